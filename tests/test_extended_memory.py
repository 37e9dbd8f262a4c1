"""A finished run whose memory was extended draws and is scored with the larger one; random weights."""

import dataclasses
import json

import pytest
import random_run
import test_generate
import test_memory

from cm3jax import cli, config, provenance, run, stages
from cm3jax.data import scenes, sources_scenes
from cm3jax.retrieval import memory

RECIPE = dataclasses.replace(
    test_memory.RECIPE,
    vocab=test_generate.VOCAB,
    prepare=config.Prepare(source="scenes:easy", resolution=16, count=24, workers=1),
    image=config.Image(model=test_generate.NET),
    tokens=config.Tokens(workers=1, batch=8),
    decoder=config.DecoderStage(
        model=test_generate.MODEL, packing=config.Packing(length=512), training=config.Training(steps=3, batch=2)
    ),
    evaluate=config.Evaluate(
        samples=2, validation_samples=2, batch=2, draw=(config.Sampling(),), documents=(0, 1), max_text=3, sheet=1
    ),
)
CAPTIONS = [scenes.record("easy", 0, i, "train", 16).parts[0] for i in range(40)]
PARTS = ["--bank.splits", "train", "composition"]


def did(*words):
    return cli.main([str(word) for word in words])


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """Return a run whose decoder was made with a memory of `train`, and whose memory then got `composition` too."""
    patch = pytest.MonkeyPatch()
    patch.setattr(sources_scenes, "HELD_OUT", 6)
    for name, call in (("retriever", test_memory.untrained), ("decoder", lambda recipe, folder: None)):
        patch.setitem(run.STAGES, name, dataclasses.replace(run.STAGES[name], call=call))
    folder = random_run.make(tmp_path_factory.mktemp("run"), RECIPE, CAPTIONS, 0.1)
    recipe = config.load(folder / "recipe.json")
    for name in ("text", "image"):
        run.taken(folder, name, run.decided(recipe, name), "elsewhere")
    for name in ("prepare", "tokens", *run.MEMORY, "decoder"):
        run.run(recipe, folder, only=name)
    before = stages.read(folder / "decoder")
    assert did("retrieve", "build", folder, "--extend", *PARTS) == 0
    assert stages.read(folder / "decoder") == before
    yield folder
    patch.undo()


def test_it_draws_and_captions_with_documents_of_the_added_split(extended, capsys):
    found = memory.load(extended)
    assert found.bank.documents == {"train": 24, "composition": 6}
    late = found._records("composition")[3]
    assert did("generate", extended, late.parts[0], "--documents", "2", "--out", extended / "drawn") == 0
    drawn, *told = capsys.readouterr().out.splitlines()
    wanted = found.find(texts=[late.parts[0]], count=2)[0]
    assert json.loads(provenance.read(drawn)["documents"]) == [one.origin for one in wanted]
    assert told == [f"    with {x.split}/{x.key}, score {x.score:.3f} (scenes:easy, Apache-2.0)" for x in wanted]
    assert "composition" in {one.split for one in found.find(texts=[late.parts[0]], count=30)[0]}
    assert did("caption", extended, drawn, "--documents", "1", "--max_text", "3") == 0
    assert "    with " in capsys.readouterr().out


def test_training_on_says_what_to_do_and_a_folder_of_its_own_takes_the_larger_memory(extended, tmp_path, capsys):
    for words in (["run", "--out", extended], ["train", "--inputs", extended]):
        assert did(words[0], extended / "recipe.json", *words[1:]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "made from another neighbours" in said and "cm3jax evaluate" in said
    (tmp_path / "old.json").write_text(json.dumps(config.to_json(RECIPE)))
    assert did("run", tmp_path / "old.json", "--out", extended) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and 'bank.splits was ["train", "composition"] and is now ["train"]' in said
    new = tmp_path / "new"
    assert did("train", extended / "recipe.json", "--inputs", extended, "--out", new) == 0
    assert stages.read(new / "decoder").inputs["neighbours"] == stages.read(extended / "neighbours").result
    assert config.load(extended / "recipe.json").bank.splits == ("train", "composition"), "refused ones change nothing"


@pytest.mark.slow
def test_it_is_scored_with_the_larger_memory(extended):
    assert did("evaluate", extended) == 0
    report = json.loads((extended / "report.json").read_text())
    assert did("evaluate", extended, "--suite", "scenes") == 0, "and stays as it is"
    assert [row["documents"] for row in report["text_to_image"]["by_documents"]] == [0, 1]
    assert stages.read(extended / "evaluate").inputs["bank"] == stages.read(extended / "bank").result
