"""Text <-> piece ids: a sentencepiece BPE that gives back any valid Unicode string exactly (arXiv 2309.02591 §2.1).

Identity normalisation, no dummy prefix, no whitespace removal, byte fallback. Piece ids are 0-based; the document
tokenizer shifts them into the one id space. Imports no jax.
"""

import collections
import io
import itertools
import pathlib
import random
from collections.abc import Iterable, Sequence

import sentencepiece

import cm3jax.config as config
from cm3jax.types import UserError

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
