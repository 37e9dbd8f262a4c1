"""Pictures of a folder, one after another: found in a fixed order, read by threads ahead of who uses them, and hashed.

What is read ahead is bounded, so that memory does not depend on the number of pictures.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import itertools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from cm3jax.data import example
from cm3jax.data import pictures as decoding
from cm3jax.types import UserError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".jp2", ".avif"}
AHEAD = 4
"""Pictures for each thread that are read before they are asked for."""


@dataclasses.dataclass(frozen=True)
class File:
    """A picture file, and what tells that it has changed.

    Attributes:
      name: Path below the folder, with slashes.
      changed: Time of the last change, in nanoseconds.
    """

    path: pathlib.Path
    name: str
    size: int
    changed: int

    @property
    def stem(self) -> str:
        """The name without its ending: what a picture and its reconstruction have in common."""
        return str(pathlib.PurePosixPath(self.name).with_suffix(""))


def found(folder) -> list[File]:
    """Return the pictures in a folder and below, by name; hidden files and folders are passed over.

    Raises:
      UserError: if there is no such folder, or no picture in it.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise UserError(f"pictures {str(folder)!r}: no such folder; give one of picture files, or statistics (.npz)")
    files = []
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if path.suffix.lower() in SUFFIXES and path.is_file() and not any(part.startswith(".") for part in name.parts):
            status = path.stat()
            files.append(File(path, name.as_posix(), status.st_size, status.st_mtime_ns))
    if not files:
        endings = ", ".join(sorted(SUFFIXES))
        raise UserError(f"pictures {str(folder)!r}: no picture in it; files that end in {endings} are looked at")
    return sorted(files, key=lambda file: file.name)


def pairs(pictures: Sequence[File], reference: Sequence[File]) -> list[tuple[File, File]]:
    """Return pictures side by side with those of the same name, whatever the ending, in the reference.

    Raises:
      UserError: naming the picture that has no counterpart, or two.
    """
    sides = []
    for files in (pictures, reference):
        by_stem = {file.stem: file for file in files}
        if len(by_stem) != len(files):
            stem = next(stem for stem, n in collections.Counter(f.stem for f in files).items() if n > 1)
            raise UserError(f"pictures {files[0].path.parent}: two are named {stem!r}; pairs are found by name")
        sides.append(by_stem)
    first, second = sides
    for a, b, which in ((first, second, "the reference"), (second, first, "the pictures")):
        if alone := sorted(set(a) - set(b)):
            raise UserError(
                f"{a[alone[0]].path}: has no counterpart among {which} ({len(alone)} such of {len(a)}); pictures that"
                " are compared one by one need the same names"
            )
    return [(first[stem], second[stem]) for stem in sorted(first)]


def read(file: File) -> tuple[np.ndarray, str]:
    """Return a picture's pixels, uint8 [h, w, 3], and the SHA-256 of its file.

    Raises:
      UserError: naming a file that is no picture.
    """
    try:
        data = file.path.read_bytes()
        return decoding.decode(data), hashlib.sha256(data).hexdigest()
    except OSError as e:
        raise UserError(f"picture {str(file.path)!r}: {e.strerror or e}") from None
    except example.Bad as e:
        raise UserError(f"picture {str(file.path)!r}: {e}; remove it, or make it again") from None


def ahead(rows: Iterable[Any], work: Callable[[Any], Any], threads: int) -> Iterator[Any]:
    """Yield `work(row)` for each row, in order, made by threads; at most AHEAD times as many as threads are waiting."""
    rows = iter(rows)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        waiting = collections.deque(pool.submit(work, row) for row in itertools.islice(rows, AHEAD * threads))
        try:
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(work, row) for row in itertools.islice(rows, 1))
        finally:
            for one in waiting:
                one.cancel()
