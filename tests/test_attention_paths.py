"""Laws of attention's paths: each is the plain one, each keeps documents apart, each is refused where it cannot run."""

import dataclasses
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shapes

from cm3jax import config as configs
from cm3jax import sharding
from cm3jax.data import packing
from cm3jax.nn import attention, attention_blocks, attention_paths, attention_splash, decoder
from cm3jax.train import lm
from cm3jax.types import UserError
from cm3jax.vocab import BREAK, EOD, Vocab

VOCAB = Vocab(text=23, image=31, sentinels=5, multiple=8)


@pytest.fixture
def interpreted(monkeypatch):
    """The splash kernel without a TPU, in blocks of 128 so that a short row has several."""
    monkeypatch.setattr(attention_splash, "INTERPRET", True)
    monkeypatch.setattr(attention_splash, "BLOCK", 128)


@pytest.fixture
def short_blocks(monkeypatch):
    """Rows of more than 8 queries go block by block, in blocks of 8."""
    monkeypatch.setattr(attention_paths, "LONG", 8)
    monkeypatch.setattr(attention_blocks, "BLOCK", 8)


def rows(b, t, n, g, k, dtype=jnp.float32):
    """Queries, keys, values, and segments of three documents, a piece of the first after the third, then padding."""
    q, k, v = (jax.random.normal(jax.random.key(i), (b, t, x, k), dtype) for i, x in enumerate((n, g, g)))
    edges = np.cumsum([0, t // 5, t // 3, t // 5, t // 7])
    segments = np.zeros((b, t), np.int32)
    for row in range(b):
        for number, start, end in zip((1, 2, 3, 1), edges, edges[1:], strict=False):
            segments[row, start + row : end + row] = number
    return q, k, v, jnp.asarray(segments)


def outputs_and_gradients(attend, q, k, v, segments):
    """What a path gives for tokens that are no padding, and the gradients of a loss on them."""
    weights = jax.random.normal(jax.random.key(9), q.shape) * (segments > 0)[:, :, None, None]

    def loss(q, k, v):
        y = attend(q, k, v)
        return jnp.sum(weights * y.astype(jnp.float32)), y

    gradients, y = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    return jnp.where((segments > 0)[:, :, None, None], y, 0), *gradients


def assert_equal_to_plain(attend, q, k, v, segments, bound):
    """The stated bound is on the largest difference, relative to the largest value."""
    plain = lambda q, k, v: attention.attend(q, k, v, attention.visible(segments, segments))  # noqa: E731
    ours, theirs = (outputs_and_gradients(f, q, k, v, segments) for f in (attend, plain))
    for a, b in zip(ours, theirs, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.abs(a - b).max() < bound * np.abs(b).max()


# heads, heads of keys and values, width: grouped, all in one group, the 760M's width
@pytest.mark.parametrize("n, g, k", [(4, 2, 64), (3, 1, 128), (2, 2, 96)])
def test_splash_equals_plain_within_1e_5(interpreted, n, g, k):
    q, k, v, segments = rows(3, 256, n, g, k)
    splash = lambda q, k, v: attention_splash.attend(q, k, v, segments)  # noqa: E731
    assert_equal_to_plain(splash, q, k, v, segments, 1e-5)


def test_splash_in_bfloat16_equals_plain_within_2_percent(interpreted):
    q, k, v, segments = rows(3, 256, 2, 1, 64, jnp.bfloat16)
    splash = lambda q, k, v: attention_splash.attend(q, k, v, segments)  # noqa: E731
    assert_equal_to_plain(splash, q, k, v, segments, 2e-2)


def test_splash_on_a_mesh_equals_plain(interpreted):
    q, k, v, segments = rows(4, 128, 4, 2, 64)
    mesh = sharding.mesh(configs.Mesh(2, 2, 2))
    with jax.set_mesh(mesh):
        q, k, v, segments = sharding.place(mesh, jax.tree.map(np.asarray, (q, k, v, segments)))
        splash = lambda q, k, v: attention_splash.attend(q, k, v, segments)  # noqa: E731
        ours = outputs_and_gradients(splash, q, k, v, segments)
    split = jax.NamedSharding(mesh, sharding.spec(("batch", "seq", "act_heads", "head")))
    assert ours[1].sharding.is_equivalent_to(split, 4)
    ours = jax.device_get(ours)
    q, k, v, segments = map(jnp.asarray, jax.device_get((q, k, v, segments)))
    plain = lambda q, k, v: attention.attend(q, k, v, attention.visible(segments, segments))  # noqa: E731
    for a, b in zip(ours, outputs_and_gradients(plain, q, k, v, segments), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("n, g", [(4, 4), (6, 2)])
def test_blocks_equal_plain_within_1e_6(short_blocks, n, g):
    q, k, v, segments = rows(3, 29, n, g, 5)
    blocks = lambda q, k, v: attention_blocks.attend(q, k, v, segments, segments)  # noqa: E731
    assert_equal_to_plain(blocks, q, k, v, segments, 1e-6)


def test_blocks_equal_plain_behind_a_cache(short_blocks):
    q, k, v, segments = rows(3, 29, 4, 2, 5)
    last = slice(10, 29)
    mask = attention.visible(segments[:, last], segments, 10)
    ours = attention_blocks.attend(q[:, last], k, v, segments[:, last], segments, 10)
    np.testing.assert_allclose(ours, attention.attend(q[:, last], k, v, mask), atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ documents

LENGTH = 128
PACKING = configs.Packing(kind="whole", length=LENGTH, isolate=True)
MODEL = configs.Decoder(layers=2, width=64, heads=2, init_std=0.2, dtype="float32", remat="full")


def three_documents(seed=0):
    """Ids of `[eod] text <break> codes [eod]` three times, the document of each, and the span of document 1's text."""
    random, ids = np.random.default_rng(seed), []
    for _ in range(3):
        text = random.integers(VOCAB.text_start, VOCAB.image_start, 7)
        codes = random.integers(VOCAB.image_start, VOCAB.sentinel_start, 16)
        ids.append(np.concatenate([[EOD], text, [BREAK], codes, [EOD]]))
    document = np.repeat([1, 2, 3], [len(x) for x in ids]).astype(np.int32)
    return np.concatenate(ids).astype(np.uint16), document, np.array([[1, 8]])


def infill(params, ids, document, spans, path):
    """The hidden states from which the infill of document 1 is read, found by its tokens' modality."""
    batch = packing.arrays([packing.masked(ids, document, spans, VOCAB, PACKING)], VOCAB, PACKING)
    net = decoder.Decoder(dataclasses.replace(MODEL, attention=path), VOCAB.size, LENGTH)
    hidden, _ = jax.jit(net.apply)({"params": params}, batch["inputs"], batch["positions"], batch["segments"])
    reads = (batch["modality"] == packing.INFILL) & (batch["weights"] > 0)
    assert reads.sum() >= 7 and (batch["segments"][reads] == 1).all()
    assert (np.flatnonzero(reads[0]) > np.flatnonzero(batch["segments"][0] == 3).max() - 1).any()
    return np.asarray(hidden)[reads]


@pytest.mark.parametrize("path", ["whole", "blocks", "splash"])
def test_the_infill_of_document_1_depends_on_document_1_only(path, request):
    if path != "whole":
        request.getfixturevalue({"blocks": "short_blocks", "splash": "interpreted"}[path])
    path = "splash" if path == "splash" else "xla"
    net = decoder.Decoder(MODEL, VOCAB.size, LENGTH)
    params = nn.unbox(jax.jit(lambda key: decoder.init(net, key))(jax.random.key(0)))
    params = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(x.size), x.shape), params)
    (ids, document, spans), (others, _, _) = three_documents(0), three_documents(1)
    before = infill(params, ids, document, spans, path)
    assert (infill(params, np.where(document == 1, ids, others), document, spans, path) == before).all()
    outside = (document == 1) & (np.arange(len(ids)) >= 8)  # the picture's codes, not the masked text itself
    after = infill(params, np.where(outside, others, ids), document, spans, path)
    assert (np.abs(after - before).max(-1) > 1e-4).all()


# ------------------------------------------------------------------------------------------------------------ choosing


def device(platform, kind="", capability=None):
    return types.SimpleNamespace(platform=platform, device_kind=kind, compute_capability=capability)


CPU, TPU = device("cpu", "cpu"), device("tpu", "TPU v5 lite")
H100, V100, AMD = device("gpu", "H100", "9.0"), device("gpu", "V100", "7.0"), device("gpu", "MI300X", "gfx942")
STAGE = configs.DecoderStage()
ISOLATED = configs.DecoderStage(packing=configs.Packing(isolate=True))
FLOAT32 = configs.DecoderStage(model=configs.Decoder(dtype="float32"))
ODD = configs.DecoderStage(packing=configs.Packing(length=4097))


@pytest.mark.parametrize(
    "stage, on, path",
    [
        (STAGE, CPU, "xla"),
        (STAGE, TPU, "splash"),
        (ISOLATED, TPU, "splash"),
        (ODD, TPU, "xla"),
        (STAGE, H100, "cudnn"),
        (ISOLATED, H100, "xla"),
        (FLOAT32, H100, "xla"),
        (STAGE, V100, "xla"),
        (STAGE, AMD, "xla"),
    ],
)
def test_auto_is_the_best_path_of_the_platform(stage, on, path):
    assert lm.resolve(stage, on).model.attention == path


def asked(stage, path):
    return dataclasses.replace(stage, model=dataclasses.replace(stage.model, attention=path))


@pytest.mark.parametrize(
    "stage, on, line",
    [
        (asked(STAGE, "splash"), CPU, r"attention = splash: needs a TPU, and this is cpu \(cpu\); use auto or xla"),
        (asked(ODD, "splash"), TPU, "multiple of 128 tokens, and decoder.packing.length is 4097"),
        (asked(STAGE, "cudnn"), TPU, r"compute capability 8.0 or more, and this is tpu \(TPU v5 lite\)"),
        (asked(STAGE, "cudnn"), V100, r"this is compute capability 7.0 \(V100\)"),
        (asked(STAGE, "cudnn"), AMD, r"this is compute capability gfx942 \(MI300X\)"),
        (asked(ISOLATED, "cudnn"), H100, "knows no segments"),
        (asked(FLOAT32, "cudnn"), H100, "needs decoder.model.dtype bfloat16, and it is float32"),
    ],
)
def test_a_path_that_cannot_run_is_refused_in_one_line(stage, on, line):
    with pytest.raises(UserError, match=line) as error:
        lm.resolve(stage, on)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["xla", "splash", "cudnn"])
def test_xla_runs_everywhere_and_a_good_choice_stays(path):
    on = {"xla": TPU, "splash": TPU, "cudnn": H100}[path]
    assert lm.resolve(asked(STAGE, path), on) == asked(STAGE, path)


# -------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("path", ["xla", "splash"])
def test_a_long_row_is_trained_without_any_array_of_queries_by_keys(path):
    model = configs.Decoder(layers=2, width=64, heads=2, attention=path)
    stage = configs.DecoderStage(model=model, training=configs.Training(steps=2, batch=2))
    t = stage.packing.length
    assert not [x for x in shapes.arrays_of(stage, VOCAB) if list(x.shape).count(t) > 1]


def test_a_short_row_takes_the_whole_product_at_once():
    model = configs.Decoder(layers=2, width=64, heads=2)
    stage = configs.DecoderStage(model=model, packing=configs.Packing(length=1024))
    stage = dataclasses.replace(stage, training=configs.Training(steps=2, batch=2))
    assert [x for x in shapes.arrays_of(stage, VOCAB) if x.shape == (2, 2, 1024, 1024) and x.dtype == jnp.float32]
