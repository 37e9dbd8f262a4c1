"""What the readers of the public sets yield, and how they look into files: every error names the file and the id."""

import dataclasses
import io
import json
import pathlib
from collections.abc import Collection
from typing import Any

import numpy as np
from PIL import Image

from cm3jax.data import sources_folder
from cm3jax.data.example import Bad
from cm3jax.tasks import templates
from cm3jax.tasks.templates import SIDE
from cm3jax.types import UserError

MOST = 10
"""Boxes of a picture that are told, the largest first; a hundred would fill the sequence."""


@dataclasses.dataclass(frozen=True)
class Coloured:
    """A panoptic map in COCO's PNG format, to be painted with one colour for each category.

    Attributes:
      path: A pixel holds the id of its segment, R + 256 G + 65536 B.
      categories: ((segment, category), ...).
    """

    path: pathlib.Path
    categories: tuple[tuple[int, int], ...]


Number = int | float
Value = str | bytes | pathlib.Path | Coloured
"""Of a field: text; an encoded picture; where one lies; a map to be painted."""


@dataclasses.dataclass(frozen=True)
class Item:
    """One example of a public set.

    Attributes:
      key: Unique within the set.
      task: The instruction task that its values are for ("caption", "question", "edit", ...).
      values: Field of the task -> value, in the order of the task's template.
      truth: What scores need besides, JSON types only: all captions, all answers, boxes, ...
      group: Items of one group show the same picture, and never straddle two splits.
      license, source: As far as the set tells them.
    """

    key: str
    task: str
    values: dict[str, Value]
    truth: dict[str, Any] = dataclasses.field(default_factory=dict)
    group: str = ""
    license: str = ""
    source: str = ""


# ---------------------------------------------------------------------------------------------------------------- files


def find(folder: pathlib.Path, *names: str) -> pathlib.Path:
    """Return the first of some paths that is there; names may be patterns.

    Raises:
      UserError: if none is, with what was looked for.
    """
    for name in names:
        if found := sorted(folder.glob(name)):
            return found[0]
    raise UserError(f"{str(folder)!r}: no such folder" if not folder.is_dir() else _absent(folder, names))


def _absent(folder: pathlib.Path, names: tuple[str, ...]) -> str:
    return f"{str(folder)!r}: holds no {names[0]}" + (f" (nor {', '.join(names[1:])})" if names[1:] else "")


def picture_in(folders: list[pathlib.Path], *names: str) -> pathlib.Path:
    """Return where a picture lies; if nowhere, where it should, so that reading it says what is missing."""
    places = [folder / name for folder in folders for name in names]
    return next((path for path in places if path.is_file()), places[0])


def load(path: pathlib.Path, kind: type = dict) -> Any:
    """Return what a JSON file holds.

    Raises:
      UserError: if it is no JSON, or no object (list) where one is expected.
    """
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as e:
        raise UserError(f"{str(path)!r}: not JSON: {str(e)[:100]}") from None
    if not isinstance(value, kind):
        raise UserError(f"{str(path)!r}: a JSON {type(value).__name__}, expected a {kind.__name__}")
    return value


def rows(value: dict, name: str, path: pathlib.Path) -> list[dict]:
    """Return a list of objects in a JSON object.

    Raises:
      UserError: if it is not there.
    """
    found = value.get(name)
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise UserError(f"{str(path)!r}: no list of objects {name!r} in it; is it the right file?")
    return found


def field(row: dict, name: str, path: pathlib.Path, key: Any) -> Any:
    """Return a field of a row.

    Raises:
      UserError: if it has none.
    """
    if name not in row:
        raise UserError(f"{str(path)!r}: id {key}: no {name!r} in it")
    return row[name]


def index(found: list[dict], name: str, path: pathlib.Path) -> dict[Any, dict]:
    """Return rows by their id.

    Raises:
      UserError: if a row has none, or two have the same.
    """
    table = {}
    for row in found:
        key = field(row, name, path, "?")
        if key in table:
            raise UserError(f"{str(path)!r}: id {key}: twice in it")
        table[key] = row
    return table


def match(key: Any, table: Collection, path: pathlib.Path, other: pathlib.Path) -> None:
    """Check that an id of one file is in another.

    Raises:
      UserError: if it is not.
    """
    if key not in table:
        raise UserError(f"{str(path)!r}: id {key} is not in {str(other)!r}; are they of the same split and version?")


# ------------------------------------------------------------------------------------------------------------- pictures


def picture(value: Value, root: pathlib.Path) -> bytes | np.ndarray:
    """Return a picture as bytes of a file, or as uint8 pixels [h, w, 3].

    Args:
      root: The set's folder; nothing outside of it is opened.

    Raises:
      Bad: if it cannot be read.
    """
    if isinstance(value, bytes):
        return value
    path = value.path if isinstance(value, Coloured) else value
    data = sources_folder.read(str(root), root, _name(path, root))
    return data if not isinstance(value, Coloured) else paint(data, dict(value.categories))


def _name(path: pathlib.Path, root: pathlib.Path) -> str:
    """Return the file's name in the set's folder; of one outside of it the absolute name, which is refused."""
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def paint(data: bytes, categories: dict[int, int]) -> np.ndarray:
    """Return a panoptic PNG as uint8 [h, w, 3] with one colour for each category, and black where there is none.

    Raises:
      Bad: if a segment of it is not among `categories`.
    """
    try:
        pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(np.int64)
    except (OSError, ValueError) as e:
        raise Bad("broken picture", str(e)[:100]) from None
    segments, where = np.unique(pixels @ [1, 256, 65536], return_inverse=True)
    if strange := [int(segment) for segment in segments if segment and int(segment) not in categories]:
        raise Bad("broken metadata", f"segment {strange[0]} of the map is not in segments_info")
    palette = np.array([colour(categories.get(int(segment), 0)) for segment in segments], np.uint8)
    return palette[where.reshape(pixels.shape[:2])]


def colour(category: int) -> tuple[int, int, int]:
    """Return a category's colour: 0 is black, the others differ from each other by at least 36 in one channel.

    Seven levels a channel make 342 colours; a step of 151, prime to 342, keeps neighbours in the list apart.
    """
    number = (category - 1) * 151 % 342 + 1 if category else 0
    return number % 7 * 36, number // 7 % 7 * 36, number // 49 * 36


def size(path: pathlib.Path, root: pathlib.Path) -> tuple[int, int] | None:
    """Return (width, height) of a picture from its header, None if it is missing, or none."""
    try:
        with Image.open(sources_folder.locate(str(root), root, _name(path, root))) as found:
            return found.size
    except (Bad, OSError, ValueError):
        return None


# ---------------------------------------------------------------------------------------------------------------- boxes


def located(boxes: list[tuple[str, Number, Number, Number, Number]], width: Number, height: Number) -> list[dict]:
    """Return the boxes that the centre crop of a picture shows, the largest first, at most MOST.

    Args:
      boxes: (name, x0, y0, x1, y1) in pixels of the picture.

    Returns:
      {"name", "box": [x0, y0, x1, y1]} in whole pixels of the crop, scaled to SIDE; empty boxes are left out.
    """
    short = min(width, height)
    left, top, scale = (width - short) / 2, (height - short) / 2, SIDE / short
    found = []
    for name, *corners in boxes:
        moved = [(x - left) * scale if i % 2 == 0 else (x - top) * scale for i, x in enumerate(corners)]
        box = [round(min(max(x, 0.0), SIDE)) for x in moved]
        if box[0] < box[2] and box[1] < box[3]:
            found.append({"name": name, "box": box})
    area = lambda thing: (thing["box"][2] - thing["box"][0]) * (thing["box"][3] - thing["box"][1])  # noqa: E731
    return sorted(found, key=area, reverse=True)[:MOST]


def told(things: list[dict]) -> str:
    """Return boxes as a prompt tells them: "dog at (12, 40) -> (80, 200), ...", in pixels of 256."""
    return templates.located([(thing["name"], [x / SIDE for x in thing["box"]]) for thing in things])


def listed(things: list[dict]) -> str:
    """Return a caption that names what there is, for sets without captions: "dog, cat" of a dog and two cats."""
    return ", ".join(dict.fromkeys(thing["name"] for thing in things))
