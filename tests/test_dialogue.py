"""VisDial's figures, by hand."""

import math

import numpy as np
import pytest

import cm3jax.evaluate.dialogue as dialogue
from cm3jax.types import UserError


def test_ndcg_by_hand():
    """Two candidates fit, 1.0 and 0.5; the order found is c, a, b, d, so that of the two places only `a`'s 1.0 counts.

    Gain 1.0 / log2(3); at best 1.0 / log2(2) + 0.5 / log2(3).
    """
    found = dialogue.ndcg(np.array([[0.8, 0.2, 0.9, 0.1]]), np.array([[1.0, 0.0, 0.0, 0.5]]))
    assert found == pytest.approx((1 / math.log2(3)) / (1 + 0.5 / math.log2(3)))


def test_the_best_order_has_ndcg_1_and_questions_are_averaged():
    relevance = np.array([[0.2, 0.0, 0.8], [0.0, 1.0, 0.0]])
    assert dialogue.ndcg(relevance, relevance) == pytest.approx(1)
    assert dialogue.ndcg(np.array([[0.2, 0.0, 0.8], [2.0, 1.0, 0.0]]), relevance) == pytest.approx(0.5)


def test_the_order_below_the_fitting_ones_does_not_matter():
    relevance = np.array([[1.0, 0.0, 0.0, 0.0]])
    assert dialogue.ndcg(np.array([[9, 3, 2, 1]]), relevance) == dialogue.ndcg(np.array([[9, 1, 2, 3]]), relevance)


def test_the_place_of_the_dialogues_answer_by_hand():
    scores = np.array([[0.1, 0.9, 0.5], [0.7, 0.2, 0.1], [0.3, 0.2, 0.1]])
    found = dialogue.sparse(scores, np.array([2, 0, 2]))  # places 2, 1, 3
    assert found == pytest.approx({"MRR": (1 / 2 + 1 + 1 / 3) / 3, "R@1": 1 / 3, "R@5": 1, "R@10": 1, "mean rank": 2})


def test_of_equal_scores_the_first_comes_first():
    np.testing.assert_array_equal(dialogue.ranks(np.array([[1.0, 2.0, 1.0, 2.0]])), [[3, 1, 4, 2]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dialogue.ndcg(np.ones((2, 3)), np.array([[1.0, 0, 0], [0, 0, 0]])), "question 1 has no candidate"),
        (lambda: dialogue.ndcg(np.ones((2, 3)), np.ones((2, 4))), r"scores \(2, 3\) and relevance \(2, 4\)"),
        (lambda: dialogue.sparse(np.ones((2, 3)), np.array([0, 3])), "question 1: answer 3: must be 0 to 2"),
        (lambda: dialogue.sparse(np.ones((2, 3)), np.array([0])), "2 questions and 1 answers: one each"),
        (lambda: dialogue.ranks(np.array([[1.0], [np.nan]])), "question 1 has a score that is no number"),
    ],
)  # fmt: skip
def test_figures_that_have_no_meaning_are_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()
