"""The model card of a run: Markdown with the front matter that Hugging Face reads, from facts on disk alone.

Every line says what a file of the run says: recipe.json, the stages' stage.json, prepared/summary.json, the token
shards, checkpoints, evaluate/scores.json and samples.jsonl, suites/*.json. What none of them says is "not recorded",
and stands there.
"""

import collections
import difflib
import json
import math
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
import safetensors
import yaml

from cm3jax import checkpoint, provenance, report, stages, trees
from cm3jax import config as configs
from cm3jax import run as runs
from cm3jax.data import tokens
from cm3jax.evaluate import results, samples
from cm3jax.nn import decoder, flops
from cm3jax.sample import generate
from cm3jax.train import lm
from cm3jax.types import UserError

UNKNOWN = "not recorded"
FEW = 30
"""Records of a group at least, for its figure to be more than a hint."""
MOST = 50
"""Groups of an attribute, sources and licences that are shown, the largest ones."""
UNSAID = (
    "licence of the weights, contact",
    "intended uses, and uses to refrain from",
    "known limits and biases, beyond the scores above",
    "languages of the texts",
    "consent of those whose work or pictures the data holds",
    "energy used and carbon emitted",
    "what people think of the results",
)
"""What a model card should say, and no file of a run has a place for."""


def write(run, also: Sequence[Any] = (), by: Sequence[str] = (), out: str = "") -> pathlib.Path:
    """Write the card of a run, and return its path.

    Args:
      run: Run folder.
      also: Run folders of the same recipe with other seeds; scores are then given with their spread over all.
      by: Attributes of records (`evaluate.samples.named`) by which scores are given.
      out: File; "": card.md in the run folder.

    Raises:
      UserError: if a folder is no run, runs differ in more than seeds, or no record has an attribute.
    """
    run = pathlib.Path(run)
    path = pathlib.Path(out) if out else run / "card.md"
    text = card(run, [pathlib.Path(one) for one in also], by)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as e:
        raise UserError(f"card {str(path)!r}: {e.strerror or e}; choose another file with --out") from None
    return path


def card(run: pathlib.Path, also: Sequence[pathlib.Path] = (), by: Sequence[str] = ()) -> str:
    """Return the text of a card; for the rest see `write`."""
    recipe, others = recipe_of(run), [recipe_of(one) for one in also]
    refuse_others(recipe, others, also)
    found = scores_of(run)
    sections = [
        ["# " + plain(recipe.name), "", INTRODUCTION.format(provenance.version())],
        ["## Model", "", *table(("", ""), model(recipe, run, found))],
        ["## Data", "", *data(run)],
        ["## Tokens", "", *token_section(recipe, run)],
        ["## Training", "", *training(recipe, run)],
        ["## Compute", "", *compute(recipe, run)],
        ["## Scores", "", *scoring(run, also, recipe, others)],
        *([["## Scores of suites", "", *told]] if (told := suites(run)) else []),
        *(["## Scores by " + plain(name), "", *grouped(samples.read(run / "evaluate"), name)] for name in by),
        ["## Not recorded", "", "This program keeps no record of:", "", *(f"- {line}" for line in UNSAID)],
        ["## All settings", "", "```json", json.dumps(configs.to_json(recipe), indent=1), "```"],
    ]
    return front(recipe, found) + "\n\n".join("\n".join(lines) for lines in sections) + "\n"


INTRODUCTION = (
    "Written by `cm3jax card` (cm3jax {}) from the files of the run, without a word by hand. What no file says is given"
    f' as "{UNKNOWN}".'
)


def recipe_of(run: pathlib.Path) -> configs.Recipe:
    """Return the recipe of a run.

    Raises:
      UserError: if the folder is no run.
    """
    if not (run / "recipe.json").is_file():
        raise UserError(f"run folder {str(run)!r}: has no recipe.json; give the folder that `cm3jax run` wrote")
    return configs.load(run / "recipe.json")


def scores_of(run: pathlib.Path) -> dict[str, Any]:
    """Return what the evaluation of a run found; {} if there was none."""
    path = run / "evaluate" / "scores.json"
    return report.read(path) if path.is_file() else {}


# ------------------------------------------------------------------------------------------------------- Markdown, YAML


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Return a table in Markdown: columns under a name stand right, but for the first; those without one, left."""
    marks = ["---", *("---:" if name else "---" for name in head[1:])]
    cells = [list(head), marks, *([plain(cell) for cell in row] for row in rows)]
    return [f"| {' | '.join(row)} |" for row in cells]


def plain(value: Any) -> str:
    """Return a value as text that is no markup and fits a cell; numbers with their thousands apart."""
    if value is None or value == "":
        return UNKNOWN
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = " ".join(str(value).split())
    return "".join(f"&#{ord(sign)};" if sign in "<&|`*[\\" else sign for sign in text)


def front(recipe: configs.Recipe, found: dict[str, Any]) -> str:
    """Return the front matter (huggingface.co/docs/hub/model-cards): what the Hub indexes."""
    values = {
        "library_name": "cm3jax",
        "license": "unknown",
        "pipeline_tag": "text-to-image",
        "tags": ["cm3leon", "jax", "text-to-image", "image-to-text"],
    }
    if results := [one for task in HUB for one in hub_result(recipe, found, task)]:
        values["model-index"] = [{"name": recipe.name, "results": results}]
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---\n\n"


HUB = {"text_to_image": "text-to-image", "image_to_text": "image-to-text"}
"""Task of an evaluation -> what the Hub calls it."""


def hub_result(recipe: configs.Recipe, found: dict[str, Any], task: str) -> list[dict]:
    """Return a task's figures as one result of a model-index, in a list; [] if it has none."""
    own = {name: value for name, value in found.get(task, {}).items() if name in ("object_accuracy", "scene_accuracy")}
    source = recipe.prepare.source or UNKNOWN
    measured = [{"type": name, "name": name.replace("_", " "), "value": value} for name, value in own.items()]
    where = {"type": source, "name": source, "split": "test"}
    return [{"task": {"type": HUB[task]}, "dataset": where, "metrics": measured}] if measured else []


# -------------------------------------------------------------------------------------------------------------- a model


def model(recipe: configs.Recipe, run: pathlib.Path, found: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return what the network is, a fact a row."""
    net, vocab, rows = recipe.decoder.model, recipe.vocab, []
    if steps := checkpoint.steps(run / "decoder"):
        shapes = jax.eval_shape(lambda key: decoder.init(lm.model(recipe.decoder, vocab), key), jax.random.key(0))
        told = found.get("protocol", {}).get("checkpoint", {})
        step = told.get("step", steps[-1])
        weights = generate.identity(run, step)[1] if step in steps else told.get("weights")
        chosen = "chosen on the validation split" if told.get("validation_loss") else "the latest"
        shape = f"layers {net.layers}, width {net.width}, heads {net.heads}"
        rows += [
            ("decoder", f"{trees.size(shapes):,} parameters; {shape}"),
            ("row", f"{recipe.decoder.packing.length:,} tokens"),
            ("checkpoint", f"step {step}, {chosen}"),
            ("weights, as pictures name them in their fields", weights),
        ]
    else:
        rows.append(("decoder", "none"))
    rows += [
        ("vocabulary", f"{vocab.size:,} ids: {vocab.text:,} of text, {vocab.image:,} image codes"),
        ("form of documents", recipe.form.kind),
    ]
    side, factor = recipe.prepare.resolution, recipe.image.model.factor
    for name, more in (("image", f", pictures of {side} px as {(side // factor) ** 2:,} codes"), ("retriever", "")):
        if (run / name / "weights.safetensors").is_file():
            title = {"image": "image tokenizer"}.get(name, name)
            rows.append((title, f"{parameters(run / name / 'weights.safetensors'):,} parameters{more}"))
    rows += [("memory of documents", f"splits {', '.join(recipe.bank.splits)}")] if recipe.retrieve else []
    if "decoder" in trained(recipe, run):
        start = recipe.decoder.start
        rows.append(("first weights", f"those of the run {start}" if start else "random"))
    origins = {name: record.imported for name, record in records(run).items() if record.imported}
    return rows + [(f"{name}, imported from", origin) for name, origin in origins.items()]


def parameters(path: pathlib.Path) -> int:
    """Return how many numbers a safetensors file holds."""
    with safetensors.safe_open(path, "numpy") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 (no mapping)


def records(run: pathlib.Path) -> dict[str, stages.Record]:
    """Return the records of the stages that were begun."""
    found = {name: stages.read(stage.folder(run)) for name, stage in runs.STAGES.items()}
    return {name: record for name, record in found.items() if record}


# ------------------------------------------------------------------------------------------------------ data and tokens


def data(run: pathlib.Path) -> list[str]:
    """Return where the documents came from, under which licences, and which were rejected."""
    path = run / "prepared" / "summary.json"
    if not path.is_file():
        return [f"Sources, licences, rejected rows: {UNKNOWN} (no prepared/summary.json)."]
    found = report.read(path)
    splits, total = found["splits"], found["records"]
    source = plain(found["config"].get("source"))
    lines = [f"Source: {source}. Rows read: {found['rows']:,}; kept as documents: {total:,}."]
    rows = [(name, counts["records"], counts["pictures"]) for name, counts in splits.items()]
    lines += ["", *table(("split", "documents", "pictures"), rows)]
    lines += ["", *table(("source", "documents"), counted(found.get("sources"), total))]
    lines += ["", *table(("licence", "documents"), counted(found.get("licenses"), total))]
    rejected = found["rejects"]
    lines += ["", f"Rejected: {sum(rejected.values()):,} rows{'' if rejected else ', as all could be used'}."]
    lines += ["", *table(("reason", "rows"), sorted(rejected.items(), key=lambda x: -x[1]))] if rejected else []
    pictures = [
        ("the same pixels as another", found["duplicates"]),
        ("the same pixels in several splits", found["straddling"]),
        ("enlarged to the resolution", found.get("sizes", {}).get("enlarged")),
    ]
    return [*lines, "", *table(("pictures", "number"), pictures)]


def counted(counts: dict[str, int] | None, total: int) -> list[tuple[str, int]]:
    """Return rows of the largest counts, what is not among them, and what is not known; they add up to `total`."""
    known = {name: n for name, n in (counts or {}).items() if name}
    largest = sorted(known.items(), key=lambda x: -x[1])[:MOST]
    unknown = (counts or {}).get("", 0) if counts else total
    left = total - sum(n for _, n in largest) - unknown
    return largest + [("others", left)] * (left > 0) + [(UNKNOWN, unknown)] * (unknown > 0)


def token_section(recipe: configs.Recipe, run: pathlib.Path) -> list[str]:
    """Return how many tokens of which kind there are, and in other sets of the mixture."""
    if not tokens.splits(run / "tokens"):
        return [f"Tokens by kind: {UNKNOWN} (no token shards in tokens/)."]
    counts = {split: kinds(tokens.Tokens(run / "tokens", split), recipe) for split in tokens.splits(run / "tokens")}
    names = list(next(iter(counts.values())))
    rows = [(split, *own.values(), sum(own.values())) for split, own in counts.items()]
    lines = table(("split", *names, "in all"), rows)
    for name, weight in zip(("", *recipe.decoder.mixture.sets), recipe.decoder.mixture.weights, strict=False):
        other = pathlib.Path(name)
        lines += ["", f"Share {weight:g} of what the decoder reads: {plain(name) if name else 'the tokens above'}."]
        lines += ["", *data(other.parent)] if name else []
    return lines


def kinds(found: tokens.Tokens, recipe: configs.Recipe) -> dict[str, int]:
    """Return {"text", "image", "marks": number of ids} of a split."""
    vocab, counts = recipe.vocab, collections.Counter()
    for ids in found.blocks():
        image, text = int(np.count_nonzero(vocab.is_image(ids))), int(np.count_nonzero(vocab.is_text(ids)))
        counts.update(text=text, image=image, marks=len(ids) - text - image)
    return {name: counts[name] for name in ("text", "image", "marks")}


# --------------------------------------------------------------------------------------------------- training, compute

TRAINED = ("image", "retriever", "decoder")
"""Stages that the one loop trains."""


def trained(recipe: configs.Recipe, run: pathlib.Path) -> dict[str, int]:
    """Return {stage: steps done} of what was trained in this run."""
    found = {name: checkpoint.steps(run / name) for name in TRAINED if name in records(run)}
    return {name: steps[-1] for name, steps in found.items() if steps and not records(run)[name].imported}


def training(recipe: configs.Recipe, run: pathlib.Path) -> list[str]:
    """Return what each training was set to, and how much the decoder read."""
    done = trained(recipe, run)
    if not done:
        return [f"Training: {UNKNOWN} (no stage was trained in this run)."]
    rows = []
    for name, steps in done.items():
        settings = getattr(recipe, name).training
        how, far = settings.optimizer, f"{steps:,} of {settings.steps:,}"
        rows.append((name, far, settings.batch, how.name, f"{how.peak_lr:g}", str(settings.seed)))
    lines = table(("stage", "steps", "rows a step", "optimizer", "peak learning rate", "seed"), rows)
    if "decoder" in done:
        stage = recipe.decoder
        read = done["decoder"] * stage.training.batch * stage.packing.length
        lines += ["", f"The decoder read {read:,} positions, padding included; parameters trained: {stage.trainable}."]
        if "train" in tokens.splits(run / "tokens") and not stage.mixture.sets:
            there = tokens.Tokens(run / "tokens", "train").total
            lines[-1] += f" That is {read / there:.3g} times the training tokens."
    return lines


def compute(recipe: configs.Recipe, run: pathlib.Path) -> list[str]:
    """Return time, chip-hours and model FLOPs of each stage, and their sums."""
    known, done, rows, sums = records(run), trained(recipe, run), [], collections.Counter()
    for name in known:
        record, count = known[name], model_flops(recipe, name, done)
        held = {kind: seconds / 3600 for kind, seconds in record.device_seconds.items()}
        chips = ", ".join(f"{hours:.3g} {kind}" for kind, hours in held.items())
        none = "" if record.imported or name in runs.ON_DEVICES else "none"
        cost = f"{count:.3g}" if count else "none" if none else ""
        rows.append((name, "" if record.imported else report.duration(record.seconds), chips or none, cost))
        sums.update(held | {"seconds": record.seconds, "flops": count})
    chips = ", ".join(f"{hours:.3g} {kind}" for kind, hours in sums.items() if kind not in ("seconds", "flops"))
    all_flops = f"{sums['flops']:.3g}" if sums["flops"] else ""
    rows.append(("sum of what is recorded", report.duration(sums["seconds"]), chips, all_flops))
    head = ("stage", "time", "chip-hours, by jax's name of the chip", "model FLOPs")
    notes = (
        "Chip-hours are the time times all devices that the run held. Model FLOPs are those of the mathematics of the"
        " training steps, without what is computed again; they have no closed form here for the image tokenizer, and"
        " are not counted where nothing is trained."
    )
    more = " What went into the first weights is not among them." if recipe.decoder.start else ""
    return [*table(head, rows), "", notes + more]


def model_flops(recipe: configs.Recipe, name: str, done: dict[str, int]) -> float:
    """Return the model FLOPs of a stage's training; 0: not known."""
    if name == "decoder" and name in done:
        return done[name] * lm.step_flops(recipe.decoder, recipe.vocab)
    if name == "retriever" and name in done:
        return done[name] * flops.contrastive(recipe.retriever.model, recipe.retriever.training.batch)
    return 0.0


# --------------------------------------------------------------------------------------------------------------- scores

FIGURE = {"object_accuracy": "accuracy", "scene_accuracy": "whole"}
"""Name in scores.json -> name of the same in `evaluate.samples.FIGURES`; others have the same."""
ASIDE = {"samples", "examples", "codes", "documents", "candidates", "sampling", "checkpoint"}
"""Names in scores.json of numbers that are no figures; lists, such as those of all settings, are passed over."""


def figures(found: dict[str, Any]) -> dict[str, float | None]:
    """Return {"text_to_image.object_accuracy": 0.9, ...} of what scores.json holds; None where JSON has no number."""
    flat = stages.flatten({name: value for name, value in found.items() if name != "protocol"})
    return {name: x for name, x in flat.items() if not ASIDE & set(name.split(".")) and (x is None or is_number(x))}


LEGEND = (
    "accuracy: parts (objects, letters, answers) that are right, over those asked for or shown, whichever are more;"
    " scene accuracy, whole: records of which all is right; psnr in dB; perplexity per token. No spread: the"
    " records do not differ, which tells nothing of others."
)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def scoring(run, also, recipe: configs.Recipe, others: list[configs.Recipe]) -> list[str]:
    """Return the scores with their spread: over records, or over runs where there are several."""
    if not (found := scores_of(run)) and not also:
        return [f"Scores: {UNKNOWN} (the run was not evaluated)."]
    own, lines = figures(found), [*protocol(found)]
    rows = samples.read(run / "evaluate")
    if not rows:
        lines += ["", f"Scores of single records: {UNKNOWN} (evaluated by an older version), so intervals are too."]
    lines += ["", LEGEND]
    one = [(name, shown(value), interval(rows, name), *size(rows, name)) for name, value in own.items()]
    lines += ["", *table(("score", "value", "95 % interval over records", "records"), one)]
    if also:
        lines += ["", *over_runs([run, *also], [recipe, *others])]
    return lines


def protocol(found: dict[str, Any]) -> list[str]:
    """Return under which circumstances the scores were taken."""
    told, drawn = found.get("protocol", {}), found.get("text_to_image", {}).get("sampling")
    count = ", ".join(f"{n:,} of {split}" for split, n in told.get("samples", {}).items()) or UNKNOWN
    versions = ", ".join(f"{name} {version}" for name, version in told.get("versions", {}).items()) or UNKNOWN
    rows = [
        ("records", count),
        ("settings chosen on", told.get("chosen_on")),
        ("seed", told.get("seed")),
        ("fingerprints of the data", ", ".join(f"{x} of {split}" for split, x in told.get("data", {}).items())),
        ("dtype of the network", told.get("dtype")),
        ("side of pictures, px", told.get("resolution")),
        ("digest of the code that decides figures", told.get("code", {}).get("modules")),
        ("device", told.get("device")),
        ("versions", versions),
        ("how pictures are drawn", report.sampling_name(drawn) if drawn else UNKNOWN),
    ]
    return table(("", ""), rows)


def suites(run: pathlib.Path) -> list[str]:
    """Return what each suite found, with the protocols of its figures; [] if none was run."""
    lines = []
    for path in sorted((run / "suites").glob("*.json")):
        found = results.read(path)
        told, metrics = found.get("model", {}), found["metrics"]
        model = ", ".join(f"{name} {plain(told.get(name))}" for name in ("step", "weights", "dtype", "resolution"))
        rows = []
        for name, one in metrics.items():
            spread = f"{one['deviation']:.4g}" if "deviation" in one else None
            rows.append((name, f"{one['value']:.4g}", spread, one["protocol"].get("samples")))
        lines += ["", f"### {plain(path.stem)}", "", f"Model: {model}.", ""]
        lines += table(("score", "value", "standard deviation", "samples"), rows)
        lines += [f"\n{plain(name)}: {plain(x['warning'])}." for name, x in metrics.items() if "warning" in x]
        groups: dict[str, list[str]] = {}
        for name, one in metrics.items():
            own = {k: v for k, v in stages.flatten(one["protocol"]).items() if k != "samples"}
            groups.setdefault(", ".join(f"{k} = {v}" for k, v in own.items()), []).append(name)
        for text, names in groups.items():
            whose = f" of {', '.join(map(plain, names))}" if len(groups) > 1 else ""
            lines += ["", f"Protocol{whose}: {plain(text)}."]
    return lines[1:]


def shown(value: float | int | None) -> str:
    return UNKNOWN if value is None else report.figure(value)


def place(name: str) -> tuple[str, str, str, str]:
    """Return (task, split, figure, kind of question) of a score's name in the table of samples."""
    task, *rest = name.split(".")
    if task == "tasks":
        group, _, kind = rest[0].partition(", ")
        return f"tasks.{group}", "test", rest[-1], kind
    split = rest[0] if len(rest) > 1 else "test"
    return task, split, FIGURE.get(rest[-1], rest[-1]), ""


def estimated(rows: list[dict], name: str) -> samples.Estimate | None:
    """Return a score anew from single records; None if they do not tell it."""
    task, split, figure, kind = place(name)
    own = [one for one in rows if one["split"] == split and kind in ("", one["attributes"].get("truth.kind"))]
    return samples.estimates(own, task).get(figure)


def interval(rows: list[dict], name: str) -> str:
    return between(estimated(rows, name))


def between(one: samples.Estimate | None) -> str:
    """Return "0.85 – 0.96"."""
    if one is None:
        return UNKNOWN
    return "no spread" if one.low is None else f"{shown(one.low)} – {shown(one.high)}"


def size(rows: list[dict], name: str) -> list[int | None]:
    one = estimated(rows, name)
    return [one.records if one else None]


# ------------------------------------------------------------------------------------------------------ runs and groups


def refuse_others(recipe: configs.Recipe, others: list[configs.Recipe], folders: Sequence[pathlib.Path]) -> None:
    """Raise UserError unless runs are of one recipe but for seeds and names: their spread would not be chance's."""
    for other, folder in zip(others, folders, strict=True):
        changed = stages.differences(*(configs.to_json(one) for one in (recipe, other)))
        changed = [one for one in changed if not is_seed(one[0]) and one[0] != "name"]
        if changed:
            name, here, there = changed[0]
            raise UserError(
                f"--also {folder}: its {name} is {there!r}, the other run's {here!r}; give runs of one recipe that"
                " differ in their seeds alone"
            )


def is_seed(name: str) -> bool:
    return name.split(".")[-1] in ("seed", "eval_mask_seed")


def over_runs(folders: list[pathlib.Path], recipes: list[configs.Recipe]) -> list[str]:
    """Return each score's mean and spread over runs, and in which seeds the runs differ."""
    scores = [report.read(folder / "evaluate" / "scores.json") for folder in folders]
    found = [figures(one) for one in scores]
    rows = []
    for name in found[0]:
        values = [one[name] for one in found if one.get(name) is not None]
        whole = len(values) == len(found)
        spread = (np.mean(values), np.std(values, ddof=1), min(values), max(values)) if whole else [None] * 4
        rows.append((name, *(shown(None if x is None else float(x)) for x in spread)))
    flat = [{k: v for k, v in stages.flatten(configs.to_json(one)).items() if is_seed(k)} for one in recipes]
    differ = [name for name in flat[0] if len({one[name] for one in flat}) > 1]
    seeds = "; ".join(f"{name} {', '.join(str(one[name]) for one in flat)}" for name in differ)
    head = f"Over {len(found)} runs of this recipe, which differ in {seeds or 'nothing, not even a seed'}:"
    return [head, "", *mixed(scores), *table(("score", "mean", "standard deviation", "least", "largest"), rows)]


def mixed(scores: list[dict[str, Any]]) -> list[str]:
    """Return in what the protocols of several evaluations differ, beside the runs' own checkpoints and seeds."""
    told = [{k: v for k, v in one.get("protocol", {}).items() if k not in ("checkpoint", "seed")} for one in scores]
    if not (rows := results.differing(told)):
        return []
    head = "Evaluated by different protocols, so that what lies between the runs is not their seeds' alone:"
    return [head, "", *table(("", *(f"run {i + 1}" for i in range(len(scores)))), rows), ""]


def grouped(rows: list[dict], name: str) -> list[str]:
    """Return the scores of each group of test records with the same value of an attribute.

    Raises:
      UserError: if no record has it.
    """
    rows = [one for one in rows if one["split"] == "test"]
    known = sorted({attribute for one in rows for attribute in one["attributes"]})
    if not rows:
        raise UserError(f"--by {name}: no scores of single records; make them with: cm3jax evaluate RUN")
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"they have: {', '.join(known) or 'none'}"
        raise UserError(f"--by {name}: no record of the evaluation has this attribute; {hint}")
    groups: dict[str, list[dict]] = {}
    for one in rows:
        groups.setdefault(str(one["attributes"].get(name, UNKNOWN)), []).append(one)
    lines = [f"Groups of fewer than {FEW} records are marked: chance alone may make their figures."]
    for task in dict.fromkeys(task for one in rows for task in one["scores"]):
        lines += ["", f"### {plain(task)}", "", *by_group(groups, task)]
    return lines


def by_group(groups: dict[str, list[dict]], task: str) -> list[str]:
    """Return a table of one task's figures, a row a group, and how far the groups are apart."""
    found = {group: samples.estimates(own, task) for group, own in groups.items()}
    counts = {group: sum(task in one["scores"] for one in own) for group, own in groups.items()}
    order = sorted((group for group in found if counts[group]), key=lambda group: (-counts[group], group))
    names = [name for name in samples.FIGURES if any(name in one for one in found.values())]
    rows = []
    for group in order[:MOST]:
        cells = (found[group].get(name) for name in names)
        values = [f"{shown(one.value)} ({between(one)})" if one else UNKNOWN for one in cells]
        rows.append((group, f"{counts[group]:,}{' (few)' if counts[group] < FEW else ''}", *values))
    lines = table(("group", "records", *(f"{name} (95 % interval)" for name in names)), rows)
    lines += ["", f"{len(order) - MOST:,} smaller groups are not shown."] if len(order) > MOST else []
    enough = [found[group] for group in order if counts[group] >= FEW]
    if len(enough) < 2:
        return [*lines, "", f"Fewer than two groups have {FEW} records: how far they are apart is not given."]
    values = {name: [one[name].value for one in enough if name in one] for name in names}
    apart = ", ".join(f"{name} {max(own) - min(own):.3g}" for name, own in values.items() if own)
    return [*lines, "", f"Largest differences between groups of {FEW} records or more: {apart}."]
