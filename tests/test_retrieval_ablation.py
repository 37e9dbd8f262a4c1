"""The two experiments of launch/ on retrieval: what they count, and both at toy size from data to plots."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import xml.etree.ElementTree as xml

import numpy as np
import pytest

from cm3jax import config as configs
from cm3jax.data import scenes, sources_scenes
from cm3jax.data import scenes_world as world
from cm3jax.types import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "launch"))

import candidates  # noqa: E402
import retrieval_ablation as ablation  # noqa: E402

RECIPE = configs.load(ROOT / "configs" / "retrieval.py")


def toy() -> configs.Recipe:
    change, r = dataclasses.replace, RECIPE
    model = change(r.decoder.model, width=16, heads=2, layers=1)
    training = change(r.decoder.training, steps=3, batch=8, evaluate_every=0)
    return change(
        r,
        prepare=change(r.prepare, count=64, workers=1),
        image=change(r.image, seed_after=2, training=change(r.image.training, steps=4, batch=8, evaluate_every=0)),
        retriever=change(r.retriever, training=change(r.retriever.training, steps=2, batch=16, evaluate_every=0)),
        decoder=change(r.decoder, model=model, training=training),
        evaluate=change(r.evaluate, batch=8),
    )


def test_what_a_prompt_asks_a_memory_for_is_its_names_and_held_out_pairs():
    name = tuple(world.NAMES)[-1]
    scene = scenes.parse(f"a {name} top left, a small purple over red circle top right, on white", "rare")
    assert ablation.things(scene) == [("new", name), ("held_out", "circle purple")]
    assert ablation.wanted(scene) == {name, "circle purple"}
    assert not ablation.wanted(scenes.parse("a small red circle top left, on white", "rare"))


def test_the_decoder_without_retrieval_is_the_same_but_for_its_documents_and_steps(monkeypatch):
    monkeypatch.setattr(ablation, "fill", lambda recipe, shared: 0.6 if recipe.retrieve else 0.8)
    with_, without = (ablation.arm(RECIPE, name, 2, pathlib.Path()) for name in ("with", "without"))
    assert with_.retrieve and not without.retrieve
    assert without.decoder.training.steps == round(with_.decoder.training.steps * 0.6 / 0.8)
    training = dataclasses.replace(without.decoder.training, steps=with_.decoder.training.steps)
    assert dataclasses.replace(without.decoder, training=training) == with_.decoder
    assert with_.decoder.training.seed == 2


def test_the_decoder_learns_from_no_document_that_came_late():
    assert RECIPE.bank.splits == ("bank",) and set(ablation.BANK) - set(RECIPE.bank.splits) == {"late"}


def test_every_seed_has_every_way_to_draw():
    found = ablation.rows([0, 1])
    assert len(found) == len(set(found)) == 2 * 2 * 5
    assert ("without", 1, "test", "0") in found and ("with", 0, "composition", "told") in found


def figures(value):
    kinds = {"right": {k: value for k in ablation.KINDS}, "frechet": 1.0, "found": 0.5}
    return {"object_accuracy": value, "scene_accuracy": value} | kinds


def test_the_spread_is_mean_least_and_greatest_over_seeds():
    results = {("with", seed, "test", "1"): figures(v) for seed, v in enumerate((0.2, 0.3, 0.7))}
    assert np.allclose(ablation.spread(results)["test"]["with 1"]["new"], [0.4, 0.2, 0.7])


def test_the_plot_is_a_file_of_its_own_with_a_whisker_for_each_point():
    results = {row: figures(0.1 * (i % 7)) for i, row in enumerate(ablation.rows([0, 1, 2]))}
    root = xml.fromstring(ablation.plot(ablation.spread(results)))
    marks = [e for e in root.iter() if e.tag.endswith("circle")]
    assert root.tag.endswith("svg") and len(marks) == 5 * (3 + 1)


def test_models_of_three_sizes_keep_the_width_of_a_head():
    models = [candidates.sized(RECIPE, size).decoder.model for size in candidates.SIZES]
    assert len({m.width // m.heads for m in models}) == 1
    assert [m.width for m in models] == [64, 128, 192]
    assert candidates.sized(RECIPE, "whole").decoder == RECIPE.decoder


@pytest.mark.slow
def test_both_experiments_run_at_toy_size_and_continue(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sources_scenes, "HELD_OUT", 16)
    monkeypatch.setattr(sources_scenes, "CATALOGUE", {"bank": 48, "late": 48})
    monkeypatch.setattr(candidates, "COUNTS", (1, 2))
    monkeypatch.setattr(candidates, "WEIGHTS", (1.0, 2.0))
    recipe = tmp_path / "toy.json"
    recipe.write_text(json.dumps(configs.to_json(toy())))

    def phase(arguments, *words):
        experiment = candidates if hasattr(arguments, "documents") else ablation
        if experiment is candidates:
            return candidates.one(arguments, toy(), *words)
        return ablation.one(arguments.work, toy(), arguments.prompts, *words)

    def call(experiment, *words):
        monkeypatch.setattr(experiment, "phase", phase)
        monkeypatch.setattr(ablation, "together", lambda arguments, *all_: [phase(arguments, *each) for each in all_])
        given = [experiment.__file__, str(tmp_path), "--config", str(recipe), "--prompts", "13", *words]
        monkeypatch.setattr(sys, "argv", given)
        experiment.main()

    words = ["--seeds", "0", "--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.svg")]
    words += ["--frechet-plot", str(tmp_path / "af.svg")]
    call(ablation, *words)
    found = json.loads((tmp_path / "a.json").read_text())
    assert len(found["each"]) == 10 and {row["split"] for row in found["each"]} == set(ablation.SPLITS)
    told = [row for row in found["each"] if row["documents"] == "told" and row["split"] == "composition"]
    assert all(row["found"] > 0 for row in told)
    assert 0 <= found["pool"]["each"] <= found["pool"]["any"] <= 1
    for name in ("a", "af"):
        xml.fromstring((tmp_path / f"{name}.svg").read_text())
    monkeypatch.setattr(ablation, "measure", lambda *_: pytest.fail("what is there is not measured again"))
    call(ablation, *words)

    call(
        candidates,
        "--json",
        str(tmp_path / "b.json"),
        "--plot",
        str(tmp_path / "b.svg"),
        "--frechet-plot",
        str(tmp_path / "bf.svg"),
    )
    found = json.loads((tmp_path / "b.json").read_text())
    assert set(found["candidates"]) == set(candidates.SAMPLING) and set(found["guidance"]) == set(candidates.SIZES)
    for name in ("b", "bf"):
        xml.fromstring((tmp_path / f"{name}.svg").read_text())


def test_phases_run_together_on_cores_of_their_own_and_one_that_fails_is_told(tmp_path, monkeypatch):
    say = "import os, sys; open(sys.argv[1], 'w').write(repr([*os.sched_getaffinity(0)])); sys.exit(int(sys.argv[2]))"
    monkeypatch.setattr(ablation, "command", lambda arguments, *words: [sys.executable, "-c", say, *words])
    ablation.together(None, (str(tmp_path / "a"), "0"), (str(tmp_path / "b"), "0"))
    one, two = (set(json.loads((tmp_path / name).read_text())) for name in "ab")
    assert one and two and (len(os.sched_getaffinity(0)) == 1 or not one & two)
    with pytest.raises(subprocess.CalledProcessError):
        ablation.together(None, (str(tmp_path / "a"), "3"), (str(tmp_path / "b"), "0"))


def test_more_prompts_than_there_are_is_one_clear_line(tmp_path, monkeypatch):
    from cm3jax.data import shards
    from cm3jax.retrieval import memory
    from cm3jax.sample import generate

    monkeypatch.setattr(configs, "load", lambda path: RECIPE)
    monkeypatch.setattr(memory, "load", lambda *_: None)
    monkeypatch.setattr(generate, "load", lambda *_: None)
    monkeypatch.setattr(shards, "Reader", lambda *_: [None] * 5)
    with pytest.raises(UserError, match="--prompts 6: test has 5"):
        ablation.measure(tmp_path, "with", 0, "test", "0", 6)
