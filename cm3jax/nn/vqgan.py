"""The image tokenizer's network: VQGAN's encoder, codebook and decoder (arXiv 2012.09841 appendix A).

Make-A-Scene's, which CM3Leon uses, has channel multipliers 1, 1, 2, 4 at 256 px (arXiv 2203.13131 §3). Pictures are
[b, h, w, 3] in [-1, 1], latents and vectors [b, h/f, w/f, z]. Convolutions run in `config.dtype`; parameters, norms and
softmax are float32.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import cm3jax.config as cfg
import cm3jax.nn.quantizer as quantizer

EPS = 1e-6  # of GroupNorm, as in arXiv 2012.09841's code


def fold(pictures: Float[Array, "b h w c"], patch: int) -> Float[Array, "b i j d"]:
    """Turn patch x patch pixels into channels: [b, h, w, c] -> [b, h/patch, w/patch, patch*patch*c]."""
    b, h, w, c = pictures.shape
    x = pictures.reshape(b, h // patch, patch, w // patch, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // patch, w // patch, patch * patch * c)


def unfold(x: Float[Array, "b i j d"], patch: int) -> Float[Array, "b h w c"]:
    """Undo `fold`."""
    b, i, j, d = x.shape
    x = x.reshape(b, i, j, patch, patch, d // patch**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, i * patch, j * patch, d // patch**2)


def conv(features: int, kernel: int, dtype, name: str | None = None, **kwargs) -> nn.Conv:
    """Return a biased convolution whose parameters carry their logical axes."""
    lecun = nn.initializers.lecun_normal()
    return nn.Conv(
        features,
        (kernel, kernel),
        dtype=dtype,
        kernel_init=nn.with_logical_partitioning(lecun, (None, None, "conv_in", "conv_out")),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("conv_out",)),
        name=name,
        **kwargs,
    )


class Norm(nn.Module):
    """GroupNorm over the picture, or over each position's own channels when `local`; nothing if `groups` is 0."""

    groups: int
    local: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        if not self.groups:
            return x
        # Statistics over the whole picture would let a code see more than its own patch.
        return nn.GroupNorm(
            num_groups=math.gcd(self.groups, x.shape[-1]),
            epsilon=EPS,
            reduction_axes=(-1,) if self.local else None,
            dtype=self.dtype,
            scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("norm",)),
            bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)),
        )(x)


class Block(nn.Module):
    """Residual block: x + conv(silu(norm(conv(silu(norm(x))))))."""

    features: int
    kernel: int
    groups: int
    dtype: Any
    shortcut: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        y = x
        for i in (1, 2):
            y = nn.silu(Norm(self.groups, self.kernel == 1, self.dtype, name=f"norm{i}")(y))
            y = conv(self.features, self.kernel, self.dtype, f"conv{i}")(y)
        if x.shape[-1] != self.features:
            x = conv(self.features, self.shortcut, self.dtype, "shortcut")(x)
        return x + y


class Attention(nn.Module):
    """Residual self-attention over all positions, one head (arXiv 2012.09841 appendix A)."""

    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        y = Norm(self.groups, False, self.dtype, name="norm")(x)
        query, key, value = (conv(c, 1, self.dtype, name)(y).reshape(b, h * w, c) for name in ("query", "key", "value"))
        scores = jnp.einsum("btc,bsc->bts", query, key, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * c**-0.5, axis=-1).astype(value.dtype)
        y = jnp.einsum("bts,bsc->btc", weights, value).reshape(b, h, w, c)
        return x + conv(c, 1, self.dtype, "out")(y)


class Stack(nn.Module):
    """The residual blocks of one resolution, each followed by attention if `attend`."""

    features: int
    blocks: int
    kernel: int
    attend: bool
    groups: int
    dtype: Any
    shortcut: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        for i in range(self.blocks):
            x = Block(self.features, self.kernel, self.groups, self.dtype, self.shortcut, name=f"block{i}")(x)
            if self.attend:
                x = Attention(self.groups, self.dtype, name=f"attention{i}")(x)
        return x


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution."""

    kernel: int
    attend: bool
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        x = Block(x.shape[-1], self.kernel, self.groups, self.dtype, name="block0")(x)
        if self.attend:
            x = Attention(self.groups, self.dtype, name="attention")(x)
        return Block(x.shape[-1], self.kernel, self.groups, self.dtype, name="block1")(x)


class Encoder(nn.Module):
    """Pictures to latents."""

    config: cfg.VQGAN

    @nn.compact
    def __call__(self, pictures: Float[Array, "b h w 3"]) -> Float[Array, "b i j z"]:
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        local, kernel = c.encoder_kernel == 1, c.encoder_kernel
        x = conv(c.width, kernel, dtype, "first")(fold(pictures, c.patch).astype(dtype))
        for i, multiplier in enumerate(c.multipliers):
            attend, features = i in c.attention and not local, c.width * multiplier
            sizes = (features, c.encoder_blocks, kernel, attend, c.groups, dtype, c.shortcut_kernel)
            x = Stack(*sizes, name=f"level{i}")(x)
            if i < len(c.multipliers) - 1:
                # Stride 2: a 3x3 kernel reaches one pixel past the lower right edge, a 2x2 kernel stays in its patch.
                size, pad = (2, 0) if local else (3, 1)
                x = conv(x.shape[-1], size, dtype, f"down{i}", strides=2, padding=((0, pad), (0, pad)))(x)
        if c.middle:
            attend = c.middle_attention and not local
            x = Middle(kernel, attend, c.groups, dtype, name="middle")(x)
        x = nn.silu(Norm(c.groups, local, dtype, name="norm")(x))
        return conv(c.latents or c.z, kernel, dtype, "last")(x).astype(jnp.float32)


class Decoder(nn.Module):
    """Code vectors to what the last convolution turns into pixels."""

    config: cfg.VQGAN

    @nn.compact
    def __call__(self, vectors: Float[Array, "b i j z"]) -> Float[Array, "b k l c"]:
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        x = conv(c.width * c.multipliers[-1], 3, dtype, "first")(vectors.astype(dtype))
        if c.middle:
            x = Middle(3, c.middle_attention, c.groups, dtype, name="middle")(x)
        for i, multiplier in reversed(list(enumerate(c.multipliers))):
            attend, features = i in c.attention, c.width * multiplier
            x = Stack(features, c.decoder_blocks, 3, attend, c.groups, dtype, c.shortcut_kernel, name=f"level{i}")(x)
            if i > 0:
                b, h, w, d = x.shape
                x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, d)).reshape(b, 2 * h, 2 * w, d)
                x = conv(d, 3, dtype, f"up{i}")(x)
        return nn.silu(Norm(c.groups, False, dtype, name="norm")(x))


class VQGAN(nn.Module):
    """Encoder, codebook of `codes` entries, decoder."""

    config: cfg.VQGAN
    codes: int

    def setup(self):
        c = self.config
        dtype = jnp.dtype(c.dtype)
        self.encoder = Encoder(c)
        self.to_code = conv(c.z, 1, dtype)
        self.from_code = conv(c.latents or c.z, 1, dtype)
        if c.decoder:
            self.decoder = Decoder(c)
            # A position that paints a whole patch needs no neighbours for its last step, and 3x3 would be dear.
            self.last = conv(3 * c.patch**2, 3 if c.patch == 1 else 1, dtype)
        if c.quantizer == "argmax":
            self.scores = conv(self.codes, 1, jnp.float32)
        # arXiv 2012.09841's start; training overwrites it with centres of real latents.
        start = nn.initializers.uniform(2 / self.codes)
        self.codebook = self.param(
            "codebook", nn.with_logical_partitioning(start, (None, "conv_in")), (self.codes, c.z), jnp.float32
        )

    def encode(self, pictures: Float[Array, "b h w 3"]) -> Float[Array, "b i j z"]:
        """Return latents, before quantization, on the unit sphere where the config says so."""
        latents = self.to_code(self.encoder(pictures)).astype(jnp.float32)
        unit = self.config.l2_normalise or self.config.quantizer == "cosine"
        return quantizer.normalise(latents) if unit else latents

    def choose(self, latents: Float[Array, "b i j z"]) -> Int[Array, "b i j"]:
        """Return the codes of latents; the lowest of several equally good ones."""
        if self.config.quantizer == "argmax":
            return jnp.argmax(self.scores(latents), axis=-1).astype(jnp.int32)
        return quantizer.nearest(latents, self._table())

    def vectors(self, codes: Int[Array, "b i j"]) -> Float[Array, "b i j z"]:
        """Return the codes' vectors."""
        return quantizer.lookup(codes, self._table())

    def _table(self) -> Float[Array, "m z"]:
        return quantizer.normalise(self.codebook) if self.config.quantizer == "cosine" else self.codebook

    def tokenize(self, pictures: Float[Array, "b h w 3"]) -> Int[Array, "b i j"]:
        """Return the codes of pictures."""
        return self.choose(self.encode(pictures))

    def paint(self, codes: Int[Array, "b i j"]) -> Float[Array, "b h w 3"]:
        """Return the pictures of codes."""
        return self.decode(self.vectors(codes))

    def features(self, vectors: Float[Array, "b i j z"]) -> Float[Array, "b k l c"]:
        """Return the decoder's state before its last convolution."""
        return self.decoder(self.from_code(vectors))

    def pixels(self, features: Float[Array, "b k l c"]) -> Float[Array, "b h w 3"]:
        """Return float32 pictures, about [-1, 1]."""
        return unfold(self.last(features).astype(jnp.float32), self.config.patch)

    def decode(self, vectors: Float[Array, "b i j z"]) -> Float[Array, "b h w 3"]:
        """Return pictures of code vectors."""
        return self.pixels(self.features(vectors))

    def __call__(self, pictures: Float[Array, "b h w 3"]) -> tuple[Float[Array, "b k l c"], Int[Array, "b i j"]]:
        """Return the reconstruction and the codes; without a decoder, what one would begin with in its place."""
        codes = self.tokenize(pictures)
        return (self.paint(codes) if self.config.decoder else self.from_code(self.vectors(codes))), codes
