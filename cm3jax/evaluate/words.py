"""Scores of what was said about pictures, from the published sets' own files; each figure with its protocol.

    kind          what was said                                     the truth
    captions      [{image_id, caption}]                             captions_val2014.json (COCO's format)
    vqa           [{question_id, answer}]                           v2_mscoco_val2014_annotations.json; also OK-VQA's
    vizwiz        [{image, answer}] or [{image, answerable}]        Annotations/val.json
    science-qa    {"results": {id: number of the choice}}           problems.json
    visdial       [{image_id, round_id (from 1), ranks [100]}]      visdial_1.0_val.json, its dense annotations, or both

Both sides must have the same ids, unless a part is asked for: then what was said decides, and the protocol's hash of
the truth is that of the part. Result files are those of `score`, for `results.table`.
"""

import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cm3jax import config as configs
from cm3jax.data.sets import coco, item, questions
from cm3jax.evaluate import answers, captions, dialogue, results
from cm3jax.stages import write_text
from cm3jax.types import UserError

SCORED_BY = (
    *(f"evaluate/{name}" for name in ("captions", "ptb", "answers", "dialogue", "words")),
    *(f"data/sets/{name}" for name in ("coco", "item", "questions")),
)
"""Modules that decide a figure."""


class Scored(NamedTuple):
    """Figures of one set of ids."""

    said: Mapping[Any, Any]
    wrote: Mapping[Any, Any]
    """The truth of the same ids."""
    figures: Mapping[str, float]
    """"accuracy", and "accuracy/KIND" of the ids of that kind alone."""
    tokens: str
    """What was compared."""
    kinds: Mapping[Any, Sequence[str]] = {}


def score(
    kind: str,
    predictions,
    truth: Sequence[Any],
    out,
    part: bool = False,
    split: str = "test",
    say: Callable[[str], Any] = print,
    made: Mapping[str, Any] = {},
) -> dict[str, Any]:
    """Score what was said, write the result file, and return what it holds.

    Args:
      kind: A key of `KINDS`.
      predictions: The file of what was said.
      truth: The files of the truth; one, but for visdial.
      out: The result file.
      part: Score the ids that were answered, though there are more.
      split: Of science-qa, whose problems.json holds all.
      made: How it was said, for the protocol.

    Raises:
      UserError: in one line, for files that are none or do not belong to each other.
    """
    predictions, truth = pathlib.Path(predictions), [pathlib.Path(path) for path in truth]
    if not 1 <= len(truth) <= (2 if kind == "visdial" else 1):
        raise UserError(f"{kind}: {len(truth)} files of the truth; needs {FILES[kind]}")
    metrics: dict[str, Any] = {}
    for found in KINDS[kind](predictions, truth, part, split):
        reference = {"count": len(found.wrote), "data": digest(found.wrote)}
        protocol = {
            "set": kind,
            "reference": reference,
            "tokens": found.tokens,
            "code": results.code(SCORED_BY),
            **made,
        }
        for name, value in found.figures.items():
            own = name.partition("/")[2]
            samples = sum(own in found.kinds[key] for key in found.said) if own else len(found.said)
            figure = {"value": value, "data": digest(found.said), "protocol": {"samples": samples} | protocol}
            metrics[name] = figure
            say(f"{name}: {value:.6g}")
    result = {"predictions": str(predictions), "truth": [str(path) for path in truth], "metrics": metrics}
    pathlib.Path(out).parent.mkdir(parents=True, exist_ok=True)
    write_text(pathlib.Path(out), json.dumps(result, indent=1) + "\n")
    return result


def digest(found: Mapping[Any, Any]) -> str:
    """Return 16 hex digits that identify what is known of each id, whatever the order."""
    return configs.digest(sorted(([key, value] for key, value in found.items()), key=lambda pair: str(pair[0])))


# ------------------------------------------------------------------------------------------------------------ the files


def opened(path: pathlib.Path, kind: type) -> Any:
    """Return what a JSON file holds.

    Raises:
      UserError: if it is none, or of another kind.
    """
    try:
        return item.load(path, kind)
    except OSError as e:
        raise UserError(f"{str(path)!r}: {e.strerror}") from None


def rows(path: pathlib.Path, *names: str) -> dict[Any, dict]:
    """Return the objects of a list by the fields that identify them, a tuple if those are several.

    Raises:
      UserError: if a row has none, or two have the same.
    """
    found = {}
    for row in item.rows({"all": opened(path, list)}, "all", path):
        key = tuple(item.field(row, name, path, "?") for name in names)
        if wrong := [part for part in key if not isinstance(part, int | str)]:
            raise UserError(f"{str(path)!r}: id {wrong[0]!r}: must be a number or a text")
        key = key if len(names) > 1 else key[0]
        if key in found:
            raise UserError(f"{str(path)!r}: id {key!r}: twice in it")
        found[key] = row
    return found


def said(path: pathlib.Path, found: Mapping[Any, dict], name: str) -> dict[Any, str]:
    """Return a text of each row.

    Raises:
      UserError: if one is no text or empty.
    """
    texts = {key: item.field(row, name, path, key) for key, row in found.items()}
    if wrong := [key for key, text in texts.items() if not (isinstance(text, str) and text.strip())]:
        what = f"{name} {texts[wrong[0]]!r}"
        raise UserError(f"{str(path)!r}: id {wrong[0]!r}: {what} is empty or no text ({len(wrong)} of {len(texts)})")
    return texts


def matched(found: Mapping, wrote: Mapping, paths: Sequence[pathlib.Path], part: bool) -> dict[Any, Any]:
    """Return the truth of the ids that were answered, in their order.

    Args:
      paths: Of what was said, and of the truth.

    Raises:
      UserError: if there are none, or the ids do not match.
    """
    here, there = (repr(str(path)) for path in paths)
    if not found:
        raise UserError(f"{here}: holds nothing for the ids of {there}; nothing can be scored")
    if strange := [key for key in found if key not in wrote]:
        raise UserError(
            f"{here}: id {strange[0]!r} is not in {there} ({len(strange)} of {len(found)} ids are not); are they of the"
            " same split and version?"
        )
    if (missing := [key for key in wrote if key not in found]) and not part:
        raise UserError(
            f"{here}: nothing for id {missing[0]!r} of {there} ({len(missing)} of {len(wrote)} ids are missing);"
            " --part scores those that are there"
        )
    return {key: wrote[key] for key in found}


# ------------------------------------------------------------------------------------------------------------ the kinds


def _captions(path: pathlib.Path, truth: Sequence[pathlib.Path], part: bool, split: str) -> Iterator[Scored]:
    told = said(path, rows(path, "image_id"), "caption")
    opened(truth[0], dict)
    wrote = matched(told, coco.captioned(truth[0]), (path, truth[0]), part)
    yield Scored(told, wrote, captions.evaluate(wrote, told), "PTB, lower case, marks dropped (evaluate/ptb.py)")


def _vqa(path: pathlib.Path, truth: Sequence[pathlib.Path], part: bool, split: str) -> Iterator[Scored]:
    other = truth[0]
    told = said(path, rows(path, "question_id"), "answer")
    table = item.index(item.rows(opened(other, dict), "annotations", other), "question_id", other)
    table = matched(told, table, (path, other), part)
    yield _answered(told, table, other, answers.accuracy, "made alike as VQA's (evaluate/answers.py)")


def _answered(told: Mapping, table: Mapping[Any, dict], other: pathlib.Path, one: Callable, tokens: str) -> Scored:
    wrote = {key: questions.people(row, other, key) for key, row in table.items()}
    kinds = {key: [row["answer_type"]] if "answer_type" in row else [] for key, row in table.items()}
    return Scored(told, wrote, answers.vqa(told, wrote, kinds, one), tokens, kinds)


def _vizwiz(path: pathlib.Path, truth: Sequence[pathlib.Path], part: bool, split: str) -> Iterator[Scored]:
    other, found = truth[0], rows(path, "image")
    opened(other, list)
    table = matched(found, rows(other, "image"), (path, other), part)
    if any("answer" in row for row in found.values()):
        tokens = "made alike as VizWiz's, people's as they are (evaluate/answers.py)"
        yield _answered(said(path, found, "answer"), table, other, answers.vizwiz_accuracy, tokens)
        return
    sure = {key: item.field(row, "answerable", path, key) for key, row in found.items()}
    if wrong := [key for key, x in sure.items() if not isinstance(x, int | float) or not math.isfinite(x)]:
        raise UserError(f"{str(path)!r}: id {wrong[0]!r}: answerable {sure[wrong[0]]!r}: must be a number")
    wrote = {key: bool(item.field(row, "answerable", other, key)) for key, row in table.items()}
    yield Scored(sure, wrote, answers.unanswerability(sure, wrote), "confidences")


def _science(path: pathlib.Path, truth: Sequence[pathlib.Path], part: bool, split: str) -> Iterator[Scored]:
    other, found = truth[0], opened(path, dict).get("results")
    if not isinstance(found, dict):
        raise UserError(f"{str(path)!r}: no object 'results' in it; must be {{\"results\": {{id: number of choice}}}}")
    if wrong := [key for key, choice in found.items() if not isinstance(choice, int)]:
        raise UserError(f"{str(path)!r}: id {wrong[0]!r}: choice {found[wrong[0]]!r}: must be a whole number, -1: none")
    problems = opened(other, dict)
    item.rows({"all": list(problems.values())}, "all", other)
    problems = {key: row for key, row in problems.items() if row.get("split") == split}
    if not problems:
        raise UserError(f"{str(other)!r}: no problem of split {split!r}; set --split")
    table = matched(found, problems, (path, other), part)
    wrote = {key: item.field(row, "answer", other, key) for key, row in table.items()}
    kinds = {key: _columns(row) for key, row in table.items()}
    yield Scored(found, wrote, answers.choices(found, wrote, kinds), f"numbers of choices, split {split}", kinds)


SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
"""Columns of ScienceQA's published tables (arXiv 2209.09513 table 3), with which the others are told below."""


def _columns(row: Mapping[str, Any]) -> list[str]:
    """Return the columns of the published tables that a problem counts in."""
    found = [SUBJECTS[row["subject"]]] if row.get("subject") in SUBJECTS else []
    shown = [name for name, field in (("TXT", "hint"), ("IMG", "image")) if row.get(field)]
    grade = str(row.get("grade", "")).removeprefix("grade")
    found += shown or ["NO"]
    return [*found, "G1-6" if int(grade) <= 6 else "G7-12"] if grade.isdigit() else found


def _visdial(path: pathlib.Path, truth: Sequence[pathlib.Path], part: bool, split: str) -> Iterator[Scored]:
    found = {key: item.field(row, "ranks", path, key) for key, row in rows(path, "image_id", "round_id").items()}
    for key, ranks in found.items():
        count = len(next(iter(found.values()))) if isinstance(ranks, list) else 0
        if not count or sorted(map(repr, ranks)) != sorted(map(repr, range(1, count + 1))):
            raise UserError(f"{str(path)!r}: id {key}: ranks must be a list of 1, 2, ..., in any order, each once")
    for other in truth:
        if isinstance(opened(other, object), dict):
            yield _sparse(path, found, other, part)
        else:
            dense = _dense(path, found, other, part)
            yield dense
            yield from _given(dense, other) if len(truth) == 1 else ()


def _sparse(path: pathlib.Path, found: Mapping, other: pathlib.Path, part: bool) -> Scored:
    """Score the places of the answers that were given in the dialogs."""
    wrote, counts = {}, {}
    for dialog in item.rows(item.field(opened(other, dict), "data", other, "-"), "dialogs", other):
        key = item.field(dialog, "image_id", other, "?")
        for i, turn in enumerate(item.rows(dialog, "dialog", other), 1):
            if "gt_index" not in turn:
                raise UserError(f"{str(other)!r}: id {key}: no 'gt_index' in round {i}; answers missing")
            wrote[key, i], counts[key, i] = turn["gt_index"], len(item.field(turn, "answer_options", other, key))
    wrote = matched(found, wrote, (path, other), part)
    _same(path, found, other, counts)
    return _placed(found, wrote, RANKS)


def _placed(found: Mapping, wrote: Mapping, tokens: str) -> Scored:
    figures = dialogue.sparse(-np.array(list(found.values())), np.array(list(wrote.values())))
    return Scored(found, wrote, figures, tokens)


def _dense(path: pathlib.Path, found: Mapping, other: pathlib.Path, part: bool) -> Scored:
    """Score the places of the answers that people found fitting, in the rounds that they were shown: one of ten."""
    wrote = {key: _relevance(row, other, key) for key, row in rows(other, "image_id", "round_id").items()}
    found = {key: ranks for key, ranks in found.items() if key in wrote}
    wrote = matched(found, wrote, (path, other), part)
    _same(path, found, other, {key: len(row) for key, row in wrote.items()})
    ndcg = dialogue.ndcg(-np.array(list(found.values())), np.array(list(wrote.values())))
    return Scored(found, wrote, {"NDCG": ndcg}, RANKS)


def _given(dense: Scored, other: pathlib.Path) -> Iterator[Scored]:
    """Score the places of the dialogs' own answers in the judged rounds alone, where a suite wrote them beside."""
    table = rows(other, "image_id", "round_id")
    if all("gt_index" in table[key] for key in dense.said):
        yield _placed(dense.said, {key: table[key]["gt_index"] for key in dense.said}, f"{RANKS}, judged rounds only")


RANKS = "ranks"


def _same(path: pathlib.Path, found: Mapping, other: pathlib.Path, counts: Mapping[Any, int]) -> None:
    """Raise UserError unless there is a rank for each candidate."""
    for key, ranks in found.items():
        if len(ranks) != counts[key]:
            raise UserError(f"{str(path)!r}: id {key}: {len(ranks)} ranks, {str(other)!r} has {counts[key]} candidates")


def _relevance(row: dict, path: pathlib.Path, key) -> list[float]:
    found = row.get("gt_relevance", row.get("relevance"))
    if not isinstance(found, list):
        raise UserError(f"{str(path)!r}: id {key}: no 'gt_relevance' in it; answers missing")
    return found


KINDS: dict[str, Callable[..., Iterator[Scored]]] = {
    "captions": _captions,
    "vqa": _vqa,
    "vizwiz": _vizwiz,
    "science-qa": _science,
    "visdial": _visdial,
}
FILES = {
    "captions": "one, of captions in COCO's format",
    "vqa": "one, of annotations",
    "vizwiz": "one, of annotations",
    "science-qa": "one, problems.json",
    "visdial": "the dialogs, the dense annotations, or both",
}
