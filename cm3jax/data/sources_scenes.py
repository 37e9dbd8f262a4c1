"""The embedded world as a source: every index of a split is one scene, drawn from the seed."""

import dataclasses
from collections.abc import Iterator

from cm3jax import config
from cm3jax.data import example, scenes, scenes_tasks, scenes_world
from cm3jax.data.example import Example
from cm3jax.types import UserError

COUNT = 20_000  # training scenes where the config names no count
HELD_OUT = 1024  # scenes of each other split: issue figures want at least 512
CATALOGUE = {"bank": 3_664, "late": 920, "web": 40_000}
"""`scenes:rare`: two documents of each name to retrieve, an eighth as many of pairs; what the retriever learns from."""

EACH, MORE = 256, 16
"""`scenes:tasks`: held-out documents of each task in each split, and how often as many are trained on where the config
names no count."""


@dataclasses.dataclass(frozen=True)
class Scenes:
    """`count` training scenes, as many as `CATALOGUE` says, and `HELD_OUT` of each other split."""

    level: str
    seed: int
    resolution: int
    count: int

    def size(self, split: str) -> int:
        if self.level == scenes_world.TASKS and split != "train":
            return EACH * len(scenes_tasks.ORDER)
        return {"train": self.count, scenes_world.TEXTS: self.count // 2, **CATALOGUE}.get(split, HELD_OUT)

    def fingerprint(self) -> list:
        facts = [self.level, self.seed, self.resolution, self.count, HELD_OUT]
        tasks = [scenes_tasks.ORDER, scenes_tasks.TRAINED, scenes_tasks.ASKED, scenes_tasks.EDITED]
        # The captions' split of texts is what is written in the tasks' documents.
        more = {"rare": [CATALOGUE], scenes_world.TASKS: [EACH, *tasks], scenes_world.CAPTIONS: tasks}
        return [*facts, *more.get(self.level, ())]

    def total(self, jobs: list) -> int:
        return sum(self.size(split) for split in scenes_world.splits(self.level))

    def jobs(self, shards: int) -> list[list]:
        """Cut every split into `shards` ranges: a job is [[split, first, stop], ...]."""
        shards = example.shards(self.count, shards)
        splits = scenes_world.splits(self.level)
        cut = {split: [self.size(split) * i // shards for i in range(shards + 1)] for split in splits}
        return [[[split, ends[i], ends[i + 1]] for split, ends in cut.items()] for i in range(shards)]

    def read(self, job: list) -> Iterator[Example]:
        for split, first, stop in job:
            for index in range(first, stop):
                record = scenes.record(self.level, self.seed, index, split, self.resolution)
                values = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
                yield Example(where=f"scenes:{self.level} {split} {index}", **{**values, "split": split})


def open(prepare: config.Prepare) -> Scenes:
    """Return the source of one level of the embedded world.

    Raises:
      UserError: for another level.
    """
    level = prepare.source.partition(":")[2]
    if level not in (*scenes_world.LEVELS, scenes_world.TASKS, scenes_world.CAPTIONS):
        known = "scenes:easy, scenes:full, scenes:rare, scenes:captions or scenes:tasks"
        raise UserError(f"source {prepare.source!r}: no such level; use {known}")
    count = EACH * MORE * len(scenes_tasks.ORDER) if level == scenes_world.TASKS else COUNT
    return Scenes(level, prepare.seed, prepare.resolution, prepare.count or count)
