"""Which documents of the bank are retrieved for each document of every split, found once for all epochs.

    neighbours/  SPLIT-NNNNN-of-NNNNN.npy  int32 [documents, by_image + by_text]  index.json

Shards and order are those of prepared/ and tokens/. A row holds ids of the bank: first those found by the picture, best
first, then those found by the text, -1 where there is none. A document without a picture has none by picture, and one
without text, or without any left after the dropout, none by text.
"""

import pathlib
import re
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int32

from cm3jax import config as configs
from cm3jax.data import encode, index, pair_batches, prepare_shard, shards, tokens
from cm3jax.retrieval import bank as banks
from cm3jax.retrieval import search, strategy
from cm3jax.types import Record, UserError

FILE = re.compile(r"(?P<split>.+)-\d{5}-of-(?P<shards>\d{5})\.npy")


class Neighbours:
    """The neighbours of one split's documents: `neighbours[i]` is int32 [n], bank ids, -1 for none."""

    def __init__(self, folder, split: str):
        folder = pathlib.Path(folder)
        found = {p.name: int(m["shards"]) for p in sorted(folder.glob("*.npy")) if (m := FILE.fullmatch(p.name))}
        own = {name: n for name, n in found.items() if FILE.fullmatch(name)["split"] == split}
        if not own or set(own.values()) != {len(own)}:
            raise UserError(
                f"neighbours {str(folder)!r}: split {split!r} is not there, or lacks shards; make them with: cm3jax"
                " retrieve build RUN"
            )
        self.shards = [np.load(folder / name, mmap_mode="r" if index.count(folder / name) else None) for name in own]
        self.starts = np.cumsum([0] + [len(x) for x in self.shards])
        self._arguments = (folder, split)

    def __reduce__(self):
        return Neighbours, self._arguments

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, i: int) -> Int32[np.ndarray, " n"]:
        if not 0 <= i < len(self):
            raise IndexError(f"document {i}: the split has {len(self)}")
        shard = int(np.searchsorted(self.starts, i, "right")) - 1
        return np.asarray(self.shards[shard][i - self.starts[shard]])


# --------------------------------------------------------------------------------------------------------------- making


def missing(prepared, out) -> list[encode.Shard]:
    """Return the shards that have no neighbours yet, or not those that the index says."""
    out = pathlib.Path(out)
    wrong = set(index.faults(out)) if (out / index.FILE).is_file() else set()
    return [s for s in encode.all_shards(prepared) if not (out / name(*s)).is_file() or name(*s) in wrong]


def name(split: str, shard: int, count: int) -> str:
    return f"{tokens.stem(split, shard, count)}.npy"


def make(
    prepared,
    out,
    bank: banks.Bank,
    searcher: search.Searcher,
    encoder,
    settings: configs.Neighbours,
    left: Iterable[encode.Shard],
    write: bool = True,
    batch: int = 256,
) -> int:
    """Write the neighbours of some shards, and return of how many documents.

    Args:
      write: False for a host that only searches along with the others.
    """
    out, found, total = pathlib.Path(out), shards.files(prepared), 0
    out.mkdir(parents=True, exist_ok=True)
    for split, shard, count in left:
        path, first = found[split][shard], sum(shards.count(p) for p in found[split][:shard])
        rows, waiting = [np.zeros((0, settings.by_image + settings.by_text), np.int32)], []
        for record in encode.records([path], 0):
            waiting.append(record)
            if len(waiting) == batch:
                rows.append(find(waiting, split, first, bank, searcher, encoder, settings))
                first, waiting = first + len(waiting), []
        if waiting:
            rows.append(find(waiting, split, first, bank, searcher, encoder, settings))
        total += sum(map(len, rows))
        if write:
            partial = out / f".{name(split, shard, count)}"
            np.save(partial, np.concatenate(rows))
            partial.replace(out / name(split, shard, count))
    return total


def describe(out) -> list[str]:
    """Return a line for each split: how many documents have how many neighbours."""
    lines = []
    for split in sorted(index.read(out)):
        rows = np.concatenate([np.asarray(x) for x in Neighbours(out, split).shards])
        mean = (rows >= 0).sum(1).mean() if len(rows) else 0.0
        none = (rows < 0).all(1).mean() if len(rows) else 0.0
        lines.append(f"{split}: {mean:.2f} of {rows.shape[1]} a document, none for {none:.1%}")
    return lines


def find(
    records: Sequence[Record],
    split: str,
    first: int,
    bank: banks.Bank,
    searcher: search.Searcher,
    encoder,
    settings: configs.Neighbours,
) -> Int32[np.ndarray, "b n"]:
    """Return the neighbours of records `first`, `first` + 1, ... of a split."""
    start = bank.first(split)
    own = np.full(len(records), -1, np.int64)
    if start >= 0:
        own = np.arange(len(records), dtype=np.int64) + start + first
    whole = bank.vectors(own) if start >= 0 else encoder.documents(records)[0]
    queries = strategy.Queries(own, whole, banks.pad([banks.mark(record) for record in records]))
    taken = np.zeros((len(records), 0), np.int64)
    for by, count in ((by_image, settings.by_image), (by_text, settings.by_text)):
        if not count:
            continue
        vectors = by(records, encoder, settings)
        scores, ids = searcher.search(vectors, settings.candidates)
        ids = np.where(vectors.any(1)[:, None], ids, -1)
        taken = np.concatenate([taken, strategy.choose(bank, scores, ids, count, settings, queries, taken)[1]], 1)
    return taken.astype(np.int32)


def by_image(records: Sequence[Record], encoder, settings: configs.Neighbours) -> np.ndarray:
    """Return the vector of each document's pictures, their mean made of length 1; zeros where it has none."""
    found = [pair_batches.parts(record)[1] for record in records]
    vectors = encoder.pictures([picture for pictures in found for picture in pictures])
    out = np.zeros((len(records), vectors.shape[1]), np.float32)
    np.add.at(out, np.repeat(np.arange(len(found)), [len(pictures) for pictures in found]), vectors)
    return strategy.unit(out)


def by_text(records: Sequence[Record], encoder, settings: configs.Neighbours) -> np.ndarray:
    """Return the vector of each document's text after the dropout; zeros where nothing is left."""
    texts = ["\n".join(pair_batches.parts(record)[0]) for record in records]
    return encoder.texts(texts, settings.dropout, [seed(settings, record) for record in records])


def seed(settings: configs.Neighbours, record: Record) -> int:
    """Return the seed of a document's dropout, which depends on its key and not on its place."""
    return prepare_shard.digest(f"{settings.seed}\0{record.key}") % configs.SEEDS
