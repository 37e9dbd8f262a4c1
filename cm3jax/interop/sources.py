"""What somebody else's file or folder is, by its content: which model, which files, and its tensors by known names.

    found = sources.open("chameleon-7b")             # or of Meta's layout, or an image tokenizer, or CLIP
    found.kind, found.language["model.norm.weight"].shape      # nothing is read yet

Where a folder has the language model and not what belongs to it, `tokenizer` and `image` say where that lies.
"""

import dataclasses
import hashlib
import os
import pathlib
import re
from typing import Any

from cm3jax.interop import chameleon, mapped, meta, safetensor_files, tensors, vqgan
from cm3jax.tokenizers import clip as tokenizers
from cm3jax.tokenizers import text
from cm3jax.types import UserError

CONFIG, NATIVE = "config.json", "cm3jax"
DEEP = 3
"""Folders in one another that are looked into: Meta's download has models/7b/ and tokenizer/."""
MOST_JSON = 2**26
"""Bytes of a JSON file that is looked into; the tokenizer of a vocabulary of 65,536 has four million."""
LAYOUTS = "Chameleon (Hugging Face's or Meta's layout), image tokenizers (VQGAN) and CLIP"


@dataclasses.dataclass(frozen=True)
class Source:
    """A released checkpoint.

    Attributes:
      path: What was opened.
      kind: "chameleon", "image", "clip", or "cm3jax" for what `export --to safetensors` writes.
      layout: Whose files they are, in words.
      files: All files that are read.
      language: The language model's tensors under Hugging Face's names; {} if there is none.
      image: The image tokenizer's tensors, as their file names them; {} if there is none.
      clip: CLIP's tensors; {} if there are none.
      about: The config.json, or what it would be; {} if there is none.
      tokenizer: The text tokenizer's file.
    """

    path: pathlib.Path
    kind: str
    layout: str
    files: tuple[pathlib.Path, ...]
    language: dict[str, mapped.Tensor] = dataclasses.field(default_factory=dict)
    image: dict[str, mapped.Tensor] = dataclasses.field(default_factory=dict)
    clip: dict[str, mapped.Tensor] = dataclasses.field(default_factory=dict)
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    tokenizer: pathlib.Path | None = None

    @property
    def inner(self) -> bool:
        """Whether the image tokenizer lies in the language model's own files, whose config.json then tells of both."""
        return any(name.startswith(chameleon.IMAGE) for name in self.image)


def open(path, tokenizer: str = "", image: str = "") -> Source:
    """Return what a file or folder holds.

    Args:
      tokenizer: A tokenizer.json, or a folder that has one; "": in `path`.
      image: The image tokenizer's file, or a folder that has one; "": in `path`.

    Raises:
      UserError: naming the file that is missing, damaged, or not to be trusted, or what was found instead.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; give a checkpoint of {LAYOUTS}")
    if path.is_file() and path.suffix == ".json" and tensors.recognised(path) != "index":
        path = path.parent
    about = meta.read_json(path / CONFIG) if path.is_dir() and (path / CONFIG).is_file() else {}
    if about.get("format") == NATIVE:
        return _native(path, about)
    if about.get("model_type") == "chameleon":
        return _hugging_face(path, about, tokenizer, image)
    if path.is_dir() and (shards := [p for p in _files(path) if _holds(p, meta.TABLE)]):
        return _meta(path, shards, tokenizer, image)
    if tokenizer or image:
        raise UserError(f"{path}: --tokenizer and --image are for a language model, and none of Chameleon's is here")
    found = tensors.open(path)
    names = set(found.found)
    if any(name.startswith(("vision_model.", "visual.")) for name in names):
        files = _beside(found.files, "config.json", *tokenizers.FILES)
        return Source(path, "clip", "CLIP", files, clip=found.found)
    if meta.TABLE in names:
        raise UserError(f"{path}: one part of Meta's layout; give the folder that holds it, params.json and tokenizer")
    if is_image(names) and chameleon.NAMES["table"] not in names:
        return Source(path, "image", "image tokenizer", found.files, image=found.found, about=_side(found.values))
    if chameleon.NAMES["table"] in names and "model_type" not in about:
        raise UserError(f"{path}: a language model without a {CONFIG} that says its model_type; fetch that file too")
    what = f"model_type {about['model_type']!r}" if "model_type" in about else f"tensors such as {sorted(names)[:1]}"
    raise UserError(f"{path}: {what}: not known here; what can be imported: {LAYOUTS}")


def is_image(names) -> bool:
    """Return whether tensors are an image tokenizer's: a codebook, and an encoder or a decoder."""
    ends = [name.split(".") for name in names]
    return any("quantize" in parts for parts in ends) and any({"encoder", "decoder"} & set(parts) for parts in ends)


# ------------------------------------------------------------------------------------------------------------- layouts


def _hugging_face(path: pathlib.Path, about: dict[str, Any], tokenizer: str, image: str) -> Source:
    found = tensors.open(path)
    inner = {name: t for name, t in found.found.items() if name.startswith(chameleon.IMAGE)}
    language = {name: t for name, t in found.found.items() if name not in inner}
    outer = _image(pathlib.Path(image)) if image else None
    if not (inner or outer):
        raise UserError(f"{path}: has no image tokenizer; name a file that has one with --image (Meta's vqgan.ckpt)")
    words = _tokenizer(pathlib.Path(tokenizer or path))
    about = _named(about, words, path)
    files = (*found.files, path / CONFIG, words, *(outer.files if outer else ()))
    pictures = outer.found if outer else inner
    return Source(path, "chameleon", "Hugging Face", files, language, pictures, about=about, tokenizer=words)


def _named(about: dict[str, Any], words: pathlib.Path, path: pathlib.Path) -> dict[str, Any]:
    """Return a config.json with the entries of its tokenizer.

    Raises:
      UserError: if the config names an entry with another id than the tokenizer has.
    """
    names, told = entries(words), about.get("vocabulary_map") or {}
    if not isinstance(told, dict):
        raise UserError(f"{path / CONFIG}: vocabulary_map is {mapped.short(told)}, must be an object")
    for name, i in told.items():
        if names.get(name) != i:
            has = f"has {names[name]}" if name in names else "has no such entry"
            raise UserError(
                f"{words}: {has}, but {CONFIG} gives entry {name!r} the id {i!r}; take the tokenizer of this model"
            )
    return about | {"vocabulary_map": names}


def _meta(path: pathlib.Path, shards: list[pathlib.Path], tokenizer: str, image: str) -> Source:
    folders = sorted({shard.parent for shard in shards})
    if len(folders) > 1:
        raise UserError(f"{path}: has several models, {folders[0]} and {folders[1]}; name one, and its --tokenizer")
    folder = folders[0]
    told = {p: meta.read_json(p) for p in sorted(folder.glob("*params.json"))}
    about = meta.params(told, folder)
    opened = [tensors.open(p) for p in meta.ordered(shards, about, folder)]
    language = meta.tensors(opened, about)
    words = _tokenizer(pathlib.Path(tokenizer or path))
    table = language[chameleon.NAMES["table"]]
    mlp = meta.mlp_width(opened, about)
    settings = meta.settings(about, table.shape[0], mlp, entries(words), table.dtype.name, folder)
    pictures = _image(pathlib.Path(image or path))
    files = (*(p for one in opened for p in one.files), *told, words, *pictures.files)
    return Source(path, "chameleon", "Meta", files, language, pictures.found, about=settings, tokenizer=words)


def _native(path: pathlib.Path, about: dict[str, Any]) -> Source:
    found = tensors.open(path).found if any(path.glob("*.safetensors*")) else {}
    return Source(path, NATIVE, "cm3jax", tuple(_files(path)), language=found, about=about)


# --------------------------------------------------------------------------------------------------------- single files


def _tokenizer(path: pathlib.Path) -> pathlib.Path:
    """Return the one tokenizer file in a folder, by its content, or the file itself."""
    found = [p for p in (_files(path) if path.is_dir() else [path]) if _is_tokenizer(p)]
    found = [p for p in found if len(p.parts) == min(len(p.parts) for p in found)]
    if len(found) != 1:
        what = f"several, {found[0].name} and {found[1].name}" if found else "none"
        raise UserError(
            f"{path}: a text tokenizer with Chameleon's image codes is needed (tokenizer.json, text_tokenizer.json),"
            f" here is {what}; name it with --tokenizer"
        )
    return found[0]


def _is_tokenizer(path: pathlib.Path) -> bool:
    if path.suffix != ".json" or not path.is_file() or path.stat().st_size > MOST_JSON:
        return False
    data = path.read_bytes()
    return b'"model"' in data and b'"vocab"' in data and b"IMGIMG" in data


def entries(path: pathlib.Path) -> dict[str, int]:
    """Return the entries of a tokenizer's file: name -> id."""
    return text.read_published(path).get_vocab(with_added_tokens=True)


def _image(path: pathlib.Path) -> mapped.Tensors:
    """Return the tensors of the one image tokenizer in a folder, by its content, or of the file itself."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder of an image tokenizer")
    paths = _files(path) if path.is_dir() else [path]
    found = [
        t for t in (tensors.open(p) for p in paths if tensors.recognised(p) in tensors.OPENERS) if is_image(t.found)
    ]
    if len(found) != 1:
        what = f"several, {found[0].path.name} and {found[1].path.name}" if found else "none"
        raise UserError(f"{path}: an image tokenizer is needed (vqgan.ckpt), here is {what}; name it with --image")
    return found[0]


def _side(values: dict[str, Any]) -> dict[str, int]:
    """Return the pixels of a side that a file's metadata tells of an image tokenizer, {} if it does not."""
    told = values.get(vqgan.RESOLUTION)
    return {vqgan.RESOLUTION: int(told)} if isinstance(told, str) and re.fullmatch("[0-9]{1,5}", told) else {}


def _holds(path: pathlib.Path, name: str) -> bool:
    """Return whether a file of torch.save has a tensor of this name."""
    return tensors.recognised(path) == "torch" and name in tensors.open(path).found


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return the files in a folder and its folders, as deep as Meta's layout is, sorted."""
    found = []
    for at, folders, names in os.walk(folder):
        if len(pathlib.Path(at).relative_to(folder).parts) >= DEEP - 1:
            folders.clear()
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [pathlib.Path(at) / name for name in names]
    return sorted(path for path in found if path.is_file())


def _beside(files: tuple[pathlib.Path, ...], *names: str) -> tuple[pathlib.Path, ...]:
    """Return files, and those of these names beside the first."""
    others = [files[0].parent / name for name in names]
    return (*files, *(path for path in others if path.is_file() and path not in files))


# ------------------------------------------------------------------------------------------------------------ checksums


def digest(source: Source) -> str:
    """Return the SHA-256 of all that is read: a file's own; of several, that of the lines "SHA-256, two spaces, name".

    Names are those below the folder, sorted; so `sha256sum` over them, through `sha256sum` again, gives the same.
    """
    files = dict.fromkeys(source.files)
    if len(files) == 1:
        return tensors.checksum(source.files[0])
    root = source.path if source.path.is_dir() else source.path.parent
    names = {os.path.relpath(path, root): path for path in files}
    lines = [f"{tensors.checksum(names[name])}  {name}\n" for name in sorted(names)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def floating(found: dict[str, mapped.Tensor], path: pathlib.Path) -> None:
    """Raise a UserError that names the first tensor whose numbers are no plain weights."""
    for name, tensor in found.items():
        if safetensor_files.NAMES.get(tensor.dtype) not in ("F32", "F16", "BF16"):
            called = mapped.called(found, name, str(path))
            raise UserError(f"{called} is of {tensor.dtype}: weights must be float32, float16 or bfloat16")
