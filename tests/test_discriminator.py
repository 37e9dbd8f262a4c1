"""Laws of the patch discriminator."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3jax import sharding, trees
from cm3jax.nn import discriminator


def shapes(net, side=64):
    return jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))["params"]


def test_its_parameter_count_is_pinned():
    """4*4*(3*64 + 64*128 + 128*256 + 256*512 + 512*1) weights, 961 biases, 2*896 of the norms."""
    count = trees.size(shapes(discriminator.PatchDiscriminator()))
    assert count == 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512) + 961 + 2 * 896


def test_one_logit_sees_a_patch_of_seventy_pixels():
    net = discriminator.PatchDiscriminator(width=1, groups=0)
    pictures = jnp.full((1, 128, 128, 3), 0.5)
    ones = lambda tree: jax.tree.map(jnp.ones_like, sharding.unbox(tree))  # noqa: E731
    params = ones(jax.tree.map(lambda s: jnp.ones(s.shape), shapes(net)))

    def middle(x):
        logits = net.apply({"params": params}, x)[0]
        return logits[logits.shape[0] // 2, logits.shape[1] // 2]

    seen = np.abs(np.asarray(jax.jit(jax.grad(middle))(pictures))).sum((0, 3)) > 0
    assert seen.any(0).sum() == seen.any(1).sum() == 70


@pytest.mark.parametrize("side, logits", [(32, 2), (64, 6), (256, 30)])
def test_the_number_of_logits(side, logits):
    net = discriminator.PatchDiscriminator()
    out = jax.eval_shape(lambda: net.init_with_output(jax.random.key(0), jnp.zeros((2, side, side, 3)))[0])
    assert out.shape == (2, logits, logits) and out.dtype == jnp.float32


def test_a_picture_is_judged_without_its_batch_mates():
    net = discriminator.PatchDiscriminator(width=4)
    pictures = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (3, 32, 32, 3)), jnp.float32)
    params = jax.jit(net.init)(jax.random.key(0, impl="rbg"), pictures)
    apply = jax.jit(net.apply)
    np.testing.assert_allclose(apply(params, pictures)[1:2], apply(params, pictures[1:2]), rtol=1e-4, atol=1e-6)


def test_every_parameter_has_axis_names():
    boxed = shapes(discriminator.PatchDiscriminator())
    leaves = jax.tree.leaves(boxed, is_leaf=sharding.is_box)
    assert all(sharding.is_box(x) for x in leaves) and [sharding.spec(x.names) for x in leaves]
