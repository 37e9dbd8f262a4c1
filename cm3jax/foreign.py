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
import json
import os
import pathlib
import shutil
from typing import Any, NamedTuple

import flax.traverse_util
import numpy as np

from cm3jax import config, stages, trees
from cm3jax import run as runs
from cm3jax.interop import chameleon, chameleon_vocab, mapped, sources, streamed, vqgan
from cm3jax.retrieval import encoder, weights
from cm3jax.tokenizers import clip as tokenizers
from cm3jax.tokenizers import text
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
    model = weights.sizes(_folder(found.path), _Opened(found.clip))
    tokenizers.load(_folder(found.path))
    return Plan(config.Recipe(name=name, retriever=config.Retriever(model=model)), clip=model)


def _image(found: sources.Source, name: str, resolution: int) -> Plan:
    network = vqgan.network(found.image, None, resolution, str(found.path))
    sources.floating(_taken(found.image, network), found.path)
    room = LIMIT - len(SPECIALS) - network.codes - Vocab.sentinels  # the default text vocabulary may not fit beside it
    vocab = Vocab(text=max(1, min(Vocab.text, room)), image=network.codes)
    return Plan(_with_pictures(config.Recipe(name=name, vocab=vocab), network), image=network)


def _with_pictures(recipe: config.Recipe, network: vqgan.Network) -> config.Recipe:
    """Return a recipe with an image tokenizer's settings."""
    return dataclasses.replace(
        recipe,
        prepare=dataclasses.replace(recipe.prepare, resolution=network.resolution),
        image=dataclasses.replace(recipe.image, model=network.model),
    )


def _taken(tensors: dict[str, mapped.Tensor], network: vqgan.Network) -> dict[str, mapped.Tensor]:
    """Return the tensors of an image tokenizer that are read."""
    return {leaf.name: tensors[leaf.name] for leaf in vqgan.leaves(network).values()}


def _folder(path: pathlib.Path) -> pathlib.Path:
    return path if path.is_dir() else path.parent


class _Opened:
    """Tensors as `weights` wants an open file."""

    def __init__(self, tensors: dict[str, mapped.Tensor]):
        self.tensors = tensors
        self.keys = tensors.keys

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
    recipe = config.Recipe(
        name=name,
        vocab=order.vocab,
        decoder=config.DecoderStage(
            model=network.model,
            packing=config.Packing(kind="whole", length=network.length),
            mask=config.Mask(spans=0.0),
            z_loss=1e-5,  # arXiv 2405.09818 §2.4
        ),
    )
    return Plan(_with_pictures(recipe, pictures), params, order, pictures)


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
    if plan.decoder:
        (run / "text").mkdir()
        shutil.copyfile(found.tokenizer, run / "text" / text.PUBLISHED)
        chameleon_vocab.save(run / "text" / text.ORDER, plan.order)
        text.load(run / "text")  # what a run will open must open
        record(run, "text", {"vocab": {"text": plan.recipe.vocab.text}}, origin)
        params = flax.traverse_util.unflatten_dict(plan.decoder, sep="/")
        streamed.save(run / "decoder", 0, params, {"identity": {"name": "decoder"}, "seconds": 0.0})
        made = {name: config.to_json(getattr(plan.recipe.decoder, name)) for name in ("model", "packing", "mask")}
        record(run, "decoder", {"decoder": made}, origin)
    if plan.image:
        params = vqgan.read(found.image, plan.image, where=str(found.path))
        vqgan.save(run / "image", plan.image, params)
        made = {"image": {"model": config.to_json(plan.image.model)}, "vocab": {"image": plan.image.codes}}
        record(run, "image", made, origin)
    if plan.clip:
        folder = _folder(found.path)
        encoder.save(run / "retriever", *weights.read(folder, _Opened(found.clip)), tokenizers.load(folder))
        record(run, "retriever", {"retriever": {"model": config.to_json(plan.clip)}}, origin)
    about = {"layout": found.layout, "sha256": digest, "source": str(found.path), "config": found.about}
    about["files"] = sorted(os.path.relpath(path, found.path) for path in set(found.files))
    stages.write_text(run / ABOUT, json.dumps(about, indent=1) + "\n")
    stages.write_text(run / "recipe.json", json.dumps(config.to_json(plan.recipe), indent=1) + "\n")


def record(run: pathlib.Path, name: str, settings: dict[str, Any], origin: str) -> None:
    """Write the stage.json of an imported stage."""
    stage = runs.STAGES[name]
    files = stages.files(run, stage.output)
    result = stages.fingerprint(run, files)
    digest = config.digest(stages.significant(settings))
    made = stages.Record(settings, digest, {}, True, result, files, imported=origin)
    stages.write(stage.folder(run), made)
