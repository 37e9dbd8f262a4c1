"""Tokenizers of released models: ids are those of their tokenizer.json, in the order of ours."""

import json
import pickle

import chameleons
import hypothesis.strategies as st
import pytest
import tokenizers
from hypothesis import example, given

from cm3jax.interop import chameleon_vocab
from cm3jax.tokenizers import document, text
from cm3jax.types import UserError

unicode = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    about = chameleons.words()
    (folder / text.PUBLISHED).write_text(json.dumps(about))
    order = chameleon_vocab.order(about["model"]["vocab"], chameleons.ROWS_WITH_BYTES, "tokenizer.json")
    chameleon_vocab.save(folder / text.ORDER, order)
    theirs = tokenizers.Tokenizer.from_file(str(folder / text.PUBLISHED))
    theirs.no_truncation()
    return text.load(folder), order, theirs


@given(unicode)
@example("")
@example("a cat, cats and a dog\n\u2581 \U0001f680")
def test_ids_are_those_of_the_checkpoints_own_tokenizer(made, string):
    ours, order, theirs = made
    if any(name in string for name in theirs.get_vocab() if len(name) > 3 and name.startswith(("<", "IMG"))):
        return
    ids = document.text_ids(string, ours, order.vocab)
    assert order.theirs[ids.astype(int)].tolist() == theirs.encode(string, add_special_tokens=False).ids
    assert ours.decode(ours.encode(string)) == theirs.decode(theirs.encode(string).ids, skip_special_tokens=False)


def test_text_comes_back(made):
    for string in ("a red cat", "  two  blanks ", "caf\u00e9 \U0001f680", "CATS"):
        assert made[0].decode(made[0].encode(string)) == string


def test_merges_are_used_and_long_texts_are_not_cut(made):
    ours, order, theirs = made
    assert len(ours.encode(" cat cat cat cat cat cat cat")) == 7
    assert [theirs.id_to_token(int(order.theirs[order.vocab.text_start + i])) for i in ours.encode(" cat")] == [
        "\u2581cat"
    ]


def test_every_entry_has_our_id(made):
    ours, order, theirs = made
    for name, i in theirs.get_vocab().items():
        assert order.theirs[ours.id(name)] == i
    assert ours.id(chameleon_vocab.spelt(5)) == order.vocab.image_start + 5
    with pytest.raises(UserError, match="no entry '<nothing>'"):
        ours.id("<nothing>")


@pytest.mark.parametrize("marker", ["<eoss>", "</s>", chameleon_vocab.spelt(3), "<reserved08195>"])
def test_the_name_of_a_marker_is_no_text(made, marker):
    with pytest.raises(UserError, match=f"holds '{marker}'"):
        made[0].encode(f"a {marker} cat")


def test_ids_without_an_entry_are_told(made):
    ours, order, theirs = made
    unnamed = sorted(set(range(chameleons.ROWS_WITH_BYTES)) - set(theirs.get_vocab().values()))
    assert len(unnamed) >= 3
    hole = int(order.ours[unnamed[0]]) - order.vocab.text_start
    cat = ours.encode(" cat")
    assert ours.decode([*cat, hole, hole, *cat]) == " cat\ufffd\ufffd cat"
    with pytest.raises(ValueError, match="must be 0 to"):
        ours.decode([ours.size])


def test_a_worker_gets_the_same_tokenizer(made):
    again = pickle.loads(pickle.dumps(made[0]))
    assert again.encode("a cat") == made[0].encode("a cat")


def test_files_that_are_none_are_refused(made, tmp_path):
    (tmp_path / text.PUBLISHED).write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json': not one of the `tokenizers` library"):
        text.load(tmp_path)
    (tmp_path / text.PUBLISHED).write_bytes(made[0].path.read_bytes())
    with pytest.raises(UserError, match=r"order\.json': not readable"):
        text.load(tmp_path)
    few = chameleon_vocab.own(chameleon_vocab.Vocab(100, 30, 10, 1))
    chameleon_vocab.save(tmp_path / text.ORDER, few)
    with pytest.raises(UserError, match="has the id 351, but order.json is of 144 ids"):
        text.load(tmp_path)
