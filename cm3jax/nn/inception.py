"""Inception v3 (arXiv 1512.00567) as FID knows it: the network of TensorFlow's graph of 2015-12-05, now pt_inception.

It is not the Inception of torchvision: average pools do not count what lies outside the picture, the last block takes a
maximum where the paper has an average, and there are 1008 logits. FID's features are the 2048 means before the logits.

Modules and parameters bear the names of that file, so that `interop.inception` maps them one to one. Every convolution
has no bias and is followed by a normalisation with fixed statistics and a ReLU. Stride 1 keeps the size of a map, but
for the first layers'; stride 2 uses no padding.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

SIDE = 299
"""Pixels of a side that FID resizes pictures to."""
FEATURES, LOGITS = 2048, 1008
EPS = 1e-3
"""Of the normalisations."""

Map, Made = Float[Array, "b h w c"], Float[Array, "b i j k"]
"""What goes into a layer, and what comes out."""


class Conv(nn.Module):
    """Convolution, normalisation by the statistics of the training, ReLU.

    Attributes:
      kernel: Height and width.
      stride: Of both; 2 goes without padding.
      padding: None: "SAME" for stride 1.
    """

    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Map) -> Made:
        shape = (*self.kernel, x.shape[-1], self.width)
        kernel = self.param("kernel", _named(nn.initializers.he_normal(), None, None, "conv_in", "conv_out"), shape)
        scale, bias, mean, var = (
            self.param(name, _named(nn.initializers.constant(value), "conv_out"), (self.width,))
            for name, value in {"scale": 1.0, "bias": 0.0, "mean": 0.0, "var": 1.0}.items()
        )
        x = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            (self.stride, self.stride),
            self.padding or ("VALID" if self.stride > 1 else "SAME"),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=jax.lax.Precision.HIGHEST,  # else accelerators would round float32 to 8 or 11 bits
        )
        x = (x.astype(jnp.float32) - mean) * (scale * jax.lax.rsqrt(var + EPS)) + bias
        return nn.relu(x).astype(self.dtype)


def _named(init, *axes: str | None):
    return nn.with_logical_partitioning(init, axes)


def average(x: Map) -> Map:
    """Return the mean over 3 x 3 places around each, of those inside the map."""
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def maximum(x: Map) -> Map:
    """Return the maximum over 3 x 3 places around each."""
    return nn.max_pool(x, (3, 3), (1, 1), "SAME")


def halved(x: Map) -> Made:
    """Return the maximum over 3 x 3 places, every other one."""
    return nn.max_pool(x, (3, 3), (2, 2), "VALID")


class Block(nn.Module):
    """What the mixed blocks share: branches whose maps are laid one behind the other."""

    dtype: Any = jnp.float32

    def conv(self, name: str, width: int, kernel: tuple[int, int] = (1, 1), stride: int = 1) -> Conv:
        return Conv(width, kernel, stride, dtype=self.dtype, name=name)


class A(Block):
    """35 x 35: 1 x 1, 5 x 5, two 3 x 3, pool."""

    pool: int = 64

    @nn.compact
    def __call__(self, x: Map) -> Made:
        five = self.conv("branch5x5_2", 64, (5, 5))(self.conv("branch5x5_1", 48)(x))
        three = self.conv("branch3x3dbl_2", 96, (3, 3))(self.conv("branch3x3dbl_1", 64)(x))
        three = self.conv("branch3x3dbl_3", 96, (3, 3))(three)
        pool = self.conv("branch_pool", self.pool)(average(x))
        return jnp.concatenate([self.conv("branch1x1", 64)(x), five, three, pool], -1)


class B(Block):
    """35 x 35 to 17 x 17."""

    @nn.compact
    def __call__(self, x: Map) -> Made:
        three = self.conv("branch3x3dbl_2", 96, (3, 3))(self.conv("branch3x3dbl_1", 64)(x))
        three = self.conv("branch3x3dbl_3", 96, (3, 3), 2)(three)
        return jnp.concatenate([self.conv("branch3x3", 384, (3, 3), 2)(x), three, halved(x)], -1)


class C(Block):
    """17 x 17: 7 x 7 as rows and columns, once and twice; `inner` channels between them."""

    inner: int = 128

    @nn.compact
    def __call__(self, x: Map) -> Made:
        row, column = (1, 7), (7, 1)
        once = self.conv("branch7x7_2", self.inner, row)(self.conv("branch7x7_1", self.inner)(x))
        once = self.conv("branch7x7_3", 192, column)(once)
        twice = self.conv("branch7x7dbl_1", self.inner)(x)
        for number, kernel in ((2, column), (3, row), (4, column)):
            twice = self.conv(f"branch7x7dbl_{number}", self.inner, kernel)(twice)
        twice = self.conv("branch7x7dbl_5", 192, row)(twice)
        pool = self.conv("branch_pool", 192)(average(x))
        return jnp.concatenate([self.conv("branch1x1", 192)(x), once, twice, pool], -1)


class D(Block):
    """17 x 17 to 8 x 8."""

    @nn.compact
    def __call__(self, x: Map) -> Made:
        three = self.conv("branch3x3_2", 320, (3, 3), 2)(self.conv("branch3x3_1", 192)(x))
        seven = self.conv("branch7x7x3_2", 192, (1, 7))(self.conv("branch7x7x3_1", 192)(x))
        seven = self.conv("branch7x7x3_4", 192, (3, 3), 2)(self.conv("branch7x7x3_3", 192, (7, 1))(seven))
        return jnp.concatenate([three, seven, halved(x)], -1)


class E(Block):
    """8 x 8: 3 x 3 as rows beside columns, of the map itself and of a 3 x 3 of it.

    Attributes:
      largest: The pool is a maximum: in the last block, and in FID's network only.
    """

    largest: bool = False

    @nn.compact
    def __call__(self, x: Map) -> Made:
        row, column = (1, 3), (3, 1)
        once = self.conv("branch3x3_1", 384)(x)
        once = [self.conv("branch3x3_2a", 384, row)(once), self.conv("branch3x3_2b", 384, column)(once)]
        twice = self.conv("branch3x3dbl_2", 384, (3, 3))(self.conv("branch3x3dbl_1", 448)(x))
        twice = [self.conv("branch3x3dbl_3a", 384, row)(twice), self.conv("branch3x3dbl_3b", 384, column)(twice)]
        pool = self.conv("branch_pool", 192)((maximum if self.largest else average)(x))
        return jnp.concatenate([self.conv("branch1x1", 320)(x), *once, *twice, pool], -1)


class Inception(nn.Module):
    """Pictures in [-1, 1] -> FID's features, and the logits.

    Attributes:
      dtype: Of the convolutions; normalisation and the last mean are in float32.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"]) -> tuple[Float[Array, "b 2048"], Float[Array, "b 1008"]]:
        def conv(name: str, width: int, kernel=(3, 3), stride=1, padding="VALID"):
            return Conv(width, kernel, stride, padding, self.dtype, name=name)

        x = conv("Conv2d_1a_3x3", 32, stride=2)(x)  # [b, 149, 149, 32] of 299 pixels
        x = conv("Conv2d_2a_3x3", 32)(x)  # [b, 147, 147, 32]
        x = halved(conv("Conv2d_2b_3x3", 64, padding="SAME")(x))  # [b, 73, 73, 64]
        x = conv("Conv2d_3b_1x1", 80, (1, 1))(x)
        x = halved(conv("Conv2d_4a_3x3", 192)(x))  # [b, 35, 35, 192]
        for name, pool in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = A(self.dtype, pool, name=name)(x)  # [b, 35, 35, 224 + pool]
        x = B(self.dtype, name="Mixed_6a")(x)  # [b, 17, 17, 768]
        for name, inner in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
            x = C(self.dtype, inner, name=name)(x)
        x = D(self.dtype, name="Mixed_7a")(x)  # [b, 8, 8, 1280]
        x = E(self.dtype, name="Mixed_7b")(x)  # [b, 8, 8, 2048]
        x = E(self.dtype, largest=True, name="Mixed_7c")(x)
        features = x.astype(jnp.float32).mean((1, 2))
        return features, Head(name="fc")(features)


class Head(nn.Module):
    """The logits of TensorFlow's 1008 classes."""

    @nn.compact
    def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b 1008"]:
        kernel = self.param(
            "kernel", _named(nn.initializers.lecun_normal(), "conv_in", "conv_out"), (x.shape[-1], LOGITS)
        )
        bias = self.param("bias", _named(nn.initializers.zeros, "conv_out"), (LOGITS,))
        return jnp.matmul(x, kernel, precision=jax.lax.Precision.HIGHEST) + bias
