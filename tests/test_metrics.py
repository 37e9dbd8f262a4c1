"""Sums and weights, what is written and shown."""

import io
import json
import math
import subprocess
import sys

import numpy as np
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c  # noqa: F401  (the module that writes what we read below)

from cm3jax import metrics


def test_means_weigh_batches_by_their_weights_and_leave_out_what_did_not_occur():
    sums = metrics.total([{"loss": (2.0, 1.0), "text": (0.0, 0.0)}, {"loss": (1.0, 3.0), "tokens": (9, 1)}])
    assert metrics.means(sums) == {"loss": 0.75}


def test_the_first_metric_that_is_not_finite_is_named():
    assert metrics.not_finite({"a": (1.0, 1.0), "b": (math.inf, 1.0), "c": (math.nan, 1.0)}) == "b"
    assert metrics.not_finite({"a": (1.0, 1.0)}) == ""


def test_a_line_holds_step_seconds_and_named_values(tmp_path):
    writer = metrics.Writer(tmp_path)
    writer.write(3, 1.5, "train", {"loss": 0.25})
    writer.write(3, 1.75, "validation", {"loss": 0.5})
    writer.close()
    assert metrics.lines(tmp_path / "metrics.jsonl") == [
        {"step": 3, "seconds": 1.5, "train/loss": 0.25},
        {"step": 3, "seconds": 1.75, "validation/loss": 0.5},
    ]


def test_tensorboard_gets_the_same_values(tmp_path):
    writer = metrics.Writer(tmp_path)
    writer.write(3, 1.5, "train", {"loss": 0.25})
    writer.close()
    assert ("train/loss", 3, 0.25) in [
        (value.tag, event.step, value.simple_value) for event in events(tmp_path) for value in event.summary.value
    ]


def events(folder):
    """The events of a TensorBoard file: length (8 bytes), its check (4), the event, its check (4)."""
    (path,) = folder.glob("events*")
    data, out = path.read_bytes(), []
    while data:
        size = int.from_bytes(data[:8], "little")
        out.append(event_pb2.Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    return out


def test_a_run_that_continues_drops_the_lines_after_its_step_and_a_torn_one(tmp_path):
    writer = metrics.Writer(tmp_path)
    for step in (2, 4, 6):
        writer.write(step, 1.0, "train", {"loss": 1.0})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 8, "sec')
    writer = metrics.Writer(tmp_path, 4)
    writer.close()
    assert [line["step"] for line in metrics.lines(tmp_path / "metrics.jsonl")] == [2, 4]
    assert writer.seen == {(2, "train"), (4, "train")}


def test_a_run_from_the_start_begins_a_new_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 0, "seconds": 1, "train/loss": 1}) + "\n")
    metrics.Writer(tmp_path).close()
    assert metrics.lines(tmp_path / "metrics.jsonl") == []


def test_rates_count_sums_over_time_and_steps_of_no_time_have_none():
    meter = metrics.Meter(seconds=100.0)
    assert meter.seconds >= 100
    rates = meter.rates({"tokens": (50.0, 1.0)}, 5)
    assert math.isclose(rates["tokens_per_second"], 10 * rates["steps_per_second"])
    assert meter.rates({}, 0) == {}


class Clock:
    """A clock that a test moves."""

    def __init__(self, monkeypatch):
        self.now = 50.0
        monkeypatch.setattr(metrics.time, "monotonic", lambda: self.now)

    def after(self, seconds):
        self.now += seconds


def test_step_times_are_those_between_ends_of_steps_and_start_anew_behind_a_pause(monkeypatch):
    clock = Clock(monkeypatch)
    meter = metrics.Meter()
    meter.waited(9.0)
    clock.after(100)
    meter.done()
    meter.pause()  # an evaluation: nothing of before counts
    for seconds in (1, 1, 1, 5):
        clock.after(seconds)
        meter.waited(seconds / 4)
        meter.done()
    rates = meter.rates({}, 4)
    assert rates["step_seconds_p50"] == 1 and math.isclose(rates["step_seconds_p90"], 1 + 0.7 * 4)
    assert rates["steps_per_second"] == 0.5 and rates["data_seconds"] == 0.5 and rates["data_share"] == 0.25
    clock.after(2)
    meter.done()
    assert meter.rates({}, 1)["step_seconds_p99"] == 2


def test_the_progress_line_shows_mfu_memory_and_waiting_where_there_is_something_to_say():
    out = io.StringIO()
    progress = metrics.Progress("decoder", 10, every=0, out=out)
    progress.show(1, {"loss": 1.0, "mfu": 0.5234, "hbm_peak_gib": 12.34, "data_share": 0.25})
    progress.show(2, {"loss": 1.0, "data_share": 0.04})
    assert out.getvalue().splitlines() == [
        "decoder: step 1/10, loss 1, MFU 52.3%, HBM 12.3 GiB, 25% waiting for data",
        "decoder: step 2/10, loss 1",
    ]


def test_without_a_terminal_a_plain_line_shows_the_progress_now_and_then():
    out = io.StringIO()
    progress = metrics.Progress("decoder", 10, every=3600, out=out)
    for step in (2, 4, 10):
        progress.show(step, {"loss": 1.25, "tokens_per_second": 123456.0, "steps_per_second": 2.0})
    progress.close()
    assert out.getvalue().splitlines() == [
        "decoder: step 2/10, loss 1.25, 123k tokens/s, 00:04 left",
        "decoder: step 10/10, loss 1.25, 123k tokens/s, 00:00 left",
    ]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_a_bar_shows_loss_rate_and_time_left():
    out = Terminal()
    progress = metrics.Progress("decoder", 10, start=4, out=out)
    progress.show(8, {"loss": 1.25, "items_per_second": 40.0, "steps_per_second": 2.0})
    progress.say("validation: loss 2")
    progress.close()
    text = out.getvalue()
    assert "decoder: validation: loss 2\n" in text and "loss 1.25, 40 items/s" in text and "8/10" in text


def test_a_host_that_is_not_the_first_is_quiet():
    out = io.StringIO()
    metrics.Progress("decoder", 10, out=out, quiet=True).show(10, {"loss": 1.0, "steps_per_second": 1.0})
    assert out.getvalue() == ""


def test_peak_memory_is_that_of_a_python_with_jax():
    assert 0.02 < metrics.peak_memory_gib() < 64


def test_peak_memory_of_a_program_is_not_that_of_the_process_that_started_it():
    held = np.ones(2**27)  # 1 GiB
    program = "from cm3jax import metrics; print(metrics.peak_memory_gib())"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert metrics.peak_memory_gib() > held.nbytes / 2**30 > float(out)
