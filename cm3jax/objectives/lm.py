"""Next-token loss over the one vocabulary, in chunks so that full logits never exist (arXiv 2309.02591 §2.2)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cm3jax import config as configs
from cm3jax import sharding
from cm3jax.nn import decoder, layers


def token_losses(
    params, config: configs.Decoder, hidden: Float[Array, "b t d"], targets: Int[Array, "b t"], chunk: int
) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    """Return -log p(target) and log Σ exp(logits) of every position, in nats, float32.

    Args:
      chunk: Positions whose [b, chunk, v] logits exist at one time; the backward pass computes them again.
    """

    def losses(table, hidden, targets):
        scores = sharding.constrain(decoder.scores(table, hidden), "batch", "seq", "vocab_out")
        log_z = jax.nn.logsumexp(scores, -1)
        # A masked sum, not a gather: it fuses, and a vocabulary sharded over chips needs no exchange of scores.
        hit = targets[..., None] == jnp.arange(scores.shape[-1])
        return log_z - jnp.sum(jnp.where(hit, scores, 0), -1), log_z

    t = targets.shape[1]
    table = decoder.output(params, config)
    if t <= chunk:
        return losses(table, hidden, targets)

    # Gathered once for all chunks; in float32, so that the chunks' gradients add up without rounding.
    table = table.astype(jnp.float32)
    body = jax.checkpoint(lambda _, xs: (None, losses(table, *xs)), prevent_cse=False)
    _, (nll, log_z) = jax.lax.scan(body, None, (layers.blocks(hidden, chunk), layers.blocks(targets, chunk)))
    return layers.unblocked(nll, t), layers.unblocked(log_z, t)
