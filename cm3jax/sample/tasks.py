"""Answers to tasks: an edit, a picture from a feature image, an answer to a question, in three lines.

    generator = generate.load("runs/sft")
    (found,) = tasks.answer(generator, "question", [{"question": "Which shape is top left?", "image": picture}])
    print(found["answer"])

What a task needs and what it gives back says `tasks.table`. Row i of a call draws from the stream (seed, i).

    seen = [{"question": "Which shape is top left?", "image": other, "answer": "a circle"}]
    tasks.answer(generator, "question", [{...}], examples=seen)

Examples stand before each query, as documents that were retrieved for it do (arXiv 2309.02591 §2.1), in all streams of
guidance. A model that was trained without retrieval has seen nothing of the kind.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cm3jax import config as configs
from cm3jax.sample import generate
from cm3jax.tasks import table, templates
from cm3jax.tokenizers import document


def answer(
    generator: generate.Generator,
    task: str,
    values: Sequence[Mapping[str, Any]],
    seed: int = 0,
    sampling: configs.Sampling | None = None,
    max_text: int = 96,
    wording: int = 0,
    examples: Sequence[Mapping[str, Any]] = (),
) -> list[dict[str, Any]]:
    """Return {field: text, or picture uint8 [h, w, 3]} of the answer to each row.

    Args:
      values: The fields of each row but the answer's; pictures as uint8 [h, w, 3] of any size, or codes [n].
      sampling: None: pictures at temperature 1, texts greedily.
      max_text: Tokens of one text at most.
      wording: Which template.
      examples: All fields of each, the answer's too; shown before every row, in this order and wording.

    Raises:
      UserError: if there is no such task, a field is missing, or a prompt, examples included, is too long.
    """
    if not values:
        return []
    declared = table.find(task)
    rows, shown = encoded(generator, declared, values), documents(generator, declared, examples, wording)
    prompts = [templates.prompt(task, row, generator.text, generator.vocab, wording, shown) for row in rows]
    if declared.draws:
        drawn = generator._codes(prompts, [generator.codes] * len(prompts), seed, sampling or configs.Sampling())
        pictures = generator.image.decode(np.array(drawn, np.uint16).reshape(-1, generator.codes))
        return [templates.answers(task, [picture]) for picture in pictures]
    found: list[list[str]] = [[] for _ in rows]
    for i in range(len(declared.answer)):
        if i:
            prompts = [
                templates.following(prompt, ids, generator.vocab) for prompt, ids in zip(prompts, spans, strict=True)
            ]
        # another stream for each field: the same one would draw all by the same numbers
        spans = generator._span_ids(prompts, seed, sampling or generate.GREEDY, max_text, f"sample/{i}")
        for row, ids in zip(found, spans, strict=True):
            row.append(document.decode_text(ids[:-1], generator.text, generator.vocab))
    return [templates.answers(task, row) for row in found]


def encoded(generator: generate.Generator, task: table.Task, values: Sequence[Mapping[str, Any]]) -> list[dict]:
    """Return the rows with codes for given pictures; each field's go through the tokenizer at once."""
    return _coded(generator, [name for name in task.fields if name not in task.answer], values)


def documents(
    generator: generate.Generator, task: table.Task, examples: Sequence[Mapping[str, Any]], wording: int = 0
) -> list[np.ndarray]:
    """Return the ids of examples as training has them, answers included, uint16 [n] each.

    Raises:
      UserError: if a field is missing, of the wrong type or, in the answer, empty.
    """
    found = []
    for row in _coded(generator, task.fields, examples):
        parts, regions = templates.make(task.name, row, wording)
        found.append(document.marked(parts, regions, generator.text, generator.vocab)[0])
    return found


def _coded(generator: generate.Generator, names: Sequence[str], values: Sequence[Mapping[str, Any]]) -> list[dict]:
    rows = [dict(row) for row in values]
    for name in filter(table.is_picture, names):
        here = [row for row in rows if name in row]
        for row, codes in zip(here, generator.encode([row[name] for row in here]), strict=True):
            row[name] = codes
    return rows
