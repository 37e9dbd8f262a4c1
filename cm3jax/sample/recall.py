"""Draw and caption with documents from a run's memory bank (arXiv 2309.02591 §2.1, table 1).

What the command line and the evaluation call: find documents for the queries, show those that fit, let the retriever
pick among candidates.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from cm3jax import config as configs
from cm3jax.sample import generate, rerank

Documents = list[list[Any]]
"""Of each query, what was shown before it: `retrieval.memory.Found`, best first."""


def draw(
    generator: Any,
    captions: Sequence[str],
    seed: int = 0,
    sampling: configs.Sampling = configs.Sampling(),
    memory: Any = None,
    documents: int = 0,
    encoder: Any = None,
    candidates: int = 1,
) -> tuple[np.ndarray, Documents]:
    """Return a picture for each caption, uint8 [n, h, w, 3], and the documents that were shown.

    Args:
      generator: A `generate.Generator`.
      memory: A `retrieval.memory.Memory`, asked for `documents` a caption; needed if that is above 0.
      encoder: Picks the best of `candidates` pictures; needed if that is above 1.
    """
    found, ids = texts(generator, memory, captions, documents, seed)
    if candidates == 1:
        return generator.text_to_image(captions, seed, sampling, ids), found
    return rerank.draw(generator, encoder, captions, candidates, seed, sampling, ids).best(), found


def write(
    generator: Any,
    shown: Sequence[np.ndarray] | np.ndarray,
    seed: int = 0,
    sampling: configs.Sampling = generate.GREEDY,
    max_text: int = 96,
    memory: Any = None,
    documents: int = 0,
    codes: np.ndarray | None = None,
) -> tuple[list[str], Documents]:
    """Return a caption for each picture, and the documents that were shown.

    Args:
      shown: uint8 [h, w, 3] each.
      codes: Of the pictures, uint16 [n, codes], if they are known.
      memory: As for `draw`.
    """
    found, ids = pictures(generator, memory, shown, documents, max_text, seed)
    return generator.image_to_text(shown if codes is None else codes, seed, sampling, max_text, ids), found


def texts(generator, memory, captions: Sequence[str], count: int, seed: int = 0) -> tuple[Documents, list | None]:
    """Return for each caption the documents that are shown before it, and their ids (None: of nothing)."""
    if not count:
        return [[] for _ in captions], None
    return fitted(generator, memory, memory.find(texts=captions, count=count, seed=seed), captions)


def pictures(generator, memory, shown, count: int, max_text: int, seed: int = 0) -> tuple[Documents, list | None]:
    """Return for each picture the documents that are shown before it, and their ids (None: of nothing)."""
    if not count:
        return [[] for _ in shown], None
    return fitted(generator, memory, memory.find(pictures=shown, count=count, seed=seed), None, max_text)


def fitted(generator, memory, found: Documents, captions, max_text: int = 96) -> tuple[Documents, list]:
    """Return the first ones of each list for which the model's row has room, and their ids."""
    ids = generator.fitting([[memory.ids(one) for one in row] for row in found], captions, max_text)
    return [row[: len(kept)] for row, kept in zip(found, ids, strict=True)], ids
