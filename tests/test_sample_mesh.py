"""Several devices draw and write as one does: the model split over heads and width, the rows over the rest."""

import dataclasses

import chameleons
import checkpoints
import jax
import ml_dtypes
import numpy as np
import pytest
import talking_run

from cm3jax import config as configs
from cm3jax import foreign, sharding, trees
from cm3jax.nn import decoder
from cm3jax.sample import decode, generate, grammar, layout
from cm3jax.tokenizers import turns
from cm3jax.train import lm
from cm3jax.types import UserError

MESHES = pytest.mark.parametrize("shape", [(2, 2, 2), (1, 8, 1)], ids=str)
GUIDED = configs.Sampling(temperature=0.7, top_p=0.9, guidance=3.0, image_guidance=1.2)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return talking_run.make(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def alone(run):
    return generate.load(run, batch=4)


def split(run, shape):
    return generate.load(run, batch=4, mesh=configs.Mesh(*shape))


@MESHES
def test_weights_lie_as_in_training(run, alone, shape):
    found, mesh = split(run, shape), sharding.mesh(configs.Mesh(*shape))
    weights = generate.weights(run, configs.load(run / "recipe.json"), mesh=configs.Mesh(*shape))
    boxed = jax.eval_shape(lambda key: decoder.init(found.model, key), jax.random.key(0))
    places = sharding.shardings(mesh, boxed, strict="")
    assert jax.tree.all(jax.tree.map(lambda x, place: x.sharding == place, weights, places))
    assert jax.tree.all(jax.tree.map(np.array_equal, found.params, alone.params))
    assert found.mesh == mesh and alone.mesh.size == 1
    for layer in found.params["layers"].values():  # taken apart, each as it lay in the stack
        pairs = jax.tree.map(lambda x, stack: (x.sharding.shard_shape(x.shape), stack), layer, weights["layers"])
        for part, stack in jax.tree.leaves(pairs, is_leaf=lambda x: isinstance(x, tuple)):
            assert part == stack.sharding.shard_shape(stack.shape)[1:]


@MESHES
def test_all_that_is_drawn_and_written_is_one_devices(run, alone, shape):
    many = split(run, shape)
    pictures = list(np.random.default_rng(5).integers(0, 256, (3, talking_run.SIDE, talking_run.SIDE, 3), np.uint8))
    codes = np.random.default_rng(0).integers(0, talking_run.VOCAB.image, (3, talking_run.CODES)).astype(np.uint16)
    prompts = [
        turns.picture(turns.continuation(["a", c], alone.text, alone.vocab, alone.form).ids, alone.vocab, alone.form)
        for c in codes
    ]
    for draw in (
        lambda g: g._codes(prompts, [talking_run.CODES] * 3, 1, GUIDED),
        lambda g: g.image_to_text(pictures, 2, configs.Sampling(), max_text=6),
    ):
        one, several = draw(alone), draw(many)
        assert len(one) == 3 and len({str(x) for x in one}) == 3
        assert all(np.array_equal(x, y) for x, y in zip(one, several, strict=True))


def test_the_cache_is_split_over_heads_and_rows(run, capfd):
    found, rows, steps = split(run, (1, 2, 2)), 4, talking_run.CODES
    form, vocab = found.form, found.vocab
    prompt = turns.text_to_image("a red", found.text, vocab, form)
    streams = [[ids for ids, _ in stream] for stream in zip(*[prompt.streams(2)] * rows, strict=True)]
    fixed = (
        decode.pad(streams, 16),
        grammar.start([grammar.CODES] * rows, left=steps),
        decode.settings(GUIDED, np.arange(rows)),
        np.full((rows, steps), -1, np.int32),
        jax.random.split(jax.random.key(0), rows),
    )
    rules = grammar.pictures(vocab, found.text.size, steps)
    with sharding.within(found.mesh):
        made = decode.decode.lower(found.model, rules, decode.kind(GUIDED), steps, found.params, *fixed).compile()
    cache = jax.eval_shape(lambda: decoder.init_cache(found.model.config, rows * 2, 15 + steps))["layers"][0]["k"]
    spelt = lambda *shape: f"f32[{','.join(map(str, shape))}]"  # noqa: E731
    (b, g, s, k), text = cache.shape, made.as_text()
    assert spelt(b // 2, g // 2, s, k) in text and spelt(b, g, s, k) not in text
    assert "Involuntary full rematerialization" not in capfd.readouterr().err


def test_small_weights_are_copied_and_large_ones_split_as_far_as_they_divide(run):
    def of(mesh=configs.Mesh(), heads=4, kv_heads=0, vocab=configs.Vocab(text=64, image=64, sentinels=16, multiple=64)):
        model = configs.Decoder(layers=1, width=64, heads=heads, kv_heads=kv_heads)
        stage = configs.DecoderStage(model=model, training=configs.Training(mesh=mesh))
        return configs.Recipe(vocab=vocab, decoder=stage)

    shape = lambda recipe, memory: dict(sharding.mesh(layout.mesh(recipe, 8, memory)).shape)  # noqa: E731
    size = trees.size(layout.abstract(lm.model(of().decoder, of().vocab), sharding.mesh(configs.Mesh())))
    copies, halves = (dict(zip(sharding.AXES, each, strict=True)) for each in ((8, 1, 1), (1, 4, 2)))
    assert shape(of(), None) == shape(of(), 16 * size) == copies
    assert shape(of(), 16 * size - 1) == {"replica": 1, "fsdp": 2, "tensor": 4}
    assert shape(of(kv_heads=2), 1) == halves
    assert shape(of(heads=8), 1) == {"replica": 1, "fsdp": 1, "tensor": 8}
    # A recipe's own mesh is kept where there are as many devices, and asked for it is never given up.
    assert shape(of(configs.Mesh(1, 4, 2)), None) == halves
    assert shape(of(configs.Mesh(2, 16, 2)), None) == copies
    six = sharding.mesh(layout.mesh(of(), 6, 1), jax.devices()[:6])
    assert dict(six.shape) == {"replica": 1, "fsdp": 1, "tensor": 2}  # 3 divide neither width nor heads
    assert layout.mesh(of(configs.Mesh(0, -1, 2)), 3, None) == configs.Mesh(-1, 1)
    with pytest.raises(UserError, match="does not fit 8 devices"):
        generate.weights(run, configs.load(run / "recipe.json"), mesh=configs.Mesh(1, 16, 1))
    recipe = configs.load(run / "recipe.json")
    training = dataclasses.replace(recipe.decoder.training, mesh=configs.Mesh())
    recipe = dataclasses.replace(recipe, decoder=dataclasses.replace(recipe.decoder, training=training))
    assert dict(sharding.mesh_of(generate.weights(run, recipe)).shape) == copies


@pytest.mark.slow
def test_an_import_of_half_precision_is_split_as_it_lies_in_its_file(tmp_path):
    about = checkpoints.settings(dtype="bfloat16", num_key_value_heads=2)
    checkpoints.hugging_face(tmp_path / "hf", about, chameleons.random_tensors(about, ml_dtypes.bfloat16))
    imported = foreign.bring(str(tmp_path / "hf"), str(tmp_path / "run"), say=lambda line: None)
    one, several = (split(imported, shape) for shape in ((1, 1, 1), (2, 2, 2)))
    assert {x.dtype for x in jax.tree.leaves(several.params)} == {np.dtype(ml_dtypes.bfloat16)}
    assert all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(several.params))
    assert jax.tree.all(jax.tree.map(np.array_equal, one.params, several.params))
    wide = [dataclasses.replace(g, model=g.model.clone(config=precise(g.model.config))) for g in (one, several)]
    pictures = [g.text_to_image(["a cat", "cat"], 1, GUIDED) for g in wide]
    assert np.array_equal(*pictures) and (pictures[0][0] != pictures[0][1]).any()


def precise(model):
    """Computed in float32, where the order of sums does not turn a draw."""
    return dataclasses.replace(model, dtype="float32")
