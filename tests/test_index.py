import gc
import json
import sys

import numpy as np
import pytest

from cm3jax.data import index, shards, tokens
from cm3jax.types import Record, UserError

FIX = "make it again"


@pytest.fixture
def folder(tmp_path):
    """Records and tokens of two splits; three shards of five records, and one of two."""
    for split, count in (("train", 3), ("test", 1)):
        for shard in range(count):
            tokens.write(tmp_path, split, [(str(i), np.arange(i)) for i in range(5)], shard, count)
        with shards.Writer(tmp_path, split, count) as writer:
            for i in range(5 * count):
                writer.write(Record(str(i), ("a text",)))
    index.write(tmp_path)
    return tmp_path


def test_a_whole_folder_passes_and_its_index_counts_everything(folder):
    found = index.check(folder, FIX)
    assert sorted(found) == ["test", "train"] and len(found["train"]) == 12
    assert found["train"]["train-00001-of-00003.array_record"][1] == 5
    assert found["train"]["train-00002-of-00003.lengths.npy"][1] == 5
    assert found["test"]["test-00000-of-00001.ids.npy"][1] == 10
    assert all(size == (folder / name).stat().st_size for files in found.values() for name, (size, _) in files.items())


def test_many_files_are_looked_at_at_once_whatever_runs_between(tmp_path):
    """As where jax is: its callback of the collector lets other threads run, where numpy reads a header."""
    for shard in range(64):
        np.save(tmp_path / f"train-{shard:05d}-of-00064.ids.npy", np.zeros(shard, np.uint16))
    before, turn = gc.get_threshold(), sys.getswitchinterval()
    gc.callbacks.append(callback := lambda *_: sum(range(50)))
    gc.set_threshold(5)
    sys.setswitchinterval(1e-6)
    try:
        counts = [[count for _, count in index.make(tmp_path)["train"].values()] for _ in range(6)]
    finally:
        gc.callbacks.remove(callback)
        gc.set_threshold(*before)
        sys.setswitchinterval(turn)
    assert counts == [list(range(64))] * 6


def test_what_is_missing_short_or_new_is_named_in_one_line_with_the_fix(folder):
    (folder / "train-00001-of-00003.array_record").unlink()
    cut = folder / "train-00002-of-00003.ids.npy"
    cut.write_bytes(cut.read_bytes()[:-2])
    tokens.write(folder, "test", [("k", np.arange(3))], 1, 2)
    with pytest.raises(UserError) as error:
        index.check(folder, FIX)
    text = str(error.value)
    assert "5 of 16 shard files are wrong: " in text and text.endswith(f" and 2 more; {FIX}") and "\n" not in text
    assert "train-00001-of-00003.array_record (missing)" in text
    size = len(cut.read_bytes())
    assert f"train-00002-of-00003.ids.npy ({size} bytes instead of {size + 2})" in text


@pytest.mark.parametrize("name", ["train-00000-of-00003.array_record", "train-00000-of-00003.lengths.npy"])
def test_a_file_of_the_right_size_with_another_count_is_noticed(folder, name):
    content = json.loads((folder / index.FILE).read_text())
    content["train"][name][1] += 1
    (folder / index.FILE).write_text(json.dumps(content))
    assert index.faults(folder) == {name: "5 items instead of 6"}


@pytest.mark.parametrize("name", ["train-00000-of-00003.array_record", "train-00000-of-00003.ids.npy"])
def test_a_file_of_the_right_size_that_holds_something_else_is_noticed(folder, name):
    (folder / name).write_bytes(bytes((folder / name).stat().st_size))
    assert index.faults(folder) == {name: "unreadable"}


def test_a_folder_without_an_index_is_refused(folder):
    (folder / index.FILE).unlink()
    with pytest.raises(UserError, match=r"no index.json in it.*make the stage again"):
        index.check(folder, FIX)
    (folder / index.FILE).write_text("[1]")
    with pytest.raises(UserError, match="not readable"):
        index.check(folder, FIX)
