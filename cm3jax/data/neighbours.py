"""Neighbours on disk: for each document of a split the documents that can be retrieved for it, memory mapped.

A shard is one file, `{split}-00000-of-00004.npy`, int32 [documents, pool], with the same shards and order as tokens/
and prepared/. A row holds ids of the memory bank, the ones found by the picture first, then those found by the text; -1
for none. An id is a position in the splits of the bank end to end. Imports no jax.
"""

import pathlib
import re

import numpy as np

from cm3jax.data import tokens
from cm3jax.types import UserError

NAME = re.compile(r"(?P<split>.+)-(?P<shard>\d{5})-of-(?P<shards>\d{5})\.npy")
NONE = -1


def path(folder, split: str, shard: int, shards: int) -> pathlib.Path:
    """Return the file of one shard."""
    return pathlib.Path(folder) / f"{tokens.stem(split, shard, shards)}.npy"


def write(folder, split: str, found: np.ndarray, shard: int = 0, shards: int = 1) -> None:
    """Write one shard, int32 [documents, pool], whole or not at all."""
    if found.dtype != np.int32 or found.ndim != 2:
        raise ValueError(f"neighbours of shape {found.shape}, {found.dtype}: must be int32 [documents, pool]")
    target = path(folder, split, shard, shards)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    with open(partial, "wb") as file:  # np.save would add .npy to the name
        np.save(file, found)
    partial.replace(target)


def written(folder, split: str, shards: int) -> list[int]:
    """Return the shards of `split`, out of `shards`, that are already whole, so that writing can continue."""
    return [i for i in range(shards) if path(folder, split, i, shards).is_file()]


def splits(folder) -> list[str]:
    """Return the names of the splits in `folder`."""
    found = (NAME.fullmatch(p.name) for p in pathlib.Path(folder).glob("*.npy"))
    return sorted({m["split"] for m in found if m})


class Neighbours:
    """The neighbours of one split; `neighbours[i]` is int32 [pool], -1 for none.

    Attributes:
      pool: Documents that can be retrieved for one, at most.
    """

    def __init__(self, folder, split: str):
        self.folder, self.split = pathlib.Path(folder), split
        how = "make them again"
        shards = tokens.shard_count(self.folder, NAME, split, "neighbours", how, how)
        self._shards = [load(path(self.folder, split, i, shards)) for i in range(shards)]
        pools = {shard.shape[1] for shard in self._shards}
        if len(pools) > 1:
            raise UserError(
                f"neighbours {str(self.folder)!r}: split {split!r} has shards of {sorted(pools)} neighbours a document;"
                " make them again"
            )
        self.pool = pools.pop()
        self._first = np.cumsum([0] + [len(shard) for shard in self._shards])

    def __reduce__(self):  # a worker process maps the files again instead of getting a copy of them
        return Neighbours, (self.folder, self.split)

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, i: int) -> np.ndarray:
        if not 0 <= i < len(self):
            raise IndexError(f"document {i}: the split {self.split!r} has neighbours of {len(self)}")
        return self.read(i, i + 1)[0]

    def read(self, start: int, end: int) -> np.ndarray:
        """Return the neighbours of documents start .. end, int32 [end - start, pool]."""
        pieces = [
            shard[max(0, start - first) : max(0, end - first)]
            for shard, first in zip(self._shards, self._first[:-1].tolist(), strict=True)
            if start < first + len(shard) and first < end
        ]
        return np.concatenate([*pieces, np.zeros((0, self.pool), np.int32)])


def load(file: pathlib.Path) -> np.ndarray:
    """Return one shard; a missing or broken file is a UserError."""
    try:
        found = np.asarray(np.load(file, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError, EOFError):
        raise UserError(f"neighbours {str(file)!r}: missing or broken; delete it and make them again") from None
    if found.dtype != np.int32 or found.ndim != 2:
        raise UserError(f"neighbours {str(file)!r}: {found.dtype} of shape {found.shape}; must be int32, two axes")
    return found
