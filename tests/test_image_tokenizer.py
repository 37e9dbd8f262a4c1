"""Laws of the trained image tokenizer and its folder."""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from cm3jax import config as configs
from cm3jax import sharding
from cm3jax.nn import vqgan
from cm3jax.objectives import vqgan as objective
from cm3jax.tokenizers import image
from cm3jax.types import UserError

SIDE, CODES = 12, 7
MODEL = configs.VQGAN(
    patch=4, width=4, multipliers=(1,), encoder_blocks=1, decoder_blocks=1, attention=(), middle=False, groups=0, z=3
)


@pytest.fixture(scope="module")
def params():
    net = vqgan.VQGAN(MODEL, CODES)
    made = jax.jit(net.init)(jax.random.key(0, impl="rbg"), jnp.zeros((1, SIDE, SIDE, 3)))["params"]
    codebook = np.random.default_rng(0).normal(size=(CODES, 3)).astype(np.float32)
    return sharding.unbox(made) | {"codebook": jnp.asarray(codebook)}


@pytest.fixture(scope="module")
def tokenizer(params):
    return image.Tokenizer(MODEL, CODES, SIDE, params, batch=4)


@pytest.fixture
def folder(tmp_path, params):
    image.save(tmp_path, MODEL, CODES, SIDE, params)
    return tmp_path


def pictures(b, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (b, SIDE, SIDE, 3), dtype=np.uint8)


def test_codes_are_rows_of_the_grid_and_decode_to_the_networks_pictures(tokenizer, params):
    x = pictures(5)
    codes = tokenizer.encode(x)
    assert tokenizer.grid == (3, 3) and codes.shape == (5, 9) and codes.dtype == np.uint16
    out, grid = jax.jit(vqgan.VQGAN(MODEL, CODES).apply)({"params": params}, objective.to_unit(jnp.asarray(x)))
    np.testing.assert_array_equal(codes, grid.reshape(5, 9))
    found = tokenizer.decode(codes)
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - np.asarray(objective.to_bytes(out)).astype(int)).max() <= 1


@pytest.mark.parametrize("b", [0, 1, 4, 5])
def test_a_picture_alone_gives_the_codes_that_it_gives_in_a_batch(tokenizer, b):
    x = pictures(11)
    whole = tokenizer.encode(x)
    np.testing.assert_array_equal(tokenizer.encode(x[:b]), whole[:b])
    np.testing.assert_array_equal(tokenizer.decode(whole[:b]), tokenizer.decode(whole)[:b])


def test_any_number_of_pictures_compiles_once(tokenizer):
    for b in (1, 2, 9):
        tokenizer.decode(tokenizer.encode(pictures(b)))
    assert tokenizer._encode._cache_size() == tokenizer._decode._cache_size() == 1


def test_a_saved_tokenizer_is_the_same_after_loading(tokenizer, folder):
    found = image.load(folder, batch=4)
    assert (found.config, found.codes, found.resolution, found.grid) == (MODEL, CODES, SIDE, (3, 3))
    x = pictures(3)
    np.testing.assert_array_equal(found.encode(x), tokenizer.encode(x))
    np.testing.assert_array_equal(found.decode(found.encode(x)), tokenizer.decode(tokenizer.encode(x)))


F16 = configs.VQGAN(multipliers=(1, 1, 2, 2, 4))


@pytest.mark.parametrize(
    "model, side, batch", [(MODEL, SIDE, 64), (F16, 64, 64), (F16, 256, 4), (F16, 512, 1), (F16, 2048, 1)]
)
def test_pictures_of_a_call_are_as_many_as_memory_allows(model, side, batch):
    """A full-size network at 512 pixels with 64 of them would need tens of GB."""
    assert image.fitting(model, side) == batch


def test_a_loaded_tokenizer_takes_as_many_pictures_as_fit(folder, monkeypatch):
    assert image.load(folder).batch == 64
    monkeypatch.setattr(image, "LARGEST", 7 * 3 * 3 * 4)
    assert image.load(folder).batch == 4
    assert image.load(folder, devices=tuple(jax.local_devices())).batch == 32


@pytest.mark.parametrize(
    "x", [pictures(1)[:, :8], pictures(1).astype(np.float32), pictures(1)[0], pictures(1)[..., :1]]
)
def test_pictures_of_another_kind_are_refused(tokenizer, x):
    with pytest.raises(UserError, match=r"takes uint8 \[b, 12, 12, 3\]"):
        tokenizer.encode(x)


def test_codes_that_are_no_picture_are_refused(tokenizer):
    with pytest.raises(UserError, match="a row of 9 integers"):
        tokenizer.decode(np.zeros((1, 8), np.uint16))
    with pytest.raises(UserError, match="image code 7: the codebook has codes 0 to 6"):
        tokenizer.decode(np.full((1, 9), 7, np.uint16))
    with pytest.raises(UserError, match="image code -1"):
        tokenizer.decode(np.full((1, 9), -1, np.int32))


def test_a_resolution_that_does_not_fit_is_refused(params):
    with pytest.raises(UserError, match="resolution 13: not a multiple of the 4 pixels per code"):
        image.Tokenizer(MODEL, CODES, 13, params)


def edit(folder, **fields):
    about = json.loads((folder / image.CONFIG).read_text())
    (folder / image.CONFIG).write_text(json.dumps(about | fields))


def rewrite(folder, change):
    """Change the tensors of a saved tokenizer, checksum and all."""
    flat = change(dict(safetensors.numpy.load_file(folder / image.WEIGHTS)))
    data = safetensors.numpy.save(flat)
    (folder / image.WEIGHTS).write_bytes(data)
    edit(folder, sha256=hashlib.sha256(data).hexdigest())


def test_a_folder_without_a_tokenizer_is_said(tmp_path):
    with pytest.raises(UserError, match="no image tokenizer here"):
        image.load(tmp_path)


def test_missing_weights_are_said(folder):
    (folder / image.WEIGHTS).unlink()
    with pytest.raises(UserError, match="No such file or directory; train the image tokenizer again"):
        image.load(folder)


def test_a_flipped_byte_is_noticed(folder):
    data = bytearray((folder / image.WEIGHTS).read_bytes())
    data[-3] ^= 1
    (folder / image.WEIGHTS).write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        image.load(folder)


def test_a_broken_config_is_said(folder):
    (folder / image.CONFIG).write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        image.load(folder)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"codes": "many"}, "field 'codes' is missing or no int"),
        ({"model": {"depth": 3}}, "unknown field 'depth'"),
        ({"codes": 9}, r"codebook has shape \(7, 3\), the network \(9, 3\)"),
        ({"resolution": 13}, "resolution 13"),
    ],
)
def test_a_config_of_another_network_is_said(folder, fields, message):
    edit(folder, **fields)
    with pytest.raises(UserError, match=message):
        image.load(folder)


def test_missing_and_surplus_weights_are_named(folder):
    rewrite(folder, lambda flat: {k: v for k, v in flat.items() if k != "last/bias"})
    with pytest.raises(UserError, match="no weight 'last/bias'"):
        image.load(folder)
    rewrite(folder, lambda flat: flat | {"last/bias": np.zeros(48, np.float32), "more": np.zeros(1, np.float32)})
    with pytest.raises(UserError, match="a surplus weight 'more'"):
        image.load(folder)
