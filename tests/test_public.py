"""configs/public.py, every stage by its own command, on a stand-in of what img2dataset writes."""

import contextlib
import io
import json
import pathlib
import tarfile

import numpy as np
import pytest
from PIL import Image

from cm3jax import checkpoint, cli, config, flags
from cm3jax.data import shards, tokens

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = str(ROOT / "configs" / "public.py")
COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200), "grey": (128, 128, 128)}


def img2dataset(folder: pathlib.Path, tars: int, each: int) -> None:
    """Write a folder as img2dataset does (its writer.py and logger.py): tars of .jpg, .txt and .json members named by
    tar and row, beside each tar a file of statistics; every seventh link is dead, so that numbers are missing."""
    folder.mkdir()
    for t in range(tars):
        dead = [i for i in range(each) if i % 7 == 3]
        with tarfile.open(folder / f"{t:05d}.tar", "w") as tar:
            for i in (i for i in range(each) if i not in dead):
                name = f"{t:05d}{i:04d}"
                caption, data = jpeg(t * each + i)
                about = {
                    "caption": caption, "url": f"https://example.com/{name}.jpg", "key": name, "status": "success",
                    "error_message": None, "width": 48, "height": 36, "original_width": 96, "original_height": 72,
                    "exif": "{}", "sha256": "0" * 64,
                }  # fmt: skip
                members = {"jpg": data, "json": json.dumps(about, indent=4).encode(), "txt": caption.encode()}
                for kind, content in members.items():
                    member = tarfile.TarInfo(f"{name}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        stats = {
            "count": each, "successes": each - len(dead), "failed_to_download": len(dead), "failed_to_resize": 0,
            "duration": 1.5, "start_time": 0.0, "end_time": 1.5,
            "status_dict": {"success": each - len(dead), "HTTP Error 404: Not Found": len(dead)},
        }  # fmt: skip
        (folder / f"{t:05d}_stats.json").write_text(json.dumps(stats, indent=4))
        (folder / f"{t:05d}.parquet").write_bytes(b"PAR1 is not read")


def jpeg(i: int) -> tuple[str, bytes]:
    """Return a caption and its picture: a disc of one colour on another, 48 x 36."""
    (one, front), (two, back) = (list(COLOURS.items())[j % 4] for j in (i, i // 4 + i + 1))
    y, x = np.mgrid[:36, :48]
    picture = np.where(((x - 24) ** 2 + (y - 18) ** 2 < 40 + 3 * i % 90)[..., None], front, back).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "jpeg", quality=95)
    return f"a {one} disc on {two}, number {i}", buffer.getvalue()


VOCAB = ["--vocab.text", "300", "--vocab.image", "64"]
SMALL_IMAGE = [
    "--image.model.width", "8", "--image.model.groups", "4", "--image.model.z", "8", "--image.steps", "3",
    "--image.training.batch", "8", "--image.loss.discriminator-width", "8", "--image.model.encoder-blocks", "1",
    "--image.model.decoder-blocks", "1", "--image.model.no-middle", "--image.evaluate-batches", "1",
    "--image.loss.adversarial", "0", "--image.loss.perceptual", "0", "--image.mesh.fsdp", "1",
]  # fmt: skip
SMALL_DECODER = [
    "--decoder.model.layers", "1", "--decoder.model.width", "32", "--decoder.model.heads", "2", "--decoder.steps", "4",
    "--decoder.training.batch", "8", "--decoder.packing.length", "96", "--decoder.loss-chunk", "32",
    "--decoder.training.workers", "0", "--decoder.sample-every", "0", "--decoder.warmup", "1",
    "--decoder.evaluate-batches", "1", "--decoder.mesh.fsdp", "1",
]  # fmt: skip
SMALL_EVALUATION = [
    "--evaluate.samples", "4", "--evaluate.validation-samples", "2", "--evaluate.batch", "4", "--evaluate.sheet", "2",
    "--evaluate.max-text", "8",
]  # fmt: skip


def cm3jax(*arguments) -> None:
    assert cli.main([str(a) for a in arguments]) == 0, arguments


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder after every command of the recipe but the last, and what was said."""
    folder, said = tmp_path_factory.mktemp("public"), io.StringIO()
    img2dataset(folder / "cc12m", tars=4, each=30)
    run = folder / "run"
    share = ["--validation", "0.15", "--test", "0.15", "--resolution", "32", "--workers", "1"]
    with contextlib.redirect_stdout(said):
        for host in (1, 0):
            cm3jax("prepare", folder / "cc12m", run, *share, "--host", host, "--hosts", 2)
        cm3jax("train", CONFIG, "--inputs", run, "--stage", "text", *VOCAB)
        cm3jax("train", CONFIG, "--inputs", run, "--stage", "image", *VOCAB, *SMALL_IMAGE)
        for host in (1, 2, 0):
            cm3jax("encode", run, "--tokens.batch", 8, "--tokens.workers", 0, "--host", host, "--hosts", 3)
        cm3jax("train", CONFIG, "--inputs", run, *VOCAB, *SMALL_DECODER)
    return run, said.getvalue()


@pytest.mark.slow
def test_the_public_recipe_runs_from_tars_as_img2dataset_writes_them_to_a_trained_decoder(trained):
    run, said = trained
    summary = json.loads((run / "prepared" / "summary.json").read_text())
    assert summary["rows"] == summary["records"] == 4 * 26 and summary["splits"]["train"]["shards"] == 4
    record = shards.Reader(run / "prepared", "train")[0]
    assert record.source.startswith("https://example.com/") and record.parts[0].startswith("a ")
    found = tokens.Tokens(run / "tokens", "train")
    assert len(found) == summary["splits"]["train"]["records"] and min(found.lengths) > (32 // 8) ** 2
    assert "per chip (8 x cpu)" in said and f"decoder: {len(found)} documents" in said
    assert checkpoint.steps(run / "decoder") == [4]


@pytest.mark.slow
def test_the_public_recipe_is_scored(trained):
    run, _ = trained
    cm3jax("evaluate", run, *SMALL_EVALUATION)
    report = json.loads((run / "report.json").read_text())
    assert set(report["perplexity"]) == {"text", "image", "infill", "validation"}
    assert report["text_to_image"]["samples"] == 4


def test_the_public_recipe_is_the_f8_tokenizer_and_the_350m_decoder():
    public = config.load(CONFIG)
    assert public.image == config.load(ROOT / "configs" / "image" / "f8_8192.py").image
    paper = config.load(ROOT / "configs" / "cm3leon" / "350m.py").decoder
    assert (public.decoder.model, public.decoder.packing) == (paper.model, paper.packing)
    assert (public.prepare.resolution // public.image.model.factor) ** 2 == 1024


def test_the_commands_of_the_public_recipe_are_read_by_the_command_line():
    """The verbs and flags of its docstring exist; `plan` is held by its own tests."""
    lines = [line.strip() for line in pathlib.Path(CONFIG).read_text().splitlines()]
    commands = [line.split()[1:] for line in lines if line.startswith("cm3jax ")]
    commands = [command for command in commands if command[0] not in ("plan", "generate")]
    assert len(commands) == 7
    for verb, *argv in commands:
        argv = ["0" if a == "I" else "1" if a == "N" else a for a in argv]
        values = {"recipe": config.load(CONFIG)} if verb in cli.RECIPES else {}
        flags.parse(cli.VERBS[verb], argv, f"cm3jax {verb}", flags.blank(cli.VERBS[verb], **values))
