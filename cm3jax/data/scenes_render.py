"""Scenes to pixels: antialiased shapes, cached as finished patches, so that a picture is a few slice assignments."""

import functools

import numpy as np
from PIL import Image

from cm3jax.data import scenes_world as world

SUPERSAMPLE = 8
STRIPE = 4
"""Height of one stripe, in lattice steps."""
STRIPE_COLOUR = 0.4
"""Share of the object's colour in every other stripe; the rest is ink, so that no stripe vanishes in the background."""
BLACK, WHITE = (12, 12, 12), (245, 245, 245)
FONT = {
    **{"A": "ehhvhhh", "B": "uhhuhhu", "C": "ehggghe", "D": "uhhhhhu", "E": "vgguggv", "F": "vgguggg", "G": "ehgnhhe"},
    **{"H": "hhhvhhh", "I": "e44444e", "J": "72222ic", "K": "hikokih", "L": "ggggggv", "M": "hrllhhh", "N": "hhpljhh"},
    **{"O": "ehhhhhe", "P": "uhhuggg", "Q": "ehhhlid", "R": "uhhukih", "S": "fgge11u", "T": "v444444", "U": "hhhhhhe"},
    **{"V": "hhhhha4", "W": "hhhllrh", "X": "hha4ahh", "Y": "hha4444", "Z": "v1248gv"},
}
"""Capitals of 5 x 7 dots; one base-32 digit per row, its highest bit on the left."""


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Five points up to radius 1, notches at 0.45."""
    fold = np.pi / 5
    angle = np.abs((np.arctan2(u, -v) + fold) % (2 * fold) - fold)
    x, y = np.hypot(u, v) * np.cos(angle), np.hypot(u, v) * np.sin(angle)
    notch = 0.45 * np.cos(fold), 0.45 * np.sin(fold)
    return (notch[0] - 1) * y - notch[1] * (x - 1) > 0


INSIDE = {
    "circle": lambda u, v: u**2 + v**2 < 1,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) < 0.95,
    "triangle": lambda u, v: (v < 0.9) & (np.abs(u) < (v + 1) / 1.9),
    "cross": lambda u, v: (np.minimum(np.abs(u), np.abs(v)) < 0.34) & (np.maximum(np.abs(u), np.abs(v)) < 1),
    "ring": lambda u, v: (u**2 + v**2 < 1) & (u**2 + v**2 > 0.25),
    "star": _star,
}
"""Whether points are inside a shape; u to the right and v down, both -1 to 1 over the bounding box."""


@functools.cache
def mask(shape: str, side: float, offset: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    """Return the coverage of each pixel, float32 [k, k] in [0, 1].

    Args:
      side: Bounding box in pixels.
      offset: (x, y) of the box's upper left corner in the mask, in pixels, 0 to 1.
    """
    k = int(np.ceil(side + max(offset)))
    grid = (np.arange(k * SUPERSAMPLE) + 0.5) / SUPERSAMPLE
    u, v = ((grid - o) / side * 2 - 1 for o in offset)
    inside = INSIDE[shape](u[None, :], v[:, None])
    return inside.reshape(k, SUPERSAMPLE, k, SUPERSAMPLE).mean((1, 3), dtype=np.float32)


@functools.cache
def stripes(side: float, offset: float, resolution: int) -> np.ndarray:
    """Return the share of the object's own colour in each pixel row of a striped object, float32 [k]."""
    k = int(np.ceil(side + offset))
    steps = ((np.arange(k * SUPERSAMPLE) + 0.5) / SUPERSAMPLE - offset) * world.LATTICE / resolution
    odd = np.floor(steps / STRIPE).astype(int) % 2 == 1
    return np.where(odd, STRIPE_COLOUR, 1).reshape(k, SUPERSAMPLE).mean(1, dtype=np.float32)


@functools.cache
def upper(side: float, offset: float) -> np.ndarray:
    """Return the share of the upper colour in each pixel row of an object of two colours, float32 [k]."""
    k = int(np.ceil(side + offset))
    above = (np.arange(k * SUPERSAMPLE) + 0.5) / SUPERSAMPLE - offset < side / 2
    return above.reshape(k, SUPERSAMPLE).mean(1, dtype=np.float32)


def ink(level: str, background: str) -> tuple[int, int, int]:
    """Return what words and every other stripe are drawn with: black on light backgrounds, else white."""
    return BLACK if sum(world.BACKGROUNDS[level][background]) > 450 else WHITE


@functools.lru_cache(maxsize=16384)
def _patch(looks, level: str, background: str, resolution: int, offset: tuple[float, float]) -> np.ndarray:
    """Return an object on its background, uint8 [k, k, 3]."""
    shape, colour, size, texture = looks
    side = world.SIZES[level][size] * resolution / world.LATTICE
    cover = mask(shape, side, offset)[..., None]
    paint = np.float32(world.COLOURS[colour])[None, None]
    if texture == "striped":
        own = stripes(side, offset[1], resolution)
        own = np.pad(own, (0, len(cover) - len(own)), mode="edge")[:, None, None]
        paint = own * paint + (1 - own) * np.float32(ink(level, background))
    elif texture in world.OVER:
        own = upper(side, offset[1])
        own = np.pad(own, (0, len(cover) - len(own)), mode="edge")[:, None, None]
        paint = own * paint + (1 - own) * np.float32(world.COLOURS[world.OVER[texture]])
    base = np.float32(world.BACKGROUNDS[level][background])
    return np.round(base + cover * (paint - base)).astype(np.uint8)


@functools.cache
def glyph(letter: str) -> np.ndarray:
    """Return a capital as float32 [LETTER_HEIGHT, LETTER_WIDTH] of 0 and 1, one entry per lattice step."""
    rows = [[int(row, 32) >> bit & 1 for bit in (4, 3, 2, 1, 0)] for row in FONT[letter]]
    return np.float32(rows).repeat(2, 0).repeat(2, 1)


def word_top(place: str) -> int:
    """Return the first row of a word's letters, in lattice steps."""
    margin = world.LETTER_MARGIN
    return margin if place == "top" else world.LATTICE - margin - world.LETTER_HEIGHT


def _draw_word(picture: np.ndarray, scene: world.Scene) -> None:
    """Draw the scene's word in place."""
    letters = np.zeros((world.LATTICE, world.LATTICE), np.float32)
    y, x = word_top(scene.word_place), round(scene.word_x * world.LATTICE)
    for i, letter in enumerate(scene.word):
        start = x + i * world.LETTER_STEP
        letters[y : y + world.LETTER_HEIGHT, start : start + world.LETTER_WIDTH] = glyph(letter)
    if len(picture) != world.LATTICE:
        letters = np.asarray(Image.fromarray(letters).resize(picture.shape[:2], Image.Resampling.BOX))
    where = letters > 0
    cover, paint = letters[where][:, None], np.float32(ink(scene.level, scene.background))
    picture[where] = np.round(picture[where] + cover * (paint - picture[where]))


def corner(centre: float, side: float, resolution: int) -> tuple[int, float]:
    """Return the first pixel of a box along one axis, and where the box starts in it (in sixteenths of a pixel)."""
    start = round((centre * resolution - side / 2) * 16) / 16
    return int(np.floor(start)), start - np.floor(start)


def render(scene: world.Scene, resolution: int) -> np.ndarray:
    """Return the picture of a scene, uint8 [resolution, resolution, 3]."""
    picture = np.empty((resolution, resolution, 3), np.uint8)
    picture[:] = world.BACKGROUNDS[scene.level][scene.background]
    for thing in scene.objects:
        side = world.SIZES[scene.level][thing.size] * resolution / world.LATTICE
        (x, fx), (y, fy) = corner(thing.x, side, resolution), corner(thing.y, side, resolution)
        patch = _patch(thing.looks, scene.level, scene.background, resolution, (fx, fy))
        picture[y : y + len(patch), x : x + len(patch)] = patch
    if scene.word:
        _draw_word(picture, scene)
    return picture
