"""The retriever at work: texts, pictures and documents to vectors of length 1 (arXiv 2309.02591 §2.1).

Its folder holds config.json (network, identity, checksum), weights.safetensors and the text tokenizer's files.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import flax.traverse_util
import jax
import numpy as np
import safetensors.numpy
from jaxtyping import Bool, Float

from cm3jax import config as configs
from cm3jax import sharding
from cm3jax.data import pair_batches
from cm3jax.data import pictures as crops
from cm3jax.nn import clip
from cm3jax.retrieval import weights
from cm3jax.stages import write_text
from cm3jax.tokenizers import clip as tokenizers
from cm3jax.types import Record, UserError

CONFIG, WEIGHTS = "config.json", "weights.safetensors"
BATCH = 256
"""Rows per call of the compiled functions; fewer are padded, so that each compiles once."""
EMPTY = 0.0
"""Every entry of the vector of a text without a token, as after dropout: such a row is no query, as its score is 0
with everything; `any()` of a row tells."""

Vectors = Float[np.ndarray, "n z"]


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Texts and pictures -> vectors.

    Attributes:
      config: The network.
      params: Its weights, unboxed.
      tokenizer: Of the texts.
      identity: 16 hex digits of weights, network and tokenizer: vectors of two encoders cannot be compared.
      batch: Rows per compiled call.
      devices: Devices that share the rows of a call, each with all the weights.
    """

    config: configs.CLIP
    params: Any
    tokenizer: tokenizers.Tokenizer
    identity: str
    batch: int = BATCH
    devices: tuple = ()

    def __post_init__(self):
        if not self.devices or self.batch % len(self.devices):
            raise UserError(f"batch = {self.batch} rows: must be a multiple of the {len(self.devices)} devices")
        if self.tokenizer.rows > (rows := len(self.params["text"]["table"])):
            raise UserError(
                f"text tokenizer of {self.tokenizer.rows} ids: the retriever's table has {rows} rows; take the two from"
                " one place"
            )

    @property
    def size(self) -> int:
        """Width of the vectors."""
        return self.config.size

    def texts(self, texts: Sequence[str], dropout: float = 0.0, seeds: Sequence[int] | None = None) -> Vectors:
        """Return the vectors of texts; `EMPTY` for one that has no token, or none left.

        Args:
          texts: Tokens that exceed the network's context are cut.
          dropout: Share of the tokens that are left out, each by itself (arXiv 2309.02591 §2.1).
          seeds: Of the dropout, one a text, which then does not depend on its batch mates.

        Raises:
          ValueError: if there is dropout and not one seed a text.
        """
        rows = [self.tokenizer.encode(text) for text in texts]
        if dropout:
            if seeds is None or len(seeds) != len(rows):
                raise ValueError(f"dropout = {dropout}: needs one seed for each of the {len(rows)} texts")
            rows = [dropped(row, dropout, int(seed)) for row, seed in zip(rows, seeds, strict=True)]
        ids, ends = tokenizers.arrays(rows, self.tokenizer, self.config.context)
        full = np.array([bool(row) for row in rows], bool)
        return np.where(full[:, None], self._over("texts", self.size, ids, ends), np.float32(EMPTY))

    def pictures(self, pictures) -> Vectors:
        """Return the vectors of pictures, uint8 [n, h, w, 3] or a list of [h, w, 3] of any sizes."""
        return self._over("pictures", self.size, self._squares(pictures))

    def features(self, pictures) -> Vectors:
        """Return what the picture tower makes of pictures before its projection, [n, vision_width]."""
        return self._over("features", self.config.vision_width, self._squares(pictures))

    def documents(self, records: Sequence[Record]) -> tuple[Vectors, Bool[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        """Return the vectors of documents, not of length 1, and which of them hold text and which a picture.

        A document's vector is the mean of its text's and its pictures' (arXiv 2309.02591 §2.1), each of length 1;
        where one is missing, the other. Several texts are read as one; of several pictures the mean counts, made
        of length 1. Codes are not looked at. A document with neither has the zero vector.
        """
        found = [pair_batches.parts(record) for record in records]
        by_text = self.texts(["\n".join(texts) for texts, _ in found])
        owner = np.repeat(np.arange(len(found)), [len(pictures) for _, pictures in found])
        by_image = np.zeros_like(by_text)
        np.add.at(by_image, owner, self.pictures([picture for _, pictures in found for picture in pictures]))
        by_image /= np.maximum(np.linalg.norm(by_image, axis=1, keepdims=True), 1e-12)
        text, image = by_text.any(1), by_image.any(1)
        return (by_text + by_image) / np.maximum(text + image.astype(np.float32), 1)[:, None], text, image

    def _squares(self, pictures) -> np.ndarray:
        side, found = self.config.resolution, [np.asarray(picture) for picture in pictures]
        for picture in found:
            if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
                raise UserError(f"picture of {picture.dtype} {picture.shape}: the encoder takes uint8 [h, w, 3]")
        if not found:
            return np.zeros((0, side, side, 3), np.uint8)
        return np.stack([crops.square(picture, side) for picture in found])

    def _over(self, method: str, width: int, *rows: np.ndarray) -> Vectors:
        """Return a method of the network over rows, `batch` at a time; the last ones are padded with zeros."""
        out = [np.empty((0, width), np.float32)]
        for start in range(0, len(rows[0]), self.batch):
            part = [x[start : start + self.batch] for x in rows]
            full = [np.zeros((self.batch, *x.shape[1:]), x.dtype) for x in part]
            for x, y in zip(full, part, strict=True):
                x[: len(y)] = y
            placed = jax.device_put(full, sharding.rows(self._mesh))
            out.append(np.asarray(self._compiled(method)(self._copies, *placed))[: len(part[0])])
        return np.concatenate(out)

    @functools.cached_property
    def _mesh(self):
        return sharding.mesh(configs.Mesh(), self.devices)

    @functools.cached_property
    def _copies(self):
        return jax.device_put(self.params, jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec()))

    def _compiled(self, method: str) -> Callable:
        if method not in self._functions:
            net = clip.CLIP(self.config, len(self.params["text"]["table"]))
            self._functions[method] = jax.jit(lambda params, *x: net.apply({"params": params}, *x, method=method))
        return self._functions[method]

    @functools.cached_property
    def _functions(self) -> dict[str, Callable]:
        return {}


def dropped(ids: Sequence[int], dropout: float, seed: int) -> list[int]:
    """Return ids without those that a seeded coin takes out, each with probability `dropout`."""
    keep = np.random.default_rng(seed).random(len(ids)) >= dropout
    return [i for i, kept in zip(ids, keep, strict=True) if kept]


def embed(
    encoder: Encoder, records: Iterable[Record], say: Callable[[str], Any] = lambda line: None
) -> Iterator[tuple[list[Record], Vectors, Bool[np.ndarray, " n"], Bool[np.ndarray, " n"]]]:
    """Yield records, `encoder.batch` at a time, with what `encoder.documents` makes of them; then say how fast it was.

    The rate counts the time from one batch's request to its vectors, reading included, without the compiler's.
    """
    encoder.documents([Record("", ("a", np.zeros((8, 8, 3), np.uint8)))])
    count, spent, records, start = 0, 0.0, iter(records), time.monotonic()
    while batch := list(itertools.islice(records, encoder.batch)):
        found = encoder.documents(batch)
        count, spent = count + len(batch), spent + time.monotonic() - start
        yield batch, *found
        start = time.monotonic()
    rate, devices = count / max(spent, 1e-9), encoder.devices
    chips = f"{rate / len(devices):.1f} per chip ({len(devices)} x {devices[0].device_kind})"
    say(f"{count:,} documents, {rate:.1f} a second, {chips}, reading included")


# -------------------------------------------------------------------------------------------------------------- on disk


def save(folder, model: configs.CLIP, params, tokenizer: tokenizers.Tokenizer) -> None:
    """Write a retriever's folder; other files in it stay.

    Args:
      params: Unboxed: `train.state.averaged(state)`.
      tokenizer: Its files are written beside.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer.files.items():
        (folder / name).write_bytes(content)
    data = safetensors.numpy.save(flat(params))
    partial = folder / f".{WEIGHTS}.partial"
    partial.write_bytes(data)
    partial.replace(folder / WEIGHTS)
    about = {
        "model": configs.to_json(model),
        "identity": identify(model, params, tokenizer),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    write_text(folder / CONFIG, json.dumps(about, indent=1) + "\n")  # last: a folder that has it is whole


def load(folder, batch: int = BATCH, devices: tuple = ()) -> Encoder:
    """Return the encoder in a folder.

    Args:
      folder: A run's retriever/, or published weights with their tokenizer (see `weights`).
      batch: Rows per compiled call; rounded up to a multiple of the devices.
      devices: Those that share them; (): all of this host.

    Raises:
      UserError: if there is none, or its files do not belong together.
    """
    folder, devices = pathlib.Path(folder), devices or tuple(jax.local_devices())
    published = (folder / weights.FILE).is_file() and not (folder / WEIGHTS).is_file()
    model, params, tokenizer = read_published(folder) if published else _read(folder)
    identity = identify(model, params, tokenizer)
    if not published and identity != _about(folder)["identity"]:
        raise UserError(f"{str(folder)!r}: weights, tokenizer and {CONFIG} are not of one retriever; make it again")
    return Encoder(model, params, tokenizer, identity, -(-batch // len(devices)) * len(devices), devices)


def read_published(folder) -> tuple[configs.CLIP, Any, tokenizers.Tokenizer]:
    """Return network, parameters and tokenizer of published weights."""
    tokenizer = tokenizers.load(folder)
    return *weights.load(folder), tokenizer


def _read(folder: pathlib.Path) -> tuple[configs.CLIP, Any, tokenizers.Tokenizer]:
    about, tokenizer = _about(folder), tokenizers.load(folder)
    model = configs.from_json(configs.CLIP, about["model"], f"{folder / CONFIG}: model")
    try:
        data = (folder / WEIGHTS).read_bytes()
    except OSError as e:
        raise UserError(f"{str(folder / WEIGHTS)!r}: {e.strerror}; make the retriever again") from None
    if hashlib.sha256(data).hexdigest() != about["sha256"]:
        raise UserError(f"{str(folder / WEIGHTS)!r}: damaged, or not the file that {CONFIG} was written with")
    return model, flax.traverse_util.unflatten_dict(safetensors.numpy.load(data), sep="/"), tokenizer


def flat(params) -> dict[str, np.ndarray]:
    """Return weights as {"a/b/c": float32 array}."""
    found = flax.traverse_util.flatten_dict(params, sep="/")
    return {name: np.array(found[name], np.float32, order="C") for name in sorted(found)}


def identify(model: configs.CLIP, params, tokenizer: tokenizers.Tokenizer) -> str:
    """Return 16 hex digits that differ for two encoders whose vectors do."""
    digest = hashlib.sha256(configs.digest(model).encode())
    for name, x in flat(params).items():
        digest.update(f"{name}{x.shape}".encode())
        digest.update(x.data)
    for content in tokenizer.files.values():
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()[:16]


def _about(folder: pathlib.Path) -> dict:
    path = folder / CONFIG
    try:
        about = json.loads(path.read_text())
    except OSError:
        raise UserError(
            f"{str(folder)!r}: no retriever here ({CONFIG} is missing); cm3jax train ... --stage retriever makes one"
        ) from None
    except ValueError as e:
        raise UserError(f"{str(path)!r}: not JSON ({e})") from None
    kinds = {"model": dict, "identity": str, "sha256": str}
    for name, kind in kinds.items():
        if not isinstance(about, dict) or not isinstance(about.get(name), kind):
            raise UserError(f"{str(path)!r}: field {name!r} is missing or no {kind.__name__}")
    return about
