"""safetensors files, in and out.

A file is the length of its header (8 bytes), the header (JSON: {name: {dtype, shape, data_offsets}}) and the numbers.
Files that others made are not trusted: the header is checked against the file before anything is mapped.
"""

import json
import math
import os
import pathlib
from typing import Any

import ml_dtypes
import numpy as np

from cm3jax.interop import mapped
from cm3jax.types import UserError

DTYPES = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "C64": np.complex64,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ONE, SHARD, INDEX = "model.safetensors", "model-{:05}-of-{:05}.safetensors", "model.safetensors.index.json"
METADATA = "__metadata__"
MOST_HEADER = 100_000_000
"""Bytes of a header: the format's own limit."""
SHARD_BYTES = 5 * 10**9
"""Of a shard's numbers, at most: what the files on Hugging Face's hub have."""
AGAIN = "the file is damaged or was made wrongly; fetch it again"


# ------------------------------------------------------------------------------------------------------------------ in


def open(path) -> mapped.Tensors:
    """Return what a safetensors file holds.

    Raises:
      UserError: naming the file, and the tensor whose entry does not fit it.
    """
    path = pathlib.Path(path)
    start, header = _header(path)
    size = path.stat().st_size - start
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict):
        raise UserError(f"{path}: {METADATA} is {mapped.short(metadata)}, must be an object; {AGAIN}")
    ends = {name: _checked(path, name, entry, size) for name, entry in header.items()}
    _tiled(path, ends, size)
    found = {name: _tensor(path, name, start, entry) for name, entry in header.items()}
    return mapped.Tensors(path, "safetensors", (path,), found, metadata)


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object whose keys must differ (json's object_pairs_hook)."""
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise ValueError(f"{mapped.short(twice)} stands twice")
    return made


def _header(path: pathlib.Path) -> tuple[int, dict[str, Any]]:
    """Return where the numbers begin, and the header."""
    with path.open("rb") as file:
        size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MOST_HEADER, size - 8):
            raise UserError(
                f"{path}: claims a header of {length:,} bytes, can have at most {min(MOST_HEADER, max(size - 8, 0)):,}"
                f" in {size:,} bytes; {AGAIN}"
            )
        text = file.read(length)
    try:
        header = json.loads(text.decode(), object_pairs_hook=once)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: its header is not JSON of tensors: {e}; {AGAIN}") from None
    if not isinstance(header, dict):
        raise UserError(f"{path}: its header is {mapped.short(header)}, must be an object; {AGAIN}")
    return 8 + length, header


def _checked(path: pathlib.Path, name: str, entry: Any, size: int) -> tuple[int, int]:
    """Return where a tensor begins and ends among the numbers, if its entry fits their `size`."""
    where = f"{path}: tensor {mapped.short(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{where}: {mapped.short(entry)} must have dtype, shape and data_offsets; {AGAIN}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"{where}: dtype {mapped.short(dtype)} is none of {', '.join(DTYPES)}")
    if not mapped.shaped(shape):
        raise UserError(f"{where}: shape {mapped.short(shape)} is none that an array can have; {AGAIN}")
    if not (mapped.counts(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1] <= size):
        raise UserError(f"{where}: data_offsets {mapped.short(offsets)} must lie within 0 to {size:,}; {AGAIN}")
    need, have = math.prod(shape) * DTYPES[dtype].itemsize, offsets[1] - offsets[0]
    if need != have:
        raise UserError(f"{where}: shape {shape} of {dtype} takes {need:,} bytes, data_offsets have {have:,}; {AGAIN}")
    return offsets[0], offsets[1]


def _tiled(path: pathlib.Path, ends: dict[str, tuple[int, int]], size: int) -> None:
    """Raise a UserError unless the tensors lie one behind the other, from the first byte to the last."""
    at, before = 0, ""
    for name, (start, end) in sorted(ends.items(), key=lambda item: item[1]):
        if start < at:
            raise UserError(f"{path}: tensors {mapped.short(before)} and {mapped.short(name)} overlap; {AGAIN}")
        if start > at:
            raise UserError(f"{path}: {start - at:,} bytes before tensor {mapped.short(name)} are no tensor's; {AGAIN}")
        at, before = end, name
    if at < size:
        raise UserError(f"{path}: its last {size - at:,} bytes are no tensor's; {AGAIN}")


def _tensor(path: pathlib.Path, name: str, start: int, entry: dict[str, Any]) -> mapped.Tensor:
    dtype, shape, (first, last) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    read = lambda: mapped.pages(path, start + first, last - first).view(dtype).reshape(shape)  # noqa: E731
    return mapped.Tensor(shape, dtype, read, mapped.origin(path, name))


# ----------------------------------------------------------------------------------------------------------------- out


def write(path, tensors: dict[str, mapped.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write one file, tensor by tensor; it appears when it is whole.

    Args:
      metadata: Of the header; transformers wants "format": "pt".

    Raises:
      UserError: naming the tensor that the format cannot hold.
    """
    path = pathlib.Path(path)
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)  # so that all lie aligned
    header, at = {METADATA: metadata} if metadata else {}, 0
    for name in order:
        tensor = tensors[name]
        if name == METADATA or tensor.dtype not in NAMES:
            raise UserError(f"{path}: tensor {mapped.short(name)} of {tensor.dtype}: safetensors cannot hold it")
        offsets = [at, at + tensor.size]
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        at += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                file.write(_bytes(name, tensors[name]))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _bytes(name: str, tensor: mapped.Tensor) -> memoryview:
    array = tensor.read()
    if (array.shape, array.dtype) != (tensor.shape, tensor.dtype):
        raise ValueError(f"{name}: {array.dtype} {array.shape} was read, announced was {tensor.dtype} {tensor.shape}")
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def save(
    folder, tensors: dict[str, mapped.Tensor], metadata: dict[str, str], most: int = SHARD_BYTES
) -> list[pathlib.Path]:
    """Write tensors as Hugging Face's folders have them, in one file or in shards with an index; return the files.

    Args:
      most: Bytes of one file's tensors; one tensor may have more.

    Raises:
      UserError: if weights are there already, or naming the tensor that the format cannot hold; nothing is left then.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if there := sorted([*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]):
        raise UserError(f"{there[0]}: is there already; remove it or name another folder")
    parts = _parts(tensors, most)
    names = [ONE] if len(parts) == 1 else [SHARD.format(i + 1, len(parts)) for i in range(len(parts))]
    made = [folder / name for name in names]
    try:
        for path, part in zip(made, parts, strict=True):
            write(path, {name: tensors[name] for name in part}, metadata)
        if len(parts) > 1:
            made.append(folder / INDEX)
            where = {name: file for file, part in zip(names, parts, strict=True) for name in part}
            about = {"metadata": {"total_size": sum(t.size for t in tensors.values())}, "weight_map": where}
            made[-1].write_text(json.dumps(about, indent=2) + "\n")
    except BaseException:
        for path in made:
            path.unlink(missing_ok=True)
        raise
    return made


def _parts(tensors: dict[str, mapped.Tensor], most: int) -> list[list[str]]:
    """Return the names of each shard, in order, as many as fit."""
    parts, room = [[]], most
    for name, tensor in tensors.items():
        if parts[-1] and tensor.size > room:
            parts.append([])
            room = most
        parts[-1].append(name)
        room -= tensor.size
    return parts
