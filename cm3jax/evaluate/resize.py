"""Pictures to what FID's Inception sees, in the two ways that published figures were made; FIDs of the two differ.

"pytorch-fid" samples with linear weights of the four nearest pixels, without a filter before: what is made smaller is
aliased, as in the first published FIDs. "clean-fid" (arXiv 2104.11222) takes Pillow's bicubic filter, which widens with
the factor, channel by channel in float32, so that nothing is rounded to 8 bits. Imports no jax.
"""

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

SIDE = 299
Picture = UInt8[np.ndarray, "h w 3"]
Seen = Float32[np.ndarray, "299 299 3"]


def pytorch_fid(picture: Picture) -> Seen:
    """Return a picture as pytorch-fid has it: linear, no filter, corners not aligned; in [-1, 1]."""
    x = picture.astype(np.float32) / 255
    x = _sampled(_sampled(x, 0), 1)
    return 2 * x - 1


def _sampled(x: np.ndarray, axis: int) -> np.ndarray:
    """Return SIDE samples along an axis, each between its two nearest neighbours; numbers in float32, as torch's."""
    size = x.shape[axis]
    places = (np.arange(SIDE, dtype=np.float32) + np.float32(0.5)) * np.float32(size / SIDE) - np.float32(0.5)
    places = places.clip(0, size - 1)
    first = places.astype(np.int64)
    share = (places - first.astype(np.float32)).reshape(-1, *(1,) * (x.ndim - 1 - axis))
    after = np.minimum(first + 1, size - 1)
    return x.take(first, axis) * (1 - share) + x.take(after, axis) * share


def clean_fid(picture: Picture) -> Seen:
    """Return a picture as clean-fid has it: Pillow's bicubic in float32, cut to 0..255, then (x - 128) / 128."""
    channels = [Image.fromarray(picture[:, :, c].astype(np.float32)) for c in range(3)]
    resized = [np.asarray(c.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for c in channels]
    return (np.stack(resized, -1).clip(0, 255) - 128) / np.float32(128)


MODES = {"pytorch-fid": pytorch_fid, "clean-fid": clean_fid}
