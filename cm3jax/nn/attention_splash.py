"""Attention by jax's splash kernel for TPUs (Pallas): causal, within segments, no array of [t, s] in main memory.

The kernel computes the causal mask from two indices in place and reads the segments as two vectors, block by block, and
skips blocks after the diagonal. It is a program for one chip: `attend` hands each chip its own rows and heads.
"""

import jax
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Float, Int

from cm3jax import sharding

LANES = 128
"""A TPU's vector registers are 8 x 128: the kernel's blocks are multiples of this."""

BLOCK = 512
"""Queries and keys of a block at most: what fits the chip's own memory with room for double buffering (the value that
MaxText's configs use for v5e, v5p and v6e)."""

SAVED = "attention"
"""Name of the kernel's results (y, log-sum-exp) for remat policies: with these kept, going back runs no forward."""

INTERPRET = False
"""Run the kernel's Python instead of compiling it: for tests on machines without a TPU."""


def refusal(length: int, head_width: int) -> str:
    """Return why the kernel cannot take rows of this length and heads of this width, "" if it can."""
    if length % LANES:
        return f"needs rows of a multiple of {LANES} tokens, and decoder.packing.length is {length}"
    if head_width % 8:
        return f"needs heads of a multiple of 8, and they have {head_width}"
    return ""


def attend(
    q: Float[Array, "b t n k"], k: Float[Array, "b t g k"], v: Float[Array, "b t g k"], segments: Int[Array, "b t"]
) -> Float[Array, "b t n k"]:
    """softmax(q kᵀ / √k) v of whole rows: each token sees its own segment up to itself.

    Padding (segment 0) sees padding: finite, and of weight 0 in every loss.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _local(q, k, v, segments)
    names = ("batch", "seq", "act_heads", "head")
    specs = [sharding.fit(mesh, names, x.shape, "attention") for x in (q, k, v)]
    rows = sharding.fit(mesh, names[:2], segments.shape, "attention")
    # check_vma=False: the kernel does not say over which axes its results vary, so jax cannot check that.
    return jax.shard_map(_local, in_specs=(*specs, rows), out_specs=specs[0], check_vma=False)(q, k, v, segments)


def _local(q, k, v, segments):
    """Attend on one chip."""
    t, n, width = q.shape[1:]
    # Heads before tokens, scaled queries: the kernel's form.
    q, k, v = (q * width**-0.5).astype(q.dtype).swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2)
    return jax.vmap(_kernel(t, n))(q, k, v, splash.SegmentIds(segments, segments)).swapaxes(1, 2)


def _kernel(t: int, n: int):
    """Return the kernel of n heads over t tokens."""
    block = next(size for size in range(BLOCK, 0, -LANES) if t % size == 0)
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    return splash.make_splash_mha_single_device(
        splash.MultiHeadMask([splash.CausalMask((t, t))] * n),
        block_sizes=splash.BlockSizes(**dict.fromkeys(names, block)),
        residual_checkpoint_name=SAVED,
        interpret=INTERPRET,
    )
