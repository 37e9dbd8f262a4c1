import pickle

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from cm3jax.data import tokens
from cm3jax.types import UserError


def documents(count, seed=0):
    rng = np.random.default_rng(seed)
    return [(f"k{seed}-{i}", rng.integers(0, 65536, rng.integers(0, 9)).astype(np.uint16)) for i in range(count)]


@given(st.lists(st.lists(st.integers(0, 65535), max_size=5), max_size=7), st.integers(1, 3))
def test_documents_come_back_from_any_number_of_shards(tmp_path_factory, ids, shards):
    folder = tmp_path_factory.mktemp("tokens")
    pairs = [(f"ключ {i}", np.array(x, np.uint16)) for i, x in enumerate(ids)]
    for shard in range(shards):
        tokens.write(folder, "train", pairs[shard::shards], shard, shards)
    found = tokens.Tokens(folder, "train")
    expected = [pair for shard in range(shards) for pair in pairs[shard::shards]]
    assert len(found) == len(ids) and found.keys() == [key for key, _ in expected]
    assert all(np.array_equal(found[i], x) and found[i].dtype == np.uint16 for i, (_, x) in enumerate(expected))
    assert found.lengths.tolist() == [len(x) for _, x in expected]


def test_a_part_of_a_document_is_read_alone(tmp_path):
    tokens.write(tmp_path, "train", [("a", np.arange(5)), ("b", np.arange(10, 20))])
    found = tokens.Tokens(tmp_path, "train")
    assert found.read(1, 3, 6).tolist() == [13, 14, 15]
    assert found.read(0, 3, 99).tolist() == [3, 4] and found.read(0, 7, 9).tolist() == []


def test_writing_continues_by_shard(tmp_path):
    tokens.write(tmp_path, "train", documents(3), 0, 3)
    tokens.write(tmp_path, "train", documents(3), 2, 3)
    (tmp_path / "train-00001-of-00003.ids.partial.npy").write_bytes(b"half")  # as a killed run leaves it
    assert tokens.written(tmp_path, "train", 3) == [0, 2]
    with pytest.raises(UserError, match="2 files of"):
        tokens.Tokens(tmp_path, "train")
    tokens.write(tmp_path, "train", documents(3), 1, 3)
    assert tokens.written(tmp_path, "train", 3) == [0, 1, 2] and len(tokens.Tokens(tmp_path, "train")) == 9
    assert not list(tmp_path.glob("*.partial.npy"))


def test_splits_are_told_apart(tmp_path):
    for split in ("train", "train-extra", "validation"):
        tokens.write(tmp_path, split, documents(2, len(split)))
    assert tokens.splits(tmp_path) == ["train", "train-extra", "validation"]
    assert tokens.Tokens(tmp_path, "train").keys() == ["k5-0", "k5-1"]
    with pytest.raises(UserError, match=r"no split 'test' \(found: train, train-extra, validation\)"):
        tokens.Tokens(tmp_path, "test")


def test_a_copy_in_another_process_maps_the_files_again(tmp_path):
    tokens.write(tmp_path, "train", [("a", np.zeros(100_000, np.uint16))])
    copied = pickle.dumps(tokens.Tokens(tmp_path, "train"))
    assert len(copied) < 1000 and len(pickle.loads(copied)[0]) == 100_000


def test_a_document_that_is_not_there_is_refused(tmp_path):
    tokens.write(tmp_path, "train", documents(2))
    for i in (-1, 2):
        with pytest.raises(IndexError, match="has 2"):
            tokens.Tokens(tmp_path, "train")[i]


@pytest.mark.parametrize("kind", ["ids", "lengths"])
def test_a_cut_file_is_named(tmp_path, kind):
    tokens.write(tmp_path, "train", documents(9))
    path = tmp_path / f"train-00000-of-00001.{kind}.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{kind}.npy.*encode again"):
        tokens.Tokens(tmp_path, "train")


def test_lengths_of_other_ids_are_noticed(tmp_path):
    tokens.write(tmp_path, "train", documents(9))
    np.save(tmp_path / "train-00000-of-00001.lengths.npy", np.array([3], np.int32))
    with pytest.raises(UserError, match="disagree"):
        tokens.Tokens(tmp_path, "train")


def test_blocks_are_all_ids_in_order(tmp_path):
    documents = [(str(i), np.arange(i, i + 5)) for i in range(6)]
    for i in range(2):
        tokens.write(tmp_path, "train", documents[i::2], i, 2)
    found = list(tokens.Tokens(tmp_path, "train").blocks(4))
    assert max(map(len, found)) == 4
    assert np.concatenate(found).tolist() == [x for i in range(2) for _, ids in documents[i::2] for x in ids]
