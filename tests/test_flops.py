"""The closed form against what XLA counts where it sees every layer."""

import jax
import jax.numpy as jnp
import pytest

from cm3jax import config as configs
from cm3jax.nn import decoder, flops

VOCAB, LENGTH = 640, 97


@pytest.mark.parametrize("parts", [{}, {"activation": "swiglu", "kv_heads": 2, "mlp_width": 300, "tied": False}])
def test_a_forward_pass_is_what_xla_counts_when_every_token_sees_the_whole_row(parts):
    config = configs.Decoder(
        layers=1, width=256, heads=4, dtype="float32", remat="none", **parts
    )  # one: XLA sees a scan once
    model, ids = decoder.Decoder(config, VOCAB, LENGTH), jax.ShapeDtypeStruct((2, LENGTH), jnp.int32)
    params = jax.eval_shape(lambda key: decoder.init(model, key), jax.random.key(0))

    def forward(params, ids):
        hidden, _ = model.apply({"params": params}, ids, ids, ids)
        return decoder.logits(params, config, hidden)

    unboxed = jax.tree.map(lambda x: x.value, params, is_leaf=lambda x: hasattr(x, "names"))
    counted = jax.jit(forward).lower(unboxed, ids).cost_analysis()["flops"]
    assert 2 * LENGTH * flops.forward(config, VOCAB, seen=LENGTH) == pytest.approx(counted, rel=0.03)


def test_a_step_is_three_forward_passes_over_a_causal_row():
    config = configs.Decoder(layers=3, width=64, heads=4)
    tokens = sum(flops.forward(config, VOCAB, seen=i + 1) for i in range(LENGTH))
    assert flops.step(config, VOCAB, 5, LENGTH) == pytest.approx(3 * 5 * tokens)


def test_the_7b_takes_six_flops_a_weight_and_the_attention():
    config, vocab = configs.Decoder(layers=32, width=4096, heads=32), 65_536
    per_token = flops.step(config, vocab, 1, 4096) / 4096
    weights = decoder.parameter_count(config, vocab, 4096) - 4096 * 4096
    assert per_token == pytest.approx(6 * weights + 6 * 32 * 4096 * 4097)
