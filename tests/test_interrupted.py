"""A run that is killed in every stage ends as one that was left alone."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from cm3jax import checkpoint, config, run, trees

ROOT = pathlib.Path(__file__).parent.parent
RECIPE = '''"""A run of a minute."""

import dataclasses

from cm3jax import config as c

base, replace = c.load({quickstart!r}), dataclasses.replace
image, decoder = base.image, base.decoder
config = replace(
    base,
    name="small",
    prepare=replace(base.prepare, count=400, resolution=32, shards=4),
    text=replace(base.text, sample=300),
    image=replace(
        image,
        model=replace(image.model, width=16, decoder_blocks=1),
        training=replace(image.training, steps=60, batch=8, save_every=10, sample_every=30),
        seed_after=5,
    ),
    decoder=replace(
        decoder,
        model=replace(decoder.model, layers=1, width=32, heads=2),
        packing=replace(decoder.packing, picture=16),
        training=replace(decoder.training, steps=300, batch=8, save_every=20, sample_every=150),
    ),
    evaluate=replace(base.evaluate, samples=8, validation_samples=4, batch=8, sheet=2, draw=base.evaluate.draw[:1]),
)
'''


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "small.py"
    path.write_text(RECIPE.format(quickstart=str(ROOT / "configs" / "quickstart.py")))
    return path


def start(recipe, out):
    command = [sys.executable, "-m", "cm3jax.cli", "run", str(recipe), "--out", str(out)]
    environment = {**os.environ, "XLA_FLAGS": ""}  # one device, as on a person's machine
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)


def began(out, stage):
    """Tell whether a stage is under way: some of its work is on disk; for the trainings, a checkpoint."""
    folder = run.STAGES[stage].folder(out)
    if stage in ("image", "decoder"):
        return bool(checkpoint.steps(folder))
    return (folder / "stage.json").exists()


def finished(out, stage):
    path = run.STAGES[stage].folder(out) / "stage.json"
    try:
        return json.loads(path.read_text())["complete"]
    except OSError:
        return False


def kill_in(recipe, out, stage, sign):
    """Start the run and kill it, workers too, once it is in a stage; return whether the stage was unfinished then."""
    process = start(recipe, out)
    while process.poll() is None and not began(out, stage):
        time.sleep(0.02)
    unfinished = not finished(out, stage)
    if process.poll() is None:
        os.killpg(process.pid, sign)
    process.wait(120)
    return unfinished


@pytest.mark.slow
def test_a_run_killed_in_every_stage_ends_as_one_left_alone(recipe, tmp_path):
    assert start(recipe, tmp_path / "whole").wait() == 0
    signs = dict(prepare=signal.SIGKILL, image=signal.SIGKILL, tokens=signal.SIGINT, decoder=signal.SIGKILL)
    cut = [kill_in(recipe, tmp_path / "cut", stage, sign) for stage, sign in signs.items()]
    assert cut.count(True) >= 3  # a stage of a second may be done before the signal comes
    assert start(recipe, tmp_path / "cut").wait() == 0
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for pattern in ("prepared/*.array_record", "text/*.model", "image/*.safetensors", "tokens/*.npy"):
        names = sorted(str(p.relative_to(whole)) for p in whole.glob(pattern))
        assert names
        for name in names:
            assert (whole / name).read_bytes() == (cut / name).read_bytes(), name
    one, two = (trees.named_leaves(checkpoint.load_params(folder / "decoder")) for folder in (whole, cut))
    assert all(np.array_equal(one[name], two[name]) for name in one)
    scores = [json.loads((folder / "report.json").read_text())["text_to_image"] for folder in (whole, cut)]
    assert scores[0] == scores[1]


def test_the_small_recipe_is_the_quickstart_made_small(recipe):
    small, base = config.load(recipe), config.load(ROOT / "configs" / "quickstart.py")
    assert small.vocab == base.vocab and small.decoder.mask == base.decoder.mask
    assert small.decoder.packing == dataclasses.replace(base.decoder.packing, picture=(32 // 8) ** 2)
