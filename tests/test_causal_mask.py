import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import assume, given

from cm3jax.config import Mask
from cm3jax.objectives import causal_mask
from cm3jax.vocab import BREAK, EOD, EOSS, PAD, Vocab

VOCAB = Vocab(text=300, image=101, sentinels=23, multiple=7)
T, I = VOCAB.text_start, VOCAB.image_start
seeds = st.integers(0, 2**32 - 1)
masks = st.builds(Mask, spans=st.sampled_from([0.3, 1.0, 4.0, 30.0]), rotate=st.sampled_from([0.0, 0.5, 1.0]))


@st.composite
def blocks(draw):
    """A row of documents, or a piece cut out of one."""
    token = st.one_of(st.integers(T, T + 5), st.integers(I, I + 5), st.just(BREAK), st.just(EOD))
    return np.array(draw(st.lists(token, min_size=1, max_size=80)), np.uint16)


def pair(rng, text=10, image=64):
    return np.concatenate([[EOD], rng.integers(T, I, text), [BREAK], rng.integers(I, I + 100, image), [EOD]])


@given(blocks(), masks, seeds)
def test_masking_loses_no_token(ids, mask, seed):
    spans = causal_mask.spans(ids, VOCAB, mask, np.random.default_rng(seed))
    masked = causal_mask.mask(ids, spans, VOCAB)
    assert len(masked) == len(ids) + 3 * len(spans)
    assert np.array_equal(causal_mask.unmask(masked, VOCAB), ids)


@given(blocks(), masks, seeds)
def test_a_full_row_keeps_its_length_and_loses_three_tokens_of_its_tail_per_span(ids, mask, seed):
    spans = causal_mask.spans(ids, VOCAB, mask, np.random.default_rng(seed))
    masked = causal_mask.mask(ids, spans, VOCAB, room=len(ids))
    n = (masked == EOSS).sum()
    assert len(masked) == len(ids) and n <= len(spans)
    assert np.array_equal(causal_mask.unmask(masked, VOCAB), ids[: len(ids) - 3 * n])


@given(blocks(), masks, seeds)
def test_spans_are_disjoint_sorted_and_inside_one_stretch(ids, mask, seed):
    spans = causal_mask.spans(ids, VOCAB, mask, np.random.default_rng(seed))
    assert (spans[:, 0] < spans[:, 1]).all() and (spans[1:, 0] >= spans[:-1, 1]).all()
    for start, end in spans:
        assert start >= 1 and not np.isin(ids[start:end], [BREAK, EOD, PAD]).any()


@given(blocks(), masks, seeds, st.integers(1, 9))
def test_there_are_never_more_spans_than_sentinels_or_room_for_them(ids, mask, seed, most):
    few = Vocab(text=300, image=101, sentinels=4)
    assert len(causal_mask.spans(ids, few, mask, np.random.default_rng(seed), most)) <= min(3, most)


@given(blocks(), masks, seeds)
def test_the_row_takes_as_many_spans_as_come_out_even(ids, mask, seed):
    spans = causal_mask.spans(ids, VOCAB, mask, np.random.default_rng(seed))
    left, keep = causal_mask.fit(spans, len(ids), len(ids))
    n = len(left)
    assert keep == len(ids) - 3 * n and (left[:, 0] < left[:, 1]).all() and (left <= keep).all()
    assert np.array_equal(left[:, 0], spans[:n, 0])
    if n < len(spans):
        assert spans[n, 0] >= len(ids) - 3 * (n + 1)


def test_a_masked_pair_reads_as_in_the_paper():
    ids = np.array([EOD, T + 1, T + 2, T + 3, BREAK, I, I + 1, I + 2, EOD], np.uint16)
    masked = causal_mask.mask(ids, np.array([[2, 4], [6, 8]]), VOCAB)
    first, second = VOCAB.sentinel(0), VOCAB.sentinel(1)
    place = [EOD, T + 1, first, BREAK, I, second, EOD]
    assert masked.tolist() == [*place, first, T + 2, T + 3, EOSS, second, I + 1, I + 2, EOSS]
    assert masked.dtype == np.uint16


def test_without_spans_a_row_stays_as_it_is():
    ids = pair(np.random.default_rng(0))
    for mask in (Mask(spans=0.0), Mask(spans=0.0, rotate=1.0)):
        assert len(causal_mask.spans(ids, VOCAB, mask, np.random.default_rng(0))) == 0
    assert np.array_equal(causal_mask.mask(ids, np.zeros((0, 2), np.int64), VOCAB), ids)


def test_each_span_goes_to_the_stretch_that_it_overlaps_most():
    found = np.array([[1, 5], [6, 20], [21, 24]])
    drawn = np.array([[1, 9], [3, 8], [4, 23], [5, 6], [22, 30], [2, 4]])
    assert causal_mask.clip(drawn, found).tolist() == [[1, 5], [3, 5], [6, 20], [22, 24], [2, 4]]


def test_stretches_lie_between_breaks_and_documents_and_leave_out_the_first_token():
    ids = np.array([T, T, BREAK, I, I, EOD, EOD, T, BREAK, BREAK, I, PAD, PAD])
    assert causal_mask.stretches(ids).tolist() == [[1, 2], [3, 5], [7, 8], [10, 11]]


def draws(count, mask, ids=None):
    ids = pair(np.random.default_rng(0)) if ids is None else ids
    rng = np.random.default_rng(1)
    return [causal_mask.spans(ids, VOCAB, mask, rng) for _ in range(count)]


def test_the_number_of_spans_follows_poisson():
    # every whole-stretch draw of n spans gives min(n, stretches): 7 documents have 14
    ids = np.concatenate([pair(np.random.default_rng(0))] * 7)
    counts = np.bincount([len(s) for s in draws(8_000, Mask(rotate=1.0), ids)], minlength=5)[:5] / 8_000
    assert np.abs(counts - np.array([0.3679, 0.3679, 0.1839, 0.0613, 0.0153])).max() < 0.018


def test_the_share_of_purely_causal_blocks_is_that_of_no_span():
    # one long stretch: what one draw loses is a span that rounds to nothing, 2 / L of them
    ids = np.concatenate([[EOD], np.full(3000, I)])
    empty = np.mean([len(s) == 0 for s in draws(8_000, Mask(rotate=0.0), ids)])
    assert abs(empty - 0.3679) < 0.018


def test_one_span_is_that_of_two_sorted_uniforms():
    length, rng = 1000, np.random.default_rng(2)
    spans = np.concatenate([causal_mask.draw(length, 1, rng) for _ in range(20_000)])
    size = (spans[:, 1] - spans[:, 0]) / length
    assert abs(size.mean() - 1 / 3) < 0.01 and abs((size**2).mean() - 1 / 6) < 0.01
    assert abs(spans[:, 0].mean() / length - 1 / 3) < 0.01 and spans[:, 0].min() == 1
    assert spans[:, 1].max() == length


def test_several_spans_are_the_first_candidates_that_do_not_meet():
    rng, again = np.random.default_rng(3), np.random.default_rng(3)
    for n in (2, 3, 5):
        for _ in range(200):
            kept, taken = [], np.zeros(102, bool)
            for u in again.random((n * n, 2)):
                start, end = max(1, int(min(u) * 101)), int(max(u) * 101 + 0.5)
                if start < end and not taken[start:end].any() and len(kept) < n:
                    kept.append([start, end])
                    taken[start:end] = True
            assert causal_mask.draw(101, n, rng).tolist() == sorted(kept)


def test_the_rotated_share_masks_whole_stretches():
    ids = pair(np.random.default_rng(0), text=10, image=64)
    whole = {(1, 11), (12, 76)}
    drawn = [s for s in draws(8_000, Mask(rotate=0.5)) if len(s)]
    share = np.mean([all(tuple(x) in whole for x in s.tolist()) for s in drawn])
    assert len(ids) == 77 and 0.5 < share < 0.56  # the other law masks a whole stretch now and then
    assert all(tuple(x) in whole for s in draws(500, Mask(rotate=1.0)) for x in s.tolist())


def test_rotation_masks_each_stretch_as_often_as_the_others():
    ones = [tuple(s[0]) for s in draws(10_000, Mask(rotate=1.0)) if len(s) == 1]
    assert abs(np.mean([s == (1, 11) for s in ones]) - 0.5) < 0.02


@given(st.lists(st.sampled_from([T, BREAK, EOD, EOSS, VOCAB.sentinel(0), VOCAB.sentinel(1)]), max_size=12))
def test_markers_that_do_not_pair_up_are_refused(ids):
    ids = np.array(ids, np.uint16)
    at = ids[VOCAB.is_sentinel(ids)]
    n = int((ids == EOSS).sum())
    assume(len(at) != 2 * n)
    with pytest.raises(ValueError, match="not a masked row"):
        causal_mask.unmask(ids, VOCAB)


def test_padding_at_the_end_is_dropped_by_unmask():
    ids = pair(np.random.default_rng(0)).astype(np.uint16)
    masked = causal_mask.mask(ids, np.array([[2, 4]]), VOCAB)
    assert np.array_equal(causal_mask.unmask(np.pad(masked, (0, 9)), VOCAB), ids)


def test_a_share_of_the_rotated_blocks_masks_exactly_one_whole_text():
    vocab, rng = Vocab(text=20, image=20, sentinels=9, multiple=1), np.random.default_rng(0)
    text = [vocab.text_start + i for i in range(3)]
    image = [vocab.image_start + i for i in range(5)]
    ids = np.array([EOD, *text, BREAK, *image, BREAK, *text, BREAK, *image, EOD])
    texts = {(1, 4), (11, 14)}
    found = [causal_mask.spans(ids, vocab, Mask(spans=1.0, rotate=1.0, captions=0.75), rng) for _ in range(4000)]
    one = [tuple(spans[0]) for spans in found if len(spans) == 1 and tuple(spans[0]) in texts]
    some = sum(len(spans) > 0 for spans in found)
    others = 0.25 * 0.582 * 0.5  # the other rotated blocks: n = 1 in 58.2 % of them, and half of the stretches are text
    np.testing.assert_allclose(len(one) / some, 0.75 + others, atol=0.03)
    assert abs(one.count((1, 4)) / len(one) - 0.5) < 0.05
