"""Drawing, captioning and scoring with a real memory: a tiny run with random weights, from the command line."""

import json

import numpy as np
import pytest
import random_run
import test_memory
from PIL import Image

from cm3jax import cli, provenance, run
from cm3jax import config as configs
from cm3jax.data import shards, sources_scenes
from cm3jax.evaluate import protocol
from cm3jax.retrieval import memory
from cm3jax.sample import generate
from cm3jax.tokenizers import document
from cm3jax.vocab import Vocab

pytestmark = pytest.mark.slow

TRAINING = configs.Training(batch=2, mesh=configs.Mesh(1, 1, 1))
RECIPE = configs.Recipe(
    vocab=Vocab(text=320, image=11, sentinels=4, multiple=8),
    prepare=configs.Prepare(source="scenes:easy", resolution=16, count=16, workers=1),
    image=configs.Image(
        model=configs.VQGAN(patch=4, width=8, multipliers=(1,), encoder_blocks=1, decoder_blocks=1, attention=(), z=3)
    ),
    tokens=configs.Tokens(batch=16),
    retrieve=True,
    retriever=configs.Retriever(model=test_memory.TINY),
    bank=configs.Bank(batch=16),
    neighbours=test_memory.NO_LIMITS,
    decoder=configs.DecoderStage(
        model=configs.Decoder(layers=1, width=16, heads=2, dtype="float32"),
        packing=configs.Packing("whole", 320),
        training=TRAINING,
    ),
    evaluate=configs.Evaluate(
        samples=3, batch=4, draw=(configs.Sampling(),), validation_samples=2, max_text=6, documents=(1,), candidates=2
    ),
)
CAPTION = "a large red circle top left, on white"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("run"))


def make(folder):
    """Return a run whose records, tokens, bank and neighbours are real; only its weights are random."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources_scenes, "HELD_OUT", 4)
        run.prepare(RECIPE, folder)
    texts = [record.parts[0] for record in shards.Reader(folder / "prepared", "train")]
    random_run.make(folder, RECIPE, texts)
    test_memory.untrained(RECIPE, folder)
    for stage in (run.tokens, run.bank, run.neighbours):
        stage(RECIPE, folder)
    return folder


@pytest.fixture(scope="module")
def keys(made):
    """Return what the bank's documents are called."""
    return {f"train/{record.key}" for record in shards.Reader(made / "prepared", "train")}


def told(lines):
    """Return the keys that lines say were shown."""
    assert all(line.startswith("    with ") and ", score " in line and line.endswith(", Apache-2.0)") for line in lines)
    return [line.removeprefix("    with ").partition(",")[0] for line in lines]


def test_a_picture_is_drawn_with_a_document_of_the_bank_that_is_told_and_kept_in_its_file(made, keys, tmp_path, capsys):
    words = ["--documents", "1", "--candidates", "2", "--seed", "3", "--out", str(tmp_path)]
    assert cli.main(["generate", str(made), CAPTION, *words]) == 0
    file, *lines = capsys.readouterr().out.splitlines()
    (found,) = memory.load(made).find(texts=[CAPTION], count=1)
    assert told(lines) == [f"train/{x.key}" for x in found] and len(found) == 1 and set(told(lines)) <= keys
    kept = provenance.read(file)
    assert [row["key"] for row in json.loads(kept["documents"])] == told(lines) and kept["prompt"] == CAPTION
    assert json.loads(kept["settings"])["candidates"] == 2

    opened, drawing = memory.load(made), generate.load(made)
    ids = opened.ids(found[0])
    text, picture = opened.record(found[0]).parts
    parts = document.decode(ids, drawing.text, RECIPE.vocab)
    assert parts[0] == text and np.array_equal(parts[1], drawing.encode(picture[None])[0].reshape(-1))
    candidates = drawing.text_to_image([CAPTION] * 2, 3, retrieved=[[ids]] * 2)
    scores = opened.encoder.pictures(candidates) @ opened.encoder.texts([CAPTION])[0]
    assert np.array_equal(np.asarray(Image.open(file)), candidates[scores.argmax()])


def test_a_caption_is_written_with_a_document_of_the_bank_that_is_told(made, keys, tmp_path, capsys):
    record = next(iter(shards.Reader(made / "prepared", "train")))
    Image.fromarray(record.parts[1]).save(tmp_path / "asked.png")
    words = ["--documents", "1", "--max-text", "6"]
    assert cli.main(["caption", str(made), str(tmp_path / "asked.png"), *words]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("    ")]
    (found,) = memory.load(made).find(pictures=[record.parts[1]], count=1)
    assert told(lines) == [f"train/{x.key}" for x in found] and len(found) == 1 and set(told(lines)) <= keys
    assert f"train/{record.key}" not in told(lines)  # though it is in the bank too


def test_an_evaluation_with_a_memory_names_the_documents_that_it_showed(made, keys):
    scores = protocol.evaluate(RECIPE, made, lambda line: None)
    examples = json.loads((made / "evaluate" / "examples.json").read_text())
    for task in ("text_to_image", "image_to_text"):
        assert scores[task]["documents"] == 1 and scores[task]["candidates"] == 2
        assert len(examples[task]) == 3
        shown = [example["documents"] for example in examples[task]]
        assert all(len(row) == 1 and row[0]["key"] in keys and row[0]["license"] == "Apache-2.0" for row in shown)
        assert all((made / "evaluate" / row[0]["picture"]).is_file() for row in shown)
    found = provenance.read(made / "evaluate" / "text_to_image-000-picture.png")
    assert (found["weights"], json.loads(found["settings"])["candidates"]) == (generate.identity(made)[1], 2)
    assert [row["key"] for row in json.loads(found["documents"])] == [
        row["key"] for row in examples["text_to_image"][0]["documents"]
    ]
    assert set(scores["protocol"]["data"]) == set(scores["protocol"]["samples"]) >= {"test"}
    run.publish(made)
    page = (made / "report.html").read_text()
    assert all(row[0]["key"] in page for row in shown)
