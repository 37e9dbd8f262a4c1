"""A public set in its published files: `set:NAME:FOLDER`, or `set:NAME:FOLDER:SPLIT` for one split of it.

An item becomes a document of its task (`tasks.templates`), the wordings in turn; `fields` keep task, wording and truth.
A picture that is missing or broken, or an empty answer, costs its item only; a broken annotation file stops all.
"""

import dataclasses
import hashlib
import itertools
import pathlib
from collections.abc import Iterator

from cm3jax import config
from cm3jax.data import example
from cm3jax.data.example import Bad, Example, Reject
from cm3jax.data.sets import catalogue, item
from cm3jax.data.sets.item import Item
from cm3jax.tasks import table, templates
from cm3jax.types import UserError

PREFIX = "set:"


@dataclasses.dataclass(frozen=True)
class Sets:
    """Splits of one set, each with its number of items; a job is [[split, first item, stop], ...]."""

    name: str
    root: str
    splits: tuple[tuple[str, int], ...]

    def fingerprint(self) -> list:
        """What the annotation files hold; pictures are many, and are looked at by name only."""
        hashed = [[str(path.relative_to(self.root)), _digest(path)] for path in _annotations(pathlib.Path(self.root))]
        return [self.name, [list(split) for split in self.splits], hashed]

    def total(self, jobs: list) -> int:
        return sum(stop - first for job in jobs for _, first, stop in job)

    def jobs(self, shards: int) -> list[list]:
        total = sum(length for _, length in self.splits)
        shards = example.shards(total, shards)
        ends = [total * i // shards for i in range(shards + 1)]
        return [self._ranges(first, stop) for first, stop in itertools.pairwise(ends)]

    def _ranges(self, first: int, stop: int) -> list[list]:
        ends = list(itertools.accumulate((length for _, length in self.splits), initial=0))
        cut = ((i, max(first - a, 0), min(stop, b) - a) for i, (a, b) in enumerate(itertools.pairwise(ends)))
        return [[self.splits[i][0], low, high] for i, low, high in cut if low < high]

    def read(self, job: list) -> Iterator[Example | Reject]:
        for split, first, stop in job:
            items = itertools.islice(catalogue.read(self.name, self.root, split, first), stop - first)
            for turn, found in enumerate(items, first):
                where = f"{self.name}/{split}:{found.key}"
                try:
                    yield self._example(found, where, split, turn)
                except Bad as e:
                    yield e.reject(found.key, where)

    def _example(self, found: Item, where: str, split: str, turn: int) -> Example:
        root, task = pathlib.Path(self.root), table.find(found.task)
        values = {name: v if isinstance(v, str) else item.picture(v, root) for name, v in found.values.items()}
        if empty := [name for name in task.answer if values[name] == ""]:
            raise Bad("no answer", f"field {empty[0]!r} is empty")
        parts, regions = templates.make(found.task, values, turn)
        held_out = example.split_name(split)
        return Example(
            f"{split}/{found.key}",
            parts,
            where,
            {"task": found.task, "wording": turn % len(task.templates), "truth": found.truth},
            regions=regions,
            group=found.group,
            license=found.license,
            source=found.source or self.name,
            split=held_out,
        )


def open(prepare: config.Prepare) -> Sets:
    """Return the source that `set:NAME:FOLDER[:SPLIT]` names.

    Raises:
      UserError: if there is no such set, or its files are not in the folder.
    """
    name, _, rest = prepare.source.removeprefix(PREFIX).partition(":")
    folder, _, split = rest.rpartition(":")
    if not folder or split not in (*catalogue.SPLITS, *catalogue.SYNONYMS):
        folder, split = rest, ""
    if not folder:
        raise UserError(
            f"source {prepare.source!r}: must be set:NAME:FOLDER or set:NAME:FOLDER:SPLIT, such as"
            " set:vqa_v2:/data/vqa:val"
        )
    catalogue.find(name)
    wanted = (catalogue.SYNONYMS.get(split, split),) if split else catalogue.splits(name, folder)
    left, taken = prepare.count, []
    for each in wanted:
        length = catalogue.count(name, folder, each)
        length = min(length, left) if prepare.count else length
        left -= length
        taken += [(each, length)] if length else []
    if not taken:
        raise UserError(f"source {prepare.source!r}: holds no items; a task needs a picture")
    return Sets(name, folder, tuple(taken))


def _annotations(root: pathlib.Path) -> list[pathlib.Path]:
    """Return the files that may hold annotations: at most two folders down, and no pictures."""
    kinds = ("*.json", "*.jsonl", "*.csv", "*.token", "*.parquet")
    return sorted({path for kind in kinds for path in (*root.glob(kind), *root.glob(f"*/{kind}"))})


def _digest(path: pathlib.Path) -> str:
    """Return a checksum of a file; of parquet, which holds the pictures, of its size and its end, which names all."""
    with path.open("rb") as file:
        if path.suffix != ".parquet":
            return hashlib.file_digest(file, "sha256").hexdigest()
        size = path.stat().st_size
        file.seek(max(0, size - 2**16))
        return f"{size}:{hashlib.sha256(file.read()).hexdigest()}"
