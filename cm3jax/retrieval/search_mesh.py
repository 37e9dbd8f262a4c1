"""Search on the accelerators: the bank's vectors lie split over the memory of all devices, each finds its own nearest.

Every device goes over its part block by block and keeps its k best, and the k best of all devices are merged. On a TPU
`jax.lax.approx_max_k` picks them from a block, approximately (arXiv 2206.14286; RECALL is what it is asked for). On
other devices it would be exact but for ties, in any order; there `lax.top_k` takes its place, and the whole is exact,
ties included: the lower id comes first.

Several hosts must ask together, with the same queries.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from cm3jax.retrieval import bank as banks
from cm3jax.retrieval import search

Found = search.Found
AXIS = "bank"
BLOCK = 65_536
"""Vectors of a device scored at one time: with 256 queries, 64 MiB of scores."""
RECALL = 0.99
"""Asked of approx_max_k; its own default is 0.95."""


class Mesh:
    """The vectors of a bank on devices; see `search.open`.

    Args:
      devices: Those that share the vectors; None: all, of all hosts.
      block: Vectors of a device scored at one time.
      approximate: Use approx_max_k; None: on TPUs.
    """

    def __init__(self, bank: banks.Bank, devices=None, block: int = BLOCK, approximate: bool | None = None):
        devices = jax.devices() if devices is None else list(devices)
        self.bank, (self.mesh, self.block, share) = bank, cut(len(bank), devices, block)
        self.approximate = devices[0].platform == "tpu" if approximate is None else approximate
        shape = (share * len(devices), bank.size)
        split = NamedSharding(self.mesh, PartitionSpec(AXIS))
        self.vectors = jax.make_array_from_callback(shape, split, lambda at: rows(bank, *at[0].indices(shape[0])[:2]))

    def search(self, queries: Float[np.ndarray, "q z"], k: int) -> Found:
        search.check(self.bank, queries, k)
        rows = [self._some(queries[at : at + search.QUERIES], k) for at in range(0, len(queries), search.QUERIES)]
        return search.joined(rows, k)

    def _some(self, queries: np.ndarray, k: int) -> Found:
        padded = np.zeros((search.QUERIES, self.bank.size), np.float32)  # one compiled program for all
        padded[: len(queries)] = queries
        whole = NamedSharding(self.mesh, PartitionSpec())
        placed = jax.make_array_from_callback(padded.shape, whole, lambda at: padded[at])
        scores, ids = program(self.mesh, len(self.bank), self.block, k, self.approximate)(placed, self.vectors)
        scores, ids = (np.asarray(x.addressable_data(0))[: len(queries)] for x in (scores, ids))
        return scores, np.where(np.isneginf(scores), -1, ids).astype(np.int64)


def cut(total: int, devices: list, block: int = BLOCK) -> tuple[jax.sharding.Mesh, int, int]:
    """Return how so many vectors lie: the mesh, the vectors of a block, and those of a device, a multiple of it."""
    types = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((len(devices),), (AXIS,), axis_types=types, devices=devices)
    share = -(-total // len(devices))
    block = min(block, share)
    return mesh, block, -(-share // block) * block


def rows(bank: banks.Bank, start: int, stop: int) -> np.ndarray:
    """Return vectors start .. stop - 1 of a bank, zeros past its end."""
    out = np.zeros((stop - start, bank.size), np.float16)
    for first, vectors in zip(bank.starts, bank.arrays["vectors"], strict=False):
        a, b = max(start, int(first)), min(stop, int(first) + len(vectors))
        if a < b:
            out[a - start : b - start] = vectors[a - first : b - first]
    return out


@functools.lru_cache(maxsize=8)
def program(mesh: jax.sharding.Mesh, total: int, block: int, k: int, approximate: bool):
    """Return the compiled search: (queries [q, z], vectors [n, z] split over the mesh) -> scores, ids [q, k]."""

    def local(queries, vectors):
        first = jax.lax.axis_index(AXIS) * len(vectors)
        own = nearest(queries, vectors, first, total, block, k, approximate)
        scores, ids = (jax.lax.all_gather(x, AXIS, axis=1, tiled=True) for x in own)
        return best(scores, ids, k)

    whole, split = PartitionSpec(), PartitionSpec(AXIS)
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(whole, split), out_specs=(whole, whole), check_vma=False))


def nearest(
    queries: Float[Array, "q z"], vectors: Float[Array, "n z"], first, total: int, block: int, k: int, approximate: bool
) -> tuple[Float[Array, "q k"], Int[Array, "q k"]]:
    """Return the k best of one device's vectors, whose first has the id `first`; -inf where there are fewer."""

    pick = functools.partial(jax.lax.approx_max_k, recall_target=RECALL) if approximate else jax.lax.top_k

    def step(kept, start):
        some = jax.lax.dynamic_slice_in_dim(vectors, start, block)
        scores = jnp.einsum("qz,nz->qn", queries, some.astype(jnp.float32), precision="highest")
        ids = first + start + jnp.arange(block, dtype=jnp.int32)
        scores = jnp.where(ids < total, scores, -jnp.inf)
        found, at = pick(scores, min(k, block))
        both = jnp.concatenate([kept[0], found], 1), jnp.concatenate([kept[1], ids[at]], 1)  # lower ids first
        return best(*both, k), None

    none = jnp.full((len(queries), k), -jnp.inf), jnp.zeros((len(queries), k), jnp.int32)
    return jax.lax.scan(step, none, jnp.arange(0, len(vectors), block, dtype=jnp.int32))[0]


def best(scores: Float[Array, "q n"], ids: Int[Array, "q n"], k: int) -> tuple[Float[Array, "q k"], Int[Array, "q k"]]:
    """Return the k best of each row; of equal ones the first, as lax.top_k gives them."""
    found, at = jax.lax.top_k(scores, k)
    return found, jnp.take_along_axis(ids, at, 1)
