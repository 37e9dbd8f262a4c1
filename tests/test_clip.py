"""Laws of CLIP's network and of its contrastive loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3jax import config, sharding, trees
from cm3jax.nn import clip, flops
from cm3jax.objectives import contrastive

TINY = config.CLIP(
    resolution=15,
    patch=5,
    vision_width=12,
    vision_layers=2,
    vision_heads=3,
    context=11,
    text_width=14,
    text_layers=2,
    text_heads=2,
    size=7,
)
VOCAB = 37
COUNTS = {  # of the published weights
    "ViT-B/32": (config.CLIP(), 151_277_313),
    "ViT-B/16": (config.CLIP(patch=16), 149_620_737),
    "ViT-L/14": (
        config.CLIP(
            patch=14,
            vision_width=1024,
            vision_layers=24,
            vision_heads=16,
            text_width=768,
            text_heads=12,
            size=768,
        ),
        427_616_513,
    ),
}


def shapes(model, vocab):
    return jax.eval_shape(lambda key: clip.init(clip.CLIP(model, vocab), key), jax.random.key(0))


@pytest.fixture(scope="module")
def params():
    return sharding.unbox(jax.jit(lambda key: clip.init(clip.CLIP(TINY, VOCAB), key))(jax.random.key(0)))


@pytest.mark.parametrize("name", COUNTS)
def test_published_networks_have_exactly_their_parameters(name):
    model, count = COUNTS[name]
    assert trees.size(sharding.unbox(shapes(model, 49_408))) == count


def test_every_parameter_has_names_and_divides_over_a_mesh():
    mesh = sharding.mesh(config.Mesh(fsdp=4, tensor=2))
    placed = trees.named_leaves(sharding.shardings(mesh, shapes(config.CLIP(), 49_408), strict=""))
    assert placed["text/layers/up/matrix/w"].spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor")
    assert placed["vision/layers/out/matrix/w"].spec == jax.sharding.PartitionSpec(None, "tensor", "fsdp")
    assert placed["text/table"].spec == jax.sharding.PartitionSpec(("tensor", "fsdp"), None)


def test_a_text_is_read_up_to_its_end_alone(params):
    net, rng = clip.CLIP(TINY, VOCAB), np.random.default_rng(0)
    ids = rng.integers(0, VOCAB, (3, 11)).astype(np.int32)
    ends = jnp.array([2, 5, 10])
    other = np.where(np.arange(11) > np.asarray(ends)[:, None], rng.integers(0, VOCAB, (3, 11)), ids).astype(np.int32)
    read = lambda ids: net.apply({"params": params}, jnp.asarray(ids), ends, method="texts")  # noqa: E731
    np.testing.assert_array_equal(read(ids), read(other))
    assert not np.allclose(read(ids), read((ids + 1) % VOCAB), atol=1e-3)
    np.testing.assert_allclose(jnp.linalg.norm(read(ids), axis=1), 1, rtol=1e-6)


def test_flops_of_a_step_are_those_of_its_matrices():
    """ViT-B/32's picture tower alone takes 4.4 GFLOP multiply-adds (arXiv 2103.00020's code), its text tower 2.9."""
    forward = flops.contrastive(config.CLIP(), 1) / 3
    assert 2 * 7.1e9 < forward < 2 * 7.5e9
    assert flops.contrastive(config.CLIP(), 2) > 2 * flops.contrastive(config.CLIP(), 1)  # 2 x 2 products


def pairs(b, z=7, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True)) for x in rng.normal(size=(2, b, z)).astype("f")]


def test_the_loss_is_the_mean_of_two_cross_entropies():
    texts, pictures = pairs(13)
    found, right = contrastive.losses(texts, pictures, jnp.float32(9.0))
    scores = 9 * np.asarray(texts, np.float64) @ np.asarray(pictures, np.float64).T
    softmax = lambda s, axis: np.exp(s) / np.exp(s).sum(axis, keepdims=True)  # noqa: E731
    wanted = -(np.log(np.diag(softmax(scores, 1))) + np.log(np.diag(softmax(scores, 0)))) / 2
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    np.testing.assert_array_equal(right["text_accuracy"], scores.argmax(1) == np.arange(13))
    np.testing.assert_array_equal(right["image_accuracy"], scores.argmax(0) == np.arange(13))


def test_the_loss_compares_all_pairs_of_all_devices():
    texts, pictures = pairs(24)
    loss = lambda t, p: jnp.mean(contrastive.losses(t, p, jnp.float32(9.0))[0])  # noqa: E731
    grad = jax.value_and_grad(loss, argnums=(0, 1))
    mesh = sharding.mesh(config.Mesh(replica=2, fsdp=4))
    with jax.set_mesh(mesh):
        sharded = jax.jit(grad)(*jax.device_put((texts, pictures), sharding.rows(mesh)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), sharded, grad(texts, pictures))
    assert sharded[0] > loss(texts[:3], pictures[:3]) + 0.5  # what one device alone would find
