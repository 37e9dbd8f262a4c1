"""`cm3jax <verb>`: argument types to calls, nothing else.

Every verb is a dataclass of its arguments with a `__call__`. What a verb needs is imported when it is called, so that
`--help` answers at once. The environment is read here and nowhere below: CM3JAX_TRACEBACK=1 shows where an error arose.
"""

import contextlib
import ctypes
import dataclasses
import difflib
import errno
import json
import multiprocessing
import os
import pathlib
import signal
import sys
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

from cm3jax import config as configs
from cm3jax import flags, stages
from cm3jax.config import Mesh, Recipe, Sampling
from cm3jax.types import UserError

MASK = "<mask>"  # sample.generate's, which would load jax
PUBLISHED = "published"
IMPORTED = "imported.json"  # foreign.ABOUT, which would load jax
TrainedStage = Literal["decoder", "image", "text", "retriever"]
FeatureName = Literal["edges", "segmentation", "hed", "pose", "depth", "normals", "scribble"]
Benchmark = Literal["all", "train", "decode", "data", "prepare", "chameleon", "chameleon-7b"]
SuiteName = Literal[
    "scenes", "tasks", "pictures", "reconstruction", "captions", "vqa", "vizwiz", "science-qa", "visdial"
]
TextKind = Literal["captions", "vqa", "vizwiz", "science-qa", "visdial"]
Examples = UseAppendAction[tuple[tuple[str, ...], ...]]
StageName = Literal["", "prepare", "text", "image", "tokens", "retriever", "bank", "neighbours", "decoder", "evaluate"]


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Decode and crop a data source into records of one size, in OUT/prepared/."""

    source: Positional[Annotated[str, arg(metavar="SOURCE")]]
    """scenes:easy, :full, :rare, :tasks, tfds:NAME, set:NAME:FOLDER (a public set's files), a folder with
    metadata.jsonl/.csv, or WebDataset tars (braces allowed)."""
    out: Positional[Annotated[str, arg(metavar="OUT")]]
    """Run folder to write to."""
    prepare: Annotated[configs.Prepare, flags.FLAT] = configs.Prepare()
    redo: bool = False
    """Make it again from nothing."""
    host: int = 0
    """With --hosts: which of them this is, 0 to N - 1."""
    hosts: int = 1
    """Hosts that share the work, on one disk, each with this command; the last to end writes the summary."""
    cluster: Annotated[configs.Hosts, flags.FLAT] = configs.Hosts()

    def __call__(self):
        if self.prepare.source:
            raise UserError(f"--source {self.prepare.source}: the source stands first: cm3jax prepare SOURCE OUT")
        settings = dataclasses.replace(self.prepare, source=self.source)
        recipe = Recipe(name=pathlib.Path(self.out).resolve().name, prepare=settings)
        if (pathlib.Path(self.out) / IMPORTED).is_file():  # keeps what the import decided
            recipe = run_recipe(self.out)
            if settings.resolution == configs.Prepare().resolution:
                settings = dataclasses.replace(settings, resolution=recipe.prepare.resolution)
            recipe = dataclasses.replace(recipe, prepare=settings)
        make(recipe, self.out, "prepare", self)


@dataclasses.dataclass(frozen=True)
class Train:
    """Train one stage on the results of the earlier stages of a run.

    Ctrl-C saves, and the same command continues.

    An imported model, once pictures are prepared and encoded in its folder, is trained further in a folder of its own:

    cm3jax train RUN/recipe.json --inputs RUN --out NEW --decoder.start RUN --decoder.trainable image_head
    """

    config: Positional[Annotated[str, arg(metavar="CONFIG")]]
    """Config file that holds the stage's settings; the flags below change single ones."""
    inputs: str
    """Run folder that holds the earlier stages (prepared/, and tokens/ for the decoder); one in a bucket, gs://..., is
    copied to --out."""
    stage: TrainedStage = "decoder"
    """What to train."""
    out: str = ""
    """Run folder to write to, which then links to the earlier stages; "": the folder of --inputs."""
    redo: bool = False
    """Train from the start again."""
    recipe: Annotated[Recipe, flags.FLAT] = Recipe()
    cluster: Annotated[configs.Hosts, flags.FLAT] = configs.Hosts()

    def __call__(self):
        from cm3jax import hosts, run
        from cm3jax.data import paths

        refuse_idle("train", self.recipe, configs.load(self.config), (self.stage, "vocab", "name"))
        hosts.start(self.cluster)
        remote = paths.is_remote(self.inputs)
        if remote and self.out:
            run.fetch(self.stage, self.inputs, pathlib.Path(self.out), self.recipe)
        elif remote:
            raise UserError(f"--inputs {self.inputs}: is copied to this machine; say where with --out")
        inputs = self.out if remote else str(folder(self.inputs))
        recipe, out = run.adopt(self.recipe, inputs, self.stage), self.out or self.inputs
        if self.out and not remote:
            run.link(self.stage, pathlib.Path(self.inputs), pathlib.Path(self.out))
        run.run(recipe, out, redo=self.stage if self.redo else "", only=self.stage)


@dataclasses.dataclass(frozen=True)
class Encode:
    """Write the token shards of a run with its two trained tokenizers."""

    run: Positional[Annotated[str, arg(metavar="RUN")]]
    """Run folder with prepared/, text/ and image/."""
    tokenizers: str = ""
    """Run folder whose text/ and image/ are copied into RUN first, as for a set that its model is to be tuned on; "":
    RUN's own."""
    redo: bool = False
    """Make them again from nothing."""
    host: int = 0
    """With --hosts: which of them this is, 0 to N - 1."""
    hosts: int = 1
    """Hosts that share the work, on one disk, each with this command; the last to end writes the index."""
    recipe: Annotated[Recipe, flags.FLAT] = Recipe()
    cluster: Annotated[configs.Hosts, flags.FLAT] = configs.Hosts()

    def __call__(self):
        from cm3jax import run

        refuse_idle("encode", self.recipe, run_recipe(self.run), ("tokens",))
        recipe = run.borrow(self.recipe, self.run, folder(self.tokenizers)) if self.tokenizers else self.recipe
        make(run.adopt(recipe, self.run, "tokens"), self.run, "tokens", self)


def make(recipe: Recipe, out: str, stage: str, flags: Prepare | Encode) -> None:
    """Make a stage, or this host's share of it."""
    from cm3jax import hosts, parts, run

    if flags.hosts == 1 and flags.host == 0:
        hosts.start(flags.cluster)
        run.run(recipe, out, redo=stage if flags.redo else "", only=stage)
    elif flags.redo:
        raise UserError("--redo: not with --hosts, as it would remove what the others made; delete the stage's folder")
    else:
        parts.part(recipe, out, stage, flags.host, flags.hosts)


@dataclasses.dataclass(frozen=True)
class Run:
    """Bring every stage of a recipe up to date: prepare, text, image, tokens, decoder, evaluate.

    A finished stage is skipped, an interrupted one continues. If a setting has changed since a stage was made, the run
    stops and names it.
    """

    config: Positional[Annotated[str, arg(metavar="RECIPE")]]
    """Recipe file, such as configs/quickstart.py; the flags below change single settings."""
    data: str = ""
    """Data source to use in place of the recipe's; as --prepare.source."""
    out: str = ""
    """Run folder; "": runs/NAME, NAME being the recipe's."""
    redo: StageName = ""
    """Stage to make again from nothing, with all that depend on it."""
    recipe: Annotated[Recipe, flags.FLAT] = Recipe()
    cluster: Annotated[configs.Hosts, flags.FLAT] = configs.Hosts()

    def __call__(self):
        from cm3jax import hosts, run

        hosts.start(self.cluster)
        recipe = self.recipe
        if self.data:
            recipe = dataclasses.replace(recipe, prepare=dataclasses.replace(recipe.prepare, source=self.data))
        out = run.run(recipe, self.out or f"runs/{recipe.name}", redo=self.redo)
        print(f"report: {out / 'report.html'}")


@dataclasses.dataclass(frozen=True)
class Generate:
    """Draw pictures from captions.

    The sampling flags start from the setting that the run's evaluation chose. With --documents, or where the evaluation
    chose some, documents of the run's memory bank are shown before each caption, and their keys, sources and licences
    are printed.

    cm3jax generate RUN "How does a chameleon hunt?" photo.jpg "Draw each step." --interleaved
    """

    run: Positional[Annotated[str, arg(metavar="RUN")]]
    """Run folder with text/, image/ and decoder/."""
    prompts: Positional[Annotated[tuple[str, ...], arg(metavar="PROMPT")]]
    """Captions, such as "a large red circle top left, on white". With --interleaved the parts of one document in their
    order, texts and picture files."""
    count: int = 1
    """Pictures of each."""
    seed: int = 0
    out: str = ""
    """Folder for the pictures; "": RUN/generated."""
    batch: int = 16
    """Pictures drawn at one time."""
    documents: int = -1
    """Documents shown before each caption; -1: as many as the run's evaluation chose."""
    candidates: int = 1
    """Pictures drawn for each that is kept; the run's retriever picks the one nearest to the caption."""
    interleaved: bool = False
    """Continue the document that the PROMPTs begin with text and pictures, and write it as a page: Markdown, and PNG
    files beside it. To a model of Chameleon's form they are a request, which it answers."""
    parts: int = 4
    """--interleaved: new texts and pictures at most; for a model of Chameleon's form pictures, with text between."""
    max_text: int = 96
    """--interleaved: longest new text, in tokens."""
    mesh: Mesh = Mesh()
    """How the devices share the model; as it stands here: the recipe's own if it names one, a copy
    each if they hold it, else split over heads."""
    sampling: Annotated[Sampling, flags.FLAT] = Sampling()

    def __call__(self):
        run = folder(self.run)
        if self.interleaved:
            return self.write_pages(run)
        prompts = [prompt for prompt in self.prompts for _ in range(positive("count", self.count))]
        if not prompts:
            raise UserError(
                'generate: needs a caption behind the run folder, such as "a large red circle top left, on white"'
            )
        for prompt in self.prompts:
            stated(prompt)
        count, candidates = documents(self.documents, run, "generate"), positive("candidates", self.candidates)
        from cm3jax import png, provenance
        from cm3jax.sample import recall

        generator = loaded(self, run, positive("batch", self.batch))
        memory, encoder = remembered(run, self.batch, count, candidates > 1)
        pictures, found = recall.draw(
            generator, prompts, seeded(self.seed), self.sampling, memory, count, encoder, candidates
        )
        model, settings = artist(run), configs.to_json(self.sampling) | {"candidates": candidates}
        for i, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
            shown = tuple(one.origin for one in found[i])
            made = provenance.Made(model, prompt, self.seed, i, settings, shown)
            print(png.write(self.out or run / "generated", picture, made))
            tell(found[i], count)

    def write_pages(self, run: pathlib.Path) -> None:
        """Write --count documents that begin with the prompts; the seed of each is one above that of the one before."""
        from cm3jax import pages, png, provenance

        count, max_text = positive("count", self.count), positive("max_text", self.max_text)
        if self.documents > 0 or self.candidates != 1:
            raise UserError("--interleaved: neither --documents nor --candidates go with it; leave them out")
        if self.parts < 0:
            raise UserError(f"--parts = {self.parts}: must be at least 0")
        seeds = [seeded(self.seed + i) for i in range(count)]
        parts = [png.read(prompt) if looks_like_a_file(prompt) else stated(prompt) for prompt in self.prompts]
        files = [prompt for prompt, part in zip(self.prompts, parts, strict=True) if not isinstance(part, str)]
        words = [pathlib.Path(prompt).name if prompt in files else prompt for prompt in self.prompts]
        given = {"pictures": [provenance.hashed(path) for path in files], "parts": self.parts, "max_text": max_text}
        settings = configs.to_json(self.sampling) | given
        generator = loaded(self, run, positive("batch", self.batch))
        model = artist(run)
        for seed in seeds:
            found = generator.continue_document(parts, self.parts, seed, self.sampling, max_text, closed=True)
            made = provenance.Made(model, " ".join(words) or "document", seed, 0, settings)
            print(pages.write(self.out or run / "generated", found, made, len(files)))


@dataclasses.dataclass(frozen=True)
class Caption:
    """Write captions for pictures."""

    run: Positional[Annotated[str, arg(metavar="RUN")]]
    """Run folder with text/, image/ and decoder/."""
    pictures: Positional[Annotated[tuple[str, ...], arg(metavar="PICTURE")]]
    """Picture files; their centre square is looked at."""
    seed: int = 0
    batch: int = 16
    """Pictures looked at at one time."""
    max_text: int = 96
    """Longest caption, in tokens."""
    documents: int = -1
    """Documents of the run's memory bank shown before each picture; -1: as many as the run's evaluation chose."""
    request: str = ""
    """What a model of Chameleon's form is asked of each picture; "": form.request of the run's recipe."""
    mesh: Mesh = Mesh()
    """How the devices share the model; as it stands here: the recipe's own if it names one, a copy
    each if they hold it, else split over heads."""
    sampling: Annotated[Sampling, flags.FLAT] = Sampling(temperature=0.0)

    def __call__(self):
        from cm3jax import png

        run = folder(self.run)
        if not self.pictures:
            raise UserError("caption: needs a picture file behind the run folder")
        pictures = [png.read(path) for path in self.pictures]
        count, max_text = documents(self.documents, run, "caption"), positive("max_text", self.max_text)
        from cm3jax.sample import recall

        generator = loaded(self, run, positive("batch", self.batch))
        if self.request:
            generator = generator.asking(self.request)
        memory, _ = remembered(run, self.batch, count)
        texts, found = recall.write(generator, pictures, seeded(self.seed), self.sampling, max_text, memory, count)
        for path, text, shown in zip(self.pictures, texts, found, strict=True):
            print(f"{path}: {text}" if len(texts) > 1 else text)
            tell(shown, count)


@dataclasses.dataclass(frozen=True)
class Infill:
    """Fill a region of a picture (--box), or the <mask> in a caption.

    cm3jax infill RUN PICTURE "a large red circle top left, on white" --box 0 0 0.5 0.5

    cm3jax infill RUN PICTURE "a large <mask> circle top left, on white"

    Words are the likeliest ones unless a sampling flag or --count says otherwise.
    """

    run: Positional[Annotated[str, arg(metavar="RUN")]]
    """Run folder with text/, image/ and decoder/."""
    picture: Positional[Annotated[str, arg(metavar="PICTURE")]]
    """Picture file; its centre square is used."""
    text: Positional[Annotated[str, arg(metavar="TEXT")]]
    """Caption of the whole picture; with <mask> in it, the words that are missing are written."""
    box: tuple[float, ...] = ()
    """Region to draw anew: X0 Y0 X1 Y1 in fractions of the square, upper left and lower right."""
    count: int = 1
    """Answers."""
    seed: int = 0
    out: str = ""
    """Folder for the pictures; "": RUN/infilled."""
    max_text: int = 96
    """Longest answer for <mask>, in tokens."""
    mesh: Mesh = Mesh()
    """How the devices share the model; as it stands here: the recipe's own if it names one, a copy
    each if they hold it, else split over heads."""
    sampling: Annotated[Sampling, flags.FLAT] = Sampling()

    def __call__(self):
        from cm3jax import png, provenance

        run = folder(self.run)
        if bool(self.box) == (MASK in self.text):
            raise UserError(f"infill: needs either --box X0 Y0 X1 Y1, or {MASK} in the text")
        if self.box and len(self.box) != 4:
            raise UserError(f"--box: {len(self.box)} numbers; needs four, X0 Y0 X1 Y1")
        rows, _ = positive("count", self.count), stated(self.text)
        pictures, texts = [png.read(self.picture)] * rows, [self.text] * rows
        from cm3jax.sample import generate

        generator = loaded(self, run)
        if not self.box:
            unset = self.sampling == chosen(run, "infill") and rows == 1
            sampling = generate.GREEDY if unset else self.sampling
            max_text = positive("max_text", self.max_text)
            print(*generator.infill_text(pictures, texts, seeded(self.seed), sampling, max_text), sep="\n")
            return
        drawn = generator.infill_image(pictures, texts, [self.box] * rows, seeded(self.seed), self.sampling)
        given = {"box": list(self.box), "picture": provenance.hashed(self.picture)}
        model, settings = artist(run), configs.to_json(self.sampling) | given
        for i, picture in enumerate(drawn):
            source = "compositeWithTrainedAlgorithmicMedia"
            made = provenance.Made(model, self.text, self.seed, i, settings, source=source)
            print(png.write(self.out or run / "infilled", picture, made))


@dataclasses.dataclass(frozen=True)
class Edit:
    """Change a picture as an instruction says.

    cm3jax edit RUN photo.jpg "make the sky red"

    cm3jax edit RUN photo.jpg "make the sky red" --guidance 7.5 --image_guidance 1.5

    cm3jax edit RUN photo.jpg "make the sky red" --example a.png "make the sky red" b.png

    With --image_guidance, how much the picture weighs and how much the instruction does are two numbers; Chameleon's
    public code edits with the above. Both compare with prompts whose instruction or picture is masked, which a model
    must have seen: decoder.mask.rotate above 0 in its training.
    """

    run: Positional[Annotated[str, arg(metavar="RUN")]]
    """Run folder with text/, image/ and decoder/, tuned on tasks."""
    picture: Positional[Annotated[str, arg(metavar="PICTURE")]]
    """Picture file; its centre square is used."""
    instruction: Positional[Annotated[str, arg(metavar="INSTRUCTION")]]
    """What to change."""
    count: int = 1
    """Pictures."""
    seed: int = 0
    out: str = ""
    """Folder for the pictures; "": RUN/edited."""
    example: Examples = ()
    """PICTURE INSTRUCTION EDITED: an edit to go by, shown before this one; may be given several times."""
    mesh: Mesh = Mesh()
    """How the devices share the model; as it stands here: the recipe's own if it names one, a copy
    each if they hold it, else split over heads."""
    sampling: Annotated[Sampling, flags.FLAT] = Sampling()

    def __call__(self):
        from cm3jax import png

        values = {"instruction": stated(self.instruction, "instruction"), "image": png.read(self.picture)}
        examples = read_examples(self.example, ("image", "instruction", "edited_image"))
        draw_task(self, "edit", values, examples, self.instruction, "edited", {})


@dataclasses.dataclass(frozen=True)
class DrawFrom:
    """Draw a caption from a feature image: edges, a scribble, a segmentation or depth map, normals, a pose.

    cm3jax draw-from RUN scribble.png "a red circle, on white" --kind scribble

    cm3jax draw-from RUN photo.jpg "a red circle, on white" --kind edges --of-picture
    """

    run: Positional[Annotated[str, arg(metavar="RUN")]]
    """Run folder with text/, image/ and decoder/, tuned on tasks."""
    picture: Positional[Annotated[str, arg(metavar="PICTURE")]]
    """Feature image; its centre square is used."""
    caption: Positional[Annotated[str, arg(metavar="CAPTION")]]
    """What to draw."""
    kind: FeatureName = "edges"
    """What PICTURE is."""
    of_picture: bool = False
    """PICTURE is a photograph or drawing, of which the feature image is to be made: edges (Canny) and scribbles, by
    pip install 'cm3jax[features]', or by --maker."""
    maker: str = ""
    """--of-picture: package.module:function, a function of yours that makes it: uint8 [h, w, 3] -> the same."""
    count: int = 1
    """Pictures."""
    seed: int = 0
    out: str = ""
    """Folder for the pictures; "": RUN/drawn."""
    example: Examples = ()
    """FEATURE_IMAGE CAPTION PICTURE: a drawing to go by, shown before this one; may be given several times."""
    mesh: Mesh = Mesh()
    """How the devices share the model; as it stands here: the recipe's own if it names one, a copy
    each if they hold it, else split over heads."""
    sampling: Annotated[Sampling, flags.FLAT] = Sampling()

    def __call__(self):
        from cm3jax import png
        from cm3jax.tasks import features

        picture = png.read(self.picture)
        if self.of_picture:
            picture = features.make(self.kind, picture, self.maker)
        elif self.maker:
            raise UserError("--maker makes a feature image of a picture; add --of-picture")
        how = {"of_picture": self.of_picture} | ({"maker": self.maker} if self.maker else {})
        values = {"caption": stated(self.caption), "feature_image": picture}
        examples = read_examples(self.example, ("feature_image", "caption", "image"))
        draw_task(self, self.kind, values, examples, self.caption, "drawn", how)


def read_examples(given: tuple[tuple[str, ...], ...], names: tuple[str, ...]) -> list[dict]:
    """Return {field: text, or the picture in the file} of each --example, whose words are these fields."""
    from cm3jax import png
    from cm3jax.tasks import table

    wanted = " ".join(name.upper() for name in names)
    for words in given:
        if len(words) != len(names):
            raise UserError(f"--example {' '.join(map(repr, words))}: {len(words)} words; needs {len(names)}: {wanted}")
    return [
        {name: png.read(word) if table.is_picture(name) else word for name, word in zip(names, words, strict=True)}
        for words in given
    ]


def draw_task(
    verb: Edit | DrawFrom, task: str, values: dict, examples: list, prompt: str, into: str, more: dict
) -> None:
    """Draw --count pictures of one task, and print where they are; `more` settings go into their files."""
    from cm3jax import png, provenance

    run, rows = folder(verb.run), [values] * positive("count", verb.count)
    seed = seeded(verb.seed)
    from cm3jax.sample import tasks

    generator = loaded(verb, run)
    (field,) = tasks.table.find(task).answer
    seen = [
        [
            provenance.hashed(word) if tasks.table.is_picture(name) else word
            for name, word in zip(one, words, strict=True)
        ]
        for one, words in zip(examples, verb.example, strict=True)
    ]
    given = {"task": task, "picture": provenance.hashed(verb.picture), "example": seen, **more}
    model, settings = artist(run), configs.to_json(verb.sampling) | given
    for i, found in enumerate(tasks.answer(generator, task, rows, seed, verb.sampling, examples=examples)):
        made = provenance.Made(model, prompt, seed, i, settings)
        print(png.write(verb.out or run / into, found[field], made))


@dataclasses.dataclass(frozen=True)
class Show:
    """Show where a picture came from: the model, prompt, seed and settings in its file's fields.

    cm3jax show runs/quickstart/generated/a-red-circle-0-0-1a2b3c.png
    """

    picture: Positional[Annotated[str, arg(metavar="PICTURE")]]
    """PNG file that this program wrote."""

    def __call__(self):
        from cm3jax import provenance

        print(provenance.show(self.picture))


@dataclasses.dataclass(frozen=True)
class Ask:
    """Answer a question about a picture.

    cm3jax ask RUN photo.jpg "What lies on the table?"

    cm3jax ask RUN photo.jpg "Which is a fruit?" --options "(A) apple (B) cup" --reason

    cm3jax ask RUN photo.jpg "What is it?" --example a.png "What is it?" cup --example b.png "What is it?" apple
    """

    run: Positional[Annotated[str, arg(metavar="RUN")]]
    """Run folder with text/, image/ and decoder/, tuned on tasks."""
    picture: Positional[Annotated[str, arg(metavar="PICTURE")]]
    """Picture file; its centre square is looked at."""
    question: Positional[Annotated[str, arg(metavar="QUESTION")]]
    """What to answer."""
    options: str = ""
    """Answers to choose among, such as "(A) apple (B) cup"."""
    context: str = ""
    """With --options: what else is known."""
    reason: bool = False
    """With --options: say why first."""
    seed: int = 0
    max_text: int = 96
    """Longest answer, in tokens."""
    example: Examples = ()
    """PICTURE QUESTION ANSWER: one to go by, shown before this one; may be given several times. With --options it is
    PICTURE QUESTION OPTIONS ANSWER, with --reason PICTURE QUESTION OPTIONS EXPLANATION ANSWER."""
    mesh: Mesh = Mesh()
    """How the devices share the model; as it stands here: the recipe's own if it names one, a copy
    each if they hold it, else split over heads."""
    sampling: Annotated[Sampling, flags.FLAT] = Sampling(temperature=0.0)

    def __call__(self):
        from cm3jax import png

        if not self.options and (self.reason or self.context):
            raise UserError("ask: --reason and --context go with --options, the answers to choose among; add them")
        task = ("reasoning" if self.reason else "choice") if self.options else "question"
        values = {"question": stated(self.question, "question"), "image": png.read(self.picture)}
        names = ["image", "question", *["options"] * bool(self.options), *["explanation"] * self.reason, "answer"]
        examples = [{"context": "", **one} for one in read_examples(self.example, tuple(names))]
        print(write_task(self, task, values | {"context": self.context, "options": self.options}, examples))


@dataclasses.dataclass(frozen=True)
class Describe:
    """Describe a picture, in short or in detail.

    cm3jax describe RUN photo.jpg --long
    """

    run: Positional[Annotated[str, arg(metavar="RUN")]]
    """Run folder with text/, image/ and decoder/, tuned on tasks."""
    picture: Positional[Annotated[str, arg(metavar="PICTURE")]]
    """Picture file; its centre square is looked at."""
    long: bool = False
    """In detail."""
    seed: int = 0
    max_text: int = 192
    """Longest description, in tokens."""
    example: Examples = ()
    """PICTURE DESCRIPTION: one to go by, shown before this one; may be given several times."""
    mesh: Mesh = Mesh()
    """How the devices share the model; as it stands here: the recipe's own if it names one, a copy
    each if they hold it, else split over heads."""
    sampling: Annotated[Sampling, flags.FLAT] = Sampling(temperature=0.0)

    def __call__(self):
        from cm3jax import png

        task, values = "long_caption" if self.long else "caption", {"image": png.read(self.picture)}
        print(write_task(self, task, values, read_examples(self.example, ("image", "caption"))))


def write_task(verb: Ask | Describe, task: str, values: dict, examples: list) -> str:
    """Return the fields of one answer, a line each."""
    run, seed, max_text = folder(verb.run), seeded(verb.seed), positive("max_text", verb.max_text)
    from cm3jax.sample import tasks

    generator = loaded(verb, run)
    (found,) = tasks.answer(generator, task, [values], seed, verb.sampling, max_text, examples=examples)
    return "\n".join(found.values())


def artist(run: pathlib.Path):
    """Return the `provenance.Model` that draws: the run's, with the checkpoint that its evaluation chose."""
    from cm3jax import provenance
    from cm3jax.sample import generate

    return provenance.Model(run_recipe(str(run)).name, *generate.identity(run, chosen_checkpoint(run)))


def loaded(verb, run: pathlib.Path, batch: int = 16):
    """Return the generator of a verb's run, with the checkpoint that its evaluation chose."""
    from cm3jax.sample import generate

    mesh = None if verb.mesh == Mesh() else verb.mesh
    return generate.load(run, batch, chosen_checkpoint(run), mesh)


def documents(given: int, run: pathlib.Path, verb: str) -> int:
    """Return how many documents are shown: those of the flag, or as many as the run's evaluation chose."""
    if given < -1:
        raise UserError(f"--documents = {given}: must be at least 0, or -1 for what the run's evaluation chose")
    return reported(run, lambda report: report.get(SAMPLED[verb], {}).get("documents", 0)) if given < 0 else given


def remembered(run: pathlib.Path, batch: int, documents: int, rerank: bool = False):
    """Return the run's memory, if documents are asked for, and its retriever, if one is to pick."""
    from cm3jax.retrieval import encoder
    from cm3jax.retrieval import memory as memories

    memory = memories.load(run, batch) if documents else None
    picks = (memory.encoder if memory else encoder.load(run / "retriever", batch)) if rerank else None
    return memory, picks


def tell(found, asked: int) -> None:
    """Print which documents were shown, indented below what was drawn or written with them."""
    for one in found:
        origin = ", ".join(x for x in (one.source, one.license) if x)
        print(f"    with {one.split}/{one.key}, score {one.score:.3f}{f' ({origin})' if origin else ''}")
    if len(found) < asked:
        print(f"    {len(found)} of {asked} documents: no more were found, or the row has no room")


def positive(name: str, value: int) -> int:
    if value < 1:
        raise UserError(f"--{name} = {value}: must be at least 1")
    return value


SAY = {"caption": "what the picture shows", "instruction": "what to change", "question": "what to answer"}


def stated(text: str, what: str = "caption") -> str:
    if not text.strip():  # preparation rejects such captions, so that training never meets one
        raise UserError(f"{what} {text!r}: is empty; say {SAY[what]}")
    return text


def seeded(value: int) -> int:
    if not 0 <= value < configs.SEEDS:
        raise UserError(f"--seed = {value}: must be from 0 to {configs.SEEDS - 1}")
    return value


def refuse_idle(verb: str, recipe: Recipe, default: Recipe, own: tuple[str, ...]) -> None:
    """Raise UserError for a flag that does nothing: one of a stage whose result is taken as it is on disk."""
    given, unset = stages.flatten(configs.to_json(recipe)), stages.flatten(configs.to_json(default))
    for name in given | unset:
        if name.partition(".")[0] not in own and given.get(name) != unset.get(name):
            raise UserError(
                f"--{name}: does nothing here, as {verb} takes the other stages' results as they are; what it listens"
                f" to: {', '.join(f'--{section}.*' if section != 'name' else '--name' for section in own)}"
            )


@dataclasses.dataclass(frozen=True)
class RetrieveBuild:
    """Make the retriever, the memory bank and the neighbours of a run, as far as they are not there.

    cm3jax retrieve build RUN

    cm3jax retrieve build RUN --extend --bank.splits train more --bank.search ivf_pq
    """

    run: Positional[Annotated[str, arg(metavar="RUN")]]
    """Run folder with prepared/ and text/, whose recipe retrieves."""
    extend: bool = False
    """Add the further splits of --bank.splits to the bank, or search it another way, and keep the vectors in it."""
    redo: Literal["", "retriever", "bank", "neighbours"] = ""
    """Stage to make again from nothing, with all that depend on it."""
    recipe: Annotated[Recipe, flags.FLAT] = Recipe()
    cluster: Annotated[configs.Hosts, flags.FLAT] = configs.Hosts()

    def __call__(self):
        from cm3jax import hosts, run

        own = ("retrieve", "retriever", "bank", "neighbours", "name")
        refuse_idle("retrieve build", self.recipe, run_recipe(self.run), own)
        hosts.start(self.cluster)
        run.build_memory(self.recipe, self.run, self.redo, self.extend)


@dataclasses.dataclass(frozen=True)
class RetrieveQuery:
    """Show the documents that a run's memory bank has for a text or a picture, with their scores.

    cm3jax retrieve query RUN "a large red circle top left"

    cm3jax retrieve query RUN picture.png --count 8 --out sheet.png
    """

    run: Positional[Annotated[str, arg(metavar="RUN")]]
    """Run folder with retriever/, bank/ and prepared/."""
    query: Positional[Annotated[str, arg(metavar="QUERY")]]
    """A text, or the path of a picture file."""
    count: int = 4
    """Documents at most."""
    out: str = ""
    """PNG file for the sheet; "": a file of its own name in RUN/retrieved."""

    def __call__(self):
        from cm3jax import png

        stated(self.query)
        count, given = positive("count", self.count), folder(self.run)
        picture = png.read(self.query) if looks_like_a_file(self.query) else None
        from cm3jax.retrieval import memory, sheet

        bank = memory.load(given)
        asked = {"texts": [self.query]} if picture is None else {"pictures": [picture]}
        (found,) = bank.find(**asked, count=count)
        for document in found:
            text = " / ".join(part for part in bank.record(document).parts if isinstance(part, str))
            origin = ", ".join(x for x in (document.source, document.license) if x)
            print(f"{document.score:.3f}  {document.key}{f' ({origin})' if origin else ''}: {text}")
        if len(found) < count:
            print(f"{len(found)} of {count}: no more documents pass the limits of the run's neighbours.* settings")
        records = [bank.record(document) for document in found]
        drawn = sheet.draw(self.query if picture is None else picture, records, [x.score for x in found])
        if not self.out:
            print(png.save(given / "retrieved" / f"{png.stem(self.query, 0, 0, bank.settings)}.png", drawn))
            return
        print(png.save(self.out, drawn))  # without marks of a machine: these pictures are the bank's


def looks_like_a_file(text: str) -> bool:
    """Return whether an argument is the path of a file, or ends as a picture's name does."""
    endings = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
    with contextlib.suppress(OSError, ValueError):
        return text.lower().endswith(endings) or pathlib.Path(text).is_file()
    return False


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Score a run; writes report.json, report.html and samples.png, or with --suite RUN/suites/SUITE.json.

    cm3jax evaluate RUN --suite captions pictures --held-out runs/coco --split validation --evaluate.samples 5000
    --score.metrics fid clip_score --score.weights.inception pt_inception.pth --score.weights.clip clip/

    A suite that was interrupted continues, and what is known is not made again.
    """

    run: Positional[Annotated[str, arg(metavar="RUN")]]
    """Finished run folder."""
    suite: tuple[SuiteName, ...] = ()
    """scenes: what the evaluation without --suite makes, if it is not there. pictures: drawn from captions, by the
    figures of --score.metrics. reconstruction: by the same (psnr ssim lpips rfid), as the image tokenizer gives them
    back. captions: CIDEr-D, BLEU, ROUGE-L. vqa, vizwiz: accuracy; science-qa: of the questions with a picture.
    visdial: NDCG, and MRR and recalls of the judged rounds. tasks: the embedded world's."""
    held_out: str = ""
    """--suite: folder of `cm3jax prepare`, with the documents to score on; "": RUN."""
    split: str = "test"
    """--suite: which of them."""
    score: configs.Score = configs.Score()
    recipe: Annotated[Recipe, flags.FLAT] = Recipe()

    def __call__(self):
        from cm3jax import run

        refuse_idle("evaluate", self.recipe, run_recipe(self.run), ("evaluate", "name"))
        if self.suite:
            return self.by_suites()
        if (self.held_out, self.split, self.score) != ("", "test", configs.Score()):
            raise UserError("evaluate: --held-out, --split and --score go with --suite; add it")
        recipe = run.adopt(self.recipe, self.run, "evaluate")
        out = run.run(recipe, self.run, redo="evaluate", only="evaluate")
        print(f"report: {out / 'report.html'}")

    def by_suites(self) -> None:
        """Score by each suite, with the settings and documents that the run's evaluation chose."""
        from cm3jax import run

        if "scenes" in self.suite:
            run.run(run.adopt(self.recipe, self.run, "evaluate"), self.run, only="evaluate")
        named, home = [name for name in self.suite if name != "scenes"], folder(self.run)
        if not named:
            return
        from cm3jax.evaluate import suites

        shown = documents(-1, home, "generate"), documents(-1, home, "caption")
        decoding = suites.Decoding(chosen(home, "generate"), chosen_checkpoint(home), *shown)
        suites.evaluate(named, home, self.recipe, self.held_out or home, self.split, decoding, self.score)
        print("\n".join(f"result: {home / 'suites' / name}.json" for name in named))


@dataclasses.dataclass(frozen=True)
class Card:
    """Write a run's model card: data, licences, compute, scores and their spread, from its files alone.

    cm3jax card RUN --also RUN2 RUN3 --by lang source

    It ends with all settings as they are, paths among them: read it before you publish it.
    """

    run: Positional[Annotated[str, arg(metavar="RUN")]]
    """Run folder."""
    also: tuple[str, ...] = ()
    """Runs of the same recipe with other seeds: scores are then given with their spread over all."""
    by: tuple[str, ...] = ()
    """Attributes by which scores are given: source, license, group, or a field of the data's records, such as lang."""
    out: str = ""
    """Markdown file; "": RUN/card.md."""

    def __call__(self):
        from cm3jax import card

        print(card.write(folder(self.run), [folder(one) for one in self.also], self.by, self.out))


@dataclasses.dataclass(frozen=True)
class Score:
    """Score pictures against a reference, pair by pair or against captions, and write the protocol with the figures.

    cm3jax score drawn/ real/ --metrics fid kid --weights.inception pt_inception-2015-12-05-6726825d.pth

    cm3jax score rebuilt/ originals/ --metrics psnr ssim rfid --weights.inception pt_inception-2015-12-05-6726825d.pth

    cm3jax score drawn/ --metrics clip_score --weights.clip clip-vit-base-patch32/

    What an interrupted run has seen stays in --cache, and the same command continues.
    """

    pictures: Positional[Annotated[str, arg(metavar="PICTURES")]]
    """Folder of pictures, or their statistics (.npz)."""
    reference: Positional[Annotated[str, arg(metavar="REFERENCE")]] = ""
    """The same of what they are compared with; not needed for captions."""
    score: Annotated[configs.Score, flags.FLAT] = configs.Score()
    captions: str = ""
    """metadata.jsonl or .csv with file_name and text of each picture; "": the one in PICTURES."""
    statistics: str = ""
    """Also write the statistics of PICTURES to this .npz, which pytorch-fid reads too, as a later REFERENCE."""
    out: str = ""
    """Result file; "": runs/scores/NAME-XXXXXX.json, NAME being that of the folder of PICTURES."""
    cache: str = "runs/scores/cache"
    """Folder for what is known of single pictures."""

    def __call__(self):
        name = pathlib.Path(self.pictures).resolve().stem
        known = configs.digest(self.pictures, self.reference, self.score)[:6]  # others have another file
        out = self.out or f"runs/scores/{name}-{known}.json"
        from cm3jax.evaluate import score

        more = {"captions": self.captions, "statistics": self.statistics}
        found = score.score(self.pictures, self.reference, self.score, out, self.cache, **more)
        if found["metrics"]:
            print(f"result: {out}")


@dataclasses.dataclass(frozen=True)
class ScoreText:
    """Score captions or answers in a published set's format, and write the protocol with the figures.

    cm3jax score-text captions results.json captions_val2014.json --part

    cm3jax score-text vqa results.json v2_mscoco_val2014_annotations.json

    cm3jax score-text science-qa results.json problems.json --split test

    cm3jax score-text visdial ranks.json visdial_1.0_val.json visdial_1.0_val_dense_annotations.json
    """

    kind: Positional[Annotated[TextKind, arg(metavar="KIND")]]
    """captions: CIDEr-D, BLEU, ROUGE-L; vqa (also OK-VQA's), vizwiz: accuracy by kind of answer, each by its own rule,
    or how well it is told which of VizWiz's questions cannot be answered; science-qa: accuracy in the columns of the
    published tables; visdial: MRR, recalls, NDCG."""
    predictions: Positional[Annotated[str, arg(metavar="PREDICTIONS")]]
    """What was said, in the set's format of results (cm3jax/evaluate/words.py)."""
    truth: Positional[Annotated[tuple[str, ...], arg(metavar="TRUTH")]]
    """The set's annotations."""
    part: bool = False
    """Score what is predicted, though the annotations have more; the result says so."""
    split: str = "test"
    """Of science-qa."""
    out: str = ""
    """Result file; "": runs/scores/NAME-KIND-XXXXXX.json, NAME being that of PREDICTIONS."""

    def __call__(self):
        from cm3jax.evaluate import words

        name = pathlib.Path(self.predictions).stem
        known = configs.digest(self.predictions, self.truth, self.part, self.split)[:6]
        out = self.out or f"runs/scores/{name}-{self.kind}-{known}.json"
        words.score(self.kind, self.predictions, self.truth, out, self.part, self.split)
        print(f"result: {out}")


@dataclasses.dataclass(frozen=True)
class Tabulate:
    """Show result files of `score` and `score-text` as one table, if their protocols are the same."""

    results: Positional[Annotated[tuple[str, ...], arg(metavar="RESULT")]]
    """Result files."""
    mixed: bool = False
    """Show figures of different protocols too, each with a mark."""

    def __call__(self):
        from cm3jax.evaluate import results

        if not self.results:
            raise UserError("tabulate: needs result files of cm3jax score")
        print(results.table(self.results, self.mixed))


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measure training, decoding, making batches and preparing pictures on this machine."""

    what: Positional[Annotated[Benchmark, arg(metavar="WHAT")]] = "all"
    """all (train, decode, data, prepare), one of these, chameleon (against transformers) or chameleon-7b (on a GPU or
    TPU)."""
    config: str = "configs/cm3leon/tiny.py"
    """Recipe whose decoder is measured."""
    rounds: int = 5
    """Rounds of each contestant; the figure is their median."""
    compiled: bool = False
    """Compare with torch.compile too."""
    out: str = ""
    """JSON file to write too."""

    def __call__(self):
        from cm3jax import bench

        bench.main(self.what, self.config, self.rounds, self.compiled, self.out)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Compile a recipe's training for a TPU slice that is not there: does it fit, and how long would it take.

    cm3jax plan configs/cm3leon/7b.py --topology v5e-256

    Needs no TPU, but its compiler: pip install 'cm3jax[tpu]'.
    """

    config: Positional[Annotated[str, arg(metavar="RECIPE")]]
    """Recipe file or run folder; the flags below change single settings. "published": the method on runs of others."""
    topology: str = "v5e-256"
    """Slice, as users name it (v5p-128), as the compiler does (v5p:4x4x4), or both (v5p-128=v5p:4x4x4)."""
    slices: int = 1
    """Number of such slices, joined by the data-center network."""
    use: Annotated[Literal["train", "sample", "bank"], arg(name="for")] = "train"
    """What to compile: the train step, prefill and the decode loop, or the search of a memory bank on the mesh."""
    rows: int = 0
    """--for sample: pictures drawn at one time; 0: one for each chip that rows are split over."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """--for sample: that the weights are kept in; imported ones keep their file's."""
    documents: int = 1_000_000
    """--for bank: of the bank, whose vectors are as long as retriever.model.size."""
    search: bool = False
    """If it does not fit, try changes, the cheapest first, until one does."""
    json: bool = False
    """Print JSON to standard output, and nothing else."""
    recipe: Annotated[Recipe, flags.FLAT] = Recipe()

    def __call__(self):
        from cm3jax.plan import environment

        os.environ.update(environment.NEEDED)
        from cm3jax.plan import show

        if self.config == PUBLISHED:
            return show.published()
        if self.use == "sample":
            return show.sampling(self.recipe, self.topology, self.slices, self.rows, self.dtype, self.json)
        if self.use == "bank":
            return show.searching(self.recipe, self.topology, self.slices, self.documents, self.json)
        return show.training(self.recipe, self.topology, self.slices, self.search, self.json)


@dataclasses.dataclass(frozen=True)
class Tasks:
    """List the tasks of instruction tuning, each with an example; or count them in what a run trains on.

    cm3jax tasks question

    cm3jax tasks runs/sft-scenes
    """

    name: Positional[Annotated[str, arg(metavar="TASK")]] = ""
    """One of them alone, with all its wordings; "": all. A run folder with prepared/ and tokens/: how many documents
    of each task its rows hold, and in how many of them exactly the answer is masked."""
    rows: int = 2000
    """Of a run: rows that are looked at, the first of the first epoch, which are shuffled."""

    def __call__(self):
        from cm3jax.tasks import show, table

        if self.name and self.name not in table.TASKS and pathlib.Path(self.name).is_dir():
            from cm3jax.data import census

            run_recipe(self.name)
            return print(census.of_run(self.name, positive("rows", self.rows)))
        print(show.one(self.name) if self.name else show.all())


@dataclasses.dataclass(frozen=True)
class Import:
    """Bring a released checkpoint into a run folder: Chameleon, Anole, Lumina-mGPT, an image tokenizer, CLIP.

    cm3jax import chameleon-7b runs/chameleon

    cm3jax import vqgan.ckpt runs/taming --hash 5e2f...

    What it is follows from its content. Nothing in a file is ever executed, and nothing is written unless all of it
    fits. The run folder then works with every verb.
    """

    source: Positional[Annotated[str, arg(metavar="SOURCE")]]
    """Folder of a checkpoint (Hugging Face's layout or Meta's), or a file of an image tokenizer."""
    out: Positional[Annotated[str, arg(metavar="OUT")]]
    """Run folder to write; must not be there."""
    tokenizer: str = ""
    """The text tokenizer's file, or a folder that has it; "": in SOURCE."""
    image: str = ""
    """The image tokenizer's file, or a folder that has it (Hugging Face's Chameleon has no image decoder, Meta's
    vqgan.ckpt has); "": in SOURCE."""
    resolution: int = 0
    """Pixels of a side of the image tokenizer's pictures; 0: as the files say, or what is known of published ones."""
    pinned: Annotated[str, arg(name="hash")] = ""
    """SHA-256 that the files must have, as an import prints it; "": any."""
    dry_run: bool = False
    """Find a place for every tensor, read none and write nothing. With --hash the files are read once, for it."""

    def __call__(self):
        from cm3jax import foreign

        foreign.bring(self.source, self.out, self.tokenizer, self.image, self.resolution, self.pinned, self.dry_run)


@dataclasses.dataclass(frozen=True)
class Export:
    """Write a run's weights into files for others: as such models are published, or as plain safetensors.

    cm3jax export runs/chameleon chameleon-hf --to hf
    """

    run: Positional[Annotated[str, arg(metavar="RUN")]]
    """Run folder, trained here or imported."""
    out: Positional[Annotated[str, arg(metavar="OUT")]]
    """Folder to write; must not be there."""
    to: Literal["hf", "safetensors"] = "safetensors"
    """hf: Hugging Face's layout of Chameleon, for decoders of that form, or of CLIP, for a retriever, both for
    transformers, or of an image tokenizer one file with taming's or LlamaGen's names; safetensors: all parts of any
    run, named as cm3jax/interop/plain.py says. Import reads all of them again."""
    part: Literal["", "decoder", "retriever", "image"] = ""
    """--to hf: which of them; "": the first of them that the run has."""
    step: int = -1
    """Checkpoint of the decoder; -1: the one that the run's evaluation chose, else the latest."""
    dtype: Literal["", "float32", "bfloat16", "float16"] = ""
    """Type of the weights; "": as they are stored."""

    def __call__(self):
        from cm3jax import foreign

        run = folder(self.run)
        step = chosen_checkpoint(run) if self.step < 0 else self.step
        foreign.send(run, self.out, self.to, step, self.dtype, self.part)


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Show versions, devices, memory and disk, what is missing and how to get it."""

    def __call__(self):
        from cm3jax import doctor

        return doctor.main()


VERBS = {
    "prepare": Prepare,
    "train": Train,
    "encode": Encode,
    "run": Run,
    "generate": Generate,
    "caption": Caption,
    "infill": Infill,
    "edit": Edit,
    "draw-from": DrawFrom,
    "ask": Ask,
    "describe": Describe,
    "show": Show,
    "retrieve build": RetrieveBuild,
    "retrieve query": RetrieveQuery,
    "evaluate": Evaluate,
    "card": Card,
    "tasks": Tasks,
    "score": Score,
    "score-text": ScoreText,
    "tabulate": Tabulate,
    "import": Import,
    "export": Export,
    "plan": Plan,
    "bench": Bench,
    "doctor": Doctor,
}
RECIPES = {"run": "RECIPE", "plan": "RECIPE", "train": "CONFIG"}
RECIPES |= {"encode": "RUN", "evaluate": "RUN", "retrieve build": "RUN"}
SAMPLED = {"generate": "text_to_image", "caption": "image_to_text", "infill": "infill"}
SAMPLED |= {"edit": "text_to_image", "draw-from": "text_to_image", "ask": "image_to_text", "describe": "image_to_text"}
FIRST = RECIPES | dict.fromkeys(SAMPLED, "RUN")
"""Verbs whose first argument names where the defaults of their flags come from: a recipe, a run, a run's scores."""

# ---------------------------------------------------------------------------------------------------------------- main


def main(argv=None) -> int:
    """Run one command; return its exit code.

    0, also when SIGTERM stopped a training that then was saved; 2 for a mistake in the input; 75 if the
    other hosts did not come; 130 for Ctrl-C.
    """
    if argv is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it was told to ignore it
        signal.signal(signal.SIGINT, stop_here)
    argv = list(sys.argv[1:] if argv is None else argv)
    settle_platform()
    traceback = "--traceback" in argv or os.environ.get("CM3JAX_TRACEBACK", "0") not in ("", "0")
    try:
        return ended(command([a for a in argv if a != "--traceback"]) or 0)
    except UserError as e:
        if traceback:
            raise
        print(f"cm3jax: {' '.join(str(e).split())}", file=sys.stderr)
        return failed(e.code)
    except KeyboardInterrupt as e:
        if traceback:
            raise
        sys.stderr.write(f"\ncm3jax: {str(e) or INTERRUPTED}\n")  # at once: workers may be writing there too
        number = getattr(e, "number", 0)  # 0: nothing was saved
        code = 0 if number == signal.SIGTERM else 130
        return ended(code) if number else failed(code)
    except BrokenPipeError:  # `| head` closed our output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as e:
        if not traceback and disk_is_full(e):
            print("cm3jax: the disk is full; free some space, and the same command continues", file=sys.stderr)
            return failed(2)
        if not several():
            raise
        sys.excepthook(*sys.exc_info())
        print(f"cm3jax: {LOST.format(several())}", file=sys.stderr)
        return failed(1)


LOST = (
    "host {} stopped at the error above. If that speaks of a connection or a peer, another host has ended: its log"
    " says why. The same command on all hosts continues from the last checkpoint."
)


def several() -> str:
    """Return which host of how many this is; "" where it is the only one."""
    hosts = sys.modules.get("cm3jax.hosts")
    return f"{hosts.index()} of {hosts.count()}" if hosts and hosts.count() > 1 else ""


def ended(code: int) -> int:
    """Return the exit code of a command that all hosts end together, once they have."""
    if several():
        sys.modules["cm3jax.hosts"].finish()
    return code


def failed(code: int) -> int:
    """Return the exit code of a command that this host may end alone; one of several exits at once."""
    if several():
        sys.modules["cm3jax.hosts"].abandon(code)
    return code


INTERRUPTED = "interrupted; the same command continues"


def stop_here(number, frame) -> None:
    """End this process at Ctrl-C, wherever it is; the training loop has a handler of its own, which saves first.

    What a stage leaves on disk stands every kill. An exception instead of an exit may arise in a function that compiled
    code calls, and is then lost, or takes the process down with C++'s words. Workers, though, must be told to stop.
    """
    if multiprocessing.active_children():
        raise KeyboardInterrupt
    with contextlib.suppress(RuntimeError, OSError):  # it was writing just now, or nobody listens
        sys.stdout.flush()
    os.write(2, f"\ncm3jax: {INTERRUPTED}\n".encode())
    os._exit(130)


def disk_is_full(error: BaseException | None) -> bool:
    """Return whether an error, or what it arose from, says so; the libraries that write shards have no errno."""
    if error is None:
        return False
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error)
    return full or disk_is_full(error.__cause__ or error.__context__)


DEVICES = ("accel*", "vfio/[0-9]*", "nvidia*", "kfd", "dxg")
"""In /dev: TPUs, older and newer, NVIDIA's, AMD's, and a graphics card under WSL2."""


def settle_platform() -> None:
    """Where there is no accelerator, tell jax so, and let this process keep the memory that a step frees.

    libtpu, which the tests install to compile for TPUs, complains at length on a machine without one.
    """
    chips = [path for pattern in DEVICES for path in pathlib.Path("/dev").glob(pattern)]
    if not chips and sys.platform == "linux":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        keep_memory()


def keep_memory() -> None:
    """Keep freed memory for the next step; must be called before jax starts its threads.

    XLA asks malloc for all of a step's arrays anew, and glibc fetches and returns large blocks page by page: a fifth of
    the time of a training step on a CPU. Other C libraries are left alone.
    """
    malloc_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if malloc_option:
        trim_threshold, mmap_max, arena_max = -1, -4, -8  # malloc.h
        malloc_option(arena_max, 1)  # further arenas are too small for large blocks
        malloc_option(mmap_max, 0)
        malloc_option(trim_threshold, 2**31 - 1)


def command(argv: list[str]) -> int | None:
    """Run the verb that `argv` begins with."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(help())
        return 0
    if argv[0] == "--version":
        import importlib.metadata

        print(f"cm3jax {importlib.metadata.version('cm3jax')}")
        return 0
    words = 2 if " ".join(argv[:2]) in VERBS else 1
    verb, rest = " ".join(argv[:words]), argv[words:]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"verbs: {', '.join(VERBS)}"
        if longer := [name for name in VERBS if name.startswith(f"{verb} ")]:
            hint = f"say {' or '.join(longer)}"
        raise UserError(f"{verb!r}: no such verb; {hint}")
    return flags.parse(VERBS[verb], rest, f"cm3jax {verb}", defaults(verb, rest))()


def help() -> str:
    """Return what `cm3jax` prints when it is not told what to do."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:{width}}  {(cls.__doc__ or '').splitlines()[0]}" for name, cls in VERBS.items())
    return (
        "usage: cm3jax VERB ... [--traceback]\n\nCM3Leon in JAX: train it from nothing, draw, caption, infill.\n\n"
        f"{verbs}\n\n`cm3jax VERB --help` lists a verb's arguments; the first steps: bash launch/quickstart.sh"
    )


def defaults(verb: str, argv: list[str]):
    """Return the verb's arguments with the settings of the recipe that its first argument names.

    Raises:
      UserError: if that argument is missing or names no recipe.
    """
    cls = VERBS[verb]
    unnamed = not argv or argv[0].startswith("-")
    if verb not in FIRST or (unnamed and set(argv) & {"-h", "--help"}):
        return flags.blank(cls)
    if unnamed:
        raise UserError(f"{verb}: needs {FIRST[verb]} as its first argument; see cm3jax {verb} --help")
    if verb in SAMPLED:
        return flags.blank(cls, sampling=chosen(folder(argv[0]), verb))
    if argv[0] == PUBLISHED and verb == "plan":
        return flags.blank(cls)
    of_a_run = RECIPES[verb] == "RUN" or pathlib.Path(argv[0]).is_dir()
    return flags.blank(cls, recipe=run_recipe(argv[0]) if of_a_run else configs.load(argv[0]))


def chosen(run: pathlib.Path, verb: str) -> Sampling:
    """Return the setting that the run's evaluation chose for what a verb does; the plain one before an evaluation."""
    recipe = run / "recipe.json"
    form = configs.load(recipe).form.plain if recipe.is_file() else "cm3leon"
    plain = (configs.PLAIN_TEXT if SAMPLED[verb] == "image_to_text" else configs.PLAIN)[form]
    return reported(
        run,
        lambda report: configs.from_json(
            Sampling, report.get(SAMPLED[verb], {}).get("sampling", configs.to_json(plain))
        ),
    )


def chosen_checkpoint(run: pathlib.Path) -> int | None:
    """Return the step of the decoder's checkpoint that the run's evaluation chose; None before one: the latest."""
    return reported(run, lambda report: report.get("protocol", {}).get("checkpoint", {}).get("step"))


def reported(run: pathlib.Path, take):
    """Return what `take` finds in the run's report.json; {} stands for a run without one.

    Raises:
      UserError: if the file is not what an evaluation writes.
    """
    path = run / "report.json"
    try:
        return take(json.loads(path.read_text()) if path.is_file() else {})
    except (ValueError, AttributeError, UserError) as e:
        raise UserError(f"{path}: not readable ({e}); make it again with: cm3jax evaluate {run}") from None


def run_recipe(run: str) -> Recipe:
    """Return the recipe that a run folder was made with.

    Raises:
      UserError: if it is no run folder.
    """
    path = folder(run) / "recipe.json"
    if not path.is_file():
        raise UserError(f"run folder {run!r}: has no recipe.json; make a run with: cm3jax run RECIPE --out {run}")
    return configs.load(path)


def folder(run: str) -> pathlib.Path:
    """Return an existing run folder.

    Raises:
      UserError: if there is none.
    """
    from cm3jax.data import paths

    paths.local_only(run, "run folder")
    path = pathlib.Path(run)
    if not paths.within(path.is_dir, run):
        known = sorted(str(p.parent) for p in pathlib.Path("runs").glob("*/recipe.json"))
        near = difflib.get_close_matches(run, known, 1)
        hint = f"did you mean {near[0]!r}?" if near else "make one with: cm3jax run configs/quickstart.py"
        raise UserError(f"run folder {run!r}: no such folder; {hint}")
    return path


if __name__ == "__main__":
    sys.exit(main())
