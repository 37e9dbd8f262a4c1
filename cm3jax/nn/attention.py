"""Attention of queries over keys, causal and within segments."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def visible(
    query_segments: Int[Array, "b t"], key_segments: Int[Array, "b s"], first: Int[Array, ""] | int = 0
) -> Bool[Array, "b t s"]:
    """Return which keys each query sees: those of its own segment, not after it. Segment 0 is padding.

    Args:
      first: Slot of the first query among the keys.
    """
    t, s = query_segments.shape[1], key_segments.shape[1]
    causal = jnp.arange(s) <= first + jnp.arange(t)[:, None]
    same = query_segments[:, :, None] == key_segments[:, None, :]
    return causal & same & (key_segments[:, None, :] != 0)


def attend(
    q: Float[Array, "b t n k"], k: Float[Array, "b s g k"], v: Float[Array, "b s g k"], mask: Bool[Array, "b t s"]
) -> Float[Array, "b t n k"]:
    """softmax(q kᵀ / √k) v, the softmax in float32; n query heads share g key heads (grouped-query attention).

    A query that sees nothing (padding) gets the mean of all values: finite, and of weight 0 in every loss.
    """
    b, t, n, width = q.shape
    s, g = k.shape[1:3]
    # Batch dimensions first, two matrix dimensions last: XLA's CPU products are twice as fast in this form.
    q = q.reshape(b, t, g, n // g, width).transpose(0, 2, 3, 1, 4).reshape(b, g, n // g * t, width)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    scores = jnp.einsum("bgqk,bgsk->bgqs", q, k, preferred_element_type=jnp.float32) / jnp.sqrt(float(width))
    scores = jnp.where(mask[:, None, None], scores.reshape(b, g, n // g, t, s), -1e30).reshape(b, g, n // g * t, s)
    # exp and its sum, divided after the product with v: one pass less over the scores than softmax, both ways.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    total = jnp.sum(weights, -1, keepdims=True)
    y = jnp.einsum("bgqs,bgsk->bgqk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32) / total
    return y.astype(v.dtype).reshape(b, g, n // g, t, width).transpose(0, 3, 1, 2, 4).reshape(b, t, n, width)
