"""The embedded world as a data source: scenes, their pictures and captions, and both read back.

`scenes_world` says what the three levels are and draws scenes; `scenes_render` makes pictures; `scenes_words` makes
captions and reads them; `scenes_recognise` reads pictures; `scenes_tasks` makes documents of all tasks. The readers are
for scoring, never to choose candidates.
"""

import numpy as np

from cm3jax.data import scenes_recognise, scenes_render, scenes_tasks, scenes_words, scenes_world
from cm3jax.data.scenes_world import Scene
from cm3jax.types import Record, Region


def sample(level: str, seed: int, index: int, split: str) -> Scene:
    """Draw scene `index` of a split ("train", "validation", "test", "composition"; rare: "bank", "late", "web")."""
    return scenes_world.sample(level, seed, index, split)


def render(scene: Scene, resolution: int) -> np.ndarray:
    """Return the picture of a scene, uint8 [resolution, resolution, 3]."""
    return scenes_render.render(scene, resolution)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Return one of the wordings of a scene."""
    return scenes_words.caption(scene, rng)


def parse(text: str, level: str) -> Scene:
    """Return the scene that a caption states; never raises on any text."""
    return scenes_words.parse(text, level)


def recognise(picture: np.ndarray, level: str) -> Scene:
    """Return the scene that a picture, uint8 [h, w, 3], shows, from its pixels alone."""
    return scenes_recognise.recognise(picture, level)


def recognise_all(pictures: np.ndarray, level: str) -> list[Scene]:
    """Return the scenes that pictures, uint8 [b, h, w, 3], show; many times faster than one by one."""
    return scenes_recognise.recognise_all(pictures, level)


def record(level: str, seed: int, index: int, split: str, resolution: int) -> Record:
    """Return one caption-picture pair with its ground truth in `fields["scene"]` (JSON) and one region per object.

    Of the level "tasks": a task's document (`scenes_tasks.record`); of "captions": `scenes_tasks.pair`.
    """
    if level in scenes_tasks.RECORDS:
        return scenes_tasks.RECORDS[level](seed, index, split, resolution)
    scene = sample(level, seed, index, split)
    text = caption(scene, scenes_world.stream(level, seed, index, split, "caption"))
    scene = scenes_world.shown(scene, split)
    return Record(
        key=f"scenes-{level}-{seed}-{split}-{index}",
        parts=(text, render(scene, resolution)),
        fields={"scene": scenes_world.to_json(scene)},
        regions=tuple(Region(1, "object", scenes_world.box(level, t), " ".join(t.looks)) for t in scene.objects),
        license="Apache-2.0",
        source=f"scenes:{level}",
        split=split,
    )
