"""Laws of the next-token loss and of training the decoder."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shapes

from cm3jax import config as configs
from cm3jax import rng
from cm3jax.nn import decoder
from cm3jax.objectives import lm as objective
from cm3jax.train import lm
from cm3jax.vocab import Vocab

VOCAB = Vocab(text=23, image=31, sentinels=5, multiple=8)
MODEL = configs.Decoder(layers=2, width=32, heads=4, init_std=0.1, dtype="float32", remat="none")
STAGE = configs.DecoderStage(
    model=MODEL,
    packing=configs.Packing(kind="whole", length=13),
    training=configs.Training(
        steps=60, batch=8, optimizer=configs.Optimizer(peak_lr=1e-2, warmup=5, weight_decay=0.0), ema=0.9
    ),
)


def batch(b=8, t=13, seed=0):
    """A batch as data.pipeline makes it, with padding at the end of odd rows."""
    random = np.random.default_rng(seed)
    ids = random.integers(0, VOCAB.used, (b, t)).astype(np.int32)
    segments = np.ones((b, t), np.int32)
    segments[1::2, 9:] = 0
    weights = segments.astype(np.float32)
    weights[:, -1] = 0
    arrays = {
        "inputs": ids,
        "targets": np.roll(ids, -1, 1),
        "weights": weights,
        "positions": np.tile(np.arange(t, dtype=np.int32), (b, 1)),
        "segments": segments,
        "modality": random.integers(0, 4, (b, t)).astype(np.int8),
    }
    return jax.tree.map(jnp.asarray, arrays)


def parameters(stage=STAGE, seed=0):
    params = nn.unbox(jax.jit(lambda key: decoder.init(lm.model(stage, VOCAB), key))(jax.random.key(seed)))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return jax.tree.unflatten(
        tree, [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    )


@pytest.mark.parametrize("chunk", [1, 4, 5, 12])
def test_chunks_change_neither_loss_nor_gradient(chunk):
    params, data = parameters(), batch()

    def loss(params, chunk):
        stage = dataclasses.replace(STAGE, loss_chunk=chunk, z_loss=1e-2)
        (total, weight), _ = lm.losses(lm.model(stage, VOCAB), stage, params, data)
        return total / weight

    whole, chunked = (jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, c) for c in (64, chunk))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole, chunked)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_of_the_paper_never_holds_the_logits_of_a_row(accumulate):
    """Sequence 4096 and the whole vocabulary: all arrays with a side of the vocabulary are tables or one chunk."""
    model = configs.Decoder(layers=2, width=64, heads=2)
    stage = configs.DecoderStage(model=model, training=configs.Training(steps=2, batch=4, accumulate=accumulate))
    vocab = Vocab()
    wide = {x.shape for x in shapes.arrays_of(stage, vocab) if vocab.size in x.shape}
    chunk = (4 // accumulate, stage.loss_chunk, vocab.size)
    assert vocab.size > 65_000 and stage.packing.length == 4096
    assert chunk in wide and max(map(np.prod, wide)) == max(np.prod(chunk), vocab.size * model.width)


def test_token_losses_equal_log_softmax():
    params, data = parameters(), batch()
    hidden = jax.random.normal(jax.random.key(5), (8, 13, 32))
    nll, log_z = objective.token_losses(params, MODEL, hidden, data["targets"], 5)
    scores = np.asarray(hidden) @ np.asarray(params["table"]).T
    np.testing.assert_allclose(log_z, np.log(np.exp(scores).sum(-1)), rtol=1e-4)
    picked = np.take_along_axis(scores, np.asarray(data["targets"])[..., None], -1)[..., 0]
    np.testing.assert_allclose(nll, np.asarray(log_z) - picked, atol=1e-4)


def test_padding_changes_nothing():
    params, data = parameters(), batch()
    garbage = {**data, "inputs": jnp.where(data["segments"] > 0, data["inputs"], 7)}
    garbage["targets"] = jnp.where(data["weights"] > 0, data["targets"], 11)
    run = jax.jit(lambda x: lm.losses(lm.model(STAGE, VOCAB), STAGE, params, x)[1]["loss"])
    values = [run(x) for x in (data, garbage)]
    np.testing.assert_allclose(*[s / w for s, w in values], rtol=1e-6)


def test_losses_by_modality_add_up_to_the_loss_of_their_tokens():
    _, metrics = jax.jit(lambda p, x: lm.losses(lm.model(STAGE, VOCAB), STAGE, p, x))(parameters(), batch())
    data = batch()
    assert sum(metrics[f"loss_{n}"][1] for n in lm.MODALITIES) == (data["weights"] * (data["modality"] < 3)).sum()
    assert metrics["tokens"][0] == data["segments"].sum()


def test_the_initial_loss_is_that_of_a_uniform_guess():
    stage = configs.DecoderStage(model=configs.Decoder(layers=2, width=64, heads=4, dtype="float32"))
    params = nn.unbox(jax.jit(lambda key: decoder.init(lm.model(stage, VOCAB), key))(jax.random.key(0)))
    _, metrics = jax.jit(lambda p, x: lm.losses(lm.model(stage, VOCAB), stage, p, x))(params, batch())
    np.testing.assert_allclose(metrics["loss"][0] / metrics["loss"][1], np.log(VOCAB.size), rtol=2e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_one_batch_can_be_overfitted(optimizer):
    training = dataclasses.replace(
        STAGE.training, optimizer=dataclasses.replace(STAGE.training.optimizer, name=optimizer, muon_lr=0.02)
    )
    task = lm.task(dataclasses.replace(STAGE, training=training), VOCAB)
    state, data, step = nn.unbox(jax.jit(task.init)(rng.key(0, "init"))), batch(), jax.jit(task.step)
    for i in range(60):
        state, metrics = step(state, data, rng.key(0, "step", i))
    assert metrics["loss"][0] / metrics["loss"][1] < 0.1 * np.log(VOCAB.size)
    assert state.step == 60


def test_evaluation_uses_the_averaged_weights():
    task = lm.task(STAGE, VOCAB)
    state = nn.unbox(jax.jit(task.init)(rng.key(0, "init")))
    other = state.replace(params=parameters())
    run = jax.jit(task.evaluate)
    a, b = (run(s, batch())["loss"][0] for s in (state, other))
    assert a == b
    assert run(state.replace(extra={"ema": parameters()}), batch())["loss"][0] != a
