"""Folders of pictures: what is found, in what order, and that reading ahead is bounded."""

import threading
import time

import numpy as np
import pytest
from PIL import Image

from cm3jax.evaluate import picture_files, tables
from cm3jax.types import UserError


def draw(path, seed=0, side=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)).save(path)
    return path


def test_pictures_are_found_below_the_folder_in_the_order_of_their_names(tmp_path):
    for name in ("b.png", "a/z.JPG", "a.webp", ".hidden/c.png", ".c.png"):
        draw(tmp_path / name)
    (tmp_path / "metadata.jsonl").write_text("")
    assert [file.name for file in picture_files.found(tmp_path)] == ["a.webp", "a/z.JPG", "b.png"]


def test_a_folder_without_pictures_is_said(tmp_path):
    with pytest.raises(UserError, match="no picture in it; files that end in"):
        picture_files.found(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        picture_files.found(tmp_path / "nothing")


def test_pairs_have_one_name_whatever_the_ending(tmp_path):
    for name in ("x/a.png", "x/b.png", "y/a.jpg", "y/b.png"):
        draw(tmp_path / name)
    x, y = (picture_files.found(tmp_path / name) for name in "xy")
    assert [(a.name, b.name) for a, b in picture_files.pairs(x, y)] == [("a.png", "a.jpg"), ("b.png", "b.png")]
    with pytest.raises(UserError, match=r"b.png: has no counterpart among the pictures \(1 such of 2\)"):
        picture_files.pairs(x[:1], y)
    draw(tmp_path / "x/a.jpg")
    with pytest.raises(UserError, match="two are named 'a'"):
        picture_files.pairs(picture_files.found(tmp_path / "x"), y)


def test_a_broken_picture_is_named(tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(UserError, match=r"a.png': not a picture.*; remove it, or make it again"):
        picture_files.read(picture_files.found(tmp_path)[0])


def test_what_is_read_ahead_is_in_order_and_bounded():
    made, used, most, lock = 0, 0, 0, threading.Lock()

    def work(i):
        nonlocal made, most
        time.sleep(0.002 * (i % 3))  # so that later ones are ready before earlier ones
        with lock:
            made += 1
            most = max(most, made - used)
        return i

    for i, found in enumerate(picture_files.ahead(range(101), work, 3)):
        assert found == i
        with lock:
            used += 1
    assert used == 101 and most <= 3 * picture_files.AHEAD + 1


def test_an_error_in_a_thread_reaches_who_reads():
    def work(i):
        if i == 7:
            raise UserError("seven")
        return i

    with pytest.raises(UserError, match="seven"):
        list(picture_files.ahead(range(100), work, 2))


# --------------------------------------------------------------------------------------------------------------- tables


class Work:
    """Mean colours of pictures; counts what it was asked for."""

    def __init__(self, stop=None):
        self.asked, self.stop = [], stop

    def __call__(self, rows):
        if len(self.asked) == self.stop:
            raise KeyboardInterrupt
        self.asked.append(len(rows))
        found = [picture_files.read(row[0]) for row in rows]
        return np.array([x.mean((0, 1)) for x, _ in found], np.float32), [digest for _, digest in found]


def rows(folder):
    return [(file,) for file in picture_files.found(folder)]


@pytest.fixture
def folder(tmp_path):
    for i in range(11):
        draw(tmp_path / "pictures" / f"{i:02d}.png", i)
    return tmp_path / "pictures"


def test_an_interrupted_table_continues_at_the_part_where_it_was(folder, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        tables.make(tmp_path / "t", rows(folder), 3, Work(stop=2), "t", 4, quiet=True)
    again, whole = Work(), Work()
    found = tables.make(tmp_path / "t", rows(folder), 3, again, "t", 4, quiet=True)
    wanted = tables.make(tmp_path / "u", rows(folder), 3, whole, "t", 4, quiet=True)
    assert again.asked == [3] and whole.asked == [4, 4, 3]
    np.testing.assert_array_equal(found.all(), wanted.all())
    assert found.data == wanted.data and found.all().shape == (11, 3)


def test_only_the_part_of_a_picture_that_has_changed_is_made_again(folder, tmp_path):
    first = tables.make(tmp_path / "t", rows(folder), 3, Work(), "t", 4, quiet=True)
    before = first.all()
    draw(folder / "05.png", 99, 9)
    again = Work()
    second = tables.make(tmp_path / "t", rows(folder), 3, again, "t", 4, quiet=True)
    assert again.asked == [4] and second.data != first.data
    assert list(np.flatnonzero((second.all() != before).any(1))) == [5]


@pytest.mark.parametrize("damage", ["cut", "gone", "text"])
def test_a_damaged_part_is_made_again(folder, tmp_path, damage):
    wanted = tables.make(tmp_path / "t", rows(folder), 3, Work(), "t", 4, quiet=True).all()
    path = tmp_path / "t" / "00001.npy"
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-7] if damage == "cut" else b"text")
    again = Work()
    np.testing.assert_array_equal(tables.make(tmp_path / "t", rows(folder), 3, again, "t", 4, quiet=True).all(), wanted)
    assert again.asked == [4]


def test_the_data_are_known_by_their_content_not_by_their_names(folder, tmp_path):
    first = tables.make(tmp_path / "t", rows(folder), 3, Work(), "t", 4, quiet=True)
    (folder / "03.png").rename(folder / "renamed.png")
    assert tables.make(tmp_path / "u", rows(folder), 3, Work(), "t", 4, quiet=True).data == first.data


def test_a_figure_that_is_no_number_is_refused(folder, tmp_path):
    def bad(rows):
        return np.full((len(rows), 3), np.nan, np.float32), [""] * len(rows)

    with pytest.raises(UserError, match=r"00.png or one of the next 4 pictures gives what is no number"):
        tables.make(tmp_path / "t", rows(folder), 3, bad, "t", 4, quiet=True)
