import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from cm3jax.config import Mask, Packing
from cm3jax.data import packing, tokens
from cm3jax.objectives import causal_mask
from cm3jax.types import UserError
from cm3jax.vocab import BREAK, EOD, PAD, Vocab

VOCAB = Vocab(text=300, image=101, sentinels=23, multiple=7)
T, I = VOCAB.text_start, VOCAB.image_start
lengths = st.lists(st.integers(0, 70), min_size=1, max_size=40).map(lambda x: np.array(x, np.int32))
seeds = st.integers(0, 2**32 - 1)
SETTINGS = [Packing(kind, 83, isolate) for kind in ("whole", "chop") for isolate in (False, True)]


def pair(rng, text, image=17):
    return np.concatenate([rng.integers(T, I, text), [BREAK], rng.integers(I, I + 101, image)]).astype(np.uint16)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("tokens"), np.random.default_rng(0)
    tokens.write(folder, "train", [(str(i), pair(rng, int(rng.integers(1, 12)))) for i in range(61)])
    return tokens.Tokens(folder, "train")


def rows(data, settings, mask, seed=0, epoch=0):
    """Yield (row before masking, owner, spans, masked row) of an epoch."""
    plan = packing.plan(data.lengths, seed, epoch, settings)
    for r in range(len(plan)):
        ids, owner, _ = packing.read(plan, r, data, settings)
        spans = packing.draw_spans(ids, VOCAB, mask, settings, packing.stream(seed, "mask", epoch, r))
        yield ids, owner, spans, packing.masked(ids, owner, spans, VOCAB, settings)


# ---------------------------------------------------------------------------------------------------------------- plan


@given(lengths, seeds, st.integers(0, 3), st.sampled_from([0, 1, 2]))
def test_whole_puts_each_document_that_fits_into_one_row(lengths, seed, epoch, most):
    settings = Packing("whole", 83, documents=most)
    if lengths.min() > 83 - 26:
        return
    plan = packing.plan(lengths, seed, epoch, settings)
    fits = np.flatnonzero(lengths + 2 <= 83 - 24)
    assert sorted(plan.documents.tolist()) == fits.tolist() and plan.too_long == len(lengths) - len(fits)
    assert plan.first[0] == 0 and (plan.first[1:] == plan.end[:-1]).all() and plan.end[-1] == len(fits)
    for r in range(len(plan)):
        documents, skip = plan.row(r)
        assert skip == 0 and 0 < (lengths[documents] + 2).sum() <= 83 - 24 and len(documents) <= (most or 99)


@given(lengths, seeds, st.integers(0, 3), st.booleans())
def test_chop_rows_end_to_end_are_the_shuffled_documents(tmp_path_factory, lengths, seed, epoch, isolate):
    settings, folder = Packing("chop", 19, isolate), tmp_path_factory.mktemp("tokens")
    pairs = [(str(i), np.full(n, T + i, np.uint16)) for i, n in enumerate(lengths)]
    tokens.write(folder, "train", pairs)
    double, data = isolate, tokens.Tokens(folder, "train")
    order = packing.stream(seed, "order", epoch).permutation(len(lengths))
    stream = np.concatenate([x for i in order for x in ([EOD], pairs[i][1], [EOD] * double)] + [[EOD] * (not double)])
    if len(stream) < 19:
        with pytest.raises(UserError, match=r"packing.length = 19"):
            packing.plan(lengths, seed, epoch, settings)
        return
    plan = packing.plan(lengths, seed, epoch, settings)
    found = [packing.read(plan, r, data, settings)[0] for r in range(len(plan))]
    assert len(plan) == len(stream) // 19 and all(len(x) == 19 for x in found)
    assert np.array_equal(np.concatenate(found), stream[: len(plan) * 19])


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_plan_follows_from_seed_epoch_and_lengths(settings):
    lengths = np.arange(5, 50, dtype=np.int32)
    made = [
        packing.plan(lengths, seed, epoch, settings).documents.tolist()
        for seed, epoch in [(0, 0)] * 2 + [(0, 1), (1, 0)]
    ]
    assert made[0] == made[1] and made[0] != made[2] and made[0] != made[3] and made[2] != made[3]


def test_best_fit_wastes_little():
    sizes = np.random.default_rng(0).integers(20, 1000, 20_000)
    row_of = packing.best_fit(sizes, 4000, 0)
    filled = np.bincount(row_of, sizes)
    assert filled.max() <= 4000 and sizes.sum() / 4000 / len(filled) > 0.98


def test_a_document_longer_than_any_row_is_counted_and_left_out():
    plan = packing.plan(np.array([5, 500, 7, 58, 57], np.int32), 0, 0, Packing("whole", 83))
    assert plan.too_long == 2 and sorted(plan.documents.tolist()) == [0, 2, 4]


def test_no_document_that_fits_is_one_clear_line():
    with pytest.raises(UserError, match=r"packing.length = 83: no document fits, the shortest takes 60 tokens and 24"):
        packing.plan(np.array([58, 500], np.int32), 0, 0, Packing("whole", 83))
    with pytest.raises(UserError, match=r"packing.length = 7: must be 8"):
        packing.plan(np.array([58, 500], np.int32), 0, 0, Packing("chop", 7))


def test_four_of_the_paper_s_pairs_fill_a_row_of_4352():
    plan = packing.plan(np.full(8, 55 + 1 + 1024, np.int32), 0, 0, Packing("whole", 4352))
    assert len(plan) == 2 and 4 * (1 + 55 + 1 + 1024 + 1) == 4352 - 24


# ----------------------------------------------------------------------------------------------------------------- row


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_masked_row_gives_the_row_back(data, settings):
    for ids, _, _, (out, *_) in rows(data, settings, Mask(spans=2.0)):
        n = (out == VOCAB.sentinel(0)).sum() and int(VOCAB.is_sentinel(out).sum()) // 2
        cut = max(0, len(ids) + 3 * n - 83)
        assert len(out) <= 83 and (cut == 0 or settings.kind == "chop")
        assert np.array_equal(causal_mask.unmask(out, VOCAB), ids[: len(ids) - cut])


@given(lengths, seeds)
def test_whole_never_cuts_a_document_whatever_the_mask(tmp_path_factory, lengths, seed):
    folder = tmp_path_factory.mktemp("tokens")
    lengths = np.minimum(lengths, 57)
    tokens.write(folder, "train", [(str(i), np.full(n, T + i, np.uint16)) for i, n in enumerate(lengths)])
    data = tokens.Tokens(folder, "train")
    for ids, _, _, (out, *_) in rows(data, Packing("whole", 83), Mask(spans=5.0), seed):
        assert np.array_equal(causal_mask.unmask(out, VOCAB), ids) and len(out) <= 83


def test_both_eods_frame_every_document_of_whole(data):
    for ids, owner, _, _ in rows(data, Packing("whole", 83), Mask()):
        for document in range(1, owner.max() + 1):
            inside = ids[owner == document]
            assert inside[0] == EOD and inside[-1] == EOD and (inside == EOD).sum() == 2


@pytest.mark.parametrize("kind", ["whole", "chop"])
def test_with_isolate_each_document_sees_what_a_row_of_its_own_would_show(data, kind):
    settings, seen = Packing(kind, 149, isolate=True), 0
    for ids, owner, spans, row in rows(data, settings, Mask(spans=4.0)):
        batch = {k: v[0] for k, v in packing.arrays([row], VOCAB, settings).items()}
        spans, keep = causal_mask.fit(spans, len(ids), 149)
        for document in range(1, owner[:keep].max() + 1):
            own = np.flatnonzero(owner[:keep] == document)
            mine = spans[owner[spans[:, 0]] == document] - own[0]
            moved = causal_mask.layout(mine, len(own))[1]
            masked = causal_mask.mask(ids[own], mine, VOCAB)
            view = masked, np.ones(len(moved), np.int32), moved, mine[:0, 0], np.zeros(len(moved), bool)
            alone = {k: v[0] for k, v in packing.arrays([view], VOCAB, settings).items()}
            here, there = batch["segments"] == document, alone["segments"] == 1
            for name in ("inputs", "targets", "weights", "positions", "modality"):
                assert np.array_equal(batch[name][here], alone[name][there]), name
            seen += len(mine)
    assert seen > 20


def test_without_isolate_a_row_is_one_segment_with_running_positions(data):
    settings = Packing("whole", 83)
    for *_, row in rows(data, settings, Mask()):
        batch = {k: v[0] for k, v in packing.arrays([row], VOCAB, settings).items()}
        n = len(row[0])
        assert batch["segments"].tolist() == [1] * n + [0] * (83 - n)
        assert batch["positions"].tolist() == [*range(n)] + [0] * (83 - n)


def test_targets_are_the_row_shifted_left_and_weigh_nothing_at_the_end_and_on_padding(data):
    for settings in (Packing("whole", 83), Packing("chop", 83)):
        for *_, row in rows(data, settings, Mask()):
            batch = {k: v[0] for k, v in packing.arrays([row], VOCAB, settings).items()}
            n = len(row[0])
            assert np.array_equal(batch["targets"][: n - 1], batch["inputs"][1:n])
            assert batch["weights"].tolist() == [1.0] * (n - 1) + [0.0] * (84 - n)
            assert (batch["targets"][n - 1 :] == PAD).all() and (batch["inputs"][n:] == PAD).all()


def test_modality_is_that_of_the_target():
    ids = np.array([EOD, T, T + 1, BREAK, I, I + 1, EOD], np.uint16)
    settings = Packing("whole", 16)
    row = packing.masked(ids, np.ones(7, np.int32), np.array([[2, 3], [5, 6]]), VOCAB, settings)
    batch = {k: v[0] for k, v in packing.arrays([row], VOCAB, settings).items()}
    s, t = VOCAB.sentinel(0), VOCAB.sentinel(1)
    assert batch["targets"].tolist() == [T, s, BREAK, I, t, EOD, s, T + 1, 3, t, I + 1, 3, 0, 0, 0, 0]
    text, image, infill, other = packing.TEXT, packing.IMAGE, packing.INFILL, packing.OTHER
    expected = [text, other, other, image, other, other, other, infill, other, other, infill, other]
    assert batch["modality"].tolist() == expected + [other] * 4


@pytest.mark.parametrize("isolate", [False, True])
def test_a_moved_span_weighs_at_least_what_the_config_says_and_nothing_else_changes(data, isolate):
    settings, short, long = Packing("whole", 149, isolate=isolate), 0, 0
    for *_, row in rows(data, settings, Mask(spans=4.0)):
        plain, batch = (packing.arrays([row], VOCAB, settings, Mask(span_weight=w)) for w in (0.0, 6.0))
        assert all(np.array_equal(plain[name], batch[name]) for name in plain if name != "weights")
        moved, changed = plain["modality"] == packing.INFILL, plain["weights"] != batch["weights"]
        assert not changed[~moved].any()
        ids, _, lengths, *_ = row
        for start in np.flatnonzero(VOCAB.is_sentinel(ids)):
            n = int(lengths[start + 1]) if start + 1 < len(ids) else 0
            own = batch["weights"][0, start : start + n]
            assert n == 0 or abs(own.sum() - max(n, 6)) < 1e-5
            short, long = short + (0 < n < 6), long + (n > 6)
    assert short > 5 and long > 5


@pytest.mark.parametrize("settings", SETTINGS)
def test_arrays_have_the_promised_types(data, settings):
    batch = packing.arrays([row for *_, row in rows(data, settings, Mask())][:3], VOCAB, settings)
    kinds = {"inputs": "int32", "targets": "int32", "weights": "float32", "positions": "int32", "segments": "int32"}
    assert {k: str(v.dtype) for k, v in batch.items()} == kinds | {"modality": "int8"}
    assert all(v.shape == (3, 83) for v in batch.values())
