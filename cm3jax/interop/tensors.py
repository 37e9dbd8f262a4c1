"""Any file or folder of tensors, recognised by its content, never by its name.

found = tensors.open(folder)
found.found["model.norm.weight"].shape       # nothing is read yet
found.read("model.norm.weight")              # mapped from the file, in its own type
"""

import hashlib
import json
import pathlib
from typing import Any

from cm3jax.interop import mapped, safetensor_files, torch_files
from cm3jax.types import UserError

OPENERS = {"safetensors": safetensor_files.open, "torch": torch_files.open}
MOST_INDEX = 2**26
"""Bytes of an index; that of a model with 100,000 tensors has ten million."""
BLOCK = 2**22
"""Bytes read at one time for a checksum."""


def open(path) -> mapped.Tensors:
    """Return what a file, an index of shards or a folder with either holds.

    Raises:
      UserError: naming the file, and the tensor if it is one's, that is missing, damaged or not to be trusted.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder of weights")
    file = _within(path) if path.is_dir() else path
    kind = recognised(file)
    if kind == "index":
        return _sharded(file)
    if kind not in OPENERS:
        with file.open("rb") as data:
            start = data.read(8)
        raise UserError(f"{file}: neither safetensors nor torch.save nor an index of shards; starts with {start!r}")
    return OPENERS[kind](file)


def recognised(path: pathlib.Path) -> str:
    """Return what a file is by its first bytes: "safetensors", "torch", "index", or "" for none of them."""
    with path.open("rb") as file:
        start = file.read(16)
    if start.lstrip().startswith(b"{") and b"\0" not in start:  # text; else a header of 123 bytes begins so
        return "index" if path.stat().st_size <= MOST_INDEX and "weight_map" in _json(path, False) else ""
    if start[8:9] == b"{":
        return "safetensors"
    return "torch" if start.startswith((b"PK\x03\x04", b"\x80")) else ""


def _within(folder: pathlib.Path) -> pathlib.Path:
    """Return the one file of a folder that says where its tensors are; an index speaks for its shards."""
    kinds = {path: recognised(path) for path in sorted(folder.iterdir()) if path.is_file()}
    for wanted in ("index", "safetensors", "torch"):
        paths = [path for path, kind in kinds.items() if kind == wanted]
        if len(paths) == 1:
            return paths[0]
        if paths:
            raise UserError(f"{folder}: has several, {paths[0].name} and {paths[1].name}; name the file to take")
    raise UserError(f"{folder}: no file in it is safetensors, torch.save or an index of shards")


def _json(path: pathlib.Path, strict: bool = True) -> dict[str, Any]:
    """Return a JSON object; if not strict, an empty one where there is none, and keys may stand twice."""
    try:
        hook = safetensor_files.once if strict else None
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=hook)
        if isinstance(data, dict):
            return data
        error: Any = "not an object"
    except (ValueError, RecursionError) as e:
        error = e
    if not strict:
        return {}
    raise UserError(f"{path}: not an index of shards ({error})")


def _sharded(index: pathlib.Path) -> mapped.Tensors:
    """Return the tensors of all shards that an index names, each where the index says, in the index's order."""
    where = _json(index)["weight_map"]
    if not isinstance(where, dict) or not where:
        raise UserError(f"{index}: weight_map {mapped.short(where)} must be an object of tensors' files")
    shards: dict[str, mapped.Tensors] = {}
    for name, file in where.items():
        if not isinstance(file, str) or pathlib.PurePath(file).name != file:
            raise UserError(f"{index}: tensor {mapped.short(name)} lies in {mapped.short(file)}, not a file's name")
        if file not in shards:
            shards[file] = _shard(index, name, file)
        if name not in shards[file].found:
            raise UserError(
                f"{index.parent / file}: has no tensor {mapped.short(name)}, which {index.name} places there"
            )
    for file, shard in shards.items():
        for name in shard.found:
            if where.get(name) != file:
                told = f"in {where[name]}" if name in where else "nowhere"
                raise UserError(f"{shard.path}: has tensor {mapped.short(name)}, which {index.name} places {told}")
    kinds = {shard.kind for shard in shards.values()}
    if len(kinds) > 1:
        raise UserError(f"{index}: its shards are of different kinds, {' and '.join(sorted(kinds))}")
    values = {name: value for shard in shards.values() for name, value in shard.values.items()}
    files = (index, *(shard.path for shard in shards.values()))
    return mapped.Tensors(index, kinds.pop(), files, {n: shards[f].found[n] for n, f in where.items()}, values)


def _shard(index: pathlib.Path, name: str, file: str) -> mapped.Tensors:
    path = index.parent / file
    if not path.is_file():
        raise UserError(f"{path}: missing; {index.name} places tensor {mapped.short(name)} there")
    kind = recognised(path)
    if kind not in OPENERS:
        raise UserError(f"{path}: neither safetensors nor torch.save; {index.name} names it as a shard")
    return OPENERS[kind](path)


# ------------------------------------------------------------------------------------------------------------ checksums


def digest(found: mapped.Tensors) -> str:
    """Return the SHA-256 of what was opened: a file's own, as sha256sum prints it; of several, that of their list.

    The list has a line "SHA-256, two spaces, name" for each file, sorted by name.
    """
    if len(found.files) == 1:
        return checksum(found.files[0])
    lines = [f"{checksum(path)}  {path.name}\n" for path in sorted(found.files, key=lambda path: path.name)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def verify(found: mapped.Tensors, wanted: str) -> None:
    """Raise a UserError unless what was opened has this SHA-256."""
    if (have := digest(found)) != wanted.strip().lower():
        raise UserError(f"{found.path}: its SHA-256 is {have}, not {wanted}; fetch it again, or pin what it is")


def checksum(path: pathlib.Path) -> str:
    """Return the SHA-256 of a file."""
    made = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            made.update(block)
    return made.hexdigest()
