"""The one seam between the decoder and the ways to compute attention.

    xla      works everywhere; above LONG queries block by block (`attention_blocks`), so that no [t, s] array is whole
    splash   TPU: the library's Pallas kernel (`attention_splash`); segments; nothing of [t, s] outside the chip
    cudnn    NVIDIA: cuDNN's fused kernel through jax; causal only, so for rows whose documents see each other

All three are `attention.attend` within rounding. With a cache (sampling) attention is always xla's.
"""

from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Bool, Float, Int

from cm3jax import config as configs
from cm3jax.nn import attention, attention_blocks, attention_splash

LONG = 1024
"""Queries above which xla's attention goes block by block; up to here the whole [t, s] is small, and faster at once."""


class View(NamedTuple):
    """What the queries of a layer may see: keys of their own segment, not after them. Segment 0 is padding."""

    queries: Int[Array, "b t"]
    """Segment of each query."""
    keys: Int[Array, "b s"]
    """Segment of each key."""
    first: Any
    """Slot of the first query among the keys."""
    mask: Bool[Array, "b t s"] | None
    """The same, spelt out for all layers at once, where that is small."""


def view(path: str, queries: Int[Array, "b t"], keys: Int[Array, "b s"], first, cached: bool) -> View:
    """Return the view of a row, or of new tokens on a cache; made once for all layers."""
    whole = queries.shape[1] <= LONG and (cached or path in ("auto", "xla"))
    return View(queries, keys, first, attention.visible(queries, keys, first) if whole else None)


def attend(
    path: str,
    q: Float[Array, "b t n k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g k"],
    seen: View,
    cached: bool = False,
) -> Float[Array, "b t n k"]:
    """softmax(q kᵀ / √k) v by a path; n query heads share g key heads.

    Args:
      path: xla, splash or cudnn; auto is xla for who has not asked `train.lm.resolve`.
      seen: From `view`.
      cached: The keys are a cache: any path is xla's then.
    """
    if seen.mask is not None:
        return attention.attend(q, k, v, seen.mask)
    if cached or path in ("auto", "xla"):
        return attention_blocks.attend(q, k, v, seen.queries, seen.keys, seen.first)
    if path == "splash":
        return attention_splash.attend(q, k, v, seen.queries)
    # Causal alone: `refusal` leaves only rows of one segment with padding at the end, which no token before it sees.
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def refusal(path: str, config: configs.Decoder, packing: configs.Packing, device: Any) -> str:
    """Return why a path cannot train this decoder on this device, "" if it can."""
    if path == "splash":
        if device.platform != "tpu":
            return f"needs a TPU, and this is {device.platform} ({device.device_kind})"
        return attention_splash.refusal(packing.length, config.head_width)
    if path == "cudnn":
        return _cudnn_refusal(config, packing, device)
    return ""


def _cudnn_refusal(config: configs.Decoder, packing: configs.Packing, device: Any) -> str:
    """jax's own conditions, `jax._src.cudnn.fused_attention_stablehlo.check_is_flash_attention`."""
    capability = str(getattr(device, "compute_capability", None) or "")
    number = float(capability) if capability.replace(".", "", 1).isdigit() else 0.0  # AMD's are words
    if device.platform not in ("gpu", "cuda") or number < 8:
        having = f"compute capability {capability}" if capability else device.platform
        return f"needs an NVIDIA GPU of compute capability 8.0 or more, and this is {having} ({device.device_kind})"
    if config.dtype != "bfloat16":
        return f"needs decoder.model.dtype bfloat16, and it is {config.dtype}"
    if packing.isolate:
        return "knows no segments, and decoder.packing.isolate hides the documents of a row from each other"
    widest = 256 if number >= 9 else 128
    if config.head_width % 8 or config.head_width > widest:
        return f"needs heads of a multiple of 8 up to {widest}, and they have {config.head_width}"
    return ""
