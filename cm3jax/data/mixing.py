"""Several token sets as one, mixed by weight (arXiv 2309.02591 §3, §4.2 trains on such mixtures). Imports no jax.

An epoch of a mixture has about as many tokens as its sets together, and of each set the share that its weight says. A
set is a circle of documents: shuffled once through, then shuffled anew. Each epoch takes the next stretch of every
circle, the same number of documents each time, and shuffles them all. So documents of one set are used equally often
(but for one), none comes again before all others of its set, and the documents of epoch e follow from (seed, e,
lengths, weights) alone.
"""

import dataclasses

import numpy as np

from cm3jax.config import DecoderStage
from cm3jax.data import packing, retrieved, tokens
from cm3jax.data.tokens import Tokens
from cm3jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Mix:
    """What decides the order of a mixture's documents.

    Attributes:
      documents: Of each set.
      drawn: Documents of each set in one epoch.
    """

    documents: tuple[int, ...]
    drawn: tuple[int, ...]

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Return the documents of an epoch in order, numbered through all sets, int64 [sum of `drawn`]."""
        first = np.cumsum([0, *self.documents])
        own = [
            stretch(seed, k, n, epoch * m, m) for k, (n, m) in enumerate(zip(self.documents, self.drawn, strict=True))
        ]
        chosen = np.concatenate([start + found for start, found in zip(first, own, strict=False)])
        return chosen[packing.stream(seed, "order", epoch).permutation(len(chosen))]


def stretch(seed: int, k: int, documents: int, start: int, count: int) -> np.ndarray:
    """Return documents start .. start + count of the circle of set k."""
    turns = range(start // documents, (start + count - 1) // documents + 1)
    circle = [packing.stream(seed, f"set {k}", turn).permutation(documents) for turn in turns]
    offset = start - turns.start * documents
    return np.concatenate([*circle, np.zeros(0, np.int64)])[offset : offset + count]


def mix(documents: list[int], totals: list[int], weights: tuple[float, ...]) -> Mix:
    """Return the mixture of sets with so many documents and tokens, by shares of the tokens."""
    shares = np.array(weights) / sum(weights)
    passes = sum(totals) * shares / np.array(totals, np.float64)
    drawn = [max(1, round(p * n)) for p, n in zip(passes, documents, strict=True)]
    return Mix(tuple(documents), tuple(drawn))


class Mixed(tokens.Chain):
    """Several sets as one: documents are numbered through all of them."""

    def __init__(self, sets: list[Tokens], weights: tuple[float, ...]):
        super().__init__(sets)
        for one in sets:
            if not one.lengths.any():
                raise UserError(f"token set {str(one.folder)!r}: holds no token; leave it out of the mixture")
        self.weights, self.mix = weights, mix([len(one) for one in sets], [one.total for one in sets], weights)

    def __reduce__(self):
        return Mixed, (self.sets, self.weights)

    def at(self, seed: int, epoch: int) -> Tokens:
        shown = [one.at(seed, epoch) for one in self.sets]
        return self if shown == self.sets else tokens.Chain(shown)

    def describe(self) -> list[str]:
        """Return a line for each set: what it holds, its share of the tokens, how often an epoch passes over it."""
        totals = [one.total for one in self.sets]
        passes = [m / n for m, n in zip(self.mix.drawn, self.mix.documents, strict=True)]
        used = [total * p for total, p in zip(totals, passes, strict=True)]
        return [
            f"{one.folder}: {u / sum(used):.1%} of the tokens; {len(one):,} documents of {total:,} tokens, passed over"
            f" {p:.3g} times an epoch"
            for one, total, p, u in zip(self.sets, totals, passes, used, strict=True)
        ]


def open(folder, split: str, stage: DecoderStage, source: retrieved.Source | None = None) -> Tokens:
    """Return the token set that a stage trains on: that of a folder, mixed with those that its mixture names.

    Args:
      source: Of documents that are retrieved for those of the folder, not of the other sets, whose bank is another.
    """
    own = Tokens(folder, split)
    if source and stage.retrieved.most:
        own = retrieved.Retrieving(own, source, stage.retrieved, stage.packing)
    others = [Tokens(other, split) for other in stage.mixture.sets]
    return Mixed([own, *others], stage.mixture.weights) if others else own
