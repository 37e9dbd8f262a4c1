"""An imported model of Chameleon's form is drawn with, captioned with, fine-tuned and evaluated as any other run.

The import is a real one: files as Hugging Face publishes them, in bfloat16, with a `tokenizers` tokenizer and an image
tokenizer that draws.
"""

import dataclasses
import json
import re

import chameleons
import checkpoints
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from PIL import Image

from cm3jax import checkpoint, cli, config, provenance, trees
from cm3jax.evaluate import protocol
from cm3jax.interop import chameleon_vocab
from cm3jax.nn import decoder
from cm3jax.sample import generate
from cm3jax.tokenizers import turns
from cm3jax.vocab import EOD

pytestmark = pytest.mark.slow

SIDE, CODES = 8, 16
"""Of the pictures of `checkpoints.PICTURES`."""
SPLITS = ["train"] * 16 + ["validation"] * 2 + ["test"] * 2


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A run folder as `cm3jax import` leaves it."""
    folder = tmp_path_factory.mktemp("imported")
    about = checkpoints.settings(dtype="bfloat16", num_key_value_heads=2, swin_norm=True)
    checkpoints.hugging_face(folder / "hf", about, chameleons.random_tensors(about, ml_dtypes.bfloat16))
    did("import", folder / "hf", run := folder / "run")
    return run


@pytest.fixture(scope="module")
def favouring(tmp_path_factory):
    """The same import with another row of the head for the begin of a picture, so that pictures are begun."""
    folder = tmp_path_factory.mktemp("favouring")
    about = checkpoints.settings(dtype="bfloat16", num_key_value_heads=2, swin_norm=True)
    tensors = chameleons.random_tensors(about, ml_dtypes.bfloat16)
    head, begin = tensors["lm_head.weight"], about["vocabulary_map"]["<racm3:break>"]
    head[begin] = (1.5 * np.random.default_rng(0).standard_normal(head.shape[1])).astype(head.dtype)
    checkpoints.hugging_face(folder / "hf", about, tensors)
    did("import", folder / "hf", run := folder / "run")
    return run


@pytest.fixture(scope="module")
def recipe(imported):
    return config.load(imported / "recipe.json")


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
    # 37 codes do not divide over eight devices: the rows that are trained stay whole
    flags = "--decoder.trainable image_head --decoder.steps 2 --decoder.batch 8 --decoder.warmup 0 --decoder.replica 8"
    flags += " --decoder.fsdp 1"
    start = ["--decoder.start", imported, "--out", out]
    did("train", imported / "recipe.json", "--inputs", imported, *start, *flags.split())
    return out


def did(*words):
    assert cli.main([str(word) for word in words]) == 0


def test_its_tokens_are_documents_of_its_form(imported, recipe, tuned):
    from cm3jax.data import tokens
    from cm3jax.tokenizers import text

    stored, tokenizer = tokens.Tokens(imported / "tokens", "train"), text.load(imported / "text")
    assert isinstance(tokenizer, text.Published)
    assert len(stored) == 16
    for i in range(len(stored)):
        ids = stored.read(i, 0, 10**6)
        found = turns.decode(ids, tokenizer, recipe.vocab, recipe.form)
        assert re.fullmatch("a (red|blue) circle", found[0]) and found[1].shape == (CODES,)
        assert EOD not in ids and recipe.form.begin not in ids
    assert config.load(tuned / "recipe.json").form == recipe.form


def test_fine_tuning_changes_the_heads_rows_of_codes_alone(imported, recipe, tuned):
    old, new = (trees.named_leaves(checkpoint.load_params(run / "decoder")) for run in (imported, tuned))
    vocab = recipe.vocab
    codes = slice(vocab.image_start, vocab.sentinel_start)
    assert {x.dtype.name for x in old.values()} == {"bfloat16"}, "an import keeps its files' type"
    for name in set(old) - {"head"}:
        np.testing.assert_array_equal(old[name], new[name], err_msg=name)
    same = (old["head"] == new["head"]).all(1)
    assert not same[codes].any() and same[: vocab.image_start].all() and same[vocab.sentinel_start :].all()


def test_it_draws_captions_and_fills_in(tuned, imported, pictures, tmp_path, capsys):
    for run in (imported, tuned):
        did("generate", run, "a red circle", "--out", tmp_path / "drawn")
        drawn = np.asarray(Image.open(capsys.readouterr().out.strip().splitlines()[-1]))
        assert drawn.shape == (SIDE, SIDE, 3)
    did("caption", tuned, pictures / "0.png", pictures / "1.png", "--max_text", "5")
    assert capsys.readouterr().out.count(".png: ") == 2
    did("infill", tuned, pictures / "0.png", "a red circle", "--box", "0.25", "0.25", "1", "1", "--out", tmp_path)
    assert (tmp_path / capsys.readouterr().out.strip().splitlines()[-1]).is_file()
    assert cli.main(["infill", str(tuned), str(pictures / "0.png"), "a <mask>"]) == 2
    assert "trained without masks" in capsys.readouterr().err


def test_a_page_of_text_and_drawn_pictures_is_written(favouring, pictures, tmp_path, capsys):
    words = ["generate", favouring, "a red", pictures / "0.png", "circle", "--interleaved", "--count", "4"]
    did(*words, "--parts", "1", "--max_text", "6", "--out", tmp_path / "pages")
    paths = capsys.readouterr().out.strip().splitlines()
    assert len(set(paths)) == 4
    drawn = 0
    for path in paths:
        page = (tmp_path / path).read_text()
        assert page.startswith("a red\n\n![picture 1](") and "\n\ncircle" in page
        shown = dict(re.findall(r"!\[(picture \d+)\]\((.*?)\)", page))
        assert set(shown) <= {"picture 1", "picture 2"}
        for name in shown.values():
            assert np.asarray(Image.open(tmp_path / "pages" / name)).shape == (SIDE, SIDE, 3)
        if "picture 2" in shown:
            drawn += 1
            made = provenance.read(tmp_path / "pages" / shown["picture 2"])
            assert made["source"] == "trainedAlgorithmicMedia", "the first was given, the second drawn"
        assert not Image.open(tmp_path / "pages" / shown["picture 1"]).info
    assert drawn, "no page has a picture that was drawn"


def test_it_is_evaluated(tuned):
    did("evaluate", tuned, "--evaluate.samples", "2", "--evaluate.max_text", "4")
    report = json.loads((tuned / "report.json").read_text())
    assert report["perplexity"]["image"] > 1 and report["perplexity"]["infill"] is None
    assert report["image_to_text"]["samples"] == 2 and report["infill"]["samples"] == 2


def test_its_losses_on_several_devices_are_one_devices(tuned):
    recipe = config.load(tuned / "recipe.json")
    training = dataclasses.replace(recipe.decoder.training, batch=6)  # not a multiple of the devices that share it
    recipe = dataclasses.replace(recipe, decoder=dataclasses.replace(recipe.decoder, training=training))
    measure = protocol.held_out(recipe, tuned)
    one, several = (
        measure(generate.weights(tuned, recipe, mesh=config.Mesh(*shape)), "train", False)
        for shape in ((1, 1, 1), (2, 2, 2))
    )
    assert one["loss"][1] == several["loss"][1] > 0
    assert one["loss_image"][0] == pytest.approx(several["loss_image"][0], rel=1e-5)


def test_a_start_of_another_network_is_refused(imported, tuned, tmp_path, capsys):
    words = ["train", imported / "recipe.json", "--inputs", imported, "--out", tmp_path / "x"]
    assert cli.main([*map(str, words), "--decoder.start", str(imported), "--decoder.layers", "1"]) == 2
    assert "its layers is 3, this recipe's 1; train with" in capsys.readouterr().err
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


def test_a_model_trained_in_its_form_gives_the_same_logits_in_transformers(pictures, tmp_path):
    """Through the verbs: tokenizers imported, a decoder trained from nothing on them, exported, opened there."""
    import transformers

    about = checkpoints.settings(num_key_value_heads=2)
    checkpoints.hugging_face(tmp_path / "hf", about)
    did("import", tmp_path / "hf", run := tmp_path / "run")
    did("prepare", pictures, run)
    did("encode", run)
    flags = "--decoder.steps 6 --decoder.batch 8 --decoder.warmup 0 --decoder.peak_lr 0.03"
    did("train", run / "recipe.json", "--inputs", run, "--out", out := tmp_path / "out", *flags.split())
    did("export", out, tmp_path / "exported", "--to", "hf")
    params = jax.tree.map(jnp.asarray, checkpoint.load_params(out / "decoder"))
    recipe = config.load(out / "recipe.json")
    assert recipe.form.kind == "chameleon"
    model, told = transformers.ChameleonForConditionalGeneration.from_pretrained(
        tmp_path / "exported", output_loading_info=True, dtype=torch.float32
    )
    assert not told["missing_keys"] and not told["mismatched_keys"]
    order = chameleon_vocab.load(out / "text" / "order.json")
    ids = np.random.default_rng(1).integers(0, recipe.vocab.size, (2, 40))  # in Chameleon's order
    with torch.no_grad():
        theirs = model.lm_head(model.model(torch.tensor(ids)).last_hidden_state).numpy()
    net = decoder.Decoder(recipe.decoder.model, recipe.vocab.size, recipe.decoder.packing.length)
    place = jnp.broadcast_to(jnp.arange(40), ids.shape)
    hidden, _ = net.apply({"params": params}, jnp.asarray(order.ours[ids], jnp.int32), place, jnp.ones_like(place))
    ours = order.back(np.asarray(decoder.logits(params, recipe.decoder.model, hidden)))
    assert ours.std() > 0.1, "too flat to tell a mistake"
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
