"""Networks that turn pictures into vectors, for the scores that compare sets: FID's Inception, CLIP's picture tower.

Rows of a call lie split over the devices, each with all the weights; one shape is compiled. `Network.about` is what a
result tells of it.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from cm3jax import config as configs
from cm3jax import sharding
from cm3jax.data import pictures as crops
from cm3jax.evaluate import picture_files, resize, tables
from cm3jax.interop import inception as inception_files
from cm3jax.nn import clip, inception
from cm3jax.types import UserError

CLIP_RESIZE = "CLIP's own: shorter side to the network's by bicubic, centre cut out, 8 bits"


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """A function of pictures.

    Attributes:
      about: Weights, resizing, dtype: all that its vectors depend on, as JSON.
      width: Numbers of a vector.
      prepare: A picture, uint8 [h, w, 3] -> what the network takes of it; on the host, by threads.
      apply: (params, rows of that) -> vectors [b, width].
      batch: Rows of a call.
      devices: Those that share them.
    """

    about: dict[str, Any]
    width: int
    prepare: Callable[[np.ndarray], np.ndarray]
    apply: Callable[[Any, jax.Array], jax.Array]
    params: Any
    batch: int
    devices: tuple

    def __post_init__(self):
        if not self.devices or self.batch % len(self.devices):
            raise UserError(f"--batch = {self.batch}: must be a multiple of the {len(self.devices)} devices")

    def __call__(self, rows: Iterable[np.ndarray]) -> Float[np.ndarray, "n d"]:
        """Return the vectors of prepared pictures; only a batch of them is in memory at one time."""
        out, rows = [np.empty((0, self.width), np.float32)], iter(rows)
        while part := list(itertools.islice(rows, self.batch)):
            full = np.zeros((self.batch, *part[0].shape), part[0].dtype)
            full[: len(part)] = part
            placed = jax.device_put(full, sharding.rows(self._mesh))
            out.append(np.asarray(self._compiled(self._copies, placed), np.float32)[: len(part)])
        return np.concatenate(out)

    @functools.cached_property
    def _mesh(self):
        return sharding.mesh(configs.Mesh(), self.devices)

    @functools.cached_property
    def _whole(self):
        return jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec())

    @functools.cached_property
    def _copies(self):
        return jax.device_put(self.params, self._whole)

    @functools.cached_property
    def _compiled(self) -> Callable:
        split = sharding.rows(self._mesh)
        return jax.jit(self.apply, in_shardings=(self._whole, split), out_shardings=split)


def of_inception(
    path, mode: str, dtype: str = "float32", batch: int = 64, devices: Sequence[Any] | None = None
) -> Network:
    """Return FID's network with the weights in a file.

    Args:
      mode: Of `resize.MODES`.
      dtype: Of the convolutions.
      batch: Rows of a call; rounded up to a multiple of the devices.
      devices: None: all of this host.

    Raises:
      UserError: if the file is not that of the network.
    """
    params, digest = inception_files.load(path)
    net = inception.Inception(jnp.dtype(dtype))
    about = {"network": "Inception v3 of FID, 2048 features", "weights": digest, "resize": mode, "dtype": dtype}
    apply = lambda params, x: net.apply({"params": params}, x)[0]  # noqa: E731
    return Network(about, inception.FEATURES, resize.MODES[mode], apply, params, *_shared(batch, devices))


def of_clip(encoder, batch: int = 64, devices: Sequence[Any] | None = None) -> Network:
    """Return the picture tower of a `retrieval.encoder.Encoder` up to its projection, vectors not of length 1.

    So CLIP-FID (arXiv 2203.06026) takes them, and the CLIP score after making them of length 1.
    """
    net, side = clip.CLIP(encoder.config, len(encoder.params["text"]["table"])), encoder.config.resolution
    about = {"network": f"CLIP, {side} px", "weights": encoder.identity, "resize": CLIP_RESIZE, "dtype": "float32"}
    method = lambda net, x: net.vision(clip.normalise(x))[1]  # noqa: E731

    def apply(params, x):
        with jax.default_matmul_precision("highest"):  # else accelerators would round float32
            return net.apply({"params": params}, x, method=method)

    prepare = lambda picture: crops.square(picture, side)  # noqa: E731
    return Network(about, encoder.size, prepare, apply, encoder.params, *_shared(batch, devices))


def _shared(batch: int, devices: Sequence[Any] | None) -> tuple[int, tuple]:
    devices = tuple(devices or jax.local_devices())
    return -(-batch // len(devices)) * len(devices), devices


def table(
    network: Network, files: Sequence[picture_files.File], folder, name: str, threads: int = 4, quiet: bool = False
) -> tables.Table:
    """Return the vectors of picture files, of which those that lie in `folder` are not made again."""

    def prepared(row: tables.Row) -> tuple[np.ndarray, str]:
        pixels, digest = picture_files.read(row[0])
        return network.prepare(pixels), digest

    def work(rows: Sequence[tables.Row]) -> tuple[np.ndarray, list[str]]:
        digests: list[str] = []

        def seen():
            for x, digest in picture_files.ahead(rows, prepared, threads):
                digests.append(digest)
                yield x

        return network(seen()), digests

    return tables.make(folder, [(file,) for file in files], network.width, work, name, quiet=quiet)
