"""Laws of the model card: facts of the run's files, what is not known said so, and a front matter that others read."""

import dataclasses
import json

import huggingface_hub
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from cm3jax import card, cli, config, stages
from cm3jax import run as runs
from cm3jax.data import prepare, tokens
from cm3jax.evaluate import samples
from cm3jax.evaluate.scenes import Score
from cm3jax.nn import flops
from cm3jax.types import UserError
from cm3jax.vocab import Vocab

VOCAB = Vocab(text=50, image=16, sentinels=4, multiple=8)
MODEL = config.Decoder(layers=1, width=16, heads=2, dtype="float32")
TRAINING = config.Training(steps=40, batch=8, seed=3)
RECIPE = config.Recipe(
    name="made | up",
    vocab=VOCAB,
    prepare=config.Prepare(source="elsewhere", resolution=16),
    image=config.Image(model=config.VQGAN(patch=4, multipliers=(1,), attention=())),
    decoder=config.DecoderStage(model=MODEL, packing=config.Packing("whole", 32), training=TRAINING),
)
LANGUAGES = ["en"] * 40 + ["fr"] * 35 + ["<de>"] * 4 + [None]


def line(i):
    """Return a picture's line of metadata.jsonl: three licences, two hosts; every tenth picture is missing."""
    licence = ("CC0-1.0", "<b>|own", "")[i % 3]
    source = f"https://host{i % 2}.example/{i}.png"
    return {
        "file_name": f"{i}.png" if i % 10 else "none.png",
        "text": f"grey {i}",
        "license": licence,
        "source": source,
    }


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("in")
    for i in range(40):
        Image.fromarray(np.full((20, 20, 3), 6 * i, np.uint8)).save(folder / f"{i}.png")
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line(i)) + "\n" for i in range(40)))
    out = tmp_path_factory.mktemp("out")
    prepare.prepare(config.Prepare(str(folder), 16, workers=1, shards=1), out, progress=False)
    return out


def make(run, prepared, right=lambda i: 2, recipe=RECIPE):
    """Write what a finished run leaves, without its weights: record i was answered with right(i) of 2 objects."""
    run.mkdir()
    (run / "recipe.json").write_text(json.dumps(config.to_json(recipe)))
    (run / "prepared").symlink_to(prepared)
    ids = [VOCAB.text_start] * 3 + [2] + [VOCAB.image_start + 5] * 16
    tokens.write(run / "tokens", "train", [(f"k{i}", np.array(ids)) for i in range(7)])
    tokens.write(run / "tokens", "test", [("k", np.array(ids[:5]))])
    for name in ("text/tokenizer.model", "decoder/checkpoints/40/manifest.json"):
        (run / name).parent.mkdir(parents=True)
        (run / name).write_text(name)
    (run / "image").mkdir()
    safetensors.numpy.save_file({"a": np.zeros((3, 5)), "b": np.zeros(2)}, run / "image" / "weights.safetensors")
    for name, devices in (("text", {}), ("decoder", {"TPU v5 lite": 8 * 3600.0})):
        stages.write(run / name, stages.Record(complete=True, seconds=1800.0, device_seconds=devices))
    table, rows = (
        {},
        [samples.Named("test", f"k{i}", {"lang": lang} if lang else {}) for i, lang in enumerate(LANGUAGES)],
    )
    judged = [Score(right(i), 2, right(i) == 2) for i in range(len(rows))]
    samples.put(table, "text_to_image", rows, judged)
    samples.write(run / "evaluate", table)
    value = sum(one.matched for one in judged) / sum(one.of for one in judged)
    scores = {
        "name": recipe.name,
        "source": "elsewhere",
        "protocol": {"samples": {"test": 80}, "seed": 5, "checkpoint": {"step": 40, "validation_loss": {"40": 2.5}}},
        "text_to_image": {"object_accuracy": value, "samples": 80, "sampling": {"temperature": 0.5}},
        "perplexity": {"text": 3.5, "image": None, "validation": {"text": 3.25}},
    }
    (run / "evaluate" / "scores.json").write_text(json.dumps(scores))
    return run


def cells(text, first):
    """Return the cells of the one row of a card that begins so."""
    (found,) = [row for row in text.splitlines() if row.startswith(f"| {first} |")]
    return [cell.strip() for cell in found.strip("|").split("|")][1:]


@pytest.fixture(scope="module")
def run(prepared, tmp_path_factory):
    return make(tmp_path_factory.mktemp("runs") / "one", prepared, lambda i: 2 if i < 40 else i % 2)


@pytest.fixture(scope="module")
def text(run):
    return card.card(run)


def test_the_front_matter_is_read_by_hugging_face_with_the_scores(run):
    path = card.write(run)
    assert path == run / "card.md"
    found = huggingface_hub.ModelCard.load(path)
    assert found.data.license == "unknown" and found.data.library_name == "cm3jax"
    (result,) = found.data.eval_results
    scores = json.loads((run / "evaluate" / "scores.json").read_text())
    assert result.metric_type == "object_accuracy" and result.metric_value == scores["text_to_image"]["object_accuracy"]
    assert result.task_type == "text-to-image" and found.data.model_name == "made | up"
    assert found.text.lstrip().startswith("# made &#124; up\n")


def test_documents_add_up_by_split_source_and_licence_and_rejects_have_reasons(text):
    assert "Rows read: 40; kept as documents: 36." in text and cells(text, "missing file") == ["4"]
    assert [cells(text, f"host{i}.example") for i in (0, 1)] == [["16"], ["20"]]
    kept = [line(i)["license"] for i in range(40) if i % 10]
    assert cells(text, "CC0-1.0") == [str(kept.count("CC0-1.0"))]
    assert cells(text, "&#60;b>&#124;own") == [str(kept.count("<b>|own"))], "no markup of the data's"
    assert [str(kept.count(""))] == cells(text.split("| licence |")[1].split("Rejected")[0], "not recorded")


def test_counts_of_what_is_not_shown_or_not_known_add_up_too():
    many = {str(i): 1 for i in range(card.MOST + 7)} | {"": 5}
    rows = card.counted(many, 100)
    assert rows[-2:] == [("others", 100 - card.MOST - 5), (card.UNKNOWN, 5)] and sum(n for _, n in rows) == 100
    assert card.counted(None, 9) == [(card.UNKNOWN, 9)], "a summary of an older version"


def test_tokens_are_counted_by_kind(text):
    assert text.count("| split | text | image | marks | in all |") == 1
    section = text.split("## Tokens")[1].split("##")[0]
    assert cells(section, "train") == ["21", "112", "7", "140"] and cells(section, "test") == ["3", "1", "1", "5"]


def test_compute_is_that_of_the_steps_and_of_the_chips_that_were_held(text):
    count = 40 * flops.step(MODEL, VOCAB.size, 8, 32)
    section = text.split("## Compute")[1].split("##")[0]
    assert cells(section, "decoder") == ["30 min 0 s", "8 TPU v5 lite", f"{count:.3g}"]
    assert cells(section, "text") == ["30 min 0 s", "none", "none"]
    assert cells(section, "sum of what is recorded") == ["1 h 0 min", "8 TPU v5 lite", f"{count:.3g}"]
    section = text.split("## Training")[1].split("##")[0]
    assert cells(section, "decoder") == ["40 of 40", "8", "adamw", "0.0003", "3"]
    assert (
        f"read {40 * 8 * 32:,} positions" in section and f"{40 * 8 * 32 / 140:.3g} times the training tokens" in section
    )


def test_scores_have_an_interval_where_single_records_are_known_and_say_so_where_not(text):
    value, spread, count = cells(text, "text_to_image.object_accuracy")
    low, high = map(float, spread.split(" – "))
    assert low < float(value) < high and count == "80"
    assert cells(text, "perplexity.text") == ["3.500", "not recorded", "not recorded"]
    assert cells(text, "perplexity.image")[0] == "not recorded"
    assert cells(text, "how pictures are drawn") == ["temperature 0.5"]
    assert cells(text, "device") == ["not recorded"] and cells(text, "image tokenizer")[0].startswith("17 parameters")


def test_scores_by_group_are_those_of_its_records_and_small_groups_are_marked(run):
    found = card.card(run, by=["lang"]).split("## Scores by lang")[1].split("##  Not")[0]
    assert cells(found, "en") == ["40", "1.000 (no spread)", "1.000 (no spread)"]
    french = sum(i % 2 for i in range(40, 75)) / 70
    assert cells(found, "fr")[1].startswith(f"{french:.3f} (") and cells(found, "fr")[0] == "35"
    assert cells(found, "&#60;de>")[0] == "4 (few)" and cells(found, "not recorded")[0] == "1 (few)"
    apart = f"accuracy {1 - french:.3g}, whole {1 - 0:.3g}"
    assert f"Largest differences between groups of 30 records or more: {apart}." in found
    assert "Fewer than two groups have 30 records" in "\n".join(
        card.by_group({"a": samples.read(run / "evaluate")}, "x")
    )
    with pytest.raises(UserError, match="--by langs: no record .* did you mean lang?"):
        card.card(run, by=["langs"])


def test_spread_over_runs_is_that_of_their_seeds_alone(run, prepared, tmp_path, capsys):
    training = dataclasses.replace(TRAINING, seed=4)
    other = dataclasses.replace(RECIPE, name="two", decoder=dataclasses.replace(RECIPE.decoder, training=training))
    two = make(tmp_path / "two", prepared, lambda i: 1, other)
    assert cli.main(["card", str(run), "--also", str(two), "--out", str(tmp_path / "card.md")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "card.md")
    found = (tmp_path / "card.md").read_text().split("Over 2 runs of this recipe")[1]
    assert "which differ in decoder.training.seed 3, 4:" in found
    first = json.loads((run / "evaluate" / "scores.json").read_text())["text_to_image"]["object_accuracy"]
    wanted = [np.mean([first, 0.5]), np.std([first, 0.5], ddof=1), 0.5, first]
    assert cells(found, "text_to_image.object_accuracy") == [f"{x:.3f}" for x in wanted]
    assert cells(found, "perplexity.image") == ["not recorded"] * 4
    assert "different protocols" not in found
    longer = dataclasses.replace(other.decoder, training=dataclasses.replace(training, steps=50))
    three = make(tmp_path / "three", prepared, recipe=dataclasses.replace(other, decoder=longer))
    with pytest.raises(
        UserError, match=r"its decoder.training.steps is 50, the other run's 40; give runs of one recipe"
    ):
        card.card(run, [three])


def test_runs_that_were_evaluated_otherwise_are_not_averaged_without_a_word(run, prepared, tmp_path):
    two = make(tmp_path / "two", prepared, lambda i: 1)
    path = two / "evaluate" / "scores.json"
    scores = json.loads(path.read_text())
    scores["protocol"] |= {"device": "TPU v5 lite", "seed": 6, "code": {"modules": "abc"}, "dtype": "float32"}
    scores["protocol"]["checkpoint"]["step"] = 30
    scores["start"] = {"checkpoint": {"step": 1}, "infill": {"object_accuracy": 0.25}}
    path.write_text(json.dumps(scores))
    found = card.card(run, [two]).split("Over 2 runs of this recipe")[1].split("##")[0]
    section = found.split("Evaluated by different protocols")[1].split("| score |")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines()[4:-1]]
    assert rows == [
        ["device", "not recorded", "TPU v5 lite"],
        ["code.modules", "not recorded", "abc"],
        ["dtype", "not recorded", "float32"],
    ]
    text = card.card(two)
    assert cells(text, "dtype of the network") == ["float32"] and cells(text, "seed") == ["6"]
    assert cells(text, "start.infill.object_accuracy")[0] == "0.250" and "start.checkpoint" not in text


def test_figures_of_suites_stand_in_the_card_with_their_protocols_and_their_model(prepared, tmp_path):
    run = make(tmp_path / "run", prepared)
    assert "## Scores of suites" not in card.card(run)
    (run / "suites" / "pictures-01234567").mkdir(parents=True)
    same = {"reference": {"count": 40, "data": "aa"}, "code": {"modules": "cc"}}
    fid = {"value": 23.4567, "warning": "too few", "protocol": {"samples": 50, "features": {"resize": "clean"}} | same}
    kid = {"value": 0.0125, "deviation": 0.5, "protocol": {"samples": 50, "subsets": 100} | same}
    model = {"step": 40, "weights": "0123", "dtype": "bfloat16", "resolution": 64}
    (run / "suites" / "pictures.json").write_text(json.dumps({"metrics": {"fid": fid, "kid": kid}, "model": model}))
    cider = {
        name: {"value": 1.25, "protocol": {"samples": n, "set": "a|b"}} for name, n in (("CIDEr", 9), ("BLEU-4", 8))
    }
    (run / "suites" / "captions.json").write_text(json.dumps({"metrics": cider}))
    text = card.card(run).split("## Scores of suites\n")[1].split("\n## ")[0]
    first, second = text.split("### pictures")
    assert first.startswith("\n### captions\n\nModel: step not recorded, weights not recorded")
    assert cells(first, "CIDEr") == ["1.25", "not recorded", "9"] and cells(first, "BLEU-4")[2] == "8"
    assert first.count("Protocol") == 1 and "\nProtocol: set = a&#124;b." in first
    assert (
        cells(second, "kid")[0] == "0.0125"
        and "Model: step 40, weights 0123, dtype bfloat16, resolution 64." in second
        and "fid: too few." in second
    )
    assert cells(second, "fid") == ["23.46", "not recorded", "50"] and cells(second, "kid")[1] == "0.5"
    whole = "reference.count = 40, reference.data = aa, code.modules = cc."
    assert f"\nProtocol of fid: features.resize = clean, {whole}" in second
    assert f"\nProtocol of kid: subsets = 100, {whole}" in second
    (run / "suites" / "captions.json").write_text("{")
    with pytest.raises(UserError, match="captions.json': not a file that cm3jax score writes"):
        card.card(run)


def test_a_run_of_which_nothing_is_known_has_a_card_that_says_so(tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps(config.to_json(RECIPE)))
    text = card.card(tmp_path)
    for what in ("Sources, licences, rejected rows", "Tokens by kind", "Training", "Scores"):
        assert f"{what}: not recorded" in text
    assert cells(text, "decoder") == ["none"] and "model-index" not in text
    assert all(f"- {one}" in text for one in card.UNSAID)
    with pytest.raises(UserError, match="has no recipe.json"):
        card.card(tmp_path / "nowhere")
    with pytest.raises(UserError, match="choose another file with --out"):
        card.write(tmp_path, out=str(tmp_path / "no" / "card.md"))


def test_what_was_imported_or_begun_elsewhere_is_named_and_its_compute_is_not_claimed(prepared, tmp_path):
    start = dataclasses.replace(RECIPE.decoder, start="runs/first")
    run = make(tmp_path / "run", prepared, recipe=dataclasses.replace(RECIPE, decoder=start))
    assert "What went into the first weights is not among them." in card.card(run)
    assert cells(card.card(run), "first weights") == ["those of the run runs/first"]
    runs.taken(run, "decoder", {}, "published (0123)")
    text = card.card(run)
    assert cells(text, "decoder, imported from") == ["published (0123)"] and "first weights |" not in text
    section = text.split("## Compute")[1].split("##")[0]
    assert cells(section, "decoder") == ["not recorded"] * 3 and "Training: not recorded" in text


def test_the_sets_of_a_mixture_are_told_with_their_shares(prepared, tmp_path):
    make(tmp_path / "b", prepared)
    mixture = config.Mixture((str(tmp_path / "b" / "tokens"),), (3.0, 0.3))
    recipe = dataclasses.replace(RECIPE, decoder=dataclasses.replace(RECIPE.decoder, mixture=mixture))
    text = card.card(make(tmp_path / "a", prepared, recipe=recipe))
    assert "Share 3 of what the decoder reads: the tokens above." in text
    assert "Share 0.3 of what the decoder reads: " in text and text.count("Rows read: 40; kept as documents: 36.") == 2


def test_an_evaluation_of_an_older_version_has_scores_without_intervals(prepared, tmp_path):
    run = make(tmp_path / "run", prepared)
    (run / "evaluate" / samples.FILE).unlink()
    text = card.card(run)
    assert "Scores of single records: not recorded" in text
    assert cells(text, "text_to_image.object_accuracy") == ["1.000", "not recorded", "not recorded"]
    with pytest.raises(UserError, match="--by lang: no scores of single records; make them with: cm3jax evaluate"):
        card.card(run, by=["lang"])
    (run / "evaluate" / "scores.json").unlink()
    with pytest.raises(UserError, match="scores.json: no such file; make it with: cm3jax evaluate"):
        card.card(run, [run])


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("reconstruction.psnr", ("reconstruction", "test", "psnr", "")),
        ("infill.composition.scene_accuracy", ("infill", "composition", "whole", "")),
        ("tasks.edit.accuracy", ("tasks.edit", "test", "accuracy", "")),
        ("tasks.question, count.whole", ("tasks.question", "test", "whole", "count")),
    ],
)
def test_every_score_is_found_among_single_records(name, found):
    assert card.place(name) == found
