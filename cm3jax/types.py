"""The dimension glossary, and the record that every data set is turned into.

One alphabet for annotations and einsum, lower case there and upper case for the int:
`b` batch · `t` query position · `s` key position · `d` width · `n` heads · `k` per-head · `f` feed-forward ·
`v` vocabulary · `l` layer · `h w c` image or grid · `z` code dimension · `m` codebook.
"""

import dataclasses
from typing import Any

import numpy as np

Part = str | np.ndarray
"""One part of a document, told apart by type: `str` is text; uint8 [h, w, 3] a picture; uint16 [n] image codes."""


ANSWER = "answer"
"""Kind of the regions that SFT masks; the only one that may lie in a text, from character x0 to x1 of it, as shares."""


@dataclasses.dataclass(frozen=True)
class Region:
    """A box in one picture part, in fractions of its sides, (x0, y0) upper left and (x1, y1) lower right."""

    part: int
    kind: str
    """"face" or "object" train the tokenizer's region losses (arXiv 2203.13131); `ANSWER`: what a task asks for; other
    kinds are carried along."""
    box: tuple[float, float, float, float]
    label: str = ""


@dataclasses.dataclass(frozen=True)
class Record:
    """One document: a caption-picture pair, an interleaved page, an edit triple, ...

    Attributes:
      key: Unique within its data set.
      parts: In reading order. A pair is (text, picture): pretraining writes text first (arXiv 2309.02591 §2.1).
      fields: Extra named values (alternative captions, answers, ground truth); JSON types only.
      split: "train", "validation", "test", ... or "" for "decide by the hash of the pixels".
      group: Records of one group never straddle two splits.
    """

    key: str
    parts: tuple[Part, ...]
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    regions: tuple[Region, ...] = ()
    group: str = ""
    license: str = ""
    source: str = ""
    split: str = ""


class UserError(Exception):
    """A mistake in the input. The command line prints it as one line and exits with `code`.

    The message names the value, the limit and the fix.
    """

    code = 2


class Unavailable(UserError):
    """Nothing that the user could correct: the same command may work later. launch/again.sh starts it again."""

    code = 75  # EX_TEMPFAIL of sysexits.h
