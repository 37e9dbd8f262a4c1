"""Named suites of scores: what is held out is drawn, described or answered by a run's model, and scored.

    pictures   a picture for each caption, against those held out (`score`; the settings name metrics and weights)
    reconstruction  each picture as the image tokenizer gives it back, against itself (`score`, likewise)
    captions   a caption for each picture, against what people wrote (`words`)
    vqa        answers to questions about pictures, against those of people (`words`)
    vizwiz     the same for VizWiz's questions, which have an accuracy of their own (`words`)
    science-qa choices among given answers, of questions with a picture, explained first where people did (`words`)
    visdial    candidates for an answer, by their likelihood, against how fitting people found each (`words`)
    tasks      answers to the embedded world's tasks, against their exact truth (`tasks`)

Each leaves RUN/suites/NAME.json, a result file. It names the model beside the figures, not in their protocols: models
are what one compares. What the model gave lies in RUN/suites/NAME-XXXXXXXX/, in blocks, where XXXXXXXX stands for all
that decides it: weights, decoding, documents. So an interrupted suite continues, and what is known already is not made
again.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from cm3jax import checkpoint, provenance, stages
from cm3jax import config as configs
from cm3jax.data import shards
from cm3jax.data.scenes_world import TASKS
from cm3jax.evaluate import answers, protocol, results, score, words
from cm3jax.evaluate import tasks as judges
from cm3jax.sample import generate, recall, tasks
from cm3jax.stages import write_text
from cm3jax.tasks import table, templates
from cm3jax.types import Record, UserError

BLOCK = 256
"""Answers of the model that are kept together; an interruption costs one block. Block k draws from seed + k."""
PARTS = ("text", "image", "decoder", "retriever", "bank")
"""Folders of a run that what it draws and writes depends on."""
NOTHING = "."
"""Stands for an empty text of the model, which no format of results has; scores count no word in it."""


Work = Callable[[list[Record], list[int], int], list]
"""(documents, their numbers, seed) -> what the model gives for each, JSON types."""


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How the model draws and writes, beside `recipe.evaluate`.

    Attributes:
      draw: Of pictures; texts are written with `recipe.evaluate.write`.
      step: The decoder's checkpoint; None: the latest.
      drawn_with, written_with: Documents shown before a caption, and before a picture.
    """

    draw: configs.Sampling = configs.Sampling()
    step: int | None = None
    drawn_with: int = 0
    written_with: int = 0


@dataclasses.dataclass(eq=False)
class Bench:
    """What all suites share: a model, loaded when something is first made with it, and documents."""

    run: pathlib.Path
    recipe: configs.Recipe
    reader: shards.Reader
    split: str
    decoding: Decoding
    scoring: configs.Score
    say: Callable[[str], Any]

    @functools.cached_property
    def generator(self) -> Any:
        return generate.load(self.run, self.recipe.evaluate.batch, self.decoding.step)

    @functools.cached_property
    def memory(self) -> Any:
        return protocol.remembered(self.recipe, self.run)

    @functools.cached_property
    def weights(self) -> str:
        """A digest of the files of the model and its memory, and of the checkpoint's step."""
        names = [name for part in PARTS for name in stages.files(self.run, part)]
        step = checkpoint.steps(self.run / "decoder")[-1] if self.decoding.step is None else self.decoding.step
        return configs.digest(stages.fingerprint(self.run, names), step)

    @functools.cached_property
    def model(self) -> provenance.Model:
        return provenance.Model(self.recipe.name, *generate.identity(self.run, self.decoding.step))

    @property
    def about(self) -> dict[str, Any]:
        """What a result file tells of the model."""
        dtype, side = self.recipe.decoder.model.dtype, self.recipe.prepare.resolution
        return {"step": self.model.step, "weights": self.model.weights, "dtype": dtype, "resolution": side}

    def rows(self, fits: Callable[[Record], Any], what: str, most: int = 0) -> list[int]:
        """Return the places of the first documents that fit.

        Raises:
          UserError: if none does.
        """
        here = (i for i, record in enumerate(self.reader) if fits(record))
        if not (found := list(itertools.islice(here, most or self.recipe.evaluate.samples))):
            raise UserError(f"suite {what}: none of {len(self.reader)} documents fits; see cm3jax evaluate --help")
        return found

    def documents(self, rows: Sequence[int]) -> str:
        """Return 16 hex digits of the bytes of these documents."""
        found = hashlib.sha256()
        for i in rows:
            found.update(hashlib.sha256(self.reader.read_bytes(i)).digest())
        return found.hexdigest()[:16]

    def folder(self, suite: str, rows: Sequence[int], how: Mapping[str, Any]) -> pathlib.Path:
        """Return where the answers to these documents lie, under a name that stands for all that decides them."""
        about = {"weights": self.weights, "documents": self.documents(rows), **how}
        folder = self.run / "suites" / f"{suite}-{configs.digest(about)[:8]}"
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "made.json", json.dumps(about, indent=1) + "\n")
        return folder

    def answers(self, folder: pathlib.Path, rows: Sequence[int], work: Work) -> list[Any]:
        """Return what the model gives for each document; blocks that are there stay."""
        found: list[Any] = []
        for block, first in enumerate(range(0, len(rows), BLOCK)):
            part, path = rows[first : first + BLOCK], folder / f"{block:05d}.json"
            if not path.is_file():
                self.say(f"suite {folder.name}: {first:,} of {len(rows):,}")
                seed = (self.recipe.evaluate.seed + block) % configs.SEEDS
                made = work([self.reader[i] for i in part], list(range(first, first + len(part))), seed)
                write_text(path, json.dumps(made) + "\n")
            found += json.loads(path.read_text())
        return found


def evaluate(
    names: Sequence[str],
    run,
    recipe: configs.Recipe,
    held_out,
    split: str = "test",
    decoding: Decoding = Decoding(),
    scoring: configs.Score = configs.Score(),
    say: Callable[[str], Any] = print,
) -> dict[str, dict]:
    """Score a run by suites; return {name: what its result file holds}.

    Args:
      names: Keys of `SUITES`.
      recipe: The run's; `recipe.evaluate` says how many documents, and how texts are written.
      held_out: A run folder whose prepared/ holds the documents.
      split: Of them.
      scoring: Of the suites of pictures.

    Raises:
      UserError: for what is missing, before any work of a suite.
    """
    run = pathlib.Path(run)
    if {"pictures", "reconstruction"} & set(names):
        score.needs(scoring, "score.")
    if (asks := sorted(set(names) - {"pictures", "reconstruction", "captions"})) and recipe.form.kind != "cm3leon":
        raise UserError(f"suite {asks[0]} asks as CM3Leon's documents do; {run} is of form {recipe.form.kind}")
    reader = shards.Reader(pathlib.Path(held_out) / "prepared", split)
    bench = Bench(run, recipe, reader, split, decoding, scoring, say)
    found = {}
    with stages.locked(run):
        for name in names:
            out = run / "suites" / f"{name}.json"
            found[name] = SUITES[name](bench, out) | {"model": bench.about}
            write_text(out, json.dumps(found[name], indent=1) + "\n")
    return found


def known(bench: Bench, out: pathlib.Path, folder: pathlib.Path, modules: tuple[str, ...]) -> dict | None:
    """Return a result file that these answers and this version of the program made already; None if there is none."""
    figures = results.figures(out)
    if not figures or any(figure["protocol"].get("code") != results.code(modules) for figure in figures.values()):
        return None
    found = results.read(out)
    if pathlib.Path(found.get("predictions", "")) not in (folder, folder / "said.json"):
        return None
    for name, figure in figures.items():
        bench.say(f"suite {out.stem}: {name}: {figure['value']:.6g} (known)")
    return found


# ---------------------------------------------------------------------------------------------------- what is said


def spoken(
    bench: Bench,
    name: str,
    out: pathlib.Path,
    fits: Callable[[Record], Any],
    what: str,
    how: Mapping[str, Any],
    work: Work,
    files: Callable[[Sequence[Record], list], tuple[Any, Any]],
) -> dict:
    """Score what the model says of the documents that fit, as a kind of `words`.

    Args:
      name: Of the suite, and of the kind.
      what: What fits, for people.
      how: A protocol's part that says how the model was asked.
      files: (documents, what was said of each) -> what was said, and the truth, in the published formats.
    """
    rows = bench.rows(fits, f"{name}: {what}")
    folder = bench.folder(name, rows, how)
    if before := known(bench, out, folder, words.SCORED_BY):
        return before
    said = bench.answers(folder, rows, work)
    paths = [folder / "said.json", folder / "truth.json"]
    for path, value in zip(paths, files([bench.reader[i] for i in rows], said), strict=True):
        write_text(path, json.dumps(value) + "\n")
    return words.score(name, paths[0], paths[1:], out, split=bench.split, say=saying(bench, name), made=how)


def saying(bench: Bench, suite: str) -> Callable[[str], Any]:
    return lambda line: bench.say(f"suite {suite}: {line}")


def decoded(settings: configs.Evaluate, sampling: configs.Sampling, **more: Any) -> dict[str, Any]:
    """Return a protocol's part that says how the model was asked."""
    return {"decoding": {"sampling": configs.to_json(sampling), "seed": settings.seed, **more}}


def told(record: Record) -> list[str]:
    """Return all captions of a document that is a picture with captions; [] for others."""
    text, picture = protocol.pair(record)
    if text is None or picture is None:
        return []
    truth = record.fields.get("truth")
    known = truth.get("captions") if isinstance(truth, dict) else record.fields.get("captions")
    return list(known) if known else [text]


def captions(bench: Bench, out: pathlib.Path) -> dict:
    """Score captions of pictures by CIDEr-D, BLEU and ROUGE-L."""
    settings, count = bench.recipe.evaluate, bench.decoding.written_with

    def work(records: list[Record], numbers: list[int], seed: int) -> list[str]:
        shown, memory = [protocol.first(record)[1] for record in records], bench.memory if count else None
        found, _ = recall.write(bench.generator, shown, seed, settings.write, settings.max_text, memory, count)
        return found

    def files(records, said):
        keys = [record.key for record in records]
        found = [{"image_id": key, "caption": text.strip() or NOTHING} for key, text in zip(keys, said, strict=True)]
        texts = [{"image_id": record.key, "caption": text} for record in records for text in told(record)]
        return found, {"images": [{"id": key} for key in keys], "annotations": texts}

    how = decoded(settings, settings.write, documents=count, max_text=settings.max_text)
    return spoken(bench, "captions", out, told, "a picture with a caption", how, work, files)


def truth_of(record: Record, name: str, *asks: str) -> Any:
    """Return a field of the truth of a document of one of these tasks; () where it has none."""
    truth = record.fields.get("truth")
    return truth.get(name, ()) if record.fields.get("task") in asks and isinstance(truth, dict) else ()


def unanswered(task: str, record: Record) -> dict[str, Any]:
    """Return the fields of a document but those of the answer."""
    values = templates.read(task, record.parts)
    return {name: value for name, value in values.items() if name not in table.find(task).answer}


def from_vizwiz(record: Record) -> bool:
    """Tell whether a document is a question of VizWiz, which alone says whether a question can be answered."""
    return record.source == "vizwiz" or truth_of(record, "answerable", "question") != ()


def people_answered(bench: Bench, name: str, out: pathlib.Path, fits: Callable[[Record], Any], what: str) -> dict:
    """Score answers to questions, in VQA's formats or VizWiz's."""
    settings = bench.recipe.evaluate
    key = "image" if name == "vizwiz" else "question_id"

    def work(records: list[Record], numbers: list[int], seed: int) -> list[str]:
        given = [unanswered("question", record) for record in records]
        found = tasks.answer(bench.generator, "question", given, seed, settings.write, settings.max_text)
        return [row["answer"] for row in found]

    def files(records, said):
        keys, truths = [record.key for record in records], [record.fields["truth"] for record in records]
        found = [{key: one, "answer": text or NOTHING} for one, text in zip(keys, said, strict=True)]
        truth = [
            {key: one, "answers": [{"answer": text} for text in row["answers"]]}
            | {name: row[name] for name in ("answer_type", "answerable") if name in row}
            for one, row in zip(keys, truths, strict=True)
        ]
        return found, truth if name == "vizwiz" else {"annotations": truth}

    how = decoded(settings, settings.write, max_text=settings.max_text)
    return spoken(bench, name, out, fits, what, how, work, files)


def vqa(bench: Bench, out: pathlib.Path) -> dict:
    """Score answers to questions by VQA's accuracy."""
    fits = lambda record: truth_of(record, "answers", "question") and not from_vizwiz(record)  # noqa: E731
    return people_answered(bench, "vqa", out, fits, "a question that people answered (VizWiz's: suite vizwiz)")


def vizwiz(bench: Bench, out: pathlib.Path) -> dict:
    """Score answers to VizWiz's questions by its own accuracy."""
    fits = lambda record: truth_of(record, "answers", "question") and from_vizwiz(record)  # noqa: E731
    return people_answered(bench, "vizwiz", out, fits, "a question of VizWiz that people answered")


CHOICES = ("choice", "reasoning")
"""Tasks with answers to choose from."""


def science_qa(bench: Bench, out: pathlib.Path) -> dict:
    """Score choices among given answers by ScienceQA's accuracy, of the questions with a picture."""
    settings = bench.recipe.evaluate

    def work(records: list[Record], numbers: list[int], seed: int) -> list[str]:
        found = [""] * len(records)
        for task in CHOICES:
            here = [i for i, record in enumerate(records) if record.fields["task"] == task]
            given = [unanswered(task, records[i]) for i in here]
            rows = tasks.answer(bench.generator, task, given, seed, settings.write, settings.max_text)
            for i, row in zip(here, rows, strict=True):
                found[i] = row["answer"]
        return found

    def files(records, said):
        picked, problems = {}, {}
        for record, text in zip(records, said, strict=True):
            truth, hint = record.fields["truth"], unanswered(record.fields["task"], record)["context"]
            picked[record.key] = answers.chosen(text, truth["choices"])
            problems[record.key] = truth | {"hint": hint, "image": "image.png", "split": bench.split}
        return {"results": picked}, problems

    fits = lambda record: truth_of(record, "choices", *CHOICES)  # noqa: E731
    how = decoded(settings, settings.write, max_text=settings.max_text) | {"questions": "those with a picture"}
    return spoken(bench, "science-qa", out, fits, "a question with choices", how, work, files)


def visdial(bench: Bench, out: pathlib.Path) -> dict:
    """Score the order of candidate answers, by their likelihood, by VisDial's NDCG; MRR and recalls of judged rounds.

    The question is asked behind the caption and all that was said before, as text; published protocols differ in that.
    """

    def work(records: list[Record], numbers: list[int], seed: int) -> list[list[int]]:
        return [ranks(bench.generator, record) for record in records]

    def files(records, said):
        truths = [record.fields["truth"] for record in records]
        keys = [{"image_id": r.group, "round_id": t["round"]} for r, t in zip(records, truths, strict=True)]
        pairs = zip(keys, truths, strict=True)
        truth = [key | {"gt_relevance": t["relevance"], "gt_index": t["answer"]} for key, t in pairs]
        return [key | {"ranks": row} for key, row in zip(keys, said, strict=True)], truth

    needed = ("relevance", "answer", "candidates", "caption", "history", "round")
    fits = lambda record: all(truth_of(record, name, "question") != () for name in needed)  # noqa: E731
    asked = "caption, history, question; ? behind each"
    how = {"decoding": {"ranked by": "likelihood", "asked": asked, "seed": bench.recipe.evaluate.seed}}
    return spoken(bench, "visdial", out, fits, "a question with judged candidates", how, work, files)


def ranks(generator: Any, record: Record) -> list[int]:
    """Return the rank of each candidate, 1 the likeliest; of equal ones the first."""
    truth, values = record.fields["truth"], unanswered("question", record)
    marked = lambda question: f"{question.removesuffix('?').rstrip()}?"  # noqa: E731  # as published they have none
    before = [truth["caption"], *(f"{marked(question)} {reply}." for question, reply in truth["history"])]
    values["question"] = " ".join([*(text for text in before if text), marked(values["question"])])
    (row,) = tasks.encoded(generator, table.find("question"), [values])
    prompt = templates.prompt("question", row, generator.text, generator.vocab)
    texts = [text and f" {text}" for text in truth["candidates"]]  # a blank belongs to the word behind it
    likely = generator.likelihood([prompt] * len(texts), texts)
    return (np.argsort(np.argsort(-likely, kind="stable"), kind="stable") + 1).tolist()


# ------------------------------------------------------------------------------------------------------------- pictures


def pictures(bench: Bench, out: pathlib.Path) -> dict:
    """Score pictures drawn from captions against those held out; both lie as PNG files in the suite's folder."""
    settings, draw, count = bench.recipe.evaluate, bench.decoding.draw, bench.decoding.drawn_with
    rows = bench.rows(told, "pictures: a picture with a caption")
    how = decoded(settings, draw, documents=count, candidates=settings.candidates)
    folder = bench.folder("pictures", rows, how)

    def work(records: list[Record], numbers: list[int], seed: int) -> list[str]:
        texts, picks = [told(record)[0] for record in records], settings.candidates > 1
        memory, encoder = bench.memory if count else None, bench.memory.encoder if picks else None
        drawn, shown = recall.draw(bench.generator, texts, seed, draw, memory, count, encoder, settings.candidates)
        asked = configs.to_json(draw) | {"candidates": settings.candidates}
        for side in ("drawn", "real"):
            (folder / side).mkdir(exist_ok=True)
        for i, (number, record) in enumerate(zip(numbers, records, strict=True)):
            documents = tuple(one.origin for one in shown[i])
            made = provenance.Made(bench.model, texts[i], seed, i, asked, documents)
            Image.fromarray(drawn[i]).save(folder / "drawn" / f"{number:06d}.png", pnginfo=provenance.fields(made))
            Image.fromarray(protocol.first(record)[1]).save(folder / "real" / f"{number:06d}.png")
        return texts

    texts = bench.answers(folder, rows, work)
    lines = [json.dumps({"file_name": f"{i:06d}.png", "text": text}) for i, text in enumerate(texts)]
    names = folder / "drawn" / "metadata.jsonl"
    if not names.is_file():  # written once, as its time is part of what a figure is known by
        write_text(names, "\n".join(lines) + "\n")
    sides, cache = (folder / "drawn", folder / "real"), bench.run / "suites" / "cache"
    return score.score(*sides, bench.scoring, out, cache, say=saying(bench, "pictures"), made=how)


def reconstruction(bench: Bench, out: pathlib.Path) -> dict:
    """Score pictures as the image tokenizer gives them back; they and the originals lie in the suite's folder."""
    rows = bench.rows(lambda record: protocol.first(record)[1] is not None, "reconstruction: a picture")
    folder = bench.folder("reconstruction", rows, {})
    sides = folder / "rebuilt", folder / "originals"

    def work(records: list[Record], numbers: list[int], seed: int) -> list[str]:
        originals = np.stack([protocol.first(record)[1] for record in records])
        rebuilt = bench.generator.image.decode(bench.generator.image.encode(originals))
        for side, pictures in zip(sides, (rebuilt, originals), strict=True):
            side.mkdir(exist_ok=True)
            for number, pixels in zip(numbers, pictures, strict=True):
                Image.fromarray(pixels).save(side / f"{number:06d}.png")
        return [record.key for record in records]

    bench.answers(folder, rows, work)
    cache = bench.run / "suites" / "cache"
    return score.score(*sides, bench.scoring, out, cache, say=saying(bench, "reconstruction"))


# ---------------------------------------------------------------------------------------------------------------- tasks


def answered(bench: Bench, out: pathlib.Path) -> dict:
    """Score the answers to the embedded world's tasks."""
    settings, draw = bench.recipe.evaluate, bench.decoding.draw
    fits = lambda record: record.source == f"scenes:{TASKS}" and record.fields.get("task") in table.TASKS  # noqa: E731
    every = len(bench.reader)
    rows = bench.rows(fits, f"tasks: a document of scenes:{TASKS}", every)
    how = decoded(settings, draw, write=configs.to_json(settings.write), max_text=settings.max_text)
    folder = bench.folder("tasks", rows, how | {"samples": settings.samples})
    if before := known(bench, out, folder, protocol.JUDGED_BY):
        return before

    def answer(task: str, values: Sequence[Mapping[str, Any]], wording: int) -> list[dict[str, Any]]:
        sampling = draw if table.TASKS[task].draws else settings.write
        path = folder / f"{task}-{wording}.{'npy' if table.TASKS[task].draws else 'json'}"
        if not path.is_file():
            bench.say(f"suite tasks: {task}, {len(values)} examples")
            found = tasks.answer(bench.generator, task, values, settings.seed, sampling, settings.max_text, wording)
            keep(path, found, table.TASKS[task].answer[0])
        return kept(path, table.TASKS[task].answer[0])

    found, *_ = judges.measure((bench.reader[i] for i in rows), answer, settings.samples)
    told = {"set": f"scenes:{TASKS}", "reference": {"data": bench.documents(rows)}}
    metrics = {}
    for name, value, samples in flat(found):
        protocol_ = {"samples": samples, **told, "code": results.code(protocol.JUDGED_BY), **how}
        metrics[name] = {"value": value, "protocol": protocol_}
        bench.say(f"suite tasks: {name}: {value:.6g}")
    result = {"predictions": str(folder), "metrics": metrics}
    write_text(out, json.dumps(result, indent=1) + "\n")
    return result


def flat(found: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, float, int]]:
    """Yield (name, value, examples) of a table of tasks: "edit" is its accuracy, "edit/whole" a further figure."""
    for name, row in found.items():
        for figure, value in row.items():
            if figure != "examples":
                yield name if figure == "accuracy" else f"{name}/{figure}", float(value), int(row["examples"])


def keep(path: pathlib.Path, found: Sequence[Mapping[str, Any]], field: str) -> None:
    """Write answers in one step: pictures of one field, or texts."""
    if path.suffix == ".json":
        write_text(path, json.dumps(list(found)) + "\n")
        return
    partial = path.with_name(f".{path.name}")
    np.save(partial, np.stack([row[field] for row in found]))
    os.replace(partial, path)


def kept(path: pathlib.Path, field: str) -> list[dict[str, Any]]:
    """Return the answers that `keep` wrote."""
    return json.loads(path.read_text()) if path.suffix == ".json" else [{field: picture} for picture in np.load(path)]


SUITES: dict[str, Callable[[Bench, pathlib.Path], dict]] = {
    "pictures": pictures,
    "reconstruction": reconstruction,
    "captions": captions,
    "vqa": vqa,
    "vizwiz": vizwiz,
    "science-qa": science_qa,
    "visdial": visdial,
    "tasks": answered,
}
