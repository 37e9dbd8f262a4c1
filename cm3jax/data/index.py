"""index.json: the size and the count of every shard file as it was written, to check them all before work on them.

    {"train": {"train-00000-of-00002.array_record": [bytes, records], ...}, ...}

A count is an array_record's number of records, or the length of a .npy: documents (lengths, keys) or tokens (ids).
Training finds a lost shard only when a row needs it, hours later; a folder that is copied or mounted loses some.
"""

import concurrent.futures
import io
import json
import pathlib
import re
import threading

import numpy as np

from cm3jax.data import shards
from cm3jax.types import UserError

FILE = "index.json"
ARRAYS = re.compile(r"(?P<split>.+)-\d{5}-of-\d{5}(\.\w+)?\.npy")
"""Shards of .npy: one file, or one of each kind, such as `.ids.npy`."""
AT_ONCE = 32
"""Files looked at at one time: a look is mostly waiting, on a network disk for milliseconds."""
PARSING = threading.Lock()
"""numpy reads headers by `ast`, which fails now and then in two threads at once (3.11.7; compare CPython gh-106905)."""
NAMED = 3
"""Faults that the message names; the others are counted."""

Index = dict[str, dict[str, list[int]]]


def make(folder) -> Index:
    """Return the index of the shards of a folder as they are now."""
    folder = pathlib.Path(folder)
    paths = [path for path in sorted(folder.iterdir()) if split(path.name)]
    found: Index = {}
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        for path, numbers in zip(paths, pool.map(measure, paths), strict=True):
            found.setdefault(split(path.name), {})[path.name] = numbers
    return found


def split(name: str) -> str:
    """Return the split that a shard file belongs to; "" if it is none."""
    match = shards.NAME.fullmatch(name) or ARRAYS.fullmatch(name)
    return match["split"] if match else ""


def measure(path: pathlib.Path) -> list[int]:
    """Return [bytes, count] of one shard file.

    Raises:
      UserError: if its count cannot be read.
    """
    return [path.stat().st_size, count(path)]


def count(path: pathlib.Path) -> int:
    if path.suffix == ".array_record":
        return shards.count(path)
    try:
        with open(path, "rb") as file:
            head = io.BytesIO(file.read(4096))
        with PARSING:
            np.lib.format.read_magic(head)
            return np.lib.format.read_array_header_1_0(head)[0][0]
    except (OSError, ValueError) as e:
        raise UserError(f"{str(path)!r}: not a .npy file ({e})") from None


def write(folder) -> Index:
    """Write the index of a folder's shards, and return it."""
    found, path = make(folder), pathlib.Path(folder) / FILE
    partial = path.with_name(f".{FILE}.partial")
    partial.write_text(json.dumps(found, indent=0) + "\n")
    partial.replace(path)
    return found


def read(folder) -> Index:
    """Return the index of a folder.

    Raises:
      UserError: if there is none, or it is not what `write` wrote.
    """
    path = pathlib.Path(folder) / FILE
    try:
        found = json.loads(path.read_text())
        return {split: {name: [int(n), int(c)] for name, (n, c) in files.items()} for split, files in found.items()}
    except FileNotFoundError:
        raise UserError(
            f"{str(folder)!r}: no {FILE} in it, so that nobody knows which shards belong there; make the stage again"
            " (--redo)"
        ) from None
    except (OSError, ValueError, TypeError, AttributeError) as e:
        raise UserError(f"{str(path)!r}: not readable ({e}); make the stage again (--redo)") from None


def faults(folder) -> dict[str, str]:
    """Return {file name: what is wrong with it} of the shard files that are not as the index says."""
    folder, wanted = pathlib.Path(folder), read(folder)
    files = [(name, *numbers) for shards in wanted.values() for name, numbers in shards.items()]
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        found = pool.map(lambda file: fault(folder / file[0], *file[1:]), files)
        wrong = {name: text for (name, *_), text in zip(files, found, strict=True) if text}
    known = {name for name, *_ in files}
    surplus = [path.name for path in folder.iterdir() if split(path.name) and path.name not in known]
    return wrong | dict.fromkeys(sorted(surplus), "not in the index")


def fault(path: pathlib.Path, size: int, items: int) -> str:
    """Return what is wrong with one file, "" if nothing is."""
    try:
        here = path.stat().st_size
    except OSError as e:
        return "missing" if isinstance(e, FileNotFoundError) else str(e.strerror)
    if here != size:
        return f"{here:,} bytes instead of {size:,}"
    try:
        now = count(path)
    except UserError:
        return "unreadable"
    return "" if now == items else f"{now:,} items instead of {items:,}"


def check(folder, fix: str) -> Index:
    """Return the index of a folder all of whose shards are as it says.

    Args:
      fix: What to do about it, the end of the message.

    Raises:
      UserError: naming the files that are missing, short or hold another number of records.
    """
    found = read(folder)
    if wrong := faults(folder):
        named = ", ".join(f"{name} ({text})" for name, text in [*wrong.items()][:NAMED])
        more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        total = sum(map(len, found.values()))
        raise UserError(f"{str(folder)!r}: {len(wrong)} of {total} shard files are wrong: {named}{more}; {fix}")
    return found
