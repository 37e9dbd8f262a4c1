"""The count of tasks in what is trained on, against counts by hand."""

import dataclasses
import json

import fake_encoder
import numpy as np
import pytest

from cm3jax import cli, config
from cm3jax.config import DecoderStage, Mask, Mixture, Packing, Recipe, Training
from cm3jax.data import census, index, tokens
from cm3jax.data.census import Count
from cm3jax.types import Record, UserError
from cm3jax.vocab import BREAK, Vocab

VOCAB = Vocab(text=300, image=101, sentinels=23, multiple=7)
T, I = VOCAB.text_start, VOCAB.image_start
WORDS = np.r_[T, T + 1, T + 2, T + 3, BREAK, I, I + 1, I + 2, I + 3]
"""A question, of which words 2 and 3 are the answer, and a picture: 9 ids."""
DRAWN = np.r_[T + 5, BREAK, I, I + 1, I + 2, I + 3]
"""Words, and a picture that is the answer: 6 ids."""
PLAIN = np.r_[T + 7, T + 8, BREAK, I]
"""A document of no task: 4 ids."""
KINDS = {"question": (WORDS, [(2, 4)]), "words": (DRAWN, [(2, 6)]), "": (PLAIN, [])}
TASKS = ["question"] * 5 + ["words"] * 3 + [""] * 2


def write(run, tasks, recipe=None):
    """Write prepared/, tokens/ and recipe.json of a run whose documents have these tasks."""
    records = [Record(f"{i}", ("x",), {"task": task} if task else {}) for i, task in enumerate(tasks)]
    fake_encoder.write(run / "prepared", {"train": records}, 1)
    documents = [(f"{i}", KINDS[task][0], np.array(KINDS[task][1]).reshape(-1, 2)) for i, task in enumerate(tasks)]
    tokens.write(run / "tokens", "train", documents)
    index.write(run / "tokens")
    (run / "recipe.json").write_text(json.dumps(config.to_json(recipe or Recipe(vocab=VOCAB))))
    return tokens.Tokens(run / "tokens", "train")


def stage(answers, packing, spans=0.0):
    return DecoderStage(packing=packing, mask=Mask(spans=spans, answers=answers), training=Training(batch=1))


def counted(found, stage, rows):
    return {name: dataclasses.astuple(one) for name, one in census.count(found, stage, VOCAB, TASKS, rows).items()}


def test_whole_documents_are_counted_as_by_hand(tmp_path):
    """Each costs its ids and two [eod]s; no mask at all is what a picture's prompt has."""
    found, one = write(tmp_path, TASKS), Packing("whole", 20, documents=1, most_spans=2)
    assert counted(found, stage(1.0, one), 10) == {
        "question": (5, 55, 5, 5),
        "words": (3, 24, 3, 3),
        "(no task)": (2, 12, 0, 0),
    }
    assert counted(found, stage(0.0, one), 10)["question"] == (5, 55, 5, 0)
    assert counted(found, stage(0.0, one), 10)["words"] == (3, 24, 3, 3)
    assert counted(found, stage(0.0, one), 20)["question"] == (10, 110, 10, 0)  # two epochs
    law = counted(found, stage(0.0, one, spans=30.0), 200)
    assert law["question"][3] < 0.2 * law["question"][2] and law["words"][3] < 0.2 * law["words"][2]


def test_half_of_the_documents_are_masked_as_asked(tmp_path):
    found = write(tmp_path, TASKS)
    documents, _, _, taught = counted(found, stage(0.5, Packing("whole", 20, documents=1, most_spans=2)), 2000)[
        "question"
    ]
    assert documents == 1000 and 440 < taught < 560  # 0.5 with a deviation of 16


def test_cut_documents_count_once_and_are_taught_only_where_they_are_whole(tmp_path):
    """One long row cut at 30: of the documents' 10 + 7 + 5 ids each, as the stream has them."""
    found, settings = write(tmp_path, TASKS), stage(1.0, Packing("chop", 30))
    rows = (5 * 10 + 3 * 7 + 2 * 5 + 1) // 30
    counts = counted(found, settings, rows)
    assert sum(tokens for _, tokens, _, _ in counts.values()) == rows * 30
    assert sum(documents for documents, *_ in counts.values()) <= 10
    documents, _, whole, taught = counts["question"]
    assert whole <= documents and taught <= whole
    plain = counted(found, stage(0.0, Packing("chop", 30)), rows)
    assert plain["question"][3] == 0 < plain["question"][2]


def test_the_command_counts_a_run_and_its_mixture(tmp_path, capsys):
    write(tmp_path / "b", ["words"] * 6)
    settings = stage(1.0, Packing("whole", 20, documents=1, most_spans=2))
    mixture = Mixture((str(tmp_path / "b" / "tokens"),), (61.0, 36.0))  # as many tokens as there are
    recipe = Recipe(vocab=VOCAB, decoder=dataclasses.replace(settings, mixture=mixture))
    write(tmp_path / "a", ["question"] * 5 + [""] * 4, recipe)
    assert cli.main(["tasks", str(tmp_path / "a")]) == 0
    first, _, *rows = capsys.readouterr().out.splitlines()
    assert first == "15 of 15 rows of the first epoch"
    assert [" ".join(row.split()) for row in rows] == [
        "words 6 40.0% 48 37.8% 6 6 100.0%",
        "question 5 33.3% 55 43.3% 5 5 100.0%",
        "(no task) 4 26.7% 24 18.9% 0 0 0.0%",
    ]
    assert cli.main(["tasks", str(tmp_path / "a"), "--rows", "4"]) == 0
    assert capsys.readouterr().out.startswith("4 of 15 rows")


def test_records_that_are_not_those_of_the_tokens_are_refused(tmp_path):
    write(tmp_path, ["words"] * 3)
    tokens.write(tmp_path / "tokens", "train", [("0", DRAWN)])
    with pytest.raises(UserError, match=r"3 records, but .* has 1 documents; encode it again"):
        census.of_run(tmp_path)


def test_the_most_common_task_comes_first():
    lines = census.table({"edit": Count(1, 5, 1, 1), "caption": Count(3, 5, 3, 0)})
    assert [line.split()[0] for line in lines] == ["task", "caption", "edit"]
