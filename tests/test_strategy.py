"""What is chosen from candidates, and that nothing leaks: no document receives itself, a copy, or a held-out one."""

import dataclasses

import fake_encoder
import numpy as np
import pytest

from cm3jax import config as configs
from cm3jax.retrieval import bank, encoder, memory, neighbours, search, strategy
from cm3jax.types import Record

FAKE = fake_encoder.Fake()
NONE = strategy.Queries()


def banked(folder, records, held_out=()):
    """Return the opened bank of these records."""
    shard = bank.Shard("train", 0, 1, 0, len(records))
    bank.write(folder, shard, encoder.embed(FAKE, iter(records)))
    forbidden = np.unique(np.concatenate([np.zeros(0, np.uint64), *(bank.mark(r) for r in held_out)]))
    bank.seal(folder, [shard], forbidden, "fake")
    return bank.open(folder)


def chosen(made, text, count, settings, queries=NONE, taken=()):
    """Return the ids chosen for one text."""
    found = search.Flat(made).search(FAKE.texts([text]), settings.candidates)
    before = np.array([taken], np.int64).reshape(1, -1)
    return strategy.choose(made, *found, count, settings, queries, before)[1][0].tolist()


def test_the_defaults_are_the_papers():
    """Two by image and two by text, no score above 0.9, 20 % of the query dropped, both modalities: 2309.02591 §2.1."""
    default = configs.Neighbours()
    assert (default.by_image, default.by_text, default.most_score, default.dropout) == (2, 2, 0.9, 0.2)
    assert default.both and default.most_alike == default.most_score


FREE = configs.Neighbours(most_score=1.0, most_alike=1.0, both=False, candidates=16)
PAIRS = [
    fake_encoder.pair("0", ["red", "small", "circle", "top"], 1),
    fake_encoder.pair("1", ["red", "small", "circle", "top"], 2),  # as good as the first
    fake_encoder.pair("2", ["red", "small", "circle", "left"]),
    fake_encoder.pair("3", ["blue", "large", "star", "right"]),
    Record("4", ("red small circle top",)),
    Record("5", (fake_encoder.picture(["red", "small", "circle", "top"], 3),)),
    Record("6", (np.arange(5, dtype=np.uint16),)),
    fake_encoder.pair("7", ["red", "small", "square", "top"]),
]
QUERY = "red small circle top"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return banked(tmp_path_factory.mktemp("bank"), PAIRS)


def test_without_limits_the_most_relevant_are_chosen_in_order(made):
    _, ids = search.Flat(made).search(FAKE.texts([QUERY]), 8)
    assert chosen(made, QUERY, 7, FREE) == [i for i in ids[0].tolist() if i != 6]
    assert chosen(made, QUERY, 3, FREE) == [4, 0, 1]


def test_only_documents_with_both_text_and_picture_are_chosen(made):
    both = dataclasses.replace(FREE, both=True)
    assert chosen(made, QUERY, 8, both) == [0, 1, 2, 7, 3, -1, -1, -1]


def test_a_document_more_similar_than_the_limit_is_passed_over(made):
    scores, ids = search.Flat(made).search(FAKE.texts([QUERY]), 8)
    found = chosen(made, QUERY, 8, dataclasses.replace(FREE, most_score=0.6))
    assert 4 not in found and found[0] >= 0
    assert all(scores[0][ids[0].tolist().index(i)] <= 0.6 for i in found if i >= 0)


def test_what_is_too_much_like_one_chosen_before_is_passed_over(made):
    assert chosen(made, QUERY, 2, dataclasses.replace(FREE, both=True, most_alike=0.95)) == [0, 2]
    vectors = strategy.unit(made.vectors(np.arange(8)))
    diverse = [i for i in chosen(made, QUERY, 8, dataclasses.replace(FREE, most_alike=0.6)) if i >= 0]
    alike = vectors[diverse] @ vectors[diverse].T
    assert len(diverse) > 1 and alike[~np.eye(len(diverse), dtype=bool)].max() <= 0.6


def test_what_was_taken_before_is_not_chosen_again(made):
    assert chosen(made, QUERY, 2, FREE, taken=[4, 0]) == [1, 2] or chosen(made, QUERY, 2, FREE, taken=[4, 0])[0] == 1
    assert 1 not in chosen(made, QUERY, 8, dataclasses.replace(FREE, most_alike=0.95), taken=[0, -1])


def test_a_document_a_query_and_its_copies_are_never_chosen(made):
    own = strategy.Queries(own=np.array([4]))
    assert 4 not in chosen(made, QUERY, 8, FREE, own)
    marks = strategy.Queries(marks=bank.pad([bank.mark(PAIRS[1])]))
    assert 1 not in chosen(made, QUERY, 8, FREE, marks)


def test_a_near_copy_of_the_whole_query_is_passed_over(made):
    """Though its text's score is below the limit, as a document's vector is the mean of two."""
    limited = dataclasses.replace(FREE, most_score=0.95)
    assert {0, 1} <= set(chosen(made, QUERY, 8, limited))
    whole = strategy.Queries(whole=FAKE.documents([PAIRS[0]])[0])
    assert not {0, 1} & set(chosen(made, QUERY, 8, limited, whole))
    assert 2 in chosen(made, QUERY, 8, limited, whole)


def test_a_copy_of_a_held_out_document_is_never_chosen(tmp_path):
    made = banked(tmp_path, PAIRS, [Record("test", ("other words", PAIRS[0].parts[1]))])
    assert set(chosen(made, QUERY, 8, FREE)) == {4, 1, 5, 2, 7, 3, -1}


def test_copies_of_each_other_are_not_chosen_together(tmp_path):
    seen = fake_encoder.picture(["red", "small", "circle", "top"])
    twins = [Record("a", ("red", seen)), Record("b", ("blue", seen))]
    made = banked(tmp_path, [*twins, PAIRS[3]])
    assert sorted(chosen(made, QUERY, 3, FREE)) in ([-1, 0, 2], [-1, 1, 2])


# ---------------------------------------------------------------------------------------------------------------- leaks


EXACT, NEARLY = [f"test{i}" for i in range(5)], [f"test{i}" for i in range(5, 9)]
"""Documents of the test split of which the bank has copies."""


def seeded(rng):
    """Return splits with exact copies, near copies and copies of held-out documents among them."""
    train = [fake_encoder.pair(f"train{i}", fake_encoder.some(rng), i) for i in range(60)]
    more = [fake_encoder.pair(f"more{i}", fake_encoder.some(rng), 60 + i) for i in range(20)]
    test = [fake_encoder.pair(f"test{i}", fake_encoder.some(rng), 100 + i) for i in range(12)]
    exact = [dataclasses.replace(record, key=f"{record.key} again") for record in train[:10]]
    renamed = [Record(f"{r.key} renamed", ("another caption", r.parts[1])) for r in train[10:20]]
    near = [fake_encoder.pair(f"{r.key} nearly", r.parts[0].split(), 200) for r in train[20:30]]
    leaked = [dataclasses.replace(record, key=f"{record.key} leaked") for record in test[:5]]
    nearly = [fake_encoder.pair(f"{r.key} nearly", r.parts[0].split(), 201) for r in test[5:9]]
    return {"train": [*train, *exact, *renamed, *near, *leaked], "more": [*more, *nearly], "test": test}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder, settings = tmp_path_factory.mktemp("world"), configs.Bank(splits=("train", "more"), shard=33)
    found = fake_encoder.write(folder / "prepared", seeded(np.random.default_rng(0)))
    everything = [*found["train"], *found["more"]]
    for shard in bank.plan(folder / "prepared", folder / "bank", settings):
        some = found[shard.split][shard.first : shard.stop]
        bank.write(folder / "bank", shard, encoder.embed(FAKE, iter(some)))
    bank.finish(folder / "prepared", folder / "bank", settings, "fake")
    return found, everything, bank.open(folder / "bank", "fake")


def leaks(world, settings):
    """Return {kind of leak: how often a document received one}; the test compares records, not hashes."""
    found, everything, made = world
    counts = dict.fromkeys(("itself", "copy", "near copy", "copy of test"), 0)
    tested = {record.parts[1].tobytes() for record in found["test"]}
    received = 0
    for split, records in found.items():
        rows = neighbours.find(records, split, 0, made, search.Flat(made), FAKE, settings)
        for record, row in zip(records, rows, strict=True):
            for other in (everything[i] for i in row if i >= 0):
                received += 1
                same_picture = np.array_equal(other.parts[1], record.parts[1])
                counts["itself"] += other.key == record.key
                counts["copy"] += same_picture
                words = sorted(other.parts[0].split()) == sorted(record.parts[0].split())
                counts["near copy"] += words and np.array_equal(
                    np.sort(other.parts[1][0, :, 0]), np.sort(record.parts[1][0, :, 0])
                )
                counts["copy of test"] += other.parts[1].tobytes() in tested
    return counts, received / sum(map(len, found.values()))


def test_no_document_ever_receives_itself_a_copy_or_a_held_out_document(world):
    counts, mean = leaks(world, configs.Neighbours())
    assert counts == {"itself": 0, "copy": 0, "near copy": 0, "copy of test": 0}
    assert mean > 3.5  # and yet there are enough


def test_without_the_limits_near_copies_would_be_received_and_exact_ones_are_still_not(world):
    counts, _ = leaks(world, configs.Neighbours(most_score=1.0, most_alike=1.0, both=False))
    assert counts["near copy"] > 20
    assert counts["itself"] == counts["copy"] == counts["copy of test"] == 0


def test_near_copies_of_held_out_documents_are_kept_from_these_alone_and_exact_ones_from_everybody(world):
    """A near copy has other pixels and so other marks; what it is near to is known only where that is the query."""
    found, everything, made = world
    received = {}
    for split, records in found.items():
        rows = neighbours.find(records, split, 0, made, search.Flat(made), FAKE, configs.Neighbours())
        for record, row in zip(records, rows, strict=True):
            received[record.key] = {everything[i].key for i in row if i >= 0}
    nearly, leaked = {f"{key} nearly" for key in NEARLY}, {f"{key} leaked" for key in EXACT}
    assert nearly | leaked <= {record.key for record in everything}
    assert not any(f"{key} nearly" in received[key] for key in NEARLY)
    assert nearly & set.union(*received.values()) and not leaked & set.union(*received.values())


@pytest.mark.parametrize("settings", [configs.Neighbours(), dataclasses.replace(FREE, candidates=200)])
def test_memory_asked_with_a_held_out_caption_never_returns_an_exact_copy_but_a_near_one(world, settings):
    found, everything, made = world
    texts = [record.parts[0] for record in found["test"]]
    _, nearest = search.Flat(made).search(FAKE.texts(texts), 10)
    opened = memory.Memory(made.folder.parent, made, search.Flat(made), FAKE, settings, 2)
    answers = opened.find(texts=texts, count=len(made))
    for record, near, answer in zip(found["test"], nearest, answers, strict=True):
        before, keys = {everything[i].key for i in near}, {one.key for one in answer}
        exact, nearly = f"{record.key} leaked", f"{record.key} nearly"
        assert (exact in before, nearly in before) == (record.key in EXACT, record.key in NEARLY)
        assert keys and not any(key.endswith(" leaked") for key in keys)
        assert (nearly in keys) == (record.key in NEARLY)  # a caption alone does not tell whose copy it would be


def test_the_dropout_belongs_to_the_document_and_not_to_its_place(world):
    found, _, made = world
    arguments = made, search.Flat(made), FAKE, configs.Neighbours(dropout=0.5)
    forth = neighbours.find(found["test"], "test", 0, *arguments)
    back = neighbours.find(found["test"][::-1], "test", 0, *arguments)
    # of copies, whose vectors are equal, rounding decides which one it is: a product's last bit depends on the place
    assert np.array_equal(made.vectors(forth), made.vectors(back[::-1]))
    other = neighbours.find(found["test"], "test", 0, *arguments[:3], configs.Neighbours(dropout=0.5, seed=1))
    assert not np.array_equal(forth, other)


def test_a_query_with_no_text_left_finds_nothing_by_text_and_still_by_picture(world):
    found, _, made = world
    rows = neighbours.find(found["test"], "test", 0, made, search.Flat(made), FAKE, configs.Neighbours(dropout=1.0))
    assert (rows[:, 2:] == -1).all()
    assert (rows[:, :2] >= 0).all()


def test_a_text_alone_finds_by_text_and_a_picture_alone_by_picture(world):
    _, _, made = world
    records = [Record("a", ("red small",)), Record("b", (fake_encoder.picture(fake_encoder.WORDS[:4], 99),))]
    rows = neighbours.find(records, "test", 0, made, search.Flat(made), FAKE, configs.Neighbours(dropout=0.0))
    assert ((rows >= 0) == [[False, False, True, True], [True, True, False, False]]).all()
