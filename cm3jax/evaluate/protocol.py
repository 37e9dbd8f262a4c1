"""Score a run: choose checkpoint and sampling on the validation split, then run test and composition once.

Every figure is over the first `evaluate.samples` records of a split, never over picked ones. Where the data has ground
truth (the embedded world) pictures and captions are read back by recognisers; these score only, and choose nothing.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable
from importlib import metadata

import jax
import numpy as np
from PIL import Image

from cm3jax import checkpoint
from cm3jax import config as configs
from cm3jax.data import encode, pipeline, scenes, shards, tokens
from cm3jax.data.scenes_world import Scene, from_json
from cm3jax.evaluate import pictures as closeness
from cm3jax.evaluate import scenes as judges
from cm3jax.sample import generate
from cm3jax.train import lm
from cm3jax.types import UserError

PACKAGES = ("cm3jax", "jax", "jaxlib", "flax", "optax", "numpy")


@dataclasses.dataclass(frozen=True)
class Pairs:
    """The first caption and picture of each record of a split, and the record's ground truth.

    Attributes:
      pictures: uint8 [n, h, w, 3].
      truths: None where the data has none.
      level: Of the embedded world; "" for other data.
    """

    captions: list[str]
    pictures: np.ndarray
    truths: list[Scene] | None = None
    level: str = ""

    def __len__(self) -> int:
        return len(self.captions)

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


ACCURACIES = ("object_accuracy", "scene_accuracy")


def accuracy(found: list[judges.Score]) -> dict[str, float]:
    """Return the two accuracies of judged examples; nothing for none."""
    return {name: judges.summary(found)[name] for name in ACCURACIES} if found else {}


def evaluate(recipe: configs.Recipe, run, say: Callable[[str], None] = print) -> dict:
    """Score the run in folder `run`; write evaluate/scores.json, evaluate/examples.json and the examples' pictures.

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
    losses = validation_losses(run, measure)
    step = min(losses, key=losses.get) if losses else None
    if losses:
        say(f"evaluate: checkpoint {step}, of {', '.join(f'{s} (validation loss {x:.4f})' for s, x in losses.items())}")
    generator = generate.load(run, batch=settings.batch, step=step)
    scores, examples = score(recipe, generator, measure, splits, say)
    scores["protocol"]["checkpoint"] = {
        "step": step or checkpoint.steps(run / "decoder")[-1],
        "validation_loss": losses,
    }
    save(run / "evaluate", scores, examples)
    return scores


def pairs(prepared, split: str, most: int) -> Pairs:
    """Return the first pairs of a split; records without both a text and a picture are passed over."""
    captions, pictures, truths, level = [], [], [], ""
    for record in shards.Reader(prepared, split):
        text = next((part for part in record.parts if isinstance(part, str)), None)
        picture = next((part for part in record.parts if encode.is_picture(part)), None)
        if text is None or picture is None:
            continue
        captions.append(text)
        pictures.append(picture)
        if record.source.startswith("scenes:"):
            level = record.source.removeprefix("scenes:")
            truths.append(from_json(record.fields["scene"]))
        if len(captions) == most:
            break
    stacked = np.stack(pictures) if pictures else np.zeros((0, 1, 1, 3), np.uint8)
    return Pairs(captions, stacked, truths, level) if truths else Pairs(captions, stacked)


def score(recipe, generator, measure, splits: dict[str, Pairs], say) -> tuple[dict, dict]:
    """Return (scores, examples): the figures by task, and the first test examples with their pictures."""
    test = splits["test"]
    codes = {name: generator.encode(split.pictures) for name, split in splits.items()}
    examples, scores = {}, {"name": recipe.name, "source": recipe.prepare.source, "protocol": protocol(recipe, splits)}

    say("evaluate: reconstruction")
    rebuilt = generator.image.decode(codes["test"])
    scores["reconstruction"] = reconstruction(test, rebuilt, codes["test"], recipe.vocab.image)
    examples["reconstruction"] = [
        {"original": a, "picture": b} for a, b in zip(test.pictures, rebuilt[: recipe.evaluate.sheet], strict=False)
    ]
    say("evaluate: text to image")
    scores["text_to_image"], drawn, right, chosen = text_to_image(recipe.evaluate, generator, splits)
    examples["text_to_image"] = [
        {"caption": c, "picture": p, "correct": r} for c, p, r in zip(test.captions, drawn, right, strict=True)
    ]
    say("evaluate: image to text")
    scores["image_to_text"], written, right = image_to_text(recipe.evaluate, generator, splits, codes)
    examples["image_to_text"] = [
        {"picture": p, "caption": c, "asked": a, "correct": r}
        for p, c, a, r in zip(test.pictures, written, test.captions, right, strict=True)
    ]
    say("evaluate: infilling")
    scores["infill"], examples["infill"] = infill(recipe.evaluate, generator, splits, codes, chosen)
    say("evaluate: perplexity")
    scores["perplexity"] = perplexity(measure, generator.params, "test")
    if "validation" in splits:
        scores["perplexity"]["validation"] = perplexity(measure, generator.params, "validation")
    return scores, {name: rows[: recipe.evaluate.sheet] for name, rows in examples.items()}


def protocol(recipe, splits) -> dict:
    """Return what a reader needs to judge or repeat the figures."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "samples": {name: len(split) for name, split in splits.items()},
        "seed": recipe.evaluate.seed,
        "chosen_on": "validation" if "validation" in splits else "nothing: the first setting",
        "versions": versions,
        "device": jax.devices()[0].device_kind,
    }


# ------------------------------------------------------------------------------------------------------------- tasks


def reconstruction(test: Pairs, rebuilt, codes, size: int) -> dict:
    """Return how well the image tokenizer alone does: the ceiling of all that follows."""
    found = {
        "psnr": finite(closeness.psnr(test.pictures, rebuilt).mean()),
        "ssim": finite(closeness.ssim(test.pictures, rebuilt).mean()),
        **{f"codebook_{name}": value for name, value in closeness.codebook(codes, size).items()},
        "codes": size,
        "samples": len(test),
    }
    return found | accuracy(test.pictured(rebuilt) if test.level else [])


def text_to_image(settings: configs.Evaluate, generator, splits):
    """Return (scores, the test pictures of the chosen setting, which of them are right, that setting).

    Without ground truth nothing can be chosen, and the first setting draws.
    """

    def draw(name, sampling, most=None):
        return generator.text_to_image(splits[name].captions[:most], seed=settings.seed, sampling=sampling)

    test = splits["test"]
    if not test.level:
        scores = {"samples": len(test), "sampling": configs.to_json(settings.draw[0])}
        return scores, draw("test", settings.draw[0]), test.correct([]), settings.draw[0]
    rows, pictures, found = [], [], []
    for sampling in settings.draw:
        row = {"sampling": configs.to_json(sampling)}
        if "validation" in splits:
            drawn = draw("validation", sampling, settings.validation_samples)
            row["validation"] = accuracy(splits["validation"].pictured(drawn))["object_accuracy"]
        pictures.append(draw("test", sampling))
        found.append(test.pictured(pictures[-1]))
        rows.append(row | accuracy(found[-1]))
    best = max(range(len(rows)), key=lambda i: rows[i].get("validation", 0.0))
    chosen = settings.draw[best]
    scores = accuracy(found[best]) | {"samples": len(test), "sampling": configs.to_json(chosen), "settings": rows}
    if "composition" in splits:
        scores["composition"] = accuracy(splits["composition"].pictured(draw("composition", chosen)))
    return scores, pictures[best], test.correct(found[best]), chosen


def image_to_text(settings: configs.Evaluate, generator, splits, codes):
    """Return (scores, the captions written for the test pictures, which of them are right)."""

    def write(name):
        return generator.image_to_text(codes[name], settings.seed, settings.write, settings.max_text)

    test, written = splits["test"], write("test")
    found = test.described(written) if test.level else []
    scores = accuracy(found) | {"samples": len(test), "sampling": configs.to_json(settings.write)}
    if test.level and "composition" in splits:
        scores["composition"] = accuracy(splits["composition"].described(write("composition")))
    return scores, written, test.correct(found)


def infill(settings: configs.Evaluate, generator, splits, codes, sampling) -> tuple[dict, list[dict]]:
    """Return (scores, examples) of drawing one region anew: a box around one object, or the middle of the picture.

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
    if test.level and "composition" in splits:
        scores["composition"] = accuracy(one("composition")[-1])
    right = [bool(s.matched == s.of) for s in found] if test.level else [None] * len(rows)
    examples = [
        {"masked": hide(test.pictures[i], box), "picture": p, "original": test.pictures[i], "caption": c, "correct": r}
        for i, box, p, c, r in zip(rows, boxes, drawn, captions, right, strict=True)
    ]
    return scores, examples


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
    stage = recipe.decoder
    batches = math.ceil(recipe.evaluate.samples / stage.training.batch)
    stage = dataclasses.replace(stage, training=dataclasses.replace(stage.training, evaluate_batches=batches))
    net = lm.model(stage, recipe.vocab)
    step = jax.jit(lambda params, batch: lm.losses(net, stage, params, batch)[1])

    def measure(params, split: str, masked: bool):
        totals = None
        for batch in pipeline.eval_batches(run / "tokens", split, stage, recipe.vocab, masked):
            metrics = step(params, jax.tree.map(jax.numpy.asarray, batch))
            totals = metrics if totals is None else jax.tree.map(np.add, totals, metrics)
        return {name: (float(total), float(weight)) for name, (total, weight) in (totals or {}).items()}

    return measure


def validation_losses(run: pathlib.Path, measure) -> dict[int, float]:
    """Return {step: mean validation nll, in nats} of the decoder's checkpoints; {} if there is nothing to choose on."""
    steps = checkpoint.steps(run / "decoder")
    if len(steps) < 2 or "validation" not in tokens.splits(run / "tokens"):
        return {}
    found = {}
    for step in steps:
        params = jax.tree.map(jax.numpy.asarray, checkpoint.load_params(run / "decoder", step=step))
        total, weight = measure(params, "validation", True).get("loss", (0.0, 0.0))
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
    out = {}
    for task, rows in examples.items():
        out[task] = []
        for i, row in enumerate(rows):
            out[task].append(row := dict(row))
            for key, value in row.items():
                if isinstance(value, np.ndarray):
                    row[key] = f"{task}-{i:03d}-{key}.png"
                    Image.fromarray(value).save(folder / row[key])
    (folder / "examples.json").write_text(json.dumps(out, indent=1) + "\n")
    (folder / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
