"""Laws of the neighbours' files."""

import pickle

import numpy as np
import pytest

from cm3jax.data import neighbours
from cm3jax.types import UserError


@pytest.fixture
def folder(tmp_path):
    found = np.arange(39, dtype=np.int32).reshape(13, 3)
    for shard, rows in enumerate((found[:5], found[5:5], found[5:])):
        neighbours.write(tmp_path, "train", rows, shard, 3)
    neighbours.write(tmp_path, "test", found[:2])
    return tmp_path


def test_documents_are_numbered_through_the_shards(folder):
    found = neighbours.Neighbours(folder, "train")
    assert len(found) == 13 and found.pool == 3
    assert np.array_equal(np.stack([found[i] for i in range(13)]).ravel(), np.arange(39))
    for start in range(14):
        for end in range(start, 14):
            assert np.array_equal(found.read(start, end).ravel(), np.arange(3 * start, 3 * end))
    assert neighbours.splits(folder) == ["test", "train"] and neighbours.written(folder, "train", 3) == [0, 1, 2]


def test_a_copy_for_a_worker_is_small_and_reads_the_same(folder):
    copied = pickle.dumps(neighbours.Neighbours(folder, "train"))
    assert len(copied) < 500 and pickle.loads(copied)[7].tolist() == [21, 22, 23]


def test_a_document_out_of_range_is_an_error(folder):
    for i in (-1, 13):
        with pytest.raises(IndexError, match="has neighbours of 13"):
            neighbours.Neighbours(folder, "train")[i]


def test_what_is_missing_or_broken_is_one_clear_line(folder):
    with pytest.raises(UserError, match=r"no split 'validation' \(found: test, train\)"):
        neighbours.Neighbours(folder, "validation")
    neighbours.path(folder, "train", 1, 3).unlink()
    with pytest.raises(UserError, match=r"has 2 files of \[3\] shards"):
        neighbours.Neighbours(folder, "train")
    file = neighbours.path(folder, "test", 0, 1)
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UserError, match="missing or broken"):
        neighbours.Neighbours(folder, "test")
    np.save(file, np.zeros(3))
    with pytest.raises(UserError, match="must be int32"):
        neighbours.Neighbours(folder, "test")
    with pytest.raises(ValueError, match="must be int32"):
        neighbours.write(folder, "test", np.zeros((2, 3)))
