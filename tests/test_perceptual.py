"""Laws of the feature distances, on a VGG16 of few channels with random weights in a file."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from cm3jax.nn import perceptual
from cm3jax.types import UserError

NARROW = (2, 3, 3, 5, 5)


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setattr(perceptual, "WIDTHS", NARROW)


def tensors(heads=True, seed=0):
    rng = np.random.default_rng(seed)
    return {name: np.abs(rng.normal(size=s)).astype(np.float32) if "lin" in name else
            rng.normal(size=s).astype(np.float32) for name, s in perceptual.shapes(heads).items()}  # fmt: skip


def write(path, found):
    safetensors.numpy.save_file(found, path)
    return path


def pictures(seed, b=2, side=32):
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, (b, side, side, 3)), jnp.float32)


def test_the_names_and_shapes_are_torchvisions_and_lpips(monkeypatch):
    monkeypatch.setattr(perceptual, "WIDTHS", (64, 128, 256, 512, 512))
    shapes = perceptual.shapes(heads=True)
    assert sum(np.prod(s) for n, s in shapes.items() if n.startswith("features")) == 14_714_688  # torchvision's count
    assert sum(np.prod(s) for n, s in shapes.items() if n.startswith("lin")) == 1472
    assert shapes["features.28.weight"] == (512, 512, 3, 3) and shapes["lin2.model.1.weight"] == (1, 256, 1, 1)


def test_the_features_are_those_of_the_same_network_in_torch(tmp_path):
    import torch

    found, x = tensors(), pictures(1)
    weights = perceptual.load(write(tmp_path / "w.safetensors", found), heads=True)
    y = (
        torch.tensor(np.array(x)).permute(0, 3, 1, 2) - torch.tensor(perceptual.SHIFT).view(1, 3, 1, 1)
    ) / torch.tensor(perceptual.SCALE).view(1, 3, 1, 1)
    for i, (numbers, ours) in enumerate(zip(perceptual.STAGES, perceptual.features(weights, x), strict=True)):
        y = torch.nn.functional.max_pool2d(y, 2) if i else y
        for n in numbers:
            w, b = (torch.tensor(found[f"features.{n}.{kind}"]) for kind in ("weight", "bias"))
            y = torch.relu(torch.nn.functional.conv2d(y, w, b, padding=1))
        np.testing.assert_allclose(ours, y.permute(0, 2, 3, 1).numpy(), rtol=1e-3, atol=1e-3 * float(y.max()))


def test_lpips_is_zero_for_equal_pictures_and_weighs_channels_by_the_heads(tmp_path):
    weights = perceptual.load(write(tmp_path / "w.safetensors", tensors()), heads=True)
    x, y = pictures(1), pictures(2)
    lpips = jax.jit(perceptual.lpips)
    np.testing.assert_allclose(lpips(weights, x, x), 0, atol=1e-6)
    twice = {k: v * (2 if k.startswith("lin") else 1) for k, v in weights.items()}
    assert (lpips(weights, x, y) > 0).all()
    np.testing.assert_allclose(lpips(twice, x, y), 2 * lpips(weights, x, y), rtol=1e-5)


def test_only_the_output_gets_a_gradient(tmp_path):
    weights = perceptual.load(write(tmp_path / "w.safetensors", tensors(False)), heads=False)
    both = jax.jit(jax.grad(lambda x, y: perceptual.matching(weights, x, y).sum(), (0, 1)))
    to_target, to_output = both(pictures(1), pictures(2))
    assert not to_target.any() and to_output.any()


def test_surplus_tensors_are_left_alone(tmp_path):
    path = write(tmp_path / "w.safetensors", tensors() | {"classifier.0.weight": np.zeros((2, 2), np.float32)})
    assert set(perceptual.load(path, heads=False)) == set(perceptual.shapes(False))


@pytest.mark.parametrize("name", ["features.14.bias", "lin3.model.1.weight"])
def test_a_missing_tensor_is_named(tmp_path, name):
    found = tensors()
    del found[name]
    with pytest.raises(UserError, match=f"no tensor '{name}'"):
        perceptual.load(write(tmp_path / "w.safetensors", found), heads=True)


def test_a_wrong_shape_is_named(tmp_path):
    found = tensors() | {"features.5.weight": np.zeros((3, 2, 5, 5), np.float32)}
    with pytest.raises(UserError, match=r"features.5.weight has shape \(3, 2, 5, 5\), must be \(3, 2, 3, 3\)"):
        perceptual.load(write(tmp_path / "w.safetensors", found), heads=True)


def test_a_file_that_is_missing_or_none_of_ours_is_said(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        perceptual.load(tmp_path / "nothing", heads=True)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(UserError, match="not a safetensors file"):
        perceptual.load(tmp_path / "text", heads=True)


# ------------------------------------------------------------------------------------------------------------- regions


def test_a_box_of_the_crops_own_size_is_cut_out_exactly():
    x = pictures(0, 2, 16)
    boxes = jnp.array([[[0.25, 0.5, 0.75, 1.0]], [[0.0, 0.0, 0.5, 0.5]]])
    found = perceptual.crop(x, boxes, 8)
    np.testing.assert_allclose(found[0], x[0, 8:16, 4:12], atol=1e-5)
    np.testing.assert_allclose(found[1], x[1, 0:8, 0:8], atol=1e-5)


def test_a_crop_is_enlarged_without_changing_a_plain_picture():
    x = jnp.full((1, 16, 16, 3), 0.3)
    np.testing.assert_allclose(perceptual.crop(x, jnp.array([[[0.25, 0.25, 0.5, 0.75]]]), 24), 0.3, atol=1e-5)


def test_region_losses_look_inside_their_boxes_only(tmp_path, monkeypatch):
    monkeypatch.setattr(perceptual, "CROP", 16)
    weights = perceptual.load(write(tmp_path / "w.safetensors", tensors(False)), heads=False)
    x, y = pictures(1), pictures(2)
    boxes = jnp.array([[[0.25, 0.25, 0.75, 0.75], [0, 0, 0, 0]], [[0, 0, 1, 1], [0, 0, 0.5, 0.5]]], jnp.float32)
    chosen = jnp.array([[1.0, 0.0], [0.0, 0.0]])
    cut = jax.jit(jax.value_and_grad(lambda y: perceptual.regions(weights, x, y, boxes, chosen)))
    value, to_output = cut(y)
    assert value > 0 and np.isfinite(to_output).all()
    seen = np.abs(np.asarray(to_output)).sum(-1) > 0
    assert seen[0].any() and not seen[1].any()
    rows = np.nonzero(seen[0].any(1))[0]
    assert rows.min() >= 7 and rows.max() <= 24  # the box is 8..23; linear interpolation reaches one pixel further
