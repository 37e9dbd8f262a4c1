"""COCO 2014 and 2017 (cocodataset.org/#format-data), and Objects365, which uses the same format for boxes.

annotations/captions_val2017.json    images [{id, file_name, width, height, license}], licenses,
                                     annotations [{image_id, id, caption}]
annotations/instances_val2017.json   annotations [{image_id, category_id, bbox [x, y, w, h], iscrowd}], categories
annotations/panoptic_val2017.json    annotations [{image_id, file_name, segments_info [{id, category_id}]}]
panoptic_val2017/NAME.png            the maps
val2017/NAME.jpg                     the pictures; also images/val2017/, or flat
"""

import collections
import pathlib
from collections.abc import Iterator
from typing import Any

from cm3jax.data.sets import item
from cm3jax.data.sets.item import Item
from cm3jax.types import UserError

YEARS = ("2017", "2014")


def names(kind: str, split: str, years: tuple[str, ...] = YEARS) -> tuple[str, ...]:
    """Return where an annotation file may lie."""
    stems = [f"{kind}_{split}{year}.json" for year in years]
    return (*(f"annotations/{stem}" for stem in stems), *stems)


def captions(folder: pathlib.Path, split: str, years: tuple[str, ...] = YEARS) -> Iterator[Item]:
    """Yield one item a picture: its first caption; all of them in truth["captions"].

    Args:
      years: Of the set, the one to take first; others are not looked at.
    """
    path, data, images = _open(folder, "captions", split, years)
    told = _captions(path, data, images)
    for key, image in images.items():
        if key not in told:
            raise UserError(f"{str(path)!r}: id {key}: a picture without caption; answers missing")
        values = {"caption": told[key][0], "image": _picture(folder, path, image)}
        yield Item(str(key), "caption", values, {"captions": told[key]}, str(key), **_origin(data, image))


def boxes(folder: pathlib.Path, split: str) -> Iterator[Item]:
    """Yield one item a picture that has boxes: its caption (if the captions are there, else names), what is where."""
    path, data, images = _open(folder, "instances", split)
    known = _beside(folder, path, images)
    for key, image, things in _things(path, data, images):
        caption = known[key][0] if key in known else item.listed(things)
        values = {"caption": caption, "objects": item.told(things), "image": _picture(folder, path, image)}
        yield Item(str(key), "located", values, {"objects": things}, str(key), **_origin(data, image))


def objects365(folder: pathlib.Path, split: str) -> Iterator[Item]:
    """Yield one item a picture that has boxes, from zhiyuan_objv2_SPLIT.json."""
    path = item.find(folder, *objects365_names("", split))
    data = item.load(path)
    images = item.index(item.rows(data, "images", path), "id", path)
    for key, image, things in _things(path, data, images):
        name = pathlib.PurePosixPath(item.field(image, "file_name", path, key))
        places = [folder / split, folder / "images" / split, folder]
        where = item.picture_in(places, f"{name.parent.name}/{name.name}", name.name, str(name))
        values = {"caption": item.listed(things), "objects": item.told(things), "image": where}
        yield Item(str(key), "located", values, {"objects": things}, str(key), **_origin(data, image))


def objects365_names(kind: str, split: str) -> tuple[str, ...]:
    stems = (f"zhiyuan_objv2_{split}.json", f"objects365_{split}.json")
    return (*stems, *(f"annotations/{stem}" for stem in stems), *(f"{split}/{stem}" for stem in stems))


def panoptic(folder: pathlib.Path, split: str) -> Iterator[Item]:
    """Yield one item a map: the map in colours of categories, the caption (if there, else names), the picture."""
    path, data, images = _open(folder, "panoptic", split)
    categories = _categories(path, data)
    known = _beside(folder, path, images)
    for row in item.rows(data, "annotations", path):
        key = item.field(row, "image_id", path, "?")
        item.match(key, images, path, path)
        segments = [(s["id"], s["category_id"]) for s in item.rows(row, "segments_info", path)]
        for _, category in segments:
            item.match(category, categories, path, path)
        map_ = _map(folder, path, item.field(row, "file_name", path, key))
        what = list(dict.fromkeys(categories[category] for _, category in segments))
        values = {
            "feature_image": item.Coloured(map_, tuple(segments)),
            "caption": known[key][0] if key in known else ", ".join(what),
            "image": _picture(folder, path, images[key]),
        }
        yield Item(str(key), "segmentation", values, {"categories": what}, str(key), **_origin(data, images[key]))


# -------------------------------------------------------------------------------------------------------- shared parts


def _open(
    folder: pathlib.Path, kind: str, split: str, years: tuple[str, ...] = YEARS
) -> tuple[pathlib.Path, dict, dict[Any, dict]]:
    path = item.find(folder, *names(kind, split, years))
    data = item.load(path)
    return path, data, item.index(item.rows(data, "images", path), "id", path)


def captioned(path: pathlib.Path) -> dict[Any, list[str]]:
    """Return the captions of each picture that a file of COCO's format has some of.

    Raises:
      UserError: as the readers.
    """
    data = item.load(path)
    return _captions(path, data, item.index(item.rows(data, "images", path), "id", path))


def _captions(path: pathlib.Path, data: dict, images: dict) -> dict[Any, list[str]]:
    told = collections.defaultdict(list)
    for row in item.rows(data, "annotations", path):
        key = item.field(row, "image_id", path, "?")
        item.match(key, images, path, path)
        told[key].append(str(item.field(row, "caption", path, key)).strip())
    return dict(told)


def _beside(folder: pathlib.Path, path: pathlib.Path, images: dict) -> dict[Any, list[str]]:
    """Return the captions of the same pictures, {} if there is no captions file."""
    kind = path.name.split("_")[0]
    other = path.with_name(path.name.replace(kind, "captions"))
    if not other.is_file():
        return {}
    data = item.load(other)
    known = item.index(item.rows(data, "images", other), "id", other)
    for key in images:
        item.match(key, known, path, other)
    return _captions(other, data, known)


def _categories(path: pathlib.Path, data: dict) -> dict[int, str]:
    table = item.index(item.rows(data, "categories", path), "id", path)
    return {key: str(item.field(row, "name", path, key)) for key, row in table.items()}


def _things(path: pathlib.Path, data: dict, images: dict) -> Iterator[tuple[Any, dict, list[dict]]]:
    """Yield (id, picture's row, boxes in its centre crop) of pictures that have some; crowds are left out."""
    categories = _categories(path, data)
    found = collections.defaultdict(list)
    for row in item.rows(data, "annotations", path):
        key, category = item.field(row, "image_id", path, "?"), item.field(row, "category_id", path, row.get("id"))
        item.match(key, images, path, path)
        item.match(category, categories, path, path)
        if not row.get("iscrowd"):
            x, y, w, h = item.field(row, "bbox", path, row.get("id"))
            found[key].append((categories[category], x, y, x + w, y + h))
    for key, image in images.items():
        width, height = item.field(image, "width", path, key), item.field(image, "height", path, key)
        if things := item.located(found[key], width, height):
            yield key, image, things


def _picture(folder: pathlib.Path, path: pathlib.Path, image: dict) -> pathlib.Path:
    split = path.stem.split("_")[-1]  # "val2017"
    name = item.field(image, "file_name", path, image["id"])
    return item.picture_in([folder / split, folder / "images" / split, folder / "images", folder], name)


def _map(folder: pathlib.Path, path: pathlib.Path, name: str) -> pathlib.Path:
    return item.picture_in([folder / path.stem, path.parent / path.stem, folder], name)


def _origin(data: dict, image: dict) -> dict[str, str]:
    """Return the licence that a picture's number stands for, and where it is from."""
    licenses = {row.get("id"): row.get("name") or row.get("url", "") for row in data.get("licenses") or []}
    license = licenses.get(image.get("license"), "")
    return {"license": str(license), "source": str(image.get("flickr_url") or image.get("coco_url") or "")}
