"""Score drawings, captions and infilled pictures of the embedded world, object by object.

Something is *stated* (by a caption) and something is *shown* (by a picture). Stated and shown objects are matched one
to one on all that is stated of each: shape, colour, size, texture, and its place or its relation to another object.
Object accuracy = matched / max(stated, shown), summed over all examples, so that extra objects cost; things that a
reader noticed but could not read count as objects that match nothing. Whole-scene accuracy asks that all objects match,
none is extra, and background and word are right.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from cm3jax.data import scenes
from cm3jax.data import scenes_world as world
from cm3jax.data.scenes_world import Object, Scene

FIELDS = ("shape", "colour", "size", "texture", "place")
"""What is compared; "place" includes relations."""


@dataclasses.dataclass(frozen=True)
class Score:
    """One example's counts: objects matched, of max(stated, shown), and whether all of the scene is right."""

    matched: int
    of: int
    whole: bool


# ------------------------------------------------------------------------------------------------------------ matching


def fits(stated: Object, shown: Object, scene: Scene, fields: Sequence[str] = FIELDS) -> bool:
    """Return whether object `shown` of a picture's `scene` is all that `stated` says, as far as `fields` go."""
    if any(getattr(stated, f) != getattr(shown, f) for f in fields if f != "place"):
        return False
    if "place" not in fields:
        return True
    if stated.place and stated.place != shown.place:
        return False
    return not stated.relation or _related(stated.relation, shown, scene)


def _related(relation: tuple[str, ...], shown: Object, scene: Scene) -> bool:
    """Return whether the scene has another object of the looks in relation[1:] from which `shown` is relation[0]."""
    others = [thing for thing in scene.objects if thing is not shown and thing.looks == relation[1:]]
    return any(world.relation(shown, other) == relation[0] for other in others)


def match(stated: Scene, shown: Scene, fields: Sequence[str] = FIELDS) -> list[tuple[int, int]]:
    """Return a largest one-to-one matching as pairs of indices (stated, shown)."""
    good = np.array([[fits(a, b, shown, fields) for b in shown.objects] for a in stated.objects], dtype=bool)
    if not good.size:
        return []
    rows, columns = linear_sum_assignment(good, maximize=True)
    return [(int(i), int(j)) for i, j in zip(rows, columns, strict=True) if good[i, j]]


def score(stated: Scene, shown: Scene, fields: Sequence[str] = FIELDS) -> Score:
    """Compare what is stated with what is shown."""
    matched = len(match(stated, shown, fields))
    of = max(len(stated.objects) + stated.unread, len(shown.objects) + shown.unread)
    rest = stated.background == shown.background != "" and stated.word == shown.word
    rest = rest and stated.word_place == shown.word_place
    return Score(matched, of, matched == of and rest)


def object_accuracy(stated: Scene, shown: Scene, fields: Sequence[str] = FIELDS) -> float:
    """Return one example's matched / max(stated, shown); 1 if both are empty."""
    result = score(stated, shown, fields)
    return result.matched / result.of if result.of else 1.0


# --------------------------------------------------------------------------------------------------------- many at once


def summary(scores: Sequence[Score]) -> dict[str, float]:
    """Return {"object_accuracy", "scene_accuracy", "objects", "examples"}.

    Object accuracy is the sum of matched over the sum of max(stated, shown); NaN if there is nothing to score.
    """
    objects = sum(s.of for s in scores)
    return {
        "object_accuracy": sum(s.matched for s in scores) / objects if objects else float("nan"),
        "scene_accuracy": sum(s.whole for s in scores) / len(scores) if scores else float("nan"),
        "objects": objects,
        "examples": len(scores),
    }


def drawings(captions: Sequence[str], pictures: np.ndarray, level: str) -> dict[str, float]:
    """Score pictures, uint8 [b, h, w, 3], against the captions that asked for them (or that describe them)."""
    shown = scenes.recognise_all(pictures, level)
    return summary([score(scenes.parse(text, level), seen) for text, seen in zip(captions, shown, strict=True)])


def descriptions(captions: Sequence[str], truths: Sequence[Scene], level: str) -> dict[str, float]:
    """Score written captions against the true scenes (`scenes_world.from_json(record.fields["scene"])`)."""
    return summary([score(scenes.parse(text, level), truth) for text, truth in zip(captions, truths, strict=True)])


# ----------------------------------------------------------------------------------------------------------- infilling


@dataclasses.dataclass(frozen=True)
class Target:
    """One object to be infilled and the region masked for it.

    Attributes:
      index: Of the object in the true scene.
      cells: The region in the tokenizer's code grid, (top, left, bottom, right), the last two exclusive.
      grid: (h, w) of that grid.
    """

    index: int
    cells: tuple[int, int, int, int]
    grid: tuple[int, int]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """The region as fractions of the picture, (x0, y0, x1, y1)."""
        top, left, bottom, right = self.cells
        h, w = self.grid
        return left / w, top / h, right / w, bottom / h

    def mask(self) -> np.ndarray:
        """Return which codes are masked, bool [h * w], row by row."""
        top, left, bottom, right = self.cells
        masked = np.zeros(self.grid, bool)
        masked[top:bottom, left:right] = True
        return masked.ravel()


def target(scene: Scene, grid: tuple[int, int], rng: np.random.Generator, margin: float = 1 / 32) -> Target | None:
    """Choose an object to infill: its box and `margin` around it, widened to whole codes, touches nothing else.

    Returns None if the scene has no such object (never in the easy level where quarters are whole codes).
    """
    choices = []
    for index, thing in enumerate(scene.objects):
        cells = _cells(world.box(scene.level, thing), grid, margin)
        choice = Target(index, cells, grid)
        others = [world.box(scene.level, other) for i, other in enumerate(scene.objects) if i != index]
        if not any(_overlap(choice.box, other) for other in others + _word_boxes(scene)):
            choices.append(choice)
    return choices[rng.integers(len(choices))] if choices else None


def _cells(box, grid: tuple[int, int], margin: float) -> tuple[int, int, int, int]:
    """Return the cells (top, left, bottom, right) that a box with a margin touches."""
    (x0, y0, x1, y1), (h, w) = box, grid
    left, top = max(int(np.floor((x0 - margin) * w)), 0), max(int(np.floor((y0 - margin) * h)), 0)
    right, bottom = min(int(np.ceil((x1 + margin) * w)), w), min(int(np.ceil((y1 + margin) * h)), h)
    return top, left, bottom, right


def _overlap(a, b) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _word_boxes(scene: Scene) -> list[tuple[float, float, float, float]]:
    """Return the box of the scene's word, if there is one."""
    if not scene.word:
        return []
    strip = world.STRIP / world.LATTICE
    y = 0.0 if scene.word_place == "top" else 1 - strip
    return [(scene.word_x, y, scene.word_x + world.word_width(scene.word) / world.LATTICE, y + strip)]


def infill_score(stated: Scene, truth: Scene, shown: Scene, chosen: Target) -> Score:
    """Score one infilled picture: is the chosen object there again, and nothing else in its region?

    `of` counts the objects whose centre is in the region (at least 1); `whole` is the whole picture against `stated`.
    """
    asked = next((stated.objects[i] for i, j in match(stated, truth) if j == chosen.index), None)
    x0, y0, x1, y1 = chosen.box
    inside = [thing for thing in shown.objects if x0 <= thing.x < x1 and y0 <= thing.y < y1]
    hit = asked is not None and any(fits(asked, thing, shown) for thing in inside)
    return Score(int(hit), max(1, len(inside)), score(stated, shown).whole)


def infills(
    captions: Sequence[str],
    truths: Sequence[Scene],
    targets: Sequence[Target],
    pictures: np.ndarray,
    level: str,
) -> dict[str, float]:
    """Score infilled pictures, uint8 [b, h, w, 3], on the object that was masked out of each."""
    shown = scenes.recognise_all(pictures, level)
    examples = zip(captions, truths, targets, shown, strict=True)
    return summary([infill_score(scenes.parse(text, level), truth, seen, t) for text, truth, t, seen in examples])
