"""An imported model of Chameleon's form is drawn with, captioned with, fine-tuned and evaluated as any other run."""

import json
import re

import jax
import numpy as np
import pytest
import talking_run
from PIL import Image

from cm3jax import checkpoint, cli, foreign, trees
from cm3jax import run as runs
from cm3jax.tokenizers import turns
from cm3jax.vocab import EOD

pytestmark = pytest.mark.slow

SPLITS = ["train"] * 16 + ["validation"] * 2 + ["test"] * 2


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A run folder as an import leaves it."""
    run = talking_run.make(tmp_path_factory.mktemp("imported"))
    recipe = talking_run.RECIPE
    for name in ("text", "image", "decoder"):
        runs.taken(run, name, runs.decided(recipe, name), "elsewhere")
    (run / foreign.ABOUT).write_text("{}")
    return run


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of pictures with captions."""
    folder, draw, lines = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0), []
    for i, split in enumerate(SPLITS):
        Image.fromarray(draw.integers(0, 256, (20, 16, 3), np.uint8)).save(folder / f"{i}.png")
        text = f"a {('red', 'blue')[i % 2]} circle"
        lines.append(json.dumps({"file_name": f"{i}.png", "text": text, "split": split}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def tuned(imported, pictures, tmp_path_factory):
    """The import, its head's rows of codes trained on for two steps in a folder of its own."""
    out = tmp_path_factory.mktemp("tuned") / "run"
    did("prepare", pictures, imported)
    did("encode", imported)
    flags = "--decoder.trainable image_head --decoder.steps 2 --decoder.batch 8 --decoder.warmup 0"
    start = ["--decoder.start", imported, "--out", out]
    did("train", imported / "recipe.json", "--inputs", imported, *start, *flags.split())
    return out


def did(*words):
    assert cli.main([str(word) for word in words]) == 0


def test_its_tokens_are_documents_of_its_form(imported, tuned):
    from cm3jax.data import tokens
    from cm3jax.tokenizers import text

    stored, tokenizer = tokens.Tokens(imported / "tokens", "train"), text.load(imported / "text")
    assert len(stored) == 16
    for i in range(len(stored)):
        ids = stored.read(i, 0, 10**6)
        found = turns.decode(ids, tokenizer, talking_run.VOCAB, talking_run.FORM)
        assert re.fullmatch("a (red|blue) circle", found[0]) and found[1].shape == (talking_run.CODES,)
        assert EOD not in ids and talking_run.FORM.begin not in ids
    assert config.load(tuned / "recipe.json").form == talking_run.FORM


def test_fine_tuning_changes_the_heads_rows_of_codes_alone(imported, tuned):
    old, new = (trees.named_leaves(checkpoint.load_params(run / "decoder")) for run in (imported, tuned))
    vocab = talking_run.VOCAB
    codes = slice(vocab.image_start, vocab.sentinel_start)
    for name in set(old) - {"head"}:
        np.testing.assert_array_equal(old[name], new[name], err_msg=name)
    same = (old["head"] == new["head"]).all(1)
    assert not same[codes].any() and same[: vocab.image_start].all() and same[vocab.sentinel_start :].all()


def test_it_draws_captions_and_fills_in(tuned, imported, pictures, tmp_path, capsys):
    for run in (imported, tuned):
        did("generate", run, "a red circle", "--out", tmp_path / "drawn")
        drawn = np.asarray(Image.open(capsys.readouterr().out.strip().splitlines()[-1]))
        assert drawn.shape == (talking_run.SIDE, talking_run.SIDE, 3)
    did("caption", tuned, pictures / "0.png", pictures / "1.png", "--max_text", "5")
    assert capsys.readouterr().out.count(".png: ") == 2
    did("infill", tuned, pictures / "0.png", "a red circle", "--box", "0.25", "0.25", "1", "1", "--out", tmp_path)
    assert (tmp_path / capsys.readouterr().out.strip().splitlines()[-1]).is_file()
    assert cli.main(["infill", str(tuned), str(pictures / "0.png"), "a <mask>"]) == 2
    assert "trained without masks" in capsys.readouterr().err


def test_a_page_of_text_and_pictures_is_written(imported, pictures, tmp_path, capsys):
    words = ["generate", imported, "a red", pictures / "0.png", "circle", "--interleaved", "--count", "2"]
    did(*words, "--parts", "1", "--max_text", "6", "--out", tmp_path / "pages")
    paths = capsys.readouterr().out.strip().splitlines()
    assert len(set(paths)) == 2
    for path in paths:
        page = (tmp_path / path).read_text()
        assert page.startswith("a red\n\n![picture 1](") and "\n\ncircle" in page
        for name in re.findall(r"!\[picture \d+\]\((.*?)\)", page):
            assert np.asarray(Image.open(tmp_path / "pages" / name)).shape == (talking_run.SIDE, talking_run.SIDE, 3)


def test_it_is_evaluated(tuned):
    did("evaluate", tuned, "--evaluate.samples", "2", "--evaluate.max_text", "4")
    report = json.loads((tuned / "report.json").read_text())
    assert report["perplexity"]["image"] > 1 and report["perplexity"]["infill"] is None
    assert report["image_to_text"]["samples"] == 2 and report["infill"]["samples"] == 2


def test_a_start_of_another_network_is_refused(imported, tuned, tmp_path, capsys):
    words = ["train", imported / "recipe.json", "--inputs", imported, "--out", tmp_path / "x"]
    assert cli.main([*map(str, words), "--decoder.start", str(imported), "--decoder.layers", "1"]) == 2
    assert "its layers is 2, this recipe's 1; train with" in capsys.readouterr().err
    assert cli.main([*map(str, words), "--decoder.start", str(tmp_path)]) == 2
    assert "no run folder with a decoder" in capsys.readouterr().err


def test_all_of_it_is_trained_unless_told_otherwise(imported, tuned, tmp_path):
    words = ["train", imported / "recipe.json", "--inputs", imported, "--out", tmp_path / "x", "--decoder.warmup", "0"]
    did(*words, "--decoder.start", imported, "--decoder.steps", "1", "--decoder.batch", "8")
    old, new = (trees.named_leaves(checkpoint.load_params(run / "decoder")) for run in (imported, tmp_path / "x"))
    assert all((old[name] != new[name]).any() for name in old)
    near = max(float(np.abs(np.asarray(old[n]) - np.asarray(new[n])).max()) for n in old)
    assert near < 0.01, "it must begin with the weights of the import"
    assert len(jax.tree.leaves(new)) == len(old)
