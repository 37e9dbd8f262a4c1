"""The stage `retriever` from the command line, on scenes."""

import json

import numpy as np
import pytest

from cm3jax import cli, config, run, stages
from cm3jax.data import shards
from cm3jax.retrieval import encoder

SMALL = """
from cm3jax.config import *
from cm3jax.vocab import Vocab
config = Recipe(
    name="small", retrieve=True, vocab=Vocab(text=512),
    prepare=Prepare(source="scenes:easy", resolution=32, count=400),
    retriever=Retriever(
        model=CLIP(resolution=32, patch=16, vision_width=32, vision_layers=1, vision_heads=2, context=80, text_width=32,
                   text_layers=1, text_heads=2, size=16, activation="gelu"),
        training=Training(
            steps=60, batch=32, mesh=Mesh(fsdp=1), optimizer=Optimizer(name="muon", peak_lr=3e-3, warmup=5)
        ),
    ),
)
"""


@pytest.mark.slow
def test_train_makes_the_retriever_of_a_run_and_continues_it(tmp_path, capsys):
    path, folder = tmp_path / "small.py", str(tmp_path / "run")
    path.write_text(SMALL)
    recipe = config.load(path)
    run.run(recipe, folder, only="prepare")
    for stage in ("text", "retriever"):
        assert cli.main(["train", str(path), "--inputs", folder, "--stage", stage]) == 0
    record = stages.read(tmp_path / "run" / "retriever")
    assert record.complete and set(record.inputs) == {"prepare", "text"}
    assert {f"retriever/{n}" for n in ("config.json", "weights.safetensors", "tokenizer.model")} <= set(record.files)
    lines = (tmp_path / "run" / "retriever" / "metrics.jsonl").read_text().splitlines()
    losses = [m["train/loss"] for line in lines if "train/loss" in (m := json.loads(line))]
    assert losses[-1] < np.log(32) - 0.5  # what guessing gives, and well below
    found = encoder.load(tmp_path / "run" / "retriever", batch=32)
    record = next(iter(shards.Reader(tmp_path / "run" / "prepared", "test")))
    assert found.documents([record])[1:] == (np.array([True]), np.array([True]))
    capsys.readouterr()
    assert cli.main(["train", str(path), "--inputs", folder, "--stage", "retriever"]) == 0
    assert "up to date" in capsys.readouterr().out
    again = ["train", str(path), "--inputs", folder, "--stage", "retriever", "--retriever.model.size", "8"]
    assert cli.main(again) == 2
    assert "retriever.model.size was 16 and is now 8" in capsys.readouterr().err
