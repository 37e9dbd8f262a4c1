"""WebDataset tars, as img2dataset writes them: members that share a name up to the first dot are one example.

    00017.jpg (.jpeg .png .webp)   the picture
    00017.txt                      the caption; without it, "caption" (or "text") in the .json
    00017.json                     "license", "url" or "source", "split", "group", "regions"; the rest goes to `fields`

A bad member costs its example only: after unreadable bytes the search goes on at the next tar header.
"""

import collections
import dataclasses
import itertools
import os
import pathlib
import re
import tarfile
from collections.abc import Iterator

from cm3jax import config
from cm3jax.data import metadata, pictures, sources_folder
from cm3jax.data.example import Bad, Example, Reject
from cm3jax.types import UserError

PICTURES = ("jpg", "jpeg", "png", "webp")
KINDS = (*PICTURES, "txt", "json")
MAX_TEXT = 2**24  # bytes of a .txt or .json member
BRACES = re.compile(r"\{([^{}]*)\}")
MAX_TARS = 100_000


@dataclasses.dataclass(frozen=True)
class WebDataset:
    """Tar files; a job is [[tar, number of examples (0: all)], ...]."""

    tars: tuple[str, ...]
    text: str = ""
    count: int = 0

    def fingerprint(self) -> list:
        status = [os.stat(tar) for tar in self.tars]
        return [[tar, s.st_size, s.st_mtime_ns] for tar, s in zip(self.tars, status, strict=True)]

    def total(self, jobs: list) -> int:
        return sum(count for job in jobs for _, count in job)

    def jobs(self, shards: int) -> list[list]:
        """Deal the tars out to the shards, by default one each."""
        tars = self._counted() if self.count else [[tar, 0] for tar in range(len(self.tars))]
        shards = min(shards or len(tars), len(tars))
        ends = [len(tars) * i // shards for i in range(shards + 1)]
        return [tars[first:stop] for first, stop in itertools.pairwise(ends)]

    def _counted(self) -> list[list[int]]:
        """Return the tars that hold the first `count` examples, each with how many of them it holds."""
        left, taken = self.count, []
        for tar, path in enumerate(self.tars):
            here = min(left, sum(1 for _ in _groups(path)))
            taken += [[tar, here]] if here else []
            left -= here
            if not left:
                break
        return taken or [[0, 0]]

    def read(self, job: list) -> Iterator[Example | Reject]:
        for tar, count in job:
            seen = collections.Counter()
            for name, members in itertools.islice(_groups(self.tars[tar]), count or None):
                seen[name] += 1
                key = f"{self._name(tar)}/{name}" + (f"#{seen[name]}" if seen[name] > 1 else "")
                try:
                    yield _example(members, key, self.text)
                except Bad as e:
                    yield e.reject(key, key)

    def _name(self, tar: int) -> str:
        """Return a tar's path from where all tars lie, so that equal names in two folders stay apart."""
        common = os.path.commonpath([os.path.dirname(tar) for tar in self.tars])
        return os.path.relpath(self.tars[tar], common or ".")


def open(prepare: config.Prepare) -> WebDataset:
    """Return the source of tars named by a path, a folder of tars, a glob, or braces: "a/{000..017}.tar".

    Raises:
      UserError: if a tar is missing, or none is found.
    """
    tars = [tar for pattern in expand(prepare.source) for tar in _matches(pattern)]
    if not tars:
        raise UserError(f"source {prepare.source!r}: no .tar file matches")
    missing = [tar for tar in tars if not os.path.isfile(tar)]
    if missing:
        raise UserError(
            f"source {prepare.source!r}: no such file: {missing[0]!r} ({len(missing)} of {len(tars)} missing)"
        )
    return WebDataset(tuple(tars), prepare.text_feature, prepare.count)


def _matches(pattern: str) -> list[str]:
    path = pathlib.Path(pattern)
    if path.is_dir():
        return sorted(str(tar) for tar in path.glob("*.tar"))
    if "*" in path.name or "?" in path.name:
        return sorted(str(tar) for tar in path.parent.glob(path.name))
    return [pattern]


def expand(pattern: str) -> list[str]:
    """Expand braces: "{00..12}" counts with leading zeros, "{a,b}" lists; several multiply, first varies slowest.

    Raises:
      UserError: if there are more than MAX_TARS names.
    """
    match = BRACES.search(pattern)
    if not match:
        return [pattern]
    heads = [pattern[: match.start()] + choice for choice in _choices(match[1], pattern)]
    tails = expand(pattern[match.end() :])
    if len(heads) * len(tails) > MAX_TARS:
        raise UserError(f"source {pattern!r}: {len(heads) * len(tails)} tars, limit {MAX_TARS}; prepare it in parts")
    return [head + tail for head in heads for tail in tails]


def _choices(inside: str, pattern: str) -> list[str]:
    if not (span := re.fullmatch(r"(\d+)\.\.(\d+)", inside)):
        return inside.split(",")
    first, last, width = int(span[1]), int(span[2]), len(span[1])
    if not 0 <= last - first < MAX_TARS:
        raise UserError(f"source {pattern!r}: {{{inside}}} must count upwards, to at most {MAX_TARS} tars")
    return [f"{i:0{width}d}" for i in range(first, last + 1)]


# ------------------------------------------------------------------------------------------------------- inside one tar


def _groups(path: str) -> Iterator[tuple[str, dict[str, bytes | Bad]]]:
    """Yield (key, {extension: data or what is wrong with it}) of neighbouring members that share a key.

    A tar that cannot be read on ends with one group of its own, so that the loss is counted.
    """
    key, members = "", {}
    for name, value in _members(path):
        base, extension = _split(name)
        if members and base != key:
            yield key, members
            members = {}
        key = base
        members[extension] = value
    if members:
        yield key, members


def _split(name: str) -> tuple[str, str]:
    """Split "folder/a.b.JPG" into ("folder/a", "b.jpg"): WebDataset's rule, the first dot of the last component."""
    folder, _, last = name.rpartition("/")
    base, _, extension = last.partition(".")
    return f"{folder}/{base}".lstrip("/"), extension.lower()


def _members(path: str) -> Iterator[tuple[str, bytes | Bad]]:
    """Yield the name and the data of every member of interest; ("", Bad) where the tar itself breaks off."""
    last = None
    try:
        # ignore_zeros: skip blocks that are no header instead of stopping
        with tarfile.open(path, "r:", ignore_zeros=True, errors="surrogateescape") as tar:
            for last in _forward(tar, os.path.getsize(path)):
                if not last.isdir() and _split(last.name)[1] in KINDS:
                    yield last.name.encode("utf-8", "backslashreplace").decode(), _data(tar, last)
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as e:
        yield "", Bad("unreadable tar", f"breaks off: {e}")
    else:
        if last is None:
            yield "", Bad("unreadable tar", "no member in it; a compressed tar must be unpacked to .tar")


def _forward(tar: tarfile.TarFile, size: int) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar of `size` bytes, going on at the next header behind one whose own size is wrong.

    A negative size would send tarfile back to an earlier member, for ever (CVE-2025-8194).
    """
    for member in tar:
        tar.members.clear()  # tarfile keeps every header otherwise
        yield member
        if tar.offset < member.offset_data or tar.offset > size:
            tar.offset = member.offset_data


def _data(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | Bad:
    if not member.isreg() or member.issparse():
        return Bad("unreadable tar member", f"{member.name[-60:]}: a link, device or sparse file")
    limit = pictures.MAX_BYTES if _split(member.name)[1] in PICTURES else MAX_TEXT
    if not 0 <= member.size <= limit:
        return Bad("unreadable tar member", f"{member.name[-60:]}: {member.size} bytes, limit {limit}")
    try:
        return tar.extractfile(member).read()
    except (tarfile.TarError, OSError, EOFError, ValueError) as e:
        return Bad("unreadable tar member", f"{member.name[-60:]}: {e}")


def _example(members: dict[str, bytes | Bad], key: str, text: str) -> Example:
    """Return the example of one group of members.

    Raises:
      Bad: the first thing that is wrong with it.
    """
    for value in members.values():
        if isinstance(value, Bad):
            raise value
    row = metadata.load_json(members["json"]) if "json" in members else {}
    if "url" in row:
        row.setdefault("source", row.pop("url"))
    column = text or ("text" if "text" in row and "caption" not in row else "caption")
    if "txt" in members:
        row[column] = metadata.decode_text(members["txt"])
    picture = next((members[kind] for kind in PICTURES if kind in members), None)
    if picture is None:
        raise Bad("missing file", f"no {', '.join(PICTURES)} member")
    row.pop("parts", None)  # an img2dataset column of that name is no document
    return sources_folder.to_example(row, key, key, column, "", lambda _: picture)
