"""Distances between pictures in the features of VGG16: LPIPS, and feature matching on boxes.

LPIPS (arXiv 1801.03924) is the perceptual loss of VQGAN (arXiv 2012.09841 §3.1). Feature matching on the boxes of faces
and objects is Make-A-Scene's (arXiv 2203.13131 §3.2-3.3), there with a face-embedding network and with VGG.

The weights are not part of this project; they load from a safetensors file of float32 tensors, named as their public
releases name them: `features.{0,2,5,7,10,12,14,17,19,21,24,26,28}.{weight,bias}` of torchvision's VGG16 and, for LPIPS,
`lin{0..4}.model.1.weight` of the package lpips. To make the file where torch is at hand:

    import lpips, safetensors.torch, torchvision
    weights = torchvision.models.vgg16(weights="IMAGENET1K_V1").features.state_dict(prefix="features.")
    heads = lpips.LPIPS(net="vgg").state_dict()
    weights |= {f"lin{i}.model.1.weight": heads[f"lin{i}.model.1.weight"] for i in range(5)}
    safetensors.torch.save_file({k: v.contiguous() for k, v in weights.items()}, "vgg16_lpips.safetensors")

A face network is a file of the same layers without heads (VGG-Face is a VGG16); what it expects of its input other than
ImageNet's normalisation of RGB is to be folded into its first layer.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax.core import meta
from jaxtyping import Array, Float

from cm3jax.types import UserError

WIDTHS = (64, 128, 256, 512, 512)
"""Channels of VGG16's five stages."""
STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
"""torchvision's numbers of the convolutions; a 2 x 2 maximum lies between stages."""
# LPIPS's statement of ImageNet's mean and deviation, for pictures in [-1, 1].
SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
SCALE = np.array([0.458, 0.448, 0.450], np.float32)
CROP = 112
"""Pixels of a side that a box is resized to."""

Weights = dict[str, jax.Array | np.ndarray]


def shapes(heads: bool) -> dict[str, tuple[int, ...]]:
    """Return the tensors that a weights file must hold, with torch's layout [out, in, 3, 3]."""
    found, before = {}, 3
    for numbers, width in zip(STAGES, WIDTHS, strict=True):
        for number in numbers:
            found[f"features.{number}.weight"] = (width, before, 3, 3)
            found[f"features.{number}.bias"] = (width,)
            before = width
    return found | ({f"lin{i}.model.1.weight": (1, w, 1, 1) for i, w in enumerate(WIDTHS)} if heads else {})


def load(path, heads: bool) -> dict[str, np.ndarray]:
    """Return the weights in a safetensors file, kernels as [3, 3, in, out], heads as [channels].

    Args:
      path: The file.
      heads: Whether LPIPS's linear heads must be there; other surplus tensors (the classifier) are left alone.

    Raises:
      UserError: if the file is missing or not safetensors, or naming the tensor that is missing or has another shape.
    """
    if not pathlib.Path(path).is_file():
        raise UserError(f"VGG16 weights {str(path)!r}: no such file; cm3jax/nn/perceptual.py says how to make one")
    try:
        tensors = safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, OSError) as e:
        raise UserError(f"VGG16 weights {str(path)!r}: not a safetensors file ({e})") from None
    wanted = shapes(heads)
    for name, shape in wanted.items():
        if name not in tensors:
            raise UserError(f"VGG16 file {str(path)!r}: no tensor {name!r}; cm3jax/nn/perceptual.py lists the names")
        if tensors[name].shape != shape:
            raise UserError(f"VGG16 weights {str(path)!r}: {name} has shape {tensors[name].shape}, must be {shape}")
    return {name: _native(tensors[name].astype(np.float32)) for name in wanted}


def _native(x: np.ndarray) -> np.ndarray:
    """Return a torch tensor in our layout."""
    if x.ndim == 1:
        return x
    return x.reshape(-1) if x.shape[2:] == (1, 1) else np.ascontiguousarray(x.transpose(2, 3, 1, 0))


def boxed(weights: Weights) -> dict[str, meta.Partitioned]:
    """Return the weights with their logical axes, as they ride in a training state."""
    axes = {4: (None, None, "conv_in", "conv_out"), 1: ("conv_out",)}
    return {name: meta.Partitioned(jnp.asarray(x), names=axes[x.ndim]) for name, x in weights.items()}


def features(weights: Weights, pictures: Float[Array, "b h w 3"], dtype=jnp.float32) -> list[Float[Array, "b i j c"]]:
    """Return the last activations of each stage (relu1_2, 2_2, 3_3, 4_3, 5_3) of pictures in [-1, 1]."""
    x, found = ((pictures - SHIFT) / SCALE).astype(dtype), []
    for i, numbers in enumerate(STAGES):
        if i:
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        for number in numbers:
            kernel = weights[f"features.{number}.weight"].astype(dtype)
            x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            x = jax.nn.relu(x + weights[f"features.{number}.bias"].astype(dtype))
        found.append(x.astype(jnp.float32))
    return found


def _differences(weights, target, output, dtype) -> list[Float[Array, "b i j c"]]:
    """Return the squared differences of features that are scaled to length 1 at each position."""

    def unit(x):
        return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-10)

    pairs = zip(features(weights, target, dtype), features(weights, output, dtype), strict=True)
    return [jnp.square(unit(jax.lax.stop_gradient(a)) - unit(b)) for a, b in pairs]


def lpips(
    weights: Weights, target: Float[Array, "b h w 3"], output: Float[Array, "b h w 3"], dtype=jnp.float32
) -> Float[Array, " b"]:
    """Return LPIPS of each pair of pictures (arXiv 1801.03924 eq. 1). Only `output` gets a gradient."""
    found = _differences(weights, target, output, dtype)
    heads = [weights[f"lin{i}.model.1.weight"] for i in range(len(found))]
    return sum(jnp.mean(d @ head, axis=(1, 2)) for d, head in zip(found, heads, strict=True))


def matching(
    weights: Weights, target: Float[Array, "b h w 3"], output: Float[Array, "b h w 3"], dtype=jnp.float32
) -> Float[Array, " b"]:
    """Return the distance of the features of each pair, all stages and channels alike [choice]."""
    found = _differences(weights, target, output, dtype)
    return sum(jnp.mean(jnp.sum(d, axis=-1), axis=(1, 2)) for d in found)


def crop(pictures: Float[Array, "b h w 3"], boxes: Float[Array, "b r 4"], size: int = CROP) -> Float[Array, "n s s 3"]:
    """Cut boxes (x0, y0, x1, y1, fractions of the sides) out of pictures, resized to size x size: [b*r, s, s, 3].

    An empty box gives an unspecified but finite crop.
    """
    h, w = pictures.shape[1:3]
    sides = jnp.array([h, w], jnp.float32)

    def one(picture, box):
        start, end = jnp.stack([box[1], box[0]]) * sides, jnp.stack([box[3], box[2]]) * sides
        scale = size / jnp.maximum(end - start, 1.0)
        shape = (size, size, picture.shape[-1])
        # Antialiasing would make the kernel's width depend on the box for no gain: crops are mostly enlarged.
        return jax.image.scale_and_translate(picture, shape, (0, 1), scale, -start * scale, "linear", antialias=False)

    crops = jax.vmap(lambda picture, rows: jax.vmap(lambda box: one(picture, box))(rows))(pictures, boxes)
    return crops.reshape(-1, size, size, pictures.shape[-1])


def regions(
    weights: Weights,
    target: Float[Array, "b h w 3"],
    output: Float[Array, "b h w 3"],
    boxes: Float[Array, "b r 4"],
    chosen: Float[Array, "b r"],
    dtype=jnp.float32,
) -> Float[Array, ""]:
    """Return the feature distance inside the chosen boxes: summed over a picture's, averaged over pictures."""
    found = matching(weights, crop(target, boxes), crop(output, boxes), dtype).reshape(chosen.shape)
    return jnp.mean(jnp.sum(jnp.where(chosen > 0, found, 0.0), axis=1))
