"""Adding up metrics, writing them (metrics.jsonl, TensorBoard), the progress line, time and memory."""

import json
import math
import pathlib
import re
import resource
import sys
import time

import numpy as np
import tensorboardX
import tqdm

COUNTS = ("tokens", "items")
"""Metrics whose sum counts what was processed; shown as a rate."""


def total(batches) -> dict[str, tuple[float, float]]:
    """Return the sums of several batches' {name: (sum, weight)} of host numbers."""
    out: dict[str, tuple[float, float]] = {}
    for metrics in batches:
        for name, (value, weight) in metrics.items():
            old = out.get(name, (0.0, 0.0))
            out[name] = (old[0] + float(value), old[1] + float(weight))
    return out


def means(sums) -> dict[str, float]:
    """Return {name: sum / weight}; names of weight 0 (a modality that did not occur) are left out."""
    return {name: value / weight for name, (value, weight) in sums.items() if weight and name not in COUNTS}


def not_finite(metrics) -> str:
    """Return the first name whose sum is NaN or infinite, or ""."""
    return next((name for name, (value, _) in metrics.items() if not math.isfinite(float(value))), "")


def peak_memory_gib() -> float:
    """Return the largest resident memory that this process has had, in GiB.

    Linux hands ru_maxrss of the process that starts a program down to the program; VmHWM is the program's own.
    """
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # macOS: bytes


class Writer:
    """Writes scalars to `folder`/metrics.jsonl, one object a line, and to TensorBoard event files beside it.

    A run that continues at `step` first drops what was written after that step, so that every step has one line.
    """

    def __init__(self, folder, step: int = 0):
        self.path = pathlib.Path(folder) / "metrics.jsonl"
        kept = [line for line in lines(self.path) if line["step"] <= step]
        self.seen = {(line["step"], name.split("/")[0]) for line in kept for name in line if "/" in name}
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept if step))
        self.events = tensorboardX.SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(self, step: int, seconds: float, group: str, values: dict[str, float]) -> None:
        """Write {group/name: value} of one step; `seconds` is the training time so far."""
        named = {f"{group}/{name}": float(f"{value:.9g}") for name, value in values.items()}  # 9 tell all float32 apart
        with self.path.open("a") as f:
            f.write(json.dumps({"step": step, "seconds": round(seconds, 2), **named}) + "\n")
        for name, value in named.items():
            self.events.add_scalar(name, value, step)
        self.events.flush()
        self.seen.add((step, group))

    def close(self) -> None:
        self.events.close()


def lines(path) -> list[dict]:
    """Return the objects of a metrics.jsonl; a last line that a crash cut short is left out."""
    path = pathlib.Path(path)
    out = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            out.append(json.loads(text))
        except ValueError:
            continue
    return out


PERCENTILES = (50, 90, 99)


class Meter:
    """Wall time and rates of a run. `seconds` counts on from where the run was interrupted.

    Between two calls of `rates` it is told of each step twice: how long the data took, and that the step is done. The
    time of a step is that from the end of the one before, so that nothing has to wait for the devices.
    """

    def __init__(self, seconds: float = 0.0):
        self.start = time.monotonic() - seconds
        self.pause()

    def waited(self, seconds: float) -> None:
        """Count the time that a step's data took."""
        self.data.append(seconds)

    def done(self) -> None:
        """Note that a step is done."""
        now = time.monotonic()
        self.took.append(now - self.before)
        self.before = now

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def rates(self, sums, steps: int) -> dict[str, float]:
        """Return {"tokens_per_second": ..., "steps_per_second": ...} since the last call."""
        took, data, each = max(time.monotonic() - self.last, 1e-9), self.data, self.took
        self.pause()
        if not steps:
            return {}
        out = {f"{name}_per_second": sums[name][0] / took for name in COUNTS if name in sums}
        if each:
            out |= {f"step_seconds_p{p}": float(np.percentile(each, p)) for p in PERCENTILES}
        if data:
            out |= {"data_seconds": sum(data) / len(data), "data_share": sum(data) / took}
        return {**out, "steps_per_second": steps / took}

    def pause(self) -> None:
        """Leave the time since the last call out of the next rates (evaluation, saving)."""
        self.last = self.before = time.monotonic()
        self.data: list[float] = []
        self.took: list[float] = []


SHOWN = {
    "mfu": ("MFU {:.1%}", 0.0),
    "hbm_peak_gib": ("HBM {:.3g} GiB", 0.0),
    "data_share": ("{:.0%} waiting for data", 0.05),
}
"""What the progress line shows beside loss and rate, and the value from which it is worth a word."""


class Progress:
    """A progress bar on a terminal; elsewhere a plain line every `every` seconds."""

    def __init__(self, name: str, steps: int, start: int = 0, every: float | int = 15, out=None, quiet=False):
        self.out = out or sys.stdout
        self.quiet = quiet
        self.name, self.steps, self.every, self.spoken = name, steps, every, -math.inf
        terminal = self.out.isatty()
        self.bar = tqdm.tqdm(total=steps, initial=start, desc=name, file=self.out, disable=quiet or not terminal)

    def show(self, step: int, values: dict[str, float]) -> None:
        """Show where the run is; the rate is that of the last interval."""
        parts = [f"loss {values['loss']:.4g}"] if "loss" in values else []
        parts += [f"{_short(values[k])} {k[:-11]}/s" for k in (f"{c}_per_second" for c in COUNTS) if k in values]
        parts += [text.format(values[k]) for k, (text, least) in SHOWN.items() if values.get(k, -1) >= least]
        if not self.bar.disable:
            self.bar.set_postfix_str(", ".join(parts), refresh=False)
            self.bar.update(step - self.bar.n)
        elif time.monotonic() - self.spoken >= self.every or step == self.steps:
            self.spoken = time.monotonic()
            if rate := values.get("steps_per_second"):
                parts.append(f"{tqdm.tqdm.format_interval(int((self.steps - step) / rate))} left")
            self.say(", ".join([f"step {step}/{self.steps}", *parts]))

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if not self.bar.disable:
            self.bar.write(f"{self.name}: {text}", file=self.out)
        elif not self.quiet:
            print(f"{self.name}: {text}", file=self.out, flush=True)

    def close(self) -> None:
        self.bar.close()


def say(text: str) -> None:
    """Print a line above whatever progress bar there is, from any thread."""
    tqdm.tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def _short(number: float) -> str:
    """Return 1234567 as "1.23M"."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"
