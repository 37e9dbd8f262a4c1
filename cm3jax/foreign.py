"""Released checkpoints into run folders: `cm3jax import`; and run folders into files for others: `cm3jax export`.

An imported run is a run like any other, with all stages complete that the checkpoint has:

    RUN/
      recipe.json               vocab in our order, image.model and prepare.resolution, decoder.model, packing.length;
                                of Chameleon: form (begin, turn), packing.opening, no masks
      imported.json             where it came from: layout, SHA-256, the files, config.json as it was
      text/    stage.json  tokenizer.json  order.json    read by tokenizers.text.load -> text.Published, whose
                                `id("<reserved08706>")` is our id of any entry of the checkpoint's tokenizer
      image/   stage.json  config.json  weights.safetensors
      decoder/ stage.json  checkpoints/0                 parameters alone, each in the type of its file
      retriever/ stage.json  config.json  weights.safetensors  vocab.json  merges.txt      (of CLIP)

A `stage.json` here has no inputs, names the source in `imported`, and holds only the settings that the import decides.
An image tokenizer alone makes image/, CLIP retriever/; the other stages of a run can be made beside them.

Everything is written to OUT.partial, which becomes OUT when it is whole.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import shutil
from typing import Any, NamedTuple

import flax.traverse_util
import numpy as np

from cm3jax import checkpoint, config, stages, trees
from cm3jax import run as runs
from cm3jax.interop import chameleon, chameleon_vocab, mapped, pieces, plain, safetensor_files, sources, streamed, vqgan
from cm3jax.retrieval import encoder, weights
from cm3jax.tokenizers import clip as tokenizers
from cm3jax.tokenizers import image, text
from cm3jax.types import UserError
from cm3jax.vocab import LIMIT, SPECIALS, Vocab

ABOUT = "imported.json"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What an import will write, all of it checked against the files and nothing of it read.

    Attributes:
      recipe: Of the run.
      decoder: Our parameters, to be read in blocks; {} if there is no language model.
      order: Of the language model's ids; None without one.
      image: The image tokenizer; None if there is none.
      clip: The retriever; None if there is none.
    """

    recipe: config.Recipe
    decoder: dict[str, streamed.Array] = dataclasses.field(default_factory=dict)
    order: chameleon_vocab.Order | None = None
    image: vqgan.Network | None = None
    clip: config.CLIP | None = None


def bring(
    source: str,
    out: str,
    tokenizer: str = "",
    image: str = "",
    resolution: int = 0,
    pinned: str = "",
    dry: bool = False,
    say=print,
) -> pathlib.Path:
    """Write the run folder of a released checkpoint; return it.

    Args:
      source, tokenizer, image: As for `sources.open`.
      resolution: Of the image tokenizer's pictures; 0: as the files say, or what is known of published ones.
      pinned: SHA-256 that what is read must have; "": any.
      dry: Map every tensor, and write nothing.
      say: Told in lines what is done.

    Raises:
      UserError: if `out` is there, or whatever is wrong with the files, naming the file and the tensor. Nothing is
        written then.
    """
    folder = pathlib.Path(out)
    fresh(folder)
    found = sources.open(source, tokenizer, image)
    plan = planned(found, folder.resolve().name, resolution)
    for line in described(found, plan):
        say(line)
    if pinned or not dry:
        digest = sources.digest(found)
        say(f"SHA-256 {digest} of {len(set(found.files))} files")
        if pinned and digest != pinned.strip().lower():
            raise UserError(f"{source}: its SHA-256 is {digest}, not {pinned}; fetch it again, or pin what it is")
    if dry:
        say("dry run: every tensor has its place; nothing is written")
        return folder
    with whole(folder) as partial:
        write(found, plan, partial, digest)
    say(f"run folder {folder}")
    return folder


def fresh(folder: pathlib.Path) -> None:
    """Raise a UserError if a folder to be made is there."""
    if folder.exists() or folder.is_symlink():
        raise UserError(f"{folder}: is there already; remove it, or name another folder")
    if not folder.absolute().parent.is_dir():
        raise UserError(f"{folder}: its folder {folder.absolute().parent} does not exist; make it first")


@contextlib.contextmanager
def whole(folder: pathlib.Path):
    """Give a folder to write to, which gets its name when the block ends well, and is removed when it does not."""
    partial = folder.with_name(f"{folder.name}.partial")
    if partial.exists():
        raise UserError(f"{partial}: is left from another import or export; remove it if none is running")
    partial.mkdir()
    try:
        yield partial
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------- what is


def planned(found: sources.Source, name: str, resolution: int = 0) -> Plan:
    """Return what an import of a source writes; raises a UserError that names what does not fit."""
    if found.kind == "chameleon":
        return _chameleon(found, name, resolution)
    if found.kind == "image":
        return _image(found, name, resolution)
    if found.kind == plain.FORMAT:
        return _plain(found, name)
    model = weights.sizes(_folder(found.path), _Opened(found))
    tokenizers.load(_folder(found.path))
    return Plan(config.Recipe(name=name, retriever=config.Retriever(model=model)), clip=model)


def _image(found: sources.Source, name: str, resolution: int) -> Plan:
    network = vqgan.network(found.image, None, resolution or found.about.get(vqgan.RESOLUTION, 0), str(found.path))
    sources.floating(_taken(found.image, network), found.path)
    room = LIMIT - len(SPECIALS) - network.codes - Vocab.sentinels  # the default text vocabulary may not fit beside it
    vocab = Vocab(text=max(1, min(Vocab.text, room)), image=network.codes)
    return Plan(vqgan.with_settings(config.Recipe(name=name, vocab=vocab), network), image=network)


def _plain(found: sources.Source, name: str) -> Plan:
    made = plain.recipe(found.about, str(found.path / sources.CONFIG))
    wanted = plain.leaves(made) if found.language else {}  # else a run's tokenizer or retriever alone
    plain.compare(found.language, wanted, str(found.path))
    sources.floating(found.language, found.path)
    own = chameleon_vocab.own(made.vocab)  # ids are ours there
    params = {path: _streamed(found.language, leaf, own) for path, leaf in wanted.items()}
    opened = {part: PARTS[part](found.path / part) for part in PARTS if (found.path / part).is_dir()}
    if params and "text" in opened and opened["text"].size > made.vocab.text:
        raise UserError(f"{found.path}: its text tokenizer has {opened['text'].size} entries, not {made.vocab.text}")
    if params and "image" in opened and opened["image"].codes != made.vocab.image:
        raise UserError(f"{found.path}: its image tokenizer has {opened['image'].codes} codes, not {made.vocab.image}")
    return Plan(dataclasses.replace(made, name=name), params)


PARTS = {"text": text.load, "image": image.load, "retriever": encoder.load}
"""Folders of a run that are files for others as they are, and what opens them."""


def _taken(tensors: dict[str, mapped.Tensor], network: vqgan.Network) -> dict[str, mapped.Tensor]:
    """Return the tensors of an image tokenizer that are read."""
    return {leaf.name: tensors[leaf.name] for leaf in vqgan.leaves(network).values()}


def _folder(path: pathlib.Path) -> pathlib.Path:
    return path if path.is_dir() else path.parent


class _Opened:
    """Tensors as `weights` wants an open file."""

    def __init__(self, found: sources.Source):
        self.tensors, self.path = found.clip, found.files[0]
        self.keys = found.clip.keys

    def get_slice(self, name: str):
        return _Shape(self.tensors[name].shape)

    def get_tensor(self, name: str) -> np.ndarray:
        return self.tensors[name].read()


class _Shape(NamedTuple):
    shape: tuple[int, ...]

    def get_shape(self) -> list[int]:
        return list(self.shape)


def _chameleon(found: sources.Source, name: str, resolution: int) -> Plan:
    where = str(found.path)
    network = chameleon.network(found.about, f"{where}: {sources.CONFIG}")
    order = chameleon_vocab.order(found.about["vocabulary_map"], network.rows, str(found.tokenizer))
    wanted = chameleon.leaves(network.model, network.rows)
    chameleon.compare(found.language, wanted, where)
    pictures = vqgan.network(found.image, found.about if found.inner else None, resolution, where)
    if pictures.codes != order.vocab.image:
        raise UserError(
            f"{where}: its image tokenizer has {pictures.codes} codes, its text tokenizer {found.tokenizer}"
            f" entries for {order.vocab.image}; they do not belong together"
        )
    sources.floating(found.language | _taken(found.image, pictures), found.path)
    params = {path: _streamed(found.language, leaf, order) for path, leaf in wanted.items()}
    form = _form(found, order, pictures, resolution)
    talks = form.kind == "chameleon"
    recipe = config.Recipe(
        name=name,
        vocab=order.vocab,
        form=dataclasses.replace(form, grid=0),  # until the recipe has the pictures' size
        decoder=config.DecoderStage(
            model=network.model,
            packing=config.Packing("whole", network.length, most_spans=0, opening=form.begin)
            if talks
            else config.Packing("whole", network.length),
            mask=config.Mask(spans=0.0) if talks else config.Mask(),
            z_loss=1e-5,  # arXiv 2405.09818 §2.4
        ),
        evaluate=config.Evaluate(draw=(config.PLAIN[form.plain],), write=config.PLAIN_TEXT[form.plain])
        if talks
        else config.Evaluate(),
    )
    recipe = dataclasses.replace(vqgan.with_settings(recipe, pictures), form=form)
    return Plan(recipe, params, order, pictures)


def _form(found: sources.Source, order: chameleon_vocab.Order, pictures: vqgan.Network, resolution: int) -> config.Form:
    """Return the form of the model's documents: Chameleon's or Lumina's, unless it was trained here.

    A model that was trained here has no markers of turns in its vocabulary.
    """
    names, markers = found.about["vocabulary_map"], (chameleon_vocab.BEGIN, chameleon_vocab.END_OF_TURN)
    there = [name for name in markers if name in names]
    if not there:
        return config.Form()
    if len(there) < len(markers):
        lost = next(name for name in markers if name not in names)
        raise UserError(f"{found.tokenizer}: no entry {lost!r}; take the tokenizer that came with the model")
    begin, turn = (int(order.ours[names[name]]) for name in markers)
    form = config.Form("chameleon", begin, turn)
    if chameleon.LUMINA not in found.about:
        return form
    if not resolution:
        raise UserError(
            f"{found.path}: Lumina-mGPT's files do not say how large its pictures are; set --resolution to the"
            " checkpoint's, 512, 768 or 1024"
        )
    return _lumina(found, order, pictures, form)


def _lumina(
    found: sources.Source, order: chameleon_vocab.Order, pictures: vqgan.Network, form: config.Form
) -> config.Form:
    """Return the form of Lumina-mGPT's documents, whose pictures state their sides, in units of two codes."""
    names, grid = found.about["vocabulary_map"], pictures.resolution // pictures.model.factor
    entries = tuple(chameleon_vocab.reserved(i) for i in (8800 + grid // 2, 8799))
    if grid % 2 or any(name not in names for name in entries):
        raise UserError(
            f"{found.path}: Lumina-mGPT has no pictures of {pictures.resolution} px; set --resolution to the"
            " checkpoint's, 512, 768 or 1024"
        )
    side, line = (int(order.ours[names[name]]) for name in entries)
    asked = f"Generate an image of {pictures.resolution}x{pictures.resolution} according to the following prompt:\n{{}}"
    return dataclasses.replace(form, pair="turn", grid=grid, side=side, line=line, drawing=asked)


def _streamed(tensors: dict[str, mapped.Tensor], leaf: chameleon.Leaf, order: chameleon_vocab.Order) -> streamed.Array:
    """Return one of our arrays: a layer's tensor at a time, of a table some rows."""
    kinds = {tensors[name].dtype for name in leaf.names}
    dtype = kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)  # which holds the others exactly
    block = (1, *leaf.shape[1:]) if leaf.stacked else streamed.blocked(leaf.shape, dtype.itemsize)
    return streamed.Array(leaf.shape, dtype, block, lambda at: chameleon.piece(tensors, leaf, order, at, dtype))


def described(found: sources.Source, plan: Plan) -> list[str]:
    """Return what a person wants to know before an import."""
    lines = [f"{found.path}: {found.layout}"]
    if plan.image:
        left = f", {len(plan.image.left)} tensors of its training left out" if plan.image.left else ""
        lines.append(
            f"image tokenizer: {plan.image.codes:,} codes, {plan.image.resolution} px, {plan.image.model.factor} px a"
            f" code, {len(vqgan.leaves(plan.image))} tensors{left}"
            + ("" if plan.image.model.decoder else "; no decoder, so it reads pictures and draws none (see --image)")
        )
    if plan.clip:
        lines.append(f"retriever: {len(found.clip)} tensors, pictures of {plan.clip.resolution} px")
    if plan.decoder:
        size, model = trees.size(plan.decoder), plan.recipe.decoder.model
        kinds = ", ".join(sorted({str(array.dtype) for array in plan.decoder.values()}))
        lines.append(
            f"decoder: {size:,} parameters in {len(found.language):,} tensors of {kinds}; {model.layers} layers of"
            f" width {model.width}, {plan.recipe.vocab.size:,} ids of which {plan.recipe.vocab.image:,} are image codes"
        )
    return lines


# --------------------------------------------------------------------------------------------------------- what is made


def write(found: sources.Source, plan: Plan, run: pathlib.Path, digest: str) -> None:
    """Write a run folder, stage by stage."""
    origin = f"{found.path} ({digest[:16]})"
    if found.kind == plain.FORMAT:
        for part in copied(found.path, run):
            runs.taken(run, part, runs.decided(plan.recipe, part), origin)
    elif plan.decoder:
        (run / "text").mkdir()
        shutil.copyfile(found.tokenizer, run / "text" / text.PUBLISHED)
        chameleon_vocab.save(run / "text" / text.ORDER, plan.order)
        text.load(run / "text")  # what a run will open must open
        runs.taken(run, "text", runs.decided(plan.recipe, "text"), origin)
    if plan.decoder:
        params = flax.traverse_util.unflatten_dict(plan.decoder, sep="/")
        streamed.save(run / "decoder", 0, params, {"identity": {"name": "decoder"}, "seconds": 0.0})
        runs.taken(run, "decoder", runs.decided(plan.recipe, "decoder"), origin)
    if plan.image:
        params = vqgan.read(found.image, plan.image, where=str(found.path))
        vqgan.save(run / "image", plan.image, params)
        runs.taken(run, "image", runs.decided(plan.recipe, "image"), origin)
    if plan.clip:
        folder = _folder(found.path)
        encoder.save(run / "retriever", *weights.read(folder, _Opened(found)), tokenizers.load(folder))
        runs.taken(run, "retriever", runs.decided(plan.recipe, "retriever"), origin)
    told = {name: value for name, value in found.about.items() if name != "vocabulary_map"}  # tokenizer.json has it
    about = {"layout": found.layout, "sha256": digest, "source": str(found.path), "config": told}
    about["files"] = sorted(os.path.relpath(path, _folder(found.path)) for path in set(found.files))
    if plan.image:
        kinds = {tensor.dtype.name for tensor in _taken(found.image, plan.image).values()}
        about["image"] = {"form": plan.image.form, "prefix": plan.image.prefix}
        about["image"]["dtype"] = kinds.pop() if len(kinds) == 1 else "float32"
    stages.write_text(run / ABOUT, json.dumps(about, indent=1) + "\n")
    stages.write_text(run / "recipe.json", json.dumps(config.to_json(plan.recipe), indent=1) + "\n")


def copied(source: pathlib.Path, out: pathlib.Path) -> list[str]:
    """Copy the finished files of a run's tokenizers and retriever; return the folders that there are."""
    found = [part for part in PARTS if (source / part).is_dir()]
    for part in found:
        (out / part).mkdir()
        for path in sorted((source / part).iterdir()):
            if path.is_file() and stages.counts(path.relative_to(source)):
                shutil.copyfile(path, out / part / path.name)
    return found


# ----------------------------------------------------------------------------------------------------------------- out


SENT = ("decoder", "retriever", "image")
"""Parts of a run that have a form of others."""


def send(
    run: pathlib.Path, out: str, to: str, step: int | None = None, dtype: str = "", part: str = "", say=print
) -> pathlib.Path:
    """Write a run's weights for others; return the folder.

    Args:
      to: "hf": Chameleon or CLIP as Hugging Face publishes it, which transformers loads, or an image tokenizer under
        its published names; "safetensors": see `interop.plain`.
      step: Checkpoint of the decoder; None: the latest.
      part: Of "hf": one of `SENT`; "": the first of them that the run has.
      dtype: Of the weights; "": as they are stored.

    Raises:
      UserError: if `out` is there, the run is not finished, or naming the setting in which it is no Chameleon, or no
        image tokenizer of a published form.
    """
    folder = pathlib.Path(out)
    fresh(folder)
    recipe = config.load(run / "recipe.json")
    if part and to != "hf":
        raise UserError(f"--part {part}: --to {to} writes all parts; leave it out, or take --to hf")
    part = part or next((name for name in SENT if (run / name).is_dir()), SENT[0])
    if to == "hf" and not (run / part).is_dir():
        raise UserError(f"{run}: has no {part}/, and --to hf writes one of {', '.join(SENT)}; take --to safetensors")
    with whole(folder) as partial:
        if to == "hf" and part != "decoder":
            files = (_clip if part == "retriever" else _pictures)(run, partial, dtype)
        else:
            files = (_hugging_face if to == "hf" else _safetensors)(run, recipe, partial, step, dtype)
    say(f"{folder}: {', '.join(files)}")
    return folder


def _hugging_face(run: pathlib.Path, recipe: config.Recipe, out: pathlib.Path, step, dtype: str) -> list[str]:
    """Write a folder that transformers loads."""
    origin = imported(run)
    tokenizer, model = text.load(run / "text"), recipe.decoder.model
    if isinstance(tokenizer, text.Published):
        words = _with_image(json.loads(tokenizer.path.read_text(encoding="utf-8")))
        words["truncation"] = None  # as `text.load` has it; transformers' processor would cut pictures short by it
        order = chameleon_vocab.load(run / "text" / text.ORDER)
    else:
        words, order = pieces.document(tokenizer, recipe.vocab), chameleon_vocab.own(recipe.vocab)
    stages.write_text(out / text.PUBLISHED, json.dumps(words, ensure_ascii=False) + "\n")
    names = sources.entries(out / text.PUBLISHED)
    about = chameleon.settings(model, recipe.vocab.size, recipe.decoder.packing.length, names)
    pictures = image.load(run / "image")
    network = vqgan.Network(pictures.config, pictures.codes, pictures.resolution, prefix=chameleon.IMAGE)
    about |= {"vq_config": vqgan.vq_config(network)}
    about |= {chameleon.LUMINA: recipe.decoder.z_loss} if recipe.form.grid else {}
    tensors = chameleon.tensors(_weights(run, step), model, order, _kind(dtype))
    of_pictures = _kind(dtype or origin.get("image", {}).get("dtype", ""))
    tensors |= {name: mapped.held(x) for name, x in vqgan.tensors(pictures.params, network, of_pictures)}
    if not dtype and origin.get("config", {}).get("dtype", origin.get("config", {}).get("torch_dtype")):
        about["dtype"] = origin["config"].get("dtype", origin["config"].get("torch_dtype"))
    files = safetensor_files.save(out, tensors, {"format": "pt"})
    # its processor has no ends of rows, and needs the entries that only a released tokenizer has
    released = recipe.form.plain == "chameleon" and chameleon_vocab.IMAGE in names
    codes = pictures.grid[0] * pictures.grid[1]
    for name, content in {
        "config.json": about,
        "generation_config.json": {key: about[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
        "tokenizer_config.json": _tokenizer_config(names, about),
        **(chameleon.processing(pictures.resolution, codes) if released else {}),
    }.items():
        stages.write_text(out / name, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return sorted([path.name for path in files] + ["config.json", "tokenizer.json"])


def _clip(run: pathlib.Path, out: pathlib.Path, dtype: str) -> list[str]:
    """Write a folder that transformers' CLIPModel loads, with the files of the tokenizer as they are."""
    made, kind = encoder.load(run / "retriever"), _kind(dtype)
    tensors = {n: mapped.held(x.astype(kind or x.dtype)) for n, x in weights.tensors(made.config, made.params).items()}
    files = safetensor_files.save(out, tensors, {"format": "pt"}, most=sum(t.size for t in tensors.values()))
    rows = len(made.params["text"]["table"])
    about = weights.settings(made.config, rows, made.tokenizer.begin, made.tokenizer.end)
    for name, content in {
        weights.CONFIG: about,
        "preprocessor_config.json": weights.preprocessing(made.config),
    }.items():
        stages.write_text(out / name, json.dumps(content, indent=1) + "\n")
    for name, content in made.tokenizer.files.items():
        (out / name).write_bytes(content)
    return sorted([path.name for path in files] + [weights.CONFIG, *made.tokenizer.files])


def _pictures(run: pathlib.Path, out: pathlib.Path, dtype: str) -> list[str]:
    """Write an image tokenizer under its published names, those of the network's own state_dict, in one file.

    A file of torch may have had them in containers, "state_dict" or "model", which are left out. The pictures' size,
    which no tensor tells, stands in the file's metadata.
    """
    made, form = image.load(run / "image"), {"cosine": "llamagen"}
    network = vqgan.Network(made.config, made.codes, made.resolution, form.get(made.config.quantizer, "taming"))
    kind = _kind(dtype or imported(run).get("image", {}).get("dtype", ""))
    tensors = {name: mapped.held(x) for name, x in vqgan.tensors(made.params, network, kind)}
    safetensor_files.write(out / vqgan.FILE, tensors, {"format": "pt", vqgan.RESOLUTION: str(made.resolution)})
    return [vqgan.FILE]


def _with_image(words: dict[str, Any]) -> dict[str, Any]:
    """Return a tokenizer.json in which Meta's reserved entry has the name that Hugging Face gave it."""
    vocab, before, now = words["model"]["vocab"], chameleon_vocab.IMAGE_BEFORE, chameleon_vocab.IMAGE
    if now in vocab or before not in vocab:
        return words
    words["model"]["vocab"] = {now if name == before else name: i for name, i in vocab.items()}
    for added in words["added_tokens"]:
        added["content"] = now if added["content"] == before else added["content"]
    return words


def _tokenizer_config(names: dict[str, int], about: dict[str, Any]) -> dict[str, Any]:
    """Return what transformers wants to know beside tokenizer.json."""
    by_id = {i: name for name, i in names.items()}
    told = {
        f"{role}_token": by_id[about[f"{role}_token_id"]]
        for role in ("bos", "eos", "pad")
        if about[f"{role}_token_id"] is not None
    }
    if chameleon_vocab.END_OF_TURN in names:
        told["sep_token"] = chameleon_vocab.END_OF_TURN
    longest = about["max_position_embeddings"]
    return {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": longest, **told}


def _safetensors(run: pathlib.Path, recipe: config.Recipe, out: pathlib.Path, step, dtype: str) -> list[str]:
    """Write all parts of a run that are weights or tokenizers."""
    files = copied(run, out)
    if (run / "decoder").is_dir():
        tensors = plain.tensors(_weights(run, step), recipe, _kind(dtype))
        files += [path.name for path in safetensor_files.save(out, tensors, {"format": "np"})]
    stages.write_text(out / sources.CONFIG, json.dumps(plain.settings(recipe), indent=1) + "\n")
    return [*files, sources.CONFIG]


def _weights(run: pathlib.Path, step: int | None) -> dict[str, mapped.Tensor]:
    """Return the arrays of a run's decoder by path; the one that was read last stays in memory, and no other."""
    found, last = checkpoint.open_params(run / "decoder", step=step), {}

    def read(path: str) -> np.ndarray:
        if path not in last:
            last.clear()
            last[path] = found[path].read()
        return last[path]

    return {p: mapped.Tensor(x.shape, x.dtype, functools.partial(read, p)) for p, x in found.items()}


def imported(run: pathlib.Path) -> dict[str, Any]:
    """Return what an import wrote down of where a run came from; {} for a run that was made here."""
    path = run / ABOUT
    return json.loads(path.read_text()) if path.is_file() else {}


def _kind(name: str) -> np.dtype | None:
    """Return a type by its name; None for ""."""
    return safetensor_files.DTYPES[{"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[name]] if name else None
