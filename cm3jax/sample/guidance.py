"""What a second and third stream do to the logits: classifier-free guidance and CD-K (arXiv 2309.02591 §3.1)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from cm3jax.sample import filters


def guide(streams: Float[Array, "n b v"], scales: Float[Array, "n_1 b"]) -> Float[Array, "b v"]:
    """Mix the streams' logits by classifier-free guidance.

    Two streams (conditional, unconditional): uncond + a (cond - uncond), arXiv 2309.02591 §3.1.
    Three (text and picture, picture, unconditional): uncond + b (picture - uncond) + a (full - picture), the editing
    form of arXiv 2211.09800 §3.2.1, as in Chameleon's released code.

    Args:
      streams: Logits, most conditioned first.
      scales: The scale of each step from one stream to the next, so one fewer: (a,) or (a, b). All 1: the first
        stream, bit for bit, because the sum is taken as weights that are then exactly 1, 0, 0.
    """
    one = jnp.ones_like(scales[:1]) if scales.shape[0] else jnp.ones((1, streams.shape[1]), streams.dtype)
    scales = jnp.concatenate([scales, one])
    weights = scales - jnp.concatenate([jnp.zeros_like(one), scales[:-1]])
    return jnp.sum(weights[:, :, None] * streams, axis=0)


def contrast(
    cond: Float[Array, "b v"],
    uncond: Float[Array, "b v"],
    allowed: Bool[Array, "b v"],
    temperature: Float[Array, " b"],
    uncond_temperature: Float[Array, " b"],
    alpha: Float[Array, " b"],
    k: int,
) -> Float[Array, "b v"]:
    """Return CD-K's scores, to be drawn from by softmax (arXiv 2309.02591 §3.1).

    score(t) = log p_cond(t) - log p_uncond(t) for t in V, else -inf, with V = {t : p_cond(t) >= alpha * (k-th largest
    p_cond)}. k = 1 is plain contrastive decoding (arXiv 2210.15097). Probabilities are over the allowed ids. With fewer
    than k of those, V is all of them. Temperature 0 is the limit: the most likely id of the conditional stream.
    """
    log_cond = jax.nn.log_softmax(filters.temper(jnp.where(allowed, cond, -jnp.inf), temperature))
    log_uncond = jax.nn.log_softmax(filters.temper(jnp.where(allowed, uncond, -jnp.inf), uncond_temperature))
    kth = jax.lax.top_k(log_cond, min(k, cond.shape[-1]))[0][:, -1:]
    inside = allowed & (log_cond > -jnp.inf) & (log_cond >= jnp.log(alpha)[:, None] + kth)
    return jnp.where(inside, log_cond - log_uncond, -jnp.inf)
