"""Checkpoints: FOLDER/checkpoints/STEP, written by orbax in the background.

A checkpoint has two items: `state`, the whole training state as arrays, and `meta`, JSON. It is restored into a tree of
shapes with shardings, so the mesh and the number of hosts may be others than those that saved it; `load_params` reads
the weights alone.

Once orbax has written all files of a checkpoint, the lead host reads them back and writes `manifest.json` beside them:
size and CRC32C of each, and of itself. A folder without a manifest is a save that did not end, and counts for nothing.
Nothing is read from a checkpoint whose files are not its manifest's: orbax itself restores flipped bits silently.
"""

import concurrent.futures
import hashlib
import json
import logging
import os
import pathlib
import shutil
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import google_crc32c
import jax
import numpy as np
import orbax.checkpoint as ocp

import cm3jax.hosts as hosts
import cm3jax.trees as trees
from cm3jax.types import UserError

STATE, META, MANIFEST = "state", "meta", "manifest.json"
BLOCK = 2**22
"""Bytes read at one time for a checksum."""
READERS = 8
"""Files read at one time: storage on a network is slow one by one."""
UNFINISHED = ".orbax-checkpoint-tmp"
"""What orbax adds to the name of a folder until all is in it."""


class Damaged(UserError):
    """A checkpoint whose files are not those that were saved; the one before it may be whole."""


class Saver:
    """The checkpoints of one stage: what `open` returns and `save` writes to.

    Attributes:
      directory: FOLDER/checkpoints.
      keep: How many are kept, the latest ones; 0: all.
      say: Told in a line when a save begins and when it is committed.
    """

    def __init__(self, directory: pathlib.Path, keep: int, say: Callable[[str], Any]):
        self.directory, self.keep, self.say = directory, keep, say
        self.writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        self.whole: set[int] = set()  # steps whose files have been checked

    def wait(self) -> None:
        """Wait until what was begun is committed, on all hosts, which call this together."""
        self.join()
        hosts.barrier("checkpoint committed")

    def close(self) -> None:
        """Wait until what was begun is committed; the saver is used no more."""
        try:
            self.join()
        finally:
            self.writer.close()

    def join(self) -> None:
        """Wait until what was begun is committed, as far as this host is concerned."""
        if self.thread:
            self.thread.join()
            self.thread = None
        if error := self.error:
            self.error = None
            raise error

    def commit_later(self, step: int) -> None:
        """Write the manifest of a step, in a thread, as soon as orbax is done with its files."""
        begun = time.monotonic()

        def work():
            try:
                self.writer.wait_until_finished()
                if hosts.lead():
                    size = commit(self.directory / str(step))
                    self.say(f"step {step}: checkpoint committed, {size:,} bytes in {time.monotonic() - begun:.1f} s")
                    for old in steps(self.directory.parent)[: -self.keep] if self.keep else []:
                        _remove(self.directory / str(old))
            except BaseException as e:
                self.error = e

        self.thread = threading.Thread(target=work, name="checkpoint-commit")
        self.thread.start()


def open(folder, keep: int = 2, say: Callable[[str], Any] = lambda line: None) -> Saver:
    """Return what writes and reads FOLDER/checkpoints, which this creates; the latest `keep` are kept (0: all)."""
    quiet()
    path = pathlib.Path(folder).absolute() / "checkpoints"
    path.mkdir(parents=True, exist_ok=True)
    if hosts.lead():
        for partial in path.glob(f"*{UNFINISHED}*"):
            shutil.rmtree(partial)
    return Saver(path, keep, say)


def quiet() -> None:
    """Keep orbax from telling every save in ten lines."""
    logging.getLogger("absl").setLevel(logging.ERROR)


def save(saver: Saver, step: int, state, meta: dict[str, Any]) -> None:
    """Start to write a checkpoint; arrays are copied before this returns, so the state may be donated.

    Checkpoints of this step or later go, and saves that did not end: a run meets such only after it went back. All
    hosts call this together.
    """
    saver.join()
    saver.whole.clear()
    if hosts.lead():
        for old in {*uncommitted(saver), *(s for s in steps(saver.directory.parent) if s >= step)}:
            _remove(saver.directory / str(old))
        saver.say(f"step {step}: checkpoint save started")
    args = ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(meta))
    saver.writer.save(saver.directory / str(step), args=args)
    saver.commit_later(step)


def steps(folder) -> list[int]:
    """Return the steps of the committed checkpoints of a stage's folder, ascending; [] if there are none."""
    path = pathlib.Path(folder) / "checkpoints"
    found = [p for p in path.iterdir() if p.name.isdigit()] if path.is_dir() else []
    return sorted(int(p.name) for p in found if (p / MANIFEST).is_file())


def identity(folder, step: int) -> str:
    """Return the SHA-256 of a committed checkpoint's manifest, which has the checksums of all its files."""
    return hashlib.sha256((pathlib.Path(folder) / "checkpoints" / str(step) / MANIFEST).read_bytes()).hexdigest()


def candidates(saver: Saver) -> list[int]:
    """Return the committed steps, the latest first, as the lead host sees them; all hosts call this together."""
    return hosts.leads(sorted(steps(saver.directory.parent), reverse=True))


def uncommitted(saver: Saver) -> list[int]:
    """Return the steps of saves that did not end."""
    found = {int(p.name) for p in saver.directory.iterdir() if p.name.isdigit()}
    return sorted(found - set(steps(saver.directory.parent)))


def load_meta(saver: Saver, step: int) -> dict[str, Any]:
    """Return the JSON saved with a checkpoint, once its files are checked; all hosts call this together.

    Raises:
      Damaged: on all hosts, if a file is not the one that was saved.
    """
    check(saver, step)
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            return reader.restore(saver.directory / str(step) / META)
    except Exception as e:
        raise Damaged(_unreadable(saver.directory / str(step), e)) from e


def restore(saver: Saver, step: int, target):
    """Return the state of a checkpoint, once its files are checked; all hosts call this together.

    Args:
      saver: From `open`.
      step: One of `candidates`.
      target: Tree of `jax.ShapeDtypeStruct` with shardings, in the structure of the saved state.

    Raises:
      UserError: if a parameter is missing or has another shape, naming it.
      Damaged: on all hosts, if a file is not the one that was saved.
    """
    check(saver, step)
    path = saver.directory / str(step) / STATE
    _check(_saved(path), target, path)
    try:
        return _read(path, target)
    except Exception as e:
        raise Damaged(_unreadable(path.parent, e)) from e


def load_params(folder, prefer_ema: bool = True, step: int | None = None, target=None, stored: bool = False):
    """Return the weights of a trained stage, on any host and without knowing its optimizer.

    Args:
      folder: The stage's folder.
      prefer_ema: Take the averaged weights (extra["ema"]) where the checkpoint has them.
      step: Which checkpoint; None: the latest.
      target: Tree of `jax.ShapeDtypeStruct` that the weights must match, with shardings or else for this host's first
        device; None: whatever the checkpoint holds, as numpy arrays.
      stored: Leave each weight in the type that it was saved in, whatever the target's.

    Raises:
      UserError: if there is no such checkpoint, or a parameter is missing or has another shape.
      Damaged: if a file is not the one that was saved.
    """
    path, where, weights = _weights(folder, prefer_ema, step)
    if target is None:
        target = jax.tree.map(_plain, weights)
    _check(weights, target, path)
    if stored:
        target = jax.tree.map(lambda x, saved: x.update(dtype=saved.dtype), target, weights)
    return _part(path, where, target)


class Stored(NamedTuple):
    """An array in a checkpoint."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def open_params(folder, prefer_ema: bool = True, step: int | None = None) -> dict[str, Stored]:
    """Return the weights that `load_params` gives, by path, "a/b/c": each is read when it is asked for, and not kept.

    Raises:
      UserError, Damaged: as `load_params`; all files are checked at once.
    """
    path, where, weights = _weights(folder, prefer_ema, step)

    def one(name: str, leaf) -> Stored:
        place = tuple(name.split("/"))
        read = lambda: _at(_part(path, where, _under(_plain(leaf), place)), place)  # noqa: E731
        return Stored(tuple(leaf.shape), np.dtype(leaf.dtype), read)

    return {name: one(name, leaf) for name, leaf in trees.named_leaves(weights).items()}


def _weights(folder, prefer_ema: bool, step: int | None) -> tuple[pathlib.Path, tuple[str, ...], Any]:
    """Return the folder of a checkpoint's state, where in it the weights are, and their shapes and types."""
    found = steps(folder)
    if not found or (step is not None and step not in found):
        which = f"step {step}, only {found}" if found else "checkpoint"
        raise UserError(f"{str(folder)!r}: no {which}; train this stage first, or correct the path")
    path = pathlib.Path(folder).absolute() / "checkpoints" / str(found[-1] if step is None else step) / STATE
    if fault := _fault(path.parent):
        raise Damaged(_damaged(path.parent, fault))
    saved = _saved(path)
    where = ("extra", "ema") if prefer_ema and "ema" in (saved.get("extra") or {}) else ("params",)
    return path, where, _at(saved, where)


def _plain(leaf) -> np.ndarray:
    """Return what stands for a numpy array of this shape and type, without its memory."""
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)


def _part(path: pathlib.Path, where: tuple[str, ...], target):
    """Return what lies at a place of a checkpoint's state, as `target` has it."""
    try:
        return _at(_read(path, _under(target, where), partial=True), where)
    except Exception as e:
        raise Damaged(_unreadable(path.parent, e)) from e


def _saved(path: pathlib.Path) -> dict[str, Any]:
    """Return the tree of what a checkpoint holds: leaves have .shape and .dtype."""
    try:
        tree = ocp.PyTreeCheckpointHandler().metadata(path).tree
    except Exception as e:
        raise Damaged(_unreadable(path.parent, e)) from e
    if not isinstance(tree, dict) or "params" not in tree:
        raise Damaged(f"checkpoint {str(path.parent)!r}: holds no training state; it is not one of cm3jax's")
    return tree


def _check(saved, target, path: pathlib.Path) -> None:
    """Raise a UserError that names the first parameter by which two trees differ."""
    have, want = trees.named_leaves(saved), trees.named_leaves(target)
    missing, extra = sorted(set(want) - set(have)), sorted(set(have) - set(want))
    hint = "the config is not the one it was trained with"
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"has {extra[0]}, which the model lacks"
        raise UserError(f"checkpoint {str(path.parent)!r} {what}: {hint}")
    for name, leaf in want.items():
        if tuple(have[name].shape) != tuple(leaf.shape):
            shapes = f"shape {tuple(have[name].shape)}, the model {tuple(leaf.shape)}"
            raise UserError(f"checkpoint {str(path.parent)!r}: {name} has {shapes}: {hint}")


def _read(path: pathlib.Path, target, partial: bool = False):
    """Return the arrays at `path` in the structure, types and shardings of `target`."""

    def how(leaf):
        if isinstance(leaf, np.ndarray):
            return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
        sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype)

    args = ocp.args.PyTreeRestore(item=target, restore_args=jax.tree.map(how, target), partial_restore=partial)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(), multiprocessing_options=_alone(target)) as reader:
        return reader.restore(path, args=args)


def _alone(target) -> ocp.options.MultiprocessingOptions:
    """Return orbax's options for a reading in which it may wait for other hosts only if they read the arrays too."""
    shared = [s for x in jax.tree.leaves(target) if (s := getattr(x, "sharding", None)) and not s.is_fully_addressable]
    if shared or hosts.count() == 1:
        return ocp.options.MultiprocessingOptions()
    here = hosts.index()
    return ocp.options.MultiprocessingOptions(primary_host=here, active_processes={here})


def _at(tree, where: tuple[str, ...]):
    for name in where:
        tree = tree[name]
    return tree


def _under(tree, where: tuple[str, ...]):
    for name in reversed(where):
        tree = {name: tree}
    return tree


def _unreadable(path: pathlib.Path, error: Exception) -> str:
    text = " ".join(str(error).split())[:120]
    return f"checkpoint {str(path)!r} cannot be read ({type(error).__name__}: {text}); delete it to use the one before"


def _damaged(path: pathlib.Path, fault: str) -> str:
    return f"checkpoint {str(path)!r} is damaged: {fault}; delete it to use the one before"


# ------------------------------------------------------------------------------------------------------------ manifests


def check(saver: Saver, step: int) -> None:
    """Compare a checkpoint's files with its manifest, each host its share of them; all hosts call this together.

    Raises:
      Damaged: on all hosts, naming the file, what was expected and what was found.
    """
    if step in saver.whole:
        return
    path = saver.directory / str(step)
    faults = hosts.gathered(_fault(path, hosts.index(), hosts.count()))
    for number, fault in enumerate(faults):
        if fault:
            raise Damaged(_damaged(path, f"host {number} finds that {fault}" if len(faults) > 1 else fault))
    saver.whole.add(step)


def commit(path: pathlib.Path) -> int:
    """Write the manifest of a checkpoint's folder, in one step; return the bytes of all its files."""
    names = sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file() and p.name != MANIFEST)
    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        found = dict(zip(names, pool.map(lambda name: _measure(path / name), names), strict=True))
    partial = path / f".{MANIFEST}.partial"
    partial.write_text(_render(found))
    os.replace(partial, path / MANIFEST)
    return sum(size for size, _ in found.values())


def _render(found: dict[str, tuple[int, str]]) -> str:
    """Return the text of a manifest, which ends with its own checksum."""
    crc = google_crc32c.value(json.dumps(found, sort_keys=True).encode())
    return json.dumps({"files": found, "crc32c": _hex(crc)}, indent=0) + "\n"


def _fault(path: pathlib.Path, first: int = 0, every: int = 1) -> str:
    """Return what is wrong with every `every`-th file of a checkpoint from the `first` on, "" if nothing is."""
    try:
        text = (path / MANIFEST).read_bytes()
        files = {name: (size, crc) for name, (size, crc) in json.loads(text)["files"].items()}
        if _render(files).encode() != text:
            raise ValueError("it does not have its own checksum")
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        return f"{MANIFEST} is not what was written ({type(e).__name__}: {' '.join(str(e).split())[:80]})"
    names = sorted(files)[first::every]
    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        return next(filter(None, pool.map(lambda name: _differs(path / name, name, *files[name]), names)), "")


def _differs(path: pathlib.Path, name: str, size: int, crc: str) -> str:
    """Return how a file differs from its entry in the manifest, "" if it does not."""
    try:
        found = path.stat().st_size
        if found != size:
            return f"{name} has {found} bytes, expected {size}"
        if (now := _measure(path)[1]) != crc:
            return f"{name} has crc32c {now}, expected {crc}"
    except FileNotFoundError:
        return f"{name} is missing, expected {size} bytes"
    except OSError as e:
        return f"{name} cannot be read ({e.strerror}), expected {size} bytes"
    return ""


def _measure(path: pathlib.Path) -> tuple[int, str]:
    """Return size and CRC32C of a file."""
    size, crc = 0, 0
    with path.open("rb") as f:
        while block := f.read(BLOCK):
            size, crc = size + len(block), google_crc32c.extend(crc, block)
    return size, _hex(crc)


def _hex(crc: int) -> str:
    return f"{crc:08x}"


def _remove(path: pathlib.Path) -> None:
    """Delete a checkpoint, its manifest first: half of one must not count as whole."""
    (path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path)
