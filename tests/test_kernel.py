"""Laws of the kernel distance, and torchmetrics' KID on the same features."""

import jax
import numpy as np
import pytest

from cm3jax.evaluate import kernel
from cm3jax.types import UserError


def features(n, size, seed=0):
    rng = np.random.default_rng(seed)
    return np.abs(rng.normal(size=(n, size)) + seed / 4).astype(np.float32)


def by_hand(a, b):
    """Return the estimate for two whole sets, term by term."""
    kernel = lambda x, y: (x.astype(float) @ y / len(x) + 1) ** 3  # noqa: E731
    within = lambda s: np.mean([kernel(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j])  # noqa: E731
    return within(a) + within(b) - 2 * np.mean([kernel(x, y) for x in a for y in b])


def test_it_is_what_the_definition_says():
    a, b = features(11, 5, 1), features(11, 5, 2)
    np.testing.assert_allclose(kernel.distance(a, b, 3, 11), (by_hand(a, b), 0), atol=2e-6)


@pytest.mark.slow  # torchmetrics takes its time to import
def test_it_equals_the_kid_of_torchmetrics():
    import torch
    import torch_references  # noqa: F401
    from torchmetrics.image.kid import KernelInceptionDistance

    class Same(torch.nn.Module):
        """What torchmetrics takes for the network: the features come in as pictures."""

        num_features = 23

        def forward(self, x):
            return x[:, 0, 0].double()

    a, b = features(37, 23, 1), features(37, 23, 2)
    reference = KernelInceptionDistance(Same(), subsets=3, subset_size=37)  # all of them, in whatever order
    for x, real in ((a, False), (b, True)):
        reference.update(torch.tensor(x)[:, None, None], real=real)
    mean, deviation = reference.compute()
    found = kernel.distance(a, b, 3, 37)
    assert mean > 0.1 and abs(found[0] - float(mean)) < 1e-5 * float(mean)
    assert found[1] < 1e-6 and deviation < 1e-6


@pytest.mark.slow
def test_subsets_follow_from_the_seed_and_their_estimates_are_torchmetrics():
    import torch
    import torch_references  # noqa: F401
    from torchmetrics.image.kid import poly_mmd

    a, b = features(41, 23, 1), features(31, 23, 2)
    wanted = []
    for i in range(11):
        rng = np.random.default_rng((5, i))
        x, y = (torch.tensor(s[rng.choice(len(s), 17, replace=False)]).double() for s in (a, b))
        wanted.append(float(poly_mmd(y, x)))
    np.testing.assert_allclose(kernel.distance(a, b, 11, 17, 5), (np.mean(wanted), np.std(wanted)), rtol=1e-5)
    assert kernel.distance(a, b, 11, 17, 6) != kernel.distance(a, b, 11, 17, 5)


def test_eight_devices_give_what_one_gives():
    a, b = features(41, 7, 1), features(31, 7, 2)
    one = kernel.distance(a, b, 11, 17, devices=jax.devices()[:1])
    np.testing.assert_allclose(kernel.distance(a, b, 11, 17, devices=jax.devices()), one, rtol=1e-6)


def test_sets_of_one_kind_are_at_no_distance_but_for_noise():
    (a, b), c = np.split(features(422, 7, 1), 2), features(211, 7, 3)
    near, noise = kernel.distance(a, b, 20, 101)
    far, _ = kernel.distance(a, c, 20, 101)
    assert abs(near) < 2 * noise < far / 10


def test_what_has_no_distance_is_one_clear_line():
    a = features(11, 7)
    with pytest.raises(UserError, match="subsets of 12 of 11 and 11 samples: .* at most the smaller set; set --subset"):
        kernel.distance(a, a, 3, 12)
    with pytest.raises(UserError, match="must be of one size"):
        kernel.distance(a, features(11, 5), 3, 5)
