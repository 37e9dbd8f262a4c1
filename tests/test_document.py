import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from cm3jax.tokenizers import document, text
from cm3jax.types import UserError
from cm3jax.vocab import BREAK, EOD, EOSS, Vocab

VOCAB = Vocab(text=320, image=19, sentinels=11, multiple=7)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
pictures = st.lists(st.integers(0, VOCAB.image - 1), min_size=1, max_size=9).map(lambda c: np.array(c, np.uint16))
documents = st.lists(st.one_of(texts, pictures), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return text.train(["a red circle", "a blue square"], 300, tmp_path_factory.mktemp("text") / "tokenizer.model")


def same(a, b):
    return type(a) is type(b) and np.array_equal(a, b)


@given(documents, st.booleans())
def test_any_interleaving_of_parts_comes_back(tokenizer, parts, framed):
    ids = document.encode(parts, tokenizer, VOCAB)
    assert ids.dtype == np.uint16
    found = document.decode(np.array([EOD, *ids, EOD]) if framed else ids, tokenizer, VOCAB)
    assert len(found) == len(parts) and all(map(same, found, parts))


@given(documents)
def test_a_document_is_its_parts_joined_by_breaks(tokenizer, parts):
    ids = document.encode(parts, tokenizer, VOCAB)
    assert (ids == BREAK).sum() == len(parts) - 1 and not np.isin(ids, [EOD, EOSS]).any()
    assert VOCAB.is_image(ids).sum() == sum(len(p) for p in parts if not isinstance(p, str))


def test_text_entries_that_the_tokenizer_does_not_fill_read_as_replacement_characters(tokenizer):
    unused = VOCAB.text_start + VOCAB.text - 1
    ids = [unused, *document.text_ids("a red", tokenizer, VOCAB), unused, unused]
    assert document.decode(np.array(ids), tokenizer, VOCAB) == ["\ufffda red\ufffd\ufffd"]


@pytest.mark.parametrize("wrong", [VOCAB.image_start, VOCAB.sentinel(0), EOSS, EOD])
def test_a_part_that_mixes_text_with_something_else_is_refused(tokenizer, wrong):
    with pytest.raises(ValueError, match="in a text part"):
        document.decode(np.array([VOCAB.text_start + 3, wrong, VOCAB.text_start + 3]), tokenizer, VOCAB)


@pytest.mark.parametrize(
    "parts, message",
    [
        ([], "without parts"),
        (["a", np.zeros(0, np.uint16)], "shape"),
        ([np.zeros((2, 2), np.uint16)], "shape"),
        ([np.array([0.5])], "float"),
        ([np.array([19])], "0 to vocab.image - 1 = 18"),
        ([np.array([-1])], "0 to vocab.image - 1 = 18"),
        (["\ud800"], "lone surrogate"),
    ],
)
def test_a_document_that_cannot_be_written_is_refused_in_one_line(tokenizer, parts, message):
    with pytest.raises(UserError, match=message):
        document.encode(parts, tokenizer, VOCAB)


def test_a_tokenizer_larger_than_its_range_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"vocab.text = 260: .*raise"):
        document.encode(["a"], tokenizer, Vocab(text=260, image=19, sentinels=3))
