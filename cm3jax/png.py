"""Picture files of the command line: read any, write PNG with what it was made from in its text fields."""

import json
import pathlib
import re
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from cm3jax import config
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


def write(folder, picture: np.ndarray, prompt: str, seed: int, index: int, settings: Any) -> pathlib.Path:
    """Write one picture, uint8 [h, w, 3], and return its path; the name tells prompt, seed and index.

    Args:
      prompt, seed, index: What it was drawn from; row `index` of the call.
      settings: A dataclass; a digest of it is in the name, so that other settings give another file.

    Raises:
      UserError: if it cannot be written there.
    """
    made = prompt, seed, index, settings
    return save(pathlib.Path(folder) / f"{stem(*made)}.png", picture, fields(*made))


def stem(prompt: str, seed: int, index: int, settings: Any) -> str:
    """Return the name, without its ending, of what was made so."""
    slug = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:40] or "picture"
    return f"{slug}-{seed}-{index}-{config.digest(prompt, settings)[:6]}"


def fields(prompt: str, seed: int, index: int, settings: Any) -> PngImagePlugin.PngInfo:
    """Return the text fields of a picture's file."""
    found = PngImagePlugin.PngInfo()
    values = {
        "prompt": prompt,
        "seed": str(seed),
        "index": str(index),
        "settings": json.dumps(config.to_json(settings)),
    }
    for name, value in {**values, "Software": "cm3jax"}.items():
        found.add_itxt(name, value)
    return found
