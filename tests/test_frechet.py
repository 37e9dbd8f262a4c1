"""Laws of the Frechet distance."""

import warnings

import numpy as np
import pytest
import scipy.linalg

from cm3jax.evaluate import frechet
from cm3jax.types import UserError


def features(n, size, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, size)) @ rng.normal(size=(size, size)) + rng.normal(size=size)


def test_a_set_is_at_no_distance_from_itself():
    a = frechet.moments(features(53, 7))
    assert frechet.distance(a, a) < 1e-9


def test_a_shift_costs_its_squared_length():
    a, shift = features(53, 7), np.arange(7.0)
    assert np.isclose(frechet.distance(frechet.moments(a), frechet.moments(a + shift)), shift @ shift)


def test_a_scale_costs_what_the_closed_form_says():
    a = features(53, 7)
    a -= a.mean(0)
    wanted = np.trace(np.cov(a.T)) * (3 - 1) ** 2
    assert np.isclose(frechet.distance(frechet.moments(a), frechet.moments(3 * a)), wanted)


def test_it_equals_the_formula_with_a_general_matrix_root():
    a, b = features(97, 11, 1), features(101, 11, 2)
    ca, cb = np.cov(a.T), np.cov(b.T)
    wanted = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(ca + cb - 2 * scipy.linalg.sqrtm(ca @ cb).real)
    found = frechet.distance(frechet.moments(a), frechet.moments(b))
    assert np.isclose(found, wanted) and np.isclose(frechet.distance(frechet.moments(b), frechet.moments(a)), found)


def test_batches_add_up_to_the_whole():
    a = features(101, 5) + 1e6
    whole, parts = frechet.moments(a), frechet.moments(a[:0])
    for start in range(0, 101, 17):
        parts = frechet.add(parts, frechet.moments(a[start : start + 17]))
    assert parts.count == 101
    assert np.allclose(parts.mean, whole.mean, rtol=1e-14) and np.allclose(parts.scatter, whole.scatter, rtol=1e-8)


def test_fewer_samples_than_features_have_numbers_are_warned_of():
    few, enough = frechet.moments(features(5, 7)), frechet.moments(features(7, 7))
    with pytest.warns(UserWarning, match="from 5 samples, fewer than the 7 numbers of a feature"):
        frechet.distance(few, enough)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet.distance(enough, enough)


def test_what_has_no_distance_is_one_clear_line():
    one, two = frechet.moments(features(1, 3)), frechet.moments(features(9, 3))
    with pytest.raises(UserError, match="1 features of 3 numbers and 9 of 3: needs at least two"):
        frechet.distance(one, two)
    with pytest.raises(UserError, match="of one size"):
        frechet.distance(two, frechet.moments(features(9, 4)))
    with pytest.raises(UserError, match="no finite numbers"):
        frechet.moments(np.full((3, 3), np.nan))
