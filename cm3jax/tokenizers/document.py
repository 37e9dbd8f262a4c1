"""Documents <-> ids in the one id space, and the prompts (arXiv 2309.02591 §2.2, §3).

A document's ids are its parts joined by <break>, without [eod]s: `text <break> IMG`. Packing frames it as
`[eod] text <break> IMG [eod]`. Every prompt is a prefix of what masking a framed document yields, its unconditional
stream too; `kinds` says of which, and `tests/test_prompts.py` holds both. Imports no jax.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from cm3jax.tokenizers.text import Tokenizer
from cm3jax.types import ANSWER, Region, UserError
from cm3jax.vocab import BREAK, EOD, EOSS, Vocab

Part = str | np.ndarray
"""Text, or integer image codes [n], 0-based."""


def encode(parts: Sequence[Part], tokenizer: Tokenizer, vocab: Vocab) -> np.ndarray:
    """Return the ids of a document, uint16 [n], without [eod]s; `decode` gives the parts back.

    Raises:
      UserError: if there is no part, a picture has no codes or codes out of range, or the tokenizer is too large.
    """
    if not len(parts):
        raise UserError("a document without parts; give it at least one text or picture")
    pieces = []
    for part in parts:
        pieces += [[BREAK], text_ids(part, tokenizer, vocab) if isinstance(part, str) else image_ids(part, vocab)]
    return np.concatenate(pieces[1:]).astype(np.uint16)


def marked(
    parts: Sequence[Part], regions: Sequence[Region], tokenizer: Tokenizer, vocab: Vocab
) -> tuple[np.ndarray, np.ndarray]:
    """Return a document's ids, uint16 [n], and where the answers of a task stand in them, int32 [k, 2] (start, end).

    A text is tokenized between the borders of its answers, so that a prompt that lacks them has the ids of the
    document. The blank before an answer belongs to it, as to the word that follows one in the tokenizer's pieces.

    Args:
      regions: Those of kind "answer" count; without any, the ids are those of `encode`.

    Raises:
      UserError: as `encode`, or if answers overlap or lie in no part.
    """
    answers: dict[int, list[Region]] = {}
    for region in regions:
        if region.kind == ANSWER:
            answers.setdefault(region.part, []).append(region)
    if any(not 0 <= part < len(parts) for part in answers):
        raise UserError(f"an answer in part {max(answers)} of {len(parts)}; must be one of them")
    if not answers:
        return encode(parts, tokenizer, vocab), np.zeros((0, 2), np.int32)
    pieces, spans, at = [], [], 0
    for i, part in enumerate(parts):
        for piece, wanted in _cut(part, answers.get(i, ())):
            ids = encode([piece], tokenizer, vocab)
            spans += [(at, at + len(ids))] * (wanted and len(ids) > 0)
            pieces, at = [*pieces, ids], at + len(ids)
        pieces, at = [*pieces, [BREAK]], at + 1
    return np.concatenate(pieces[:-1]).astype(np.uint16), np.array(spans, np.int32).reshape(-1, 2)


def _cut(part: Part, answers: Sequence[Region]) -> list[tuple[Part, bool]]:
    """Return the pieces of a part, and which of them are answers."""
    if not answers or not isinstance(part, str):
        return [(part, len(answers) > 0)]
    pieces, last = [], 0
    for region in sorted(answers, key=lambda region: region.box[0]):
        start, end = (round(x * len(part)) for x in (region.box[0], region.box[2]))
        start -= part[last:start].endswith(" ")
        if not last <= start < end <= len(part):
            raise UserError(f"answer {region.label!r} of {part!r}: empty, or overlaps another; mark each once")
        pieces += [(part[last:start], False), (part[start:end], True)]
        last = end
    return [*pieces, (part[last:], False)]


def text_ids(text: str, tokenizer: Tokenizer, vocab: Vocab) -> np.ndarray:
    """Return the ids of a text, uint16 [n]."""
    if tokenizer.size > vocab.text:
        raise UserError(f"vocab.text = {vocab.text}: the text tokenizer has {tokenizer.size} entries; raise vocab.text")
    return (np.array(tokenizer.encode(text), np.int64) + vocab.text_start).astype(np.uint16)


def image_ids(codes: np.ndarray, vocab: Vocab) -> np.ndarray:
    """Return the ids of image codes [n] (row-major), uint16 [n]."""
    codes = np.asarray(codes)
    if codes.ndim != 1 or not len(codes) or codes.dtype.kind not in "iu":
        raise UserError(f"image codes of shape {codes.shape}, {codes.dtype}: must be whole numbers [n], n at least 1")
    if codes.min() < 0 or codes.max() >= vocab.image:
        raise UserError(f"image codes {codes.min()} to {codes.max()}: must be 0 to vocab.image - 1 = {vocab.image - 1}")
    return (codes.astype(np.int64) + vocab.image_start).astype(np.uint16)


def decode(ids: np.ndarray, tokenizer: Tokenizer, vocab: Vocab) -> list[Part]:
    """Return the parts of one document, with or without its [eod]s: str, or uint16 codes [n].

    Text ids that the tokenizer does not fill, which a model may draw, become U+FFFD.

    Raises:
      ValueError: if a part mixes text and codes, or an id is a marker of the mask (unmask first).
    """
    ids = np.asarray(ids, np.int64)
    if len(ids) and ids[0] == EOD:
        ids = ids[1:]
    if len(ids) and ids[-1] == EOD:
        ids = ids[:-1]
    return [decode_part(part, tokenizer, vocab) for part in np.split(ids, np.flatnonzero(ids == BREAK))]


def decode_part(ids: np.ndarray, tokenizer: Tokenizer, vocab: Vocab) -> Part:
    """Return the text or the codes of one stretch; a <break> that opens it is left out."""
    ids = ids[1:] if len(ids) and ids[0] == BREAK else ids
    if len(ids) and vocab.is_image(ids).all():
        return (ids - vocab.image_start).astype(np.uint16)
    if not vocab.is_text(ids).all():
        wrong = int(ids[~vocab.is_text(ids)][0])
        raise ValueError(f"{vocab.name(wrong)} in a text part")
    return decode_text(ids, tokenizer, vocab)


def decode_text(ids: np.ndarray, tokenizer: Tokenizer, vocab: Vocab) -> str:
    """Return the text of ids [n]; unfilled entries of the vocabulary become U+FFFD."""
    pieces = np.asarray(ids, np.int64) - vocab.text_start
    holes = np.flatnonzero(pieces >= tokenizer.size)
    runs = np.split(pieces, holes)
    texts = [tokenizer.decode(run.tolist()) for run in (runs[0], *(run[1:] for run in runs[1:]))]
    return "\ufffd".join(texts)


# ------------------------------------------------------------------------------------------------------------- prompts


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What to condition on, in ids.

    Attributes:
      kind: Its name, one of `KINDS` or of `tasks.table.TASKS`.
      ids: uint16 [n].
      unconditional: uint16 [m], the stream of guidance: the same task without what the user asked for.
      produces: "image": codes; "text": text up to `stop`; "document": parts, breaks and at last [eod].
      stop: The id that ends the answer.
      known: int64 [k]: of each of the first k ids to come the one that is held, -1 where it is drawn: codes outside a
        region, and what ends rows of codes.
      hidden: The codes behind each sentinel that stands in its place in `ids`; 0 for text.
      unconditional_hidden: The same of `unconditional`.
      pictured: uint16 [k], the stream between these two: the pictures of `ids` without the text; None: `ids` has no
        pictures of its own, and this stream would be `unconditional`.
      pictured_hidden: The same of `pictured`.
      retrieved: How many ids behind the first [eod] are those of retrieved documents or examples, in all streams.
    """

    kind: str
    ids: np.ndarray
    unconditional: np.ndarray
    produces: str
    stop: int
    known: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    hidden: tuple[int, ...] = ()
    unconditional_hidden: tuple[int, ...] = ()
    pictured: np.ndarray | None = None
    pictured_hidden: tuple[int, ...] = ()
    retrieved: int = 0

    def streams(self, count: int) -> list[tuple[np.ndarray, tuple[int, ...]]]:
        """Return ids and hidden codes of each of `count` streams, the most conditioned first."""
        without = self.unconditional, self.unconditional_hidden
        between = without if self.pictured is None else (self.pictured, self.pictured_hidden)
        return [(self.ids, self.hidden), *([between] if count == 3 else []), without][:count]


def join(*pieces) -> np.ndarray:
    """Return single ids and arrays of ids end to end, uint16 [n]."""
    return np.concatenate([np.atleast_1d(p) for p in pieces]).astype(np.uint16)


Documents = Sequence[np.ndarray]
"""Retrieved documents, or examples: uint16 ids [n] each, without [eod]s."""


def shown(retrieved: Documents) -> np.ndarray:
    """Return `document <break> document <break> ...`, what stands behind the first [eod], uint16 [n]."""
    return join(np.zeros(0, np.uint16), *(piece for ids in retrieved for piece in (ids, BREAK)))


def text_to_image(text: str, tokenizer: Tokenizer, vocab: Vocab, retrieved: Documents = ()) -> Prompt:
    """`[eod] text <break>`, then one picture and [eod]. Unconditional: `[eod] <sentinel:0> <break>`.

    Here and in the other prompts, retrieved documents stand behind the first [eod], `[eod] document <break> ... text
    <break>`, in both streams: guidance keeps them and drops the query.
    """
    before = shown(retrieved)
    ids = join(EOD, before, text_ids(text, tokenizer, vocab), BREAK)
    without = join(EOD, before, vocab.sentinel(0), BREAK)
    return Prompt("text_to_image", ids, without, "image", EOD, unconditional_hidden=(0,), retrieved=len(before))


def unconditional(vocab: Vocab) -> Prompt:
    """`[eod] <sentinel:0> <break>`, then one picture and [eod]."""
    ids = join(EOD, vocab.sentinel(0), BREAK)
    return Prompt("unconditional", ids, ids, "image", EOD, hidden=(0,), unconditional_hidden=(0,))


def image_to_text(codes: np.ndarray, vocab: Vocab, retrieved: Documents = ()) -> Prompt:
    """`[eod] <sentinel:0> <break> IMG [eod] <sentinel:0>`, then the caption and <eoss>.

    Unconditional: a caption of no picture in particular, `[eod] <sentinel:0> <break> <sentinel:1> [eod] <sentinel:0>`.
    """
    first, second, before = vocab.sentinel(0), vocab.sentinel(1), shown(retrieved)
    ids = join(EOD, before, first, BREAK, image_ids(codes, vocab), EOD, first)
    without = join(EOD, before, first, BREAK, second, EOD, first)
    hidden = {"hidden": (0,), "unconditional_hidden": (0, len(codes))}
    return Prompt("image_to_text", ids, without, "text", EOSS, **hidden, retrieved=len(before))


def infill_text(
    before: str, after: str, codes: np.ndarray, tokenizer: Tokenizer, vocab: Vocab, retrieved: Documents = ()
) -> Prompt:
    """`[eod] before <sentinel:0> after <break> IMG [eod] <sentinel:0>`, then the missing words and <eoss>.

    Blanks belong to the word that follows: `after` keeps its leading one.

    Unconditional: that of `image_to_text`. It sees neither the picture nor the words around the gap, hence guidance
    pulls towards both; masking a part of the caption and the picture together is too rare in training to lean on.
    """
    whole = image_to_text(codes, vocab, retrieved)
    if not before and not after:
        return whole
    first = vocab.sentinel(0)
    text = join(text_ids(before, tokenizer, vocab), first, text_ids(after, tokenizer, vocab), BREAK)
    ids = join(EOD, shown(retrieved), text, image_ids(codes, vocab), EOD, first)
    return dataclasses.replace(whole, kind="infill_text", ids=ids)


def infill_image(
    text: str,
    codes: np.ndarray,
    region: np.ndarray,
    tokenizer: Tokenizer,
    vocab: Vocab,
    retrieved: Documents = (),
) -> Prompt:
    """`[eod] text <break> codes[:first] <sentinel:0> codes[last + 1:] [eod] <sentinel:0>`, then the span and <eoss>.

    The region is infilled as ONE span, from its first to its last code in reading order; the codes of that stretch
    that lie outside the region come back in `known`, to be held while decoding.

    Unconditional: `[eod] <sentinel:0> <break> codes[:first]`, then the same codes. Masking the caption as well would
    put `<sentinel:0> caption <eoss>` before the region's span, which would show the caption; so this stream draws the
    region causally. It sees neither the text nor what follows the region, hence guidance pulls towards both.

    Args:
      codes: [n] the picture's codes; those inside the region are not looked at.
      region: bool [n], true where a code is to be drawn.
    """
    ids, region = image_ids(codes, vocab), np.asarray(region, bool).reshape(-1)
    if len(region) != len(ids) or not region.any():
        raise UserError(f"region of {region.sum()} codes out of {len(region)}: must mark one of {len(ids)} codes")
    first, last = np.flatnonzero(region)[[0, -1]]
    sentinel, before = vocab.sentinel(0), shown(retrieved)
    start = join(EOD, before, text_ids(text, tokenizer, vocab), BREAK)
    prompt = join(start, ids[:first], sentinel, ids[last + 1 :], EOD, sentinel)
    without = join(EOD, before, sentinel, BREAK, ids[:first])
    known = np.where(region, -1, ids.astype(np.int64))[first : last + 1]
    return Prompt("infill_image", prompt, without, "image", EOSS, known, (len(known),), (0,), retrieved=len(before))


def continuation(parts: Sequence[Part], tokenizer: Tokenizer, vocab: Vocab, closed: bool = False) -> Prompt:
    """`[eod] part <break> part ...`, then more text and pictures up to [eod].

    Unconditional: every finished text is masked, `[eod] <sentinel:0> <break> IMG ...`; an unfinished one stays.

    Args:
      parts: May be empty: a document from nothing.
      closed: The last part is finished: a <break> follows it. A picture is always whole.
    """
    ids, without, masked = [EOD], [EOD], 0
    for i, part in enumerate(parts):
        end = [BREAK] if closed or i < len(parts) - 1 else []
        here = text_ids(part, tokenizer, vocab) if isinstance(part, str) else image_ids(part, vocab)
        ids += [here, end]
        hidden = isinstance(part, str) and end and len(here)
        without += [vocab.sentinel(masked) if hidden else here, end]
        masked += bool(hidden)
    return Prompt("continuation", join(*ids), join(*without), "document", EOD, unconditional_hidden=(0,) * masked)


# ------------------------------------------------------------------------------- what a masked document is a prefix of

KINDS = {
    "continuation": "E[^S]*E$",
    "text_to_image": "E(T?BIB)*T?BIE",
    "unconditional": "E(T?BIB)*SBIE",
    "image_to_text": "E(T?BIB)*SBIES",
    "image_to_text.unconditional": "E(T?BIB)*SBSES",
    "infill_text": "E(T?BIB)*(TST?|ST)BIES",
    "infill_image": "E(T?BIB)*T?B(ISI?|SI?)ES",
}
"""Prompt kind -> what a masked document looks like that begins with such a prompt and its answer.

E [eod], B <break>, S sentinel, X <eoss>, T and I runs of text and codes. Retrieved pairs, T?BIB, may stand before. The
unconditional streams are "unconditional" for pictures and "image_to_text.unconditional" for text. A picture's answer
must be whole, so `text_to_image` asks for the [eod] behind it.
"""


def skeleton(ids: np.ndarray, vocab: Vocab) -> str:
    """Return one letter per special token and per run of text or codes (see `KINDS`)."""
    ids = np.asarray(ids, np.int64)
    ranges = [vocab.text_start, vocab.image_start, vocab.sentinel_start, vocab.used]
    letters = np.where(ids < vocab.text_start, ids, EOSS + np.searchsorted(ranges, ids, "right"))
    run = (letters == EOSS + 1) | (letters == EOSS + 2)
    first = np.ones(len(ids), bool)
    first[1:] = (letters[1:] != letters[:-1]) | ~run[1:]
    return "".join("PEBXTIS?"[i] for i in letters[first])


def kinds(ids: np.ndarray, vocab: Vocab) -> list[str]:
    """Return the prompt kinds that a masked document, framed by [eod]s, teaches."""
    text = skeleton(ids, vocab)
    return [kind for kind, pattern in KINDS.items() if re.match(pattern, text)]
