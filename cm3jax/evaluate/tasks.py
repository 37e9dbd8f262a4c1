"""Score the answers to the embedded world's tasks against their exact truth (`data.scenes_tasks`).

A picture that was asked for is read from its pixels; what is written, by closed grammars. Of scenes, objects are
counted as `evaluate.scenes` does: by looks and place, extra ones cost. Of words, letters in their places; of a figure,
its four limbs and its colour; of an answer, one thing: it is right or not.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from cm3jax.data import scenes, scenes_tasks, scenes_tasks_read, scenes_tasks_render
from cm3jax.data import scenes_world as world
from cm3jax.data.scenes_tasks import Truth
from cm3jax.data.scenes_world import Scene
from cm3jax.evaluate import boxes, edges, letters, samples, segmentation
from cm3jax.evaluate import scenes as judges
from cm3jax.evaluate.scenes import Score
from cm3jax.tasks import table, templates
from cm3jax.types import Record, UserError


def score(truth: Truth, drawn: dict[str, Any]) -> Score:
    """Return an answer's parts that are right, of how many, and whether all is right.

    Args:
      drawn: Field -> what `tasks.templates.answers` gives, pictures as uint8 [h, w, 3].

    Raises:
      UserError: if a field of the answer is missing.
    """
    task = table.find(truth.task)
    if missing := [name for name in task.answer if name not in drawn]:
        raise UserError(f"task {truth.task}: no answer for {', '.join(missing)}; needs {', '.join(task.answer)}")
    if task.draws:
        return picture(truth, drawn[task.answer[0]])
    return texts(truth, [drawn[name] for name in task.answer])


def picture(truth: Truth, drawn: np.ndarray) -> Score:
    """Score a picture, uint8 [h, w, 3]."""
    if truth.word:
        return _letters(truth.word, scenes_tasks_read.word(drawn))
    if truth.figure:
        shown = scenes_tasks_read.figure(drawn)
        names = [field.name for field in dataclasses.fields(truth.figure)]
        right = [shown is not None and getattr(shown, n) == getattr(truth.figure, n) for n in names]
        return Score(sum(right), len(right), all(right))
    return judges.score(truth.scene, scenes.recognise(drawn, world.TASKS))


def _letters(asked: str, read: str) -> Score:
    right = sum(a == b for a, b in zip(asked, read, strict=False))
    return Score(right, max(len(asked), len(read)), asked == read)


def texts(truth: Truth, said: Sequence[str]) -> Score:
    """Score what was written for the fields of an answer."""
    if truth.task == "caption":
        return judges.score(scenes.parse(said[0], world.TASKS), truth.scene)
    if truth.task == "long_caption":
        return judges.score(scenes_tasks_read.narrative(said[0]), truth.scene)
    right = [normal(a) == normal(b) for a, b in zip(truth.answers, said, strict=True)]
    if truth.kind in scenes_tasks.EXPLAINED:
        return Score(int(_end(truth.answers[0]) == _end(said[0])), 1, right[0])
    return Score(int(right[-1]), 1, all(right))  # an explanation may be wrong, and its answer right


def _end(text: str) -> str:
    """Return the last word of a text."""
    return normal(text).rpartition(" ")[2]


def normal(text: str) -> str:
    """Return a text without blanks at its ends or twice, in small letters, without the full stop behind it."""
    return " ".join(text.lower().split()).removesuffix(".")


def edited(truth: Truth, drawn: np.ndarray) -> dict[str, bool]:
    """Return whether an edit's picture shows what was to change, and all that was to stay.

    An edit that does nothing keeps all and changes nothing: neither figure says anything without the other.
    """
    shown = scenes.recognise(drawn, world.TASKS)
    before, after = (_contents(one) for one in (truth.before, truth.scene))
    read = _contents(shown)
    places = before.keys() | after.keys()
    changed = {place for place in places if before.get(place) != after.get(place)}
    return {
        "changed": all(read.get(place) == after.get(place) for place in changed),
        "kept": not shown.unread and all(read.get(place) == after.get(place) for place in places - changed),
    }


def against(task: str, pairs: Sequence[tuple[Truth, np.ndarray]]) -> dict[str, float]:
    """Return how close pictures, uint8 [h, w, 3], are to the map, edges, boxes or word that they were to show.

    The recognisers read each picture, and a map of what they see is compared; what they cannot read is not in it.

    Returns:
      Of segmentation "miou", over the pixels of all pictures; of edges, hed and scribble "edge_f1", of located
      "box_iou", of words "text", of edits "changed" and "kept", means over pictures; {} of others. What a scribble is
      about are the scene's edges.
    """
    if task == "edit":
        found = [edited(truth, drawn) for truth, drawn in pairs]
        return {name: _mean(one[name] for one in found) for name in ("changed", "kept")}
    if task == "words":
        return {"text": _mean(letters.accuracy(truth.word, scenes_tasks_read.word(drawn)) for truth, drawn in pairs)}
    if task not in ("segmentation", "edges", "hed", "scribble", "located"):
        return {}
    seen = [(truth.scene, scenes.recognise(drawn, world.TASKS), len(drawn)) for truth, drawn in pairs]
    if task == "located":
        return {"box_iou": _mean(boxes.agreement(_boxes(asked), _boxes(shown)) for asked, shown, _ in seen)}
    draw = scenes_tasks_render.labels if task == "segmentation" else scenes_tasks_render.outline
    maps = [(draw(asked, side), draw(shown, side)) for asked, shown, side in seen]
    if task == "segmentation":
        classes = len(scenes_tasks_render.CLASSES) + 1
        return {"miou": segmentation.miou(sum(segmentation.confusion(a, b, classes) for a, b in maps))}
    return {"edge_f1": _mean(edges.f1(a, b) for a, b in maps)}


def _boxes(scene: Scene) -> list[boxes.Located]:
    return [(scenes_tasks.short(thing), world.box(scene.level, thing)) for thing in scene.objects]


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


Answerer = Callable[[str, Sequence[dict[str, Any]], int], list[dict[str, Any]]]
"""(task, the fields of each row but the answer's, which wording) -> {field: answer} of each row."""


def measure(
    records: Iterable[Record], answer: Answerer, most: int
) -> tuple[dict, list[dict[str, Any]], list[tuple[samples.Named, str, Score]]]:
    """Return (`summary`, an example of each task, each record with its task and score) of the answers to the first
    `most` records of each task.

    The summary has the figures of `against` too. An example holds what was given and asked for in reading order, what
    came, and whether that is right.
    """
    groups: dict[tuple[str, int], list[Record]] = {}
    counts = collections.Counter()
    for record in records:
        task = record.fields.get("task", "")
        if task in table.TASKS and "truth" in record.fields and counts[task] < most:
            groups.setdefault((task, record.fields["wording"]), []).append(record)
            counts[task] += 1
    truths, scores, examples, each, pairs = [], [], {}, [], collections.defaultdict(list)
    for (task, wording), found in groups.items():
        wanted = table.TASKS[task].answer
        values = [templates.read(task, record.parts) for record in found]
        given = [{name: value for name, value in row.items() if name not in wanted} for row in values]
        drawn = answer(task, given, wording)
        known = [scenes_tasks.from_json(record.fields["truth"]) for record in found]
        judged = [score(truth, row) for truth, row in zip(known, drawn, strict=True)]
        examples.setdefault(task, example(found[0], values[0], drawn[0], judged[0]))
        truths, scores = truths + known, scores + judged
        if table.TASKS[task].draws:
            pairs[task] += zip(known, (row[wanted[0]] for row in drawn), strict=True)
        each += [(samples.named(one, one.split), task, seen) for one, seen in zip(found, judged, strict=True)]
    found = summary(truths, scores)
    for task, drawn in pairs.items():
        found[task] |= against(task, drawn)
    return found, [examples[task] for task in scenes_tasks.ORDER if task in examples], each


def example(record: Record, values: dict[str, Any], drawn: dict[str, Any], judged: Score) -> dict[str, Any]:
    """Return what a page shows of one answer; "drawn" and "wanted" are pictures, or texts."""
    task = table.TASKS[record.fields["task"]]
    one = lambda found: found[task.answer[0]] if task.draws else " ".join(found[name] for name in task.answer)  # noqa: E731
    given = [part for part in record.parts[: -1 if task.draws else None] if not isinstance(part, str)]
    said = " ".join(f"{name}: {value}" for name, value in values.items() if isinstance(value, str))
    return {
        "task": task.name,
        "given": given,
        "said": said if task.draws else " ".join(x for x in (values.get("question"), values.get("options")) if x),
        "drawn": one(drawn),
        "wanted": one(values),
        "correct": judged.whole,
    }


def _contents(scene: Scene) -> dict[str, Any]:
    return {thing.place: thing.looks for thing in scene.objects} | {"background": scene.background}


def summary(truths: Sequence[Truth], found: Sequence[Score]) -> dict[str, dict[str, float]]:
    """Return {task, or "question, KIND": {"accuracy", "whole", "examples"}} of scored answers.

    accuracy: The sum of what is right over the sum of what there is; whole: the share that is right as a whole.
    """
    groups: dict[str, list[Score]] = {}
    for truth, one in zip(truths, found, strict=True):
        groups.setdefault(truth.task, []).append(one)
        if truth.kind:
            groups.setdefault(f"{truth.task}, {truth.kind}", []).append(one)
    order = {name: i for i, name in enumerate(scenes_tasks.ORDER)}
    names = sorted(groups, key=lambda name: (order[name.split(",")[0]], name))
    return {
        name: {
            "accuracy": sum(s.matched for s in groups[name]) / max(1, sum(s.of for s in groups[name])),
            "whole": sum(s.whole for s in groups[name]) / len(groups[name]),
            "examples": len(groups[name]),
        }
        for name in names
    }
