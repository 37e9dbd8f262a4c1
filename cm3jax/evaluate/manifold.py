"""Improved precision and recall of a set of pictures (arXiv 1904.06991): what is drawn is real, what is real is drawn.

A set's manifold is the union of balls around its features, each as large as the distance to its k-th nearest neighbour
in the set. Precision is the share of the pictures that lie in the reference's, recall the share of the reference that
lies in theirs. The paper takes features of VGG16; here those of FID's Inception, as diffusion models are scored.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from cm3jax import config as configs
from cm3jax import sharding
from cm3jax.types import UserError

ROWS, COLUMNS = 1024, 8192
"""Of a block of distances, rows on each device: 32 MiB there."""
NONE = -1
"""Index of a row that only fills a block."""


def precision_recall(
    pictures: Float[np.ndarray, "n d"],
    reference: Float[np.ndarray, "m e"],
    k: int = 3,
    devices: Sequence[Any] | None = None,
) -> tuple[float, float]:
    """Return precision and recall.

    Args:
      k: Neighbour whose distance is a ball's radius; the paper's 3.
      devices: Those that share the rows; None: all of this host.

    Raises:
      UserError: if a set has no k-th neighbour, or the features are of different sizes.
    """
    if pictures.shape[1] != reference.shape[1]:
        raise UserError(
            f"precision of features of {pictures.shape[1]} and {reference.shape[1]} numbers: must be of one size"
        )
    if not 1 <= k < min(len(pictures), len(reference)):
        raise UserError(
            f"precision with neighbour {k} of {len(pictures)} and {len(reference)} samples: must be at least 1 and less"
            " than the smaller set; set --neighbours"
        )
    # Distances do not change, but their squares lose fewer digits in float32.
    centre = reference.mean(0, dtype=np.float64).astype(np.float32)
    blocks = Blocks(sharding.mesh(configs.Mesh(), tuple(devices or jax.local_devices())))
    a, b = (np.asarray(x, np.float32) - centre for x in (pictures, reference))
    return blocks.covered(a, b, blocks.radii(b, k)), blocks.covered(b, a, blocks.radii(a, k))


@dataclasses.dataclass(frozen=True, eq=False)
class Blocks:
    """Distances block by block, rows over the devices of a mesh."""

    mesh: Any
    rows: int = ROWS
    columns: int = COLUMNS

    def radii(self, x: np.ndarray, k: int) -> np.ndarray:
        """Return the squared distance of each row to its k-th nearest other row, [n]."""
        out = []
        for own, index in self._split(x, self._height(len(x))):
            best = np.full((len(own), k), np.inf, np.float32)
            own, index, best = jax.device_put((own, index, best), sharding.rows(self.mesh))
            for others, number in self._split(x, min(self.columns, len(x))):
                best = _nearest(own, index, others, number, best)
            out.append(np.asarray(best[:, -1]))
        return np.concatenate(out)[: len(x)]

    def covered(self, x: np.ndarray, y: np.ndarray, radii: np.ndarray) -> float:
        """Return the share of rows x that lie in a ball around a row of y."""
        out, width = [], min(self.columns, len(y))
        for own, _ in self._split(x, self._height(len(x))):
            seen = np.zeros(len(own), bool)
            own, seen = jax.device_put((own, seen), sharding.rows(self.mesh))
            for others, number in self._split(y, width):
                around = np.where(number == NONE, np.float32(-1), radii[number])
                seen = _inside(own, others, around, seen)
            out.append(np.asarray(seen))
        return float(np.concatenate(out)[: len(x)].mean())

    def _height(self, n: int) -> int:
        return min(self.rows, -(-n // self.mesh.size)) * self.mesh.size

    @staticmethod
    def _split(x: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield blocks of `size` rows and their indices; the last is filled up."""
        for at in range(0, len(x), size):
            own = x[at : at + size]
            block, index = np.zeros((size, x.shape[1]), np.float32), np.full(size, NONE, np.int32)
            block[: len(own)], index[: len(own)] = own, np.arange(at, at + len(own))
            yield block, index


def _squares(x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Float[Array, "n m"]:
    product = jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.maximum((x * x).sum(1)[:, None] + (y * y).sum(1)[None] - 2 * product, 0)


@functools.partial(jax.jit, donate_argnums=4)
def _nearest(
    x: Float[Array, "n d"],
    index: Int[Array, " n"],
    y: Float[Array, "m d"],
    number: Int[Array, " m"],
    best: Float[Array, "n k"],
) -> Float[Array, "n k"]:
    """Return the k least squared distances so far, of x to y and those before; a row is no neighbour of itself."""
    other = (number != NONE)[None] & (number[None] != index[:, None])
    found = jnp.concatenate([best, jnp.where(other, _squares(x, y), jnp.inf)], 1)
    return -jax.lax.top_k(-found, best.shape[1])[0]


@jax.jit
def _inside(
    x: Float[Array, "n d"], y: Float[Array, "m d"], radii: Float[Array, " m"], seen: Bool[Array, " n"]
) -> Bool[Array, " n"]:
    return seen | (_squares(x, y) <= radii).any(1)
