"""The public sets by name: `read("vqa_v2", "/data/vqa", "val")`.

Their files are read where they are, as published; nothing is downloaded. To add a set: a function that yields items
from (folder, split), the names of the file that a split has, and a line here.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Iterator

from cm3jax.data.sets import captions, coco, dialogue, edits, open_images, questions
from cm3jax.data.sets.item import Item
from cm3jax.types import UserError

SPLITS = ("train", "val", "test")
SYNONYMS = {"validation": "val", "valid": "val", "dev": "val"}


@dataclasses.dataclass(frozen=True)
class Set:
    """A public set.

    Attributes:
      items: (folder, split) -> its items, always in the same order.
      names: split -> where the file may lie that says that the split is there.
      about: One line for people.
    """

    items: Callable[[pathlib.Path, str], Iterator[Item]]
    names: Callable[[str], tuple[str, ...]]
    about: str


SETS = {
    "coco_captions": Set(coco.captions, lambda s: coco.names("captions", s), "COCO 2014/2017, five captions a picture"),
    "coco_boxes": Set(coco.boxes, lambda s: coco.names("instances", s), "COCO 2014/2017, what is where"),
    "coco_panoptic": Set(coco.panoptic, lambda s: coco.names("panoptic", s), "COCO 2017, segmentation maps"),
    "flickr30k": Set(captions.flickr30k, captions.flickr30k_names, "Flickr30k, five captions a picture"),
    "image_paragraph": Set(captions.paragraphs, captions.paragraph_names, "paragraphs on pictures of Visual Genome"),
    "instruct_pix2pix": Set(edits.edits, edits.names, "InstructPix2Pix, edits by instruction (parquet)"),
    "localized_narratives": Set(captions.narratives, captions.narrative_names, "narrations of pictures"),
    "objects365": Set(coco.objects365, lambda s: coco.objects365_names("", s), "Objects365 v2, what is where"),
    "ok_vqa": Set(questions.ok_vqa, questions.ok_vqa_names, "OK-VQA, questions that take knowledge"),
    "open_images": Set(open_images.boxes, open_images.names, "Open Images, what is where"),
    "science_qa": Set(questions.science_qa, questions.science_qa_names, "ScienceQA, choices with explanations"),
    "visdial": Set(dialogue.rounds, dialogue.names, "VisDial 1.0, rounds with judged candidates"),
    "vizwiz": Set(questions.vizwiz, questions.vizwiz_names, "VizWiz, questions of blind people"),
    "vqa_v2": Set(questions.vqa, questions.vqa_names, "VQA v2, ten answers a question"),
}


def find(name: str) -> Set:
    """Return a set by its name.

    Raises:
      UserError: if there is none.
    """
    if name not in SETS:
        raise UserError(f"set {name!r}: no such set; sets: {', '.join(SETS)}")
    return SETS[name]


def read(name: str, folder, split: str, first: int = 0) -> Iterator[Item]:
    """Yield the items of a split, from number `first` on; pictures as where they lie (`item.picture` reads them).

    Raises:
      UserError: naming file and id, if a file is missing or broken, ids of two do not match, or answers are missing.
    """
    found, folder, split = find(name), pathlib.Path(folder), SYNONYMS.get(split, split)
    if found.items is edits.edits:
        return edits.edits(folder, split, first)  # skips without reading pictures
    return itertools.islice(found.items(folder, split), first, None)


def count(name: str, folder, split: str) -> int:
    """Return the number of items of a split.

    Raises:
      UserError: as `read`.
    """
    if find(name).items is edits.edits:
        return edits.count(pathlib.Path(folder), split)
    return sum(1 for _ in read(name, folder, split))


def splits(name: str, folder) -> tuple[str, ...]:
    """Return the splits whose files are in a folder.

    Raises:
      UserError: if there are none.
    """
    names, folder = find(name).names, pathlib.Path(folder)
    found = tuple(split for split in SPLITS if any(any(folder.glob(pattern)) for pattern in names(split)))
    if not found:
        where = (
            f"{str(folder)!r}: no such folder" if not folder.is_dir() else f"{str(folder)!r}: holds none of its files"
        )
        raise UserError(f"set {name!r}: {where}; looked for {', '.join(names('train'))}")
    return found
