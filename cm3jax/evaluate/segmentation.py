"""How well maps of classes agree: mean intersection over union."""

import numpy as np


def confusion(asked: np.ndarray, drawn: np.ndarray, classes: int) -> np.ndarray:
    """Return how many pixels of each class of one map are of each class of the other, int64 [classes, classes].

    Counts of several maps are added up before `miou`.

    Args:
      asked, drawn: int [h, w] of 0 to classes - 1.
    """
    pairs = asked.astype(np.int64).ravel() * classes + drawn.ravel()
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def miou(counts: np.ndarray) -> float:
    """Return the intersection over the union of each class's pixels, averaged over the classes that either side has.

    What is behind all is a class like others, as in the published figures of PASCAL VOC.
    """
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    return float((counts.diagonal()[union > 0] / union[union > 0]).mean())
