import dataclasses
import itertools
import pickle
import subprocess
import sys

import grain
import numpy as np
import pytest

from cm3jax.config import DecoderStage, Mask, Packing, Training
from cm3jax.data import packing, pipeline, tokens
from cm3jax.objectives import causal_mask
from cm3jax.types import UserError
from cm3jax.vocab import BREAK, Vocab

VOCAB = Vocab(text=300, image=101, sentinels=23, multiple=7)
T, I = VOCAB.text_start, VOCAB.image_start
WHOLE = DecoderStage(packing=Packing("whole", 83), training=Training(batch=6, evaluate_batches=3))
CHOP = dataclasses.replace(WHOLE, packing=Packing("chop", 83))
ONE = dataclasses.replace(WHOLE, packing=Packing("whole", 83, documents=1))
STAGES = pytest.mark.parametrize("stage", [WHOLE, CHOP, ONE], ids=["whole", "chop", "one"])


def pair(rng, text, image=17):
    return np.concatenate([rng.integers(T, I, text), [BREAK], rng.integers(I, I + 101, image)]).astype(np.uint16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("tokens"), np.random.default_rng(0)
    for split, count in (("train", 41), ("validation", 17)):
        tokens.write(folder, split, [(str(i), pair(rng, int(rng.integers(1, 12)))) for i in range(count)])
    return folder


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def first(count, iterator):
    found = list(itertools.islice(iterator, count))
    iterator.close()
    return found


@STAGES
def test_a_run_that_starts_at_step_n_sees_what_one_from_step_0_sees_there(folder, stage):
    run = first(12, pipeline.batches(folder, "train", stage, VOCAB))
    for start in (1, 7, 11):
        later = first(12 - start, pipeline.batches(folder, "train", stage, VOCAB, start))
        assert all(map(same, run[start:], later))


@STAGES
@pytest.mark.parametrize("hosts", [2, 3])
def test_the_hosts_shares_make_up_the_batch_of_one_host(folder, stage, hosts):
    data = tokens.Tokens(folder, "train")
    for step in (0, 5, 23):
        alone = pipeline.Batches(data, stage, VOCAB)(step)
        shares = [pipeline.Batches(data, stage, VOCAB, host, hosts)(step) for host in range(hosts)]
        assert same(alone, {k: np.concatenate([share[k] for share in shares]) for k in alone})


@STAGES
def test_every_epoch_shows_every_row_once_and_shuffles_anew(folder, stage):
    make = pipeline.Batches(tokens.Tokens(folder, "train"), stage, VOCAB)
    seen, g = [], 0
    for epoch in range(4):
        plan = packing.plan(tokens.Tokens(folder, "train").lengths, 0, epoch, stage.packing)
        assert [make.epochs.locate(g + r)[1:] for r in range(len(plan))] == [(epoch, r) for r in range(len(plan))]
        seen.append(plan.documents.tolist())
        g += len(plan)
    assert len({tuple(x) for x in seen}) == 4 and len({tuple(sorted(x)) for x in seen}) == 1


def test_rows_are_found_in_any_order(folder):
    make = pipeline.Batches(tokens.Tokens(folder, "train"), WHOLE, VOCAB)
    ahead = {step: make(step) for step in (30, 2, 17, 0, 31)}
    again = pipeline.Batches(tokens.Tokens(folder, "train"), WHOLE, VOCAB)
    assert all(same(again(step), batch) for step, batch in ahead.items())


def test_a_document_is_masked_anew_in_every_epoch(folder):
    make = pipeline.Batches(tokens.Tokens(folder, "train"), ONE, VOCAB)
    rows = [make.unmasked(g) for g in range(41 * 6)]
    mine = [tuple(map(tuple, spans)) for ids, _, spans, _ in rows if np.array_equal(ids, rows[0][0])]
    assert len(mine) == 6 and len(set(mine)) >= 3


def test_seeds_give_other_rows_and_other_masks(folder):
    other = dataclasses.replace(WHOLE, training=dataclasses.replace(WHOLE.training, seed=1))
    data = tokens.Tokens(folder, "train")
    assert not same(pipeline.Batches(data, WHOLE, VOCAB)(0), pipeline.Batches(data, other, VOCAB)(0))


def test_validation_batches_are_the_same_at_every_call_and_for_every_training_seed(folder):
    other = dataclasses.replace(ONE, training=dataclasses.replace(ONE.training, seed=1))
    runs = [list(pipeline.eval_batches(folder, "validation", stage, VOCAB)) for stage in (ONE, ONE, other)]
    assert all(map(same, runs[0], runs[1])) and all(map(same, runs[0], runs[2]))
    moved = dataclasses.replace(ONE, eval_mask_seed=1)
    assert not all(map(same, runs[0], pipeline.eval_batches(folder, "validation", moved, VOCAB)))


def test_validation_takes_every_row_once_and_fills_up_with_padding(folder):
    found = list(pipeline.eval_batches(folder, "validation", ONE, VOCAB, masked=False))
    ids = np.concatenate([batch["inputs"] for batch in found])
    data = tokens.Tokens(folder, "validation")
    assert len(ids) == 18 and (ids[17] == 0).all() and found[2]["weights"][5].sum() == 0
    rows = {tuple(row[row > 0][1:-1].tolist()) for row in ids[:17]}
    assert rows == {tuple(x.tolist()) for x in data}


def test_unmasked_validation_rows_are_purely_causal(folder):
    for batch in pipeline.eval_batches(folder, "validation", WHOLE, VOCAB, masked=False):
        assert not VOCAB.is_sentinel(batch["inputs"]).any() and not (batch["modality"] == packing.INFILL).any()


def test_hosts_validate_as_many_batches_as_each_other(folder):
    alone = list(pipeline.eval_batches(folder, "validation", ONE, VOCAB))
    shares = [list(pipeline.eval_batches(folder, "validation", ONE, VOCAB, True, host, 3)) for host in range(3)]
    assert [len(share) for share in shares] == [len(alone)] * 3
    for step, batch in enumerate(alone):
        assert same(batch, {k: np.concatenate([share[step][k] for share in shares]) for k in batch})


def test_a_batch_that_does_not_divide_over_the_hosts_is_refused(folder):
    with pytest.raises(UserError, match=r"training.batch = 6: must be a multiple of the 4 processes"):
        pipeline.batches(folder, "train", WHOLE, VOCAB, 0, 0, 4)
    with pytest.raises(UserError, match="multiple of the 4 processes"):
        next(pipeline.eval_batches(folder, "validation", WHOLE, VOCAB, True, 0, 4))


def test_what_cannot_be_packed_is_refused_before_the_first_batch(folder):
    short = dataclasses.replace(WHOLE, packing=Packing("whole", 30))
    with pytest.raises(UserError, match="no document fits"):
        pipeline.batches(folder, "train", short, VOCAB)
    with pytest.raises(UserError, match="no split 'test'"):
        pipeline.batches(folder, "test", WHOLE, VOCAB)


def test_the_fingerprint_names_what_the_batches_follow_from(folder):
    data, other = tokens.Tokens(folder, "train"), tokens.Tokens(folder, "validation")
    more = dataclasses.replace(WHOLE, training=dataclasses.replace(WHOLE.training, steps=7))
    masked = dataclasses.replace(WHOLE, mask=Mask(rotate=0.1))
    base = pipeline.fingerprint(data, WHOLE, VOCAB)
    assert base == pipeline.fingerprint(data, more, VOCAB)
    assert len({base, *(pipeline.fingerprint(data, s, VOCAB) for s in (CHOP, masked))}) == 3
    assert base != pipeline.fingerprint(other, WHOLE, VOCAB)


def test_the_description_counts_the_first_epoch(folder):
    data = tokens.Tokens(folder, "train")
    found = pipeline.describe(data, dataclasses.replace(WHOLE, packing=Packing("whole", 50)))
    assert found["documents"] == 41 and found["tokens"] == data.lengths.sum()
    assert found["too_long"] == (data.lengths > 50 - 24 - 2).sum() and found["rows"] == 41 - found["too_long"]
    assert 0.3 < found["filled"] < 0.6 and pipeline.describe(data, CHOP)["filled"] == 1.0


def test_a_copy_for_a_worker_is_small_and_gives_the_same_batch(folder):
    make = pipeline.Batches(tokens.Tokens(folder, "train"), WHOLE, VOCAB)
    expected = make(3)
    copied = pickle.dumps(make)
    assert len(copied) < 5000 and same(pickle.loads(copied)(3), expected)


WORKER = """
import sys
import numpy as np, grain
from cm3jax.data import pipeline, tokens
from tests_stage import VOCAB, WHOLE

def probe(batch):
    import os, jax
    from jax._src import xla_bridge
    return batch | {"backends": np.array(len(xla_bridge._backends)), "pid": np.array(os.getpid())}

def main():
    import os
    make = pipeline.Batches(tokens.Tokens(sys.argv[1], "train"), WHOLE, VOCAB)
    it = iter(pipeline.iterate(grain.MapDataset.range(3, 10**9).map(make).map(probe), 2))
    pids = set()
    for step in range(3, 9):
        batch = next(it)
        assert batch.pop("backends") == 0, "a jax backend was initialised in a worker"
        pids.add(int(batch.pop("pid")))
        assert all(np.array_equal(batch[k], v) for k, v in make(step).items())
    assert len(pids - {os.getpid()}) == 2, "not in workers"
    it.close()

if __name__ == "__main__":
    main()
    print("fine")
"""


@pytest.mark.slow
def test_workers_give_the_same_batches_and_initialise_no_jax_backend(folder, tmp_path):
    (tmp_path / "tests_stage.py").write_text(
        f"from cm3jax.config import *\nfrom cm3jax.vocab import Vocab\nVOCAB = {VOCAB!r}\nWHOLE = {WHOLE!r}\n"
    )
    (tmp_path / "worker.py").write_text(WORKER)
    found = subprocess.run(
        [sys.executable, "worker.py", str(folder)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert found.stdout.strip() == "fine", found.stderr


def test_no_module_that_a_data_worker_needs_imports_jax():
    code = (
        "import sys; sys.modules['grain'] = None\n"  # grain imports jax itself, without a backend
        "from cm3jax.data import tokens, packing\nfrom cm3jax.tokenizers import text, document\n"
        "from cm3jax.objectives import causal_mask\nassert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@STAGES
def test_masking_in_the_pipeline_loses_no_token_but_the_tail_of_chop(folder, stage):
    make = pipeline.Batches(tokens.Tokens(folder, "train"), stage, VOCAB)
    for g in range(40):
        ids, *_ = make.unmasked(g)
        out = make.row(g)[0]
        assert len(out) <= 83
        back = causal_mask.unmask(out, VOCAB)
        assert np.array_equal(back, ids[: len(back)]) and (len(back) == len(ids) or stage is CHOP)


def test_threads_read_in_order(folder):
    make = pipeline.Batches(tokens.Tokens(folder, "train"), WHOLE, VOCAB)
    it = iter(pipeline.iterate(grain.MapDataset.range(0, 9).map(make), 0))
    found = list(it)
    assert len(found) == 9 and all(same(batch, make(step)) for step, batch in enumerate(found))
