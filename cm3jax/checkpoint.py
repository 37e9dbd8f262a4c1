"""Checkpoints: FOLDER/checkpoints/STEP, written by orbax in the background.

A checkpoint has two items: `state`, the whole training state as arrays, and `meta`, JSON. It is restored into a tree of
shapes with shardings, so the mesh may be another than the one that saved it; `load_params` reads the weights alone.
"""

import logging
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

import cm3jax.trees as trees
from cm3jax.types import UserError

STATE, META = "state", "meta"


class Damaged(UserError):
    """A checkpoint whose files cannot be read; the one before it may be whole."""


def open(folder, keep: int = 2) -> ocp.CheckpointManager:
    """Return orbax's manager of FOLDER/checkpoints, which it creates; the latest `keep` are kept (0: all)."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax tells every save in ten lines
    path = pathlib.Path(folder).absolute() / "checkpoints"
    options = ocp.CheckpointManagerOptions(max_to_keep=keep or None, cleanup_tmp_directories=True, create=True)
    return ocp.CheckpointManager(path, options=options, item_names=(STATE, META))


def save(manager: ocp.CheckpointManager, step: int, state, meta: dict[str, Any]) -> None:
    """Start to write a checkpoint; arrays are copied before this returns, so the state may be donated.

    Checkpoints of this step or later go: a run meets such only after it went back behind one that was damaged.
    """
    for later in [s for s in manager.all_steps() if s >= step]:
        manager.delete(later)
    args = ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(meta))
    if not manager.save(step, args=args, force=True):
        raise RuntimeError(f"orbax did not save step {step} in {manager.directory}")


def steps(folder) -> list[int]:
    """Return the steps of the finished checkpoints of a stage's folder, ascending; [] if there are none."""
    path = pathlib.Path(folder) / "checkpoints"
    return sorted(int(p.name) for p in path.iterdir() if p.name.isdigit()) if path.is_dir() else []


def load_meta(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """Return the JSON saved with a checkpoint."""
    try:
        return manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))[META]
    except Exception as e:
        raise Damaged(_unreadable(manager.directory, step, e)) from e


def restore(manager: ocp.CheckpointManager, step: int, target):
    """Return the state of a checkpoint.

    Args:
      manager: From `open`.
      step: One of the manager's.
      target: Tree of `jax.ShapeDtypeStruct` with shardings, in the structure of the saved state.

    Raises:
      UserError: if a parameter is missing or has another shape, naming it.
      Damaged: if the files cannot be read.
    """
    path = pathlib.Path(manager.directory) / str(step) / STATE
    _check(_saved(path), target, path)
    try:
        return _read(path, target)
    except Exception as e:
        raise Damaged(_unreadable(manager.directory, step, e)) from e


def load_params(folder, prefer_ema: bool = True, step: int | None = None, target=None):
    """Return the weights of a trained stage, on any host and without knowing its optimizer.

    Args:
      folder: The stage's folder.
      prefer_ema: Take the averaged weights (extra["ema"]) where the checkpoint has them.
      step: Which checkpoint; None: the latest.
      target: Tree of `jax.ShapeDtypeStruct` that the weights must match, with shardings or else for this host's first
        device; None: whatever the checkpoint holds, as numpy arrays.

    Raises:
      UserError: if there is no such checkpoint, or a parameter is missing or has another shape.
      Damaged: if the files cannot be read.
    """
    found = steps(folder)
    if not found or (step is not None and step not in found):
        which = f"step {step}, only {found}" if found else "checkpoint"
        raise UserError(f"{str(folder)!r}: no {which}; train this stage first, or correct the path")
    path = pathlib.Path(folder).absolute() / "checkpoints" / str(found[-1] if step is None else step) / STATE
    saved = _saved(path)
    where = ("extra", "ema") if prefer_ema and "ema" in (saved.get("extra") or {}) else ("params",)
    weights = _at(saved, where)
    if target is None:
        target = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), weights)
    _check(weights, target, path)
    try:
        return _at(_read(path, _under(target, where), partial=True), where)
    except Exception as e:
        raise Damaged(_unreadable(path.parent.parent, int(path.parent.name), e)) from e


def _saved(path: pathlib.Path) -> dict[str, Any]:
    """Return the tree of what a checkpoint holds: leaves have .shape and .dtype."""
    try:
        tree = ocp.PyTreeCheckpointHandler().metadata(path).tree
    except Exception as e:
        raise Damaged(_unreadable(path.parent.parent, int(path.parent.name), e)) from e
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
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(path, args=args)


def _at(tree, where: tuple[str, ...]):
    for name in where:
        tree = tree[name]
    return tree


def _under(tree, where: tuple[str, ...]):
    for name in reversed(where):
        tree = {name: tree}
    return tree


def _unreadable(folder, step: int, error: Exception) -> str:
    text = " ".join(str(error).split())[:120]
    path = pathlib.Path(folder) / str(step)
    return f"checkpoint {str(path)!r} cannot be read ({type(error).__name__}: {text}); delete it to use the one before"
