"""Laws of feature images that are made of any picture."""

import numpy as np
import pytest

from cm3jax.tasks import features
from cm3jax.types import UserError


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
