"""A run's weights as plain safetensors: `cm3jax export RUN OUT --to safetensors`, and in again by `cm3jax import`.

    OUT/config.json            {"format": "cm3jax", "version": 1, "recipe": the run's recipe}
        model.safetensors      the decoder; above 5 GB in shards, with model.safetensors.index.json
        text/                  tokenizer.model (sentencepiece), or tokenizer.json and order.json of an imported run
        image/                 config.json, weights.safetensors: the image tokenizer
        retriever/             config.json, weights.safetensors and its tokenizer, of a run that retrieves

Names are those of the parameters in `cm3jax.nn`, with dots; a layer's number stands behind "layers". Every matrix is
[in, out]: y = x @ w. Of the decoder, d being its width:

    table  [vocab, d]       head  [vocab, d], unless tied     positions  [length, d], if learned
    layers.0.attention.{q,k,v,out}.w       layers.0.attention.{q_norm,k_norm}.{scale,bias}  [heads, k], if qk_norm
    layers.0.mlp.{gate,up,down}.w          gate only of swiglu
    norm.scale, layers.0.{attention_norm,mlp_norm}.scale       of rmsnorm; layernorm has no parameters

Of image/ and retriever/, names have slashes, all is float32, and config.json tells the sizes. Of image/, kernels are
[h, w, in, out], each with a bias [out] beside it; z is a code's dimension; level0 is the full resolution, of the
decoder too. Chameleon's own has no decoder/ and no last/:

    codebook  [codes, z]
    encoder/first/{kernel,bias}, encoder/last/{kernel,bias}      from the picture, to the latents
    decoder/first/{kernel,bias}, last/{kernel,bias}              from the latents, to the picture
    to_code/{kernel,bias}, from_code/{kernel,bias}               between latents and codes
    scores/{kernel,bias}                                         of each code, if quantizer is "argmax"
    {encoder,decoder}/level0/block0/{conv1,conv2}/{kernel,bias}
    {encoder,decoder}/level0/block0/{norm1,norm2}/GroupNorm_0/{scale,bias}
    {encoder,decoder}/level0/block0/shortcut/{kernel,bias}       if it changes the channels
    {encoder,decoder}/level0/attention0/{query,key,value,out}/{kernel,bias}
    {encoder,decoder}/level0/attention0/norm/GroupNorm_0/{scale,bias}
    {encoder,decoder}/middle/{block0,attention,block1}/...       as in a level
    {encoder,decoder}/norm/GroupNorm_0/{scale,bias}              before the last convolution
    encoder/down0/{kernel,bias}, decoder/up1/{kernel,bias}       behind the level of that number

Of retriever/, layers stand in one array, [layers, ...], matrices are [in, out] and d is a tower's width:

    logit_scale                                       []
    text/table  [vocab, d]        vision/patches  [3 patch**2, d], of rows, columns, colours     vision/first  [d]
    {text,vision}/positions       {text,vision}/projection  [d, size]
    {text,vision}/norm/{scale,bias}, vision/first_norm/{scale,bias}
    {text,vision}/layers/{q,k,v,out,up,down}/{matrix/w,b}
    {text,vision}/layers/{attention_norm,mlp_norm}/{scale,bias}

To read them without cm3jax:

    import json, pathlib, safetensors.numpy
    about = json.loads(pathlib.Path(folder, "config.json").read_text())
    weights = {}
    for file in sorted(pathlib.Path(folder).glob("model*.safetensors")):
        weights |= safetensors.numpy.load_file(file)
    model, vocab = about["recipe"]["decoder"]["model"], about["recipe"]["vocab"]
    first = weights["layers.0.attention.q.w"]  # [d, heads * k]

The id of a text piece i is 4 + i, of an image code c 4 + vocab["text"] + c (see `cm3jax.vocab`).
"""

from collections.abc import Mapping
from typing import Any

from cm3jax import config as configs
from cm3jax.interop import chameleon, mapped
from cm3jax.types import UserError

FORMAT, VERSION = "cm3jax", 1
LAYERS = "layers/"


def settings(recipe: configs.Recipe) -> dict[str, Any]:
    """Return the content of config.json."""
    return {"format": FORMAT, "version": VERSION, "recipe": configs.to_json(recipe)}


def recipe(about: Mapping[str, Any], where: str) -> configs.Recipe:
    """Return the recipe in a config.json; raises a UserError that names what is not known."""
    if about.get("version") != VERSION:
        raise UserError(f"{where}: version = {about.get('version')!r}: this program reads {VERSION}; update it")
    return configs.from_json(configs.Recipe, about.get("recipe"), f"{where}: recipe")


def leaves(made: configs.Recipe) -> dict[str, chameleon.Leaf]:
    """Return where each of our parameters comes from, by its path."""
    model, found = made.decoder.model, {}
    for path, leaf in chameleon.shapes(model, made.vocab.size, made.decoder.packing.length).items():
        stacked = path.startswith(LAYERS)
        rest = path.removeprefix(LAYERS).replace("/", ".")
        names = tuple(f"layers.{i}.{rest}" for i in range(model.layers)) if stacked else (rest,)
        found[path] = chameleon.Leaf(leaf.shape, names, stacked, "plain")
    return found


def compare(tensors: Mapping[str, mapped.Tensor], wanted: dict[str, chameleon.Leaf], where: str) -> None:
    """Raise a UserError that names the first tensor which is not as the recipe has it."""
    shapes = {name: leaf.theirs for leaf in wanted.values() for name in leaf.names}
    mapped.fit(tensors, shapes, where, " by its config.json")
    if extra := sorted(set(tensors) - set(shapes)):
        called = mapped.called(tensors, extra[0], where)
        raise UserError(f"{called} is no tensor of this decoder ({len(extra)} such)")


def tensors(ours: Mapping[str, mapped.Tensor], made: configs.Recipe, dtype: Any = None) -> dict[str, mapped.Tensor]:
    """Return the decoder's tensors by name; each is made when it is read.

    Args:
      ours: Our parameters by path.
      dtype: Of the tensors; None: that of the parameters.
    """
    return chameleon.given(ours, leaves(made), dtype)
