"""The trained image tokenizer: pictures to codes and back (arXiv 2309.02591 §2.1).

Its folder holds config.json (network, codes, resolution, checksum) and weights.safetensors: all that sampling needs.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

import cm3jax.config as cfg
import cm3jax.nn.vqgan as vqgan
import cm3jax.objectives.vqgan as objective
import cm3jax.sharding as sharding
from cm3jax.types import UserError

CONFIG, WEIGHTS = "config.json", "weights.safetensors"
BATCH = 64
"""Pictures per call of the compiled functions, at most; fewer are padded, so that each compiles once."""
LARGEST = 2**25
"""Numbers at most in a call's largest array, 128 MiB: one picture of 512 pixels through 128 channels, four of 256.
Several such arrays exist at one time, and a single picture to read or draw should not cost many times its own share."""


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Pictures of one resolution <-> code grids.

    Attributes:
      config: The network.
      codes: Size of the codebook.
      resolution: Pixels of a side.
      params: Weights of the generator {encoder, decoder, codebook, ...}, unboxed.
      batch: Pictures per compiled call.
      devices: Devices that share the pictures of a call, each with all the weights; (): the default device alone.
    """

    config: cfg.VQGAN
    codes: int
    resolution: int
    params: dict
    batch: int = BATCH
    devices: tuple = ()

    def __post_init__(self):
        check(self.config, self.resolution, self.codes)
        if self.devices and self.batch % len(self.devices):
            raise UserError(f"batch = {self.batch} pictures: must be a multiple of the {len(self.devices)} devices")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes."""
        return (self.resolution // self.config.factor,) * 2

    def encode(self, pictures: np.ndarray) -> np.ndarray:
        """Return the codes of pictures uint8 [b, h, w, 3], uint16 [b, n], row by row.

        Raises:
          UserError: if the pictures are not uint8 RGB of the tokenizer's resolution.
        """
        pictures, side = np.asarray(pictures), self.resolution
        if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[1:] != (side, side, 3):
            raise UserError(
                f"pictures of {pictures.dtype} {pictures.shape}: this tokenizer takes uint8 [b, {side}, {side}, 3];"
                " prepare them at its resolution"
            )
        return self._over(self._encode, pictures, (self.grid[0] * self.grid[1],), np.uint16)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Return the pictures uint8 [b, h, w, 3] of codes [b, n].

        Raises:
          UserError: if a row is not one picture's worth of codes, a code is not in the codebook, or the tokenizer was
            imported without a decoder.
        """
        if not self.config.decoder:
            raise UserError(
                "this image tokenizer has no decoder, as its source had none: it reads pictures and draws none; import"
                " it from a source with one (Meta's vqgan.ckpt, Anole)"
            )
        codes, n = np.asarray(codes), self.grid[0] * self.grid[1]
        if codes.ndim != 2 or codes.shape[1] != n or not np.issubdtype(codes.dtype, np.integer):
            raise UserError(f"codes of {codes.dtype} {codes.shape}: a picture here is a row of {n} integers")
        if codes.size and not 0 <= codes.min() <= codes.max() < self.codes:
            worst = int(codes.max() if codes.max() >= self.codes else codes.min())
            raise UserError(f"image code {worst}: the codebook has codes 0 to {self.codes - 1}")
        side = self.resolution
        return self._over(self._decode, codes.astype(np.int32), (side, side, 3), np.uint8)

    def _over(self, function, rows, shape, dtype) -> np.ndarray:
        """Return function(params, rows), computed `batch` rows at a time; the last ones are padded with zeros."""
        out = [np.empty((0, *shape), dtype)]
        for start in range(0, len(rows), self.batch):
            part = rows[start : start + self.batch]
            full = np.zeros((self.batch, *rows.shape[1:]), rows.dtype)
            full[: len(part)] = part
            weights, full = self._placed(full)
            out.append(np.asarray(function(weights, full))[: len(part)].astype(dtype))
        return np.concatenate(out)

    def _placed(self, rows):
        """Return the weights and some rows where they are computed with."""
        if not self.devices:
            return self.params, rows
        return self._copies, jax.device_put(rows, sharding.rows(self._mesh))

    @functools.cached_property
    def _mesh(self):
        return sharding.mesh(cfg.Mesh(), self.devices)

    @functools.cached_property
    def _copies(self):
        whole = jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec())
        return jax.device_put(self.params, whole)

    @functools.cached_property
    def _encode(self):
        model = vqgan.VQGAN(self.config, self.codes)

        def encode(params, pictures):
            codes = model.apply({"params": params}, objective.to_unit(pictures), method="tokenize")
            return codes.reshape(len(pictures), -1)

        return jax.jit(encode)

    @functools.cached_property
    def _decode(self):
        model = vqgan.VQGAN(self.config, self.codes)

        def decode(params, codes):
            grids = codes.reshape(-1, *self.grid)
            return objective.to_bytes(model.apply({"params": params}, grids, method="paint"))

        return jax.jit(decode)


def check(config: cfg.VQGAN, resolution: int, codes: int) -> None:
    """Raise a UserError unless network, resolution and codebook fit each other."""
    if resolution % config.factor or resolution < config.factor:
        raise UserError(
            f"resolution {resolution}: not a multiple of the {config.factor} pixels per code that image.model.patch ="
            f" {config.patch} and {len(config.multipliers)} multipliers make; change prepare.resolution or the model"
        )
    if not 2 <= codes <= 2**16:
        raise UserError(f"vocab.image = {codes}: must be 2 to 65536, what uint16 holds")


def save(folder, config: cfg.VQGAN, codes: int, resolution: int, params) -> None:
    """Write a tokenizer's folder.

    Args:
      folder: Created if need be; other files in it stay.
      config: The network.
      codes: Size of the codebook.
      resolution: Pixels of a side.
      params: Generator weights, unboxed: `train.vqgan.averaged(state)`.
    """
    check(config, resolution, codes)
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    data = safetensors.numpy.save({name: np.asarray(x, np.float32) for name, x in flat.items()})
    about = {
        "model": cfg.to_json(config),
        "codes": codes,
        "resolution": resolution,
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    # The config goes last: a folder that has it is whole.
    _replace(folder / WEIGHTS, data)
    _replace(folder / CONFIG, (json.dumps(about, indent=1) + "\n").encode())


def _replace(path: pathlib.Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(data)
    os.replace(partial, path)


def fitting(config: cfg.VQGAN, resolution: int) -> int:
    """Return the pictures of a call, a power of two up to `BATCH`, with which no array exceeds `LARGEST`."""
    side = resolution // config.patch
    sizes = [(side >> i) ** 2 * config.width * multiplier for i, multiplier in enumerate(config.multipliers)]
    return min(BATCH, 2 ** int(math.log2(max(1, LARGEST // max(sizes)))))


def load(folder, batch: int = 0, devices: tuple = ()) -> Tokenizer:
    """Return the tokenizer in a folder.

    Args:
      batch: Pictures per compiled call; 0: as many as `fitting` says, on each of the devices.
      devices: See `Tokenizer`.

    Raises:
      UserError: if there is none, its files do not belong together, or a weight is missing or has another shape.
    """
    folder = pathlib.Path(folder)
    about = _about(folder)
    model = cfg.from_json(cfg.VQGAN, about["model"], f"{folder / CONFIG}: model")
    codes, resolution = about["codes"], about["resolution"]
    check(model, resolution, codes)
    try:
        data = (folder / WEIGHTS).read_bytes()
    except OSError as e:
        raise UserError(f"{str(folder / WEIGHTS)!r}: {e.strerror}; train the image tokenizer again") from None
    if hashlib.sha256(data).hexdigest() != about["sha256"]:
        raise UserError(f"{str(folder / WEIGHTS)!r}: damaged, or not the file that {CONFIG} was written with")
    flat = safetensors.numpy.load(data)
    _compare(flat, model, codes, resolution, folder / WEIGHTS)
    params = flax.traverse_util.unflatten_dict({name: jnp.asarray(x) for name, x in flat.items()}, sep="/")
    batch = batch or fitting(model, resolution) * max(1, len(devices))
    return Tokenizer(model, codes, resolution, params, batch, devices)


def _about(folder: pathlib.Path) -> dict:
    path = folder / CONFIG
    try:
        about = json.loads(path.read_text())
    except OSError:
        raise UserError(f"{str(folder)!r}: no image tokenizer here ({CONFIG} is missing); train one first") from None
    except ValueError as e:
        raise UserError(f"{str(path)!r}: not JSON ({e})") from None
    kinds = {"model": dict, "codes": int, "resolution": int, "sha256": str}
    for name, kind in kinds.items():
        if not isinstance(about, dict) or not isinstance(about.get(name), kind):
            raise UserError(f"{str(path)!r}: field {name!r} is missing or no {kind.__name__}")
    return about


def _compare(flat, model: cfg.VQGAN, codes: int, resolution: int, path) -> None:
    """Raise a UserError that names the first weight which is not as the network has it."""
    net = vqgan.VQGAN(model, codes)
    wanted = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, resolution, resolution, 3)))["params"]
    wanted = flax.traverse_util.flatten_dict(jax.tree.map(lambda x: x, flax.core.meta.unbox(wanted)), sep="/")
    if odd := sorted(set(flat) ^ set(wanted)):
        what = "no weight" if odd[0] in wanted else "a surplus weight"
        raise UserError(f"{str(path)!r}: {what} {odd[0]!r}; the file is not of the network in {CONFIG}")
    for name, leaf in wanted.items():
        if flat[name].shape != leaf.shape:
            raise UserError(f"{str(path)!r}: {name} has shape {flat[name].shape}, the network {leaf.shape}")
