"""Feature images of any picture: edges and scribbles here, others by a function that the user names.

As the embedded world draws them (`data.scenes_tasks_render`): edges white on black, scribbles black on white. Needs
scikit-image (pip install 'cm3jax[features]'), which is imported when it is used. Imports no jax.
"""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from cm3jax.tasks import table
from cm3jax.types import UserError

Maker = Callable[[np.ndarray], Any]
"""A picture, uint8 [h, w, 3] -> its feature image, of the same size and type."""
FINE, COARSE = 1.0, 3.0
"""Blur before edges are looked for, in pixels of a picture of `SIDE`: a scribble shows the coarse ones only."""
SIDE = 256
STROKE = 3
"""Width of a scribble's lines, in pixels of a picture of `SIDE`."""


def make(kind: str, picture: np.ndarray, maker: str = "") -> np.ndarray:
    """Return a feature image of a picture, uint8 [h, w, 3].

    Args:
      kind: A key of `table.FEATURES`.
      maker: "package.module:function", a `Maker`, for what is not made here; it takes the place of what is.

    Raises:
      UserError: if there is no such feature, or nothing that makes it.
    """
    return checked(find(kind, maker)(picture), picture, maker or kind)


def find(kind: str, maker: str = "") -> Maker:
    """Return the function that makes a feature image; the arguments are those of `make`.

    Raises:
      UserError: if there is no such feature, or nothing that makes it.
    """
    if kind not in table.FEATURES:
        raise UserError(f"feature {kind!r}: no such feature; features: {', '.join(table.FEATURES)}")
    if maker:
        return named(maker)
    if kind not in MAKERS:
        raise UserError(
            f"feature {kind!r}: is not made here; give a file that shows it, or a function that makes it. What is made"
            f" here: {', '.join(MAKERS)}"
        )
    return MAKERS[kind]


def edges(picture: np.ndarray) -> np.ndarray:
    """Return Canny's edges of a picture, white on black."""
    return _lines(_canny(picture, FINE))


def scribble(picture: np.ndarray) -> np.ndarray:
    """Return a picture's coarse edges as strokes, black on white."""
    from scipy import ndimage

    width = max(1, round(STROKE * min(picture.shape[:2]) / SIDE))
    return 255 - _lines(ndimage.binary_dilation(_canny(picture, COARSE), np.ones((width, width), bool)))


MAKERS: dict[str, Maker] = {"edges": edges, "scribble": scribble}


def _canny(picture: np.ndarray, blur: float) -> np.ndarray:
    """Return where the edges are, bool [h, w]."""
    try:
        from skimage import feature
    except ImportError:
        raise UserError("edges and scribbles need scikit-image: pip install 'cm3jax[features]'") from None
    grey = picture.astype(np.float64) @ np.array([0.299, 0.587, 0.114]) / 255
    return feature.canny(grey, sigma=max(0.5, blur * min(grey.shape) / SIDE))


def _lines(there: np.ndarray) -> np.ndarray:
    return np.repeat(np.where(there, 255, 0).astype(np.uint8)[..., None], 3, axis=-1)


def named(maker: str) -> Maker:
    """Return the function that "package.module:function" names.

    Raises:
      UserError: if there is none.
    """
    module, _, name = maker.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as e:
        raise UserError(f"{maker!r}: {e}; must be package.module:function, of a module that Python finds") from None


def checked(found: Any, picture: np.ndarray, maker: str) -> np.ndarray:
    """Return what a named function made of a picture.

    Raises:
      UserError: if it is no picture of that size.
    """
    if not isinstance(found, np.ndarray) or found.shape != picture.shape or found.dtype != np.uint8:
        what = f"{found.dtype} {found.shape}" if isinstance(found, np.ndarray) else type(found).__name__
        raise UserError(f"{maker!r}: gave {what} for a picture of {picture.shape}; must be uint8 of that shape")
    return found
