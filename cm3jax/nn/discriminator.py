"""The patch discriminator: each logit judges one 70 x 70 patch of a picture (arXiv 1611.07004 §3.2.2; 2012.09841)."""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

SMALLEST = 32
"""Smallest side of a picture that leaves at least one logit."""


class PatchDiscriminator(nn.Module):
    """Convolutions 64-128-256-512-1 of kernel 4 and strides 2, 2, 2, 1, 1.

    GroupNorm stands where the paper has batch norm [choice]: no statistics couple the pictures of a batch, so that a
    sharded step is the single-device step and real and generated pictures are judged alike.

    Attributes:
      width: Channels of the first layer.
      groups: Of GroupNorm, lowered so that each has four channels; 0: no norms.
      dtype: Of the convolutions; parameters and logits are float32.
    """

    width: int = 64
    groups: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pictures: Float[Array, "b h w 3"]) -> Float[Array, "b i j"]:
        x = nn.leaky_relu(self.conv(self.width, 2, "conv0")(pictures.astype(self.dtype)), 0.2)
        for i, stride in ((1, 2), (2, 2), (3, 1)):
            x = self.conv(self.width * 2**i, stride, f"conv{i}")(x)
            x = nn.leaky_relu(self.norm(x, f"norm{i}"), 0.2)
        return self.conv(1, 1, "last")(x)[..., 0].astype(jnp.float32)

    def conv(self, features: int, stride: int, name: str) -> nn.Conv:
        normal = nn.initializers.normal(0.02)
        return nn.Conv(
            features,
            (4, 4),
            stride,
            padding=1,
            dtype=self.dtype,
            kernel_init=nn.with_logical_partitioning(normal, (None, None, "conv_in", "conv_out")),
            bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("conv_out",)),
            name=name,
        )

    def norm(self, x, name: str):
        if not self.groups:
            return x
        # Four channels to a group at least: a channel alone would lose its mean, and the bias before would do nothing.
        return nn.GroupNorm(
            math.gcd(self.groups, max(1, x.shape[-1] // 4)),
            dtype=self.dtype,
            scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("norm",)),
            bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)),
            name=name,
        )(x)
