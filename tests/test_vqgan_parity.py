"""Chameleon's imported image tokenizer against transformers' own: the same codes, in and out again."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import vqgans

from cm3jax.interop import vqgan
from cm3jax.nn import vqgan as nets

pytestmark = pytest.mark.slow  # transformers takes its time to import

SIDE, PICTURES = 32, 200
BASE = {"resolution": SIDE, "base_channels": 32, "num_res_blocks": 1, "embed_dim": 9, "latent_channels": 11}
BASE |= {"num_embeddings": 97}
CONFIGS = {
    "as released, small": {"channel_multiplier": [1, 1, 2], "num_res_blocks": 2},
    "attention at a resolution": {"channel_multiplier": [1, 2], "attn_resolutions": [16]},
    "no attention": {"channel_multiplier": [2, 1, 3], "attn_type": "none", "embed_dim": 11},
}
ALL = pytest.mark.parametrize("name", CONFIGS)


def tokenizer(settings):
    from transformers.models.chameleon import configuration_chameleon, modeling_chameleon

    return modeling_chameleon.ChameleonVQVAE(configuration_chameleon.ChameleonVQVAEConfig(**settings)).eval()


@functools.cache
def theirs(name):
    """Return a tokenizer of transformers' with random weights whose codes spread, and its settings."""
    settings = BASE | CONFIGS[name]
    net, draw = tokenizer(settings), torch.Generator().manual_seed(0)
    vqgans.shake(net, draw)
    vqgans.settle(net.quantize, their_latents(net, vqgans.pictures(8, SIDE, 1)), draw)
    return net, settings


@torch.no_grad()
def their_latents(net, x):
    return net.quant_conv(net.encoder(torch.from_numpy(x)))


@torch.no_grad()
def their_codes(net, x):
    return torch.cat([net.encode(part).image_tokens for part in torch.from_numpy(x).split(50)]).numpy().ravel()


@functools.cache
def imported(name):
    net, settings = theirs(name)
    state = vqgans.state(net, prefix="model.vqmodel.")
    network = vqgan.network(state, {"model_type": "chameleon", "vq_config": settings})
    return network, vqgan.read(state, network)


def our_codes(network, params, x):
    model = nets.VQGAN(network.model, network.codes)
    run = jax.jit(lambda p, x: model.apply({"params": p}, x, method="tokenize"))
    parts = np.split(x.transpose(0, 2, 3, 1), len(x) // 50)
    return np.concatenate([np.asarray(run(params, jnp.asarray(part))).ravel() for part in parts])


@ALL
def test_codes_of_200_pictures_are_transformers(name):
    """At least 99.9 % are equal, and where they differ, two codes are equally near within 1e-4 of the distance."""
    net, _ = theirs(name)
    network, params = imported(name)
    x = vqgans.pictures(PICTURES, SIDE)
    found, wanted = our_codes(network, params, x), their_codes(net, x)
    assert len(np.unique(wanted)) > 40, "too dull to tell a mistake"
    differ = np.flatnonzero(found != wanted)
    gaps = []
    if differ.size:
        flat = torch.cat([their_latents(net, part) for part in np.split(x, 4)]).permute(0, 2, 3, 1)
        flat = flat.reshape(len(found), -1)[differ].double().numpy()
        table = net.quantize.embedding.weight.detach().double().numpy()
        far, near = (((flat - table[codes[differ]]) ** 2).sum(-1) for codes in (found, wanted))
        gaps = np.abs(far - near) / near
    print(f"{name}: {len(found) - differ.size:,} of {len(found):,} codes equal, gaps of the others {gaps}")
    assert differ.size <= 0.001 * len(found) and all(gap < 1e-4 for gap in gaps)


@ALL
def test_what_is_exported_loads_in_transformers_with_equal_codes(name):
    net, settings = theirs(name)
    network, params = imported(name)
    again = vqgan.vq_config(network)
    assert {k: v for k, v in settings.items() if k != "attn_type"}.items() <= again.items()
    fresh = tokenizer(again)
    state = dict(vqgan.tensors(params, network._replace(prefix="")))
    fresh.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()})
    x = vqgans.pictures(50, SIDE, 3)
    np.testing.assert_array_equal(their_codes(fresh, x), their_codes(net, x))


def test_the_released_tokenizer_has_transformers_names_and_shapes():
    with torch.device("meta"):
        state = tokenizer({}).state_dict()
    state = {f"model.vqmodel.{name}": x for name, x in state.items()}
    network = vqgan.network(state, {"model_type": "chameleon"})
    wanted = {name: tuple(x.shape) for name, x in state.items()}
    assert {leaf.name: leaf.theirs for leaf in vqgan.leaves(network).values()} == wanted
    assert (network.codes, network.resolution, network.model.factor) == (8192, 512, 16)
