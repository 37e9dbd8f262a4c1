"""The mask of instruction tuning: exactly the answers, in the share of the documents that is asked for."""

import collections
import dataclasses
import hashlib
import itertools

import numpy as np
import pytest

from cm3jax import config as configs
from cm3jax.config import DecoderStage, Mask, Packing, Training
from cm3jax.data import census, encode, index, mixing, neighbours, packing, pipeline, retrieved, scenes, tokens
from cm3jax.objectives import causal_mask
from cm3jax.tasks import table, templates
from cm3jax.tokenizers import document, text
from cm3jax.vocab import BREAK, EOD, EOSS, Vocab

VOCAB = Vocab(text=400, image=23, sentinels=11, multiple=7)
CODES = 4
PER_TASK = 8
STAGE = DecoderStage(
    packing=Packing("whole", 420, documents=1, most_spans=4), mask=Mask(answers=0.5), training=Training(batch=1)
)


def codes(pictures):
    """Return codes that tell pictures apart a little."""
    flat = pictures.reshape(len(pictures), CODES, -1).astype(np.int64)
    return (flat.sum(-1) % VOCAB.image).astype(np.uint16)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Return the records of all tasks, the text tokenizer and their token shards."""
    folder = tmp_path_factory.mktemp("tasks")
    # of a held-out split, which has each task equally often
    found = [scenes.record("tasks", 0, i, "test", 16) for i in range(PER_TASK * len(table.TASKS))]
    lines = [part for one in found for part in one.parts if isinstance(part, str)]
    tokenizer = text.train(lines, 390, folder / "tokenizer.model")
    for shard in range(2):
        made = encode.documents(found[shard::2], codes, tokenizer, VOCAB, 16)
        tokens.write(folder / "tokens", "train", made, shard, 2)
    index.write(folder / "tokens")
    return found[::2] + found[1::2], tokenizer, folder / "tokens"


def opened(data):
    return tokens.Tokens(data[2], "train")


def shares(found, stage, rows):
    """Return of each task the share of its documents that teach its prompt."""
    keys = found.keys()  # of `scenes:tasks` end with the task
    tasks = [key.rsplit("-", 1)[1] if "tasks" in key else "" for key in keys]
    counts = census.count(found, stage, VOCAB, tasks, rows)
    return {name: one.taught / one.documents for name, one in counts.items() if name != census.NONE}


def parts(record):
    """Return a record's parts with codes for pictures."""
    return [part if isinstance(part, str) else codes(part[None])[0] for part in record.parts]


def test_token_shards_carry_where_the_answers_stand(data):
    found = opened(data)
    for i, record in enumerate(data[0]):
        ids, spans = document.marked(parts(record), record.regions, data[1], VOCAB)
        assert np.array_equal(found[i], ids) and np.array_equal(found.answers(i), spans) and len(spans)
    assert (data[2] / "train-00001-of-00002.answers.npy").is_file()
    assert len(index.check(data[2], "")["train"]) == 8
    twice = tokens.Chain([found, found])
    n = len(found)
    assert all(np.array_equal(twice.answers(n + i), found.answers(i)) for i in range(n))


def test_shards_without_answers_are_the_three_files_of_old(data, tmp_path):
    tokens.write(tmp_path, "train", [("a", np.arange(5), np.array([[1, 3]])), ("b", np.arange(4))])
    assert tokens.Tokens(tmp_path, "train").answers(0).tolist() == [[1, 3]]
    assert tokens.Tokens(tmp_path, "train").answers(1).shape == (0, 2)
    tokens.write(tmp_path, "train", [("a", np.arange(5), np.zeros((0, 2), int)), ("b", np.arange(4))])
    assert {path.name.split(".")[1] for path in tmp_path.iterdir()} == {"ids", "lengths", "keys"}


def test_every_task_s_prompt_begins_a_document_of_the_shards(data):
    """Text and code ids of prompts at inference are those that training saw."""
    found = opened(data)
    for i, record in enumerate(data[0]):
        name, n = record.fields["task"], record.fields["wording"]
        values = templates.read(name, parts(record))
        prompt = templates.prompt(name, values, data[1], VOCAB, n)
        whole, spans = np.array([EOD, *found[i], EOD], np.uint16), found.answers(i) + 1
        row = whole if table.TASKS[name].draws else causal_mask.mask(whole, spans, VOCAB)
        answer = [*whole[slice(*spans[0])], EOD if table.TASKS[name].draws else EOSS]
        assert row[: len(prompt.ids) + len(answer)].tolist() == [*prompt.ids.tolist(), *map(int, answer)]


def test_every_task_s_prompt_is_common_in_what_is_trained_on(data):
    rows = 8 * len(data[0])
    found = shares(opened(data), STAGE, rows)
    assert found.keys() == table.TASKS.keys()
    words = [found[name] for name, one in table.TASKS.items() if not one.draws]
    drawn = [found[name] for name, one in table.TASKS.items() if one.draws]
    assert min(words) > 0.35 and max(words) < 0.75 and 0.45 < np.mean(words) < 0.62  # half, and a few by the law
    assert min(drawn) > 0.5 and 0.6 < np.mean(drawn) < 0.76  # half, and e^-1 of the rest
    law = dataclasses.replace(STAGE, mask=Mask())
    assert min(shares(opened(data), law, rows).values()) < 0.05


def test_in_packed_rows_each_document_is_masked_by_itself(data):
    """Isolated documents of one row: each has its answers masked, or what the law drew for it."""
    stage = dataclasses.replace(STAGE, packing=Packing("whole", 600, isolate=True, most_spans=12))
    found = opened(data)
    assert min(shares(found, stage, 200).values()) > 0.3
    make, counts = pipeline.Batches(found, stage, VOCAB), collections.Counter()
    for g in range(len(make.epochs.plan(0))):
        _, owner, spans, _ = make.unmasked(g)
        assert len(spans) <= 12 and (np.diff(spans.ravel()) >= 0).all()
        assert all((owner[a:b] == owner[a]).all() and a < b for a, b in spans)
        asked = packing.answers(make.epochs.plan(0), g, found, stage.packing)
        counts["documents"] += owner.max()
        counts["asked"] += len(asked)
    assert counts["documents"] == counts["asked"] > 40


def test_masks_follow_from_seed_row_and_epoch(data):
    make, again = (pipeline.Batches(opened(data), STAGE, VOCAB) for _ in range(2))
    for g in (90, 3, 250):
        assert all(np.array_equal(a, b) for a, b in zip(make.row(g), again.row(g), strict=True))
    other = dataclasses.replace(STAGE, training=Training(batch=1, seed=1))
    rows = [pipeline.Batches(opened(data), stage, VOCAB).unmasked(g)[2] for stage in (STAGE, other) for g in range(9)]
    assert any(not np.array_equal(a, b) for a, b in zip(rows[:9], rows[9:], strict=True))


def test_evaluation_masks_answers_too_and_perplexity_masks_nothing(data):
    def rows(answers, masked):
        stage = dataclasses.replace(STAGE, mask=Mask(spans=0.0, answers=answers))
        batches = itertools.islice(pipeline.eval_batches(data[2], "train", stage, VOCAB, masked), 8)
        return [np.isin(one["inputs"], [EOSS]).any() for one in batches]

    assert any(rows(1.0, True)) and not any(rows(0.0, True)) and not any(rows(1.0, False))


def test_without_the_setting_nothing_is_as_it_was_not(data):
    """Rows and fingerprint of older runs stay what they were."""
    found, law = opened(data), dataclasses.replace(STAGE, mask=Mask())
    ids, owner, shown = packing.read(pipeline.Epochs(found, 0, law.packing).plan(0), 5, found, law.packing)
    spans = packing.draw_spans(ids, VOCAB, law.mask, law.packing, packing.stream(0, "mask", 0, 5))
    row = packing.masked(ids, owner, spans, VOCAB, law.packing, shown)
    assert all(np.array_equal(a, b) for a, b in zip(pipeline.Batches(found, law, VOCAB).row(5), row, strict=True))
    old = {k: v for k, v in configs.to_json(law.mask).items() if k != "answers"}
    assert old == {"spans": 1.0, "rotate": 0.5, "captions": 0.0}
    lengths = hashlib.sha256(found.lengths.astype("<i4").tobytes()).hexdigest()
    assert pipeline.fingerprint(found, law, VOCAB) == configs.digest(lengths, law.packing, old, VOCAB, 1, 0)
    assert len({pipeline.fingerprint(found, one, VOCAB) for one in (law, STAGE)}) == 2


@pytest.mark.parametrize(
    "settings", (Packing("whole", 600, isolate=True, most_spans=12), Packing("chop", 300)), ids=str
)
def test_what_stands_around_an_answer_weighs_less_where_it_is_asked_for(data, settings):
    """Of a document that masks exactly its answer, the answer and the [eod] behind the document keep their weight."""
    found, seen = opened(data), collections.Counter()
    law = Mask(answers=0.5, span_weight=50.0)
    less, equal = (
        pipeline.Batches(found, dataclasses.replace(STAGE, packing=settings, mask=one), VOCAB)
        for one in (dataclasses.replace(law, context_weight=0.25), law)
    )
    for g in range(20):
        a, b = less(g), equal(g)
        assert all(np.array_equal(a[name], b[name]) for name in a if name != "weights")
        share = np.divide(a["weights"], b["weights"], out=np.ones_like(a["weights"]), where=b["weights"] > 0)[0]
        assert set(np.unique(share)) <= {0.25, 1.0}
        _, owner, spans, part = less.unmasked(g)
        (plan, _), _, r = less.epochs.locate(g)
        asked = packing.answers(plan, r, found, settings)
        for number, i in enumerate(plan.row(r)[0].tolist(), 1):
            here = np.flatnonzero(owner == number)
            own = spans[owner[spans[:, 0]] == number]
            if number not in asked or not np.array_equal(own, asked[number]):
                assert (part[here] == packing.OWN).all()
                seen["others"] += 1
                continue
            answer = np.zeros(int(found.lengths[i]), bool)
            for first, end in found.answers(i):
                answer[first:end] = True
            body = part[here][1 : 1 + len(answer)]
            assert np.array_equal(body == packing.CONTEXT, ~answer) and (part[here][1 + len(answer) :] == 0).all()
            seen["asked"] += 1
        if settings.kind == "whole":  # nothing is cut off: what is moved keeps its weight
            assert (share[a["modality"][0] == packing.INFILL] == 1).all()
        seen["less"] += int((share < 1).sum())
    assert min(seen["others"], seen["asked"], seen["less"]) > 20


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize("context_weight", [0.25, 1.0])
def test_the_last_two_tokens_of_an_answer_in_words_weigh_at_least_what_the_config_says(data, isolate, context_weight):
    """Those of documents that mask exactly that; of other spans, of drawn codes and of all else nothing changes."""
    found, settings = opened(data), Packing("whole", 600, isolate=isolate, most_spans=12)
    law = Mask(spans=2.0, answers=0.5, span_weight=5.0, context_weight=context_weight)
    plain, heavy = (
        pipeline.Batches(found, dataclasses.replace(STAGE, packing=settings, mask=one), VOCAB)
        for one in (law, dataclasses.replace(law, end_weight=70.0))
    )
    total = 0
    for g in range(30):
        a, b = plain(g), heavy(g)
        assert all(np.array_equal(a[name], b[name]) for name in a if name != "weights")
        changed = np.flatnonzero(a["weights"][0] != b["weights"][0])
        targets = a["targets"][0]
        assert (b["weights"][0, changed] == 70).all() and VOCAB.is_text(targets[changed]).all()
        assert all(EOSS in targets[at + 1 : at + 3] for at in changed)
        ids, owner, spans, _ = plain.unmasked(g)
        (plan, _), _, r = plain.epochs.locate(g)
        asked, expected = packing.answers(plan, r, found, settings), 0
        for number, wanted in asked.items():
            if np.array_equal(spans[owner[spans[:, 0]] == number], wanted):
                expected += sum(int(VOCAB.is_text(ids[first:end][-2:]).sum()) for first, end in wanted)
        assert len(changed) == expected
        total += expected
    assert total > 20


def test_cut_documents_and_too_many_answers_are_left_to_the_law(data):
    """Chopped rows mask the answers of documents that they hold whole, as far as sentinels go."""
    found = opened(data)
    stage = dataclasses.replace(STAGE, packing=Packing("chop", 300), mask=Mask(spans=0.0, answers=1.0))
    make, seen = pipeline.Batches(found, stage, VOCAB), 0
    for g in range(30):
        ids, owner, spans, _ = make.unmasked(g)
        for number in np.unique(owner[spans[:, 0]]):
            inside = ids[owner == number]
            assert inside[0] == EOD and owner[-1] != number
            seen += 1
        for start, end in spans:
            assert not np.isin(ids[start:end], [EOD, BREAK]).any()
    assert seen > 10
    few = Packing("whole", 2000, most_spans=2)
    stage = dataclasses.replace(STAGE, packing=few, mask=Mask(spans=3.0, answers=1.0))
    assert all(len(pipeline.Batches(found, stage, VOCAB).unmasked(g)[2]) <= 2 for g in range(5))


def test_a_mixture_keeps_the_answers_of_its_sets(data, tmp_path):
    plain = [(f"plain-{i}-", np.array([VOCAB.text_start + 5, BREAK, VOCAB.image_start])) for i in range(40)]
    tokens.write(tmp_path, "train", plain)
    mixture = configs.Mixture(sets=(str(data[2]),), weights=(1.0, 9.0))
    stage = dataclasses.replace(STAGE, mixture=mixture)
    found, own = mixing.open(tmp_path, "train", stage), opened(data)
    assert len(found.answers(39)) == 0
    assert all(np.array_equal(found.answers(40 + i), own.answers(i)) for i in range(len(own)))
    assert min(shares(found, stage, 4000).values()) > 0.2  # most of these rows have a plain document


def test_answers_stand_behind_what_was_retrieved_for_their_document(data, tmp_path):
    own = opened(data)
    found = np.stack([np.random.default_rng(i).permutation(len(own))[:2] for i in range(len(own))]).astype(np.int32)
    neighbours.write(tmp_path, "train", found)
    stage = dataclasses.replace(STAGE, retrieved=configs.Retrieved(least=1, most=2), packing=Packing("whole", 900))
    shown = mixing.open(data[2], "train", stage, retrieved.Source(tmp_path, ("train",))).at(0, 0)
    for i in range(0, len(own), 7):
        assert shown.before(i) > 0
        for (a, b), (c, d) in zip(shown.answers(i), own.answers(i), strict=True):
            assert np.array_equal(shown[i][a:b], own[i][c:d])
