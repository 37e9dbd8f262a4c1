"""Laws of the image tokenizer's losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3jax import config as configs
from cm3jax.data import picture_batches
from cm3jax.objectives import vqgan as objective


def pictures(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, (*shape, 3)), jnp.float32)


def test_all_bytes_come_back_from_the_unit_range():
    x = jnp.arange(256, dtype=jnp.uint8).repeat(3).reshape(1, 16, 16, 3)
    unit = objective.to_unit(x)
    assert unit.min() == -1 and unit.max() == 1
    np.testing.assert_array_equal(objective.to_bytes(unit), x)


def test_bytes_are_clipped():
    x = jnp.array([-3.0, 3.0, 0.0]).reshape(1, 1, 1, 3)
    np.testing.assert_array_equal(objective.to_bytes(x)[0, 0, 0], [0, 255, 128])


def test_psnr_is_that_of_each_picture():
    a = jnp.zeros((3, 5, 7, 3), jnp.uint8)
    b = a.at[1].set(255).at[2].set(1)
    np.testing.assert_allclose(objective.psnr(a, b), [100, 0, 20 * np.log10(255)], atol=1e-4)


def test_multiscale_gradient_ignores_brightness_and_sees_edges():
    x = pictures(0, 2, 11, 13)
    assert objective.multiscale_gradient(x, x + 0.3) == pytest.approx(0, abs=1e-6)
    assert objective.multiscale_gradient(x, x[:, ::-1]) > 0.1


def test_halving_averages_and_drops_an_odd_edge():
    x = pictures(0, 1, 5, 3)
    half = objective.halve(x)
    assert half.shape == (1, 2, 1, 3)
    np.testing.assert_allclose(half[0, 1, 0], x[0, 2:4, 0:2].mean((0, 1)), rtol=1e-5)


def test_hinge_losses():
    real, fake = jnp.array([2.0, 0.0]), jnp.array([-2.0, 1.0])
    assert objective.hinge_discriminator(real, fake) == pytest.approx(0.5 * (0.5 + 1.0))
    assert objective.hinge_generator(fake) == pytest.approx(0.5)


def test_the_adaptive_weight_is_the_ratio_of_norms_and_bounded():
    a, b = jnp.array([3.0, 4.0]), jnp.array([[0.6], [0.8]])
    assert objective.adaptive_weight(a, b) == pytest.approx(5, rel=1e-3)
    assert objective.adaptive_weight(1e9 * a, b) == objective.LIMIT
    assert jax.grad(lambda a: objective.adaptive_weight(a, b))(a).any() == False  # noqa: E712


def test_the_total_is_the_weighted_sum_of_its_terms():
    loss = configs.VQGANLoss(l1=0.3, l2=0.7, perceptual=2.0)
    x, y = pictures(0, 2, 8, 8), pictures(1, 2, 8, 8)
    total, terms = objective.reconstruction(x, y, loss, {}, {})
    assert set(terms) == {"l1", "l2", "perceptual"}
    assert terms["l1"] == pytest.approx(np.abs(x - y).mean(), rel=1e-5)
    expected = 0.3 * terms["l1"] + 0.7 * terms["l2"] + 2 * terms["perceptual"]
    assert float(total) == pytest.approx(float(expected), rel=1e-5)


def test_kinds_of_boxes_are_numbered_as_in_the_batches():
    assert {"face": objective.FACE, "object": objective.OBJECT} == picture_batches.KINDS
