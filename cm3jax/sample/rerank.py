"""Several candidates a caption, of which the encoder picks one (arXiv 2309.02591 §3.1: CLIP picks one of eight).

With `Sampling(method="mixture")` half of them are drawn by top-p with guidance and half by CD-K, the paper's best: the
candidates of a caption are neighbouring rows of one call, and of a mixture every other row draws by the other method.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from cm3jax import config as configs
from cm3jax.sample import generate
from cm3jax.types import UserError


class Candidates(NamedTuple):
    """What was drawn for each of n captions.

    Attributes:
      pictures: uint8 [n, candidates, h, w, 3], in the order of drawing.
      scores: float32 [n, candidates], the cosine of caption and picture; 0 where a caption has no token.
    """

    pictures: np.ndarray
    scores: np.ndarray

    def best(self, of: int | None = None) -> np.ndarray:
        """Return the best picture of the first `of` candidates of each caption (None: of all), uint8 [n, h, w, 3]."""
        chosen = self.scores[:, :of].argmax(1)
        return self.pictures[np.arange(len(chosen)), chosen]


def draw(
    generator: generate.Generator,
    encoder: Any,
    prompts: Sequence[str],
    candidates: int,
    seed: int = 0,
    sampling: configs.Sampling = configs.Sampling(),
    retrieved: generate.Retrieved | None = None,
    numbers: Sequence[int] | None = None,
) -> Candidates:
    """Draw candidates for each caption, and score them.

    Candidate j of caption i is row i * candidates + j of one call, and draws from the stream of that row.

    Args:
      encoder: A `retrieval.encoder.Encoder`, or what has its `texts` and `pictures`.
      retrieved: Documents before each caption, the same for all of its candidates.
      numbers: i of each caption, where these are some of many; None: 0, 1, ...

    Raises:
      UserError: if a caption is too long, or the number below 1.
    """
    if candidates < 1:
        raise UserError(f"candidates = {candidates}: must be at least 1")
    repeat = lambda rows: [row for row in rows for _ in range(candidates)]  # noqa: E731
    before = None if retrieved is None else repeat(retrieved)
    rows = None if numbers is None else [i * candidates + j for i in numbers for j in range(candidates)]
    drawn = generator.text_to_image(repeat(prompts), seed, sampling, before, rows)
    pictures = drawn.reshape(len(prompts), candidates, *drawn.shape[1:])
    return Candidates(pictures, score(encoder, prompts, pictures))


def score(encoder: Any, texts: Sequence[str], pictures: np.ndarray) -> np.ndarray:
    """Return the cosine of each caption [n] with each of its pictures [n, candidates, h, w, 3], float32."""
    n, count = pictures.shape[:2]
    if not n:
        return np.zeros((0, count), np.float32)
    wanted = np.asarray(encoder.texts(texts))
    found = np.asarray(encoder.pictures(pictures.reshape(n * count, *pictures.shape[2:])))
    return np.einsum("nd,ncd->nc", wanted, found.reshape(n, count, -1)).astype(np.float32)
