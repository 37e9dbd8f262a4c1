"""Laws of records on disk."""

import pickle

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from cm3jax.data import shards
from cm3jax.types import Record, Region, UserError


def same(a: Record, b: Record) -> bool:
    """Compare two records, arrays included."""
    parts = len(a.parts) == len(b.parts)
    for x, y in zip(a.parts, b.parts, strict=True):
        parts &= type(x) is type(y) and (x == y if isinstance(x, str) else x.dtype == y.dtype and np.array_equal(x, y))
    rest = ("key", "fields", "regions", "group", "license", "source", "split")
    return parts and all(getattr(a, name) == getattr(b, name) for name in rest)


def record(i: int = 0) -> Record:
    rng = np.random.default_rng(i)
    return Record(
        key=f"key {i}",
        parts=("before", rng.integers(0, 256, (7, 5, 3), np.uint8), "", rng.integers(0, 65536, 11, np.uint16)),
        fields={"captions": ["a", "b"], "nested": {"x": [1, 2.5, None, True]}, "number": -(2**40)},
        regions=(Region(1, "face", (0.1, 0.2, 0.3, 0.4), "Ada"),),
        group="g",
        license="CC0-1.0",
        source="a book",
        split="train",
    )


def write(folder, count: int, shard_count: int = 1, split: str = "train"):
    with shards.Writer(folder, split, shard_count) as writer:
        for i in range(count):
            writer.write(record(i))


def test_a_record_comes_back_exactly():
    assert same(shards.decode(shards.encode(record())), record())


@hypothesis.given(st.text(st.characters(exclude_categories=["Cs"])), st.binary(max_size=40))
def test_any_text_and_any_codes_come_back(text, data):
    codes = np.frombuffer(data[: len(data) // 2 * 2], "<u2").astype(np.uint16)
    written = Record(key=text, parts=(text, codes))
    assert same(shards.decode(shards.encode(written)), written)


@pytest.mark.parametrize("shape", [(1, 1), (1, 31), (31, 1), (64, 64)])
@pytest.mark.parametrize("values", [(0, 256), (7, 8), (254, 256)])
def test_pictures_of_any_size_come_back_exactly(shape, values):
    picture = np.random.default_rng(0).integers(*values, (*shape, 3), np.uint8)
    assert np.array_equal(shards.decode(shards.encode(Record("", (picture,)))).parts[0], picture)


@pytest.mark.parametrize("part", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros(4, np.int32)])
def test_a_part_of_another_type_is_refused(part):
    with pytest.raises(TypeError, match="must be uint8"):
        shards.encode(Record("", (part,)))


@pytest.mark.parametrize("count, shard_count", [(0, 1), (1, 1), (7, 1), (7, 3), (2, 5)])
def test_every_record_is_found_once_whatever_the_shards(tmp_path, count, shard_count):
    write(tmp_path, count, shard_count)
    reader = shards.Reader(tmp_path, "train")
    assert len(reader) == count
    assert sorted(r.key for r in reader) == sorted(record(i).key for i in range(count))


def test_one_shard_keeps_the_order_and_random_access_agrees(tmp_path):
    write(tmp_path, 13)
    reader = shards.Reader(tmp_path, "train")
    assert all(same(reader[i], record(i)) for i in (12, 0, 5, 5))
    assert same(reader[-1], record(12))
    with pytest.raises(IndexError, match="record 13 of 13"):
        reader[13]


def test_a_reader_survives_pickling(tmp_path):
    write(tmp_path, 5, 2)
    reader = shards.Reader(tmp_path, "train")
    assert same(pickle.loads(pickle.dumps(reader))[3], reader[3])


def test_a_reader_keeps_few_files_open(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_OPEN", 2)
    write(tmp_path, 20, 5)
    reader = shards.Reader(tmp_path, "train")
    assert len({reader[i].key for i in list(range(20)) * 2}) == 20
    assert len(reader._readers) == 2


def test_splits_are_listed_and_kept_apart(tmp_path):
    write(tmp_path, 3, split="train")
    write(tmp_path, 2, split="composition")
    assert shards.splits(tmp_path) == ["composition", "train"]
    with pytest.raises(UserError, match="no split 'test'; found: composition, train"):
        shards.Reader(tmp_path, "test")


def test_a_missing_folder_and_a_missing_shard_are_named(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        shards.Reader(tmp_path / "none", "train")
    write(tmp_path, 6, 3)
    (tmp_path / shards.name("train", 1, 3)).unlink()
    with pytest.raises(UserError, match="split 'train' has 2 of 3 shards"):
        shards.Reader(tmp_path, "train")


def test_damage_is_noticed_and_never_read_as_data(tmp_path):
    write(tmp_path, 50)
    path = tmp_path / shards.name("train", 0, 1)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cut short"):
        shards.Reader(tmp_path, "train")
    flipped = bytearray(whole)
    flipped[whole.index(b"key 7") + 3] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(UserError, match="damaged"):
        [*shards.Reader(tmp_path, "train")]


def test_texts_are_read_without_the_pictures(monkeypatch):
    record = Record("k", ("one", np.zeros((4, 4, 3), np.uint8), "two", np.array([1, 2], np.uint16)), {"a": {1: "x"}})
    data = shards.encode(record)
    monkeypatch.setattr(shards, "_part_in", lambda *_: pytest.fail("decoded a picture"))
    assert shards.texts(data) == ["one", "two"]
