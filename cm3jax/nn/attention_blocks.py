"""Attention in XLA for long rows: a block of queries at a time, forward and backward."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cm3jax.nn import attention, layers

BLOCK = 256
"""Queries whose scores over all keys exist at one time: [b, n, 256, 4096] in float32 is 4 MiB for a row and head."""


def attend(
    q: Float[Array, "b t n k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g k"],
    queries: Int[Array, "b t"],
    keys: Int[Array, "b s"],
    first: Int[Array, ""] | int = 0,
) -> Float[Array, "b t n k"]:
    """Return `attention.attend` under `attention.visible(queries, keys, first)`; going back, scores are computed again.

    Args:
      queries: Segment of each query.
      keys: Segment of each key.
      first: Slot of the first query among the keys.
    """

    def block(start, xs):
        q, queries = xs
        return start + BLOCK, attention.attend(q, k, v, attention.visible(queries, keys, start))

    body = jax.checkpoint(block, prevent_cse=False)
    _, y = jax.lax.scan(body, jnp.asarray(first, jnp.int32), (layers.blocks(q, BLOCK), layers.blocks(queries, BLOCK)))
    return layers.unblocked(y, q.shape[1])
