"""Gradients over a global batch, averaged weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cm3jax.train import state as states


def loss(params, batch, key):
    error = (batch["x"] @ params["w"] - batch["y"]) ** 2
    total, weight = jnp.sum(batch["w"] * error), jnp.sum(batch["w"])
    return (total, weight), {"loss": (total, weight), "items": (jnp.float32(len(error)), jnp.float32(1))}


@pytest.fixture
def example():
    draw = np.random.default_rng(3)
    batch = {
        "x": draw.normal(size=(24, 5)),
        "y": draw.normal(size=24),
        "w": draw.integers(0, 3, 24) * (4 - np.arange(24) % 4),
    }
    return {"w": jnp.asarray(draw.normal(size=5), jnp.float32)}, {
        k: jnp.asarray(v, jnp.float32) for k, v in batch.items()
    }


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_accumulation_changes_neither_loss_nor_gradients(example, parts):
    params, batch = example
    mean = lambda p: (lambda found: found[0][0] / found[0][1])(loss(p, batch, None))  # noqa: E731
    value, expected = jax.value_and_grad(mean)(params)
    found, metrics = jax.jit(lambda p, b: states.gradients(loss, p, b, jax.random.key(0), parts))(params, batch)
    np.testing.assert_allclose(found["w"], expected["w"], rtol=2e-5)
    np.testing.assert_allclose(metrics["loss"][0] / metrics["loss"][1], value, rtol=1e-5)
    assert metrics["items"][0] == 24


def test_a_mean_of_the_parts_means_would_be_another_loss(example):
    params, batch = example
    halves = states.split(batch, 2)
    parts = [loss(params, jax.tree.map(lambda x, i=i: x[i], halves), None)[0] for i in range(2)]
    (total, weight), _ = loss(params, batch, None)
    assert abs(np.mean([a / b for a, b in parts]) - total / weight) > 1e-3


def test_a_part_takes_every_nth_row():
    parts = states.split({"x": jnp.arange(6)}, 2)["x"]
    np.testing.assert_array_equal(parts, [[0, 2, 4], [1, 3, 5]])
    with pytest.raises(ValueError, match="6 rows does not split into accumulate = 4"):
        states.split({"x": jnp.arange(6)}, 4)


def test_a_batch_without_weight_gives_zero_gradients(example):
    params, batch = example
    found, _ = states.gradients(loss, params, {**batch, "w": jnp.zeros(24)}, jax.random.key(0))
    assert np.all(np.asarray(found["w"]) == 0)


def test_every_part_has_a_key_of_its_own():
    def draws(params, batch, key):
        value = jax.random.uniform(key) * params
        return (value, jnp.float32(1)), {"draw": (value, jnp.float32(1))}

    _, metrics = states.gradients(draws, jnp.float32(1), jnp.zeros(4), jax.random.key(0), 4)
    expected = sum(jax.random.uniform(jax.random.fold_in(jax.random.key(0), i)) for i in range(4))
    np.testing.assert_allclose(metrics["draw"][0], expected, rtol=1e-6)


def test_an_update_counts_and_moves_against_the_gradient():
    optimizer = optax.sgd(0.5)
    state = states.create({"w": jnp.ones(3)}, optimizer, {"usage": jnp.zeros(2)})
    state = states.update(state, {"w": jnp.full(3, 0.2)}, optimizer)
    assert state.step == 1 and state.extra["usage"].shape == (2,)
    np.testing.assert_allclose(state.params["w"], 0.9, rtol=1e-6)


def test_the_average_forgets_the_start_and_then_decays_slowly():
    early = states.average({"w": jnp.zeros(())}, {"w": jnp.ones(())}, 0.999, 1)["w"]
    late = states.average({"w": jnp.zeros(())}, {"w": jnp.ones(())}, 0.999, 1_000_000)["w"]
    np.testing.assert_allclose([early, late], [1 - 2 / 11, 0.001], rtol=1e-3)


def test_metrics_of_two_batches_add():
    assert states.add({"loss": (1.0, 2.0)}, {"loss": (3.0, 4.0)})["loss"] == (4.0, 6.0)
