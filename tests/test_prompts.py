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
others = st.lists(st.tuples(words, pictures), max_size=3)
"""Retrieved pairs."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return text.train(["a red circle", "a blue square"], 300, tmp_path_factory.mktemp("text") / "tokenizer.model")


def framed(parts, tokenizer):
    return np.array([EOD, *document.encode(parts, tokenizer, VOCAB), EOD], np.uint16)


def shown(pairs, tokenizer):
    """Return the ids of retrieved pairs, one by one."""
    return [document.encode(pair, tokenizer, VOCAB) for pair in pairs]


def masked(ids, *spans):
    return causal_mask.mask(ids, np.array(spans, np.int64).reshape(-1, 2), VOCAB)


def begins(ids, prompt, answer=()):
    """Tell whether a masked document is the prompt, then the answer, then whatever."""
    whole = [*prompt, *answer]
    return ids[: len(whole)].tolist() == [int(i) for i in whole]


def allowed(ids, *spans):
    """Tell whether each span lies in one stretch, as the law has it."""
    return all(any(a <= s and e <= b for a, b in causal_mask.stretches(ids)) and s < e for s, e in spans)


@given(words, pictures, others)
def test_text_to_image_is_a_prefix_of_the_unmasked_pair(tokenizer, caption, codes, pairs):
    prompt = document.text_to_image(caption, tokenizer, VOCAB, shown(pairs, tokenizer))
    ids = framed([*sum(pairs, ()), caption, codes], tokenizer)
    assert begins(ids, prompt.ids, [*document.image_ids(codes, VOCAB), EOD])
    assert (prompt.produces, prompt.stop) == ("image", EOD)


@given(words, pictures, others)
def test_the_unconditional_prompt_is_a_prefix_of_the_pair_without_its_caption(tokenizer, caption, codes, pairs):
    """Retrieved documents stay in the stream of guidance; the query's text goes."""
    ids = framed([*sum(pairs, ()), caption, codes], tokenizer)
    prompt = document.text_to_image(caption, tokenizer, VOCAB, shown(pairs, tokenizer))
    row = masked(ids, causal_mask.stretches(ids)[-2])
    assert begins(row, prompt.unconditional, [*document.image_ids(codes, VOCAB), EOD])
    plain = document.text_to_image(caption, tokenizer, VOCAB).unconditional
    assert np.array_equal(plain, document.unconditional(VOCAB).ids)


@given(words, pictures, others)
def test_image_to_text_is_a_prefix_of_the_pair_without_its_caption(tokenizer, caption, codes, pairs):
    ids = framed([*sum(pairs, ()), caption, codes], tokenizer)
    prompt = document.image_to_text(codes, VOCAB, shown(pairs, tokenizer))
    caption_span, picture_span = causal_mask.stretches(ids)[-2:]
    answer = [*document.text_ids(caption, tokenizer, VOCAB), EOSS]
    assert begins(masked(ids, caption_span), prompt.ids, answer) and prompt.stop == EOSS
    assert begins(masked(ids, caption_span, picture_span), prompt.unconditional, answer)


@given(words, words, words, pictures, others)
def test_infill_text_is_a_prefix_of_the_pair_without_those_words(tokenizer, before, words, after, codes, pairs):
    pieces, first = [document.text_ids(x, tokenizer, VOCAB) for x in (before, words, " " + after)], [EOD]
    first += [i for found in shown(pairs, tokenizer) for i in (*found.tolist(), BREAK)]
    ids = np.array([*first, *np.concatenate(pieces), BREAK, *document.image_ids(codes, VOCAB), EOD], np.uint16)
    start = len(first) + len(pieces[0])
    span = (start, start + len(pieces[1]))
    prompt = document.infill_text(before, " " + after, codes, tokenizer, VOCAB, shown(pairs, tokenizer))
    assert allowed(ids, span) and begins(masked(ids, span), prompt.ids, [*pieces[1], EOSS])
    assert begins(masked(ids, *causal_mask.stretches(ids)[-2:]), prompt.unconditional)


def test_infilling_a_whole_caption_is_captioning(tokenizer):
    codes = np.arange(4, dtype=np.uint16)
    assert document.infill_text("", "", codes, tokenizer, VOCAB).kind == "image_to_text"


@given(words, pictures, others, st.data())
def test_infill_image_is_a_prefix_of_the_pair_without_that_stretch(tokenizer, caption, codes, pairs, data):
    region = np.zeros(len(codes), bool)
    region[data.draw(st.lists(st.integers(0, len(codes) - 1), min_size=1))] = True
    prompt = document.infill_image(caption, codes, region, tokenizer, VOCAB, shown(pairs, tokenizer))
    ids = framed([*sum(pairs, ()), caption, codes], tokenizer)
    start = causal_mask.stretches(ids)[-1][0]
    first, last = np.flatnonzero(region)[[0, -1]]
    span = (start + first, start + last + 1)
    answer = document.image_ids(codes, VOCAB)[first : last + 1]
    assert allowed(ids, span) and begins(masked(ids, span), prompt.ids, [*answer, EOSS])
    assert np.array_equal(prompt.known, np.where(region[first : last + 1], -1, answer.astype(int)))
    # the unconditional stream draws the same codes in place
    assert begins(masked(ids, causal_mask.stretches(ids)[-2]), prompt.unconditional, answer)


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


@given(words, pictures, others, st.integers(0, 2**32 - 1))
def test_what_masking_yields_is_named_by_the_prompts_that_begin_it(tokenizer, caption, codes, pairs, seed):
    ids, before = framed([*sum(pairs, ()), caption, codes], tokenizer), shown(pairs, tokenizer)
    spans = causal_mask.spans(ids, VOCAB, Mask(spans=1.5), np.random.default_rng(seed))
    row = masked(ids, *spans)
    found = document.kinds(row, VOCAB)
    prompt = document.text_to_image(caption, tokenizer, VOCAB, before)
    assert ("text_to_image" in found) == begins(row, prompt.ids, ids[-len(codes) - 1 :])
    assert ("unconditional" in found) == begins(row, prompt.unconditional, ids[-len(codes) - 1 :])
    assert ("image_to_text" in found) == begins(row, document.image_to_text(codes, VOCAB, before).ids)
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
