"""Laws of repetition, temperature, top-k and top-p."""

import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from cm3jax.sample import filters

V = 11
GRID = st.integers(-6, 6).map(lambda x: np.float32(x / 2))  # coarse, so that ties are common
top_k_top_p, temper = jax.jit(filters.top_k_top_p), jax.jit(filters.temper)
LOGITS = arrays.arrays(np.float32, (3, V), elements=GRID)


def reference(logits, k, p):
    """One row, straight from the docstring."""
    kept = logits >= np.sort(logits)[::-1][(k or V) - 1]
    mass = np.where(kept, np.exp(logits.astype(np.float64) - logits.max()), 0)
    mass /= mass.sum()
    order, total = np.argsort(-mass, kind="stable"), 0.0
    for i in order:
        if total >= p - 1e-6 or mass[i] == 0:
            break
        total, last = total + mass[i], mass[i]
    return np.where(kept & (mass >= last * (1 - 1e-9)), logits, -np.inf)


def columns(*values, dtype=np.float32):
    return np.array(values, dtype)


@given(LOGITS, st.lists(st.integers(0, V + 3), min_size=3, max_size=3), st.sampled_from([0.001, 0.3, 0.61, 0.9, 1.0]))
def test_top_k_then_top_p_equal_a_plain_loop(logits, k, p):
    out = top_k_top_p(logits, columns(*k, dtype=np.int32), columns(p, 1, p))
    for row in range(3):
        np.testing.assert_array_equal(out[row], reference(logits[row], min(k[row], V), (p, 1, p)[row]))


@given(LOGITS)
def test_neutral_settings_change_nothing(logits):
    out = top_k_top_p(logits, columns(0, V, 0, dtype=np.int32), columns(1, 1, 1))
    np.testing.assert_array_equal(temper(out, columns(1, 1, 1)), logits)


@given(LOGITS)
def test_ids_that_were_out_stay_out(logits):
    cut = np.where(np.arange(V) % 3 == 0, -np.inf, logits)
    out = top_k_top_p(cut, columns(0, 4, V, dtype=np.int32), columns(0.8, 1, 0.5))
    assert (out[:, ::3] == -jnp.inf).all() and (out > -jnp.inf).any(-1).all()


@given(LOGITS)
def test_temperature_zero_leaves_the_first_of_the_largest(logits):
    out = temper(logits, columns(0, 0, 2))
    np.testing.assert_array_equal(jnp.argmax(out[:2], -1), np.argmax(logits[:2], -1))
    assert ((out[:2] > -jnp.inf).sum(-1) == 1).all()
    np.testing.assert_array_equal(out[2], logits[2] / 2)


@pytest.mark.slow  # transformers takes its time to import
@pytest.mark.parametrize("penalty", [1.2, 0.8, 1.0])
def test_repetition_is_penalised_as_transformers_does(penalty):
    import torch
    import transformers

    draw = np.random.default_rng(0)
    logits, ids = draw.normal(0, 3, (5, V)).astype(np.float32), draw.integers(0, V, (5, 4))
    logits[:, 3] = -np.inf  # an id that is out stays out
    seen = np.zeros((5, V), bool)
    seen[np.arange(5)[:, None], ids] = True
    theirs = transformers.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(ids), torch.tensor(logits)).numpy()
    ours = filters.penalise(jnp.asarray(logits), jnp.asarray(seen), jnp.full(5, penalty))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert (penalty == 1) == np.array_equal(theirs, logits)


def test_drawn_frequencies_are_the_softmax():
    logits, n = jnp.array([0.0, 1.0, -1.0, 2.0, -jnp.inf, 0.5]), 20_000
    keys = jax.random.split(jax.random.key(7), n)
    drawn = filters.draw(jnp.tile(logits, (n, 1)), jnp.ones((n, 6), bool), keys)
    expected = np.asarray(jax.nn.softmax(logits)) * n
    found = np.bincount(drawn, minlength=6)
    assert found[4] == 0
    chi_square = ((found - expected)[expected > 0] ** 2 / expected[expected > 0]).sum()
    assert chi_square < 18.5  # 4 degrees of freedom: p = 0.001


def test_only_allowed_ids_are_drawn_whatever_the_logits():
    bad = jnp.array([jnp.nan, jnp.inf, -jnp.inf, 3e38])
    logits = jnp.stack([jnp.full(4, x) for x in bad] + [bad])
    for allowed in np.eye(4, dtype=bool):
        drawn = filters.draw(logits, jnp.tile(allowed, (5, 1)), jax.random.split(jax.random.key(0), 5))
        np.testing.assert_array_equal(drawn, np.argmax(allowed))


def test_the_best_is_what_temperature_zero_draws():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(50, 9)).round(1), jnp.float32)
    allowed = jnp.asarray(np.random.default_rng(1).random((50, 9)) < 0.5).at[:, 3].set(True)
    masked = jnp.where(allowed, logits, -jnp.inf)
    drawn = filters.draw(filters.temper(masked, jnp.zeros(50)), allowed, jax.random.split(jax.random.key(0), 50))
    assert jnp.array_equal(filters.best(masked, allowed), drawn)
    assert jnp.array_equal(filters.best(jnp.full((50, 9), jnp.nan), allowed), allowed.argmax(-1))
