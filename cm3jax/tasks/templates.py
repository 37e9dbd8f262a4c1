"""A task's fields <-> its document, and the prompts that ask for its answer (arXiv 2309.02591 §4, table 5).

    parts, regions = templates.make("question", {"question": ..., "answer": ..., "image": picture}, n)
    prompt = templates.prompt("question", {"question": ..., "image": codes}, tokenizer, vocab)
    templates.answers(prompt, "question", ["a red apple"])      {"answer": "a red apple"}

`regions` say where the answer stands, for SFT to mask it: `document.marked` finds its ids. Imports no jax.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cm3jax.tasks import table
from cm3jax.tasks.table import FIELD
from cm3jax.tokenizers import document
from cm3jax.tokenizers.document import Documents, Prompt
from cm3jax.tokenizers.text import Tokenizer
from cm3jax.types import ANSWER, Region, UserError
from cm3jax.vocab import BREAK, EOD, EOSS, Vocab

Values = Mapping[str, Any]
"""Field -> text, or a picture: pixels, an encoded file's bytes, or image codes [n]."""

# ----------------------------------------------------------------------------------------------------------- documents


def make(task: str, values: Values, n: int = 0) -> tuple[tuple[Any, ...], tuple[Region, ...]]:
    """Return the parts of a task's document, in reading order, and where the fields of its answer stand.

    Args:
      values: A value for each field; more are allowed.
      n: Which wording; counts on from the first one behind the last.

    Returns:
      parts: Texts, and the values of pictures as they are; what `types.Record` and `data.example.Example` hold.
      regions: Of kind "answer", labelled with the field; a text's box has the shares of its characters as x.

    Raises:
      UserError: if there is no such task, or a field is missing, of the wrong type or, in the answer, empty.
    """
    declared = table.find(task)
    _check(declared, values, declared.fields)
    parts, regions = [], []
    for i, template in enumerate(_wording(declared, n)):
        name = _picture(template)
        if name:
            parts.append(values[name])
            regions += [Region(i, ANSWER, (0.0, 0.0, 1.0, 1.0), name)] * (name in declared.answer)
            continue
        text, places = _fill(template, values)
        parts.append(text)
        for field in declared.answer:
            if field in places:
                start, end = places[field]
                regions.append(Region(i, ANSWER, (start / len(text), 0.0, end / len(text), 1.0), field))
    return tuple(parts), tuple(regions)


def read(task: str, parts: Sequence[Any]) -> dict[str, Any] | None:
    """Return the fields of a task's document, in whichever wording it is; None if it is not one. Undoes `make`.

    Where a text fits a wording in several ways, the first fields are the shortest.
    """
    declared = table.find(task)
    for n in reversed(range(len(declared.templates))):  # the first one of captions fits any text
        templates, found = _wording(declared, n), {}
        if len(templates) != len(parts):
            continue
        for template, part in zip(templates, parts, strict=True):
            name = _picture(template)
            if bool(name) == isinstance(part, str):
                break
            match = None if name else _pattern(template).fullmatch(part)
            if not name and not match:
                break
            found |= {name: part} if name else match.groupdict()
        else:
            return found
    return None


def _wording(task: table.Task, n: int) -> list[str]:
    return table.split(task.templates[n % len(task.templates)])


def _picture(template: str) -> str:
    """Return the field of a part that is a picture, "" of one that is a text."""
    found = FIELD.fullmatch(template)
    return found[1] if found and table.is_picture(found[1]) else ""


def _fill(template: str, values: Values) -> tuple[str, dict[str, tuple[int, int]]]:
    """Return a part's text, and the characters (start, end) of each field in it."""
    text, places, last = "", {}, 0
    for found in FIELD.finditer(template):
        text += template[last : found.start()]
        places[found[1]] = len(text), len(text) + len(values[found[1]])
        text, last = text + values[found[1]], found.end()
    return text + template[last:], places


def _pattern(template: str) -> re.Pattern:
    pieces = FIELD.split(template)
    named = (f"(?P<{piece}>.*?)" if i % 2 else re.escape(piece) for i, piece in enumerate(pieces))
    return re.compile("".join(named), re.DOTALL)


def _check(task: table.Task, values: Values, names: Sequence[str]) -> None:
    """Raise UserError unless these fields are there and of the right type."""
    for name in names:
        if name not in values:
            raise UserError(f"task {task.name}: no value for the field {name!r}; it needs {', '.join(names)}")
        if isinstance(values[name], str) == table.is_picture(name):
            wanted = "a picture" if table.is_picture(name) else "a text"
            raise UserError(f"task {task.name}: field {name!r} is a {type(values[name]).__name__}; must be {wanted}")
        if name in task.answer and isinstance(values[name], str) and not values[name].strip():
            raise UserError(f"task {task.name}: field {name!r} is empty; leave out examples without an answer")


# ------------------------------------------------------------------------------------------------------------- prompts


def prompt(
    task: str, values: Values, tokenizer: Tokenizer, vocab: Vocab, n: int = 0, examples: Documents = ()
) -> Prompt:
    """Return what asks for a task's answer: a prefix of what masking its document yields.

    A picture is drawn behind all that stands before it; unconditional, without what the user gave; between the two,
    where a picture is among that, with it and without the texts (arXiv 2405.09818's public code edits so). Words are
    filled in: of several fields the first one is asked for, `following` then for the next. Unconditional, their part
    and all behind it are masked, as `document.image_to_text` has it.

    Args:
      values: Of all fields but the answer's; pictures as image codes [n].
      examples: Documents of the task with their answers, before the query in all streams, as retrieved ones are.

    Raises:
      UserError: if there is no such task, or a field is missing or of the wrong type.
    """
    declared, before = table.find(task), document.shown(examples)
    given = [name for name in declared.fields if name not in declared.answer]
    _check(declared, values, given)
    if declared.draws:
        ids, hidden = stream(task, values, tokenizer, vocab, given, n, before)
        without, gone = stream(task, values, tokenizer, vocab, (), n, before)
        told = Prompt(task, ids, without, "image", EOD, hidden=hidden, unconditional_hidden=gone, retrieved=len(before))
        if not any(table.is_picture(name) for name in given):
            return told
        pictured, kept = stream(task, values, tokenizer, vocab, [x for x in given if table.is_picture(x)], n, before)
        return dataclasses.replace(told, pictured=pictured, pictured_hidden=kept)
    first = vocab.sentinel(0)
    ids, without, gone, masked = [EOD, before], [EOD, before], (), False
    for template in _wording(declared, n):
        found, asked = _gaps(template, values, declared.answer, tokenizer, vocab)
        ids, masked = [*ids, found, BREAK], masked or asked
        without += [vocab.sentinel(len(gone)) if masked else found, BREAK]
        gone += (_codes(template, values),) * masked
    ids, without = [*ids[:-1], EOD, first], [*without[:-1], EOD, first]
    hidden = {"hidden": (0,) * len(declared.answer), "unconditional_hidden": gone}
    return Prompt(task, document.join(*ids), document.join(*without), "text", EOSS, **hidden, retrieved=len(before))


def stream(
    task: str,
    values: Values,
    tokenizer: Tokenizer,
    vocab: Vocab,
    keep: Sequence[str],
    n: int = 0,
    before: np.ndarray | tuple = (),
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Return one stream of guidance towards a picture: parts that hold a field not in `keep` are masked.

    All fields kept: the prompt. None: its unconditional stream. The pictures: the stream between.

    Args:
      before: Ids behind the first [eod], which no stream masks.

    Returns:
      ids: uint16 [t], up to the <break> before the picture.
      hidden: The codes behind each sentinel; 0 for text.
    """
    ids, hidden = [EOD, before], ()
    for template in _wording(table.find(task), n)[:-1]:
        if set(FIELD.findall(template)) <= set(keep):
            name = _picture(template)
            found = (
                document.image_ids(values[name], vocab) if name else _gaps(template, values, (), tokenizer, vocab)[0]
            )
        else:
            found, hidden = vocab.sentinel(len(hidden)), (*hidden, _codes(template, values))
        ids += [found, BREAK]
    return document.join(*ids), hidden


def following(prompt: Prompt, drawn: np.ndarray, vocab: Vocab) -> Prompt:
    """Return the prompt for the next field of an answer, behind what was drawn for the one before, <eoss> included.

    Guidance ends with the first field: its stream would have to hold what was drawn, which `prompt` masks as a whole.
    """
    asked = int(prompt.ids[-1]) - vocab.sentinel_start + 1
    if asked >= len(prompt.hidden):
        raise UserError(f"task {prompt.kind}: its answer has {len(prompt.hidden)} fields, and all are drawn")
    ids = document.join(prompt.ids, drawn, vocab.sentinel(asked))
    return dataclasses.replace(prompt, ids=ids, unconditional=ids, unconditional_hidden=prompt.hidden)


def answers(task: str, drawn: Sequence[Any]) -> dict[str, Any]:
    """Return {field: value} from what was drawn for each field of an answer: texts without <eoss>, or codes.

    The blank before a word belongs to the word, so a text loses the blanks around it.
    """
    declared = table.find(task)
    if len(drawn) != len(declared.answer):
        raise UserError(f"task {task}: {len(drawn)} answers; needs one for each of {', '.join(declared.answer)}")
    return {
        name: one.strip() if isinstance(one, str) else one for name, one in zip(declared.answer, drawn, strict=True)
    }


def _gaps(template: str, values: Values, answer, tokenizer: Tokenizer, vocab: Vocab) -> tuple[np.ndarray, bool]:
    """Return a part's ids with a sentinel for each field of the answer, and whether there is any."""
    if name := _picture(template):
        return document.image_ids(values[name], vocab), False
    pieces, text, asked = [], "", 0
    for i, piece in enumerate(FIELD.split(template)):
        if not i % 2:
            text += piece
        elif piece in answer:
            pieces += [document.text_ids(text.removesuffix(" "), tokenizer, vocab), vocab.sentinel(asked)]
            text, asked = "", asked + 1
        else:
            text += values[piece]
    return document.join(*pieces, document.text_ids(text, tokenizer, vocab)), asked > 0


def _codes(template: str, values: Values) -> int:
    """Return how many codes a part has; 0 for text."""
    name = _picture(template)
    return len(values[name]) if name else 0


# ------------------------------------------------------------------------------------------------------------ locations

SIDE = 256
"""Pixels that locations count in, whatever a picture's size."""
_LOCATION = re.compile(r"(?P<label>[^(]*?) at \((\d+), (\d+)\) -> \((\d+), (\d+)\)(?:, |$)")


def located(objects: Sequence[tuple[str, Sequence[float]]]) -> str:
    """Return "apple at (96, 80) -> (160, 144), ..." from (label, (x0, y0, x1, y1) in fractions of the picture)."""
    places = ([round(SIDE * x) for x in box] for _, box in objects)
    pairs = zip((label for label, _ in objects), places, strict=True)
    return ", ".join(f"{label} at ({x0}, {y0}) -> ({x1}, {y1})" for label, (x0, y0, x1, y1) in pairs)


def read_located(text: str) -> list[tuple[str, tuple[float, ...]]]:
    """Return the (label, box) of each location in a text, in its order; the boxes in fractions of the picture."""
    return [
        (found["label"].strip(), tuple(int(x) / SIDE for x in found.groups()[1:])) for found in _LOCATION.finditer(text)
    ]
