"""VQA's normalisation and its rule of ten people, ScienceQA's choices, answerability."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

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


def test_answerability_is_sklearns_average_precision():
    rng = np.random.default_rng(0)
    truths = {i: bool(rng.integers(2)) for i in range(41)}
    sure = {i: float(rng.integers(7)) for i in range(41)}  # with ties
    wanted = average_precision_score([truths[i] for i in range(41)], [sure[i] for i in range(41)])
    assert answers.answerability(sure, truths) == pytest.approx(wanted)


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


def test_answerability_needs_an_answerable_question():
    with pytest.raises(UserError, match="none of 2 questions is answerable"):
        answers.answerability({1: 0.5, 2: 0.1}, {1: False, 2: False})


def test_a_question_without_kind_is_refused():
    with pytest.raises(UserError, match="question 2: its kind is not given"):
        answers.choices({1: 0, 2: 0}, {1: 0, 2: 0}, {1: ["NAT"]})
