"""VisDial 1.0 (visualdialog.org/data), for evaluation.

visdial_1.0_val.json                    data {questions [text], answers [text], dialogs [{image_id, caption,
                                        dialog [{question, answer, answer_options [100], gt_index}]}]}
visdial_1.0_val_dense_annotations.json  [{image_id, round_id (from 1), gt_relevance [100]}]
VisualDialog_val2018/VisualDialog_val2018_000000000042.jpg
"""

import pathlib
from collections.abc import Iterator

from cm3jax.data.sets import item
from cm3jax.data.sets.item import Item
from cm3jax.types import UserError

DENSE = ("visdial_1.0_{}_dense_annotations.json", "visdial_1.0_{}_dense_sample.json")


def names(split: str) -> tuple[str, ...]:
    return (f"visdial_1.0_{split}.json",)


def rounds(folder: pathlib.Path, split: str) -> Iterator[Item]:
    """Yield one item a round whose candidates people judged; what was said before is in truth["history"]."""
    path = item.find(folder, *names(split))
    try:
        dense = item.find(folder, *(name.format(split) for name in DENSE))
    except UserError as e:
        raise UserError(f"{e}; answers missing: without these NDCG is not defined") from None
    data = item.field(item.load(path), "data", path, "-")
    questions, answers = item.field(data, "questions", path, "-"), item.field(data, "answers", path, "-")
    dialogs = item.index(item.rows(data, "dialogs", path), "image_id", path)
    for row in item.rows({"all": item.load(dense, list)}, "all", dense):
        key, number = item.field(row, "image_id", dense, "?"), item.field(row, "round_id", dense, "?")
        item.match(key, dialogs, dense, path)
        said = item.rows(dialogs[key], "dialog", path)
        if not 1 <= number <= len(said):
            raise UserError(f"{str(dense)!r}: id {key}: round {number}; {str(path)!r} has {len(said)} rounds of it")
        truth = _round(said[number - 1], answers, row, path, dense, key)
        truth |= {"caption": str(dialogs[key].get("caption", "")), "round": number}
        truth["history"] = [
            [_text(questions, turn, "question", path, key), _text(answers, turn, "answer", path, key)]
            for turn in said[: number - 1]
        ]
        question = _text(questions, said[number - 1], "question", path, key)
        values = {
            "question": question,
            "answer": truth["candidates"][truth["answer"]],
            "image": _picture(folder, split, key),
        }
        yield Item(f"{key}/{number}", "question", values, truth, str(key))


def _round(turn: dict, answers: list, row: dict, path: pathlib.Path, dense: pathlib.Path, key) -> dict:
    """Return the candidates of a round, which one was said, and how fitting each is."""
    options = item.field(turn, "answer_options", path, key)
    if "gt_index" not in turn:
        raise UserError(f"{str(path)!r}: id {key}: no 'gt_index' in it; answers missing")
    relevance = row.get("gt_relevance", row.get("relevance"))
    if relevance is None:
        raise UserError(f"{str(dense)!r}: id {key}: no 'gt_relevance' in it")
    if len(relevance) != len(options):
        raise UserError(
            f"{str(dense)!r}: id {key}: {len(relevance)} figures for {len(options)} candidates of {str(path)!r}"
        )
    candidates = [_text(answers, {"n": option}, "n", path, key) for option in options]
    return {"candidates": candidates, "answer": turn["gt_index"], "relevance": list(relevance)}


def _text(table: list, row: dict, name: str, path: pathlib.Path, key) -> str:
    """Return the text that a number stands for."""
    number = item.field(row, name, path, key)
    if not isinstance(number, int) or not 0 <= number < len(table):
        raise UserError(f"{str(path)!r}: id {key}: {name} {number!r}: must be 0 to {len(table) - 1}")
    return str(table[number])


def _picture(folder: pathlib.Path, split: str, key: int | str) -> pathlib.Path:
    """Return the picture; those of the training split are COCO's."""
    year = f"VisualDialog_{split}2018"
    places = [folder / year, folder / "images", folder / "train2014", folder / "val2014", folder]
    number = str(key).zfill(12)
    coco = (f"COCO_{part}2014_{number}.jpg" for part in ("train", "val"))
    return item.picture_in(places, f"{year}_{number}.jpg", *(coco if split == "train" else ()))
