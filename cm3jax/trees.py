"""Helpers over pytrees of arrays."""

import math
from typing import Any

import jax


def path_name(path) -> str:
    """Return a key path of jax.tree_util as "a/b/c"."""
    return "/".join(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)


def named_leaves(tree) -> dict[str, Any]:
    """Return {"a/b/c": leaf}."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def size(tree) -> int:
    """Return the number of scalars in all leaves (arrays or shape structs)."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def nbytes(tree) -> int:
    """Return the bytes of all leaves."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
