"""Laws of the scoring of scenes: what costs, what does not, and what infilling asks."""

import dataclasses

import numpy as np
import pytest

from cm3jax.data import scenes
from cm3jax.data import scenes_world as world
from cm3jax.evaluate import scenes as evaluate

level = pytest.mark.parametrize("level", world.LEVELS)
FEW = 80


def records(level, count=FEW):
    """Return captions, pictures and true scenes of the test split."""
    found = [scenes.record(level, 2, i, "test", 64) for i in range(count)]
    truths = [world.from_json(r.fields["scene"]) for r in found]
    return [r.parts[0] for r in found], np.stack([r.parts[1] for r in found]), truths


def easy(*objects, background="white", unread=0):
    """Return a scene from strings such as "small red circle top left"."""
    things = [text.split(" ", 3) for text in objects]
    return world.Scene("easy", background, tuple(world.Object(s, c, z, p) for z, c, s, p in things), unread=unread)


A, B = "small red circle top left", "large blue square top right"


@level
def test_the_truth_scores_one(level):
    captions, pictures, truths = records(level)
    assert evaluate.drawings(captions, pictures, level)["object_accuracy"] == 1
    assert evaluate.drawings(captions, pictures, level)["scene_accuracy"] == 1
    result = evaluate.descriptions(captions, truths, level)
    assert result["object_accuracy"] == result["scene_accuracy"] == 1 and result["examples"] == FEW


@level
def test_another_scenes_picture_scores_near_zero(level):
    captions, pictures, _ = records(level)
    assert evaluate.drawings(captions[1:] + captions[:1], pictures, level)["object_accuracy"] < 0.05


def test_extra_and_missing_and_unread_objects_cost_the_same():
    both, one = easy(A, B), easy(A)
    assert evaluate.object_accuracy(one, both) == evaluate.object_accuracy(both, one) == 0.5
    assert evaluate.object_accuracy(one, easy(A, unread=1)) == evaluate.object_accuracy(easy(A, unread=1), one) == 0.5


@pytest.mark.parametrize(
    "wrong", ["large red circle top left", "small blue circle top left", "small red ring top left"]
)
def test_every_wrong_attribute_costs_the_object(wrong):
    assert evaluate.object_accuracy(easy(A, B), easy(wrong, B)) == 0.5


def test_a_wrong_place_costs_only_where_place_is_compared():
    moved = easy("small red circle bottom left")
    assert evaluate.object_accuracy(easy(A), moved) == 0
    assert evaluate.object_accuracy(easy(A), moved, fields=("shape", "colour", "size")) == 1


def test_objects_are_matched_one_to_one():
    assert evaluate.object_accuracy(easy(A, A), easy(A)) == 0.5


def test_the_background_counts_for_the_whole_scene_only():
    result = evaluate.score(easy(A), easy(A, background="black"))
    assert result.matched == result.of == 1 and not result.whole


def test_the_matching_is_a_largest_one():
    """A greedy matching would give the unplaced red circle the only one that the placed red circle can have."""
    looks = ("circle", "red", "small")
    stated = world.Scene("full", "white", (world.Object(*looks), world.Object(*looks, "top left")))
    shown = world.Scene("full", "white", (world.Object(*looks, "top left"), world.Object(*looks, "right")))
    assert len(evaluate.match(stated, shown)) == 2


def test_a_relation_must_hold_between_the_shown_objects():
    stated = scenes.parse("a small red ring at the top and a large blue star left of the small red ring", "full")
    ring = world.Object("ring", "red", "small", "top", x=0.5, y=0.2)
    left = world.Object("star", "blue", "large", "left", x=0.1, y=0.3)
    right = dataclasses.replace(left, x=0.9, place="right")
    for star, right_count in ((left, 2), (right, 1)):
        assert len(evaluate.match(stated, world.Scene("full", "white", (ring, star)))) == right_count
    assert not evaluate.match(stated, world.Scene("full", "white", (left,)))


def test_a_word_counts_for_the_whole_scene():
    captions, _, truths = records("full")
    text, truth = next((c, t) for c, t in zip(captions, truths, strict=True) if t.word)
    wrong = dataclasses.replace(truth, word="ZZZ")
    assert evaluate.score(scenes.parse(text, "full"), truth).whole
    assert not evaluate.score(scenes.parse(text, "full"), wrong).whole


def test_a_summary_weighs_objects_not_examples():
    result = evaluate.summary([evaluate.Score(1, 1, True), evaluate.Score(0, 3, False)])
    assert result == {"object_accuracy": 0.25, "scene_accuracy": 0.5, "objects": 4, "examples": 2}
    assert np.isnan(evaluate.summary([])["object_accuracy"])


# ----------------------------------------------------------------------------------------------------------- infilling


@level
@pytest.mark.parametrize("grid", [(8, 8), (16, 16), (7, 5)])
def test_a_target_lies_wholly_inside_its_region_and_nothing_else_touches_it(level, grid):
    for i, truth in enumerate(records(level)[2]):
        chosen = evaluate.target(truth, grid, np.random.default_rng(i))
        if chosen is None:
            continue
        x0, y0, x1, y1 = chosen.box
        for n, thing in enumerate(truth.objects):
            a, b, c, d = world.box(level, thing)
            if n == chosen.index:
                assert x0 <= a and y0 <= b and c <= x1 and d <= y1
            else:
                assert a >= x1 or b >= y1 or c <= x0 or d <= y0
        top, left, bottom, right = chosen.cells
        assert chosen.mask().sum() == (bottom - top) * (right - left)
        assert chosen.mask().reshape(grid)[top:bottom, left:right].all()


def test_every_easy_scene_has_a_target_within_one_quarter():
    for truth in records("easy")[2]:
        chosen = evaluate.target(truth, (8, 8), np.random.default_rng(0))
        top, left, bottom, right = chosen.cells
        assert top // 4 == (bottom - 1) // 4 and left // 4 == (right - 1) // 4


@level
def test_an_untouched_picture_is_infilled_right_and_an_erased_one_wrong(level):
    captions, pictures, truths = records(level)
    targets = [evaluate.target(t, (8, 8), np.random.default_rng(i)) for i, t in enumerate(truths)]
    some = [i for i, t in enumerate(targets) if t]
    assert len(some) > 0.8 * FEW
    captions, truths, targets = ([x[i] for i in some] for x in (captions, truths, targets))
    pictures = pictures[some]
    assert evaluate.infills(captions, truths, targets, pictures, level)["object_accuracy"] == 1
    for picture, truth, chosen in zip(pictures, truths, targets, strict=True):
        top, left, bottom, right = (8 * c for c in chosen.cells)
        picture[top:bottom, left:right] = world.BACKGROUNDS[level][truth.background]
    assert evaluate.infills(captions, truths, targets, pictures, level)["object_accuracy"] == 0


def test_a_second_object_in_the_region_costs():
    truth = scenes.sample("easy", 0, 0, "train")
    chosen = evaluate.target(truth, (8, 8), np.random.default_rng(0))
    twice = dataclasses.replace(truth, objects=(*truth.objects, truth.objects[chosen.index]))
    assert evaluate.infill_score(truth, truth, twice, chosen) == evaluate.Score(1, 2, False)
