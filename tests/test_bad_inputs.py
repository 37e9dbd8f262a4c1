"""Every kind of broken input costs its example only, or gives the user one line."""

import contextlib
import json

import numpy as np
import pytest

from cm3jax import config
from cm3jax.data import pictures, prepare, shards
from cm3jax.data.example import Bad
from cm3jax.types import UserError
from tests import broken


def run(source, out):
    values = source if isinstance(source, dict) else {"source": source}
    settings = config.Prepare(**{"resolution": 16, "validation": 0.0, "test": 0.0, "workers": 1, **values})
    return prepare.prepare(settings, out, progress=False)


def cases(table):
    return pytest.mark.parametrize("case", table, ids=lambda case: case.name.replace(" ", "_"))


def test_the_corpus_has_many_kinds_with_names_of_their_own():
    names = [case.name for case in broken.ROWS + broken.SOURCES]
    assert len(set(names)) == len(names) >= 25


@cases(broken.ROWS)
def test_a_bad_row_costs_that_example_only(case, tmp_path):
    (tmp_path / "in").mkdir()
    summary = run(case.make(tmp_path / "in"), tmp_path / "out")
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    texts = [f"{reject['reason']}: {reject['detail']}" for reject in rejects]
    assert len(texts) == 1 and case.message in texts[0], texts
    assert summary["records"] == broken.GOOD == len(shards.Reader(tmp_path / "out", "train"))
    assert summary["rejects"] == {rejects[0]["reason"]: 1}


@cases(broken.SOURCES)
def test_an_unusable_source_gives_one_line(case, tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError) as error:
        run(case.make(tmp_path / "in"), tmp_path / "out")
    assert case.message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "gif", "bmp", "tiff", "ppm", "jpeg2000"])
def test_damaged_bytes_decode_or_are_bad_but_nothing_else(kind):
    good, rng = broken.encoded(kind), np.random.default_rng(0)
    for i in range(60):
        data = bytearray(good if i % 3 else good[: rng.integers(1, len(good))])
        for place in rng.integers(len(data), size=8):
            data[place] = rng.integers(256)
        with contextlib.suppress(Bad):
            assert pictures.decode(bytes(data)).shape[2] == 3
