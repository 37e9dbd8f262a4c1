"""`cm3jax export`: what import reads is written again, bit for bit, and transformers computes the same with it."""

import dataclasses
import json
import re
import subprocess
import sys

import chameleons
import checkpoints
import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import tokenizers
import torch
import vqgans
from PIL import Image

from cm3jax import checkpoint, cli, config, foreign, sharding
from cm3jax.interop import (
    chameleon,
    chameleon_vocab,
    mapped,
    pieces,
    plain,
    safetensor_files,
    sources,
    streamed,
    tensors,
    vqgan,
)
from cm3jax.nn import clip, decoder
from cm3jax.nn import vqgan as nets
from cm3jax.objectives import vqgan as objective
from cm3jax.tokenizers import document, image, text
from cm3jax.types import UserError
from cm3jax.vocab import BREAK, EOSS, Vocab


def quiet(line):
    pass


def contents(folder):
    """Return the tensors of a folder by name, as bits."""
    found = tensors.open(folder)
    return {name: (t.shape, t.dtype, t.read().tobytes()) for name, t in found.found.items()}


KINDS = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


SOME = [pytest.param("float32", marks=pytest.mark.slow), "bfloat16", pytest.param("float16", marks=pytest.mark.slow)]


@pytest.mark.parametrize("kind", SOME)
def test_hugging_faces_files_come_back_bit_for_bit(tmp_path, kind):
    about = checkpoints.settings(dtype=kind, num_key_value_heads=2, swin_norm=True)
    checkpoints.hugging_face(tmp_path / "hf", about, chameleons.random_tensors(about, KINDS[kind]))
    foreign.bring(str(tmp_path / "hf"), str(tmp_path / "run"), say=quiet)
    foreign.send(tmp_path / "run", str(tmp_path / "out"), "hf", say=quiet)
    assert contents(tmp_path / "out") == contents(tmp_path / "hf")
    told, again = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("hf", "out"))
    assert chameleon.network(told) == chameleon.network(again)
    assert (told["vocabulary_map"], told["vq_config"], told["dtype"]) == tuple(
        again[name] for name in ("vocabulary_map", "vq_config", "dtype")
    )
    assert sources.entries(tmp_path / "out" / "tokenizer.json") == sources.entries(tmp_path / "hf" / "tokenizer.json")
    foreign.bring(str(tmp_path / "out"), str(tmp_path / "again"), say=quiet)
    first, second = (checkpoint.load_params(tmp_path / name / "decoder") for name in ("run", "again"))
    assert jax.tree.all(jax.tree.map(np.array_equal, first, second))
    run, again = (config.load(tmp_path / name / "recipe.json") for name in ("run", "again"))
    assert dataclasses.replace(again, name="run") == run
    for name in ("text/order.json", "image/weights.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["hf", "meta"])
def test_transformers_processor_of_an_exported_folder_says_what_we_do(tmp_path, layout):
    import transformers

    about = checkpoints.settings()
    tensors = checkpoints.per_process(chameleons.random_tensors(about), about, 1)
    if layout == "hf":
        checkpoints.hugging_face(tmp_path / "hf", about, tensors)
    else:
        checkpoints.meta_folder(tmp_path / "meta", tensors, about)
    foreign.bring(str(tmp_path / layout), str(tmp_path / "run"), resolution=8, say=quiet)
    foreign.send(tmp_path / "run", str(tmp_path / "out"), "hf", say=quiet)
    processor = transformers.ChameleonProcessor.from_pretrained(tmp_path / "out")
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    found = processor(images=Image.fromarray(picture), text="a cat<image>", return_tensors="np")
    seen = np.moveaxis(np.asarray(objective.to_unit(jnp.asarray(picture)[None])), -1, 1)
    np.testing.assert_allclose(found["pixel_values"], seen, atol=1e-6)
    tokenizer, order = text.load(tmp_path / "run" / "text"), chameleon_vocab.load(tmp_path / "run/text/order.json")
    recipe = config.load(tmp_path / "run" / "recipe.json")
    before, ids = document.text_ids("a cat", tokenizer, recipe.vocab).tolist(), found["input_ids"][0]
    image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    marks = [BREAK, *[order.ours[image_id]] * 16, EOSS, recipe.form.turn]
    assert order.ours[ids].tolist() == [*before, *marks]
    other = Image.fromarray(np.random.default_rng(1).integers(0, 256, (20, 33, 3), np.uint8))
    assert processor(images=other, text="<image>", return_tensors="np")["pixel_values"].shape == (1, 3, 8, 8)


def test_metas_model_becomes_hugging_faces(tmp_path):
    about = checkpoints.settings()
    made = checkpoints.per_process(chameleons.random_tensors(about), about, 2)
    foreign.bring(
        str(checkpoints.meta_folder(tmp_path / "meta", made, about, 2)), str(tmp_path / "run"), resolution=8, say=quiet
    )
    foreign.send(tmp_path / "run", str(tmp_path / "out"), "hf", say=quiet)
    checkpoints.hugging_face(tmp_path / "hf", about, made)
    assert contents(tmp_path / "out") == contents(tmp_path / "hf")
    assert sources.entries(tmp_path / "out" / "tokenizer.json") == sources.entries(tmp_path / "hf" / "tokenizer.json")


# --------------------------------------------------------------------------------------------------------- trained here

WORDS = ["a red cat", "a blue dog, and a cat", "two cats on a mat", "the cat sat"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a run of Chameleon's form as a training here leaves it, with random weights."""
    run = tmp_path_factory.mktemp("trained") / "run"
    tokenizer = text.train(WORDS * 20, 300, run / "text" / "tokenizer.model")
    vocab = Vocab(text=304, image=chameleons.CODES, sentinels=8, multiple=16)
    model = config.Decoder(
        layers=2, width=32, heads=4, kv_heads=2, mlp_width=40, tied=False, dtype="float32", **chameleon.FORM
    )
    recipe = config.Recipe(
        name="trained",
        vocab=vocab,
        prepare=config.Prepare(resolution=8),
        image=config.Image(model=checkpoints.PICTURES.model),
        decoder=config.DecoderStage(model=model, packing=config.Packing(length=64)),
    )
    (run / "recipe.json").write_text(json.dumps(config.to_json(recipe)))
    vqgan.save(run / "image", checkpoints.PICTURES, vqgan.read(checkpoints.pictures(""), checkpoints.PICTURES))
    net, draw = decoder.Decoder(model, vocab.size, 64), np.random.default_rng(0)
    shapes = sharding.unbox(jax.eval_shape(lambda key: decoder.init(net, key), jax.random.key(0)))
    params = jax.tree.map(lambda x: jnp.asarray(0.3 * draw.standard_normal(x.shape, np.float32)), shapes)
    manager = checkpoint.open(run / "decoder")
    checkpoint.save(manager, 7, {"step": jnp.int32(7), "params": params, "opt_state": {}, "extra": {}}, {})
    manager.close()
    return run, recipe, params, tokenizer


def logits(params, recipe, ids):
    net, ids = decoder.Decoder(recipe.decoder.model, recipe.vocab.size, 64), jnp.asarray(ids, jnp.int32)
    place = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    hidden = net.apply({"params": params}, ids, place, jnp.ones_like(ids))[0]
    return np.asarray(decoder.logits(params, recipe.decoder.model, hidden))


@pytest.mark.slow
def test_a_model_trained_here_gives_the_same_logits_in_transformers(trained, tmp_path):
    import transformers

    run, recipe, params, tokenizer = trained
    foreign.send(run, str(tmp_path / "out"), "hf", say=quiet)
    model, told = transformers.ChameleonForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype=torch.float32
    )
    assert not told["missing_keys"] and not told["mismatched_keys"]
    assert all(".decoder." in key or "post_quant" in key for key in told["unexpected_keys"])
    ids = np.random.default_rng(1).integers(0, recipe.vocab.used, (2, 40))
    with torch.no_grad():
        theirs = model.lm_head(model.model(torch.tensor(ids)).last_hidden_state).numpy()
    ours = logits(params, recipe, ids)
    assert ours.std() > 0.1
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for string in (*WORDS, "caf\u00e9 \U0001f680\n  x"):
        found = words(string, add_special_tokens=False)["input_ids"]
        assert found == document.text_ids(string, tokenizer, recipe.vocab).tolist()
        assert words.decode(found) == string
    assert words.convert_tokens_to_ids(chameleon_vocab.spelt(5)) == recipe.vocab.image_start + 5
    assert (words.pad_token, words.eos_token) == ("<pad>", "</s>")
    assert not list((tmp_path / "out").glob("*processor_config.json")), "CM3Leon's documents are not its processor's"


def test_a_model_trained_here_comes_back_from_hugging_faces_layout(trained, tmp_path):
    run, recipe, params, tokenizer = trained
    foreign.send(run, str(tmp_path / "out"), "hf", say=quiet)
    foreign.bring(str(tmp_path / "out"), str(tmp_path / "again"), say=quiet)
    again = config.load(tmp_path / "again" / "recipe.json")
    assert again.form == config.Form(), "its documents are CM3Leon's"
    assert (again.vocab.image, again.vocab.sentinels) == (recipe.vocab.image, recipe.vocab.sentinels)
    other = text.load(tmp_path / "again" / "text")
    for string in WORDS:
        assert other.decode(other.encode(string)) == string
    ids = np.array([[0, 1, *document.text_ids(WORDS[0], tokenizer, recipe.vocab)]])
    moved = np.array([[0, 1, *document.text_ids(WORDS[0], other, again.vocab)]])
    found = logits(jax.tree.map(jnp.asarray, checkpoint.load_params(tmp_path / "again" / "decoder")), again, moved)
    codes = lambda x, vocab: x[..., vocab.image_start : vocab.sentinel_start]  # noqa: E731
    np.testing.assert_allclose(codes(found, again.vocab), codes(logits(params, recipe, ids), recipe.vocab), atol=1e-5)


def test_merges_say_what_sentencepiece_does(trained):
    _, recipe, _, tokenizer = trained
    theirs = tokenizers.Tokenizer.from_str(json.dumps(pieces.document(tokenizer, recipe.vocab)))
    draw = np.random.default_rng(0)
    letters = list("acdtbloenums ,xyz\u00e9")
    for _ in range(300):
        string = "".join(draw.choice(letters, draw.integers(0, 30)))
        assert theirs.encode(string).ids == document.text_ids(string, tokenizer, recipe.vocab).tolist(), string


def test_what_is_no_chameleon_is_refused_by_its_setting(trained, tmp_path):
    run, recipe, *_ = trained
    other = tmp_path / "run"
    other.mkdir()
    for name in ("text", "image", "decoder"):
        (other / name).symlink_to(run / name)
    told = config.to_json(recipe)
    told["decoder"]["model"]["activation"] = "relu"
    (other / "recipe.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match="decoder.model.activation = 'relu'"):
        foreign.send(other, str(tmp_path / "out"), "hf", say=quiet)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


# ---------------------------------------------------------------------------------------------------- plain safetensors


def test_plain_safetensors_come_back_bit_for_bit(trained, tmp_path):
    run, recipe, params, _ = trained
    foreign.send(run, str(tmp_path / "out"), "safetensors", say=quiet)
    foreign.bring(str(tmp_path / "out"), str(tmp_path / "again"), say=quiet)
    found = checkpoint.load_params(tmp_path / "again" / "decoder")
    assert jax.tree.structure(found) == jax.tree.structure(jax.tree.map(np.asarray, params))
    assert jax.tree.all(jax.tree.map(lambda a, b: np.asarray(a).tobytes() == b.tobytes(), params, found))
    assert config.load(tmp_path / "again" / "recipe.json") == dataclasses.replace(recipe, name="again")
    for name in ("text/tokenizer.model", "image/weights.safetensors", "image/config.json"):
        assert (run / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    foreign.send(tmp_path / "again", str(tmp_path / "twice"), "safetensors", say=quiet)
    assert contents(tmp_path / "twice") == contents(tmp_path / "out")


def test_the_loader_in_the_documentation_reads_them(trained, tmp_path):
    run, recipe, params, _ = trained
    foreign.send(run, str(tmp_path / "out"), "safetensors", say=quiet)
    example = re.search(r"without cm3jax:\n\n((?:    .*\n|\n)+)", plain.__doc__)[1]
    scope = {"folder": tmp_path / "out"}
    exec(re.sub(r"(?m)^    ", "", example), scope)
    assert np.array_equal(scope["first"], params["layers"]["attention"]["q"]["w"][0])
    assert scope["vocab"]["text"] == recipe.vocab.text
    names = set(scope["weights"])
    assert {"table", "head", "norm.scale", "layers.1.mlp.gate.w", "layers.0.attention.q_norm.bias"} <= names


def test_the_documentation_names_every_array_of_pictures_and_retriever():
    """And names no other."""
    expand = lambda word: re.escape(word).replace(r"\{", "(").replace(r"\}", ")").replace(",", "|")  # noqa: E731
    section = plain.__doc__.split("Of image/ and retriever/")[1].split("To read them")[0]
    words = {x for x in re.findall(r"[\w{},/.]+", "\n".join(re.findall("(?m)^    (.*)", section)))}
    words = {word.strip(",") for word in words if "/" in word or word in ("codebook", "logit_scale")}
    patterns = {re.sub("[0-9]+", "[0-9]+", expand(word)).replace(r"\.\.\.", ".+") for word in words}
    names = {path for size in (False, True) for path in vqgan._shapes(_network(size), 5)}
    model = config.CLIP(vision_width=64, vision_layers=1, text_width=64, text_layers=1, vision_heads=1, text_heads=1)
    made = jax.eval_shape(lambda key: clip.init(clip.CLIP(model, 9), key), jax.random.key(0))
    names |= set(flax.traverse_util.flatten_dict(sharding.unbox(made), sep="/"))
    assert not [name for name in names if not any(re.fullmatch(pattern, name) for pattern in patterns)]
    assert not [pattern for pattern in patterns if not any(re.fullmatch(pattern, name) for name in names)]


def _network(scores):
    """Return a small network, of both kinds one with every part that there is."""
    quantizer = {"quantizer": "argmax", "latents": 32} if scores else {}
    return config.VQGAN(width=32, multipliers=(1, 2), attention=(0, 1), z=8, **quantizer)


def test_a_checkpoint_and_a_type_can_be_chosen(trained, tmp_path, capsys):
    run = trained[0]
    out = str(tmp_path / "out")
    assert cli.main(["export", str(run), out, "--step", "7", "--dtype", "bfloat16"]) == 0
    assert {t.dtype.name for t in tensors.open(tmp_path / "out").found.values()} == {"bfloat16"}
    assert cli.main(["export", str(run), str(tmp_path / "none"), "--step", "8"]) == 2
    assert "no step 8" in capsys.readouterr().err
    assert cli.main(["export", str(run), out]) == 2
    assert "is there already" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_spoilt_plain_folder_is_refused_by_name(trained, tmp_path):
    foreign.send(trained[0], str(tmp_path / "out"), "safetensors", say=quiet)
    path = tmp_path / "out" / "config.json"
    told = json.loads(path.read_text())
    for change, words in (
        ({"version": 2}, "version = 2"),
        ({"recipe": told["recipe"] | {"colour": 1}}, "unknown field 'colour'"),
        ({"recipe": told["recipe"] | {"vocab": told["recipe"]["vocab"] | {"text": 400}}}, "has shape"),
    ):
        path.write_text(json.dumps(told | change))
        with pytest.raises(UserError, match=words):
            foreign.bring(str(tmp_path / "out"), str(tmp_path / "again"), say=quiet)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_an_image_tokenizer_alone_comes_back(tmp_path):
    made = {n: torch.tensor(x) for n, x in checkpoints.pictures("").items()}
    torch.save(made, tmp_path / "vqgan.ckpt")
    foreign.bring(str(tmp_path / "vqgan.ckpt"), str(tmp_path / "run"), resolution=8, say=quiet)
    foreign.send(tmp_path / "run", str(tmp_path / "out"), "safetensors", say=quiet)
    foreign.bring(str(tmp_path / "out"), str(tmp_path / "again"), say=quiet)
    first, second = (image.load(tmp_path / name / "image").params for name in ("run", "again"))
    assert jax.tree.all(jax.tree.map(np.array_equal, first, second))
    with pytest.raises(UserError, match="has no retriever/"):
        foreign.send(tmp_path / "run", str(tmp_path / "hf"), "hf", part="retriever", say=quiet)


PUBLISHED = {
    "taming": ("taming", "state_dict", torch.float32),
    "Gumbel": ("Gumbel", "state_dict", torch.float32),
    "LlamaGen": ("LlamaGen", "model", torch.float32),
    "half precision": ("taming", "", torch.bfloat16),
}


@pytest.mark.parametrize(("name", "within", "kind"), PUBLISHED.values(), ids=PUBLISHED)
def test_a_published_image_tokenizer_comes_back_bit_for_bit_through_the_verbs(tmp_path, name, within, kind):
    state = {n: x.to(kind) for n, x in vqgans.random(vqgans.SMALL[name]).state_dict().items()}
    torch.save({within: state, "epoch": 3} if within else state, tmp_path / "last.ckpt")
    source, run, out, again = (str(tmp_path / n) for n in ("last.ckpt", "run", "out", "again"))
    assert cli.main(["import", source, run, "--resolution", "16"]) == 0
    assert cli.main(["export", run, out, "--to", "hf"]) == 0
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["vqgan.safetensors"]
    written = safetensors.torch.load_file(tmp_path / "out" / "vqgan.safetensors")
    assert {n: x.dtype for n, x in written.items()} == {n: kind for n in state}
    assert all(torch.equal(written[n], x) for n, x in state.items()), "others' own names and shapes"
    assert cli.main(["import", out, again]) == 0, "the file tells the pictures' size"
    assert cli.main(["export", again, str(tmp_path / "twice"), "--to", "hf"]) == 0
    for file in ("config.json", "weights.safetensors"):
        assert (tmp_path / "again/image" / file).read_bytes() == (tmp_path / "run/image" / file).read_bytes()
    assert contents(tmp_path / "twice") == contents(out)


def test_an_image_tokenizer_that_was_trained_here_has_published_names_if_it_is_such_a_network(trained, tmp_path):
    foreign.send(trained[0], str(tmp_path / "out"), "hf", part="image", say=quiet)
    written = tensors.open(tmp_path / "out").found
    assert {n: t.read().tobytes() for n, t in written.items()} == {
        n: x.tobytes() for n, x in checkpoints.pictures("").items()
    }
    model = dataclasses.replace(checkpoints.PICTURES.model, patch=2)
    params = sharding.unbox(nets.VQGAN(model, 5).init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"])
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "recipe.json").write_text((trained[0] / "recipe.json").read_text())
    image.save(tmp_path / "own" / "image", model, 5, 8, params)
    with pytest.raises(UserError, match=r"image\.model\.patch = 2: taming's networks have 1"):
        foreign.send(tmp_path / "own", str(tmp_path / "none"), "hf", say=quiet)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "own"]


@pytest.mark.parametrize("told", ["x", "-16", "9" * 4000, "17"])
def test_a_pictures_size_that_cannot_be_is_not_taken_from_a_file(tmp_path, told):
    held = {name: mapped.held(x) for name, x in checkpoints.pictures("").items()}
    safetensor_files.write(tmp_path / "vqgan.safetensors", held, {"resolution": told})
    with pytest.raises(UserError, match="resolution"):
        foreign.bring(str(tmp_path / "vqgan.safetensors"), str(tmp_path / "run"), say=quiet)


# --------------------------------------------------------------------------------------------------------------- memory

PEAKS = """
import sys
from cm3jax import foreign, metrics

def peak():
    return int(metrics.peak_memory_gib() * 2**30)

small, run, out, again = sys.argv[1:]
quiet = lambda line: None
for to in ("hf", "safetensors"):
    foreign.send(foreign.pathlib.Path(small), f"{out}-{to}-first", to, say=quiet)
foreign.bring(f"{out}-safetensors-first", f"{again}-first", say=quiet)
before = peak()
for to in ("hf", "safetensors"):
    foreign.send(foreign.pathlib.Path(run), f"{out}-{to}", to, say=quiet)
after = peak()
foreign.bring(f"{out}-safetensors", again, say=quiet)
print(after - before, peak() - before)
"""


@pytest.mark.slow
def test_export_and_import_need_the_memory_of_the_largest_array(trained, tmp_path):
    """A decoder of 240 MB whose largest array has 34 MB, in a process of its own."""
    run, recipe, *_ = trained
    model = dataclasses.replace(recipe.decoder.model, layers=32, width=512, kv_heads=0, mlp_width=512)
    big = dataclasses.replace(recipe, decoder=dataclasses.replace(recipe.decoder, model=model))
    other = tmp_path / "run"
    other.mkdir()
    for name in ("text", "image"):
        (other / name).symlink_to(run / name)
    (other / "recipe.json").write_text(json.dumps(config.to_json(big)))
    wanted = chameleon.shapes(model, recipe.vocab.size, 64)
    ones = lambda at: np.ones([part.stop - part.start for part in at], np.float32)  # noqa: E731
    arrays = {
        path: streamed.Array(x.shape, np.dtype(np.float32), (1, *x.shape[1:]) if "layers/" in path else x.shape, ones)
        for path, x in wanted.items()
    }
    size, largest = sum(x.size for x in arrays.values()) * 4, max(x.size for x in arrays.values()) * 4
    assert size > 6.5 * largest > 2e8
    streamed.save(other / "decoder", 0, flax.traverse_util.unflatten_dict(arrays, sep="/"), {})
    arguments = [str(run), str(other), str(tmp_path / "out"), str(tmp_path / "again")]
    done = subprocess.run([sys.executable, "-c", PEAKS, *arguments], capture_output=True, text=True, check=True)
    out, both = map(int, done.stdout.split())
    assert out < 3 * largest and both < 3 * largest, (out / largest, both / largest)
