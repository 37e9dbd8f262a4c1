"""Names of TPU slices, the users' and the compiler's."""

import math

import pytest

from cm3jax.plan import slices
from cm3jax.train import watch
from cm3jax.types import UserError

SAME = {
    "v5e-256": ("v5e:16x16", 256),
    "v4-128": ("v4:4x4x4", 64),
    "v5p-64": ("v5p:2x4x4", 32),
    "v5p-128": ("v5p:4x4x4", 64),
    "v6e-64": ("v6e:8x8", 64),
}


@pytest.mark.parametrize("name", SAME)
def test_both_names_of_a_slice_mean_the_same_chips(name):
    topology, chips = SAME[name]
    found = slices.parse(name)
    assert found == slices.parse(topology) == slices.parse(f"{name}={topology}")
    assert (found.name, found.topology, found.chips) == (name, topology, chips)


def test_both_names_chips_and_devices_are_printed():
    assert slices.parse("v5p-128").describe() == "v5p-128 = v5p:4x4x4: 64 chips, 64 devices"
    assert slices.parse("v4:4x4x4").describe() == "v4-128 = v4:4x4x4 with megacore: 64 chips, 64 devices"
    assert slices.parse("v5e-16", 2).describe() == "2 x v5e-16 = v5e:4x4: 32 chips, 32 devices"


def test_every_slice_that_is_sold_is_found_by_either_name():
    for chip in slices.CHIPS.values():
        for shape in chip.shapes:
            one = slices.Slice(chip, shape)
            assert slices.parse(one.name) == slices.parse(one.topology) == one
            assert one.chips == math.prod(shape)


def test_google_s_own_name_of_v5e_is_known():
    assert slices.parse("v5litepod-256") == slices.parse("v5e-256")


@pytest.mark.parametrize(
    "text, said",
    [
        ("v5p-65", "v5p-N counts TensorCores, two a chip; there are v5p-8 = v5p:2x2x1, "),
        ("v5e-65", "v5e-N counts chips; there are v5e-1 = v5e:1x1, "),
        ("v5p:4x4", "there are v5p-8 = v5p:2x2x1, "),
        ("h100-8", "no such slice; "),
        ("v5e256", "did you mean v5e-256?"),
        ("", "families: v4, v5e, v5p, v6e"),
        (
            "v5p-64=v5p:4x4x4",
            "v5p-64 = v5p:2x4x4: 32 chips, 32 devices; v5p-128 = v5p:4x4x4: 64 chips",
        ),
        ("v5e-8=v5e:2x4=v5e-8", "the names disagree"),
    ],
)
def test_an_unknown_name_or_two_that_disagree_are_refused_in_one_line(text, said):
    with pytest.raises(UserError, match="--topology ") as e:
        slices.parse(text)
    assert said in str(e.value) and "\n" not in str(e.value)


def test_less_than_one_slice_is_refused():
    with pytest.raises(UserError, match="--slices = 0: must be at least 1"):
        slices.parse("v5e-16", 0)


def test_a_training_s_mfu_and_its_plan_s_are_fractions_of_the_same_peak():
    kinds = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}  # jax's device_kind
    assert {family: watch.PEAK[kind] for family, kind in kinds.items()} == {f: c.flops for f, c in slices.CHIPS.items()}
