"""`cm3jax bench chameleon` and `chameleon-7b`: how fast a model of Chameleon's shape decodes.

- `chameleon` continues eight prompts by greedy tokens with the program that `cm3jax generate` runs, against
  `transformers`' own `generate` with its cache: one small shape, the same weights, float32, all cores for both. The ids
  of both must be equal, or there is no figure.
- `chameleon-7b` draws pictures of 1024 codes with the 7B's shape in bfloat16 and random weights, with guidance, on an
  accelerator: seconds a picture at batch 1 and 16, and the share of what its memory allows. A step reads all weights
  that it needs and the whole cache once; that many bytes over the peak bandwidth is the bound.

Rounds are measured as in `bench`.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from cm3jax import bench, sharding, trees
from cm3jax import config as configs
from cm3jax import vocab as vocabulary
from cm3jax.interop import chameleon, chameleon_vocab, mapped
from cm3jax.nn import decoder, flops
from cm3jax.sample import decode, grammar
from cm3jax.types import UserError

SMALL = configs.Decoder(layers=8, width=512, heads=8, mlp_width=1376, tied=False, dtype="float32", **chameleon.FORM)
"""A twelfth of the 7B's width, its proportions."""
SMALL_VOCAB = vocabulary.Vocab(text=8190, image=8192 - 8, sentinels=2, multiple=2)
"""16,380 ids, half of them image codes."""
BIG = configs.Decoder(layers=32, width=4096, heads=32, mlp_width=11008, tied=False, **chameleon.FORM)
"""Chameleon 7B (arXiv 2405.09818 table 1)."""
BIG_VOCAB = vocabulary.Vocab(text=56828, image=8192, sentinels=512)
"""65,536 ids, as the released vocabulary is ordered here."""
CODES, PROMPT = 1024, 32
BANDWIDTH = {"H200": 4.8e12, "H100": 3.35e12, "A100-SXM4-80GB": 2.039e12, "A100": 1.555e12, "L4": 3.0e11}
"""Bytes a second of a GPU's memory by its data sheet, by a part of its name."""
COPIED = 2**28
"""Numbers that are copied to measure a bandwidth that is not listed."""


# ------------------------------------------------------------------------------------------------- against transformers


def small(
    rounds: int = 5,
    model: configs.Decoder = SMALL,
    vocab: vocabulary.Vocab = SMALL_VOCAB,
    batch: int = 8,
    prompt: int = 16,
    steps: int = 64,
) -> list[bench.Row]:
    """Return tokens/s of greedy decoding here and in transformers, and the ratio.

    Raises:
      UserError: if transformers or PyTorch is not installed, or the ids of both differ.
    """
    net = decoder.Decoder(model, vocab.size, prompt + steps)
    params = silent(bench.random_params(net), vocab)
    ids = np.random.default_rng(0).integers(vocab.text_start, vocab.image_start, (batch, prompt))
    ours, theirs = in_jax(net, params, vocab, ids, steps), in_transformers(model, params, vocab, ids, steps)
    if not np.array_equal(found := ours(), wanted := theirs()):
        where = np.argwhere(found != wanted)[0]
        raise UserError(f"bench chameleon: row {where[0]} differs from transformers' at token {where[1]}; no figure")
    rates = bench.alternate({"cm3jax": lambda: ours().size, "transformers": lambda: theirs().size}, rounds)
    sizes = f"{trees.size(params) / 1e6:.0f}M parameters"
    note = f"{batch} rows, {prompt} + {steps} tokens, {sizes}, {model.dtype}, {bench.count_cores()} cores"
    return [
        bench.row("chameleon, cm3jax", rates["cm3jax"], "tokens/s", note),
        bench.row("chameleon, transformers", rates["transformers"], "tokens/s", "generate() with cache; the same ids"),
        bench.ratio("chameleon, cm3jax over transformers", rates["cm3jax"], rates["transformers"]),
    ]


def silent(params, vocab: vocabulary.Vocab):
    """Return weights with which no marker is ever the likeliest token, so that both programs may draw the same ids."""
    markers = np.r_[0 : vocab.text_start, vocab.sentinel_start : vocab.size]
    return {**params, "head": params["head"].at[markers].set(0.0)}


def in_jax(net: decoder.Decoder, params, vocab: vocabulary.Vocab, ids: np.ndarray, steps: int) -> Callable:
    """Return what draws text greedily, int [b, steps], as the sampler does."""
    rows, greedy = np.arange(len(ids)), configs.Sampling(temperature=0.0)
    rules = grammar.Grammar(vocab, vocab.text, 1, 0, 0, vocab.image_start, unsaid=())
    state = grammar.start([grammar.SPAN_START] * len(ids), left=steps + 1)
    forced, keys = np.full((len(ids), steps), -1, np.int32), jax.random.split(jax.random.key(0), len(ids))
    fixed = decode.pad([list(ids)], ids.shape[1]), state, decode.settings(greedy, rows), forced, keys
    params = decoder.apart(params)  # as `generate.load` does
    return lambda: np.asarray(decode.decode(net, rules, decode.kind(greedy), steps, params, *fixed).ids)


def in_transformers(model: configs.Decoder, params, vocab: vocabulary.Vocab, ids: np.ndarray, steps: int) -> Callable:
    """Return what draws the same by transformers' generate; it hides the image codes by itself.

    Raises:
      UserError: if it is not installed.
    """
    try:
        import torch
        import transformers
    except ImportError as e:
        raise UserError(f"bench chameleon: {e.name} is not installed; pip install 'cm3jax[dev]'") from None
    torch.set_num_threads(bench.count_cores())
    order, names = chameleon_vocab.own(vocab), chameleon_vocab.own_names(vocab)
    about = chameleon.settings(model, vocab.size, ids.shape[1] + steps, {**names, "<image>": vocab.text_start})
    pictures = {"resolution": 8, "base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1}
    pictures |= {"embed_dim": 8, "num_embeddings": vocab.image, "latent_channels": 8}  # loaded, and never used
    found = transformers.ChameleonForConditionalGeneration(
        transformers.ChameleonConfig(**about, vq_config=pictures)
    ).eval()
    state = {name: torch.tensor(x.read()) for name, x in chameleon.tensors(mapped.named(params), model, order).items()}
    found.load_state_dict(state, strict=False)
    prompts, seen = torch.tensor(ids), torch.ones(ids.shape, dtype=torch.long)
    how = {"max_new_tokens": steps, "do_sample": False, "use_cache": True, "eos_token_id": None, "pad_token_id": 0}

    def draw() -> np.ndarray:
        with torch.inference_mode():
            return found.generate(prompts, attention_mask=seen, **how)[:, ids.shape[1] :].numpy()

    return draw


# -------------------------------------------------------------------------------------------------- on an accelerator


def big(
    rounds: int = 3,
    model: configs.Decoder = BIG,
    vocab: vocabulary.Vocab = BIG_VOCAB,
    codes: int = CODES,
    batches: tuple[int, ...] = (1, 16),
) -> list[bench.Row]:
    """Return seconds a picture with guidance at some batch sizes, and the share of the memory's bound.

    Raises:
      UserError: if there is no accelerator, or its memory does not hold the weights and the cache.
    """
    device = jax.devices()[0]
    refuse_device(device, needed(model, vocab, codes, max(batches)))
    bandwidth, source = peak(device)
    net = decoder.Decoder(model, vocab.size, PROMPT + codes)
    params, rows = half(net), []
    for batch in batches:
        draw, bound = drawing(net, params, vocab, codes, batch), read_bytes(model, vocab, codes, batch) / bandwidth
        rates = bench.alternate({"draw": lambda draw=draw: len(draw())}, rounds)["draw"]
        seconds = [batch / rate for rate in rates]
        note = f"{codes} codes, 2 streams, {model.dtype}; bound {bound:.2f} s a batch by {source}"
        rows.append(bench.row(f"chameleon-7b, batch {batch}", [s / batch for s in seconds], "s/image", note))
        rows.append(bench.row(f"chameleon-7b, batch {batch}, of the bound", [bound / s for s in seconds], "x"))
    return rows


def refuse_device(device, bytes_needed: int) -> None:
    """Raise a UserError unless a device is an accelerator with enough memory."""
    gib = 2**30
    if device.platform == "cpu":
        raise UserError(
            f"bench chameleon-7b: needs a GPU or TPU with {bytes_needed / gib:.0f} GiB, and jax finds only"
            f" {device.device_kind}; for a CPU there is: cm3jax bench chameleon"
        )
    limit = (device.memory_stats() or {}).get("bytes_limit", 0)
    if 0 < limit < bytes_needed:
        raise UserError(
            f"bench chameleon-7b: needs {bytes_needed / gib:.0f} GiB, and {device.device_kind} gives {limit / gib:.0f}"
        )


def needed(model: configs.Decoder, vocab: vocabulary.Vocab, codes: int, batch: int) -> int:
    """Return the bytes of weights, in the compute dtype, and cache."""
    size = jnp.dtype(model.dtype).itemsize
    return size * decoder.parameter_count(model, vocab.size, PROMPT + codes) + cache_bytes(model, codes, batch)


def cache_bytes(model: configs.Decoder, codes: int, batch: int) -> int:
    """Return the bytes of the cache of two streams."""
    return 2 * batch * (PROMPT - 1 + codes) * flops.cached(model) * jnp.dtype(model.dtype).itemsize


def read_bytes(model: configs.Decoder, vocab: vocabulary.Vocab, codes: int, batch: int) -> int:
    """Return the bytes that drawing a batch must read: in each step the layers, the codes' rows of the head, the cache.

    The cache counts whole, as each step's attention reads all its slots.
    """
    size = jnp.dtype(model.dtype).itemsize
    tables = 2 * vocab.size * model.width
    layers = decoder.parameter_count(model, vocab.size, PROMPT + codes) - tables
    return codes * (size * (layers + vocab.image * model.width) + cache_bytes(model, codes, batch))


def peak(device) -> tuple[float, str]:
    """Return bytes a second of a device's memory, and where the number is from."""
    kind = device.device_kind
    for name, value in BANDWIDTH.items():
        if name in kind:
            return value, f"{name}'s data sheet, {value / 1e12:.2f} TB/s"
    x, copy = jnp.zeros(COPIED, jnp.float32), jax.jit(lambda x: x + 1)
    rate = max(bench.alternate({"copy": lambda: copy(x).block_until_ready().nbytes * 2}, 5)["copy"])
    return rate, f"a copy on this {kind}, {rate / 1e12:.2f} TB/s"


def half(net: decoder.Decoder):
    """Return random weights in the compute dtype, made on the device leaf by leaf."""
    shapes = sharding.unbox(jax.eval_shape(lambda key: decoder.init(net, key), jax.random.key(0)))
    leaves, tree = jax.tree.flatten(shapes)
    std, dtype = net.config.width**-0.5, jnp.dtype(net.config.dtype)
    make = jax.jit(lambda key, shape: std * jax.random.normal(key, shape, dtype), static_argnums=1)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return jax.tree.unflatten(tree, [make(key, x.shape) for key, x in zip(keys, leaves, strict=True)])


def drawing(net: decoder.Decoder, params, vocab: vocabulary.Vocab, codes: int, batch: int) -> Callable:
    """Return what draws a batch of pictures with Chameleon's own setting after prompts of random text, [b, codes]."""
    rng, rows = np.random.default_rng(0), np.arange(batch)
    sampling = dataclasses.replace(
        configs.PLAIN["chameleon"], image_guidance=-1.0, repetition_penalty=1.0
    )  # a prompt without pictures has two streams
    prompts = list(rng.integers(vocab.text_start, vocab.image_start, (batch, PROMPT)))
    empty = [prompt[[0, -1]] for prompt in prompts]
    rules = grammar.pictures(vocab, vocab.text, codes)
    state = grammar.start([grammar.CODES] * batch, left=np.full(batch, codes))
    forced, keys = np.full((batch, codes), -1, np.int32), jax.random.split(jax.random.key(0), batch)
    fixed = decode.pad([prompts, empty], PROMPT), state, decode.settings(sampling, rows), forced, keys
    return lambda: np.asarray(decode.decode(net, rules, decode.kind(sampling), codes, params, *fixed).ids)
