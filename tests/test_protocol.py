"""What the evaluation chooses, and the figures that it adds up."""

import ast
import dataclasses
import json
import math
import shutil

import numpy as np
import pytest

from cm3jax import card, checkpoint, config, provenance
from cm3jax.data import scenes, scenes_tasks, shards, tokens
from cm3jax.evaluate import pictures as closeness
from cm3jax.evaluate import protocol, results, samples
from cm3jax.evaluate import scenes as judges
from cm3jax.sample import generate
from cm3jax.types import UserError


@pytest.fixture
def trained(monkeypatch):
    """Pretend that the decoder has checkpoints at 10, 20 and 30 with these weights, and data of these splits."""
    weights, splits = {10: 3.0, 20: 1.5, 30: 2.0}, ["test", "validation"]
    monkeypatch.setattr(checkpoint, "steps", lambda folder: sorted(weights))
    monkeypatch.setattr(tokens, "splits", lambda folder: splits)
    return weights, splits, weights.get


def measure(params, split, masked):
    assert split == "validation"
    return {"loss": (params * 8, 8.0)}


def test_the_validation_loss_of_every_checkpoint_is_measured(trained, tmp_path):
    losses = protocol.validation_losses(tmp_path, measure, trained[2])
    assert losses == {10: 3.0, 20: 1.5, 30: 2.0}


def test_a_checkpoint_without_a_finite_loss_is_never_chosen(trained, tmp_path):
    trained[0][20] = math.nan
    assert protocol.validation_losses(tmp_path, measure, trained[2]) == {10: 3.0, 30: 2.0}


def test_without_a_choice_nothing_is_measured(trained, tmp_path):
    weights, splits, _ = trained
    splits.remove("validation")
    assert protocol.validation_losses(tmp_path, None, None) == {}
    splits.append("validation")
    for step in (10, 20):
        del weights[step]
    assert protocol.validation_losses(tmp_path, None, None) == {}


def test_perplexity_is_that_of_causal_rows_for_text_and_codes_and_of_masked_ones_for_spans():
    def measure(params, split, masked):
        return {f"loss_{name}": (4 * nll + 4 * masked, 4.0) for name, nll in (("text", 1), ("image", 2), ("infill", 3))}

    found = protocol.perplexity(measure, None, "test")
    assert found == pytest.approx({"text": math.exp(1), "image": math.exp(2), "infill": math.exp(4)})


def test_a_modality_without_tokens_has_no_perplexity():
    found = protocol.perplexity(lambda *_: {"loss_text": (2.0, 1.0), "loss_image": (0.0, 0.0)}, None, "test")
    assert found == {"text": pytest.approx(math.exp(2)), "image": None, "infill": None}


class Knowing:
    """Draws what the captions ask for, and of every third one nothing; its tokenizer keeps the pictures themselves."""

    grid = (4, 4)
    params = None

    def __init__(self, splits):
        self.known = {c: p for split in splits.values() for c, p in zip(split.captions, split.pictures, strict=True)}
        self.image = self

    def encode(self, pictures):
        return np.stack(pictures)

    def decode(self, codes):
        return codes

    def text_to_image(self, captions, seed, sampling, retrieved=None):
        return np.stack([self.known[c] if i % 3 else 0 * self.known[c] for i, c in enumerate(captions)])

    def image_to_text(self, codes, seed, sampling, max_text, retrieved=None):
        known = {picture.tobytes(): caption for caption, picture in self.known.items()}
        return [known[c.tobytes()] if i % 3 else "" for i, c in enumerate(codes)]

    def infill_image(self, codes, captions, boxes, seed, sampling):
        return self.text_to_image(captions, seed, sampling)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Records of the embedded world, of three splits."""
    folder = tmp_path_factory.mktemp("prepared")
    for split in ("test", "validation", "composition"):
        with shards.Writer(folder, split) as writer:
            for i in range(7):
                writer.write(scenes.record("easy", 0, i, split, 32))
    return folder


def test_every_captioning_document_of_the_tasks_is_a_pair_without_the_words_around_it(tmp_path):
    with shards.Writer(tmp_path, "test") as writer:
        for i in range(4 * len(scenes_tasks.ORDER)):
            writer.write(scenes.record("tasks", 0, i, "test", 48))
    found = protocol.pairs(tmp_path, "test", 9)
    assert len(found) == 4 and found.level == "tasks"
    assert all(
        judges.score(scenes.parse(c, "tasks"), t).whole for c, t in zip(found.captions, found.truths, strict=True)
    )
    assert not any("Describe" in caption for caption in found.captions)


def reached(name, seen):
    """Add to `seen` a module and what it imports of the embedded world, the scores and the tasks."""
    if name not in seen:
        seen.add(name)
        for node in ast.walk(ast.parse((results.ROOT / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cm3jax."):
                folder = node.module.removeprefix("cm3jax.").replace(".", "/")
                found = [folder, *(f"{folder}/{alias.name}" for alias in node.names)]
                for other in found:
                    if (results.ROOT / f"{other}.py").is_file() and other.startswith(("data/scenes", "evaluate/")):
                        reached(other, seen)
    return seen


def test_the_code_of_a_protocol_is_all_that_reads_and_judges_an_answer():
    asked = reached("evaluate/tasks", set()) - {"evaluate/samples"}  # which only keeps the figures
    assert asked <= set(protocol.JUDGED_BY) <= set(protocol.SCORED_BY)


def test_the_fingerprint_of_a_split_is_that_of_its_records_alone(prepared, tmp_path):
    (tmp_path / "prepared").mkdir()
    for path in prepared.iterdir():
        shutil.copy(path, tmp_path / "prepared")
    before = protocol.fingerprints(tmp_path, ["test", "validation"])
    with shards.Writer(tmp_path / "prepared", "validation") as writer:
        writer.write(scenes.record("easy", 1, 0, "validation", 32))
    after = protocol.fingerprints(tmp_path, ["test", "validation"])
    assert after["test"] == before["test"] and after["validation"] != before["validation"]


def test_the_figures_of_the_model_that_training_began_with_name_its_weights(monkeypatch, tmp_path):
    start = dataclasses.replace(config.Recipe().decoder, start="runs/first")
    recipe = dataclasses.replace(config.Recipe(), decoder=start)
    monkeypatch.setattr(generate, "load", lambda run, batch: run)
    monkeypatch.setattr(generate, "identity", lambda run: (7, f"weights of {run}"))
    monkeypatch.setattr(protocol, "score", lambda recipe, artist, *_: ({"infill": {"of": artist.generator}}, {}, {}))
    splits = {"test": protocol.Pairs([], np.zeros((0, 1, 1, 3), np.uint8))}
    found = protocol.begun(recipe, protocol.Artist(None, recipe.evaluate), tmp_path, None, splits, lambda line: None)
    assert found["infill"] == {"of": "runs/first"}
    assert found["checkpoint"] == {"step": 7, "weights": "weights of runs/first"}
    assert not any("checkpoint" in name for name in card.figures({"start": found}))


def test_pictures_that_the_model_drew_say_so_and_those_that_it_was_given_do_not(tmp_path):
    blank = np.zeros((4, 4, 3), np.uint8)
    examples = {
        "text_to_image": [{"caption": "a", "picture": blank}, {"caption": "b", "picture": blank}],
        "image_to_text": [{"picture": blank, "caption": "a", "asked": "b"}],
        "infill": [{"masked": blank, "picture": blank, "original": blank, "caption": "c"}],
        "reconstruction": [{"original": blank, "picture": blank}],
        "tasks": [
            {"task": "edit", "given": [blank], "said": "instruction: d", "drawn": blank, "wanted": blank},
            {"task": "caption", "given": [blank], "said": "", "drawn": "words", "wanted": "words"},
        ],
    }
    scores = {task: {"sampling": {"temperature": 0.5}} for task in ("text_to_image", "infill")}
    scores |= {"name": "one", "protocol": {"seed": 3, "checkpoint": {"step": 7, "weights": "abc"}}}
    protocol.save(tmp_path, scores, examples)
    drawn = {
        "text_to_image-000-picture": ("a", "0", "trainedAlgorithmicMedia"),
        "text_to_image-001-picture": ("b", "1", "trainedAlgorithmicMedia"),
        "infill-000-picture": ("c", "0", "compositeWithTrainedAlgorithmicMedia"),
        "tasks-000-drawn": ("instruction: d", "0", "trainedAlgorithmicMedia"),
    }
    files = sorted(tmp_path.glob("*.png"))
    assert len(files) == 12 and set(drawn) < {path.stem for path in files}
    for path in files:
        if path.stem not in drawn:
            with pytest.raises(UserError, match="does not say where it came from"):
                provenance.read(path)
            continue
        found = provenance.read(path)
        assert (found["prompt"], found["index"], found["source"]) == drawn[path.stem]
        assert (found["model"], found["step"], found["weights"], found["seed"]) == ("one", "7", "abc", "3")
        assert json.loads(found["settings"])["temperature"] == 0.5


def test_every_figure_is_the_sum_of_the_samples_that_are_kept(prepared, monkeypatch, tmp_path):
    monkeypatch.setattr(closeness, "codebook", lambda codes, size: {})
    settings = config.Evaluate(draw=(config.Sampling(),), samples=7, validation_samples=3)
    recipe = config.Recipe(prepare=config.Prepare(source="scenes:easy"), evaluate=settings)
    splits = {name: protocol.pairs(prepared, name, 7) for name in shards.splits(prepared)}
    artist = protocol.Artist(Knowing(splits), settings)
    scores, _, table = protocol.score(recipe, artist, lambda *_: {}, splits, lambda line: None)
    assert {"dtype", "resolution", "code", "versions", "device", "seed", "samples"} <= set(scores["protocol"])
    samples.write(tmp_path, table)
    lines = samples.read(tmp_path)
    assert len(lines) == 14 and {line["split"] for line in lines} == {"test", "composition"}
    for split, find in (("test", lambda task: scores[task]), ("composition", lambda task: scores[task]["composition"])):
        own = [line for line in lines if line["split"] == split]
        for task in ("text_to_image", "image_to_text", "infill"):
            found, told = samples.estimates(own, task), find(task)
            assert found["accuracy"].value == pytest.approx(told["object_accuracy"])
            assert found["whole"].value == pytest.approx(told["scene_accuracy"])
            assert 0 < found["accuracy"].value < 1 and found["accuracy"].records == 7
    found = samples.estimates([line for line in lines if line["split"] == "test"], "reconstruction")
    assert found["ssim"].value == scores["reconstruction"]["ssim"] == 1 and found["accuracy"].value == 1
    assert "psnr" not in found and scores["reconstruction"]["psnr"] is None, "no error: no number"
    assert {line["attributes"]["source"] for line in lines} == {"scenes:easy"}
