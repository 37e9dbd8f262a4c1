"""Kernel distance of two sets of features: KID, whatever the features (arXiv 1801.01401).

The squared maximum mean discrepancy with the kernel (x.y / size + 1)^3, by the unbiased estimate, which may be below 0,
over subsets of both sets; mean and deviation over the subsets. Unlike FID it has no bias from the number of samples.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cm3jax import config as configs
from cm3jax import sharding
from cm3jax.types import UserError

DEGREE = 3


def distance(
    a: Float[np.ndarray, "n d"],
    b: Float[np.ndarray, "m e"],
    subsets: int = 100,
    size: int = 1000,
    seed: int = 0,
    devices: Sequence[Any] | None = None,
) -> tuple[float, float]:
    """Return mean and deviation of the kernel distance over subsets.

    Args:
      subsets: Their number.
      size: Samples of each set in one, drawn without repetition; draw i follows from (seed, i) alone.
      devices: Those that share the subsets; None: all of this host.

    Raises:
      UserError: if a set has too few samples, or the features are of different sizes.
    """
    if a.shape[1] != b.shape[1]:
        raise UserError(f"kernel distance of features of {a.shape[1]} and {b.shape[1]} numbers: must be of one size")
    if not 2 <= size <= min(len(a), len(b)):
        raise UserError(
            f"kernel distance with subsets of {size} of {len(a)} and {len(b)} samples: must be at least 2 and at most"
            " the smaller set; set --subset-size"
        )
    mesh = sharding.mesh(configs.Mesh(), tuple(devices or jax.local_devices()))
    found = []
    for at in range(0, subsets, mesh.size):
        draws = [np.random.default_rng((seed, i)) for i in range(at, at + mesh.size)]  # those past the end are left out
        chosen = [[x[rng.choice(len(x), size, replace=False)] for x in (a, b)] for rng in draws]
        rows = [np.stack(side).astype(np.float32) for side in zip(*chosen, strict=True)]
        sums = _sums(*jax.device_put(rows, sharding.rows(mesh)))
        found += list(_estimates(*(np.asarray(x, np.float64) for x in sums), size))
    found = np.array(found[:subsets])
    return float(found.mean()), float(found.std())


@jax.jit
def _sums(a: Float[Array, "b n d"], b: Float[Array, "b n d"]) -> tuple[Float[Array, "b n"], ...]:
    """Return the sums of the kernel over the second argument: within a and b, without the diagonal, and between them.

    Only a row is summed in float32: the estimate is a small difference of large means.
    """
    product = functools.partial(jnp.einsum, "bid,bjd->bij", precision=jax.lax.Precision.HIGHEST)
    kernel = lambda x, y: (product(x, y) / a.shape[-1] + 1) ** DEGREE  # noqa: E731
    off = 1 - jnp.eye(a.shape[1])
    return (kernel(a, a) * off).sum(-1), (kernel(b, b) * off).sum(-1), kernel(a, b).sum(-1)


def _estimates(within_a: np.ndarray, within_b: np.ndarray, between: np.ndarray, size: int) -> np.ndarray:
    return (within_a.sum(1) + within_b.sum(1)) / (size * (size - 1)) - 2 * between.sum(1) / size**2
