"""More candidates and stronger guidance against quality (arXiv 2309.02591 figure 4, in small).

    python launch/candidates.py WORK --json candidates.json --plot candidates.svg --guidance-plot guidance.svg

WORK is the folder of launch/retrieval_ablation.py, whose tokenizers, retriever and memory it takes, or a new one.

- Candidates: the decoder of seed 0 draws 16 pictures for each prompt by temperature alone, by top-p with guidance, by
  CD-K, and by the mixture (half by each of the last two); the retriever picks among the first 1, 2, 4, 8 and 16.
- Guidance: decoders of three sizes, trained on as many steps, draw one picture for each prompt at each weight.

What is counted: object accuracy, and the Frechet distance in the retriever's features, on the first prompts of `test`.
What is there is not made again: the same command continues. Every phase is a process of its own.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
import retrieval_ablation as ablation

from cm3jax import config as configs
from cm3jax import curves
from cm3jax.types import UserError

SAMPLING = {
    "temperature": configs.Sampling(temperature=1.0),
    "top_p": configs.Sampling(temperature=1.0, top_p=0.9, guidance=1.5),
    "cd_k": configs.Sampling(method="cd_k", temperature=1.0, cd_k=1),
    "mixture": configs.Sampling(method="mixture", temperature=1.0, top_p=0.9, guidance=1.5, cd_k=1),
}
"""cd_k = 1: a code here is nearly certain, the fourth likeliest as good as impossible, and k = 4 would draw noise."""
COUNTS = (1, 2, 4, 8, 16)
WEIGHTS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SIZES = {"half": 0.5, "whole": 1.0, "wide": 1.5}
"""Widths of the three models over the config's; heads alike."""


def sized(recipe: configs.Recipe, size: str) -> configs.Recipe:
    """Return the recipe of a decoder of one of the three sizes; heads keep their width."""
    model, factor = recipe.decoder.model, SIZES[size]
    width, heads = round(model.width * factor), max(1, round(model.heads * factor))
    model = dataclasses.replace(model, width=width, heads=heads)
    return dataclasses.replace(recipe, name=size, decoder=dataclasses.replace(recipe.decoder, model=model))


def folder(work: pathlib.Path, size: str) -> pathlib.Path:
    """Return where a decoder lies: the one of the config's own size is the ablation's."""
    return work / ("with-0" if size == "whole" else f"size-{size}")


def train(work: pathlib.Path, recipe: configs.Recipe, size: str) -> None:
    from cm3jax import run

    if size == "whole":
        return ablation.train(work, recipe, "with", 0)
    run.link("decoder", work / "shared", folder(work, size))
    run.run(sized(recipe, size), folder(work, size), only="decoder")


class Setting:
    """Everything that draws and judges the first `count` prompts of the test split with `documents` documents."""

    def __init__(self, work: pathlib.Path, size: str, count: int, documents: int):
        from cm3jax.data import shards
        from cm3jax.evaluate import frechet
        from cm3jax.retrieval import memory as memories
        from cm3jax.sample import generate, recall

        recipe = configs.load(work / "memory" / "recipe.json")
        memory = memories.load(work / "memory", recipe.evaluate.batch)
        reader = shards.Reader(work / "shared" / "prepared", "test")
        if len(reader) < count:
            raise UserError(f"--prompts {count}: test has {len(reader)}")
        records = [reader[i] for i in range(count)]
        self.level, self.encoder = recipe.prepare.source.partition(":")[2], memory.encoder
        self.captions, self.stated = [r.parts[0] for r in records], [ablation.truth(r) for r in records]
        self.real = frechet.moments(self.encoder.features(np.stack([r.parts[1] for r in records])))
        self.generator = generate.load(folder(work, size), recipe.evaluate.batch)
        self.retrieved = recall.texts(self.generator, memory, self.captions, documents)[1]

    def judge(self, pictures: np.ndarray) -> dict[str, float]:
        from cm3jax.data import scenes
        from cm3jax.evaluate import frechet
        from cm3jax.evaluate import scenes as judges

        read = scenes.recognise_all(pictures, self.level)
        found = judges.summary([judges.score(a, b) for a, b in zip(self.stated, read, strict=True)])
        distance = frechet.distance(frechet.moments(self.encoder.features(pictures)), self.real)
        return {"object_accuracy": found["object_accuracy"], "frechet": distance}


def candidates(work: pathlib.Path, method: str, count: int, documents: int) -> dict:
    """Return {candidates: figures} of one way to draw."""
    from cm3jax.sample import rerank

    at = Setting(work, "whole", count, documents)
    drawn = rerank.draw(at.generator, at.encoder, at.captions, max(COUNTS), 0, SAMPLING[method], retrieved=at.retrieved)
    return {str(n): at.judge(drawn.best(n)) for n in COUNTS}


def guidance(work: pathlib.Path, size: str, count: int, documents: int) -> dict:
    """Return {weight: figures} of one model."""
    at, found = Setting(work, size, count, documents), {}
    for weight in WEIGHTS:
        sampling = dataclasses.replace(SAMPLING["temperature"], guidance=weight)
        found[str(weight)] = at.judge(at.generator.text_to_image(at.captions, 0, sampling, at.retrieved))
    return found


def plot(title: str, across: str, found: dict[str, dict], figure: str = "object_accuracy") -> str:
    """Return the picture of a figure; candidates are spaced by doublings."""
    lines = [
        curves.Spread(name, [(float(x), *[row[figure]] * 3) for x, row in rows.items()]) for name, rows in found.items()
    ]
    return curves.figure(title, across, figure.replace("_", " "), lines, across.startswith("candidates"))


def phase(arguments, *words: str) -> None:
    here = [sys.executable, __file__, str(arguments.work), "--config", arguments.config]
    here += ["--prompts", str(arguments.prompts), "--documents", str(arguments.documents)]
    subprocess.run([*here, "--phase", *words], check=True)


def result(arguments, *words: str) -> pathlib.Path:
    return arguments.work / "scores" / f"{'-'.join(words)}-{arguments.prompts}-{arguments.documents}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=pathlib.Path)
    parser.add_argument("--config", default="configs/retrieval.py")
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--documents", type=int, default=1, help="retrieved for each prompt")
    parser.add_argument("--json", type=pathlib.Path, default=None)
    parser.add_argument("--plot", type=pathlib.Path, default=None)
    parser.add_argument("--frechet-plot", type=pathlib.Path, default=None)
    parser.add_argument("--guidance-plot", type=pathlib.Path, default=None)
    parser.add_argument("--phase", nargs="+", default=[], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.phase:
        return one(arguments, configs.load(arguments.config), *arguments.phase)
    phase(arguments, "share")
    for size in SIZES:
        phase(arguments, "train", size)
    found = {}
    for what, names in (("candidates", SAMPLING), ("guidance", SIZES)):
        for name in names:
            path = result(arguments, what, name)
            if not path.is_file():
                phase(arguments, what, name)
            found.setdefault(what, {})[name] = json.loads(path.read_text())
    for what, names in found.items():
        for name, rows in names.items():
            shown = ", ".join(f"{x}: {r['object_accuracy']:.3f} (Frechet {r['frechet']:.2f})" for x, r in rows.items())
            print(f"{what}, {name}: {shown}")
    if arguments.json:
        facts = {"prompts": arguments.prompts, "documents": arguments.documents}
        arguments.json.write_text(json.dumps(facts | found, indent=1) + "\n")
    for path, figure in ((arguments.plot, "object_accuracy"), (arguments.frechet_plot, "frechet")):
        if path:
            path.write_text(plot("Candidates", "candidates for each prompt", found["candidates"], figure))
    if arguments.guidance_plot:
        arguments.guidance_plot.write_text(plot("Guidance", "guidance weight", found["guidance"]))


def one(arguments, recipe: configs.Recipe, what: str, name: str = "") -> None:
    work = arguments.work
    if what == "share":
        return ablation.share(work, recipe)
    if what == "train":
        return train(work, recipe, name)
    measured = {"candidates": candidates, "guidance": guidance}[what](
        work, name, arguments.prompts, arguments.documents
    )
    ablation.put(result(arguments, what, name), measured)


if __name__ == "__main__":
    ablation.script(main)
