"""Folders of small Chameleons as Hugging Face and Meta publish them."""

import dataclasses
import json
import pathlib

import chameleons
import ml_dtypes
import numpy as np
import torch

from cm3jax import config
from cm3jax.interop import chameleon, mapped, meta, safetensor_files, vqgan

PICTURES = vqgan.Network(
    config.VQGAN(width=32, multipliers=(1, 1), encoder_blocks=1, decoder_blocks=2, attention=(), z=8),
    chameleons.CODES,
    8,
)


def settings(**changes):
    """Return a config.json of a vocabulary with an entry for every byte."""
    made = chameleons.about(vocab_size=chameleons.ROWS_WITH_BYTES, **changes)
    return made | {
        "model_type": "chameleon",
        "vq_config": vqgan.vq_config(PICTURES),
        "vocabulary_map": chameleons.words()["model"]["vocab"],
    }


def pictures(prefix="model.vqmodel.", decoder=True, dtype=np.float32, seed=0):
    """Return tensors of a small image tokenizer."""
    draw = np.random.default_rng(seed)
    network = PICTURES._replace(prefix=prefix, model=dataclasses.replace(PICTURES.model, decoder=decoder))
    leaves = vqgan.leaves(network).values()
    return {leaf.name: (0.3 * draw.standard_normal(leaf.theirs)).astype(dtype) for leaf in leaves}


def hugging_face(folder: pathlib.Path, about=None, tensors=None, most=safetensor_files.SHARD_BYTES, decoder=True):
    """Write Hugging Face's layout, image tokenizer included; return its tensors."""
    about = about or settings()
    tensors = tensors or chameleons.random_tensors(about)
    if decoder is not None:
        tensors = tensors | pictures(decoder=decoder, dtype=next(iter(tensors.values())).dtype)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(about))
    (folder / "tokenizer.json").write_text(json.dumps(chameleons.words()))
    held = {name: mapped.held(x) for name, x in tensors.items()}
    safetensor_files.save(folder, held, {"format": "pt"}, most)
    return tensors


def metas(tensors, about, shards=1, fused=False, dtype=torch.float32):
    """Return Meta's tensors of each model-parallel process, made from Hugging Face's by what the two say of each."""
    heads, groups = about["num_attention_heads"], about["num_key_value_heads"]
    made = [{} for _ in range(shards)]

    def put(name, x, axis):
        for i, part in enumerate(made):
            piece = x if axis is None else np.split(x, shards, axis)[i]
            part[name] = torch.tensor(np.ascontiguousarray(piece), dtype=dtype)

    put(meta.TABLE, tensors["model.embed_tokens.weight"], 1)
    put(meta.HEAD, tensors["lm_head.weight"], 0)
    put(meta.NORM, tensors["model.norm.weight"], None)
    for i in range(about["num_hidden_layers"]):
        theirs, ours = f"model.layers.{i}.", f"layers.{i}."
        for name, (other, axis) in meta.PLAIN.items():
            put(ours + name, tensors[theirs + other], axis)
        for letter, count in (("q", heads), ("k", groups)):
            put(
                f"{ours}attention.w{letter}.weight",
                neighbours(tensors[f"{theirs}self_attn.{letter}_proj.weight"], count),
                0,
            )
            for kind in ("weight", "bias"):
                rows = tensors[f"{theirs}self_attn.{letter}_norm.{kind}"]  # [heads, k], equal within a process
                for part, own in zip(made, np.split(rows, shards), strict=True):
                    assert (own == own[0]).all()
                    x = neighbours(own[0], 1)
                    part[f"{ours}attention.{letter}_normalization.{kind}"] = torch.tensor(x, dtype=dtype)
        if fused:
            for part in made:
                for name, inner in meta.FUSED.items():
                    part[ours + name] = torch.cat([part.pop(ours + one) for one in inner])
    for part in made:
        part["rope.freqs"] = torch.ones(3)
    return made


def neighbours(x, heads):
    """Return rows with the pairs (i, i + k/2) of each head side by side."""
    k = len(x) // heads
    rows = [head * k + i + half * (k // 2) for head in range(heads) for i in range(k // 2) for half in (0, 1)]
    return x[rows]


def per_process(tensors, about, shards):
    """Return tensors whose scales and biases of q and k are equal within each process, as Meta's are."""
    found = dict(tensors)
    for name, x in tensors.items():
        if "q_norm" in name or "k_norm" in name:
            found[name] = np.repeat(x[:: len(x) // shards], len(x) // shards, 0)
    return found


def params(about, shards=1, **changes):
    """Return the content of params.json."""
    model = {
        "dim": about["hidden_size"],
        "n_layers": about["num_hidden_layers"],
        "n_heads": about["num_attention_heads"],
        "norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "qk_normalization": True,
        "swin_norm": about.get("swin_norm", False),
        "max_seq_len": about["max_position_embeddings"],
    }
    if about["num_key_value_heads"] != about["num_attention_heads"]:
        model["n_kv_heads"] = about["num_key_value_heads"]
    return {"model": model | changes, "model_parallel_size": shards, "seq_length": 4096}


def meta_folder(folder: pathlib.Path, tensors, about, shards=1, **options):
    """Write Meta's layout."""
    model, words = folder / "models" / "7b", folder / "tokenizer"
    model.mkdir(parents=True)
    words.mkdir()
    parts = metas(tensors, about, shards, **options)
    for i, part in enumerate(parts):
        torch.save(part, model / ("consolidated.pth" if shards == 1 else f"consolidated.{i:02}.pth"))
    (model / "params.json").write_text(json.dumps(params(about, shards)))
    (model / "consolidate_params.json").write_text(json.dumps({"model_parallel_size": shards}))
    (words / "text_tokenizer.json").write_text(json.dumps(metas_words()))
    (words / "checklist.chk").write_text("0  vqgan.ckpt\n")
    torch.save({"state_dict": {n: torch.tensor(x) for n, x in pictures("").items()}}, words / "vqgan.ckpt")
    return folder


def metas_words():
    """Return Meta's tokenizer, which has <reserved08707> for Hugging Face's <image>."""
    return json.loads(json.dumps(chameleons.words()).replace("<image>", "<reserved08707>"))


HALF = {torch.float16: np.float16, torch.bfloat16: ml_dtypes.bfloat16, torch.float32: np.float32}


def sparse_7b(folder: pathlib.Path, most=safetensor_files.SHARD_BYTES):
    """Write the 7B in Hugging Face's layout without its numbers: headers, and files of that size without any blocks.

    Sizes of arXiv 2405.09818 table 1, bfloat16, an image tokenizer without a decoder; return the number of tensors.
    """
    about = {"model_type": "chameleon", "torch_dtype": "bfloat16"}
    network = chameleon.network(about)
    model, codes, side = vqgan.PUBLISHED["Chameleon"]
    pictures = vqgan.Network(dataclasses.replace(model, decoder=False), codes, side, prefix=chameleon.IMAGE)
    shapes = {n: leaf.theirs for leaf in chameleon.leaves(network.model, network.rows).values() for n in leaf.names}
    shapes |= {leaf.name: leaf.theirs for leaf in vqgan.leaves(pictures).values()}
    files, size = [{}], 0
    for name, shape in shapes.items():
        count = 2 * int(np.prod(shape))
        if size + count > most:
            files.append({})
            size = 0
        files[-1][name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [size, size + count]}
        size += count
    names = [safetensor_files.SHARD.format(i + 1, len(files)) for i in range(len(files))]
    folder.mkdir(parents=True)
    for name, header in zip(names, files, strict=True):
        text = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + max(entry["data_offsets"][1] for entry in header.values()))
    where = {tensor: name for name, header in zip(names, files, strict=True) for tensor in header}
    (folder / safetensor_files.INDEX).write_text(json.dumps({"weight_map": where}))
    words = chameleons.words(network.rows, codes)
    (folder / "tokenizer.json").write_text(json.dumps(words))
    (folder / "config.json").write_text(json.dumps(about | {"vocabulary_map": words["model"]["vocab"]}))
    return len(shapes)
