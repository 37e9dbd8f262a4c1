"""Laws of the decoder."""

import dataclasses
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3jax import config as configs
from cm3jax import trees
from cm3jax.nn import attention, decoder, layers

CM3LEON = configs.Decoder(layers=3, width=24, heads=4, init_std=0.3, dtype="float32")
VARIANTS = {
    "cm3leon": CM3LEON,
    "cm3leon, dots recomputed": dataclasses.replace(CM3LEON, remat="dots"),
    "chameleon": dataclasses.replace(
        CM3LEON, activation="swiglu", norm="rmsnorm", position="rope", qk_norm=True, tied=False, remat="none"
    ),
    "chameleon 34b": dataclasses.replace(
        CM3LEON,
        kv_heads=2,
        mlp_width=37,
        activation="swiglu",
        norm="rmsnorm",
        norm_order="post",
        position="rope",
        tied=False,
    ),
    "both positions": dataclasses.replace(CM3LEON, position="both", layers=1),
}
REMAT = ("dots", "full", "offload")
VOCAB, LENGTH, B, T = 97, 31, 2, 13
PINNED = {"tiny": 5_242_880, "100m": 101_498_880, "350m": 373_030_912, "760m": 786_038_784, "7b": 6_726_615_040}


def build(config, seed=0):
    """A model whose parameters are all non-zero, and a batch for it."""
    model = decoder.Decoder(config, VOCAB, LENGTH)
    params = nn.unbox(jax.jit(lambda key: decoder.init(model, key))(jax.random.key(seed)))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    params = jax.tree.unflatten(
        tree, [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    )
    ids = jax.random.randint(jax.random.key(seed + 2), (B, T), 0, VOCAB)
    return model, params, ids, jnp.tile(jnp.arange(T), (B, 1)), jnp.ones((B, T), jnp.int32)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_parameter_count_equals_the_closed_form(config):
    params = jax.eval_shape(lambda k: decoder.init(decoder.Decoder(config, VOCAB, LENGTH), k), jax.random.key(0))
    assert trees.size(params) == decoder.parameter_count(config, VOCAB, LENGTH)


@pytest.mark.parametrize("path", sorted(pathlib.Path("configs/cm3leon").glob("*.py")), ids=lambda p: p.stem)
def test_every_published_size_has_its_exact_parameter_count(path):
    recipe = configs.load(path)
    stage = recipe.decoder
    model = decoder.Decoder(stage.model, recipe.vocab.size, stage.packing.length)
    assert trees.size(jax.eval_shape(lambda k: decoder.init(model, k), jax.random.key(0))) == PINNED[path.stem]
    assert f"{PINNED[path.stem]:,}" in path.read_text()


def test_no_pinned_size_lacks_a_config():
    assert set(PINNED) == {p.stem for p in pathlib.Path("configs/cm3leon").glob("*.py")}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_a_later_token_changes_no_earlier_output(config):
    model, params, ids, positions, segments = build(config)
    run = jax.jit(lambda ids: model.apply({"params": params}, ids, positions, segments)[0])
    changed = ids.at[:, 7].set((ids[:, 7] + 1) % VOCAB)
    before, after = run(ids), run(changed)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert (jnp.abs(before[:, 7:] - after[:, 7:]).max(-1) > 1e-6).all()


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_cached_equals_uncached_with_prompts_of_unequal_length(config):
    model, params, ids, positions, segments = build(config)
    pad = jnp.array([0, 3])  # row 1 starts three slots later
    slot = jnp.arange(T)
    segments = (slot >= pad[:, None]).astype(jnp.int32)
    positions = jnp.maximum(slot - pad[:, None], 0)
    run = jax.jit(lambda *a: model.apply({"params": params}, *a))
    full, _ = run(ids, positions, segments)
    out, cache = run(ids[:, :5], positions[:, :5], segments[:, :5], decoder.init_cache(config, B, T + 4), 0)
    outs = [out]
    for i in range(5, T):
        out, cache = run(ids[:, i : i + 1], positions[:, i : i + 1], segments[:, i : i + 1], cache, i)
        outs.append(out)
    seen = segments[..., None] > 0
    np.testing.assert_allclose(jnp.where(seen, jnp.concatenate(outs, 1), 0), jnp.where(seen, full, 0), atol=2e-5)
    alone, _ = run(ids[1:, 3:], positions[1:, 3:], segments[1:, 3:])
    np.testing.assert_allclose(full[1:, 3:], alone, atol=2e-5)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_weights_apart_are_the_same_weights(config):
    model, params, ids, positions, segments = build(config)
    run = jax.jit(lambda params, cache: model.apply({"params": params}, ids, positions, segments, cache)[0])
    apart, cache = decoder.apart(params), decoder.init_cache(config, B, T)
    assert trees.size(apart) == trees.size(params)
    np.testing.assert_allclose(run(apart, None), run(params, None), atol=1e-5)
    np.testing.assert_allclose(run(apart, cache), run(params, cache), atol=1e-6)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_a_segment_sees_only_itself(config):
    model, params, ids, positions, _ = build(config)
    segments = jnp.where(jnp.arange(T) < 6, 1, 2)[None].repeat(B, 0)
    positions = jnp.where(positions < 6, positions, positions - 6)
    run = jax.jit(lambda *a: model.apply({"params": params}, *a)[0])
    both = run(ids, positions, segments)
    second = run(ids[:, 6:], positions[:, 6:], segments[:, 6:])
    np.testing.assert_allclose(both[:, 6:], second, atol=2e-5)


def test_what_a_layer_keeps_changes_neither_outputs_nor_gradients():
    model, params, ids, positions, segments = build(CM3LEON)

    def loss(params, remat):
        net = model.clone(config=dataclasses.replace(CM3LEON, remat=remat))
        return jnp.sum(net.apply({"params": params}, ids, positions, segments)[0][..., 0])

    found = {r: jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, r) for r in ("none", *REMAT)}
    for remat in REMAT:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found[remat], found["none"])


def test_a_layer_keeps_what_its_policy_says():
    model, params, ids, positions, segments = build(CM3LEON)

    def kept(remat):
        """Arrays of each layer [layers, B, T, ...] that wait for the backward pass, those in host memory apart."""
        net = model.clone(config=dataclasses.replace(CM3LEON, remat=remat))
        loss = lambda params: jnp.sum(net.apply({"params": params}, ids, positions, segments)[0][..., 0])  # noqa: E731
        jaxpr = jax.make_jaxpr(jax.grad(loss))(params).jaxpr
        stacks = [v.aval for e in jaxpr.eqns if e.primitive.name == "scan" for v in e.outvars]
        stacks = [x for x in stacks if x.shape[:1] == (CM3LEON.layers,) and x.size >= CM3LEON.layers * B * T]
        stacks = [x for x in stacks if B in x.shape[1:] or B * T in x.shape[1:]]
        return len(stacks), sum("host" in str(x.memory_space).lower() for x in stacks)

    assert kept("full") == (1, 0) and kept("offload") == (1, 1)
    assert kept("full")[0] < kept("dots")[0] < kept("none")[0]


def test_initial_weights_follow_the_paper():
    config = configs.Decoder(layers=4, width=256, heads=4)
    params = nn.unbox(decoder.init(decoder.Decoder(config, 4096, 512), jax.random.key(0)))
    leaves = trees.named_leaves(params)
    for name in ("layers/attention/out/w", "layers/mlp/down/w"):
        assert (leaves[name] == 0).all()
    for name in ("table", "layers/attention/q/w", "layers/attention/k/w", "layers/attention/v/w", "layers/mlp/up/w"):
        assert abs(leaves[name]).max() <= 3 * 0.006
        assert abs(float(leaves[name].std()) / 0.006 - 0.9866) < 0.02  # a normal cut at 3 std has 0.9866 of its std
    assert abs(leaves["positions"]).max() <= 3 * 0.0002


def test_cm3leon_has_no_biases_and_no_norm_parameters():
    shapes = jax.eval_shape(lambda k: decoder.init(decoder.Decoder(CM3LEON, VOCAB, LENGTH), k), jax.random.key(0))
    assert all(
        name.split("/")[-2] == "w" or name in ("table/value", "positions/value") for name in trees.named_leaves(shapes)
    )


def test_attention_equals_a_loop_over_heads():
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 5, n, 3)) for i, n in enumerate((6, 2, 2)))
    mask = attention.visible(jnp.ones((2, 5), int), jnp.ones((2, 5), int))
    out = attention.attend(q, k, v, mask)
    for head in range(6):
        scores = np.einsum("btk,bsk->bts", q[:, :, head], k[:, :, head // 3]) / np.sqrt(3)
        weights = np.exp(np.where(np.tril(np.ones((5, 5))), scores, -np.inf))
        weights /= weights.sum(-1, keepdims=True)
        np.testing.assert_allclose(out[:, :, head], weights @ v[:, :, head // 3], atol=1e-5)


def test_rotary_scores_depend_on_distance_only():
    q, k = (jax.random.normal(jax.random.key(i), (1, 1, 1, 8)) for i in range(2))
    at = lambda x, p: layers.rotate(x, jnp.full((1, 1), p), 10_000.0)  # noqa: E731
    np.testing.assert_allclose((at(q, 11) * at(k, 4)).sum(), (at(q, 107) * at(k, 100)).sum(), atol=1e-4)
    assert abs((at(q, 11) * at(k, 4)).sum() - (at(q, 11) * at(k, 5)).sum()) > 1e-4
