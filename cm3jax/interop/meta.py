"""Chameleon as Meta publishes it -> the tensors that Hugging Face's files have, which `chameleon` reads.

    models/7b/  consolidated.pth, or consolidated.00.pth to consolidated.03.pth: one for each model-parallel process
                params.json, and consolidate_params.json over it
    tokenizer/  text_tokenizer.json, vqgan.ckpt, vqgan.yaml

The processes split q, k, v, the MLP's first two matrices and the output layer by rows, the output projections and the
embedding table by columns; norms are copies. q, k and v may be one tensor, and the MLP's first two. Three things differ
from Hugging Face's files beside the names:

- Rotary positions turn neighbours (2i, 2i + 1) of a head there and (i, i + k/2) here, so that rows of q and k change
  places; scale and bias of their norms with them.
- Those scales and biases belong to a process [k]: all of its heads share them. Here each head has its own [heads, k].
- Norms of the residual stream are one thing in training. If the copies differ by a rounding, their mean is taken.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from cm3jax.interop import chameleon, mapped
from cm3jax.types import UserError

TABLE, HEAD, NORM = "tok_embeddings.weight", "output.weight", "norm.weight"
PLAIN = {
    "attention.wo.weight": ("self_attn.o_proj.weight", 1),
    "feed_forward.w2.weight": ("mlp.down_proj.weight", 1),
    "attention.wv.weight": ("self_attn.v_proj.weight", 0),
    "feed_forward.w1.weight": ("mlp.gate_proj.weight", 0),
    "feed_forward.w3.weight": ("mlp.up_proj.weight", 0),
    "attention_norm.weight": ("input_layernorm.weight", None),
    "ffn_norm.weight": ("post_attention_layernorm.weight", None),
}
"""Of a layer: Meta's name -> Hugging Face's, and the axis by which the processes split it (None: copies)."""
FUSED = {
    "attention.wqkv.weight": ("attention.wq.weight", "attention.wk.weight", "attention.wv.weight"),
    "feed_forward.w13.weight": ("feed_forward.w1.weight", "feed_forward.w3.weight"),
}
"""Tensors that hold several, rows below rows."""
NOT_WEIGHTS = {"rope.freqs"}
NUMBER = re.compile(r"consolidated(?:\.([0-9]+))?\.(?:pth|pt)")
DEFAULTS = {"n_kv_heads": None, "rope_theta": 10_000.0, "swin_norm": False, "norm_eps": 1e-5, "qk_normalization": True}
LONG = 16_384
"""Positions of a model whose rotations are slower than usual; else 4,096 (arXiv 2405.09818 table 1)."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """What params.json says.

    Attributes:
      heads, groups: Of queries; of keys and values.
      width: Of a head.
      shards: Model-parallel processes, one file each.
    """

    heads: int
    groups: int
    width: int
    shards: int


# ------------------------------------------------------------------------------------------------------------ settings


def params(files: dict[pathlib.Path, dict[str, Any]], where: pathlib.Path) -> dict[str, Any]:
    """Return the settings in a model's JSON files, what stands under "model" included; consolidate_params.json last."""
    found: dict[str, Any] = {}
    for path in sorted(files, key=lambda path: "consolidate" in path.name):
        about = files[path]
        found |= {k: v for k, v in about.items() if not isinstance(v, dict)} | (about.get("model") or {})
    if missing := [name for name in ("dim", "n_layers", "n_heads") if name not in found]:
        raise UserError(f"{where}: no {missing[0]} in params.json; take the file that came with the weights")
    return DEFAULTS | found


def settings(
    about: dict[str, Any], rows: int, mlp: int, names: dict[str, int], dtype: str, where: pathlib.Path
) -> dict[str, Any]:
    """Return the config.json that Hugging Face's files would have.

    Args:
      about: From `params`.
      rows: Of the embedding table.
      mlp: Width of the feed-forward layer.
      names: The tokenizer's entries: name -> id.
      dtype: Of the weights.
    """
    if about["qk_normalization"] is not True:
        raise UserError(
            f"{where}: qk_normalization = {about['qk_normalization']!r}: must be true, as in all Chameleons"
        )
    theta = about["rope_theta"]
    if type(theta) not in (int, float) or theta <= 0:
        raise UserError(f"{where}: rope_theta = {theta!r}: must be a number above 0")
    return {
        **chameleon.DEFAULTS,
        "vocab_size": rows,
        "hidden_size": about["dim"],
        "intermediate_size": mlp,
        "num_hidden_layers": about["n_layers"],
        "num_attention_heads": about["n_heads"],
        "num_key_value_heads": about["n_kv_heads"],
        "max_position_embeddings": about.get("max_seq_len") or (LONG if theta > DEFAULTS["rope_theta"] else 4096),
        "rms_norm_eps": about["norm_eps"],
        "rope_theta": float(theta),
        "swin_norm": about["swin_norm"],
        "vocabulary_map": names,
        "dtype": dtype,
    }


# -------------------------------------------------------------------------------------------------------------- shards


def ordered(paths: list[pathlib.Path], about: dict[str, Any], folder: pathlib.Path) -> list[pathlib.Path]:
    """Return the files in the order of their processes.

    Raises:
      UserError: naming the one that is missing.
    """
    numbers = {}
    for path in paths:
        match = NUMBER.fullmatch(path.name)
        if not match:
            raise UserError(f"{path}: has Meta's tensors, but no name consolidated.NN.pth that says which part it is")
        number = int(match[1] or 0)
        if number in numbers:
            raise UserError(f"{path}: is part {number}, and so is {numbers[number].name}; remove one of them")
        numbers[number] = path
    whole = len(paths) == 1 and paths[0].name == "consolidated.pth"  # whatever params.json tells of the training
    count = 1 if whole else about.get("model_parallel_size") or max(numbers) + 1
    if type(count) is not int or not 0 < count <= 4096:
        raise UserError(f"{folder}: model_parallel_size = {count!r}: must be a whole number from 1 on")
    if lost := [i for i in range(count) if i not in numbers]:
        raise UserError(f"{folder / f'consolidated.{lost[0]:02}.pth'}: missing; the model has {count} parts")
    if max(numbers) >= count:
        raise UserError(f"{numbers[max(numbers)]}: one part more than model_parallel_size = {count} in params.json")
    return [numbers[i] for i in range(count)]


def tensors(shards: list[mapped.Tensors], about: dict[str, Any]) -> dict[str, mapped.Tensor]:
    """Return Hugging Face's tensors, each made of its parts when it is read.

    Raises:
      UserError: naming the file and the tensor that is missing, left over, or not as in the other files.
    """
    parts = [_split(shard, _shape(about, shard, len(shards))) for shard in shards]
    shape, latest = _shape(about, shards[0], len(shards)), _Latest()
    for shard, part in zip(shards, parts, strict=True):
        if odd := sorted(set(part) ^ set(parts[0])):
            owner, lacks = (shards[0], shard) if odd[0] in parts[0] else (shard, shards[0])
            raise UserError(f"{lacks.path}: no tensor {odd[0]!r}, which {owner.path.name} has")
    found = {}
    for name in parts[0]:
        pieces = [part[name] for part in parts]
        for shard, piece in zip(shards, pieces, strict=True):
            if (piece.shape, piece.dtype) != (pieces[0].shape, pieces[0].dtype):
                raise UserError(
                    f"{shard.path}: {name} is {piece.dtype} {piece.shape}, but {pieces[0].dtype} {pieces[0].shape} in"
                    f" {shards[0].path.name}"
                )
        theirs, tensor = _made(name, pieces, shape, latest, shards[0].path)
        found[theirs] = tensor
    return found


def mlp_width(shards: list[mapped.Tensors], about: dict[str, Any]) -> int:
    """Return the width of the feed-forward layer, which params.json tells only by a rule."""
    name = "layers.0.feed_forward.w2.weight"
    found = shards[0].found.get(name)
    if found is None or len(found.shape) != 2:
        raise UserError(f"{shards[0].path}: no matrix {name!r}")
    return found.shape[1] * len(shards)


def _shape(about: dict[str, Any], shard: mapped.Tensors, shards: int) -> Shape:
    heads, groups, dim = about["n_heads"], about["n_kv_heads"], about["dim"]
    groups = heads if groups is None else groups
    for name, value in (("n_heads", heads), ("n_kv_heads", groups), ("dim", dim)):
        if type(value) is not int or value < 1 or value % shards:
            raise UserError(f"{shard.path.parent}: {name} = {value!r}: must be a multiple of its {shards} parts")
    if dim % (2 * heads):
        raise UserError(f"{shard.path.parent}: dim = {dim}: must be n_heads = {heads} heads of an even width")
    return Shape(heads, groups, dim // heads, shards)


def _split(shard: mapped.Tensors, shape: Shape) -> dict[str, mapped.Tensor]:
    """Return a file's tensors by name, fused ones as several."""
    found = {}
    rows = [count // shape.shards * shape.width for count in (shape.heads, shape.groups, shape.groups)]
    for name, tensor in shard.found.items():
        if name in NOT_WEIGHTS:
            continue
        layer, whole = next(((name[: -len(x) - 1], x) for x in FUSED if name.endswith(f".{x}")), ("", ""))
        if not whole:
            found[name] = tensor
            continue
        inner = FUSED[whole]
        sizes = rows if len(inner) == 3 else [tensor.shape[0] // 2] * 2 if tensor.shape else [0, 0]
        if len(tensor.shape) != 2 or tensor.shape[0] != sum(sizes):
            raise UserError(
                f"{shard.path}: {name} has shape {tensor.shape}, must have {sum(sizes)} rows by params.json"
            )
        for i, (one, size) in enumerate(zip(inner, sizes, strict=True)):
            if f"{layer}.{one}" in shard.found:
                raise UserError(f"{shard.path}: {layer}.{one} stands twice, in {name} too")
            found[f"{layer}.{one}"] = _rows(tensor, sum(sizes[:i]), size)
    return found


def _rows(tensor: mapped.Tensor, first: int, count: int) -> mapped.Tensor:
    origin = f"{tensor.origin} (its rows {first:,} to {first + count:,})"
    return mapped.Tensor((count, *tensor.shape[1:]), tensor.dtype, lambda: tensor[first : first + count], origin)


class _Latest:
    """The tensor that was put together last: blocks of one are read one after another."""

    def __init__(self):
        self.key, self.value = None, None

    def get(self, key: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        if self.key != key:
            self.key, self.value = None, None  # the old one goes before the new one comes
            self.key, self.value = key, make()
        return self.value


def _made(
    name: str, parts: list[mapped.Tensor], shape: Shape, latest: _Latest, path: pathlib.Path
) -> tuple[str, mapped.Tensor]:
    """Return Hugging Face's name of a tensor, and the tensor."""
    if name in (TABLE, HEAD, NORM):
        theirs, axis = {
            TABLE: (chameleon.NAMES["table"], 1),
            HEAD: (chameleon.NAMES["head"], 0),
            NORM: ("model.norm.weight", None),
        }[name]
        return theirs, _joined(name, parts, axis, latest)
    match = re.fullmatch(r"layers\.([0-9]+)\.(.+)", name)
    layer, rest = (f"model.layers.{match[1]}.", match[2]) if match else ("", "")
    if rest in PLAIN:
        theirs, axis = PLAIN[rest]
        return layer + theirs, _joined(name, parts, axis, latest)
    if turned := re.fullmatch(r"attention\.w([qk])\.weight", rest):
        heads = shape.heads if turned[1] == "q" else shape.groups
        whole = _joined(name, parts, 0, latest)
        if len(whole.shape) != 2 or whole.shape[0] != heads * shape.width:
            raise UserError(
                f"{path}: {name} has shape {parts[0].shape}, must have {heads * shape.width} rows in all parts"
            )
        make = lambda: halved(whole.read(), heads)  # noqa: E731
        return f"{layer}self_attn.{turned[1]}_proj.weight", dataclasses.replace(whole, read=make)
    if normed := re.fullmatch(r"attention\.([qk])_normalization\.(weight|bias)", rest):
        heads = (shape.heads if normed[1] == "q" else shape.groups) // shape.shards
        if any(part.shape != (shape.width,) for part in parts):
            raise UserError(f"{path}: {name} has shape {parts[0].shape}, must be {(shape.width,)}")
        make = lambda: np.repeat(np.stack([halved(part.read(), 1) for part in parts]), heads, 0)  # noqa: E731
        return (
            f"{layer}self_attn.{normed[1]}_norm.{normed[2]}",
            mapped.Tensor((heads * shape.shards, shape.width), parts[0].dtype, make, _together(parts)),
        )
    raise UserError(f"{path}: {name} is no tensor of Chameleon's")


def _joined(name: str, parts: list[mapped.Tensor], axis: int | None, latest: _Latest) -> mapped.Tensor:
    """Return the whole of a tensor that the processes split along an axis, or have copies of."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if axis is None:
        return dataclasses.replace(first, read=lambda: _mean([part.read() for part in parts]))
    shape = tuple(n * len(parts) if i == axis else n for i, n in enumerate(first.shape))
    make = lambda: latest.get(name, lambda: np.concatenate([part.read() for part in parts], axis))  # noqa: E731
    return mapped.Tensor(shape, first.dtype, make, _together(parts))


def _together(parts: list[mapped.Tensor]) -> str:
    """Return what to call a tensor that is made of parts."""
    return parts[0].origin + (f" (with its {len(parts)} parts put together)" if len(parts) > 1 else "")


def _mean(copies: list[np.ndarray]) -> np.ndarray:
    """Return the mean of copies, which of equal ones is the copy itself, bit for bit."""
    if all(np.array_equal(copies[0], copy) for copy in copies[1:]):
        return copies[0]
    return np.mean([copy.astype(np.float32) for copy in copies], 0).astype(copies[0].dtype)


def halved(x: np.ndarray, heads: int) -> np.ndarray:
    """Return rows [heads * k, ...] with each head's pairs (2i, 2i + 1) moved to (i, i + k/2)."""
    k = x.shape[0] // heads
    return x.reshape(heads, k // 2, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Return a JSON object; raises a UserError if the file holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path}: not readable ({e})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds {mapped.short(found)}, must be an object")
    return found
