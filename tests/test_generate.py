"""Laws of prompts in, pictures and text out; tiny models with random weights."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import random_run

from cm3jax import config as configs
from cm3jax.data import packing
from cm3jax.nn import decoder
from cm3jax.sample import decode, generate, grammar
from cm3jax.tokenizers import document
from cm3jax.tokenizers import image as images
from cm3jax.types import UserError
from cm3jax.vocab import Vocab

VOCAB = Vocab(text=300, image=11, sentinels=4, multiple=8)
SIDE, CODES, LENGTH = 12, 9, 72
NET = configs.VQGAN(patch=4, width=8, multipliers=(1,), encoder_blocks=1, decoder_blocks=1, attention=(), z=3)
MODEL = configs.Decoder(layers=1, width=16, heads=2, position="both", dtype="float32")
RECIPE = configs.Recipe(
    vocab=VOCAB,
    prepare=configs.Prepare(resolution=SIDE),
    image=configs.Image(model=NET),
    decoder=configs.DecoderStage(model=MODEL, packing=configs.Packing(length=LENGTH)),
)
GUIDED = configs.Sampling(method="mixture", temperature=0.9, top_p=0.95, guidance=2.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder, with what `load` needs and nothing else."""
    return random_run.make(
        tmp_path_factory.mktemp("run"), RECIPE, ["a red circle", "a blue square", "two green dots"] * 3
    )


@pytest.fixture(scope="module")
def generator(run):
    return generate.load(run, batch=2)


@pytest.fixture(scope="module")
def pictures():
    return list(np.random.default_rng(5).integers(0, 256, (3, SIDE, SIDE, 3), np.uint8))


NO_SPANS = np.zeros((0, 2), np.int64)
PROMPTS = ["a red circle", "", "a blue square and two green dots"]


def test_a_picture_depends_on_seed_and_place_not_on_the_batch(generator):
    first = generator.text_to_image(PROMPTS, 4, GUIDED)
    assert first.shape == (3, SIDE, SIDE, 3) and first.dtype == np.uint8
    wider = dataclasses.replace(generator, batch=4).text_to_image(PROMPTS, 4, GUIDED)
    np.testing.assert_array_equal(first, wider)
    np.testing.assert_array_equal(first[:1], generator.text_to_image(PROMPTS[:1], 4, GUIDED))
    assert (first != generator.text_to_image(PROMPTS, 5, GUIDED)).any()


def test_captions_are_text_within_their_length(generator, pictures):
    for sampling in (generate.GREEDY, configs.Sampling(temperature=1.0, guidance=1.5)):
        captions = generator.image_to_text(pictures, 0, sampling, max_text=5)
        assert len(captions) == 3
        assert all(isinstance(caption, str) and caption for caption in captions)
    assert len(generator.text.encode(captions[0])) <= 5 * 4  # bytes that are no UTF-8 come back as U+FFFD, 3 bytes each


def test_text_infilling_keeps_what_is_around_the_mask(generator, pictures):
    found = generator.infill_text(pictures, ["a <mask> circle", "<mask> circle", "a red <mask>"], max_text=4)
    assert found[0].startswith("a") and found[0].endswith(" circle") and len(found[0]) > len("a circle")
    assert found[1].endswith(" circle") and found[2].startswith("a red")


def test_picture_infilling_changes_only_codes_in_the_box(generator, pictures, monkeypatch):
    before, seen = generator.encode(pictures), []
    monkeypatch.setattr(images.Tokenizer, "decode", lambda self, codes: seen.append(np.array(codes)) or codes)
    boxes = [(0.34, 0.0, 1.0, 0.6), (4, 4, 8, 8), (0.0, 0.0, 1.0, 1.0)]
    changed = np.zeros((3, CODES), bool)
    for seed in range(4):
        generator.infill_image(pictures, PROMPTS, boxes, seed, GUIDED)
        changed |= seen[-1] != before
    inside = np.stack([generator.region(box) for box in boxes])
    assert not (changed & ~inside).any()
    assert changed.any(-1).all() and changed[2].sum() >= CODES - 1


def test_a_box_touches_the_codes_that_it_overlaps(generator):
    grid = lambda *box: generator.region(box).reshape(3, 3).astype(int).tolist()  # noqa: E731
    assert grid(0.0, 0.0, 1 / 3, 1 / 3) == [[1, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert grid(4, 0, 9, 4) == [[0, 1, 1], [0, 0, 0], [0, 0, 0]]
    assert grid(0, 5, 12, 6) == [[0, 0, 0], [1, 1, 1], [0, 0, 0]]


def test_a_continued_document_begins_with_what_was_given(generator, pictures):
    for seed in range(6):
        found = generator.continue_document(["a red", pictures[0]], 3, seed, max_text=6)
        assert found[0] == "a red" and len(found) <= 5
        np.testing.assert_array_equal(found[1], pictures[0])
        assert all(isinstance(p, str) or p.shape == (SIDE, SIDE, 3) for p in found)
        assert generator.continue_document(["a red"], 0, seed, max_text=6)[0].startswith("a red")
        assert len(generator.continue_document(max_parts=1, seed=seed, max_text=6)) == 1
        closed = generator.continue_document(["a red"], 1, seed, max_text=6, closed=True)
        assert closed[0] == "a red" and len(closed) == 2


def test_pictures_of_another_size_are_cropped(generator, pictures):
    tall = np.pad(pictures[0], ((4, 4), (0, 0), (0, 0)))
    np.testing.assert_array_equal(generator.encode([tall]), generator.encode(pictures[:1]))


def test_repeated_calls_do_not_compile_again(generator, pictures):
    generator.text_to_image(PROMPTS, 0, GUIDED)
    generator.image_to_text(pictures, max_text=5)
    before = decode.decode._cache_size()
    generator.text_to_image(PROMPTS[::-1], 9, dataclasses.replace(GUIDED, temperature=0.4, guidance=3.0))
    generator.image_to_text(pictures[:2], 3, max_text=9)
    assert decode.decode._cache_size() == before


def test_no_prompts_give_no_answers(generator):
    assert generator.text_to_image([]).shape == (0, SIDE, SIDE, 3)
    assert generator.image_to_text([]) == []


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda g, p: g.text_to_image(["x" * 200]), "prompt 0: 202 tokens, but the model's row of 72 leaves 63"),
        (
            lambda g, p: g.text_to_image(["red"], retrieved=[documents(g, p) * 4]),
            "of which 108 of documents before it, but the model's row of 72 leaves 63 before an answer of 9; shorten",
        ),
        (lambda g, p: g.text_to_image(["red"], retrieved=[]), "1 prompts, 0 lists_of_retrieved_documents: must be as"),
        (lambda g, p: g.infill_text(p[:1], ["no mask"]), "caption 'no mask': has 0 <mask>; must have exactly one"),
        (lambda g, p: g.infill_text(p, ["<mask>"]), "3 pictures, 1 captions: must be as many of each"),
        (lambda g, p: g.infill_image(p[:1], [""], [(0.5, 0.0, 1.5, 1.0)]), "box (0.5, 0.0, 1.5, 1.0): must be x0, y0"),
        (lambda g, p: g.infill_image(p[:1], [""], [(3, 3, 3, 9)]), "in pixels 0 to 12, with x0 < x1 and y0 < y1"),
        (
            lambda g, p: g.image_to_text([p[0][..., 0]]),
            "picture of shape (12, 12), uint8: must be uint8 [height, width",
        ),
        (lambda g, p: g.image_to_text(p, max_text=0), "max_text = 0: must be at least 1"),
        (lambda g, p: g.continue_document(max_parts=0), "max_parts = 0"),
        (lambda g, p: g.asking("what?"), "request 'what?': a model of form cm3leon is asked nothing"),
        (lambda g, p: generate.load("nowhere"), "run 'nowhere': no recipe.json there"),
    ],
)
def test_a_users_mistake_is_one_clear_line(generator, pictures, call, message):
    with pytest.raises(UserError) as error:
        call(generator, pictures)
    assert message in str(error.value) and "\n" not in str(error.value)


def documents(generator, pictures, texts=("a red circle", "two")):
    """Return the ids of pairs of a text and a picture."""
    return [
        document.encode([text, codes], generator.text, VOCAB)
        for text, codes in zip(texts, generator.encode(pictures[: len(texts)]), strict=True)
    ]


@pytest.mark.parametrize("picture", [0, CODES])
def test_a_picture_is_the_argmax_of_training_s_row_with_its_documents_before(generator, pictures, picture):
    """Greedy codes are those of teacher forcing over the row as `data.packing` lays it out, with any number before."""
    generator = dataclasses.replace(generator, picture=picture)
    found, prompts = documents(generator, pictures), ["a blue", "red", "two"]
    retrieved = [found, [], found[1:]]
    prompt = [document.text_to_image(p, generator.text, VOCAB, r) for p, r in zip(prompts, retrieved, strict=True)]
    rules, packed = (
        grammar.pictures(VOCAB, generator.text.size, CODES),
        configs.Packing("whole", LENGTH, picture=picture),
    )
    state = grammar.start([grammar.CODES] * 3, left=np.full(3, CODES))
    drawn = generator._draw(rules, prompt, state, CODES, 0, generate.GREEDY)
    for one, codes, before in zip(prompt, drawn, retrieved, strict=True):
        row = np.concatenate([one.ids, codes])
        shown, n = np.zeros(len(row), bool), sum(len(ids) + 1 for ids in before)
        shown[1 : 1 + n] = True
        batch = packing.arrays(
            [packing.masked(row, np.ones(len(row), np.int32), NO_SPANS, VOCAB, packed, shown)], VOCAB, packed
        )
        inputs = [jnp.asarray(batch[name]) for name in ("inputs", "positions", "segments")]
        hidden, _ = generator.model.apply({"params": generator.params}, *inputs)
        scores = decoder.logits(generator.params, MODEL, hidden)[0, len(one.ids) - 1 : len(row) - 1]
        best = VOCAB.image_start + np.argmax(scores[:, VOCAB.image_start : VOCAB.sentinel_start], -1)
        np.testing.assert_array_equal(best, codes)
        assert one.retrieved == n
    alone = generator.text_to_image(prompts, 0, generate.GREEDY)
    both = generator.text_to_image(prompts, 0, generate.GREEDY, retrieved)
    np.testing.assert_array_equal(both[1], alone[1])
    assert (both[0] != alone[0]).any()


def test_captions_and_infilling_look_at_the_retrieved_documents(generator, pictures):
    found = documents(generator, pictures)
    before = [found, found[:1], []]
    alone = generator.image_to_text(pictures, max_text=5)
    with_them = generator.image_to_text(pictures, max_text=5, retrieved=before)
    assert with_them[2] == alone[2] and with_them != alone
    masks = ["a <mask> circle"] * 3
    alone = generator.infill_text(pictures, masks, max_text=4)
    with_them = generator.infill_text(pictures, masks, max_text=4, retrieved=before)
    assert with_them[2] == alone[2] and with_them != alone
    whole = [(0.0, 0.0, 1.0, 1.0)] * 3
    alone = generator.infill_image(pictures, PROMPTS, whole, 0, generate.GREEDY)
    short = [found[1:], found[1:], []]
    with_them = generator.infill_image(pictures, PROMPTS, whole, 0, generate.GREEDY, short)
    np.testing.assert_array_equal(with_them[2], alone[2])
    assert (with_them != alone).any()


def test_documents_are_given_up_until_the_prompt_fits(generator, pictures):
    found = documents(generator, pictures)
    for prompts in (["a", "x" * 30, "x" * 55], None):
        many = [found * 4] * 3
        kept = generator.fitting(many, prompts, max_text=20)
        for row, documents_before in enumerate(kept):
            own = 2 + len(generator.text.encode(prompts[row])) if prompts else CODES + 6 + 20 - CODES
            used = [
                own + sum(len(ids) + 1 for ids in ids_before)
                for ids_before in (documents_before, many[row][: len(documents_before) + 1])
            ]
            assert used[0] <= LENGTH - CODES < used[1]
            assert all(np.array_equal(a, b) for a, b in zip(documents_before, many[row], strict=False))
    generator.text_to_image(
        ["a", "x" * 30, "x" * 55], retrieved=generator.fitting([found * 4] * 3, ["a", "x" * 30, "x" * 55])
    )
    assert generator.fitting([found], ["a"]) == [found]


@pytest.mark.parametrize("field, value", [("temperature", -1.0), ("top_p", 0.0), ("cd_alpha", 2.0), ("cd_k", 0)])
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(UserError, match=f"sampling.{field} = "):
        configs.from_json(configs.Sampling, {field: value})


@pytest.mark.parametrize("picture", [0, CODES])
def test_filling_in_reads_the_positions_that_training_gives(generator, pictures, picture):
    """Greedy codes of an infilled region are the argmax of teacher forcing over the row as `packing` lays it out."""
    generator = dataclasses.replace(generator, picture=picture)
    codes, region = generator.encode(pictures[:1])[0], np.arange(CODES) % 5 == 2  # codes 2 to 7, of which two are free
    prompt = document.infill_image("a red circle", codes, region, generator.text, VOCAB)
    state = grammar.start([grammar.CODES], left=np.array([6]))
    rules = grammar.pictures(VOCAB, generator.text.size, CODES)
    drawn = generator._draw(rules, [prompt], state, CODES, 0, generate.GREEDY)[0]
    row = np.concatenate([prompt.ids, drawn])
    packed = configs.Packing(kind="whole", length=LENGTH, picture=picture)
    moved = np.arange(len(row)) > len(prompt.ids)
    batch = packing.arrays(
        [(row, np.ones(len(row), np.int32), moved, np.array(prompt.hidden), moved & False)], VOCAB, packed
    )
    inputs = [jnp.asarray(batch[name]) for name in ("inputs", "positions", "segments")]
    hidden, _ = generator.model.apply({"params": generator.params}, *inputs)
    scores = decoder.logits(generator.params, MODEL, hidden)[0, len(prompt.ids) - 1 : len(row) - 1]
    best = VOCAB.image_start + np.argmax(scores[:, VOCAB.image_start : VOCAB.sentinel_start], -1)
    np.testing.assert_array_equal(np.where(prompt.known < 0, best, prompt.known), drawn)
    start = LENGTH - CODES + 1 if picture else len(prompt.ids) - 1
    assert batch["positions"][0, len(prompt.ids) - 1] == start
