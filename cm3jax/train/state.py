"""What training carries from step to step, what a task is, and gradients over a global batch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

Metrics = dict[str, tuple[Any, Any]]
"""Name -> (sum, weight): they add up over parts, batches and hosts; the value is sum / weight."""


@flax.struct.dataclass
class TrainState:
    """Everything that a checkpoint holds.

    Attributes:
      step: Updates done, int32 scalar.
      params: Weights, float32.
      opt_state: The optimizer's.
      extra: The task's own tree, such as {"ema": averaged weights, "usage": ...}; sharded and saved like the rest.
    """

    step: Any
    params: Any
    opt_state: Any
    extra: Any


@dataclasses.dataclass(frozen=True)
class Task:
    """What the loop trains: pure functions, not jitted.

    Attributes:
      init: key -> TrainState, with the parameters still in linen's boxes (`create`); the loop unboxes.
      step: (state, batch, key) -> (state with step + 1, metrics). Metrics must hold "loss"; "tokens" or "items", whose
        sum is the count of non-padding tokens or pictures, gives the rate that the progress bar shows.
      evaluate: (state, batch) -> metrics; None for a task without validation.
      flops: Model FLOPs of a step over the global batch, in closed form, for MFU; 0: not known.
    """

    init: Callable[[jax.Array], TrainState]
    step: Callable[[TrainState, Any, jax.Array], tuple[TrainState, Metrics]]
    evaluate: Callable[[TrainState, Any], Metrics] | None = None
    flops: float = 0.0


def create(params, optimizer: optax.GradientTransformation, extra=None, trained=None) -> TrainState:
    """Return the state of step 0.

    Args:
      params: As `model.init` returns them, boxed: the optimizer's state then carries the same axis names.
      optimizer: From `optim.make`.
      extra: The task's own tree.
      trained: The part of the parameters that the optimizer is of; None: all.
    """
    opt_state = optimizer.init(params if trained is None else trained)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, {} if extra is None else extra)


def update(state: TrainState, gradients, optimizer: optax.GradientTransformation) -> TrainState:
    """Return the state one step on, with these gradients (tree like `params`) applied."""
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state)


def average(ema, params, decay: float, step):
    """Return the exponential moving average of the weights after `step` updates.

    The decay warms up as (1 + step) / (10 + step), so that the random initial weights are soon forgotten.
    """
    decay = jnp.minimum(decay, (1 + step) / (10 + step)).astype(jnp.float32)
    return jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), ema, params)


def with_average(state: TrainState, decay: float) -> TrainState:
    """Return the state with the average of its weights one step on; as it is, if it keeps none."""
    if "ema" not in state.extra:
        return state
    ema = average(state.extra["ema"], state.params, decay, state.step)
    return state.replace(extra=state.extra | {"ema": ema})


def averaged(state: TrainState):
    """Return the averaged weights, or the weights themselves if none are kept."""
    return state.extra.get("ema", state.params)


def add(a: Metrics, b: Metrics) -> Metrics:
    """Return the metrics of two batches together."""
    return jax.tree.map(jnp.add, a, b)


def gradients(loss: Callable, params, batch, key: jax.Array, parts: int = 1) -> tuple[Any, Metrics]:
    """Return the gradients of Σ sum / Σ weight over the global batch, and the metrics.

    The mean is taken once, over all parts, so that accumulation changes memory and not the loss, however the weights
    fall. A part takes every `parts`-th row: with the rows split over devices, each keeps its own.

    Args:
      loss: (params, batch, key) -> ((sum, weight), metrics), with sums over rows and a weight that does not depend on
        `params`.
      params: Tree to differentiate by.
      batch: Tree of arrays [b, ...].
      key: Part i gets fold_in(key, i).
      parts: Number of parts; divides b.
    """

    def total(params, batch, key):
        (value, weight), metrics = loss(params, batch, key)
        return value, (weight, metrics)

    def part(rows, i):
        (_, (weight, metrics)), found = jax.value_and_grad(total, has_aux=True)(
            params, rows, jax.random.fold_in(key, i)
        )
        return found, weight, metrics

    (found, weight, metrics), _ = over_parts(lambda rows, i: (part(rows, i), None), batch, parts)
    return jax.tree.map(lambda g: g / jnp.maximum(weight, 1e-9).astype(g.dtype), found), metrics


def split(batch, parts: int):
    """Return [parts, b / parts, ...] arrays; part i holds rows i, i + parts, i + 2 parts, ..."""

    def one(x):
        if x.shape[0] % parts:
            raise ValueError(f"a batch of {x.shape[0]} rows does not split into accumulate = {parts} parts")
        return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)

    return jax.tree.map(one, batch)


def over_parts(function, batch, parts: int):
    """Return the sum over the parts of a batch of function(rows, i)[0], and the stacked function(rows, i)[1]."""
    if parts == 1:
        return function(batch, 0)
    rows = split(batch, parts)

    def body(total, xs):
        found, rest = function(*xs)
        return jax.tree.map(jnp.add, total, found), rest

    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], rows), jnp.int32(0))[0]
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(body, zeros, (rows, jnp.arange(parts)))
