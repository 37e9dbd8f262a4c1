"""Laws of the retriever at work: vectors, dropout, documents, and what its folder holds."""

import dataclasses
import gzip
import json
import shutil

import flax.traverse_util
import jax
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from cm3jax import cli, config, foreign, run, sharding, stages
from cm3jax.interop import tensors
from cm3jax.nn import clip
from cm3jax.retrieval import encoder, weights
from cm3jax.tokenizers import clip as tokenizers
from cm3jax.tokenizers import text
from cm3jax.types import Record, UserError

MODEL = config.CLIP(
    resolution=14,
    patch=7,
    vision_width=64,
    vision_layers=1,
    vision_heads=1,
    context=9,
    text_width=64,
    text_layers=1,
    text_heads=1,
    size=8,
)
"""Heads of 64, as in OpenAI's weights."""
TEXTS = ["a red circle", "", "a blue square, and far more words than fit into the context", "a", "two green stars"]


def pictures(n=5, seed=0):
    rng = np.random.default_rng(seed)
    return [
        rng.integers(0, 256, (*shape, 3), np.uint8) for shape in [(14, 14), (31, 17), (5, 9), (14, 14), (40, 40)][:n]
    ]


def tokenizer(folder):
    text.train(TEXTS * 3, 300, folder / tokenizers.PIECES, config.Text())
    return tokenizers.load(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a retriever's folder, its weights all random."""
    pieces, out = tokenizer(tmp_path_factory.mktemp("text")), tmp_path_factory.mktemp("retriever")
    net = clip.CLIP(MODEL, pieces.rows)
    shapes = sharding.unbox(jax.eval_shape(lambda key: clip.init(net, key), jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: (0.2 * rng.normal(size=x.shape)).astype(np.float32), shapes)
    encoder.save(out, MODEL, params, pieces)
    return out


@pytest.fixture(scope="module")
def found(folder):
    return encoder.load(folder, batch=8)


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "retriever")


def test_vectors_have_length_1_and_do_not_depend_on_batch_mates(found):
    for vectors, one in [
        (found.texts(TEXTS), lambda i: found.texts([TEXTS[i]])),
        (found.pictures(pictures()), lambda i: found.pictures([pictures()[i]])),
    ]:
        assert vectors.shape == (5, 8) and vectors.dtype == np.float32 and np.isfinite(vectors).all()
        for i in range(5):
            np.testing.assert_array_equal(vectors[i], one(i)[0])
        full = vectors.any(1)
        np.testing.assert_allclose(np.linalg.norm(vectors[full], axis=1), 1, rtol=1e-6)
        assert full.sum() >= 4 and len(np.unique(vectors.round(4), axis=0)) == 5


def test_more_rows_than_a_batch_and_none_at_all(found):
    many = TEXTS * 5
    np.testing.assert_array_equal(found.texts(many), np.tile(found.texts(TEXTS), (5, 1)))
    assert found.texts([]).shape == found.pictures([]).shape == (0, 8)
    assert found.features(pictures(2)).shape == (2, 64)
    with pytest.raises(UserError, match=r"picture of float64 \(3, 3\): the encoder takes uint8"):
        found.pictures([np.zeros((3, 3))])


def test_the_rows_of_a_call_and_their_vectors_lie_split_over_the_devices(found, monkeypatch):
    calls, compiled = [], encoder.Encoder._compiled

    def watched(self, method):
        def call(*arguments):
            calls.append((*arguments, compiled(self, method)(*arguments)))
            return calls[-1][-1]

        return call

    monkeypatch.setattr(encoder.Encoder, "_compiled", watched)
    wide = dataclasses.replace(found, batch=16)
    np.testing.assert_allclose(wide.texts(TEXTS), found.texts(TEXTS), atol=1e-6)
    np.testing.assert_allclose(wide.pictures(pictures()), found.pictures(pictures()), atol=1e-6)
    assert [rows[0].shape[0] for _, *rows in calls] == [16, 8, 16, 8]
    for params, *rows in calls:
        for x in rows:
            shape = (x.shape[0] // 8, *x.shape[1:])
            assert [(s.device, s.data.shape) for s in x.addressable_shards] == [(d, shape) for d in jax.devices()]
        assert all(x.is_fully_replicated and len(x.addressable_shards) == 8 for x in jax.tree.leaves(params))


def test_dropout_is_a_function_of_the_rows_own_seed(found):
    several = found.texts(TEXTS, dropout=0.5, seeds=range(5))
    np.testing.assert_array_equal(several[2:4], found.texts(TEXTS[2:4], dropout=0.5, seeds=[2, 3]))
    others = [found.texts(TEXTS[2:3], dropout=0.5, seeds=[seed])[0].tobytes() for seed in range(6)]
    assert len(set(others)) == 6
    np.testing.assert_array_equal(found.texts(TEXTS, dropout=0.0, seeds=range(5)), found.texts(TEXTS))
    with pytest.raises(ValueError, match="needs one seed for each of the 5 texts"):
        found.texts(TEXTS, dropout=0.2)


def test_dropout_takes_its_share():
    left = [len(encoder.dropped(range(50), 0.2, seed)) for seed in range(400)]
    assert abs(np.mean(left) - 40) < 3 * np.sqrt(50 * 0.2 * 0.8 / 400)
    assert encoder.dropped([3, 5], 0.0, 1) == [3, 5] and encoder.dropped([3, 5], 1.0, 1) == []


def test_a_text_with_no_token_left_is_no_query(found):
    for vectors in (found.texts(["", "a"])[:1], found.texts(TEXTS, dropout=1.0, seeds=range(5))):
        assert (vectors == encoder.EMPTY).all() and not vectors.any()


def test_a_documents_vector_is_the_mean_of_its_texts_and_its_pictures(found):
    one, two, *_ = pictures()
    records = [
        Record("pair", ("a red circle", one)),
        Record("text", ("a red circle",)),
        Record("picture", (one,)),
        Record("page", ("a red", two, "circle", one)),
        Record("codes", (np.zeros(4, np.uint16),)),
        Record("blank", ("  ", two)),
    ]
    vectors, text, image = found.documents(records)
    words, lines, (first, second) = *found.texts(["a red circle", "a red\ncircle"]), found.pictures([one, two])
    both = (first + second) / np.linalg.norm(first + second)
    wanted = [(words + first) / 2, words, first, (lines + both) / 2, np.zeros(8), second]
    np.testing.assert_allclose(vectors, wanted, atol=1e-6)
    assert text.tolist() == [True, True, False, True, False, False]
    assert image.tolist() == [True, False, True, True, False, True]


def test_embedding_goes_in_order_and_says_how_fast(found):
    records, said = [Record(str(i), (TEXTS[i % 5], pictures()[i % 5])) for i in range(19)], []
    parts = list(encoder.embed(found, iter(records), said.append))
    assert [r.key for batch, *_ in parts for r in batch] == [r.key for r in records]
    assert [len(batch) for batch, *_ in parts] == [8, 8, 3]
    np.testing.assert_array_equal(np.concatenate([part[1] for part in parts]), found.documents(records)[0])
    assert said[0].startswith("19 documents, ") and "per chip (8 x cpu)" in said[0]


def test_what_is_saved_is_loaded_and_a_batch_is_rounded_up_to_the_devices(found, folder):
    again = encoder.load(folder, batch=3, devices=tuple(jax.local_devices()[:2]))
    assert (again.identity, again.batch, again.size, again.config) == (found.identity, 4, 8, MODEL)
    np.testing.assert_allclose(again.texts(TEXTS), found.texts(TEXTS), atol=1e-6)


def test_identity_is_that_of_weights_network_and_tokenizer(found):
    params = jax.tree.map(np.array, found.params)
    params["text"]["norm"]["bias"][0] += 1e-3
    other = config.from_json(config.CLIP, config.to_json(MODEL) | {"activation": "gelu"})
    identities = {
        found.identity,
        encoder.identify(MODEL, params, found.tokenizer),
        encoder.identify(other, found.params, found.tokenizer),
    }
    assert len(identities) == 3 and all(len(i) == 16 for i in identities)
    assert encoder.identify(MODEL, found.params, found.tokenizer) == found.identity


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("config.json", None, r"no retriever here \(config.json is missing\)"),
        ("config.json", b"{", "not JSON"),
        ("config.json", b"{}", "field 'model' is missing or no dict"),
        ("weights.safetensors", None, "No such file or directory; make the retriever again"),
        ("weights.safetensors", b"x" * 1000, "damaged"),
        ("tokenizer.model", None, r"no text tokenizer here \(vocab.json is missing\)"),
    ],
)
def test_a_folder_that_is_not_whole_gives_one_clear_line(copy, name, data, message):
    if data is None:
        (copy / name).unlink()
    else:
        (copy / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        encoder.load(copy)
    assert "\n" not in str(error.value)


def test_another_tokenizer_than_the_trained_one_is_refused(copy):
    text.train(["entirely other words"], 300, copy / tokenizers.PIECES, config.Text())
    with pytest.raises(UserError, match="are not of one retriever"):
        encoder.load(copy)


# ---------------------------------------------------------------------------------------------------- published weights


SYMBOLS = [*tokenizers.SIGNS, *(s + tokenizers.LAST for s in tokenizers.SIGNS), tokenizers.BEGIN, tokenizers.END]


def publish(found, out, layout=weights.OPENAI, change=lambda tensors: None):
    """Write the encoder's weights as OpenAI or Hugging Face would, with CLIP's kind of tokenizer."""
    flat, tensors = flax.traverse_util.flatten_dict(found.params, sep="/"), {}
    rows, width = len(SYMBOLS), MODEL.text_width
    flat["text/table"] = np.random.default_rng(1).normal(size=(rows, width)).astype(np.float32)
    for path, layers in weights.sources(MODEL, rows, layout).items():
        for i, source in enumerate(layers):
            x = flat[path][i] if "/layers/" in path else flat[path]
            tensor = tensors.setdefault(source.name, np.zeros(source.shape, np.float32))
            # `take` only moves entries, so it says where each of ours lies
            places = source.take(np.arange(tensor.size).reshape(source.shape))
            tensor.reshape(-1)[places] = x
    change(tensors)
    out.mkdir(exist_ok=True)
    safetensors.numpy.save_file({name: np.asarray(x) for name, x in tensors.items()}, out / weights.FILE)
    if layout is weights.HUGGING_FACE:
        tower = {"hidden_act": "quick_gelu", "num_attention_heads": 1}
        (out / weights.CONFIG).write_text(json.dumps({"text_config": tower, "vision_config": tower}))
    (out / tokenizers.VOCAB).write_text(json.dumps({s: i for i, s in enumerate(SYMBOLS)}))
    (out / tokenizers.MERGES).write_text("#version: 0.2\n")
    return out


@pytest.mark.parametrize("layout", [weights.OPENAI, weights.HUGGING_FACE], ids=["openai", "huggingface"])
def test_published_weights_are_an_encoder_and_stay_the_same_one_in_a_run(found, tmp_path, layout):
    direct = encoder.load(publish(found, tmp_path / "clip", layout), batch=8)
    np.testing.assert_array_equal(direct.pictures(pictures()), found.pictures(pictures()))
    retriever = config.Retriever(weights=str(tmp_path / "clip"), model=MODEL)
    recipe = config.Recipe(retrieve=True, retriever=retriever)
    run.refuse_misfits(recipe, ["retriever"])
    run.retriever(recipe, tmp_path)
    again = encoder.load(tmp_path / "retriever", batch=8)
    assert again.identity == direct.identity and (tmp_path / "retriever" / "merges.txt").is_file()
    np.testing.assert_array_equal(again.texts(TEXTS), direct.texts(TEXTS))


def test_openais_own_file_is_imported_and_becomes_a_folder_that_a_run_takes(found, tmp_path):
    """A TorchScript program, of half precision but for the norms, and the file of its tokenizer."""
    source, module = publish(found, tmp_path / "clip"), torch.nn.Module()
    for name in (tokenizers.VOCAB, tokenizers.MERGES):
        (source / name).unlink()
    (source / tokenizers.OPENAI).write_bytes(gzip.compress(b"a heading\n"))
    tensors = safetensors.torch.load_file(source / weights.FILE)
    halves = {name: x if "ln_" in name else x.half() for name, x in tensors.items()}
    for name, x in halves.items():
        at, (*folders, last) = module, name.split(".")
        for folder in folders:
            if folder not in dict(at.named_children()):
                at.add_module(folder, torch.nn.Module())
            at = at.get_submodule(folder)
        at.register_parameter(last, torch.nn.Parameter(x))
    module.register_buffer("input_resolution", torch.tensor(MODEL.resolution))
    (source / weights.FILE).unlink()
    torch.jit.save(torch.jit.script(module), source / "ViT-B-32.pt")
    assert cli.main(["import", str(source / "ViT-B-32.pt"), str(tmp_path / "run")]) == 0
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "hf"), "--to", "hf"]) == 0
    safetensors.torch.save_file(halves, source / weights.FILE)
    wanted = encoder.load(source)
    for folder in (tmp_path / "run" / "retriever", tmp_path / "hf"):
        made = encoder.load(folder)
        assert made.config == MODEL and made.identity == wanted.identity


def test_a_wrong_tensor_of_any_file_of_clip_is_named_with_the_file(found, tmp_path, capsys):
    source = publish(found, tmp_path / "clip", change=put("ln_final.bias", 3))
    torch.save(safetensors.torch.load_file(source / weights.FILE), source / "clip.pt")
    assert cli.main(["import", str(source / "clip.pt"), str(tmp_path / "run")]) == 2
    assert f"'{source / 'clip.pt'}': ln_final.bias has shape (3,), must be (64,)" in capsys.readouterr().err


def test_weights_of_another_network_stop_the_run_and_name_the_flags(found, tmp_path):
    folder = publish(found, tmp_path / "clip")
    recipe = config.Recipe(retrieve=True, retriever=config.Retriever(weights=str(folder)))
    with pytest.raises(UserError, match="--retriever.model.resolution 14 --retriever.model.patch 7") as error:
        run.refuse_misfits(recipe, ["retriever"])
    assert "activation" not in str(error.value) and "\n" not in str(error.value)


def without(name):
    return lambda tensors: tensors.pop(name)


def put(name, *shape):
    return lambda tensors: tensors.update({name: np.zeros(shape, np.float32)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("ln_final.bias"), "no tensor 'ln_final.bias'"),
        (without("transformer.resblocks.0.mlp.c_fc.weight"), "no tensor 'transformer.resblocks.0.mlp.c_fc.weight'"),
        (without("visual.class_embedding"), "no tensor 'vision_model.embeddings.class_embedding'"),
        (without("positional_embedding"), "no tensor 'positional_embedding'"),
        (put("ln_final.bias", 3), r"ln_final.bias has shape \(3,\), must be \(64,\)"),
        (put("visual.conv1.weight", 3), r"visual.conv1.weight has shape \(3,\), must have 4 dimensions"),
        (put("visual.positional_embedding", 4, 64), r"has shape \(4, 64\), must be \(2, 64\)"),
        (put("adapter", 3), r"adapter is no tensor of plain CLIP \(1 such\)"),
        (put("text_model.embeddings.position_ids", 1, 9), ""),
    ],
)
def test_a_tensor_that_is_missing_wrong_or_left_over_is_named(found, tmp_path, change, message):
    folder = publish(found, tmp_path / "clip", change=change)
    if not message:
        weights.load(folder)  # old files hold these too
        return
    with pytest.raises(UserError, match=message) as error:
        weights.load(folder)
    assert "\n" not in str(error.value)


def test_a_folder_without_weights_or_config_gives_one_clear_line(found, tmp_path):
    with pytest.raises(UserError, match=r"model.safetensors': no such file"):
        weights.load(tmp_path)
    (tmp_path / weights.FILE).write_bytes(b"torch")
    with pytest.raises(UserError, match="not a safetensors file"):
        weights.load(tmp_path)
    folder = publish(found, tmp_path / "clip", weights.HUGGING_FACE)
    (folder / weights.CONFIG).write_text(json.dumps({"text_config": {"hidden_act": "gelu"}}))
    with pytest.raises(UserError, match="hidden_act is gelu and quick_gelu"):
        weights.load(folder)
    (folder / weights.CONFIG).unlink()
    with pytest.raises(UserError, match=r"config.json': no such file; Hugging Face's weights need"):
        weights.load(folder)


@pytest.mark.parametrize("layout", [weights.OPENAI, weights.HUGGING_FACE], ids=["openai", "huggingface"])
def test_import_makes_the_same_retriever_of_published_weights(found, tmp_path, layout):
    direct = encoder.load(publish(found, tmp_path / "clip", layout), batch=8)
    out = foreign.bring(str(tmp_path / "clip"), str(tmp_path / "run"), say=lambda line: None)
    assert encoder.load(out / "retriever", batch=8).identity == direct.identity
    assert config.load(out / "recipe.json").retriever.model == MODEL
    assert stages.read(out / "retriever").complete
    publish(found, tmp_path / "less", layout, lambda tensors: tensors.pop(layout["text/positions"]))
    with pytest.raises(UserError, match=f"no tensor {layout['text/positions']!r}"):
        foreign.bring(str(tmp_path / "less"), str(tmp_path / "other"), say=lambda line: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip", "less", "run"]


def test_a_retriever_comes_back_from_hugging_faces_layout(folder, found, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(folder, run / "retriever")
    (run / "recipe.json").write_text(json.dumps(config.to_json(config.Recipe())))
    assert cli.main(["export", str(run), str(tmp_path / "out"), "--to", "hf"]) == 0
    assert encoder.load(tmp_path / "out", batch=8).identity == found.identity
    again = foreign.bring(str(tmp_path / "out"), str(tmp_path / "again"), say=lambda line: None)
    assert encoder.load(again / "retriever", batch=8).identity == found.identity
    foreign.send(run, str(tmp_path / "half"), "hf", dtype="bfloat16", part="retriever", say=lambda line: None)
    assert {t.dtype.name for t in tensors.open(tmp_path / "half").found.values()} == {"bfloat16"}
    with pytest.raises(UserError, match="has no decoder/"):
        foreign.send(run, str(tmp_path / "none"), "hf", part="decoder", say=lambda line: None)
    with pytest.raises(UserError, match="--to safetensors writes all parts"):
        foreign.send(run, str(tmp_path / "none"), "safetensors", part="retriever", say=lambda line: None)
    assert not (tmp_path / "none").exists()
