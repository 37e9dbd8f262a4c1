"""Planning the search of a memory bank: the real program compiled for a slice, and the arithmetic beside it."""

import json

import pytest

from cm3jax import cli
from cm3jax.plan import searching, slices
from cm3jax.types import UserError

TARGET = slices.parse("v5e-8")


def test_a_bank_over_chips_is_compiled_and_its_memory_is_the_vectors(capsys):
    small, large = (searching.plan(TARGET, n, 128, 8) for n in (2**20, 2**24))
    assert small.fits and large.fits
    assert 2 * 128 * 2**24 / 8 <= large.total < 1.5 * 2 * 128 * 2**24 / 8 + 2**28
    assert large.rate[0] <= large.rate[1] < small.rate[1]
    assert large.terms.matrices == pytest.approx(16 * small.terms.matrices)
    assert "16,777,216 vectors of 128 fp16 numbers, 4.0 GiB in all" in large.text()


def test_what_does_not_fit_is_refused_with_the_compilers_words(capsys):
    found = searching.plan(TARGET, 2**30, 512, 8)
    assert not found.fits and found.terms is None and "RESOURCE_EXHAUSTED" in found.refusal
    assert f"does not fit, by {(found.total - found.limit) / 2**30:.2f} GiB" in found.text()
    with pytest.raises(UserError, match="--documents 0: must be at least 1"):
        searching.plan(TARGET, 0, 512, 8)


def test_the_command_prints_it_and_json(capsys):
    words = ["plan", "configs/retrieval.py", "--for", "bank", "--topology", "v5e-8", "--documents", "100000"]
    assert cli.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["documents"] == 100_000 and found["queries_per_second"]["low"] > 0
