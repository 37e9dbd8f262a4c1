"""Records on disk: array_record files of msgpack'ed records, pictures as lossless WebP.

A folder holds `{split}-NNNNN-of-NNNNN.array_record`. Any record is read by its index alone, so that hosts can read
their own rows of a step by random access.
"""

import bisect
import io
import itertools
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import msgpack
import numpy as np
from array_record.python import array_record_module
from PIL import Image

from cm3jax.types import Record, Region, UserError

NAME = re.compile(r"(?P<split>\w+)-(?P<shard>\d{5})-of-(?P<shards>\d{5})\.array_record")
WRITE = "group_size:1,uncompressed"  # a group is what one read decompresses; pictures are compressed already
READ = "readahead_buffer_size:0,max_parallelism:0"  # random access
# Exact, and against PNG at its fastest: a third of the time to write, the same to read, 12 to 33 % smaller.
LOSSLESS = {"lossless": True, "exact": True, "quality": 0, "method": 0}
MAX_OPEN = 256  # files of one reader; a process may open 1024 by default
PICTURE, CODES = 1, 2  # msgpack extension types


def name(split: str, shard: int, shards: int) -> str:
    """Return the file name of one shard."""
    return f"{split}-{shard:05d}-of-{shards:05d}.array_record"


def encode(record: Record) -> bytes:
    """Return a record as bytes.

    Raises:
      ValueError, TypeError, OverflowError: if a text holds a lone surrogate, or `fields` is not plain JSON types.
    """
    regions = [(r.part, r.kind, list(r.box), r.label) for r in record.regions]
    names = (record.key, record.group, record.license, record.source, record.split)
    return msgpack.packb([names, [_part_out(part) for part in record.parts], record.fields, regions])


def decode(data: bytes) -> Record:
    """Return the record that `encode` wrote."""
    names, parts, fields, regions = msgpack.unpackb(data, ext_hook=_part_in, strict_map_key=False)
    key, group, license, source, split = names
    boxes = tuple(Region(part, kind, tuple(box), label) for part, kind, box, label in regions)
    return Record(key, tuple(parts), fields, boxes, group, license, source, split)


def texts(data: bytes) -> list[str]:
    """Return the text parts of an encoded record, without the work of decoding its pictures."""
    return [part for part in msgpack.unpackb(data, strict_map_key=False)[1] if isinstance(part, str)]


def fields(data: bytes) -> dict[str, Any]:
    """Return the fields of an encoded record, without the work of decoding its pictures."""
    return msgpack.unpackb(data, strict_map_key=False)[2]


def _part_out(part):
    if isinstance(part, str):
        return part
    if part.dtype == np.uint8 and part.ndim == 3 and part.shape[2] == 3:
        buffer = io.BytesIO()
        Image.fromarray(part).save(buffer, "webp", **LOSSLESS)
        return msgpack.ExtType(PICTURE, buffer.getvalue())
    if part.dtype == np.uint16 and part.ndim == 1:
        return msgpack.ExtType(CODES, part.astype("<u2").tobytes())
    raise TypeError(f"part of {part.dtype} {part.shape}: must be uint8 [h, w, 3] (picture) or uint16 [n] (codes)")


def _part_in(code: int, data: bytes):
    if code == PICTURE:
        return np.asarray(Image.open(io.BytesIO(data), formats=("WEBP",)))
    return np.frombuffer(data, "<u2").astype(np.uint16)


class Writer:
    """Writes the records of one split, spread in turn over `shards` files; use as a context manager.

    The files are whole only after `close`: write elsewhere and rename where a reader may look.
    """

    def __init__(self, folder, split: str, shards: int = 1):
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.paths = [folder / name(split, i, shards) for i in range(shards)]
        self._writers = [array_record_module.ArrayRecordWriter(str(path), WRITE) for path in self.paths]
        self._next = itertools.cycle(self._writers)

    def write(self, record: Record) -> None:
        self.write_bytes(encode(record))

    def write_bytes(self, data: bytes) -> None:
        """Write what `encode` returned."""
        next(self._next).write(data)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def files(folder) -> dict[str, list[pathlib.Path]]:
    """Return {split: its shards in order}.

    Raises:
      UserError: if there is no such folder, or a split lacks one of its shards.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise UserError(f"{str(folder)!r}: no such folder; `cm3jax prepare SOURCE OUT` makes one")
    found = {}
    for path in sorted(folder.iterdir()):
        if match := NAME.fullmatch(path.name):
            found.setdefault(match["split"], []).append((path, int(match["shards"])))
    for split, shards in found.items():
        if {len(shards)} != {n for _, n in shards}:
            raise UserError(
                f"{str(folder)!r}: split {split!r} has {len(shards)} of {max(n for _, n in shards)} shards;"
                " run `cm3jax prepare` again"
            )
    return {split: [path for path, _ in shards] for split, shards in found.items()}


def splits(folder) -> list[str]:
    """Return the names of the splits that a folder of shards holds."""
    return sorted(files(folder))


class Reader:
    """Random access to splits, end to end: `len(reader)`, `reader[i]`, `for record in reader`. Can be pickled."""

    def __init__(self, folder, *splits: str):
        found = files(folder)
        for split in splits:
            if split not in found:
                raise UserError(f"{str(folder)!r}: no split {split!r}; found: {', '.join(sorted(found)) or 'none'}")
        self._open([path for split in splits for path in found[split]])

    @classmethod
    def of(cls, paths: list[pathlib.Path]) -> "Reader":
        """Return a reader of these shards, one behind the other."""
        reader = cls.__new__(cls)
        reader._open(paths)
        return reader

    def _open(self, paths):
        self.paths = paths
        self._ends = list(itertools.accumulate(count(path) for path in paths))
        self._readers = {}

    def __len__(self) -> int:
        return self._ends[-1]

    def read_bytes(self, index: int) -> bytes:
        """Return record `index` still encoded."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        index %= len(self)
        shard = bisect.bisect_right(self._ends, index)
        first = self._ends[shard - 1] if shard else 0
        try:
            return self._reader(shard).read([index - first])[0]
        except RuntimeError as e:  # array_record checks a hash of every chunk
            raise UserError(f"{str(self.paths[shard])!r}: damaged; delete it and prepare again ({e})") from None

    def _reader(self, shard: int):
        if shard not in self._readers:
            if len(self._readers) >= MAX_OPEN:
                self._readers.pop(next(iter(self._readers))).close()  # the one opened first
            self._readers[shard] = open_file(self.paths[shard])
        return self._readers[shard]

    def __getitem__(self, index: int) -> Record:
        return decode(self.read_bytes(index))

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))

    def __getstate__(self):
        return self.paths

    def __setstate__(self, paths):
        self._open(paths)


def open_file(path):
    """Open one array_record file for random access.

    Raises:
      UserError: if it is missing, cut short or not an array_record; the library itself would show 0 records.
    """
    reader = array_record_module.ArrayRecordReader(str(path), options=READ)
    if not reader.ok():
        raise UserError(f"{str(path)!r}: missing, cut short or not an array_record; delete it and prepare again")
    return reader


def count(path) -> int:
    """Return the number of records in one array_record file."""
    reader = open_file(path)
    number = reader.num_records()
    reader.close()
    return number
