"""What the evaluation chooses, and the figures that it adds up."""

import math

import pytest

from cm3jax import checkpoint
from cm3jax.data import tokens
from cm3jax.evaluate import protocol


@pytest.fixture
def trained(monkeypatch):
    """Pretend that the decoder has checkpoints at 10, 20 and 30 with these weights, and data of these splits."""
    weights, splits = {10: 3.0, 20: 1.5, 30: 2.0}, ["test", "validation"]
    monkeypatch.setattr(checkpoint, "steps", lambda folder: sorted(weights))
    monkeypatch.setattr(tokens, "splits", lambda folder: splits)
    return weights, splits, weights.get


def measure(params, split, masked):
    assert split == "validation"
    return {"loss": (params * 8, 8.0)}


def test_the_validation_loss_of_every_checkpoint_is_measured(trained, tmp_path):
    losses = protocol.validation_losses(tmp_path, measure, trained[2])
    assert losses == {10: 3.0, 20: 1.5, 30: 2.0}


def test_a_checkpoint_without_a_finite_loss_is_never_chosen(trained, tmp_path):
    trained[0][20] = math.nan
    assert protocol.validation_losses(tmp_path, measure, trained[2]) == {10: 3.0, 30: 2.0}


def test_without_a_choice_nothing_is_measured(trained, tmp_path):
    weights, splits, _ = trained
    splits.remove("validation")
    assert protocol.validation_losses(tmp_path, None, None) == {}
    splits.append("validation")
    for step in (10, 20):
        del weights[step]
    assert protocol.validation_losses(tmp_path, None, None) == {}


def test_perplexity_is_that_of_causal_rows_for_text_and_codes_and_of_masked_ones_for_spans():
    def measure(params, split, masked):
        return {f"loss_{name}": (4 * nll + 4 * masked, 4.0) for name, nll in (("text", 1), ("image", 2), ("infill", 3))}

    found = protocol.perplexity(measure, None, "test")
    assert found == pytest.approx({"text": math.exp(1), "image": math.exp(2), "infill": math.exp(4)})


def test_a_modality_without_tokens_has_no_perplexity():
    found = protocol.perplexity(lambda *_: {"loss_text": (2.0, 1.0), "loss_image": (0.0, 0.0)}, None, "test")
    assert found == {"text": pytest.approx(math.exp(2)), "image": None, "infill": None}
