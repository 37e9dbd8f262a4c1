"""Every reader on small files of exactly the published format, and what it says about broken ones."""

import csv
import json
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from cm3jax import config
from cm3jax.data import prepare, shards, sources
from cm3jax.data.example import Bad, Example, Reject
from cm3jax.data.sets import catalogue, item
from cm3jax.tasks import table, templates
from cm3jax.types import UserError
from tests import broken


def write(path: pathlib.Path, value) -> pathlib.Path:
    """Write JSON, or lines of JSON for .jsonl."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in value) if path.suffix == ".jsonl" else json.dumps(value)
    path.write_text(lines)
    return path


def photo(path: pathlib.Path, width: int = 64, height: int = 48, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path, "PNG")  # decoders look at the bytes, not at the name


# ------------------------------------------------------------------------------------- one maker of files for each set


def _images(*ids: int) -> list[dict]:
    return [
        {"license": 4, "file_name": f"{i:012d}.jpg", "coco_url": f"http://images.cocodataset.org/val2017/{i:012d}.jpg",
         "height": 48, "width": 64, "date_captured": "2013-11-14 17:02:52", "flickr_url": f"http://flickr/{i}", "id": i}
        for i in ids
    ]  # fmt: skip


LICENSES = [{"url": "http://creativecommons.org/licenses/by/2.0/", "id": 4, "name": "Attribution License"}]
CATEGORIES = [
    {"supercategory": "person", "id": 1, "name": "person"},
    {"supercategory": "animal", "id": 18, "name": "dog"},
]


def coco_captions(root: pathlib.Path) -> None:
    told = [(42, "A dog. "), (7, "Two cats."), (42, "The dog runs.")]
    rows = [{"image_id": key, "id": 100 + i, "caption": text} for i, (key, text) in enumerate(told)]
    data = {"info": {"year": 2017}, "licenses": LICENSES, "images": _images(42, 7), "annotations": rows}
    write(root / "annotations/captions_val2017.json", data)
    photo(root / "val2017/000000000042.jpg", seed=42)
    photo(root / "val2017/000000000007.jpg", seed=7)


def coco_boxes(root: pathlib.Path) -> None:
    coco_captions(root)
    boxes = [
        (42, 18, [16, 12, 24, 36], 0),
        (42, 1, [0, 0, 64, 48], 0),
        (42, 1, [0, 0, 9, 9], 1),
        (7, 18, [0, 0, 6, 9], 0),
    ]
    rows = [
        {"segmentation": [[1, 1, 2, 2, 3, 1]], "area": 9.0, "iscrowd": crowd, "image_id": key, "bbox": box,
         "category_id": kind, "id": i}
        for i, (key, kind, box, crowd) in enumerate(boxes)
    ]  # fmt: skip
    data = {"licenses": LICENSES, "images": _images(42, 7), "annotations": rows, "categories": CATEGORIES}
    write(root / "annotations/instances_val2017.json", data)


def coco_panoptic(root: pathlib.Path) -> None:
    coco_captions(root)
    segments = [{"id": 3 + 256 * 5, "category_id": 18, "area": 4, "bbox": [0, 0, 2, 2], "iscrowd": 0}]
    segments += [{"id": 65536 * 2, "category_id": 1, "area": 2, "bbox": [0, 0, 1, 1], "iscrowd": 0}]
    rows = [{"segments_info": segments, "file_name": "000000000042.png", "image_id": 42}]
    data = {"licenses": LICENSES, "images": _images(42, 7), "annotations": rows, "categories": CATEGORIES}
    write(root / "annotations/panoptic_val2017.json", data)
    (root / "panoptic_val2017").mkdir()
    pixels = np.array([[[3, 5, 0], [3, 5, 0]], [[0, 0, 0], [0, 0, 2]]], np.uint8)
    Image.fromarray(pixels).save(root / "panoptic_val2017/000000000042.png")


def objects365(root: pathlib.Path) -> None:
    image = {"height": 48, "id": 420917, "license": 5, "width": 64, "url": None}
    image["file_name"] = "images/v1/patch8/objects365_v1_00420917.jpg"
    row = {"id": 66, "iscrowd": 0, "isfake": 0, "area": 9, "isreflected": 0, "bbox": [8.0, 0.0, 24.0, 24.0]}
    row |= {"image_id": 420917, "category_id": 18}
    data = {"images": [image], "annotations": [row], "categories": CATEGORIES, "licenses": [{"id": 5, "name": "BY"}]}
    write(root / "zhiyuan_objv2_val.json", data)
    photo(root / "val/patch8/objects365_v1_00420917.jpg")


BOX_COLUMNS = (
    "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
)


def open_images(root: pathlib.Path, *more: str) -> None:
    rows = ["0001eeaf4aed83f9,xclick,/m/0cmf2,1,0.125,0.5,0,0.5,0,0,0,0,0"]
    rows += ["0001eeaf4aed83f9,xclick,/m/011k07,1,0.2,0.3,0.2,0.3,0,0,1,0,0", *more]
    (root / "validation-annotations-bbox.csv").write_text("\n".join([BOX_COLUMNS, *rows]) + "\n")
    (root / "class-descriptions-boxable.csv").write_text("/m/011k07,Tortoise\n/m/0cmf2,Airplane\n")
    with (root / "validation-images-with-rotation.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["ImageID", "Subset", "OriginalURL", "License", "Title"])
        for key in dict.fromkeys(row.split(",")[0] for row in rows):
            table.writerow([key, "validation", "https://flickr/1", "https://cc/by/2.0/", 'a "title", here'])
    photo(root / "validation/0001eeaf4aed83f9.jpg")


def instruct_pix2pix(root: pathlib.Path) -> None:
    import pyarrow
    import pyarrow.parquet as parquet

    (root / "data").mkdir(parents=True)
    for file in range(2):
        keys = [f"{file}{i}" for i in range(5)]
        image = lambda key, seed: {"bytes": broken.encoded("jpeg", seed=seed), "path": f"{key}_{seed}.jpg"}  # noqa: E731
        table = {
            "original_prompt": [f"a dog {key}" for key in keys],
            "original_image": [image(key, 0) for key in keys],
            "edit_prompt": [f"make it a cat {key}" for key in keys],
            "edited_prompt": [f"a cat {key}" for key in keys],
            "edited_image": [image(key, 1) for key in keys],
        }
        path = root / f"data/train-{file:05d}-of-00002-9e2c.parquet"
        parquet.write_table(pyarrow.table(table), path, row_group_size=2)


def flickr30k(root: pathlib.Path) -> None:
    sentences = [{"tokens": ["two", "men"], "raw": "Two men.", "imgid": 0, "sentid": i} for i in range(2)]
    images = [
        {"sentids": [0, 1], "imgid": 0, "sentences": sentences, "split": "val", "filename": "1000092795.jpg"},
        {"sentids": [2], "imgid": 1, "sentences": [{"raw": "A dog."}], "split": "train", "filename": "10002456.jpg"},
    ]
    write(root / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})
    photo(root / "flickr30k-images/1000092795.jpg")


def flickr30k_tokens(root: pathlib.Path) -> None:
    lines = ["1000092795.jpg#0\tTwo young guys .", "1000092795.jpg#1\tTwo men # outside .", "10002456.jpg#0\tA dog ."]
    root.mkdir(exist_ok=True)
    (root / "results_20130124.token").write_text("\n".join(lines) + "\n")
    photo(root / "flickr30k-images/1000092795.jpg")


def image_paragraph(root: pathlib.Path) -> None:
    row = {
        "url": "https://cs.stanford.edu/VG_100K/2356347.jpg",
        "image_id": 2356347,
        "paragraph": "A large building. It ",
    }
    write(root / "paragraphs_v1.json", [row, row | {"image_id": 2317429}])
    write(root / "val_split.json", [2356347])
    photo(root / "VG_100K_2/2356347.jpg")


def localized_narratives(root: pathlib.Path) -> None:
    row = {
        "dataset_id": "mscoco_val2017",
        "image_id": "137576",
        "annotator_id": 93,
        "caption": "In this image there are cows.",
    }
    row |= {
        "timed_caption": [{"utterance": "In this", "start_time": 0, "end_time": 0.4}],
        "voice_recording": "coco.ogg",
    }
    row |= {"traces": [[{"x": 0.2, "y": -0.01, "t": 0.02}]]}
    write(root / "coco_val_localized_narratives-00000-of-00002.jsonl", [row])
    write(root / "coco_val_localized_narratives-00001-of-00002.jsonl", [row | {"annotator_id": 94}])
    photo(root / "val2017/000000137576.jpg")


PEOPLE = [
    {"answer_id": i + 1, "answer": "down" if i < 6 else "at table", "answer_confidence": "yes"} for i in range(10)
]


def vqa_v2(root: pathlib.Path, prefix: str = "v2_") -> None:
    question = {"image_id": 262148, "question": "Where is he looking?", "question_id": 262148000}
    row = {"question_type": "where is", "multiple_choice_answer": "down", "answers": PEOPLE, "image_id": 262148}
    row |= {"answer_type": "other", "question_id": 262148000}
    about = {"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "data_subtype": "val2014"}
    about["license"] = {"url": "http://creativecommons.org/licenses/by/4.0/", "name": "CC BY 4.0"}
    write(root / f"{prefix}OpenEnded_mscoco_val2014_questions.json", {**about, "questions": [question]})
    write(root / f"{prefix}mscoco_val2014_annotations.json", {**about, "annotations": [row]})
    photo(root / "val2014/COCO_val2014_000000262148.jpg")


def ok_vqa(root: pathlib.Path) -> None:
    vqa_v2(root, "")
    path = root / "mscoco_val2014_annotations.json"
    data = json.loads(path.read_text())
    del data["annotations"][0]["multiple_choice_answer"]
    for answer in data["annotations"][0]["answers"]:
        answer["raw_answer"] = answer["answer"]
    write(path, data)


def vizwiz(root: pathlib.Path) -> None:
    answers = [{"answer": "unanswerable" if i % 2 else "basil leaves", "answer_confidence": "yes"} for i in range(9)]
    row = {"image": "VizWiz_val_00000001.jpg", "question": "What is this? ", "answers": answers}
    write(root / "Annotations/val.json", [row | {"answer_type": "other", "answerable": 1}])
    photo(root / "val/VizWiz_val_00000001.jpg")


def science_qa(root: pathlib.Path) -> None:
    row = {
        "question": "Which is farthest north?",
        "choices": ["West Virginia", "Louisiana"],
        "answer": 0,
        "hint": "Look.",
    }
    row |= {"image": "image.png", "task": "closed choice", "grade": "grade2", "subject": "social science"}
    row |= {"topic": "geography", "category": "Geography", "skill": "Read a map", "lecture": "Maps have arrows."}
    row |= {"solution": "Find the compass.", "split": "val"}
    problems = {"5": row, "6": row | {"image": None}, "7": row | {"solution": "", "hint": "", "answer": 1}}
    write(root / "problems.json", problems)
    write(root / "pid_splits.json", {"train": [], "val": ["5", "6", "7"], "test": []})
    photo(root / "val/5/image.png")
    photo(root / "images/val/7/image.png")


def visdial(root: pathlib.Path) -> None:
    turn = lambda i: {"question": i, "answer": i, "answer_options": [2, i, 1], "gt_index": 1}  # noqa: E731
    dialog = {"image_id": 185565, "caption": "a dog on a lawn", "dialog": [turn(0), turn(3)]}
    data = {"questions": ["is it sunny", "x", "y", "is it old"], "answers": ["yes", "no", "maybe", "i can't tell"]}
    write(root / "visdial_1.0_val.json", {"data": data | {"dialogs": [dialog]}, "split": "val", "version": "1.0"})
    dense = [{"image_id": 185565, "round_id": 2, "gt_relevance": [0.0, 1.0, 0.4]}]
    write(root / "visdial_1.0_val_dense_annotations.json", dense)
    photo(root / "VisualDialog_val2018/VisualDialog_val2018_000000185565.jpg")


MAKERS = {name: globals()[name] for name in catalogue.SETS}
SPLIT = {"instruct_pix2pix": "train"}


@pytest.fixture(params=MAKERS)
def made(request, tmp_path):
    """Return (name, folder, split) of a small copy of each set."""
    MAKERS[request.param](tmp_path)
    return request.param, tmp_path, SPLIT.get(request.param, "val")


def texts(found):
    """Return an item's texts, and its pictures' paths from the folder."""
    short = lambda v: v if isinstance(v, str) else v.name if isinstance(v, pathlib.Path) else type(v).__name__  # noqa: E731
    return {name: short(value) for name, value in found.values.items()}


# --------------------------------------------------------------------------------------------------- laws for every set


def test_a_set_has_items_with_distinct_keys_and_pictures_that_can_be_read(made):
    name, folder, split = made
    items = list(catalogue.read(name, folder, split))
    assert items and len({found.key for found in items}) == len(items)
    for found in items:
        pictures = [value for value in found.values.values() if not isinstance(value, str)]
        assert pictures and found.group and json.loads(json.dumps(found.truth)) == found.truth
        for value in pictures:
            assert len(item.picture(value, folder)) > 0


def test_reading_from_the_middle_gives_the_rest(made):
    name, folder, split = made
    items = list(catalogue.read(name, folder, split))
    assert catalogue.count(name, folder, split) == len(items)
    for first in range(len(items) + 2):
        assert list(catalogue.read(name, folder, split, first)) == items[first:]


def test_the_splits_that_are_there_are_found(made):
    name, folder, split = made
    assert split in catalogue.splits(name, folder)
    if split == "val":
        assert list(catalogue.read(name, folder, "validation")) == list(catalogue.read(name, folder, "val"))


def test_a_folder_without_the_set_says_what_is_missing(made):
    name, folder, split = made
    with pytest.raises(UserError, match=f"set '{name}': .*none': no such folder; looked for"):
        catalogue.splits(name, folder / "none")
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match="empty.*(holds no|missing)"):
        list(catalogue.read(name, folder / "empty", split if name != "flickr30k" else "val"))


def test_prepare_reads_a_set(made):
    name, folder, split = made
    opened = sources.open(config.Prepare(source=f"set:{name}:{folder}:{split}"))
    jobs = json.loads(json.dumps(opened.jobs(2)))
    examples = [found for job in jobs for found in opened.read(job)]
    items = list(catalogue.read(name, folder, split))
    assert opened.total(jobs) == len(examples) == len(items)
    for example, found in zip(examples, items, strict=True):
        assert isinstance(example, Example) and example.group == found.group
        assert example.fields["task"] == found.task and example.fields["truth"] == found.truth
        assert example.split == {"val": "validation"}.get(split, split)
        assert templates.read(found.task, example.parts) is not None
        text = "".join(part for part in example.parts if isinstance(part, str))
        assert all(value in text for value in found.values.values() if isinstance(value, str))
        assert {region.label for region in example.regions} == set(table.find(found.task).answer)
    wordings = {example.fields["wording"] for example in examples}
    assert len(wordings) == min(len(examples), len(table.find(items[0].task).templates))
    assert opened.fingerprint() == sources.open(config.Prepare(source=f"set:{name}:{folder}:{split}")).fingerprint()


# ------------------------------------------------------------------------------------------------------- each set alone


def test_coco_captions(tmp_path):
    coco_captions(tmp_path)
    dog, cats = catalogue.read("coco_captions", tmp_path, "val")
    assert (dog.key, dog.task, dog.group) == ("42", "caption", "42")
    assert texts(dog) == {"caption": "A dog.", "image": "000000000042.jpg"}
    assert dog.truth == {"captions": ["A dog.", "The dog runs."]} and cats.truth == {"captions": ["Two cats."]}
    assert (dog.license, dog.source) == ("Attribution License", "http://flickr/42")


def test_coco_boxes_are_told_in_pixels_of_the_centre_crop(tmp_path):
    """64 x 48 pixels: the crop begins at 8 and is 48 wide, so that a pixel is 256 / 48 of the prompt's."""
    coco_boxes(tmp_path)
    (found,) = catalogue.read("coco_boxes", tmp_path, "val")  # the other picture's box lies outside the crop
    assert texts(found) == {
        "caption": "A dog.",
        "objects": "person at (0, 0) -> (256, 256), dog at (43, 64) -> (171, 256)",
        "image": "000000000042.jpg",
    }
    assert found.truth["objects"][1] == {"name": "dog", "box": [43, 64, 171, 256]}


def test_without_captions_boxes_are_named(tmp_path):
    coco_boxes(tmp_path)
    (tmp_path / "annotations/captions_val2017.json").unlink()
    (found,) = catalogue.read("coco_boxes", tmp_path, "val")
    assert found.values["caption"] == "person, dog"


def test_at_most_ten_boxes_are_told():
    found = item.located([(f"thing {i}", 0, 0, i + 1, 10) for i in range(15)], 100, 100)
    assert [thing["name"] for thing in found] == [f"thing {i}" for i in range(14, 4, -1)]


def test_coco_panoptic_is_painted_by_category(tmp_path):
    coco_panoptic(tmp_path)
    (found,) = catalogue.read("coco_panoptic", tmp_path, "val")
    assert list(found.values) == ["feature_image", "caption", "image"] and found.truth == {
        "categories": ["dog", "person"]
    }
    pixels = item.picture(found.values["feature_image"], tmp_path)
    np.testing.assert_array_equal(pixels[0, 0], item.colour(18))
    np.testing.assert_array_equal(pixels[1, 1], item.colour(1))
    np.testing.assert_array_equal(pixels[1, 0], (0, 0, 0))


def test_200_categories_have_200_colours_and_none_is_black():
    assert len({item.colour(i) for i in range(201)}) == 201


def test_a_segment_without_category_is_a_bad_picture(tmp_path):
    coco_panoptic(tmp_path)
    (found,) = catalogue.read("coco_panoptic", tmp_path, "val")
    value = item.Coloured(found.values["feature_image"].path, found.values["feature_image"].categories[:1])
    with pytest.raises(Bad, match="segment 131072 of the map is not in segments_info"):
        item.picture(value, tmp_path)


def test_objects365(tmp_path):
    objects365(tmp_path)
    (found,) = catalogue.read("objects365", tmp_path, "val")
    assert texts(found)["objects"] == "dog at (0, 0) -> (128, 128)" and found.license == "BY"
    assert found.values["image"] == tmp_path / "val/patch8/objects365_v1_00420917.jpg"


def test_open_images(tmp_path):
    open_images(tmp_path)
    (found,) = catalogue.read("open_images", tmp_path, "val")
    assert texts(found) == {
        "caption": "Airplane",
        "objects": "Airplane at (0, 0) -> (128, 128)",
        "image": "0001eeaf4aed83f9.jpg",
    }
    assert (found.license, found.source) == ("https://cc/by/2.0/", "https://flickr/1")


@pytest.mark.parametrize(
    "name", ["train-images-boxable-with-rotation.csv", "oidv6-train-images-with-labels-with-rotation.csv"]
)
def test_open_images_tells_the_licences_of_train_by_its_own_file_names(tmp_path, name):
    open_images(tmp_path)
    for old, new in [("annotations-bbox.csv",) * 2, ("images-with-rotation.csv", name.removeprefix("train-"))]:
        new = new if new.startswith("oidv6") else f"train-{new}"
        (tmp_path / f"validation-{old}").rename(tmp_path / new)
    (found,) = catalogue.read("open_images", tmp_path, "train")
    assert (found.license, found.source) == ("https://cc/by/2.0/", "https://flickr/1")


def test_instruct_pix2pix(tmp_path):
    instruct_pix2pix(tmp_path)
    items = list(catalogue.read("instruct_pix2pix", tmp_path, "train"))
    assert len(items) == 10 and items[7].key == "0000007"
    assert list(items[7].values) == ["image", "instruction", "edited_image"] and items[7].task == "edit"
    assert items[7].values["instruction"] == "make it a cat 12" and items[7].values["image"] == broken.encoded(
        "jpeg", 0
    )
    assert items[7].truth == {"before": "a dog 12", "after": "a cat 12"}


def test_flickr30k_with_karpathys_splits_and_without(tmp_path):
    flickr30k(tmp_path / "a")
    (found,) = catalogue.read("flickr30k", tmp_path / "a", "val")
    assert texts(found) == {"caption": "Two men.", "image": "1000092795.jpg"} and len(found.truth["captions"]) == 2
    flickr30k_tokens(tmp_path / "b")
    one, two = catalogue.read("flickr30k", tmp_path / "b", "train")
    assert one.truth["captions"] == ["Two young guys .", "Two men # outside ."] and two.key == "10002456"
    with pytest.raises(UserError, match="without it there are no splits, and all is 'train', not 'val'"):
        list(catalogue.read("flickr30k", tmp_path / "b", "val"))


def test_image_paragraph(tmp_path):
    image_paragraph(tmp_path)
    (found,) = catalogue.read("image_paragraph", tmp_path, "val")
    assert texts(found) == {"caption": "A large building. It", "image": "2356347.jpg"} and found.task == "long_caption"


def test_a_picture_with_two_paragraphs_is_one_item_with_both(tmp_path):
    image_paragraph(tmp_path)
    rows = json.loads((tmp_path / "paragraphs_v1.json").read_text())
    write(tmp_path / "paragraphs_v1.json", [*rows, rows[0], rows[0] | {"paragraph": "A tower."}])
    write(tmp_path / "val_split.json", [2356347, 2356347])
    (found,) = catalogue.read("image_paragraph", tmp_path, "val")
    assert found.values["caption"] == "A large building. It"
    assert found.truth == {"captions": ["A large building. It", "A tower."]}


NARRATED = {  # as Google names them: set -> split -> (the set and split in the file's name, shards)
    "ade20k": {"train": ("ade20k_train", 0), "val": ("ade20k_validation", 0)},
    "coco": {"train": ("coco_train", 4), "val": ("coco_val", 0)},
    "flickr30k": {split: (f"flickr30k_{split}", 0) for split in ("train", "val", "test")},
    "open_images": {
        "train": ("open_images_train_v6", 10),
        "val": ("open_images_validation", 0),
        "test": ("open_images_test", 0),
    },
}


def narrated(root: pathlib.Path, kinds: tuple[str, ...]) -> None:
    """Write all of Google's files, a narration in each or in each shard; "asr" is what a machine understood."""
    for name, number in (found for splits in NARRATED.values() for found in splits.values()):
        rows = [{"dataset_id": name, "image_id": str(i), "caption": f"{name} {i}"} for i in range(number or 1)]
        if "captions" in kinds:
            write(root / f"{name}_captions.jsonl", rows)
        for i, row in enumerate(rows) if "full" in kinds else ():
            shard = f"-{i:05d}-of-{number:05d}" if number else ""
            write(root / f"{name}_localized_narratives{shard}.jsonl", [row | {"timed_caption": [], "traces": []}])
        write(root / f"{name}_asr.jsonl", [row | {"caption": "no"} for row in rows])


@pytest.mark.parametrize("kinds", [("captions",), ("full",), ("captions", "full")], ids="+".join)
@pytest.mark.parametrize("split", catalogue.SPLITS)
def test_all_narratives_in_a_folder_are_read_once(tmp_path, split, kinds):
    narrated(tmp_path, kinds)
    found = [item.truth["captions"][0] for item in catalogue.read("localized_narratives", tmp_path, split)]
    sets = [splits[split] for splits in NARRATED.values() if split in splits]
    assert found == [f"{name} {i}" for name, number in sets for i in range(number or 1)]


@pytest.mark.parametrize("name", sorted(NARRATED))
def test_one_set_of_narratives_is_enough(tmp_path, name):
    narrated(tmp_path, ("captions", "full"))
    for path in tmp_path.iterdir():
        if not path.name.startswith(name):
            path.unlink()
    assert catalogue.splits("localized_narratives", tmp_path) == tuple(NARRATED[name])


def test_a_narrative_is_told_of_its_own_sets_picture(tmp_path):
    """Flickr30k has a 36979.jpg, and COCO's picture 36979 is another."""
    where = {
        ("mscoco_val2017", "36979"): "val2017/000000036979.jpg",
        ("Flickr30k_val", "36979"): "flickr30k-images/36979.jpg",
        ("ADE20k_val", "ADE_val_00000001"): "ADEChallengeData2016/images/validation/ADE_val_00000001.jpg",
        ("open_images_val", "0001eeaf4aed83f9"): "validation/0001eeaf4aed83f9.jpg",
    }
    rows = [{"dataset_id": dataset, "image_id": key, "caption": "It is."} for dataset, key in where]
    write(tmp_path / "all_val_captions.jsonl", rows)
    for name in where.values():
        photo(tmp_path / name)
    for first, name in enumerate(where.values()):
        found = next(catalogue.read("localized_narratives", tmp_path, "val", first))
        assert found.values["image"] == tmp_path / name
        (tmp_path / name).unlink()
        found = next(catalogue.read("localized_narratives", tmp_path, "val", first))
        assert not found.values["image"].exists()
        photo(tmp_path / name)


def test_localized_narratives_of_two_people_are_one_group(tmp_path):
    localized_narratives(tmp_path)
    one, two = catalogue.read("localized_narratives", tmp_path, "val")
    assert (one.key, two.key) == ("mscoco_val2017/137576/93", "mscoco_val2017/137576/94") and one.group == two.group
    assert texts(one) == {"caption": "In this image there are cows.", "image": "000000137576.jpg"}


def test_vqa(tmp_path):
    vqa_v2(tmp_path)
    (found,) = catalogue.read("vqa_v2", tmp_path, "val")
    assert texts(found) == {
        "question": "Where is he looking?",
        "answer": "down",
        "image": "COCO_val2014_000000262148.jpg",
    }
    assert found.truth["answers"] == ["down"] * 6 + ["at table"] * 4 and found.truth["answer_type"] == "other"
    assert (found.key, found.group, found.license) == ("262148000", "262148", "CC BY 4.0")


@pytest.mark.parametrize("name", ["vqa_v2", "visdial"])
def test_a_pictures_number_may_be_written_as_text(tmp_path, name):
    MAKERS[name](tmp_path)
    (found,) = catalogue.read(name, tmp_path, "val")
    for path in tmp_path.glob("*.json"):
        path.write_text(re.sub(r'"image_id": (\d+)', r'"image_id": "\1"', path.read_text()))
    assert list(catalogue.read(name, tmp_path, "val")) == [found]


def test_ok_vqa_has_the_answer_of_most_people(tmp_path):
    ok_vqa(tmp_path)
    (found,) = catalogue.read("ok_vqa", tmp_path, "val")
    assert found.values["answer"] == "down" and len(found.truth["answers"]) == 10


def test_vizwiz(tmp_path):
    vizwiz(tmp_path)
    (found,) = catalogue.read("vizwiz", tmp_path, "val")
    assert texts(found) == {"question": "What is this?", "answer": "basil leaves", "image": "VizWiz_val_00000001.jpg"}
    assert found.truth["answerable"] == 1 and len(found.truth["answers"]) == 9


def test_science_qa_leaves_out_questions_without_picture(tmp_path):
    science_qa(tmp_path)
    one, two = catalogue.read("science_qa", tmp_path, "val")
    assert (one.key, one.task, two.key, two.task) == ("5", "reasoning", "7", "choice")
    assert list(one.values) == ["question", "context", "options", "explanation", "answer", "image"]
    assert one.values["options"] == "(A) West Virginia (B) Louisiana" and one.values["answer"] == "(A) West Virginia"
    assert (
        two.values["answer"] == "(B) Louisiana"
        and two.truth["answer"] == 1
        and two.truth["subject"] == "social science"
    )


def test_visdial(tmp_path):
    visdial(tmp_path)
    (found,) = catalogue.read("visdial", tmp_path, "val")
    assert (
        found.key == "185565/2" and found.values["question"] == "is it old" and found.values["answer"] == "i can't tell"
    )
    assert found.truth == {
        "candidates": ["maybe", "i can't tell", "no"],
        "answer": 1,
        "relevance": [0.0, 1.0, 0.4],
        "caption": "a dog on a lawn",
        "round": 2,
        "history": [["is it sunny", "yes"]],
    }


# --------------------------------------------------------------------------------------------------------- broken files


def change(name: str, edit):
    """Return a maker of a set with one JSON file changed by `edit(value)`."""

    def make(root: pathlib.Path, maker) -> None:
        maker(root)
        value = json.loads((root / name).read_text())
        edit(value)
        write(root / name, value)

    return make


def remove(name: str):
    def make(root: pathlib.Path, maker) -> None:
        maker(root)
        (root / name).unlink()

    return make


def text(name: str, data: bytes):
    def make(root: pathlib.Path, maker) -> None:
        maker(root)
        (root / name).write_bytes(data)

    return make


CAPTIONS, VQA, VQA_Q = (
    "annotations/captions_val2017.json",
    "v2_mscoco_val2014_annotations.json",
    "v2_OpenEnded_mscoco_val2014_questions.json",
)
DENSE, DIALOGS = "visdial_1.0_val_dense_annotations.json", "visdial_1.0_val.json"
BROKEN = [
    ("coco_captions", text(CAPTIONS, b"{"), f"{CAPTIONS}': not JSON: Expecting property name"),
    ("coco_captions", text(CAPTIONS, b"[]"), "a JSON list, expected a dict"),
    ("coco_captions", text(CAPTIONS, b"{}"), "no list of objects 'images' in it; is it the right file?"),
    ("coco_captions", change(CAPTIONS, lambda d: d["annotations"][0].update(image_id=9)), "id 9 is not in"),
    ("coco_captions", change(CAPTIONS, lambda d: d["annotations"].pop(1)), "id 7: a picture without caption; answers"),
    ("coco_captions", change(CAPTIONS, lambda d: d["images"].append(d["images"][0])), "id 42: twice in it"),
    ("coco_captions", change(CAPTIONS, lambda d: d["annotations"][0].pop("caption")), "id 42: no 'caption' in it"),
    (
        "coco_boxes",
        change(CAPTIONS, lambda d: d["images"].pop(1)),
        r"instances_val2017.json': id 7 is not in '.*captions_",
    ),
    ("coco_boxes", change("annotations/instances_val2017.json", lambda d: d["categories"].pop()), "id 18 is not in"),
    ("coco_panoptic", change("annotations/panoptic_val2017.json", lambda d: d["images"].pop(0)), "id 42 is not in"),
    (
        "objects365",
        change("zhiyuan_objv2_val.json", lambda d: d["images"][0].pop("width")),
        "id 420917: no 'width' in it",
    ),
    ("open_images", remove("class-descriptions-boxable.csv"), "holds no class-descriptions-boxable.csv"),
    (
        "open_images",
        text("class-descriptions-boxable.csv", b"/m/1,Cat\n"),
        "id /m/0cmf2 is not in '.*class-descriptions",
    ),
    (
        "open_images",
        text("validation-images-with-rotation.csv", b"ImageID,License\n1,x\n"),
        "bbox.csv': id 0001eeaf4aed83f9 is not in '.*validation-images-with-rotation.csv",
    ),
    ("open_images", text("validation-annotations-bbox.csv", b"ImageID,XMin\n"), "no column 'YMin' in it"),
    ("instruct_pix2pix", text("data/train-00000-of-00002-9e2c.parquet", b"no"), "9e2c.parquet': no parquet file"),
    (
        "flickr30k",
        change("dataset_flickr30k.json", lambda d: d["images"][0].update(sentences=[])),
        "no sentences; captions",
    ),
    (
        "image_paragraph",
        change("val_split.json", lambda d: d.append(5)),
        "val_split.json': id 5 is not in '.*paragraphs_v1",
    ),
    (
        "localized_narratives",
        text("coco_val_localized_narratives-00000-of-00002.jsonl", b"{\n"),
        "line 1: broken metadata",
    ),
    ("vqa_v2", remove(VQA), f"holds no {VQA}.*; answers missing: a split without them"),
    (
        "vqa_v2",
        change(VQA, lambda d: d["annotations"][0].update(question_id=5)),
        f"{VQA}': id 5 is not in '.*questions",
    ),
    ("vqa_v2", change(VQA, lambda d: d["annotations"].clear()), f"{VQA_Q}': id 262148000 is not in '.*annotations"),
    (
        "vqa_v2",
        change(VQA, lambda d: d["annotations"][0]["answers"].clear()),
        "id 262148000: no answers; answers missing",
    ),
    (
        "vqa_v2",
        change(VQA, lambda d: d["annotations"][0].update(image_id=1)),
        "id 262148000: image_id 1, in '.*' 262148",
    ),
    (
        "vizwiz",
        change("Annotations/val.json", lambda d: d[0].pop("answers")),
        "id VizWiz_val_00000001.jpg: no 'answers'",
    ),
    ("science_qa", change("problems.json", lambda d: d.pop("7")), "pid_splits.json': id 7 is not in '.*problems.json"),
    ("science_qa", change("problems.json", lambda d: d["5"].update(answer=2)), "id 5: answer 2: must be 0 to 1"),
    ("science_qa", change("pid_splits.json", lambda d: d.pop("val")), "no split 'val'; it has train, test"),
    ("visdial", remove(DENSE), "answers missing: without these NDCG is not defined"),
    ("visdial", change(DENSE, lambda d: d[0].update(image_id=1)), f"{DENSE}': id 1 is not in '.*{DIALOGS}"),
    ("visdial", change(DENSE, lambda d: d[0].update(round_id=3)), "id 185565: round 3; .* has 2 rounds of it"),
    ("visdial", change(DENSE, lambda d: d[0]["gt_relevance"].pop()), "2 figures for 3 candidates"),
    ("visdial", change(DIALOGS, lambda d: d["data"]["dialogs"][0]["dialog"][1].pop("gt_index")), "no 'gt_index' in it"),
    ("visdial", change(DIALOGS, lambda d: d["data"]["answers"].pop()), "id 185565: n 3: must be 0 to 2"),
]


@pytest.mark.parametrize(("name", "make", "message"), BROKEN, ids=[f"{n}: {m[:40]}" for n, _, m in BROKEN])
def test_a_broken_file_is_named_with_the_id(tmp_path, name, make, message):
    make(tmp_path, MAKERS[name])
    with pytest.raises(UserError, match=message) as caught:
        list(catalogue.read(name, tmp_path, SPLIT.get(name, "val")))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_rows_of_one_picture_must_stand_together(tmp_path):
    open_images(tmp_path, "b,xclick,/m/0cmf2,1,0,1,0,1,0,0,0,0,0", "0001eeaf4aed83f9,x,/m/0cmf2,1,0,1,0,1,0,0,0,0,0")
    photo(tmp_path / "validation/b.jpg")
    with pytest.raises(UserError, match="id 0001eeaf4aed83f9: its rows do not stand together"):
        list(catalogue.read("open_images", tmp_path, "val"))


def test_without_its_pictures_every_item_of_a_set_is_rejected_and_named(made):
    name, folder, split = made
    keys = [found.key for found in catalogue.read(name, folder, split)]
    pictures = [path for path in folder.rglob("*") if path.suffix in (".jpg", ".png")]
    for path in pictures:
        path.unlink()
    opened = sources.open(config.Prepare(source=f"set:{name}:{folder}:{split}"))
    found = [example for job in opened.jobs(1) for example in opened.read(job)]
    if name == "instruct_pix2pix":  # they lie in its parquet files
        assert not pictures and all(isinstance(example, Example) for example in found)
        return
    assert [(bad.reason, bad.where) for bad in found] == [("missing file", f"{name}/{split}:{key}") for key in keys]


def test_a_broken_picture_of_open_images_costs_its_item_only(tmp_path):
    open_images(tmp_path, "b,xclick,/m/0cmf2,1,0,1,0,1,0,0,0,0,0")
    (tmp_path / "validation/b.jpg").write_bytes(b"no picture")
    settings = config.Prepare(source=f"set:open_images:{tmp_path}", resolution=16, workers=1)
    prepare.prepare(settings, tmp_path / "out", progress=False)
    (bad,) = map(json.loads, (tmp_path / "out/rejects.jsonl").read_text().splitlines())
    assert bad["where"] == "open_images/val:b"


def test_a_missing_picture_costs_its_item_only(tmp_path):
    coco_captions(tmp_path)
    (tmp_path / "val2017/000000000007.jpg").unlink()
    opened = sources.open(config.Prepare(source=f"set:coco_captions:{tmp_path}"))
    good, bad = [found for job in opened.jobs(1) for found in opened.read(job)]
    assert good.key == "val/42" and isinstance(bad, Reject) and bad.reason == "missing file"
    assert bad.where == "coco_captions/val:7"


@pytest.mark.parametrize("absolute", [False, True])
def test_a_picture_outside_the_folder_is_never_opened(tmp_path, absolute):
    coco_captions(tmp_path / "coco")
    (tmp_path / "secret.png").write_bytes(broken.encoded())
    path = tmp_path / "coco" / CAPTIONS
    value = json.loads(path.read_text())
    value["images"][0]["file_name"] = str(tmp_path / "secret.png") if absolute else "../../secret.png"
    write(path, value)
    opened = sources.open(config.Prepare(source=f"set:coco_captions:{tmp_path / 'coco'}"))
    bad, good = [found for job in opened.jobs(1) for found in opened.read(job)]
    assert isinstance(bad, Reject) and bad.reason == "path leaves the folder" and isinstance(good, Example)


def test_a_prepared_record_is_a_document_of_its_task_with_its_answers_and_the_truth(tmp_path):
    science_qa(tmp_path / "set")
    settings = config.Prepare(source=f"set:science_qa:{tmp_path / 'set'}:val", resolution=16, workers=1)
    prepare.prepare(settings, tmp_path / "out", progress=False)
    path = shards.files(tmp_path / "out")["validation"][0]
    record = shards.decode(shards.open_file(str(path)).read([0])[0])
    assert record.key == "val/5" and record.fields["task"] == "reasoning" and record.fields["truth"]["answer"] == 0
    assert "Options: (A) West Virginia (B) Louisiana \n Answer: Let's think step-by-step: " in record.parts[0]
    assert record.parts[1].shape == (16, 16, 3) and [r.label for r in record.regions] == ["explanation", "answer"]


def test_an_item_without_an_answer_is_rejected_alone(tmp_path):
    coco_captions(tmp_path)
    path = tmp_path / CAPTIONS
    value = json.loads(path.read_text())
    for note in value["annotations"]:
        if note["image_id"] == value["images"][0]["id"]:
            note["caption"] = ""
    write(path, value)
    opened = sources.open(config.Prepare(source=f"set:coco_captions:{tmp_path}"))
    bad, good = [found for job in opened.jobs(1) for found in opened.read(job)]
    assert isinstance(bad, Reject) and bad.reason == "no answer" and isinstance(good, Example)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("set:coco", "must be set:NAME:FOLDER or set:NAME:FOLDER:SPLIT"),
        ("set:coco:/tmp", "set 'coco': no such set; sets: coco_captions, coco_boxes"),
        ("set:vqa_v2:/no/such", "set 'vqa_v2': '/no/such': no such folder; looked for v2_OpenEnded_mscoco_train2014"),
    ],
)
def test_a_source_that_is_no_set_says_so(source, message):
    with pytest.raises(UserError, match=re.escape(message)):
        sources.open(config.Prepare(source=source))


def test_count_takes_the_first_items(tmp_path):
    instruct_pix2pix(tmp_path)
    opened = sources.open(config.Prepare(source=f"set:instruct_pix2pix:{tmp_path}", count=7))
    jobs = opened.jobs(3)
    keys = [found.key for job in jobs for found in opened.read(job)]
    assert keys == [f"train/{i:07d}" for i in range(7)] and opened.total(jobs) == 7


def test_another_annotation_is_another_fingerprint(tmp_path):
    coco_captions(tmp_path)
    source = config.Prepare(source=f"set:coco_captions:{tmp_path}")
    before = sources.open(source).fingerprint()
    change(CAPTIONS, lambda d: d["annotations"][0].update(caption="A cat."))(tmp_path, lambda root: None)
    assert sources.open(source).fingerprint() != before
