"""How well pictures show what their captions say, by CLIP: the CLIP score, and CLIP R-precision."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from cm3jax.types import UserError

BLOCK = 256
"""Pictures whose candidates are scored at one time: with 100 of 512 numbers, 50 MiB."""

Vectors = Float[np.ndarray, "n z"]
"""Of length 1, those of row i of one picture and its caption."""


def score(texts: Vectors, pictures: Vectors) -> float:
    """Return 100 times the mean cosine of caption and picture, at least 0 (arXiv 2104.08718; torchmetrics' scale)."""
    return max(0.0, float(100 * np.einsum("nz,nz->n", texts, pictures, dtype=np.float64).mean()))


def r_precision(
    captions: Sequence[str], texts: Vectors, pictures: Vectors, candidates: int = 100, seed: int = 0
) -> float:
    """Return the share of pictures that are nearer to their caption than to all other candidates (arXiv 1711.10485 §4).

    Args:
      captions: Two that are equal are one candidate.
      candidates: Captions that a picture is compared with, its own among them; the others are drawn, those of picture i
        from (seed, i) alone.

    Raises:
      UserError: if there are fewer different captions than candidates.
    """
    different = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    if not 2 <= candidates <= len(different):
        raise UserError(
            f"R-precision among {candidates} candidates with {len(different)} different captions: must be at least 2"
            " and at most that; set --candidates"
        )
    own = np.array([different[caption] for caption in captions])
    first = {caption: i for i, caption in reversed(list(enumerate(captions)))}
    vectors = texts[[first[caption] for caption in different]]
    right = []
    for at in range(0, len(captions), BLOCK):
        mine, shown = own[at : at + BLOCK], pictures[at : at + BLOCK]
        others = np.stack([_others(seed, at + i, int(mine[i]), candidates, len(different)) for i in range(len(mine))])
        wrong = np.einsum("ncz,nz->nc", vectors[others], shown)
        right += list(np.einsum("nz,nz->n", vectors[mine], shown) > wrong.max(1))
    return float(np.mean(right))


def _others(seed: int, row: int, own: int, candidates: int, count: int) -> np.ndarray:
    """Return the indices of the captions that are not a picture's own."""
    found = np.random.default_rng((seed, row)).choice(count - 1, candidates - 1, replace=False, shuffle=False)
    return found + (found >= own)
