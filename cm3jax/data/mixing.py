"""Several token sets as one, mixed by weight (arXiv 2309.02591 §3, §4.2 trains on such mixtures). Imports no jax.

An epoch of a mixture has about as many tokens as its sets together, and of each set the share that its weight says. A
set is a circle of documents: shuffled once through, then shuffled anew. Each epoch takes the next stretch of every
circle, the same number of documents each time, and shuffles them all. So documents of one set are used equally often
(but for one), none comes again before all others of its set, and the documents of epoch e follow from (seed, e,
lengths, weights) alone.
"""

import dataclasses

import numpy as np

from cm3jax.config import Mixture
from cm3jax.data import packing
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


def mix(lengths: list[np.ndarray], weights: tuple[float, ...]) -> Mix:
    """Return the mixture of sets with documents of these lengths, by shares of the tokens."""
    totals = np.array([n.sum(dtype=np.int64) for n in lengths], np.float64)
    shares = np.array(weights) / sum(weights)
    passes = totals.sum() * shares / totals
    drawn = [max(1, round(p * len(n))) for p, n in zip(passes, lengths, strict=True)]
    return Mix(tuple(len(n) for n in lengths), tuple(drawn))


class Mixed(Tokens):
    """Several sets as one: documents are numbered through all of them.

    Attributes:
      sets: `Tokens` each.
    """

    def __init__(self, sets: list[Tokens], weights: tuple[float, ...]):
        for one in sets:
            if not one.lengths.any():
                raise UserError(f"token set {str(one.folder)!r}: holds no token; leave it out of the mixture")
        self.sets, self.weights, self.split = sets, weights, sets[0].split
        self.lengths = np.concatenate([one.lengths for one in sets])
        self.mix = mix([one.lengths for one in sets], weights)
        self._first = np.cumsum([0] + [len(one) for one in sets])

    def __reduce__(self):
        return Mixed, (self.sets, self.weights)

    def read(self, i: int, start: int, end: int) -> np.ndarray:
        if not 0 <= i < len(self):
            raise IndexError(f"document {i}: the mixture has {len(self)}")
        k = int(np.searchsorted(self._first, i, "right")) - 1
        return self.sets[k].read(i - int(self._first[k]), start, end)

    def keys(self) -> list[str]:
        return [key for keys in map(Tokens.keys, self.sets) for key in keys]

    def describe(self) -> list[str]:
        """Return a line for each set: what it holds, its share of the tokens, how often an epoch passes over it."""
        totals = [int(one.lengths.sum(dtype=np.int64)) for one in self.sets]
        passes = [m / n for m, n in zip(self.mix.drawn, self.mix.documents, strict=True)]
        used = [total * p for total, p in zip(totals, passes, strict=True)]
        return [
            f"{one.folder}: {u / sum(used):.1%} of the tokens; {len(one):,} documents of {total:,} tokens, passed over"
            f" {p:.3g} times an epoch"
            for one, total, p, u in zip(self.sets, totals, passes, used, strict=True)
        ]


def open(folder, split: str, mixture: Mixture) -> Tokens:
    """Return the token set of a folder, mixed with those that a mixture names if it names some."""
    own = Tokens(folder, split)
    return Mixed([own, *(Tokens(other, split) for other in mixture.sets)], mixture.weights) if mixture.sets else own
