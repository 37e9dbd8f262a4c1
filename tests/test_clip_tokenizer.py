"""The retriever's text tokenizers: CLIP's, against transformers' fast one on the same files, and the run's pieces."""

import gzip
import json
import pickle
import random
import unicodedata

import numpy as np
import pytest

from cm3jax import config
from cm3jax.tokenizers import clip, text
from cm3jax.types import UserError

WORDS = """
a the red blue photograph of an old lighthouse isn't we're they've I'm she'll he'd it's
dogs' can't naïve café Straße Ĳssel İstanbul ŒUVRE señor ÅNGSTRÖM Ελληνικός ΟΔΟΣ Москва
Ёлка Україна 東京 日本語 中文字 한국어 ภาษาไทย हिन्दी বাংলা தமிழ் العربية עברית فارسی Tiếng Việt
ქართული Հայերեն አማርኛ 😀 👩‍👩‍👧‍👦 🇯🇵 ❤️ №5 ½ ² Ⅻ ٣٤ 12345 3.14 #tag @home a_b x² e\u0301
A\u030a \ufb01 \u1e9e \u01c5 «quoted» “curly” it’s — … !!! ?! $9.99 50% C++ <b> &amp; || ~
^ \\ / () [] {} 10km 4K v2.0 ' 's ''s 'S don'T
"""
BLANKS = [" ", " ", " ", "  ", "\n", "\t", "\u00a0", "\u3000", "\u2028", "", ""]


def captions(count, seed):
    """Return texts of many scripts, with odd blanks, signs and single characters of everywhere between them."""
    rng, found, out = random.Random(seed), WORDS.split(), []
    ranges = [(0x20, 0x7F), (0xA0, 0x250), (0x370, 0x600), (0x900, 0xE80), (0x2000, 0x2C00), (0x3040, 0x9FFF)]
    ranges += [(0xAC00, 0xD7A0), (0x1F300, 0x1F650)]
    for _ in range(count):
        pieces = []
        for _ in range(rng.randint(0, 12)):
            odd = chr(rng.randrange(*rng.choice(ranges)))
            pieces += [rng.choice([rng.choice(found)] * 4 + [rng.choice(found).upper(), odd]), rng.choice(BLANKS)]
        out.append("".join(pieces))
    return out


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return a folder with vocab.json and merges.txt that the library `tokenizers` has trained."""
    import tokenizers

    trained = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix=clip.LAST))
    trained.normalizer = tokenizers.normalizers.Lowercase()
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.WhitespaceSplit(), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=alphabet, end_of_word_suffix=clip.LAST, show_progress=False
    )
    trained.train_from_iterator(captions(2000, 1), trainer)
    model = json.loads(trained.to_str())["model"]
    symbols = sorted(alphabet) + [sign + clip.LAST for sign in sorted(alphabet)]
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    symbols += list(dict.fromkeys("".join(pair) for pair in merges))
    symbols = [*dict.fromkeys(symbols), clip.BEGIN, clip.END]
    return write(tmp_path_factory.mktemp("clip"), {s: i for i, s in enumerate(symbols)}, merges)


def write(folder, ids, merges):
    folder.mkdir(exist_ok=True)
    (folder / clip.VOCAB).write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / clip.MERGES).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.mark.slow  # transformers takes its time to import
def test_ids_equal_those_of_transformers_for_captions_of_mixed_scripts(files):
    import transformers

    theirs = transformers.CLIPTokenizerFast(vocab=str(files / clip.VOCAB), merges=str(files / clip.MERGES))
    single = [f"a{c}b 1{c}!{c}" for c in map(chr, range(0x3400)) if unicodedata.category(c) != "Cn"]
    ours, texts = clip.load(files), captions(12_000, 2) + single
    assert ours.begin == theirs.bos_token_id and ours.end == theirs.eos_token_id
    merged = 0
    for caption, wanted in zip(texts, theirs(texts)["input_ids"], strict=True):
        found = ours.encode(caption)
        assert [ours.begin, *found, ours.end] == wanted, ascii(caption)
        merged += len(found) < len("".join(caption.split()).encode())
    assert len(texts) >= 10_000 and merged > 5_000, "the merges were hardly used"


@pytest.fixture(scope="module")
def openai(files, tmp_path_factory):
    """Return a folder with the pairs of `files` in the form that OpenAI publishes."""
    folder = tmp_path_factory.mktemp("openai")
    lines = (files / clip.MERGES).read_text(encoding="utf-8").split("\n")[1:-1]
    with gzip.open(folder / clip.OPENAI, "wt", encoding="utf-8") as f:
        f.write("\n".join(['"bpe_simple_vocab_16e6.txt#version: 0.2', *lines]) + "\n")
    return folder


def test_openais_file_gives_the_same_pieces(files, openai):
    theirs, ours = clip.load(files), clip.load(openai)
    names, found = ({i: symbol for symbol, i in one.ids.items()} for one in (theirs, ours))
    for caption in captions(500, 3):
        assert [found[i] for i in ours.encode(caption)] == [names[i] for i in theirs.encode(caption)], ascii(caption)
    assert pickle.loads(pickle.dumps(ours)).encode("a cat") == ours.encode("a cat")


@pytest.mark.slow
def test_openais_file_is_kept_as_files_that_transformers_reads(openai, tmp_path):
    import transformers

    ours = clip.load(openai)
    for name, content in ours.files.items():
        (tmp_path / name).write_bytes(content)
    theirs = transformers.CLIPTokenizerFast(vocab=str(tmp_path / clip.VOCAB), merges=str(tmp_path / clip.MERGES))
    for caption in captions(500, 3):
        assert [ours.begin, *ours.encode(caption), ours.end] == theirs(caption)["input_ids"], ascii(caption)


def test_of_openais_pairs_as_many_count_as_make_49408_ids(tmp_path):
    """Begin and end are 49406 and 49407 in all that was published; "!" is 0, and the first pair 512."""
    pairs = [f"{a} {b}" for a in clip.SIGNS for b in clip.SIGNS][:60_000]
    with gzip.open(tmp_path / clip.OPENAI, "wt", encoding="utf-8") as f:
        f.write("\n".join(["a heading", *pairs]) + "\n")
    found = clip.load(tmp_path)
    assert (found.begin, found.end, found.rows) == (49_406, 49_407, 49_408)
    assert (found.ids["!"], found.ids["!</w>"], found.ids[pairs[0].replace(" ", "")]) == (0, 256, 512)


def test_a_damaged_file_of_openais_gives_one_clear_line(openai, tmp_path):
    (tmp_path / clip.OPENAI).write_bytes((openai / clip.OPENAI).read_bytes()[:-20])
    with pytest.raises(UserError, match="bpe_simple_vocab_16e6.txt.gz': not readable"):
        clip.load(tmp_path)


def test_words_are_letters_single_digits_contractions_and_runs_of_signs():
    assert clip.words(clip.clean("It's 42  DOGS' bones—they'LL, №2 x²!?")) == [
        *("it", "'s", "4", "2", "dogs", "'", "bones", "—", "they", "'ll", ",", "№", "2", "x", "²", "!?")
    ]
    assert clip.words("!'s") == ["!'", "s"] and clip.words("") == clip.words(" \n\u3000") == []


def test_the_earliest_merge_goes_first_and_everywhere(tmp_path):
    symbols = [
        *clip.SIGNS,
        *(s + clip.LAST for s in clip.SIGNS),
        "ab",
        "bc",
        "abab",
        "c" + clip.LAST,
        "abc" + clip.LAST,
    ]
    ids = {s: i for i, s in enumerate(dict.fromkeys([*symbols, clip.BEGIN, clip.END]))}
    found = clip.load(write(tmp_path / "x", ids, [("a", "b"), ("b", "c"), ("ab", "ab"), ("ab", "c</w>")]))
    names = {i: s for s, i in ids.items()}
    assert [names[i] for i in found.encode("ababc Abc bc")] == ["abab", "c</w>", "abc</w>", "b", "c</w>"]
    assert found.rows == len(ids)
    assert pickle.loads(pickle.dumps(found)).encode("ababc") == found.encode("ababc")


def test_names_of_begin_and_end_in_a_text_are_plain_signs(files):
    found = clip.load(files)
    assert not {found.begin, found.end} & set(found.encode(f"a {clip.END} b {clip.BEGIN}"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids, merges: ids.pop("a</w>"), r"vocab.json': lacks 'a</w>'"),
        (lambda ids, merges: ids.pop(clip.END), r"vocab.json': lacks '<\|endoftext\|>'"),
        (lambda ids, merges: ids.update(a="b"), "not an object of symbols and ids"),
        (lambda ids, merges: merges.append(("zz", "q")), "'zz q' joins no two symbols"),
        (lambda ids, merges: merges.append(("a", "b", "c")), "'a b c' joins no two symbols"),
    ],
)
def test_files_that_do_not_belong_together_give_one_clear_line(tmp_path, change, message):
    symbols = [*clip.SIGNS, *(s + clip.LAST for s in clip.SIGNS), "ab", clip.BEGIN, clip.END]
    ids, merges = {s: i for i, s in enumerate(symbols)}, [("a", "b")]
    change(ids, merges)
    with pytest.raises(UserError, match=message) as error:
        clip.load(write(tmp_path / "x", ids, merges))
    assert "\n" not in str(error.value)


def test_a_folder_without_a_tokenizer_gives_one_clear_line(tmp_path):
    with pytest.raises(UserError, match=r"no text tokenizer here \(vocab.json is missing\)"):
        clip.load(tmp_path)
    (tmp_path / clip.VOCAB).write_text("[")
    with pytest.raises(UserError, match=r"merges.txt is missing"):
        clip.load(tmp_path)
    (tmp_path / clip.MERGES).write_text("")
    with pytest.raises(UserError, match=r"vocab.json': not readable"):
        clip.load(tmp_path)


def test_a_lone_surrogate_is_refused(files):
    with pytest.raises(UserError, match="lone surrogate"):
        clip.load(files).encode("a \ud800")


def test_the_runs_own_pieces_come_before_begin_and_end(tmp_path):
    own = text.train(["a red circle", "a blue square"] * 5, 300, tmp_path / clip.PIECES, config.Text())
    found = pickle.loads(pickle.dumps(clip.load(tmp_path)))
    assert found.encode("a red square") == own.encode("a red square")
    assert (found.begin, found.end) == (own.size, own.size + 1)
    assert found.end < found.rows and found.rows % clip.MULTIPLE == 0


def test_rows_begin_end_and_are_cut_to_the_context(tmp_path):
    text.train(["abc"], 300, tmp_path / clip.PIECES, config.Text())
    found = clip.load(tmp_path)
    ids, ends = clip.arrays([[], [5, 6], [1, 2, 3, 4, 5, 6, 7]], found, 7)
    begin, end = found.begin, found.end
    wanted = [[begin, *[end] * 6], [begin, 5, 6, *[end] * 4], [begin, 1, 2, 3, 4, 5, end]]
    np.testing.assert_array_equal(ids, wanted)
    np.testing.assert_array_equal(ends, [1, 3, 6])
    assert (ids[range(3), ends] == end).all()
