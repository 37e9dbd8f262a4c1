"""Files and folders of tensors: recognised by content, shards put together, checksums as sha256sum prints them."""

import hashlib
import json

import numpy as np
import pytest

from cm3jax.interop import mapped, safetensor_files, tensors
from cm3jax.types import UserError


def sharded(folder, most=1):
    """Write four tensors, each in a shard of its own."""
    given = {f"layers.{i}.weight": np.full((2, i + 1), i, np.float32) for i in range(4)}
    safetensor_files.save(folder, {name: mapped.held(array) for name, array in given.items()}, {"format": "pt"}, most)
    return given


def rewritten(folder, change):
    """Change the index of shards."""
    path = folder / safetensor_files.INDEX
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_a_folder_is_what_its_index_says_in_the_indexs_order(tmp_path):
    given = sharded(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    for path in (tmp_path, tmp_path / safetensor_files.INDEX):
        found = tensors.open(path)
        assert list(found.found) == list(given) and found.kind == "safetensors"
        assert len(found.files) == 5
        for name, array in given.items():
            np.testing.assert_array_equal(found.read(name), array)


def test_content_tells_and_not_the_name(tmp_path):
    safetensor_files.write(tmp_path / "weights.ckpt", {"x": mapped.held(np.ones(3))})
    (tmp_path / "model.safetensors").write_text("an error page")
    assert tensors.open(tmp_path / "weights.ckpt").kind == "safetensors"
    assert tensors.open(tmp_path).path == tmp_path / "weights.ckpt"
    with pytest.raises(UserError, match=r"model.safetensors: neither safetensors nor torch.save.*b'an error'"):
        tensors.open(tmp_path / "model.safetensors")


@pytest.mark.parametrize("length", [123, 10, 32])
def test_a_header_whose_length_reads_as_text_is_a_header(length, tmp_path):
    text = json.dumps({"x": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}).encode()
    text = (b"{}" if len(text) > length else text).ljust(length)
    (tmp_path / "a").write_bytes(length.to_bytes(8, "little") + text)
    assert tensors.open(tmp_path / "a").kind == "safetensors"


def test_what_begins_with_a_prefix_is_found_without_it(tmp_path):
    sharded(tmp_path)
    assert list(tensors.open(tmp_path).under("layers.2.")) == ["weight"]


def test_a_tensor_that_is_not_there_is_named(tmp_path):
    sharded(tmp_path)
    with pytest.raises(UserError, match=r"no tensor 'lm_head' among its 4"):
        tensors.open(tmp_path).read("lm_head")


SHARD = safetensor_files.SHARD.format(3, 4)
BROKEN = {
    "a missing shard": (lambda f: (f / SHARD).unlink(), rf"{SHARD}: missing; .* tensor 'layers.2.weight'"),
    "a damaged shard": (
        lambda f: (f / SHARD).write_bytes(b"\x04" + bytes(7) + b"{}{}"),
        rf"{SHARD}: its header is not",
    ),
    "a shard of text": (lambda f: (f / SHARD).write_text("<html>"), rf"{SHARD}: neither safetensors nor torch.save"),
    "a tensor in no shard": (
        lambda f: rewritten(f, lambda m: m.update({"lm_head": SHARD})),
        rf"{SHARD}: has no tensor 'lm_head', which model.safetensors.index.json places there",
    ),
    "a tensor in no index": (
        lambda f: rewritten(f, lambda m: m.pop("layers.1.weight")) or sharded_again(f),
        "has tensor 'layers.1.weight', which model.safetensors.index.json places nowhere",
    ),
    "a tensor in two shards": (
        lambda f: safetensor_files.write(
            f / SHARD, {f"layers.{i}.weight": mapped.held(np.zeros(2, np.float32)) for i in (1, 2)}
        ),
        rf"{SHARD}: has tensor 'layers.1.weight', which .* places in model-00002-of-00004",
    ),
    "a path for a shard": (
        lambda f: rewritten(f, lambda m: m.update({"layers.0.weight": "../secret"})),
        "tensor 'layers.0.weight' lies in '../secret', not a file's name",
    ),
    "a tensor twice": (
        lambda f: (f / safetensor_files.INDEX).write_text('{"weight_map": {"a": "b", "a": "c"}}'),
        r"index.json: not an index of shards \('a' stands twice\)",
    ),
    "no map": (lambda f: (f / safetensor_files.INDEX).write_text('{"weight_map": []}'), r"weight_map \[\] must be"),
}


def sharded_again(folder):
    """Put two tensors into each of two shards, of which the index leaves one out."""
    for path in folder.iterdir():
        path.unlink()
    sharded(folder, most=24)
    rewritten(folder, lambda m: m.pop("layers.1.weight"))


@pytest.mark.parametrize("name", BROKEN)
def test_shards_that_do_not_fit_are_refused_with_the_files_name_and_the_tensors(name, tmp_path):
    change, message = BROKEN[name]
    sharded(tmp_path)
    change(tmp_path)
    with pytest.raises(UserError, match=message) as e:
        tensors.open(tmp_path / safetensor_files.INDEX)
    assert "\n" not in str(e.value)


def test_several_files_and_no_index_are_refused_with_two_names(tmp_path):
    for name in ("a", "b"):
        safetensor_files.write(tmp_path / name, {"x": mapped.held(np.ones(3))})
    with pytest.raises(UserError, match="has several, a and b; name the file"):
        tensors.open(tmp_path)


def test_nothing_to_read_is_said(tmp_path):
    with pytest.raises(UserError, match="no such file or folder of weights"):
        tensors.open(tmp_path / "none")
    with pytest.raises(UserError, match="no file in it is safetensors"):
        tensors.open(tmp_path)
    (tmp_path / "empty").touch()
    with pytest.raises(UserError, match="empty: neither safetensors nor"):
        tensors.open(tmp_path / "empty")


def test_a_files_digest_is_its_sha256_and_is_verified(tmp_path):
    safetensor_files.write(tmp_path / "a", {"x": mapped.held(np.ones(3))})
    found, wanted = tensors.open(tmp_path / "a"), hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest()
    assert tensors.digest(found) == wanted
    tensors.verify(found, wanted.upper())
    with pytest.raises(UserError, match=f"its SHA-256 is {wanted}, not 00"):
        tensors.verify(found, "00")


def test_a_folders_digest_changes_with_any_byte_of_any_file(tmp_path):
    sharded(tmp_path)
    before = tensors.digest(tensors.open(tmp_path))
    for path in sorted(tmp_path.iterdir()):
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if path.suffix == ".safetensors" else data + b" ")
        assert tensors.digest(tensors.open(tmp_path)) != before
        path.write_bytes(data)
    assert tensors.digest(tensors.open(tmp_path)) == before


def test_reading_needs_the_memory_of_what_is_read(tmp_path):
    """A sparse file of 1 TB opens, and its last numbers are read."""
    header = {
        "big": {"dtype": "BF16", "shape": [2**19, 2**20], "data_offsets": [0, 2**40]},
        "last": {"dtype": "F32", "shape": [3], "data_offsets": [2**40, 2**40 + 12]},
    }
    text = json.dumps(header).encode()
    with (tmp_path / "a").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.seek(2**40, 1)
        file.write(np.arange(3, dtype=np.float32).tobytes())
    found = tensors.open(tmp_path)
    np.testing.assert_array_equal(found.read("last"), [0, 1, 2])
    assert found.found["big"].size == 2**40
