"""Laws of decoding and cropping. Broken files are in test_bad_inputs.py."""

import io

import numpy as np
import pytest
from PIL import Image

from cm3jax.data import pictures
from cm3jax.data.example import Bad
from cm3jax.types import Region
from tests import broken

RGB = broken.picture(height=24, width=32)


def save(image: Image.Image | np.ndarray, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **options)
    return buffer.getvalue()


def decode(image, kind: str = "png", **options) -> np.ndarray:
    return pictures.decode(save(image, kind, **options))


@pytest.mark.parametrize(
    "kind, options", [("png", {}), ("webp", {"lossless": True}), ("bmp", {}), ("tiff", {}), ("ppm", {})]
)
def test_lossless_formats_come_back_exactly(kind, options):
    assert np.array_equal(decode(RGB, kind, **options), RGB)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    turned = {
        1: RGB, 2: RGB[:, ::-1], 3: RGB[::-1, ::-1], 4: RGB[::-1], 5: RGB.swapaxes(0, 1), 6: np.rot90(RGB, -1),
        7: RGB[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(RGB),
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(decode(RGB, exif=exif), turned[orientation])


def test_broken_exif_data_leaves_the_picture_as_it_lies():
    assert np.array_equal(decode(RGB, exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), RGB)


def test_grey_and_one_bit_pictures_become_rgb():
    grey = RGB[..., 0].copy()
    assert np.array_equal(decode(grey), np.stack([grey] * 3, -1))
    assert np.array_equal(np.unique(decode(Image.fromarray(grey).convert("1"))), [0, 255])


def test_16_bit_grey_is_scaled_not_clipped():
    deep = np.linspace(0, 65535, 24 * 32).astype(np.uint16).reshape(24, 32)
    expected = np.round(deep / 257)
    for kind in ("png", "tiff"):
        assert np.abs(decode(deep, kind)[..., 1] - expected).max() <= 0.5


def test_a_clear_16_bit_grey_becomes_white():
    assert decode(np.full((2, 2), 300, np.uint16), transparency=300).min() == 255


def test_a_palette_is_looked_up():
    assert np.array_equal(
        decode(Image.fromarray(RGB).quantize(256)), np.array(Image.fromarray(RGB).quantize(256).convert("RGB"))
    )


def test_cmyk_keeps_its_colours():
    colours = np.repeat(np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]], np.uint8), 16, 1).repeat(
        16, 0
    )
    found = decode(Image.fromarray(colours).convert("CMYK"), "jpeg", quality=100).astype(int)
    assert np.abs(found - colours).max() < 40 and np.abs(found - colours).mean() < 4


def test_alpha_is_blended_on_white():
    clear = np.dstack([RGB, np.full(RGB.shape[:2], 0, np.uint8)])
    half = np.dstack([RGB, np.full(RGB.shape[:2], 128, np.uint8)])
    assert decode(clear).min() == 255
    assert np.abs(decode(half) - (RGB * (128 / 255) + 255 * (127 / 255))).max() <= 1
    assert decode(Image.fromarray(RGB[..., 0].copy()).convert("LA")).shape == RGB.shape


def test_a_transparent_palette_colour_becomes_white():
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    assert decode(image, "gif", transparency=1)[0].tolist() == [[10, 20, 30], [255, 255, 255]]


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tiff"])
def test_an_animation_gives_its_first_frame(kind):
    frames = [Image.fromarray(np.full((8, 8, 3), v, np.uint8)) for v in (0, 255, 0)]
    assert decode(frames[0], kind, save_all=True, append_images=frames[1:]).max() < 8


def test_the_size_is_checked_before_pixels_are_decoded(monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(Bad, match="too large"):
        pictures.decode(broken.PICTURES["a claim of 2500 Mpx"][0])


def test_a_picture_file_over_the_byte_limit_is_refused(monkeypatch):
    monkeypatch.setattr(pictures, "MAX_BYTES", 100)
    with pytest.raises(Bad, match="bytes, limit 100"):
        pictures.decode(broken.encoded())


@pytest.mark.parametrize("height, width", [(24, 32), (33, 17), (16, 16), (7, 13), (100, 41), (16, 400)])
def test_the_crop_is_the_papers_resize_then_centre_crop(height, width):
    """arXiv 2405.09818's code: shorter side to the target (Lanczos), the other rounded, crop the centre."""
    pixels, side = broken.picture(3, height, width), 16
    scale = side / min(height, width)
    size = round(scale * width), round(scale * height)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    resized = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))
    assert np.abs(pictures.crop(pixels, side) - resized[top : top + side, left : left + side].astype(int)).max() <= 1


def test_a_strip_is_cropped_without_making_it_huge():
    strip = np.zeros((1, 100_000, 3), np.uint8)
    assert pictures.crop(strip, 64).shape == (64, 64, 3)


def test_a_square_of_the_right_size_is_left_as_it_is():
    square = broken.picture(0, 16, 16)
    assert np.array_equal(pictures.crop(square, 16), square)


def test_a_region_moves_with_the_crop():
    region = Region(1, "face", (0.5, 0.25, 0.75, 1.0), "Ada")
    moved = pictures.crop_region(region, width=200, height=100)  # keeps x from 50 to 150
    assert moved == Region(1, "face", (0.5, 0.25, 1.0, 1.0), "Ada")
    assert pictures.crop_region(Region(1, "face", (0.0, 0.0, 0.2, 1.0)), 200, 100) is None
