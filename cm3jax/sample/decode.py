"""Prefill and the decode loop: prompts in, drawn ids out, compiled once per shape.

The streams of guidance (conditional, unconditional, ...) are rows of one batch of b * n: they share the weights' one
trip through memory, which is what decoding costs; on a mesh a row's streams lie on one device. The loop is one
`lax.while_loop` over a static cache, so that captions stop when the last of them has ended; a batch of pictures runs
through all its steps like a scan.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from cm3jax import config as configs
from cm3jax import sharding
from cm3jax import vocab as vocabulary
from cm3jax.nn import decoder
from cm3jax.objectives import places
from cm3jax.sample import filters, grammar, guidance


class Settings(NamedTuple):
    """How each row draws: arrays [b], so that another value needs no other program."""

    temperature: Float[Array, " b"]
    top_k: Int[Array, " b"]
    top_p: Float[Array, " b"]
    scales: Float[Array, "n_1 b"]
    """Guidance from each stream to the next, the most conditioned first; [0, b] with one stream."""
    contrast: Bool[Array, " b"]
    """Rows drawn by CD-K."""
    cd_alpha: Float[Array, " b"]
    uncond_temperature: Float[Array, " b"]
    penalty: Float[Array, " b"]
    """Of repeated words; 1: none."""


class Kind(NamedTuple):
    """What a batch needs of the program: static, so that nobody pays for a sort that no row asks for."""

    filtered: bool
    """Some row has top-k or top-p."""
    cd_k: int
    """The k of CD-K; 0 if no row uses it."""
    repeated: bool = False
    """Some row has a penalty on words that it has already."""
    random: bool = True
    """False: every row is greedy, and nobody needs random numbers."""


class Prompts(NamedTuple):
    """Prompts of n streams, padded on the left so that all rows go on in the same slot."""

    ids: Int[Array, "n b t"]
    lengths: Int[Array, "n b"]
    positions: Int[Array, "n b t"]
    following: Int[Array, "n b 2"]
    """Position of the token that comes next if it is none of a picture, and if it is (`objectives.places`)."""
    first: Int[Array, ""]
    """Position of a picture's first code; -1: positions count through the row."""


class Drawn(NamedTuple):
    """What came out."""

    ids: Int[Array, "b steps"]
    """<pad> after the end."""
    lengths: Int[Array, " b"]
    """Tokens drawn, the one that ends the row included."""
    logprobs: Float[Array, "b steps"]
    """log p of each token under the conditional stream alone, temperature 1, over the ids allowed; 0 after the end."""


def streams(sampling: configs.Sampling, pictured: bool = False) -> int:
    """Return how many streams a setting needs: 2 as soon as something is compared with the unconditional one.

    Args:
      pictured: Prompts show pictures, which a third stream may weigh apart from their text.
    """
    if pictured and sampling.image_guidance not in (-1, sampling.guidance):
        return 3
    return 1 if sampling.method == "top_p" and sampling.guidance == 1 else 2


def kind(sampling: configs.Sampling) -> Kind:
    """Return what the program must be able to do."""
    random, top_p = sampling.temperature > 0, sampling.method != "cd_k" and (sampling.top_k > 0 or sampling.top_p < 1)
    cd_k = 0 if sampling.method == "top_p" else sampling.cd_k
    return Kind(random and top_p, cd_k, sampling.repetition_penalty != 1, random)


def settings(sampling: configs.Sampling, rows: np.ndarray, pictured: bool = False) -> Settings:
    """Return the settings of the rows with these numbers; of a mixture, odd rows draw by CD-K.

    Args:
      pictured: As for `streams`.
    """
    full = lambda x, dtype=np.float32: np.full(len(rows), x, dtype)  # noqa: E731
    contrast = {"top_p": full(0, bool), "cd_k": full(1, bool), "mixture": rows % 2 == 1}[sampling.method]
    return Settings(
        temperature=full(sampling.temperature),
        top_k=np.where(contrast, 0, sampling.top_k).astype(np.int32),
        top_p=np.where(contrast, 1, sampling.top_p).astype(np.float32),
        scales=np.stack([full(sampling.guidance), full(sampling.image_guidance)])[: streams(sampling, pictured) - 1],
        contrast=contrast,
        cd_alpha=full(sampling.cd_alpha),
        uncond_temperature=full(sampling.uncond_temperature),
        penalty=full(sampling.repetition_penalty),
    )


def pad(
    prompts: list[list[np.ndarray]],
    length: int,
    hidden=None,
    vocab=None,
    first: int | None = None,
    retrieved=None,
    picture: int = 0,
) -> Prompts:
    """Return prompts[stream][row] as arrays of `length` columns.

    Args:
      hidden, vocab, first, picture: As in `objectives.places`, hidden[stream][row]; first None: positions count through
        the row.
      retrieved: Of each row, how many ids behind the first are those of retrieved documents; None: there are none.
    """
    ids = np.full((len(prompts), len(prompts[0]), length), vocabulary.PAD, np.int32)
    positions, following = np.zeros_like(ids), np.zeros((*ids.shape[:2], 2), np.int32)
    for i, stream in enumerate(prompts):
        for j, prompt in enumerate(stream):
            at, n = np.s_[i, j, length - len(prompt) :], len(prompt)
            ids[at], positions[at], following[i, j] = prompt, np.arange(n), n
            if first is not None:
                inside = (np.arange(n) > 0) & (np.arange(n) <= (retrieved[j] if retrieved else 0))
                place = places.places(prompt, hidden[i][j], vocab, first, None, inside, picture)
                positions[at] = place
                following[i, j] = places.following(prompt, place, hidden[i][j], vocab, first)
    lengths = np.array([[len(p) for p in stream] for stream in prompts], np.int32)
    return Prompts(ids, lengths, positions, following, np.int32(-1 if first is None else first))


def bucket(n: int) -> int:
    """Return the least length >= n of which programs are made: multiples of 16 up to 128, then four per doubling."""
    step = 16 if n <= 128 else 2 ** ((n - 1).bit_length() - 3)
    return -(-n // step) * step


@functools.partial(jax.jit, static_argnames=("model", "rules", "kind", "steps"))
def decode(
    model: decoder.Decoder,
    rules: grammar.Grammar,
    kind: Kind,
    steps: int,
    params,
    prompts: Prompts,
    state: grammar.State,
    settings: Settings,
    forced: Int[Array, "b steps"],
    keys: Key[Array, " b"],
) -> Drawn:
    """Draw up to `steps` ids after each prompt, until the grammar says that all rows are done.

    Args:
      params: Of `model`, unboxed.
      prompts: Their streams differ in the prompt only: all get the same drawn ids.
      state: Where the grammar stands after each prompt.
      forced: Ids to take in place of drawn ones; -1 is free.
      keys: One a row. Step i uses fold_in(key, i), so that a row does not depend on its batch mates
        (up to the rounding of matrix products of other shapes).
    """
    n, b, t = prompts.ids.shape
    flat = lambda x: x.swapaxes(0, 1).reshape(b * n, *x.shape[2:])  # noqa: E731
    ids, place = flat(prompts.ids), flat(prompts.positions)
    cache = _prefill(model, params, ids[:, :-1], place[:, :-1], flat(prompts.lengths), t - 1 + steps)

    def body(carry):
        i, last, place, following, state, cache, seen, drawn = carry
        logits, cache = _score(model, rules, params, last, place, cache, t - 1 + i)
        logits = logits.reshape(b, n, -1).swapaxes(0, 1)
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
        ids, logprobs = _draw(rules, kind, logits, state, seen, settings, own)
        held, done = jax.lax.dynamic_index_in_dim(forced, i, 1, keepdims=False), state.mode == grammar.DONE
        ids = jnp.where(done, vocabulary.PAD, jnp.where(held >= 0, held, ids))
        logprobs = jnp.where(done, 0.0, _column(logprobs, ids - rules.first))
        drawn = Drawn(
            jax.lax.dynamic_update_slice(drawn.ids, ids[:, None], (0, i)),
            drawn.lengths + ~done,
            jax.lax.dynamic_update_slice(drawn.logprobs, logprobs[:, None], (0, i)),
        )
        seen = _noted(rules, seen, ids[:, None]) if kind.repeated else None
        state, last = grammar.step(rules, state, ids), jnp.repeat(ids, n)
        place, following = _advance(last, following, prompts.first, rules.vocab)
        return i + 1, last, place, following, state, cache, seen, drawn

    def unfinished(carry):
        return (carry[0] < steps) & jnp.any(carry[4].mode != grammar.DONE)

    empty = Drawn(jnp.full((b, steps), vocabulary.PAD), jnp.zeros(b, jnp.int32), jnp.zeros((b, steps)))
    nothing = jnp.zeros((b, rules.last - rules.first), bool)
    seen = _noted(rules, nothing, prompts.ids[0]) if kind.repeated else None
    begin = (0, ids[:, -1], place[:, -1], flat(prompts.following), state, cache, seen, empty)
    return jax.lax.while_loop(unfinished, body, begin)[-1]


def _advance(ids: Int[Array, " b"], following: Int[Array, "b 2"], first, vocab):
    """Return the positions [b] of ids just drawn, and of what follows them."""
    other, code = following[:, 0], following[:, 1]
    drawing = vocab.is_image(ids) & (first >= 0)
    place = jnp.where(drawing, code, other)
    # anything but a code closes the picture: the next begins at `first`
    return place, jnp.stack([other + ~drawing, jnp.where(drawing, code + 1, first)], -1)


def _prefill(model, params, ids: Int[Array, "b t"], positions: Int[Array, "b t"], lengths: Int[Array, " b"], slots):
    """Return a cache that holds all of the prompts but their last ids, which are the loop's first input."""
    b, t = ids.shape
    segments = (jnp.arange(t) >= t + 1 - lengths[:, None]).astype(jnp.int32)
    cache = decoder.init_cache(model.config, b, slots)
    return model.apply({"params": params}, ids, positions, segments, cache=cache, index=0)[1]


def _score(model, rules, params, ids: Int[Array, " b"], positions: Int[Array, " b"], cache, index):
    """Return float32 logits [b, last - first] of what follows `ids`, and the cache with them."""
    one = jnp.ones_like(ids)[:, None]
    hidden, cache = model.apply({"params": params}, ids[:, None], positions[:, None], one, cache=cache, index=index)
    logits = decoder.logits(params, model.config, hidden[:, 0])[:, rules.first : rules.last]
    return sharding.constrain(logits, "batch", None), cache


def _noted(rules, seen: Bool[Array, "b v"], ids: Int[Array, "b t"]) -> Bool[Array, "b v"]:
    """Return which ids [first, last) a row has, `ids` now among them; codes are left out, as pictures repeat theirs."""
    kept = (ids >= rules.first) & (ids < rules.last) & ~rules.vocab.is_image(ids)
    at = jnp.where(kept, ids - rules.first, seen.shape[1])  # the others are dropped
    return seen.at[jnp.arange(len(ids))[:, None], at].set(True, mode="drop")


def _draw(rules, kind: Kind, logits: Float[Array, "n b v"], state, seen, settings: Settings, keys):
    """Return drawn ids [b], and the log-probabilities [b, v] of the conditional stream."""
    allowed = grammar.allowed(rules, state)
    mixed = jnp.where(allowed, guidance.guide(logits, settings.scales), -jnp.inf)
    if kind.repeated:
        mixed = filters.penalise(mixed, seen, settings.penalty)
    scores = filters.temper(mixed, settings.temperature) if kind.random else mixed
    if kind.filtered:
        scores = filters.top_k_top_p(scores, settings.top_k, settings.top_p)
    if kind.cd_k:
        contrasted = guidance.contrast(
            logits[0],
            logits[-1],
            allowed,
            settings.temperature,
            settings.uncond_temperature,
            settings.cd_alpha,
            kind.cd_k,
        )
        scores = jnp.where(settings.contrast[:, None], contrasted, scores)
    ids = rules.first + (filters.draw(scores, allowed, keys) if kind.random else filters.best(scores, allowed))
    return ids, jax.nn.log_softmax(jnp.where(allowed, logits[0], -jnp.inf))


def _column(x: Float[Array, "b v"], i: Int[Array, " b"]) -> Float[Array, " b"]:
    return jnp.take_along_axis(x, jnp.clip(i, 0, x.shape[1] - 1)[:, None], axis=1)[:, 0]
