"""Meta's own block, rebuilt in torch from its description, on Meta's tensors: the imported decoder's logits are its.

The other references are transformers', whose rotations pair (i, i + k/2) as ours do. Here neighbours turn together, by
complex numbers, as the files of Meta's have them, and every process has its own heads, columns and norms of q and k.
"""

import chameleons
import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cm3jax import checkpoint, config, foreign
from cm3jax.interop import chameleon_vocab
from cm3jax.nn import decoder

SHAPES = {
    "heads of their own": ({}, 1),
    "grouped queries": ({"num_attention_heads": 8, "num_key_value_heads": 4}, 1),
    "post-norm of the 30B": ({"swin_norm": True, "num_attention_heads": 8, "num_key_value_heads": 4}, 1),
    "two processes": ({}, 2),
    "post-norm, four processes": ({"swin_norm": True, "num_attention_heads": 8, "num_key_value_heads": 4}, 4),
}


def turned(x, theta):
    """Return heads [t, h, k] whose neighbours (2i, 2i + 1) are turned by position * theta ** (-2i / k)."""
    t, _, k = x.shape
    angles = torch.outer(torch.arange(t).double(), theta ** (-torch.arange(0, k, 2).double() / k))
    circle = torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * circle).flatten(-2)


def attention(part, layer, x, heads, groups, theta):
    """Return what one process's heads [t, d] add to the residual stream."""
    name = f"layers.{layer}.attention."
    counts = {"q": heads, "k": groups, "v": groups}
    q, k, v = ((x @ part[f"{name}w{c}.weight"].T).unflatten(-1, (n, -1)) for c, n in counts.items())
    q, k = (
        F.layer_norm(y, y.shape[-1:], part[f"{name}{c}_normalization.weight"], part[f"{name}{c}_normalization.bias"])
        for c, y in (("q", q), ("k", k))
    )
    q, k = turned(q, theta), turned(k, theta)
    k, v = (y.repeat_interleave(heads // groups, 1) for y in (k, v))
    scores = torch.einsum("thk,shk->hts", q, k) / q.shape[-1] ** 0.5
    seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril()
    found = torch.einsum("hts,shk->thk", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)
    return found.flatten(1) @ part[f"{name}wo.weight"].T


def mlp(part, layer, x):
    w1, w2, w3 = (part[f"layers.{layer}.feed_forward.w{i}.weight"] for i in (1, 2, 3))
    return (F.silu(x @ w1.T) * (x @ w3.T)) @ w2.T


def meta_logits(parts, about, ids):
    """Return the logits [t, rows] of one row of ids, summed or joined over the processes."""
    parts = [{name: x.double() for name, x in part.items()} for part in parts]
    heads, groups = (about[f"num_{kind}_heads"] // len(parts) for kind in ("attention", "key_value"))
    norm = lambda x, name: F.rms_norm(x, x.shape[-1:], parts[0][name], 1e-5)  # noqa: E731
    x = torch.cat([part["tok_embeddings.weight"][ids] for part in parts], -1)
    for i in range(about["num_hidden_layers"]):
        for name, block in (
            ("attention_norm", lambda part, x: attention(part, i, x, heads, groups, 10_000.0)),  # noqa: B023
            ("ffn_norm", lambda part, x: mlp(part, i, x)),  # noqa: B023
        ):
            weight, whole = f"layers.{i}.{name}.weight", lambda x: sum(block(part, x) for part in parts)  # noqa: B023
            x = x + (norm(whole(x), weight) if about.get("swin_norm") else whole(norm(x, weight)))
    return torch.cat([norm(x, "norm.weight") @ part["output.weight"].T for part in parts], -1).numpy()


FAST = "grouped queries"
CASES = [pytest.param(*x, id=name, marks=[pytest.mark.slow] * (name != FAST)) for name, x in SHAPES.items()]


@pytest.mark.parametrize(("changes", "shards"), CASES)
def test_logits_are_those_of_metas_block_with_neighbours_turned(tmp_path, changes, shards):
    about = checkpoints.settings(**changes)
    tensors = checkpoints.per_process(chameleons.random_tensors(about), about, shards)
    folder = checkpoints.meta_folder(tmp_path / "meta", tensors, about, shards)
    run = foreign.bring(str(folder), str(tmp_path / "run"), resolution=8, say=lambda line: None)
    ids = np.random.default_rng(1).integers(0, about["vocab_size"], 60)
    theirs = meta_logits(checkpoints.metas(tensors, about, shards), about, torch.tensor(ids))
    recipe, order = config.load(run / "recipe.json"), chameleon_vocab.load(run / "text" / "order.json")
    params = jax.tree.map(jnp.asarray, checkpoint.load_params(run / "decoder"))
    net, place = decoder.Decoder(recipe.decoder.model, recipe.vocab.size, len(ids)), jnp.arange(len(ids))[None]
    row = jnp.asarray(order.ours[ids], jnp.int32)[None]
    hidden, _ = net.apply({"params": params}, row, place, jnp.ones_like(place))
    ours = order.back(np.asarray(decoder.logits(params, recipe.decoder.model, hidden)))[0]
    assert theirs.std() > 0.1, "too flat to tell a mistake"
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
