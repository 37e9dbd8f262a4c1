"""LPIPS as a score: the package lpips with the same VGG16, and that devices and batches do not matter."""

import jax
import numpy as np
import pytest
import safetensors.numpy
from test_perceptual import NARROW, tensors

from cm3jax.evaluate import lpips
from cm3jax.nn import perceptual

RNG = np.random.default_rng(0)
A = RNG.integers(0, 256, (5, 19, 17, 3), np.uint8)
B = RNG.integers(0, 256, A.shape, np.uint8)


@pytest.fixture
def weights(tmp_path, monkeypatch):
    monkeypatch.setattr(perceptual, "WIDTHS", NARROW)
    safetensors.numpy.save_file(tensors(), tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def test_batches_and_devices_do_not_matter(weights):
    one = lpips.Network(weights, 2, jax.devices()[:1])(A, B)
    assert one.shape == (5,) and (one > 0).all()
    np.testing.assert_allclose(lpips.Network(weights, 5)(A, B), one, rtol=1e-5)


@pytest.mark.slow
def test_it_equals_the_package_lpips(tmp_path):
    import torch
    import torch_references

    package = torch_references.module("lpips")
    reference = package.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()  # VGG drawn here, its own heads
    vgg = torch_references.torchvision.models.vgg16()
    names = {k: v.shape for k, v in vgg.features.state_dict(prefix="features.").items()}
    drawn = torch_references.drawn(names)
    found = {name: torch.tensor(x) for name, x in drawn.items()}
    for i, numbers in enumerate(perceptual.STAGES):
        for number in numbers:
            layer = getattr(reference.net, f"slice{i + 1}")
            layer = layer[[int(n) for n, _ in layer.named_children()].index(number)]
            layer.weight.data, layer.bias.data = (found[f"features.{number}.{x}"] for x in ("weight", "bias"))
    heads = {f"lin{i}.model.1.weight": reference.state_dict()[f"lin{i}.model.1.weight"].numpy() for i in range(5)}
    safetensors.numpy.save_file(drawn | heads, tmp_path / "w.safetensors")
    near = np.clip(A + RNG.integers(0, 60, A.shape), 0, 255).astype(np.uint8)
    x, y = (torch.tensor(s.transpose(0, 3, 1, 2)) / 127.5 - 1 for s in (A, near))
    with torch.no_grad():
        wanted = reference(x, y).numpy()[:, 0, 0, 0]
    assert wanted.min() > 0.01
    np.testing.assert_allclose(lpips.Network(tmp_path / "w.safetensors", 5)(A, near), wanted, rtol=1e-4)
