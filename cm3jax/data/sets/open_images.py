"""Open Images V4 to V7, boxes (storage.googleapis.com/openimages/web/download_v7.html).

validation-annotations-bbox.csv         ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,...,IsGroupOf,...
class-descriptions-boxable.csv          /m/011k07,Tortoise     (no header)
validation-images-with-rotation.csv     ImageID,...,OriginalURL,...,License,...     (optional: licences)
train-images-boxable-with-rotation.csv  the same of train; oidv6-train-images-with-labels-with-rotation.csv has more
validation/IMAGEID.jpg                  the pictures
"""

import csv
import itertools
import pathlib
from collections.abc import Iterator

from cm3jax.data.sets import item
from cm3jax.data.sets.item import Item
from cm3jax.types import UserError

SPLITS = {"val": "validation"}
CLASSES = ("class-descriptions-boxable.csv", "*class-descriptions-boxable.csv")
IMAGES = (
    "{}-images-with-rotation.csv",
    "{}-images-boxable-with-rotation.csv",
    "oidv6-{}-images-with-labels-with-rotation.csv",
)
CORNERS = ("XMin", "YMin", "XMax", "YMax")


def names(split: str) -> tuple[str, ...]:
    """Return where the boxes may lie."""
    stem = f"{SPLITS.get(split, split)}-annotations-bbox.csv"
    return stem, f"oidv6-{stem}"


def boxes(folder: pathlib.Path, split: str) -> Iterator[Item]:
    """Yield one item a picture that has boxes: names and what is where; boxes of groups are left out.

    The sides of a picture stand in its own file only; one that is missing or broken is yielded without boxes, and
    reading it says what is wrong.
    """
    path, classes = item.find(folder, *names(split)), item.find(folder, *CLASSES)
    called = {row[0]: row[1] for row in _rows(classes) if len(row) == 2}
    tables = (folder / name.format(SPLITS.get(split, split)) for name in IMAGES)
    about = next(filter(pathlib.Path.is_file, tables), None)
    origins = _origins(about) if about else {}
    seen = set()
    for key, rows in itertools.groupby(_table(path), key=lambda row: row["ImageID"]):
        if key in seen:
            raise UserError(f"{str(path)!r}: id {key}: its rows do not stand together; sort the file")
        seen.add(key)
        if about:
            item.match(key, origins, path, about)
        where = item.picture_in([folder / SPLITS.get(split, split), folder / split, folder / "images"], f"{key}.jpg")
        width, height = item.size(where, folder) or (0, 0)
        found = []
        for row in rows:
            item.match(row["LabelName"], called, path, classes)
            if row.get("IsGroupOf", "0") != "1":
                x0, y0, x1, y1 = _corners(row, path)
                found.append((called[row["LabelName"]], x0 * width, y0 * height, x1 * width, y1 * height))
        things = item.located(found, width, height) if width else []
        if things or not width:
            values = {"caption": item.listed(things), "objects": item.told(things), "image": where}
            yield Item(key, "located", values, {"objects": things}, key, *origins.get(key, ("", "")))


def _corners(row: dict, path: pathlib.Path) -> list[float]:
    try:
        return [float(row[name]) for name in CORNERS]
    except ValueError:
        raise UserError(f"{str(path)!r}: id {row['ImageID']}: a corner that is no number") from None


def _origins(path: pathlib.Path) -> dict[str, tuple[str, str]]:
    """Return id -> (licence, address)."""
    return {row["ImageID"]: (row.get("License") or "", row.get("OriginalURL") or "") for row in _table(path, ())}


def _table(path: pathlib.Path, needed: tuple[str, ...] = (*CORNERS, "LabelName")) -> Iterator[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        for name in ("ImageID", *needed):
            if name not in (reader.fieldnames or []):
                raise UserError(f"{str(path)!r}: no column {name!r} in it; is it the right file?")
        for row in reader:
            if None in row.values():
                raise UserError(f"{str(path)!r}: id {row['ImageID']}: a row with too few columns")
            yield row


def _rows(path: pathlib.Path) -> Iterator[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        yield from csv.reader(file)
