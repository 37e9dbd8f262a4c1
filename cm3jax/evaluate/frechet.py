"""Frechet distance of two sets of features as if each were a Gaussian (arXiv 1706.08500): FID, whatever the features.

d^2 = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), in float64, from means and covariances that are gathered batch by
batch. With Inception's features it is FID; the embedded world's figures take the trained retriever's picture tower, and
are comparable among themselves only.
"""

import dataclasses
import json
import pathlib
import warnings
import zipfile
from collections.abc import Iterable
from typing import Any

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


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """What a distance needs of a set of features, as it lies in a file.

    Attributes:
      mean: float64 [size].
      covariance: The unbiased estimate, float64 [size, size].
      count: Samples behind it; None: the file does not tell.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None


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


def total(parts: Iterable[np.ndarray], size: int) -> Moments:
    """Return the moments of features [n, size] that come part by part."""
    found = moments(np.empty((0, size)))
    for part in parts:
        found = add(found, moments(part))
    return found


def doubt(a: Moments | Statistics, b: Moments | Statistics) -> str:
    """Return what is to be said of a distance from too few samples; "" for enough."""
    needed = len(a.mean) + 1  # deviations from their mean add up to nothing: the rank of n of them is at most n - 1
    few = min([x.count for x in (a, b) if x.count is not None], default=needed)
    if few >= needed:
        return ""
    return (
        f"Frechet distance from {few} samples, too few for the {needed - 1} numbers of a feature, which need {needed}:"
        " too high, and only comparable at the same number of samples"
    )


def distance(a: Moments | Statistics, b: Moments | Statistics) -> float:
    """Return the squared Frechet distance, the figure that is published as FID.

    Warns if a set has no more samples than the features have numbers: its covariance then lacks directions, and the
    figure says more about the number of samples than about the pictures.

    Raises:
      UserError: if a set has fewer than two samples, or they have features of different sizes.
    """
    size = len(a.mean)
    few = min([x.count for x in (a, b) if x.count is not None], default=size)
    if few < 2 or len(b.mean) != size:
        raise UserError(
            f"Frechet distance of {a.count} features of {size} numbers and {b.count} of {len(b.mean)}: needs at least"
            " two of each, of one size"
        )
    if told := doubt(a, b):
        warnings.warn(told, stacklevel=2)
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    # C1 C2 has the eigenvalues of the symmetric C1^(1/2) C2 C1^(1/2), which need no complex square root.
    between = np.linalg.eigvalsh(root @ b.covariance @ root)
    apart = a.mean - b.mean
    found = apart @ apart + np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.sqrt(between.clip(0)).sum()
    return float(max(found, 0.0))


# -------------------------------------------------------------------------------------------------------------- on disk


def save(path, found: Moments | Statistics, about: dict[str, Any]) -> None:
    """Write statistics to an .npz file, which pytorch-fid reads too.

    Args:
      about: What the features depend on, as JSON.

    Raises:
      UserError: if the set has fewer than two samples, or the file cannot be written.
    """
    path = pathlib.Path(path)
    if path.suffix != ".npz":
        raise UserError(f"statistics {str(path)!r}: the name must end in .npz, as pytorch-fid's")
    if found.count is None or found.count < 2:
        raise UserError(f"statistics of {found.count} samples: needs at least two")
    told = json.dumps({"count": found.count, **about})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.stem}.partial.npz")
        np.savez(partial, mu=found.mean, sigma=found.covariance, about=np.array(told))
        partial.replace(path)
    except OSError as e:
        raise UserError(f"statistics {str(path)!r}: {e.strerror or e}; choose another place") from None


def load(path) -> tuple[Statistics, dict[str, Any]]:
    """Return the statistics in a file of `save` or of pytorch-fid, and what `save` was told; {} from pytorch-fid.

    Raises:
      UserError: if the file holds no such thing.
    """
    where = f"statistics {str(path)!r}"
    try:
        with np.load(path, allow_pickle=False) as file:
            told = {name: file[name] for name in ("mu", "sigma", "about") if name in file}
        about = json.loads(str(told["about"])) if "about" in told else {}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:
        raise UserError(f"{where}: not readable ({getattr(e, 'strerror', None) or e})") from None
    for name in ("mu", "sigma"):
        if name not in told:
            raise UserError(f"{where}: has no array {name!r}; takes files of pytorch-fid, or of cm3jax score")
    mean, covariance = (np.asarray(told[name], np.float64) for name in ("mu", "sigma"))
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise UserError(f"{where}: mu of shape {mean.shape} and sigma of {covariance.shape} do not fit")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"{where}: has numbers that are not finite")
    if not isinstance(about, dict) or not isinstance(count := about.pop("count", None), int | None):
        raise UserError(f"{where}: what it tells of itself is not what cm3jax score writes")
    return Statistics(mean, covariance, count), about
