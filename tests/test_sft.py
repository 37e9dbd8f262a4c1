"""configs/sft/7b.py, by its own commands, on two sets of the embedded world and a small run with random weights."""

import shutil

import numpy as np
import pytest
import random_run

from cm3jax import checkpoint, cli, stages, trees
from cm3jax import config as configs
from cm3jax import run as runs
from cm3jax.data import scenes, tokens
from cm3jax.tasks import table
from cm3jax.vocab import Vocab

pytestmark = pytest.mark.slow
VOCAB = Vocab(text=400, image=11, sentinels=16, multiple=8)
NET = configs.VQGAN(patch=4, width=8, multipliers=(1,), encoder_blocks=1, decoder_blocks=1, attention=(), z=3)
MODEL = configs.Decoder(layers=1, width=16, heads=2, dtype="float32")
RECIPE = configs.Recipe(
    vocab=VOCAB,
    prepare=configs.Prepare(resolution=16),
    image=configs.Image(model=NET),
    decoder=configs.DecoderStage(model=MODEL, packing=configs.Packing("chop", 192)),
)
SMALL = "--vocab.text 400 --vocab.image 11 --vocab.sentinels 16 --vocab.multiple 8 --decoder.layers 1"
SMALL += " --decoder.width 16 --decoder.heads 2 --decoder.model.dtype float32 --decoder.length 192 --decoder.steps 2"
SMALL += " --decoder.batch 8 --decoder.accumulate 1 --decoder.warmup 1"


def did(*words):
    assert cli.main([str(word) for word in words]) == 0


def test_a_pretrained_run_is_tuned_on_sets_of_its_own_tokenizers(tmp_path, capsys):
    lines = [p for i in range(90) for p in scenes.record("tasks", 0, i, "train", 16).parts if isinstance(p, str)]
    start = tmp_path / "pretrained"
    start.mkdir()
    random_run.make(start, RECIPE, lines, 0.1)
    for name in ("text", "image"):
        runs.taken(start, name, runs.decided(RECIPE, name), "elsewhere")
    first, second, out = (tmp_path / name for name in ("first", "second", "tuned"))
    for folder, count, seed in ((first, 106, 0), (second, 318, 1)):
        did("prepare", "scenes:tasks", folder, "--resolution", 16, "--count", count, "--seed", seed, "--workers", 1)
        did("encode", folder, "--tokenizers", start)
    words = ["train", "configs/sft/7b.py", "--inputs", first, "--out", out, *SMALL.split()]
    capsys.readouterr()
    did(*words, "--decoder.start", start, "--decoder.mixture.sets", second / "tokens")
    told = capsys.readouterr().out
    assert "decoder: begins with the weights in" in told and "passes an epoch" in told
    old, new = (trees.named_leaves(checkpoint.load_params(run / "decoder")) for run in (start, out))
    assert all(0 < np.abs(np.asarray(old[n]) - np.asarray(new[n])).max() < 0.01 for n in old)
    stages.remove(out / "decoder")
    shutil.copytree(first / "tokens", start / "tokens")
    did(*words, "--decoder.start", start, "--decoder.unseen", "drawn")
    known = tokens.Tokens(first / "tokens", "train").counts(VOCAB.size) > 0
    never = VOCAB.text - int(known[VOCAB.text_start : VOCAB.image_start].sum())
    assert f"rows are drawn for {never} text pieces that these never saw" in capsys.readouterr().out
    rows = np.asarray(checkpoint.load_params(out / "decoder")["table"])
    far = np.abs(rows - np.asarray(old["table"])).max(1) > 0.02
    assert far.sum() == never and not far[known].any()
    did("tasks", out)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert {row[0] for row in rows} == table.TASKS.keys()
    taught = sum(int(row[6]) for row in rows) / sum(int(row[5]) for row in rows)  # of those that are whole
    assert 0.4 < taught < 0.8
