"""Saving and restoring, on another mesh and in part, and what a bad checkpoint says."""

import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cm3jax import checkpoint, sharding
from cm3jax import config as configs
from cm3jax.train import state as states
from cm3jax.types import UserError

META = {"identity": {"plan": "abc"}, "seconds": 1.5}


def make(scale=1.0, ema=True):
    """A small state whose weights are told apart by `scale`, the averaged ones by their sign."""
    params = {"a": {"w": scale * jnp.arange(32.0).reshape(8, 4)}, "b": scale * jnp.ones(3)}
    extra = {"ema": jax.tree.map(jnp.negative, params)} if ema else {}
    return states.create(
        params, optax.chain(optax.adam(0.1), optax.masked(optax.sgd(0.1), {"a": False, "b": True})), extra
    )


def abstract(state, placed=None):
    placed = placed or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), state)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with checkpoints at steps 1 (scale 1) and 2 (scale 2)."""
    folder = tmp_path_factory.mktemp("saved")
    manager = checkpoint.open(folder, keep=2)
    for step in (1, 2):
        checkpoint.save(manager, step, make(float(step)), META)
    manager.close()
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_was_saved_is_restored(saved):
    manager, state = checkpoint.open(saved), make(2.0)
    restored = checkpoint.restore(manager, 2, abstract(state))
    equal(restored, state)
    assert checkpoint.load_meta(manager, 2) == META


def test_a_state_is_restored_onto_another_mesh(saved):
    mesh = sharding.mesh(configs.Mesh(1, 8, 1))
    target = abstract(make(), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    target.params["a"]["w"] = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=rows)
    restored = checkpoint.restore(checkpoint.open(saved), 2, target)
    assert restored.params["a"]["w"].sharding == rows
    equal(jax.device_get(restored), jax.device_get(make(2.0)))


def test_weights_are_loaded_without_knowing_the_optimizer(saved):
    state = make(2.0)
    equal(checkpoint.load_params(saved), jax.device_get(state.extra["ema"]))
    equal(checkpoint.load_params(saved, prefer_ema=False), jax.device_get(state.params))
    equal(checkpoint.load_params(saved, prefer_ema=False, step=1), jax.device_get(make(1.0).params))


def test_weights_go_where_the_target_says(saved):
    placed = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    loaded = checkpoint.load_params(saved, target=abstract(make().params, placed))
    assert loaded["b"].sharding == placed
    bare = jax.eval_shape(lambda: make().params)
    assert checkpoint.load_params(saved, target=bare)["b"].devices() == {jax.devices()[0]}


def test_without_averaged_weights_the_weights_are_loaded(tmp_path):
    manager = checkpoint.open(tmp_path)
    checkpoint.save(manager, 5, make(ema=False), META)
    manager.close()
    equal(checkpoint.load_params(tmp_path), jax.device_get(make().params))


def test_the_latest_checkpoints_are_kept(tmp_path):
    manager, state = checkpoint.open(tmp_path, keep=2), make(ema=False)
    for step in (1, 2, 3):
        checkpoint.save(manager, step, state, META)
    manager.close()
    assert checkpoint.steps(tmp_path) == [2, 3]


def test_a_run_that_went_back_replaces_what_lies_ahead(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    manager = checkpoint.open(tmp_path / "copy")
    checkpoint.save(manager, 1, make(7.0, ema=True), META)
    manager.close()
    assert checkpoint.steps(tmp_path / "copy") == [1]
    equal(checkpoint.load_params(tmp_path / "copy", prefer_ema=False), jax.device_get(make(7.0).params))


def test_an_empty_folder_has_no_steps(tmp_path):
    assert checkpoint.steps(tmp_path) == [] and checkpoint.steps(tmp_path / "none") == []


def test_a_missing_checkpoint_says_so(saved, tmp_path):
    with pytest.raises(UserError, match="no checkpoint; train this stage first") as e:
        checkpoint.load_params(tmp_path / "nowhere")
    one_line(e)
    with pytest.raises(UserError, match=r"no step 7, only \[1, 2\]"):
        checkpoint.load_params(saved, step=7)


def test_a_parameter_of_another_shape_is_named(saved):
    target = make()
    target.params["a"]["w"] = jnp.zeros((8, 5))
    with pytest.raises(UserError, match=r"params/a/w has shape \(8, 4\), the model \(8, 5\)") as e:
        checkpoint.restore(checkpoint.open(saved), 2, abstract(target))
    assert not isinstance(e.value, checkpoint.Damaged) and one_line(e)
    with pytest.raises(UserError, match=r"a/w has shape \(8, 4\), the model \(8, 5\)"):
        checkpoint.load_params(saved, target=abstract(target.params))


def test_a_missing_or_superfluous_parameter_is_named(saved):
    more, less = make(), make()
    more.params["c"] = jnp.zeros(2)
    del less.params["b"]
    with pytest.raises(UserError, match="lacks params/c"):
        checkpoint.restore(checkpoint.open(saved), 2, abstract(more))
    with pytest.raises(UserError, match="has params/b, which the model lacks"):
        checkpoint.restore(checkpoint.open(saved), 2, abstract(less))


def victim(folder: pathlib.Path, kind: str) -> pathlib.Path:
    """A file of a checkpoint: the largest of its arrays, or a named one."""
    if kind != "arrays":
        return folder / kind
    return max((p for p in (folder / "state").rglob("d/*") if p.is_file()), key=lambda p: p.stat().st_size)


def remove(path):
    path.unlink()
    return f"is missing, expected {SIZES[path]} bytes"


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])
    return f"has {SIZES[path] - 1} bytes, expected {SIZES[path]}"


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    return "has crc32c"


SIZES = {}
KINDS = ["arrays", "state/_METADATA", "state/manifest.ocdbt", "meta/metadata", "_CHECKPOINT_METADATA"]


@pytest.mark.parametrize("damage", [remove, cut, flip])
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_named_in_one_line_with_what_was_expected_and_found(copy, kind, damage):
    folder = copy / "checkpoints" / "2"
    path = victim(folder, kind)
    SIZES[path] = path.stat().st_size
    message = damage(path)
    for read in (
        lambda: checkpoint.restore(checkpoint.open(copy), 2, abstract(make())),
        lambda: checkpoint.load_meta(checkpoint.open(copy), 2),
        lambda: checkpoint.load_params(copy),
    ):
        with pytest.raises(checkpoint.Damaged) as e:
            read()
        text = one_line(e)
        assert f"{str(folder)!r} is damaged: {path.relative_to(folder)} {message}" in text
        assert "delete it to use the one before" in text


def test_a_save_that_did_not_end_counts_for_nothing(copy):
    (copy / "checkpoints" / "2" / "manifest.json").unlink()
    saver = checkpoint.open(copy)
    assert checkpoint.steps(copy) == [1] and checkpoint.candidates(saver) == [1]
    assert checkpoint.uncommitted(saver) == [2]
    equal(checkpoint.load_params(copy, prefer_ema=False), jax.device_get(make(1.0).params))


def test_what_a_killed_save_left_goes_with_the_next_one(copy):
    (copy / "checkpoints" / "2" / "manifest.json").unlink()
    (copy / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir()
    saver = checkpoint.open(copy)
    checkpoint.save(saver, 5, make(5.0), META)
    saver.close()
    assert sorted(p.name for p in (copy / "checkpoints").iterdir()) == ["1", "5"]


def test_the_checkpoint_before_goes_only_after_the_manifest_is_there(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    left = []
    look = lambda line: left.append((line.split(",")[0], checkpoint.steps(tmp_path / "copy")))  # noqa: E731
    saver = checkpoint.open(tmp_path / "copy", keep=1, say=look)
    checkpoint.save(saver, 3, make(3.0), META)
    saver.close()
    assert left == [("step 3: checkpoint save started", [1, 2]), ("step 3: checkpoint committed", [1, 2, 3])]
    assert checkpoint.steps(tmp_path / "copy") == [3]


def test_an_error_of_the_background_comes_out_at_the_next_wait(tmp_path, monkeypatch):
    def fail(path):
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "commit", fail)
    saver = checkpoint.open(tmp_path)
    checkpoint.save(saver, 1, make(), META)
    with pytest.raises(OSError, match="no space left"):
        saver.wait()
    assert checkpoint.steps(tmp_path) == []
    saver.close()


def test_a_donated_state_does_not_change_what_is_being_saved(tmp_path):
    manager = checkpoint.open(tmp_path, keep=0)
    state = states.create({"w": jnp.arange(2.0**19)}, optax.sgd(0.1))  # large enough for jax to share its memory
    bump = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    expected = {}
    for step in range(1, 5):
        expected[step] = jax.tree.map(np.array, state.params)
        checkpoint.save(manager, step, state, META)
        state = bump(state)
    manager.close()
    for step, params in expected.items():
        equal(checkpoint.load_params(tmp_path, step=step), params)
