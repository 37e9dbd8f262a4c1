"""Whose id is whose: Chameleon's vocabulary in its own order, and the same rows in the order of `vocab.Vocab`.

Chameleon's tokenizer names its entries, image codes and markers among them (arXiv 2405.09818 §2.2). Only these names
say what an id is: the order of the codes is that of the numbers in their names, which nothing promises to be that of
the ids. An imported model has its rows in our order, so that all arithmetic of `Vocab` holds:

    <pad> <eod> <break> <eoss>  <pad>, </s>, <racm3:break> and <eoss>: all of CM3Leon's lineage, and of the same use
    text                        all that is left, in the order of their ids; <s>, end of turn and <image> among them
    image codes                 IMGIMG...Z, by the number that the letters spell
    sentinels                   the first reserved entries: 512 of them follow <racm3:break>, as in CM3Leon

`Order` is that permutation. It is written down in the run, and puts logits and tables back in Chameleon's order.
"""

import dataclasses
import functools
import json
import math
import pathlib
import re
from collections import Counter
from typing import Any

import numpy as np

from cm3jax.types import UserError
from cm3jax.vocab import Vocab

SPECIALS = ("<pad>", "</s>", "<racm3:break>", "<eoss>")
"""Chameleon's names of vocab.SPECIALS, in their order."""
BEGIN, END_OF_TURN, IMAGE = "<s>", "<reserved08706>", "<image>"
CODE = re.compile("IMGIMG([A-J]+)Z")
"""A letter is a digit: IMGIMGBACZ is code 102."""
RESERVED = re.compile("<reserved[0-9]+>")
IMAGE_BEFORE = "<reserved08707>"
"""Meta's own name of the entry that Hugging Face calls <image>."""
SENTINELS = 512
"""Reserved entries that become sentinels at most: CM3Leon's number (arXiv 2309.02591 §2.1)."""
MULTIPLE = 256
"""As `Vocab.multiple`, where the table's rows divide by it."""


@dataclasses.dataclass(frozen=True)
class Order:
    """A vocabulary in our order, and Chameleon's id of each of its rows."""

    vocab: Vocab
    theirs: np.ndarray
    """[size] Chameleon's id of each of our ids; every id once."""

    def __post_init__(self):
        if not np.array_equal(np.sort(self.theirs), np.arange(self.vocab.size)):
            raise UserError(
                f"order of ids: not each of the ids 0 to {self.vocab.size - 1} once; import the model again"
            )

    @functools.cached_property
    def ours(self) -> np.ndarray:
        """[size] Our id of each of Chameleon's ids."""
        return np.argsort(self.theirs)

    def back(self, scores: Any) -> Any:
        """Return scores over our ids, the last axis, in Chameleon's order."""
        return scores[..., self.ours]


def own(vocab: Vocab) -> Order:
    """Return the order of a model that was trained here: ours."""
    return Order(vocab, np.arange(vocab.size))


def order(names: dict[str, int], rows: int, where: str) -> Order:
    """Return the order of a vocabulary.

    Args:
      names: The tokenizer's entries: name -> id. Ids without a name are text.
      rows: Of the embedding table.
      where: What to call it in errors.

    Raises:
      UserError: if a special or a code is missing, or two entries of use have one id.
    """
    if beyond := [name for name, i in names.items() if not (type(i) is int and 0 <= i < rows)]:
        raise UserError(f"{where}: entry {beyond[0]!r} has the id {names[beyond[0]]!r}: must be from 0 to {rows - 1}")
    if missing := [name for name in SPECIALS if name not in names]:
        raise UserError(f"{where}: no entry {missing[0]!r}; take the tokenizer that belongs to the checkpoint")
    specials, images = [names[name] for name in SPECIALS], codes(names, where)
    markers = {names.get(END_OF_TURN), names.get(IMAGE, names.get(IMAGE_BEFORE))}
    free = {i for name, i in names.items() if RESERVED.fullmatch(name)} - markers
    sentinels = sorted(free - {*specials, *images})[:SENTINELS]
    used = Counter([*specials, *images, *sentinels])
    if twice := [i for i, count in used.items() if count > 1]:
        same = sorted(name for name, i in names.items() if i == twice[0])
        raise UserError(f"{where}: entries {same[0]!r} and {same[1]!r} have one id, {twice[0]}; each must have its own")
    text = [i for i in range(rows) if i not in used]
    try:
        vocab = Vocab(len(text), len(images), len(sentinels), math.gcd(rows, MULTIPLE))
    except ValueError as e:
        raise UserError(f"{where}: {e}") from None
    return Order(vocab, np.array([*specials, *text, *images, *sentinels]))


def codes(names: dict[str, int], where: str) -> list[int]:
    """Return Chameleon's id of each image code, as the names spell them.

    Raises:
      UserError: if they are not the codes 0, 1, ..., each once.
    """
    found = {}
    for name, i in names.items():
        if match := CODE.fullmatch(name):
            code = int("".join(str(ord(letter) - ord("A")) for letter in match[1]))
            if code in found:
                raise UserError(f"{where}: two entries are image code {code}, one of them {name!r}")
            found[code] = i
    missing = next(code for code in range(len(found) + 1) if code not in found)
    if missing < len(found) or not found:
        raise UserError(f"{where}: no entry {spelt(missing)!r}, of image code {missing}; there are {len(found)} codes")
    return [found[code] for code in range(len(found))]


def spelt(code: int) -> str:
    """Return the name of an image code."""
    return "IMGIMG" + "".join(chr(ord("A") + int(digit)) for digit in str(code)) + "Z"


def reserved(number: int) -> str:
    """Return the name of a reserved entry."""
    return f"<reserved{number:05}>"


def own_names(vocab: Vocab) -> dict[str, int]:
    """Return entries for a vocabulary that was made here, as Chameleon's tokenizer would name them; text by number."""
    names = {}
    for i in range(vocab.size):
        if vocab.is_image(i):
            names[spelt(i - vocab.image_start)] = i
        elif vocab.is_sentinel(i):
            names[f"<reserved{vocab.image + 2 + i - vocab.sentinel_start:05}>"] = i  # counted as Chameleon's are
        else:
            names[SPECIALS[i] if i < len(SPECIALS) else vocab.name(i)] = i
    return names


# ------------------------------------------------------------------------------------------------------------- on disk


def save(path: pathlib.Path, order: Order) -> None:
    """Write an order as JSON."""
    vocab = {f.name: getattr(order.vocab, f.name) for f in dataclasses.fields(Vocab)}
    path.write_text(json.dumps({"vocab": vocab, "theirs": order.theirs.tolist()}) + "\n")


def load(path: pathlib.Path) -> Order:
    """Return the order that `save` wrote.

    Raises:
      UserError: if it is not there, or is none.
    """
    try:
        found = json.loads(path.read_text())
        return Order(Vocab(**found["vocab"]), np.array(found["theirs"], np.int64))
    except FileNotFoundError:
        raise UserError(f"order of ids {str(path)!r}: no such file; import the model again") from None
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"order of ids {str(path)!r}: not readable ({e}); import the model again") from None
