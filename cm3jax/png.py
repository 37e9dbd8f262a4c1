"""Picture files of the command line: read any, write PNG with what it was made from in its text fields."""

import pathlib
import re
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from cm3jax import config, provenance
from cm3jax.data import example, pictures
from cm3jax.types import UserError


def read(path) -> np.ndarray:
    """Return the pixels of a picture file, uint8 [h, w, 3].

    Raises:
      UserError: if it is no picture that can be read.
    """
    try:
        return pictures.decode(pathlib.Path(path).read_bytes())
    except OSError as e:
        raise UserError(f"picture {str(path)!r}: {e.strerror or e}; give the path of a picture file") from None
    except example.Bad as e:
        raise UserError(f"picture {str(path)!r}: {e}; give a JPEG, PNG or WebP file") from None


def save(path, picture: np.ndarray, fields: PngImagePlugin.PngInfo | None = None) -> pathlib.Path:
    """Write one picture, uint8 [h, w, 3], to a PNG file, and return its path.

    Raises:
      UserError: if it cannot be written there.
    """
    path = pathlib.Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path, "png", pnginfo=fields)
    except OSError as e:
        raise UserError(f"picture {str(path)!r}: {e.strerror or e}; choose another folder with --out") from None
    return path


def write(folder, picture: np.ndarray, made: provenance.Made) -> pathlib.Path:
    """Write one picture, uint8 [h, w, 3], with what it was made from in its fields, and return its path.

    The name tells prompt, seed and index, and a digest of all else, so that other settings give another file.

    Raises:
      UserError: if it cannot be written there.
    """
    return save(pathlib.Path(folder) / f"{named(made)}.png", picture, provenance.fields(made))


def named(made: provenance.Made) -> str:
    """Return the name, without its ending, of what was made so."""
    return stem(made.prompt, made.seed, made.index, made)


def stem(prompt: str, seed: int, index: int, settings: Any) -> str:
    """Return the name, without its ending, of what was made so; `settings` is a dataclass."""
    slug = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:40] or "picture"
    return f"{slug}-{seed}-{index}-{config.digest(prompt, settings)[:6]}"
