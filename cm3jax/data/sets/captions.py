"""Flickr30k, Stanford's image paragraphs, Localized Narratives: captions short and long.

results_20130124.token               1000092795.jpg#0<TAB>Two young guys ...          (Flickr30k, no splits)
dataset_flickr30k.json               images [{filename, split, imgid, sentences [{raw}]}]   (Karpathy's splits)
paragraphs_v1.json                   [{image_id, url, paragraph}], with val_split.json: [image_id, ...]
coco_val_captions.jsonl              {dataset_id, image_id, annotator_id, caption} a line
coco_val_localized_narratives.jsonl  the same with timed_caption, traces, voice_recording; the largest sets are cut:
open_images_train_v6_localized_narratives-00000-of-00010.jsonl
"""

import collections
import itertools
import pathlib
import re
from collections.abc import Iterator

from cm3jax.data import metadata
from cm3jax.data.example import Bad
from cm3jax.data.sets import item
from cm3jax.data.sets.item import Item
from cm3jax.types import UserError

TOKEN = ("results_20130124.token", "results.token", "*.token")
KARPATHY = "dataset_flickr30k.json"
PHOTOS = ("flickr30k-images", "flickr30k_images", "images", "")
NARRATED = {"train": ("train", "train_v6"), "val": ("val", "validation")}
KINDS = re.compile("_captions|_localized_narratives")
LONG = {"train": ("training",), "val": ("validation",)}
ADE20K = "ADEChallengeData2016/images"


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
    """Yield one item a picture of Visual Genome: a paragraph about it; of the few that have two, the first.

    The published file tells some pictures twice, and a split may name one twice.
    """
    path, chosen = item.find(folder, "paragraphs_v1.json"), item.find(folder, *paragraph_names(split))
    table = collections.defaultdict(list)
    for row in item.rows({"all": item.load(path, list)}, "all", path):
        table[item.field(row, "image_id", path, "?")].append(row)
    places = [folder / name for name in ("VG_100K", "VG_100K_2", "images", "")]
    for key in dict.fromkeys(item.load(chosen, list)):
        item.match(key, table, chosen, path)
        told = list(dict.fromkeys(str(item.field(row, "paragraph", path, key)).strip() for row in table[key]))
        values = {"caption": told[0], "image": item.picture_in(places, f"{key}.jpg")}
        source = str(table[key][0].get("url", ""))
        yield Item(str(key), "long_caption", values, {"captions": told}, str(key), source=source)


def narrative_names(split: str) -> tuple[str, ...]:
    """Return the patterns of a set's files, the smallest first: "train" is also called train_v6, "val" validation."""
    kinds = "_captions.jsonl", "_localized_narratives.jsonl", "_localized_narratives-*.jsonl"
    return tuple(f"*_{name}{kind}" for kind in kinds for name in NARRATED.get(split, (split,)))


def narratives(folder: pathlib.Path, split: str) -> Iterator[Item]:
    """Yield one item a narration; a picture may have several, of different people. The voice's traces are left out.

    All sets in the folder are read, one after the other, each from one kind of its files.
    """
    item.find(folder, *narrative_names(split))
    sets = {}
    for pattern in narrative_names(split):
        kind = collections.defaultdict(list)
        for path in sorted(folder.glob(pattern)):
            kind[KINDS.split(path.name)[0]].append(path)
        sets = kind | sets
    for path in itertools.chain.from_iterable(sets[name] for name in sorted(sets)):
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
    """Return the picture: COCO writes its numbers with twelve digits, and so none is another set's."""
    names = dict.fromkeys((dataset.split("_")[-1], split, *LONG.get(split, ())))
    places = [folder / name for name in (*names, *PHOTOS)]
    places += [folder / images / name for images in ("images", ADE20K) for name in names]
    return item.picture_in(places, f"{key.zfill(12) if 'coco' in dataset else key}.jpg")
