"""Training of the retriever, as a task for the one loop (arXiv 2103.00020 §2.3-2.5)."""

import math

import jax
import jax.numpy as jnp
import optax

from cm3jax import config as configs
from cm3jax import optim, sharding
from cm3jax.nn import clip, flops
from cm3jax.objectives import contrastive
from cm3jax.train import state as states
from cm3jax.types import UserError

MOST_SCALE = math.log(100.0)
"""Of the learned logarithm of the inverse temperature: beyond, training becomes unstable (arXiv 2103.00020 §2.5)."""
FEWEST = 2
"""Pairs of a batch: with one alone there is nothing to tell apart."""


def task(stage: configs.Retriever, vocab: int) -> states.Task:
    """Return how the retriever starts, steps and is evaluated. Batches are `data.pair_batches`'.

    Args:
      vocab: Rows of the text tower's table.

    Raises:
      UserError: if a batch holds no wrong answers.
    """
    training = stage.training
    if training.batch < FEWEST:
        raise UserError(
            f"retriever.training.batch = {training.batch}: must be at least {FEWEST}, to have wrong answers"
        )
    net = clip.CLIP(stage.model, vocab, stage.init_temperature)
    shapes = jax.eval_shape(lambda key: clip.init(net, key), jax.random.key(0))
    optimizer = optim.make(training.optimizer, training.steps, shapes)

    def init(key):
        params = clip.init(net, key)
        return states.create(params, optimizer, {"ema": params} if training.ema else {})

    def step(state, batch, key):
        loss = lambda params: losses(net, params, batch, training.accumulate)  # noqa: E731
        gradients, metrics = jax.grad(loss, has_aux=True)(state.params)
        metrics["gradient_norm"] = (optax.global_norm(gradients), jnp.float32(1))
        state = states.update(state, gradients, optimizer)
        scale = jnp.minimum(state.params["logit_scale"], MOST_SCALE)
        state = state.replace(params=state.params | {"logit_scale": scale})
        return states.with_average(state, training.ema), metrics

    def evaluate(state, batch):
        return losses(net, states.averaged(state), batch, 1)[1]

    return states.Task(init, step, evaluate, flops.contrastive(stage.model, training.batch))


def losses(net: clip.CLIP, params, batch, parts: int):
    """Return (mean loss, metrics) of a batch: in nats a pair, and the share of texts and pictures that find their own.

    Args:
      parts: The vectors are made in this many parts, one after another, and again in the backward pass, so that only
        one part's activations exist at a time; the loss compares all of them.
    """
    texts, pictures, scale = vectors(net, params, batch, parts)
    found, right = contrastive.losses(texts, pictures, scale)
    b = jnp.float32(len(found))
    metrics = {name: (jnp.sum(x), b) for name, x in {"loss": found, **right}.items()}
    metrics |= {"temperature": (1 / scale, jnp.float32(1)), "items": (b, jnp.float32(1))}
    return jnp.mean(found), jax.lax.stop_gradient(metrics)


def vectors(net: clip.CLIP, params, batch, parts: int):
    """Return the normalised vectors [b, z] of texts and of pictures, in one order of the rows, and the scale."""

    def embed(rows):
        return net.apply({"params": params}, rows["ids"], rows["ends"], rows["pictures"])

    if parts == 1:
        return embed(batch)
    texts, pictures, scale = jax.lax.map(jax.checkpoint(embed), states.split(batch, parts))
    join = lambda x: sharding.constrain(x.reshape(-1, x.shape[-1]), "batch", "width")  # noqa: E731
    return join(texts), join(pictures), scale[0]
