import dataclasses
import os
import resource

import fake_encoder
import numpy as np
import pytest

from cm3jax import config as configs
from cm3jax.data import neighbours as files
from cm3jax.data import prepare_shard, shards
from cm3jax.retrieval import bank, encoder, neighbours, search
from cm3jax.types import Record, UserError

FAKE = fake_encoder.Fake()


def records(rng, split, count):
    """Return pairs, and among them a text, a picture, a page of two pictures, and codes alone."""
    found = [fake_encoder.pair(f"{split}{i}", fake_encoder.some(rng), i) for i in range(count)]
    a, b = fake_encoder.picture(fake_encoder.some(rng), 1), fake_encoder.picture(fake_encoder.some(rng), 2)
    found[1] = Record(f"{split}-text", ("red circle",), source="elsewhere é", license="")
    found[2] = Record(f"{split}-picture", (a,), license="CC BY")
    found[3] = Record(f"{split}-page", (a, "small", b, "large"))
    found[4] = Record(f"{split}-codes", (np.arange(5, dtype=np.uint16),))
    return found


def make(prepared, out, settings, which=None, made_by=FAKE):
    """Write the shards that are missing (of them those in `which`), and the index if they are all there."""
    for number, shard in enumerate(bank.missing(prepared, out, settings)):
        if which is None or number in which:
            reader = shards.Reader(prepared, shard.split)
            bank.write(out, shard, encoder.embed(made_by, (reader[i] for i in range(shard.first, shard.stop))))
    return bank.finish(prepared, out, settings, made_by.identity)


@pytest.fixture
def prepared(tmp_path):
    rng = np.random.default_rng(0)
    splits = {"train": records(rng, "train", 23), "more": records(rng, "more", 11), "test": records(rng, "test", 7)}
    return tmp_path / "prepared", fake_encoder.write(tmp_path / "prepared", splits)


SETTINGS = configs.Bank(splits=("train", "more"), shard=7)


def test_every_document_has_its_vector_flags_marks_and_origin(prepared, tmp_path):
    folder, found = prepared
    assert make(folder, tmp_path / "bank", SETTINGS)
    made, everything = bank.open(tmp_path / "bank", "fake"), [*found["train"], *found["more"]]
    assert len(made) == 34
    assert made.documents == {"train": 23, "more": 11}
    assert [made.first(split) for split in ("train", "more", "test")] == [0, 23, -1]
    ids = np.arange(34).reshape(2, 17)
    vectors, text, image = FAKE.documents(everything)
    assert np.array_equal(made.vectors(ids).reshape(34, -1), vectors.astype(np.float16).astype(np.float32))
    assert np.array_equal(made.flags(ids).reshape(-1), text * bank.TEXT + image * bank.IMAGE)
    marks, real = made.marks(ids)
    assert real.sum() == 34  # two pages hold two pictures, and two documents nothing but codes
    for i, record in enumerate(everything):
        place, own = made.place(i), (i // 17, i % 17)
        assert (place.key, place.source, place.license) == (record.key, record.source, record.license)
        assert (place.split, place.index) == (("train", i) if i < 23 else ("more", i - 23))
        assert set(marks[own][real[own]]) == set(bank.mark(record))


def test_an_id_of_minus_one_is_nothing(prepared, tmp_path):
    make(prepared[0], tmp_path / "bank", SETTINGS)
    made, none = bank.open(tmp_path / "bank"), np.array([-1])
    assert not made.vectors(none).any()
    assert made.flags(none) == [0]
    assert not made.marks(none)[1].any()


def test_a_copy_is_known_by_its_pictures_and_a_text_by_its_words():
    seen = fake_encoder.picture(["red"] * 4)
    assert bank.mark(Record("a", ("x", seen))).tolist() == bank.mark(Record("b", ("y", seen))).tolist()
    assert bank.mark(Record("a", ("x",))).tolist() == [prepare_shard.digest("x")]
    assert bank.mark(Record("a", ("x", seen))).tolist() != bank.mark(Record("a", ("x", seen + np.uint8(1)))).tolist()


def test_building_continues_by_shard_to_the_same_bytes(prepared, tmp_path):
    make(prepared[0], tmp_path / "whole", SETTINGS)
    assert not make(prepared[0], tmp_path / "parts", SETTINGS, which=(0, 3))
    (tmp_path / "parts" / "train-00001-of-00004.facts.npy").write_bytes(b"half")  # a kill in the midst of a shard
    assert [s.number for s in bank.missing(prepared[0], tmp_path / "parts", SETTINGS)] == [1, 2, 0, 1]
    assert make(prepared[0], tmp_path / "parts", SETTINGS)
    read = lambda folder: {p.name: p.read_bytes() for p in folder.iterdir()}  # noqa: E731
    assert read(tmp_path / "parts") == read(tmp_path / "whole")


def test_a_finished_split_keeps_its_shards_whatever_their_size_would_be_now(prepared, tmp_path):
    first, out = configs.Bank(splits=("train",), shard=7), tmp_path / "bank"
    make(prepared[0], out, first)
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("train*")}
    smaller = dataclasses.replace(SETTINGS, shard=3)
    assert not bank.missing(prepared[0], out, dataclasses.replace(first, shard=3))
    assert [(s.split, s.count) for s in bank.missing(prepared[0], out, smaller)] == [("more", 4)] * 4
    make(prepared[0], out, smaller)
    assert {p.name: p.stat().st_mtime_ns for p in out.glob("train*")} == before
    mixed, made = bank.open(out), make(prepared[0], tmp_path / "alike", SETTINGS) and bank.open(tmp_path / "alike")
    assert np.array_equal(mixed.vectors(np.arange(34)), made.vectors(np.arange(34)))
    assert [mixed.place(i) for i in range(34)] == [made.place(i) for i in range(34)]
    (out / "train-00001-of-00004.marks.npy").unlink()
    assert [tuple(s) for s in bank.missing(prepared[0], out, smaller)] == [("train", 1, 4, 7, 14)]


def test_a_bank_of_more_files_than_a_process_may_have_open_is_opened(prepared, tmp_path):
    make(prepared[0], tmp_path / "bank", SETTINGS)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 20, hard))
        assert len(bank.open(tmp_path / "bank").arrays["marks"]) == 6
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_further_split_adds_files_and_changes_none(prepared, tmp_path):
    first, out = configs.Bank(splits=("train",), shard=7), tmp_path / "bank"
    make(prepared[0], out, first)
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("train*")}
    assert {shard.split for shard in bank.missing(prepared[0], out, SETTINGS)} == {"more"}
    others = {m for split in ("more", "test") for record in prepared[1][split] for m in bank.mark(record)}
    assert set(bank.open(out).held_out) == others
    make(prepared[0], out, SETTINGS)
    assert {p.name: p.stat().st_mtime_ns for p in out.glob("train*")} == before
    made = bank.open(out)
    assert len(made) == 34
    assert set(made.held_out) == {m for record in prepared[1]["test"] for m in bank.mark(record)}


def test_held_out_are_the_splits_that_the_setting_names(prepared, tmp_path):
    settings = dataclasses.replace(SETTINGS, splits=("train",), held_out=("test",))
    assert make(prepared[0], tmp_path / "bank", settings)
    assert set(bank.open(tmp_path / "bank").held_out) == {
        m for record in prepared[1]["test"] for m in bank.mark(record)
    }
    wrong = dataclasses.replace(settings, held_out=("exam",))
    with pytest.raises(UserError, match="no split 'exam' in .*, only more, test, train"):
        make(prepared[0], tmp_path / "bank", wrong)
    with pytest.raises(ValueError, match="must be without bank.splits"):
        dataclasses.replace(settings, held_out=("train",))


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def damage(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", [*(f"train-00002-of-00004.{kind}.npy" for kind in bank.KINDS), bank.HELD_OUT])
@pytest.mark.parametrize(
    "harm, words",
    [(cut, "bytes instead of"), (damage, "other bytes than were written"), (lambda p: p.unlink(), "missing")],
)
def test_a_broken_file_is_named_on_opening_and_made_again(prepared, tmp_path, name, harm, words):
    make(prepared[0], tmp_path / "bank", SETTINGS)
    before = (tmp_path / "bank" / name).read_bytes()
    harm(tmp_path / "bank" / name)
    with pytest.raises(UserError, match=rf"1 of 25 files are wrong: {name} \(.*{words}"):
        bank.open(tmp_path / "bank")
    broken = [] if name == bank.HELD_OUT else [("train", 2)]  # that one belongs to no shard
    assert [(s.split, s.number) for s in bank.missing(prepared[0], tmp_path / "bank", SETTINGS)] == broken
    make(prepared[0], tmp_path / "bank", SETTINGS)
    assert len(bank.open(tmp_path / "bank")) == 34 and (tmp_path / "bank" / name).read_bytes() == before


def test_a_bank_of_another_encoder_is_refused(prepared, tmp_path):
    make(prepared[0], tmp_path / "bank", SETTINGS, made_by=fake_encoder.Fake("older"))
    with pytest.raises(UserError, match="made with encoder older, and the retriever here is fake.*--redo bank"):
        bank.open(tmp_path / "bank", "fake")


def test_a_bank_that_is_not_finished_is_refused(prepared, tmp_path):
    make(prepared[0], tmp_path / "bank", SETTINGS, which=(0,))
    with pytest.raises(UserError, match="not there, or not finished"):
        bank.open(tmp_path / "bank")


@pytest.mark.parametrize("text", ["{", "[]", '{"encoder": "a"}', '{"encoder": "a", "shards": []}'])
def test_a_broken_index_is_a_clear_error(tmp_path, text):
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(UserError, match=r"index.json': not readable"):
        bank.open(tmp_path)


def test_an_empty_bank_is_refused(prepared, tmp_path):
    with pytest.raises(UserError, match="no split 'none'.*found: more, test, train"):
        bank.plan(prepared[0], tmp_path / "bank", configs.Bank(splits=("none",)))
    with shards.Writer(tmp_path / "empty", "train"):
        pass
    with pytest.raises(UserError, match="no document in them"):
        bank.plan(tmp_path / "empty", tmp_path / "bank", configs.Bank())


def test_vectors_that_are_no_numbers_are_refused(prepared, tmp_path):
    class Broken(fake_encoder.Fake):
        def documents(self, records):
            vectors, *rest = super().documents(records)
            return vectors * np.nan, *rest

    with pytest.raises(UserError, match="vectors that are no numbers"):
        make(prepared[0], tmp_path / "bank", SETTINGS, made_by=Broken())


def test_records_that_became_fewer_are_noticed(prepared, tmp_path):
    (shard, *_), reader = bank.plan(prepared[0], tmp_path / "bank", SETTINGS), shards.Reader(prepared[0], "train")
    with pytest.raises(UserError, match="5 of 7 documents"):
        bank.write(tmp_path / "bank", shard, encoder.embed(FAKE, (reader[i] for i in range(5))))
    assert bank.missing(prepared[0], tmp_path / "bank", SETTINGS)[0] == shard


def test_several_hosts_make_what_one_does(prepared, tmp_path):
    make(prepared[0], tmp_path / "whole", SETTINGS)
    assert not make(prepared[0], tmp_path / "shared", SETTINGS, which=range(1, 9, 2))
    assert make(prepared[0], tmp_path / "shared", SETTINGS)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "shared" / path.name).read_bytes()


def test_neighbours_of_a_bank_stand_in_shards_like_the_records(prepared, tmp_path):
    folder, found = prepared
    make(folder, tmp_path / "bank", SETTINGS)
    made, out, settings = bank.open(tmp_path / "bank"), tmp_path / "neighbours", configs.Neighbours(most_score=1.0)
    arguments = folder, out, made, search.Flat(made), FAKE, settings
    count = neighbours.make(*arguments, neighbours.missing(folder, out), batch=3)
    assert count == 41
    assert sorted(p.name for p in out.glob("*.npy")) == [
        f"{split}-0000{i}-of-00002.npy" for split in ("more", "test", "train") for i in (0, 1)
    ]
    rows = files.Neighbours(out, "train")
    assert len(rows) == 23
    assert rows[0].shape == (4,) and rows[0].dtype == np.int32
    reader = shards.Reader(folder, "train")
    assert [reader[i].key for i in range(23)] == [record.key for record in found["train"]]
    for i in (0, 7, 12, 22):  # whatever the batch that a document stood in
        alone = neighbours.find([reader[i]], "train", i, made, search.Flat(made), FAKE, settings)
        assert np.array_equal(rows[i], alone[0])
    assert not neighbours.missing(folder, out)
    (out / "test-00001-of-00002.npy").unlink()
    assert neighbours.missing(folder, out) == [("test", 1, 2)]
    with pytest.raises(UserError, match=r"split 'test' has 1 files of \[2\] shards"):
        files.Neighbours(out, "test")
