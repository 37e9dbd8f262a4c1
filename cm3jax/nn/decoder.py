"""The language model: CM3Leon's decoder (arXiv 2309.02591 §2.3), Chameleon's parts as switches (arXiv 2405.09818)."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from cm3jax import config as configs
from cm3jax import sharding
from cm3jax.nn import attention_paths, attention_splash, layers

LAYER_INPUT = "layer_input"
"""Name of what each layer gets, for remat policies."""

Cache = dict[str, Any]
"""{"layers": {"k", "v": [b, g, s, k]} of each layer, "segments": [b, s] of every slot (0 = nothing there)}.

One array a layer, heads before slots: a new token then writes in place, and attention reads where it lies. Stacked over
layers and slots first, a step of the decode loop copied the cache four times over (14 x slower attention on a CPU).
"""


class Attention(nn.Module):
    """Multi-head causal self-attention over the row, or over the row and what the cache holds of it."""

    config: configs.Decoder

    @nn.compact
    def __call__(self, x, positions, seen, cache, index):
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        b, t, d = x.shape
        groups = c.kv_heads or c.heads

        def heads(name, count, axis):
            y = layers.Matrix(count * c.head_width, ("embed", axis), c.init_std, dtype, name=name)(x)
            return sharding.constrain(y.reshape(b, t, count, c.head_width), "batch", "seq", "act_heads", "head")

        q, k, v = heads("q", c.heads, "heads"), heads("k", groups, "kv_heads"), heads("v", groups, "kv_heads")
        if c.qk_norm:
            q, k = layers.HeadNorm(c.norm_eps, name="q_norm")(q), layers.HeadNorm(c.norm_eps, name="k_norm")(k)
        if c.position != "learned":
            q, k = layers.rotate(q, positions, c.rope_theta), layers.rotate(k, positions, c.rope_theta)
        cached = cache is not None
        if cached:
            cache = {name: _put(cache[name], x, index) for name, x in (("k", k), ("v", v))}
            k, v = (cache[name].astype(dtype).swapaxes(1, 2) for name in ("k", "v"))
        y = attention_paths.attend(c.attention, q, k, v, seen, cached).reshape(b, t, c.heads * c.head_width)
        return layers.Matrix(d, ("heads", "embed"), 0.0, dtype, name="out")(y), cache


class MLP(nn.Module):
    """relu(x W) W', or silu(x W) * (x V) W' (arXiv 2002.05202)."""

    config: configs.Decoder

    @nn.compact
    def __call__(self, x):
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        width = c.mlp_width or 4 * c.width
        up = layers.Matrix(width, ("embed", "mlp"), c.init_std, dtype, name="up")
        y = jax.nn.relu(up(x))
        if c.activation == "swiglu":
            y = jax.nn.silu(layers.Matrix(width, ("embed", "mlp"), c.init_std, dtype, name="gate")(x)) * up(x)
        y = sharding.constrain(y, "batch", "seq", "act_mlp")
        return layers.Matrix(c.width, ("mlp", "embed"), 0.0, dtype, name="down")(y)


class Block(nn.Module):
    """x = x + attention(norm(x)); x = x + mlp(norm(x)); or the norm on what is added ("post")."""

    config: configs.Decoder

    @nn.compact
    def __call__(self, x, cache, positions, seen, index):
        c = self.config
        x = checkpoint_name(x, LAYER_INPUT)
        first = layers.Norm(c.norm, c.norm_eps, name="attention_norm")
        second = layers.Norm(c.norm, c.norm_eps, name="mlp_norm")
        attend, mlp = Attention(c, name="attention"), MLP(c, name="mlp")
        if c.norm_order == "pre":
            y, cache = attend(first(x), positions, seen, cache, index)
            x = x + y
            x = x + mlp(second(x))
        else:
            y, cache = attend(x, positions, seen, cache, index)
            x = x + first(y)
            x = x + second(mlp(x))
        return sharding.constrain(x, "batch", "seq", "width"), cache


class Decoder(nn.Module):
    """Ids in, hidden states out; `logits` turns these into scores over the vocabulary."""

    config: configs.Decoder
    vocab: int
    """Rows of the embedding table (Vocab.size)."""
    length: int
    """Positions of the learned table: the longest row."""

    @nn.compact
    def __call__(
        self,
        ids: Int[Array, "b t"],
        positions: Int[Array, "b t"],
        segments: Int[Array, "b t"],
        cache: Cache | None = None,
        index: Any = 0,
    ) -> tuple[Float[Array, "b t d"], Cache | None]:
        """Return the final hidden states and the cache with these t tokens in slots index .. index + t.

        Args:
          positions: Of each token within its row or document, from 0.
          segments: Tokens see only tokens of their own segment; 0 is padding and sees nothing.
          cache: From `init_cache`, or None to look at these tokens alone (training).
          index: First slot to write, the same for all rows; may be traced. Prompts of unequal length are padded on the
            left with segment 0, so that all rows go on in the same slot.
        """
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        table = self.param("table", _named(c.init_std, "vocab", "table_width"), (self.vocab, c.width), jnp.float32)
        x = _rows(gathered(table, dtype), ids)
        if c.position != "rope":
            place = self.param(
                "positions", _named(c.position_std, "position", "embed"), (self.length, c.width), jnp.float32
            )
            x = x + _rows(sharding.constrain(place.astype(dtype), "position", None), positions)
        if not c.tied:
            self.param("head", _named(0.0, "vocab", "table_width"), (self.vocab, c.width), jnp.float32)
        x = sharding.constrain(x.astype(dtype), "batch", "seq", "width")

        keys = segments
        if cache is not None:
            keys = jax.lax.dynamic_update_slice(cache["segments"], segments.astype(jnp.int32), (0, index))
            keys = sharding.constrain(keys, "batch", "seq")
        seen = attention_paths.view(c.attention, segments, keys, index, cache is not None)

        if cache is None and not self._apart():
            x, kv = self._scan(x, positions, seen), None
        else:
            x, kv = self._steps(x, cache and cache["layers"], positions, seen, index)
        x = layers.Norm(c.norm, c.norm_eps, name="norm")(x)
        return x, None if cache is None else {"layers": kv, "segments": keys}

    def _scan(self, x, positions, seen):
        """Return x after all layers: compiled once, recomputed by policy in the backward pass."""
        c, block = self.config, Block
        if c.remat != "none":
            block = nn.remat(Block, prevent_cse=False, policy=kept(c.remat))
        stack = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast,) * 4,
            length=c.layers,
            metadata_params={nn.PARTITION_NAME: "layer"},
        )
        return stack(c, name="layers")(x, None, positions, seen, 0)[0]

    def _apart(self) -> bool:
        """Return whether the weights are as `apart` gives them."""
        return "0" in self.variables.get("params", {}).get("layers", {})

    def _steps(self, x, caches, positions, seen, index):
        """Return x and the caches after all layers, one after another: a scan would copy every cache out and in."""
        params = self.variables["params"] if self._apart() else apart(self.variables["params"])
        after = []
        for layer in range(self.config.layers):
            cache, weights = caches and caches[layer], {"params": params["layers"][str(layer)]}
            x, cache = Block(self.config, parent=None).apply(weights, x, cache, positions, seen, index)
            after.append(cache)
        return x, tuple(after)


def apart(params, layer=lambda w, i: w[i], delete: bool = False):
    """Return parameters with {"0": ..., "1": ...} in place of the stack of all layers' weights.

    For decoding: on a CPU a step of the loop would copy each layer's weights out of the stack, which costs as much as
    using them.

    Args:
      layer: What stands for layer i of a stack; arrays that are not there need another.
      delete: Each stack, once it is taken apart, so that there are never two copies of all; the caller has no more use
        for it.
    """
    stacks, tree = jax.tree.flatten(params["layers"])
    count, found = stacks[0].shape[0], []
    for stack in stacks:
        found.append([layer(stack, i) for i in range(count)])
        if delete:
            stack.delete()
    layers = {str(i): jax.tree.unflatten(tree, [pieces[i] for pieces in found]) for i in range(count)}
    return {**params, "layers": layers}


def kept(remat: str):
    """Return jax's policy of what a layer keeps for its backward pass; None: its input alone.

    dots keeps the products with weights, and of the splash kernel what its own backward pass asks for. offload keeps
    what full keeps, the input of every layer, in the host's memory.
    """
    policies = jax.checkpoint_policies
    if remat == "dots":
        kernel = policies.save_only_these_names(attention_splash.SAVED)
        return policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, kernel)
    if remat == "offload":
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[LAYER_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        )
    return None


def _put(old: Float[Array, "b g s k"], new: Float[Array, "b t g k"], index) -> Float[Array, "b g s k"]:
    """Return a cache with t new tokens in slots index .. index + t."""
    new = jax.lax.dynamic_update_slice(old, new.swapaxes(1, 2).astype(old.dtype), (0, 0, index, 0))
    return sharding.constrain(new, "batch", "act_heads", "seq", "head")


def _named(std: float, *axes: str):
    return nn.with_logical_partitioning(layers.truncated(std) if std else nn.initializers.zeros, axes)


def _rows(table: Float[Array, "v d"], at: Int[Array, "b t"]) -> Float[Array, "b t d"]:
    """Return rows of a table that every chip has gathered, in the compute dtype, as float32.

    The chips look up different rows, and the gradient is summed in float32 on each before they exchange it.
    """
    return table.astype(jnp.float32)[at]


def gathered(table: Float[Array, "v d"], dtype) -> Float[Array, "v d"]:
    """Return a table over the vocabulary in `dtype`, split over `tensor` only."""
    return sharding.constrain(table.astype(dtype), "vocab_out", None)


def logits(params, config: configs.Decoder, hidden: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
    """Return float32 scores of the next token over the whole table."""
    return scores(output(params, config), hidden)


def output(params, config: configs.Decoder) -> Float[Array, "v d"]:
    """Return the table that `scores` takes, in the compute dtype."""
    return gathered(params["table"] if config.tied else params["head"], jnp.dtype(config.dtype))


def scores(table: Float[Array, "v d"], hidden: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
    """Return float32 scores of hidden states against every row of a table."""
    return jnp.einsum("...d,vd->...v", hidden, table.astype(hidden.dtype), preferred_element_type=jnp.float32)


def init(model: Decoder, key):
    """Return the parameters (boxed with their logical axes); does not depend on batch or length."""
    one = jnp.ones((1, 1), jnp.int32)
    plain = dataclasses.replace(model.config, attention="xla")  # has no parameters; a kernel would refuse one token
    return model.clone(config=plain).init(key, one, one, one)["params"]


def init_cache(config: configs.Decoder, batch: int, length: int, dtype=None) -> Cache:
    """Return an empty cache of `length` slots for `batch` rows."""
    shape = (batch, config.kv_heads or config.heads, length, config.head_width)
    dtype = jnp.dtype(dtype or config.dtype)
    empty = lambda: {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}  # noqa: E731
    return {
        "layers": tuple(empty() for _ in range(config.layers)),
        "segments": jnp.zeros((batch, length), jnp.int32),
    }


def parameter_count(config: configs.Decoder, vocab: int, length: int) -> int:
    """Return the number of parameters in closed form."""
    d, mlp, groups = config.width, config.mlp_width or 4 * config.width, config.kv_heads or config.heads
    attention_ = 2 * d * (config.heads + groups) * config.head_width
    if config.qk_norm:
        attention_ += 2 * (config.heads + groups) * config.head_width
    norms = d if config.norm == "rmsnorm" else 0
    block = attention_ + (3 if config.activation == "swiglu" else 2) * d * mlp + 2 * norms
    tables = vocab * d * (1 if config.tied else 2) + (0 if config.position == "rope" else length * d)
    return tables + config.layers * block + norms
