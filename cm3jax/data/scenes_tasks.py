"""The embedded world's instruction tuning: every task of `tasks.table` with its exact truth (`scenes:tasks`).

Scenes are those of the level "tasks": 1-3 objects in the centres of quarters, 2 sizes (16/64 and 24/64), 8 colours, 6
shapes, 3 backgrounds; at 48 pixels, where it is meant to be drawn, all lies on whole pixels, and a quarter is 3 x 3
codes of 8 x 8. Small things are far and large ones near: that is the order in which they are drawn, and what depth
maps show. Two tasks draw something else: a word, six letters at most in a row of cells, each 8 x 16 pixels of 48; and a
stick figure with one of 36 poses.

Record i of a held-out split is of task i mod 15, in that task's next wording; of the training split, of i mod 53 in
`TRAINED`, which has more of what is harder to learn. `fields["task"]` names it, `fields["wording"]` counts,
`fields["truth"]` is `Truth` as JSON, and of what shows a scene `fields["scene"]` is that scene, as in the other levels.
What the splits are is as there: contents are hashed, those of both scenes of an edit; the composition split has the
held-out pairs of shape and colour (an edit at least behind it), and words and figures of its own eighth.

`scenes:captions` is what a model sees before it is tuned: the same pictures with captions and no instruction (`pair`).
The split `texts` has what is written in the tasks' documents, without pictures: a text tokenizer has seen more of the
world than captions, and would else spell the instructions.
"""

import dataclasses
import json
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from cm3jax.data import scenes_render, scenes_tasks_render, scenes_words
from cm3jax.data import scenes_world as world
from cm3jax.data.scenes_tasks_render import Figure
from cm3jax.data.scenes_world import Object, Scene
from cm3jax.tasks import table, templates
from cm3jax.types import Record

LEVEL = world.TASKS
PLACES = tuple(world.QUARTERS)
GROUNDS = tuple(world.BACKGROUNDS[LEVEL])
EDITS = ("recolour", "add", "remove", "replace", "background")
EDITED = (*EDITS, "recolour", "remove", "replace", "replace")
"""Kinds of the training split's edits, each as often: to find what is meant is harder than to add."""
QUESTIONS = ("colour", "shape", "size", "count", "relation", "yes or no")
ASKED = (*QUESTIONS, "size", "count", "count", *3 * ("yes or no",))
"""Kinds of the training split's questions, each as often: some are harder to learn."""
EXPLAINED = ("count", "yes or no")
"""Kinds whose answers say first what is asked and what is seen ("red asked, blue seen, so no"), then what follows."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
BESIDE = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}


@dataclasses.dataclass(frozen=True)
class Truth:
    """What a task's answer must be, and what it was about.

    Attributes:
      task: A key of `tasks.table.TASKS`.
      kind: Of an edit, one of `EDITS`; of a question, of `QUESTIONS`.
      scene: What the picture shows that the document ends with; None if that is a word or a figure.
      before: Of an edit, what the first picture shows.
      word: What is written.
      figure: Who stands there.
      answers: The texts that are the answer, one for each of its fields; () if it is a picture.
    """

    task: str
    kind: str = ""
    scene: Scene | None = None
    before: Scene | None = None
    word: str = ""
    figure: Figure | None = None
    answers: tuple[str, ...] = ()


def to_json(truth: Truth) -> str:
    """Return the truth as one line of JSON."""
    data = {field.name: getattr(truth, field.name) for field in dataclasses.fields(truth)}
    for name in ("scene", "before"):
        data[name] = data[name] and json.loads(world.to_json(data[name]))
    data["figure"] = data["figure"] and dataclasses.asdict(data["figure"])
    return json.dumps(data)


def from_json(text: str) -> Truth:
    """Return the truth that `to_json` wrote."""
    data = json.loads(text)
    for name in ("scene", "before"):
        data[name] = data[name] and world.from_json(json.dumps(data[name]))
    data["figure"] = data["figure"] and Figure(**data["figure"])
    return Truth(**(data | {"answers": tuple(data["answers"])}))


# -------------------------------------------------------------------------------------------------------------- scenes


def scene(rng: np.random.Generator, split: str, least: int = 1, most: int = 3) -> Scene:
    """Draw a scene of `least` to `most` objects that may be in this split."""
    while True:
        count = int(rng.integers(least, most + 1))
        places = sorted(rng.permutation(len(PLACES))[:count].tolist())
        looks = world._looks(rng, LEVEL, count, split == "composition")
        things = tuple(placed(look, PLACES[at]) for look, at in zip(looks, places, strict=True))
        found = Scene(LEVEL, pick(rng, GROUNDS), things)
        if world.home(found) == split:
            return found


def placed(looks: tuple[str, str, str, str], place: str) -> Object:
    """Return an object in the centre of a quarter."""
    shape, colour, size, texture = looks
    x, y = world.QUARTERS[place]
    return Object(shape, colour, size, place, texture, x / world.LATTICE, y / world.LATTICE)


def home(*content: Any) -> str:
    """Return the one split that may hold a word or a figure: an eighth of them each, the rest is for training."""
    bucket = zlib.crc32(repr(content).encode()) % 8
    return {0: "validation", 1: "test", 2: "composition"}.get(bucket, "train")


def pick(rng: np.random.Generator, choices):
    return choices[rng.integers(len(choices))]


# --------------------------------------------------------------------------------------------------------------- words


def a(words: str) -> str:
    """Return words with their article."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def short(thing: Object) -> str:
    """Return "red circle"."""
    return f"{thing.colour} {thing.shape}"


def long(thing: Object) -> str:
    """Return "small red circle"."""
    return f"{thing.size} {short(thing)}"


def listed(scene: Scene) -> str:
    """Return "a red circle, a blue ring", in reading order: without sizes and places, which other things show."""
    return ", ".join(a(short(thing)) for thing in scene.objects)


def brief(scene: Scene) -> str:
    """Return "a red circle, a blue ring, on white"."""
    return f"{listed(scene)}, on {scene.background}"


def narrated(scene: Scene, rng: np.random.Generator) -> str:
    """Return sentences that tell all, in reading order; `scenes_tasks_read.narrative` reads them in any."""
    count = len(scene.objects)
    told = [
        f"There is {a(long(t))} {t.place}." if rng.integers(2) else f"{t.place.capitalize()} is {a(long(t))}."
        for t in scene.objects
    ]
    opening = "The picture shows one thing." if count == 1 else f"The picture shows {count} things."
    return f"{opening} {' '.join(told)} The background is {scene.background}."


def named(thing: Object, scene: Scene) -> str:
    """Return words that mean this thing alone: its colour and shape, and where that is not enough its place."""
    alike = sum(short(other) == short(thing) for other in scene.objects)
    return f"the {short(thing)}" if alike == 1 else f"the {short(thing)} {thing.place}"


def plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


# --------------------------------------------------------------------------------------------------------------- edits

Made = tuple[Truth, dict[str, Any]]
"""A truth, and the values of its task's fields."""


def edit(rng: np.random.Generator, split: str, side: int) -> Made:
    """Draw a scene, and one that differs by an instruction; in a held-out split of each kind equally often."""
    kind = pick(rng, EDITED if split == "train" else EDITS)
    while True:
        before = scene(rng, split if split != "composition" or rng.integers(2) else "train")
        done = change(kind, before, rng)
        if done and world.home(done[0]) == split:
            break
    after, instruction = done
    pictures = {
        "image": scenes_render.render(before, side),
        "edited_image": scenes_render.render(after, side),
    }
    return Truth("edit", kind, after, before), {"instruction": instruction, **pictures}


def change(kind: str, before: Scene, rng: np.random.Generator) -> tuple[Scene, str] | None:
    """Return a scene after an edit, and the instruction; None if this kind of edit cannot be made to it."""
    things, i = list(before.objects), int(rng.integers(len(before.objects)))
    thing, size = things[i], pick(rng, tuple(world.SIZES[LEVEL]))
    shape, colour = pick(rng, world.SHAPES), pick(rng, tuple(world.COLOURS))
    what = named(thing, before)
    if kind == "recolour" and colour != thing.colour:
        things[i] = dataclasses.replace(thing, colour=colour)
        said = pick(rng, (f"make {what} {colour}", f"change the colour of {what} to {colour}"))
    elif kind == "replace" and (shape, colour) != (thing.shape, thing.colour):
        things[i] = placed((shape, colour, size, "solid"), thing.place)
        said = f"replace {what} with {a(long(things[i]))}"
    elif kind == "remove" and len(things) > 1:
        del things[i]
        said = pick(rng, (f"remove {what}", f"take {what} away"))
    elif kind == "add" and len(things) < len(PLACES) - 1:
        free = pick(rng, [place for place in PLACES if place not in [t.place for t in things]])
        things = sorted([*things, placed((shape, colour, size, "solid"), free)], key=lambda t: PLACES.index(t.place))
        said = f"add {a(f'{size} {colour} {shape}')} {free}"
    elif kind == "background":
        ground = pick(rng, [ground for ground in GROUNDS if ground != before.background])
        return dataclasses.replace(before, background=ground), f"make the background {ground}"
    else:
        return None
    return dataclasses.replace(before, objects=tuple(things)), said


# ------------------------------------------------------------------------------------------------------------ pictures


def featured(task: str) -> Callable[[np.random.Generator, str, int], Made]:
    """Return what makes a scene, its feature image and a caption that lacks what the feature image shows."""

    def draw(rng: np.random.Generator, split: str, side: int) -> Made:
        shown = scene(rng, split)
        feature = scenes_tasks_render.feature(task, shown, side, rng)
        values = {"feature_image": feature, "caption": brief(shown), "image": scenes_render.render(shown, side)}
        return Truth(task, scene=shown), values

    return draw


def posed(rng: np.random.Generator, split: str, side: int) -> Made:
    """Draw a figure; its limbs are shown, its colour and the ground are told."""
    while True:
        limbs = (pick(rng, choices) for choices in scenes_tasks_render.POSES.values())
        who = Figure(pick(rng, tuple(world.COLOURS)), pick(rng, GROUNDS), *limbs)
        if home(who) == split:
            break
    values = {
        "feature_image": scenes_tasks_render.skeleton(who, side),
        "caption": f"{a(who.colour)} figure, on {who.background}",
        "image": scenes_tasks_render.figure(who, side),
    }
    return Truth("pose", figure=who), values


def written(rng: np.random.Generator, split: str, side: int) -> Made:
    """Draw a word of 3 to 6 capitals."""
    while True:
        word = "".join(LETTERS[i] for i in rng.integers(len(LETTERS), size=rng.integers(3, 7)))
        if home(word) == split:
            break
    picture = scenes_tasks_render.word(word, pick(rng, GROUNDS), side)
    return Truth("words", word=word), {"text": word, "image": picture}


def located(rng: np.random.Generator, split: str, side: int) -> Made:
    """Draw a scene whose things have their boxes told."""
    shown = scene(rng, split)
    objects = templates.located([(short(thing), world.box(LEVEL, thing)) for thing in shown.objects])
    values = {"caption": brief(shown), "objects": objects, "image": scenes_render.render(shown, side)}
    return Truth("located", scene=shown), values


# --------------------------------------------------------------------------------------------------------------- texts


def captioned(task: str) -> Callable[[np.random.Generator, str, int], Made]:
    def draw(rng: np.random.Generator, split: str, side: int) -> Made:
        shown = scene(rng, split)
        said = scenes_words.caption(shown, rng) if task == "caption" else narrated(shown, rng)
        truth = Truth(task, scene=shown, answers=(said,))
        return truth, {"caption": said, "image": scenes_render.render(shown, side)}

    return draw


def question(rng: np.random.Generator, split: str, side: int) -> Made:
    """Draw a scene and a question about it; in a held-out split of each kind equally often."""
    kind = pick(rng, ASKED if split == "train" else QUESTIONS)
    while True:
        shown = scene(rng, split)
        if done := asked(kind, shown, rng):
            break
    values = {"question": done[0], "answer": done[1], "image": scenes_render.render(shown, side)}
    return Truth("question", kind, shown, answers=(done[1],)), values


def asked(kind: str, scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    """Return a question of a kind and its answer; None if this scene has none."""
    thing = pick(rng, scene.objects)
    if kind == "colour":
        alone = sum(other.shape == thing.shape for other in scene.objects) == 1
        return f"What colour is the {thing.shape if alone else f'{thing.shape} {thing.place}'}?", thing.colour
    if kind == "shape":
        return f"Which shape is {thing.place}?", thing.shape
    if kind == "size":
        return f"Is {named(thing, scene)} small or large?", thing.size
    if kind == "count":
        what, meant, counts = pick(rng, _counted(scene, thing, rng))
        return f"How many {what}?", f"{meant} asked, {listed(scene)} seen, so {counts}"
    if kind == "yes or no":
        said, meant, seen, true = pick(rng, _claims(scene, thing, rng))
        return f"Is {said}?", f"{meant} asked, {seen} seen, so {'yes' if true else 'no'}"
    other = pick(rng, scene.objects)
    if other is thing or (thing.x != other.x and thing.y != other.y):
        return None
    return f"What is {BESIDE[world.relation(thing, other)]} {named(other, scene)}?", a(short(thing))


def _counted(scene: Scene, thing: Object, rng: np.random.Generator) -> list[tuple[str, str, int]]:
    """Return (what is counted, in short, how many there are): things, those of a colour, those of a shape."""
    colour, shape = pick(rng, (thing.colour, pick(rng, tuple(world.COLOURS)))), pick(rng, (thing.shape, "star"))
    return [
        ("things are there", "thing", len(scene.objects)),
        (f"things are {colour}", colour, sum(other.colour == colour for other in scene.objects)),
        (f"{plural(shape)} are there", shape, sum(other.shape == shape for other in scene.objects)),
    ]


def _claims(scene: Scene, thing: Object, rng: np.random.Generator) -> list[tuple[str, str, str, bool]]:
    """Return (what may be true, in short, what is seen, whether it is): a colour, a place's shape, such a thing."""
    true = bool(rng.integers(2))
    colour = thing.colour if true else pick(rng, [colour for colour in world.COLOURS if colour != thing.colour])
    shape = thing.shape if true else pick(rng, [shape for shape in world.SHAPES if shape != thing.shape])
    alone = sum(other.shape == thing.shape for other in scene.objects) == 1
    there = any((colour, thing.shape) == (other.colour, other.shape) for other in scene.objects)
    return [
        (f"the {thing.shape if alone else f'{thing.shape} {thing.place}'} {colour}", colour, thing.colour, true),
        (f"there {a(shape)} {thing.place}", shape, thing.shape, true),
        (f"there {a(f'{colour} {thing.shape}')}", f"{colour} {thing.shape}", listed(scene), there),
    ]


def _told(scene: Scene) -> str:
    count = len(scene.objects)
    return f"The picture shows {'one thing' if count == 1 else f'{count} things'} on {scene.background}."


def choice(rng: np.random.Generator, split: str, side: int) -> Made:
    """Draw a scene, and three things of which it shows one."""
    shown = scene(rng, split)
    names = [short(thing) for thing in shown.objects]
    others = [f"{colour} {shape}" for colour in world.COLOURS for shape in world.SHAPES]
    others = [name for name in others if name not in names]
    right, at = pick(rng, names), int(rng.integers(3))
    found = [others[i] for i in rng.permutation(len(others))[:3]]
    found[at] = right
    answer = f"({LETTERS[at]}) {right}"
    values = {
        "question": "Which of these is in the picture?",
        "context": _told(shown),
        "options": " ".join(f"({letter}) {name}" for letter, name in zip(LETTERS, found, strict=False)),
        "answer": answer,
        "image": scenes_render.render(shown, side),
    }
    return Truth("choice", scene=shown, answers=(answer,)), values


def reasoning(rng: np.random.Generator, split: str, side: int) -> Made:
    """Draw a scene and ask how many of its things do not have a colour that one has."""
    shown = scene(rng, split)
    colour, count = pick(rng, shown.objects).colour, len(shown.objects)
    with_it = sum(thing.colour == colour for thing in shown.objects)
    explanation = f"I see {listed(shown)}. Of {count} {with_it} {'is' if with_it == 1 else 'are'} {colour}."
    answer = f"({LETTERS[count - with_it]}) {count - with_it}"
    values = {
        "question": f"How many things are not {colour}?",
        "context": _told(shown),
        "options": "(A) 0 (B) 1 (C) 2",
        "explanation": explanation,
        "answer": answer,
        "image": scenes_render.render(shown, side),
    }
    return Truth("reasoning", scene=shown, answers=(explanation, answer)), values


# ------------------------------------------------------------------------------------------------------------- records

MAKERS: dict[str, Callable[[np.random.Generator, str, int], Made]] = {
    "edit": edit,
    "words": written,
    "located": located,
    **{task: featured(task) for task in scenes_tasks_render.FEATURES},
    "pose": posed,
    "caption": captioned("caption"),
    "long_caption": captioned("long_caption"),
    "question": question,
    "choice": choice,
    "reasoning": reasoning,
}
"""Task -> f(stream, split, side of the pictures), which draws a truth and its values."""
ORDER = tuple(task for task in table.TASKS if task in MAKERS)
SHARES = {"edit": 13, "words": 2, "located": 3, "caption": 4, "long_caption": 3, "question": 19}
"""How often the tasks that are learned late are trained on, of 53; all others, once."""
TRAINED = tuple(task for task in ORDER for _ in range(SHARES.get(task, 1)))


def record(seed: int, index: int, split: str, resolution: int) -> Record:
    """Return the document of one index of a split; the same arguments always give the same."""
    world.check(LEVEL, split)
    order = TRAINED if split == "train" else ORDER
    turn, which = divmod(index, len(order))
    task = order[which]
    truth, values = MAKERS[task](world.stream(LEVEL, seed, index, split, "task"), split, resolution)
    parts, regions = templates.make(task, values, turn)
    fields = {"task": task, "wording": turn % len(table.TASKS[task].templates), "truth": to_json(truth)}
    return Record(
        key=f"scenes-{LEVEL}-{seed}-{split}-{index}-{task}",
        parts=parts,
        fields=fields | ({"scene": world.to_json(truth.scene)} if truth.scene else {}),
        regions=regions,
        license="Apache-2.0",
        source=f"scenes:{LEVEL}",
        split=split,
    )


OTHERS = (
    *(
        (task, "feature_image", f"{words} of {{caption}}")
        for task, (words, _) in table.FEATURES.items()
        if task in MAKERS
    ),
    ("pose", "image", "{caption}"),
    ("words", "image", 'the word "{text}"'),
)
"""Pictures beside scenes: (task that draws it, its field, its caption)."""


def pair(seed: int, index: int, split: str, resolution: int) -> Record:
    """Return a picture with a caption, as pretraining has them; the same arguments always give the same.

    Every other one is a scene, a document of the task "caption" in its plain wording. The rest is what other tasks show
    beside scenes: feature images, figures and words, captioned as pictures are, without the scenes that they go with.
    """
    world.check(world.CAPTIONS, split)
    key = f"scenes-{world.CAPTIONS}-{seed}-{split}-{index}"
    if split == world.TEXTS:
        found = record(seed, index, "train", world.LATTICE)
        words = "\n".join(part for part in found.parts if isinstance(part, str))
        return dataclasses.replace(found, key=key, parts=(words,), fields={"task": "text"}, regions=(), split=split)
    turn, other = divmod(index, 2)
    task, field, caption = OTHERS[turn % len(OTHERS)] if other else ("caption", "image", "{caption}")
    truth, values = MAKERS[task](world.stream(world.CAPTIONS, seed, index, split, "pair"), split, resolution)
    shown = {"caption": caption.format(**values), "image": values[field]}
    parts, regions = templates.make("caption", shown, 0)
    fields: dict[str, Any] = {"task": "picture", "shows": f"{task} {field}"}
    if not other:
        fields = {"task": task, "wording": 0, "truth": to_json(truth), "scene": world.to_json(truth.scene)}
    return Record(
        key=key,
        parts=parts,
        fields=fields,
        regions=regions,
        license="Apache-2.0",
        source=f"scenes:{LEVEL}",
        split=split,
    )


RECORDS = {LEVEL: record, world.CAPTIONS: pair}
"""Level -> f(seed, index, split, resolution), which gives its documents."""
