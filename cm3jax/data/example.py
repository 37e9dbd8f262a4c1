"""What a source yields: an undecoded example, or a reject with its reason."""

import dataclasses
from typing import Any

import numpy as np

from cm3jax.types import Region

HELD_OUT = ("validation", "test")
SYNONYMS = {"training": "train", "val": "validation", "valid": "validation", "dev": "validation", "eval": "validation"}


@dataclasses.dataclass(frozen=True)
class Example:
    """A document before decoding.

    Attributes:
      key: Unique within the source.
      parts: In reading order: `str` is text; `bytes` an encoded picture (JPEG, PNG, ...); uint8 [h, w, 3] pixels.
      where: Where a person finds it ("metadata.jsonl:17"), for rejects.jsonl.
      regions: Boxes in fractions of the sides of the upright picture, before the crop.
      split: "" lets the hash of the pixels decide among "train" and `held_out`.
      fields, group, license, source: As in `cm3jax.types.Record`.
    """

    key: str
    parts: tuple[str | bytes | np.ndarray, ...]
    where: str = ""
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    regions: tuple[Region, ...] = ()
    group: str = ""
    license: str = ""
    source: str = ""
    split: str = ""
    held_out: tuple[str, ...] = HELD_OUT


@dataclasses.dataclass(frozen=True)
class Reject:
    """One input row that gave no record: a reason from a short list, which is counted, and what exactly was wrong."""

    key: str
    where: str
    reason: str
    detail: str = ""


class Bad(Exception):
    """Raised where an example is found to be bad; whoever reads the source turns it into a `Reject`."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail

    def reject(self, key: str, where: str) -> Reject:
        return Reject(key, where, self.reason, self.detail)


def split_name(name: str) -> str:
    """Return the usual name of a split: "val" and "dev" are "validation"."""
    return SYNONYMS.get(name.lower(), name.lower())


ROWS_PER_SHARD = 2048  # 256 px photographs: about 250 MB
MAX_SHARDS = 8192


def shards(rows: int, asked: int) -> int:
    """Return the number of training shards: as asked, else by the number of rows."""
    return min(asked or -(-rows // ROWS_PER_SHARD), MAX_SHARDS, rows) or 1
