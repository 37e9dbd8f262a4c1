"""Tensors that lie in files: names, shapes and types at once, numbers when they are asked for.

A tensor is mapped, not loaded: its pages come as they are touched, and go with the array. So a file of any size is read
tensor by tensor in the memory of one. Arrays are read-only and keep the file's own type, half precision included.
"""

import dataclasses
import math
import pathlib
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from cm3jax import trees
from cm3jax.types import UserError

MOST_DIMENSIONS, MOST = 64, 2**56
"""Of an array, and of its numbers: numpy's limits, with room for the bytes of a number."""
SHORT = reprlib.Repr()
SHORT.maxlevel, SHORT.maxstring, SHORT.maxother, SHORT.maxlist, SHORT.maxtuple = 3, 200, 200, 8, 8


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor, not yet read.

    Attributes:
      origin: The file and the tensor as the file calls it, for errors; "" of what is in memory.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    origin: str = ""

    @property
    def size(self) -> int:
        """Bytes of its numbers."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, at: Any) -> np.ndarray:
        """Return a part of its numbers; of a mapped one, only the pages of that part are read."""
        return self.read()[at]


@dataclasses.dataclass(frozen=True)
class Tensors:
    """What a file or a folder holds, checked.

    Attributes:
      path: What was opened.
      kind: "safetensors" or "torch".
      files: All files that were looked into, an index included.
      found: {name: tensor} in the order of the file; containers in containers make names with dots.
      values: {name: what is no tensor}: metadata, step counters, settings.
    """

    path: pathlib.Path
    kind: str
    files: tuple[pathlib.Path, ...]
    found: dict[str, Tensor]
    values: dict[str, Any]

    def read(self, name: str) -> np.ndarray:
        """Return a tensor's numbers.

        Raises:
          UserError: if there is no such tensor.
        """
        if name not in self.found:
            raise UserError(f"{self.path}: no tensor {short(name)} among its {len(self.found):,}")
        return self.found[name].read()

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose names begin so, without that beginning: those in "state_dict." of a checkpoint."""
        return {name.removeprefix(prefix): t for name, t in self.found.items() if name.startswith(prefix)}


def held(array: np.ndarray) -> Tensor:
    """Return an array in memory as a tensor."""
    return Tensor(array.shape, array.dtype, lambda: array)


def named(params: Any) -> dict[str, Tensor]:
    """Return the arrays of a tree by path, "a/b/c"."""
    return {path: held(np.asarray(x)) for path, x in trees.named_leaves(params).items()}


def pages(path: pathlib.Path, start: int, size: int) -> np.ndarray:
    """Return bytes of a file in place, uint8 [size].

    Raises:
      UserError: if the file has become shorter since it was opened.
    """
    if not size:
        return np.empty(0, np.uint8)
    try:
        return np.asarray(np.memmap(path, np.uint8, "r", start, (size,)))
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: bytes {start:,} to {start + size:,} can no longer be read ({e})") from None


def origin(path: pathlib.Path, name: str) -> str:
    """Return what to call a file's tensor."""
    return f"{path}: {short(name)}"


def called(tensors: Mapping[str, Any], name: str, where: str) -> str:
    """Return what to call a tensor in errors: what its file calls it, of others where they are and their name."""
    return getattr(tensors[name], "origin", "") or f"{where}: {short(name)}"


def fit(
    tensors: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str, why: str = "", fix: str = ""
) -> None:
    """Raise a UserError that names the first tensor which is missing or has another shape.

    Args:
      shapes: Those that they must have, by name.
      why: What says so.
      fix: What to do about it.
    """
    for name, shape in shapes.items():
        if name not in tensors:
            raise UserError(f"{where}: no tensor {name!r}{fix}")
        if (found := tuple(tensors[name].shape)) != shape:
            raise UserError(f"{called(tensors, name, where)} has shape {found}, must be {shape}{why}{fix}")


def counts(values: Any) -> bool:
    """Return whether a list from a file holds whole numbers from 0 on, as offsets and strides are."""
    plain = isinstance(values, (list, tuple)) and len(values) <= MOST_DIMENSIONS
    return plain and all(type(n) is int and 0 <= n < MOST for n in values)


def shaped(values: Any) -> bool:
    """Return whether a list from a file can be a shape; numpy counts the dimensions of empty arrays too."""
    return counts(values) and math.prod(max(n, 1) for n in values) < MOST


def short(thing: Any) -> str:
    """Return a thing from a file as one line of bounded length, however deep it is."""
    return SHORT.repr(thing)
