"""Laws of prefill and the decode loop, on a small random model in float32."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3jax import config as configs
from cm3jax import rng, vocab
from cm3jax.nn import decoder
from cm3jax.sample import decode, grammar

VOCAB, LENGTH, CODES, STEPS, B = vocab.Vocab(text=13, image=11, sentinels=2, multiple=7), 40, 6, 8, 3
MODEL = decoder.Decoder(
    configs.Decoder(layers=2, width=12, heads=2, position="both", init_std=0.4, dtype="float32"), VOCAB.size, LENGTH
)
PICTURES = grammar.pictures(VOCAB, 13, CODES)
GREEDY = configs.Sampling(temperature=0.0)
GUIDED = configs.Sampling(temperature=0.8, top_p=0.9, guidance=3.0)
MIXTURE = configs.Sampling(method="mixture", temperature=0.8, top_p=0.9, guidance=3.0, cd_k=3, uncond_temperature=0.5)


@pytest.fixture(scope="module")
def params():
    """Weights that are all far from zero: initial output projections would hide the layers."""
    shapes = nn.unbox(jax.eval_shape(lambda key: decoder.init(MODEL, key), jax.random.key(0)))
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(0.4 * draw.standard_normal(x.shape, np.float32)), shapes)


def prompt(i):
    """A caption of 2 + i tokens between [eod] and <break>."""
    text = VOCAB.text_start + 1 + np.random.default_rng(i).integers(0, 12, 2 + i)
    return np.concatenate([[vocab.EOD], text, [vocab.BREAK]])


UNCOND = np.array([vocab.EOD, VOCAB.sentinel(0), vocab.BREAK])
PROMPTS = [prompt(i) for i in range(B)]


def run(params, sampling, prompts=PROMPTS, rows=None, seed=0, forced=None, rules=PICTURES, state=None, width=16):
    rows = np.arange(len(prompts)) if rows is None else np.asarray(rows)
    streams = [prompts, [UNCOND] * len(prompts)][: decode.streams(sampling)]
    return decode.decode(
        MODEL,
        rules,
        decode.kind(sampling),
        STEPS,
        params,
        decode.pad(streams, width),
        grammar.start([grammar.CODES] * len(prompts), left=CODES) if state is None else state,
        decode.settings(sampling, rows),
        np.full((len(prompts), STEPS), -1, np.int32) if forced is None else forced,
        rng.rows(jax.random.key(seed), jnp.asarray(rows)),
    )


@jax.jit
def uncached(params, row):
    place = jnp.arange(row.shape[1])[None]
    hidden, _ = MODEL.apply({"params": params}, row, place, jnp.ones_like(place))
    logits = decoder.logits(params, MODEL.config, hidden)[0]
    return jax.nn.log_softmax(logits[:, VOCAB.image_start : VOCAB.sentinel_start])


def teacher_forced(params, prompt, ids):
    """Return float32 log-probabilities over the codes, [len(ids), codes], without a cache."""
    row, n = np.zeros((1, 16), np.int32), len(prompt) + len(ids)
    row[0, :n] = np.concatenate([prompt, ids])
    return np.asarray(uncached(params, row))[len(prompt) - 1 : n - 1]


def test_greedy_is_the_argmax_of_teacher_forcing_with_prompts_of_unequal_length(params):
    out = run(params, GREEDY)
    for i in range(B):
        ids = np.asarray(out.ids[i, :CODES])
        log_p = teacher_forced(params, PROMPTS[i], ids)
        np.testing.assert_array_equal(ids - VOCAB.image_start, log_p.argmax(-1))


def test_log_probabilities_are_those_of_teacher_forcing(params):
    out = run(params, MIXTURE)
    for i in range(B):
        ids = np.asarray(out.ids[i, :CODES])
        log_p = teacher_forced(params, PROMPTS[i], ids)
        np.testing.assert_allclose(out.logprobs[i, :CODES], log_p[np.arange(CODES), ids - VOCAB.image_start], atol=1e-4)
        np.testing.assert_array_equal(out.logprobs[i, CODES:], 0)


def test_greedy_with_guidance_is_the_argmax_of_the_mixed_streams(params):
    out = run(params, configs.Sampling(temperature=0.0, guidance=3.0))
    for i in range(B):
        ids = np.asarray(out.ids[i, :CODES])
        cond, uncond = (teacher_forced(params, p, ids) for p in (PROMPTS[i], UNCOND))
        np.testing.assert_array_equal(ids - VOCAB.image_start, (uncond + 3 * (cond - uncond)).argmax(-1))


def test_a_row_alone_is_the_row_in_a_batch(params):
    together = run(params, MIXTURE).ids
    for i in range(B):
        np.testing.assert_array_equal(run(params, MIXTURE, [PROMPTS[i]], [i]).ids[0], together[i])


def test_more_padding_changes_nothing(params):
    np.testing.assert_array_equal(run(params, MIXTURE, width=32).ids, run(params, MIXTURE).ids)


def test_guidance_one_is_no_guidance(params):
    two = decode.pad([PROMPTS, [UNCOND] * B], 16)
    settings = decode.settings(configs.Sampling(), np.arange(B))._replace(scales=np.ones((1, B), np.float32))
    keys = rng.rows(jax.random.key(0), jnp.arange(B))
    state, forced = grammar.start([grammar.CODES] * B, left=CODES), np.full((B, STEPS), -1, np.int32)
    kind = decode.Kind(False, 0)
    out = decode.decode(MODEL, PICTURES, kind, STEPS, params, two, state, settings, forced, keys)
    np.testing.assert_array_equal(out.ids, run(params, configs.Sampling()).ids)


def test_a_mixture_draws_even_rows_by_top_p_and_odd_rows_by_cd_k(params):
    mixed = run(params, MIXTURE).ids
    for i in range(B):
        alone = run(params, dataclasses.replace(MIXTURE, method=("top_p", "cd_k")[i % 2]))
        np.testing.assert_array_equal(mixed[i], alone.ids[i])


def test_held_ids_stay_and_the_rest_follows_them(params):
    forced = np.full((B, STEPS), -1, np.int32)
    forced[:, 2] = VOCAB.image_start + 5
    out, free = run(params, GREEDY, forced=forced), run(params, GREEDY)
    np.testing.assert_array_equal(out.ids[:, 2], VOCAB.image_start + 5)
    np.testing.assert_array_equal(out.ids[:, :2], free.ids[:, :2])
    for i in range(B):
        ids = np.asarray(out.ids[i, :CODES])
        log_p = teacher_forced(params, PROMPTS[i], ids)
        np.testing.assert_array_equal(ids[3:] - VOCAB.image_start, log_p[3:].argmax(-1))


def test_rows_end_on_their_own_and_are_padded(params):
    rules = grammar.captions(VOCAB, 13, CODES)
    state = grammar.start([grammar.SPAN_START, grammar.DONE, grammar.SPAN_START], left=np.array([3, 9, 7]))
    out = run(params, configs.Sampling(), rules=rules, state=state)
    assert out.lengths[1] == 0 and (out.ids[1] == vocab.PAD).all()
    for row, most in ((0, 4), (2, 8)):
        n = int(out.lengths[row])
        assert 2 <= n <= most and out.ids[row, n - 1] == vocab.EOSS and (out.ids[row, n:] == vocab.PAD).all()
        assert VOCAB.is_text(np.asarray(out.ids[row, : n - 1])).all()


def test_words_of_the_prompt_and_those_drawn_are_penalised_and_codes_are_not(params):
    """Greedy, against a plain loop over logits without a cache."""
    rules, penalty = grammar.captions(VOCAB, 13, CODES), 3.0
    state = grammar.start([grammar.SPAN] * B, left=STEPS)
    sampling = configs.Sampling(temperature=0.0, repetition_penalty=penalty)
    out, free = (run(params, s, rules=rules, state=state) for s in (sampling, GREEDY))
    assert (np.asarray(out.ids) != np.asarray(free.ids)).any()
    words = np.append(np.arange(VOCAB.text_start + 1, VOCAB.text_start + 13), vocab.EOSS)
    for row, prompt in enumerate(PROMPTS):
        ids = prompt.tolist()
        for drawn in np.asarray(out.ids[row, : int(out.lengths[row])]):
            logits = np.asarray(word_logits(params, jnp.asarray([ids + [0] * (24 - len(ids))])))[0, len(ids) - 1]
            scored = np.where(logits < 0, logits * penalty, logits / penalty)
            logits = np.where(np.isin(np.arange(len(logits)), ids), scored, logits)
            assert drawn == words[logits[words].argmax()]
            ids.append(int(drawn))
    coded = dataclasses.replace(sampling, repetition_penalty=9.0)
    np.testing.assert_array_equal(run(params, coded).ids, run(params, GREEDY).ids)


@jax.jit
def word_logits(params, row):
    place = jnp.arange(row.shape[1])[None]
    return decoder.logits(params, MODEL.config, MODEL.apply({"params": params}, row, place, jnp.ones_like(place))[0])


def test_first_tokens_are_drawn_with_the_models_probabilities(params):
    n = 2000
    out = run(params, configs.Sampling(), [PROMPTS[1]] * n, seed=3)
    expected = np.exp(teacher_forced(params, PROMPTS[1], [VOCAB.image_start])[0]) * n
    found = np.bincount(np.asarray(out.ids[:, 0]) - VOCAB.image_start, minlength=11)
    assert ((found - expected) ** 2 / expected).sum() < 29.6  # 10 degrees of freedom: p = 0.001


def test_another_value_or_seed_does_not_compile_again(params):
    run(params, GUIDED)
    before = decode.decode._cache_size()
    for sampling in (configs.Sampling(temperature=0.3, top_k=4, top_p=0.5, guidance=2.0), GUIDED):
        run(params, sampling, [PROMPTS[0]] * B, rows=[7, 8, 9], seed=5)
    assert decode.decode._cache_size() == before
    run(params, configs.Sampling())
    assert decode.decode._cache_size() <= before + 1


def test_buckets_hold_their_length_and_are_few():
    sizes = [decode.bucket(n) for n in range(1, 5000)]
    assert all(n <= size <= max(16, n * 1.25 + 15) for n, size in enumerate(sizes, 1))
    assert len(set(sizes)) < 32
