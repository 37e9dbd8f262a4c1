import numpy as np
import pytest
from PIL import Image

from cm3jax import config, hooks, provenance
from cm3jax.data import shards
from cm3jax.sample import generate
from cm3jax.tokenizers import image, text
from cm3jax.types import Record


def picture(value):
    return np.full((3, 5, 3), value, np.uint8)


def write(folder, split, records):
    with shards.Writer(folder, split) as writer:
        for record in records:
            writer.write(record)


@pytest.fixture
def prepared(tmp_path):
    write(tmp_path, "train", [Record("t", ("train", picture(0)))])
    held_out = [Record(f"{i}", (f"text {i}", picture(i))) for i in range(20)]
    write(tmp_path, "validation", [Record("alone", (picture(77),)), *held_out])
    return tmp_path


def test_captions_are_the_first_texts_of_the_validation_split(prepared):
    assert hooks.captions(prepared) == [f"text {i}" for i in range(hooks.COUNT)]


def test_pictures_are_the_first_of_the_validation_split(prepared):
    assert hooks.pictures(prepared)[:, 0, 0, 0].tolist() == [77, *range(hooks.COUNT - 1)]


def test_without_a_validation_split_the_training_split_serves(tmp_path):
    write(tmp_path, "train", [Record("t", ("train", picture(3)))])
    assert hooks.captions(tmp_path) == ["train"]
    assert hooks.pictures(tmp_path).shape == (1, 3, 5, 3)


def test_a_sheet_that_the_decoder_drew_says_so(prepared, monkeypatch):
    class Drawer:
        def text_to_image(self, prompts, seed, sampling):
            return np.stack([picture(seed)] * len(prompts))

    for module in (text, image):
        monkeypatch.setattr(module, "load", lambda folder: None)
    monkeypatch.setattr(generate, "of", lambda *arguments: Drawer())
    (prepared / "prepared").symlink_to(prepared)
    hooks.drawings(config.Recipe(name="made up"), prepared)({"layers": {"w": np.zeros((1, 2))}}, 12)
    found = provenance.read(prepared / "decoder" / "samples" / "0000012.png")
    assert found["prompt"].split("\n") == hooks.captions(prepared) and found["step"] == "12"
    assert found["source"] == "trainedAlgorithmicMedia" and found["model"] == "made up"


def test_a_sheet_is_a_png_and_an_event(tmp_path):
    rows = [np.stack([picture(1), picture(2)]), np.stack([picture(3), picture(4)])]
    hooks.save(tmp_path, "samples", 12, rows)
    sheet = np.asarray(Image.open(tmp_path / "samples" / "0000012.png"))
    assert sheet.shape == (6, 10, 3)
    assert [int(sheet[y, x, 0]) for y in (0, 5) for x in (0, 9)] == [1, 2, 3, 4]
    (events,) = tmp_path.glob("events.out.tfevents.*")
    assert b"PNG" in events.read_bytes()
