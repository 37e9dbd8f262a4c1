"""How well drawn edges follow those that were asked for: an F1 score with a tolerance in pixels."""

import numpy as np
from scipy import ndimage

TOLERANCE = 1.0
"""Pixels by which an edge may miss."""


def f1(asked: np.ndarray, drawn: np.ndarray, tolerance: float = TOLERANCE) -> float:
    """Return the harmonic mean of precision and recall, 0 to 1; 1 if neither side has an edge, 0 if one has none.

    Precision is the share of the drawn edge pixels that have an asked one within the tolerance (Euclidean, between
    centres); recall is the same the other way round.

    Args:
      asked, drawn: bool [h, w], of one size.
    """
    if not asked.any() or not drawn.any():
        return float(asked.any() == drawn.any())
    precision, recall = _near(drawn, asked, tolerance), _near(asked, drawn, tolerance)
    return 2 * precision * recall / (precision + recall) if precision else 0.0


def _near(edges: np.ndarray, others: np.ndarray, tolerance: float) -> float:
    """Return the share of edges that have another within the tolerance."""
    return float((ndimage.distance_transform_edt(~others)[edges] <= tolerance).mean())
