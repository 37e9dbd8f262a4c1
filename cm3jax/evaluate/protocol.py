"""Score a run: choose checkpoint and sampling on the validation split, then run test and composition once.

Every figure is over the first `evaluate.samples` records of a split, never over picked ones. Where the data has ground
truth (the embedded world) pictures and captions are read back by recognisers; these score only, and choose nothing.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from PIL import Image

from cm3jax import checkpoint, provenance, sharding, stages
from cm3jax import config as configs
from cm3jax.data import encode, pipeline, retrieved, scenes, shards, tokens
from cm3jax.data.scenes_world import TASKS, Scene, from_json
from cm3jax.evaluate import pictures as closeness
from cm3jax.evaluate import results, samples
from cm3jax.evaluate import scenes as judges
from cm3jax.evaluate import tasks as answered
from cm3jax.sample import generate, recall, tasks
from cm3jax.tasks import table, templates
from cm3jax.train import lm
from cm3jax.types import UserError

PACKAGES = ("cm3jax", "jax", "jaxlib", "flax", "optax", "numpy")
JUDGED_BY = (
    *(f"evaluate/{name}" for name in ("boxes", "edges", "letters", "scenes", "segmentation", "tasks")),
    *(f"data/scenes{name}" for name in ("", "_recognise", "_render", "_words", "_world")),
    *(f"data/scenes_tasks{name}" for name in ("", "_read", "_render")),
    "tasks/table",
    "tasks/templates",
)
"""Modules that decide the figures of tasks."""
SCORED_BY = (*JUDGED_BY, "evaluate/pictures", "evaluate/protocol")
"""Modules that decide a figure of scores.json."""


@dataclasses.dataclass(frozen=True)
class Pairs:
    """The first caption and picture of each record of a split, and the record's ground truth.

    Attributes:
      pictures: uint8 [n, h, w, 3].
      truths: None where the data has none.
      level: Of the embedded world; "" for other data.
      names: The records, for the table of samples.
    """

    captions: list[str]
    pictures: np.ndarray
    truths: list[Scene] | None = None
    level: str = ""
    names: tuple[samples.Named, ...] = ()

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, rows: slice) -> "Pairs":
        truths = None if self.truths is None else self.truths[rows]
        taken = {"captions": self.captions[rows], "pictures": self.pictures[rows], "names": self.names[rows]}
        return dataclasses.replace(self, truths=truths, **taken)

    def pictured(self, pictures: np.ndarray) -> list[judges.Score]:
        """Judge pictures that should show what the captions say."""
        shown = scenes.recognise_all(pictures, self.level)
        captions = self.captions[: len(pictures)]
        return [
            judges.score(scenes.parse(text, self.level), scene) for text, scene in zip(captions, shown, strict=True)
        ]

    def described(self, texts: list[str]) -> list[judges.Score]:
        """Judge captions written for the pictures."""
        return [judges.score(scenes.parse(t, self.level), truth) for t, truth in zip(texts, self.truths, strict=True)]

    def correct(self, found: list[judges.Score]) -> list[bool | None]:
        """Return for each example whether all of it is right; None where nobody can tell."""
        return [one.whole for one in found] if self.level else [None] * len(self)

    def named(self, rows=None) -> list[samples.Named]:
        """Return the records, or those of these numbers."""
        return [self.names[i] for i in (range(len(self)) if rows is None else rows)]


ACCURACIES = ("object_accuracy", "scene_accuracy")


def accuracy(found: list[judges.Score]) -> dict[str, float]:
    """Return the two accuracies of judged examples; nothing for none."""
    return {name: judges.summary(found)[name] for name in ACCURACIES} if found else {}


def evaluate(recipe: configs.Recipe, run, say: Callable[[str], None] = print) -> dict:
    """Score the run in folder `run`; write evaluate/scores.json, samples.jsonl, examples.json and their pictures.

    Returns:
      What scores.json holds: see `score`.
    """
    run, settings = pathlib.Path(run), recipe.evaluate
    names = shards.splits(run / "prepared")
    splits = {name: pairs(run / "prepared", name, settings.samples) for name in names if name != "train"}
    splits = {name: split for name, split in splits.items() if len(split)}
    if "test" not in splits:
        raise UserError(f"{run / 'prepared'}: no record in the test split; raise prepare.test, or mark some as test")
    measure = held_out(recipe, run)
    losses = validation_losses(run, measure, lambda step: generate.weights(run, recipe, step))
    step = min(losses, key=losses.get) if losses else None
    if losses:
        say(f"evaluate: checkpoint {step}, of {', '.join(f'{s} (validation loss {x:.4f})' for s, x in losses.items())}")
    artist = Artist(generate.load(run, batch=settings.batch, step=step), settings, remembered(recipe, run))
    scores, examples, table = score(recipe, artist, measure, splits, say)
    if splits["test"].level == TASKS:
        scores["tasks"], examples["tasks"], each = answers(recipe, artist, run, scores, say)
        for name, task, found in each:
            samples.put(table, f"tasks.{task}", [name], [found])
    if recipe.decoder.start:
        scores["start"] = begun(recipe, artist, run, measure, splits, say)
    step, weights = generate.identity(run, step)
    scores["protocol"]["checkpoint"] = {"step": step, "weights": weights, "validation_loss": losses}
    scores["protocol"]["data"] = fingerprints(run, list(splits))
    samples.write(run / "evaluate", table)
    save(run / "evaluate", scores, examples)
    return scores


def begun(recipe: configs.Recipe, artist: "Artist", run: pathlib.Path, measure, splits: dict[str, Pairs], say) -> dict:
    """Return the figures of the model that training began with, on the same examples, with its own best setting."""
    say(f"evaluate: now the model that training began with, {recipe.decoder.start}")
    before = generate.load(recipe.decoder.start, batch=recipe.evaluate.batch)
    before = dataclasses.replace(artist, generator=before)
    scores, *_ = score(recipe, before, measure, splits, say)
    if splits["test"].level == TASKS:
        scores["tasks"], *_ = answers(recipe, before, run, scores, say)
    drawn_by = dict(zip(("step", "weights"), generate.identity(recipe.decoder.start), strict=True))
    return {"checkpoint": drawn_by} | {name: scores[name] for name in BEGUN if name in scores}


BEGUN = ("text_to_image", "image_to_text", "infill", "perplexity", "tasks")
"""Scores that the decoder decides."""


def answers(recipe: configs.Recipe, artist: "Artist", run: pathlib.Path, scores: dict, say) -> tuple[dict, list, list]:
    """Return what `evaluate.tasks.measure` does; pictures are drawn as was chosen for captions."""
    settings = recipe.evaluate
    draw = configs.from_json(configs.Sampling, scores["text_to_image"]["sampling"])

    def answer(task: str, values, wording: int):
        say(f"evaluate: task {task}, {len(values)} examples")
        sampling = draw if table.TASKS[task].draws else settings.write
        return tasks.answer(artist.generator, task, values, settings.seed, sampling, settings.max_text, wording)

    return answered.measure(shards.Reader(run / "prepared", "test"), answer, settings.samples)


def remembered(recipe: configs.Recipe, run: pathlib.Path):
    """Return the run's memory; None if its recipe has none."""
    from cm3jax.retrieval import memory

    return memory.load(run, recipe.evaluate.batch) if recipe.retrieve else None


@dataclasses.dataclass(frozen=True)
class Artist:
    """A generator with the settings of an evaluation, and perhaps a memory.

    Attributes:
      generator: A `sample.generate.Generator`.
      memory: A `retrieval.memory.Memory`; None: nothing is retrieved.
    """

    generator: Any
    settings: configs.Evaluate
    memory: Any = None

    @property
    def documents(self) -> tuple[int, ...]:
        """Numbers of documents to show."""
        return self.settings.documents if self.memory else (0,)

    def draw(self, split: Pairs, sampling: configs.Sampling, documents: int, most: int | None = None):
        """Return pictures for the first `most` captions of a split, and the documents shown before each."""
        encoder = self.memory.encoder if self.settings.candidates > 1 else None
        arguments = self.memory, documents, encoder, self.settings.candidates
        return recall.draw(self.generator, split.captions[:most], self.settings.seed, sampling, *arguments)

    def write(self, split: Pairs, codes: np.ndarray, documents: int, most: int | None = None):
        """Return captions for the first `most` pictures of a split, and the documents shown before each."""
        settings, shown = self.settings, split.pictures[:most]
        arguments = settings.seed, settings.write, settings.max_text, self.memory, documents, codes[:most]
        return recall.write(self.generator, shown, *arguments)

    def described(self, found: recall.Documents) -> list[list[dict]]:
        """Return what an example tells of the documents shown before each."""
        return [
            [
                {**one.origin, "score": one.score}
                | dict(zip(("caption", "picture"), first(self.memory.record(one)), strict=True))
                for one in row
            ]
            for row in found
        ]


def first(record) -> tuple[str | None, np.ndarray | None]:
    """Return the first text and the first picture of a record; None for what it lacks."""
    text = next((part for part in record.parts if isinstance(part, str)), None)
    return text, next((part for part in record.parts if encode.is_picture(part)), None)


def pair(record) -> tuple[str | None, np.ndarray | None]:
    """Return a record's caption and picture; None for what it lacks.

    Of the documents of tasks, those of "caption" have one: what stands in its place, without the words around it.
    """
    text, picture = first(record)
    if record.fields.get("task", "caption") != "caption":
        return None, None
    if text is not None and "wording" in record.fields:
        text = templates.read("caption", record.parts)["caption"]
    return text, picture


def pairs(prepared, split: str, most: int) -> Pairs:
    """Return the first pairs of a split; records without both a text and a picture are passed over."""
    captions, pictures, truths, names, level = [], [], [], [], ""
    for record in shards.Reader(prepared, split):
        text, picture = pair(record)
        if text is None or picture is None:
            continue
        captions.append(text)
        pictures.append(picture)
        names.append(samples.named(record, split))
        if record.source.startswith("scenes:"):
            level = record.source.removeprefix("scenes:")
            truths.append(from_json(record.fields["scene"]))
        if len(captions) == most:
            break
    stacked = np.stack(pictures) if pictures else np.zeros((0, 1, 1, 3), np.uint8)
    return Pairs(captions, stacked, truths or None, level, tuple(names))


def score(recipe, artist: Artist, measure, splits: dict[str, Pairs], say) -> tuple[dict, dict, samples.Table]:
    """Return the figures by task, the first test examples with their pictures, and the table of all samples."""
    test, generator = splits["test"], artist.generator
    codes = {name: generator.encode(split.pictures) for name, split in splits.items()}
    table: samples.Table = {}
    examples, scores = {}, {"name": recipe.name, "source": recipe.prepare.source, "protocol": protocol(recipe, splits)}

    say("evaluate: reconstruction")
    rebuilt = generator.image.decode(codes["test"])
    scores["reconstruction"], found = reconstruction(test, rebuilt, codes["test"], recipe.vocab.image)
    samples.put(table, "reconstruction", test.named(), found)
    examples["reconstruction"] = [
        {"original": a, "picture": b} for a, b in zip(test.pictures, rebuilt[: recipe.evaluate.sheet], strict=False)
    ]
    say("evaluate: text to image")
    scores["text_to_image"], drawn, found, judged, chosen = text_to_image(artist, splits)
    keep(table, "text_to_image", splits, judged)
    right = test.correct(judged.get("test", []))
    examples["text_to_image"] = [
        {"caption": c, "picture": p, "correct": r} for c, p, r in zip(test.captions, drawn, right, strict=True)
    ]
    sheet = recipe.evaluate.sheet
    shown(examples["text_to_image"], artist.described(found[:sheet]))
    say("evaluate: image to text")
    scores["image_to_text"], written, found, judged = image_to_text(artist, splits, codes)
    keep(table, "image_to_text", splits, judged)
    right = test.correct(judged.get("test", []))
    examples["image_to_text"] = [
        {"picture": p, "caption": c, "asked": a, "correct": r}
        for p, c, a, r in zip(test.pictures, written, test.captions, right, strict=True)
    ]
    shown(examples["image_to_text"], artist.described(found[:sheet]))
    say("evaluate: infilling")
    scores["infill"], examples["infill"], judged = infill(recipe.evaluate, generator, splits, codes, chosen)
    for name, (rows, found) in judged.items():
        samples.put(table, "infill", splits[name].named(rows), found)
    say("evaluate: perplexity")
    scores["perplexity"] = perplexity(measure, generator.params, "test")
    if "validation" in splits:
        scores["perplexity"]["validation"] = perplexity(measure, generator.params, "validation")
    return scores, {name: rows[:sheet] for name, rows in examples.items()}, table


def keep(table: samples.Table, task: str, splits: dict[str, Pairs], judged: dict[str, list[judges.Score]]) -> None:
    """Put what was judged of whole splits into the table of samples."""
    for name, found in judged.items():
        samples.put(table, task, splits[name].named(), found)


def shown(examples: list[dict], documents: list[list[dict]]) -> None:
    """Add to examples the documents that were shown before them, where there are any."""
    for example, found in zip(examples, documents, strict=False):
        if found:
            example["documents"] = found


def protocol(recipe, splits) -> dict:
    """Return what a reader needs to judge or repeat the figures."""
    return {
        "samples": {name: len(split) for name, split in splits.items()},
        "seed": recipe.evaluate.seed,
        "chosen_on": "validation" if "validation" in splits else "nothing: the first setting",
        "dtype": recipe.decoder.model.dtype,
        "resolution": recipe.prepare.resolution,
        "versions": {name: results.version(name) for name in PACKAGES},
        "code": results.code(SCORED_BY),
        "device": jax.devices()[0].device_kind,
    }


def fingerprints(run: pathlib.Path, splits: list[str]) -> dict[str, str]:
    """Return the fingerprint of the records of each split, whatever the others hold."""
    found = shards.files(run / "prepared")
    return {name: stages.fingerprint(run, [str(path.relative_to(run)) for path in found[name]]) for name in splits}


# ------------------------------------------------------------------------------------------------------------- tasks


def reconstruction(test: Pairs, rebuilt, codes, size: int) -> tuple[dict, list[dict]]:
    """Return how well the image tokenizer alone does, the ceiling of all that follows; and the same of each picture."""
    each = {name: getattr(closeness, name)(test.pictures, rebuilt) for name in ("psnr", "ssim")}
    found = {
        **{name: finite(values.mean()) for name, values in each.items()},
        **{f"codebook_{name}": value for name, value in closeness.codebook(codes, size).items()},
        "codes": size,
        "samples": len(test),
    }
    judged = test.pictured(rebuilt) if test.level else []
    rows = [{name: finite(values[i]) for name, values in each.items()} for i in range(len(test))]
    for row, one in zip(rows, judged, strict=False):
        row |= samples.counts(one)
    return found | accuracy(judged), rows


@dataclasses.dataclass(frozen=True)
class Try:
    """What a setting gave.

    Attributes:
      row: Its figures: validation (object accuracy) and those of the test split.
      answers: To the test split's captions or pictures, and `documents` shown before each.
      judged: The answers by split, of test and composition, where there is ground truth.
    """

    row: dict
    answers: Any
    documents: recall.Documents
    judged: dict[str, list[judges.Score]]


def best(tries: list[Try]) -> int:
    """Return the number of the one that was best on the validation split; the first where nothing tells."""
    return max(range(len(tries)), key=lambda i: tries[i].row.get("validation", 0.0))


def attempt(answer, judge, splits, count: int, row: dict) -> Try:
    """Return what answer(split's name, how many) gives, by judge(split's name, answers)."""
    answers, documents = answer("test", None)
    if not splits["test"].level:
        return Try(row, answers, documents, {})
    if count and "validation" in splits:
        row |= {"validation": accuracy(judge("validation", answer("validation", count)[0]))["object_accuracy"]}
    judged = judge("test", answers)
    return Try(row | accuracy(judged), answers, documents, {"test": judged})


def composed(one: Try, answer, judge, splits) -> Try:
    """Return a try with the composition split's figures too, if there is one that can be judged."""
    if not splits["test"].level or "composition" not in splits:
        return one
    judged = judge("composition", answer("composition", None)[0])
    row = one.row | {"composition": accuracy(judged)}
    return dataclasses.replace(one, row=row, judged=one.judged | {"composition": judged})


def text_to_image(artist: Artist, splits):
    """Return (scores, the test pictures of the chosen setting, documents shown, what was judged, that setting).

    How to draw is chosen with the most documents, then how many of them, both on the validation split. Without ground
    truth nothing can be chosen, and the first setting draws, with the most documents.
    """
    settings, test, most = artist.settings, splits["test"], max(artist.documents)

    def judge(name, pictures):
        return splits[name].pictured(pictures)

    def answers(sampling, documents: int):
        return lambda name, count: artist.draw(splits[name], sampling, documents, count)

    def attempted(sampling, documents: int, row: dict) -> Try:
        return attempt(answers(sampling, documents), judge, splits, settings.validation_samples, row)

    candidates = settings.draw if test.level else settings.draw[:1]
    tries = [attempted(sampling, most, {"sampling": configs.to_json(sampling)}) for sampling in candidates]
    first, sampling = tries[best(tries)], candidates[best(tries)]
    scores = {"settings": [one.row for one in tries]} if test.level else {}
    tries = []
    for n in artist.documents if test.level else (most,):
        one = first if n == most else attempted(sampling, n, {})
        figures = {name: value for name, value in one.row.items() if name != "sampling"}
        one = dataclasses.replace(one, row={"documents": n} | figures)
        tries.append(composed(one, answers(sampling, n), judge, splits))
    return *finished(artist, tries, scores, len(test), sampling), tries[best(tries)].judged, sampling


def image_to_text(artist: Artist, splits, codes):
    """Return (scores, the captions written for the test pictures, documents shown, what was judged)."""
    settings, test = artist.settings, splits["test"]

    def judge(name, texts):
        return splits[name][: len(texts)].described(texts)

    def attempted(documents: int) -> Try:
        answer = lambda name, count: artist.write(splits[name], codes[name], documents, count)  # noqa: E731
        count = settings.validation_samples if artist.memory else 0  # else there is nothing to choose
        one = attempt(answer, judge, splits, count, {"documents": documents})
        return composed(one, answer, judge, splits)

    tries = [attempted(n) for n in (artist.documents if test.level else (max(artist.documents),))]
    return *finished(artist, tries, {}, len(test), settings.write), tries[best(tries)].judged


def finished(artist: Artist, tries: list[Try], scores: dict, count: int, sampling):
    """Return (scores, answers, documents) of the best of tries with different numbers of documents."""
    chosen = tries[best(tries)]
    figures = {name: value for name, value in chosen.row.items() if name not in ("documents", "validation")}
    scores = figures | {"samples": count, "sampling": configs.to_json(sampling)} | scores
    if artist.memory:
        shown = [float(np.mean([len(row) for row in one.documents])) for one in tries]  # fewer where a row had no room
        rows = [one.row | {"shown": mean} for one, mean in zip(tries, shown, strict=True)]
        scores |= {"documents": chosen.row["documents"], "by_documents": rows}
        scores["candidates"] = artist.settings.candidates
    return scores, chosen.answers, chosen.documents


def infill(settings: configs.Evaluate, generator, splits, codes, sampling) -> tuple[dict, list[dict], dict]:
    """Return (scores, examples, judged) of drawing one region anew: a box around an object, or the picture's middle.

    Judged is {split: (numbers of the records, their `Score`s)}, where there is ground truth.

    Scenes without an object that has a region to itself are passed over.
    """

    def one(name):
        split, rng = splits[name], np.random.default_rng(settings.seed)
        targets = [judges.target(truth, generator.image.grid, rng) for truth in split.truths or []]
        rows = [i for i, t in enumerate(targets) if t] if split.level else list(range(len(split)))
        boxes = [targets[i].box if split.level else MIDDLE for i in rows]
        captions = [split.captions[i] for i in rows]
        drawn = generator.infill_image(codes[name][rows], captions, boxes, settings.seed, sampling)
        found = []
        if split.level:
            for i, shown in zip(rows, scenes.recognise_all(drawn, split.level), strict=True):
                stated = scenes.parse(split.captions[i], split.level)
                found.append(judges.infill_score(stated, split.truths[i], shown, targets[i]))
        return rows, boxes, captions, drawn, found

    test = splits["test"]
    rows, boxes, captions, drawn, found = one("test")
    scores = {"samples": len(rows), "sampling": configs.to_json(sampling)} | accuracy(found)
    judged = {"test": (rows, found)} if test.level else {}
    if test.level and "composition" in splits:
        numbers, *_, seen = one("composition")
        scores["composition"], judged["composition"] = accuracy(seen), (numbers, seen)
    right = [bool(s.matched == s.of) for s in found] if test.level else [None] * len(rows)
    examples = [
        {"masked": hide(test.pictures[i], box), "picture": p, "original": test.pictures[i], "caption": c, "correct": r}
        for i, box, p, c, r in zip(rows, boxes, drawn, captions, right, strict=True)
    ]
    return scores, examples, judged


MIDDLE = (0.25, 0.25, 0.75, 0.75)


def hide(picture: np.ndarray, box) -> np.ndarray:
    """Return the picture with a box (fractions) hatched."""
    h, w = picture.shape[:2]
    x0, y0, x1, y1 = (round(f * s) for f, s in zip(box, (w, h, w, h), strict=True))
    hidden = picture.copy()
    rows, columns = np.mgrid[y0:y1, x0:x1]
    hidden[y0:y1, x0:x1] = np.where(((rows + columns) // max(w // 32, 1) % 2)[..., None], 200, 150)
    return hidden


def held_out(recipe: configs.Recipe, run: pathlib.Path) -> Callable[..., dict[str, tuple[float, float]]]:
    """Return f(params, split, masked) -> {metric: (Σ w·nll, Σ w)} over the first rows of a split's tokens."""
    stage, source = recipe.decoder, retrieved.source(recipe, run)
    batches = math.ceil(recipe.evaluate.samples / stage.training.batch)
    stage = dataclasses.replace(stage, training=dataclasses.replace(stage.training, evaluate_batches=batches))
    net = lm.model(stage, recipe.vocab)
    step = jax.jit(lambda params, batch: lm.losses(net, stage, params, batch)[1])

    def measure(params, split: str, masked: bool):
        totals = None
        mesh = sharding.mesh_of(params)
        # In pieces: the mesh of drawing may split the model where that of training splits the batch.
        rows = sharding.filled(min(recipe.evaluate.batch, stage.training.batch), mesh)
        for batch in pipeline.eval_batches(run / "tokens", split, stage, recipe.vocab, masked, source=source):
            for first in range(0, stage.training.batch, rows):
                piece = jax.tree.map(lambda x: _filled(x[first : first + rows], rows), batch)  # noqa: B023
                with sharding.within(mesh):
                    metrics = step(params, piece)
                totals = metrics if totals is None else jax.tree.map(np.add, totals, metrics)
        return {name: (float(total), float(weight)) for name, (total, weight) in (totals or {}).items()}

    return measure


def _filled(x: np.ndarray, rows: int) -> np.ndarray:
    """Return an array of a batch with rows of zeros, which have no weight, up to `rows`."""
    return np.pad(x, [(0, rows - len(x))] + [(0, 0)] * (x.ndim - 1))


def validation_losses(run: pathlib.Path, measure, load) -> dict[int, float]:
    """Return {step: mean validation nll, in nats} of the decoder's checkpoints; {} if there is nothing to choose on.

    Args:
      measure: From `held_out`.
      load: Step -> parameters.
    """
    steps = checkpoint.steps(run / "decoder")
    if len(steps) < 2 or "validation" not in tokens.splits(run / "tokens"):
        return {}
    found = {}
    for step in steps:
        total, weight = measure(load(step), "validation", True).get("loss", (0.0, 0.0))
        if weight and math.isfinite(total):
            found[step] = total / weight
    return found


def perplexity(measure, params, split: str) -> dict[str, float | None]:
    """Return exp(mean nll) per token of a split: text and codes in causal order, infill in masked blocks."""
    totals = {masked: measure(params, split, masked) for masked in (False, True)}
    found = {}
    for masked, name in ((False, "text"), (False, "image"), (True, "infill")):
        total, weight = totals[masked].get(f"loss_{name}", (0.0, 0.0))
        found[name] = finite(math.exp(total / weight)) if weight else None
    return found


# -------------------------------------------------------------------------------------------------------------- files


def finite(x) -> float | None:
    """Return x, or None where JSON has no number for it."""
    return float(x) if math.isfinite(x) else None


def save(folder: pathlib.Path, scores: dict, examples: dict[str, list[dict]]) -> None:
    """Write scores.json and examples.json; a picture in an example becomes a PNG file and its name."""
    folder.mkdir(parents=True, exist_ok=True)

    def filed(value, name: str, fields=None):
        if isinstance(value, np.ndarray):
            Image.fromarray(value).save(folder / f"{name}.png", pnginfo=fields)
            return f"{name}.png"
        if isinstance(value, dict):
            return {key: filed(inner, f"{name}-{key}") for key, inner in value.items()}
        if isinstance(value, list):
            return [filed(inner, f"{name}-{i:03d}") for i, inner in enumerate(value)]
        return value

    def row(task: str, i: int, example: dict) -> dict:
        drawn = DRAWN.get(task)
        fields = provenance.fields(made(scores, task, example, i)) if drawn else None
        return {key: filed(x, f"{task}-{i:03d}-{key}", fields if key == drawn else None) for key, x in example.items()}

    out = {task: [row(task, i, example) for i, example in enumerate(rows)] for task, rows in examples.items()}
    (folder / "examples.json").write_text(json.dumps(out, indent=1) + "\n")
    (folder / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")


DRAWN = {"text_to_image": "picture", "infill": "picture", "tasks": "drawn"}
"""Task -> field of an example with what the model drew; other pictures were given, or only encoded and decoded."""


def made(scores: dict, task: str, example: dict, index: int) -> provenance.Made:
    """Return what an example's picture was made from; those of tasks are drawn as those from captions."""
    own = scores.get("text_to_image" if task == "tasks" else task, {})
    how = own.get("sampling", {})
    if task == "tasks":
        prompt, index, how = example["said"], 0, how | {"task": example["task"]}  # the first of its call
    else:
        prompt, how = example["caption"], how | {name: own[name] for name in ("candidates",) if name in own}
    source = "compositeWithTrainedAlgorithmicMedia" if task == "infill" else "trainedAlgorithmicMedia"
    model, seed = provenance.evaluated(scores), scores.get("protocol", {}).get("seed")
    return provenance.Made(model, prompt, seed, index, how, provenance.documents([example]), source)
