"""Schedules, AdamW, Muon over stacks of layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cm3jax import config as configs
from cm3jax import optim, sharding

MUON = configs.Optimizer(name="muon", weight_decay=0.0, clip=0.0, warmup=0, schedule="constant", muon_lr=1.0)


def box(value, *names):
    return nn.LogicallyPartitioned(jnp.asarray(value, jnp.float32), names)


def normal(*shape):
    return np.random.default_rng(shape).normal(size=shape).astype(np.float32)


def first_update(config, boxed, gradients=None, steps=10):
    """The update of step 0; gradients default to the parameters' own values."""
    optimizer, params = optim.make(config, steps, boxed), sharding.unbox(boxed)
    opt_state = sharding.unbox(optimizer.init(boxed))
    return jax.jit(optimizer.update)(params if gradients is None else gradients, opt_state, params)[0]


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
def test_a_schedule_warms_up_to_the_peak_and_ends_at_its_fraction(name):
    config = configs.Optimizer(warmup=4, schedule=name, final_fraction=0.1)
    rate = optim.schedule(config, 20, 2.0)
    np.testing.assert_allclose([rate(s) for s in range(5)], [0.4, 0.8, 1.2, 1.6, 2.0], rtol=1e-6)
    np.testing.assert_allclose(rate(20), 2.0 if name == "constant" else 0.2, rtol=1e-6)
    after = [float(rate(s)) for s in range(4, 21)]
    assert after == sorted(after, reverse=True)


@pytest.mark.parametrize("warmup, steps", [(0, 1), (100, 1), (100, 10), (0, 10)])
def test_a_schedule_shorter_than_its_warm_up_is_finite_and_positive(warmup, steps):
    rate = optim.schedule(configs.Optimizer(warmup=warmup, schedule="cosine"), steps, 1.0)
    assert all(0 < float(rate(s)) <= 1 for s in range(steps))


def test_adamw_is_optax_adamw_with_decay_of_matrices_only():
    config = configs.Optimizer(peak_lr=0.1, warmup=0, schedule="constant", weight_decay=0.5, clip=1.0)
    boxed = {
        "w": box(normal(2, 3, 5), "layer", "embed", "mlp"),
        "scale": box(normal(2, 3), "layer", "norm"),
        "table": box(normal(7, 3), "vocab", "table_width"),
    }
    mask = {"w": True, "scale": False, "table": True}
    reference = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(0.1, 0.9, 0.95, 1e-8, weight_decay=0.5, mask=mask)
    )
    params = sharding.unbox(boxed)
    expected = reference.update(params, reference.init(params), params)[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), first_update(config, boxed), expected)


def test_gradients_are_clipped_by_their_norm_all_together():
    config = configs.Optimizer(clip=1.0, peak_lr=1.0, warmup=0, schedule="constant", weight_decay=0.0, eps=1.0)
    boxed = {"a": box(np.zeros((1, 1)), "embed", "mlp"), "b": box(np.zeros((1, 1)), "embed", "mlp")}
    update = first_update(config, boxed, {"a": jnp.full((1, 1), 30.0), "b": jnp.full((1, 1), 40.0)})
    # Adam's first update is g / (|g| + eps), here with g = (0.6, 0.8)
    np.testing.assert_allclose([-update["a"].item(), -update["b"].item()], [0.6 / 1.6, 0.8 / 1.8], rtol=1e-5)


@pytest.mark.parametrize(
    "names, expected",
    [
        (("embed", "mlp"), ((0,), (1,))),
        (("layer", "embed", "heads", "head"), ((1,), (2, 3))),
        (("layer", "heads", "head", "embed"), ((1, 2), (3,))),
        ((None, None, "conv_in", "conv_out"), ((0, 1, 2), (3,))),
        (("vocab", "table_width"), None),
        (("position", "embed"), None),
        (("layer", "norm"), None),
        (("norm", "head"), None),
        (("layer", "embed"), None),
        ((None, None), None),
        (None, None),
    ],
)
def test_the_sides_of_a_matrix_are_read_from_its_names(names, expected):
    dims = optim.matrix(names, (2,) * len(names or "ab"))
    assert (dims and tuple(dims)) == expected


def test_muon_treats_every_layer_of_a_stack_as_a_matrix_of_its_own():
    stack = normal(3, 6, 11) * np.array([1.0, 10.0, 100.0], np.float32)[:, None, None]
    together = first_update(MUON, {"w": box(stack, "layer", "embed", "mlp")})["w"]
    for i in range(3):
        alone = first_update(MUON, {"w": box(stack[i], "embed", "mlp")})["w"]
        np.testing.assert_allclose(together[i], alone, rtol=1e-4, atol=1e-5)


def test_muon_updates_are_nearly_orthogonal_at_the_scale_of_the_shape():
    update = first_update(MUON, {"w": box(normal(2, 8, 32), "layer", "embed", "mlp")})["w"]
    singular = np.linalg.svd(np.asarray(update), compute_uv=False) / np.sqrt(32 / 8)
    assert np.all((singular > 0.5) & (singular < 1.5))


def test_muon_reshapes_heads_into_one_side_of_the_matrix():
    flat = normal(2, 6, 12)
    split = first_update(MUON, {"w": box(flat.reshape(2, 6, 4, 3), "layer", "embed", "heads", "head")})["w"]
    whole = first_update(MUON, {"w": box(flat, "layer", "embed", "heads")})["w"]
    np.testing.assert_allclose(split.reshape(2, 6, 12), whole, rtol=1e-5, atol=1e-6)
    out = np.swapaxes(flat, 1, 2)  # [layer, heads * head, embed]
    split = first_update(MUON, {"w": box(out.reshape(2, 4, 3, 6), "layer", "heads", "head", "embed")})["w"]
    whole = first_update(MUON, {"w": box(out, "layer", "heads", "embed")})["w"]
    np.testing.assert_allclose(split.reshape(2, 12, 6), whole, rtol=1e-5, atol=1e-6)


def test_muon_leaves_tables_and_norms_to_adam():
    config = configs.Optimizer(name="muon", peak_lr=0.25, warmup=0, schedule="constant", weight_decay=0.5, clip=0.0)
    boxed = {
        "w": box(normal(4, 4), "embed", "mlp"),
        "table": box(normal(7, 4), "vocab", "table_width"),
        "scale": box(normal(4), "norm"),
    }
    update, adam = (
        first_update(config, boxed),
        first_update(configs.Optimizer(**{**vars(config), "name": "adamw"}), boxed),
    )
    for name in ("table", "scale"):
        np.testing.assert_allclose(update[name], adam[name], rtol=1e-6)
    assert not np.allclose(update["w"], adam["w"], rtol=0.1)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_optimizer_state_carries_the_axis_names_of_the_parameters(name):
    boxed = {"w": box(normal(4, 8), "embed", "mlp"), "scale": box(normal(4), "norm")}
    opt_state = optim.make(configs.Optimizer(name=name), 10, boxed).init(boxed)
    leaves = jax.tree.leaves(opt_state, is_leaf=sharding.is_box)
    boxes = [x for x in leaves if sharding.is_box(x) and jax.tree.leaves(x)]
    assert len([x for x in boxes if x.names == ("embed", "mlp")]) == (2 if name == "adamw" else 1)
    assert len([x for x in boxes if x.names == ("norm",)]) == 2
    assert all(jnp.size(x) <= 3 for x in leaves if not sharding.is_box(x))  # counters and Muon's three coefficients


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_quadratic_goes_down(name):
    config = configs.Optimizer(name=name, peak_lr=0.05, muon_lr=0.05, warmup=2, weight_decay=0.0)
    boxed = {"w": box(normal(3, 4, 4), "layer", "embed", "mlp"), "scale": box(normal(4), "norm")}
    optimizer, params = optim.make(config, 60, boxed), sharding.unbox(boxed)
    opt_state = sharding.unbox(optimizer.init(boxed))
    step = jax.jit(lambda p, s: optimizer.update(p, s, p))  # the gradient of |p|² / 2 is p
    before = float(optax.global_norm(params))
    for _ in range(60):
        update, opt_state = step(params, opt_state)
        params = optax.apply_updates(params, update)
    assert float(optax.global_norm(params)) < 0.5 * before


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_bfloat16_first_moment_is_stored_so_and_hardly_changes_the_update(name):
    boxed = {"w": box(normal(3, 8, 16), "layer", "embed", "mlp"), "table": box(normal(7, 8), "vocab", "table_width")}
    params, found = sharding.unbox(boxed), {}
    for dtype in ("float32", "bfloat16"):
        config = configs.Optimizer(name=name, warmup=0, schedule="constant", weight_decay=0.0, moment_dtype=dtype)
        optimizer = optim.make(config, 10, boxed)
        opt_state, step = sharding.unbox(optimizer.init(boxed)), jax.jit(optimizer.update)
        for i in range(3):
            update, opt_state = step(jax.tree.map(lambda p: p * (1 + i % 2), params), opt_state, params)  # noqa: B023
        found[dtype] = update, sorted(str(x.dtype) for x in jax.tree.leaves(opt_state) if x.ndim > 1)
    seconds = 1 if name == "muon" else 2  # Muon's matrix has none
    assert found["float32"][1] == ["float32"] * (2 + seconds)
    assert found["bfloat16"][1] == ["bfloat16"] * 2 + ["float32"] * seconds
    for a, b in zip(*(jax.tree.leaves(found[d][0]) for d in found), strict=True):
        assert 0 < np.abs(a - b).max() < 0.02 * np.abs(a).max()
