"""What `scenes_tasks` draws beside scenes: words, stick figures, and the feature images of both. On a grid of 48."""

import dataclasses
import functools

import numpy as np
from PIL import Image
from scipy import ndimage

from cm3jax.data import scenes_render
from cm3jax.data import scenes_world as world
from cm3jax.data.scenes_world import Scene

SIDE = 48
"""Steps of a picture's side; pictures of other sizes are drawn so and resampled, or drawn to scale."""
FEATURES = ("edges", "segmentation", "hed", "depth", "normals", "scribble")
"""Feature images of scenes."""

# --------------------------------------------------------------------------------------------------------------- words

CELL_WIDTH, CELL_HEIGHT, CELL_TOP = 8, 16, 16
"""A letter's cell and the row where the cells begin, in steps."""
CELLS = SIDE // CELL_WIDTH


@functools.cache
def glyph(letter: str) -> np.ndarray:
    """Return a capital in its cell, float32 [16, 8] of 0 and 1: 5 x 7 dots, each one wide and two high."""
    dots = scenes_render.glyph(letter)[:, ::2]
    out = np.zeros((CELL_HEIGHT, CELL_WIDTH), np.float32)
    out[1:15, 1:6] = dots
    return out


def word(text: str, background: str, resolution: int) -> np.ndarray:
    """Return the picture of a word of up to 6 capitals, uint8 [resolution, resolution, 3]."""
    cover, first = np.zeros((SIDE, SIDE), np.float32), (CELLS - len(text)) // 2
    for i, letter in enumerate(text):
        left = (first + i) * CELL_WIDTH
        cover[CELL_TOP : CELL_TOP + CELL_HEIGHT, left : left + CELL_WIDTH] = glyph(letter)
    base, ink = np.float32(world.BACKGROUNDS[world.TASKS][background]), scenes_render.ink(world.TASKS, background)
    return _resized(_painted(cover, base, np.float32(ink)), resolution)


def _painted(cover: np.ndarray, base: np.ndarray, paint: np.ndarray) -> np.ndarray:
    return np.round(base + cover[..., None] * (paint - base)).astype(np.uint8)


def _resized(picture: np.ndarray, resolution: int) -> np.ndarray:
    if resolution == len(picture):
        return picture
    method = Image.Resampling.BOX if resolution < len(picture) else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(picture).resize((resolution, resolution), method))


# ------------------------------------------------------------------------------------------------------------- figures

POSES = {
    "left_arm": ("up", "out", "down"),
    "right_arm": ("up", "out", "down"),
    "left_leg": ("straight", "out"),
    "right_leg": ("straight", "out"),
}
"""Limb -> what it may do; left and right as one sees it."""
HANDS = {"up": (12.0, 6.0), "out": (7.0, 19.0), "down": (14.0, 29.0)}
FEET = {"straight": (20.0, 45.0), "out": (10.0, 43.0)}
"""Where a left limb ends, in steps; a right one is its mirror image."""
HEAD, NECK, HIP = (24.0, 8.0), (24.0, 15.0), (24.0, 29.0)
RADIUS, LIMB = 5.0, 3.5
"""Of the head, and the width of a limb, in steps."""


@dataclasses.dataclass(frozen=True)
class Figure:
    """A stick figure alone in a picture. An empty background or colour means: not readable."""

    colour: str
    background: str
    left_arm: str
    right_arm: str
    left_leg: str
    right_leg: str

    @property
    def pose(self) -> tuple[str, str, str, str]:
        return self.left_arm, self.right_arm, self.left_leg, self.right_leg


def keypoints(pose: tuple[str, str, str, str]) -> dict[str, tuple[float, float]]:
    """Return the (x, y) of a pose's points as fractions of the picture."""
    left_arm, right_arm, left_leg, right_leg = pose
    mirror = lambda point: (SIDE - point[0], point[1])  # noqa: E731
    points = {"head": HEAD, "neck": NECK, "hip": HIP, "left_hand": HANDS[left_arm], "left_foot": FEET[left_leg]}
    points |= {"right_hand": mirror(HANDS[right_arm]), "right_foot": mirror(FEET[right_leg])}
    return {name: (x / SIDE, y / SIDE) for name, (x, y) in points.items()}


BONES = {
    ("neck", "hip"): (60, 160, 255),
    ("neck", "left_hand"): (255, 80, 60),
    ("neck", "right_hand"): (60, 220, 80),
    ("hip", "left_foot"): (255, 220, 60),
    ("hip", "right_foot"): (220, 90, 255),
}
"""The two ends of a bone -> its colour in a skeleton."""


@functools.cache
def _bone(start: tuple[float, float], end: tuple[float, float], width: float, resolution: int) -> np.ndarray:
    """Return how much of each pixel a line covers, float32 [h, w]; the points are fractions, the width too."""
    fine = resolution * 4
    grid = (np.arange(fine) + 0.5) / fine
    x, y = grid[None, :] - start[0], grid[:, None] - start[1]
    dx, dy = end[0] - start[0], end[1] - start[1]
    along = np.clip((x * dx + y * dy) / max(dx * dx + dy * dy, 1e-12), 0, 1)
    inside = (x - along * dx) ** 2 + (y - along * dy) ** 2 < (width / 2) ** 2
    return inside.reshape(resolution, 4, resolution, 4).mean((1, 3), dtype=np.float32)


@functools.cache
def body(pose: tuple[str, str, str, str], resolution: int) -> np.ndarray:
    """Return how much of each pixel a figure covers, float32 [h, w]."""
    points = keypoints(pose)
    bones = [_bone(points[a], points[b], LIMB / SIDE, resolution) for a, b in BONES]
    return np.max([*bones, _bone(points["head"], points["head"], 2 * RADIUS / SIDE, resolution)], axis=0)


def figure(who: Figure, resolution: int) -> np.ndarray:
    """Return the picture of a figure, uint8 [resolution, resolution, 3]."""
    base, paint = world.BACKGROUNDS[world.TASKS][who.background], world.COLOURS[who.colour]
    return _painted(body(who.pose, resolution), np.float32(base), np.float32(paint))


def skeleton(who: Figure, resolution: int) -> np.ndarray:
    """Return a figure's bones, each in its colour, and its joints in white, on black, uint8 [h, w, 3]."""
    points, picture = keypoints(who.pose), np.zeros((resolution, resolution, 3), np.float32)
    strokes = [(_bone(points[a], points[b], 2.0 / SIDE, resolution), paint) for (a, b), paint in BONES.items()]
    strokes += [(_bone(point, point, 3.0 / SIDE, resolution), (255, 255, 255)) for point in points.values()]
    for cover, paint in strokes:
        picture += cover[..., None] * (np.float32(paint) - picture)
    return np.round(picture).astype(np.uint8)


# ------------------------------------------------------------------------------------------------------ feature images

CLASSES = {
    "circle": (220, 20, 60),
    "square": (70, 130, 180),
    "triangle": (250, 170, 30),
    "cross": (107, 142, 35),
    "ring": (153, 153, 153),
    "star": (152, 70, 251),
}
"""Colour of a shape in segmentation maps; the rest is black."""
NEARNESS = {"small": 120, "large": 235}
"""Brightness of a thing in depth maps: small things are far. What is behind all is `BEHIND`."""
BEHIND = 20
ROUNDED = 3.0
"""Steps over which a thing's surface bends away at its border, in normals."""
TREMOR = 0.8
"""Steps by which a scribble misses, about."""


def covers(scene: Scene, resolution: int) -> np.ndarray:
    """Return how much of each pixel each object covers, float32 [objects, h, w]."""
    out = np.zeros((len(scene.objects), resolution, resolution), np.float32)
    for cover, thing in zip(out, scene.objects, strict=True):
        side = world.SIZES[scene.level][thing.size] * resolution / world.LATTICE
        places = [scenes_render.corner(centre, side, resolution) for centre in (thing.x, thing.y)]
        mask = scenes_render.mask(thing.shape, side, tuple(offset for _, offset in places))
        (x, _), (y, _) = places
        cover[y : y + len(mask), x : x + len(mask)] = mask
    return out


def drawing_order(scene: Scene) -> list[int]:
    """Return the objects from the farthest to the nearest, those of one size in reading order."""
    return sorted(range(len(scene.objects)), key=lambda i: NEARNESS[scene.objects[i].size])


def labels(scene: Scene, resolution: int) -> np.ndarray:
    """Return which shape is where, int64 [resolution, resolution]: 0 for what is behind all, then as in `CLASSES`."""
    found, inside = np.zeros((resolution, resolution), np.int64), covers(scene, resolution) >= 0.5
    for i in drawing_order(scene):
        found[inside[i]] = 1 + tuple(CLASSES).index(scene.objects[i].shape)
    return found


def outline(scene: Scene, resolution: int) -> np.ndarray:
    """Return the pixels of things that touch what is none, bool [resolution, resolution]."""
    return _lines((covers(scene, resolution) >= 0.5).any(0))


def feature(kind: str, scene: Scene, resolution: int, rng: np.random.Generator) -> np.ndarray:
    """Return one of `FEATURES` of a scene, uint8 [resolution, resolution, 3]; only scribbles look at `rng`."""
    if kind == "segmentation":
        return np.uint8([(0, 0, 0), *CLASSES.values()])[labels(scene, resolution)]
    if kind in ("edges", "hed"):
        lines = outline(scene, resolution).astype(np.float32)
        if kind == "hed":
            lines = np.minimum(ndimage.gaussian_filter(lines, 1.0) * 2, 1)
        return _grey(lines)
    inside = covers(scene, resolution) >= 0.5
    if kind == "normals":
        return _normals(inside.any(0), resolution)
    if kind == "depth":
        picture = np.full((resolution, resolution, 3), BEHIND, np.uint8)
        for i in drawing_order(scene):
            picture[inside[i]] = NEARNESS[scene.objects[i].size]
        return picture
    return _grey(1 - _lines(_shaken(inside.any(0), rng)).astype(np.float32))


def _grey(lines: np.ndarray) -> np.ndarray:
    return np.repeat(np.round(lines * 255).astype(np.uint8)[..., None], 3, axis=-1)


def _lines(inside: np.ndarray) -> np.ndarray:
    """Return the pixels inside that touch what is outside, bool [h, w]."""
    return inside & ~ndimage.binary_erosion(inside)


def _shaken(inside: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return what is inside after a smooth random shift of every place, as an unsteady hand would have it."""
    side = len(inside)
    shift = ndimage.gaussian_filter(rng.normal(size=(2, side, side)), (0, side / 12, side / 12))
    shift *= TREMOR * side / SIDE / shift.std()
    places = np.mgrid[:side, :side] + shift
    return ndimage.map_coordinates(inside.astype(np.float32), places, order=1, mode="nearest") >= 0.5


def _normals(inside: np.ndarray, resolution: int) -> np.ndarray:
    """Return surfaces' directions as colours: things are flat, and rounded at their borders."""
    reach = ROUNDED * resolution / SIDE
    height = ndimage.gaussian_filter(np.minimum(ndimage.distance_transform_edt(inside), reach), 0.5)
    dy, dx = np.gradient(height)
    normal = np.stack([-dx, -dy, np.ones_like(dx)], -1)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    return np.round((normal + 1) / 2 * 255).astype(np.uint8)
