"""What retrieval brings (arXiv 2309.02591 table 1, in small): train with and without, draw with 0, 1, 2 documents.

    python launch/retrieval_ablation.py WORK --json retrieval.json --plot retrieval.svg

One run in WORK/shared makes the tokenizers, the retriever, a bank of the split `bank` and its neighbours. For each
seed two decoders of the same size are trained on as many tokens: one whose documents have up to three neighbours before
them, one without. Then the memory gets the split `late` too, which no decoder was trained on,
and the same first prompts of `test` and `composition` are drawn by both. What is counted (`scenes:rare`):

- object accuracy, and of each kind of stated object the share that is drawn right: `common` things, names that training
  `met`, `new` names, and `held_out` pairs of shape and colour;
- the Frechet distance of the drawn pictures to those of the prompts, in the trained retriever's features;
- `found`: how often the shown documents show what the prompt asks for, under this or another name. The row `told` draws
  with the first document of the bank that has the very name, whoever found it: what is lost between it and retrieval is
  the retriever's. By kind, and among the first 1, 2, 4 and 8 documents, it is measured once, before any decoder.

What is there is not made again: the same command continues. Every phase is a process of its own.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

from cm3jax import cli, curves, stages
from cm3jax import config as configs
from cm3jax.types import UserError

KINDS = ("common", "met", "new", "held_out")
SPLITS = ("test", "composition")
BANK = ("bank", "late")
"""Splits of the memory that is drawn with."""
TOLD = "told"
DEPTHS = (1, 2, 4, 8)
"""Documents among which the asked for is looked for."""


# ------------------------------------------------------------------------------------------------------------- training


def share(work: pathlib.Path, recipe: configs.Recipe) -> None:
    """Bring up to date what all decoders have in common, and the memory that is drawn with."""
    from cm3jax import run

    shared, memory = work / "shared", work / "memory"
    for stage in ("prepare", "text", "image", "tokens", "retriever", "bank", "neighbours"):
        run.run(recipe, shared, only=stage)
    run.link("bank", shared, memory)
    if not (memory / "tokens").exists():
        (memory / "tokens").symlink_to(os.path.relpath(shared / "tokens", memory), target_is_directory=True)
    bank = dataclasses.replace(recipe.bank, splits=BANK)
    run.run(dataclasses.replace(recipe, bank=bank), memory, only="bank")


def arm(recipe: configs.Recipe, name: str, seed: int, shared: pathlib.Path) -> configs.Recipe:
    """Return the recipe of a decoder "with" or "without" retrieval; the latter takes the steps of as many tokens."""
    training = dataclasses.replace(recipe.decoder.training, seed=seed)
    decoder = dataclasses.replace(recipe.decoder, training=training)
    if name == "without":
        filled = [fill(dataclasses.replace(recipe, retrieve=way), shared) for way in (True, False)]
        steps = round(training.steps * filled[0] / filled[1])
        decoder = dataclasses.replace(decoder, training=dataclasses.replace(training, steps=steps))
    return dataclasses.replace(recipe, name=f"{name}-{seed}", retrieve=name == "with", decoder=decoder)


def fill(recipe: configs.Recipe, shared: pathlib.Path) -> float:
    """Return the share of the training rows that is not padding."""
    from cm3jax.data import mixing, pipeline, retrieved

    found = mixing.open(shared / "tokens", "train", recipe.decoder, retrieved.source(recipe, shared))
    return pipeline.describe(found, recipe.decoder)["filled"]


def train(work: pathlib.Path, recipe: configs.Recipe, name: str, seed: int) -> None:
    """Bring one decoder up to date."""
    from cm3jax import run

    folder = work / f"{name}-{seed}"
    run.link("decoder", work / "shared", folder)
    run.run(arm(recipe, name, seed, work / "shared"), folder, only="decoder")


# -------------------------------------------------------------------------------------------------------------- drawing


def things(scene) -> list[tuple[str, str]]:
    """Return of each object its kind and what tells it: a name, or a held-out pair."""
    from cm3jax.data import scenes_world as world

    found = []
    for t in scene.objects:
        if t.name:
            found.append(("new" if world.is_new(t.name) else "met", t.name))
        else:
            rare = world.HELD_OUT[t.shape] == t.colour
            found.append(("held_out" if rare else "common", f"{t.shape} {t.colour}"))
    return found


def wanted(scene) -> set[str]:
    """Return what of a scene only a memory shows."""
    return {what for kind, what in things(scene) if kind != "common"}


def looks(scene) -> set:
    """Return how that looks, whatever its name; of a held-out pair what size and texture add is in the caption."""
    kinds = zip(scene.objects, things(scene), strict=True)
    return {t.looks if t.name else what for t, (kind, what) in kinds if kind != "common"}


def truth(record):
    from cm3jax.data import scenes_world as world

    return world.from_json(record.fields["scene"])


def asked(work: pathlib.Path, split: str, count: int):
    """Return the first `count` records of a split, their captions and their scenes."""
    from cm3jax.data import shards

    reader = shards.Reader(work / "shared" / "prepared", split)
    if len(reader) < count:
        raise UserError(f"--prompts {count}: {split} has {len(reader)}")
    records = [reader[i] for i in range(count)]
    return records, [r.parts[0] for r in records], [truth(r) for r in records]


def finds(work: pathlib.Path, count: int) -> dict:
    """Return {kind: {"1": share found in the first document, ...}} of what only a memory shows."""
    from cm3jax.retrieval import memory as memories

    recipe = configs.load(work / "memory" / "recipe.json")
    memory, ranks = memories.load(work / "memory", recipe.evaluate.batch), {}
    for split in SPLITS:
        _, captions, prompts = asked(work, split, count)
        found = memory.find(texts=captions, count=max(DEPTHS), seed=0)
        for scene, row in zip(prompts, found, strict=True):
            have = [looks(truth(memory.record(document))) for document in row]
            for thing, (kind, what) in zip(scene.objects, things(scene), strict=True):
                if kind != "common":
                    look = thing.looks if thing.name else what
                    rank = next((i for i, each in enumerate(have) if look in each), max(DEPTHS))
                    ranks.setdefault(kind, []).append(rank)
    return {kind: {str(n): float(np.mean(np.array(at) < n)) for n in DEPTHS} for kind, at in ranks.items()}


def pool(work: pathlib.Path, _: int) -> dict[str, float]:
    """Return how often the neighbours that training shows before a document have what its named thing looks like.

    Returns:
      {"each": share of the pool's documents that show it, "any": share of documents of which one in the pool does}.
    """
    from cm3jax.data import neighbours, shards

    found = neighbours.Neighbours(work / "shared" / "neighbours", "train")
    recipe = configs.load(work / "shared" / "recipe.json")
    bank = [looks(truth(record)) for record in shards.Reader(work / "shared" / "prepared", *recipe.bank.splits)]
    hits = []
    for i, record in enumerate(shards.Reader(work / "shared" / "prepared", "train")):
        if named := {t.looks for t in truth(record).objects if t.name}:
            hits.append([bool(named & bank[document]) for document in found[i] if document >= 0])
    return {"each": float(np.mean([hit for row in hits for hit in row])), "any": float(np.mean([any(h) for h in hits]))}


MEASURED = {"finds": finds, "pool": pool}
"""What is measured of the retriever, once."""


def shown(memory, captions, prompts, documents: str, seed: int):
    """Return for each prompt the documents before it: what the memory finds, or the first that shows what is asked.

    Returns:
      (scenes, ids): of each prompt a list each.
    """
    from cm3jax.data import shards, tokens

    if documents == "0":
        return [[] for _ in prompts], None
    if documents != TOLD:
        found = memory.find(texts=captions, count=int(documents), seed=seed)
        return [[truth(memory.record(x)) for x in row] for row in found], [
            [memory.ids(x) for x in row] for row in found
        ]
    bank = [truth(record) for record in shards.Reader(memory.run / "prepared", *BANK)]
    rows = tokens.Chain([tokens.Tokens(memory.run / "tokens", split) for split in BANK])
    first = {}
    for i, scene in enumerate(bank):
        for what in wanted(scene):
            first.setdefault(what, i)
    picked = [[first[what] for what in sorted(wanted(p)) if what in first][:1] for p in prompts]
    return [[bank[i] for i in row] for row in picked], [[rows[i] for i in row] for row in picked]


def measure(work: pathlib.Path, name: str, seed: int, split: str, documents: str, count: int) -> dict:
    """Draw the first `count` prompts of a split and return what came of them."""
    from cm3jax.data import scenes
    from cm3jax.evaluate import frechet
    from cm3jax.evaluate import scenes as judges
    from cm3jax.retrieval import memory as memories
    from cm3jax.sample import generate

    recipe = configs.load(work / "memory" / "recipe.json")
    memory = memories.load(work / "memory", recipe.evaluate.batch)
    generator = generate.load(work / f"{name}-{seed}", recipe.evaluate.batch)
    records, captions, prompts = asked(work, split, count)
    real = np.stack([record.parts[1] for record in records])
    before, ids = shown(memory, captions, prompts, documents, seed)
    start = time.monotonic()
    drawn = generator.text_to_image(captions, seed, recipe.evaluate.draw[0], ids)
    seconds = time.monotonic() - start
    level = recipe.prepare.source.partition(":")[2]
    read = scenes.recognise_all(drawn, level)
    right, of = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
    for stated, seen in zip(prompts, read, strict=True):
        hits = {i for i, _ in judges.match(stated, seen)}
        for i, (kind, _) in enumerate(things(stated)):
            of[kind] += 1
            right[kind] += i in hits
    pairs = [
        (looks(p), {look for scene in row for look in looks(scene)}) for p, row in zip(prompts, before, strict=True)
    ]
    pairs = [(want, have) for want, have in pairs if want]
    features = [frechet.moments(memory.encoder.features(pictures)) for pictures in (drawn, real)]
    return {
        **judges.summary([judges.score(a, b) for a, b in zip(prompts, read, strict=True)]),
        "right": {kind: right[kind] / of[kind] for kind in KINDS if of[kind]},
        "of": of,
        "found": sum(want <= have for want, have in pairs) / len(pairs) if pairs and ids else 0.0,
        "frechet": frechet.distance(*features),
        "seconds": round(seconds, 1),
    }


# ---------------------------------------------------------------------------------------------------------- the whole


def rows(seeds) -> list[tuple[str, int, str, str]]:
    """Return all that is measured: (arm, seed, split, documents)."""
    ways = [("without", "0"), *(("with", d) for d in ("0", "1", "2", TOLD))]
    return [(name, seed, split, documents) for seed in seeds for name, documents in ways for split in SPLITS]


def flat(found: dict) -> dict[str, float]:
    """Return the figures of one measurement by name."""
    return {k: found[k] for k in ("object_accuracy", "scene_accuracy", "frechet", "found")} | found["right"]


def spread(results: dict) -> dict:
    """Return {split: {"arm documents": {figure: [mean, least, greatest] over seeds}}}."""
    out = {}
    for (name, _, split, documents), found in results.items():
        for figure, value in flat(found).items():
            out.setdefault(split, {}).setdefault(f"{name} {documents}", {}).setdefault(figure, []).append(value)
    return {
        split: {
            way: {f: [float(np.mean(v)), min(v), max(v)] for f, v in figures.items()} for way, figures in ways.items()
        }
        for split, ways in out.items()
    }


def plot(found: dict) -> str:
    """Return the picture of the share drawn right over the number of documents; without retrieval at 0 alone."""
    lines = []
    for split, kind, name in (
        ("test", "object_accuracy", "all objects of test"),
        ("test", "new", "new names"),
        ("test", "met", "names of the tail"),
        ("composition", "held_out", "held-out pairs"),
        ("test", "common", "common things"),
    ):
        ways = found[split]
        points = [(int(d), *ways[f"with {d}"][kind]) for d in ("0", "1", "2") if kind in ways[f"with {d}"]]
        lines += [curves.Spread(name, points)] if points else []
        alone = ways["without 0"].get(kind)
        lines += [curves.Spread(f"{name}, trained without retrieval", [(0, *alone)], hollow=True)] if alone else []
    return curves.figure("What retrieval brings", "documents retrieved", "drawn right", lines)


def plot_frechet(found: dict) -> str:
    """Return the picture of the Frechet distance over the number of documents; without retrieval at 0 alone."""
    lines = []
    for split in SPLITS:
        ways = found[split]
        lines.append(curves.Spread(split, [(int(d), *ways[f"with {d}"]["frechet"]) for d in ("0", "1", "2")]))
        alone = [(0, *ways["without 0"]["frechet"])]
        lines.append(curves.Spread(f"{split}, trained without retrieval", alone, hollow=True))
    return curves.figure("What retrieval brings", "documents retrieved", "Frechet distance", lines)


def table(found: dict, retriever: dict) -> str:
    """Return the means and spreads as lines for a person."""
    lines = [
        f"the retriever finds {kind}: " + ", ".join(f"{share:.3f} in {n}" for n, share in row.items())
        for kind, row in retriever.items()
    ]
    for split, ways in found.items():
        for way, figures in ways.items():
            shown = ", ".join(f"{f} {m:.3f} ({low:.3f}-{high:.3f})" for f, (m, low, high) in figures.items())
            lines.append(f"{split}, {way}: {shown}")
    return "\n".join(lines)


def command(arguments, *words: str) -> list[str]:
    here = [sys.executable, __file__, str(arguments.work), "--config", arguments.config]
    return [*here, "--prompts", str(arguments.prompts), "--phase", *words]


def phase(arguments, *words: str) -> None:
    """Run one phase in a process of its own."""
    subprocess.run(command(arguments, *words), check=True)


def together(arguments, *phases: tuple[str, ...]) -> None:
    """Run phases at one time, each on its share of the cores, of which small models use one better than several."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if not (share := len(cores) // len(phases)):
        for words in phases:
            phase(arguments, *words)
        return
    pin = lambda i: lambda: os.sched_setaffinity(0, cores[i * share : (i + 1) * share])  # noqa: E731
    running = [subprocess.Popen(command(arguments, *words), preexec_fn=pin(i)) for i, words in enumerate(phases)]
    for process in running:
        process.wait()
    for process in running:
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, process.args)


def result(work: pathlib.Path, row, count: int) -> pathlib.Path:
    return work / "scores" / f"{'-'.join(map(str, row))}-{count}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=pathlib.Path)
    parser.add_argument("--config", default="configs/retrieval.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--prompts", type=int, default=512, help="of each split")
    parser.add_argument("--json", type=pathlib.Path, default=None)
    parser.add_argument("--plot", type=pathlib.Path, default=None)
    parser.add_argument("--frechet-plot", type=pathlib.Path, default=None)
    parser.add_argument("--phase", nargs="+", default=[], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    work, recipe = arguments.work, configs.load(arguments.config)
    if arguments.phase:
        return one(work, recipe, arguments.prompts, *arguments.phase)
    phase(arguments, "share")
    results, scores = {}, arguments.work / "scores"
    for name in MEASURED:
        if not (scores / f"{name}-{arguments.prompts}.json").is_file():
            phase(arguments, name)
    retriever, shows = (json.loads((scores / f"{name}-{arguments.prompts}.json").read_text()) for name in MEASURED)
    for seed in arguments.seeds:
        together(arguments, *(("train", name, str(seed)) for name in ("with", "without")))
    for row in rows(arguments.seeds):
        path = result(work, row, arguments.prompts)
        if not path.is_file():
            phase(arguments, "draw", *map(str, row))
        results[row] = json.loads(path.read_text())
    found = spread(results)
    print(table(found, retriever), "training's neighbours show what is named: " + json.dumps(shows), sep="\n")
    if arguments.json:
        facts = {
            "prompts": arguments.prompts,
            "seeds": arguments.seeds,
            "finds": retriever,
            "pool": shows,
            "spread": found,
        }
        each = [dict(zip(("arm", "seed", "split", "documents"), row, strict=True)) | r for row, r in results.items()]
        arguments.json.write_text(json.dumps(facts | {"each": each}, indent=1) + "\n")
    if arguments.plot:
        arguments.plot.write_text(plot(found))
    if arguments.frechet_plot:
        arguments.frechet_plot.write_text(plot_frechet(found))


def one(work: pathlib.Path, recipe: configs.Recipe, count: int, what: str, *words: str) -> None:
    if what == "share":
        return share(work, recipe)
    if what == "train":
        return train(work, recipe, words[0], int(words[1]))
    if what in MEASURED:
        return put(work / "scores" / f"{what}-{count}.json", MEASURED[what](work, count))
    name, seed, split, documents = words
    put(result(work, words, count), measure(work, name, int(seed), split, documents, count))


def put(path: pathlib.Path, figures: dict) -> None:
    """Write the figures of one measurement, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stages.write_text(path, json.dumps(figures) + "\n")


def script(main) -> None:
    """Run an experiment; a mistake in the input, or one that a phase has told of, ends it without a traceback."""
    cli.settle_platform()
    try:
        main()
    except UserError as e:
        sys.exit(f"{sys.argv[0]}: {e}")
    except subprocess.CalledProcessError as e:  # it has said why
        sys.exit(e.returncode)


if __name__ == "__main__":
    script(main)
