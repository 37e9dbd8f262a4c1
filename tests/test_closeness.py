"""What drawn pictures are compared by: maps of classes, edges, boxes and words; against references and by hand."""

import numpy as np
import pytest
from sklearn.metrics import jaccard_score

from cm3jax.evaluate import boxes, edges, letters, segmentation


@pytest.mark.parametrize("seed", range(4))
def test_miou_is_sklearns_macro_jaccard(seed):
    rng = np.random.default_rng(seed)
    asked, drawn = rng.integers(0, 3 + seed, (2, 3, 9, 11))
    counts = sum(segmentation.confusion(a, b, 7) for a, b in zip(asked, drawn, strict=True))
    assert counts.sum() == asked.size
    wanted = jaccard_score(asked.ravel(), drawn.ravel(), average="macro")
    assert segmentation.miou(counts) == pytest.approx(wanted)


def test_miou_by_hand():
    """Class 0: 2 of 4 pixels; class 1: 1 of 2; class 2 of neither side does not count; class 3: 0 of 1."""
    asked, drawn = np.array([[0, 0, 0, 1, 1]]), np.array([[0, 0, 3, 0, 1]])
    assert segmentation.miou(segmentation.confusion(asked, drawn, 4)) == pytest.approx((2 / 4 + 1 / 2 + 0) / 3)
    assert segmentation.miou(segmentation.confusion(asked, asked, 4)) == 1


def test_edges_by_hand():
    """A line of 5, drawn a pixel lower with 3 more far off: precision 5/8, recall 1; without tolerance both are 0."""
    asked, drawn = np.zeros((2, 9, 9), bool)
    asked[2, :5] = drawn[3, :5] = drawn[8, 6:] = True
    assert edges.f1(asked, drawn) == pytest.approx(2 * 0.625 / 1.625)
    assert edges.f1(asked, drawn, 0.0) == 0 and edges.f1(asked, asked, 0.0) == 1
    assert edges.f1(asked, drawn) == edges.f1(drawn, asked)


def test_the_tolerance_is_a_distance_between_pixels():
    one, other = np.zeros((2, 5, 5), bool)
    one[1, 1] = other[2, 2] = True
    assert edges.f1(one, other, 1.4) == 0 and edges.f1(one, other, 1.42) == 1


def test_a_side_without_edges():
    nothing, something = np.zeros((2, 4, 4), bool)
    something[1, 1] = True
    assert edges.f1(nothing, nothing) == 1 and edges.f1(nothing, something) == edges.f1(something, nothing) == 0


def test_iou_by_hand():
    assert boxes.iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert boxes.iou((0, 0, 1, 1), (1, 0, 2, 1)) == 0 and boxes.iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0
    assert boxes.iou((0, 0, 0.5, 1), (0, 0, 1, 1)) == 0.5


def test_boxes_are_paired_one_to_one_among_like_things():
    a, b, half = (0, 0, 1, 1), (2, 0, 3, 1), (0, 0, 0.5, 1)
    assert boxes.agreement([("cat", a), ("cat", b)], [("cat", b), ("cat", a)]) == 1
    assert boxes.agreement([("cat", a)], [("dog", a)]) == 0
    assert boxes.agreement([("cat", a), ("dog", b)], [("cat", half)]) == 0.25
    assert boxes.agreement([("cat", a)], [("cat", half), ("cat", a)]) == 0.5
    assert boxes.agreement([], []) == 1 and boxes.agreement([("cat", a)], []) == boxes.agreement([], [("cat", a)]) == 0


@pytest.mark.parametrize(
    ("asked", "read", "away"),
    [("KITTEN", "SITTING", 3), ("ABC", "XABC", 1), ("ABC", "AC", 1), ("", "AB", 2), ("SUNDAY", "SATURDAY", 3)],
)
def test_letters_by_hand(asked, read, away):
    assert letters.distance(asked, read) == letters.distance(read, asked) == away
    assert letters.accuracy(asked, read) == pytest.approx(1 - away / max(len(asked), len(read)))


def test_a_word_that_is_right_has_accuracy_1():
    assert letters.accuracy("CAT", "CAT") == letters.accuracy("", "") == 1 and letters.accuracy("CAT", "") == 0
