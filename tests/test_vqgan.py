"""Laws of the image tokenizer's network."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3jax import config as configs
from cm3jax import sharding, trees
from cm3jax.nn import discriminator, vqgan

SMALL = {"width": 4, "encoder_blocks": 1, "decoder_blocks": 1, "groups": 2, "z": 3}
COUNTS = {
    "quickstart.py": 190_296,
    "image/f8_8192.py": 66_890_627,
    "image/f16_16384.py": 76_073_859,
}
"""Encoder, codebook and decoder; the discriminator of those that have one is pinned in test_discriminator."""


def small(**changes):
    return configs.VQGAN(**{**SMALL, "multipliers": (1, 2), "attention": (), "middle": False, **changes})


def abstract(model, codes, side):
    net = vqgan.VQGAN(model, codes)
    return jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))["params"]


def pictures(seed, b, side):
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, (b, side, side, 3)), jnp.float32)


def initialised(model, codes=7, side=16):
    net = vqgan.VQGAN(model, codes)
    params = jax.jit(net.init)(jax.random.key(0, impl="rbg"), jnp.zeros((1, side, side, 3)))["params"]
    return net, sharding.unbox(params)


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_pinned(name):
    recipe = configs.load(f"configs/{name}")
    assert trees.size(abstract(recipe.image.model, recipe.vocab.image, recipe.prepare.resolution)) == COUNTS[name]


@pytest.mark.parametrize("name, grid", [("quickstart.py", 8), ("image/f8_8192.py", 32), ("image/f16_16384.py", 16)])
def test_the_grid_of_codes_and_the_picture_have_the_papers_shapes(name, grid):
    recipe = configs.load(f"configs/{name}")
    side = recipe.prepare.resolution
    net = vqgan.VQGAN(recipe.image.model, recipe.vocab.image)
    out, codes = jax.eval_shape(lambda: net.init_with_output(jax.random.key(0), jnp.zeros((2, side, side, 3)))[0])
    assert codes.shape == (2, grid, grid) and codes.dtype == jnp.int32
    assert out.shape == (2, side, side, 3) and out.dtype == jnp.float32


@hypothesis.given(st.integers(1, 5), st.integers(1, 5), st.sampled_from([1, 2, 3, 7]))
@hypothesis.settings(max_examples=10)
def test_unfold_undoes_fold(rows, columns, patch):
    x = np.random.default_rng(0).normal(size=(2, rows * patch, columns * patch, 3)).astype(np.float32)
    folded = vqgan.fold(jnp.asarray(x), patch)
    assert folded.shape == (2, rows, columns, patch * patch * 3)
    np.testing.assert_array_equal(folded[1, 0, 0], x[1, :patch, :patch].ravel())
    np.testing.assert_array_equal(vqgan.unfold(folded, patch), x)


def changed_latents(model):
    """Which of 4 x 4 latents move when one pixel of the patch at (1, 2) does."""
    net, params = initialised(model)
    x = pictures(0, 1, 16)
    encode = jax.jit(lambda x: net.apply({"params": params}, x, method="encode"))
    difference = encode(x.at[0, 7, 8].add(1.0)) - encode(x)
    return np.abs(np.asarray(difference[0])).max(-1) > 0


@pytest.mark.parametrize(
    "changes", [{"patch": 4, "multipliers": (1,)}, {"patch": 1, "multipliers": (1, 2, 2), "middle": True}]
)
def test_with_kernel_one_a_code_sees_its_own_patch_only(changes):
    moved = changed_latents(small(encoder_kernel=1, **changes))
    assert moved[1, 2] and moved.sum() == 1


def test_with_kernel_three_a_code_sees_its_neighbours():
    assert changed_latents(small(patch=4, multipliers=(1,), groups=0)).sum() > 1


def test_latents_are_unit_vectors_where_the_config_says_so():
    net, params = initialised(small(patch=4, multipliers=(1,), l2_normalise=True))
    latents = net.apply({"params": params}, pictures(0, 2, 16), method="encode")
    np.testing.assert_allclose(jnp.linalg.norm(latents, axis=-1), 1, rtol=1e-4)


def test_attention_mixes_all_positions_and_is_the_softmax_of_the_products():
    layer = vqgan.Attention(0, jnp.float32)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5, 4)), jnp.float32)
    params = sharding.unbox(jax.jit(layer.init)(jax.random.key(0, impl="rbg"), x))["params"]
    flat = np.asarray(x, np.float64).reshape(2, 15, 4)
    linear = lambda name, y: y @ np.asarray(params[name]["kernel"])[0, 0] + np.asarray(params[name]["bias"])  # noqa: E731
    q, k, v = (linear(name, flat) for name in ("query", "key", "value"))
    weights = np.exp(np.einsum("btc,bsc->bts", q, k) / 2)
    expected = flat + linear("out", weights / weights.sum(-1, keepdims=True) @ v)
    found = layer.apply({"params": params}, x)
    np.testing.assert_allclose(found.reshape(2, 15, 4), expected, rtol=1e-4, atol=1e-5)


def test_in_bfloat16_parameters_latents_and_pictures_stay_float32():
    model = small(dtype="bfloat16", multipliers=(1, 2), attention=(1,), middle=True)
    params = abstract(model, 7, 16)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    net = vqgan.VQGAN(model, 7)
    args = ({"params": sharding.unbox(params)}, jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32))
    assert jax.eval_shape(lambda p, x: net.apply(p, x, method="encode"), *args).dtype == jnp.float32
    features = jax.eval_shape(lambda p, x: net.apply(p, net.apply(p, x, method="encode"), method="features"), *args)
    assert features.dtype == jnp.bfloat16
    assert jax.eval_shape(net.apply, *args)[0].dtype == jnp.float32


def test_every_parameter_has_axis_names_that_the_mesh_accepts():
    params = abstract(configs.VQGAN(), 8192, 256) | {
        "judge": jax.eval_shape(discriminator.PatchDiscriminator().init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))[
            "params"
        ]
    }
    mesh = sharding.mesh(configs.Mesh(2, 4, 1))
    found = sharding.shardings(mesh, {"params": params})
    assert all(s.spec == jax.sharding.PartitionSpec(*[None] * len(s.spec)) for s in jax.tree.leaves(found))


@pytest.mark.parametrize(
    "field, value", [("attention", (2,)), ("encoder_kernel", 5), ("multipliers", ()), ("z", 0), ("codebook_ema", 1.0),
     ("latents", -1), ("shortcut_kernel", 2)],
)  # fmt: skip
def test_a_wrong_setting_is_named(field, value):
    with pytest.raises(ValueError, match=f"image.model.{field}"):
        small(**{field: value})


def test_a_shortcut_of_kernel_three_would_let_a_code_see_more_than_its_patch():
    with pytest.raises(ValueError, match="shortcut_kernel = 3: must be 1, or 3 where encoder_kernel is 3"):
        small(encoder_kernel=1, shortcut_kernel=3)


def test_codes_have_one_scale_only():
    with pytest.raises(ValueError, match="image.model.quantizer = 'cosine': has its own scale"):
        small(quantizer="cosine", l2_normalise=True)


def test_the_settings_of_imported_weights_change_nothing_where_they_are_off():
    """The same parameters under the same names as ever, and `latents` = z is no other network."""
    names = lambda **changes: abstract(small(patch=8, multipliers=(1,), **changes), 7, 16)  # noqa: E731
    plain, same = names(), names(latents=3)
    assert jax.tree.structure(plain) == jax.tree.structure(same) and trees.size(plain) == trees.size(same)
    assert set(plain) == {"encoder", "decoder", "to_code", "from_code", "last", "codebook"}
    assert set(names(decoder=False)) == {"encoder", "to_code", "from_code", "codebook"}
    assert set(names(quantizer="argmax")) == set(plain) | {"scores"}
