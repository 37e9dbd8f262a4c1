"""One piece of `prepare`: read a job, write its shard of every split, and count. Runs in a worker process."""

import collections
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable

import numpy as np

from cm3jax import config
from cm3jax.data import example, pictures, shards
from cm3jax.data.example import Bad, Example, Reject
from cm3jax.tasks import features, templates
from cm3jax.types import ANSWER, Record, UserError

MAX_TEXT = 100_000  # characters of a caption
SPLIT = re.compile(r"\w{1,40}", re.ASCII)
ADDRESS = re.compile(r"\w+://(?:[^/?#@]*@)?([^/?#]+)")
MOST_SOURCES = 1000
"""Different sources of a piece that are counted."""
HASHES = np.dtype([("hash", "<u8"), ("split", "<u2")])
DONE = "done.json"


class Stopped(Exception):
    """The main process asked the workers to stop; the unfinished piece is thrown away."""


def folder(work: pathlib.Path, number: int) -> pathlib.Path:
    """Return where finished piece `number` lies."""
    return work / f"{number:05d}"


def run(source, job, number: int, settings: config.Prepare, work: pathlib.Path, tick: Callable[[], None]) -> None:
    """Write piece `number` under a temporary name and rename it when whole.

    Args:
      tick: Called once a row; may raise `Stopped`.
    """
    if folder(work, number).exists():
        return
    temporary = work / f"{number:05d}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with _Piece(temporary, settings) as piece:
            for item in source.read(job):
                piece.add(item)
                tick()
        temporary.rename(folder(work, number))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class _Piece:
    """The open files and the counts of one piece."""

    def __init__(self, path: pathlib.Path, settings: config.Prepare):
        self.path, self.settings = path, settings
        self.writers: dict[str, shards.Writer] = {}
        self.splits = collections.defaultdict(collections.Counter)
        self.licenses, self.rejects, self.sides = collections.Counter(), collections.Counter(), collections.Counter()
        self.sources = collections.Counter()
        self.hashes: list[tuple[int, int]] = []
        self.rejects_file = (path / "rejects.jsonl").open("w", encoding="ascii")

    def add(self, item: Example | Reject) -> None:
        """Write one example, or its reject."""
        if isinstance(item, Example):
            try:
                return self._write(item)
            except Bad as e:
                item = e.reject(item.key, item.where)
        self.rejects[item.reason] += 1
        self.rejects_file.write(json.dumps(dataclasses.asdict(item)) + "\n")

    def _write(self, item: Example) -> None:
        decoded = decode(item)
        record = to_record(item, decoded, self.settings)
        data = _encode(record)
        if record.split not in self.writers:
            self.writers[record.split] = shards.Writer(self.path / record.split, record.split)
        self.writers[record.split].write_bytes(data)
        self._count(record, decoded)

    def _count(self, record: Record, decoded: list) -> None:
        images = [part for part in decoded if not isinstance(part, str)]
        self.splits[record.split].update(records=1, pictures=len(images))
        self.licenses[record.license] += 1
        self.sources[origin(record.source)] += 1
        self.sides.update(min(image.shape[:2]) for image in images)
        number = list(self.writers).index(record.split)
        self.hashes += [(digest(image), number) for image in images]

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        for writer in self.writers.values():
            writer.close()
        self.rejects_file.close()
        if kind is None:
            np.save(self.path / "hashes.npy", np.array(self.hashes, HASHES))
            (self.path / DONE).write_text(json.dumps(self._summary()))

    def _summary(self) -> dict:
        names = ("splits", "licenses", "rejects", "sides")
        rows = sum(self.rejects.values()) + sum(s["records"] for s in self.splits.values())
        sources = dict(self.sources.most_common(MOST_SOURCES))
        own = {"sources": sources, "order": list(self.writers), "rows": rows}
        return {name: getattr(self, name) for name in names} | own


def origin(source: str) -> str:
    """Return the host of a source that is an address, any other as it is."""
    found = ADDRESS.match(source)
    return found[1].lower() if found else source


def digest(part: str | np.ndarray) -> int:
    """Return 64 bits that identify a text, or a picture's shape and pixels."""
    if isinstance(part, str):
        return _hash(part.encode())
    return _hash(np.array(part.shape, "<u4").tobytes(), np.ascontiguousarray(part))


def _hash(*data) -> int:
    state = hashlib.blake2b(digest_size=8)
    for piece in data:
        state.update(piece)
    return int.from_bytes(state.digest(), "little")


def decode(item: Example) -> list[str | np.ndarray]:
    """Return the parts with texts checked and pictures as uint8 [h, w, 3], before the crop.

    Raises:
      Bad: with the reason for rejects.jsonl.
    """
    if not item.parts:
        raise Bad("empty document")
    return [pictures.decode(part) if isinstance(part, bytes) else _checked(part) for part in item.parts]


def _checked(part):
    if not isinstance(part, str):
        return part
    if not part.strip():
        raise Bad("empty caption")
    if len(part) > MAX_TEXT:
        raise Bad("caption too long", f"{len(part)} characters, limit {MAX_TEXT}")
    check_unicode(part)
    return part


def check_unicode(text: str) -> None:
    """Raise `Bad` for half a surrogate pair, which JSON can escape but no UTF-8 can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise Bad("lone surrogate", f"U+{ord(text[e.start]):04X} at character {e.start}") from None


def to_record(item: Example, decoded: list[str | np.ndarray], settings: config.Prepare) -> Record:
    """Return the record of a decoded example: pictures cropped, regions moved with them, split decided."""
    side = settings.resolution
    parts = tuple(part if isinstance(part, str) else pictures.crop(part, side) for part in decoded)
    values = {name: getattr(item, name) for name in ("key", "fields", "group", "license", "source")}
    values |= {"parts": parts, "regions": _regions(item, decoded)}
    values |= featured(item, settings.feature, **values) if settings.feature else {}
    return Record(split=split(item, decoded, settings), **values)


def featured(item: Example, feature: str, parts: tuple, regions: tuple, **_) -> dict:
    """Return parts, regions and fields of the document that draws a captioned picture from what a function makes of it.

    Args:
      feature: As `Prepare.feature`.
      parts, regions: Of the example, its picture cropped.

    Raises:
      Bad: if the example is no captioned picture, or the function fails on it.
    """
    kind, *maker = feature.split("=", 1)
    if [type(part) is str for part in parts] != [True, False] or item.fields.get("task", "caption") != "caption":
        raise Bad("no captioned picture", f"prepare.feature = {feature!r} makes documents of a caption and a picture")
    told = templates.read("caption", parts) if "task" in item.fields else {"caption": parts[0]}
    try:
        made = features.make(kind, parts[1], *maker)
    except UserError:
        raise
    except Exception as e:
        raise Bad("feature failed", f"{feature}: {type(e).__name__}: {e}") from None
    values = {"caption": told["caption"], "feature_image": made, "image": parts[1]}
    document, answers = templates.make(kind, values)
    boxes = tuple(dataclasses.replace(r, part=len(document) - 1) for r in regions if r.kind != ANSWER)
    fields = item.fields | {"task": kind, "wording": 0, "truth": {}}
    return {"parts": document, "regions": (*answers, *boxes), "fields": fields}


def _regions(item: Example, decoded: list) -> tuple:
    """Return the regions in fractions of the cropped pictures, and the answers in texts as they are."""
    kept = []
    for region in item.regions:
        text = 0 <= region.part < len(decoded) and isinstance(decoded[region.part], str)
        if text and region.kind == ANSWER:
            kept.append(region)
            continue
        if text or not 0 <= region.part < len(decoded):
            raise Bad("bad region", f"part {region.part} of {len(decoded)} is no picture")
        height, width = decoded[region.part].shape[:2]
        kept.append(pictures.crop_region(region, width, height))
    return tuple(region for region in kept if region is not None)


def split(item: Example, decoded: list[str | np.ndarray], settings: config.Prepare) -> str:
    """Return the given split, else decide by the hash of the group, else of the first picture's decoded pixels.

    So a picture, or a group, never straddles two splits, and the split does not depend on resolution or order.
    """
    if item.split:
        name = example.split_name(item.split)
        if not SPLIT.fullmatch(name):
            raise Bad("bad split", f"{name[:60]!r}: must be letters, digits and _, at most 40")
        return name
    first = next((part for part in decoded if not isinstance(part, str)), decoded[0])
    check_unicode(item.group)
    position = (digest(item.group) if item.group else digest(first)) / 2**64
    for name in item.held_out:
        position -= getattr(settings, name)
        if position < 0:
            return name
    return "train"


def _encode(record: Record) -> bytes:
    try:
        return shards.encode(record)
    except (ValueError, TypeError, OverflowError) as e:
        raise Bad("cannot be stored", f"{type(e).__name__}: {e}") from None
