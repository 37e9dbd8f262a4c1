"""A state machine over classes of tokens, so that a malformed document can never be drawn.

A row is in one mode; a table says which classes of tokens the mode allows and which mode follows. Counters close what a
table cannot: an image has exactly its number of codes, a stretch of text at most its number of tokens, a document ends
within its room. Sentinels, ids above the text tokenizer's real size, those that it never writes and the padding of the
embedding table belong to class NEVER, which no mode allows.

A document of Chameleon's form (arXiv 2405.09818) is written in stretches, each a row of its own: text until the end of
turn, of the document or <break>, the begin of a picture; then exactly the picture's codes. What stands between
stretches, <eoss> behind a picture, is no choice of the model's.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from cm3jax import vocab as vocabulary

PAD, EOD, BREAK, EOSS, TEXT, IMAGE, NEVER, TURN = range(8)
"""Classes of tokens; TURN: Chameleon's end of turn."""

DONE, CODES, SPAN_START, SPAN, PART_START, TEXT_PART, IMAGE_PART, IMAGE_END, TALK = range(9)
"""Modes: finished · a given number of codes, then finished · a masked span of text before and after its first token,
until <eoss> · an interleaved document: before a part, in a text, in an image, after an image, until <eod> · a stretch
of text of a document of Chameleon's form."""

RULES = {
    DONE: {PAD: DONE},
    CODES: {IMAGE: CODES},
    SPAN_START: {TEXT: SPAN},  # training never moves an empty span
    SPAN: {TEXT: SPAN, EOSS: DONE},
    PART_START: {TEXT: TEXT_PART, IMAGE: IMAGE_PART},
    TEXT_PART: {TEXT: TEXT_PART, BREAK: PART_START, EOD: DONE},
    IMAGE_PART: {IMAGE: IMAGE_PART},
    IMAGE_END: {BREAK: PART_START, EOD: DONE},
    TALK: {TEXT: TALK, TURN: DONE, EOD: DONE, BREAK: DONE},
}
"""mode -> {class allowed: next mode}. Another class, which only a held id can be, leaves the mode as it is."""

FULL = {CODES: DONE, IMAGE_PART: IMAGE_END}
"""mode -> the mode that follows when the last code is in."""


UNKNOWN = (0,)
"""sentencepiece's <unk>, which a tokenizer with byte pieces never writes."""


class State(NamedTuple):
    """Where each row stands."""

    mode: Int[Array, " b"]
    left: Int[Array, " b"]
    """Tokens that the part at hand may (text) or must (codes) still get."""
    room: Int[Array, " b"]
    """Interleaved documents: tokens that may still be written, <eod> or the end of turn included."""
    parts: Int[Array, " b"]
    """Interleaved documents: parts that may still be begun after a <break>; of Chameleon's form, pictures."""


@dataclasses.dataclass(frozen=True)
class Grammar:
    """The id space that rows may draw from.

    Attributes:
      text: Real size of the text tokenizer; ids above it are reserved and never drawn.
      image: Codes of an image.
      longest: Tokens of a text part at most, in interleaved documents.
      first, last: Ids [first, last) are the only ones that any row can need: logits outside are never looked at.
      unsaid: Pieces of the text tokenizer that are no text, and never drawn.
      turn: Id of the end of turn; 0: there is none.
    """

    vocab: vocabulary.Vocab
    text: int
    image: int
    longest: int
    first: int
    last: int
    unsaid: tuple[int, ...] = UNKNOWN
    turn: int = 0


def pictures(vocab: vocabulary.Vocab, text: int, image: int) -> Grammar:
    """Return the grammar of rows that only write codes."""
    return Grammar(vocab, text, image, 0, vocab.image_start, vocab.sentinel_start)


def captions(vocab: vocabulary.Vocab, text: int, image: int) -> Grammar:
    """Return the grammar of rows that only write text."""
    return Grammar(vocab, text, image, 0, 0, vocab.text_start + text)


def documents(vocab: vocabulary.Vocab, text: int, image: int, longest: int) -> Grammar:
    """Return the grammar of rows that write interleaved text and images."""
    return Grammar(vocab, text, image, longest, 0, vocab.sentinel_start)


def talk(vocab: vocabulary.Vocab, text: int, image: int, unsaid: tuple[int, ...], turn: int) -> Grammar:
    """Return the grammar of rows that write a stretch of text of a document of Chameleon's form."""
    return Grammar(vocab, text, image, 0, 0, max(vocab.text_start + text, turn + 1), unsaid, turn)


def start(mode, left=0, room=0, parts=0) -> State:
    """Return a state from int[b] values, or numbers for all rows; `mode` sets b."""
    mode = jnp.asarray(mode, jnp.int32)
    return State(mode, *(jnp.broadcast_to(jnp.asarray(x, jnp.int32), mode.shape) for x in (left, room, parts)))


@functools.cache
def classes(grammar: Grammar) -> np.ndarray:
    """Return the class of every id, int32[vocab.size]."""
    v = grammar.vocab
    ids = np.arange(v.size)
    table = np.full(v.size, NEVER, np.int32)
    table[[vocabulary.PAD, vocabulary.EOD, vocabulary.BREAK, vocabulary.EOSS]] = PAD, EOD, BREAK, EOSS
    table[v.is_text(ids) & (ids < v.text_start + grammar.text)] = TEXT
    table[v.text_start + np.array(grammar.unsaid, np.int64)] = NEVER
    table[v.is_image(ids)] = IMAGE
    if grammar.turn:
        table[grammar.turn] = TURN
    return table


def allowed(grammar: Grammar, state: State) -> Bool[Array, "b v"]:
    """Return which of the ids [grammar.first, grammar.last) may come next; a row that is done needs none."""
    return _permitted(grammar, state)[:, classes(grammar)[grammar.first : grammar.last]]


def step(grammar: Grammar, state: State, ids: Int[Array, " b"]) -> State:
    """Return the state after one more token a row, allowed by the state before or held."""
    kind = jnp.asarray(classes(grammar))[ids]
    begins, ends = state.mode == PART_START, kind == BREAK
    left = jnp.where(begins, jnp.where(kind == IMAGE, grammar.image, grammar.longest), state.left) - 1
    mode = jnp.asarray(_NEXT)[state.mode, kind]
    mode = jnp.where(left <= 0, jnp.asarray(_FULL)[mode], mode)
    return State(mode, left, state.room - 1, state.parts - ends)


def _permitted(grammar: Grammar, state: State) -> Bool[Array, "b 8"]:
    """Return the classes that may come next.

    In an interleaved document every choice leaves room to finish: a text token for <eod>, a <break> for a text token
    and <eod>, the first code for the other codes and <eod>. Of Chameleon's form, <break> for a picture, <eoss>, <eod>.
    """
    interleaved = state.mode >= PART_START
    budget = (state.left > 0) | (state.mode == PART_START)
    text = budget & (~interleaved | (state.room >= 2))
    image = (state.mode != PART_START) | (state.room >= grammar.image + 1)
    another = (state.parts > 0) & (state.room >= jnp.where(state.mode == TALK, grammar.image + 3, 3))
    yes = jnp.ones_like(text)
    return jnp.asarray(_ALLOWED)[state.mode] & jnp.stack([yes, yes, another, yes, text, image, yes, yes], axis=-1)


_ALLOWED = np.array([[kind in RULES[mode] for kind in range(TURN + 1)] for mode in range(len(RULES))])
_NEXT = np.array([[RULES[mode].get(kind, mode) for kind in range(TURN + 1)] for mode in range(len(RULES))], np.int32)
_FULL = np.array([FULL.get(mode, mode) for mode in range(len(RULES))], np.int32)
