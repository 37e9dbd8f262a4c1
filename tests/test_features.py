"""Laws of feature images that are made of any picture."""

import json

import numpy as np
import pytest
from PIL import Image

from cm3jax import config as configs
from cm3jax.data import prepare, shards
from cm3jax.tasks import features
from cm3jax.types import ANSWER, UserError


def disc(side=96):
    y, x = np.mgrid[:side, :side] - side / 2
    inside = (x**2 + y**2 < (side / 3) ** 2)[..., None]
    return np.where(inside, np.uint8([215, 25, 35]), np.uint8([245, 245, 245]))


@pytest.mark.parametrize("kind", ["edges", "scribble"])
def test_lines_follow_the_border_of_a_disc_and_nothing_else(kind):
    made = features.make(kind, disc())
    assert made.shape == (96, 96, 3) and made.dtype == np.uint8 and set(np.unique(made)) == {0, 255}
    drawn = made[..., 0] == (255 if kind == "edges" else 0)
    y, x = np.nonzero(drawn)
    radius = np.hypot(x - 48, y - 48)
    assert 120 < drawn.sum() < 900 and np.abs(radius - 32).max() < 4
    angles = np.histogram(np.arctan2(y - 48, x - 48), 24)[0]
    assert (angles > 0).all()  # all around


def test_a_blank_picture_has_no_lines_and_a_scribble_is_thicker_than_edges():
    assert not features.make("edges", np.full((40, 40, 3), 99, np.uint8)).any()
    large = disc(256)
    assert (features.make("scribble", large) == 0).sum() > 2 * (features.make("edges", large) == 255).sum()


def test_a_named_function_makes_what_is_not_made_here(monkeypatch, tmp_path):
    (tmp_path / "my_depth.py").write_text(
        "def make(picture):\n    return 255 - picture\ndef bad(picture):\n    return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert np.array_equal(features.make("depth", disc(), "my_depth:make"), 255 - disc())
    with pytest.raises(UserError, match="'my_depth:bad': gave int for a picture of"):
        features.make("depth", disc(), "my_depth:bad")
    for wrong in ("my_depth:none", "no_such_module:make", "my_depth"):
        with pytest.raises(UserError, match=r"must be package\.module:function"):
            features.make("depth", disc(), wrong)


def test_what_is_not_made_here_is_one_clear_line():
    with pytest.raises(UserError, match="feature 'depth': is not made here; give a file that shows it"):
        features.make("depth", disc())
    with pytest.raises(UserError, match="feature 'smell': no such feature; features: edges, "):
        features.make("smell", disc())


def test_without_scikit_image_the_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "skimage", None)
    with pytest.raises(UserError, match=r"pip install 'cm3jax\[features\]'"):
        features.make("edges", disc())


# ----------------------------------------------------------------------------------------- documents to be trained on


def prepared(tmp_path, feature, picture=None):
    """Prepare a folder of two captioned pictures and a page."""
    root = tmp_path / "pictures"
    root.mkdir()
    for i, side in enumerate((96, 120)):
        Image.fromarray(disc(side) if picture is None else picture).save(root / f"{i}.png")
    rows = [{"file_name": f"{i}.png", "text": f"disc {i}", "split": "train"} for i in range(2)]
    rows += [{"parts": ["a page", {"file_name": "0.png"}, "of text"]}]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = configs.Prepare(source=str(root), resolution=32, workers=1, feature=feature)
    summary = prepare.prepare(settings, tmp_path / "out", progress=False)
    return summary, list(shards.Reader(tmp_path / "out", "train"))


def test_captioned_pictures_become_documents_that_draw_them_from_a_feature(tmp_path):
    summary, found = prepared(tmp_path, "edges")
    assert summary["rejects"] == {"no captioned picture": 1}
    for i, record in enumerate(found):
        words, made, caption, picture = record.parts
        assert words == "Make high quality image from canny edge features" and caption == f"disc {i}"
        assert picture.shape == (32, 32, 3) and np.array_equal(made, features.make("edges", picture))
        assert [(r.part, r.kind, r.label) for r in record.regions] == [(3, ANSWER, "image")]
        assert record.fields == {"task": "edges", "wording": 0, "truth": {}}


def test_a_named_function_makes_them_and_costs_only_the_pictures_that_it_fails_on(tmp_path, monkeypatch):
    (tmp_path / "my_maps.py").write_text(
        "def invert(picture):\n    return 255 - picture\ndef broken(picture):\n    return {}[0]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    _, found = prepared(tmp_path, "normals=my_maps:invert")
    assert all(np.array_equal(record.parts[1], 255 - record.parts[3]) for record in found) and len(found) == 2
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(UserError, match="none of 3 rows is usable; first: metadata.jsonl:1: feature failed"):
        prepared(other, "normals=my_maps:broken")


def test_a_feature_that_nothing_makes_is_one_line_before_any_work(tmp_path):
    for wrong, message in (("depth", "is not made here"), ("smell", "no such feature"), ("hed=os:none", "os:none")):
        with pytest.raises(UserError, match=message):
            prepare.check(configs.Prepare(source="x", feature=wrong))
