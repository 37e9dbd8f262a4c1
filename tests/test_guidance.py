"""Laws of classifier-free guidance and of CD-K."""

import itertools

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given

from cm3jax.sample import guidance

B, V = 3, 13
SEEDS = st.integers(0, 2**31 - 1)


guide, contrast_ = jax.jit(guidance.guide), jax.jit(guidance.contrast, static_argnums=6)


def streams(seed, n=2):
    return 3 * np.random.default_rng(seed).standard_normal((n, B, V), np.float32)


def reference(cond, uncond, allowed, temperature, uncond_temperature, alpha, k):
    """One row of CD-K in plain numpy (arXiv 2309.02591 §3.1)."""
    p, q = (
        np.where(allowed, np.exp(x.astype(np.float64) / t), 0)
        for x, t in ((cond, temperature), (uncond, uncond_temperature))
    )
    p, q = p / p.sum(), q / q.sum()
    inside = allowed & (p >= alpha * np.sort(p)[::-1][k - 1] * (1 - 1e-6))
    return np.where(inside, np.log(np.maximum(p, 1e-300)) - np.log(np.maximum(q, 1e-300)), -np.inf)


def contrast(cond, uncond, allowed=None, temperature=1.0, uncond_temperature=1.0, alpha=0.5, k=4):
    full = lambda x: np.full(B, x, np.float32)  # noqa: E731
    allowed = np.ones((B, V), bool) if allowed is None else np.tile(allowed, (B, 1))
    return np.asarray(contrast_(cond, uncond, allowed, full(temperature), full(uncond_temperature), full(alpha), k))


@given(SEEDS)
def test_guidance_of_two_streams_is_the_papers_formula(seed):
    (cond, uncond), scale = streams(seed), np.array([0.0, 1.5, 7.0])
    expected = uncond + scale[:, None] * (cond - uncond)
    np.testing.assert_allclose(
        guide(np.stack([cond, uncond]), scale[None].astype(np.float32)), expected, rtol=1e-4, atol=1e-4
    )


@given(SEEDS)
def test_guidance_of_three_streams_is_the_editing_formula(seed):
    full, image, uncond = s = streams(seed, 3)
    expected = uncond + 1.5 * (image - uncond) + 7.5 * (full - image)
    out = guide(s, np.array([[7.5] * B, [1.5] * B], np.float32))
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_guidance_one_is_no_guidance_bit_for_bit(n):
    np.testing.assert_array_equal(guide(streams(n, n), np.ones((n - 1, B), np.float32)), streams(n, n)[0])


@given(SEEDS, st.integers(1, 6), st.sampled_from([0.1, 0.5, 1.0]), st.sampled_from([0.5, 0.8, 1.0]))
def test_cd_k_equals_plain_numpy(seed, k, alpha, temperature):
    cond, uncond = streams(seed)
    allowed = np.arange(V) % 4 != 1
    out = contrast(cond, uncond, allowed, temperature, 0.5, alpha, k)
    for row in range(B):
        want = reference(np.asarray(cond[row]), np.asarray(uncond[row]), allowed, temperature, 0.5, alpha, k)
        np.testing.assert_allclose(out[row], want, rtol=1e-3, atol=1e-3)


@given(SEEDS)
def test_cd_1_with_alpha_one_is_greedy(seed):
    out = contrast(*streams(seed), alpha=1.0, k=1)
    np.testing.assert_array_equal((out > -np.inf).sum(-1), 1)
    np.testing.assert_array_equal(np.argmax(out, -1), np.argmax(streams(seed)[0], -1))


@given(SEEDS)
def test_a_larger_k_never_drops_a_token(seed):
    kept = [contrast(*streams(seed), k=k) > -np.inf for k in (1, 2, 5, V, V + 3)]
    assert all((~a | b).all() for a, b in itertools.pairwise(kept))
    assert kept[-1].sum() >= kept[0].sum()


def test_fewer_allowed_tokens_than_k_are_all_kept():
    allowed = np.arange(V) < 2
    np.testing.assert_array_equal(contrast(*streams(0), allowed=allowed, k=5) > -np.inf, np.tile(allowed, (B, 1)))


@given(SEEDS)
def test_cd_k_at_temperature_zero_is_the_conditional_streams_best(seed):
    cond, uncond = streams(seed)
    for k in (1, 4):
        out = contrast(cond, uncond, temperature=0.0, k=k)
        np.testing.assert_array_equal(np.argmax(out, -1), np.argmax(cond, -1))
        np.testing.assert_array_equal((out > -np.inf).sum(-1), 1)
