"""Published CLIP weights: Hugging Face's and OpenAI's names in a safetensors file -> our parameters, and back.

Sizes are read from the tensors. What they do not tell, heads and activation, stands in Hugging Face's config.json; all
of OpenAI's towers have heads of 64 and quick_gelu. OpenAI's own files are TorchScript, which `import` reads as they
are, with a tokenizer's files beside them (OpenAI's or Hugging Face's); what `export` makes of them is such a folder:

    cm3jax import ViT-B-32.pt runs/clip && cm3jax export runs/clip clip --to hf
"""

import json
import math
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import numpy as np
import safetensors

from cm3jax import config as configs
from cm3jax import sharding
from cm3jax.nn import clip
from cm3jax.types import UserError

FILE, CONFIG = "model.safetensors", "config.json"
HEAD = 64
"""Width of a head in OpenAI's towers (arXiv 2103.00020 table 20)."""
HEADS = {"text_config": 8, "vision_config": 12}
ACTIVATION = "quick_gelu"
"""What transformers takes where a config.json does not say, since it may hold differences only."""
NOT_WEIGHTS = re.compile(r".*\.position_ids|input_resolution|context_length|vocab_size")
"""Tensors in published files that hold no weights."""

HUGGING_FACE = {
    "logit_scale": "logit_scale",
    "text/table": "text_model.embeddings.token_embedding.weight",
    "text/positions": "text_model.embeddings.position_embedding.weight",
    "text/norm/": "text_model.final_layer_norm.",
    "text/projection": "text_projection.weight",
    "text/layers/": "text_model.encoder.layers.{}.",
    "vision/first": "vision_model.embeddings.class_embedding",
    "vision/patches": "vision_model.embeddings.patch_embedding.weight",
    "vision/positions": "vision_model.embeddings.position_embedding.weight",
    "vision/first_norm/": "vision_model.pre_layrnorm.",
    "vision/norm/": "vision_model.post_layernorm.",
    "vision/projection": "visual_projection.weight",
    "vision/layers/": "vision_model.encoder.layers.{}.",
    "attention_norm/": "layer_norm1.",
    "mlp_norm/": "layer_norm2.",
    "q/": "self_attn.q_proj.",
    "k/": "self_attn.k_proj.",
    "v/": "self_attn.v_proj.",
    "out/": "self_attn.out_proj.",
    "up/": "mlp.fc1.",
    "down/": "mlp.fc2.",
    "matrix/w": "weight",
    "b": "bias",
    "scale": "weight",
    "bias": "bias",
}
OPENAI = HUGGING_FACE | {
    "text/table": "token_embedding.weight",
    "text/positions": "positional_embedding",
    "text/norm/": "ln_final.",
    "text/projection": "text_projection",
    "text/layers/": "transformer.resblocks.{}.",
    "vision/first": "visual.class_embedding",
    "vision/patches": "visual.conv1.weight",
    "vision/positions": "visual.positional_embedding",
    "vision/first_norm/": "visual.ln_pre.",
    "vision/norm/": "visual.ln_post.",
    "vision/projection": "visual.proj",
    "vision/layers/": "visual.transformer.resblocks.{}.",
    "attention_norm/": "ln_1.",
    "mlp_norm/": "ln_2.",
    "q/": "attn.in_proj_",
    "k/": "attn.in_proj_",
    "v/": "attn.in_proj_",
    "out/": "attn.out_proj.",
    "up/": "mlp.c_fc.",
    "down/": "mlp.c_proj.",
}
"""Pieces of our parameters' paths -> pieces of the tensors' names; {} is the layer's number."""


class Source(NamedTuple):
    """Where one of our arrays comes from: a tensor's name, its shape, and what turns it into ours and back."""

    name: str
    shape: tuple[int, ...]
    take: Callable[[np.ndarray], np.ndarray]
    give: Callable[[np.ndarray], np.ndarray] | None
    """None where the tensor holds others of our arrays too, as OpenAI's."""


def load(folder) -> tuple[configs.CLIP, dict[str, Any]]:
    """Return the network in a folder of published weights, and its parameters, float32.

    Raises:
      UserError: if it holds no such file, or naming the tensor that is missing, has another shape, or is left over.
    """
    folder = pathlib.Path(folder)
    with _opened(folder / FILE) as file:
        return read(folder, file)


def read(folder: pathlib.Path, file) -> tuple[configs.CLIP, dict[str, Any]]:
    """Return what `load` does, of an open file: safetensors', or what has its keys, get_slice, get_tensor and path."""
    model, wanted = _checked(folder, file)
    found = {}
    for path, layers in wanted.items():
        arrays = [layer.take(file.get_tensor(layer.name).astype(np.float32)) for layer in layers]
        found[path] = np.stack(arrays) if "/layers/" in path else arrays[0]
    return model, flax.traverse_util.unflatten_dict(found, sep="/")


def look(folder) -> configs.CLIP:
    """Return the network in a folder of published weights, without reading them; raises what `load` raises of names."""
    folder = pathlib.Path(folder)
    with _opened(folder / FILE) as file:
        return sizes(folder, file)


def sizes(folder: pathlib.Path, file) -> configs.CLIP:
    """Return what `look` does, of an open file."""
    return _checked(folder, file)[0]


def _checked(folder: pathlib.Path, file):
    """Return the network whose tensors an open file holds, and where each of our arrays comes from."""
    path = getattr(file, "path", folder / FILE)
    names = _layout(path, set(file.keys()))
    model, rows = _sizes(path, file, names)
    wanted = sources(model, rows, names)
    _compare(path, file, wanted)
    return model, wanted


def sources(model: configs.CLIP, rows: int, names: dict[str, str]) -> dict[str, list[Source]]:
    """Return where each of our parameters comes from, layer by layer.

    Args:
      rows: Of the text tower's table.
      names: HUGGING_FACE or OPENAI.
    """
    net = clip.CLIP(model, rows)
    shapes = sharding.unbox(jax.eval_shape(lambda key: clip.init(net, key), jax.random.key(0)))
    found = {}
    for path, leaf in flax.traverse_util.flatten_dict(shapes, sep="/").items():
        stacked = "/layers/" in path
        shape = leaf.shape[1:] if stacked else leaf.shape
        source = _source(path, shape, names, model.patch)
        count = leaf.shape[0] if stacked else 1
        found[path] = [source._replace(name=source.name.format(i)) for i in range(count)]
    return found


def _source(path: str, shape: tuple[int, ...], names: dict[str, str], patch: int) -> Source:
    """Return where one layer's parameter comes from; torch's matrices are [out, in], its kernels [out, in, h, w]."""
    name, rest = "", path
    while rest:
        piece = next(piece for piece in sorted(names, key=len, reverse=True) if rest.startswith(piece))
        name, rest = name + names[piece], rest.removeprefix(piece)
    if "in_proj_" in name:  # q, k and v in one
        which, width = "qkv".index(path.split("/")[2]), shape[-1]
        part = slice(which * width, (which + 1) * width)
        return Source(name, (3 * width, *shape[1:]), lambda x: x[part].T, None)
    if path == "vision/patches":
        kernel = (shape[1], 3, patch, patch)
        back = lambda x: x.reshape(patch, patch, 3, shape[1]).transpose(3, 2, 0, 1)  # noqa: E731
        return Source(name, kernel, lambda x: x.transpose(2, 3, 1, 0).reshape(shape), back)
    if path.endswith("/w") or (path.endswith("projection") and names is HUGGING_FACE):
        return Source(name, shape[::-1], lambda x: x.T, lambda x: x.T)
    return Source(name, shape, lambda x: x, lambda x: x)


def tensors(model: configs.CLIP, params) -> dict[str, np.ndarray]:
    """Return Hugging Face's tensors of our parameters, unboxed."""
    ours, found = flax.traverse_util.flatten_dict(params, sep="/"), {}
    for path, layers in sources(model, len(params["text"]["table"]), HUGGING_FACE).items():
        for i, layer in enumerate(layers):
            found[layer.name] = np.array(layer.give(ours[path][i] if "/layers/" in path else ours[path]), order="C")
    return found


def settings(model: configs.CLIP, rows: int, begin: int, end: int) -> dict[str, Any]:
    """Return Hugging Face's config.json.

    Args:
      rows: Of the text tower's table.
      begin, end: Ids around a text.
    """

    def tower(name: str) -> dict[str, Any]:
        width, layers, heads = (getattr(model, f"{name}_{what}") for what in ("width", "layers", "heads"))
        sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
        return sizes | {"num_attention_heads": heads, "hidden_act": model.activation, "projection_dim": model.size}

    ids = {"vocab_size": rows, "bos_token_id": begin, "eos_token_id": end, "pad_token_id": end}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": model.size,
        "text_config": tower("text") | ids | {"max_position_embeddings": model.context},
        "vision_config": tower("vision") | {"image_size": model.resolution, "patch_size": model.patch},
    }


def preprocessing(model: configs.CLIP) -> dict[str, Any]:
    """Return Hugging Face's preprocessor_config.json."""
    side = model.resolution
    return {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "resample": 3,  # Pillow's bicubic
        "image_mean": clip.MEAN.tolist(),
        "image_std": clip.DEVIATION.tolist(),
    }


# ---------------------------------------------------------------------------------------------------- what is in a file


def _opened(path: pathlib.Path):
    if not path.is_file():
        raise UserError(
            f"CLIP weights {str(path)!r}: no such file; cm3jax/retrieval/weights.py says what belongs there"
        )
    try:
        return safetensors.safe_open(path, framework="numpy")
    except (safetensors.SafetensorError, OSError) as e:
        raise UserError(f"CLIP weights {str(path)!r}: not a safetensors file ({e})") from None


def _layout(path: pathlib.Path, names: set[str]) -> dict[str, str]:
    for layout in (HUGGING_FACE, OPENAI):
        if layout["vision/first"] in names:
            return layout
    if "visual.layer1.0.conv1.weight" in names:
        raise UserError(f"CLIP weights {str(path)!r}: of a ResNet; take those of a ViT, such as ViT-B/32")
    raise UserError(f"CLIP weights {str(path)!r}: no tensor {HUGGING_FACE['vision/first']!r}, nor OpenAI's name of it")


def _sizes(path: pathlib.Path, file, names: dict[str, str]) -> tuple[configs.CLIP, int]:
    """Return the network as the tensors' shapes tell it, and the rows of its text table."""
    present = set(file.keys())

    def shape(name: str, dimensions: int) -> list[int]:
        if names[name] not in present:
            raise UserError(f"CLIP weights {str(path)!r}: no tensor {names[name]!r}")
        found = file.get_slice(names[name]).get_shape()
        if len(found) != dimensions:
            raise UserError(
                f"CLIP weights {str(path)!r}: {names[name]} has shape {tuple(found)}, must have {dimensions} dimensions"
            )
        return found

    def depth(name: str) -> int:
        before, after = map(re.escape, names[name].split("{}"))
        return len({m[1] for tensor in present if (m := re.match(f"{before}([0-9]+){after}", tensor))})

    (rows, text_width), (context, _) = shape("text/table", 2), shape("text/positions", 2)
    width, _, patch, _ = shape("vision/patches", 4)
    side = math.isqrt(shape("vision/positions", 2)[0] - 1)
    size = shape("text/projection", 2)[0 if names is HUGGING_FACE else 1]
    if names is HUGGING_FACE:
        heads, activation = _told(path.parent / CONFIG)
    else:
        heads, activation = {"text_heads": text_width // HEAD, "vision_heads": width // HEAD}, ACTIVATION
    sizes = {
        "resolution": side * patch,
        "patch": patch,
        "vision_width": width,
        "vision_layers": depth("vision/layers/"),
        "context": context,
        "text_width": text_width,
        "text_layers": depth("text/layers/"),
        "size": size,
        "activation": activation,
    }
    return configs.from_json(configs.CLIP, sizes | heads, f"CLIP weights {str(path)!r}"), rows


def _told(path: pathlib.Path) -> tuple[dict[str, int], str]:
    """Return heads and activation from Hugging Face's config.json."""
    try:
        about = json.loads(path.read_text())
        towers = {name: about.get(name) or {} for name in HEADS}
        heads = {
            f"{name.split('_')[0]}_heads": tower.get("num_attention_heads", HEADS[name])
            for name, tower in towers.items()
        }
        activations = {tower.get("hidden_act", ACTIVATION) for tower in towers.values()}
    except FileNotFoundError:
        raise UserError(
            f"{str(path)!r}: no such file; Hugging Face's weights need the config.json beside them"
        ) from None
    except (OSError, ValueError, AttributeError) as e:
        raise UserError(f"{str(path)!r}: not readable ({e}); take the file published with the weights") from None
    if len(activations) > 1:
        raise UserError(
            f"{str(path)!r}: hidden_act is {' and '.join(sorted(activations))}; one for both towers is known"
        )
    return heads, activations.pop()


def _compare(path: pathlib.Path, file, wanted: dict[str, list[Source]]) -> None:
    """Raise a UserError that names the first tensor which is not as the network has it."""
    present, shapes = set(file.keys()), {s.name: s.shape for layers in wanted.values() for s in layers}
    for name, shape in shapes.items():
        if name not in present:
            raise UserError(f"CLIP weights {str(path)!r}: no tensor {name!r}")
        if (found := tuple(file.get_slice(name).get_shape())) != shape:
            raise UserError(f"CLIP weights {str(path)!r}: {name} has shape {found}, must be {shape}")
    if extra := sorted(name for name in present - set(shapes) if not NOT_WEIGHTS.fullmatch(name)):
        raise UserError(
            f"CLIP weights {str(path)!r}: {extra[0]} is no tensor of plain CLIP ({len(extra)} such); take other weights"
        )
