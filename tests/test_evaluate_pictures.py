"""PSNR, SSIM and codebook usage against references."""

import numpy as np
import skimage.metrics

from cm3jax.evaluate import pictures

RNG = np.random.default_rng(0)
A = RNG.integers(0, 256, (3, 37, 41, 3), np.uint8)
B = np.clip(A.astype(int) + RNG.integers(-40, 41, A.shape), 0, 255).astype(np.uint8)


def test_psnr_equals_scikit_image():
    expected = [skimage.metrics.peak_signal_noise_ratio(a, b) for a, b in zip(A, B, strict=True)]
    np.testing.assert_allclose(pictures.psnr(A, B), expected)


def test_ssim_equals_scikit_image():
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": -1}
    expected = [skimage.metrics.structural_similarity(a, b, **settings) for a, b in zip(A, B, strict=True)]
    np.testing.assert_allclose(pictures.ssim(A, B), expected)


def test_equal_pictures_have_infinite_psnr_and_ssim_one():
    assert np.isinf(pictures.psnr(A, A)).all()
    np.testing.assert_allclose(pictures.ssim(A, A), 1)


def test_codebook_usage_and_perplexity_of_known_frequencies():
    codes = np.array([[0, 0, 1, 1], [5, 5, 6, 6]], np.uint16)
    found = pictures.codebook(codes, 8)
    assert found["usage"] == 0.5
    np.testing.assert_allclose(found["perplexity"], 4)
