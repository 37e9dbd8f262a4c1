"""How well things stand in the boxes that were asked for: intersection over union."""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

Box = Sequence[int | float]
"""(x0, y0, x1, y1) in any unit."""
Located = tuple[str, Box]
"""What a thing is, and where."""


def iou(a: Box, b: Box) -> float:
    """Return the area that two boxes share over the area that they cover together; 0 for two without area."""
    (x0, y0, x1, y1), (u0, v0, u1, v1) = a, b
    shared = max(0.0, min(x1, u1) - max(x0, u0)) * max(0.0, min(y1, v1) - max(y0, v0))
    union = (x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0) - shared
    return shared / union if union else 0.0


def agreement(asked: Sequence[Located], drawn: Sequence[Located]) -> float:
    """Return the sum of the IoU of boxes, paired one to one so that it is largest, over the larger number of them.

    Boxes of different things are no pair, so that what is missing, too much or another thing counts 0; 1 if both sides
    are empty.
    """
    if not asked or not drawn:
        return float(len(asked) == len(drawn))
    table = np.array([[iou(a, b) * (name == other) for other, b in drawn] for name, a in asked])
    return float(table[linear_sum_assignment(table, maximize=True)].sum() / max(table.shape))
