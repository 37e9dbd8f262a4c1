"""Laws of the retriever's training: accumulation, meshes, the temperature's limit, and that it learns."""

import dataclasses
import itertools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3jax import config, sharding
from cm3jax.data import pair_batches, shards
from cm3jax.nn import clip as networks
from cm3jax.retrieval import encoder
from cm3jax.tokenizers import clip as tokenizers
from cm3jax.tokenizers import text
from cm3jax.train import clip, loop
from cm3jax.train import state as states
from cm3jax.types import Record, UserError

VOCAB, B = 128, 8
MODEL = config.CLIP(
    resolution=16,
    patch=8,
    vision_width=16,
    vision_layers=1,
    vision_heads=2,
    context=9,
    text_width=16,
    text_layers=1,
    text_heads=2,
    size=8,
)
STAGE = config.Retriever(
    model=MODEL,
    training=config.Training(
        steps=40, batch=B, optimizer=config.Optimizer(peak_lr=1e-2, warmup=5, weight_decay=0.0), ema=0.9, save_every=0
    ),
)


def changed(**training):
    return dataclasses.replace(STAGE, training=dataclasses.replace(STAGE.training, **training))


def batch(seed=0):
    rng = np.random.default_rng(seed)
    ends = rng.integers(2, 9, B).astype(np.int32)
    pictures = rng.integers(0, 256, (B, 16, 16, 3)).astype(np.uint8)
    return {"ids": rng.integers(0, VOCAB, (B, 9)).astype(np.int32), "ends": ends, "pictures": pictures}


def train(stage, steps, mesh):
    """Return the state after some steps on one batch, and the loss of each."""
    compiled = loop.compile(clip.task(stage, VOCAB), stage.training, mesh)
    state, found = compiled.init(), []
    for _ in range(steps):
        with jax.set_mesh(mesh):
            state, metrics = compiled.step(state, sharding.place(mesh, batch()))
        found.append(float(metrics["loss"][0] / metrics["loss"][1]))
    return state, found


@pytest.fixture(scope="module")
def alone():
    return train(STAGE, 40, sharding.mesh(config.Mesh(fsdp=1)))


def test_one_batch_can_be_overfitted(alone):
    _, losses = alone
    assert losses[0] > 1.5 and losses[-1] < 0.1


@pytest.mark.slow
def test_sharded_training_is_that_of_one_device(alone):
    _, losses = train(STAGE, 4, sharding.mesh(config.Mesh(replica=2, fsdp=2, tensor=2)))
    np.testing.assert_allclose(losses, alone[1][:4], rtol=1e-4)


@pytest.mark.slow
def test_accumulation_compares_all_pairs_too():
    net = networks.CLIP(MODEL, VOCAB)
    params = sharding.unbox(jax.jit(lambda key: networks.init(net, key))(jax.random.key(0)))
    rows = jax.tree.map(jnp.asarray, batch())
    loss = jax.jit(jax.value_and_grad(lambda p, parts: clip.losses(net, p, rows, parts)[0]), static_argnums=1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), loss(params, 1), loss(params, 4))


@pytest.mark.slow
def test_the_temperature_is_learned_and_stops_at_a_hundredth(alone):
    assert abs(alone[0].params["logit_scale"] + np.log(STAGE.init_temperature)) > 0.01
    cold = dataclasses.replace(STAGE, init_temperature=1e-3)
    task = clip.task(cold, VOCAB)
    state = sharding.unbox(jax.jit(task.init)(jax.random.key(0)))
    assert state.params["logit_scale"] > clip.MOST_SCALE
    state, _ = jax.jit(task.step)(state, jax.tree.map(jnp.asarray, batch()), jax.random.key(0))
    assert state.params["logit_scale"] == np.float32(clip.MOST_SCALE)


def test_a_batch_of_one_pair_is_refused():
    with pytest.raises(UserError, match=r"retriever.training.batch = 1: must be at least 2"):
        clip.task(changed(batch=1), VOCAB)


COMPILE = """
import jax, numpy as np
from cm3jax import config as c, sharding
from cm3jax.train import clip, loop
model = c.CLIP(resolution=16, patch=8, vision_width=32, vision_layers=2, vision_heads=4, context=9, text_width=32,
               text_layers=2, text_heads=4, size=16)
batch = {"ids": np.zeros((16, 9), "i4"), "ends": np.ones(16, "i4"), "pictures": np.zeros((16, 16, 16, 3), "u1")}
for sizes, accumulate in (((1, 8, 1), 1), ((2, 2, 2), 2)):
    training = c.Training(steps=2, batch=16, mesh=c.Mesh(*sizes), accumulate=accumulate)
    mesh = sharding.mesh(training.mesh)
    compiled = loop.compile(clip.task(c.Retriever(model=model, training=training), 128), training, mesh)
    with jax.set_mesh(mesh):
        compiled.step.lower(compiled.abstract, sharding.place(mesh, batch, 16)).compile()
print("compiled")
"""


@pytest.mark.slow
def test_nothing_is_rematerialised_as_a_whole():
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "0"},  # the warning is lost above level 1
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert "compiled" in done.stdout, done.stderr
    assert "Involuntary full rematerialization" not in done.stderr


# ------------------------------------------------------------------------------------------------------------- the data


COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


def records(count):
    """Yield pairs of two colours, and between them texts and pictures alone, which teach nothing."""
    rng = np.random.default_rng(0)
    for i in range(count):
        names = rng.choice(list(COLOURS), 2)
        picture = np.concatenate([np.full((20, 10, 3), COLOURS[name], np.uint8) for name in names], 1)
        yield Record(f"{i}", (f"{names[0]} beside {names[1]}", picture))
        if i % 5 == 0:
            yield Record(f"{i} text", ("red",))
            yield Record(f"{i} picture", (picture,))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    for split, count in (("train", 40), ("validation", 11)):
        with shards.Writer(folder, split) as writer:
            for record in records(count):
                writer.write(record)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    text.train((r.parts[0] for r in records(40) if isinstance(r.parts[0], str)), 300, folder / tokenizers.PIECES)
    return tokenizers.load(folder)


def test_batches_are_the_same_from_any_step_and_for_any_hosts(prepared, tokenizer):
    take = lambda start, *host: next(pair_batches.batches(prepared, STAGE, tokenizer, start, *host))  # noqa: E731
    found = list(itertools.islice(pair_batches.batches(prepared, STAGE, tokenizer), 4))
    parts = [take(3, i, 2) for i in range(2)]
    for name, x in found[3].items():
        np.testing.assert_array_equal(x, take(3)[name])
        np.testing.assert_array_equal(x, np.concatenate([part[name] for part in parts]))
    assert found[0]["pictures"].shape == (B, 16, 16, 3) and found[0]["ids"].shape == (B, MODEL.context)
    assert not np.array_equal(found[0]["ids"], found[1]["ids"])


def test_a_row_is_a_text_with_its_own_picture(prepared, tokenizer):
    make = pair_batches.Pairs(prepared, STAGE.splits, STAGE, tokenizer)
    for caption, picture in map(make.choose, range(2 * len(make.reader))):
        names = caption.split(" beside ")
        assert [tuple(picture[10, x]) for x in (5, 15)] == [COLOURS[name] for name in names]


def test_data_without_a_pair_gives_one_clear_line(tmp_path, tokenizer):
    with shards.Writer(tmp_path, "train") as writer:
        writer.write(Record("0", ("red",)))
    with pytest.raises(UserError, match=r"no text with a picture in 100 records.*retriever.weights"):
        pair_batches.Pairs(tmp_path, STAGE.splits, STAGE, tokenizer)(0)


@pytest.mark.slow
def test_the_loop_trains_it_and_the_saved_encoder_finds_what_belongs_together(prepared, tokenizer, tmp_path):
    stage = changed(steps=60, ema=0.0)
    state = loop.train(
        clip.task(stage, tokenizer.rows),
        lambda step: pair_batches.batches(prepared, stage, tokenizer, step),
        lambda: pair_batches.eval_batches(prepared, stage, tokenizer),
        stage.training,
        tmp_path,
        name="retriever",
    )
    encoder.save(tmp_path, MODEL, states.averaged(state), tokenizer)
    found = encoder.load(tmp_path, batch=8)
    pairs = {r.parts[0]: r.parts[1] for r in records(40) if len(r.parts) == 2}
    scores = found.texts(list(pairs)) @ found.pictures(list(pairs.values())).T
    assert len(pairs) > 12 and (scores.argmax(1) == np.arange(len(pairs))).mean() > 0.4  # by chance 0.06
