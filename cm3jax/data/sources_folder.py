"""A folder of pictures in the Hugging Face ImageFolder convention: metadata.jsonl or metadata.csv beside them.

    {"file_name": "a.png", "text": "a cat", "license": "CC0-1.0", "source": "me", "split": "test", "group": "house 7",
     "regions": [{"box": [0.1, 0.2, 0.5, 0.6], "kind": "face", "label": "Ada"}]}
    {"parts": ["before", {"file_name": "a.png"}, "after", {"file_name": "b.png"}]}
    {"task": "edit", "image": {"file_name": "a.png"}, "instruction": "make it blue",
     "edited_image": {"file_name": "b.png"}}

Only `file_name` and `text`, or `parts`, or a task and its fields (`cm3jax tasks`) are needed. `text` may be a list of
captions: the first is the document's, all are kept in `fields["captions"]`. A box is (x0, y0, x1, y1) in fractions of
the upright picture's sides. Further columns are kept in `fields`. The metadata may also lie in sub-folders: train,
validation and test then name the split.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import pathlib
import stat
import zlib
from collections.abc import Iterator
from typing import Any

from cm3jax import config
from cm3jax.data import example, metadata, pictures
from cm3jax.data.example import Bad, Example, Reject
from cm3jax.tasks import table, templates
from cm3jax.types import Region, UserError

NAMES = ("metadata.jsonl", "metadata.csv")
STRINGS = ("group", "license", "source", "split")


@dataclasses.dataclass(frozen=True)
class Folder:
    """`files` are metadata files relative to `root`, each with the split that its folder names ("" for none)."""

    root: str
    files: tuple[tuple[str, str], ...]
    text: str = "text"
    count: int = 0

    def fingerprint(self) -> list:
        return [[name, _sha256(pathlib.Path(self.root, name))] for name, _ in self.files]

    def total(self, jobs: list) -> int:
        return sum(count for job in jobs for _, _, count, _ in job)

    def _offsets(self) -> list[tuple[int, int, int]]:
        """Return (file, offset, line) of every row that is taken."""
        every = (
            (i, offset, line)
            for i, (name, _) in enumerate(self.files)
            for offset, line, _ in metadata.rows(pathlib.Path(self.root, name))
        )
        return list(itertools.islice(every, self.count or None))

    def jobs(self, shards: int) -> list[list]:
        """Cut the rows into ranges: a job is [[file, first byte, number of rows, first line], ...]."""
        rows = self._offsets()
        shards = example.shards(len(rows), shards)
        ends = [len(rows) * i // shards for i in range(shards + 1)]
        return [_ranges(rows[first:stop]) for first, stop in itertools.pairwise(ends)]

    def read(self, job: list) -> Iterator[Example | Reject]:
        for file, start, count, line in job:
            name, split = self.files[file]
            path = pathlib.Path(self.root, name)
            for _, number, row in itertools.islice(metadata.rows(path, start, None, line), count):
                yield self._example(row, path.parent, f"{name}:{number}", split)

    def _example(self, row: dict | Bad, base: pathlib.Path, where: str, split: str) -> Example | Reject:
        key = where if isinstance(row, Bad) else f"{_short(row.get('file_name'))}#{where}".removeprefix("#")
        try:
            if isinstance(row, Bad):
                raise row
            return to_example(row, key, where, self.text, split, lambda name: read(self.root, base, name))
        except Bad as e:
            return e.reject(key, where)


def open(prepare: config.Prepare) -> Folder:
    """Return the source of a folder.

    Raises:
      UserError: if it holds no metadata, or two files of it.
    """
    root = pathlib.Path(prepare.source)
    found = _find(root)
    folders = [] if found else sorted(path for path in root.iterdir() if path.is_dir())
    found = found or [(f"{path.name}/{name}", path.name) for path in folders for name, _ in _find(path)]
    if not found:
        raise UserError(
            f"source {prepare.source!r}: no metadata.jsonl or metadata.csv in it; write one line per picture:"
            ' {"file_name": "a.png", "text": "its caption"}'
        )
    text = prepare.text_feature or "text"
    for name, _ in found:
        _check_header(root / name, text)
    files = tuple((name, _known_split(split)) for name, split in found)
    return Folder(str(root), files, text, prepare.count)


def _find(folder: pathlib.Path) -> list[tuple[str, str]]:
    names = [name for name in NAMES if (folder / name).is_file()]
    if len(names) > 1:
        raise UserError(f"{str(folder)!r}: holds both {names[0]} and {names[1]}; keep one")
    return [(name, "") for name in names]


def _check_header(path: pathlib.Path, text: str) -> None:
    if path.suffix == ".csv" and (missing := {"file_name", text} - set(metadata.header(path))):
        found = ", ".join(metadata.header(path))
        raise UserError(f"{str(path)!r}: no column {sorted(missing)[0]!r}; the header has {found}")


def _known_split(folder: str) -> str:
    split = example.split_name(folder)
    return split if split in ("train", "validation", "test") else ""


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _ranges(rows: list[tuple[int, int, int]]) -> list[list[int]]:
    """Return [file, first byte, rows, first line] for each file that the rows come from."""
    groups = (list(group) for _, group in itertools.groupby(rows, lambda row: row[0]))
    return [[group[0][0], group[0][1], len(group), group[0][2]] for group in groups]


# ------------------------------------------------------------------------------------------------- a row to an example


def to_example(row: dict[str, Any], key: str, where: str, text: str, split: str, read) -> Example:
    """Return the example that one row describes.

    Args:
      text: Name of the caption column.
      split: For a row that names none.
      read: file_name -> bytes.

    Raises:
      Bad: with the reason for rejects.jsonl.
    """
    of_task = "task" in row and not {"file_name", "parts"} & set(row)  # whose texts may be empty
    row = {name: value for name, value in row.items() if value is not None and (value != "" or of_task or name == text)}
    known, answers, captions = {"file_name", "parts", "regions", text, *STRINGS}, (), []
    if "parts" in row:
        parts = tuple(_part(part, read) for part in _list(row, "parts"))
    elif of_task:
        row, parts, answers = _of_task(row, key, read)
        known = {*known, *table.find(row["task"]).fields}
    else:
        captions = captions_of(row, text)
        parts = (captions[0], read(row.get("file_name")))
    fields = {name: value for name, value in row.items() if name not in known}
    if len(captions) > 1:
        fields["captions"] = captions
    strings = {name: _string(row, name) for name in STRINGS}
    strings["split"] = strings["split"] or split
    return Example(key, parts, where, fields, (*answers, *regions(row, parts)), **strings)


def _of_task(row: dict[str, Any], key: str, read) -> tuple[dict, tuple, tuple]:
    """Return a row with what an example of a task has, its parts, and where its answer stands.

    Raises:
      Bad: if there is no such task, or a field is missing or of the wrong type.
    """
    try:
        task = table.find(_string(row, "task"))
        values = {name: _part(row[name], read) for name in task.fields if name in row}
        wording = zlib.crc32(key.encode(errors="replace")) % len(task.templates)
        parts, answers = templates.make(task.name, values, wording)
    except UserError as e:
        raise Bad("bad task", str(e)) from None
    return row | {"wording": wording, "truth": row.get("truth", {})}, parts, answers


def captions_of(row: dict[str, Any], column: str) -> list[str]:
    """Return the captions in a column: a string, or a list of strings.

    Raises:
      Bad: "missing caption" or "caption is not text".
    """
    value = row.get(column)
    captions = value if isinstance(value, list) else [value]
    if value is None or not captions:
        raise Bad("missing caption", f"no {column!r}")
    for caption in captions:
        if not isinstance(caption, str):
            raise Bad("caption is not text", f"{column!r} is {_short(caption)}")
    return captions


def _part(part, read) -> str | bytes:
    """Return one part of a document: "text", {"text": ...} or {"file_name": ...}."""
    if isinstance(part, dict) and len(part) == 1:
        ((kind, value),) = part.items()
        if kind == "file_name":
            return read(value)
        part = value if kind == "text" else part
    if not isinstance(part, str):
        raise Bad("bad part", f'{_short(part)}: must be "text", {{"text": ...}} or {{"file_name": ...}}')
    return part


def _string(row: dict[str, Any], name: str) -> str:
    value = row.get(name, "")
    if isinstance(value, (dict, list)):
        raise Bad("broken metadata", f"{name!r} is {_short(value)}, expected text")
    return str(value)


def _list(row: dict[str, Any], name: str) -> list:
    """Return a list column; in CSV it is written as JSON."""
    value = row.get(name, [])
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    if not isinstance(value, list):
        raise Bad("broken metadata", f"{name!r} is {_short(value)}, expected a list")
    return value


def regions(row: dict[str, Any], parts: tuple) -> tuple[Region, ...]:
    """Return the boxes of a row; a box that names no part belongs to the first picture."""
    first = next((i for i, part in enumerate(parts) if not isinstance(part, str)), 0)
    return tuple(_region(value, first) for value in _list(row, "regions"))


def _region(value, first: int) -> Region:
    try:
        box = tuple(float(x) for x in value["box"])
        part, kind, label = value.get("part", first), value.get("kind", "object"), value.get("label", "")
        good = len(box) == 4 and all(math.isfinite(x) and -1e-3 <= x <= 1 + 1e-3 for x in box)
        good = good and box[0] < box[2] and box[1] < box[3] and isinstance(part, int)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError):
        good = False
    if not good:
        raise Bad(
            "bad region", f"{_short(value)}: a box is [x0, y0, x1, y1] in fractions of the sides, x0 < x1, y0 < y1"
        )
    return Region(part, str(kind), tuple(min(max(x, 0.0), 1.0) for x in box), str(label))


def _short(value) -> str:
    """Return a value for a message, at most 100 characters."""
    text = "" if value is None else value if isinstance(value, str) else repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


# ---------------------------------------------------------------------------------------------------- reading a picture


def read(root: str, base: pathlib.Path, name) -> bytes:
    """Return the bytes of picture `name`; see `locate`."""
    try:
        return locate(root, base, name).read_bytes()
    except OSError as e:
        raise _unreadable(name, e) from None


def locate(root: str, base: pathlib.Path, name) -> pathlib.Path:
    """Return the file of picture `name`, which is relative to `base`; nothing outside `root` is ever opened.

    Raises:
      Bad: with the reason for rejects.jsonl.
    """
    if not isinstance(name, str) or not name:
        raise Bad("missing file_name", _short(name))
    try:
        path = _inside(root, base, name)
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise Bad("not a file", f"{_short(name)!r}: a folder, pipe or device")  # a pipe would block for ever
        if status.st_size > pictures.MAX_BYTES:
            raise Bad("picture too large", f"{status.st_size} bytes, limit {pictures.MAX_BYTES}")
        return path
    except FileNotFoundError:
        raise Bad("missing file", _short(name)) from None
    except (OSError, ValueError) as e:  # ValueError: a NUL or half a surrogate pair in the name
        raise _unreadable(name, e) from None


def _unreadable(name: str, e: Exception) -> Bad:
    return Bad("unreadable file", f"{_short(name)!r}: {getattr(e, 'strerror', None) or e}")


def _inside(root: str, base: pathlib.Path, name: str) -> pathlib.Path:
    """Return the real path of `name`, which must stay inside `root` through `..` and symbolic links."""
    if os.path.isabs(name) or ".." in pathlib.PurePath(name).parts:
        raise Bad("path leaves the folder", _short(name))
    real = os.path.realpath(base / name)
    if not pathlib.Path(real).is_relative_to(os.path.realpath(root)):
        raise Bad("path leaves the folder", f"{_short(name)}: a link to {_short(real)}")
    return pathlib.Path(real)
