"""The decoder as a task of the training loop (arXiv 2309.02591 §2.2-2.3)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cm3jax import config as configs
from cm3jax import optim, sharding
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
    """Return how the decoder starts, steps and is evaluated. Batches are `data.pipeline`'s: [b, t] arrays.

    What `stage.trainable` leaves out has no gradient, no optimizer state and no update: it stays bit for bit.
    """
    net, training = model(stage, vocab), stage.training
    shapes = jax.eval_shape(lambda key: decoder.init(net, key), jax.random.key(0))
    part = Part(stage, vocab)
    optimizer = optim.make(training.optimizer, training.steps, jax.eval_shape(part.taken, shapes))

    def init(key):
        params = decoder.init(net, key)
        return states.create(params, optimizer, {"ema": params} if training.ema else {}, part.taken(params))

    def step(state, batch, key):
        loss = lambda own, batch, key: losses(net, stage, part.put(state.params, own), batch)  # noqa: E731
        own = part.taken(state.params)
        gradients, metrics = states.gradients(loss, own, batch, key, training.accumulate)
        metrics["gradient_norm"] = (optax.global_norm(gradients), jnp.float32(1))
        updated = states.update(state.replace(params=own), gradients, optimizer)
        state = updated.replace(params=part.put(state.params, updated.params))
        return states.with_average(state, training.ema), metrics

    def evaluate(state, batch):
        return losses(net, stage, states.averaged(state), batch)[1]

    return states.Task(init, step, evaluate, step_flops(stage, vocab))


def drawn(params, vocab: Vocab, seen: np.ndarray, key):
    """Return the parameters with new rows for text pieces that a model never saw, in the table and an untied head.

    Args:
      seen: bool [vocab.size], ids that its training documents hold.
      key: Of the new rows: normal, with the root mean square of the rows of pieces that it saw.
    """
    text = vocab.is_text(np.arange(vocab.size))
    new, old = text & ~seen, text & seen

    def one(rows, key):
        scale = jnp.sqrt(jnp.sum(jnp.square(rows) * old[:, None]) / (old.sum() * rows.shape[1]))
        return jnp.where(new[:, None], scale * jax.random.normal(key, rows.shape, rows.dtype), rows)

    tables = [name for name in ("table", "head") if name in params]
    keys = dict(zip(tables, jax.random.split(key, len(tables)), strict=True))
    return params | {
        name: jax.jit(one, out_shardings=params[name].sharding)(params[name], keys[name]) for name in tables
    }


def step_flops(stage: configs.DecoderStage, vocab: Vocab) -> float:
    """Return the model FLOPs of a step; without a backward pass through the layers, about a third of all."""
    count = flops.step(stage.model, vocab.size, stage.training.batch, stage.packing.length)
    return count if stage.trainable == "all" else count / 3


@dataclasses.dataclass(frozen=True)
class Part:
    """The part of the parameters that a stage trains: all, or the output layer's rows of image codes."""

    stage: configs.DecoderStage
    vocab: Vocab

    @property
    def rows(self) -> slice:
        return slice(self.vocab.image_start, self.vocab.sentinel_start)

    def taken(self, params):
        """Return the part, of parameters that are boxed or not."""
        if self.stage.trainable == "all":
            return params
        head = params["head"]
        return {"head": head.replace(value=head.value[self.rows]) if sharding.is_box(head) else head[self.rows]}

    def put(self, params, own):
        """Return the parameters (unboxed) with the part replaced; the rest has no gradient."""
        if self.stage.trainable == "all":
            return own
        kept = jax.lax.stop_gradient(params)
        return {**kept, "head": kept["head"].at[self.rows].set(own["head"])}


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
