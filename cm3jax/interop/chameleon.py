"""Chameleon (arXiv 2405.09818) as Hugging Face publishes it <-> our decoder.

    network = chameleon.network(about)  # of config.json
    order = chameleon_vocab.order(about["vocabulary_map"], network.rows, "config.json")
    params = chameleon.read(tensors, network.model, order)  # tensors: arrays by name, mapped from files or not
    again = chameleon.tensors(mapped.named(params), network.model, order)  # each is made when it is read

Matrices there are [out, in]. Its rotary positions turn the pairs (i, i + k/2) of a head, as ours do, so that rows of q
and k stay where they are (Meta's own files pair neighbours). Scale and bias of the norms of q and k are [heads, k]
there and here. Rows of both tables follow `chameleon_vocab.Order`. The image tokenizer, `model.vqmodel.`, is not read.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import flax.traverse_util
import jax
import numpy as np

from cm3jax import config as configs
from cm3jax import sharding
from cm3jax.interop import chameleon_vocab, mapped
from cm3jax.nn import decoder
from cm3jax.types import UserError

Tensors = Mapping[str, Any]
"""Arrays by name: numpy's, or what has a shape, a dtype and slices of numpy arrays."""

LUMINA = "z_loss_weight"
"""The setting that only a config.json of Lumina-mGPT has (Alpha-VLLM/Lumina-mGPT, configuration_xllmx_chameleon.py)."""

EPS = 1e-5
"""Of the norms of q and k in transformers, whatever its config says; the decoder has one for all norms."""

FORM = {"activation": "swiglu", "norm": "rmsnorm", "position": "rope", "qk_norm": True, "norm_eps": EPS}
"""What every Chameleon is, as fields of `config.Decoder`."""

DEFAULTS = {
    "model_type": "chameleon",
    "vocab_size": 65536,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "rms_norm_eps": EPS,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "swin_norm": False,
}
"""What transformers takes where a config.json does not say, since it may hold differences only: the 7B."""

ONLY = ("model_type", "hidden_act", "rms_norm_eps", "attention_bias", "mlp_bias")
"""Of these, the ones that can be nothing else here."""

NAMES = {
    "table": "model.embed_tokens.weight",
    "head": "lm_head.weight",
    "norm": "model.norm",
    "layers": "model.layers.{}",
    "attention": "self_attn",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "out": "o_proj",
    "q_norm": "q_norm",
    "k_norm": "k_norm",
    "mlp": "mlp",
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj",
    "w": "weight",
    "scale": "weight",
    "bias": "bias",
}
"""Pieces of our parameters' paths -> pieces of the tensors' names; {} is the layer's number."""

IMAGE = "model.vqmodel."
"""Begins the names of the image tokenizer's tensors."""

NOT_WEIGHTS = re.compile(r"model\.(layers\.[0-9]+\.self_attn\.)?rotary_emb\.inv_freq")
"""Tensors in published files that hold no weights."""


class Network(NamedTuple):
    """What a config.json says."""

    model: configs.Decoder
    rows: int
    """Of the tables."""
    length: int
    """Positions that the model was trained on."""


class Leaf(NamedTuple):
    """Where one of our arrays comes from."""

    shape: tuple[int, ...]
    """Ours, layers first if it has them."""
    names: tuple[str, ...]
    """A tensor for each layer, or one."""
    stacked: bool
    """There is a dimension of layers."""
    kind: Literal["matrix", "table", "plain"]
    """matrix: transposed; table: rows in the vocabulary's order; plain: as it is."""

    @property
    def theirs(self) -> tuple[int, ...]:
        """Shape of each of the tensors."""
        own = self.shape[self.stacked :]
        return own[::-1] if self.kind == "matrix" else own


# ------------------------------------------------------------------------------------------------------------ settings


def network(about: Mapping[str, Any], where: str = "config.json") -> Network:
    """Return the network that a config.json of Hugging Face's describes.

    Raises:
      UserError: naming the field that is of a wrong type, or says what the decoder has not.
    """
    found = {name: about.get(name, value) for name, value in DEFAULTS.items()}
    if found["num_key_value_heads"] is None:
        found["num_key_value_heads"] = found["num_attention_heads"]
    for name, value in DEFAULTS.items():
        good = isinstance(found[name], type(value)) and (type(value) is bool or not isinstance(found[name], bool))
        if not good or (type(value) is int and found[name] < 1):
            raise UserError(f"{where}: {name} = {found[name]!r}: must be {_wanted(value)}")
        if name in ONLY and found[name] != value:
            raise UserError(
                f"{where}: {name} = {found[name]!r}: only {value!r} is known here, as in all that is public"
            )
    heads, groups, width = found["num_attention_heads"], found["num_key_value_heads"], found["hidden_size"]
    if width % (2 * heads) or about.get("head_dim", width // heads) not in (None, width // heads):
        raise UserError(f"{where}: hidden_size = {width}: must be num_attention_heads = {heads} heads of an even width")
    if heads % groups:
        raise UserError(f"{where}: num_attention_heads = {heads}: must be a multiple of num_key_value_heads = {groups}")
    model = configs.Decoder(
        layers=found["num_hidden_layers"],
        width=width,
        heads=heads,
        kv_heads=groups if groups != heads else 0,
        mlp_width=found["intermediate_size"],
        norm_order="post" if found["swin_norm"] else "pre",
        rope_theta=_theta(about, where),
        tied=found["tie_word_embeddings"],
        dtype="float32" if about.get("dtype", about.get("torch_dtype")) == "float32" else "bfloat16",
        **FORM,
    )
    return Network(model, found["vocab_size"], found["max_position_embeddings"])


def _wanted(value: Any) -> str:
    return "true or false" if type(value) is bool else "a whole number from 1 on" if type(value) is int else repr(value)


def _theta(about: Mapping[str, Any], where: str) -> float:
    """Return the base of the rotations, from transformers' old fields or its new one."""
    new = about.get("rope_parameters") or {}
    old = about.get("rope_scaling") or {}
    kind = new.get("rope_type", old.get("rope_type", old.get("type", "default")))
    if kind != "default":
        raise UserError(f"{where}: rope_type = {kind!r}: only 'default' is known here, as in all that is public")
    theta = new.get("rope_theta", about.get("rope_theta", 10_000.0))
    if type(theta) not in (int, float) or theta <= 0:
        raise UserError(f"{where}: rope_theta = {theta!r}: must be a number above 0")
    return float(theta)


def settings(model: configs.Decoder, rows: int, length: int, names: dict[str, int]) -> dict[str, Any]:
    """Return the config.json of a decoder in Chameleon's form; the image tokenizer's part, `vq_config`, is not in it.

    Args:
      rows: Of the tables.
      length: Positions that the model was trained on.
      names: The tokenizer's entries: name -> id.

    Raises:
      UserError: naming the field in which the decoder is no Chameleon.
    """
    for field, value in {**FORM, "head_size": model.head_size and model.width // model.heads}.items():
        if (found := getattr(model, field)) != value:
            raise UserError(
                f"decoder.model.{field} = {found!r}: Chameleon has {value!r}; export it as plain safetensors instead"
            )
    return {
        "architectures": ["ChameleonForConditionalGeneration"],
        **DEFAULTS,
        "vocab_size": rows,
        "hidden_size": model.width,
        "intermediate_size": model.mlp_width or 4 * model.width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads or model.heads,
        "max_position_embeddings": length,
        "tie_word_embeddings": model.tied,
        "swin_norm": model.norm_order == "post",
        "rope_theta": model.rope_theta,  # transformers 4; 5 reads what follows
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "bos_token_id": names.get(chameleon_vocab.BEGIN),
        "pad_token_id": names["<pad>"],
        "eos_token_id": names["</s>"],
        "vocabulary_map": names,
        "dtype": model.dtype,
    }


def processing(side: int, codes: int) -> dict[str, dict[str, Any]]:
    """Return the files of transformers' ChameleonProcessor: by name, for square pictures of a side and so many codes.

    Published files round the factor, 2/255, to 0.0078; this one gives what our encoder sees.
    """
    pictures = {
        "image_processor_type": "ChameleonImageProcessor",
        "processor_class": "ChameleonProcessor",
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "resample": 1,  # Pillow's Lanczos, as in data.pictures
        "rescale_factor": 2 / 255,
        "image_mean": [1.0] * 3,
        "image_std": [1.0] * 3,
        **dict.fromkeys(("do_convert_rgb", "do_resize", "do_center_crop", "do_rescale", "do_normalize"), True),
    }
    whole = {
        "processor_class": "ChameleonProcessor",
        "image_seq_length": codes,
        "image_token": chameleon_vocab.IMAGE,
    }
    return {"preprocessor_config.json": pictures, "processor_config.json": whole}


# ------------------------------------------------------------------------------------------------------------- tensors


@functools.cache
def shapes(model: configs.Decoder, rows: int, length: int) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Return the shapes of our parameters by path; tracing takes a second, and an import asks several times."""
    net = decoder.Decoder(model, rows, length)
    made = sharding.unbox(jax.eval_shape(lambda key: decoder.init(net, key), jax.random.key(0)))
    return flax.traverse_util.flatten_dict(made, sep="/")


def leaves(model: configs.Decoder, rows: int) -> dict[str, Leaf]:
    """Return where each of our parameters comes from, by its path."""
    found = {}
    for path, leaf in shapes(model, rows, 1).items():
        stacked = path.startswith("layers/")
        name = ".".join(NAMES[piece] for piece in path.split("/"))
        names = tuple(name.format(i) for i in range(model.layers if stacked else 1))
        kind = "table" if path in ("table", "head") else "matrix" if path.endswith("/w") else "plain"
        found[path] = Leaf(leaf.shape, names, stacked, kind)
    return found


def compare(tensors: Tensors, wanted: dict[str, Leaf], where: str = "Chameleon") -> None:
    """Raise a UserError that names the first tensor which is not as the network has it."""
    shapes = {name: leaf.theirs for leaf in wanted.values() for name in leaf.names}
    mapped.fit(tensors, shapes, where, " by its config.json")
    if "head" not in wanted and NAMES["head"] in tensors:  # written out beside what it is tied to
        if not np.array_equal(tensors[NAMES["head"]][:], tensors[NAMES["table"]][:]):
            called = mapped.called(tensors, NAMES["head"], where)
            raise UserError(f"{called} is not {NAMES['table']}; set tie_word_embeddings to false")
        shapes[NAMES["head"]] = ()
    extra = sorted(n for n in set(tensors) - set(shapes) if not (n.startswith(IMAGE) or NOT_WEIGHTS.fullmatch(n)))
    if extra:
        called = mapped.called(tensors, extra[0], where)
        raise UserError(f"{called} is no tensor of the model in its config.json ({len(extra)} such)")


def read(
    tensors: Tensors,
    model: configs.Decoder,
    order: chameleon_vocab.Order,
    dtype: Any = np.float32,
    shardings: Any = None,
    where: str = "Chameleon",
) -> dict[str, Any]:
    """Return our parameters, unboxed.

    Only the piece at hand is in memory beside the result: a layer's tensor, or with `shardings` one device's part of
    one of our arrays.

    Args:
      tensors: Those of the decoder, all; those of the image tokenizer may be among them.
      dtype: Of the result; None: each tensor's own.
      shardings: Of our parameters, as `sharding.shardings` gives them, for arrays on devices; None: numpy arrays.
      where: What to call the checkpoint in errors.

    Raises:
      UserError: naming the tensor that is missing, has another shape, or is left over.
    """
    wanted = leaves(model, order.vocab.size)
    compare(tensors, wanted, where)
    places = flax.traverse_util.flatten_dict(shardings, sep="/") if shardings is not None else {}
    found = {}
    for path, leaf in wanted.items():
        kind = np.dtype(dtype or tensors[leaf.names[0]].dtype)

        def take(index, leaf=leaf, kind=kind):
            return piece(tensors, leaf, order, index, kind)

        whole = (slice(None),) * len(leaf.shape)
        place = places.get(path)
        found[path] = take(whole) if place is None else jax.make_array_from_callback(leaf.shape, place, take)
    return flax.traverse_util.unflatten_dict(found, sep="/")


def piece(tensors: Tensors, leaf: Leaf, order: chameleon_vocab.Order, index, dtype) -> np.ndarray:
    """Return a block of one of our arrays."""
    at = index[leaf.stacked :]
    names = leaf.names[index[0]] if leaf.stacked else leaf.names
    lengths = [len(range(*part.indices(size))) for part, size in zip(index, leaf.shape, strict=True)]
    found = np.empty((len(names), *lengths[leaf.stacked :]), dtype)
    for i, name in enumerate(names):
        tensor = tensors[name]
        if leaf.kind == "matrix":
            found[i] = tensor[at[1], at[0]].T
        elif leaf.kind == "table":
            found[i] = tensor[order.theirs[at[0]]][:, at[1]]
        else:
            found[i] = tensor[at]
    return found if leaf.stacked else found[0]


def tensors(
    ours: Mapping[str, mapped.Tensor], model: configs.Decoder, order: chameleon_vocab.Order, dtype: Any = None
) -> dict[str, mapped.Tensor]:
    """Return Chameleon's tensors, all layers of one of our arrays together; each is made when it is read.

    Args:
      ours: Our parameters by path.
      dtype: Of the tensors; None: that of the parameters.
    """
    return given(ours, leaves(model, order.vocab.size), dtype, order)


def given(
    ours: Mapping[str, mapped.Tensor],
    wanted: dict[str, Leaf],
    dtype: Any = None,
    order: chameleon_vocab.Order | None = None,
) -> dict[str, mapped.Tensor]:
    """Return the tensors that our arrays come from; `order` is of tables, if there are any."""
    found = {}
    for path, leaf in wanted.items():
        array = ours[path]
        kind = np.dtype(dtype or array.dtype)
        for i, name in enumerate(leaf.names):
            read = functools.partial(_turned, array, leaf, i, kind, order)
            found[name] = mapped.Tensor(leaf.theirs, kind, read)
    return found


def _turned(array: mapped.Tensor, leaf: Leaf, i: int, kind: np.dtype, order) -> np.ndarray:
    """Return the tensor of layer i."""
    x = array.read()[i] if leaf.stacked else array.read()
    x = x.T if leaf.kind == "matrix" else x[order.ours] if leaf.kind == "table" else x
    return np.asarray(x, kind, order="C")
