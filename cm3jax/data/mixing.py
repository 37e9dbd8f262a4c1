"""Several token sets as one, mixed by weight (arXiv 2309.02591 §3, §4.2 trains on such mixtures). Imports no jax.

An epoch of a mixture has about as many tokens as its sets together, and of each set the share that its weight says. A
set is a circle of documents: shuffled once through, then shuffled anew. Each epoch takes the next stretch of every
circle, the same number of documents each time, and shuffles them all. So documents of one set are used equally often
(but for one), none comes again before all others of its set, and the documents of epoch e follow from (seed, e,
lengths, weights, limits) alone.

Instruction tuning samples sets up and down within limits (arXiv 2309.02591 table 4: 3 and 0.3): `Mixture.most` and
`.least` bound how often an epoch passes over a set. What sets at a limit take or leave, the others share by weight.
"""

import dataclasses

import numpy as np

from cm3jax.config import DecoderStage, Mixture
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


def mix(documents: list[int], totals: list[int], mixture: Mixture) -> Mix:
    """Return the mixture of sets with so many documents and tokens, by shares of the tokens."""
    drawn = [max(1, round(p * n)) for p, n in zip(passes(totals, mixture), documents, strict=True)]
    return Mix(tuple(documents), tuple(drawn))


def passes(totals: list[int], mixture: Mixture) -> np.ndarray:
    """Return how often an epoch passes over each set of so many tokens, float64 [sets].

    Sets within the limits have tokens in proportion to their weights, and all together as many as there are.
    """
    sizes, shares = np.array(totals, np.float64), asked(mixture)
    wanted = sum(totals) * shares / sizes
    if not mixture.least and not mixture.most:
        return wanted
    least, most = mixture.least, mixture.most or np.inf
    within = lambda factor: np.clip(factor * wanted, least, most)  # noqa: E731
    turns = np.concatenate([[0, 1], least / wanted, most / wanted])  # between two of them the sum below is a line
    turns = np.sort(turns[np.isfinite(turns)])
    return within(np.interp(sizes.sum(), [within(factor) @ sizes for factor in turns], turns))


def asked(mixture: Mixture) -> np.ndarray:
    """Return the share of the tokens that each set has by its weight, float64 [sets]."""
    weights = np.array(mixture.weights or (1.0,) * (len(mixture.sets) + 1))
    return weights / weights.sum()


class Mixed(tokens.Chain):
    """Several sets as one: documents are numbered through all of them."""

    def __init__(self, sets: list[Tokens], mixture: Mixture):
        super().__init__(sets)
        for one in sets:
            if not one.lengths.any():
                raise UserError(f"token set {str(one.folder)!r}: holds no token; leave it out of the mixture")
        self.mixture, self.mix = mixture, mix([len(one) for one in sets], [one.total for one in sets], mixture)

    def __reduce__(self):
        return Mixed, (self.sets, self.mixture)

    def at(self, seed: int, epoch: int) -> Tokens:
        shown = [one.at(seed, epoch) for one in self.sets]
        return self if shown == self.sets else tokens.Chain(shown)

    def describe(self, epochs: float) -> list[str]:
        """Return a table, a line for each set: documents, tokens, share of the tokens, asked and had, and passes.

        Args:
          epochs: Of the whole training, which the last column is of.
        """
        counts = list(zip(self.mix.drawn, self.mix.documents, strict=True))
        totals, limits = [one.total for one in self.sets], passes([one.total for one in self.sets], self.mixture)
        used = [total * m / n for total, (m, n) in zip(totals, counts, strict=True)]
        rows = [("set", "documents", "tokens", "asked", "share", "passes an epoch", "in all", "")]
        for one, total, u, share, (m, n), limit in zip(
            self.sets, totals, used, asked(self.mixture), counts, limits, strict=True
        ):
            bound = {self.mixture.least: "the least", self.mixture.most: "the most"}.get(limit, "")
            figures = f"{n:,}", f"{total:,}", f"{share:.1%}", f"{u / sum(used):.1%}"
            rows.append((str(one.folder), *figures, f"{m / n:.3g}", f"{epochs * m / n:.3g}", bound))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return ["  ".join(_padded(row, widths)).rstrip() for row in rows]


def _padded(row: tuple[str, ...], widths: list[int]) -> list[str]:
    """Return the cells of a table's row: the first and the last to the left, figures to the right."""
    first, *figures, last = zip(row, widths, strict=True)
    return [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in figures), last[0]]


def open(folder, split: str, stage: DecoderStage, source: retrieved.Source | None = None) -> Tokens:
    """Return the token set that a stage trains on: that of a folder, mixed with those that its mixture names.

    Args:
      source: Of documents that are retrieved for those of the folder, not of the other sets, whose bank is another.
    """
    own = Tokens(folder, split)
    if source and stage.retrieved.most:
        own = retrieved.Retrieving(own, source, stage.retrieved, stage.packing)
    others = [Tokens(other, split) for other in stage.mixture.sets]
    return Mixed([own, *others], stage.mixture) if others else own
