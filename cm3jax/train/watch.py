"""What a person watches while a training runs: rates per chip, MFU, memory, and a trace of some steps.

Nothing here waits for the devices, but for the first and the last step of a trace.
"""

import contextlib
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
import optax

from cm3jax import metrics

PEAK = {
    "TPU v4": 275e12,  # cloud.google.com/tpu/docs/v4
    "TPU v5 lite": 197e12,  # cloud.google.com/tpu/docs/v5e
    "TPU v5": 459e12,  # cloud.google.com/tpu/docs/v5p
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,  # cloud.google.com/tpu/docs/v6e
    "NVIDIA A100-SXM4-40GB": 312e12,  # NVIDIA A100 datasheet, dense
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,  # NVIDIA H100 datasheet, SXM, dense (half of the sparse figure)
    "NVIDIA H200": 989.4e12,  # NVIDIA H200 datasheet, SXM, dense
}
"""`device_kind` as jax names it -> bfloat16 FLOP/s of one chip. What is not here gets no MFU."""

GIB = 2**30
PROFILE = "profile"
"""Folder of the traces in a stage's folder: `xprof --logdir RUN/decoder/profile` or TensorBoard's profile plugin."""

COUNTED = tuple(f"{name}_per_second" for name in metrics.COUNTS)

norm = jax.jit(optax.global_norm)


def per_chip(rates: dict[str, float], flops: float, devices: Iterable[Any]) -> dict[str, float]:
    """Return {"tokens_per_second_per_chip": ..., "mfu": ...}.

    Args:
      rates: `metrics.Meter.rates`'s.
      flops: Model FLOPs of a step; 0: not known, so no MFU.
      devices: Those that train. Of a kind that PEAK lacks: no MFU.
    """
    kinds = [d.device_kind for d in devices]
    found = {f"{k}_per_chip": v / len(kinds) for k, v in rates.items() if k in COUNTED}
    if flops and kinds[0] in PEAK and "steps_per_second" in rates:
        found["mfu"] = flops * rates["steps_per_second"] / (PEAK[kinds[0]] * len(kinds))
    return found


def memory(devices: Iterable[Any]) -> dict[str, float]:
    """Return {"hbm_gib": in use, "hbm_peak_gib": most so far} of this host's fullest chip; {} if jax tells none."""
    stats = [s for d in devices if d.process_index == jax.process_index() and (s := d.memory_stats())]
    names = {"hbm_gib": "bytes_in_use", "hbm_peak_gib": "peak_bytes_in_use"}
    return {name: max(s[key] for s in stats) / GIB for name, key in names.items() if stats and key in stats[0]}


class Profile:
    """Traces the steps first..last (counted from 1) of a training into `folder`/profile/, for xprof.

    Steps that another run has done are not traced again. The trace holds this host and its devices.
    """

    def __init__(self, steps: tuple[int, ...], folder: pathlib.Path):
        self.first, self.last = steps or (0, -1)
        self.folder, self.running = folder / PROFILE, False

    def step(self, number: int, before: Any) -> contextlib.AbstractContextManager:
        """Return the context of step `number`; `before` are results of the step before it, still under way."""
        if self.first <= number <= self.last and not self.running:
            jax.block_until_ready(before)
            jax.profiler.start_trace(str(self.folder))
            self.running = True
        return jax.profiler.StepTraceAnnotation("train", step_num=number) if self.running else contextlib.nullcontext()

    def after(self, number: int, results: Any) -> str:
        """End the trace behind its last step; return what to tell of it, or ""."""
        if not self.running or number < self.last:
            return ""
        jax.block_until_ready(results)
        self.close()
        return f"trace of steps {self.first} to {self.last}: xprof --logdir {self.folder}"

    def close(self) -> None:
        """End a trace that an interruption cut short; what it has is written."""
        if self.running:
            self.running = False
            jax.profiler.stop_trace()
