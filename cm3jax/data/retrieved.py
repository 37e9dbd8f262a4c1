"""Documents with what was retrieved for them before: one longer document (arXiv 2309.02591 §2.1, figure 9).

    [eod] t1 <break> I1 <break> t2 <break> I2 <break> tq <break> Iq [eod]

How many of a document's neighbours are shown, which and in which order is drawn from (seed, epoch, document): each
document has a place of its own in a stream of random numbers. So the plan knows all lengths, a row is still read by
random access, and nothing depends on hosts or workers. Imports no jax.
"""

import dataclasses
import hashlib
import pathlib

import numpy as np

from cm3jax import config as configs
from cm3jax.config import Packing
from cm3jax.data import neighbours, packing, tokens
from cm3jax.objectives import causal_mask
from cm3jax.types import UserError
from cm3jax.vocab import BREAK

AT_ONCE = 2**16
"""Documents whose choices exist at one time while the lengths of an epoch are added up: some 10 MB."""
EXPECTED = (0, 0)
"""Seed and epoch that stand for all of them where only the number of tokens matters."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Where retrieved documents come from.

    Attributes:
      folder: neighbours/ of a run.
      splits: The bank's, in order: its ids number their documents end to end.
    """

    folder: pathlib.Path
    splits: tuple[str, ...]


def source(recipe: configs.Recipe, run) -> Source | None:
    """Return where the retrieved documents of a run's decoder come from; None if its recipe has none."""
    return Source(pathlib.Path(run) / "neighbours", recipe.bank.splits) if recipe.retrieve else None


class Retrieving(tokens.Tokens):
    """The documents of one split and their neighbours; `at` puts them together.

    Attributes:
      own: The split's `Tokens`; `lengths` are theirs.
      bank: `Tokens` that neighbours are numbered through.
    """

    def __init__(self, own: tokens.Tokens, source: Source, settings: configs.Retrieved, packing: Packing):
        self._arguments = (own, source, settings, packing)
        self.own, self.folder, self.split, self.lengths = own, own.folder, own.split, own.lengths
        self.marks = own.marks
        self.bank = tokens.Chain([tokens.Tokens(own.folder, split) for split in source.splits])
        self.neighbours = neighbours.Neighbours(source.folder, own.split)
        if len(self.neighbours) != len(own):
            raise UserError(
                f"neighbours {str(source.folder)!r}: of {len(self.neighbours):,} documents, but the split"
                f" {own.split!r} has {len(own):,}; make them again"
            )

    def __reduce__(self):
        return Retrieving, self._arguments

    def read(self, i: int, start: int, end: int) -> np.ndarray:
        return self.own.read(i, start, end)

    def keys(self) -> list[str]:
        return self.own.keys()

    @property
    def total(self) -> int:
        return int(self.at(*EXPECTED).lengths.sum(dtype=np.int64))

    def at(self, seed: int, epoch: int) -> "Shown":
        return Shown(*self._arguments, self.bank, self.neighbours, seed, epoch)

    def fingerprint(self) -> list[str]:
        """Return what identifies the neighbours and the lengths of the bank's documents."""
        hashes = hashlib.sha256(), hashlib.sha256(self.bank.lengths.astype("<i4").tobytes())
        for start in range(0, len(self.neighbours), AT_ONCE):
            hashes[0].update(self.neighbours.read(start, start + AT_ONCE).astype("<i4").tobytes())
        return [one.hexdigest() for one in hashes]


class Shown(tokens.Tokens):
    """The documents of one epoch, retrieved ones before each.

    A document that with all of them is longer than a row of whole documents gives up retrieved ones, the last drawn
    first.

    Attributes:
      lengths: With the retrieved documents, int32 [documents].
      retrieved, given_up: Retrieved documents that are shown in the epoch, and that found no room.
    """

    def __init__(self, own, source, settings, packing, bank, neighbours, seed: int, epoch: int):
        self._own, self._settings, self._bank, self._neighbours = own, settings, bank, neighbours
        self.folder, self.split, self._seed, self._epoch = own.folder, own.split, seed, epoch
        self.marks = own.marks
        self._room = room(packing)
        self.lengths, self.retrieved, self.given_up = own.lengths.copy(), 0, 0
        for start in range(0, len(own), AT_ONCE):
            drawn, kept, sizes = self._choose(start, start + AT_ONCE)
            self.lengths[start : start + AT_ONCE] += (sizes * kept).sum(1).astype(np.int32)
            self.retrieved += int(kept.sum())
            self.given_up += int((drawn >= 0).sum() - kept.sum())

    def _choose(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return of documents start .. end, each [n, most]: bank ids (-1: none), which have room, their tokens."""
        found = self._neighbours.read(start, end)
        drawn = choose(found, self._settings, numbers(self._seed, self._epoch, start, len(found), found.shape[1] + 1))
        if drawn.max(initial=-1) >= len(self._bank):
            raise UserError(
                f"neighbours {str(self._neighbours.folder)!r}: name document {drawn.max()} of a bank of"
                f" {len(self._bank):,}; make them again"
            )
        sizes = np.where(drawn >= 0, self._bank.lengths[drawn].astype(np.int64) + 1, 0)  # and a <break> behind each
        left = self._room - self._own.lengths[start:end].astype(np.int64)
        return drawn, (drawn >= 0) & (np.cumsum(sizes, 1) <= left[:, None]), sizes

    def documents(self, i: int) -> list[int]:
        """Return the bank ids that are shown before document i, in order."""
        drawn, kept, _ = self._choose(i, i + 1)
        return drawn[kept].tolist()

    def before(self, i: int) -> int:
        return int(self.lengths[i] - self._own.lengths[i])

    def read(self, i: int, start: int, end: int) -> np.ndarray:
        pieces = [piece for k in self.documents(i) for piece in (self._bank[k], np.array([BREAK], np.uint16))]
        return np.concatenate([*pieces, self._own[i]])[start:end]

    def keys(self) -> list[str]:
        return self._own.keys()


def room(settings: Packing) -> int:
    """Return the tokens of a document at most, [eod]s left out; chop cuts documents and needs no limit."""
    if settings.kind == "chop":
        return 2**62
    return settings.length - causal_mask.MARKERS * settings.most_spans - packing.frame(settings)


def numbers(seed: int, epoch: int, start: int, count: int, width: int) -> np.ndarray:
    """Return the random numbers of documents start .. start + count, uniform [count, width]."""
    blocks = -(-width // 4)  # Philox gives four at one count
    counter = start * blocks
    return packing.stream(seed, "retrieved", epoch, start=counter).random((count, 4 * blocks))[:, :width]


def choose(found: np.ndarray, settings: configs.Retrieved, u: np.ndarray) -> np.ndarray:
    """Return which neighbours are shown, in order, int32 [n, most], -1 behind the last.

    Their number is uniform from `least` to `most`, or all where there are fewer; their order is random too.

    Args:
      found: [n, pool], -1 for none.
      u: Uniform random numbers [n, pool + 1].
    """
    n, pool = found.shape
    order = np.argsort(np.where(found >= 0, u[:, :pool], 2.0), axis=1)
    count = settings.least + (u[:, pool] * (settings.most - settings.least + 1)).astype(int)
    shown = np.full((n, settings.most), -1, np.int32)
    width = min(settings.most, pool)
    shown[:, :width] = np.take_along_axis(found, order, 1)[:, :width]  # those that are missing come last
    return np.where(np.arange(settings.most) < count[:, None], shown, np.int32(-1))
