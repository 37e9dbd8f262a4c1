"""The device mesh, the one table of sharding rules, and the strict reading of it.

A parameter is born with a logical name per dimension (`nn.with_logical_partitioning(init, ("embed", "mlp"))`); RULES
says which mesh axes a name is split over. flax's own reading of such a table replicates an unknown name and drops a
doubled mesh axis without a word, so it is not used: here both are errors, and so is a dimension that does not divide.

The boxes that carry the names ride along in everything that is made from the parameters (optimizer state, EMA), so one
walk over the abstract state finds every sharding; `unbox` then leaves plain arrays.
"""

import contextlib
import functools
import math
from typing import Any

import jax
import numpy as np
from flax.core import meta
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import cm3jax.config as configs
import cm3jax.trees as trees
from cm3jax.types import UserError

AXES = ("replica", "fsdp", "tensor")

RULES: dict[str, tuple[str, ...]] = {
    # parameters
    "embed": ("fsdp",),  # the width of matrices: gathered layer by layer
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head": (),
    "mlp": ("tensor",),
    "vocab": ("tensor", "fsdp"),  # never split a table over its width too: XLA then rematerialises the whole of it
    "table_width": (),
    "position": (),
    "layer": (),
    "conv_in": (),
    "conv_out": (),
    "norm": (),
    # activations
    "batch": ("replica", "fsdp"),
    "seq": (),
    "width": (),
    "act_heads": ("tensor",),
    "act_mlp": ("tensor",),
    "vocab_out": ("tensor",),
}
"""Logical name of a dimension -> mesh axes that it is split over; () keeps it whole."""

REPLICATED = frozenset({"conv_in", "conv_out", "norm"})
"""Names of parameters that are meant to be whole on every device, however large."""

REPLICATED_LIMIT = 2**22
"""Scalars of the largest array that may be whole on every device of a mesh without such a name."""


# ---------------------------------------------------------------------------------------------------------------- mesh


def mesh(config: configs.Mesh, devices=None) -> Mesh:
    """Return the device mesh with axes replica, fsdp, tensor.

    A mesh of fixed size smaller than the machine takes the first devices (of one process only). Several TPU slices,
    which only the slow network of the data centre joins, are laid along replica, what is left of them along fsdp.

    Args:
      config: Sizes; at most one is -1, for "what is left".
      devices: Devices to use; None: all.

    Raises:
      UserError: if the sizes do not fit the devices or their network, or tensor would span slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = _sizes(config, len(devices), slices(devices))
    count = math.prod(sizes)
    if count < len(devices) and len({d.process_index for d in devices}) > 1:
        raise UserError(f"mesh {_text(sizes)} leaves out devices of other hosts: {len(devices)} devices; set one to -1")
    several = slices(devices[:count])
    split = {"allow_split_physical_axes": True}  # where no whole axes of the torus give the sizes, parts of them do
    try:
        if several > 1:
            found = mesh_utils.create_hybrid_device_mesh(*_over_slices(sizes, several), devices[:count], **split)
        else:
            found = mesh_utils.create_device_mesh(sizes, devices[:count], **split)
    except NotImplementedError as e:
        raise UserError(f"mesh {_text(sizes)} cannot be laid on the network of these {count} devices: {e}") from None
    return Mesh(found, AXES, axis_types=(AxisType.Auto,) * len(AXES))  # Explicit, a default, is not for linen modules


def mesh_of(tree) -> Mesh | None:
    """Return the mesh that a tree's arrays are laid out on; None if they are on none."""
    found = getattr(jax.tree.leaves(tree)[0], "sharding", None)
    return found.mesh if isinstance(found, NamedSharding) else None


def within(mesh: Mesh | None):
    """Return the context in which `constrain` lays activations out on a mesh; None: it leaves them as they are."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def shares(mesh: Mesh | None) -> int:
    """Return over how many devices the rows of a batch are split: their number must be a multiple."""
    return 1 if mesh is None else _ways(mesh, RULES["batch"])


def filled(rows: int, mesh: Mesh | None) -> int:
    """Return a number of rows, raised to a multiple of the devices that share them."""
    return -(-rows // shares(mesh)) * shares(mesh)


@functools.cache  # every batch asks, and a pod has thousands of devices
def host_share(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
    """Return (i, n): a host brings the i-th of the n equal parts into which a batch's rows are split.

    Hosts over which one group of `tensor` devices lies hold the same rows, and bring the same part.

    Args:
      process: The host's number; None: this one.

    Raises:
      UserError: if hosts hold a part of their rows in common.
    """
    process, held = jax.process_index() if process is None else process, {}
    for number, group in enumerate(mesh.devices.reshape(shares(mesh), -1)):
        for device in group:
            held.setdefault(device.process_index, set()).add(number)
    parts = sorted({tuple(sorted(numbers)) for numbers in held.values()})
    if len({len(part) for part in parts}) > 1 or sum(map(len, parts)) != shares(mesh):
        sizes = tuple(mesh.shape.values())
        raise UserError(f"mesh {_text(sizes)}: groups of {sizes[2]} devices lie across hosts unevenly; change tensor")
    return parts.index(tuple(sorted(held[process]))), len(parts)


def slices(devices) -> int:
    """Return the number of TPU slices that devices lie on; 1 for all other devices."""
    return len({getattr(d, "slice_index", None) for d in devices if d.platform == "tpu"}) or 1


def _over_slices(sizes: tuple[int, ...], count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the sizes within a slice and over the slices, whose products are `sizes`."""
    replica = math.gcd(sizes[0], count)
    fsdp = math.gcd(sizes[1], count // replica)
    if replica * fsdp != count:
        raise UserError(
            f"mesh {_text(sizes)} does not split over {count} slices: set mesh.replica to a multiple of {count}"
            " (0: one copy per slice); tensor must stay within one"
        )
    return (sizes[0] // replica, sizes[1] // fsdp, sizes[2]), (replica, fsdp, 1)


def _sizes(config: configs.Mesh, count: int, slices: int) -> tuple[int, ...]:
    """Return the three sizes with 0 and -1 resolved."""
    sizes = [config.replica or slices, config.fsdp, config.tensor]
    if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise UserError(f"mesh {_text(sizes)}: sizes must be at least 1, and one of them at most -1 (what is left)")
    fixed = math.prod(s for s in sizes if s != -1)
    if fixed > count or (-1 in sizes and count % fixed):
        raise UserError(f"mesh {_text(sizes)} does not fit {count} devices; change mesh.replica, .fsdp or .tensor")
    return tuple(count // fixed if s == -1 else s for s in sizes)


def _text(sizes) -> str:
    return " x ".join(f"{name}={size}" for name, size in zip(AXES, sizes, strict=True))


# --------------------------------------------------------------------------------------------------------------- specs


def spec(names, where: str = "") -> PartitionSpec:
    """Return the partition spec of an array whose dimensions have these logical names (None: kept whole).

    Raises:
      ValueError: on a name that RULES lacks, or a mesh axis that would split two dimensions.
    """
    unknown = [n for n in names if n is not None and n not in RULES]
    if unknown:
        raise ValueError(f"{_at(where)}unknown logical axis {unknown[0]!r}; sharding.RULES has {', '.join(RULES)}")
    axes = [RULES[n] if n is not None else () for n in names]
    flat = [a for dimension in axes for a in dimension]
    doubled = sorted({a for a in flat if flat.count(a) > 1})
    if doubled:
        raise ValueError(f"{_at(where)}axes {tuple(names)} split two dimensions over the mesh axis {doubled[0]!r}")
    return PartitionSpec(*((a[0] if len(a) == 1 else a) if a else None for a in axes))


def fit(mesh, names, shape, where: str = "") -> PartitionSpec:
    """Return `spec(names)` checked against a shape and the sizes of a mesh (concrete or abstract).

    Raises:
      ValueError: as `spec`, or if there is not one name per dimension.
      UserError: if a dimension does not divide by its mesh axes. Nothing is ever left whole instead.
    """
    if len(names) != len(shape):
        raise ValueError(f"{_at(where)}{len(names)} axis names {tuple(names)} for shape {tuple(shape)}")
    found = spec(names, where)
    for i, (name, size) in enumerate(zip(names, shape, strict=True)):
        ways = _ways(mesh, found[i])
        if size % ways:
            raise UserError(
                f"{_at(where)}dimension {i} ({name}) of shape {tuple(shape)} is {size}, not a multiple of the"
                f" {ways} parts that mesh axes {found[i]} split it into; change the size or the mesh"
            )
    return found


def _ways(mesh, part) -> int:
    """Return into how many pieces one entry of a partition spec splits its dimension."""
    axes = (part,) if isinstance(part, str) else (part or ())
    return math.prod(mesh.shape[a] for a in axes)


def _at(where: str) -> str:
    return f"{where}: " if where else ""


def constrain(x, *names):
    """Pin the layout of an activation to the table's; the array unchanged where no mesh is set.

    Args:
      x: Array with one dimension per name.
      names: Logical names; None keeps a dimension whole.
    """
    current = jax.sharding.get_abstract_mesh()
    if current.empty:
        spec(names)  # a typo must not wait for the pod
        return x
    return jax.lax.with_sharding_constraint(x, fit(current, names, x.shape, "activation"))


# --------------------------------------------------------------------------------------------------- trees with names


def is_box(x) -> bool:
    """Tell whether x is linen's box of a value and its logical names."""
    return isinstance(x, meta.Partitioned)


def unbox(tree):
    """Return the tree with every box replaced by its value."""
    return jax.tree.map(lambda x: x.value if is_box(x) else x, tree, is_leaf=is_box)


def names(tree):
    """Return the tree with every box replaced by its tuple of logical names, and every other leaf by None."""
    return jax.tree.map(lambda x: tuple(x.names) if is_box(x) else None, tree, is_leaf=is_box)


def shardings(mesh: Mesh, abstract: Any, strict: str = "params", limit: int = REPLICATED_LIMIT):
    """Return the sharding of every leaf, in the structure of `unbox(abstract)`.

    Args:
      mesh: From `mesh`.
      abstract: Tree of shapes, boxed where they have names, as `jax.eval_shape` gives of an initializer.
      strict: Arrays under this top-level entry must have names ("": all of the tree).
      limit: Scalars of the largest array that may be whole on every device of a mesh that could split it.

    Raises:
      ValueError: naming the leaf, as `spec`, or for an array under `strict` that has no names.
      UserError: naming the leaf, if a dimension does not divide or a large array would be whole on every device.
    """

    def one(path, leaf):
        where = trees.path_name(path)
        if not is_box(leaf):
            return _unnamed(mesh, leaf, where, not strict or where.split("/")[0] == strict, limit)
        return jax.tree.map(lambda x: _named(mesh, leaf.names, x, where, limit), leaf.value)

    return jax.tree_util.tree_map_with_path(one, abstract, is_leaf=is_box)


def _named(mesh, names, leaf, where, limit) -> NamedSharding:
    found = fit(mesh, names, leaf.shape, where)
    if not REPLICATED & set(names):
        _refuse_replicated(mesh, found, leaf, where, limit)
    return NamedSharding(mesh, found)


def _unnamed(mesh, leaf, where, strict, limit) -> NamedSharding:
    if strict and leaf.ndim:
        raise ValueError(
            f"{where}: shape {tuple(leaf.shape)} has no axis names; wrap its initializer in"
            " nn.with_logical_partitioning(init, names)"
        )
    _refuse_replicated(mesh, PartitionSpec(), leaf, where, limit)
    return NamedSharding(mesh, PartitionSpec())


def _refuse_replicated(mesh, found, leaf, where, limit) -> None:
    """Raise if a large array would be copied onto every device of a mesh that could split it."""
    splits = mesh.shape["fsdp"] * mesh.shape["tensor"]
    size = math.prod(leaf.shape)
    if splits > 1 and size > limit and all(_ways(mesh, p) == 1 for p in found):
        raise UserError(
            f"{where}: {size} scalars of shape {tuple(leaf.shape)} would be whole on each of {mesh.size} devices"
            f" (limit {limit}); name its axes so that fsdp or tensor splits one"
        )


# ------------------------------------------------------------------------------------------------------------- batches


def rows(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch: dimension 0 over replica and fsdp."""
    return NamedSharding(mesh, spec(("batch",)))


def place(mesh: Mesh, batch, size: int | None = None):
    """Return this host's rows of a batch as global arrays.

    Args:
      mesh: From `mesh`.
      batch: Tree of numpy arrays [size / n, ...]: the rows of this host, the i-th part of n (`host_share`).
      size: Rows of the global batch; None: what the hosts bring.

    Raises:
      UserError: if the rows do not divide over the mesh, or this host brings a wrong number of them.
    """
    parts, ways = host_share(mesh)[1], shares(mesh)
    size = len(jax.tree.leaves(batch)[0]) * parts if size is None else size
    if size % ways:
        raise UserError(f"batch = {size} rows: not a multiple of the {ways} devices that share it (replica x fsdp)")
    local = size // parts

    def one(path, x):
        x = np.asarray(x)
        if x.ndim == 0 or x.shape[0] != local:
            raise UserError(f"batch/{trees.path_name(path)}: shape {x.shape}, expected {local} rows of {size} per host")
        return jax.make_array_from_process_local_data(rows(mesh), x, (size, *x.shape[1:]))

    return jax.tree_util.tree_map_with_path(one, batch)
