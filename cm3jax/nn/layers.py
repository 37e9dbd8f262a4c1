"""Small layers of the decoder: matrices without bias, norms, rotary positions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cm3jax import sharding


def truncated(std: float):
    """Return the initializer of arXiv 2309.02591 §2.3: normal, cut at three standard deviations."""
    return nn.initializers.truncated_normal(std, lower=-3.0, upper=3.0)


def blocks(x: Float[Array, "b t *c"] | Int[Array, "b t *c"], size: int):
    """Return [ceil(t / size), b, size, ...], padded with zeros at the end: what a scan over the time t takes."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def unblocked(x: Float[Array, "n b size *c"], t: int) -> Float[Array, "b t *c"]:
    """Return what `blocks` was given."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :t]


class Matrix(nn.Module):
    """y = x W, no bias (arXiv 2309.02591 §2.3). `axes` are the logical names of W's two sides."""

    features: int
    axes: tuple[str, str]
    std: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        init = truncated(self.std) if self.std else nn.initializers.zeros
        w = self.param("w", nn.with_logical_partitioning(init, self.axes), (x.shape[-1], self.features), jnp.float32)
        w = sharding.constrain(w, *self.axes)  # and so is its gradient, which then is scattered as it is reduced
        # One matrix product of two dimensions: XLA's CPU backward pass of it is faster than that of [b, t, i] @ [i, o].
        y = x.astype(self.dtype).reshape(-1, x.shape[-1]) @ w.astype(self.dtype)
        return y.reshape(*x.shape[:-1], self.features)


class Norm(nn.Module):
    """Normalise the last axis in float32.

    "layernorm" subtracts the mean and has no learned parameters (arXiv 2309.02591 §2.3); "rmsnorm" does not subtract it
    and has a learned scale (arXiv 2405.09818).
    """

    kind: str
    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        y = x.astype(jnp.float32)
        if self.kind == "layernorm":
            return standardise(y, self.eps).astype(x.dtype)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
        scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, ("norm",)), (x.shape[-1],))
        return (y * scale).astype(x.dtype)


class HeadNorm(nn.Module):
    """LayerNorm over each head's own width, a scale and a bias per head: Chameleon's QK-norm (arXiv 2405.09818)."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "b t n k"]) -> Float[Array, "b t n k"]:
        axes, shape = ("norm", "head"), x.shape[-2:]
        scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, axes), shape)
        bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, axes), shape)
        return (standardise(x.astype(jnp.float32), self.eps) * scale + bias).astype(x.dtype)


def standardise(x: Float[Array, "*b d"], eps: float) -> Float[Array, "*b d"]:
    """Return x with mean 0 and variance 1 along the last axis."""
    x = x - jnp.mean(x, -1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps)


def rotate(x: Float[Array, "b t n k"], positions: Int[Array, "b t"], theta: float) -> Float[Array, "b t n k"]:
    """Turn each pair (i, i + k/2) of a head by position * theta^(-2i/k): rotary positions (arXiv 2104.09864)."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
