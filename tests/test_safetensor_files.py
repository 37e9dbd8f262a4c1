"""safetensors files: what others write is read, what is written others read, and what does not fit is refused."""

import json

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from cm3jax.interop import mapped, safetensor_files, tensors
from cm3jax.types import UserError

PLAIN = ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"]


def arrays(seed=0):
    """Return an array of every type, some empty, some without dimensions."""
    rng = np.random.default_rng(seed)
    found = {name: (rng.normal(size=(3, 5)) * 50).astype(name) for name in PLAIN}
    found["half"] = rng.normal(size=(7,)).astype(ml_dtypes.bfloat16)
    found["small"] = rng.normal(size=(2, 1, 3)).astype(ml_dtypes.float8_e4m3fn)
    found["flags"] = rng.random((5, 2)) > 0.5
    found["one"] = np.array(3.5, np.float32)
    found["none"] = np.empty((0, 3), np.float32)
    return found


def held(arrays):
    return {name: mapped.held(array) for name, array in arrays.items()}


def raw(path, header, data=b""):
    """Write a file whose header is as given."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(start, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def test_every_array_comes_back_to_the_bit(tmp_path):
    safetensor_files.write(tmp_path / "a", held(arrays()), {"format": "pt"})
    found = tensors.open(tmp_path / "a")
    assert found.values == {"format": "pt"} and found.kind == "safetensors"
    assert set(found.found) == set(arrays())
    for name, array in arrays().items():
        assert same(found.read(name), array), name
        assert found.found[name].size == array.nbytes


def test_what_the_library_writes_is_read(tmp_path):
    plain = {name: x for name, x in arrays().items() if name not in ("half", "small")}
    safetensors.numpy.save_file(plain, tmp_path / "a")
    found = safetensor_files.open(tmp_path / "a")
    assert all(same(found.read(name), array) for name, array in plain.items()) and len(found.found) == len(plain)


def test_what_is_written_the_library_reads(tmp_path):
    plain = {name: x for name, x in arrays().items() if name not in ("half", "small")}
    safetensor_files.write(tmp_path / "a", held(plain))
    read = safetensors.numpy.load_file(tmp_path / "a")
    assert set(read) == set(plain) and all(same(read[name], array) for name, array in plain.items())


def test_half_precision_is_read_by_torch_to_the_bit(tmp_path):
    import safetensors.torch
    import torch

    given = {name: arrays()[name] for name in ("half", "small", "one", "none", "flags")}
    safetensor_files.write(tmp_path / "a", held(given), {"format": "pt"})
    read = safetensors.torch.load_file(tmp_path / "a")
    assert set(read) == set(given) and read["half"].dtype == torch.bfloat16
    for name, array in given.items():
        assert tuple(read[name].shape) == array.shape
        assert read[name].reshape(-1).view(torch.uint8).numpy().tobytes() == array.tobytes()


def test_a_view_is_written_as_it_reads(tmp_path):
    array = np.arange(35, dtype=np.float32).reshape(5, 7).T[1::2]
    safetensor_files.write(tmp_path / "a", held({"x": array}))
    np.testing.assert_array_equal(safetensor_files.open(tmp_path / "a").read("x"), array)


def test_what_is_read_cannot_be_written_to(tmp_path):
    safetensor_files.write(tmp_path / "a", held({"x": np.ones(3)}))
    with pytest.raises(ValueError, match="read-only"):
        safetensor_files.open(tmp_path / "a").read("x")[0] = 2


@hypothesis.given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(1, 200))
def test_shards_hold_every_tensor_once_in_order_and_as_many_as_fit(sizes, most):
    given = {f"x{i}": mapped.held(np.zeros(n, np.uint8)) for i, n in enumerate(sizes)}
    parts = safetensor_files._parts(given, most)
    assert [name for part in parts for name in part] == list(given)
    total = [sum(given[name].size for name in part) for part in parts]
    assert all(
        size <= most or len(part) == 1 or not any(given[n].size for n in part[1:])
        for size, part in zip(total, parts, strict=True)
    )
    firsts = [given[part[0]].size for part in parts[1:]]
    assert all(size + first > most for size, first in zip(total, firsts, strict=False))


def test_shards_come_back_to_the_bit_whatever_their_size(tmp_path):
    for most, files in ((10**9, 1), (200, 5), (1, 14)):
        made = safetensor_files.save(tmp_path / str(most), held(arrays()), {"format": "pt"}, most)
        found = tensors.open(tmp_path / str(most))
        assert len(made) == len(found.files) and len(made) >= files
        assert set(found.found) == set(arrays())
        assert all(same(found.read(name), array) for name, array in arrays().items())


def test_a_failure_leaves_nothing_behind(tmp_path):
    given = {"a": mapped.held(np.zeros(5)), "b": mapped.held(np.zeros(5, np.complex128))}
    with pytest.raises(UserError, match=r"tensor 'b' of complex128: safetensors cannot hold it"):
        safetensor_files.save(tmp_path, given, {}, most=1)
    assert not list(tmp_path.iterdir())


def test_weights_that_are_there_are_not_written_over(tmp_path):
    safetensor_files.save(tmp_path, held({"x": np.ones(3)}), {})
    with pytest.raises(UserError, match=r"model.safetensors: is there already"):
        safetensor_files.save(tmp_path, held({"x": np.zeros(3)}), {})
    assert tensors.open(tmp_path).read("x").all()


GOOD = entry(0, 24, [2, 3])
BROKEN = {
    "an absurd header": (lambda p: p.write_bytes(b"\xff" * 8 + b"{}"), "claims a header of 18,446,744,073,709,551,615"),
    "a header past the end": (lambda p: p.write_bytes((99).to_bytes(8, "little") + b"{}"), "at most 2 in 10 bytes"),
    "a header of 100 MB": (lambda p: raw(p, b"{}", bytes(9)).open("r+b").write(bytes(7) + b"\1"), "claims a header of"),
    "no JSON": (lambda p: raw(p, b"{'a'"), "its header is not JSON"),
    "no UTF-8": (lambda p: raw(p, b'{"\xff"'), "its header is not JSON"),
    "a deep header": (lambda p: raw(p, b'{"a":' + b"[" * 200_000), "its header is not JSON"),
    "a tensor twice": (lambda p: raw(p, b'{"wq": {}, "wq": {}}'), "'wq' stands twice"),
    "a field twice": (lambda p: raw(p, b'{"wq": {"dtype": "F32", "dtype": "F16"}}'), "'dtype' stands twice"),
    "no entry": (lambda p: raw(p, {"wq": 5}), "tensor 'wq': 5 must have dtype, shape and data_offsets"),
    "an unknown type": (lambda p: raw(p, {"wq": entry(0, 24, [2, 3], "Q4")}, bytes(24)), "tensor 'wq': dtype 'Q4'"),
    "a negative shape": (lambda p: raw(p, {"wq": entry(0, 24, [-2, -3])}, bytes(24)), "'wq': shape [-2, -3] is none"),
    "a fractional shape": (lambda p: raw(p, {"wq": entry(0, 24, [2.0, 3])}, bytes(24)), "'wq': shape [2.0, 3] is none"),
    "a true shape": (lambda p: raw(p, {"wq": entry(0, 4, [True])}, bytes(4)), "'wq': shape [True] is none"),
    "an absurd shape": (lambda p: raw(p, {"wq": entry(0, 24, [2**62, 4])}, bytes(24)), "'wq': shape [46116860184273"),
    "an empty absurd shape": (lambda p: raw(p, {"wq": entry(0, 0, [0, 2**62, 4])}), "'wq': shape [0, 46116"),
    "too many dimensions": (
        lambda p: raw(p, {"wq": entry(0, 4, [1] * 65)}, bytes(4)),
        "is none that an array can have",
    ),
    "another size": (lambda p: raw(p, {"wq": entry(0, 24, [2, 4])}, bytes(24)), "takes 32 bytes, data_offsets have 24"),
    "an end outside": (lambda p: raw(p, {"wq": GOOD}, bytes(23)), "'wq': data_offsets [0, 24] must lie within 0 to 23"),
    "a negative offset": (lambda p: raw(p, {"wq": entry(-8, 16, [2, 3])}, bytes(24)), "data_offsets [-8, 16] must lie"),
    "an absurd offset": (lambda p: raw(p, {"wq": entry(2**70, 2**70 + 24, [6])}, bytes(24)), "'wq': data_offsets [118"),
    "offsets reversed": (lambda p: raw(p, {"wq": entry(24, 0, [6])}, bytes(24)), "'wq': data_offsets [24, 0] must lie"),
    "three offsets": (lambda p: raw(p, {"wq": {**GOOD, "data_offsets": [0, 24, 24]}}, bytes(24)), "must lie within"),
    "an overlap": (lambda p: raw(p, {"wq": GOOD, "wk": entry(20, 44, [6])}, bytes(44)), "'wq' and 'wk' overlap"),
    "one place twice": (lambda p: raw(p, {"wq": GOOD, "wk": GOOD}, bytes(24)), "overlap"),
    "a hole": (
        lambda p: raw(p, {"wq": GOOD, "wk": entry(28, 52, [6])}, bytes(52)),
        "4 bytes before tensor 'wk' are no",
    ),
    "bytes at the end": (lambda p: raw(p, {"wq": GOOD}, bytes(25)), "its last 1 bytes are no tensor's"),
    "metadata that is a list": (lambda p: raw(p, {"__metadata__": [1]}), "__metadata__ is [1], must be an object"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_does_not_fit_is_refused_with_its_name_and_the_tensors(name, tmp_path):
    make, message = BROKEN[name]
    make(tmp_path / "weights")
    with pytest.raises(UserError) as e:
        safetensor_files.open(tmp_path / "weights")
    assert str(tmp_path / "weights") in str(e.value) and message in str(e.value) and "\n" not in str(e.value)
    assert len(str(e.value)) < 700


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Return the path of a file to overwrite, and a good file's bytes."""
    path = tmp_path_factory.mktemp("small") / "a"
    safetensor_files.write(path, held({"wq": np.ones((2, 3), np.float32), "wk": np.ones(5, np.float16)}))
    return path, path.read_bytes()


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=200)
def test_a_file_with_changed_bytes_is_read_within_its_bounds_or_refused(small, data):
    """Wherever in length and header the bytes are changed."""
    path, good = small
    whole = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 34))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole)
    try:
        found = safetensor_files.open(path)
    except UserError as e:
        assert str(path) in str(e)
    else:
        assert sum(found.read(name).nbytes for name in found.found) == 34


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 9, 100])
def test_a_file_cut_off_is_refused(cut, tmp_path):
    safetensor_files.write(tmp_path / "a", held({"x": np.ones(50)}))
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:cut])
    with pytest.raises(UserError, match="a: "):
        safetensor_files.open(tmp_path / "a")
