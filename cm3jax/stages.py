"""What a stage leaves on disk: `stage.json`, which says what it was made from, so that a later run knows what is stale.

A stage is skipped only if its settings and its inputs are those of the record and its files are all there. Settings
that differ stop the run; an unfinished stage continues.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import threading
import time
from typing import Any

import psutil

from cm3jax.types import UserError

FILE = "stage.json"
INTERVALS = {"log_every", "evaluate_every", "evaluate_batches", "sample_every", "save_every", "keep"}
VOLATILE = INTERVALS | {"workers", "mesh", "accumulate", "profile"}
"""Settings that may change between two runs of a stage: they steer how it runs, not what comes out."""
VOLATILE_PATHS = {"decoder.model.attention", "decoder.model.remat", "decoder.loss_chunk", "bank.shard"}
"""More of these, by their whole name."""
LOGS = ("metrics.jsonl", "events.out.tfevents", FILE)
ASIDE = {"samples", "profile"}
"""Folders of pictures and traces that are no result."""
BLOCK = 64 * 1024
GIB = 2.0**30


@dataclasses.dataclass
class Record:
    """The content of a stage.json."""

    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    hash: str = ""
    """Digest of the settings in `config` that decide the result."""
    inputs: dict[str, str] = dataclasses.field(default_factory=dict)
    """Fingerprint of each input's result when the stage began."""
    complete: bool = False
    result: str = ""
    """Fingerprint of the finished result."""
    files: dict[str, int] = dataclasses.field(default_factory=dict)
    """Bytes of each file of the finished result."""
    seconds: float = 0.0
    """Wall-clock time, added up over interruptions."""
    peak_memory_gib: float = 0.0
    """Largest resident memory of the process and its children together; shared pages count once per process."""
    imported: str = ""
    """What it was imported from; it has no inputs then, and `config` only what the import decides."""
    device_seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    """Seconds times the devices that the run held, by their kind as jax names it; {}: none, or not counted."""


def read(folder: pathlib.Path) -> Record | None:
    """Return the record of a stage's folder, or None if it has none.

    Raises:
      UserError: if the file is not what this program writes.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        return Record(**json.loads(path.read_text()))
    except (ValueError, TypeError) as e:
        raise UserError(f"{path}: not readable ({e}); delete the folder {folder} to make the stage again") from None


def write(folder: pathlib.Path, record: Record) -> None:
    """Write stage.json in one step, so that a kill never leaves half of one."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / FILE, json.dumps(dataclasses.asdict(record), indent=1) + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
    """Replace a file's content in one step."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


# ----------------------------------------------------------------------------------------------------- what has changed


def significant(settings, where: str = ""):
    """Return settings (JSON types) without those that do not decide the result; `where` is their place in a recipe."""
    if not isinstance(settings, dict):
        return settings
    paths = {k: f"{where}.{k}" if where else k for k in settings}
    return {
        k: significant(v, paths[k]) for k, v in settings.items() if k not in VOLATILE and paths[k] not in VOLATILE_PATHS
    }


def flatten(settings, where: str = "") -> dict[str, Any]:
    """Return {"decoder.training.steps": 100, ...}; lists are leaves."""
    if not isinstance(settings, dict):
        return {where: settings}
    dot = f"{where}." if where else ""
    return {name: value for k, v in settings.items() for name, value in flatten(v, f"{dot}{k}").items()}


def differences(old, new) -> list[tuple[str, Any, Any]]:
    """Return (field, old value, new value) of every significant setting that differs; an absent one is "(absent)".

    A setting of `config.later` at its default is in neither, so that what was made before it existed is not stale.
    """
    old, new = flatten(significant(old)), flatten(significant(new))
    pairs = [(name, old.get(name, "(absent)"), new.get(name, "(absent)")) for name in {**old, **new}]
    return [(name, a, b) for name, a, b in pairs if a != b]


def common(old, new):
    """Return `new` without the settings that `old` has not."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return {k: common(old[k], v) for k, v in new.items() if k in old}


def describe(changed: list[tuple[str, Any, Any]]) -> str:
    """Return "decoder.training.steps was 100 and is now 200 (and 2 more fields changed)"."""
    name, old, new = changed[0]
    more = f" (and {len(changed) - 1} more fields changed)" if len(changed) > 1 else ""
    return f"{name} was {json.dumps(old)} and is now {json.dumps(new)}{more}"


# --------------------------------------------------------------------------------------------------------- fingerprints


def files(run: pathlib.Path, output: str) -> dict[str, int]:
    """Return {path below the run: bytes} of all files of a result; logs, samples and hidden files are none."""
    paths = [p for p in (run / output).rglob("*") if p.is_file() and counts(p.relative_to(run))]
    return {str(p.relative_to(run)): p.stat().st_size for p in sorted(paths)}


def counts(path: pathlib.Path) -> bool:
    """Return whether a file belongs to a result."""
    return not path.name.startswith(LOGS) and not any(p in ASIDE or p.startswith(".") for p in path.parts)


def missing(run: pathlib.Path, record: Record) -> str:
    """Return what is wrong with the files of a finished stage, "" if nothing is."""
    for name, size in record.files.items():
        path = run / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return ""


def fingerprint(run: pathlib.Path, names) -> str:
    """Return a digest of files: names, sizes, and up to 16 blocks of 64 KiB spread over each.

    Reading a terabyte of shards to its end would cost more than the stage that it guards.
    """
    digest = hashlib.sha256()
    for name in sorted(names):
        size = (run / name).stat().st_size
        digest.update(f"{name}\0{size}\0".encode())
        with open(run / name, "rb") as f:
            spread = range(0, size, BLOCK) if size <= 16 * BLOCK else [i * (size - BLOCK) // 15 for i in range(16)]
            for start in spread:
                f.seek(start)
                digest.update(f.read(BLOCK))
    return digest.hexdigest()[:16]


# --------------------------------------------------------------------------------------------------- while a stage runs


def memory() -> int:
    """Return the resident bytes of this process and all its children."""
    this, total = psutil.Process(), 0
    for process in [this, *this.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            total += process.memory_info().rss
    return total


@contextlib.contextmanager
def measured(
    folder: pathlib.Path,
    record: Record,
    every: float = 10.0,
    sample: float = 0.25,
    devices: dict[str, int] | None = None,
):
    """Keep `record.seconds`, `.device_seconds` (of so many `devices`) and `.peak_memory_gib` true while a stage runs.

    The record is written every `every` seconds, so that a kill loses no more time than that; memory is looked at
    every `sample` seconds.
    """
    before, start, stop = record.seconds, time.monotonic(), threading.Event()
    held, kinds = dict(record.device_seconds), devices or {}

    def look():
        took = time.monotonic() - start
        record.seconds = round(before + took, 2)
        record.device_seconds = held | {kind: round(held.get(kind, 0.0) + n * took, 2) for kind, n in kinds.items()}
        record.peak_memory_gib = round(max(record.peak_memory_gib, memory() / GIB), 3)

    def watch():
        written = start
        while not stop.wait(sample):
            look()
            if time.monotonic() - written >= every:
                written = time.monotonic()
                write(folder, record)

    look()
    write(folder, record)
    thread = threading.Thread(target=watch, name="stage-clock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        look()
        write(folder, record)


class Locked(UserError):
    """Another process works in the run folder."""


@contextlib.contextmanager
def locked(run: pathlib.Path):
    """Hold the run folder for this process; the lock goes with the process, however it ends.

    Raises:
      Locked: if another process holds it.
      UserError: if the folder cannot be made.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = open(run / ".lock", "a")  # noqa: SIM115 (closed below; `with` would hide the error's cause)
    except OSError as e:
        raise UserError(f"run folder {str(run)!r}: {e.strerror}; choose another folder") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Locked(f"run folder {str(run)!r}: another cm3jax is working in it; wait, or use --out") from None
        yield


def remove(path: pathlib.Path) -> None:
    """Delete a file or folder if it is there; of a link, the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def summary(run: pathlib.Path, folders: dict[str, str]) -> dict[str, Any]:
    """Return {"seconds": {stage: s}, "peak_memory_gib": largest} of the stages {name: folder} made so far."""
    records = {name: record for name, folder in folders.items() if (record := read(run / folder))}
    return {
        "seconds": {name: record.seconds for name, record in records.items()},
        "peak_memory_gib": max((record.peak_memory_gib for record in records.values()), default=0.0),
    }
