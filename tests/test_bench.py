import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from cm3jax import bench, config
from cm3jax.nn import decoder
from cm3jax.types import UserError
from cm3jax.vocab import Vocab

VOCAB = Vocab(text=30, image=40, sentinels=3, multiple=8)
MODEL = config.Decoder(layers=2, width=24, heads=3, dtype="float32", remat="none")
STAGE = config.DecoderStage(
    model=MODEL,
    packing=config.Packing(length=17),
    training=config.Training(steps=100, batch=3, optimizer=config.Optimizer(warmup=0, schedule="constant")),
)
RECIPE = config.Recipe(vocab=VOCAB, decoder=STAGE)


def net(model=MODEL, length=17):
    return decoder.Decoder(model, VOCAB.size, length)


def into_torch(params, model):
    """Copy our weights into the reference."""
    t = lambda x: torch.tensor(np.asarray(x))  # noqa: E731
    state = {"table.weight": t(params["table"]), "positions.weight": t(params["positions"])}
    attention, mlp = params["layers"]["attention"], params["layers"]["mlp"]
    for i in range(MODEL.layers):
        qkv = np.concatenate([attention[name]["w"][i] for name in "qkv"], axis=1)
        state |= {
            f"blocks.{i}.qkv.weight": t(qkv.T),
            f"blocks.{i}.out.weight": t(attention["out"]["w"][i].T),
            f"blocks.{i}.up.weight": t(mlp["up"]["w"][i].T),
            f"blocks.{i}.down.weight": t(mlp["down"]["w"][i].T),
        }
    model.load_state_dict(state)
    return model


@pytest.fixture(scope="module")
def both():
    """Our weights, and the reference with the same ones."""
    params = bench.random_params(net())
    return params, into_torch(params, bench.torch_decoder(MODEL, VOCAB.size, 17))


def our_logits(params, ids):
    place = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    hidden, _ = net().apply({"params": params}, jnp.asarray(ids), place, jnp.ones(ids.shape, jnp.int32))
    return decoder.logits(params, MODEL, hidden)


IDS = np.random.default_rng(0).integers(0, VOCAB.size, (3, 17)).astype(np.int32)


def test_the_reference_in_pytorch_is_the_same_function(both):
    params, reference = both
    with torch.no_grad():
        theirs = reference(torch.tensor(IDS, dtype=torch.int64)).numpy()
    assert theirs.std() > 0.5
    np.testing.assert_allclose(our_logits(params, IDS), theirs, atol=1e-4)


def test_the_reference_has_the_same_gradients(both):
    params, reference = both
    reference.zero_grad()
    loss = torch.nn.functional.cross_entropy(
        reference(torch.tensor(IDS[:, :-1], dtype=torch.int64)).flatten(0, 1),
        torch.tensor(IDS[:, 1:], dtype=torch.int64).flatten(),
    )
    loss.backward()

    def ours(params):
        log_p = jax.nn.log_softmax(our_logits(params, IDS[:, :-1]))
        return -jnp.mean(jnp.take_along_axis(log_p, jnp.asarray(IDS[:, 1:, None]), 2))

    value, found = jax.value_and_grad(ours)(params)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    np.testing.assert_allclose(found["table"], reference.table.weight.grad, atol=1e-5)
    np.testing.assert_allclose(found["layers"]["mlp"]["up"]["w"][1], reference.blocks[1].up.weight.grad.T, atol=1e-5)


def test_the_reference_has_as_many_parameters():
    found = sum(p.numel() for p in bench.torch_decoder(MODEL, VOCAB.size, 17).parameters())
    assert found == decoder.parameter_count(MODEL, VOCAB.size, 17)


def test_parts_that_the_reference_lacks_are_refused():
    with pytest.raises(UserError, match="activation = 'swiglu'"):
        bench.torch_decoder(dataclasses.replace(MODEL, activation="swiglu"), 80, 17)


def test_drawing_without_a_cache_gives_the_same_ids():
    model = net(length=128)
    params, prompts = bench.random_params(model), IDS[:, :9] % VOCAB.text + VOCAB.text_start
    cached = bench.cached(model, params, VOCAB, prompts, 70)()
    np.testing.assert_array_equal(cached, bench.uncached(model, params, VOCAB, prompts, 70)())
    assert VOCAB.is_image(cached).all() and len(np.unique(cached)) > 3


@pytest.mark.slow
def test_training_is_measured_against_pytorch():
    rows = bench.train(RECIPE, rounds=2, steps=1)
    assert [r.name for r in rows] == ["train, cm3jax", "train, PyTorch", "train, cm3jax over PyTorch"]
    assert all(0 < r.low <= r.value <= r.high for r in rows)


@pytest.mark.slow
def test_without_pytorch_training_is_measured_and_the_missing_ratio_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (only,) = bench.train(RECIPE, rounds=1, steps=1)
    assert only.value > 0 and "pip install torch" in only.note


def test_both_sides_really_train():
    batch = bench.fake_batch(STAGE, VOCAB)
    assert bench.training_in_jax(STAGE, VOCAB, batch, 1)() == batch["inputs"].size == 3 * 17
    assert bench.torch_work(STAGE, VOCAB, batch, 1, "cpu", compiled=False)() == 3 * 17


@pytest.mark.slow
def test_training_is_measured_without_the_packages_that_it_does_not_need():
    missing = ["grain", "sentencepiece", "tensorboardX", "tqdm", "tyro", "PIL", "psutil", "torch", "array_record"]
    code = (
        f"import sys\nfor name in {missing}: sys.modules[name] = None\n"
        "from cm3jax import bench, config\n"
        "stage = config.DecoderStage(model=config.Decoder(layers=1, width=8, heads=1),"
        " packing=config.Packing(length=8), training=config.Training(steps=9, batch=8))\n"
        "print(bench.train(config.Recipe(decoder=stage), rounds=1, steps=1)[0].name)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ})
    assert out.stdout.strip() == "train, cm3jax", out.stderr


@pytest.mark.slow
def test_decoding_is_measured_with_and_without_cache():
    recipe = dataclasses.replace(RECIPE, decoder=dataclasses.replace(STAGE, packing=config.Packing(length=64)))
    rows = bench.decode(recipe, rounds=1, batch=2, prompt=5, steps=12)
    assert [r.unit for r in rows] == ["tokens/s", "tokens/s", "x"]


@pytest.mark.slow
def test_making_batches_is_measured_alone_and_through_the_workers():
    before = os.sched_getaffinity(0)
    rows = bench.data(rounds=1, pairs=80, steps=2)
    assert os.sched_getaffinity(0) == before and all(r.value > 0 for r in rows)
    alone, piped = rows[:2], rows[2:]
    assert {r.unit for r in alone} == {"tokens/s"} and {r.unit for r in piped} == {"tokens/s a core"}
    assert len(piped) == (2 if len(before) == 1 else 4) and piped[1].name == "pipeline, whole, 1 worker"


@pytest.mark.slow
def test_preparing_is_measured():
    (only,) = bench.prepare(rounds=1, count=8)
    assert only.value > 0 and only.unit == "pictures/s"


def test_rivals_alternate_and_their_first_round_is_thrown_away():
    seen = []

    def contestant(name):
        def work():
            seen.append(name)
            return 1

        return work

    rates = bench.alternate({"a": contestant("a"), "b": contestant("b")}, 3)
    assert "".join(seen) == "ab" + "ab" + "ba" + "ab"
    assert [len(v) for v in rates.values()] == [3, 3]


def test_a_figure_is_the_median_with_its_range():
    found = bench.row("x", [3.0, 1.0, 10.0], "tokens/s")
    assert (found.value, found.low, found.high) == (3.0, 1.0, 10.0)
    assert bench.ratio("r", [2.0, 3.0], [1.0, 1.0]).value == 2.5


def test_the_command_prints_a_table_and_writes_json(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "prepare", lambda rounds: [bench.row("prepare", [10.0, 12345.6], "pictures/s", "note")])
    bench.main("prepare", rounds=1, out=str(tmp_path / "bench.json"))
    printed = capsys.readouterr().out
    assert "6,178 pictures/s" in printed and "10 to 12,346" in printed and "note" in printed
    content = json.loads((tmp_path / "bench.json").read_text())
    assert content["rows"][0]["high"] == 12345.6 and content["machine"]["cores"]


def test_unknown_benchmarks_and_rounds_are_named_in_one_line():
    with pytest.raises(
        UserError,
        match="bench speed: no such benchmark; one of train, decode, data, prepare, chameleon, chameleon-7b, all",
    ):
        bench.main("speed")
    with pytest.raises(UserError, match="rounds = 0: must be at least 1"):
        bench.main("train", rounds=0)
