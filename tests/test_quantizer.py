"""Laws of vector quantization: nearest codes, where gradients go, and the codebook's upkeep."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3jax.nn import quantizer

KEY = jax.random.key(0)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_nearest_is_the_brute_force_minimum():
    latents, codebook = normal(0, 5, 7, 3), normal(1, 11, 3)
    brute = np.square(np.asarray(latents)[..., None, :] - np.asarray(codebook)).sum(-1).argmin(-1)
    np.testing.assert_array_equal(quantizer.nearest(latents, codebook), brute)


def test_the_lowest_of_equal_codes_wins():
    codebook = jnp.ones((5, 3))
    assert quantizer.nearest(jnp.zeros((1, 3)), codebook)[0] == 0


def test_straight_through_shows_the_vectors_and_hands_the_gradient_to_the_latents():
    latents, vectors, cotangent = normal(0, 5, 3), normal(1, 5, 3), normal(2, 5, 3)
    np.testing.assert_allclose(quantizer.straight_through(latents, vectors), vectors, rtol=1e-6)
    _, pull = jax.vjp(quantizer.straight_through, latents, vectors)
    to_latents, to_vectors = pull(cotangent)
    np.testing.assert_array_equal(to_latents, cotangent)
    np.testing.assert_array_equal(to_vectors, np.zeros_like(to_vectors))


def test_commitment_moves_the_encoder_and_not_the_codebook():
    latents, codebook = normal(0, 5, 3), normal(1, 7, 3)

    def loss(latents, codebook):
        return quantizer.commitment(latents, quantizer.lookup(quantizer.nearest(latents, codebook), codebook))

    to_latents, to_codebook = jax.grad(loss, (0, 1))(latents, codebook)
    assert np.abs(to_latents).max() > 0
    np.testing.assert_array_equal(to_codebook, np.zeros_like(to_codebook))


def test_the_codebook_loss_moves_the_codebook_and_not_the_encoder():
    latents, codebook = normal(0, 5, 3), normal(1, 7, 3)

    def loss(latents, codebook):
        return quantizer.codebook_loss(latents, quantizer.lookup(quantizer.nearest(latents, codebook), codebook))

    to_latents, to_codebook = jax.grad(loss, (0, 1))(latents, codebook)
    np.testing.assert_array_equal(to_latents, np.zeros_like(to_latents))
    assert np.abs(to_codebook).max() > 0


def test_commitment_and_codebook_loss_are_the_squared_distance():
    a, b = normal(0, 5, 3), normal(1, 5, 3)
    expected = np.square(np.asarray(a) - np.asarray(b)).sum(-1).mean()
    assert quantizer.commitment(a, b) == pytest.approx(expected, rel=1e-5)
    assert quantizer.codebook_loss(a, b) == pytest.approx(expected, rel=1e-5)


def test_normalised_vectors_have_length_one_and_zero_has_a_finite_gradient():
    np.testing.assert_allclose(jnp.linalg.norm(quantizer.normalise(normal(0, 7, 3)), axis=-1), 1, rtol=1e-5)
    assert np.isfinite(jax.grad(lambda x: quantizer.normalise(x).sum())(jnp.zeros(3))).all()


def test_usage_and_perplexity_count_codes():
    counts = quantizer.histogram(jnp.array([[0, 1], [2, 2]]), 5)
    np.testing.assert_array_equal(counts, [1, 1, 2, 0, 0])
    assert quantizer.usage(counts) == pytest.approx(3 / 5)
    assert quantizer.perplexity(jnp.ones(7)) == pytest.approx(7, rel=1e-5)
    assert quantizer.perplexity(jnp.array([9.0, 0, 0])) == pytest.approx(1)


# ------------------------------------------------------------------------------------------------------------- upkeep


def test_a_code_moves_to_the_moving_average_of_its_latents():
    codebook, latents, codes = normal(0, 3, 2), normal(1, 5, 2), jnp.array([0, 0, 0, 2, 2])
    state, moved = quantizer.move(quantizer.init_state(codebook), codebook, latents, codes, 0.9, False)
    for code, rows in ((0, slice(0, 3)), (2, slice(3, 5))):
        x = np.asarray(latents)[rows]
        expected = (0.9 * np.asarray(codebook)[code] + 0.1 * x.sum(0)) / (0.9 + 0.1 * len(x))
        np.testing.assert_allclose(moved[code], expected, rtol=1e-5)
    np.testing.assert_allclose(moved[1], codebook[1], rtol=1e-5)
    np.testing.assert_allclose(state.counts, [0.9 + 0.3, 0.9, 0.9 + 0.2], rtol=1e-6)


def test_a_code_that_nothing_chooses_keeps_its_place_for_ever():
    codebook, latents = normal(0, 2, 2), normal(1, 5, 2)
    state, moved = quantizer.init_state(codebook), codebook
    move = jax.jit(lambda s, c: quantizer.move(s, c, latents, jnp.zeros(5, jnp.int32), 0.5, False))
    for _ in range(40):
        state, moved = move(state, moved)
    np.testing.assert_allclose(moved[1], codebook[1], rtol=1e-3)
    np.testing.assert_allclose(moved[0], latents.mean(0), rtol=1e-4)


def test_l2_codes_stay_on_the_sphere():
    codebook, latents = quantizer.normalise(normal(0, 3, 2)), quantizer.normalise(normal(1, 5, 2))
    _, moved = quantizer.move(quantizer.init_state(codebook), codebook, latents, jnp.array([0, 0, 1, 1, 2]), 0.5, True)
    np.testing.assert_allclose(jnp.linalg.norm(moved, axis=-1), 1, rtol=1e-5)


def test_codes_age_until_they_are_chosen():
    state = quantizer.init_state(jnp.zeros((3, 2)))
    for counts in ([1, 0, 0], [0, 0, 2]):
        state = quantizer.count(state, jnp.array(counts, jnp.float32))
    np.testing.assert_array_equal(state.unused, [1, 2, 0])


def test_dead_codes_are_put_on_the_latents_that_are_served_worst():
    codebook = jnp.array([[0.0, 0.0], [9.0, 9.0], [8.0, 8.0]])
    latents = jnp.array([[0.0, 0.0], [5.0, 0.0], [0.0, 0.1], [0.0, -5.0]])
    codes = quantizer.nearest(latents, codebook)
    state = quantizer.init_state(codebook).replace(unused=jnp.array([0, 3, 2]))
    state, revived, dead = quantizer.revive(KEY, state, codebook, latents, codes, 3)
    np.testing.assert_array_equal(dead, [False, True, False])
    np.testing.assert_array_equal(revived[jnp.array([0, 2])], codebook[jnp.array([0, 2])])
    assert any(np.array_equal(revived[1], latents[i]) for i in (1, 3))
    np.testing.assert_array_equal(state.unused, [0, 0, 2])


def test_codes_that_die_together_are_put_on_different_latents():
    codebook, latents = jnp.zeros((7, 2)), normal(0, 50, 2)
    state = quantizer.init_state(codebook).replace(unused=jnp.full(7, 9))
    _, revived, dead = quantizer.revive(KEY, state, codebook, latents, jnp.zeros(50, jnp.int32), 9)
    assert dead.all() and len(np.unique(np.asarray(revived), axis=0)) == 7


@hypothesis.given(st.lists(st.floats(0.5, 2), min_size=1, max_size=13), st.integers(1, 13))
@hypothesis.settings(max_examples=20)
def test_even_draws_take_each_index_by_its_share(weights, number):
    at = (jnp.arange(number) + 0.5) / number
    counts = np.bincount(quantizer.draw(jnp.array(weights, jnp.float32), at), minlength=len(weights))
    share = np.array(weights) / sum(weights) * number
    assert counts.sum() == number and np.abs(counts - share).max() <= 1 + 1e-3


def test_an_index_of_weight_zero_is_not_drawn():
    drawn = quantizer.draw(jnp.array([0.0, 1.0, 0.0, 3.0]), jnp.linspace(0.001, 0.999, 17))
    assert set(np.asarray(drawn).tolist()) == {1, 3}


def test_kmeans_finds_separate_clusters():
    centres = np.array([[0, 0], [100, 0], [0, 100], [70, 70], [-90, 3]], np.float32)
    noise = np.random.default_rng(0).normal(size=(5, 13, 2)).astype(np.float32)
    points = (centres[:, None] + noise).reshape(-1, 2)
    found = np.asarray(quantizer.kmeans(KEY, jnp.asarray(points), 5, False))
    order = np.square(centres[:, None] - found).sum(-1).argmin(1)
    assert sorted(order) == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(found[order], (centres[:, None] + noise).mean(1), atol=1e-3)


def test_kmeans_on_the_sphere_and_with_too_few_points_is_finite():
    found = quantizer.kmeans(KEY, normal(0, 3, 5), 7, True)
    np.testing.assert_allclose(jnp.linalg.norm(found, axis=-1), 1, rtol=1e-5)
