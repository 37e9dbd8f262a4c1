"""Rows of numbers of many pictures, on disk: features, or figures of pairs. Made part by part, each made once.

A folder holds NNNNN.npy, float32 [rows, width], and NNNNN.json, which names the files that the rows are of and is
written last. So a long run that was interrupted continues at the part where it was, a second figure over the same
features reads them, and nothing has all pictures in memory. A part whose files have changed since is made again.
"""

import dataclasses
import hashlib
import io
import json
import pathlib
import uuid
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from cm3jax.data import progress
from cm3jax.evaluate.picture_files import File
from cm3jax.types import UserError

PART = 512
"""Rows of a part; with Inception's 2048 numbers, 4 MiB."""

Row = tuple[File, ...]
"""The file or files that a row is of."""


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows on disk.

    Attributes:
      parts: The files, in order.
      data: For each file of a row, 16 hex digits of the contents of these pictures, whatever their names and order.
    """

    parts: tuple[pathlib.Path, ...]
    count: int
    width: int
    data: tuple[str, ...]

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield the parts, float32 [rows, width], each in memory by itself."""
        return (np.load(path) for path in self.parts)

    def all(self) -> np.ndarray:
        """Return all rows, float32 [count, width]."""
        out = np.empty((self.count, self.width), np.float32)
        at = 0
        for part in self:
            out[at : at + len(part)] = part
            at += len(part)
        return out


def make(
    folder: pathlib.Path,
    rows: Sequence[Row],
    width: int,
    work: Callable[[Sequence[Row]], tuple[np.ndarray, list[str]]],
    name: str,
    part: int = 0,
    quiet: bool = False,
) -> Table:
    """Return the table of rows; only parts that are not in the folder are made.

    Args:
      folder: Of this table alone: other settings have other folders.
      work: Rows of a part -> their numbers, float32 [rows, width], and the SHA-256 of each file's content, row by row.
      name: Of the progress bar.
      part: Rows of a part; 0: PART.
    """
    folder.mkdir(parents=True, exist_ok=True)
    part, parts, digests = part or PART, [], []
    with progress.bar(len(rows), 0, "pictures", name, quiet) as bar:
        for at in range(0, len(rows), part):
            own, path = rows[at : at + part], folder / f"{at // part:05d}.npy"
            known = _known(path, own, width)
            if known is None:
                values, known = work(own)
                if np.isnan(values).any():
                    raise UserError(
                        f"{name}: {own[0][0].path} or one of the next {len(own)} pictures gives what is no number"
                    )
                _write(path, own, values, known)
            parts.append(path)
            digests += known
            bar.update(len(own))
    files = len(rows[0])
    return Table(tuple(parts), len(rows), width, tuple(_digest(digests[i::files]) for i in range(files)))


def _digest(digests: Sequence[str]) -> str:
    return hashlib.sha256("".join(f"{x}\n" for x in sorted(digests)).encode()).hexdigest()[:16]


def _files(rows: Sequence[Row]) -> list[list]:
    return [[file.name, file.size, file.changed] for row in rows for file in row]


def _known(path: pathlib.Path, rows: Sequence[Row], width: int) -> list[str] | None:
    """Return the digests of a part that is there and of just these files; None else."""
    try:
        about = json.loads(path.with_suffix(".json").read_text())
        if about["files"] != _files(rows) or np.load(path, mmap_mode="r").shape != (len(rows), width):
            return None
        return about["digests"]
    except (OSError, ValueError, KeyError, EOFError):
        return None


def _write(path: pathlib.Path, rows: Sequence[Row], values: np.ndarray, digests: list[str]) -> None:
    data = io.BytesIO()
    np.save(data, np.asarray(values, np.float32))
    _replace(path, data.getvalue())
    _replace(path.with_suffix(".json"), json.dumps({"files": _files(rows), "digests": digests}).encode())


def _replace(path: pathlib.Path, data: bytes) -> None:
    """Write a file in one step; another process may be writing the same one, with the same content."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    partial.write_bytes(data)
    partial.replace(path)
