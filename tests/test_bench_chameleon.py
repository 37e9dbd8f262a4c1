"""Laws of the benchmarks of Chameleon's shape; tiny shapes, nothing about speed."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from cm3jax import bench, bench_chameleon
from cm3jax.nn import decoder
from cm3jax.types import UserError
from cm3jax.vocab import Vocab

VOCAB = Vocab(text=90, image=30, sentinels=2, multiple=2)
MODEL = dataclasses.replace(bench_chameleon.SMALL, layers=1, width=32, heads=4, mlp_width=44)


def test_the_shapes_are_the_published_ones():
    assert bench_chameleon.BIG_VOCAB.size == 65536
    assert decoder.parameter_count(bench_chameleon.BIG, 65536, 4096) == 7_013_666_816
    assert bench_chameleon.SMALL_VOCAB.size == bench_chameleon.SMALL_VOCAB.used


@pytest.mark.slow  # transformers takes its time to import
def test_both_programs_draw_the_same_ids_and_a_ratio_comes_out():
    rows = bench_chameleon.small(1, MODEL, VOCAB, batch=2, prompt=3, steps=5)
    assert [row.name for row in rows][-1] == "chameleon, cm3jax over transformers" and all(r.value > 0 for r in rows)
    net = decoder.Decoder(MODEL, VOCAB.size, 8)
    params = bench_chameleon.silent(bench.random_params(net), VOCAB)
    ids = np.full((2, 3), VOCAB.text_start)
    found = bench_chameleon.in_jax(net, params, VOCAB, ids, 5)()
    assert VOCAB.is_text(found).all() and len(np.unique(found)) > 1


@pytest.mark.slow
def test_ids_that_differ_give_no_figure(monkeypatch):
    wrong = lambda *given: lambda: np.zeros((2, 5), int)  # noqa: E731
    monkeypatch.setattr(bench_chameleon, "in_transformers", wrong)
    with pytest.raises(UserError, match="row 0 differs from transformers' at token 0; no figure"):
        bench_chameleon.small(1, MODEL, VOCAB, batch=2, prompt=3, steps=5)


def test_the_7b_is_refused_without_an_accelerator_or_its_memory():
    with pytest.raises(UserError, match="chameleon-7b: needs a GPU or TPU with .. GiB, and jax finds only cpu"):
        bench_chameleon.big(1)
    small = types.SimpleNamespace(
        platform="gpu", device_kind="NVIDIA L4", memory_stats=lambda: {"bytes_limit": 22 * 2**30}
    )
    with pytest.raises(UserError, match="needs 33 GiB, and NVIDIA L4 gives 22"):
        bench_chameleon.refuse_device(small, 33 * 2**30)


def test_a_tiny_shape_goes_through_the_7bs_program(monkeypatch):
    monkeypatch.setattr(bench_chameleon, "refuse_device", lambda device, needed: None)
    monkeypatch.setattr(bench_chameleon, "COPIED", 2**16)
    model = dataclasses.replace(MODEL, dtype="bfloat16")
    rows = bench_chameleon.big(1, model, VOCAB, codes=4, batches=(1, 3))
    assert [row.unit for row in rows] == ["s/image", "x"] * 2 and all(row.value > 0 for row in rows)
    params = bench_chameleon.half(decoder.Decoder(model, VOCAB.size, 9))
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"bfloat16"}
    found = bench_chameleon.drawing(decoder.Decoder(model, VOCAB.size, 40), params, VOCAB, 4, 3)()
    assert found.shape == (3, 4) and VOCAB.is_image(found).all()


def test_the_bound_counts_weights_and_cache_of_each_step():
    model, codes = bench_chameleon.BIG, 1024
    one, many = (bench_chameleon.read_bytes(model, bench_chameleon.BIG_VOCAB, codes, b) for b in (1, 16))
    layers = 2 * (decoder.parameter_count(model, 65536, 1) - 2 * 65536 * 4096 + 8192 * 4096)
    slot = 2 * 32 * 4096 * 2  # keys and values of a token, bytes
    assert one == codes * (layers + 2 * (31 + codes) * slot)
    assert many - one == codes * 15 * 2 * (31 + codes) * slot
