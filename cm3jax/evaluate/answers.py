"""How many questions about pictures are answered as people answered them: VQA, VizWiz, OK-VQA; and ScienceQA's choices.

A question of VQA has ten answers of ten people. An answer is right as far as three of them gave it: min(n / 3, 1),
where n leaves out one person at a time, and the ten figures are averaged (arXiv 1505.00468 section 5, and the
evaluation page of visualqa.org). Before that, answers are made alike: lower case, no punctuation and no articles,
numbers up to ten as digits, apostrophes put back into contractions. The published evaluation does so only where the
ten people do not all say the same, and so does `accuracy`. Its rules have edges, which are kept: one comma between
digits anywhere makes every mark vanish that would else become a space, and a full stop stays only before a digit.
(GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py of a013f00, 2021; older copies differ in that.)

VizWiz's own evaluation differs (its Python API, as AttentionX/InstructBLIP_PEFT has it in lavis/common/vqa_tools/
vqa_eval_vizwiz.py and TRI-ML/vlm-evaluation in vlm_eval/util/evaluation/vizwiz/eval.py): the answer is always made
alike, the people's never, so that "two" is wrong where all ten say "two"; most contractions get a typographic
apostrophe; and what is told from confidences is that a question can NOT be answered.
"""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence

from cm3jax.types import UserError

ENOUGH = 3
"""People whose agreement makes an answer right."""
MARKS = ';/[]"{}()=+\\_-><@`,?!'
DIGITS = "zero one two three four five six seven eight nine ten"
NUMBERS = {"none": "0"} | {word: str(i) for i, word in enumerate(DIGITS.split())}
ARTICLES = frozenset(["a", "an", "the"])

CUT = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "n't've": "could had might should would",
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'d've": "he it she somebody someone something there they we who you",
    "'s": "he how somebody someone that there what when where who why",
    "'ll": "how it somebody someone something they what who why you",
    "'re": "there they what why you",
    "'am": "ma",
    "'clock": "o",
    "'all": "y",
    "'all'll": "y",
    "'all'd've": "y",
}
"""Endings with an apostrophe, and the words that take them; others keep what people wrote ("its" may be meant)."""


def _contractions() -> dict[str, str]:
    """Return what lacks one or all of its apostrophes -> the word with them."""
    found = {"twas": "'twas", "ow's'at": "'ow's'at", "'ows'at": "'ow's'at", "'ow'sat": "'ow's'at"}
    for ending, stems in CUT.items():
        for word in (stem + ending for stem in stems.split()):
            places = [i for i, letter in enumerate(word) if letter == "'"]
            found |= {word[:i] + word[i + 1 :]: word for i in places}
    return found | {"somebody'd": "somebodyd"}  # the published table has it this way round


CONTRACTIONS = _contractions()


def _typographic(words: Mapping[str, str]) -> dict[str, str]:
    """Return VizWiz's table of contractions: VQA's, with ’ for ' but where the published one kept it."""
    asked = {word if word in ("couldn'tve", "hadn'tve") else word.replace("'", "’"): to for word, to in words.items()}
    return {word: to if to in STRAIGHT else to.replace("'", "’") for word, to in asked.items()}


STRAIGHT = frozenset(["ain't", "aren't", "can't", "could've", "couldn't", "we've", "where's", "who've"])
VIZWIZ_CONTRACTIONS = _typographic(CONTRACTIONS)
COMMA = re.compile(r"\d,\d")
STOP = re.compile(r"\.(?!\d)")
STOPS = 32
"""Full stops that are taken away from one answer; the published program stops there."""


def normal(answer: str, contractions: Mapping[str, str] = CONTRACTIONS) -> str:
    """Return an answer in the form in which the published evaluation compares it."""
    answer = _line(answer)
    joined = COMMA.search(answer) is not None
    text = answer
    for mark in MARKS:
        gone = joined or mark + " " in answer or " " + mark in answer
        text = text.replace(mark, "" if gone else " ")
    words = [NUMBERS.get(word, word) for word in STOP.sub("", text, count=STOPS).lower().split()]
    return " ".join(contractions.get(word, word) for word in words if word not in ARTICLES)


def _line(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def accuracy(answer: str, people: Sequence[str]) -> float:
    """Return how right an answer is, 0 to 1.

    Args:
      people: The answers of ten people; some sets have fewer.
    """
    answer, people = _line(answer), [_line(text) for text in people]
    if len(set(people)) > 1:
        answer, people = normal(answer), [normal(text) for text in people]
    return _agreement(answer, people)


def vizwiz_accuracy(answer: str, people: Sequence[str]) -> float:
    """Return how right an answer is by VizWiz's evaluation, 0 to 1: people's answers stand as they wrote them."""
    return _agreement(normal(answer, VIZWIZ_CONTRACTIONS), people)


def _agreement(answer: str, people: Sequence[str]) -> float:
    """Return min(n / 3, 1) of the others who gave this answer, averaged over who is left out."""
    agree = sum(text == answer for text in people)
    return sum(min((agree - (text == answer)) / ENOUGH, 1.0) for text in people) / len(people)


def vqa(
    answers: Mapping,
    truths: Mapping[object, Sequence[str]],
    kinds: Mapping | None = None,
    one: Callable[[str, Sequence[str]], float] = accuracy,
) -> dict[str, float]:
    """Return {"accuracy": mean over the questions, and of each kind of question "accuracy/KIND"}; 0.476 for "47.6".

    Args:
      answers: {question id: answer}. truths: {question id: the answers of people}.
      kinds: {question id: ["yes/no"], ["number"], ...}, for the figures by kind.
      one: How right one answer is; VizWiz has its own.

    Raises:
      UserError: if a question has no answer, an answer no question, or a question no people's answers.
    """
    check(answers, truths)
    if empty := [name for name in truths if not len(truths[name])]:
        raise UserError(f"question {empty[0]!r}: no people's answers; a test split without them cannot be scored here")
    each = {name: one(answers[name], truths[name]) for name in truths}
    return _means("accuracy", each, kinds)


def unanswerability(confidences: Mapping[object, float], truths: Mapping[object, bool]) -> dict[str, float]:
    """Return VizWiz's figures of telling which questions cannot be answered: average precision, and F1 at one half.

    Args:
      confidences: {question id: how sure that the picture tells the answer}. truths: {question id: whether it does}.

    Raises:
      UserError: if the ids differ, or every question is answerable.
    """
    check(confidences, truths)
    doubts = {name: 1.0 - confidences[name] for name in truths}
    wanted = sum(not truth for truth in truths.values())
    if not wanted:
        raise UserError(f"answerability: each of {len(truths)} questions is answerable; average precision is undefined")
    found = seen = 0
    total = 0.0
    names = sorted(truths, key=lambda name: -doubts[name])
    for _, alike in itertools.groupby(names, key=lambda name: doubts[name]):  # equal confidences: one step
        group = [not truths[name] for name in alike]
        found, seen = found + sum(group), seen + len(group)
        total += sum(group) * found / seen
    told = [not truths[name] for name in truths if doubts[name] > 0.5]
    return {"unanswerable AP": total / wanted, "unanswerable F1": 2 * sum(told) / (len(told) + wanted)}


def choices(answers: Mapping, truths: Mapping, kinds: Mapping | None = None) -> dict[str, float]:
    """Return ScienceQA's accuracy: the share of questions for which exactly the right choice was named.

    Args:
      answers: {question id: number of the chosen option, -1 for none}. truths: {question id: number}.
      kinds: {question id: [subject, grade, ...]}.

    Raises:
      UserError: as `vqa`.
    """
    check(answers, truths)
    return _means("accuracy", {name: float(answers[name] == truths[name]) for name in truths}, kinds)


def chosen(answer: str, options: Sequence[str]) -> int:
    """Return which option an answer names: by its letter, "B", "(B)" or "(B) a dog", or by its text; -1 for none.

    A text that several options share names none.
    """
    letter = re.fullmatch(r"\s*(?:\(([A-Za-z])\)(?:\s.*)?|([A-Za-z])[.):]?)\s*", answer, re.DOTALL)
    if letter and (number := ord((letter[1] or letter[2]).upper()) - ord("A")) < len(options):
        return number
    same = [i for i, option in enumerate(options) if normal(option) == normal(answer)]
    return same[0] if len(same) == 1 else -1


def check(answers: Mapping, truths: Mapping) -> None:
    """Look at the ids.

    Raises:
      UserError: if there is no question, or an id is on one side only.
    """
    if not truths:
        raise UserError("answers: no questions; nothing can be scored")
    for there, here, what in ((truths, answers, "answer"), (answers, truths, "question")):
        if missing := [name for name in there if name not in here]:
            raise UserError(
                f"question {missing[0]!r}: no {what} ({len(missing)} of {len(there)} ids); score the same questions"
            )


def _means(name: str, each: Mapping, kinds: Mapping[object, Sequence[str]] | None) -> dict[str, float]:
    """Return the mean of all, and of each kind."""
    groups = {name: list(each.values())}
    for key, value in each.items():
        if kinds is not None:
            if key not in kinds:
                raise UserError(f"question {key!r}: its kind is not given")
            for kind in kinds[key]:
                groups.setdefault(f"{name}/{kind}", []).append(value)
    return {group: sum(values) / len(values) for group, values in groups.items()}
