"""Laws of the embedded world's tasks: their documents, what reads them back, and what scores answers to them."""

import collections
import dataclasses
import hashlib
import importlib.util
import re

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies
from scipy import ndimage

from cm3jax import config
from cm3jax.data import prepare, scenes, scenes_tasks, scenes_tasks_read, shards, sources, sources_scenes
from cm3jax.data import scenes_render as render
from cm3jax.data import scenes_tasks_render as drawing
from cm3jax.data import scenes_world as world
from cm3jax.evaluate import tasks as judges
from cm3jax.tasks import table, templates
from cm3jax.types import UserError

SIDE = 48
FEW, MANY = 8, 400
"""Documents of each task."""
task = pytest.mark.parametrize("task", scenes_tasks.ORDER)
PLACE = {name: i for i, name in enumerate(scenes_tasks.ORDER)}
DRAWING = [name for name in scenes_tasks.ORDER if table.TASKS[name].draws]
WRITING = [name for name in scenes_tasks.ORDER if not table.TASKS[name].draws]


def records(task, count, split="test", side=SIDE):
    """Return documents of one task."""
    step = len(scenes_tasks.ORDER)
    return [scenes.record("tasks", 7, i * step + PLACE[task], split, side) for i in range(count)]


def truth(record):
    return scenes_tasks.from_json(record.fields["truth"])


def answer(record):
    """Return the right answer of a document, as a model would give it."""
    values = templates.read(record.fields["task"], record.parts)
    return {name: values[name] for name in table.TASKS[record.fields["task"]].answer}


def right(found, answers):
    """Return the share of documents whose answers are wholly right."""
    return np.mean([judges.score(truth(one), said).whole for one, said in zip(found, answers, strict=True)])


def rough(picture, seed=0):
    """Return a picture as a tokenizer might give it back."""
    noise = np.random.default_rng(seed).normal(0, 6, picture.shape)
    soft = ndimage.gaussian_filter(picture.astype(np.float32), (0.4, 0.4, 0))
    return (soft + noise).clip(0, 255).astype(np.uint8)


# ----------------------------------------------------------------------------------------------------------- documents


def test_every_task_has_documents_in_turn_and_the_same_arguments_give_the_same():
    first, again = ([scenes.record("tasks", 3, i, "test", SIDE) for i in range(15)] for _ in range(2))
    assert [one.fields["task"] for one in first] == list(table.TASKS)
    for a, b in zip(first, again, strict=True):
        assert a.fields == b.fields and a.regions == b.regions and a.key == b.key
        assert all(np.array_equal(x, y) for x, y in zip(a.parts, b.parts, strict=True))
    assert len({str(one.parts) for one in first}) == 15


def test_training_has_all_tasks_in_turn_and_more_of_the_harder_ones():
    found = collections.Counter(scenes.record("tasks", 3, i, "train", SIDE).fields["task"] for i in range(53))
    assert set(found) == set(table.TASKS) and found == collections.Counter(scenes_tasks.TRAINED)
    assert found["question"] == 19 and found["edit"] == 13 and found["words"] == 2 and found["edges"] == 1


@task
def test_a_document_is_its_task_s_template_in_each_wording_and_its_truth_survives_json(task):
    found = records(task, FEW)
    assert {one.fields["wording"] for one in found} == set(range(len(table.TASKS[task].templates)))
    for one in found:
        values = templates.read(task, one.parts)
        assert values.keys() == set(table.TASKS[task].fields)
        assert [region.label for region in one.regions] == list(table.TASKS[task].answer)
        assert scenes_tasks.to_json(truth(one)) == one.fields["truth"] and truth(one).task == task
        if not table.TASKS[task].draws:
            assert truth(one).answers == tuple(values[name] for name in table.TASKS[task].answer)
        assert all(part.shape == (SIDE, SIDE, 3) for part in one.parts if not isinstance(part, str))


@task
def test_no_content_is_in_two_splits(task):
    for split in world.SPLITS:
        for one in map(truth, records(task, FEW, split)):
            contents = one.scene or one.figure or one.word
            home = world.home(contents) if one.scene else scenes_tasks.home(contents)
            assert home == split
            if one.before:
                assert world.home(one.before) in (split, "train" if split == "composition" else split)


@task
def test_answers_are_not_guessed_from_the_question_alone(task):
    """Of the texts that are asked for, none is nearly always the right one."""
    if task in WRITING:
        for kind in scenes_tasks.QUESTIONS if task == "question" else ("",):
            said = [one.answers[-1].split()[-1] for one in map(truth, records(task, 192)) if one.kind == kind]
            assert len(said) >= 4 and collections.Counter(said).most_common(1)[0][1] <= 0.8 * len(said)


def test_an_edit_changes_what_it_says_and_nothing_else():
    kinds = collections.Counter()
    for one in records("edit", 60):
        known = truth(one)
        kinds[known.kind] += 1
        before, after = (judges._contents(scene) for scene in (known.before, known.scene))
        changed = [place for place in before.keys() | after.keys() if before.get(place) != after.get(place)]
        assert len(changed) == 1
        said = one.parts[2]
        if known.kind == "background":
            assert changed == ["background"] and said == f"make the background {known.scene.background}"
        if known.kind in ("add", "replace", "recolour"):
            new = next(thing for thing in known.scene.objects if thing.place == changed[0])
            assert new.colour in said and (known.kind == "recolour" or f"{new.size} {new.colour} {new.shape}" in said)
    assert set(kinds) == set(scenes_tasks.EDITS) and min(kinds.values()) >= 4


@pytest.mark.parametrize("kind", drawing.FEATURES)
def test_a_feature_image_shows_shapes_sizes_and_places_and_no_colours(kind):
    """Scenes that differ in those have feature images that do; other colours and grounds change nothing."""
    found, rng = {}, np.random.default_rng
    for i in range(40):
        scene = scenes_tasks.scene(rng(i), "train")
        image = drawing.feature(kind, scene, SIDE, rng(0))
        key = tuple((t.shape, t.size, t.place) for t in scene.objects)
        assert found.setdefault(key, image.tobytes()) == image.tobytes()
        recoloured = tuple(dataclasses.replace(t, colour="red") for t in scene.objects)
        other = dataclasses.replace(scene, objects=recoloured, background="black")
        assert np.array_equal(drawing.feature(kind, other, SIDE, rng(0)), image)
    assert len(set(found.values())) == len(found) > 20


def test_scribbles_are_unsteady_and_differ_from_hand_to_hand():
    scene = scenes_tasks.scene(np.random.default_rng(0), "train")
    lines = [drawing.feature("scribble", scene, SIDE, np.random.default_rng(i)).tobytes() for i in range(5)]
    assert len(set(lines)) == 5


def test_near_things_are_brighter_in_depth_maps_and_drawn_last():
    scene = next(s for s in (scenes_tasks.scene(np.random.default_rng(i), "train") for i in range(99)) if mixed(s))
    order = [scene.objects[i].size for i in drawing.drawing_order(scene)]
    assert order == sorted(order, reverse=True)  # small before large
    depth = drawing.feature("depth", scene, SIDE, np.random.default_rng(0))
    for thing, cover in zip(scene.objects, drawing.covers(scene, SIDE), strict=True):
        assert (depth[cover == 1] == drawing.NEARNESS[thing.size]).all()


def mixed(scene):
    return {thing.size for thing in scene.objects} == {"small", "large"}


def test_keypoints_lie_on_the_figure():
    for pose in scenes_tasks_read._bodies()[0]:
        body = drawing.body(pose, SIDE)
        for x, y in drawing.keypoints(pose).values():
            assert body[int(y * SIDE), int(x * SIDE)] > 0.9


def test_boxes_hold_their_things():
    for one in records("located", FEW):
        values = templates.read("located", one.parts)
        found = templates.read_located(values["objects"])
        known = truth(one).scene
        assert found == [(scenes_tasks.short(t), world.box("tasks", t)) for t in known.objects]


# ------------------------------------------------------------------------------------------------- readers and scorers


@pytest.mark.parametrize("side", [48, 64, 96])
@pytest.mark.parametrize("task", DRAWING)
def test_the_true_picture_scores_1(task, side):
    found = records(task, FEW, side=side)
    assert right(found, [answer(one) for one in found]) == 1


@pytest.mark.parametrize("task", WRITING)
def test_the_true_words_score_1(task):
    found = records(task, 20)
    assert right(found, [answer(one) for one in found]) == 1


def verdict(question, things):
    """Return the end of the answer to a count or a question of yes or no about (colour, shape, place)s."""
    words = set(question.removesuffix("?").replace("crosses", "cross").split())
    words |= {word.removesuffix("s") for word in words}
    said = lambda *known: [known[i] for i in range(len(known)) if known[i] in words]  # noqa: E731
    colour, shape = said(*world.COLOURS), said(*world.SHAPES)
    place = [name for name in world.QUARTERS if name in question]
    asked = [one for one in things if set(one) >= {*colour, *shape, *place}]
    return str(len(asked)) if question.startswith("How many") else "yes" if asked else "no"


def test_counts_and_questions_of_yes_or_no_say_what_is_asked_and_seen_and_end_with_what_follows():
    kinds = collections.Counter()
    for one in records("question", 300):
        known, values = truth(one), templates.read("question", one.parts)
        if known.kind in scenes_tasks.EXPLAINED:
            things = [(thing.colour, thing.shape, thing.place) for thing in known.scene.objects]
            asked, seen, end = re.fullmatch(r"(.+) asked, (.+) seen, so (\w+)", values["answer"]).groups()
            assert end == verdict(values["question"], things) and asked in values["question"]
            listed = ", ".join(scenes_tasks.a(f"{colour} {shape}") for colour, shape, _ in things)
            assert seen in [listed, *(word for colour, shape, _ in things for word in (colour, shape))]
            kinds[known.kind, end] += 1
    assert set(kinds) >= {("yes or no", "yes"), ("yes or no", "no"), ("count", "0"), ("count", "1"), ("count", "2")}


def test_such_an_answer_is_right_by_its_end_and_whole_with_what_is_seen():
    known = scenes_tasks.Truth("question", "count", answers=("ring asked, a red ring, a blue star seen, so 1",))
    answers = ("Ring asked, a red ring, a blue star seen, so 1.", "star asked, a red ring seen, so 1", "2", "")
    scored = [judges.texts(known, [said]) for said in answers]
    assert [(one.matched, one.whole) for one in scored] == [(1, True), (1, False), (0, False), (0, False)]


@pytest.mark.parametrize("task", DRAWING)
def test_a_softened_and_noisy_picture_scores_as_well(task):
    found = records(task, 30)
    said = [{name: rough(picture, i) for name, picture in answer(one).items()} for i, one in enumerate(found)]
    assert right(found, said) >= 0.96


@task
def test_another_document_s_answer_scores_low(task):
    found = records(task, 30)
    assert right(found, [answer(one) for one in [*found[1:], found[0]]]) <= (0.55 if task in WRITING else 0.1)


@pytest.mark.parametrize("task", DRAWING)
def test_noise_and_blanks_score_0(task):
    found = records(task, 12)
    rng = np.random.default_rng(0)
    field = table.TASKS[task].answer[0]
    noise = [{field: rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)} for _ in found]
    blank = [{field: np.full((SIDE, SIDE, 3), 128, np.uint8)} for _ in found]
    for said in (noise, blank):
        scores = [judges.score(truth(one), picture) for one, picture in zip(found, said, strict=True)]
        assert sum(s.matched for s in scores) <= 0.05 * sum(s.of for s in scores)


@pytest.mark.parametrize("task", DRAWING)
def test_the_picture_that_was_given_is_no_answer(task):
    """Neither a feature image nor, for an edit, the picture before."""
    for one in records(task, FEW):
        values = templates.read(task, one.parts)
        given = values.get("feature_image", values.get("image") if task == "edit" else None)
        if given is not None:
            assert not judges.score(truth(one), {table.TASKS[task].answer[0]: given}).whole


def test_an_edit_that_does_nothing_keeps_all_and_changes_nothing():
    for one in records("edit", 20):
        values = templates.read("edit", one.parts)
        assert judges.edited(truth(one), values["image"]) == {"changed": False, "kept": True}
        assert judges.edited(truth(one), values["edited_image"]) == {"changed": True, "kept": True}
    found = records("edit", 20)
    others = [judges.edited(truth(one), other.parts[3]) for one, other in zip(found[1:], found, strict=False)]
    assert sum(one["kept"] for one in others) <= 2 and sum(one["changed"] for one in others) <= 8


def test_a_task_of_one_declaration_leaves_the_embedded_world_as_it_is(monkeypatch):
    monkeypatch.setitem(table.TASKS, "mine", dataclasses.replace(table.TASKS["edit"], name="mine"))
    monkeypatch.setitem(table.FEATURES, "mine", ("my features", "what is mine"))
    spec = importlib.util.spec_from_file_location("again", scenes_tasks.__file__)
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert (again.ORDER, again.OTHERS) == (scenes_tasks.ORDER, scenes_tasks.OTHERS)


@pytest.mark.parametrize("task", ["segmentation", "edges", "hed", "scribble", "located", "words"])
def test_what_a_picture_shows_is_compared_with_what_was_asked(task):
    """The right picture gives 1, and hardly less if a tokenizer softens it; another, or an empty one, much less."""
    found = records(task, 6)
    truths, pictures = [truth(one) for one in found], [one.parts[-1] for one in found]
    ((_, right),) = judges.against(task, list(zip(truths, pictures, strict=True))).items()
    ((_, soft),) = judges.against(task, list(zip(truths, map(rough, pictures), strict=True))).items()
    ((_, other),) = judges.against(task, list(zip(truths, pictures[1:] + pictures[:1], strict=True))).items()
    ((_, empty),) = judges.against(task, [(one, np.full_like(pictures[0], 245)) for one in truths]).items()
    assert right == 1 and soft > 0.97 and other < 0.6 and empty < 0.2 and empty <= other


def test_a_thing_that_was_moved_shares_its_map_and_its_box_in_part():
    """A square of 16 pixels, moved by 2, shares 14 columns of 18."""
    one = scenes_tasks.placed(("square", "red", "small", "solid"), "top left")
    asked = world.Scene("tasks", "white", (one,))
    drawn = render.render(dataclasses.replace(asked, objects=(dataclasses.replace(one, x=one.x + 2 / 64),)), 64)
    known = scenes_tasks.Truth("located", scene=asked)
    assert judges.against("located", [(known, drawn)]) == {"box_iou": pytest.approx(14 / 18)}
    maps = [drawing.labels(asked, 64) == 2, np.roll(drawing.labels(asked, 64) == 2, 2, axis=1)]
    share = (maps[0] & maps[1]).sum() / (maps[0] | maps[1]).sum()
    behind = (~maps[0] & ~maps[1]).sum() / (~maps[0] | ~maps[1]).sum()
    assert judges.against("segmentation", [(known, drawn)]) == {"miou": pytest.approx((share + behind) / 2)}
    assert (
        judges.against("edges", [(known, drawn)])["edge_f1"]
        < 1
        == judges.against("edges", [(known, render.render(asked, 64))])["edge_f1"]
    )


def test_a_word_with_one_wrong_letter_is_half_right():
    known = scenes_tasks.Truth("words", word="ABCD")
    assert judges.picture(known, drawing.word("ABXD", "white", SIDE)) == judges.Score(3, 4, False)
    assert judges.picture(known, drawing.word("ABCDE", "grey", SIDE)) == judges.Score(4, 5, False)
    assert judges.picture(known, drawing.word("ABCD", "black", SIDE)).whole


def test_every_letter_is_read_on_every_ground():
    for ground in scenes_tasks.GROUNDS:
        for i in range(0, 26, 5):
            word = scenes_tasks.LETTERS[i : i + 5]
            assert scenes_tasks_read.word(drawing.word(word, ground, SIDE)) == word


def test_a_word_is_only_read_where_it_stands_alone():
    picture = drawing.word("CAT", "white", SIDE)
    picture[36:44, 8:20] = (215, 25, 35)
    assert scenes_tasks_read.word(picture) == ""
    assert scenes_tasks_read.word(render.render(scenes_tasks.scene(np.random.default_rng(1), "train"), SIDE)) == ""


def test_a_scene_is_no_figure():
    for one in records("caption", 20):
        assert scenes_tasks_read.figure(one.parts[-1]) is None


@pytest.mark.parametrize(
    ("text", "objects", "unread"),
    [
        ("The picture shows one thing. There is a small red circle top left. The background is white.", 1, 0),
        ("The picture shows 2 things. There is a small red circle top left. The background is white.", 1, 1),
        ("There is a small red circle top left.", 1, 1),
        ("The picture shows one thing. There is a red circle top left.", 0, 2),
        ("", 0, 1),
    ],
)
def test_a_long_caption_counts_what_it_tells(text, objects, unread):
    told = scenes_tasks_read.narrative(text)
    assert (len(told.objects), told.unread) == (objects, unread)


@hypothesis.given(strategies.text())
@hypothesis.settings(max_examples=50, deadline=None)
def test_any_text_is_scored_without_error(text):
    for name in WRITING:
        known = truth(records(name, 1)[0])
        judges.score(known, dict.fromkeys(table.TASKS[name].answer, text))


def test_an_answer_that_lacks_a_field_is_one_clear_line():
    with pytest.raises(UserError, match="task reasoning: no answer for explanation; needs explanation, answer"):
        judges.score(truth(records("reasoning", 1)[0]), {"answer": "(A) 0"})


def test_scores_are_summed_by_task_and_kind():
    found = records("question", 12) + records("edit", 6)
    truths = [truth(one) for one in found]
    table = judges.summary(truths, [judges.score(t, answer(one)) for t, one in zip(truths, found, strict=True)])
    names = list(table)
    assert names[0] == "edit" and names[1].startswith("edit, ") and table["question"]["examples"] == 12
    assert all(row["accuracy"] == row["whole"] == 1 for row in table.values())


def test_answers_are_measured_by_task_with_an_example_of_each():
    """One who knows all is right; one who always gives the first document's answer is not."""
    found = [scenes.record("tasks", 3, i, "test", SIDE) for i in range(45)]
    asked = collections.Counter()

    def knows(name, values, wording):
        asked[name] += len(values)
        assert not set(table.TASKS[name].answer) & set().union(*values)
        same = [one for one in found if (one.fields["task"], one.fields["wording"]) == (name, wording)]
        return [answer(one) for one in same][: len(values)]

    scores, examples, each = judges.measure(found, knows, 3)
    assert len(each) == 3 * len(table.TASKS) and {name.key for name, _, _ in each} <= {one.key for one in found}
    assert all(one.whole and name.attributes["task"] == task for name, task, one in each)
    assert all(scores[name]["whole"] == 1 and scores[name]["examples"] == 3 for name in table.TASKS)
    assert asked == dict.fromkeys(table.TASKS, 3)
    figures = {"segmentation": {"miou"}, "located": {"box_iou"}, "words": {"text"}, "edit": {"changed", "kept"}}
    figures |= {name: {"edge_f1"} for name in ("edges", "hed", "scribble")}
    for name in table.TASKS:
        assert scores[name].keys() == {"accuracy", "whole", "examples"} | figures.get(name, set())
        assert all(scores[name][figure] == 1 for figure in figures.get(name, ()))
    assert [one["task"] for one in examples] == list(table.TASKS) and all(one["correct"] for one in examples)
    edit, question = examples[0], examples[list(table.TASKS).index("question")]
    assert len(edit["given"]) == 1 and np.array_equal(edit["drawn"], edit["wanted"]) and "instruction: " in edit["said"]
    assert question["said"].endswith("?") and question["drawn"] == question["wanted"]

    def first(name, values, wording):
        return [answer(next(one for one in found if one.fields["task"] == name))] * len(values)

    assert np.mean([row["whole"] for row in judges.measure(found, first, 3)[0].values()]) < 0.6


@pytest.mark.slow
@task
def test_400_of_each_task_are_read_back(task):
    found = records(task, MANY)
    assert right(found, [answer(one) for one in found]) >= 0.999


# -------------------------------------------------------------------------------------------------------------- source


def test_the_source_holds_out_256_documents_of_each_task_and_they_survive_preparation(tmp_path, monkeypatch):
    settings = config.Prepare(source="scenes:tasks", resolution=24, count=15, workers=1)
    source = sources.open(settings)
    assert source.size("test") == source.size("validation") == 256 * 15 and source.size("train") == 15
    assert sources.open(dataclasses.replace(settings, count=0)).size("train") == 16 * 256 * 15
    monkeypatch.setattr(sources_scenes, "EACH", 1)
    prepare.prepare(settings, tmp_path, progress=False)
    for i, one in enumerate(shards.Reader(tmp_path, "train")):
        known = scenes.record("tasks", 0, i, "train", 24)
        assert one.fields == known.fields and one.regions == known.regions
        assert all(np.array_equal(a, b) for a, b in zip(one.parts, known.parts, strict=True))


@pytest.mark.parametrize("shares", ["TRAINED", "ASKED", "EDITED"])
def test_what_is_asked_how_often_is_part_of_the_fingerprint_where_documents_follow_it(monkeypatch, shares):
    opened = [sources.open(config.Prepare(source=f"scenes:{level}")) for level in ("tasks", "captions", "full")]
    before = [source.fingerprint() for source in opened]
    monkeypatch.setattr(scenes_tasks, shares, getattr(scenes_tasks, shares)[1:])
    assert [a != source.fingerprint() for a, source in zip(before, opened, strict=True)] == [True, True, False]


@pytest.mark.parametrize(
    ("level", "wanted"), [("easy", "9c24313f6ab65fdb"), ("full", "9a5d64a61d810520"), ("rare", "e0a2abb9c7eb1fe7")]
)
def test_the_other_levels_give_the_records_that_they_always_gave(level, wanted):
    state = hashlib.sha256()
    for split in world.splits(level):
        for i in range(5):
            one = scenes.record(level, 0, i, split, 64)
            state.update(repr((one.key, one.parts[0], one.fields, one.regions)).encode() + one.parts[1].tobytes())
    assert state.hexdigest()[:16] == wanted


# --------------------------------------------------------------------------------------------------------- pretraining


def pairs(split, count):
    return [scenes.record(world.CAPTIONS, 0, i, split, 48) for i in range(count)]


def test_captions_are_scenes_and_what_tasks_show_beside_them():
    found = pairs("train", 2 * 2 * len(scenes_tasks.OTHERS))
    plain, others = found[::2], found[1::2]
    for one in plain:
        truth = scenes_tasks.from_json(one.fields["truth"])
        assert judges.score(truth, {"caption": one.parts[0]}).whole
        assert scenes.recognise(one.parts[1], "tasks").objects and world.home(truth.scene) == "train"
    assert {one.fields["task"] for one in others} == {"picture"} and not any("scene" in one.fields for one in others)
    assert len({one.fields["shows"] for one in others}) == len(scenes_tasks.OTHERS)
    words = [one for one in others if one.fields["shows"] == "words image"]
    assert all(one.parts[0] == f'the word "{scenes_tasks_read.word(one.parts[1])}"' for one in words)


def test_no_caption_shows_what_another_split_holds():
    for split in ("validation", "test", "composition"):
        scenes_shown = [world.from_json(one.fields["scene"]) for one in pairs(split, 40)[::2]]
        assert {world.home(scene) for scene in scenes_shown} == {split}


def test_texts_have_the_words_of_instructions_and_no_picture():
    found = pairs(world.TEXTS, 15)
    assert all(len(one.parts) == 1 for one in found)
    assert [one.parts[0] for one in found] == [
        "\n".join(p for p in scenes.record("tasks", 0, i, "train", 24).parts if isinstance(p, str)) for i in range(15)
    ]
    assert sources.open(config.Prepare(source="scenes:captions", count=30)).size(world.TEXTS) == 15
