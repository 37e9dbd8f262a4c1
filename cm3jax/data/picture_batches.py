"""Batches of pictures for the image tokenizer, by random access: step s of any host. Imports no jax.

Row g of the run is place g mod n of epoch g div n; an epoch is a permutation drawn from (seed, epoch). So nothing
depends on the number of hosts, workers or threads, and a run resumes at any step.
"""

import functools
from collections.abc import Iterator

import grain
import numpy as np

from cm3jax.config import Training
from cm3jax.data import encode, packing, pipeline, shards
from cm3jax.types import Record, UserError

Batch = dict[str, np.ndarray]
TRIES = 100
"""Records looked at for one picture; records may be text alone."""
KINDS = {"face": 1, "object": 2}
"""Numbers of the kinds of regions that have a loss; 0 is an unused place."""


def batches(
    prepared, training: Training, start_step: int = 0, process_index: int = 0, process_count: int = 1, boxes: int = 0
) -> Iterator[Batch]:
    """Yield this host's share of the training batches from `start_step` on, without end.

    With `boxes`, a batch also holds that many regions of each picture, the largest first: "boxes" float32 [b, boxes, 4]
    and "kinds" int32 [b, boxes], see KINDS.
    """
    make = Pictures(prepared, "train", training, process_index, process_count, boxes)
    return iter(pipeline.iterate(grain.MapDataset.range(start_step, pipeline.FOREVER).map(make), training.workers))


def eval_batches(prepared, training: Training, process_index: int = 0, process_count: int = 1) -> Iterator[Batch]:
    """Yield the same validation batches at every call: at most `training.evaluate_batches`, whole ones only.

    A validation split smaller than one batch gives one, with pictures repeated.
    """
    make = Pictures(prepared, "validation", training, process_index, process_count)
    whole = max(1, len(make.reader) // training.batch)
    return (make(step) for step in range(min(whole, training.evaluate_batches)))


class Pictures:
    """This host's share of every batch: `pictures(step)` is {"pictures": uint8 [b, h, w, 3]}."""

    def __init__(
        self, prepared, split: str, training: Training, process_index: int = 0, process_count: int = 1, boxes: int = 0
    ):
        if training.batch % process_count:
            raise UserError(
                f"image.training.batch = {training.batch}: must be a multiple of the {process_count} processes"
            )
        self._arguments = (prepared, split, training, process_index, process_count, boxes)
        self.reader, self.training, self.boxes = shards.Reader(prepared, split), training, boxes
        self.share = training.batch // process_count
        self.first = process_index * self.share
        self.order = functools.lru_cache(2)(self._order)

    def __reduce__(self):  # another process opens the files again
        return Pictures, self._arguments

    def __call__(self, step: int) -> Batch:
        start = step * self.training.batch + self.first
        found = [self.choose(g) for g in range(start, start + self.share)]
        batch = {"pictures": np.stack([record.parts[part] for record, part in found])}
        if self.boxes:
            rows = [regions(record, part, self.boxes) for record, part in found]
            batch |= {"boxes": np.stack([r[0] for r in rows]), "kinds": np.stack([r[1] for r in rows])}
        return batch

    def _order(self, epoch: int) -> np.ndarray:
        return packing.stream(self.training.seed, "pictures", epoch).permutation(len(self.reader))

    def choose(self, g: int) -> tuple[Record, int]:
        """Return row g of the run: a record and which part of it; another record if the row's is text alone."""
        epoch, place = divmod(g, len(self.reader))
        rng = packing.stream(self.training.seed, "picture", epoch, place)
        record = self.reader[int(self.order(epoch)[place])]
        for _ in range(TRIES):
            if found := [i for i, part in enumerate(record.parts) if encode.is_picture(part)]:
                return record, found[int(rng.integers(len(found)))]
            record = self.reader[int(rng.integers(len(self.reader)))]
        raise UserError(f"{self.reader.paths[0].parent}: no picture in {TRIES} records; prepare others")


def regions(record: Record, part: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the boxes [count, 4] and kinds [count] of the largest regions with a loss in one part of a record."""

    def area(region):
        x0, y0, x1, y1 = region.box
        return (x1 - x0) * (y1 - y0)

    found = [r for r in record.regions if r.part == part and r.kind in KINDS and area(r) > 0]
    found = sorted(found, key=area, reverse=True)[:count]
    boxes, kinds = np.zeros((count, 4), np.float32), np.zeros(count, np.int32)
    for i, region in enumerate(found):
        boxes[i], kinds[i] = region.box, KINDS[region.kind]
    return boxes, kinds
