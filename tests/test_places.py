"""Fixed places: what a picture's code or a moved span's token has for a position (see `objectives.places`)."""

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from cm3jax.config import Mask, Packing
from cm3jax.data import packing
from cm3jax.objectives import causal_mask, places
from cm3jax.sample import decode
from cm3jax.tokenizers import document, text
from cm3jax.vocab import BREAK, EOD, EOSS, Vocab

VOCAB = Vocab(text=320, image=19, sentinels=11, multiple=7)
CODES, LENGTH = 6, 97
FIRST = LENGTH - CODES
SETTINGS = Packing(kind="whole", length=LENGTH, picture=CODES)
RETRIEVING = Packing(kind="whole", length=199, picture=CODES)
words = st.lists(st.sampled_from(["a", "red", "blue", "circle", "\u00e9"]), min_size=1, max_size=5).map(" ".join)
pictures = st.lists(st.integers(0, VOCAB.image - 1), min_size=CODES, max_size=CODES).map(np.uint16)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return text.train(["a red circle", "a blue square"], 300, tmp_path_factory.mktemp("text") / "tokenizer.model")


def framed(parts, tokenizer):
    return np.array([EOD, *document.encode(parts, tokenizer, VOCAB), EOD], np.uint16)


def trained(ids, spans):
    """Return (ids, positions) of a document as training shows it with these spans moved."""
    spans = np.array(spans, np.int64).reshape(-1, 2)
    row = packing.masked(ids, np.ones(len(ids), np.int32), spans, VOCAB, SETTINGS)
    n = len(row[0])
    return row[0], packing.arrays([row], VOCAB, SETTINGS)["positions"][0, :n]


@given(words, pictures, st.integers(0, 2**32 - 1))
def test_every_code_has_its_place_masked_or_not_and_however_long_the_caption(tokenizer, caption, codes, seed):
    ids = framed([caption, codes], tokenizer)
    spans = causal_mask.spans(ids, VOCAB, Mask(spans=2.0, rotate=0.2), np.random.default_rng(seed), 8)
    row, positions = trained(ids, spans)
    image = VOCAB.is_image(row)
    assert dict(zip(positions[image].tolist(), row[image].tolist(), strict=True)) == {
        FIRST + k: VOCAB.image_start + int(code) for k, code in enumerate(codes)
    }


@given(words, pictures, st.integers(0, 2**32 - 1))
def test_a_moved_span_goes_on_from_its_sentinel_and_nothing_else_jumps(tokenizer, caption, codes, seed):
    ids = framed([caption, codes, caption], tokenizer)
    spans = causal_mask.spans(ids, VOCAB, Mask(spans=2.0, rotate=0.0), np.random.default_rng(seed), 8)
    row, positions = trained(ids, spans)
    at = np.flatnonzero(VOCAB.is_sentinel(row))
    there, here = at[: len(spans)], at[len(spans) :]
    assert positions[there].tolist() == positions[here].tolist()
    ends = [*here[1:], len(row)] if len(here) else []
    for start, end in zip(here, ends, strict=True):
        assert np.diff(positions[start:end]).tolist() == [1] * (end - start - 1)
    body = slice(0, here[0] if len(here) else len(row))
    plain = ~VOCAB.is_image(row[body])
    plain[there[VOCAB.is_image(ids[spans[:, 0]])]] = False
    assert positions[body][plain].tolist() == list(range(plain.sum()))


def prompts(tokenizer, caption, codes, region, gap):
    """Yield (prompt, spans that training would move, the answer)."""
    ids, image = framed([caption, codes], tokenizer), document.image_ids(codes, VOCAB)
    t, i = causal_mask.stretches(ids)
    first, last = i[0] + region[0], i[0] + region[1] + 1
    mask = np.zeros(CODES, bool)
    mask[region[0] : region[1] + 1] = True
    pieces = [document.text_ids(x, tokenizer, VOCAB) for x in gap]
    split = np.array([EOD, *np.concatenate(pieces), BREAK, *image, EOD], np.uint16)
    start = 1 + len(pieces[0])
    hole = (start, start + len(pieces[1]))
    yield ids, document.text_to_image(caption, tokenizer, VOCAB), [], [*image, EOD]
    yield ids, document.unconditional(VOCAB), [t], [*image, EOD]
    yield ids, document.image_to_text(codes, VOCAB), [t], [*ids[slice(*t)], EOSS]
    yield ids, document.infill_image(caption, codes, mask, tokenizer, VOCAB), [(first, last)], ids[first:last]
    yield split, document.infill_text(gap[0], gap[2], codes, tokenizer, VOCAB), [hole], [*pieces[1], EOSS]
    yield ids, document.continuation([caption], tokenizer, VOCAB, closed=True), [], [*image, EOD]
    yield ids, document.continuation([caption, codes], tokenizer, VOCAB), [], [EOD]


@settings(max_examples=20)
@given(words, pictures, st.tuples(st.integers(0, CODES - 1), st.integers(0, CODES - 1)), st.tuples(words, words, words))
def test_prompts_and_what_is_drawn_after_them_have_the_places_of_training(tokenizer, caption, codes, region, gap):
    region, gap = tuple(sorted(region)), (gap[0], gap[1], " " + gap[2])
    for ids, prompt, spans, answer in prompts(tokenizer, caption, codes, region, gap):
        row, expected = trained(ids, spans)
        n = len(prompt.ids)
        assert row[: n + len(answer)].tolist() == [*prompt.ids.tolist(), *map(int, answer)], prompt.kind
        padded = decode.pad([[prompt.ids]], n + 3, [[prompt.hidden]], VOCAB, FIRST)
        assert padded.positions[0, 0, 3:].tolist() == expected[:n].tolist(), prompt.kind
        following, found = jnp.asarray(padded.following[0]), []
        for token in answer:
            place, following = decode._advance(jnp.array([int(token)]), following, FIRST, VOCAB)
            found.append(int(place[0]))
        assert found == expected[n : n + len(answer)].tolist(), prompt.kind


@settings(max_examples=40)
@given(st.lists(st.tuples(words, pictures), min_size=1, max_size=4), st.integers(0, 2**32 - 1))
def test_each_picture_retrieved_has_places_of_its_own_that_do_not_depend_on_how_many_stand_before(
    tokenizer, pairs, seed
):
    """The picture k pictures before the query's lies k pictures before it among the places, masked or not."""
    parts = [part for pair in pairs for part in pair]
    ids = framed(parts, tokenizer)
    shown = np.zeros(len(ids), bool)
    shown[1 : len(ids) - 1 - len(document.encode(pairs[-1], tokenizer, VOCAB))] = True
    spans = causal_mask.spans(ids, VOCAB, Mask(spans=2.0, rotate=0.2), np.random.default_rng(seed), 8)
    row = packing.masked(ids, np.ones(len(ids), np.int32), spans, VOCAB, RETRIEVING, shown)
    positions = packing.arrays([row], VOCAB, RETRIEVING)["positions"][0, : len(row[0])]
    image = VOCAB.is_image(row[0])
    assert dict(zip(positions[image].tolist(), row[0][image].tolist(), strict=True)) == {
        RETRIEVING.length - (len(pairs) - i) * CODES + k: VOCAB.image_start + int(code)
        for i, (_, codes) in enumerate(pairs)
        for k, code in enumerate(codes)
    }
    if not len(spans):
        assert positions[~image].tolist() == list(range((~image).sum()))


@given(words, pictures)
def test_unconditional_prompts_have_the_places_of_training(tokenizer, caption, codes):
    ids = framed([caption, codes], tokenizer)
    stretches = causal_mask.stretches(ids)
    for prompt, spans in (
        (document.text_to_image(caption, tokenizer, VOCAB), stretches[:1]),
        (document.image_to_text(codes, VOCAB), stretches),
    ):
        row, expected = trained(ids, spans)
        n = len(prompt.unconditional)
        assert row[:n].tolist() == prompt.unconditional.tolist()
        found = places.places(prompt.unconditional, prompt.unconditional_hidden, VOCAB, FIRST)
        assert found.tolist() == expected[:n].tolist()


def test_with_isolate_every_document_has_the_places_that_it_has_alone(tokenizer):
    rng = np.random.default_rng(0)
    isolated = Packing(kind="whole", length=LENGTH, picture=CODES, isolate=True)
    for _ in range(30):
        alone = [framed([" ".join(["red"] * n), rng.integers(0, 19, CODES)], tokenizer) for n in (1, 2)]
        ids, owner = np.concatenate(alone), np.repeat(np.int32([1, 2]), [len(a) for a in alone])
        spans = causal_mask.spans(ids, VOCAB, Mask(spans=2.0), rng, 8)
        row = packing.masked(ids, owner, spans, VOCAB, isolated)
        found = packing.arrays([row], VOCAB, isolated)
        for i, start in ((1, 0), (2, len(alone[0]))):
            own = (spans >= start).all(1) & (spans < start + len(alone[i - 1])).all(1)
            expected = trained(alone[i - 1], spans[own] - start)
            here = found["segments"][0] == i
            assert found["inputs"][0, here].tolist() == expected[0].tolist()
            assert found["positions"][0, here].tolist() == expected[1].tolist()


def test_without_a_picture_positions_count_through_the_row():
    padded = decode.pad([[np.array([EOD, 5, BREAK])]], 5)
    assert padded.positions[0, 0].tolist() == [0, 0, 0, 1, 2]
    place, following = decode._advance(
        jnp.array([VOCAB.image_start]), jnp.asarray(padded.following[0]), padded.first, VOCAB
    )
    assert place.tolist() == [3]
    assert decode._advance(jnp.array([5]), following, padded.first, VOCAB)[0].tolist() == [4]


@pytest.mark.parametrize("change", [{"kind": "chop"}, {"picture": LENGTH}, {"picture": -1}])
def test_packings_that_have_no_fixed_places_are_refused(change):
    with pytest.raises(ValueError, match="packing.picture"):
        Packing(**({"kind": "whole", "length": LENGTH, "picture": CODES} | change))
