"""The table at the start, counted by hand on meshes that are and are not there."""

import pathlib
import sys

import jax
import pytest
from jax.experimental import topologies

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import toy_task as toy

from cm3jax import config as configs
from cm3jax import sharding
from cm3jax.train import loop, summary

PARAMS = toy.LAYERS * (2 * toy.WIDTH * toy.HIDDEN + toy.WIDTH) * 4
"""Bytes of the toy's parameters; the scale of WIDTH is on every chip."""


def abstract(mesh, training):
    return loop.compile(toy.task(training), training, mesh).abstract


def test_the_table_says_mesh_rows_and_bytes():
    training = toy.training(mesh=configs.Mesh(2, 2, 2), batch=16, accumulate=2)
    mesh = sharding.mesh(training.mesh)
    text = summary.table(abstract(mesh, training), mesh, training, step=4)
    assert text.splitlines() == [
        "3,120 parameters",
        "  devices          8 x cpu, 1 host",
        "  mesh             replica 2 x fsdp 2 x tensor 2",
        "  batch            16 rows a step, 16 per host; 2 at a time on each 2 chips, one after another in 2 parts",
        "  parameters       12.19 KiB in all, 3.188 KiB per chip",
        "  optimizer state  24.38 KiB in all, 6.383 KiB per chip",
        "  other state      12.19 KiB in all, 3.188 KiB per chip",
        "  steps            4 of 6 done",
    ]


@pytest.mark.parametrize("sizes, ways", [((1, 8, 1), 8), ((8, 1, 1), 1), ((1, 4, 2), 8), ((1, 2, 1), 2)])
def test_a_chip_holds_its_part_of_what_is_split_and_the_whole_of_what_is_not(sizes, ways):
    training = toy.training(mesh=configs.Mesh(*sizes))
    state = abstract(sharding.mesh(training.mesh), training)
    scale = toy.LAYERS * toy.WIDTH * 4
    assert summary.bytes_per_chip(state.params) == (PARAMS - scale) // ways + scale


def test_a_chip_really_holds_that():
    training = toy.training(mesh=configs.Mesh(2, 2, 2))
    compiled = loop.compile(toy.task(training), training, sharding.mesh(training.mesh))
    leaves = jax.tree.leaves(compiled.init())
    held = sum(x.addressable_shards[0].data.nbytes for x in leaves)
    assert held == summary.bytes_per_chip(compiled.abstract)


def test_slices_and_hosts_that_are_not_there_are_counted():
    devices = topologies.get_topology_desc("v5e:4x4", "tpu", num_slices=2).devices
    mesh, training = sharding.mesh(configs.Mesh(), devices), toy.training(batch=64)
    assert summary.devices(mesh) == "32 x TPU v5 lite, 8 hosts, 2 slices"
    assert summary.batch(mesh, training) == "64 rows a step, 8 per host; 2 at a time on each chip"


@pytest.mark.parametrize(
    "count, text", [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**40, "1 TiB"), (2**54, "1.638e+04 TiB")]
)
def test_bytes_are_shown_in_the_unit_that_fits(count, text):
    assert summary.show(count) == text


@pytest.mark.slow
def test_a_step_compiles_for_two_slices_that_are_not_there():
    devices = topologies.get_topology_desc("v5e:2x2", "tpu", num_slices=2).devices
    training = toy.training(batch=16)
    mesh = sharding.mesh(training.mesh, devices)
    compiled, rows = loop.compile(toy.task(training), training, mesh), sharding.rows(mesh)
    batch = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows) for k, x in toy.batch(0).items()}
    with jax.set_mesh(mesh):
        text = compiled.step.lower(compiled.abstract, batch).compile().as_text()
    assert dict(mesh.shape) == {"replica": 2, "fsdp": 4, "tensor": 1}
    assert "all-reduce" in text or "send" in text  # gradients meet across the slices
