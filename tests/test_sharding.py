"""The mesh, the rules table and its strict reading."""

import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, PartitionSpec

from cm3jax import config as configs
from cm3jax import sharding
from cm3jax.types import UserError

P = PartitionSpec


def box(shape, *names):
    return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)


@pytest.fixture(scope="module")
def mesh():
    return sharding.mesh(configs.Mesh(2, 2, 2))


def test_minus_one_takes_the_devices_that_are_left():
    assert dict(sharding.mesh(configs.Mesh(2, -1, 2)).shape) == {"replica": 2, "fsdp": 2, "tensor": 2}
    assert dict(sharding.mesh(configs.Mesh()).shape) == {"replica": 1, "fsdp": 8, "tensor": 1}
    assert dict(sharding.mesh(configs.Mesh(), jax.devices()[:1]).shape) == {"replica": 1, "fsdp": 1, "tensor": 1}


def test_a_mesh_of_fixed_size_takes_the_first_devices():
    assert list(sharding.mesh(configs.Mesh(1, 3, 1)).devices.flat) == jax.devices()[:3]


def two_slices(chips="2x2"):
    """The devices of two TPU slices that are not there."""
    return topologies.get_topology_desc(f"v5e:{chips}", "tpu", num_slices=2).devices


@pytest.mark.parametrize(
    "asked, sizes",
    [((0, -1, 1), (2, 4, 1)), ((2, 2, 2), (2, 2, 2)), ((-1, 2, 1), (4, 2, 1)), ((1, -1, 1), (1, 8, 1))],
)
def test_two_slices_lie_along_replica_and_only_what_is_left_of_them_along_fsdp(asked, sizes):
    found = sharding.mesh(configs.Mesh(*asked), two_slices())
    assert tuple(found.shape.values()) == sizes and set(found.axis_types) == {AxisType.Auto}
    index = np.vectorize(lambda d: d.slice_index)(found.devices)
    index = index if asked[0] != 1 else index.swapaxes(0, 1)
    half = len(index) // 2
    assert (index[:half] == 0).all() and (index[half:] == 1).all()


def test_tensor_parallelism_over_slices_is_refused_with_the_fix():
    with pytest.raises(UserError, match=r"mesh replica=1 x fsdp=1 x tensor=8 .* 2 slices: set mesh.replica to a"):
        sharding.mesh(configs.Mesh(1, 1, 8), two_slices())


def test_one_slice_of_two_can_be_had_alone():
    found = sharding.mesh(configs.Mesh(), [d for d in two_slices() if d.slice_index == 1])
    assert dict(found.shape) == {"replica": 1, "fsdp": 4, "tensor": 1}


@pytest.mark.parametrize("name, sizes", [("v5e:8x8", (1, -1, 4)), ("v6e:8x8", (1, -1, 4)), ("v5p:4x4x4", (1, -1, 2))])
def test_tensor_parallelism_finds_a_layout_on_every_torus(name, sizes):
    """Also where no whole axis of it is as long as that."""
    devices = topologies.get_topology_desc(name, "tpu").devices
    found = sharding.mesh(configs.Mesh(*sizes), devices)
    assert found.devices.shape == (1, len(devices) // sizes[2], sizes[2])
    assert set(found.devices.flat) == set(devices)


@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
def test_hosts_bring_every_row_once_and_those_that_hold_the_same_rows_the_same(tensor):
    """Four chips a host, in a square: a group of 4 in a row, or of 8, lies across hosts."""
    found = sharding.mesh(configs.Mesh(1, -1, tensor), topologies.get_topology_desc("v5e:8x8", "tpu").devices)
    held, brought = {}, {}
    for number, group in enumerate(found.devices.reshape(sharding.shares(found), -1)):
        for device in group:
            held.setdefault(device.process_index, set()).add(number)
    for process in held:
        brought.setdefault(sharding.host_share(found, process), []).append(held[process])
    counts = {n for _, n in brought}
    assert len(held) == 16 and len(counts) == 1 and {i for i, _ in brought} == set(range(counts.pop()))
    assert all(rows == group[0] for group in brought.values() for rows in group)
    assert sorted(n for group in brought.values() for n in group[0]) == list(range(64 // tensor))


def test_hosts_that_hold_some_rows_in_common_are_refused():
    hosts = {}
    for device in topologies.get_topology_desc("v5e:2x4", "tpu").devices:
        hosts.setdefault(device.process_index, []).append(device)
    uneven = np.array([*hosts[0][:3], *hosts[1][:3]]).reshape(1, 3, 2)
    made = jax.sharding.Mesh(uneven, sharding.AXES)
    with pytest.raises(UserError, match="groups of 2 devices lie across hosts unevenly; change tensor"):
        sharding.host_share(made, 0)


def test_only_tpus_have_slices():
    assert sharding.slices(two_slices()) == 2 and sharding.slices(jax.devices()) == 1


def test_mesh_axes_are_auto(mesh):
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize("sizes", [(-1, -1, 1), (1, 0, 1), (1, -2, 1), (1, 16, 1), (3, -1, 1)])
def test_a_mesh_that_does_not_fit_says_so_in_one_line(sizes):
    with pytest.raises(UserError, match="mesh replica=") as e:
        sharding.mesh(configs.Mesh(*sizes))
    assert "\n" not in str(e.value)


def test_names_become_the_mesh_axes_of_the_table():
    assert sharding.spec(("layer", "embed", "mlp")) == P(None, "fsdp", "tensor")
    assert sharding.spec(("vocab", "table_width")) == P(("tensor", "fsdp"), None)
    assert sharding.spec(("batch", "seq", None)) == P(("replica", "fsdp"), None, None)


def test_the_table_uses_only_axes_of_the_mesh():
    assert {axis for axes in sharding.RULES.values() for axis in axes} == set(sharding.AXES)


def test_an_unknown_name_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"blocks/w: unknown logical axis 'embde'"):
        sharding.spec(("embde", "mlp"), "blocks/w")


@pytest.mark.parametrize("names", [("embed", "vocab"), ("heads", "mlp"), ("embed", "embed")])
def test_a_doubled_mesh_axis_is_an_error(names):
    with pytest.raises(ValueError, match="split two dimensions over the mesh axis"):
        sharding.spec(names)


def test_a_dimension_that_does_not_divide_is_an_error_that_names_the_parameter(mesh):
    with pytest.raises(
        UserError, match=r"params/w: dimension 1 \(mlp\) of shape \(4, 7\) is 7, not a multiple of the 2"
    ):
        sharding.shardings(mesh, {"params": {"w": box((4, 7), "embed", "mlp")}})


def test_a_wrong_number_of_names_is_an_error(mesh):
    with pytest.raises(ValueError, match="params/w: 2 axis names"):
        sharding.shardings(mesh, {"params": {"w": box((4, 4, 4), "embed", "mlp")}})


def test_a_parameter_without_names_is_an_error_and_a_counter_elsewhere_is_not(mesh):
    bare = jax.ShapeDtypeStruct((4,), jnp.float32)
    with pytest.raises(ValueError, match=r"params/w: shape \(4,\) has no axis names"):
        sharding.shardings(mesh, {"params": {"w": bare}})
    assert sharding.shardings(mesh, {"extra": {"usage": bare}})["extra"]["usage"].spec == P()


@pytest.mark.parametrize("top, names", [("params", (None, "table_width")), ("extra", None)])
def test_a_large_array_replicated_by_accident_is_an_error_on_a_mesh_that_could_split_it(mesh, top, names):
    big = (2**11, 2**11 + 1)
    leaf = box(big, *names) if names else jax.ShapeDtypeStruct(big, jnp.float32)
    with pytest.raises(UserError, match="would be whole on each of 8 devices"):
        sharding.shardings(mesh, {top: {"w": leaf}})
    one = sharding.mesh(configs.Mesh(), jax.devices()[:1])
    assert sharding.shardings(one, {top: {"w": leaf}})[top]["w"].is_fully_replicated


def test_a_convolution_is_whole_on_purpose_however_large(mesh):
    tree = {"params": {"w": box((3, 3, 1024, 1024), None, None, "conv_in", "conv_out")}}
    assert sharding.shardings(mesh, tree)["params"]["w"].is_fully_replicated


def test_shardings_have_the_structure_of_the_unboxed_tree(mesh):
    tree = {"params": {"w": box((4, 4), "embed", "mlp")}, "n": jax.ShapeDtypeStruct((), jnp.int32)}
    assert jax.tree.structure(sharding.shardings(mesh, tree)) == jax.tree.structure(sharding.unbox(tree))
    assert sharding.names(tree) == {"params": {"w": ("embed", "mlp")}, "n": None}


def test_constrain_does_nothing_without_a_mesh_but_still_reads_the_names():
    x = jnp.ones((3, 5))
    assert sharding.constrain(x, "batch", "width") is x
    with pytest.raises(ValueError, match="unknown logical axis"):
        sharding.constrain(x, "batch", "widht")


def test_constrain_lays_an_activation_out_as_the_table_says(mesh):
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: sharding.constrain(x, "batch", "seq", "act_mlp"))(jnp.ones((8, 3, 4)))
    assert y.sharding.spec == P(("replica", "fsdp"), None, "tensor")


def test_constrain_refuses_an_activation_that_does_not_divide(mesh):
    with jax.set_mesh(mesh), pytest.raises(UserError, match=r"activation: dimension 0 \(batch\)"):
        jax.jit(lambda x: sharding.constrain(x, "batch", "width"))(jnp.ones((7, 3)))


def test_a_batch_is_split_over_the_data_axes_only(mesh):
    rows = np.arange(8 * 3).reshape(8, 3)
    placed = sharding.place(mesh, {"x": rows}, 8)["x"]
    assert placed.sharding.spec == P(("replica", "fsdp")) and placed.addressable_shards[0].data.shape == (2, 3)
    np.testing.assert_array_equal(placed, rows)


def test_a_batch_that_does_not_fit_says_why(mesh):
    with pytest.raises(UserError, match="batch = 6 rows: not a multiple of the 4 devices"):
        sharding.place(mesh, {"x": np.zeros((6, 2))})
    with pytest.raises(UserError, match=r"batch/x: shape \(4, 2\), expected 8 rows"):
        sharding.place(mesh, {"x": np.zeros((4, 2))}, 8)


COMPILE = """
import sys
import jax, numpy as np
from cm3jax import config as c, sharding, vocab
from cm3jax.nn import decoder
from cm3jax.train import lm, loop
if len(sys.argv) > 1:
    decoder.gathered = lambda table, dtype: table.astype(dtype)
    sharding.RULES |= {"vocab": ("tensor",), "table_width": ("fsdp",)}
words = vocab.Vocab(text=100, image=64, sentinels=8, multiple=64)
row = lambda dtype: np.ones((16, 16), dtype)
batch = {"inputs": row("i4"), "targets": row("i4"), "weights": row("f4"), "positions": row("i4"), "segments": row("i4"),
         "modality": row("i1")}
for sizes, tied in (((1, 8, 1), True), ((2, 2, 2), False)):
    training = c.Training(steps=2, batch=16, mesh=c.Mesh(*sizes))
    stage = c.DecoderStage(model=c.Decoder(layers=2, width=16, heads=4, tied=tied), packing=c.Packing(length=16),
                           training=training)
    mesh = sharding.mesh(training.mesh)
    compiled = loop.compile(lm.task(stage, words), training, mesh)
    with jax.set_mesh(mesh):
        compiled.step.lower(compiled.abstract, sharding.place(mesh, batch, 16)).compile()
print("compiled")
"""
INVOLUNTARY = "Involuntary full rematerialization"


def log_of_compiling(*arguments):
    """What XLA prints at its most talkative (the warning is lost above level 1)."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, *arguments],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "0"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert "compiled" in done.stdout, done.stderr
    return done.stderr


@pytest.mark.slow
def test_no_table_is_rematerialised_as_a_whole():
    assert INVOLUNTARY not in log_of_compiling()


@pytest.mark.slow
def test_a_table_split_over_its_width_too_and_not_gathered_would_be():
    assert INVOLUNTARY in log_of_compiling("both")
