"""Text <-> piece ids: a sentencepiece BPE that gives back any valid Unicode string exactly (arXiv 2309.02591 §2.1).

Identity normalisation, no dummy prefix, no whitespace removal, byte fallback. Piece ids are 0-based; the document
tokenizer shifts them into the one id space. Imports no jax.

A released model has a tokenizer of its own (`Published`): tokenizer.json, through the `tokenizers` library, beside
order.json, which says what our id of each of its entries is.
"""

import collections
import functools
import io
import itertools
import json
import pathlib
import random
import re
from collections.abc import Iterable, Sequence

import numpy as np
import sentencepiece
import tokenizers

import cm3jax.config as config
from cm3jax.types import UserError
from cm3jax.vocab import Vocab

MARKER = re.compile(r"<(?!0x[0-9A-F]{2}>)[^<>\s]+>")
"""Names of entries of Chameleon's tokenizer that stand for no text; those of bytes do."""

MODEL, PUBLISHED, ORDER = "tokenizer.model", "tokenizer.json", "order.json"

SPACE = "\u2581"  # sentencepiece's own sign for a blank: in the input it must go through the byte pieces
SMALLEST = 258  # <unk>, 256 bytes and one piece


def train(texts: Iterable[str], size: int, path, text: config.Text = config.Text()) -> "Tokenizer":
    """Train on `texts` and write the model file; the same texts give the same bytes.

    Args:
      texts: Captions; all are read, `text.sample` of them (a seeded choice) are kept for training.
      size: Most entries, byte pieces included. A small corpus fills fewer.
      path: File to write; it appears whole or not at all.

    Raises:
      UserError: if `size` has no room for the byte pieces, there is no text, or a text is not valid Unicode.
    """
    if size < SMALLEST:
        raise UserError(f"vocab.text = {size}: must be at least {SMALLEST} (256 byte pieces, <unk> and one more)")
    kept = sample((valid(t) for t in texts), text.sample, text.seed)
    sentences = cut(kept, rare(kept, size, text.character_coverage))
    if not sentences:
        raise UserError(f"text tokenizer: no text in {len(kept)} captions; give data whose captions are not empty")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=size,
        hard_vocab_limit=False,
        character_coverage=1.0,  # `rare` has seen to it
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        byte_fallback=True,
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        max_sentence_length=2**30,  # the default leaves out texts over 4192 bytes without a word
        num_threads=1,
        minloglevel=2,
    )
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(model.getvalue())
    partial.replace(path)
    return Tokenizer(path)


def sample(texts: Iterable[str], count: int, seed: int) -> list[str]:
    """Return at most `count` of `texts`, each as likely as the others, in one pass (reservoir sampling)."""
    rng, kept = random.Random(seed), []
    for i, text in enumerate(texts):
        if i < count:
            kept.append(text)
        elif (j := rng.randrange(i + 1)) < count:
            kept[j] = text
    return kept


def rare(texts: Sequence[str], size: int, coverage: float) -> set[str]:
    """Return the characters that get no piece of their own and are written as bytes, which loses nothing but length.

    Those are the rarest, up to a share 1 - `coverage` of the text; and more of them where characters alone would fill
    over half of the `size` entries, since sentencepiece then refuses to train.
    """
    counts = collections.Counter()
    for text in texts:
        counts.update(text)
    ranked = counts.most_common()
    before = itertools.accumulate((n for _, n in ranked), initial=0)
    wanted = sum(n < coverage * counts.total() for n in itertools.islice(before, len(ranked)))
    return {c for c, _ in ranked[min(wanted, max(1, (size - SMALLEST + 1) // 2)) :]}


def cut(texts: Sequence[str], characters: set[str]) -> list[str]:
    """Return the texts, cut at `characters` and at the two that sentencepiece cannot train on; no part is empty."""
    table = dict.fromkeys(map(ord, characters | {"\0"}), SPACE)
    return [part for text in texts for part in text.translate(table).split(SPACE) if part]


def valid(text: str) -> str:
    """Return `text`; a lone surrogate raises a UserError."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise UserError(
            f"text {text[max(0, e.start - 20) : e.start + 20]!r}: character {e.start} is a lone surrogate"
            f" U+{ord(text[e.start]):04X}, not valid Unicode; remove it"
        ) from None
    return text


class Tokenizer:
    """A trained model file.

    Attributes:
      size: Entries in use; ids are 0 .. size - 1.
      unsaid: Of these, the ones that are no text, and that a model must not draw: <unk>.
    """

    unsaid = (0,)

    def __init__(self, path):
        path = pathlib.Path(path)
        if not path.is_file():
            raise UserError(f"text tokenizer {str(path)!r}: no such file; train it with `cm3jax run` or `cm3jax train`")
        self.path = path
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError):
            raise UserError(f"text tokenizer {str(path)!r}: not a sentencepiece model; train it again") from None
        self.size = self._model.vocab_size()
        self._bytes = [self._surface(i) for i in range(self.size)]
        self._space = [self._model.piece_to_id(f"<0x{b:02X}>") for b in SPACE.encode()]

    def __reduce__(self):
        return Tokenizer, (self.path,)

    def _surface(self, i: int) -> bytes:
        if self._model.is_byte(i):
            return bytes([int(self._model.id_to_piece(i)[3:-1], 16)])
        return b"" if self._model.is_unknown(i) else self._model.id_to_piece(i).replace(SPACE, " ").encode()

    def piece(self, i: int) -> str:
        """Return a piece as sentencepiece writes it: U+2581 for a blank, <0x0A> for a byte."""
        return self._model.id_to_piece(i)

    def encode(self, text: str) -> list[int]:
        """Return piece ids; `decode` gives exactly `text` back.

        Raises:
          UserError: if `text` has a lone surrogate.
        """
        first, *others = valid(text).split(SPACE)
        ids = self._model.encode(first)
        for other in others:
            ids += self._space + self._model.encode(other)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of piece ids; bytes that are no UTF-8, which a model may draw, become U+FFFD.

        Raises:
          ValueError: if an id is not below `size`.
        """
        if any(not 0 <= i < self.size for i in ids):
            raise ValueError(f"piece ids must be 0 to {self.size - 1}, found {min(ids)} to {max(ids)}")
        return b"".join(self._bytes[i] for i in ids).decode("utf-8", errors="replace")


# ------------------------------------------------------------------------------------------- tokenizers of other people


def load(folder) -> Tokenizer:
    """Return the text tokenizer of a run's text/: its own, or that of the model that was imported.

    Raises:
      UserError: if there is none, or its files are not readable.
    """
    folder = pathlib.Path(folder)
    return Published(folder) if (folder / PUBLISHED).is_file() else Tokenizer(folder / MODEL)


class Published(Tokenizer):
    """The tokenizer of a released model: what its tokenizer.json makes of a text, in the order of our ids.

    Attributes:
      size: Text ids of the model, with or without an entry: all that are no special, image code or sentinel.
      unsaid: Of these, markers and ids without an entry.
      vocab: The one id space of the model.
    """

    def __init__(self, folder):
        folder = pathlib.Path(folder)
        self.path = folder / PUBLISHED
        self._model = read_published(self.path)
        self.vocab, self._theirs = _order(folder / ORDER)
        self._ours = np.argsort(self._theirs)
        self.size = self.vocab.text
        self.unsaid = self._unsaid()
        last = max(self.names.values(), default=0)
        if last >= len(self._theirs):
            raise UserError(f"{self.path}: has the id {last}, but {ORDER} is of {len(self._theirs)} ids")

    def __reduce__(self):
        return Published, (self.path.parent,)

    @functools.cached_property
    def names(self) -> dict[str, int]:
        """Every entry's name and its id in the model's own order."""
        return self._model.get_vocab(with_added_tokens=True)

    def _unsaid(self) -> tuple[int, ...]:
        """Return the pieces that are no text: markers such as <reserved08707>, and ids without an entry."""
        texts = [i for name, i in self.names.items() if not MARKER.fullmatch(name) and i < len(self._ours)]
        said = np.zeros(self.vocab.size, bool)
        said[self._ours[texts]] = True
        return tuple(np.flatnonzero(~said[self.vocab.text_start : self.vocab.image_start]).tolist())

    def id(self, name: str) -> int:
        """Return our id, in the one id space, of an entry such as "<s>"; raises a UserError if there is none."""
        if name not in self.names:
            raise UserError(f"{self.path}: no entry {name!r}; take the tokenizer that came with the model")
        return int(self._ours[self.names[name]])

    def encode(self, text: str) -> list[int]:
        """Return piece ids, 0-based among the text ids; nothing is put before or behind them.

        Raises:
          UserError: if `text` has a lone surrogate, or the name of an entry that is no text, such as an image code.
        """
        ids = self._model.encode(valid(text), add_special_tokens=False).ids
        found = self._ours[np.array(ids, np.int64)]
        if len(odd := np.flatnonzero(~self.vocab.is_text(found))):
            name = self._model.id_to_token(ids[odd[0]])
            raise UserError(f"text {text!r:.80}: holds {name!r}, a marker of the model's vocabulary and no text")
        return (found - self.vocab.text_start).tolist()

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of piece ids; ids without an entry, which a model may draw, become U+FFFD.

        Raises:
          ValueError: if an id is not below `size`.
        """
        if any(not 0 <= i < self.size for i in ids):
            raise ValueError(f"piece ids must be 0 to {self.size - 1}, found {min(ids)} to {max(ids)}")
        theirs = self._theirs[np.array(ids, np.int64) + self.vocab.text_start].tolist()
        runs = itertools.groupby(theirs, lambda i: self._model.id_to_token(i) is not None)
        return "".join(
            self._model.decode(list(run), skip_special_tokens=False) if known else "\ufffd" * len(list(run))
            for known, run in runs
        )


def read_published(path: pathlib.Path) -> tokenizers.Tokenizer:
    """Return what a tokenizer.json holds, which neither cuts nor fills texts.

    Raises:
      UserError: if it is not there, or is none.
    """
    try:
        found = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"text tokenizer {str(path)!r}: {e.strerror}; import the model again") from None
    except Exception as e:  # the library raises no narrower class
        raise UserError(f"text tokenizer {str(path)!r}: not one of the `tokenizers` library ({e!s:.120})") from None
    found.no_truncation()
    found.no_padding()
    return found


def _order(path: pathlib.Path) -> tuple[Vocab, np.ndarray]:
    """Return the id space, and the model's own id of each of its ids [size]."""
    try:
        found = json.loads(path.read_text())
        vocab, theirs = Vocab(**found["vocab"]), np.array(found["theirs"], np.int64)
        if not np.array_equal(np.sort(theirs), np.arange(vocab.size)):
            raise ValueError(f"not each of {vocab.size} ids once")
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"order of ids {str(path)!r}: not readable ({e}); import the model again") from None
    return vocab, theirs
