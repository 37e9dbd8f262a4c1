"""LPIPS of pairs of pictures (arXiv 1801.03924) with VGG16, over the devices: `nn.perceptual` has the network."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from cm3jax import config as configs
from cm3jax import sharding
from cm3jax.nn import perceptual

SMALLEST = 16
"""Pixels of a side; four maxima halve it."""


class Network:
    """LPIPS with the weights in a file.

    Args:
      path: See `nn.perceptual`.
      batch: Pairs of a call; rounded up to a multiple of the devices.
      devices: Those that share them; None: all of this host.
    """

    def __init__(self, path, batch: int = 16, devices: Sequence[Any] | None = None):
        devices = tuple(devices or jax.local_devices())
        self.mesh = sharding.mesh(configs.Mesh(), devices)
        self.batch = -(-batch // len(devices)) * len(devices)
        whole = jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec())
        self.weights = jax.device_put(perceptual.load(path, heads=True), whole)

    def __call__(self, a: UInt8[np.ndarray, "n h w 3"], b: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, " n"]:
        """Return the distance of each pair; a size of pictures is compiled once."""
        out = [np.empty(0, np.float32)]
        for at in range(0, len(a), self.batch):
            sides = [np.zeros((self.batch, *a.shape[1:]), np.uint8) for _ in range(2)]
            count = len(a[at : at + self.batch])
            for side, x in zip(sides, (a, b), strict=True):
                side[:count] = x[at : at + self.batch]
            out.append(np.asarray(_distances(self.weights, *jax.device_put(sides, sharding.rows(self.mesh))))[:count])
        return np.concatenate(out)


@jax.jit
def _distances(weights, a: UInt8[Array, "b h w 3"], b: UInt8[Array, "b h w 3"]) -> Float[Array, " b"]:
    a, b = (x.astype(jnp.float32) / 127.5 - 1 for x in (a, b))
    with jax.default_matmul_precision("highest"):  # else accelerators would round float32
        return perceptual.lpips(weights, a, b)
