"""VisDial 1.0: how well a hundred candidate answers are ranked for a question of a dialogue about a picture.

NDCG looks at how many people found each candidate fitting (the dense annotations of the 2018 challenge,
visualdialog.org): the gains are summed over as many places as there are fitting candidates, each divided by log2(place
+ 1), and compared with the best order's. MRR, recall and mean rank look at the one answer of the dialogue (arXiv
1611.08669 section 5).
"""

import numpy as np

from cm3jax.types import UserError

RECALLS = (1, 5, 10)


def ranks(scores: np.ndarray) -> np.ndarray:
    """Return the place of each candidate, from 1, int [n, candidates]; of equal scores the first comes first.

    Args:
      scores: [n, candidates], larger is better.

    Raises:
      UserError: if a score is no number.
    """
    scores = np.asarray(scores, np.float64)
    if np.isnan(scores).any():
        raise UserError(f"dialogue: question {int(np.argwhere(np.isnan(scores))[0, 0])} has a score that is no number")
    order = np.argsort(-scores, axis=1, kind="stable")
    return np.argsort(order, axis=1) + 1


def ndcg(scores: np.ndarray, relevance: np.ndarray) -> float:
    """Return the mean normalised discounted cumulative gain, 0 to 1.

    Args:
      scores: [n, candidates]. relevance: [n, candidates], the share of people who found a candidate fitting.

    Raises:
      UserError: if the shapes differ, or no candidate of a question fits.
    """
    scores, relevance = np.asarray(scores, np.float64), np.asarray(relevance, np.float64)
    if scores.shape != relevance.shape or not scores.size:
        raise UserError(f"dialogue: scores {scores.shape} and relevance {relevance.shape}: must be of one size, not 0")
    fitting = (relevance > 0).sum(1, keepdims=True)
    if not fitting.all():
        raise UserError(f"dialogue: question {int(np.argmin(fitting))} has no candidate that fits; leave it out")
    discount = lambda places: np.where(places <= fitting, 1 / np.log2(places + 1), 0.0)  # noqa: E731
    best = (relevance * discount(ranks(relevance))).sum(1)
    return float(((relevance * discount(ranks(scores))).sum(1) / best).mean())


def sparse(scores: np.ndarray, answers: np.ndarray) -> dict[str, float]:
    """Return {"MRR", "R@1", "R@5", "R@10", "mean rank"} of the answers that were given.

    Args:
      scores: [n, candidates]. answers: int [n], the index of the dialogue's own answer.

    Raises:
      UserError: if an index is no candidate's.
    """
    places, answers = ranks(scores), np.asarray(answers)
    count = places.shape[1]
    if answers.shape != places.shape[:1] or not answers.size:
        raise UserError(f"dialogue: {len(places)} questions and {len(answers)} answers: one each, and not 0")
    if (wrong := np.flatnonzero((answers < 0) | (answers >= count))).size:
        raise UserError(f"dialogue: question {wrong[0]}: answer {answers[wrong[0]]}: must be 0 to {count - 1}")
    rank = np.take_along_axis(places, answers[:, None], axis=1)[:, 0]
    recalls = {f"R@{k}": float((rank <= k).mean()) for k in RECALLS}
    return {"MRR": float((1 / rank).mean()), **recalls, "mean rank": float(rank.mean())}
