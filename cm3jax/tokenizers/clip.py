"""Text -> ids for the retriever's text tower: CLIP's byte-pair encoding, or the run's own pieces. Imports no jax.

CLIP's (arXiv 2103.00020 §2.4) is lower-cased and byte-level; the last symbol of a word carries `</w>`. Its published
files are Hugging Face's vocab.json {symbol: id} and merges.txt, a pair of symbols a line, the earliest merged first, or
OpenAI's one of pairs, which has more than are used.
"""

import functools
import gzip
import itertools
import json
import pathlib
import re
import unicodedata
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from cm3jax.tokenizers import text as pieces
from cm3jax.types import UserError

VOCAB, MERGES, PIECES, OPENAI = "vocab.json", "merges.txt", "tokenizer.model", "bpe_simple_vocab_16e6.txt.gz"
FILES = VOCAB, MERGES, PIECES, OPENAI
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
LAST = "</w>"
"""Mark of a word's last symbol."""
CONTRACTION = re.compile("'(?:s|t|re|ve|m|ll|d)")
USED = 49_152 - 256 - 2
"""Pairs of OpenAI's file that its tokenizer takes: with 512 symbols of bytes, begin and end they are 49,408 ids."""
MULTIPLE = 128
"""Rows of the table are a multiple of this, so that it divides over a mesh; the ids behind the last are not used."""


@runtime_checkable
class Tokenizer(Protocol):
    """What the retriever needs of a tokenizer.

    Attributes:
      rows: Rows of the text tower's table; ids are below.
      begin, end: Ids that stand before and behind every text.
      files: {name: content} of the files that it can be loaded from.
    """

    rows: int
    begin: int
    end: int
    files: dict[str, bytes]

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without begin and end."""
        ...


def load(folder) -> Tokenizer:
    """Return the tokenizer whose files lie in a folder.

    Raises:
      UserError: if there is none, or its files are not what they should be.
    """
    folder = pathlib.Path(folder)
    if (folder / PIECES).is_file():
        return Pieces(folder / PIECES)
    if (folder / OPENAI).is_file() and not (folder / VOCAB).is_file():
        return Words(_openai(folder / OPENAI), folder)
    for name in (VOCAB, MERGES):
        if not (folder / name).is_file():
            raise UserError(
                f"{str(folder)!r}: no text tokenizer here ({name} is missing); published weights come with {VOCAB} and"
                f" {MERGES}, or with {OPENAI}"
            )
    try:
        return Words({name: (folder / name).read_bytes() for name in (VOCAB, MERGES)}, folder)
    except OSError as e:
        raise UserError(f"{str(folder)!r}: {VOCAB} and {MERGES} cannot be read ({e.strerror})") from None


def arrays(
    rows: Sequence[Sequence[int]], tokenizer: Tokenizer, context: int
) -> tuple[Int32[np.ndarray, "b t"], Int32[np.ndarray, " b"]]:
    """Return texts (ids without begin and end) as [b, context] ids, and where each ends.

    A text too long for the context is cut; what is left of a row is filled with `end`, which no token before it sees.
    """
    ids = np.full((len(rows), context), tokenizer.end, np.int32)
    ids[:, :1] = tokenizer.begin
    lengths = [min(len(row), context - 2) for row in rows]
    for i, (row, n) in enumerate(zip(rows, lengths, strict=True)):
        ids[i, 1 : 1 + n] = row[:n]
    return ids, np.array(lengths, np.int32) + 1


class Pieces:
    """The run's own text tokenizer: its pieces, then begin and end."""

    def __init__(self, path):
        self.model = pieces.Tokenizer(path)
        self.begin, self.end = self.model.size, self.model.size + 1
        self.rows = -(-(self.model.size + 2) // MULTIPLE) * MULTIPLE
        self.path = pathlib.Path(path)
        self.files = {PIECES: self.path.read_bytes()}

    def __reduce__(self):
        return Pieces, (self.path,)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without begin and end."""
        return self.model.encode(text)


class Words:
    """CLIP's tokenizer, from its published files; ids are those of transformers' CLIPTokenizer.

    Only these differ: the names of begin and end within a text, which are letters and signs here like all others, and
    characters that are younger than this Python's Unicode, which are signs.
    """

    def __init__(self, files: dict[str, bytes], folder: pathlib.Path):
        self.files, self.folder = files, folder
        self.ids = _vocabulary(files[VOCAB], folder / VOCAB)
        self.ranks = {pair: i for i, pair in enumerate(_merges(files[MERGES], self.ids, folder / MERGES))}
        self.begin, self.end, self.rows = self.ids[BEGIN], self.ids[END], 1 + max(self.ids.values())
        self.word = functools.lru_cache(2**16)(self._word)

    def __reduce__(self):
        return Words, (self.files, self.folder)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without begin and end.

        Raises:
          UserError: if `text` has a lone surrogate.
        """
        return [i for word in words(clean(pieces.valid(text))) for i in self.word(word)]

    def _word(self, word: str) -> tuple[int, ...]:
        """Return the ids of a word: its bytes, then merged pair by pair, at each time the earliest of the list."""
        symbols = [SIGNS[byte] for byte in word.encode()]
        symbols[-1] += LAST
        while pairs := [pair for pair in itertools.pairwise(symbols) if pair in self.ranks]:
            symbols = merged(symbols, min(pairs, key=self.ranks.__getitem__))
        return tuple(self.ids[symbol] for symbol in symbols)


def merged(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """Return symbols with each occurrence of a pair joined, from the left."""
    out = []
    for symbol in symbols:
        if out and (out[-1], symbol) == pair:
            out[-1] = "".join(pair)
        else:
            out.append(symbol)
    return out


def clean(text: str) -> str:
    """Return a text as CLIP sees it: composed (NFC) and in lower case, letter by letter."""
    return "".join(c.lower() for c in unicodedata.normalize("NFC", text))  # a whole text's lower() knows final sigmas


def words(text: str) -> list[str]:
    """Return what is merged by itself: an English contraction, a run of letters, one digit, or a run of other signs."""
    kinds, found, i = [kind(c) for c in text], [], 0
    while i < len(text):
        start, i = i, i + 1
        if match := CONTRACTION.match(text, start):
            i = match.end()
        elif kinds[start] in "LO":
            while i < len(text) and kinds[i] == kinds[start]:
                i += 1
        if kinds[start] != "S":
            found.append(text[start:i])
    return found


@functools.lru_cache(2**16)
def kind(character: str) -> str:
    """Return L for a letter, N for a digit or other number, S for a blank, O for all others."""
    if character.isspace() and character not in "\x1c\x1d\x1e\x1f":  # Python's own idea of a blank
        return "S"
    major = unicodedata.category(character)[0]
    return major if major in "LN" else "O"


def signs() -> list[str]:
    """Return the character that stands for each byte in the files: itself where it shows, else one from U+0100 on."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = iter(range(256, 512))
    return [chr(byte if byte in shown else next(hidden)) for byte in range(256)]


SIGNS = signs()


def _openai(path: pathlib.Path) -> dict[str, bytes]:
    """Return OpenAI's file in the form of Hugging Face's two, whose ids are the same.

    Ids: the bytes that show, those that do not, all of them again as a word's last, the pairs, begin and end.

    Raises:
      UserError: if it cannot be read.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as f:
            pairs = [line.rstrip("\n") for line in itertools.islice(f, 1, 1 + USED)]  # the first line is a heading
    except (OSError, EOFError, ValueError) as e:
        raise UserError(f"CLIP merges {str(path)!r}: not readable ({e}); take the published file") from None
    alphabet = sorted(SIGNS)  # those that stand for hidden bytes are the last of it
    symbols = [*alphabet, *(sign + LAST for sign in alphabet), *(pair.replace(" ", "") for pair in pairs), BEGIN, END]
    ids = {symbol: i for i, symbol in enumerate(symbols)}
    merges = "\n".join(["#version: 0.2", *pairs]) + "\n"
    return {VOCAB: json.dumps(ids, ensure_ascii=False).encode(), MERGES: merges.encode()}


def _vocabulary(content: bytes, path: pathlib.Path) -> dict[str, int]:
    """Return {symbol: id} of a vocab.json.

    Raises:
      UserError: if it is not one, or lacks a symbol without which some text would have no ids.
    """
    try:
        found = json.loads(content.decode("utf-8"))
    except ValueError as e:
        raise UserError(f"CLIP vocabulary {str(path)!r}: not readable ({e}); take the published file") from None
    if not isinstance(found, dict) or not all(type(i) is int and i >= 0 for i in found.values()):
        raise UserError(f"CLIP vocabulary {str(path)!r}: not an object of symbols and ids; take the published file")
    for symbol in (BEGIN, END, *SIGNS, *(sign + LAST for sign in SIGNS)):
        if symbol not in found:
            raise UserError(f"CLIP vocabulary {str(path)!r}: lacks {symbol!r}; take the published file")
    return found


def _merges(content: bytes, ids: dict[str, int], path: pathlib.Path) -> list[tuple[str, str]]:
    """Return the pairs of a merges.txt.

    Raises:
      UserError: if a line is no pair, or joins to what the vocabulary lacks.
    """
    try:
        lines = content.decode("utf-8").replace("\r\n", "\n").split("\n")
    except ValueError as e:
        raise UserError(f"CLIP merges {str(path)!r}: not readable ({e}); take the published file") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line or line.startswith("#version"):
            continue
        pair = tuple(line.split(" "))
        if len(pair) != 2 or "".join(pair) not in ids:
            raise UserError(
                f"CLIP merges {str(path)!r}, line {number}: {line[:40]!r} joins no two symbols to one of {VOCAB}; take"
                " the two files from one place"
            )
        found.append(pair)
    return found
