"""Frechet distance of two sets of features as if each were a Gaussian (arXiv 1706.08500): FID, whatever the features.

d^2 = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), in float64, from means and covariances that are gathered batch by
batch. With Inception's features it is FID; the embedded world's figures take the trained retriever's picture tower, and
are comparable among themselves only.
"""

import dataclasses
import warnings

import numpy as np

from cm3jax.types import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """What is known of a set of features.

    Attributes:
      mean: float64 [size].
      scatter: Sum of the outer products of the deviations from the mean, float64 [size, size].
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @property
    def covariance(self) -> np.ndarray:
        """The unbiased estimate, as published FIDs take it."""
        return self.scatter / (self.count - 1)


def moments(features: np.ndarray) -> Moments:
    """Return the moments of features [n, size].

    Raises:
      UserError: if a feature is no finite number.
    """
    features = np.asarray(features, np.float64)
    if not np.isfinite(features).all():
        raise UserError("features that are no finite numbers: the Frechet distance of them is not defined")
    mean = features.mean(0) if len(features) else np.zeros(features.shape[1])
    apart = features - mean
    return Moments(len(features), mean, apart.T @ apart)


def add(a: Moments, b: Moments) -> Moments:
    """Return the moments of two sets together (Chan et al. 1979), so that a set need never lie in memory whole."""
    count = a.count + b.count
    if not count:
        return a
    apart = b.mean - a.mean
    scatter = a.scatter + b.scatter + np.outer(apart, apart) * (a.count * b.count / count)
    return Moments(count, a.mean + apart * (b.count / count), scatter)


def distance(a: Moments, b: Moments) -> float:
    """Return the squared Frechet distance, the figure that is published as FID.

    Warns if a set has fewer samples than the features have numbers: its covariance then lacks directions, and the
    figure says more about the number of samples than about the pictures.

    Raises:
      UserError: if a set has fewer than two samples, or they have features of different sizes.
    """
    size = len(a.mean)
    if min(a.count, b.count) < 2 or len(b.mean) != size:
        raise UserError(
            f"Frechet distance of {a.count} features of {size} numbers and {b.count} of {len(b.mean)}: needs at least"
            " two of each, of one size"
        )
    if min(a.count, b.count) < size:
        warnings.warn(
            f"Frechet distance from {min(a.count, b.count)} samples, fewer than the {size} numbers of a feature: too"
            " high, and only comparable at the same number of samples",
            stacklevel=2,
        )
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    # C1 C2 has the eigenvalues of the symmetric C1^(1/2) C2 C1^(1/2), which need no complex square root.
    between = np.linalg.eigvalsh(root @ b.covariance @ root)
    apart = a.mean - b.mean
    found = apart @ apart + np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.sqrt(between.clip(0)).sum()
    return float(max(found, 0.0))
