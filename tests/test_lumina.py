"""Lumina-mGPT: a Chameleon whose pictures state their sides and end their rows, from an import to drawing and back."""

import dataclasses
import json
import re

import chameleons
import checkpoints
import jax.numpy as jnp
import numpy as np
import pytest

from cm3jax import config as configs
from cm3jax import foreign
from cm3jax.interop import chameleon, chameleon_vocab
from cm3jax.nn import decoder
from cm3jax.sample import generate
from cm3jax.tokenizers import turns
from cm3jax.types import UserError
from cm3jax.vocab import BREAK, EOD, EOSS

SIDE, GRID = 8, 4
CODES = GRID**2
GUIDED = configs.Sampling(temperature=0.0, guidance=4.0)
LENGTH = 160


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A checkpoint as Lumina's are published: Chameleon's files, and a setting that Chameleon has not."""
    folder = tmp_path_factory.mktemp("published")
    about = checkpoints.settings(num_hidden_layers=2, max_position_embeddings=LENGTH)
    checkpoints.hugging_face(folder, about | {chameleon.LUMINA: 1e-5})
    for path in (folder / "config.json", folder / "tokenizer.json"):
        text = path.read_text()
        for own, lumina in (("08194", "08799"), ("08195", "08802"), ("08196", "08801")):
            text = text.replace(f"<reserved{own}>", f"<reserved{lumina}>")
        path.write_text(text)
    return folder


@pytest.fixture(scope="module")
def run(published, tmp_path_factory):
    return foreign.bring(
        str(published), str(tmp_path_factory.mktemp("runs") / "run"), resolution=SIDE, say=lambda line: None
    )


@pytest.fixture(scope="module")
def generator(run):
    return generate.load(run, batch=1)


@pytest.fixture(scope="module")
def named(run, published):
    """What the published tokenizer calls each of our ids."""
    order = chameleon_vocab.load(run / "text" / "order.json")
    names = json.loads((published / "config.json").read_text())["vocabulary_map"]
    theirs = {i: name for name, i in names.items()}
    return lambda ids: [theirs.get(int(order.theirs[i])) for i in ids]


def codes(n=1, seed=0):
    return np.random.default_rng(seed).integers(0, chameleons.CODES, (n, CODES)).astype(np.uint16)


def test_an_import_knows_the_form_and_how_it_is_drawn(run, named):
    recipe = configs.load(run / "recipe.json")
    form = recipe.form
    assert (form.kind, form.pair, form.grid) == ("chameleon", "turn", GRID)
    assert named([form.side, form.line]) == ["<reserved08802>", "<reserved08799>"]
    assert form.drawing == "Generate an image of 8x8 according to the following prompt:\n{}"
    assert recipe.evaluate.draw == (configs.Sampling(top_k=2000, guidance=4.0),)


def test_prompts_and_documents_are_spelt_as_in_the_published_code(generator, named):
    form, vocab = generator.form, generator.vocab
    prompt = turns.text_to_image("a cat", generator.text, vocab, form)
    asked = named(turns.part_ids(form.drawing.replace("{}", "a cat"), generator.text, vocab, form))
    opened = ["<racm3:break>", "<reserved08802>", "<reserved08802>"]
    assert named(prompt.ids) == ["<s>", *asked, "<reserved08706>", *opened]
    assert named(prompt.unconditional) == opened and prompt.pictured is None
    one = codes()[0]
    rows = [(*map(chameleon_vocab.spelt, row), "<reserved08799>") for row in one.reshape(GRID, GRID).tolist()]
    document = turns.encode(["a cat", one], generator.text, vocab, form)
    assert named(document) == [*asked, "<reserved08706>", *opened, *(name for row in rows for name in row), "<eoss>"]
    text, back = turns.decode(np.concatenate([[form.begin], document, [EOD]]), generator.text, vocab, form)
    assert text == form.drawing.replace("{}", "a cat") and np.array_equal(back, one)
    with pytest.raises(UserError, match="a picture of 15 codes: must have 4 rows of 4"):
        turns.part_ids(one[1:], generator.text, vocab, form)


def scores(generator, ids, behind):
    """Return logits over the codes at each of the places of `behind`, without a cache."""
    whole = np.concatenate([ids, behind])
    row = jnp.asarray(np.pad(whole, (0, LENGTH - len(whole))), jnp.int32)[None]
    place = jnp.arange(LENGTH)[None]
    hidden, _ = generator.model.apply({"params": generator.params}, row, place, (place < len(whole)).astype(jnp.int32))
    found = np.asarray(decoder.logits(generator.params, generator.model.config, hidden))[0]
    found = found[len(ids) - 1 : len(whole) - 1]
    return found[:, generator.vocab.image_start : generator.vocab.sentinel_start]


@pytest.mark.parametrize("infilled", [False, True])
def test_greedy_with_guidance_is_the_argmax_without_a_cache_with_ends_of_rows_between(generator, infilled):
    form, vocab, one = generator.form, generator.vocab, codes()[0]
    if infilled:
        region = np.isin(np.arange(CODES), (6, 7, 9))
        prompt = turns.infill_image("a cat", one, region, generator.text, vocab, form)
        known = [*[vocab.image_start + one[8]], -1]
        assert prompt.known.tolist() == [-1, -1, form.line, *known]
        held, count = (8,), 4
    else:
        prompt, held, count = turns.text_to_image("a cat", generator.text, vocab, form), (), CODES
        assert (prompt.known.reshape(GRID, GRID + 1) == [-1] * GRID + [form.line]).all()
    (drawn,) = generator._codes([prompt], [len(prompt.known)], 0, GUIDED)
    assert drawn.shape == (count,)
    ids = prompt.known.copy()
    ids[ids != form.line] = vocab.image_start + drawn.astype(int)
    full, without = (scores(generator, stream, ids) for stream, _ in prompt.streams(2))
    free = prompt.known == -1
    assert free.sum() == count - len(held)
    np.testing.assert_array_equal((without + 4.0 * (full - without)).argmax(-1)[free], ids[free] - vocab.image_start)


def test_pictures_captions_boxes_and_pages(generator):
    pictures = generator.text_to_image(["a cat", "a"], 0)
    assert pictures.shape == (2, SIDE, SIDE, 3)
    assert len(generator.image_to_text(pictures, max_text=4)) == 2
    box = (0.0, 0.5, 0.5, 1.0)
    assert generator.infill_image(pictures[:1], ["a"], [box]).shape == (1, SIDE, SIDE, 3)
    page = generator.continue_document([pictures[0], "a"], max_parts=1, max_text=4)
    assert len(page) >= 2
    # A stretch of text that asks for a picture gets a whole one behind its sides.
    form, start = generator.form, turns.continuation(["a"], generator.text, generator.vocab, generator.form).ids
    calls = iter([[np.array([BREAK])], [np.array([EOD])]])
    talking = dataclasses.replace(generator)
    object.__setattr__(talking, "_talk", lambda *a, **k: next(calls))
    (row,) = talking._stretches([start], 1, 0, GUIDED, 4)
    drawn = row[len(start) :]
    assert drawn[:3].tolist() == [BREAK, form.side, form.side] and drawn[-2:].tolist() == [EOSS, EOD]
    assert len(drawn) == 3 + CODES + GRID + 2 and (drawn[3:-2].reshape(GRID, GRID + 1)[:, -1] == form.line).all()


def test_exported_and_imported_it_is_the_same(run, tmp_path):
    foreign.send(run, str(tmp_path / "out"), "hf", say=lambda line: None)
    assert not list((tmp_path / "out").glob("*processor_config.json")), "transformers' processor ends no rows"
    again = foreign.bring(str(tmp_path / "out"), str(tmp_path / "again"), resolution=SIDE, say=lambda line: None)
    assert configs.load(again / "recipe.json").form == configs.load(run / "recipe.json").form


def test_a_side_that_it_has_no_entry_for_is_refused(published, tmp_path):
    for pixels in (6, 12):
        with pytest.raises(UserError, match=f"no pictures of {pixels} px; set --resolution"):
            foreign.bring(str(published), str(tmp_path / "run"), resolution=pixels, say=lambda line: None)
    with pytest.raises(UserError, match="do not say how large its pictures are; set --resolution"):
        foreign.bring(str(published), str(tmp_path / "run"), say=lambda line: None)
    assert not (tmp_path / "run").exists()


def test_a_form_that_contradicts_itself_is_refused(run):
    recipe = configs.load(run / "recipe.json")
    for change, message in (
        ({"grid": 3}, "form.grid = 3: a picture of 8 px has 16 codes"),
        ({"line": recipe.vocab.image_start}, "that are no image codes"),
        ({"side": 0}, "form.side = 0"),
        ({"drawing": "a cat"}, "form.drawing = 'a cat': must have {}"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            dataclasses.replace(recipe, form=dataclasses.replace(recipe.form, **change))
