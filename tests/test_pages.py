"""Laws of pages: a document as Markdown, its pictures beside it."""

import re

import numpy as np
import pytest
from PIL import Image

from cm3jax import pages, provenance
from cm3jax.types import UserError

MODEL = provenance.Model("run", 7, "0123456789abcdef")
PICTURES = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)


def test_a_page_has_its_parts_in_order_and_its_pictures_beside_it(tmp_path):
    parts = ["first\n", PICTURES[0], "", "second\n\nthird", PICTURES[1]]
    path = pages.write(tmp_path / "new", parts, provenance.Made(MODEL, "a red / circle", 3, 0, {}))
    blocks = path.read_text().rstrip("\n").split("\n\n")
    assert [block for block in blocks if not block.startswith("!")] == ["first", "second", "third"]
    shown = [re.fullmatch(r"!\[picture (\d)\]\((.*)\)", blocks[i]).groups() for i in (1, 4)]
    assert [n for n, _ in shown] == ["1", "2"]
    for (_, name), wanted in zip(shown, PICTURES, strict=True):
        with Image.open(path.parent / name) as found:
            assert np.array_equal(np.asarray(found), wanted) and found.info["prompt"] == "a red / circle"


def test_a_picture_that_was_given_is_not_said_to_be_drawn(tmp_path):
    made = provenance.Made(MODEL, "a circle", 3, 0, {})
    path = pages.write(tmp_path, [PICTURES[0], "what is this?", PICTURES[1]], made, given=1)
    assert not Image.open(tmp_path / f"{path.stem}-1.png").info
    assert provenance.read(tmp_path / f"{path.stem}-2.png")["source"] == "trainedAlgorithmicMedia"


def test_other_settings_give_another_page(tmp_path):
    made = [provenance.Made(MODEL, "x", seed, 0, how) for seed in (0, 1) for how in ({}, {"top_k": 2})]
    paths = {pages.write(tmp_path, ["x"], one) for one in made}
    assert len(paths) == 4


def test_a_page_that_cannot_be_written_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another folder with --out"):
        pages.write(tmp_path / "file", ["x"], provenance.Made(MODEL, "x", 0, 0, {}))
