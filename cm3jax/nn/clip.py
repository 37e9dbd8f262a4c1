"""CLIP: a text tower and a picture tower whose vectors can be compared (arXiv 2103.00020 §2.4).

Both are pre-norm transformers with biases and learned norms; the text tower is causal and read at the end token, the
picture tower (ViT, arXiv 2010.11929) at a token of its own in front of the patches.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from cm3jax import config as configs
from cm3jax import sharding
from cm3jax.nn import attention, layers

EPS = 1e-5
"""Added to the variance in norms, in all published weights."""
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
"""Of red, green and blue in CLIP's training pictures, scaled to [0, 1]; its weights expect pictures without them."""
TABLE_STD, POSITION_STD = 0.02, 0.01
"""First weights of the text tower's tables, as in CLIP's public code; that of the other weights is in `Tower`."""


def normalise(pictures: UInt8[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
    """Return pictures as the picture tower expects them."""
    return (pictures.astype(jnp.float32) / 255 - MEAN) / DEVIATION


def unit(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """Return vectors scaled to length 1; the zero vector stays as it is."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-24))


class Linear(nn.Module):
    """y = x W + b. `axes` are the logical names of W's two sides."""

    features: int
    axes: tuple[str, str]
    std: float

    @nn.compact
    def __call__(self, x: Float[Array, "b t i"]) -> Float[Array, "b t o"]:
        y = layers.Matrix(self.features, self.axes, self.std, jnp.dtype("float32"), name="matrix")(x)
        axis = "norm" if self.axes[1] == "embed" else self.axes[1]
        return y + self.param("b", _named(nn.initializers.zeros, axis), (self.features,), jnp.float32)


class Norm(nn.Module):
    """LayerNorm with a learned scale and bias."""

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        scale = self.param("scale", _named(nn.initializers.ones, "norm"), x.shape[-1:], jnp.float32)
        bias = self.param("bias", _named(nn.initializers.zeros, "norm"), x.shape[-1:], jnp.float32)
        return layers.standardise(x, EPS) * scale + bias


class Block(nn.Module):
    """x = x + attention(norm(x)); x = x + mlp(norm(x))."""

    heads: int
    depth: int
    activation: str

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], seen: Bool[Array, "b t t"]):
        b, t, d = x.shape
        inner, outer = d**-0.5, (2 * self.depth * d) ** -0.5  # as in CLIP's public code

        def heads(name, x):
            y = Linear(d, ("embed", "heads"), inner, name=name)(x).reshape(b, t, self.heads, d // self.heads)
            return sharding.constrain(y, "batch", "seq", "act_heads", "head")

        y = Norm(name="attention_norm")(x)
        y = attention.attend(heads("q", y), heads("k", y), heads("v", y), seen).reshape(b, t, d)
        x = x + Linear(d, ("heads", "embed"), outer, name="out")(y)

        y = Linear(4 * d, ("embed", "mlp"), (2 * d) ** -0.5, name="up")(Norm(name="mlp_norm")(x))
        y = activate(self.activation, sharding.constrain(y, "batch", "seq", "act_mlp"))
        x = x + Linear(d, ("mlp", "embed"), outer, name="down")(y)
        return sharding.constrain(x, "batch", "seq", "width"), None


def activate(kind: str, x: Float[Array, "b t f"]) -> Float[Array, "b t f"]:
    """Return gelu(x), exact, or its early approximation x * sigmoid(1.702 x), which OpenAI's weights expect."""
    return x * jax.nn.sigmoid(1.702 * x) if kind == "quick_gelu" else jax.nn.gelu(x, approximate=False)


def stack(depth: int, heads: int, activation: str):
    """Return `depth` blocks one after another, compiled once; their parameters have a leading axis of layers."""
    blocks = nn.scan(
        Block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast,),
        length=depth,
        metadata_params={nn.PARTITION_NAME: "layer"},
    )
    return blocks(heads, depth, activation, name="layers")


class Text(nn.Module):
    """Ids in, one vector out."""

    config: configs.CLIP
    vocab: int

    @nn.compact
    def __call__(self, ids: Int[Array, "b t"], ends: Int[Array, " b"]) -> Float[Array, "b z"]:
        """Return the vectors of texts, not normalised.

        Args:
          ids: Begin, text, end; whatever follows is not seen.
          ends: Index of the end token in each row.
        """
        c, (b, t) = self.config, ids.shape
        table = self.param("table", _normal(TABLE_STD, "vocab", "table_width"), (self.vocab, c.text_width), jnp.float32)
        places = self.param(
            "positions", _normal(POSITION_STD, "position", "embed"), (c.context, c.text_width), jnp.float32
        )
        x = sharding.constrain(table, "vocab_out", None)[ids] + sharding.constrain(places, "position", None)[:t]
        x = sharding.constrain(x, "batch", "seq", "width")
        causal = jnp.broadcast_to(jnp.tril(jnp.ones((t, t), bool)), (b, t, t))
        x, _ = stack(c.text_layers, c.text_heads, c.activation)(x, causal)
        last = jnp.take_along_axis(x, ends[:, None, None], axis=1)[:, 0]
        return _projected(self, Norm(name="norm")(last), c.size)


class Vision(nn.Module):
    """Pictures in; the tower's features, and their projection to the shared space."""

    config: configs.CLIP

    @nn.compact
    def __call__(self, pictures: Float[Array, "b h w 3"]) -> tuple[Float[Array, "b d"], Float[Array, "b z"]]:
        c, b, d = self.config, len(pictures), self.config.vision_width
        grid, std = c.resolution // c.patch, d**-0.5
        patches = pictures.reshape(b, grid, c.patch, grid, c.patch, 3).swapaxes(2, 3).reshape(b, grid * grid, -1)
        kernel = self.param("patches", _normal(std, None, "embed"), (patches.shape[-1], d), jnp.float32)
        first = self.param("first", _normal(std, "norm"), (d,), jnp.float32)
        places = self.param("positions", _normal(std, "position", "embed"), (1 + grid * grid, d), jnp.float32)
        x = patches @ sharding.constrain(kernel, None, "embed")
        x = jnp.concatenate([jnp.broadcast_to(first, (b, 1, d)), x], 1) + sharding.constrain(places, "position", None)
        x = Norm(name="first_norm")(sharding.constrain(x, "batch", "seq", "width"))
        t = x.shape[1]
        x, _ = stack(c.vision_layers, c.vision_heads, c.activation)(x, jnp.ones((b, t, t), bool))
        features = Norm(name="norm")(x[:, 0])
        return features, _projected(self, features, c.size)


class CLIP(nn.Module):
    """The two towers and the temperature of their comparison.

    Attributes:
      config: Sizes.
      vocab: Rows of the text tower's table.
      temperature: First value; what is learned is the logarithm of its inverse.
    """

    config: configs.CLIP
    vocab: int
    temperature: float = 0.07

    def setup(self):
        self.text, self.vision = Text(self.config, self.vocab), Vision(self.config)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(-np.log(self.temperature)), ())

    def __call__(self, ids, ends, pictures):
        """Return the normalised vectors [b, z] of texts and of pictures, and the factor of their products."""
        return self.texts(ids, ends), self.pictures(pictures), jnp.exp(self.logit_scale)

    def texts(self, ids: Int[Array, "b t"], ends: Int[Array, " b"]) -> Float[Array, "b z"]:
        """Return the normalised vectors of texts."""
        return unit(self.text(ids, ends))

    def pictures(self, pictures: UInt8[Array, "b h w 3"]) -> Float[Array, "b z"]:
        """Return the normalised vectors of pictures."""
        return unit(self.vision(normalise(pictures))[1])

    def features(self, pictures: UInt8[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """Return what the picture tower makes of pictures, before its projection."""
        return self.vision(normalise(pictures))[0]


def init(model: CLIP, key):
    """Return the parameters (boxed with their logical axes)."""
    pictures = jnp.zeros((1, model.config.resolution, model.config.resolution, 3), jnp.uint8)
    return model.init(key, jnp.zeros((1, 3), jnp.int32), jnp.zeros((1,), jnp.int32), pictures)["params"]


def _projected(module: nn.Module, x: Float[Array, "b d"], size: int) -> Float[Array, "b z"]:
    d = x.shape[-1]
    return x @ module.param("projection", _normal(d**-0.5, "embed", None), (d, size), jnp.float32)


def _normal(std: float, *axes: str | None):
    return _named(layers.truncated(std), *axes)


def _named(init, *axes: str | None):
    return nn.with_logical_partitioning(init, axes)
