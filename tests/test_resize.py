"""Resizing for FID against the two programs whose figures are published."""

import numpy as np
import pytest
import torch
import torch_references

from cm3jax.evaluate import resize

cleanfid_resize = torch_references.module("cleanfid.resize")

SIZES = [(299, 299), (64, 64), (31, 17), (1, 1), (257, 503), (300, 299)]


def picture(h, w):
    return np.random.default_rng(h * w).integers(0, 256, (h, w, 3), np.uint8)


@pytest.mark.parametrize(("h", "w"), SIZES)
def test_pytorch_fids_way_is_torchs_interpolation(h, w):
    x = torch.tensor(picture(h, w).transpose(2, 0, 1)[None]).float() / 255
    wanted = 2 * torch.nn.functional.interpolate(x, (299, 299), mode="bilinear", align_corners=False) - 1
    np.testing.assert_allclose(resize.pytorch_fid(picture(h, w)), wanted[0].numpy().transpose(1, 2, 0), atol=2e-5)


@pytest.mark.parametrize(("h", "w"), SIZES)
def test_clean_fids_way_is_clean_fids(h, w):
    wanted = cleanfid_resize.build_resizer("clean")(picture(h, w))
    np.testing.assert_array_equal(resize.clean_fid(picture(h, w)), (wanted - 128) / 128)


def test_the_two_ways_differ_by_more_than_rounding():
    x = picture(503, 503)
    assert np.abs(resize.pytorch_fid(x) - resize.clean_fid(x)).mean() > 0.1
