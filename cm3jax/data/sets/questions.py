"""VQA v2, OK-VQA, VizWiz, ScienceQA.

v2_OpenEnded_mscoco_val2014_questions.json   questions [{question_id, image_id, question}]
v2_mscoco_val2014_annotations.json           annotations [{question_id, image_id, question_type, answer_type,
                                             multiple_choice_answer, answers [{answer, ...}]}]
OpenEnded_mscoco_val2014_questions.json, mscoco_val2014_annotations.json            (OK-VQA; the same format)
val2014/COCO_val2014_000000000042.jpg        the pictures of both
Annotations/val.json                         [{image, question, answers [{answer, ...}], answer_type, answerable}]
problems.json                                {id: {question, choices, answer, hint, image, solution, split, ...}}
pid_splits.json                              {split: [id, ...]}
val/42/image.png                             ScienceQA's pictures; also images/val/42/image.png
"""

import collections
import pathlib
from collections.abc import Iterator

from cm3jax.data.sets import item
from cm3jax.data.sets.item import Item
from cm3jax.types import UserError

VIZWIZ = ("Annotations/{}.json", "annotations/{}.json", "{}.json")


def vqa_names(split: str) -> tuple[str, ...]:
    return _everywhere(f"v2_OpenEnded_mscoco_{split}2014_questions.json")


def ok_vqa_names(split: str) -> tuple[str, ...]:
    return _everywhere(f"OpenEnded_mscoco_{split}2014_questions.json")


def _everywhere(name: str) -> tuple[str, ...]:
    return name, f"annotations/{name}", f"questions/{name}"


def vqa(folder: pathlib.Path, split: str) -> Iterator[Item]:
    """Yield one item a question, with the answer that most people gave; all ten in truth["answers"]."""
    annotations = _everywhere(f"v2_mscoco_{split}2014_annotations.json")
    return _asked(folder, split, item.find(folder, *vqa_names(split)), annotations)


def ok_vqa(folder: pathlib.Path, split: str) -> Iterator[Item]:
    """Yield one item a question whose answer takes knowledge, as `vqa`."""
    annotations = _everywhere(f"mscoco_{split}2014_annotations.json")
    return _asked(folder, split, item.find(folder, *ok_vqa_names(split)), annotations)


def _asked(folder: pathlib.Path, split: str, path: pathlib.Path, annotations: tuple[str, ...]) -> Iterator[Item]:
    try:
        other = item.find(folder, *annotations)
    except UserError as e:
        raise UserError(f"{e}; answers missing: a split without them can neither be trained on nor scored") from None
    questions = item.index(item.rows(item.load(path), "questions", path), "question_id", path)
    data = item.load(other)
    rows = item.index(item.rows(data, "annotations", other), "question_id", other)
    license = str((data.get("license") or {}).get("name", ""))
    for key in rows:
        item.match(key, questions, other, path)
    places = [folder / f"{split}2014", folder / "images" / f"{split}2014", folder / "images", folder]
    for key, question in questions.items():
        item.match(key, rows, path, other)
        image = item.field(question, "image_id", path, key)
        if rows[key].get("image_id", image) != image:
            raise UserError(f"{str(other)!r}: id {key}: image_id {rows[key]['image_id']}, in {str(path)!r} {image}")
        answers = people(rows[key], other, key)
        best = str(rows[key].get("multiple_choice_answer") or _most(answers))
        number = str(image).zfill(12)
        where = item.picture_in(places, f"COCO_{split}2014_{number}.jpg", f"{number}.jpg")
        values = {"question": str(item.field(question, "question", path, key)), "answer": best, "image": where}
        truth = {"answers": answers, **{n: rows[key][n] for n in ("answer_type", "question_type") if n in rows[key]}}
        yield Item(str(key), "question", values, truth, str(image), license)


def people(row: dict, path: pathlib.Path, key) -> list[str]:
    """Return the answers that people gave to a question.

    Raises:
      UserError: if there are none.
    """
    if "answers" not in row:
        raise UserError(f"{str(path)!r}: id {key}: no 'answers' in it; answers missing")
    found = [str(item.field(answer, "answer", path, key)) for answer in item.rows(row, "answers", path)]
    if not found:
        raise UserError(f"{str(path)!r}: id {key}: no answers; answers missing")
    return found


def _most(answers: list[str]) -> str:
    """Return the answer that most people gave, of several the first."""
    return collections.Counter(answers).most_common(1)[0][0]


def vizwiz_names(split: str) -> tuple[str, ...]:
    return tuple(name.format(split) for name in VIZWIZ)


def vizwiz(folder: pathlib.Path, split: str) -> Iterator[Item]:
    """Yield one item a question of a blind person, with the answer that most people gave; "unanswerable" is one."""
    path = item.find(folder, *vizwiz_names(split))
    rows = item.index(item.rows({"all": item.load(path, list)}, "all", path), "image", path)
    for key, row in rows.items():
        answers = people(row, path, key)
        where = item.picture_in([folder / split, folder / "Images" / split, folder / "images", folder], key)
        question = str(item.field(row, "question", path, key)).strip()
        values = {"question": question, "answer": _most(answers), "image": where}
        truth = {"answers": answers, **{n: row[n] for n in ("answer_type", "answerable") if n in row}}
        yield Item(key.rpartition(".")[0] or key, "question", values, truth, key)


def science_qa_names(split: str) -> tuple[str, ...]:
    return "pid_splits.json", "*/pid_splits.json"


def science_qa(folder: pathlib.Path, split: str) -> Iterator[Item]:
    """Yield one item a question that has a picture: "reasoning" with its solution, "choice" where there is none."""
    chosen = item.find(folder, *science_qa_names(split))
    path = item.find(chosen.parent, "problems.json")
    problems, splits = item.load(path), item.load(chosen)
    if split not in splits:
        raise UserError(f"{str(chosen)!r}: no split {split!r}; it has {', '.join(splits)}")
    for key in map(str, splits[split]):
        item.match(key, problems, chosen, path)
        if problems[key].get("image"):
            yield _problem(folder, path, key, problems[key], split)


def _problem(folder: pathlib.Path, path: pathlib.Path, key: str, row: dict, split: str) -> Item:
    choices, answer = item.field(row, "choices", path, key), item.field(row, "answer", path, key)
    if not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise UserError(f"{str(path)!r}: id {key}: answer {answer!r}: must be 0 to {len(choices) - 1}")
    options = [f"({chr(ord('A') + i)}) {choice}" for i, choice in enumerate(choices)]
    home = row.get("split", split)
    places = [folder / home / key, folder / "images" / home / key, folder / "images" / key]
    values = {
        "question": str(item.field(row, "question", path, key)),
        "context": str(row.get("hint") or ""),
        "options": " ".join(options),
    }
    solution = str(row.get("solution") or "").strip()
    values |= {"explanation": solution} if solution else {}
    values |= {"answer": options[answer], "image": item.picture_in(places, row["image"])}
    truth = {"choices": choices, "answer": answer, **{n: row[n] for n in ("subject", "grade", "topic") if n in row}}
    return Item(key, "reasoning" if solution else "choice", values, truth, key)
