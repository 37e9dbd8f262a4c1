"""Zero-shot MS-COCO, the FID and CLIP score of arXiv 2309.02591 table 1, of any run.

    python launch/coco.py COCO RUN --clip clip-vit-base-patch32/ --inception pt_inception-2015-12-05-6726825d.pth

COCO holds annotations/captions_val2014.json and val2014/ as they are published. For 0, 1 and 2 documents of the run's
memory bank it draws 8 pictures for each of 30,000 captions, lets CLIP pick one, and scores those against the pictures
that the captions are of; --documents 0 is for a run without a bank. What it leaves in --out: drawn-N/ and reference/ of
pictures, drawn-N.json of figures with their protocols, and a table on the screen.

The paper says 30k prompts, 8 samples of which CLIP picks one, up to two documents, and half of the candidates by top-p
with guidance, half by CD-K (§3.1). Ours is what it does not say: one caption each of so many pictures, both chosen by
--seed; the centre squares of these, at the run's resolution, as the reference; temperature, guidance and CD-K's
numbers. The CLIP score is by the CLIP that picked.

What a prompt draws follows from (--seed, its number), whatever the shard, the batch or the host. What is there is not
drawn again: the same command continues. Hosts share the work on one disk with --part I --parts N; the command of the
last one to end scores.

What it costs: 30,000 x 8 x 3 pictures; the seconds of a batch of them on the chips of one host are those of

    cm3jax plan RUN --for sample --topology v5e-8 --rows 64

for prompts without documents; each document makes a prompt about 1,034 tokens longer.
"""

import dataclasses
import json
import math
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import numpy as np
import retrieval_ablation as ablation
from tyro.conf import Positional, arg

from cm3jax import checkpoint, cli, flags, png, provenance, stages
from cm3jax import config as configs
from cm3jax.data import pictures as crops
from cm3jax.data.sets import coco as files
from cm3jax.types import UserError

SAMPLING = configs.Sampling("mixture", temperature=0.8, top_p=0.9, guidance=3.0, uncond_temperature=0.5)
"""Temperatures and CD-K's alpha as public code has them, where the paper has no value."""


@dataclasses.dataclass(frozen=True)
class Coco:
    """Draw MS-COCO's captions as arXiv 2309.02591 table 1 does, and score the pictures."""

    coco: Positional[Annotated[str, arg(metavar="COCO")]]
    """Folder of COCO 2014, with annotations/captions_val2014.json and val2014/."""
    run: Positional[Annotated[str, arg(metavar="RUN")]]
    """Run folder with text/, image/ and decoder/; with retriever/, bank/ and tokens/ for documents."""
    clip: str
    """CLIP that picks among candidates and scores: a folder of published weights, or a run's retriever/."""
    inception: str
    """FID's weights, pt_inception-2015-12-05 of pytorch-fid."""
    out: str = "runs/coco"
    """Folder for pictures and figures."""
    prompts: int = 30_000
    """Captions, each of another picture."""
    candidates: int = 8
    """Pictures drawn for each caption."""
    documents: tuple[int, ...] = (0, 1, 2)
    """Numbers of retrieved documents to draw with, a figure each."""
    seed: int = 0
    """Of the choice of captions and of all draws."""
    batch: int = 64
    """Pictures drawn at one time."""
    shard: int = 64
    """Captions that are drawn, and can be lost, together."""
    part: int = 0
    """With --parts: which of the hosts this is, 0 to N - 1."""
    parts: int = 1
    """Hosts that share the drawing."""
    sampling: Annotated[configs.Sampling, flags.FLAT] = SAMPLING

    def __post_init__(self):
        configs.within(self, "coco", 1, math.inf, "prompts", "candidates", "batch", "shard", "parts")
        configs.within(self, "coco", 0, configs.SEEDS - 1, "seed")
        configs.within(self, "coco", 0, self.parts - 1, "part")
        if not self.documents or min(self.documents) < 0:
            raise ValueError(f"coco.documents = {self.documents}: must be one or more numbers from 0 on")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A caption, and the picture that it is of."""

    key: str
    caption: str
    picture: pathlib.Path

    @property
    def file(self) -> str:
        return f"{self.key}.png"


def prompts(folder, count: int, seed: int) -> list[Prompt]:
    """Return captions of different pictures of val2014; the first ones are the same whatever the count.

    Raises:
      UserError: if its files are not there, or it has fewer pictures.
    """
    items = list(files.captions(pathlib.Path(folder), "val", ("2014",)))
    if len(items) < count:
        raise UserError(f"--prompts {count}: {folder} has {len(items)} pictures; ask for at most as many")
    rng = np.random.default_rng(seed)
    which, order = rng.random(len(items)), rng.permutation(len(items))[:count]
    told = [items[i].truth["captions"] for i in order]
    captions = [one[int(which[i] * len(one))] for i, one in zip(order, told, strict=True)]
    return [Prompt(items[i].key, caption, items[i].values["image"]) for i, caption in zip(order, captions, strict=True)]


def put(path: pathlib.Path, picture: np.ndarray, fields=None) -> None:
    """Write a picture whole or not at all."""
    png.save(path.with_name(f".{path.name}"), picture, fields).replace(path)


def reference(found: Sequence[Prompt], folder: pathlib.Path, side: int) -> None:
    """Write the centre squares of the pictures, those that are not there."""
    for one in found:
        if not (folder / one.file).is_file():
            put(folder / one.file, crops.crop(png.read(one.picture), side))


def draw(settings: Coco, found: Sequence[Prompt], folder: pathlib.Path, generator, encoder, memory, count: int) -> int:
    """Draw this host's shards with `count` documents, those that are not whole; return how many it drew."""
    from cm3jax.sample import recall, rerank

    model = cli.artist(cli.folder(settings.run))
    how = configs.to_json(settings.sampling) | {"candidates": settings.candidates}
    shards = range(0, len(found), settings.shard)
    left = [start for start in shards[settings.part :: settings.parts] if absent(folder, shard(found, settings, start))]
    for start in left:
        own = shard(found, settings, start)
        captions, numbers = [one.caption for one in own], range(start, start + len(own))
        shown, ids = recall.texts(generator, memory, captions, count, settings.seed)
        arguments = settings.candidates, settings.seed, settings.sampling, ids, numbers
        best = rerank.draw(generator, encoder, captions, *arguments).best()
        for one, number, picture, documents in zip(own, numbers, best, shown, strict=True):
            origins = tuple(document.origin for document in documents)
            made = provenance.Made(model, one.caption, settings.seed, number, how, origins)
            put(folder / one.file, picture, provenance.fields(made))
        print(f"{folder.name}: {start + len(own):,} of {len(found):,}", flush=True)
    return len(left)


def shard(found: Sequence[Prompt], settings: Coco, start: int) -> Sequence[Prompt]:
    return found[start : start + settings.shard]


def absent(folder: pathlib.Path, found: Sequence[Prompt]) -> int:
    """Return how many pictures are not there."""
    return sum(not (folder / one.file).is_file() for one in found)


def agree(out: pathlib.Path, about: dict[str, Any]) -> None:
    """Write what the pictures in a folder are drawn with, or raise UserError if they are drawn otherwise."""
    path = out / "drawn.json"
    if not path.is_file():
        return stages.write_text(path, json.dumps(about, indent=1) + "\n")
    if changed := stages.differences(json.loads(path.read_text()), about):
        raise UserError(f"{path}: {stages.describe(changed)}; set it back, or draw into another --out")


def score(settings: Coco, found: Sequence[Prompt], out: pathlib.Path, count: int, about: dict, tools=None) -> str:
    """Score the pictures drawn with `count` documents; return the result file, which also tells how they were drawn."""
    from cm3jax.evaluate import score as scores

    drawn, path = out / f"drawn-{count}", out / f"drawn-{count}.json"
    lines = [json.dumps({"file_name": one.file, "text": one.caption}) for one in found]
    stages.write_text(drawn / "metadata.jsonl", "\n".join(lines) + "\n")
    weights = configs.Weights(inception=settings.inception, clip=settings.clip)
    wanted = configs.Score(metrics=("fid", "clip_score"), weights=weights)
    how = {name: about[name] for name in ("sampling", "candidates", "seed")}
    made = {"decoding": how}  # but for the documents, which are what the table compares
    result = scores.score(drawn, out / "reference", wanted, path, out / "cache", tools=tools, made=made)
    stages.write_text(path, json.dumps(result | {"drawn": about | {"documents": count}}, indent=1) + "\n")
    return str(path)


def make(settings: Coco, memory: Any = None, tools: Any = None, say: Callable[[str], Any] = print) -> None:
    """Draw, and score once all hosts have drawn.

    Args:
      memory, tools: In place of the run's memory bank and of the scores' networks.
    """
    from cm3jax.evaluate import results
    from cm3jax.retrieval import encoder as encoders
    from cm3jax.retrieval import memory as memories
    from cm3jax.sample import generate

    run, out = cli.folder(settings.run), pathlib.Path(settings.out)
    found = prompts(settings.coco, settings.prompts, settings.seed)
    step = cli.chosen_checkpoint(run)
    step = max(checkpoint.steps(run / "decoder"), default=None) if step is None else step
    generator = generate.load(run, settings.batch, step)
    encoder = encoders.load(settings.clip, settings.batch)
    if max(settings.documents):
        memory = memory or memories.load(run, settings.batch)
    about = {"run": run.resolve().name, "checkpoint": step, "clip": encoder.identity}
    made = ("decoder", "bank") if memory else ("decoder",)
    about |= {name: record.result for name in made if (record := stages.read(run / name))}
    about |= {name: getattr(settings, name) for name in ("prompts", "candidates", "seed")}
    about["sampling"] = configs.to_json(settings.sampling)
    out.mkdir(parents=True, exist_ok=True)
    agree(out, about)
    if settings.part == 0:
        reference(found, out / "reference", generator.image.resolution)
    for count in settings.documents:
        draw(settings, found, out / f"drawn-{count}", generator, encoder, memory, count)
    del generator, encoder, memory  # their room, for the networks of the scores
    folders = [out / "reference", *(out / f"drawn-{count}" for count in settings.documents)]
    if missing := sum(absent(folder, found) for folder in folders):
        return say(f"{missing:,} pictures are other hosts'; the one that ends last scores them")
    say(results.table([score(settings, found, out, count, about, tools) for count in settings.documents]))


def main(argv: Sequence[str] | None = None) -> None:
    make(flags.parse(Coco, list(sys.argv[1:] if argv is None else argv), "launch/coco.py", flags.blank(Coco)))


if __name__ == "__main__":
    ablation.script(main)
