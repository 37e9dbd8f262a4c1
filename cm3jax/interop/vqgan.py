"""Released image tokenizers <-> our VQGAN: taming-transformers', Chameleon's and LlamaGen's tensors by name.

    found = interop.tensors.open("vqgan.ckpt").found            # or any {name: array}
    network = vqgan.network(found, about)                       # about: Hugging Face's config.json, {} without one
    params = vqgan.read(found, network)                         # what nn/vqgan and tokenizers/image take, float32
    again = dict(vqgan.tensors(params, network))                # the same names and layouts, bit for bit
    vqgan.save(folder, network, params)                         # image/ of a run: config.json, weights.safetensors
    vqgan.with_settings(recipe, network)                        # what the run's recipe must say
    network.left                                                # names of tensors that were left out on purpose

Two forms are known, each recognised by its tensors' names under one of `PREFIXES`:

    taming     arXiv 2012.09841: VQGAN f16, the Gumbel f8, and Chameleon's (arXiv 2405.09818), in Meta's vqgan.ckpt and
               in Hugging Face's folders, there often without its decoder
    llamagen   arXiv 2406.06525: VQ-16 and VQ-8, codes of 8 dimensions compared at length 1

Kernels there are [out, in, h, w]. All downsample with one row and column of zeros behind the picture, none before it,
and have GroupNorm of 32 groups with eps 1e-6, as nn/vqgan does. A level's number counts halvings, from the full
resolution on; only LlamaGen's decoder numbers its levels in the order of their work, from the lowest resolution up.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from cm3jax import config as configs
from cm3jax import sharding
from cm3jax.interop import mapped
from cm3jax.nn import vqgan as nets
from cm3jax.tokenizers import image
from cm3jax.types import UserError

Tensors = Mapping[str, Any]
"""By name: `mapped.Tensor`s, or arrays. Names are those of the file; tensors of a language model may be among them."""

PREFIXES = ("model.vqmodel.", "state_dict.", "ema.", "model.", "")
"""What the tensors' names begin with: in Hugging Face's Chameleon, Lightning's checkpoints, LlamaGen's training (the
averaged weights before the last ones), and where the network is saved by itself."""

LANGUAGE_MODEL = "model.vqmodel."
"""With this beginning, all other tensors are those of the language model, and not looked at."""

LEFT = re.compile(
    r"(state_dict\.)?loss\..+"  # taming's discriminator and LPIPS
    r"|(optimizer_states|lr_schedulers|callbacks|loops)\..+"  # Lightning's
    r"|(discriminator|optimizer|optimizer_disc|scaler|scaler_disc)\..+"  # LlamaGen's
    r"|((state_dict|ema|model)\.)?quantize\.codebook_used"  # LlamaGen's count of codes, of use in training only
)
"""Tensors in published files that are no part of the tokenizer."""

FILE, RESOLUTION = "vqgan.safetensors", "resolution"
"""What an export writes, and the pixels of a side in its metadata."""
GROUPS, KERNEL = 32, 3
COMMON = {"patch": 1, "encoder_kernel": KERNEL, "groups": GROUPS, "middle": True, "l2_normalise": False}
FIELDS = {
    "taming": {field: (value,) for field, value in COMMON.items()} | {"quantizer": ("nearest", "argmax")},
    "llamagen": {field: (value,) for field, value in COMMON.items()}
    | {"quantizer": ("cosine",), "middle_attention": (True,)},
}
"""What a network of a form must be, as fields of `config.VQGAN`: the values that it may have."""

F16 = configs.VQGAN(width=128, multipliers=(1, 1, 2, 2, 4), attention=(4,), z=256)
F8 = configs.VQGAN(width=128, multipliers=(1, 1, 2, 4), attention=(3,), z=256)
CHAMELEON = dataclasses.replace(F16, attention=())
PUBLISHED = {
    "taming f16/1024": (F16, 1024, 256),
    "taming f16/16384": (F16, 16384, 256),
    "taming Gumbel f8/8192": (dataclasses.replace(F8, quantizer="argmax"), 8192, 256),
    "Chameleon": (CHAMELEON, 8192, 512),
    "LlamaGen VQ-16": (dataclasses.replace(F16, z=8, latents=256, quantizer="cosine"), 16384, 256),
    "LlamaGen VQ-8": (
        dataclasses.replace(F8, multipliers=(1, 2, 2, 4), z=8, latents=256, quantizer="cosine"), 16384, 256,
    ),
}  # fmt: skip
"""Network, codes, and the pixels of a side that it was trained on, which no tensor tells."""

HUGGING_FACE = {
    "embed_dim": 256,
    "num_embeddings": 8192,
    "double_latent": False,
    "latent_channels": 256,
    "resolution": 512,
    "in_channels": 3,
    "base_channels": 128,
    "channel_multiplier": [1, 1, 2, 2, 4],
    "num_res_blocks": 2,
    "attn_resolutions": None,
    "attn_type": "vanilla",
}
"""What transformers takes where the vq_config of a config.json does not say, since it may hold differences only."""

BOTH = {
    r"^(en|de)coder/first/": r"\1coder.conv_in.",
    r"^encoder/last/": r"encoder.conv_out.",
    r"^last/": r"decoder.conv_out.",
    r"^(en|de)coder/norm/": r"\1coder.norm_out.",
    r"^to_code/": r"quant_conv.",
    r"^from_code/": r"post_quant_conv.",
    r"^scores/": r"quantize.proj.",
    r"GroupNorm_0/": r"",
    r"\bquery/": r"q/",
    r"\bkey/": r"k/",
    r"\bvalue/": r"v/",
    r"\bout/": r"proj_out/",
    r"\b(kernel|scale)$": r"weight",
}
NAMES = {
    "taming": {
        r"^encoder/level(\d+)/": r"encoder.down.\1.",
        r"^encoder/down(\d+)/": r"encoder.down.\1.downsample.conv.",
        r"^decoder/level(\d+)/": r"decoder.up.\1.",
        r"^decoder/up(\d+)/": r"decoder.up.\1.upsample.conv.",
        r"/middle/block0/": r".mid.block_1.",
        r"/middle/attention/": r".mid.attn_1.",
        r"/middle/block1/": r".mid.block_2.",
        r"\bblock(\d+)/": r"block.\1.",
        r"\battention(\d+)/": r"attn.\1.",
    },
    "llamagen": {
        r"^(en|de)coder/level(\d+)/": r"\1coder.conv_blocks.\2.",
        r"^encoder/down(\d+)/": r"encoder.conv_blocks.\1.downsample.conv.",
        r"^decoder/up(\d+)/": r"decoder.conv_blocks.\1.upsample.conv.",
        r"/middle/block0/": r".mid.0.",
        r"/middle/attention/": r".mid.1.",
        r"/middle/block1/": r".mid.2.",
        r"\bblock(\d+)/": r"res.\1.",
        r"\battention(\d+)/": r"attn.\1.",
    },
}
"""Our parameters' paths -> the tensors' names, replaced one after another; `BOTH` follows."""

FIRST = {"taming": "encoder.down.0.block.0.conv1.weight", "llamagen": "encoder.conv_blocks.0.res.0.conv1.weight"}
"""The tensor by which a form is known."""


class Network(NamedTuple):
    """A tokenizer as its tensors tell it."""

    model: configs.VQGAN
    codes: int
    resolution: int
    """Pixels of a side that it was trained on; any multiple of `model.factor` can be set here, by _replace."""
    form: Literal["taming", "llamagen"] = "taming"
    prefix: str = ""
    """Of the tensors' names."""
    left: tuple[str, ...] = ()
    """Names of the tensors that are left out: discriminator, losses, optimizers."""


class Leaf(NamedTuple):
    """Where one of our arrays comes from."""

    shape: tuple[int, ...]
    """Ours."""
    name: str

    @property
    def theirs(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return tuple(self.shape[i] for i in (3, 2, 0, 1)) if len(self.shape) == 4 else self.shape


# ------------------------------------------------------------------------------------------------------------ settings


def network(
    tensors: Tensors, about: Mapping[str, Any] | None = None, resolution: int = 0, where: str = "image tokenizer"
) -> Network:
    """Return the tokenizer whose tensors these are, checked to the last one; no numbers are read.

    Args:
      tensors: As the file names them.
      about: Hugging Face's config.json, whose vq_config must agree; {} or None without one.
      resolution: Pixels of a side of its pictures; 0: what `about` or `PUBLISHED` says.
      where: What to call the checkpoint in errors.

    Raises:
      UserError: if the names are of no form that is known here; naming the tensor that is missing, has another shape
        or is left over, or the field of `about` that disagrees; or if nothing says the resolution.
    """
    prefix, form = _recognised(tensors, where)
    model, codes = _sizes(tensors, prefix, form, where)
    told = _told(about or {}, where)
    found = Network(model, codes, resolution or told.get("resolution", 0) or _trained_on(model, codes), form, prefix)
    if not found.resolution:
        raise UserError(f"{where}: its pictures' resolution is unknown, as it is no published one; give it")
    image.check(model, found.resolution, codes)
    if told:
        _agree(found._replace(resolution=told["resolution"]), told, where)
    return found._replace(left=compare(tensors, found, where))


def _recognised(tensors: Tensors, where: str) -> tuple[str, str]:
    """Return prefix and form."""
    for prefix in PREFIXES:
        for form, name in FIRST.items():
            if prefix + name in tensors:
                return prefix, form
    tried = " nor ".join(repr(name) for name in FIRST.values())
    raise UserError(f"{where}: holds no image tokenizer that is known here, neither {tried}")


def _sizes(tensors: Tensors, prefix: str, form: str, where: str) -> tuple[configs.VQGAN, int]:
    """Return the network as the tensors' names and shapes tell it, and the number of codes."""
    names = {name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        if name not in names:
            raise UserError(f"{where}: no tensor {prefix + name!r}")
        found = tuple(tensors[prefix + name].shape)
        if len(found) != dimensions or 0 in found:
            called = mapped.called(tensors, prefix + name, where)
            raise UserError(f"{called} has shape {found}, must have {dimensions} dimensions above 0")
        return found

    level, block = ("down", "block") if form == "taming" else ("conv_blocks", "res")
    back = "up" if form == "taming" else "conv_blocks"
    levels = _count(names, rf"encoder\.{level}\.([0-9]+)\.{block}\..*")
    width, argmax = shape("encoder.conv_in.weight", 4)[0], "quantize.embed.weight" in names
    channels = [shape(f"encoder.{level}.{i}.{block}.0.conv1.weight", 4)[0] for i in range(levels)]
    for i, count in enumerate(channels):
        if count % width or width % GROUPS:
            raise UserError(
                f"{where}: level {i} of the encoder has {count} channels, must be a multiple of the first layer's"
                f" {width}, and that of {GROUPS}"
            )
    codes, z = shape("quantize.embed.weight" if argmax else "quantize.embedding.weight", 2)
    latents = shape("encoder.conv_out.weight", 4)[0]
    decoder, blocks = any(name.startswith("decoder.") for name in names), rf"0\.{block}\.([0-9]+)\..*"
    middle = "encoder.mid.attn_1.q.weight" if form == "taming" else "encoder.mid.1.q.weight"
    deepest = _count(names, rf"encoder\.{level}\.{blocks}")
    sizes = {
        "width": width,
        "multipliers": [count // width for count in channels],
        "encoder_blocks": deepest,
        "decoder_blocks": _count(names, rf"decoder\.{back}\.{blocks}") if decoder else deepest + 1,
        "attention": [i for i in range(levels) if f"encoder.{level}.{i}.attn.0.q.weight" in names],
        "middle_attention": middle in names,
        "z": z,
        "latents": latents if latents != z else 0,
        "quantizer": "argmax" if argmax else "cosine" if form == "llamagen" else "nearest",
        "shortcut_kernel": KERNEL if any(".conv_shortcut." in name for name in names) else 1,
        "decoder": decoder,
    }
    return configs.from_json(configs.VQGAN, sizes, where), codes


def _count(names: set[str], pattern: str) -> int:
    """Return how many numbers stand at the pattern's group."""
    return len({match[1] for name in names if (match := re.fullmatch(pattern, name))})


def _trained_on(model: configs.VQGAN, codes: int) -> int:
    """Return the resolution of the published tokenizer that is this one, 0 if none is."""
    whole = dataclasses.replace(model, decoder=True)
    return next((side for known, size, side in PUBLISHED.values() if (known, size) == (whole, codes)), 0)


def _told(about: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the vq_config of a config.json with transformers' defaults, {} if it has none."""
    if "vq_config" not in about and about.get("model_type") not in ("chameleon", "anole"):
        return {}
    given = about.get("vq_config") or {}
    if not isinstance(given, Mapping):
        raise UserError(f"{where}: vq_config = {mapped.short(given)}: must be an object")
    told = {name: given.get(name, value) for name, value in HUGGING_FACE.items()}
    if type(told["resolution"]) is not int or told["resolution"] < 1:
        raise UserError(f"{where}: vq_config.resolution = {mapped.short(told['resolution'])}: must be a whole number")
    return told


def _agree(network: Network, told: dict[str, Any], where: str) -> None:
    """Raise a UserError naming the field of a vq_config that is not as the tensors have it."""
    for name, value in vq_config(network).items():
        said = told[name]
        if name == "attn_resolutions":
            same = mapped.counts(said or []) and sorted(said or []) == sorted(value or [])
        else:  # of attention's types, all but "vanilla" are none
            same = said == value or (name == "attn_type" and "vanilla" not in (said, value))
        if not same:
            raise UserError(f"{where}: vq_config.{name} = {mapped.short(told[name])}, its tensors are of {value}")


def vq_config(network: Network) -> dict[str, Any]:
    """Return the network as the vq_config of a Chameleon's config.json in Hugging Face's form.

    Raises:
      UserError: naming the field in which it is no Chameleon's.
    """
    check(network)
    model = network.model
    for field, value in (
        ("quantizer", "nearest"),
        ("shortcut_kernel", 1),
        ("decoder_blocks", model.encoder_blocks + 1),
    ):
        _refuse(model, field, (value,), "Chameleon's")
    return {
        "embed_dim": model.z,
        "num_embeddings": network.codes,
        "double_latent": False,
        "latent_channels": model.latents or model.z,
        "resolution": network.resolution,
        "in_channels": 3,
        "base_channels": model.width,
        "channel_multiplier": list(model.multipliers),
        "num_res_blocks": model.encoder_blocks,
        "attn_resolutions": [network.resolution // 2**i for i in model.attention] or None,
        "attn_type": "vanilla" if model.middle_attention else "none",
    }


def with_settings(recipe: configs.Recipe, network: Network) -> configs.Recipe:
    """Return the recipe of a run with this tokenizer."""
    return dataclasses.replace(
        recipe,
        vocab=dataclasses.replace(recipe.vocab, image=network.codes),
        prepare=dataclasses.replace(recipe.prepare, resolution=network.resolution),
        image=dataclasses.replace(recipe.image, model=network.model),
    )


def check(network: Network) -> None:
    """Raise a UserError that names the setting which networks of this form cannot have."""
    for field, values in FIELDS[network.form].items():
        _refuse(network.model, field, values, f"{network.form}'s")


def _refuse(model: configs.VQGAN, field: str, values: tuple, whose: str) -> None:
    if (found := getattr(model, field)) not in values:
        known = " or ".join(map(repr, values))
        raise UserError(f"image.model.{field} = {found!r}: {whose} networks have {known}")


# ------------------------------------------------------------------------------------------------------------- tensors


def leaves(network: Network) -> dict[str, Leaf]:
    """Return where each of our parameters comes from, by its path."""
    check(network)
    shapes = _shapes(network.model, network.codes)
    return {path: Leaf(shape, network.prefix + _name(path, network)) for path, shape in shapes.items()}


@functools.cache
def _shapes(model: configs.VQGAN, codes: int) -> Mapping[str, tuple[int, ...]]:
    """Return the shapes of our parameters; a full-size network takes seconds to trace, and is asked about thrice."""
    side = model.factor
    made = jax.eval_shape(nets.VQGAN(model, codes).init, jax.random.key(0), jnp.zeros((1, side, side, 3)))["params"]
    return {path: x.shape for path, x in flax.traverse_util.flatten_dict(sharding.unbox(made), sep="/").items()}


def _name(path: str, network: Network) -> str:
    """Return the tensor's name of one of our parameters."""
    if path == "codebook":
        return "quantize.embed.weight" if network.model.quantizer == "argmax" else "quantize.embedding.weight"
    if network.form == "llamagen":  # its decoder counts from the lowest resolution
        top = len(network.model.multipliers) - 1
        path = re.sub(r"^decoder/(level|up)(\d+)", lambda found: f"decoder/{found[1]}{top - int(found[2])}", path)
    for ours, theirs in (NAMES[network.form] | BOTH).items():
        path = re.sub(ours, theirs, path)
    beside = "nin_shortcut" if network.model.shortcut_kernel == 1 else "conv_shortcut"
    return path.replace("shortcut/", f"{beside}.").replace("/", ".")


def compare(tensors: Tensors, network: Network, where: str = "image tokenizer") -> tuple[str, ...]:
    """Return the names of the tensors that are left out on purpose.

    Raises:
      UserError: naming the first tensor which is not as the network has it.
    """
    shapes = {leaf.name: leaf.theirs for leaf in leaves(network).values()}
    mapped.fit(tensors, shapes, where, " by the shapes of the others")
    scope = network.prefix if network.prefix == LANGUAGE_MODEL else ""
    others = sorted(name for name in set(tensors) - set(shapes) if name.startswith(scope))
    left = [name for name in others if LEFT.fullmatch(name) or (network.prefix == "ema." and name.startswith("model."))]
    if extra := sorted(set(others) - set(left)):
        called = mapped.called(tensors, extra[0], where)
        raise UserError(f"{called} is no tensor of this image tokenizer ({len(extra)} such)")
    return tuple(left)


def read(tensors: Tensors, network: Network, dtype: Any = np.float32, where: str = "image tokenizer") -> dict[str, Any]:
    """Return our parameters, unboxed numpy arrays.

    Args:
      dtype: Of the result; None: each tensor's own. Halves become float32 without loss.

    Raises:
      UserError: naming the tensor that is missing, has another shape, is left over, or holds no floating numbers.
    """
    compare(tensors, network, where)
    found = {}
    for path, leaf in leaves(network).items():
        tensor = tensors[leaf.name]
        x = tensor.read() if isinstance(tensor, mapped.Tensor) else np.asarray(tensor)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise UserError(f"{mapped.called(tensors, leaf.name, where)} is of {x.dtype}, must be of floating numbers")
        found[path] = np.ascontiguousarray(x.transpose(2, 3, 1, 0) if x.ndim == 4 else x, dtype or x.dtype)
    return flax.traverse_util.unflatten_dict(found, sep="/")


def tensors(params: Mapping[str, Any], network: Network, dtype: Any = None) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors of a form, names and contiguous arrays, one after another.

    Args:
      params: Our parameters, unboxed.
      network: Of a tokenizer that was trained here: Network(model, codes, resolution).
      dtype: Of the tensors; None: that of the parameters.

    Raises:
      UserError: naming the setting that the form cannot have.
    """
    ours = flax.traverse_util.flatten_dict(params, sep="/")
    for path, leaf in leaves(network).items():
        x = np.asarray(ours[path])
        yield leaf.name, np.ascontiguousarray(x.transpose(3, 2, 0, 1) if x.ndim == 4 else x, dtype or x.dtype)


def save(folder: str | pathlib.Path, network: Network, params: Mapping[str, Any]) -> None:
    """Write the image/ folder of a run, which `tokenizers.image.load` opens."""
    image.save(folder, network.model, network.codes, network.resolution, params)
