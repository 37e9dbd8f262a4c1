"""AdamW as in the paper, or Muon for the hidden matrices with AdamW for the rest; learning rate schedules.

Which parameter is a matrix, and which of its sides is the input, is read from its logical axis names (see sharding.py),
so that a stack of layers [layer, embed, heads] is orthogonalised layer by layer and not as one flat matrix.
"""

import math

import jax
import optax
from optax.contrib import MuonDimensionNumbers

import cm3jax.config as configs
import cm3jax.sharding as sharding

MUON_MOMENTUM = 0.95  # Keller Jordan's, as in optax

TABLES = frozenset({"vocab", "table_width", "position", "norm"})
"""Parameters with one of these axes are no hidden matrices: Muon leaves them to Adam."""


def make(config: configs.Optimizer, steps: int, params) -> optax.GradientTransformation:
    """Return the optimizer: clipping by the global norm, then AdamW or Muon, with decoupled weight decay.

    Decay takes every parameter of two or more dimensions (the layer axis not counted), embedding tables included, and
    no vectors. OPT decays all parameters alike (arXiv 2205.01068); CM3Leon has neither biases nor learned norms (arXiv
    2309.02591 §2.3), so there both rules are the same.

    Args:
      config: Its settings.
      steps: Updates of the whole run, for the schedule.
      params: The parameters or their shapes, boxed with their axis names, as `jax.eval_shape(init, key)` gives.
    """
    decayed = _leaves(params, lambda names, shape: len(_own(names, shape)) >= 2)
    parts = [optax.clip_by_global_norm(config.clip)] if config.clip else []
    if config.name == "adamw":
        parts.append(_adamw(config, steps, decayed))
    else:
        dims = _leaves(params, matrix)
        labels = jax.tree.map(lambda d: "adam" if d is None else "muon", dims, is_leaf=_is_dims)
        both = {"adam": _adamw(config, steps, decayed), "muon": _muon(config, steps, dims)}
        parts.append(optax.partition(both, labels))
    return optax.chain(*parts)


def schedule(config: configs.Optimizer, steps: int, peak: float) -> optax.Schedule:
    """Return step -> learning rate: linear warm-up from 0, then the way down to final_fraction x peak at `steps`."""
    warmup = min(config.warmup, max(steps - 1, 0))
    down, end = max(steps - warmup, 1), peak * config.final_fraction
    after = {
        "linear": optax.linear_schedule(peak, end, down),
        "cosine": optax.cosine_decay_schedule(peak, down, config.final_fraction),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    # (step + 1): the first update is not thrown away at rate 0.
    return optax.join_schedules([lambda step: peak * (step + 1) / (warmup + 1), after], [warmup])


def matrix(names, shape) -> MuonDimensionNumbers | None:
    """Return which axes of a hidden matrix are its input and its output, None for what is none.

    Axes named "layer" are neither: each index along them is a matrix of its own. Of the others, a leading "embed" is
    the input of all the rest, (embed, heads, head); else the last is the output, (heads, head, embed) or a
    convolution's (None, None, conv_in, conv_out). A matrix has at least two named axes.
    """
    own = _own(names, shape)
    named = [i for i in own if names is not None and names[i] is not None]
    if len(named) < 2 or TABLES & {names[i] for i in named}:
        return None
    cut = 1 if names[own[0]] == "embed" else -1
    return MuonDimensionNumbers(tuple(own[:cut]), tuple(own[cut:]))


def _own(names, shape) -> list[int]:
    """Return the axes of a parameter that are not a stack of layers."""
    return [i for i in range(len(shape)) if names is None or names[i] != "layer"]


def _leaves(params, function):
    """Return function(names, shape) of every parameter; names is None for one without a box."""

    def one(x):
        return function(tuple(x.names), x.value.shape) if sharding.is_box(x) else function(None, x.shape)

    return jax.tree.map(one, params, is_leaf=sharding.is_box)


def _is_dims(x) -> bool:
    return x is None or isinstance(x, MuonDimensionNumbers)


def _adamw(config: configs.Optimizer, steps: int, decayed) -> optax.GradientTransformation:
    return optax.chain(
        optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=config.moment_dtype),
        # a function, so that inside a partition the mask meets parameters of the partition's own structure
        optax.add_decayed_weights(config.weight_decay, lambda tree: _like(decayed, tree, False)),
        optax.scale_by_learning_rate(schedule(config, steps, config.peak_lr)),
    )


def _muon(config: configs.Optimizer, steps: int, dims) -> optax.GradientTransformation:
    """Return Muon with the scale of its author, sqrt(max(1, out / in)), and decoupled decay."""
    masked = jax.tree.map(lambda d: optax.MaskedNode() if d is None else d, dims, is_leaf=_is_dims)

    def scale(updates, params=None):
        return jax.tree.map(lambda u, d: u * _width_scale(u.shape, d), updates, masked)

    return optax.chain(
        optax.contrib.scale_by_muon(
            beta=MUON_MOMENTUM, eps=config.eps, mu_dtype=config.moment_dtype, weight_dimension_numbers=masked
        ),
        optax.stateless(scale),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(schedule(config, steps, config.muon_lr)),
    )


def _width_scale(shape, dims: MuonDimensionNumbers) -> float:
    fan_in = math.prod(shape[i] for i in dims.reduction_axis)
    fan_out = math.prod(shape[i] for i in dims.output_axis)
    return math.sqrt(max(1.0, fan_out / fan_in))


def _like(flags, tree, default):
    """Return the flags with `default` wherever `tree` has optax's hole instead of a parameter."""
    hole = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
    return jax.tree.map(lambda flag, x: default if hole(x) else flag, flags, tree, is_leaf=hole)
