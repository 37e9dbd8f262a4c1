"""Token shards: the ids of documents as uint16, memory mapped.

A shard is three .npy files: `{split}-00000-of-00004.ids.npy` (uint16, all documents end to end), `.lengths.npy`
(int32 per document) and `.keys.npy` (bytes per document). Ids are the document's parts joined by <break>, without
[eod]s. A shard of tasks has a fourth, `.answers.npy` (int32 rows of document, start and end: the ids that are an
answer). The ids file is renamed into place last, so a shard that has one is whole. Imports no jax.
"""

import itertools
import pathlib
import re
from collections.abc import Iterable, Iterator

import numpy as np

from cm3jax.types import UserError

NAME = re.compile(r"(?P<split>.+)-(?P<shard>\d{5})-of-(?P<shards>\d{5})\.ids\.npy")
FILE = re.compile(r"(?P<stem>(?P<split>.+)-\d{5}-of-\d{5})\.(ids|lengths|keys|answers)\.npy")


def stem(split: str, shard: int, shards: int) -> str:
    """Return the common part of a shard's three file names."""
    return f"{split}-{shard:05d}-of-{shards:05d}"


def write(folder, split: str, documents: Iterable[tuple], shard: int = 0, shards: int = 1) -> int:
    """Write one shard, and return its number of documents.

    Args:
      documents: (key, uint16 ids [n]), or (key, ids, answers): int [k, 2] of (start, end) in the ids, in order.
    """
    keys, ids, marks = [], [], []
    for key, document, *answers in documents:
        marks += [(len(keys), start, end) for found in answers for start, end in np.asarray(found).tolist()]
        keys.append(key.encode())
        ids.append(np.asarray(document, np.uint16))
    base = pathlib.Path(folder) / stem(split, shard, shards)
    base.parent.mkdir(parents=True, exist_ok=True)
    save(base, "keys", np.array(keys, np.bytes_))
    save(base, "lengths", np.array([len(x) for x in ids], np.int32))
    if marks:
        save(base, "answers", np.array(marks, np.int32))
    else:
        base.with_name(f"{base.name}.answers.npy").unlink(missing_ok=True)
    save(base, "ids", np.concatenate([*ids, np.zeros(0, np.uint16)]))
    return len(keys)


def save(base: pathlib.Path, kind: str, array: np.ndarray) -> None:
    """Write `base`.`kind`.npy whole or not at all."""
    partial = base.with_name(f"{base.name}.{kind}.partial.npy")
    np.save(partial, array)
    partial.replace(base.with_name(f"{base.name}.{kind}.npy"))


def written(folder, split: str, shards: int) -> list[int]:
    """Return the shards of `split`, out of `shards`, that are already whole, so that writing can continue."""
    folder = pathlib.Path(folder)
    return [i for i in range(shards) if (folder / f"{stem(split, i, shards)}.ids.npy").is_file()]


def splits(folder) -> list[str]:
    """Return the names of the splits in `folder`."""
    found = (NAME.fullmatch(p.name) for p in pathlib.Path(folder).glob("*.ids.npy"))
    return sorted({m["split"] for m in found if m})


def shard_count(folder: pathlib.Path, name: re.Pattern, split: str, what: str, absent: str, partial: str) -> int:
    """Return how many shards a split has.

    Args:
      name: Of a shard's file, with the groups split and shards.
      what, absent, partial: What lies in the folder, and what to do where there is none of the split, or not all.

    Raises:
      UserError: if the split is not there, or lacks shards.
    """
    matches = [m for p in folder.glob("*.npy") if (m := name.fullmatch(p.name))]
    counts = [int(m["shards"]) for m in matches if m["split"] == split]
    if not counts:
        known = ", ".join(sorted({m["split"] for m in matches})) or "none"
        raise UserError(f"{what} {str(folder)!r}: no split {split!r} (found: {known}); {absent}")
    if len(set(counts)) > 1 or len(counts) != max(counts):
        found = f"{len(counts)} files of {sorted(set(counts))} shards"
        raise UserError(f"{what} {str(folder)!r}: split {split!r} has {found}; {partial}")
    return max(counts)


class Tokens:
    """The documents of one split; `tokens[i]` is uint16 [n].

    Attributes:
      lengths: int32 [documents].
      marks: int64 [k, 3] of (document, start, end), in order: the ids that are a task's answer (`document.marked`).
      mix: Of several sets, their `mixing.Mix`; of one, None.
    """

    mix = None

    def __init__(self, folder, split: str):
        self.folder, self.split = pathlib.Path(folder), split
        shards = shard_count(self.folder, NAME, split, "tokens", "encode it first", "encode it again")
        bases = [self.folder / stem(split, i, shards) for i in range(shards)]
        self._ids = [np.asarray(load(base, "ids", mmap=True)) for base in bases]  # a plain view slices twice as fast
        lengths = [load(base, "lengths") for base in bases]
        for base, ids, n in zip(bases, self._ids, lengths, strict=True):
            if ids.dtype != np.uint16 or n.sum(dtype=np.int64) != len(ids):
                raise UserError(f"token shard {str(base)!r}: lengths and ids disagree; delete it and encode again")
        self.lengths = np.concatenate(lengths)
        self._first = np.cumsum([0] + [len(n) for n in lengths])
        self._start = np.concatenate([np.cumsum(n, dtype=np.int64) - n for n in lengths])
        self._bases = bases
        self.marks = chained([answers(base) for base in bases], self._first)

    def __reduce__(self):  # a worker process maps the files again instead of getting a copy of them
        return Tokens, (self.folder, self.split)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.read(i, 0, int(np.iinfo(np.int32).max))

    def read(self, i: int, start: int, end: int) -> np.ndarray:
        """Return ids start .. end of document i, without reading the rest."""
        if not 0 <= i < len(self):
            raise IndexError(f"document {i}: the split {self.split!r} has {len(self)}")
        shard = int(np.searchsorted(self._first, i, "right")) - 1
        at, n = int(self._start[i]), int(self.lengths[i])
        return self._ids[shard][at + start : at + min(end, n)]

    def answers(self, i: int) -> np.ndarray:
        """Return where the answers of document i stand in its ids, int64 [k, 2]; none where no task made it."""
        first, end = np.searchsorted(self.marks[:, 0], [i, i + 1])
        return self.marks[first:end, 1:] + self.before(i)

    def blocks(self, size: int = 2**20) -> Iterator[np.ndarray]:
        """Yield all ids of the split, uint16, up to `size` at a time."""
        for ids in self._ids:
            yield from (ids[i : i + size] for i in range(0, len(ids), size))

    def counts(self, size: int) -> np.ndarray:
        """Return how often each id below `size` stands in the split, int64 [size]."""
        return sum((np.bincount(ids, minlength=size) for ids in self.blocks()), np.zeros(size, np.int64))

    def keys(self) -> list[str]:
        """Return the record key of every document."""
        return [k.decode() for base in self._bases for k in load(base, "keys").tolist()]

    @property
    def total(self) -> int:
        """Tokens of an epoch, retrieved documents included (with those, about)."""
        return int(self.lengths.sum(dtype=np.int64))

    def at(self, seed: int, epoch: int) -> "Tokens":
        """Return the documents as an epoch shows them: these, or longer ones with retrieved documents before."""
        return self

    def before(self, i: int) -> int:
        """Return how many of document i's ids are those of documents retrieved for it, which stand first."""
        return 0


class Chain(Tokens):
    """Several sets end to end: documents are numbered through all of them.

    Attributes:
      sets: `Tokens` each.
    """

    def __init__(self, sets: list[Tokens]):
        self.sets, self.folder, self.split = sets, sets[0].folder, sets[0].split
        self.lengths = np.concatenate([one.lengths for one in sets])
        self._first = np.cumsum([0] + [len(one) for one in sets])
        self.marks = chained([one.marks for one in sets], self._first)

    def __reduce__(self):
        return Chain, (self.sets,)

    def _find(self, i: int) -> tuple[Tokens, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"document {i}: the {len(self.sets)} sets have {len(self)}")
        k = int(np.searchsorted(self._first, i, "right")) - 1
        return self.sets[k], i - int(self._first[k])

    def read(self, i: int, start: int, end: int) -> np.ndarray:
        one, own = self._find(i)
        return one.read(own, start, end)

    def keys(self) -> list[str]:
        return list(itertools.chain.from_iterable(one.keys() for one in self.sets))

    @property
    def total(self) -> int:
        return sum(one.total for one in self.sets)

    def before(self, i: int) -> int:
        one, own = self._find(i)
        return one.before(own)


def answers(base: pathlib.Path) -> np.ndarray:
    """Return the answers of one shard, int32 [k, 3]; none if it has no file of them."""
    there = base.with_name(f"{base.name}.answers.npy").is_file()
    return load(base, "answers") if there else np.zeros((0, 3), np.int32)


def chained(marks: list[np.ndarray], first: np.ndarray) -> np.ndarray:
    """Return the `marks` of sets end to end, whose documents count on from `first`, int64 [k, 3]."""
    moved = [found + np.array([start, 0, 0]) for found, start in zip(marks, first, strict=False)]
    return np.concatenate([*moved, np.zeros((0, 3), np.int64)])


def load(base: pathlib.Path, kind: str, mmap: bool = False) -> np.ndarray:
    """Return one array of a shard; a missing or broken file is a UserError."""
    path = base.with_name(f"{base.name}.{kind}.npy")
    try:
        return np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        raise UserError(f"token shard {str(path)!r}: missing or broken; delete the shard and encode again") from None
