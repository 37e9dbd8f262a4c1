"""Temperature, top-k and top-p: which ids may be drawn, and how likely (arXiv 2309.02591 §3.1); and repetition.

They compose in this order, each on what the one before left: grammar, repetition, temperature, top-k, top-p. An id that
is out has logit -inf. All settings are arrays with one value a row, so that rows of one batch may differ and a new
value does not recompile.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

FINITE = 1e30
"""Stands for infinity where a sum must stay a number."""


def penalise(logits: Float[Array, "b v"], seen: Bool[Array, "b v"], penalty: Float[Array, " b"]) -> Float[Array, "b v"]:
    """Make ids that a row has already less likely: divide their logits by the penalty, multiply those below 0.

    The penalised sampling of arXiv 1909.05858 §4.1, with the two cases of transformers, which Chameleon's released code
    calls; a penalty of 1 changes nothing.
    """
    penalty = penalty[:, None]
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def temper(logits: Float[Array, "b v"], temperature: Float[Array, " b"]) -> Float[Array, "b v"]:
    """Divide by the temperature; at 0 only the largest logit stays (the first of equals), which is greedy decoding."""
    t = temperature[:, None]
    best = jnp.argmax(logits, axis=-1, keepdims=True) == jnp.arange(logits.shape[-1])
    return jnp.where(t > 0, logits / jnp.where(t > 0, t, 1.0), jnp.where(best, 0.0, -jnp.inf))


def top_k_top_p(logits: Float[Array, "b v"], k: Int[Array, " b"], p: Float[Array, " b"]) -> Float[Array, "b v"]:
    """Keep the k most likely ids, and of these the fewest that hold probability p, most likely first.

    Ids as likely as the last one kept are kept too, so that the result does not depend on the order of the ids.

    Args:
      logits: Unnormalised log-probabilities; -inf for ids that are out already.
      k: 0 keeps all.
      p: In (0, 1]; 1 keeps all. Measured after top-k, on probabilities that sum to 1 again.
    """
    ranked = -jnp.sort(-logits, axis=-1)
    rank = jnp.arange(logits.shape[-1])
    ranked = jnp.where((rank < k[:, None]) | (ranked == _at(ranked, k - 1)) | (k[:, None] == 0), ranked, -jnp.inf)
    probability = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    kept = (before < p[:, None]) | (p[:, None] >= 1)  # rounding may lift `before` to 1 in the tail
    kept = (kept & (ranked > -jnp.inf)).at[:, 0].set(True)
    return jnp.where(logits >= _at(ranked, jnp.sum(kept, axis=-1) - 1), logits, -jnp.inf)


def draw(logits: Float[Array, "b v"], allowed: Bool[Array, "b v"], keys: Key[Array, " b"]) -> Int[Array, " b"]:
    """Draw one id a row, each with its own key; never one that is not allowed, whatever the logits hold."""
    return jax.vmap(jax.random.categorical)(keys, _finite(logits, allowed))


def best(logits: Float[Array, "b v"], allowed: Bool[Array, "b v"]) -> Int[Array, " b"]:
    """Return the likeliest id of each row, the first of equals; as `draw` at temperature 0, without random numbers."""
    return jnp.argmax(_finite(logits, allowed), axis=-1)


def _finite(logits: Float[Array, "b v"], allowed: Bool[Array, "b v"]) -> Float[Array, "b v"]:
    finite = jnp.nan_to_num(logits, nan=-FINITE, posinf=FINITE, neginf=-FINITE)
    return jnp.where(allowed, finite, -jnp.inf)


def _at(x: Float[Array, "b v"], i: Int[Array, " b"]) -> Float[Array, "b 1"]:
    """Return x[row, i[row]] as a column; i is clipped to the last one."""
    return jnp.take_along_axis(x, jnp.clip(i, 0, x.shape[-1] - 1)[:, None], axis=-1)
