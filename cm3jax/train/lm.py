"""The decoder as a task of the training loop (arXiv 2309.02591 §2.2-2.3)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cm3jax import config as configs
from cm3jax import optim
from cm3jax.nn import attention_paths, decoder, flops
from cm3jax.objectives import lm
from cm3jax.train import state as states
from cm3jax.types import UserError
from cm3jax.vocab import Vocab

MODALITIES = ("text", "image", "infill")
"""Names of the values 0, 1, 2 of a batch's "modality"; infill is the moved part of a masked span."""
RETRIEVED = 4
"""Added to the modality of a token in a retrieved document (`data.packing.RETRIEVED`)."""


def model(stage: configs.DecoderStage, vocab: Vocab) -> decoder.Decoder:
    """Return the network that a stage trains."""
    return decoder.Decoder(stage.model, vocab.size, stage.packing.length)


def resolve(stage: configs.DecoderStage, device: Any) -> configs.DecoderStage:
    """Return the stage with attention "auto" replaced by the best path for a device, such as one of an absent slice.

    Raises:
      UserError: if the stage asks for a path that this device, or the shape of the stage, does not allow.
    """
    refusal = lambda path: attention_paths.refusal(path, stage.model, stage.packing, device)  # noqa: E731
    path = stage.model.attention
    if path == "auto":
        path = next(p for p in ("splash", "cudnn", "xla") if not refusal(p))
    elif reason := refusal(path):
        raise UserError(f"decoder.model.attention = {path}: {reason}; use auto or xla")
    return dataclasses.replace(stage, model=dataclasses.replace(stage.model, attention=path))


def task(stage: configs.DecoderStage, vocab: Vocab) -> states.Task:
    """Return how the decoder starts, steps and is evaluated. Batches are `data.pipeline`'s: [b, t] arrays."""
    net, training = model(stage, vocab), stage.training
    shapes = jax.eval_shape(lambda key: decoder.init(net, key), jax.random.key(0))
    optimizer = optim.make(training.optimizer, training.steps, shapes)

    def init(key):
        params = decoder.init(net, key)
        return states.create(params, optimizer, {"ema": params} if training.ema else {})

    def step(state, batch, key):
        loss = lambda params, batch, key: losses(net, stage, params, batch)  # noqa: E731
        gradients, metrics = states.gradients(loss, state.params, batch, key, training.accumulate)
        metrics["gradient_norm"] = (optax.global_norm(gradients), jnp.float32(1))
        state = states.update(state, gradients, optimizer)
        if training.ema:
            ema = states.average(state.extra["ema"], state.params, training.ema, state.step)
            state = state.replace(extra={"ema": ema})
        return state, metrics

    def evaluate(state, batch):
        params = state.extra["ema"] if training.ema else state.params
        return losses(net, dataclasses.replace(stage, z_loss=0.0), params, batch)[1]

    return states.Task(init, step, evaluate, flops.step(stage.model, vocab.size, training.batch, stage.packing.length))


def losses(net: decoder.Decoder, stage: configs.DecoderStage, params, batch):
    """Return ((Σ w·nll + z-loss, Σ w), metrics) of a batch; nll in nats per token, by modality too."""
    hidden, _ = net.apply({"params": params}, batch["inputs"], batch["positions"], batch["segments"])
    nll, log_z = lm.token_losses(params, stage.model, hidden, batch["targets"], stage.loss_chunk)
    w = batch["weights"]
    total = jnp.sum(w * (nll + stage.z_loss * jnp.square(log_z)))
    metrics = {"loss": (jnp.sum(w * nll), jnp.sum(w))}
    for i, name in enumerate(MODALITIES):
        for prefix, modality in (("loss_", i), ("loss_retrieved_", RETRIEVED + i)):
            own = w * (batch["modality"] == modality)
            metrics[prefix + name] = (jnp.sum(own * nll), jnp.sum(own))
    metrics["tokens"] = (jnp.sum(batch["segments"] > 0).astype(jnp.float32), jnp.float32(1))
    return (total, jnp.sum(w)), jax.lax.stop_gradient(metrics)
