"""Vector quantization: nearest code, straight-through gradient, and what keeps a codebook alive.

VQ-VAE (arXiv 1711.00937), its codebook by moving averages (appendix A.1 there), l2-normalised codes
(arXiv 2110.04627 §3.2), k-means seeding and restarts of dead codes (arXiv 2005.00341 §3, the latter also in
arXiv 2110.04627's tables). Pure functions; `n` counts latents, `m` codes, `z` the dimension of both.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray


@flax.struct.dataclass
class CodebookState:
    """What the codebook's upkeep remembers from step to step, beside the codes themselves.

    Attributes:
      counts: Moving average of how many latents chose each code, float32 [m].
      sums: Moving average of the sum of those latents, float32 [m, z].
      unused: Steps since each code was last chosen, int32 [m].
    """

    counts: Any  # not annotated by shape: trees of boxes and of shardings have this structure too
    sums: Any
    unused: Any


def normalise(x: Float[Array, "... z"]) -> Float[Array, "... z"]:
    """Scale vectors to length 1; a zero vector stays 0 and its gradient finite."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)


def distances(latents: Float[Array, "n z"], codebook: Float[Array, "m z"]) -> Float[Array, "n m"]:
    """Return squared distances up to a term that depends on the latent only, by one matrix product."""
    product = jnp.einsum("nz,mz->nm", latents, codebook, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(codebook * codebook, axis=-1) - 2 * product


def nearest(latents: Float[Array, "... z"], codebook: Float[Array, "m z"]) -> Int[Array, "..."]:
    """Return the index of each latent's nearest code; the lowest index wins a tie."""
    flat = latents.reshape(-1, latents.shape[-1]).astype(jnp.float32)
    return jnp.argmin(distances(flat, codebook), axis=-1).astype(jnp.int32).reshape(latents.shape[:-1])


def lookup(codes: Int[Array, "..."], codebook: Float[Array, "m z"]) -> Float[Array, "... z"]:
    """Return the codes' vectors."""
    return jnp.take(codebook, codes, axis=0, mode="clip")


def straight_through(latents: Float[Array, "... z"], vectors: Float[Array, "... z"]) -> Float[Array, "... z"]:
    """Return `vectors`, with the gradient going to `latents` unchanged (arXiv 1711.00937 §3.2)."""
    return latents + jax.lax.stop_gradient(vectors - latents)


def commitment(latents: Float[Array, "... z"], vectors: Float[Array, "... z"]) -> Float[Array, ""]:
    """Return mean ||z_e - sg(e)||^2, which moves the ENCODER; `beta` of arXiv 1711.00937 eq. 3 weights this term.

    The public code of arXiv 2012.09841 weights the other one by mistake.
    """
    return jnp.mean(jnp.sum(jnp.square(latents - jax.lax.stop_gradient(vectors)), axis=-1))


def codebook_loss(latents: Float[Array, "... z"], vectors: Float[Array, "... z"]) -> Float[Array, ""]:
    """Return mean ||sg(z_e) - e||^2, which moves the CODEBOOK when it is trained by gradient."""
    return jnp.mean(jnp.sum(jnp.square(jax.lax.stop_gradient(latents) - vectors), axis=-1))


def histogram(codes: Int[Array, "..."], size: int) -> Float[Array, " m"]:
    """Return how often each of `size` codes occurs."""
    return jnp.zeros(size, jnp.float32).at[codes.reshape(-1)].add(1.0)


def usage(counts: Float[Array, " m"]) -> Float[Array, ""]:
    """Return the share of codes that occur at all."""
    return jnp.mean(counts > 0)


def perplexity(counts: Float[Array, " m"]) -> Float[Array, ""]:
    """Return exp of the entropy of the codes: how many codes there are in effect."""
    p = counts / jnp.maximum(counts.sum(), 1e-9)
    return jnp.exp(-jnp.sum(jax.scipy.special.xlogy(p, p)))


# ------------------------------------------------------------------------------------------------------------- upkeep


def init_state(codebook: Float[Array, "m z"]) -> CodebookState:
    """Return the state of a codebook that was just seeded: each code as if chosen once."""
    m = codebook.shape[0]
    return CodebookState(jnp.ones(m), codebook.astype(jnp.float32), jnp.zeros(m, jnp.int32))


def count(state: CodebookState, counts: Float[Array, " m"]) -> CodebookState:
    """Age the codes by one step; chosen ones are young again."""
    return state.replace(unused=jnp.where(counts > 0, 0, state.unused + 1))


def move(
    state: CodebookState,
    codebook: Float[Array, "m z"],
    latents: Float[Array, "n z"],
    codes: Int[Array, " n"],
    decay: float,
    l2: bool,
) -> tuple[CodebookState, Float[Array, "m z"]]:
    """Move each code to the moving average of the latents that chose it (arXiv 1711.00937 appendix A.1).

    A code whose average count has decayed to nothing keeps its place.
    """
    counts = decay * state.counts + (1 - decay) * histogram(codes, codebook.shape[0])
    batch_sums = jnp.zeros_like(state.sums).at[codes].add(latents.astype(jnp.float32))
    sums = decay * state.sums + (1 - decay) * batch_sums
    mean = sums / jnp.maximum(counts, 1e-6)[:, None]
    mean = normalise(mean) if l2 else mean
    moved = jnp.where((counts > 1e-3)[:, None], mean, codebook)
    return state.replace(counts=counts, sums=sums), moved


def draw(weights: Float[Array, " n"], at: Float[Array, " r"]) -> Int[Array, " r"]:
    """Return the indices at fractions `at` in [0, 1) of the cumulative weights.

    Uniform fractions draw by weight; evenly spaced ones repeat an index only if its share exceeds their spacing
    (systematic resampling).
    """
    total = jnp.cumsum(weights + 1e-12)
    return jnp.minimum(jnp.searchsorted(total, at * total[-1], side="right"), len(weights) - 1)


def revive(
    key: PRNGKeyArray,
    state: CodebookState,
    codebook: Float[Array, "m z"],
    latents: Float[Array, "n z"],
    codes: Int[Array, " n"],
    after: int,
) -> tuple[CodebookState, Float[Array, "m z"], Bool[Array, " m"]]:
    """Put codes that nothing chose for `after` steps onto latents that the codebook serves badly.

    Latents are drawn by their squared distance to their code, so that new codes go where the error is.

    Returns:
      The new state, the new codebook, and which codes were moved.
    """
    dead = state.unused >= after
    # Codes that die together are spread evenly over the error, so that they do not all land on the same latent.
    at = (jnp.maximum(jnp.cumsum(dead) - 1, 0) + jax.random.uniform(key)) / jnp.maximum(jnp.sum(dead), 1)
    error = jnp.sum(jnp.square(latents - lookup(codes, codebook)), axis=-1)
    fresh = latents[draw(error, at)].astype(codebook.dtype)
    revived = jnp.where(dead[:, None], fresh, codebook)
    # As if chosen by an average share of the batch: enough weight not to die at once.
    start = jnp.maximum(jnp.mean(state.counts), 1e-3)
    return (
        CodebookState(
            counts=jnp.where(dead, start, state.counts),
            sums=jnp.where(dead[:, None], fresh * start, state.sums),
            unused=jnp.where(dead, 0, state.unused),
        ),
        revived,
        dead,
    )


def kmeans(
    key: PRNGKeyArray, points: Float[Array, "n z"], number: int, l2: bool, iterations: int = 10
) -> Float[Array, "m z"]:
    """Return `number` centres of `points` by k-means++ seeding (Arthur & Vassilvitskii 2007) and Lloyd's iterations.

    With `l2`, points and centres live on the unit sphere. If there are fewer distinct points than centres, the
    surplus centres repeat points; they die and are revived later.
    """
    points = points.astype(jnp.float32)
    points = normalise(points) if l2 else points
    at = jax.random.uniform(key, (number, 1))

    def choose(i, carry):
        centres, best = carry
        pick = draw(best, at[i])[0]
        centres = centres.at[i].set(points[pick])
        return centres, jnp.minimum(best, jnp.sum(jnp.square(points - points[pick]), axis=-1))

    def lloyd(_, centres):
        codes = nearest(points, centres)
        counts = histogram(codes, number)[:, None]
        mean = jnp.zeros_like(centres).at[codes].add(points) / jnp.maximum(counts, 1.0)
        return jnp.where(counts > 0, normalise(mean) if l2 else mean, centres)

    start = (jnp.zeros((number, points.shape[1])), jnp.ones(points.shape[0]))
    centres, _ = jax.lax.fori_loop(0, number, choose, start)
    return jax.lax.fori_loop(0, iterations, lloyd, centres)
