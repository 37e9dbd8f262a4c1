"""What torch.save writes (.pt, .pth, .ckpt, .bin), read without torch.

Since torch 1.6 a file is a zip archive: data.pkl holds the objects, data/KEY the numbers of each storage, not
compressed, which are mapped in place. Before, it was five pickles and then the storages one after another. In both, a
tensor is a call of torch._utils._rebuild_tensor_v2(storage, offset, shape, stride, ...). The pickles are read by
`pickles`, which executes nothing; everything that they claim is checked against the file.

What torch.jit.save writes (OpenAI's CLIP) is an archive too, with a program in code/, which is not looked at: data.pkl
holds the modules, objects of the program's classes __torch__.*, which are read as their attributes by name.
"""

import dataclasses
import io
import math
import mmap
import os
import pathlib
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

from cm3jax.interop import mapped, pickles
from cm3jax.interop.pickles import Global
from cm3jax.types import UserError

STORAGES = {
    Global("torch", f"{name}Storage"): np.dtype(dtype)
    for name, dtype in {
        "Double": np.float64,
        "Float": np.float32,
        "Half": np.float16,
        "BFloat16": ml_dtypes.bfloat16,
        "Long": np.int64,
        "Int": np.int32,
        "Short": np.int16,
        "Char": np.int8,
        "Byte": np.uint8,
        "Bool": np.bool_,
        "ComplexFloat": np.complex64,
        "ComplexDouble": np.complex128,
    }.items()
}
UNTYPED = Global("torch.storage", "UntypedStorage")
DTYPES = {
    Global("torch", name): np.dtype(dtype)
    for name, dtype in {
        "float64": np.float64,
        "float32": np.float32,
        "float16": np.float16,
        "bfloat16": ml_dtypes.bfloat16,
        "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
        "float8_e5m2": ml_dtypes.float8_e5m2,
        "int64": np.int64,
        "int32": np.int32,
        "int16": np.int16,
        "int8": np.int8,
        "uint64": np.uint64,
        "uint32": np.uint32,
        "uint16": np.uint16,
        "uint8": np.uint8,
        "bool": np.bool_,
    }.items()
}
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
"""The first two objects of a file of the old kind."""
MOST_PICKLE = 2**28
"""Bytes of the objects without the numbers: Meta's 7B has 50 KB; it is read into memory, and takes a minute."""
MOST_THINGS, MOST_DEPTH = 1_000_000, 64
"""Of the objects: a few instructions can make a list of lists that has more members than there are atoms."""
SAFE = "nothing was executed; save the weights alone with torch.save(model.state_dict(), FILE), or take safetensors"
AGAIN = "the file is damaged or was made wrongly; fetch it again"


@dataclasses.dataclass(frozen=True, eq=False)
class Storage:
    """A storage as the pickle claims it: `count` numbers under a key."""

    dtype: np.dtype
    key: str
    count: int

    @property
    def size(self) -> int:
        """Bytes of its numbers."""
        return self.count * self.dtype.itemsize


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Claim:
    """A tensor as the pickle claims it, not yet checked: a view of a storage."""

    storage: Any
    offset: Any
    shape: Any
    stride: Any
    dtype: Any = None


Places = dict[str, tuple[int, int]]
"""Where in the file each storage begins, and its bytes."""


def open(path) -> mapped.Tensors:
    """Return what a file of torch.save holds.

    Raises:
      UserError: naming the file, and what in it would run code, is not torch's, or does not fit.
    """
    path = pathlib.Path(path)
    with path.open("rb") as file:
        start = file.read(4)
    try:
        tree, places = _zip(path) if start == b"PK\x03\x04" else _old(path)
    except pickles.Refused as e:
        raise UserError(f"{path}: its pickle {e}; {SAFE}") from None
    found, values = {}, {}
    for name, value in _leaves(path, tree):
        if name in found or name in values:
            raise UserError(f"{path}: {mapped.short(name)} stands twice; {AGAIN}")
        if isinstance(value, Claim):
            found[name] = _tensor(path, name, value, places)
        else:
            values[name] = value
    return mapped.Tensors(path, "torch", (path,), found, values)


# ------------------------------------------------------------------------------------------------- the two containers


def _zip(path: pathlib.Path) -> tuple[Any, Places]:
    """Return the objects in an archive, and where its storages are."""
    entries = _entries(path)
    roots = [name.removesuffix("data.pkl") for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise UserError(f"{path}: a zip file with {len(roots)} entries NAME/data.pkl, must have one; not torch.save's")
    root = roots[0]
    if _bytes(path, entries, f"{root}byteorder", b"little") != b"little":
        raise UserError(f"{path}: was written by a big-endian machine; save it again on another")
    plain = _of_the_program if f"{root}constants.pkl" in entries else lambda kind: False
    tree = pickles.load(io.BytesIO(_bytes(path, entries, f"{root}data.pkl")), CALLS, _persistent, plain)
    begin = f"{root}data/"
    places = {name.removeprefix(begin): entry[:2] for name, entry in entries.items() if name.startswith(begin)}
    return tree, places


def _entries(path: pathlib.Path) -> dict[str, tuple[int, int, int]]:
    """Return where each entry of an archive begins, its bytes and their checksum; a program's code is left out.

    Raises:
      UserError: naming the entry that is compressed, overlaps another, lies outside the file or stands twice.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            listed = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error, OSError) as e:
        raise UserError(f"{path}: not a whole zip file ({e}); {AGAIN}") from None
    names = [info.filename for info in listed]
    code = tuple(f"{x.removesuffix('constants.pkl')}code/" for x in names if re.fullmatch("[^/]+/constants.pkl", x))
    found, at, size = {}, 0, path.stat().st_size
    with path.open("rb") as file:
        for info in sorted(listed, key=lambda info: info.header_offset):
            where = f"{path}: entry {mapped.short(info.filename)}"
            packed = info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size
            if (packed or info.flag_bits & 1) and not info.filename.startswith(code):
                raise UserError(f"{where}: is compressed or encrypted, torch.save never does that; {AGAIN}")
            if info.filename in found:
                raise UserError(f"{where}: stands twice; {AGAIN}")
            if info.header_offset < at:
                raise UserError(f"{where}: overlaps the one before it; {AGAIN}")
            file.seek(info.header_offset)
            head = file.read(30)
            if len(head) < 30 or head[:4] != b"PK\x03\x04":
                raise UserError(f"{where}: does not begin where the archive says; {AGAIN}")
            start = info.header_offset + 30 + sum(struct.unpack("<HH", head[26:30]))
            at = start + info.compress_size
            if at > size:
                raise UserError(f"{where}: {info.compress_size:,} bytes from {start:,} on end behind the file; {AGAIN}")
            if not info.filename.startswith(code):
                found[info.filename] = start, info.file_size, info.CRC
    return found


def _bytes(
    path: pathlib.Path, entries: dict[str, tuple[int, int, int]], name: str, default: bytes | None = None
) -> bytes:
    """Return a small entry, checked by its checksum; the default if there is none."""
    if default is not None and name not in entries:
        return default
    start, size, checksum = entries[name]
    if size > MOST_PICKLE:
        raise UserError(f"{path}: entry {name!r} has {size:,} bytes, at most {MOST_PICKLE:,} are read")
    data = mapped.pages(path, start, size).tobytes()
    if zlib.crc32(data) != checksum:
        raise UserError(f"{path}: entry {name!r} is not what its checksum says; {AGAIN}")
    return data


def _old(path: pathlib.Path) -> tuple[Any, Places]:
    """Return the objects in a file of the old kind, and where its storages are."""
    known: dict[str, Storage] = {}

    def persistent(claim: Any) -> Any:
        if isinstance(claim, tuple) and len(claim) == 4 and claim[0] == "module":
            return claim[1]  # a class with its source text: a name here, like any other
        storage = _persistent(claim)
        same = known.setdefault(storage.key, storage)
        if (same.dtype, same.count) != (storage.dtype, storage.count):
            raise pickles.Refused(f"claims storage {mapped.short(storage.key)} in two ways")
        return storage

    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            raise UserError(f"{path}: an empty file")
        with mmap.mmap(file.fileno(), min(size, MOST_PICKLE), access=mmap.ACCESS_READ) as data:
            if pickles.load(data, {}, _none) != MAGIC or pickles.load(data, {}, _none) != PROTOCOL:
                raise UserError(f"{path}: a pickle, but not one of torch.save; {SAFE}")
            about = pickles.load(data, {}, _none)
            if not isinstance(about, dict) or about.get("little_endian") is not True:
                raise UserError(f"{path}: was written by a big-endian machine; save it again on another")
            tree = pickles.load(data, CALLS, persistent)
            keys = pickles.load(data, {}, _none)
            at = data.tell()
        return tree, _lined(path, file, at, size, keys, known)


def _lined(path: pathlib.Path, file, at: int, size: int, keys: Any, known: dict[str, Storage]) -> Places:
    """Return where storages are that lie one behind the other from `at` on, each after its count of numbers."""
    places: Places = {}
    for key in keys if isinstance(keys, list) else [keys]:
        where = f"{path}: storage {mapped.short(key)}"
        if not isinstance(key, str) or key not in known or key in places:
            raise UserError(f"{where}: stands twice, or no tensor is in it; {AGAIN}")
        file.seek(at)
        count, wanted = int.from_bytes(file.read(8), "little"), known[key]
        if count != wanted.count or at + 8 + wanted.size > size:
            raise UserError(f"{where}: {wanted.size:,} bytes are claimed at {at:,} of {size:,}; {AGAIN}")
        places[key] = at + 8, wanted.size
        at += 8 + wanted.size
    return places


# ------------------------------------------------------------------------------------------------- what may be "called"


def _persistent(claim: Any) -> Storage:
    """Return the storage that a persistent id stands for: ("storage", type, key, device, count)."""
    if not (isinstance(claim, tuple) and len(claim) in (5, 6) and claim[0] == "storage"):
        raise pickles.Refused(f"refers to {mapped.short(claim)}, which is no storage")
    kind, key, count = claim[1], claim[2], claim[4]
    dtype = np.dtype(np.uint8) if kind == UNTYPED else STORAGES.get(kind) if isinstance(kind, Global) else None
    if dtype is None:
        raise pickles.Refused(f"has a storage of type {mapped.short(kind)}, which is not known here")
    if len(claim) == 6 and claim[5] is not None:
        raise pickles.Refused(f"has a storage {mapped.short(key)} within another, as torch before 0.5 wrote")
    if not (isinstance(key, str) and mapped.counts([count])):
        raise pickles.Refused(f"has a storage {mapped.short(key)} of {mapped.short(count)} numbers")
    return Storage(dtype, key, count)


def _none(claim: Any) -> Any:
    raise pickles.Refused(f"refers to {mapped.short(claim)} where no storage can be")


def _rebuilt(storage, offset, shape, stride, grad=False, hooks=None, metadata=None) -> Claim:
    if metadata:  # "conj" or "neg": the numbers are not what is stored
        raise pickles.Refused(f"has a tensor with {mapped.short(metadata)}; call resolve_conj() and resolve_neg()")
    return Claim(storage, offset, shape, stride)


def _rebuilt_as(storage, offset, shape, stride, grad, hooks, dtype, metadata=None) -> Claim:
    claim = _rebuilt(storage, offset, shape, stride, metadata=metadata)
    if not isinstance(dtype, Global) or dtype not in DTYPES:
        raise pickles.Refused(f"has a tensor of type {mapped.short(dtype)}, which is not known here")
    return dataclasses.replace(claim, dtype=DTYPES[dtype])


def _parameter(data, grad=True, hooks=None, state=None) -> Any:
    return data


def _with_attributes(function, kind, arguments, state) -> Any:
    """Return a tensor to which attributes were added; they are left out."""
    plain = {Global("torch", "Tensor"), Global("torch._tensor", "Tensor"), Global("torch.nn.parameter", "Parameter")}
    if kind not in plain or function not in CALLS or function == REBUILD_TYPE or not isinstance(arguments, tuple):
        raise pickles.Refused(f"has a tensor of class {mapped.short(kind)}, made by {mapped.short(function)}")
    return CALLS[function](*arguments)


def _of_the_program(kind: Global) -> bool:
    """Return whether a class is one of a TorchScript program's own, whose objects are modules."""
    return kind.module == "__torch__" or kind.module.startswith("__torch__.")


def _items(pairs=()) -> dict[Any, Any]:
    return pickles.paired({}, pairs.items() if isinstance(pairs, dict) else pairs)


def _encoded(text: Any, encoding: Any) -> bytes:
    """Return bytes, which protocol 2 writes as text."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickles.Refused(f"would encode {mapped.short(text)} as {mapped.short(encoding)}")
    return text.encode("latin1")


def _device(*parts) -> str:
    return ":".join(map(str, parts))


REBUILD_TYPE = Global("torch._tensor", "_rebuild_from_type_v2")
CALLS: dict[Global, Callable[..., Any]] = {
    Global("torch._utils", "_rebuild_tensor"): _rebuilt,
    Global("torch._utils", "_rebuild_tensor_v2"): _rebuilt,
    Global("torch._utils", "_rebuild_tensor_v3"): _rebuilt_as,
    Global("torch._utils", "_rebuild_parameter"): _parameter,
    Global("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    REBUILD_TYPE: _with_attributes,
    Global("torch", "Size"): tuple,
    Global("torch", "device"): _device,
    Global("collections", "OrderedDict"): _items,
    Global("collections", "defaultdict"): lambda factory=None: {},
    Global("_codecs", "encode"): _encoded,
    **{
        Global("torch.jit._pickle", f"build_{kind}list"): lambda items: items
        for kind in ("int", "double", "bool", "tensor")
    },
    Global("torch.jit._pickle", "restore_type_tag"): lambda thing, kind: thing,
    **{Global(module, "set"): lambda items=(): set(map(pickles.key, items)) for module in ("builtins", "__builtin__")},
}
"""Stand-ins for the functions that a file of tensors calls; torch's own are never run."""


# ----------------------------------------------------------------------------------------------------- tensors by name


def _leaves(path: pathlib.Path, tree: Any) -> Iterator[tuple[str, Any]]:
    """Yield (name, value) of all that is no container, depth first; names are keys and numbers, joined by dots.

    Raises:
      UserError: if there is no end of it.
    """
    things = 0
    stack = [((), tree)]
    while stack:
        name, value = stack.pop()
        things += 1
        if things > MOST_THINGS or len(name) > MOST_DEPTH:
            raise UserError(
                f"{path}: more than {MOST_THINGS:,} things, or {MOST_DEPTH} containers in one another, at"
                f" {mapped.short('.'.join(name))}; {AGAIN}"
            )
        if isinstance(value, dict):
            inner = list(value.items())
        elif type(value) in (list, tuple):
            inner = list(enumerate(value))
        else:
            yield ".".join(name), value
            continue
        if things + len(stack) + len(inner) > MOST_THINGS:
            raise UserError(f"{path}: more than {MOST_THINGS:,} things; {AGAIN}")
        stack += [((*name, str(key)), item) for key, item in reversed(inner)]


def _tensor(path: pathlib.Path, name: str, claim: Claim, places: Places) -> mapped.Tensor:
    """Return a tensor whose claims fit its storage, and the storage the file."""
    where, storage = f"{path}: tensor {mapped.short(name)}", claim.storage
    if not isinstance(storage, Storage):
        raise UserError(f"{where}: its storage is {mapped.short(storage)}; {AGAIN}")
    if not (mapped.shaped(claim.shape) and mapped.counts(claim.stride) and mapped.counts([claim.offset])):
        claimed = mapped.short((claim.offset, claim.shape, claim.stride))
        raise UserError(f"{where}: offset, shape and stride {claimed} must be numbers from 0 on; {AGAIN}")
    shape, stride, dtype = tuple(claim.shape), tuple(claim.stride), claim.dtype or storage.dtype
    if len(shape) != len(stride):
        raise UserError(f"{where}: shape {shape} and stride {stride} are not of one length; {AGAIN}")
    if storage.key not in places:
        raise UserError(f"{where}: its storage {mapped.short(storage.key)} is not in the file; {AGAIN}")
    start, size = places[storage.key]
    if size != storage.size:
        raise UserError(f"{where}: its storage has {size:,} bytes, {storage.size:,} are claimed; {AGAIN}")
    count, held = math.prod(shape), size // dtype.itemsize
    last = claim.offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if count else 0
    if count and (last >= held or count > held):
        raise UserError(
            f"{where}: shape {shape} with stride {stride} from {claim.offset:,} on does not fit the {held:,} numbers of"
            f" its storage; {AGAIN}"
        )
    first, end = start + claim.offset * dtype.itemsize, start + (last + 1) * dtype.itemsize
    read = lambda: _view(path, first, end - first, dtype, shape, stride)  # noqa: E731
    return mapped.Tensor(shape, dtype, read, mapped.origin(path, name))


def _view(path, start: int, size: int, dtype: np.dtype, shape: tuple[int, ...], stride: tuple[int, ...]) -> np.ndarray:
    """Return numbers of a storage in place."""
    if not math.prod(shape):
        return np.empty(shape, dtype)
    steps = tuple(s * dtype.itemsize if n > 1 else 0 for n, s in zip(shape, stride, strict=True))
    return np.ndarray(shape, dtype, mapped.pages(path, start, size), strides=steps)
