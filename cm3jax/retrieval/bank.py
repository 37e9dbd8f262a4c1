"""The memory bank on disk: a vector for each document that can be retrieved, and what must be known of it.

    bank/  index.json  held_out.npy  SPLIT-NNNNN-of-NNNNN.{vectors,facts,marks,names}.npy  [ivf_pq.faiss | hnsw.faiss]

A document's id is its place in the splits of the bank, one behind the other, each in the order of its records. A shard
holds at most `bank.shard` documents of one split, so that a further split adds files and changes none. A split that is
finished keeps its shards, whatever `bank.shard` is now:

- `vectors` fp16 [n, size], as the encoder gives them (arXiv 2309.02591 §2.1): memory-mapped, never read whole;
- `facts` [n]: whether there is text and a picture, and where a document's marks and names end in the two below;
- `marks` uint64: what a copy is known by, the hash of each picture's pixels, of a document without pictures its text's;
- `names` uint8: key, source and licence of each document, in UTF-8, end to end.

`held_out.npy` has the marks of the documents of `bank.held_out`, or of all splits that are not the bank's, sorted.
The vectors file is renamed into place last, so a shard that has one is whole; index.json is written when all are there.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
import pathlib
import resource
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float16, Int, UInt8, UInt64

from cm3jax import config as configs
from cm3jax import stages
from cm3jax.data import index, pair_batches, prepare_shard, shards, tokens
from cm3jax.types import Record, UserError

TEXT, IMAGE = 1, 2
"""Flags of a document: it holds text, it holds a picture."""
FACTS = np.dtype([("flags", "u1"), ("marks", "<i8"), ("key", "<i8"), ("source", "<i8"), ("license", "<i8")])
KINDS = ("facts", "marks", "names", "vectors")
HELD_OUT = "held_out.npy"
SPARE = 512
"""Files that a process may have open beside those of a bank."""
FIX = "make the bank again with: cm3jax retrieve build RUN --redo bank"


class Shard(NamedTuple):
    """A file of the bank: documents first .. stop - 1 of a split, number `number` of `count` shards."""

    split: str
    number: int
    count: int
    first: int
    stop: int

    @property
    def stem(self) -> str:
        return tokens.stem(self.split, self.number, self.count)


def plan(prepared, out, settings: configs.Bank) -> list[Shard]:
    """Return the shards of the bank in order, those of a split that the index in `out` knows as they are there.

    Raises:
      UserError: if a split is not there, or nothing is in any.
    """
    found, wanted = shards.files(prepared), []
    known = _about(pathlib.Path(out))["shards"] if (pathlib.Path(out) / index.FILE).is_file() else []
    for split in settings.splits:
        if split not in found:
            there = ", ".join(sorted(found)) or "none"
            raise UserError(f"bank.splits: no split {split!r} in {str(prepared)!r}; found: {there}")
        size = sum(shards.count(path) for path in found[split])
        made = [shard for shard in known if shard.split == split]
        if made and made[-1].stop == size:
            wanted += made
            continue
        count, most = -(-size // settings.shard), settings.shard
        wanted += [Shard(split, i, count, i * most, min(size, (i + 1) * most)) for i in range(count)]
    if not wanted:
        raise UserError(f"bank.splits = {settings.splits}: no document in them, so nothing could be retrieved")
    return wanted


# --------------------------------------------------------------------------------------------------------------- making


def missing(prepared, out, settings: configs.Bank) -> list[Shard]:
    """Return the shards that are not there, or not as the index says."""
    out, wanted = pathlib.Path(out), plan(prepared, out, settings)
    stems = {shard.stem for shard in wanted}
    wrong = set()
    if (out / index.FILE).is_file():
        files = {n: v for n, v in _about(out)["files"].items() if n.split(".")[0] in stems}
        wrong = {name.split(".")[0] for name in files if _fault(out / name, files[name])}
    whole = {path.name.split(".")[0] for path in out.glob("*.vectors.npy") if path.name.count(".") == 2} - wrong
    return [shard for shard in wanted if shard.stem not in whole]


def write(out, shard: Shard, batches: Iterable[tuple[Sequence[Record], Any, Any, Any]]) -> None:
    """Write one shard.

    Args:
      batches: What `encoder.embed` yields: records, vectors [b, size], which hold text [b], which a picture [b].

    Raises:
      UserError: if a vector is not finite, or there are not as many records as the shard holds.
    """
    out, size = pathlib.Path(out), shard.stop - shard.first
    out.mkdir(parents=True, exist_ok=True)
    base, facts, at = out / shard.stem, np.zeros(size, FACTS), 0
    marks, written, vectors = [np.zeros(0, np.uint64)], bytearray(), None
    partial = out / f"{shard.stem}.vectors.partial.npy"
    for records, found, text, image in batches:
        if vectors is None:
            vectors = np.lib.format.open_memmap(partial, "w+", np.float16, (size, found.shape[1]))
        if not np.isfinite(found).all() or at + len(records) > size:
            raise UserError(
                f"bank shard {shard.stem}: vectors that are no numbers, or too many; train the retriever again"
            )
        vectors[at : at + len(records)] = found
        facts["flags"][at : at + len(records)] = np.where(text, TEXT, 0) | np.where(image, IMAGE, 0)
        for record in records:
            own = mark(record)
            marks.append(own)
            ends = [(written.extend(x.encode()), len(written))[1] for x in (record.key, record.source, record.license)]
            facts["marks"][at] = len(own) + (facts["marks"][at - 1] if at else 0)
            facts["key"][at], facts["source"][at], facts["license"][at] = ends
            at += 1
    if vectors is None or at < size:
        raise UserError(f"bank shard {shard.stem}: {at} of {size} documents; the records changed meanwhile")
    vectors.flush()
    tokens.save(base, "facts", facts)
    tokens.save(base, "marks", np.concatenate(marks))
    tokens.save(base, "names", np.frombuffer(bytes(written), np.uint8))
    partial.replace(base.with_name(f"{base.name}.vectors.npy"))


def mark(record: Record) -> UInt64[np.ndarray, " n"]:
    """Return what copies of a document share with it: hashes of its pictures' pixels, or of its text if it has none.

    A caption alone makes no copy: many pictures have the same.
    """
    texts, pictures = pair_batches.parts(record)
    return np.array([prepare_shard.digest(part) for part in pictures or ["\n".join(texts)] * bool(texts)], np.uint64)


def finish(prepared, out, settings: configs.Bank, identity: str) -> bool:
    """Write held_out.npy and the index if all shards are there; return whether they are."""
    if missing(prepared, out, settings):
        return False
    seal(out, plan(prepared, out, settings), held_out(prepared, settings), identity)
    return True


def seal(out, wanted: Sequence[Shard], forbidden: UInt64[np.ndarray, " n"], identity: str) -> None:
    """Write the index of a bank all of whose shards are there.

    Args:
      forbidden: Marks of what must never be retrieved, sorted.
      identity: Of the encoder that made the vectors.
    """
    out, stems, documents = pathlib.Path(out), {shard.stem for shard in wanted}, collections.Counter()
    np.save(out / f".{HELD_OUT}", forbidden)
    (out / f".{HELD_OUT}").replace(out / HELD_OUT)
    for path in out.glob("*.npy"):
        if index.split(path.name) and path.name.split(".")[0] not in stems:
            path.unlink()  # of another cut, which no index speaks of
    for shard in wanted:
        documents[shard.split] += shard.stop - shard.first
    about = {
        "encoder": identity,
        "size": np.load(out / f"{wanted[0].stem}.vectors.npy", mmap_mode="r").shape[1],
        "documents": dict(documents),
        "shards": [list(shard) for shard in wanted],
        "files": {name: _measure(out / name) for name in [HELD_OUT, *names(wanted)]},
    }
    stages.write_text(out / index.FILE, json.dumps(about, indent=0) + "\n")


def names(wanted: Sequence[Shard]) -> list[str]:
    return [f"{shard.stem}.{kind}.npy" for shard in wanted for kind in KINDS]


def held_out(prepared, settings: configs.Bank) -> UInt64[np.ndarray, " n"]:
    """Return the marks of all documents that must not be retrieved, sorted: what copies of them are known by."""
    found = [np.zeros(0, np.uint64)]
    for split in held_out_splits(prepared, settings):
        found += [mark(record) for record in shards.Reader(prepared, split)]
    return np.unique(np.concatenate(found))


def held_out_splits(prepared, settings: configs.Bank) -> list[str]:
    """Return the splits no copies of whose documents are retrieved.

    Raises:
      UserError: if a split of `bank.held_out` is not there.
    """
    there = shards.splits(prepared)
    if missing := [split for split in settings.held_out if split not in there]:
        raise UserError(f"bank.held_out: there is no split {missing[0]!r} in {prepared}, only {', '.join(there)}")
    return list(settings.held_out) or [split for split in there if split not in settings.splits]


def _measure(path: pathlib.Path) -> list:
    """Return [bytes, entries, checksum] of a file."""
    return [*index.measure(path), _checksum(path)]


def _checksum(path: pathlib.Path) -> str:
    """Return 16 hex digits of up to 16 blocks of 64 KiB spread over the file: a bank may be too large to read whole."""
    return stages.fingerprint(path.parent, [path.name])


def _fault(path: pathlib.Path, numbers: list) -> str:
    """Return what is wrong with one file, "" if nothing is."""
    size, entries, checksum = numbers
    return index.fault(path, size, entries) or ("" if _checksum(path) == checksum else "other bytes than were written")


def _about(folder: pathlib.Path) -> dict[str, Any]:
    path = folder / index.FILE
    try:
        about = json.loads(path.read_text())
        about["shards"] = [Shard(*shard) for shard in about["shards"]]
        if not all(about[key] for key in ("encoder", "size", "documents", "files", "shards")):
            raise ValueError("an entry is empty")
        return about
    except FileNotFoundError:
        raise UserError(f"bank {str(folder)!r}: not there, or not finished ({index.FILE} is missing); {FIX}") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
        raise UserError(f"{str(path)!r}: not readable ({e}); {FIX}") from None


# -------------------------------------------------------------------------------------------------------------- reading


class Place(NamedTuple):
    """Where a document lies, and where it comes from."""

    split: str
    index: int
    key: str
    source: str
    license: str


@dataclasses.dataclass(frozen=True, eq=False)
class Bank:
    """An opened bank; nothing of it is in memory until it is asked for.

    Attributes:
      folder: Where it lies.
      identity: Of the encoder that made it.
      size: Width of the vectors.
      documents: {split: how many}, in the order of the ids.
      held_out: Sorted marks of what must never be retrieved.
    """

    folder: pathlib.Path
    identity: str
    size: int
    documents: dict[str, int]
    shards: tuple[Shard, ...]
    held_out: np.ndarray
    arrays: dict[str, tuple[np.ndarray, ...]]
    starts: np.ndarray

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.documents)

    def first(self, split: str) -> int:
        """Return the id of a split's first document; -1 if the split is not in the bank."""
        if split not in self.documents:
            return -1
        at = self.splits.index(split)
        return sum(self.documents[name] for name in self.splits[:at])

    def blocks(self, rows: int) -> Iterator[tuple[int, Float16[np.ndarray, "n z"]]]:
        """Yield (id of the first, vectors) of at most `rows` documents, in order."""
        for start, vectors in zip(self.starts, self.arrays["vectors"], strict=False):
            for at in range(0, len(vectors), rows):
                yield int(start) + at, vectors[at : at + rows]

    def vectors(self, ids: Int[np.ndarray, "..."]) -> Float[np.ndarray, "... z"]:
        """Return vectors as float32; of id -1, zeros."""
        return self._take("vectors", ids).astype(np.float32)

    def flags(self, ids: Int[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
        """Return which documents hold text and pictures; of id -1, 0."""
        return self._take("facts", ids)["flags"]

    def marks(self, ids: Int[np.ndarray, "..."]) -> tuple[UInt64[np.ndarray, "... m"], np.ndarray]:
        """Return the marks of documents, and which of the entries are marks and not padding."""
        flat = ids.reshape(-1)
        owner = np.searchsorted(self.starts, flat, "right") - 1  # -1 for id -1
        begin, end = np.zeros(flat.shape, np.int64), np.zeros(flat.shape, np.int64)
        for shard in np.unique(owner[owner >= 0]):
            own, ends = owner == shard, self.arrays["facts"][shard]["marks"]
            at = flat[own] - self.starts[shard]
            begin[own], end[own] = np.where(at > 0, ends[at - 1], 0), ends[at]
        real = np.arange((end - begin).max(initial=0))[None] < (end - begin)[:, None]
        out = np.zeros(real.shape, np.uint64)
        for shard in np.unique(owner[owner >= 0]):
            own = (owner == shard)[:, None] & real
            out[own] = self.arrays["marks"][shard][(begin[:, None] + np.arange(real.shape[1])[None])[own]]
        return out.reshape(*ids.shape, -1), real.reshape(*ids.shape, -1)

    def place(self, i: int) -> Place:
        """Return where document i lies and comes from."""
        shard, at = self._locate(i)
        facts, names = self.arrays["facts"][shard], self.arrays["names"][shard]
        ends = [int(facts["license"][at - 1]) if at else 0, *(int(facts[k][at]) for k in ("key", "source", "license"))]
        texts = [bytes(names[a:b]).decode() for a, b in itertools.pairwise(ends)]
        return Place(self.shards[shard].split, self.shards[shard].first + at, *texts)

    def _locate(self, i: int) -> tuple[int, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"document {i}: the bank has {len(self)}")
        shard = int(np.searchsorted(self.starts, i, "right")) - 1
        return shard, i - int(self.starts[shard])

    def _take(self, kind: str, ids: np.ndarray) -> np.ndarray:
        first = self.arrays[kind][0]
        out = np.zeros((*ids.shape, *first.shape[1:]), first.dtype)
        owner = np.searchsorted(self.starts, ids, "right") - 1  # -1 for id -1
        for shard in np.unique(owner[owner >= 0]):
            own = owner == shard
            out[own] = self.arrays[kind][shard][ids[own] - self.starts[shard]]
        return out


def pad(rows: Sequence[np.ndarray]) -> tuple[UInt64[np.ndarray, "n m"], np.ndarray]:
    """Return rows of unequal length as one array, and which entries are real."""
    lengths = np.array([len(row) for row in rows], np.int64)
    real = np.arange(max(lengths, default=0))[None] < lengths[:, None]
    out = np.zeros(real.shape, np.uint64)
    out[real] = np.concatenate([np.zeros(0, np.uint64), *rows])
    return out, real


def open(folder, identity: str = "") -> Bank:
    """Return the bank in a folder, whose files are as its index says.

    Args:
      identity: Of the encoder that will ask; "": any.

    Raises:
      UserError: if a file is missing, cut or damaged, or the bank was made with another encoder.
    """
    folder = pathlib.Path(folder)
    about = _about(folder)
    if identity and about["encoder"] != identity:
        raise UserError(
            f"bank {str(folder)!r}: made with encoder {about['encoder']}, and the retriever here is {identity}: their"
            f" vectors cannot be compared; {FIX}"
        )
    wrong = {name: fault for name, numbers in about["files"].items() if (fault := _fault(folder / name, numbers))}
    if wrong:
        named = ", ".join(f"{name} ({text})" for name, text in [*wrong.items()][: index.NAMED])
        more = f" and {len(wrong) - index.NAMED} more" if len(wrong) > index.NAMED else ""
        raise UserError(
            f"bank {str(folder)!r}: {len(wrong)} of {len(about['files'])} files are wrong: {named}{more}; {FIX}"
        )
    allow_open(len(about["files"]) + SPARE)
    load = lambda name: np.load(folder / name, mmap_mode="r" if about["files"][name][1] else None)  # noqa: E731
    arrays = {kind: tuple(load(f"{shard.stem}.{kind}.npy") for shard in about["shards"]) for kind in KINDS}
    starts = np.cumsum([0] + [shard.stop - shard.first for shard in about["shards"]])
    return Bank(
        folder,
        about["encoder"],
        about["size"],
        about["documents"],
        tuple(about["shards"]),
        np.load(folder / HELD_OUT),
        arrays,
        starts,
    )


def allow_open(files: int) -> None:
    """Let this process have so many files open, if the system permits it: numpy holds open what it maps."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = files if hard == resource.RLIM_INFINITY else min(files, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def fingerprint(bank: Bank) -> str:
    """Return 16 hex digits that identify the vectors of a bank and their order."""
    about = _about(bank.folder)
    return hashlib.sha256(json.dumps([about["encoder"], about["files"]]).encode()).hexdigest()[:16]
