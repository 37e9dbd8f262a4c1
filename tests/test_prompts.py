"""Every prompt kind is a prefix of what masking really yields, and common in training (arXiv 2309.02591 §2.2)."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from cm3jax.config import DecoderStage, Mask, Packing, Training
from cm3jax.data import pipeline, tokens
from cm3jax.objectives import causal_mask
from cm3jax.tokenizers import document, text
from cm3jax.types import UserError
from cm3jax.vocab import BREAK, EOD, EOSS, Vocab

VOCAB = Vocab(text=320, image=19, sentinels=11, multiple=7)
words = st.lists(st.sampled_from(["a", "red", "blue", "circle", "\u2581", "\u00e9"]), min_size=1, max_size=7).map(
    " ".join
)
pictures = st.lists(st.integers(0, VOCAB.image - 1), min_size=1, max_size=16).map(lambda c: np.array(c, np.uint16))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return text.train(["a red circle", "a blue square"], 300, tmp_path_factory.mktemp("text") / "tokenizer.model")


def framed(parts, tokenizer):
    return np.array([EOD, *document.encode(parts, tokenizer, VOCAB), EOD], np.uint16)


def masked(ids, *spans):
    return causal_mask.mask(ids, np.array(spans, np.int64).reshape(-1, 2), VOCAB)


def begins(ids, prompt, answer=()):
    """Tell whether a masked document is the prompt, then the answer, then whatever."""
    whole = [*prompt, *answer]
    return ids[: len(whole)].tolist() == [int(i) for i in whole]


def allowed(ids, *spans):
    """Tell whether each span lies in one stretch, as the law has it."""
    return all(any(a <= s and e <= b for a, b in causal_mask.stretches(ids)) and s < e for s, e in spans)


@given(words, pictures)
def test_text_to_image_is_a_prefix_of_the_unmasked_pair(tokenizer, caption, codes):
    prompt = document.text_to_image(caption, tokenizer, VOCAB)
    ids = framed([caption, codes], tokenizer)
    assert begins(ids, prompt.ids, [*document.image_ids(codes, VOCAB), EOD])
    assert (prompt.produces, prompt.stop) == ("image", EOD)


@given(words, pictures)
def test_the_unconditional_prompt_is_a_prefix_of_the_pair_without_its_caption(tokenizer, caption, codes):
    ids = framed([caption, codes], tokenizer)
    whole = causal_mask.stretches(ids)[0]
    prompt = document.unconditional(VOCAB)
    assert begins(masked(ids, whole), prompt.ids, [*document.image_ids(codes, VOCAB), EOD])
    assert np.array_equal(document.text_to_image(caption, tokenizer, VOCAB).unconditional, prompt.ids)


@given(words, pictures)
def test_image_to_text_is_a_prefix_of_the_pair_without_its_caption(tokenizer, caption, codes):
    ids, prompt = framed([caption, codes], tokenizer), document.image_to_text(codes, VOCAB)
    caption_span, picture_span = causal_mask.stretches(ids)
    answer = [*document.text_ids(caption, tokenizer, VOCAB), EOSS]
    assert begins(masked(ids, caption_span), prompt.ids, answer) and prompt.stop == EOSS
    assert begins(masked(ids, caption_span, picture_span), prompt.unconditional, answer)


@given(words, words, words, pictures)
def test_infill_text_is_a_prefix_of_the_pair_without_those_words(tokenizer, before, words, after, codes):
    pieces = [document.text_ids(x, tokenizer, VOCAB) for x in (before, words, " " + after)]
    ids = np.array([EOD, *np.concatenate(pieces), BREAK, *document.image_ids(codes, VOCAB), EOD], np.uint16)
    start = 1 + len(pieces[0])
    span = (start, start + len(pieces[1]))
    prompt = document.infill_text(before, " " + after, codes, tokenizer, VOCAB)
    assert allowed(ids, span) and begins(masked(ids, span), prompt.ids, [*pieces[1], EOSS])
    assert begins(masked(ids, *causal_mask.stretches(ids)), prompt.unconditional)


def test_infilling_a_whole_caption_is_captioning(tokenizer):
    codes = np.arange(4, dtype=np.uint16)
    assert document.infill_text("", "", codes, tokenizer, VOCAB).kind == "image_to_text"


@given(words, pictures, st.data())
def test_infill_image_is_a_prefix_of_the_pair_without_that_stretch(tokenizer, caption, codes, data):
    region = np.zeros(len(codes), bool)
    region[data.draw(st.lists(st.integers(0, len(codes) - 1), min_size=1))] = True
    prompt = document.infill_image(caption, codes, region, tokenizer, VOCAB)
    ids = framed([caption, codes], tokenizer)
    start = causal_mask.stretches(ids)[1][0]
    first, last = np.flatnonzero(region)[[0, -1]]
    span = (start + first, start + last + 1)
    answer = document.image_ids(codes, VOCAB)[first : last + 1]
    assert allowed(ids, span) and begins(masked(ids, span), prompt.ids, [*answer, EOSS])
    assert np.array_equal(prompt.known, np.where(region[first : last + 1], -1, answer.astype(int)))
    # the unconditional stream draws the same codes in place
    assert begins(masked(ids, causal_mask.stretches(ids)[0]), prompt.unconditional, answer)


@given(st.lists(st.one_of(words, pictures), max_size=5), st.booleans())
def test_a_continuation_is_a_prefix_of_the_longer_document(tokenizer, parts, closed):
    prompt = document.continuation(parts, tokenizer, VOCAB, closed)
    ids = framed([*parts, "a circle"], tokenizer)
    assert begins(ids, prompt.ids)
    done = len(parts) - (not closed)
    whole = causal_mask.stretches(ids)[: max(0, done)]
    texts = [s for s, part in zip(whole, parts, strict=False) if isinstance(part, str)]
    assert begins(masked(ids, *texts), prompt.unconditional)


@pytest.mark.parametrize("region", [np.zeros(4, bool), np.ones(5, bool)])
def test_a_region_that_marks_no_code_is_refused(tokenizer, region):
    with pytest.raises(UserError, match="must mark one of 4 codes"):
        document.infill_image("a", np.arange(4), region, tokenizer, VOCAB)


@given(words, pictures, st.integers(0, 2**32 - 1))
def test_what_masking_yields_is_named_by_the_prompts_that_begin_it(tokenizer, caption, codes, seed):
    ids = framed([caption, codes], tokenizer)
    spans = causal_mask.spans(ids, VOCAB, Mask(spans=1.5), np.random.default_rng(seed))
    row = masked(ids, *spans)
    found = document.kinds(row, VOCAB)
    assert ("text_to_image" in found) == begins(
        row, [*document.text_to_image(caption, tokenizer, VOCAB).ids], ids[-len(codes) - 1 :]
    )
    assert ("unconditional" in found) == begins(row, document.unconditional(VOCAB).ids, ids[-len(codes) - 1 :])
    assert ("image_to_text" in found) == begins(row, document.image_to_text(codes, VOCAB).ids)
    assert ("continuation" in found) == (len(spans) == 0)


# --------------------------------------------------------------------------------------------------------- frequencies


def corpus(tmp_path, vocab, count, text_lengths, image):
    rng = np.random.default_rng(0)

    def pair():
        words = rng.integers(vocab.text_start, vocab.image_start, rng.integers(*text_lengths))
        codes = rng.integers(vocab.image_start, vocab.sentinel_start, image)
        return np.concatenate([words, [BREAK], codes]).astype(np.uint16)

    tokens.write(tmp_path, "train", ((str(i), pair()) for i in range(count)))
    return tokens.Tokens(tmp_path, "train")


def test_every_prompt_kind_is_common_in_the_quickstart_s_rows(tmp_path):
    stage = DecoderStage(packing=Packing("whole", 160, documents=1), training=Training(batch=1))
    data = corpus(tmp_path, VOCAB, 200, (20, 60), 64)
    found = pipeline.prompt_frequencies(data, stage, VOCAB, 1500)
    some = pipeline.prompt_frequencies(data, stage, VOCAB, 200)
    assert some == pipeline.prompt_frequencies(data, stage, VOCAB, 200, literal=True)  # one document: no difference
    assert min(found.values()) >= 0.02, found
    assert abs(found["continuation"] - 0.37) < 0.04 and abs(found["image_to_text"] - 0.092) < 0.02


def test_rotation_makes_whole_captions_common_in_the_paper_s_rows(tmp_path):
    vocab = Vocab()
    data = corpus(tmp_path, vocab, 300, (10, 11), 1024)
    found = {}
    for rotate in (0.0, 0.5):
        stage = DecoderStage(packing=Packing("chop", 4096), mask=Mask(rotate=rotate), training=Training(batch=1))
        found[rotate] = pipeline.prompt_frequencies(data, stage, vocab, 500)
    assert found[0.0]["image_to_text"] < 0.003
    assert all(found[0.5][kind] > 0.1 for kind in ("text_to_image", "unconditional", "image_to_text", "infill_image"))
