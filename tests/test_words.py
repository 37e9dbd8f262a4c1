"""Scores of words from files of the published formats: the figures, their protocols, and what is refused."""

import itertools
import json
import math

import pytest

from cm3jax import cli
from cm3jax.evaluate import answers, captions, results, words
from cm3jax.types import UserError


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


COCO = {
    "images": [{"id": 42, "file_name": "42.jpg"}, {"id": 7, "file_name": "7.jpg"}, {"id": 9, "file_name": "9.jpg"}],
    "annotations": [
        {"image_id": key, "id": i, "caption": text}
        for i, (key, text) in enumerate(
            [(42, "A dog's bowl."), (7, "Two cats sleep."), (42, "The dog runs!"), (9, "A bird flies over the sea.")]
        )
    ],
}
SAID = [{"image_id": 7, "caption": "Two cats."}, {"image_id": 42, "caption": "a dog runs"}]
PEOPLE = {1: (["yes"] * 10, "yes/no"), 2: (["2"] * 2 + ["3"] * 8, "number"), 3: (["no"] * 10, "yes/no")}
VQA = {
    "annotations": [
        {"question_id": key, "image_id": 5, "answer_type": kind, "answers": [{"answer": text} for text in people]}
        for key, (people, kind) in PEOPLE.items()
    ]
}
ANSWERS = [{"question_id": 1, "answer": "yes"}, {"question_id": 2, "answer": "two"}, {"question_id": 3, "answer": "x"}]
VIZWIZ = [
    {"image": f"{i}.jpg", "question": "What?", "answer_type": "other", "answerable": i % 2,
     "answers": [{"answer": "soup"}] * (i + 1) + [{"answer": "can"}] * (9 - i)}
    for i in range(4)
]  # fmt: skip
PROBLEMS = {
    "3": {"answer": 0, "subject": "natural science", "grade": "grade2", "hint": "", "image": "image.png"},
    "5": {"answer": 1, "subject": "social science", "grade": "grade8", "hint": "Read.", "image": "image.png"},
    "6": {"answer": 2, "subject": "language science", "grade": "grade6", "hint": "", "image": None},
}
PROBLEMS = {key: row | {"split": "test"} for key, row in PROBLEMS.items()} | {"8": {"answer": 0, "split": "val"}}
DIALOGS = {
    "data": {
        "dialogs": [
            {"image_id": key, "dialog": [{"gt_index": at, "answer_options": [4, 5, 6]} for at in places]}
            for key, places in ((42, (2, 0)), (7, (1, 1)))
        ]
    }
}
DENSE = [{"image_id": 42, "round_id": 2, "gt_relevance": [1.0, 0.0, 0.5]}]
RANKS = [
    {"image_id": key, "round_id": i, "ranks": ranks}
    for (key, i), ranks in zip(
        itertools.product((42, 7), (1, 2)), ([1, 2, 3], [2, 1, 3], [3, 1, 2], [1, 2, 3]), strict=True
    )
]


def run(folder, kind, said, *truth, **more):
    """Return the result's metrics."""
    paths = [write(folder / f"truth{i}.json", one) for i, one in enumerate(truth)]
    out = folder / "r.json"
    found = words.score(kind, write(folder / "said.json", said), paths, out, say=lambda line: None, **more)
    assert json.loads(out.read_text()) == found
    return found["metrics"]


def values(metrics):
    return {name: figure["value"] for name, figure in metrics.items()}


def test_captions_are_scored_in_coco_s_format(tmp_path):
    found = run(tmp_path, "captions", SAID, COCO, part=True)
    wrote = {7: ["Two cats sleep."], 42: ["A dog's bowl.", "The dog runs!"]}
    assert values(found) == captions.evaluate(wrote, {7: "Two cats.", 42: "a dog runs"})
    protocol = found["CIDEr"]["protocol"]
    assert protocol["samples"] == 2 and protocol["reference"]["count"] == 2 and "PTB" in protocol["tokens"]
    assert set(protocol["code"]) == {"cm3jax", "modules"}


def test_answers_are_scored_in_vqa_s_format_by_kind(tmp_path):
    found = run(tmp_path, "vqa", ANSWERS, VQA)
    assert values(found) == pytest.approx({"accuracy": 1.6 / 3, "accuracy/yes/no": 0.5, "accuracy/number": 0.6})
    assert [figure["protocol"]["samples"] for figure in found.values()] == [3, 2, 1]


def test_vizwiz_has_answers_and_confidences(tmp_path):
    """The first and the third cannot be answered; doubts of 0.5, 0.1, 0.3, 0.9 have them at places 2 and 3."""
    told = [{"image": f"{i}.jpg", "answer": "soup"} for i in range(4)]
    people = [["soup"] * (i + 1) + ["can"] * (9 - i) for i in range(4)]
    found = values(run(tmp_path, "vizwiz", told, VIZWIZ))
    assert (
        found["accuracy"] == found["accuracy/other"] == sum(answers.vizwiz_accuracy("soup", one) for one in people) / 4
    )
    assert "VizWiz" in run(tmp_path, "vizwiz", told, VIZWIZ)["accuracy"]["protocol"]["tokens"]
    two = [{"image": "a.jpg", "answers": [{"answer": "two"}] * 10, "answer_type": "number", "answerable": 1}]
    assert values(run(tmp_path, "vizwiz", [{"image": "a.jpg", "answer": "two"}], two))["accuracy"] == 0
    sure = [{"image": f"{i}.jpg", "answerable": x} for i, x in enumerate([0.5, 0.9, 0.7, 0.1])]
    found = values(run(tmp_path, "vizwiz", sure, VIZWIZ))
    assert found == pytest.approx({"unanswerable AP": (1 / 2 + 2 / 3) / 2, "unanswerable F1": 0})


def test_choices_are_scored_in_the_columns_of_the_published_tables(tmp_path):
    said = {"results": {"3": 0, "5": 0, "6": -1}, "outputs": {}}
    found = run(tmp_path, "science-qa", said, PROBLEMS)
    right = {"NAT": 1, "SOC": 0, "LAN": 0, "IMG": 0.5, "TXT": 0, "NO": 0, "G1-6": 0.5, "G7-12": 0}
    wanted = {"accuracy": 1 / 3} | {f"accuracy/{name}": value for name, value in right.items()}
    assert values(found) == pytest.approx(wanted)
    with pytest.raises(UserError, match=r"id '3' is not in .* \(3 of 3 ids are not\)"):
        run(tmp_path, "science-qa", said, PROBLEMS, split="val")
    with pytest.raises(UserError, match="no problem of split 'dev'; set --split"):
        run(tmp_path, "science-qa", said, PROBLEMS, split="dev")


@pytest.mark.parametrize("order", [1, -1])
def test_ranks_are_scored_against_dialogs_and_dense_annotations(tmp_path, order):
    """Places of what was said: 3, 2, 1, 2. Of the round that people saw, the first place has no gain, the second 1."""
    found = run(tmp_path, "visdial", RANKS, *[DIALOGS, DENSE][::order])
    ndcg = (1 / math.log2(3)) / (1 + 0.5 / math.log2(3))
    wanted = {"MRR": (1 / 3 + 1 / 2 + 1 + 1 / 2) / 4, "R@1": 0.25, "R@5": 1, "R@10": 1, "mean rank": 2, "NDCG": ndcg}
    assert values(found) == pytest.approx(wanted)
    assert found["MRR"]["protocol"]["samples"] == 4 and found["NDCG"]["protocol"]["samples"] == 1


def test_judged_rounds_that_know_the_dialog_s_answer_have_its_places_too(tmp_path):
    """As suites write them; with the dialogs beside, those decide."""
    known = [DENSE[0] | {"gt_index": 0}]
    found = run(tmp_path, "visdial", RANKS, known)
    sparse = {"MRR": 1 / 2, "R@1": 0, "R@5": 1, "R@10": 1, "mean rank": 2}
    assert {name: x for name, x in values(found).items() if name != "NDCG"} == sparse
    assert found["MRR"]["protocol"]["tokens"] == "ranks, judged rounds only"
    assert found["NDCG"]["protocol"] == run(tmp_path, "visdial", RANKS, DENSE)["NDCG"]["protocol"]
    both = run(tmp_path, "visdial", RANKS, DIALOGS, known)
    assert both["MRR"]["protocol"]["samples"] == 4 and both["NDCG"] == found["NDCG"]


def test_the_protocol_knows_the_truth_and_not_what_was_said_or_its_order(tmp_path):
    first = run(tmp_path, "vqa", ANSWERS, VQA)["accuracy"]
    other = run(tmp_path, "vqa", [*ANSWERS[:2], {"question_id": 3, "answer": "no"}], VQA)["accuracy"]
    turned = run(tmp_path, "vqa", ANSWERS[::-1], {"annotations": VQA["annotations"][::-1]})["accuracy"]
    assert first == turned and first["protocol"] == other["protocol"] and first["data"] != other["data"]
    part = run(tmp_path, "vqa", ANSWERS[:2], VQA, part=True)["accuracy"]
    name, whole, fewer = results.differing([first["protocol"], part["protocol"]])[0]
    assert (name, whole, fewer) == ("samples", 3, 2)
    same = run(tmp_path, "vqa", ANSWERS[1:], VQA, part=True)["accuracy"]
    assert [row[0] for row in results.differing([part["protocol"], same["protocol"]])] == ["reference.data"]


@pytest.mark.parametrize(
    ("kind", "said", "truth", "message"),
    [
        ("captions", SAID, COCO, r"said.json': nothing for id 9 of .*truth0.json' \(1 of 3 ids are missing\); --part"),
        ("captions", [{"image_id": "7", "caption": "a"}], COCO, r"id '7' is not in .* \(1 of 1 ids are not\)"),
        ("captions", [], COCO, "said.json': holds nothing for the ids of .*truth0.json'; nothing can be scored"),
        ("captions", [*SAID, SAID[0]], COCO, "id 7: twice in it"),
        ("captions", [{"image_id": 7, "caption": " "}], COCO, r"id 7: caption ' ' is empty or no text \(1 of 1\)"),
        ("captions", [{"image_id": 7, "caption": 3}], COCO, "id 7: caption 3 is empty or no text"),
        ("captions", [{"image_id": [7], "caption": "a"}], COCO, r"id \[7\]: must be a number or a text"),
        ("captions", [{"caption": "a"}], COCO, "no 'image_id' in it"),
        ("captions", {"results": SAID}, COCO, "a JSON dict, expected a list"),
        ("captions", SAID, VQA, "no list of objects 'images' in it; is it the right file"),
        ("captions", "{", COCO, "not JSON"),
        ("vqa", ANSWERS, {"questions": []}, "no list of objects 'annotations' in it"),
        ("vqa", ANSWERS[:1], {"annotations": [{"question_id": 1}]}, "id 1: no 'answers' in it; answers missing"),
        ("vqa", ANSWERS[:1], {"annotations": [{"question_id": 1, "answers": []}]}, "id 1: no answers; answers missing"),
        ("vizwiz", [{"image": "0.jpg", "answerable": "x"}], VIZWIZ[:1], "answerable 'x': must be a number"),
        ("science-qa", {"3": 0}, PROBLEMS, "no object 'results' in it"),
        ("science-qa", {"results": {"3": "A"}}, PROBLEMS, "id '3': choice 'A': must be a whole number"),
        ("visdial", RANKS[1:], DIALOGS, r"nothing for id \(42, 1\)"),
        (
            "visdial",
            [RANKS[0] | {"ranks": [0, 1, 2]}],
            DIALOGS,
            r"id \(42, 1\): ranks must be a list of 1, 2, ..., in any order",
        ),
        ("visdial", [RANKS[0], RANKS[1] | {"ranks": [1, 2]}], DIALOGS, r"id \(42, 2\): ranks must be a list of"),
        ("visdial", [RANKS[0] | {"ranks": 3}], DIALOGS, r"id \(42, 1\): ranks must be a list of"),
        ("visdial", [RANKS[1] | {"ranks": [2, 1]}], DENSE, "2 ranks, .* has 3 candidates"),
        ("visdial", [RANKS[1]], [{"image_id": 42, "round_id": 2}], "no 'gt_relevance' in it; answers missing"),
        ("visdial", RANKS, {"data": {"dialogs": [{"image_id": 42, "dialog": [{}]}]}}, "no 'gt_index' in round 1"),
        ("visdial", RANKS[:1], DENSE, "holds nothing for the ids of"),
    ],
)
def test_files_that_do_not_belong_together_are_one_clear_line(tmp_path, kind, said, truth, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path, kind, said, truth)
    assert not (tmp_path / "r.json").exists()


def test_the_verb_scores_and_tabulate_refuses_other_protocols(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, value in (("a", ANSWERS), ("b", ANSWERS[:2]), ("t", VQA), ("r", RANKS), ("d", DENSE)):
        write(tmp_path / f"{name}.json", value)
    assert cli.main(["score-text", "vqa", "a.json", "t.json", "--out", "x.json"]) == 0
    assert "accuracy/yes/no: 0.5" in capsys.readouterr().out
    assert cli.main(["score-text", "vqa", "b.json", "t.json", "--part"]) == 0
    other = capsys.readouterr().out.split("result: ")[1].strip()
    assert other.startswith("runs/scores/b-vqa-")
    assert cli.main(["tabulate", "x.json"]) == 0
    assert capsys.readouterr().out.startswith("| result | accuracy | accuracy/yes/no | accuracy/number |")
    assert cli.main(["tabulate", "x.json", other]) == 2
    assert (
        "accuracy: x.json and runs/scores/b-vqa-" in (told := capsys.readouterr().err) and "samples = 3 and 2" in told
    )
    assert cli.main(["score-text", "vqa", "nothing.json", "t.json"]) == 2
    assert "nothing.json': No such file" in capsys.readouterr().err
    assert cli.main(["score-text", "vqa", "a.json", "t.json", "d.json"]) == 2
    assert "vqa: 2 files of the truth; needs one, of annotations" in capsys.readouterr().err


def test_kinds_of_the_command_line_are_those_that_are_scored():
    assert set(cli.TextKind.__args__) == set(words.KINDS) == set(words.FILES)
