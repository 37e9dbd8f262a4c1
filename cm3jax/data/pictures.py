"""Decode a picture file to upright RGB pixels, and crop it to the square that the tokenizer reads."""

import io
import struct
import warnings

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from cm3jax.data.example import Bad
from cm3jax.types import Region

Image.init()  # registers the formats
# Not all of Pillow's: EPS, for one, would run Ghostscript. AVIF is not in every build.
FORMATS = sorted({"JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF"} & set(Image.OPEN))
MAX_PIXELS = 2**27  # 134 Mpx, 400 MB of RGB: more is taken for a decompression bomb
MAX_BYTES = 2**28
MAX_WORK = 2**32  # pixels times scans: a progressive JPEG may go over its pixels hundreds of times, for minutes
LONGEST = 32  # `square` makes the whole long side: of a strip of 1 x 100000, gigabytes
DEEP = ("I;16", "I;16L", "I;16B", "I;16N")
# What Pillow's plugins raise on broken files; found by fuzzing (tests/test_bad_inputs.py).
BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    OverflowError,
    AttributeError,
    struct.error,
)
BROKEN += (ArithmeticError, MemoryError, NotImplementedError, RecursionError, Image.DecompressionBombError)


def decode(data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """Return the pixels of an encoded picture: upright, first frame, RGB, transparency on white.

    Raises:
      Bad: with the reason "empty picture file", "picture too large", "not a picture" or "broken picture".
    """
    if not data:
        raise Bad("empty picture file")
    if len(data) > MAX_BYTES:
        raise Bad("picture too large", f"{len(data)} bytes, limit {MAX_BYTES}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd EXIF and the like; the size is checked here, by our own limit
        picture = _open(data)
        try:
            picture.seek(0)
            return np.array(_rgb(_upright(picture)))
        except BROKEN as e:
            raise Bad("broken picture", f"{type(e).__name__}: {e}") from None


def _open(data: bytes) -> Image.Image:
    """Read the header and check the size before a pixel is decoded."""
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as e:
        raise Bad("picture too large", str(e)) from None
    except Image.UnidentifiedImageError:
        raise Bad("not a picture", f"no header of {', '.join(FORMATS)}: starts with {data[:8]!r}") from None
    except BROKEN as e:
        raise Bad("broken picture", f"{type(e).__name__}: {e}") from None
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise Bad("picture too large", f"{width} x {height} pixels, limit {MAX_PIXELS} pixels")
    scans = data.count(b"\xff\xda") if picture.format == "JPEG" else 1
    if scans * width * height > MAX_WORK:
        raise Bad("picture too large", f"{width} x {height} pixels in {scans} scans, limit {MAX_WORK} in all")
    return picture


def _upright(picture: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; broken EXIF data leaves the picture as it lies."""
    picture.load()
    try:
        return ImageOps.exif_transpose(picture)
    except BROKEN:
        return picture


def _rgb(picture: Image.Image) -> Image.Image:
    """Return RGB on white, whatever the mode: grey, palette, CMYK, 16 bits, with or without alpha."""
    if picture.mode in DEEP or picture.mode == "I":
        return _from_16_bits(picture)
    if picture.mode == "F":
        raise Bad("broken picture", "floating-point pixels; convert it to 8 bits")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def _from_16_bits(picture: Image.Image) -> Image.Image:
    """Scale 0..65535 to 0..255 (Pillow's own conversion would clip at 255)."""
    values = np.asarray(picture).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise Bad("broken picture", f"values {values.min()} to {values.max()}; convert it to 8 or 16 bits")
    clear = picture.info.get("transparency")
    grey = np.where(values == clear, 255, (values + 128) // 257) if isinstance(clear, int) else (values + 128) // 257
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def _frame(width: int, height: int, side: int) -> tuple[float, float, float, float]:
    """Return the box (left, top, right, bottom) in source pixels that becomes the square.

    The same numbers as "resize the shorter side to `side`, rounding the other; crop the centre" (arXiv 2405.09818's
    code), without ever making the long side of a 1 x 100000 strip.
    """
    scale = side / min(width, height)
    resized = (round(scale * width), round(scale * height))
    left, top = ((n - side) // 2 for n in resized)
    x, y = width / resized[0], height / resized[1]
    return left * x, top * y, (left + side) * x, (top + side) * y


def crop(pixels: UInt8[np.ndarray, "h w 3"], side: int) -> UInt8[np.ndarray, "side side 3"]:
    """Resize the shorter side to `side` with Lanczos and crop the centre (arXiv 2405.09818's preprocessing)."""
    height, width = pixels.shape[:2]
    if height == width == side:
        return pixels
    box = _frame(width, height, side)
    return np.array(Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS, box=box))


def crop_region(region: Region, width: int, height: int) -> Region | None:
    """Return a region of a picture of width x height in fractions of its crop; None if the crop cuts it away."""
    left, top, right, bottom = _frame(width, height, min(width, height))
    x0, y0, x1, y1 = region.box
    across = [min(max((x * width - left) / (right - left), 0.0), 1.0) for x in (x0, x1)]
    down = [min(max((y * height - top) / (bottom - top), 0.0), 1.0) for y in (y0, y1)]
    if across[0] >= across[1] or down[0] >= down[1]:
        return None
    return Region(region.part, region.kind, (across[0], down[0], across[1], down[1]), region.label)


def square(pixels: UInt8[np.ndarray, "h w 3"], side: int) -> UInt8[np.ndarray, "side side 3"]:
    """Resize the shorter side to `side`, bicubic, and crop the centre, as CLIP's public code does (arXiv 2103.00020).

    The ends of a strip over `LONGEST` times longer than wide are cut off first.
    """
    height, width = pixels.shape[:2]
    if height == width == side:
        return pixels
    most = LONGEST * min(height, width)
    if max(height, width) > most:
        top, left = max(0, (height - most) // 2), max(0, (width - most) // 2)
        pixels = pixels[top : top + most, left : left + most]
        height, width = pixels.shape[:2]
    resized = [side * n // min(height, width) for n in (width, height)]
    whole = np.asarray(Image.fromarray(pixels).resize(resized, Image.Resampling.BICUBIC))
    left, top = ((n - side) // 2 for n in resized)
    return np.array(whole[top : top + side, left : left + side])
