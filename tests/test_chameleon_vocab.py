"""Laws of whose id is whose."""

import json

import chameleons
import checkpoints
import numpy as np
import pytest

from cm3jax import foreign
from cm3jax import vocab as vocabulary
from cm3jax.interop import chameleon_vocab
from cm3jax.types import UserError
from cm3jax.vocab import Vocab

NAMES = chameleons.vocabulary()
ORDER = chameleon_vocab.order(NAMES, chameleons.ROWS, "x")


def released():
    """Return the entries of the published tokenizer as far as they matter: its size, codes and markers."""
    names = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<eoss>": 8196, "<racm3:break>": 8197, "<image>": 8711}
    names |= {f"<reserved{i - 4:05}>": i for i in range(8198, 16384) if i != 8711}
    codes = np.random.default_rng(0).permutation(8192).tolist()
    return names | {chameleon_vocab.spelt(code): 4 + i for i, code in enumerate(codes)}


def test_every_id_has_one_place_and_back():
    assert sorted(ORDER.theirs.tolist()) == list(range(chameleons.ROWS)) == list(range(ORDER.vocab.size))
    assert ORDER.theirs[ORDER.ours].tolist() == list(range(chameleons.ROWS))


def test_codes_stand_by_the_number_in_their_names_not_by_their_ids():
    place = ORDER.theirs[ORDER.vocab.image_start :][: chameleons.CODES]
    assert place.tolist() == [NAMES[chameleon_vocab.spelt(code)] for code in range(chameleons.CODES)]
    assert place.tolist() != sorted(place.tolist())


def test_a_code_is_spelt_with_letters_for_digits():
    assert chameleon_vocab.spelt(8190) == "IMGIMGIBJAZ"
    assert chameleon_vocab.codes({"IMGIMGAZ": 9, "IMGIMGBZ": 7}, "x") == [9, 7]


def test_specials_are_theirs_of_the_same_use():
    found = dict(zip(vocabulary.SPECIALS, ORDER.theirs.tolist(), strict=False))
    wanted = {"<pad>": "<pad>", "<eod>": "</s>", "<break>": "<racm3:break>", "<eoss>": "<eoss>"}
    assert found == {ours: NAMES[theirs] for ours, theirs in wanted.items()}


def test_the_released_vocabulary_gets_cm3leons_512_sentinels_behind_the_break():
    order = chameleon_vocab.order(released(), 65536, "x")
    assert order.vocab == Vocab(text=65536 - 4 - 8192 - 512, image=8192, sentinels=512)
    assert order.theirs[order.vocab.sentinel_start : order.vocab.used].tolist() == list(range(8198, 8710))
    assert order.vocab.is_text(order.ours[[0, 3, 8710, 8711, 65535]]).all()


def test_scores_go_back_to_their_order():
    scores = np.random.default_rng(1).standard_normal((2, 3, chameleons.ROWS))
    assert np.array_equal(ORDER.back(scores[..., ORDER.theirs]), scores)


def test_an_order_is_read_as_it_was_written(tmp_path):
    chameleon_vocab.save(tmp_path / "order.json", ORDER)
    found = chameleon_vocab.load(tmp_path / "order.json")
    assert found.vocab == ORDER.vocab
    assert np.array_equal(found.theirs, ORDER.theirs)


def test_a_vocabulary_made_here_comes_back_with_its_own_codes_and_markers():
    vocab = Vocab(text=11, image=23, sentinels=5, multiple=16)
    order = chameleon_vocab.order(chameleon_vocab.own_names(vocab), vocab.size, "x")
    assert np.array_equal(chameleon_vocab.own(vocab).theirs, np.arange(vocab.size))
    image = order.theirs[order.vocab.image_start :][:23]
    assert image.tolist() == [vocab.image_start + i for i in range(23)]
    sentinels = order.theirs[order.vocab.sentinel_start : order.vocab.used]
    assert sentinels.tolist() == [vocab.sentinel(i) for i in range(5)]


def without(*gone):
    return {name: i for name, i in NAMES.items() if not name.startswith(gone)}


BROKEN = {
    "no break": (without("<racm3:break>"), "no entry '<racm3:break>'"),
    "a code short": (without("IMGIMGFZ"), "no entry 'IMGIMGFZ', of image code 5; there are 36 codes"),
    "no codes": (without("IMGIMG"), "no entry 'IMGIMGAZ', of image code 0; there are 0 codes"),
    "a code twice": (NAMES | {"IMGIMGAFZ": 5}, "two entries are image code 5, one of them 'IMGIMGAFZ'"),
    "two on one id": (NAMES | {"<eoss>": NAMES["IMGIMGAZ"]}, "entries '<eoss>' and 'IMGIMGAZ' have one id"),
    "beyond the table": (NAMES | {"far": 131}, "entry 'far' has the id 131: must be from 0 to 130"),
    "no number": (NAMES | {"odd": "7"}, "entry 'odd' has the id '7'"),
    "no sentinels": (without("<reserved"), "vocab.sentinels = 0: must be at least 1"),
}


@pytest.mark.parametrize(("names", "words"), BROKEN.values(), ids=BROKEN)
def test_a_vocabulary_that_does_not_fit_is_refused_by_the_entry(names, words):
    with pytest.raises(UserError) as e:
        chameleon_vocab.order(names, chameleons.ROWS, "config.json")
    assert str(e.value).startswith("config.json: ")
    assert words in str(e.value)


@pytest.mark.parametrize("text", ["", "[]", '{"vocab": {}, "theirs": [0, 0]}', '{"vocab": {"tex": 1}, "theirs": []}'])
def test_an_order_that_is_none_is_refused(tmp_path, text):
    path = tmp_path / "order.json"
    path.write_text(text)
    with pytest.raises(UserError, match="import the model again"):
        chameleon_vocab.load(path)


def test_a_missing_order_is_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        chameleon_vocab.load(tmp_path / "order.json")


# -------------------------------------------------------------------------------------------------- beside Meta's files


def one_code_fewer(path):
    """Take the highest code's entry out of a tokenizer.json."""
    words = json.loads(path.read_text())
    gone = chameleon_vocab.spelt(chameleons.CODES - 1)
    del words["model"]["vocab"][gone]
    words["added_tokens"] = [entry for entry in words["added_tokens"] if entry["content"] != gone]
    path.write_text(json.dumps(words))


def an_entry_beyond(path):
    words = json.loads(path.read_text())
    words["model"]["vocab"]["far"] = chameleons.ROWS_WITH_BYTES
    path.write_text(json.dumps(words))


METAS = {
    "one code fewer": (
        one_code_fewer,
        r"image tokenizer has 37 codes, its text tokenizer .*text_tokenizer\.json entries for 36",
    ),
    "an entry beyond": (an_entry_beyond, r"text_tokenizer\.json: entry 'far' has the id 352: must be from 0 to 351"),
}


@pytest.mark.parametrize(("spoil", "words"), METAS.values(), ids=METAS)
def test_a_tokenizer_of_another_model_beside_metas_files_is_refused_by_its_name(tmp_path, spoil, words):
    about = checkpoints.settings()
    tensors = checkpoints.per_process(chameleons.random_tensors(about), about, 2)
    folder = checkpoints.meta_folder(tmp_path / "meta", tensors, about, 2)
    spoil(folder / "tokenizer" / "text_tokenizer.json")
    with pytest.raises(UserError, match=words) as e:
        foreign.bring(str(folder), str(tmp_path / "run"), resolution=8, say=lambda line: None)
    assert "\n" not in str(e.value)
    assert [path.name for path in tmp_path.iterdir()] == ["meta"], "nothing is written"
