import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from cm3jax.vocab import SPECIALS, Vocab

SMALL = Vocab(text=300, image=17, sentinels=5, multiple=7)
sizes = st.builds(
    Vocab,
    text=st.integers(1, 3000),
    image=st.integers(1, 3000),
    sentinels=st.integers(2, 600),
    multiple=st.sampled_from([1, 7, 128, 256]),
)


def test_defaults_are_the_paper_s_sizes_and_fit_uint16():
    vocab = Vocab()
    assert (vocab.text, vocab.image, vocab.sentinels) == (56320, 8192, 512)
    assert vocab.used == 4 + 56320 + 8192 + 512 and vocab.size == 65280 and vocab.size % 256 == 0


@given(sizes)
def test_id_ranges_tile_the_vocabulary(vocab):
    ids = np.arange(vocab.size)
    classes = np.stack(
        [ids < len(SPECIALS), vocab.is_text(ids), vocab.is_image(ids), vocab.is_sentinel(ids), ids >= vocab.used]
    )
    assert (classes.sum(axis=0) == 1).all()
    assert classes.sum(axis=1)[:4].tolist() == [4, vocab.text, vocab.image, vocab.sentinels]
    assert classes[4].sum() < vocab.multiple and vocab.size % vocab.multiple == 0


def test_every_id_has_its_own_name():
    names = [SMALL.name(i) for i in range(SMALL.size)]
    assert len(set(names)) == SMALL.size
    assert names[2] == "<break>" and names[4] == "text:0" and names[304] == "image:0"
    assert names[SMALL.sentinel(4)] == "<sentinel:4>" and names[-1].startswith("unused:")


@pytest.mark.parametrize("i", [-1, 5])
def test_a_sentinel_out_of_range_is_refused(i):
    with pytest.raises(ValueError, match="sentinels 0 to 4"):
        SMALL.sentinel(i)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"text": 0}, "vocab.text = 0"),
        ({"image": -1}, "vocab.image = -1"),
        ({"sentinels": 1}, "at least 2"),
        ({"text": 60000}, "65536"),
    ],
)
def test_sizes_that_cannot_work_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        Vocab(**sizes)
