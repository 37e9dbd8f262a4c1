"""How close two sets of pictures are: PSNR and SSIM, mean of per-picture values on uint8."""

import numpy as np
import scipy.ndimage


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the peak signal-to-noise ratio of each pair in dB, [n]; equal pictures give infinity.

    Args:
      a, b: uint8 [n, h, w, 3].
    """
    error = np.mean(np.square(a.astype(np.float64) - b), axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255.0**2 / error)


def ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the structural similarity of each pair, [n] (Wang et al. 2004: Gaussian window of 11 pixels, sigma 1.5).

    Args:
      a, b: uint8 [n, h, w, 3], h and w at least 11; the channels are averaged, a border of 5 pixels left out.
    """
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    blur = lambda x: scipy.ndimage.gaussian_filter(x, (0, 1.5, 1.5, 0), radius=5)  # noqa: E731
    a, b = a.astype(np.float64), b.astype(np.float64)
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    map_ = (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return map_[:, 5:-5, 5:-5].mean(axis=(1, 2, 3))


def codebook(codes: np.ndarray, size: int) -> dict[str, float]:
    """Return how a set of pictures uses the codebook.

    Args:
      codes: uint16 [n, codes of a picture].
      size: Entries of the codebook.

    Returns:
      usage: Share of the entries that occur. perplexity: exp of the entropy of their frequencies, at most `size`.
    """
    frequency = np.bincount(codes.reshape(-1), minlength=size) / codes.size
    seen = frequency[frequency > 0]
    return {"usage": len(seen) / size, "perplexity": float(np.exp(-np.sum(seen * np.log(seen))))}
