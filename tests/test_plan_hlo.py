"""Collectives of compiled programs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cm3jax import config as configs
from cm3jax import sharding
from cm3jax.plan import hlo

STEPS, ROWS, WIDTH = 5, 8, 6


@pytest.fixture(scope="module")
def mesh():
    return sharding.mesh(configs.Mesh(2, 2, 2))


def compiled(mesh, body, spec=P(("replica", "fsdp", "tensor"))):
    """Return the collectives of a scan whose body exchanges something in each step."""

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=spec, out_specs=spec)
    def local(x):
        return jax.lax.scan(lambda x, _: (body(x), None), x, None, STEPS)[0]

    x = jax.ShapeDtypeStruct((8 * ROWS, WIDTH), jnp.float32, sharding=NamedSharding(mesh, spec))
    return hlo.collectives(jax.jit(local).lower(x).compile().as_text(), mesh.size)


def vary(x, axis):
    return jax.lax.pcast(x, axis, to="varying")


def test_an_exchange_in_a_loop_counts_as_often_as_the_loop_runs(mesh):
    (found,) = compiled(mesh, lambda x: vary(jnp.sin(jax.lax.psum(x, "fsdp")), "fsdp"))
    assert (found.kind, found.times, found.bytes) == ("all-reduce", STEPS, ROWS * WIDTH * 4)
    assert found.group == (0, 2)  # of a mesh of 2 x 2 x 2, devices that differ in the middle axis
    assert hlo.summary([found])["all-reduce"]["count"] == STEPS


def test_the_bytes_of_a_gathered_and_of_a_scattered_array_are_those_of_the_whole(mesh):
    def body(x):
        whole = jax.lax.all_gather(jnp.sin(x), ("replica", "fsdp"), tiled=True)
        return jax.lax.psum_scatter(jnp.sin(whole), ("replica", "fsdp"), tiled=True)

    found = {c.kind: c for c in compiled(mesh, body)}
    assert set(found) == {"all-gather", "reduce-scatter"}
    assert {c.bytes for c in found.values()} == {4 * ROWS * WIDTH * 4}
    assert {c.group for c in found.values()} == {(0, 2, 4, 6)}
    assert {c.times for c in found.values()} == {STEPS}


TPU = """HloModule step
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}
%start (p: bf16[4,2]) -> bf16[4,16] {
  %p = bf16[4,2]{1,0} parameter(0)
  ROOT %g = bf16[4,16]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=3, replica_groups=mesh['a'=2,'b'=8] {'b'}
}
%finish (p: bf16[4,2]) -> bf16[4,16] {
  %p = bf16[4,2]{1,0} parameter(0)
  ROOT %h = bf16[4,16]{1,0} all-gather(%p), channel_id=3, replica_groups=mesh['a'=2,'b'=8] {'b'}
}
%all-reduce-scatter.1 (p: f32[16]) -> f32[1] {
  %p = f32[16]{0} parameter(0)
  %r = f32[16]{0} all-reduce(%p), channel_id=4, replica_groups=[1,16]<=[16], to_apply=%add
  ROOT %s = f32[1]{0} dynamic-slice(%r, %p), dynamic_slice_sizes={1}
}
%condition (c: (s32[], bf16[4,2])) -> pred[] {
  %c = (s32[], bf16[4,2]{1,0}) parameter(0)
  %n = s32[] constant(7)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%i, %n), direction=LT
}
%body (c: (s32[], bf16[4,2])) -> (s32[], bf16[4,2]) {
  %c = (s32[], /*index=1*/bf16[4,2]{1,0}) parameter(0)
  %x = bf16[4,16] fusion(%c), kind=kCustom, calls=%start
  %y = bf16[4,16] fusion(%c), kind=kCustom, calls=%finish
  %z = f32[1] fusion(%c), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %t = (s32[], bf16[4,2]) tuple(%c, %x)
}
ENTRY %main (a: bf16[4,2]) -> bf16[4,2] {
  %a = bf16[4,2]{1,0} parameter(0)
  %w = (s32[], bf16[4,2]) while(%a), condition=%condition, body=%body
  %q = (f32[3], f32[5]) all-reduce(%a, %a), replica_groups={{0,4},{1,5}}, to_apply=%add
  ROOT %p = bf16[4,2] collective-permute(%a), channel_id=9, source_target_pairs={{0,1},{1,0}}
}
"""
"""In the form that libtpu 0.0.42 prints: an asynchronous gather in two fusions, and a fused reduce-scatter."""


def test_a_tpu_program_s_fusions_are_read():
    found = {c.kind: c for c in hlo.collectives(TPU, 16)}
    assert found["all-gather"] == hlo.Collective("all-gather", 4 * 16 * 2, 7, tuple(range(8)))
    assert found["reduce-scatter"] == hlo.Collective("reduce-scatter", 64, 7, tuple(range(16)))
    assert found["all-reduce"] == hlo.Collective("all-reduce", 32, 1, (0, 4))
    assert found["collective-permute"] == hlo.Collective("collective-permute", 16, 1, (0, 1))


def test_a_loop_without_a_constant_in_its_condition_is_an_error_and_no_guess():
    with pytest.raises(ValueError, match="trip count"):
        hlo.collectives(TPU.replace("%n = s32[] constant(7)", "%n = s32[] get-tuple-element(%c), index=0"), 16)


@pytest.mark.parametrize("kind, share", [("all-gather", 7 / 8), ("reduce-scatter", 7 / 8), ("all-reduce", 14 / 8)])
def test_time_is_the_bytes_that_leave_a_chip_over_the_rate(kind, share):
    found = hlo.Collective(kind, 800, 3, tuple(range(8)))
    assert np.isclose(hlo.seconds([found], lambda group: 10.0 * len(group)), 3 * 800 * share / 80)
