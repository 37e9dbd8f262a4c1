"""Laws of documents of Chameleon's form, and of drawing and writing them; a tiny model with random weights."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import talking_run
from talking_run import CODES, FORM, LENGTH, MODEL, RECIPE, SIDE, VOCAB

from cm3jax import config as configs
from cm3jax.data import packing, tokens
from cm3jax.nn import decoder
from cm3jax.sample import decode, generate
from cm3jax.sample import turns as drawing
from cm3jax.tokenizers import turns
from cm3jax.types import UserError
from cm3jax.vocab import BREAK, EOD, EOSS

CHAMELEON = configs.Sampling(temperature=0.7, top_p=0.9, guidance=3.0, image_guidance=1.2)
FREE = configs.Sampling(temperature=1.0, guidance=1.5, image_guidance=1.2)
TALKS = dataclasses.replace(FORM, pair="turn")


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    """Draws row by row: few programs to compile."""
    return generate.load(talking_run.make(tmp_path_factory.mktemp("run")), batch=1)


@pytest.fixture(scope="module")
def together(generator):
    """Draws four rows at one time."""
    return dataclasses.replace(generator, batch=4)


@pytest.fixture(scope="module")
def pictures():
    return list(np.random.default_rng(5).integers(0, 256, (3, SIDE, SIDE, 3), np.uint8))


def codes(n=1, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB.image, (n, CODES)).astype(np.uint16)


def same(a, b):
    return len(a) == len(b) and all(type(x) is type(y) and np.array_equal(x, y) for x, y in zip(a, b, strict=True))


# ----------------------------------------------------------------------------------------------------------- documents


@pytest.mark.parametrize("form", [FORM, TALKS])
def test_a_document_comes_back_from_its_ids(generator, form):
    one, two = codes(2)
    for parts in (["a red"], [one], ["a red", one], [one, "two"], ["a", one, two, "dots", one], ["", one]):
        ids = turns.encode(parts, generator.text, VOCAB, form)
        found = turns.decode(np.concatenate([[FORM.begin], ids, [EOD]]), generator.text, VOCAB, form)
        assert same(found, [p for p in parts if len(p)])
    assert turns.decode(np.zeros(0, int), generator.text, VOCAB, form) == []


def test_what_is_no_document_is_refused(generator):
    picture = [BREAK, *(VOCAB.image_start + codes()[0]), EOSS]
    for ids in (picture[1:], picture[:-1], [BREAK, EOSS], [VOCAB.sentinel(0)], picture[:4] + picture, [EOSS]):
        with pytest.raises(ValueError, match="no part of Chameleon's form"):
            turns.decode(np.array(ids), generator.text, VOCAB, FORM)
    with pytest.raises(UserError, match="a document without parts"):
        turns.encode([], generator.text, VOCAB, FORM)


@pytest.mark.parametrize("form", [FORM, TALKS])
def test_every_prompt_begins_a_row_as_training_lays_it_out(generator, form, tmp_path):
    one, two = codes(2)
    recipe = RECIPE.decoder.packing
    drawn = ["a red circle", one]
    asked = [one, form.request]  # and the end of turn, which only a request has
    region = np.arange(CODES) == 3
    for parts, prompt in (
        (drawn, turns.text_to_image(drawn[0], generator.text, VOCAB, form)),
        (drawn, turns.infill_image(drawn[0], one, region, generator.text, VOCAB, form)),
        ([*drawn, "two", two], turns.continuation(["a red circle", one], generator.text, VOCAB, FORM)),
        (asked, turns.image_to_text(one, generator.text, VOCAB, form)),
    ):
        if prompt.kind == "continuation" and form is TALKS:
            continue
        ids = turns.encode(parts, generator.text, VOCAB, form)
        tokens.write(tmp_path, "train", [("one", ids)])
        stored = tokens.Tokens(tmp_path, "train")
        row = packing.read(packing.plan(stored.lengths, 0, 0, recipe), 0, stored, recipe)[0]
        n = len(prompt.ids) - (prompt.kind == "image_to_text")
        np.testing.assert_array_equal(row[:n], prompt.ids[:n])
        assert row[0] == FORM.begin and row[-1] == EOD


def test_the_streams_drop_what_chameleons_code_drops(generator):
    one = codes()[0]
    before = turns.continuation(["a red", one, "circle"], generator.text, VOCAB, FORM, closed=True).ids
    prompt = turns.picture(np.concatenate([before, [BREAK]]), VOCAB, FORM)
    shown = [FORM.begin, BREAK, *(VOCAB.image_start + one), EOSS, BREAK]
    assert prompt.pictured.tolist() == shown and prompt.unconditional.tolist() == [FORM.begin, BREAK]
    assert [ids.tolist() for ids, _ in prompt.streams(3)] == [prompt.ids.tolist(), shown, [FORM.begin, BREAK]]
    assert turns.text_to_image("a red", generator.text, VOCAB, FORM).pictured is None


# ------------------------------------------------------------------------------------------------------------- drawing


def scores(generator, prompt, ids):
    """Return float32 logits over the codes after a prompt and each of the ids drawn, without a cache."""
    row = np.concatenate([prompt, ids])
    padded = np.zeros((1, LENGTH), np.int32)
    padded[0, : len(row)] = row
    hidden = uncached(generator.model, generator.params, padded, np.int32(len(row)))
    logits = np.asarray(hidden)[0, len(prompt) - 1 : len(row) - 1]
    return logits[:, VOCAB.image_start : VOCAB.sentinel_start]


@jax.jit
def _forward(params, row, end):
    place = jnp.arange(LENGTH)[None]
    net = decoder.Decoder(MODEL, VOCAB.size, LENGTH)
    hidden, _ = net.apply({"params": params}, row, place, (place < end).astype(jnp.int32))
    return decoder.logits(params, MODEL, hidden)


def uncached(model, params, row, end):
    return _forward(params, row, end)


def interleaved_prompts(generator):
    """Three prompts for a picture: with a picture before, with none, with two."""
    one, two = codes(2)
    parts = [["a red", one, "blue"], ["two green dots"], [one, "a", two]]
    return [
        turns.picture(np.concatenate([turns.continuation(p, generator.text, VOCAB, FORM).ids, [BREAK]]), VOCAB, FORM)
        for p in parts
    ]


def test_greedy_with_three_streams_is_the_argmax_of_the_mixed_streams_without_a_cache(generator):
    prompts = interleaved_prompts(generator)
    greedy = dataclasses.replace(CHAMELEON, temperature=0.0)
    for prompt, drawn in zip(prompts, generator._codes(prompts, [CODES] * 3, 0, greedy), strict=True):
        ids = VOCAB.image_start + drawn.astype(int)
        full, image, without = (scores(generator, p, ids) for p, _ in prompt.streams(3))
        mixed = without + 1.2 * (image - without) + 3.0 * (full - image)
        np.testing.assert_array_equal(mixed.argmax(-1), drawn)


def test_equal_weights_are_two_streams_and_weights_of_one_are_none(generator):
    prompts, draw = (
        interleaved_prompts(generator),
        lambda **k: generator._codes(prompts, [CODES] * 3, 1, configs.Sampling(temperature=0.0, **k)),
    )
    full = draw()
    assert decode.streams(configs.Sampling(guidance=1.5, image_guidance=1.5), True) == 2
    assert decode.streams(configs.Sampling(guidance=1.0, image_guidance=1.0), True) == 1
    assert decode.streams(CHAMELEON, True) == 3 and decode.streams(CHAMELEON, False) == 2
    np.testing.assert_array_equal(draw(guidance=1.5, image_guidance=1.5), draw(guidance=1.5))
    np.testing.assert_array_equal(draw(guidance=1.0, image_guidance=1.0), full)
    # and in the limit of the three-stream program itself
    near = draw(guidance=1.5, image_guidance=1.5 + 1e-6)
    np.testing.assert_array_equal(near, draw(guidance=1.5))
    assert (np.array(draw(guidance=1.5, image_guidance=0.2)) != np.array(near)).any()


def test_a_row_alone_is_the_row_in_a_batch_with_three_streams(generator, together):
    prompts = interleaved_prompts(generator)
    batch = together._codes(prompts, [CODES] * 3, 3, CHAMELEON)
    for i, prompt in enumerate(prompts):
        alone = generator._codes([prompt], [CODES], 3, CHAMELEON, numbers=[i])[0]
        if prompt.pictured is not None:  # else it is drawn by two streams alone: the same up to rounding
            np.testing.assert_array_equal(alone, batch[i])


def test_a_caption_becomes_a_picture(generator):
    prompts = ["a red circle", "", "a blue square and two green dots"]
    first = generator.text_to_image(prompts, 4, CHAMELEON)
    assert first.shape == (3, SIDE, SIDE, 3) and first.dtype == np.uint8
    np.testing.assert_array_equal(first[:1], generator.text_to_image(prompts[:1], 4, CHAMELEON))
    assert (first != generator.text_to_image(prompts, 5, CHAMELEON)).any()


def test_captions_answer_the_request_within_their_length(generator, pictures):
    for sampling in (generate.GREEDY, FREE):
        found = generator.image_to_text(pictures, 0, sampling, max_text=5)
        assert len(found) == 3 and all(isinstance(x, str) for x in found)
    other = generator.asking("two green dots")
    assert other.image_to_text(pictures, max_text=9) != generator.image_to_text(pictures, max_text=9)


def test_picture_infilling_changes_only_codes_in_the_box(generator, pictures, monkeypatch):
    before, seen = generator.encode(pictures), []
    monkeypatch.setattr(type(generator.image), "decode", lambda self, codes: seen.append(np.array(codes)) or codes)
    boxes = [(0.25, 0.25, 0.75, 0.75)] * 3
    generator.infill_image(pictures, ["a red", "", "two"], boxes, 0, FREE)
    changed, inside = seen[-1] != before, generator.region(boxes[0])
    assert not (changed & ~inside).any() and changed.any()


# ------------------------------------------------------------------------------------------- text and pictures by turns


def whole(ids, longest, given):
    """Return whether ids are a document to its end, whose new texts are not too long."""
    word = "".join(
        "B" if i == BREAK else "X" if i == EOSS else "E" if i in (EOD, FORM.turn) else "I" if VOCAB.is_image(i) else "T"
        for i in ids[given:].tolist()
    )
    return re.fullmatch(f"T{{0,{longest}}}(BI{{{CODES}}}XT{{0,{longest}}})*E", word)


@pytest.mark.slow
def test_an_interleaved_document_is_always_whole_and_ends_within_its_row(generator):
    one, longest = codes()[0], 7
    rows = [
        turns.continuation(parts, generator.text, VOCAB, FORM, True).ids
        for parts in (["a red"], [one, "two"], [], ["x" * (LENGTH - 5)])
    ]
    pictures = 0
    for seed in range(4):
        loud = dataclasses.replace(generator, params={**generator.params, "head": favoured(generator, BREAK, seed)})
        for i, ids in enumerate(loud._stretches(list(rows), 3, seed, FREE, longest)):
            assert whole(ids, longest, len(rows[i])) and len(ids) <= LENGTH
            assert ids[: len(rows[i])].tolist() == rows[i].tolist()
            pictures += int((ids[len(rows[i]) :] == BREAK).sum())
            drawn = np.unique(ids[len(rows[i]) :])
            text = drawn[VOCAB.is_text(drawn) & (drawn != FORM.turn)] - VOCAB.text_start
            assert (text < generator.text.size).all() and 0 not in text
    assert pictures > 8


def favoured(generator, i, seed):
    """Return the output layer with a random row for id i, so that it is drawn more or less often."""
    head = generator.params["head"]
    return head.at[i].set(jnp.asarray(1.5 * np.random.default_rng(seed).standard_normal(head.shape[1]), head.dtype))


@pytest.mark.slow
def test_an_interleaved_row_alone_is_the_row_in_a_batch(generator):
    prompts = [["two", "green dots"], ["a red circle"], []]
    loud = dataclasses.replace(generator, params={**generator.params, "head": favoured(generator, BREAK, 1)})
    together = dataclasses.replace(loud, batch=4)
    for seed in range(2):
        batch = together.interleave(prompts, 2, seed, FREE, max_text=6)
        assert same(loud.continue_document(prompts[0], 2, seed, FREE, max_text=6), batch[0])


def test_a_document_begins_with_what_was_given(generator, pictures):
    found = generator.continue_document([pictures[0], "a red"], 1, 0, FREE, 6)
    assert found[1].startswith("a red")
    np.testing.assert_array_equal(found[0], pictures[0])
    closed = generator.continue_document([pictures[0], "a red"], 1, 0, FREE, 6, closed=True)
    assert closed[1] == "a red"


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda g, p: g.infill_text(p[:1], ["a <mask>"]), "trained without masks and fills no gap in a text"),
        (lambda g, p: g.text_to_image(["red"], retrieved=[[codes()[0]]]), "documents: a model of form chameleon"),
        (lambda g, p: g.interleave([["x" * 200]]), "prompt 0: 201 tokens, but the model's row of 80 leaves 79"),
        (lambda g, p: g.interleave([["x"]], pictures=-1), "pictures = -1, max_text = 96: must be at least 0 and 1"),
        (lambda g, p: g.image_to_text(p, max_text=0), "max_text = 0: must be at least 1"),
    ],
)
def test_a_users_mistake_is_one_clear_line(generator, pictures, call, message):
    with pytest.raises(UserError) as error:
        call(generator, pictures)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"form.turn": 1}, "form.turn = 1: must be an id of the vocabulary's text, 4 to 303"),
        ({"decoder.mask.spans": 1.0}, "decoder.mask.spans = 1.0: must be 0 where documents are of form chameleon"),
        ({"decoder.packing.opening": 9}, "decoder.packing.opening = 9: must be 302 where documents are of form"),
        ({"form": {}}, "decoder.packing.opening = 302: a document of form cm3leon opens with [eod], 1"),
        ({"decoder.packing.kind": "chop"}, "documents that open with another id than they close with need"),
    ],
)
def test_settings_that_the_form_does_not_allow_are_refused(change, message):
    content = configs.to_json(RECIPE)
    for path, value in change.items():
        *folders, name = path.split(".")
        place = content
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = value
    with pytest.raises(UserError) as error:
        configs.from_json(configs.Recipe, content)
    assert message in str(error.value)


def test_the_generator_of_this_form_is_of_its_own_kind(generator):
    assert isinstance(generator, drawing.Generator) and generator.form == FORM
