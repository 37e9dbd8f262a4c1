"""Flickr30k, Stanford's image paragraphs, Localized Narratives: captions short and long.

results_20130124.token               1000092795.jpg#0<TAB>Two young guys ...          (Flickr30k, no splits)
dataset_flickr30k.json               images [{filename, split, imgid, sentences [{raw}]}]   (Karpathy's splits)
paragraphs_v1.json                   [{image_id, url, paragraph}], with val_split.json: [image_id, ...]
coco_val_localized_narratives.jsonl  {dataset_id, image_id, annotator_id, caption, timed_caption, traces, ...} a line
"""

import collections
import pathlib
from collections.abc import Iterator

from cm3jax.data import metadata
from cm3jax.data.example import Bad
from cm3jax.data.sets import item
from cm3jax.data.sets.item import Item
from cm3jax.types import UserError

TOKEN = ("results_20130124.token", "results.token", "*.token")
KARPATHY = "dataset_flickr30k.json"
PHOTOS = ("flickr30k-images", "flickr30k_images", "images", "")


def flickr30k_names(split: str) -> tuple[str, ...]:
    return (KARPATHY, *TOKEN) if split in ("train", "val", "test") else TOKEN


def flickr30k(folder: pathlib.Path, split: str) -> Iterator[Item]:
    """Yield one item a picture, all captions in truth["captions"].

    Args:
      split: Of Karpathy's file; without that file all pictures are "train".

    Raises:
      UserError: if another split is asked for than there is.
    """
    path = folder / KARPATHY
    if not path.is_file():
        if split != "train":
            raise UserError(
                f"{str(path)!r}: missing; without it there are no splits, and all is 'train', not {split!r}"
            )
        found = _tokens(item.find(folder, *TOKEN))
    else:
        rows = item.rows(item.load(path), "images", path)
        item.index(rows, "filename", path)
        found = {
            row["filename"]: _sentences(row, path)
            for row in rows
            if item.field(row, "split", path, row["filename"]) == split
        }
    places = [folder / name for name in PHOTOS]
    for name, captions in found.items():
        values = {"caption": captions[0], "image": item.picture_in(places, name)}
        yield Item(name.removesuffix(".jpg"), "caption", values, {"captions": captions}, name)


def _sentences(row: dict, path: pathlib.Path) -> list[str]:
    found = [str(item.field(s, "raw", path, row["filename"])).strip() for s in item.rows(row, "sentences", path)]
    if not found:
        raise UserError(f"{str(path)!r}: id {row['filename']}: no sentences; captions missing")
    return found


def _tokens(path: pathlib.Path) -> dict[str, list[str]]:
    found = collections.defaultdict(list)
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        name, tab, caption = line.partition("\t")
        if not tab or "#" not in name:
            raise UserError(f"{str(path)!r}: line {number}: {line[:40]!r}: must be NAME.jpg#N, a tab, a caption")
        found[name.rpartition("#")[0]].append(caption.strip())
    return dict(found)


def paragraph_names(split: str) -> tuple[str, ...]:
    return (f"{split}_split.json",)


def paragraphs(folder: pathlib.Path, split: str) -> Iterator[Item]:
    """Yield one item a picture of Visual Genome: a paragraph about it."""
    path, chosen = item.find(folder, "paragraphs_v1.json"), item.find(folder, *paragraph_names(split))
    table = item.index(item.rows({"all": item.load(path, list)}, "all", path), "image_id", path)
    places = [folder / name for name in ("VG_100K", "VG_100K_2", "images", "")]
    for key in item.load(chosen, list):
        item.match(key, table, chosen, path)
        text = str(item.field(table[key], "paragraph", path, key)).strip()
        values = {"caption": text, "image": item.picture_in(places, f"{key}.jpg")}
        yield Item(
            str(key), "long_caption", values, {"captions": [text]}, str(key), source=str(table[key].get("url", ""))
        )


def narrative_names(split: str) -> tuple[str, ...]:
    return f"*_{split}_localized_narratives*.jsonl", f"*_{split}_captions*.jsonl"


def narratives(folder: pathlib.Path, split: str) -> Iterator[Item]:
    """Yield one item a narration; a picture may have several, of different people. The voice's traces are left out."""
    first = item.find(folder, *narrative_names(split))
    pattern = next(p for p in narrative_names(split) if first in folder.glob(p))
    for path in sorted(folder.glob(pattern)):
        for _, number, row in metadata.rows(path):
            if isinstance(row, Bad):
                raise UserError(f"{str(path)!r}: line {number}: {row}")
            key = item.field(row, "image_id", path, f"line {number}")
            text = str(item.field(row, "caption", path, key)).strip()
            where = _narrated(folder, split, str(row.get("dataset_id", "")), str(key))
            name = f"{row.get('dataset_id', '')}/{key}/{row.get('annotator_id', number)}"
            group = f"{row.get('dataset_id', '')}/{key}"
            yield Item(name, "long_caption", {"caption": text, "image": where}, {"captions": [text]}, group)


def _narrated(folder: pathlib.Path, split: str, dataset: str, key: str) -> pathlib.Path:
    """Return the picture: COCO writes its numbers with twelve digits."""
    places = [folder / name for name in (dataset.split("_")[-1], split, "images", *PHOTOS)]
    padded = f"{int(key):012d}.jpg" if key.isdigit() and "coco" in dataset else f"{key}.jpg"
    return item.picture_in(places, padded, f"{key}.jpg")
