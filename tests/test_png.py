import numpy as np
import pytest
from PIL import Image

from cm3jax import config, png, provenance
from cm3jax.config import Sampling
from cm3jax.types import UserError

PICTURE = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
MODEL = provenance.Model("quickstart", 7, "0123456789abcdef")


def made(prompt, seed=0, index=0, sampling=Sampling(), model=MODEL):
    return provenance.Made(model, prompt, seed, index, config.to_json(sampling))


def test_a_picture_reads_back_with_what_it_was_made_from(tmp_path):
    path = png.write(tmp_path / "new", PICTURE, made("Ein roter Kreis · 円", 3, 1))
    assert np.array_equal(png.read(path), PICTURE)
    assert Image.open(path).text["prompt"] == "Ein roter Kreis · 円"


def test_other_settings_captions_and_models_give_another_file(tmp_path):
    names = {
        png.write(tmp_path, PICTURE, made(prompt, seed, index, sampling, model)).name
        for prompt in ("a circle", "A circle!", "")
        for seed in (0, 1)
        for index in (0, 1)
        for sampling in (Sampling(), Sampling(top_k=5))
        for model in (MODEL, provenance.Model("quickstart", 8, "0123456789abcdee"))
    }
    assert len(names) == 3 * 2 * 2 * 2 * 2


def test_a_prompt_never_leaves_the_folder(tmp_path):
    path = png.write(tmp_path, PICTURE, made("../../etc/passwd" * 20))
    assert path.parent == tmp_path and len(path.name) < 100


@pytest.mark.parametrize("data", [None, b"", b"text", b"\x89PNG\r\n\x1a\nbroken"])
def test_no_picture_is_one_line(tmp_path, data):
    path = tmp_path / "x.png"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UserError, match="x.png'") as caught:
        png.read(path)
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another folder with --out"):
        png.write(tmp_path / "file" / "sub", PICTURE, made("x"))
