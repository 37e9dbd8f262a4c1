import pickle
import random

import hypothesis.strategies as st
import pytest
from hypothesis import example, given

import cm3jax.config as config
from cm3jax.tokenizers import text
from cm3jax.types import UserError

WORDS = ["a", "red", "blue", "green", "small", "large", "circle", "square", "triangle", "on", "the", "left", "above"]
CAPTIONS = [" ".join(random.Random(i).choices(WORDS, k=9)) + ", on grey." for i in range(300)]
unicode = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
awkward = st.text(st.sampled_from("\0\n\r\t \u2581\u2585\u2047\ufeff\ufffd\u00a0\U0001f600e\u0301<0x41>a"), max_size=20)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return text.train(CAPTIONS, 512, tmp_path_factory.mktemp("text") / "tokenizer.model")


@given(st.one_of(unicode, awkward))
@example("")
@example("\0a\0")
@example(" \u2581 \u2581\u2581a")
@example("a red\u2581circle \U0001f9d1\u200d\U0001f680\n\n")
def test_any_valid_unicode_comes_back_exactly(tokenizer, string):
    ids = tokenizer.encode(string)
    assert tokenizer.decode(ids) == string
    assert all(0 <= i < tokenizer.size for i in ids)


def test_u2581_is_written_as_its_three_bytes(tokenizer):
    assert [tokenizer._bytes[i] for i in tokenizer.encode("\u2581")] == [b"\xe2", b"\x96", b"\x81"]


def test_common_words_are_single_pieces(tokenizer):
    assert len(tokenizer.encode("small red circle above large blue square")) <= 8


def test_the_size_is_a_cap_that_a_small_corpus_does_not_fill(tmp_path):
    few = text.train(["a red circle"] * 5, 5000, tmp_path / "few.model")
    assert 258 <= few.size < 300
    assert text.train(CAPTIONS, 300, tmp_path / "cut.model").size <= 300


def test_more_characters_than_entries_leave_the_rare_ones_to_bytes(tmp_path):
    corpus = ["".join(chr(0x4E00 + i) for i in range(start, start + 40)) for start in range(0, 4000, 40)]
    model = text.train(corpus, 512, tmp_path / "cjk.model")
    assert model.size <= 512
    assert all(model.decode(model.encode(line)) == line for line in corpus)


def test_training_is_deterministic(tmp_path):
    paths = [tmp_path / name for name in "ab"]
    for path in paths:
        text.train(iter(CAPTIONS), 400, path, config.Text(sample=100))
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_sample_is_seeded_and_never_larger_than_asked():
    assert text.sample(CAPTIONS, 10, 0) == text.sample(iter(CAPTIONS), 10, 0) != text.sample(CAPTIONS, 10, 1)
    assert len(text.sample(CAPTIONS, 10, 0)) == 10 and text.sample(CAPTIONS, 1000, 0) == CAPTIONS


@given(unicode, unicode, st.integers(0xD800, 0xDFFF))
def test_a_lone_surrogate_gets_one_clear_line(tokenizer, before, after, surrogate):
    with pytest.raises(UserError, match=r"lone surrogate U\+D[89A-F]") as error:
        tokenizer.encode(before + chr(surrogate) + after)
    assert len(str(error.value).splitlines()) == 1
    str(error.value).encode()


def test_bytes_that_are_no_text_become_replacement_characters(tokenizer):
    euro = tokenizer.encode("\u20ac")
    assert tokenizer.decode(euro[:1]) == "\ufffd"


@pytest.mark.parametrize("ids", [[-1], [512]])
def test_an_id_that_is_no_piece_is_refused(tokenizer, ids):
    with pytest.raises(ValueError, match="piece ids"):
        tokenizer.decode(ids)


@pytest.mark.parametrize(
    "texts, size, message",
    [
        (["a"], 257, "vocab.text = 257"),
        ([], 512, "no text"),
        (["", "\u2581"], 512, "no text"),
        (["\ud800"], 512, "lone"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_in_one_line(tmp_path, texts, size, message):
    with pytest.raises(UserError, match=message):
        text.train(texts, size, tmp_path / "t.model")
    assert not list(tmp_path.iterdir())


def test_a_missing_or_broken_model_file_is_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        text.Tokenizer(tmp_path / "none.model")
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="not a sentencepiece model"):
        text.Tokenizer(tmp_path / "bad.model")


def test_the_rarest_characters_get_no_piece_of_their_own():
    assert text.rare(["aaaaaaaab", "aaaaaaaaac"], 1000, 0.85) == {"b", "c"}
    assert text.rare(["ab"], 1000, 1.0) == set()
    assert text.rare(["aab"], 258, 1.0) == {"b"}
    assert text.cut(["a\0b", "\u2581c", "cxc"], {"x"}) == ["a", "b", "c", "c", "c"]


def test_a_copy_in_another_process_reads_the_same(tokenizer):
    copied = pickle.loads(pickle.dumps(tokenizer))
    assert copied.size == tokenizer.size and copied.encode(CAPTIONS[0]) == tokenizer.encode(CAPTIONS[0])
