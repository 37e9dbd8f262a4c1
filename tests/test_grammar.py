"""Laws of the grammar: what it lets out is always a whole document."""

import functools
import re

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given

from cm3jax.sample import filters, grammar
from cm3jax.vocab import BREAK, EOD, EOSS, PAD, Vocab

VOCAB, TEXT, IMAGE, LONGEST = Vocab(text=11, image=7, sentinels=3, multiple=5), 8, 4, 5
DOCUMENTS = grammar.documents(VOCAB, TEXT, IMAGE, LONGEST)
B = 6
LETTERS = np.array(list("PEBXTI?"))


@functools.partial(jax.jit, static_argnums=(0, 3))
def write(rules, state, favourite, steps):
    """Draw `steps` ids a row, one id a row being the favourite; return the state and the ids [b, steps]."""
    logits = jnp.where(jnp.arange(rules.first, rules.last) == favourite[:, None], jnp.inf, 0.0)

    def body(state, i):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), i), len(state.mode))
        ids = rules.first + filters.draw(logits, grammar.allowed(rules, state), keys)
        ids = jnp.where(state.mode == grammar.DONE, PAD, ids)
        return grammar.step(rules, state, ids), ids

    state, ids = jax.lax.scan(body, state, jnp.arange(steps))
    return state, ids.T


def word(ids):
    """One letter per token; "?" is one that must never be drawn."""
    return "".join(LETTERS[grammar.classes(DOCUMENTS)[ids]])


def test_every_id_has_the_class_that_the_vocabulary_gives_it():
    kinds = grammar.classes(DOCUMENTS)
    assert word([PAD, EOD, BREAK, EOSS]) == "PEBX" and len(kinds) == VOCAB.size
    assert (kinds == grammar.TEXT).sum() == TEXT - 1 and (kinds == grammar.IMAGE).sum() == VOCAB.image
    assert word(range(VOCAB.text_start + TEXT, VOCAB.image_start)) == "???"
    assert set(word(range(VOCAB.sentinel_start, VOCAB.size))) == {"?"}


FAVOURITES = st.lists(st.integers(0, VOCAB.size - 1), min_size=B, max_size=B).map(np.array)


def numbers(low, high):
    return st.lists(st.integers(low, high), min_size=B, max_size=B).map(np.array)


@given(FAVOURITES, numbers(2, 19), numbers(0, 3))
def test_an_interleaved_document_is_always_whole(favourite, room, parts):
    starts = [grammar.PART_START, grammar.TEXT_PART, grammar.IMAGE_END] * (B // 3)
    state, ids = write(DOCUMENTS, grammar.start(starts, left=2, room=room, parts=parts), favourite, 20)
    assert (state.mode == grammar.DONE).all()
    part = f"(T{{1,{LONGEST}}}|I{{{IMAGE}}})"
    for row, first, fits, more in zip(np.asarray(ids), [part, "T{0,2}", ""] * (B // 3), room, parts, strict=True):
        text = word(row).rstrip("P")
        assert re.fullmatch(f"{first}(B{part}){{0,{more}}}E", text) and len(text) <= fits


@given(FAVOURITES, numbers(1, 6))
def test_a_span_of_text_ends_by_eoss_within_its_length(favourite, longest):
    rules = grammar.captions(VOCAB, TEXT, IMAGE)
    state, ids = write(rules, grammar.start([grammar.SPAN_START] * B, left=longest), favourite, 7)
    assert (state.mode == grammar.DONE).all()
    assert all(re.fullmatch(f"T{{1,{n}}}XP*", word(row)) for row, n in zip(np.asarray(ids), longest, strict=True))


@given(FAVOURITES, numbers(1, 9))
def test_a_picture_has_exactly_its_codes(favourite, counts):
    rules = grammar.pictures(VOCAB, TEXT, IMAGE)
    state, ids = write(rules, grammar.start([grammar.CODES] * B, left=counts), favourite, 9)
    assert (state.mode == grammar.DONE).all()
    assert [word(row) for row in np.asarray(ids)] == ["I" * n + "P" * (9 - n) for n in counts]


def test_every_mode_always_lets_something_through():
    modes = range(1, len(grammar.RULES))
    mode, room, left, parts = (x.reshape(-1) for x in np.meshgrid(modes, range(1, 12), range(4), range(3)))
    counting = np.isin(mode, (grammar.CODES, grammar.IMAGE_PART, grammar.SPAN_START))
    reachable = (left > 0) | ~counting
    reachable &= (room >= 2) | (mode != grammar.PART_START)  # a <break> is drawn only where two more tokens fit
    state = grammar.start(mode[reachable], left[reachable], room[reachable], parts[reachable])
    assert grammar.allowed(DOCUMENTS, state).any(-1).all()


def test_a_finished_row_stays_finished():
    state = grammar.step(DOCUMENTS, grammar.start([grammar.DONE], left=0, room=0), jnp.array([PAD]))
    assert state.mode.tolist() == [grammar.DONE]
