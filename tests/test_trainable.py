"""Laws of training a part of the decoder alone, and of beginning with weights from elsewhere."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding
from talking_run import MODEL, VOCAB

from cm3jax import config as configs
from cm3jax import sharding, trees
from cm3jax.nn import decoder
from cm3jax.train import lm, loop

STAGE = configs.DecoderStage(
    model=dataclasses.replace(MODEL, layers=1, init_std=0.1, remat="none"),
    packing=configs.Packing(kind="whole", length=13),
    training=configs.Training(
        steps=2, batch=8, save_every=0, optimizer=configs.Optimizer(peak_lr=1e-2, warmup=0, weight_decay=0.1), ema=0.9
    ),
    trainable="image_head",
)
CODES = slice(VOCAB.image_start, VOCAB.sentinel_start)


def batch(seed=0):
    ids = np.random.default_rng(seed).integers(0, VOCAB.used, (8, 13)).astype(np.int32)
    ones = np.ones_like(ids)
    return {
        "inputs": ids,
        "targets": np.roll(ids, -1, 1),
        "weights": ones.astype(np.float32),
        "positions": np.tile(np.arange(13, dtype=np.int32), (8, 1)),
        "segments": ones,
        "modality": VOCAB.is_image(ids).astype(np.int8),
    }


def weights(target):
    """Return random weights in the shapes and places of a tree."""
    draw = np.random.default_rng(3)
    return jax.tree.map(
        lambda x: jax.device_put((0.2 * draw.standard_normal(x.shape)).astype(x.dtype), x.sharding), target
    )


@pytest.fixture(scope="module", params=["adamw", "muon"])
def trained(request, tmp_path_factory):
    """Return (the weights that training began with, its last state), on eight devices."""
    optimizer = dataclasses.replace(STAGE.training.optimizer, name=request.param)
    training = dataclasses.replace(STAGE.training, optimizer=optimizer)
    task = lm.task(dataclasses.replace(STAGE, training=training), VOCAB)
    first = []

    def given(target):
        first.append(jax.tree.map(np.asarray, found := weights(target)))
        return found

    folder = tmp_path_factory.mktemp("decoder")
    state = loop.train(task, lambda step: iter([batch(0), batch(1)][step:]), None, training, folder, weights=given)
    return first[0], state


def test_all_but_the_heads_rows_of_codes_stays_bit_for_bit(trained):
    before, state = trained
    for after in (state.params, state.extra["ema"]):
        old, new = trees.named_leaves(before), trees.named_leaves(jax.tree.map(np.asarray, after))
        assert set(old) == set(new)
        for name in set(old) - {"head"}:
            np.testing.assert_array_equal(new[name], old[name], err_msg=name)
        rest = np.ones(VOCAB.size, bool)
        rest[CODES] = False
        np.testing.assert_array_equal(new["head"][rest], old["head"][rest])
        assert (new["head"][CODES] != old["head"][CODES]).any(1).all()


def test_the_optimizer_keeps_moments_of_the_trained_rows_alone(trained):
    _, state = trained
    sizes = {x.shape for x in jax.tree.leaves(state.opt_state) if x.ndim > 1}  # the rest are settings and counts
    assert sizes == {(VOCAB.image, MODEL.width)}


def test_its_gradient_is_that_of_the_whole_training():
    net, data = lm.model(STAGE, VOCAB), jax.tree.map(jnp.asarray, batch())
    params = sharding.unbox(lm.task(STAGE, VOCAB).init(jax.random.key(0)).params)
    params = jax.tree.map(lambda x: x + 0.1, params)
    part = lm.Part(STAGE, VOCAB)
    loss = lambda params: lm.losses(net, STAGE, params, data)[0][0]  # noqa: E731
    whole = jax.grad(loss)(params)["head"][CODES]
    own = jax.grad(lambda own: loss(part.put(params, own)))(part.taken(params))["head"]
    np.testing.assert_allclose(own, whole, rtol=1e-5, atol=1e-6)
    assert np.abs(whole).max() > 1e-3


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_pieces_that_a_model_never_saw_are_drawn_anew_and_nothing_else(tied):
    """On one device as on eight; the new rows differ, and are as long as those of pieces that it saw."""
    net = decoder.Decoder(dataclasses.replace(STAGE.model, tied=tied, width=64), VOCAB.size, 13)
    shapes = nn.unbox(jax.eval_shape(lambda key: decoder.init(net, key), jax.random.key(0)))
    one = SingleDeviceSharding(jax.devices()[0])
    old = weights(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), shapes))
    text, seen = VOCAB.is_text(np.arange(VOCAB.size)), np.random.default_rng(0).random(VOCAB.size) < 0.5
    new, tables = lm.drawn(old, VOCAB, seen, jax.random.key(1)), ["table"] if tied else ["table", "head"]
    for name, a in trees.named_leaves(old).items():
        b = np.asarray(trees.named_leaves(new)[name])
        if name not in tables:
            assert np.array_equal(a, b)
            continue
        assert np.array_equal(a[~(text & ~seen)], b[~(text & ~seen)])
        a, b = np.asarray(a)[text & seen], b[text & ~seen]
        assert abs(np.std(b) / np.sqrt(np.mean(np.square(a))) - 1) < 0.1
        assert np.abs(np.corrcoef(b) - np.eye(len(b))).max() < 0.7
    assert tied or not np.allclose(new["table"][text & ~seen], new["head"][text & ~seen])
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    over = NamedSharding(mesh, PartitionSpec(None, "x"))
    spread = old | {name: jax.device_put(old[name], over) for name in tables}
    again = lm.drawn(spread, VOCAB, seen, jax.random.key(1))
    for name in tables:  # the mean square is summed in another order
        assert again[name].sharding == over
        np.testing.assert_allclose(again[name], new[name], rtol=1e-5)


def test_what_pieces_no_model_saw_is_nothing_to_ask():
    with pytest.raises(ValueError, match="decoder.unseen = drawn: rows of which model"):
        dataclasses.replace(STAGE, unseen="drawn")


def test_a_tied_head_is_refused():
    with pytest.raises(ValueError, match="decoder.trainable = image_head: with decoder.model.tied"):
        dataclasses.replace(STAGE, model=dataclasses.replace(STAGE.model, tied=True))
