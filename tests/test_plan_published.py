"""The published runs: their models are of the size that their names say, and their FLOPs as their logs say."""

import jax
import pytest

from cm3jax import sharding, trees
from cm3jax.nn import decoder, flops
from cm3jax.plan import published
from cm3jax.train import lm

RUNS = {run.name: run for run in published.RUNS}


def parameters(run) -> int:
    net = lm.model(run.recipe.decoder, run.recipe.vocab)
    return trees.size(jax.eval_shape(lambda: sharding.unbox(decoder.init(net, jax.random.key(0)))))


@pytest.mark.parametrize("name", RUNS)
def test_a_model_has_the_parameters_of_its_name(name):
    billions = float(name.partition("B")[0].split()[-1])
    assert parameters(RUNS[name]) / 1e9 == pytest.approx(billions, rel=0.03)


def test_the_count_of_flops_is_that_of_the_log_of_llama_on_v6e():
    """The recipe's page: 4.546 seconds a step at 417.397 TFLOP/s a chip."""
    run = RUNS["Llama 3.1 8B, MaxText"]
    stage, vocab = run.recipe.decoder, run.recipe.vocab
    tokens = stage.training.batch * stage.packing.length / 256
    attention = run.squares * stage.model.layers * flops.scores(stage.model, stage.packing.length)
    matrices = stage.model.layers * flops.matrices(stage.model) + vocab.size * stage.model.width
    assert tokens * (6 * matrices + 3 * attention) == pytest.approx(4.546 * 417.397e12, rel=1e-3)
