"""Laws of improved precision and recall, against the definition written out."""

import jax
import numpy as np
import pytest

from cm3jax import config as configs
from cm3jax import sharding
from cm3jax.evaluate import manifold
from cm3jax.types import UserError

A = np.random.default_rng(0).normal(size=(53, 5)).astype(np.float32)
B = (np.random.default_rng(1).normal(size=(41, 5)) * 0.7 + 0.5).astype(np.float32)


def written_out(a, b, k):
    """Return precision of a and recall of b as the paper defines them, in float64."""
    far = lambda x, y: np.linalg.norm(x[:, None].astype(float) - y[None], axis=-1)  # noqa: E731
    share = lambda x, y: (far(x, y) <= np.sort(far(y, y), 1)[:, k]).any(1).mean()  # noqa: E731
    return share(a, b), share(b, a)


@pytest.mark.parametrize("k", [1, 3])
def test_it_is_what_the_definition_says(k):
    wanted = written_out(A, B, k)
    assert min(wanted) > 0.1 and max(wanted) < 1
    assert manifold.precision_recall(A, B, k) == wanted


def test_eight_devices_give_what_one_gives():
    one = manifold.precision_recall(A, B, devices=jax.devices()[:1])
    assert manifold.precision_recall(A, B, devices=jax.devices()) == one


def test_the_size_of_the_blocks_does_not_matter():
    mesh = sharding.mesh(configs.Mesh(), jax.devices())
    whole, small = manifold.Blocks(mesh), manifold.Blocks(mesh, 3, 7)
    radii = whole.radii(B, 3)
    np.testing.assert_allclose(small.radii(B, 3), radii, rtol=1e-5)
    assert small.covered(A, B, radii) == whole.covered(A, B, radii)


def test_a_set_covers_itself_and_nothing_far_away():
    assert manifold.precision_recall(A, A) == (1, 1)
    assert manifold.precision_recall(A, A + 100) == (0, 0)


def test_too_small_a_set_has_balls_around_all_and_is_refused():
    with pytest.raises(UserError, match="neighbour 3 of 3 and 41 samples: .* less than the smaller set; set --neighb"):
        manifold.precision_recall(A[:3], B)
    with pytest.raises(UserError, match="must be of one size"):
        manifold.precision_recall(A[:, :3], B)
