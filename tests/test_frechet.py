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


def test_samples_whose_covariance_lacks_directions_are_warned_of():
    enough = frechet.moments(features(8, 7))
    for n in (5, 7):
        few = frechet.moments(features(n, 7))
        assert np.linalg.matrix_rank(few.covariance) == n - 1 < 7 == np.linalg.matrix_rank(enough.covariance)
        with pytest.warns(UserWarning, match=f"from {n} samples, too few for the 7 numbers of a feature, which need 8"):
            frechet.distance(few, enough)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet.distance(enough, enough)
        frechet.distance(enough, frechet.Statistics(enough.mean, enough.covariance, None))


def test_what_has_no_distance_is_one_clear_line():
    one, two = frechet.moments(features(1, 3)), frechet.moments(features(9, 3))
    with pytest.raises(UserError, match="1 features of 3 numbers and 9 of 3: needs at least two"):
        frechet.distance(one, two)
    with pytest.raises(UserError, match="of one size"):
        frechet.distance(two, frechet.moments(features(9, 4)))
    with pytest.raises(UserError, match="no finite numbers"):
        frechet.moments(np.full((3, 3), np.nan))


# -------------------------------------------------------------------------------------------------------------- on disk


@pytest.mark.parametrize("shards", [1, 2, 5, 11])
def test_shards_of_a_set_merge_to_one_value_however_many_there_are(shards):
    a, b = features(101, 13, 1), frechet.moments(features(97, 13, 2))
    whole = frechet.distance(frechet.moments(a), b)
    parts = [frechet.total(np.array_split(part, 3), 13) for part in np.array_split(a, shards)]
    for order in (parts, parts[::-1]):
        merged = order[0]
        for part in order[1:]:
            merged = frechet.add(merged, part)
        assert merged.count == 101
        np.testing.assert_allclose(frechet.distance(merged, b), whole, rtol=1e-10)


def test_saved_statistics_are_the_same_when_read(tmp_path):
    a, b = (frechet.moments(features(31, 7, seed)) for seed in (1, 2))
    frechet.save(tmp_path / "a.npz", a, {"features": {"resize": "clean-fid"}})
    found, about = frechet.load(tmp_path / "a.npz")
    assert about == {"features": {"resize": "clean-fid"}} and found.count == 31
    assert frechet.distance(found, b) == frechet.distance(a, b)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_pytorch_fids_files_are_read_and_it_would_read_ours(tmp_path):
    x = features(31, 7)
    np.savez_compressed(tmp_path / "theirs.npz", mu=x.mean(0), sigma=np.cov(x, rowvar=False))
    found, about = frechet.load(tmp_path / "theirs.npz")
    assert about == {} and found.count is None
    assert frechet.distance(found, frechet.moments(x)) < 1e-9
    frechet.save(tmp_path / "ours.npz", frechet.moments(x), {})
    with np.load(tmp_path / "ours.npz") as file:  # as pytorch_fid.fid_score does
        mu, sigma = file["mu"][:], file["sigma"][:]
    np.testing.assert_allclose(mu, x.mean(0))
    np.testing.assert_allclose(sigma, np.cov(x, rowvar=False))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mu": np.zeros(3)}, "has no array 'sigma'; takes files of pytorch-fid, or of cm3jax score"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"mu of shape \(3,\) and sigma of \(4, 4\) do not fit"),
        ({"mu": np.zeros(3), "sigma": np.full((3, 3), np.inf)}, "has numbers that are not finite"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "about": np.array("[1]")}, "what it tells of itself"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "about": np.array("{")}, "not readable"),
        ({"mu": np.array([{}]), "sigma": np.eye(1)}, "not readable"),  # a pickle
    ],
)
def test_a_file_that_holds_no_statistics_is_said(tmp_path, values, message):
    np.savez(tmp_path / "x.npz", **values)
    with pytest.raises(UserError, match=message):
        frechet.load(tmp_path / "x.npz")


def test_what_is_no_file_of_arrays_is_said(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        frechet.load(tmp_path / "x.npz")
    (tmp_path / "x.npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(UserError, match="not readable"):
        frechet.load(tmp_path / "x.npz")
    with pytest.raises(UserError, match="must end in .npz"):
        frechet.save(tmp_path / "x.json", frechet.moments(features(3, 3)), {})
