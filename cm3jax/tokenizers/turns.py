"""Documents of Chameleon's form (arXiv 2405.09818) <-> ids in the one id space, and its prompts.

    <s> text <break> code code ... code <eoss> text ... </s>

Text and pictures follow one another as they come; <break> begins a picture and <eoss> ends it, </s> is [eod]. Between
a request and its answer, and behind the answer, may stand the end of turn. Nothing is masked: a prompt is the beginning
of a document. What the streams of guidance drop is as in Chameleon's published code: the one between keeps the pictures
and no text, the last one nothing. Imports no jax.

Lumina-mGPT (arXiv 2408.02657 §2.2; Alpha-VLLM/Lumina-mGPT, lumina_mgpt/data/item_processor.py), which `form.grid`
tells, states a picture's height and width and ends each row of its codes; its stream without a prompt begins at
<break>:

    <s> Generate an image of 768x768 according to the following prompt:\n text <turn> <break> side side
    code ... code <line> code ... code <line> ... <eoss> <turn> </s>
"""

from collections.abc import Sequence

import numpy as np

from cm3jax.config import Form
from cm3jax.tokenizers import document
from cm3jax.tokenizers.document import Part, Prompt
from cm3jax.tokenizers.text import Tokenizer
from cm3jax.types import UserError
from cm3jax.vocab import BREAK, EOD, EOSS, Vocab


def encode(parts: Sequence[Part], tokenizer: Tokenizer, vocab: Vocab, form: Form) -> np.ndarray:
    """Return the ids of a document, uint16 [n], without <s> and </s>, which packing adds.

    With `form.pair` "turn" the end of turn stands behind a text that opens the document, if anything follows it.

    Raises:
      UserError: if there is no part, a picture has no codes or codes out of range, or the tokenizer is too large.
    """
    if not len(parts):
        raise UserError("a document without parts; give it at least one text or picture")
    opens = len(parts) > 1 and isinstance(parts[0], str)
    if opens and not isinstance(parts[1], str):
        parts = [form.drawing.replace("{}", parts[0]), *parts[1:]]
    pieces = [part_ids(part, tokenizer, vocab, form) for part in parts]
    if opens and form.pair == "turn":
        pieces.insert(1, np.array([form.turn], np.uint16))
    return document.join(*pieces)


def part_ids(part: Part, tokenizer: Tokenizer, vocab: Vocab, form: Form) -> np.ndarray:
    """Return the ids of a text, or of a picture between its marks, uint16 [n]."""
    if isinstance(part, str):
        return document.text_ids(part, tokenizer, vocab)
    return document.join(opening(form), lines(document.image_ids(part, vocab), form), EOSS)


def opening(form: Form) -> list[int]:
    """Return the ids before a picture's codes."""
    return [BREAK, form.side, form.side] if form.grid else [BREAK]


def lines(ids: np.ndarray, form: Form) -> np.ndarray:
    """Return the ids of a whole picture's codes with what ends their rows.

    Raises:
      UserError: if the form has rows, and this is another number of codes.
    """
    if not form.grid:
        return ids
    if len(ids) != form.grid**2:
        raise UserError(f"a picture of {len(ids)} codes: must have {form.grid} rows of {form.grid}, as form.grid says")
    return np.insert(ids.reshape(form.grid, form.grid), form.grid, form.line, axis=1).reshape(-1)


def decode(ids: np.ndarray, tokenizer: Tokenizer, vocab: Vocab, form: Form) -> list[Part]:
    """Return the parts of a document: str, or uint16 codes [n]. Neighbouring texts are one, ends of turns are left out.

    Raises:
      ValueError: if a picture is not between its marks, or an id stands in no document of this form.
    """
    ids = np.asarray(ids, np.int64)
    between = (form.side, form.line) if form.grid else ()
    ids = ids[~np.isin(ids, (form.begin, form.turn, EOD, *between))]
    parts = []
    for piece in np.split(ids, np.flatnonzero(ids == BREAK)):  # each but the first begins with a picture
        codes, text, end = None, piece, np.flatnonzero(piece == EOSS)
        if len(end) and piece[0] == BREAK:
            codes, text = piece[1 : end[0]], piece[end[0] + 1 :]
        if not vocab.is_text(text).all() or not (codes is None or (len(codes) and vocab.is_image(codes).all())):
            raise ValueError(f"{' '.join(vocab.name(i) for i in piece[:8].tolist())} ...: no part of Chameleon's form")
        parts += [] if codes is None else [(codes - vocab.image_start).astype(np.uint16)]
        parts += [document.decode_text(text, tokenizer, vocab)] if len(text) else []
    return parts


# ------------------------------------------------------------------------------------------------------------- prompts


def text_to_image(text: str, tokenizer: Tokenizer, vocab: Vocab, form: Form) -> Prompt:
    """`<s> text <break>`, then one picture and <eoss>; with `form.pair` "turn" an end of turn before <break>."""
    turn, asked = [form.turn] if form.pair == "turn" else [], form.drawing.replace("{}", text)
    ids = document.join(form.begin, document.text_ids(asked, tokenizer, vocab), turn, BREAK)
    return picture(ids, vocab, form, "text_to_image")


def picture(ids: np.ndarray, vocab: Vocab, form: Form, kind: str = "continuation") -> Prompt:
    """The beginning of a document, up to the <break> of a picture that is to be drawn.

    Guidance: `pictured` keeps <s>, the pictures and their marks, `unconditional` is `<s> <break>`. With `form.grid` the
    sides follow <break>, what ends the rows is known, `unconditional` begins at <break>, and nothing is in between.
    """
    ids = np.asarray(ids, np.uint16)
    if form.grid:
        known = lines(np.full(form.grid**2, -1), form)
        return Prompt(kind, document.join(ids[:-1], opening(form)), document.join(opening(form)), "image", EOSS, known)
    shown = ids[(ids == form.begin) | (ids == BREAK) | (ids == EOSS) | vocab.is_image(ids)]
    pictured = shown if vocab.is_image(ids).any() else None
    return Prompt(kind, ids, document.join(form.begin, BREAK), "image", EOSS, pictured=pictured)


def infill_image(
    text: str, codes: np.ndarray, region: np.ndarray, tokenizer: Tokenizer, vocab: Vocab, form: Form
) -> Prompt:
    """`<s> text <break> codes[:first]`, then the codes from the region's first to its last.

    There are no masks, so what is drawn sees the codes before it and none behind the region. Those of the stretch that
    lie outside the region come back in `known`. Unconditional: the same without the text.

    Args:
      codes, region: As for `document.infill_image`.
    """
    ids, region = document.image_ids(codes, vocab), np.asarray(region, bool).reshape(-1)
    if len(region) != len(ids) or not region.any():
        raise UserError(f"region of {region.sum()} codes out of {len(region)}: must mark one of {len(ids)} codes")
    whole = text_to_image(text, tokenizer, vocab, form)
    known = lines(np.where(region, -1, ids.astype(np.int64)), form)
    first, last = np.flatnonzero(known == -1)[[0, -1]]
    before, known = lines(ids, form)[:first], known[first : last + 1]
    streams = (document.join(stream, before) for stream in (whole.ids, whole.unconditional))
    return Prompt("infill_image", *streams, "image", EOSS, known)


def image_to_text(codes: np.ndarray, tokenizer: Tokenizer, vocab: Vocab, form: Form) -> Prompt:
    """`<s> <break> IMG <eoss> request <turn>`, then the caption and the end of turn. Unconditional: without IMG."""
    request = document.join(document.text_ids(form.request, tokenizer, vocab), form.turn)
    ids = document.join(form.begin, part_ids(codes, tokenizer, vocab, form), request)
    return Prompt("image_to_text", ids, document.join(form.begin, request), "text", form.turn)


def continuation(parts: Sequence[Part], tokenizer: Tokenizer, vocab: Vocab, form: Form, closed: bool = False) -> Prompt:
    """`<s> part part ...`, then text and pictures up to the end of turn or of the document. No guidance for text.

    Args:
      parts: May be empty: a document from nothing.
      closed: The parts are a request: the end of turn follows them.
    """
    pieces = [part_ids(part, tokenizer, vocab, form) for part in parts]
    ids = document.join(form.begin, *pieces, *([form.turn] if closed and len(parts) else []))
    return Prompt("continuation", ids, ids, "document", form.turn)
