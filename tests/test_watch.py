"""Rates per chip, MFU, memory, and the trace of some steps."""

import dataclasses
import gzip
import json
import pathlib
import sys

import jax
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import toy_task as toy

from cm3jax import checkpoint, metrics, trees
from cm3jax import config as configs
from cm3jax.train import loop, watch


@dataclasses.dataclass(frozen=True)
class Chip:
    device_kind: str = "TPU v5 lite"
    process_index: int = 0
    used: int = 0

    def memory_stats(self):
        return {"bytes_in_use": self.used, "peak_bytes_in_use": 2 * self.used} if self.used else None


def test_mfu_is_the_flops_done_over_those_that_the_chips_could():
    rates = {"steps_per_second": 0.5, "tokens_per_second": 1000.0}
    found = watch.per_chip(rates, 4 * 197e12, [Chip()] * 4)
    assert found == {"tokens_per_second_per_chip": 250.0, "mfu": pytest.approx(0.5)}


@pytest.mark.parametrize("chip, flops", [(Chip("cpu"), 1e12), (Chip(), 0.0)])
def test_where_peak_or_flops_are_not_known_there_is_no_mfu(chip, flops):
    assert watch.per_chip({"steps_per_second": 1.0}, flops, [chip]) == {}


def test_memory_is_that_of_the_fullest_chip_of_this_host():
    chips = [Chip(used=2**30), Chip(used=3 * 2**30), Chip(process_index=1, used=9 * 2**30)]
    assert watch.memory(chips) == {"hbm_gib": 3.0, "hbm_peak_gib": 6.0}
    assert watch.memory([Chip()]) == {}


def run(folder, **changes):
    training = toy.training(**{"mesh": configs.Mesh(2, 2, 2), **changes})
    return loop.train(toy.task(training), toy.batches, None, training, folder)


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """A run of 6 steps of which the 3rd and 4th are traced, and its final state."""
    folder = tmp_path_factory.mktemp("traced")
    return folder, run(folder, profile=(3, 4))


def events(folder):
    (path,) = folder.glob("profile/plugins/profile/*/*.trace.json.gz")
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def test_a_trace_of_the_asked_steps_lies_under_the_stage(traced):
    assert list(traced[0].glob("profile/plugins/profile/*/*.xplane.pb"))
    steps = {e["args"]["step_num"] for e in events(traced[0]) if e.get("name") == "train"}
    assert steps == {"3", "4"}


def test_a_trace_changes_no_result(traced, tmp_path):
    assert not (tmp_path / "profile").exists()
    plain = run(tmp_path)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(traced[1]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_trace_that_the_end_of_the_training_cuts_is_written(tmp_path):
    run(tmp_path, profile=(6, 9))
    assert {e["args"]["step_num"] for e in events(tmp_path) if e.get("name") == "train"} == {"6"}


def test_a_continued_training_traces_no_step_twice(traced):
    run(traced[0], steps=6, profile=(3, 4))
    assert len(list(traced[0].glob("profile/plugins/profile/*"))) == 1


def test_every_logged_line_says_how_fast_and_how_steady_the_steps_were(traced):
    lines = [line for line in metrics.lines(traced[0] / "metrics.jsonl") if "train/steps_per_second" in line]
    assert [line["step"] for line in lines] == [2, 3, 4, 6]
    for line in lines:
        p50, p90, p99 = (line[f"train/step_seconds_p{p}"] for p in (50, 90, 99))
        assert 0 < p50 <= p90 <= p99
        assert 0 <= line["train/data_seconds"] < 1 and 0 <= line["train/data_share"] < 1
        assert line["train/items_per_second_per_chip"] == pytest.approx(line["train/items_per_second"] / 8, rel=1e-4)
        assert "train/mfu" not in line and "train/hbm_gib" not in line  # a CPU has neither


def test_the_parameter_norm_is_that_of_the_weights_after_the_step(traced):
    params = checkpoint.restore(checkpoint.open(traced[0], keep=3), 4, abstract()).params
    norm = np.sqrt(
        sum(np.sum(np.square(x, dtype=np.float64)) for x in trees.named_leaves(jax.device_get(params)).values())
    )
    (line,) = [x for x in metrics.lines(traced[0] / "metrics.jsonl") if x["step"] == 4]
    assert line["train/parameter_norm"] == pytest.approx(norm, rel=1e-4)


def abstract():
    from cm3jax import sharding

    training = toy.training(mesh=configs.Mesh(2, 2, 2))
    return loop.compile(toy.task(training), training, sharding.mesh(training.mesh)).abstract


def test_watching_waits_for_no_step_before_the_host_is_two_ahead(tmp_path, monkeypatch):
    seen, real = [], jax.block_until_ready
    monkeypatch.setattr(jax, "block_until_ready", lambda x: seen.append("wait") or real(x))

    def batches(start):
        for step in range(start, 7):
            seen.append(step)
            yield toy.batch(step)

    training = toy.training(mesh=configs.Mesh(1, 1, 1), steps=7, log_every=100, save_every=100, evaluate_every=0)
    loop.train(toy.task(training), batches, None, training, tmp_path)
    assert seen[:2] == [0, "wait"]  # the first step compiles
    assert seen[2:13] == [1, 2, 3, "wait", 4, "wait", 5, "wait", 6, "wait", "wait"] and loop.AHEAD == 2
