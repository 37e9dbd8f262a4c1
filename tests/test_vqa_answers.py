"""VQA's normalisation and its rule of ten people, VizWiz's, ScienceQA's choices, answerability.

The official repository (GT-Vision-Lab/VQA) has an example of answers but neither the annotations that they belong to
nor a figure for them, and its program is on no registry. What OpenFlamingo's package carries is a copy of it, one file
that needs nothing else (references.txt): its tables and its two functions that make answers alike are the official
ones, and its `evaluate` is that of the official a013f00 (2021) but that it makes alike also where all ten people say
the same, which is tested by hand, and that a question may lack its kind.
"""

import importlib.util
import pathlib
import sys
import types

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score

import cm3jax.evaluate.answers as answers
from cm3jax.types import UserError

NORMAL = {
    "A dog.": "dog",
    "The two dogs": "2 dogs",
    "None": "0",
    "ten": "10",
    "dont": "don't",
    "Couldnt've": "couldn't've",
    "it's o'clock": "it's o'clock",
    "oclock": "o'clock",
    "somebody'd": "somebodyd",
    "black-and-white": "black and white",
    "black - white": "black white",
    "yes, no": "yes no",
    "yes,no": "yes no",
    "1,000": "1000",
    "1,000-foot": "1000foot",
    "3.5": "3.5",
    "3. 5": "3 5",
    "U.S.": "us",
    "5 p.m.": "5 pm",
    "what?!": "what",
    "(left)": "left",
    "a/b": "b",
    "red/white": "red white",
    "red\nor\tblue ": "red or blue",
    "It's 10:30": "it's 10:30",
    "": "",
    "the": "",
}
"""By the published rules, each worked out by hand."""
OFFICIAL = {"dont": "don't", "100,978": "100978", "2:50 pm": "2:50 pm", "girl's": "girl's"}
"""The examples of the evaluation page of visualqa.org."""


@pytest.mark.parametrize("answer", OFFICIAL)
def test_the_examples_of_the_official_page(answer):
    assert answers.normal(answer) == OFFICIAL[answer]


@pytest.fixture(scope="module")
def published():
    """What evaluates in OpenFlamingo's copy of the official program; its package imports models, this file nothing."""
    sys.path.append(str(pathlib.Path(sys.prefix) / "references"))
    found = importlib.util.find_spec("open_flamingo")
    sys.path.pop()
    assert found, "open_flamingo is not there; launch/setup.sh installs tests/references.txt"
    (folder,) = found.submodule_search_locations
    spec = importlib.util.spec_from_file_location("vqa_metric", pathlib.Path(folder) / "eval" / "vqa_metric.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.VQAEval


def asked(rows):
    """Return questions and answers as the program's own readers give them."""
    return types.SimpleNamespace(qa=rows, getQuesIds=lambda: list(rows))


def test_the_tables_are_the_official_ones(published):
    """Words with a capital are never found there, as all is made small before; two others are their own entry."""
    found, act = published(asked({}), asked({})), lambda word, to: word == word.lower() and word != to
    assert {word: to for word, to in found.contractions.items() if act(word, to)} == answers.CONTRACTIONS
    assert len(found.contractions) == 120 == len(answers.CONTRACTIONS) + 4 + 2
    assert found.manualMap == answers.NUMBERS and set(found.articles) == answers.ARTICLES
    assert list(answers.MARKS) == found.punct and len(found.punct) == 21


def written(draw, official):
    """Return an answer of words that the rules know and others, with marks at all their places."""
    words = [*official.contractions, *official.contractions.values(), *answers.NUMBERS, "a", "An", "the", "Dog", "red"]
    words += ["1,000", "3.5", "10:30", "5", "p.m.", "U.S", "it's", "...", "", "\t", "\n", "café"]
    glue = [" "] * 9 + ["", ".", ". ", ", ", ","] + [mark + end for mark in official.punct for end in ("", " ")]
    return "".join(str(draw.choice(words)) + str(draw.choice(glue)) for _ in range(draw.integers(1, 5)))


def test_answers_are_made_alike_as_the_official_program_does(published):
    official, draw = published(asked({}), asked({})), np.random.default_rng(0)
    texts = [*NORMAL, *OFFICIAL, *official.contractions, "." * 40, *(written(draw, official) for _ in range(5000))]
    for text in texts:
        line = text.replace("\n", " ").replace("\t", " ").strip()
        assert answers.normal(text) == official.processDigitArticle(official.processPunctuation(line)), text
    assert len({answers.normal(text) for text in texts}) > 3000


def test_accuracies_are_those_of_the_official_program(published):
    """Overall, by kind, and of each question, where not all ten people wrote the same letters."""
    draw, said, truths = np.random.default_rng(1), {}, {}
    words = ["two", "2", "the 2", "dont", "don't", "Don't.", "black-and-white", "black and white", "1,000", "1000"]
    for i in range(400):
        few = draw.choice(words, int(draw.integers(2, 5)), replace=False)
        truths[i] = [*map(str, few[:2]), *map(str, draw.choice(few, 8))]
        said[i] = str(draw.choice([*few, "else"]))
    kinds = {i: [("yes/no", "number", "other")[i % 3]] for i in said}
    people = {
        i: {"question_type": "what", "answer_type": kinds[i][0], "answers": [
            {"answer": text, "answer_confidence": "yes", "answer_id": k} for k, text in enumerate(truths[i], 1)
        ]}
        for i in said
    }  # fmt: skip
    official = published(asked(people), asked({i: {"answer": text} for i, text in said.items()}), n=9)
    official.evaluate()
    found = answers.vqa(said, truths, kinds)
    wanted = {"accuracy": official.accuracy["overall"]}
    wanted |= {f"accuracy/{kind}": value for kind, value in official.accuracy["perAnswerType"].items()}
    assert {name: 100 * value for name, value in found.items()} == pytest.approx(wanted, abs=1e-8)
    each = {i: 100 * answers.accuracy(said[i], truths[i]) for i in said}
    assert each == pytest.approx(official.evalQA, abs=1e-8) and {0, 100} < {*map(round, each.values())}


@pytest.mark.parametrize("answer", NORMAL)
def test_an_answer_is_made_alike(answer):
    assert answers.normal(answer) == NORMAL[answer]


def test_a_normal_answer_stays_as_it_is():
    for text in NORMAL.values():
        if text not in ("somebodyd", "a b"):
            assert answers.normal(text) == text


def test_at_most_32_full_stops_vanish():
    assert answers.normal("." * 40) == "." * 8


@pytest.mark.parametrize(("agree", "figure"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_the_rule_of_ten_people(agree, figure):
    """Of 3 who agree, leaving one of them out leaves 2: (3 * 2/3 + 7 * 1) / 10 = 0.9."""
    people = ["dog"] * agree + [f"cat {i}" for i in range(10 - agree)]
    assert answers.accuracy("dog", people) == pytest.approx(figure)


def test_answers_are_made_alike_only_where_people_differ():
    assert answers.accuracy("A dog.", ["dog"] * 10) == 0
    assert answers.accuracy("A dog.", ["dog"] * 9 + ["the dog"]) == 1
    assert answers.accuracy(" dog\n", ["dog"] * 10) == 1


def test_the_figures_of_a_set_are_means_over_questions_and_over_kinds():
    truths = {1: ["yes"] * 10, 2: ["2"] * 2 + ["3"] * 8, 3: ["no"] * 10}
    found = answers.vqa({1: "yes", 2: "two", 3: "yes"}, truths, {1: ["yes/no"], 2: ["number"], 3: ["yes/no"]})
    assert found == pytest.approx({"accuracy": 1.6 / 3, "accuracy/yes/no": 0.5, "accuracy/number": 0.6})


def test_vizwiz_makes_the_answer_alike_and_leaves_people_s_as_they_are():
    """Each by hand; "two" becomes "2", which nobody wrote, and "2" is what "two" is compared as."""
    assert answers.vizwiz_accuracy("two", ["two"] * 10) == 0
    assert answers.vizwiz_accuracy("two", ["2"] * 10) == answers.vizwiz_accuracy("A can.\n", ["can"] * 10) == 1
    assert answers.vizwiz_accuracy("can", ["Can", "a can", "can."] + ["can"] * 2 + ["tin"] * 5) == pytest.approx(0.6)
    assert answers.vizwiz_accuracy("Soup", ["soup"] * 3 + ["can"] * 7) == pytest.approx(0.9)
    assert answers.vizwiz_accuracy("none", ["none"] * 9 + ["0"]) == pytest.approx(0.3)
    assert answers.accuracy("two", ["two"] * 10) == answers.accuracy("none", ["none"] * 9 + ["0"]) == 1  # VQA's


def test_vizwiz_puts_typographic_apostrophes_into_most_contractions():
    """The published table, but for its words with capitals, which are looked up after they are made small."""
    found = answers.VIZWIZ_CONTRACTIONS
    assert len(found) == len(answers.CONTRACTIONS) == 114
    assert found["dont"] == "don’t" and found["weve"] == "we've" and found["couldn'tve"] == "couldn’t’ve"
    assert found["couldnt’ve"] == "couldn’t’ve" and found["somebody’d"] == "somebodyd" and found["twas"] == "’twas"
    assert sum("'" in to for to in found.values()) == 8 and sum("'" in word for word in found) == 2
    assert answers.vizwiz_accuracy("dont", ["don't"] * 10) == 0 and answers.vizwiz_accuracy("cant", ["can't"] * 10) == 1


def test_what_cannot_be_answered_is_told_by_sklearn_s_average_precision_and_f1():
    rng = np.random.default_rng(0)
    truths = {i: bool(rng.integers(2)) for i in range(41)}
    sure = {i: float(rng.integers(7)) / 6 for i in range(41)}  # with ties, and some at one half
    labels, doubts = [1 - truths[i] for i in range(41)], np.array([1 - sure[i] for i in range(41)])
    wanted = {"unanswerable AP": average_precision_score(labels, doubts)}
    wanted["unanswerable F1"] = f1_score(labels, doubts > 0.5)
    assert answers.unanswerability(sure, truths) == pytest.approx(wanted)


def test_what_cannot_be_answered_is_told_by_hand():
    """In order of doubt: 2 no, 0 yes, 3 no, 1 yes. At one half 2 and 0 are told, and 1 of the 2 rightly."""
    found = answers.unanswerability({0: 0.3, 1: 0.9, 2: 0.1, 3: 0.5}, {0: True, 1: True, 2: False, 3: False})
    assert found == pytest.approx({"unanswerable AP": (1 + 2 / 3) / 2, "unanswerable F1": 0.5})
    assert answers.unanswerability({0: 1.0}, {0: False}) == {"unanswerable AP": 1, "unanswerable F1": 0}


def test_choices_are_right_or_wrong():
    found = answers.choices(
        {"1": 0, "2": 2, "3": -1}, {"1": 0, "2": 1, "3": 0}, {"1": ["NAT", "IMG"], "2": ["NAT"], "3": ["SOC"]}
    )
    assert found == pytest.approx({"accuracy": 1 / 3, "accuracy/NAT": 0.5, "accuracy/IMG": 1, "accuracy/SOC": 0})


@pytest.mark.parametrize(
    ("answer", "option"),
    [("(B) a cat", 1), ("B", 1), ("b.", 1), ("A cat.", 1), ("the dog", 0), ("cat and dog", -1), ("(Z)", -1), ("", -1)],
)  # fmt: skip
def test_which_option_an_answer_names(answer, option):
    assert answers.chosen(answer, ["dog", "cat", "bird"]) == option


def test_a_text_of_two_options_names_none():
    assert answers.chosen("dog", ["dog", "a dog"]) == -1


@pytest.mark.parametrize(
    ("given", "truths", "message"),
    [
        ({}, {}, "answers: no questions; nothing can be scored"),
        ({1: "a"}, {1: ["a"], 2: ["b"]}, r"question 2: no answer \(1 of 2 ids\); score the same questions"),
        ({1: "a", 5: "b"}, {1: ["a"]}, r"question 5: no question \(1 of 2 ids\)"),
        ({1: "a"}, {1: []}, "question 1: no people's answers; a test split without them cannot be scored here"),
    ],
)
def test_questions_that_do_not_match_are_refused(given, truths, message):
    with pytest.raises(UserError, match=message):
        answers.vqa(given, truths)


def test_answerability_needs_a_question_that_cannot_be_answered():
    with pytest.raises(UserError, match="each of 2 questions is answerable"):
        answers.unanswerability({1: 0.5, 2: 0.1}, {1: True, 2: True})


def test_a_question_without_kind_is_refused():
    with pytest.raises(UserError, match="question 2: its kind is not given"):
        answers.choices({1: 0, 2: 0}, {1: 0, 2: 0}, {1: ["NAT"]})
