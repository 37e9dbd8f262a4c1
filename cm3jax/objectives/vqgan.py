"""Losses of the image tokenizer (arXiv 2012.09841 §3.1, arXiv 2203.13131 §3).

Pictures here are float32 [b, h, w, 3] in [-1, 1]; every loss is a mean over the batch.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

import cm3jax.config as cfg
import cm3jax.nn.perceptual as perceptual

LIMIT = 1e4
"""Largest adaptive weight, as in arXiv 2012.09841's code."""


def to_unit(pictures: UInt8[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
    """Map 0..255 to [-1, 1]."""
    return pictures.astype(jnp.float32) / 127.5 - 1


def to_bytes(pictures: Float[Array, "b h w 3"]) -> UInt8[Array, "b h w 3"]:
    """Map [-1, 1] to 0..255, rounded and clipped."""
    return jnp.clip(jnp.round((pictures.astype(jnp.float32) + 1) * 127.5), 0, 255).astype(jnp.uint8)


def psnr(target: UInt8[Array, "b h w 3"], output: UInt8[Array, "b h w 3"]) -> Float[Array, " b"]:
    """Return the peak signal-to-noise ratio of each picture in dB; identical pictures give 100."""
    error = jnp.mean(jnp.square(target.astype(jnp.float32) - output.astype(jnp.float32)), axis=(1, 2, 3))
    return jnp.minimum(100.0, 10 * jnp.log10(255.0**2 / jnp.maximum(error, 1e-9)))


def halve(pictures: Float[Array, "b h w c"]) -> Float[Array, "b i j c"]:
    """Average 2 x 2 pixels; an odd last row or column is left out."""
    b, h, w, c = pictures.shape
    return pictures[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def multiscale_gradient(
    target: Float[Array, "b h w 3"], output: Float[Array, "b h w 3"], scales: int = 3
) -> Float[Array, ""]:
    """Return the mean L1 distance of horizontal and vertical differences, at full, half, quarter ... size.

    The stated substitute for a perceptual loss where no feature network is at hand [choice]: it asks for edges in
    the right place and says nothing about what they mean.
    """
    error, total = target - output, jnp.zeros(())
    for i in range(scales):
        error = halve(error) if i else error
        total += jnp.mean(jnp.abs(jnp.diff(error, axis=1))) + jnp.mean(jnp.abs(jnp.diff(error, axis=2)))
    return total / scales


FACE, OBJECT = 1, 2
"""Kinds of a batch's boxes, as data.picture_batches numbers them; 0 is an unused place."""


def reconstruction(
    target: Float[Array, "b h w 3"], output: Float[Array, "b h w 3"], loss: cfg.VQGANLoss, networks: dict, batch: dict
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Return what compares a picture with its reconstruction: the weighted sum, and its unweighted terms.

    Args:
      target, output: Pictures.
      loss: The weights; terms of weight 0 but l1 and l2 are not computed.
      networks: VGG weights {"perceptual", "face"} as far as the config names files.
      batch: For region losses, "boxes" [b, r, 4] and "kinds" [b, r].
    """
    error = target - output
    terms = {"l1": jnp.mean(jnp.abs(error)), "l2": jnp.mean(jnp.square(error))}
    if loss.perceptual and loss.perceptual_weights:
        terms["perceptual"] = jnp.mean(perceptual.lpips(networks["perceptual"], target, output))
    elif loss.perceptual:
        terms["perceptual"] = multiscale_gradient(target, output)
    for name, kind, network in (("face", FACE, "face"), ("object", OBJECT, "perceptual")):
        if getattr(loss, name):
            chosen = (batch["kinds"] == kind).astype(jnp.float32)
            terms[name] = perceptual.regions(networks[network], target, output, batch["boxes"], chosen)
    return sum(getattr(loss, name) * term for name, term in terms.items()), terms


def hinge_discriminator(real: Float[Array, "..."], fake: Float[Array, "..."]) -> Float[Array, ""]:
    """Return the discriminator's hinge loss (arXiv 1705.02894)."""
    return 0.5 * (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake)))


def hinge_generator(fake: Float[Array, "..."]) -> Float[Array, ""]:
    """Return what the generator minimises against the discriminator."""
    return -jnp.mean(fake)


def adaptive_weight(reconstruction: Float[Array, "..."], adversarial: Float[Array, "..."]) -> Float[Array, ""]:
    """Return the ratio of the two losses' gradient norms at the decoder's last layer (arXiv 2012.09841 eq. 7)."""
    ratio = jnp.linalg.norm(reconstruction.ravel()) / (jnp.linalg.norm(adversarial.ravel()) + 1e-4)
    return jax.lax.stop_gradient(jnp.clip(ratio, 0.0, LIMIT))
