"""A run's memory while drawing: ask with texts or pictures, get documents (arXiv 2309.02591 §2.1).

memory = memory.load(run)
found = memory.find(texts=["a red circle"], count=2)    # one list a query, best first
memory.ids(found[0][0])                                 # its tokens, to be put before the prompt
"""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt16

from cm3jax import config as configs
from cm3jax.data import pictures as crops
from cm3jax.data import shards, tokens
from cm3jax.retrieval import bank as banks
from cm3jax.retrieval import encoder as encoders
from cm3jax.retrieval import search, strategy
from cm3jax.types import Record, UserError


@dataclasses.dataclass(frozen=True)
class Found:
    """One document of the bank, as an answer to a query.

    Attributes:
      id: In the bank.
      score: Inner product with the query's vector.
      split, index: Where it lies in prepared/ and tokens/.
    """

    id: int
    score: float
    split: str
    index: int
    key: str
    source: str
    license: str

    @property
    def origin(self) -> dict[str, str]:
        """What is told of it wherever it is shown."""
        return {"key": f"{self.split}/{self.key}", "source": self.source, "license": self.license}


@dataclasses.dataclass(frozen=True, eq=False)
class Memory:
    """Everything that is needed to retrieve; `load` makes one."""

    run: pathlib.Path
    bank: banks.Bank
    searcher: search.Searcher
    encoder: Any
    settings: configs.Neighbours
    resolution: int
    """Side of the run's pictures, by whose pixels copies are known."""

    def find(
        self,
        texts: Sequence[str] | None = None,
        pictures: Sequence[np.ndarray] | np.ndarray | None = None,
        count: int = 2,
        seed: int = 0,
        dropout: float = 0.0,
    ) -> list[list[Found]]:
        """Return for each query at most `count` documents, best first.

        The strategy is that of the run's neighbours: limits of likeness, both modalities, no copy of a held-out
        document or of a picture that is asked with. A query with both text and picture is the mean of their
        vectors, as a document is. One without a picture whose text has no token, or none left after the dropout, finds
        nothing.

        Args:
          texts, pictures: One a query; at least one of the two.
          seed, dropout: Share of the text's tokens that are left out; row i takes seed + i.

        Raises:
          UserError: if neither is given, they are not equally many, or count is below 1.
        """
        given = [x for x in (texts, pictures) if x is not None]
        if not given or len({len(x) for x in given}) > 1:
            raise UserError(
                "retrieval: needs texts or pictures, and where both are given as many of one as of the other"
            )
        rows = len(given[0])
        vectors, queries = self._vectors(texts, pictures, seed, dropout), strategy.Queries()
        if pictures is not None:
            records = [Record("", (crops.crop(picture, self.resolution),)) for picture in pictures]
            queries = strategy.Queries(marks=banks.pad([banks.mark(record) for record in records]))
        scores, ids = self.searcher.search(vectors, max(self.settings.candidates, count))
        ids = np.where(vectors.any(1)[:, None], ids, -1)
        none = np.zeros((rows, 0), np.int64)
        scores, ids = strategy.choose(self.bank, scores, ids, count, self.settings, queries, none)
        return [
            [Found(int(i), float(score), *self.bank.place(int(i))) for score, i in zip(*row, strict=True) if i >= 0]
            for row in zip(scores, ids, strict=True)
        ]

    def _vectors(self, texts, pictures, seed: int, dropout: float) -> np.ndarray:
        seeds = None if texts is None else [(seed + i) % configs.SEEDS for i in range(len(texts))]
        found = [] if texts is None else [self.encoder.texts(texts, dropout, seeds)]
        found += [] if pictures is None else [self.encoder.pictures(pictures)]
        there = sum(x.any(1).astype(np.float32) for x in found)
        return sum(found) / np.maximum(there, 1)[:, None]

    def ids(self, found: Found) -> UInt16[np.ndarray, " n"]:
        """Return a document's tokens."""
        return self._tokens(found.split)[found.index]

    def record(self, found: Found) -> Record:
        """Return a document with its pictures."""
        return self._records(found.split)[found.index]

    @functools.cached_property
    def _opened(self) -> dict[tuple[str, str], Any]:
        return {}

    def _tokens(self, split: str) -> tokens.Tokens:
        at = ("tokens", split)
        if at not in self._opened:
            self._opened[at] = tokens.Tokens(self.run / "tokens", split)
        return self._opened[at]

    def _records(self, split: str) -> shards.Reader:
        at = ("records", split)
        if at not in self._opened:
            self._opened[at] = shards.Reader(self.run / "prepared", split)
        return self._opened[at]


def load(run, batch: int = 16) -> Memory:
    """Return the memory of a run that has a bank.

    Args:
      batch: Queries that go through the encoder at once.

    Raises:
      UserError: if it has none, or its parts do not belong together.
    """
    run = pathlib.Path(run)
    if not (run / "bank").is_dir():
        raise UserError(f"{str(run)!r}: has no memory bank; make one with: cm3jax retrieve build {run}")
    recipe = configs.load(run / "recipe.json")
    encoder = encoders.load(run / "retriever", batch)
    bank = banks.open(run / "bank", encoder.identity)
    searcher = search.open(bank, recipe.bank)
    return Memory(run, bank, searcher, encoder, recipe.neighbours, recipe.prepare.resolution)
