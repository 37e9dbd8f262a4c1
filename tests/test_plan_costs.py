"""FLOPs in closed form, and the two estimates."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from cm3jax import config as configs
from cm3jax import sharding
from cm3jax.config import Decoder, DecoderStage, Packing, Training
from cm3jax.nn import decoder, flops
from cm3jax.plan import costs, estimate, hlo, slices
from cm3jax.train import lm
from cm3jax.vocab import Vocab

B, T = 2, 128
VOCAB = Vocab(text=1200, image=64, sentinels=8)
WIDE = Decoder(layers=1, width=256, heads=4, dtype="float32", remat="none")
LLAMA = dataclasses.replace(
    WIDE, activation="swiglu", norm="rmsnorm", position="rope", kv_heads=2, mlp_width=640, head_size=96, tied=False
)


def stage(model, **changes):
    packing, training = Packing(kind="chop", length=T), Training(batch=B)
    return DecoderStage(model=model, packing=packing, training=training, loss_chunk=T, **changes)


def shape(found, **changes):
    values = {"stage": found, "vocab": VOCAB.size, "params": 1, "data": 1, "tensor": 1, "shards": 1}
    return costs.Shape(**{**values, **changes})


@pytest.mark.parametrize("model", [WIDE, LLAMA], ids=["cm3leon", "llama"])
def test_flops_are_xla_s_own_count_where_it_has_no_loop_to_miss(model):
    """Of one layer, so that the scan runs once; xla also counts norms and softmax, and the masked half of attention."""
    found = stage(dataclasses.replace(model, attention="xla"))
    net = lm.model(found, VOCAB)
    params = jax.eval_shape(lambda: sharding.unbox(decoder.init(net, jax.random.key(0))))
    ids, weights = (jax.ShapeDtypeStruct((B, T), dtype) for dtype in (jnp.int32, jnp.float32))
    batch = dict.fromkeys(("inputs", "targets", "positions", "segments", "modality"), ids) | {"weights": weights}
    loss = lambda params, batch: lm.losses(net, found, params, batch)[0][0]  # noqa: E731
    counted = jax.jit(jax.grad(loss)).lower(params, batch).cost_analysis()["flops"]
    ours = costs.flops(shape(found))
    assert ours.recompute == 0
    assert ours.model + 2 * ours.attention == pytest.approx(counted, rel=0.06)


def test_recomputation_is_a_third_of_the_layers_and_goes_by_policy():
    none, dots, full = (costs.flops(shape(stage(dataclasses.replace(WIDE, remat=r)))) for r in ("none", "dots", "full"))
    assert none.useful == dots.useful == full.useful
    layers = 2 * flops.matrices(WIDE) * B * T
    assert none.recompute == 0
    assert dots.recompute == full.recompute - layers == none.attention / 3


def test_logits_in_chunks_are_computed_again():
    whole, chunks = stage(WIDE), dataclasses.replace(stage(WIDE), loss_chunk=T // 4)
    again = costs.flops(shape(chunks)).recompute - costs.flops(shape(whole)).recompute
    assert again == 2 * VOCAB.size * WIDE.width * B * T


def test_a_paper_config_costs_six_flops_a_parameter_and_token():
    recipe = configs.load("configs/cm3leon/7b.py")
    found = costs.flops(shape(recipe.decoder, vocab=recipe.vocab.size))
    tokens = recipe.decoder.training.batch * recipe.decoder.packing.length
    count = decoder.parameter_count(recipe.decoder.model, recipe.vocab.size, 4096)
    assert found.model == 6 * tokens * (count - 4096 * 4096)  # a position costs no product


def test_work_on_many_chips_adds_up_to_that_on_one():
    one, many = costs.work(shape(stage(WIDE))), costs.work(shape(stage(WIDE), data=2, shards=2))
    assert many.matrices * 2 == one.matrices and many.attention * 2 == one.attention
    assert one.hbm / 2 < many.hbm < one.hbm  # the weights are read by both


def test_values_in_the_host_s_memory_go_there_and_back():
    offload = dataclasses.replace(WIDE, remat="offload")
    assert costs.work(shape(stage(offload))).host == 2 * 2 * WIDE.width * B * T
    assert costs.work(shape(stage(WIDE))).host == 0
    assert costs.work(shape(stage(WIDE), host_values=7)).host == 2 * 2 * 7 * B * T


def test_everything_overlapped_is_the_largest_term_and_nothing_overlapped_the_sum():
    terms = estimate.Terms(matrices=2.0, attention=1.0, hbm=2.5, ici=0.5, dcn=0.25, host=0.125)
    assert (terms.low, terms.high) == (3.0, 6.375)
    assert dataclasses.replace(terms, ici=9.0).low == 9.0


class Device:
    def __init__(self, coords, slice_index=0):
        self.coords, self.slice_index = coords, slice_index


def test_the_rate_of_a_group_is_that_of_the_axes_it_fills():
    pod, cube = slices.parse("v5e-256"), slices.parse("v4-128")
    order = [Device((x, y, 0)) for x in range(16) for y in range(16)]
    link = pod.chip.link
    assert estimate.ici(pod, order, tuple(range(256))) == 4 * link  # two rings, both ways
    assert estimate.ici(pod, order, tuple(range(16))) == 2 * link
    assert estimate.ici(pod, order, tuple(range(4))) == link  # a part of an axis is no ring
    order = [Device((x, y, z)) for x in range(4) for y in range(4) for z in range(4)]
    assert estimate.ici(cube, order, tuple(range(64))) == 6 * cube.chip.link


def test_what_crosses_slices_goes_at_the_network_s_rate():
    target = slices.parse("v5e-4", 2)
    order = [Device((x, y, 0), i) for i in range(2) for x in range(2) for y in range(2)]
    found = [hlo.Collective("all-reduce", 1000, 1, (0, 4)), hlo.Collective("all-gather", 1000, 1, (0, 1, 2, 3))]
    times = estimate.exchanges(target, order, found)
    assert times["dcn"] == pytest.approx(1000 / target.chip.dcn)
    assert times["ici"] == pytest.approx(750 / (2 * target.chip.link))
