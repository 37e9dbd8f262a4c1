"""Which of the nearest documents are taken (arXiv 2309.02591 §2.1): relevance, modality, diversity; and what never is.

Relevance is the order of the search. Passed over are, by the settings: documents that lack text or picture; those more
similar to the query than `most_score`; those more similar than `most_alike` to one taken before. Always passed over are
the query's own document, its copies (`bank.mark`), copies of held-out documents, and copies of what is taken already.

A bank's vector is the mean of two that point to different sides, so a caption's score with its own document stays
well below 1, and a limit on the score alone would let near copies through. So where the query is a whole document, the
cosine with its own mean vector is held against `most_score` too (ours). numpy only.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int64, UInt64

from cm3jax import config as configs
from cm3jax.retrieval import bank as banks

BOTH = banks.TEXT | banks.IMAGE


@dataclasses.dataclass(frozen=True)
class Queries:
    """What is known of the documents that are asked for, one a row; what is not known is None.

    Attributes:
      own: Ids of the documents themselves, -1 for what is not in the bank.
      whole: Their vectors as the bank would hold them.
      marks: What their copies are known by, and which entries are real.
    """

    own: Int64[np.ndarray, " q"] | None = None
    whole: Float[np.ndarray, "q z"] | None = None
    marks: tuple[UInt64[np.ndarray, "q m"], Bool[np.ndarray, "q m"]] | None = None


def choose(
    bank: banks.Bank,
    scores: Float[np.ndarray, "q c"],
    ids: Int64[np.ndarray, "q c"],
    count: int,
    settings: configs.Neighbours,
    queries: Queries,
    taken: Int64[np.ndarray, "q t"],
) -> tuple[Float[np.ndarray, "q n"], Int64[np.ndarray, "q n"]]:
    """Return the scores and ids [q, count] of the documents chosen from candidates, best first; id -1 for none.

    Args:
      scores, ids: Of the candidates, as `search` returns them.
      taken: Ids of documents chosen before, -1 for none; no copy of them, or one too much alike, is chosen.
    """
    vectors = unit(bank.vectors(np.concatenate([taken, ids], 1)))
    marks = bank.marks(np.concatenate([taken, ids], 1))
    good = allowed(bank, scores, ids, settings, queries, vectors[:, taken.shape[1] :], marks)
    alike = np.einsum("qcz,qnz->qcn", vectors[:, taken.shape[1] :], vectors)
    chosen = np.concatenate([taken >= 0, np.zeros(ids.shape, bool)], 1)
    for j in range(ids.shape[1]):
        at = taken.shape[1] + j
        near = (np.minimum(alike[:, j], 1) > settings.most_alike) | shared(marks, at)
        left = chosen[:, taken.shape[1] :].sum(1) < count
        chosen[:, at] = good[:, j] & left & ~(near & chosen).any(1)
    order = np.argsort(~chosen[:, taken.shape[1] :], axis=1, kind="stable")[:, :count]
    kept = np.take_along_axis(chosen[:, taken.shape[1] :], order, 1)
    found = np.where(kept, np.take_along_axis(ids, order, 1), -1)
    worth = np.where(kept, np.take_along_axis(scores, order, 1), -np.inf)
    more = ((0, 0), (0, count - found.shape[1]))
    return np.pad(worth, more, constant_values=-np.inf), np.pad(found, more, constant_values=-1)


def allowed(bank, scores, ids, settings, queries: Queries, vectors, marks) -> Bool[np.ndarray, "q c"]:
    """Return which candidates may be taken, whatever else is."""
    flags, (found, real) = bank.flags(ids), tuple(x[:, -ids.shape[1] :] for x in marks)
    good = (ids >= 0) & (np.minimum(scores, 1) <= settings.most_score)
    good &= (flags & BOTH) == BOTH if settings.both else flags > 0
    good &= ~(members(found, bank.held_out) & real).any(2)
    if queries.own is not None:
        good &= ids != queries.own[:, None]
    if queries.marks is not None:
        own, there = queries.marks
        same = (found[:, :, :, None] == own[:, None, None]) & real[:, :, :, None] & there[:, None, None]
        good &= ~same.any((2, 3))
    if queries.whole is not None:
        cosine = np.einsum("qcz,qz->qc", vectors, unit(queries.whole))
        good &= np.minimum(cosine, 1) <= settings.most_score
    return good


def shared(marks, at: int) -> Bool[np.ndarray, "q n"]:
    """Return which documents of a row share a mark with the one in column `at`."""
    found, real = marks
    same = (found[:, :, :, None] == found[:, at][:, None, None]) & real[:, :, :, None] & real[:, at][:, None, None]
    return same.any((2, 3))


def members(values: UInt64[np.ndarray, "..."], known: UInt64[np.ndarray, " n"]) -> Bool[np.ndarray, "..."]:
    """Return which values are among the known ones, which are sorted."""
    if not len(known):
        return np.zeros(values.shape, bool)
    at = np.minimum(np.searchsorted(known, values), len(known) - 1)
    return known[at] == values


def unit(vectors: Float[np.ndarray, "... z"]) -> Float[np.ndarray, "... z"]:
    """Return vectors of length 1; zeros stay zeros."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
