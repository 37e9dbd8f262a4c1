"""Suites: what the model is asked, what is kept of it, and the result files; the model is made up but for one test."""

import dataclasses
import json
import shutil
import types

import numpy as np
import pytest
import random_run
import talking_run
from PIL import Image

from cm3jax import cli, provenance
from cm3jax import config as configs
from cm3jax import run as stage
from cm3jax.data import scenes, shards
from cm3jax.evaluate import answers, captions, protocol, results, score, suites, words
from cm3jax.tasks import table, templates
from cm3jax.types import Record, UserError

SIDE = 16
RNG = np.random.default_rng(0)
RECIPE = configs.Recipe(evaluate=configs.Evaluate(samples=5, batch=2, seed=3))
PSNR = configs.Score(metrics=("psnr", "ssim"), threads=1)


def picture():
    return RNG.integers(0, 256, (SIDE, SIDE, 3), np.uint8)


def document(task, values, wording, key, truth):
    parts, regions = templates.make(task, values, wording)
    return Record(key, parts, {"task": task, "wording": wording, "truth": truth}, regions, split="test")


def records():
    """Return pairs as a folder gives them, and captions and questions as public sets do."""
    found = [Record(f"pair{i}", (f"a {c} dog", picture()), split="test") for i, c in enumerate(("red", "blue", "wet"))]
    found[2] = dataclasses.replace(found[2], fields={"captions": ["a wet dog", "a dog in the rain"]})
    told = ["A cat sleeps.", "The cat is asleep."]
    found += [document("caption", {"caption": told[0], "image": picture()}, 1, "cat", {"captions": told})]
    people = [["yes"] * 10, ["2"] * 4 + ["3"] * 6, ["a tree"] * 10]
    kinds = ({"answer_type": "yes/no"}, {"answer_type": "number"}, {})
    for i, (given, kind) in enumerate(zip(people, kinds, strict=True)):
        values = {"question": f"What {i}?", "answer": given[0], "image": picture()}
        found += [document("question", values, i, f"q{i}", {"answers": given} | kind)]
    return [*found, Record("text", ("no picture",), split="test")]


class Model:
    """What `generate.load` gives, as far as suites use it; it says and draws what depends on seed and input."""

    def __init__(self):
        self.asked = []

    def text_to_image(self, texts, seed, sampling, retrieved):
        self.asked.append((tuple(texts), seed))
        draw = np.random.default_rng(seed)
        return draw.integers(0, 256, (len(texts), SIDE, SIDE, 3), np.uint8)

    def image_to_text(self, pictures, seed, sampling, max_text, retrieved):
        self.asked.append((len(pictures), seed))
        return [["a dog", "", "a wet dog"][i % 3] for i in range(len(pictures))]


def write(folder, found, split="test"):
    with shards.Writer(folder / "prepared", split) as writer:
        for record in found:
            writer.write(record)
    for name in ("text", "image", "decoder"):
        (folder / name).mkdir()
        (folder / name / "weights").write_text(name)
    return folder


def pretend(monkeypatch, found):
    """Put a made-up model in the place of a run's."""
    name = lambda run, step: (step or 7, configs.digest((run / "decoder" / "weights").read_text()))  # noqa: E731
    monkeypatch.setattr(suites.generate, "load", lambda run, batch, step: found)
    monkeypatch.setattr(suites.generate, "identity", name)
    return found


@pytest.fixture
def model(monkeypatch):
    return pretend(monkeypatch, Model())


@pytest.fixture
def run(tmp_path):
    return write(tmp_path / "run", records())


def scored(run, *names, recipe=RECIPE, lines=None, **more):
    say = (lambda line: None) if lines is None else lines.append
    more = {"decoding": suites.Decoding(step=7), "scoring": PSNR} | more
    return suites.evaluate(names, run, recipe, run, say=say, **more)


def values(result):
    return {name: figure["value"] for name, figure in result["metrics"].items()}


def test_captions_are_written_for_pictures_with_all_that_people_wrote_as_references(run, model):
    found = scored(run, "captions")["captions"]
    wrote = {0: ["a red dog"], 1: ["a blue dog"], 2: ["a wet dog", "a dog in the rain"], 3: ["A cat sleeps.",
             "The cat is asleep."]}  # fmt: skip
    assert values(found) == captions.evaluate(wrote, {0: "a dog", 1: "", 2: "a wet dog", 3: "a dog"})
    assert model.asked == [(4, 3)]
    decoding = found["metrics"]["CIDEr"]["protocol"]["decoding"]
    assert decoding["seed"] == 3 and decoding["documents"] == 0 and decoding["sampling"]["temperature"] == 0
    assert results.read(run / "suites" / "captions.json") == found
    (folder,) = run.glob("suites/captions-*")
    again = words.score(
        "captions", folder / "said.json", [folder / "truth.json"], run / "x.json", say=lambda line: None
    )
    assert values(again) == values(found)


def test_questions_are_asked_without_their_answer(run, model, monkeypatch):
    def answer(generator, task, rows, seed, sampling, max_text):
        assert generator is model and task == "question" and all(set(row) == {"question", "image"} for row in rows)
        return [{"answer": {"What 0?": "yes", "What 1?": "two", "What 2?": ""}[row["question"]]} for row in rows]

    monkeypatch.setattr(suites.tasks, "answer", answer)
    found = scored(run, "vqa")["vqa"]
    two = answers.accuracy("two", ["2"] * 4 + ["3"] * 6)
    wanted = {"accuracy": (1 + two) / 3, "accuracy/yes/no": 1, "accuracy/number": two}
    assert values(found) == pytest.approx(wanted)


def test_questions_of_vizwiz_are_scored_by_its_own_rule_in_a_suite_of_their_own(tmp_path, model, monkeypatch):
    """All ten wrote "two", which VQA's rule counts and VizWiz's does not, and the model says it of every question."""
    truth = {"answers": ["two"] * 10, "answer_type": "number", "answerable": 1}
    row = document("question", {"question": "How many?", "answer": "two", "image": picture()}, 0, "val/v0", truth)
    run = write(tmp_path / "run", [*records(), dataclasses.replace(row, source="vizwiz")])
    asked = []

    def answer(generator, task, rows, *how):
        asked.append(len(rows))
        return [{"answer": "two"}] * len(rows)

    monkeypatch.setattr(suites.tasks, "answer", answer)
    found = scored(run, "vqa", "vizwiz")
    assert asked == [3, 1] and values(found["vizwiz"]) == {"accuracy": 0, "accuracy/number": 0}
    assert found["vizwiz"]["metrics"]["accuracy"]["protocol"]["set"] == "vizwiz"
    assert found["vqa"]["metrics"]["accuracy"]["protocol"]["samples"] == 3
    (said,) = json.loads(next(run.glob("suites/vizwiz-*/said.json")).read_text())
    assert said == {"image": "val/v0", "answer": "two"}
    only = write(tmp_path / "only", [dataclasses.replace(row, source="vizwiz")])
    with pytest.raises(UserError, match=r"suite vqa: .*VizWiz's: suite vizwiz.*none of 1 documents fits"):
        scored(only, "vqa")


def problems():
    """Return questions with choices, one with an explanation."""
    shared = {"context": "", "image": picture()}
    one = {"question": "Which flies?", "options": "(A) a dog (B) a bird", "answer": "(B) a bird", **shared}
    two = {"question": "Which swims?", "options": "(A) a fish (B) a cat", "answer": "(A) a fish", **shared}
    truth = {"subject": "natural science", "grade": "grade3"}
    return [
        document("choice", one, 0, "p1", {"choices": ["a dog", "a bird"], "answer": 1} | truth),
        document("reasoning", two | {"explanation": "It has fins."}, 0, "p2",
                 {"choices": ["a fish", "a cat"], "answer": 0} | truth),
        document("choice", one, 0, "p3", {"choices": ["a dog", "a bird"], "answer": 1} | truth),
    ]  # fmt: skip


def test_choices_are_read_from_what_is_said_by_letter_or_text(tmp_path, model, monkeypatch):
    run = write(tmp_path / "run", [*records(), *problems()])

    def answer(generator, task, rows, *how):
        assert all(set(row) == {"question", "context", "options", "image"} for row in rows)
        return [{"answer": {"choice": ["A bird", "(A)"], "reasoning": ["nothing"]}[task][i]} for i in range(len(rows))]

    monkeypatch.setattr(suites.tasks, "answer", answer)
    found = values(scored(run, "science-qa")["science-qa"])
    assert found == pytest.approx(
        {"accuracy": 1 / 3, "accuracy/NAT": 1 / 3, "accuracy/IMG": 1 / 3, "accuracy/G1-6": 1 / 3}
    )


def test_the_split_that_was_asked_for_is_the_one_in_the_protocol(tmp_path, model, monkeypatch):
    run = write(tmp_path / "run", problems(), "validation")
    monkeypatch.setattr(suites.tasks, "answer", lambda generator, task, rows, *how: [{"answer": "(B)"}] * len(rows))
    told = scored(run, "science-qa", split="validation")["science-qa"]["metrics"]["accuracy"]
    assert told["value"] == pytest.approx(2 / 3) and told["protocol"]["tokens"].endswith("split validation")
    assert told["protocol"]["questions"] == "those with a picture"


def test_candidates_are_ranked_by_likelihood_behind_what_was_said_before(tmp_path, model, monkeypatch):
    relevance = [0.0, 1.0, 0.5]
    said = {"caption": "A dog.", "history": [["is it wet", "yes"]], "round": 2, "answer": 1}
    truth = {"candidates": ["a", "b", "c"], "relevance": relevance} | said
    row = document("question", {"question": "is it old", "answer": "b", "image": picture()}, 0, "42/2", truth)
    row = dataclasses.replace(row, group="42")
    run = write(tmp_path / "run", [*records(), row])
    asked, likely = [], np.array([-3.0, -2.0, -2.0])
    model.text, model.vocab = None, None
    model.likelihood = lambda prompts, texts: asked.append(texts) or likely
    monkeypatch.setattr(suites.tasks, "encoded", lambda generator, task, rows: rows)
    monkeypatch.setattr(suites.templates, "prompt", lambda task, row, *how: asked.append(row["question"]))
    result = scored(run, "visdial")["visdial"]
    found = values(result)
    assert result["metrics"]["NDCG"]["protocol"]["decoding"]["seed"] == 3
    assert asked == ["A dog. is it wet? yes. is it old?", [" a", " b", " c"]]  # as training has them behind a word
    (said,) = json.loads(next(run.glob("suites/visdial-*/said.json")).read_text())
    assert said == {"image_id": "42", "round_id": 2, "ranks": [3, 1, 2]}
    assert found == pytest.approx({"NDCG": 1, "MRR": 1, "R@1": 1, "R@5": 1, "R@10": 1, "mean rank": 1})


def test_pictures_are_drawn_from_first_captions_beside_those_held_out(run, model, monkeypatch):
    monkeypatch.setattr(suites, "BLOCK", 3)
    found = scored(run, "pictures")["pictures"]
    first = ("a red dog", "a blue dog", "a wet dog")
    assert model.asked == [(first, 3), (("A cat sleeps.",), 4)]
    (folder,) = run.glob("suites/pictures-*")
    real = [np.asarray(Image.open(path)) for path in sorted((folder / "real").iterdir())]
    assert [np.array_equal(a, b.parts[-1]) for a, b in zip(real, shards.Reader(run / "prepared", "test"), strict=False)]
    assert len(real) == 4 and set(found["metrics"]) == {"psnr", "ssim"}
    assert found["metrics"]["psnr"]["protocol"]["decoding"]["candidates"] == 1
    lines = [json.loads(line) for line in (folder / "drawn" / "metadata.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == [*first, "A cat sleeps."]
    told = [provenance.read(folder / "drawn" / f"{i:06d}.png") for i in range(4)]
    assert [(one["prompt"], one["seed"], one["index"]) for one in told] == [
        *((text, "3", str(i)) for i, text in enumerate(first)),
        ("A cat sleeps.", "4", "0"),
    ]
    assert {(one["weights"], one["step"]) for one in told} == {(found["model"]["weights"], "7")}
    assert not any("prompt" in Image.open(path).info for path in (folder / "real").iterdir()), "nobody drew those"


def test_reconstructions_lie_beside_the_originals_and_are_scored_in_pairs(run, model, monkeypatch):
    """By a tokenizer that knows the upper half of each picture."""
    monkeypatch.setattr(suites, "BLOCK", 3)
    model.image = types.SimpleNamespace(
        encode=lambda x: x[:, : SIDE // 2], decode=lambda x: np.concatenate([x, 0 * x], 1)
    )
    found = scored(run, "reconstruction")["reconstruction"]
    (folder,) = run.glob("suites/reconstruction-*")
    originals = [protocol.first(one)[1] for one in shards.Reader(run / "prepared", "test")][:5]
    for i, original in enumerate(originals):
        assert np.array_equal(np.asarray(Image.open(folder / "originals" / f"{i:06d}.png")), original)
        rebuilt = np.asarray(Image.open(folder / "rebuilt" / f"{i:06d}.png"))
        assert np.array_equal(rebuilt[: SIDE // 2], original[: SIDE // 2]) and not rebuilt[SIDE // 2 :].any()
    wanted = [10 * np.log10(255**2 / np.mean(np.square(x[SIDE // 2 :], dtype=np.float64)) * 2) for x in originals]
    assert values(found)["psnr"] == pytest.approx(np.mean(wanted), rel=1e-5) and len(originals) == 5
    lines = []
    scored(run, "reconstruction", lines=lines)
    assert all(line.endswith("(known)") for line in lines) and len(lines) == 2


def test_results_of_different_models_say_so_and_stand_in_one_table(run, model):
    paths, told = [], []
    for name in ("a", "b"):
        (run / "decoder" / "weights").write_text(name)
        told.append(scored(run, "captions", "pictures"))
        for suite in told[-1]:
            paths.append(run / f"{suite}-{name}.json")
            shutil.copy(run / "suites" / f"{suite}.json", paths[-1])
    for suite in told[0]:
        first, second = (one[suite]["model"] for one in told)
        assert first["weights"] != second["weights"] and first | {"weights": ""} == second | {"weights": ""}
        assert first | {"weights": ""} == {"step": 7, "weights": "", "dtype": "bfloat16", "resolution": 256}
        assert json.loads((run / f"{suite}-b.json").read_text())["model"] == second
        assert "[a]" not in results.table([path for path in paths if path.name.startswith(suite)])


def test_an_interrupted_suite_continues_with_the_block_that_lacks(run, model, monkeypatch):
    monkeypatch.setattr(suites, "BLOCK", 2)
    draw, whole = model.text_to_image, scored(run, "pictures")["pictures"]
    (folder,) = run.glob("suites/pictures-*")
    for path in (folder / "00001.json", run / "suites" / "pictures.json"):
        path.unlink()
    model.asked.clear()
    again = scored(run, "pictures")["pictures"]
    assert [seed for _, seed in model.asked] == [4] and values(again) == values(whole) and model.text_to_image == draw


def test_what_is_known_is_not_made_again_and_what_changed_is(run, model, monkeypatch):
    first = scored(run, "captions", "pictures")
    model.asked.clear()
    monkeypatch.setitem(score.FIGURES, "psnr", lambda *x: pytest.fail("made again"))
    monkeypatch.setattr(words, "score", lambda *x, **y: pytest.fail("made again"))
    lines = []
    again = scored(run, "captions", "pictures", lines=lines)
    assert {name: one["metrics"] for name, one in again.items()} == {
        name: one["metrics"] for name, one in first.items()
    }
    assert not model.asked and all(line.endswith("(known)") for line in lines) and len(lines) == 8
    monkeypatch.undo()
    pretend(monkeypatch, model)
    scored(run, "captions", recipe=dataclasses.replace(RECIPE, evaluate=dataclasses.replace(RECIPE.evaluate, seed=5)))
    (run / "decoder" / "weights").write_text("others")
    scored(run, "captions")
    assert [seed for _, seed in model.asked] == [5, 3] and len(list(run.glob("suites/captions-*"))) == 3


def test_a_figure_is_made_again_if_a_picture_changes(run, model):
    before = values(scored(run, "pictures")["pictures"])
    (folder,) = run.glob("suites/pictures-*")
    Image.fromarray(picture()).save(folder / "drawn" / "000000.png")
    lines = []
    assert values(scored(run, "pictures", lines=lines)["pictures"])["psnr"] != before["psnr"]
    assert not any("known" in line for line in lines)


@pytest.fixture
def tasks_run(tmp_path):
    return write(tmp_path / "tasks", [scenes.record("tasks", 0, i, "test", 48) for i in range(30)])


def test_tasks_are_answered_once_and_scored_each_with_its_protocol(tasks_run, monkeypatch):
    """One who knows: pictures and words come back from what is kept as they were."""
    known, asked = [scenes.record("tasks", 0, i, "test", 48) for i in range(30)], []

    def answer(generator, task, rows, seed, sampling, max_text, wording):
        asked.append((task, wording))
        assert sampling.temperature == (1 if table.TASKS[task].draws else 0)
        found = [one for one in known if (one.fields["task"], one.fields["wording"]) == (task, wording)]
        read = [templates.read(task, one.parts) for one in found]
        return [{name: row[name] for name in table.TASKS[task].answer} for row in read][: len(rows)]

    pretend(monkeypatch, None)
    monkeypatch.setattr(suites.tasks, "answer", answer)
    found = scored(tasks_run, "tasks")["tasks"]
    assert set(values(found).values()) == {1.0} and found["metrics"]["edit"]["protocol"]["samples"] == 2
    assert {"edit", "edit/whole", "segmentation/miou", "edges/edge_f1", "located/box_iou", "words/text"} <= set(
        found["metrics"]
    )
    assert (
        scored(tasks_run, "tasks")["tasks"] == found
        and len(asked)
        == len(set(asked)) + asked.count("caption") // 2 + (asked.count("long_caption") + asked.count("question")) // 2
    )
    (tasks_run / "suites" / "tasks.json").unlink()
    calls = len(asked)
    assert scored(tasks_run, "tasks")["tasks"] == found and len(asked) == len(set(asked)) >= len(table.TASKS)
    (tasks_run / "suites" / "tasks.json").unlink()
    calls = len(asked)
    assert scored(tasks_run, "tasks")["tasks"] == found and len(asked) == calls
    assert results.table([tasks_run / "suites" / "tasks.json"]).startswith("| result | edit | edit/whole |")


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("tasks", {}, "suite tasks: a document of scenes:tasks: none of 8 documents fits"),
        ("captions", {"split": "dev"}, "no split 'dev'; found: test"),
        ("pictures", {"scoring": configs.Score()}, "fid: needs --score.weights.inception PATH"),
    ],
)
def test_what_a_suite_lacks_is_one_line_before_any_work(run, model, name, more, message):
    with pytest.raises(UserError, match=message):
        scored(run, name, **more)
    assert not model.asked


def test_a_model_of_another_form_is_not_asked(run):
    with pytest.raises(UserError, match="suite vqa asks as CM3Leon's documents do; .* is of form chameleon"):
        suites.evaluate(("vqa",), run, talking_run.RECIPE, run)


@pytest.fixture
def made(run, monkeypatch):
    """A run with a recipe, whose evaluation and checkpoints are made up."""
    (run / "recipe.json").write_text(json.dumps(configs.to_json(RECIPE)))
    calls = []
    monkeypatch.setattr(stage, "run", lambda recipe, folder, **how: calls.append((recipe.evaluate, how)))
    monkeypatch.setattr(suites.checkpoint, "steps", lambda folder: [2, 4])
    return run, calls


def test_the_verb_scores_by_suites_and_makes_the_evaluation_only_where_it_is_not(made, model, capsys):
    run, calls = made
    told = ["evaluate", str(run), "--suite", "scenes", "captions", "pictures", "--evaluate.samples", "2"]
    assert cli.main([*told, "--score.metrics", "psnr"]) == 0
    assert calls == [(dataclasses.replace(RECIPE.evaluate, samples=2), {"only": "evaluate"})]
    out = capsys.readouterr().out
    assert "suite captions: CIDEr: " in out and "suite pictures: psnr: " in out
    assert out.endswith(f"result: {run}/suites/captions.json\nresult: {run}/suites/pictures.json\n")
    assert json.loads((run / "suites" / "pictures.json").read_text())["pictures"]["files"] == 2
    assert cli.main(["evaluate", str(run), "--suite", "scenes"]) == 0 and len(calls) == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--split", "validation"], "--held-out, --split and --score go with --suite; add it"),
        (["--suite", "picture"], "picture"),
        (["--suite", "captions", "--held-out", "nowhere"], "nowhere/prepared': no such folder"),
        (["--suite", "captions", "--decoder.steps", "3"], "--decoder.training.steps: does nothing here"),
    ],
)
def test_a_wrong_flag_is_one_line(made, model, capsys, argv, message):
    assert cli.main(["evaluate", str(made[0]), *argv]) == 2
    line = capsys.readouterr().err
    assert message in line and line.count("\n") == 1 and not made[1]


def test_names_of_the_command_line_are_the_suites():
    assert set(cli.SuiteName.__args__) == {*suites.SUITES, "scenes"}


@pytest.mark.slow
def test_a_real_model_is_scored_by_suites_from_the_command_line(tmp_path, capsys, monkeypatch):
    """A tiny one with random weights."""
    net = configs.VQGAN(patch=4, width=8, multipliers=(1,), encoder_blocks=1, decoder_blocks=1, attention=(), z=3)
    model = configs.Decoder(layers=1, width=16, heads=2, position="both", dtype="float32")
    recipe = configs.Recipe(
        vocab=configs.Vocab(text=320, image=11, sentinels=4, multiple=8),
        prepare=configs.Prepare(resolution=SIDE),
        image=configs.Image(model=net),
        decoder=configs.DecoderStage(model=model, packing=configs.Packing("whole", 160, picture=16)),
        evaluate=configs.Evaluate(samples=3, batch=4, max_text=6),
    )
    truth = {"candidates": ["yes", "no", "a dog"], "relevance": [0.0, 1.0, 0.5], "answer": 1}
    truth |= {"caption": "", "history": [], "round": 1}
    judged = document("question", {"question": "is it old", "answer": "no", "image": picture()}, 0, "42/1", truth)
    judged = dataclasses.replace(judged, group="42")
    held = write(tmp_path / "held", [*records(), *problems(), judged])
    run = tmp_path / "run"
    run.mkdir()
    random_run.make(run, recipe, ["a red dog", "Question: What 1? Answer: yes."] * 9)
    told = ["evaluate", str(run), "--held-out", str(held), "--score.metrics", "psnr", "ssim"]
    told += ["--suite", "captions", "vqa", "pictures", "reconstruction", "science-qa", "visdial"]
    assert cli.main(told) == 0
    out = capsys.readouterr().out
    lines = ("captions: CIDEr: ", "vqa: accuracy: ", "pictures: ssim: ", "reconstruction: psnr: ")
    for line in (*lines, "science-qa: accuracy/NAT: "):
        assert f"suite {line}" in out
    assert "suite visdial: NDCG: " in out and "suite visdial: mean rank: " in out
    assert cli.main(told) == 0
    assert capsys.readouterr().out.count("(known)") == 6 + 3 + 2 + 2 + 4 + 6
    assert cli.main(["tabulate", *(str(run / "suites" / f"{name}.json") for name in ("captions", "vqa"))]) == 0
