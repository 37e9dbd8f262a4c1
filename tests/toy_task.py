"""A tiny task for the loop's tests: a two-layer network with named axes on a fixed random regression."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cm3jax import config as configs
from cm3jax import optim, rng, sharding
from cm3jax.train import state as states

WIDTH, HIDDEN, LAYERS = 16, 32, 3
FLOPS = 1e6
"""What the task says that its step takes; the tests of MFU count with it."""


class Layer(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x, _):
        init = nn.initializers.normal(0.2)
        up = self.param("up", nn.with_logical_partitioning(init, ("embed", "mlp")), (WIDTH, self.hidden))
        down = self.param("down", nn.with_logical_partitioning(init, ("mlp", "embed")), (self.hidden, WIDTH))
        scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, ("norm",)), (WIDTH,))
        h = sharding.constrain(jax.nn.relu((x * scale) @ up), "batch", "act_mlp")
        return x + h @ down, None


class Network(nn.Module):
    hidden: int = HIDDEN

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=LAYERS,
            metadata_params={nn.PARTITION_NAME: "layer"},
        )
        return sharding.constrain(stack(self.hidden, name="layers")(x, None)[0], "batch", "width")


def params(key, hidden=HIDDEN):
    """Boxed parameters."""
    return Network(hidden).init(key, jnp.ones((1, WIDTH)))["params"]


def loss(params, batch, key, hidden=HIDDEN, noise=0.01):
    """Weighted squared error with a little noise from the key, so that the key matters."""
    x = batch["x"] + noise * jax.random.normal(key, ())
    error = jnp.sum((Network(hidden).apply({"params": params}, x) - batch["y"]) ** 2, -1)
    total, weight = jnp.sum(batch["w"] * error), jnp.sum(batch["w"])
    return (total, weight), {"loss": (total, weight), "items": (jnp.float32(batch["w"].shape[0]), jnp.float32(1))}


def task(training: configs.Training, hidden=HIDDEN, noise=0.01, break_at=-1) -> states.Task:
    """The task of some settings; the same object for the same ones, so that tests compile it once."""
    return _task(training.optimizer, training.steps, training.accumulate, hidden, noise, break_at)


@functools.cache
def _task(optimizer, steps, accumulate, hidden, noise, break_at) -> states.Task:
    """As `task`. The update of step `break_at` makes the weights infinite without a sign of it in the metrics."""
    start = functools.partial(params, hidden=hidden)
    objective = functools.partial(loss, hidden=hidden, noise=noise)
    optimizer = optim.make(optimizer, steps, jax.eval_shape(start, jax.random.key(0)))

    def init(key):
        boxed = start(key)
        return states.create(boxed, optimizer, {"ema": boxed})

    def step(state, batch, key):
        gradients, found = states.gradients(objective, state.params, batch, key, accumulate)
        new = states.update(state, gradients, optimizer)
        new = new.replace(params=jax.tree.map(lambda x: jnp.where(new.step == break_at, jnp.inf, x), new.params))
        return new.replace(extra={"ema": states.average(state.extra["ema"], new.params, 0.9, new.step)}), found

    def evaluate(state, batch):
        return objective(state.params, batch, rng.key(0, "evaluate"))[1]

    return states.Task(init, step, evaluate, FLOPS)


def batch(step: int, rows: int = 16, nan: bool = False):
    """The batch of a step: a function of the step alone."""
    draw = np.random.default_rng((7, step))
    x = draw.normal(size=(rows, WIDTH)).astype(np.float32)
    y = np.roll(x, 1, -1) * 0.5
    return {"x": x, "y": y * np.nan if nan else y, "w": draw.integers(0, 3, rows).astype(np.float32)}


def batches(start: int):
    step = start
    while True:
        yield batch(step)
        step += 1


def eval_batches():
    return iter([batch(1_000_000 + i) for i in range(4)])


def training(**changes) -> configs.Training:
    base = dict(
        steps=6,
        batch=16,
        optimizer=configs.Optimizer(peak_lr=1e-2, warmup=2),
        log_every=2,
        save_every=2,
        evaluate_every=3,
        evaluate_batches=2,
        keep=3,
    )
    return configs.Training(**{**base, **changes})
