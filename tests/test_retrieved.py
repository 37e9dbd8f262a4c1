"""Laws of documents with retrieved ones before them: plan, rows, batches."""

import collections
import dataclasses
import itertools
import pickle

import numpy as np
import pytest

from cm3jax import config as configs
from cm3jax.config import DecoderStage, Mask, Mixture, Packing, Training
from cm3jax.data import mixing, neighbours, packing, pipeline, retrieved, tokens
from cm3jax.objectives import causal_mask
from cm3jax.types import UserError
from cm3jax.vocab import BREAK, EOD, Vocab

VOCAB = Vocab(text=300, image=101, sentinels=23, multiple=7)
T, I = VOCAB.text_start, VOCAB.image_start
CODES, POOL, BANK = 5, 4, 60
WHOLE = DecoderStage(
    packing=Packing("whole", 83, most_spans=4), training=Training(batch=6, evaluate_batches=3), mask=Mask(spans=2.0)
)
CHOP = dataclasses.replace(WHOLE, packing=Packing("chop", 83))
ONE = dataclasses.replace(WHOLE, packing=Packing("whole", 83, most_spans=4, documents=1, picture=CODES))
ISOLATED = dataclasses.replace(WHOLE, packing=Packing("whole", 83, most_spans=4, isolate=True))
CHOP_ISOLATED = dataclasses.replace(WHOLE, packing=Packing("chop", 83, isolate=True))
STAGES = pytest.mark.parametrize(
    "stage", [WHOLE, CHOP, ONE, ISOLATED, CHOP_ISOLATED], ids=["whole", "chop", "one", "isolated", "chop isolated"]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run: 41 + 19 documents that can be retrieved in two splits, neighbours of train and validation.

    The first text id of bank document i is T + i, that of a validation document T + 100 + i; some rows have fewer
    neighbours than the pool, and some none.
    """
    folder, rng = tmp_path_factory.mktemp("run"), np.random.default_rng(0)
    for split, count, first in (("train", 41, 0), ("bank", 19, 41), ("validation", 17, 100)):
        documents = []
        for i in range(first, first + count):
            words = np.concatenate([[T + i], rng.integers(T + 200, I, rng.integers(0, 7))])
            documents.append((str(i), np.concatenate([words, [BREAK], rng.integers(I, I + 101, CODES)])))
        half = count // 2
        tokens.write(folder / "tokens", split, documents[:half], 0, 2)
        tokens.write(folder / "tokens", split, documents[half:], 1, 2)
        found = np.stack([rng.permutation(BANK)[:POOL] for _ in range(count)]).astype(np.int32)
        found[rng.random(found.shape) < 0.2] = -1
        found[3] = -1
        if split != "bank":
            neighbours.write(folder / "neighbours", split, found[:half], 0, 2)
            neighbours.write(folder / "neighbours", split, found[half:], 1, 2)
    return folder


@pytest.fixture(scope="module")
def source(folder):
    return retrieved.Source(folder / "neighbours", ("train", "bank"))


def opened(folder, source, stage, split="train"):
    return mixing.open(folder / "tokens", split, stage, source)


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def first(count, iterator):
    found = list(itertools.islice(iterator, count))
    iterator.close()
    return found


# ------------------------------------------------------------------------------------------------------------ documents


@STAGES
def test_a_document_is_the_retrieved_ones_joined_by_breaks_then_its_own_ids(folder, source, stage):
    data = opened(folder, source, stage)
    bank = [*tokens.Tokens(folder / "tokens", "train"), *tokens.Tokens(folder / "tokens", "bank")]
    for epoch in range(3):
        shown = data.at(0, epoch)
        for i in range(len(data)):
            chosen = shown.documents(i)
            joined = [x for k in chosen for x in (bank[k], [BREAK])]
            before = np.concatenate([*joined, []])
            assert shown[i].tolist() == [*before, *bank[i]] and shown.before(i) == len(before)
            assert shown.read(i, 3, 9).tolist() == shown[i][3:9].tolist()
            assert len(set(chosen)) == len(chosen) <= 3 and set(chosen) <= set(data.neighbours[i].tolist()) - {-1}


@STAGES
def test_the_plan_s_lengths_are_what_reading_gives(folder, source, stage):
    data = opened(folder, source, stage)
    for seed, epoch in [(0, 0), (0, 5), (9, 0)]:
        shown = data.at(seed, epoch)
        assert shown.lengths.tolist() == [len(shown[i]) for i in range(len(shown))]
        assert shown.retrieved == sum(len(shown.documents(i)) for i in range(len(shown)))


def test_choices_follow_from_seed_epoch_and_document_alone(folder, source):
    data = opened(folder, source, WHOLE)

    def choices(seed, epoch):
        return [data.at(seed, epoch).documents(i) for i in range(len(data))]

    assert choices(0, 1) == choices(0, 1)
    assert len({str(choices(*key)) for key in [(0, 0), (0, 1), (1, 0), (1, 1)]}) == 4


def test_the_random_numbers_of_one_document_are_its_row_of_those_of_all():
    for width in (1, 4, 5, 9):
        all_of_them = retrieved.numbers(7, 3, 0, 50, width)
        assert all_of_them.shape == (50, width) and len(np.unique(all_of_them)) == 50 * width
        for i in (0, 1, 17, 49):
            assert np.array_equal(retrieved.numbers(7, 3, i, 1, width)[0], all_of_them[i])


def test_lengths_do_not_depend_on_how_many_are_added_up_at_once(folder, source, monkeypatch):
    data = opened(folder, source, WHOLE)
    expected = data.at(0, 0).lengths
    monkeypatch.setattr(retrieved, "AT_ONCE", 7)
    assert np.array_equal(data.at(0, 0).lengths, expected)


@pytest.mark.parametrize("least, most", [(0, 3), (1, 2), (2, 2), (0, 1), (3, 4), (0, 9)])
def test_their_number_is_uniform_from_least_to_most_and_every_neighbour_and_order_as_likely(least, most):
    settings, n = configs.Retrieved(least=least, most=most), 60_000
    found = np.tile(np.arange(POOL, dtype=np.int32), (n, 1))
    shown = retrieved.choose(found, settings, np.random.default_rng(0).random((n, POOL + 1)))
    count = (shown >= 0).sum(1)
    wanted = collections.Counter(min(k, POOL) for k in range(least, most + 1))
    shares = {k: (count == k).mean() for k in range(most + 1)}
    assert shares == pytest.approx({k: wanted[k] / (most + 1 - least) for k in shares}, abs=0.01)
    assert (shown[:, :-1] < 0)[shown[:, 1:] >= 0].sum() == 0  # no hole before a document
    for column in range(min(most, POOL)):
        there = shown[:, column][shown[:, column] >= 0]
        assert np.bincount(there, minlength=POOL) / len(there) == pytest.approx(np.full(POOL, 0.25), abs=0.02)


def test_documents_with_fewer_neighbours_show_those_that_they_have():
    found = np.array([[-1, 5, -1, 7], [-1, -1, -1, -1]], np.int32)
    for seed in range(50):
        u = np.random.default_rng(seed).random((2, 5))
        shown = retrieved.choose(found, configs.Retrieved(least=3, most=3), u)
        assert sorted(shown[0].tolist()) == [-1, 5, 7] and shown[1].tolist() == [-1, -1, -1] and shown[0, 2] == -1


# ----------------------------------------------------------------------------------------------------------------- rows


def test_a_document_longer_than_a_row_gives_up_retrieved_ones_and_that_is_counted(folder, source):
    short = dataclasses.replace(ONE, packing=Packing("whole", 40, most_spans=2, documents=1))
    wide = dataclasses.replace(ONE, packing=Packing("whole", 4000, most_spans=2, documents=1))
    data, all_of_them = (opened(folder, source, stage) for stage in (short, wide))
    for epoch in range(3):
        shown, wanted = data.at(0, epoch), all_of_them.at(0, epoch)
        lost = 0
        for i in range(len(data)):
            kept, drawn = shown.documents(i), wanted.documents(i)
            assert drawn[: len(kept)] == kept
            lost += len(drawn) - len(kept)
            size = len(shown[i])
            assert size <= 40 - 6 - 2
            if len(kept) < len(drawn):  # the next one has no room
                assert size + data.bank.lengths[drawn[len(kept)]] + 1 > 40 - 6 - 2
        assert shown.given_up == lost > 0 and wanted.given_up == 0
    facts = pipeline.describe(data, short)
    assert facts["given_up"] == data.at(0, 0).given_up and facts["retrieved"] == data.at(0, 0).retrieved > 0
    assert facts["rows"] == 41 and facts["too_long"] == 0 and facts["tokens"] == data.lengths.sum()
    assert opened(folder, source, CHOP).at(0, 0).given_up == 0


@STAGES
def test_a_row_tells_which_of_its_tokens_are_retrieved(folder, source, stage):
    data = opened(folder, source, stage)
    plan = packing.plan(data.at(0, 0).lengths, 0, 0, stage.packing)
    shown, seen = data.at(0, 0), collections.Counter()
    for r in range(len(plan)):
        ids, owner, flags = packing.read(plan, r, shown, stage.packing)
        documents, skip = plan.row(r)
        sizes = [(int(shown.lengths[i]), shown.before(i)) for i in documents.tolist()]
        closing = [EOD] * (packing.frame(stage.packing) - 1)
        framed = np.concatenate([[EOD, *shown[i], *closing] for i in documents.tolist()])[skip : skip + 83]
        told = [[0] + [1] * before + [0] * (size - before + len(closing)) for size, before in sizes]
        told = np.concatenate(told)[skip : skip + 83]
        n = len(framed)  # the stream's last [eod] may follow
        assert ids[:n].tolist() == framed.tolist() and flags[:n].tolist() == told.tolist()
        assert ids[n:].tolist() in ([], [EOD]) and not flags[n:].any() and len(flags) == len(ids) == len(owner)
        seen.update(flags.tolist())
    assert min(seen.values()) > 300


@STAGES
def test_a_masked_row_gives_the_row_back(folder, source, stage):
    make, masked = pipeline.Batches(opened(folder, source, stage), stage, VOCAB), 0
    for g in range(60):
        ids, _, spans, shown = make.unmasked(g)
        out, *_, flags = make.row(g)
        assert len(out) <= 83
        masked += len(spans)
        if stage in (WHOLE, ONE):
            assert np.array_equal(causal_mask.unmask(out, VOCAB), ids)
        elif stage is CHOP:
            back = causal_mask.unmask(out, VOCAB)
            assert np.array_equal(back, ids[: len(back)])
        kept, keep = causal_mask.fit(spans, len(ids), 83)
        assert np.array_equal(flags, shown[causal_mask.layout(kept, keep)[0]])
    assert masked > 20


@STAGES
def test_retrieved_targets_have_their_own_modality_and_weight(folder, source, stage):
    light = dataclasses.replace(stage, retrieved=configs.Retrieved(weight=0.25))
    data, seen = opened(folder, source, stage), 0
    plain, weighed = pipeline.Batches(data, stage, VOCAB), pipeline.Batches(data, light, VOCAB)
    for step in range(4):
        a, b = plain(step), weighed(step)
        there = a["modality"] >= packing.RETRIEVED
        assert set(np.unique(a["weights"])) <= {0.0, 1.0} and (a["weights"][there] == 1).all()
        assert np.array_equal(b["weights"], np.where(there, np.float32(0.25), a["weights"]))
        assert all(np.array_equal(a[k], b[k]) for k in a if k != "weights")
        text = VOCAB.is_text(a["targets"]) & (a["weights"] > 0)
        codes = VOCAB.is_image(a["targets"]) & (a["weights"] > 0)
        assert set((a["modality"][text] % 4).tolist()) <= {packing.TEXT, packing.INFILL}
        assert set((a["modality"][codes] % 4).tolist()) <= {packing.IMAGE, packing.INFILL}
        seen += there.sum()
    assert seen > 100


def test_the_first_token_of_a_retrieved_document_is_retrieved_and_that_of_the_query_is_not(folder, source):
    data = opened(folder, source, ONE)
    causal = dataclasses.replace(ONE, mask=Mask(spans=0.0))
    for step in range(4):
        batch = pipeline.Batches(data, causal, VOCAB)(step)
        for targets, modality in zip(batch["targets"], batch["modality"], strict=True):
            texts = [i for i, t in enumerate(targets) if T <= t < T + 100]  # the first word of each document
            assert all(modality[i] == packing.RETRIEVED + packing.TEXT for i in texts[:-1])
            assert modality[texts[-1]] == packing.TEXT


# -------------------------------------------------------------------------------------------------------------- batches


@STAGES
@pytest.mark.parametrize("hosts", [2, 3])
def test_the_hosts_shares_make_up_the_batch_of_one_host(folder, source, stage, hosts):
    data = opened(folder, source, stage)
    for step in (0, 5, 23):
        alone = pipeline.Batches(data, stage, VOCAB)(step)
        shares = [pipeline.Batches(data, stage, VOCAB, host, hosts)(step) for host in range(hosts)]
        assert same(alone, {k: np.concatenate([share[k] for share in shares]) for k in alone})


@STAGES
def test_a_run_that_starts_at_step_n_sees_what_one_from_step_0_sees_there(folder, source, stage):
    run = first(12, pipeline.batches(folder / "tokens", "train", stage, VOCAB, source=source))
    later = first(5, pipeline.batches(folder / "tokens", "train", stage, VOCAB, 7, source=source))
    assert all(map(same, run[7:], later))


def test_epochs_that_have_different_numbers_of_rows_follow_each_other(folder, source):
    make = pipeline.Batches(opened(folder, source, CHOP), CHOP, VOCAB)
    plans = [packing.plan(make._arguments[0].at(0, e).lengths, 0, e, CHOP.packing) for e in range(5)]
    assert len({len(plan) for plan in plans}) > 1
    rows = [(e, r) for e, plan in enumerate(plans) for r in range(len(plan))]
    assert [make.epochs.locate(g)[1:] for g in range(len(rows))] == rows


def test_a_document_is_shown_beside_others_in_every_epoch(folder, source):
    make = pipeline.Batches(opened(folder, source, ONE), ONE, VOCAB)
    found = collections.defaultdict(set)
    for g in range(41 * 8):
        ids, _, _, shown = make.unmasked(g)
        shown = shown[1:] == packing.SHOWN
        found[ids[1:][~shown].tobytes()].add(ids[1:][shown].tobytes())
    assert len(found) == 41 and np.mean([len(x) for x in found.values()]) > 5


def test_validation_has_the_same_documents_retrieved_at_every_call(folder, source):
    other = dataclasses.replace(WHOLE, training=dataclasses.replace(WHOLE.training, seed=1))
    runs = [
        list(pipeline.eval_batches(folder / "tokens", "validation", stage, VOCAB, source=source))
        for stage in (WHOLE, WHOLE, other)
    ]
    assert all(map(same, runs[0], runs[1])) and all(map(same, runs[0], runs[2]))
    assert any((batch["modality"] >= packing.RETRIEVED).any() for batch in runs[0])
    without = list(pipeline.eval_batches(folder / "tokens", "validation", WHOLE, VOCAB))
    assert not any((batch["modality"] >= packing.RETRIEVED).any() for batch in without)


def test_a_copy_for_a_worker_is_small_and_gives_the_same_batch(folder, source):
    make = pipeline.Batches(opened(folder, source, WHOLE), WHOLE, VOCAB)
    copied = pickle.dumps(make)
    assert len(copied) < 5000 and same(pickle.loads(copied)(3), make(3))


def test_no_document_is_retrieved_where_none_is_asked_for(folder, source):
    none = dataclasses.replace(WHOLE, retrieved=configs.Retrieved(most=0))
    plain = pipeline.Batches(tokens.Tokens(folder / "tokens", "train"), WHOLE, VOCAB)
    assert same(pipeline.Batches(opened(folder, source, none), none, VOCAB)(3), plain(3))
    assert same(pipeline.Batches(opened(folder, None, WHOLE), WHOLE, VOCAB)(3), plain(3))


def test_the_fingerprint_names_neighbours_bank_and_settings(folder, source, tmp_path):
    base = pipeline.fingerprint(opened(folder, source, WHOLE), WHOLE, VOCAB)
    found = {base, pipeline.fingerprint(opened(folder, None, WHOLE), WHOLE, VOCAB)}
    for settings in (configs.Retrieved(most=2), configs.Retrieved(weight=0.1), configs.Retrieved(least=1)):
        stage = dataclasses.replace(WHOLE, retrieved=settings)
        found.add(pipeline.fingerprint(opened(folder, source, stage), stage, VOCAB))
    turned = dataclasses.replace(source, splits=("bank", "train"))
    found.add(pipeline.fingerprint(opened(folder, turned, WHOLE), WHOLE, VOCAB))
    other = neighbours.Neighbours(folder / "neighbours", "train").read(0, 41).copy()
    other[40, 0] ^= 1
    neighbours.write(tmp_path, "train", other)
    moved = dataclasses.replace(source, folder=tmp_path)
    found.add(pipeline.fingerprint(opened(folder, moved, WHOLE), WHOLE, VOCAB))
    assert len(found) == 7
    assert base == pipeline.fingerprint(opened(folder, source, WHOLE), WHOLE, VOCAB)


def test_a_mixture_counts_retrieved_documents_among_a_set_s_tokens(folder, source):
    mixture = Mixture((str(folder / "other"),), (1.0, 1.0))
    tokens.write(folder / "other", "train", [(str(i), np.full(30, T + 299, np.uint16)) for i in range(40)])
    stage = dataclasses.replace(CHOP, mixture=mixture)
    make, counts = pipeline.Batches(opened(folder, source, stage), stage, VOCAB), collections.Counter()
    for g in range(400):
        ids, _, _, shown = make.unmasked(g)
        counts["other"] += (ids == T + 299).sum()
        counts["retrieved"] += (shown == packing.SHOWN).sum()
        counts["all"] += len(ids)
    assert counts["other"] / counts["all"] == pytest.approx(0.5, abs=0.04) and counts["retrieved"] > 0
    facts = pipeline.describe(make._arguments[0], stage)
    assert facts["retrieved"] > 0 and pipeline.fingerprint(make._arguments[0], stage, VOCAB)


# ------------------------------------------------------------------------------------------------------------ bad input


def test_neighbours_that_do_not_fit_the_tokens_are_one_clear_line(folder, source, tmp_path):
    neighbours.write(tmp_path, "train", np.zeros((40, 4), np.int32))
    with pytest.raises(UserError, match="of 40 documents, but the split 'train' has 41; make them again"):
        opened(folder, retrieved.Source(tmp_path, source.splits), WHOLE)
    neighbours.write(tmp_path, "train", np.full((41, 4), 60, np.int32))
    with pytest.raises(UserError, match="name document 60 of a bank of 60; make them again"):
        opened(folder, retrieved.Source(tmp_path, source.splits), WHOLE).at(0, 0)
    with pytest.raises(UserError, match="no split 'validation'"):
        opened(folder, retrieved.Source(tmp_path, source.splits), WHOLE, "validation")
    with pytest.raises(UserError, match="no split 'more'"):
        opened(folder, dataclasses.replace(source, splits=("more",)), WHOLE)
