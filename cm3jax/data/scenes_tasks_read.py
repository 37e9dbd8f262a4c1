"""Words, figures and texts of `scenes_tasks` read back, from pixels and characters alone."""

import functools
import itertools
import re

import numpy as np
from PIL import Image
from scipy import ndimage

from cm3jax.data import scenes_recognise, scenes_render
from cm3jax.data import scenes_tasks_render as render
from cm3jax.data import scenes_world as world
from cm3jax.data.scenes_tasks_render import SIDE, Figure
from cm3jax.data.scenes_words import _any
from cm3jax.data.scenes_world import Object, Scene

UNREAD = "?"
"""Stands for a letter that is there and cannot be read."""
SHARP = 0.5
"""Blur of glyphs before they are compared, in steps: half of what a tokenizer softens them by."""
LETTER_FIT = 0.45
"""Least share of a cell's energy that a glyph must explain."""
FAINT = 0.12
"""Energy of a cell, as a share of the faintest letter's, from which on something stands there."""
FIGURE_FIT = 0.75
"""Least share of a picture's energy that a figure must explain."""


def _on_grid(picture: np.ndarray) -> np.ndarray:
    """Return a picture at one pixel a step, float32 [48, 48, 3]."""
    if picture.shape[:2] != (SIDE, SIDE):
        method = Image.Resampling.BOX if len(picture) > SIDE else Image.Resampling.BICUBIC
        picture = np.asarray(Image.fromarray(picture).resize((SIDE, SIDE), method))
    return picture.astype(np.float32)


def _ground(pixels: np.ndarray) -> tuple[str, np.ndarray]:
    """Return the background, "" if there is none, and its colour [3]."""
    names, bases = scenes_recognise._backgrounds(pixels[None], world.TASKS)
    return names[0], bases[0]


# --------------------------------------------------------------------------------------------------------------- words


@functools.cache
def _glyphs() -> tuple[tuple[str, ...], np.ndarray]:
    """Return the letters and their cells, softened, float32 [26, 16 * 8]."""
    letters = tuple(scenes_render.FONT)
    cells = [ndimage.gaussian_filter(render.glyph(letter), SHARP).ravel() for letter in letters]
    return letters, np.stack(cells)


def word(picture: np.ndarray) -> str:
    """Return the word that a picture, uint8 [h, w, 3], shows; "" if it shows none, or anything beside it.

    A letter is a cell that a glyph in the ink of the background explains; one that none does is read as "?".
    """
    pixels = _on_grid(picture)
    name, base = _ground(pixels)
    if not name:
        return ""
    letters, glyphs = _glyphs()
    axis = np.float32(scenes_render.ink(world.TASKS, name)) - base
    along = (pixels - base) @ axis / (axis @ axis)
    energy = ((pixels - base) ** 2).sum(-1) / (axis @ axis)
    rows = slice(render.CELL_TOP, render.CELL_TOP + render.CELL_HEIGHT)
    power = (glyphs**2).sum(1)
    if energy.sum() - energy[rows].sum() > power.min() / 2:  # something else stands above or below
        return ""
    read = ""
    for i in range(render.CELLS):
        columns = slice(i * render.CELL_WIDTH, (i + 1) * render.CELL_WIDTH)
        cell, whole = along[rows, columns].ravel(), energy[rows, columns].sum()
        if whole < FAINT * power.min():
            read += " "
            continue
        size = np.clip(glyphs @ cell / power, 0, 1.2)  # how black the letter is
        left = whole - 2 * size * (glyphs @ cell) + size**2 * power
        best = left.argmin()
        read += letters[best] if left[best] < (1 - LETTER_FIT) * whole and size[best] > 0.4 else UNREAD
    return read.strip()


# ------------------------------------------------------------------------------------------------------------- figures


@functools.cache
def _bodies() -> tuple[list[tuple[str, ...]], np.ndarray]:
    """Return all poses and what they cover, softened, float32 [36, 48 * 48]."""
    poses = list(itertools.product(*render.POSES.values()))
    return poses, np.stack([ndimage.gaussian_filter(render.body(pose, SIDE), SHARP).ravel() for pose in poses])


def figure(picture: np.ndarray) -> Figure | None:
    """Return the figure that a picture, uint8 [h, w, 3], shows, from the pose and the colour that explain it best."""
    pixels = _on_grid(picture)
    name, base = _ground(pixels)
    if not name:
        return None
    poses, bodies = _bodies()
    signal = ndimage.gaussian_filter(pixels - base, (SHARP, SHARP, 0)).reshape(-1, 3)
    power = (bodies**2).sum(1)
    paints = bodies @ signal / power[:, None]  # the best colour of each pose, less the background
    whole = (signal**2).sum()
    left = whole - (power[:, None] * paints**2).sum(1)
    best = left.argmin()
    colour = scenes_recognise._colour(paints[best] + base)
    if not colour or left[best] > (1 - FIGURE_FIT) * whole:
        return None
    return Figure(colour, name, *poses[best])


# --------------------------------------------------------------------------------------------------------------- texts

_LOOKS = f"an? ({_any(world.SIZES[world.TASKS])}) ({_any(world.COLOURS)}) ({_any(world.SHAPES)})"
_PLACE = f"({_any(world.QUARTERS)})"
_TOLD = (re.compile(f"There is {_LOOKS} {_PLACE}"), re.compile(f"{_PLACE} is {_LOOKS}", re.IGNORECASE))
_OPENING = re.compile(r"The picture shows (?:(one) thing|(\d) things)")
_BEHIND = re.compile(f"The background is ({_any(world.BACKGROUNDS[world.TASKS])})")


def narrative(text: str) -> Scene:
    """Return the scene that a long caption tells; what it does not tell rightly, or twice, counts as `unread`."""
    grounds, counts, things, unread = [], [], [], 0
    for sentence in filter(None, (piece.strip() for piece in text.split("."))):
        if found := _OPENING.fullmatch(sentence):
            counts.append(int(found[2] or 1))
        elif found := _BEHIND.fullmatch(sentence):
            grounds.append(found[1])
        elif found := _TOLD[0].fullmatch(sentence):
            things.append(Object(found[3], found[2], found[1], found[4]))
        elif found := _TOLD[1].fullmatch(sentence):
            things.append(Object(found[4], found[3], found[2], found[1].lower()))
        else:
            unread += 1
    unread += counts != [len(things)]
    return Scene(world.TASKS, grounds[0] if len(grounds) == 1 else "", tuple(things), unread=unread)
