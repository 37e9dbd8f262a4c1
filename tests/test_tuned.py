"""The evaluation of a tuned run: every task, and beside it the model that tuning began with. Random weights."""

import dataclasses
import json
import shutil

import pytest
import random_run

from cm3jax import config as configs
from cm3jax import run
from cm3jax.data import shards, sources_scenes
from cm3jax.evaluate import protocol
from cm3jax.tasks import table
from cm3jax.vocab import Vocab

pytestmark = pytest.mark.slow

EACH = 2
NET = configs.VQGAN(patch=16, width=8, multipliers=(1,), encoder_blocks=1, decoder_blocks=1, attention=(), z=3)
RECIPE = configs.Recipe(
    name="tuned",
    vocab=Vocab(text=320, image=11, sentinels=8, multiple=8),
    prepare=configs.Prepare(source="scenes:tasks", resolution=48, count=50, workers=1),
    image=configs.Image(model=NET),
    tokens=configs.Tokens(batch=16),
    decoder=configs.DecoderStage(
        model=configs.Decoder(layers=1, width=16, heads=2, dtype="float32"),
        packing=configs.Packing("whole", 512, isolate=True, picture=9),
        mask=configs.Mask(answers=0.5, span_weight=9.0),
        training=configs.Training(batch=2, mesh=configs.Mesh(1, 1, 1)),
    ),
    evaluate=configs.Evaluate(samples=EACH, batch=8, draw=(configs.Sampling(),), validation_samples=2, max_text=6),
)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """Return the folder of a run whose records and tokens are real, and its recipe, which names the model before."""
    folder = tmp_path_factory.mktemp("tuned")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources_scenes, "EACH", EACH)
        run.prepare(RECIPE, folder)
    texts = [text for i in shards.Reader(folder / "prepared", "train") for text in i.parts if isinstance(text, str)]
    random_run.make(folder, RECIPE, texts)
    before = tmp_path_factory.mktemp("before")
    random_run.make(before, RECIPE, texts, scale=0.1, step=2)
    for part in ("text", "image"):  # the same tokenizers
        shutil.rmtree(before / part)
        shutil.copytree(folder / part, before / part)
    run.tokens(RECIPE, folder)
    recipe = dataclasses.replace(RECIPE, decoder=dataclasses.replace(RECIPE.decoder, start=str(before)))
    (folder / "recipe.json").write_text(json.dumps(configs.to_json(recipe)))
    return folder, recipe


def test_every_task_is_scored_for_both_models_on_the_same_documents(tuned):
    folder, recipe = tuned
    scores = protocol.evaluate(recipe, folder, lambda line: None)
    now, before = scores["tasks"], scores["start"]["tasks"]
    assert set(table.TASKS) <= set(now) == set(before)
    for name in now:
        assert now[name]["examples"] == before[name]["examples"] and 0 <= now[name]["accuracy"] <= 1
    assert now["edit"]["examples"] == EACH and {"text_to_image", "infill", "perplexity"} <= set(scores["start"])
    assert scores["start"]["checkpoint"]["step"] == 2 and scores["protocol"]["checkpoint"]["step"] == 3
    assert scores["start"]["checkpoint"]["weights"] != scores["protocol"]["checkpoint"]["weights"]

    examples = json.loads((folder / "evaluate" / "examples.json").read_text())["tasks"]
    assert {one["task"] for one in examples} == set(table.TASKS)
    run.publish(folder)
    page = (folder / "report.html").read_text()
    assert "parts, before" in page and "Before and after" in page and f"tuned from {recipe.decoder.start}" in page
