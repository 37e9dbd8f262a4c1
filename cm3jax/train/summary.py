"""What a training says of itself before its first step: the mesh, each host's rows, each chip's bytes."""

import math
from typing import Any

import jax

from cm3jax import config as configs
from cm3jax import sharding, trees

PARTS = {"params": "parameters", "opt_state": "optimizer state", "extra": "other state"}
"""Fields of the state that hold arrays, and what the table calls them."""
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def table(abstract: Any, mesh: jax.sharding.Mesh, training: configs.Training, step: int = 0) -> str:
    """Return the table that is printed once, at the start.

    Args:
      abstract: The state's shapes with their shardings, unboxed (`loop.Compiled.abstract`).
      mesh: From `sharding.mesh`.
      training: Batch, accumulation, steps.
      step: Where the training goes on.
    """
    rows = [
        ("devices", devices(mesh)),
        ("mesh", " x ".join(f"{name} {size}" for name, size in mesh.shape.items())),
        ("batch", batch(mesh, training)),
        *((PARTS[name], size(getattr(abstract, name))) for name in PARTS if jax.tree.leaves(getattr(abstract, name))),
        ("steps", f"{step} of {training.steps} done"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join([f"{trees.size(abstract.params):,} parameters", *(f"  {a:{width}}  {b}" for a, b in rows)])


def devices(mesh: jax.sharding.Mesh) -> str:
    """Return "512 x TPU v5 lite, 128 hosts, 2 slices"."""
    found = list(mesh.devices.flat)
    hosts, slices = len({d.process_index for d in found}), sharding.slices(found)
    parts = [f"{len(found)} x {found[0].device_kind}", f"{hosts} host{'s' * (hosts > 1)}"]
    return ", ".join(parts + ([f"{slices} slices"] if slices > 1 else []))


def batch(mesh: jax.sharding.Mesh, training: configs.Training) -> str:
    """Return "2048 rows a step, 16 per host; 4 at a time on each chip, one after another in 2 parts"."""
    hosts = sharding.host_share(mesh)[1]
    ways = mesh.shape["replica"] * mesh.shape["fsdp"]
    one = training.batch // ways // training.accumulate
    parts = f", one after another in {training.accumulate} parts" if training.accumulate > 1 else ""
    shared = f" {mesh.shape['tensor']} chips" if mesh.shape["tensor"] > 1 else " chip"
    return f"{training.batch} rows a step, {training.batch // hosts} per host; {one} at a time on each{shared}{parts}"


def size(tree: Any) -> str:
    """Return "25.06 GiB in all, 100.2 MiB per chip"."""
    return f"{show(trees.nbytes(tree))} in all, {show(bytes_per_chip(tree))} per chip"


def bytes_per_chip(tree: Any) -> int:
    """Return the bytes that one device holds of a tree of shapes with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def show(count: int) -> str:
    """Return 1536 as "1.5 KiB"."""
    power = min(int(math.log2(count) // 10), len(UNITS) - 1) if count else 0
    return f"{count / 2 ** (10 * power):.4g} {UNITS[power]}"
