"""Imported Chameleons against transformers' own: the same logits and the same ids, in and out again.

All that is compared went through the verbs: saved by transformers, in one file and in shards, imported into a run
folder, and exported from there.
"""

import atexit
import functools
import json
import pathlib
import shutil
import tempfile

import chameleons
import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from cm3jax import checkpoint, foreign
from cm3jax import config as configs
from cm3jax.interop import chameleon, chameleon_vocab, vqgan
from cm3jax.nn import decoder

pytestmark = pytest.mark.slow  # transformers takes its time to import

ALL = pytest.mark.parametrize("name", chameleons.CONFIGS)
SHARDED = {"grouped queries", "swin", "tied"}
"""Saved in several files; the others in one."""
LENGTH, STEPS = 69, 64
FEW = -1e30


@functools.cache
def theirs(name):
    """Return a Chameleon of transformers' with random weights, and its settings."""
    import transformers

    changes = {key: value for key, value in chameleons.CONFIGS[name].items() if key != "vocab_size"}
    settings = checkpoints.settings(**changes)
    given = {key: value for key, value in settings.items() if key != "model_type"}
    model = transformers.ChameleonForConditionalGeneration(transformers.ChameleonConfig(**given)).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=draw) + ("norm.weight" in key))
    return model, settings


@functools.cache
def run(name):
    """Return the run folder that the same Chameleon is imported to."""
    folder = pathlib.Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    theirs(name)[0].save_pretrained(folder / "hf", max_shard_size="60KB" if name in SHARDED else "5GB")
    assert (folder / "hf" / "model.safetensors").is_file() != (name in SHARDED)
    (folder / "hf" / "tokenizer.json").write_text(json.dumps(chameleons.words()))
    return foreign.bring(str(folder / "hf"), str(folder / "run"), say=lambda line: None)


@functools.cache
def ours(name):
    """Return the network, the order and the parameters of that run."""
    recipe, order = configs.load(run(name) / "recipe.json"), chameleon_vocab.load(run(name) / "text" / "order.json")
    network, wanted = chameleons.opened(theirs(name)[1])
    assert (recipe.decoder.model, order.theirs.tolist()) == (network.model, wanted.theirs.tolist())
    return network, order, jax.tree.map(jnp.asarray, checkpoint.load_params(run(name) / "decoder"))


def their_logits(model, ids):
    """Return the logits over all ids; the model's own forward hides those of the codes, which it never draws."""
    with torch.no_grad():
        return model.lm_head(model.model(torch.tensor(ids)).last_hidden_state).numpy()


def our_logits(name, ids):
    """Return the logits on Chameleon's ids, in Chameleon's order."""
    network, order, params = ours(name)
    return order.back(np.asarray(forward(network.model, network.rows, params, jnp.asarray(order.ours[ids], jnp.int32))))


@functools.partial(jax.jit, static_argnames=("model", "rows"))
def forward(model: configs.Decoder, rows: int, params, ids):
    """Return the logits of whole rows, without a cache."""
    place = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    net = decoder.Decoder(model, rows, ids.shape[1])
    return decoder.logits(params, model, net.apply({"params": params}, ids, place, jnp.ones_like(place))[0])


def some_ids(name, rows=2, length=LENGTH):
    return np.random.default_rng(1).integers(0, ours(name)[0].rows, (rows, length))


@ALL
def test_logits_are_transformers(name):
    ids = some_ids(name)
    found, wanted = our_logits(name, ids), their_logits(theirs(name)[0], ids)
    assert wanted.std() > 0.1, "too flat to tell a mistake"
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    with torch.no_grad():
        shown = theirs(name)[0](torch.tensor(ids)).logits.numpy()
    text = np.sort([i for n, i in theirs(name)[1]["vocabulary_map"].items() if not n.startswith("IMGIMG")])
    np.testing.assert_allclose(found[..., text], shown[..., text], atol=1e-4)


@functools.partial(jax.jit, static_argnames=("model", "rows", "steps"))
def greedy(model: configs.Decoder, rows: int, steps: int, params, prompts, allowed):
    """Return the likeliest ids [b, steps] after prompts, with a cache, and the logits behind them."""
    net, (b, t) = decoder.Decoder(model, rows, t_all := prompts.shape[1] + steps), prompts.shape

    def one(ids, first, cache):
        place = jnp.broadcast_to(first + jnp.arange(ids.shape[1]), ids.shape)
        hidden, cache = net.apply({"params": params}, ids, place, jnp.ones_like(ids), cache=cache, index=first)
        return decoder.logits(params, model, hidden[:, -1]), cache

    def step(carry, i):
        scores, cache = carry
        ids = jnp.argmax(jnp.where(allowed, scores, FEW), -1)
        return one(ids[:, None], t + i, cache), (ids, scores)

    begin = one(prompts, 0, decoder.init_cache(model, b, t_all))
    ids, scores = jax.lax.scan(step, begin, jnp.arange(steps))[1]
    return ids.T, scores.swapaxes(0, 1)


def drawn(name, prompts, allowed):
    """Return the 64 likeliest ids after prompts and the logits behind them, all in Chameleon's order."""
    network, order, params = ours(name)
    ids, scores = greedy(
        network.model, network.rows, STEPS, params, jnp.asarray(order.ours[prompts], jnp.int32), allowed[order.theirs]
    )
    return order.theirs[np.asarray(ids)], order.back(np.asarray(scores))


def text_only(name):
    """Return which of Chameleon's ids its own generation may draw: all but the codes."""
    allowed = np.ones(ours(name)[0].rows, bool)
    allowed[[i for n, i in theirs(name)[1]["vocabulary_map"].items() if n.startswith("IMGIMG")]] = False
    return allowed


@ALL
def test_64_greedy_ids_are_those_that_transformers_generates(name):
    prompts = some_ids(name, length=5)
    model = theirs(name)[0]
    wanted = model.generate(
        torch.tensor(prompts), attention_mask=torch.ones(prompts.shape), max_new_tokens=STEPS, do_sample=False,
        eos_token_id=None, pad_token_id=1,
    )[:, prompts.shape[1] :]  # fmt: skip
    found, _ = drawn(name, prompts, text_only(name))
    assert len(np.unique(found)) > 3, "too dull to tell a mistake"
    assert found.tolist() == wanted.tolist()


@ALL
def test_64_greedy_codes_are_those_of_transformers_network_without_a_cache(name):
    """Its own generation draws no codes: the likeliest of them by its logits, the whole row anew at each step."""
    allowed, ids = ~text_only(name), some_ids(name, length=5)
    found, _ = drawn(name, ids, allowed)
    for _ in range(STEPS):
        scores = np.where(allowed, their_logits(theirs(name)[0], ids)[:, -1], FEW)
        ids = np.concatenate([ids, scores.argmax(-1)[:, None]], 1)
    assert found.tolist() == ids[:, 5:].tolist()


@ALL
def test_cached_logits_are_uncached_ones(name):
    prompts = some_ids(name, length=5)
    found, scores = drawn(name, prompts, text_only(name))
    whole = our_logits(name, np.concatenate([prompts, found], 1))
    np.testing.assert_allclose(scores, whole[:, 4:-1], atol=1e-4)


@ALL
def test_what_is_exported_loads_in_transformers_with_equal_logits(name):
    import transformers

    model, ids = theirs(name)[0], some_ids(name)
    with tempfile.TemporaryDirectory() as folder:
        out = foreign.send(run(name), f"{folder}/out", "hf", say=lambda line: None)
        fresh, told = transformers.ChameleonForConditionalGeneration.from_pretrained(
            out, output_loading_info=True, dtype=torch.float32
        )
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(torch.equal(x, fresh.state_dict()[key]) for key, x in model.state_dict().items())
    assert np.array_equal(their_logits(fresh.eval(), ids), their_logits(model, ids))


def test_the_7b_has_transformers_names_and_shapes():
    import transformers

    with torch.device("meta"):
        settings = transformers.ChameleonConfig(
            vocabulary_map=chameleons.vocabulary(65536), vq_config=vqgan.vq_config(checkpoints.PICTURES)
        )
        state = transformers.ChameleonForConditionalGeneration(settings).state_dict()
    network = chameleon.network(settings.to_diff_dict())
    leaves = chameleon.leaves(network.model, network.rows).values()
    wanted = {name: tuple(x.shape) for name, x in state.items() if not name.startswith(chameleon.IMAGE)}
    assert {name: leaf.theirs for leaf in leaves for name in leaf.names} == wanted
