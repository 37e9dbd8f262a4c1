"""Every array of a training step, read from its program without running or compiling it."""

import jax
import jax.numpy as jnp

from cm3jax import rng, sharding
from cm3jax.train import lm


def arrays_of(stage, vocab):
    """Return the shape and dtype of all values in a train step of the decoder, inside of loops and layers too."""
    task = lm.task(stage, vocab)
    state = jax.eval_shape(lambda key: sharding.unbox(task.init(key)), jax.random.key(0))
    step = lambda state, batch: task.step(state, batch, rng.key(0, "step", state.step))  # noqa: E731
    return list(_values(jax.make_jaxpr(step)(state, batch(stage)).jaxpr))


def batch(stage):
    """Return the shapes of a batch, as `data.packing.arrays` makes them."""
    row = lambda dtype: jax.ShapeDtypeStruct((stage.training.batch, stage.packing.length), dtype)  # noqa: E731
    ints = dict.fromkeys(("inputs", "targets", "positions", "segments"), row(jnp.int32))
    return {**ints, "weights": row(jnp.float32), "modality": row(jnp.int8)}


def _values(jaxpr):
    for equation in jaxpr.eqns:
        yield from (v.aval for v in (*equation.invars, *equation.outvars) if hasattr(v.aval, "shape"))
        if equation.primitive.name != "pallas_call":  # inside are a chip's blocks
            for inner in _programs(equation.params):
                yield from _values(inner)


def _programs(params):
    """The bodies of loops, branches and calls."""
    for value in params.values():
        for x in value if isinstance(value, (tuple, list)) else (value,):
            x = getattr(x, "jaxpr", x)
            if hasattr(x, "eqns"):
                yield x
