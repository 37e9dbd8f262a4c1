"""Batches of texts and pictures that belong together, for the retriever, by random access: step s of any host.

Row g of the run is place g mod n of epoch g div n; an epoch is a permutation drawn from (seed, epoch). So nothing
depends on the number of hosts, workers or threads, and a run resumes at any step. Imports no jax.
"""

import functools
from collections.abc import Iterator

import grain
import numpy as np

from cm3jax.config import Retriever
from cm3jax.data import encode, packing, pictures, pipeline, shards
from cm3jax.tokenizers import clip
from cm3jax.types import Record, UserError

Batch = dict[str, np.ndarray]
TRIES = 100
"""Records looked at for one pair; records may be text or picture alone."""


def batches(
    prepared,
    stage: Retriever,
    tokenizer: clip.Tokenizer,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Yield this host's share of the training batches from `start_step` on, without end; see `Pairs`."""
    make = Pairs(prepared, stage.splits, stage, tokenizer, process_index, process_count)
    return iter(
        pipeline.iterate(grain.MapDataset.range(start_step, pipeline.FOREVER).map(make), stage.training.workers)
    )


def eval_batches(
    prepared, stage: Retriever, tokenizer: clip.Tokenizer, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """Yield the same validation batches at every call: at most `training.evaluate_batches`, whole ones only.

    A validation split smaller than one batch gives one, with pairs repeated, each of which then counts as a wrong
    answer for the other.
    """
    make = Pairs(prepared, ("validation",), stage, tokenizer, process_index, process_count)
    whole = max(1, len(make.reader) // stage.training.batch)
    return (make(step) for step in range(min(whole, stage.training.evaluate_batches)))


class Pairs:
    """This host's share of every batch: pairs(step) is {"pictures": uint8 [b, h, w, 3], "ids": [b, t], "ends": [b]}."""

    def __init__(
        self,
        prepared,
        splits: tuple[str, ...],
        stage: Retriever,
        tokenizer: clip.Tokenizer,
        process_index: int = 0,
        process_count: int = 1,
    ):
        batch = stage.training.batch
        if batch % process_count:
            raise UserError(f"retriever.training.batch = {batch}: must be a multiple of the {process_count} processes")
        self._arguments = (prepared, splits, stage, tokenizer, process_index, process_count)
        self.reader, self.stage, self.tokenizer = shards.Reader(prepared, *splits), stage, tokenizer
        self.share = batch // process_count
        self.first = process_index * self.share
        self.order = functools.lru_cache(2)(self._order)

    def __reduce__(self):  # another process opens the files again
        return Pairs, self._arguments

    def __call__(self, step: int) -> Batch:
        start = step * self.stage.training.batch + self.first
        found = [self.choose(g) for g in range(start, start + self.share)]
        side = self.stage.model.resolution
        rows = [self.tokenizer.encode(text) for text, _ in found]
        ids, ends = clip.arrays(rows, self.tokenizer, self.stage.model.context)
        return {"pictures": np.stack([pictures.square(p, side) for _, p in found]), "ids": ids, "ends": ends}

    def _order(self, epoch: int) -> np.ndarray:
        return packing.stream(self.stage.training.seed, "pairs", epoch).permutation(len(self.reader))

    def choose(self, g: int) -> tuple[str, np.ndarray]:
        """Return row g of the run: a text and a picture of one record, of another record if the row's lacks either."""
        epoch, place = divmod(g, len(self.reader))
        rng = packing.stream(self.stage.training.seed, "pair", epoch, place)
        record = self.reader[int(self.order(epoch)[place])]
        for _ in range(TRIES):
            texts, found = parts(record)
            if texts and found:
                return texts[int(rng.integers(len(texts)))], found[int(rng.integers(len(found)))]
            record = self.reader[int(rng.integers(len(self.reader)))]
        raise UserError(
            f"{self.reader.paths[0].parent}: no text with a picture in {TRIES} records, and the retriever learns from"
            " those; name published weights in retriever.weights"
        )


def parts(record: Record) -> tuple[list[str], list[np.ndarray]]:
    """Return the texts and the pictures of a record; blank texts are none."""
    texts = [part for part in record.parts if isinstance(part, str) and part.strip()]
    return texts, [part for part in record.parts if encode.is_picture(part)]
