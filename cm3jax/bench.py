"""`cm3jax bench`: how fast this machine trains, decodes, masks and prepares; measured, not estimated.

How it is measured:
- A contestant's round is a fixed number of steps, timed by the wall clock until the results are really there. The first
  round of each (compilation, warming up) is thrown away. Rounds of rival contestants alternate, ABBA, so that both see
  the same machine; the figure is the median, the range that of all rounds, and a ratio that of neighbouring rounds.
- `train` runs the training step of the config as the loop does (loss by modality, clipping, AdamW, one device), on
  random ids, without reading data. PyTorch runs the same function (tests/test_bench.py: equal logits for equal weights)
  as one would write it there: fused q/k/v projection, scaled_dot_product_attention with is_causal, fused AdamW,
  clip_grad_norm_; eager, and with --compiled once more through torch.compile. Both have all cores, or both
  the same accelerator, and the same matrix precision (TF32 allowed to both).
- `decode` draws greedily with the program that `cm3jax generate` runs (prefill, cache, grammar), against the same model
  without a cache, which reads the row anew for each token, padded to a multiple of 64. Compilation is not counted.
- `data` makes batches as training reads them, from token shards of made-up pairs as long as the paper's (1024 codes and
  a caption): plan, read, draw spans, move them, pack, positions and modalities. First in this process on one core; then
  through the worker processes of training, by the batches that arrive here, over the cores that both may use.
- `prepare` turns 640 x 480 JPEGs into 256 px records, all cores, start-up of the processes included.
- `chameleon` and `chameleon-7b`, which "all" leaves out, are in `bench_chameleon`.

`train` needs jax, flax, optax, orbax-checkpoint, jaxtyping and numpy only, so it also runs where the rest is not
installed: `python -m cm3jax.bench train`.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cm3jax import config as configs
from cm3jax import sharding
from cm3jax import vocab as vocabulary
from cm3jax.config import Recipe
from cm3jax.types import UserError

TINY = "configs/cm3leon/tiny.py"


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure: the median of its rounds, and their range."""

    name: str
    value: float
    low: float
    high: float
    unit: str
    note: str = ""


def row(name: str, values: list[float], unit: str, note: str = "") -> Row:
    """Return the figure of some rounds."""
    return Row(name, statistics.median(values), min(values), max(values), unit, note)


def alternate(contestants: dict[Any, Callable[[], int]], rounds: int) -> dict[Any, list[float]]:
    """Return {name: units per second of each round}; each contestant does some work and returns its units.

    The order turns around from round to round: ABBA.
    """
    for work in contestants.values():
        work()
    rates: dict[Any, list[float]] = {name: [] for name in contestants}
    for i in range(rounds):
        for name in list(contestants)[:: -1 if i % 2 else 1]:
            start = time.perf_counter()
            units = contestants[name]()
            rates[name].append(units / (time.perf_counter() - start))
    return rates


def ratio(name: str, ours: list[float], theirs: list[float]) -> Row:
    """Return the figure of how many times faster we are."""
    return row(name, [a / b for a, b in zip(ours, theirs, strict=True)], "x")


# --------------------------------------------------------------------------------------------------------------- train


def train(recipe: Recipe, rounds: int = 5, steps: int = 2, compiled: bool = False) -> list[Row]:
    """Return training tokens/s of the recipe's decoder, and of the same model in PyTorch if that is installed.

    Args:
      compiled: Also through torch.compile, which takes a minute or more to compile.
    """
    stage, vocab = recipe.decoder, recipe.vocab
    batch = fake_batch(stage, vocab)
    contestants = {"cm3jax": training_in_jax(stage, vocab, batch, steps)}
    try:
        contestants |= training_in_torch(stage, vocab, batch, steps, compiled)
        note = ""
    except ImportError:
        note = "no ratio: PyTorch is not installed; pip install torch==2.13.0"
    rates = alternate(contestants, rounds)
    shape = f"{batch['inputs'].shape[0]} rows of {batch['inputs'].shape[1]} tokens, {stage.model.dtype}"
    rows = [row(f"train, {name}", found, "tokens/s", shape) for name, found in rates.items()]
    rows[0] = dataclasses.replace(rows[0], note=note or shape)
    ours = rates.pop("cm3jax")
    return rows + [ratio(f"train, cm3jax over {name}", ours, found) for name, found in rates.items()]


def fake_batch(stage: configs.DecoderStage, vocab: vocabulary.Vocab) -> dict[str, np.ndarray]:
    """Return a batch of full rows of random ids, as `data.packing.arrays` makes them."""
    rng, shape = np.random.default_rng(0), (stage.training.batch, stage.packing.length)
    inputs = rng.integers(vocab.text_start, vocab.sentinel_start, shape).astype(np.int32)
    targets = np.concatenate([inputs[:, 1:], np.zeros_like(inputs[:, :1])], 1)
    weights = np.ones(shape, np.float32)
    weights[:, -1] = 0
    return {
        "inputs": inputs,
        "targets": targets,
        "weights": weights,
        "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape).copy(),
        "segments": np.ones(shape, np.int32),
        "modality": vocab.is_image(targets).astype(np.int8),
    }


def training_in_jax(stage: configs.DecoderStage, vocab: vocabulary.Vocab, batch, steps: int) -> Callable[[], int]:
    """Return the work of a round: `steps` updates of the one training task."""
    from cm3jax.train import lm

    task = lm.task(lm.resolve(stage, jax.devices()[0]), vocab)
    state = jax.jit(lambda key: sharding.unbox(task.init(key)))(jax.random.key(0))
    step = jax.jit(task.step, donate_argnums=0)

    def work() -> int:
        nonlocal state
        for i in range(steps):
            state, metrics = step(state, jax.tree.map(jnp.asarray, batch), jax.random.key(i))
        jax.block_until_ready((state, metrics))
        return steps * batch["inputs"].size

    return work


def training_in_torch(stage: configs.DecoderStage, vocab: vocabulary.Vocab, batch, steps: int, compiled: bool):
    """Return {name: work of a round} in PyTorch, the same number of updates.

    Raises:
      ImportError: if PyTorch is not installed.
    """
    import torch

    torch.backends.cuda.matmul.allow_tf32 = True
    torch.set_num_threads(count_cores())
    device = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"
    found = {"PyTorch": torch_work(stage, vocab, batch, steps, device, compiled=False)}
    if compiled:
        found["PyTorch compiled"] = torch_work(stage, vocab, batch, steps, device, compiled=True)
    return found


def torch_work(stage: configs.DecoderStage, vocab: vocabulary.Vocab, batch, steps: int, device: str, compiled: bool):
    """Return the work of a round in PyTorch."""
    import torch

    torch.manual_seed(0)
    o, t = stage.training.optimizer, stage.packing.length
    model = torch_decoder(stage.model, vocab.size, t).to(device)
    weights = list(model.parameters())
    betas = (o.b1, o.b2)
    optimizer = torch.optim.AdamW(weights, o.peak_lr, betas, o.eps, o.weight_decay, fused=True)

    def loss(ids, targets, weights):
        nll = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), reduction="none")
        return (nll * weights.flatten()).sum() / weights.sum()

    loss = torch.compile(loss) if compiled else loss
    arrays = batch["inputs"].astype(np.int64), batch["targets"].astype(np.int64), batch["weights"]

    def work() -> int:
        for _ in range(steps):
            value = loss(*(torch.from_numpy(x).to(device) for x in arrays))
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(weights, o.clip or 1e9)
            optimizer.step()
        value.item()
        return steps * batch["inputs"].size

    return work


def torch_decoder(config: configs.Decoder, vocab: int, length: int):
    """Return CM3Leon's decoder (arXiv 2309.02591 §2.3) as a torch.nn.Module: ids [b, t] -> logits float32 [b, t, v].

    Raises:
      UserError: if the config has a part of Chameleon's, which this has not.
    """
    import torch
    from torch.nn import functional

    plain = configs.Decoder(init_std=config.init_std, position_std=config.position_std)
    for field in ("kv_heads", "activation", "norm", "norm_order", "position", "qk_norm", "tied"):
        if getattr(config, field) != getattr(plain, field):
            raise UserError(f"decoder.model.{field} = {getattr(config, field)!r}: bench compares CM3Leon's parts only")
    d, heads, dtype = config.width, config.heads, getattr(torch, config.dtype)

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            mlp = config.mlp_width or 4 * d
            sizes = {"qkv": (d, 3 * d), "out": (d, d), "up": (d, mlp), "down": (mlp, d)}
            for name, (i, o) in sizes.items():
                setattr(self, name, torch.nn.Linear(i, o, bias=False))
                std = 0.0 if name in ("out", "down") else config.init_std
                torch.nn.init.trunc_normal_(getattr(self, name).weight, std=std or 1.0, a=-3 * std, b=3 * std)

        def matrix(self, name, x):
            return functional.linear(x, getattr(self, name).weight.to(dtype))

        def forward(self, x):
            b, t, _ = x.shape
            y = self.matrix("qkv", functional.layer_norm(x, (d,), eps=config.norm_eps))
            q, k, v = y.view(b, t, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.matrix("out", y.transpose(1, 2).reshape(b, t, d))
            y = functional.relu(self.matrix("up", functional.layer_norm(x, (d,), eps=config.norm_eps)))
            return x + self.matrix("down", y)

    class Decoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.positions = torch.nn.Embedding(vocab, d), torch.nn.Embedding(length, d)
            torch.nn.init.trunc_normal_(self.table.weight, std=config.init_std, a=-1, b=1)
            torch.nn.init.trunc_normal_(self.positions.weight, std=config.position_std, a=-1, b=1)
            self.blocks = torch.nn.ModuleList(Block() for _ in range(config.layers))

        def forward(self, ids):
            x = (self.table(ids) + self.positions.weight[: ids.shape[1]]).to(dtype)
            for block in self.blocks:
                x = block(x)
            x = functional.layer_norm(x, (d,), eps=config.norm_eps)
            return functional.linear(x, self.table.weight.to(dtype)).float()

    return Decoder()


# -------------------------------------------------------------------------------------------------------------- decode


def decode(recipe: Recipe, rounds: int = 5, batch: int = 16, prompt: int = 16, steps: int = 64) -> list[Row]:
    """Return tokens/s of drawing `steps` codes after prompts of `prompt` tokens, with and without a cache."""
    from cm3jax.train import lm

    model = lm.model(recipe.decoder, recipe.vocab)
    params = random_params(model)
    ids = np.random.default_rng(0).integers(recipe.vocab.text_start, recipe.vocab.image_start, (batch, prompt))
    with_cache, without = (
        cached(model, params, recipe.vocab, ids, steps),
        uncached(model, params, recipe.vocab, ids, steps),
    )
    rates = alternate({"cache": lambda: with_cache().size, "none": lambda: without().size}, rounds)
    note = f"{batch} rows, {prompt} + {steps} tokens, {recipe.decoder.model.dtype}"
    return [
        row("decode, with cache", rates["cache"], "tokens/s", note),
        row("decode, without cache", rates["none"], "tokens/s", note),
        ratio("decode, with over without cache", rates["cache"], rates["none"]),
    ]


def random_params(model):
    """Return weights that are all random: at its start the real model answers the same everywhere."""
    from cm3jax.nn import decoder

    shapes = sharding.unbox(jax.eval_shape(lambda key: decoder.init(model, key), jax.random.key(0)))
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    std = model.config.width**-0.5
    found = [std * jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, found)


def cached(model, params, vocab: vocabulary.Vocab, ids: np.ndarray, steps: int) -> Callable[[], np.ndarray]:
    """Return what draws [b, steps] codes greedily as the sampler does."""
    from cm3jax.sample import decode as sampler
    from cm3jax.sample import grammar

    rows, greedy = np.arange(len(ids)), configs.Sampling(temperature=0.0)
    rules = grammar.pictures(vocab, vocab.text, steps)
    state = grammar.start([grammar.CODES] * len(ids), left=np.full(len(ids), steps))
    forced, keys = np.full((len(ids), steps), -1, np.int32), jax.random.split(jax.random.key(0), len(ids))
    fixed = sampler.pad([list(ids)], ids.shape[1]), state, sampler.settings(greedy, rows), forced, keys
    return lambda: np.asarray(sampler.decode(model, rules, sampler.kind(greedy), steps, params, *fixed).ids)


def uncached(model, params, vocab: vocabulary.Vocab, ids: np.ndarray, steps: int) -> Callable[[], np.ndarray]:
    """Return what draws the same codes by reading the whole row for each."""
    from cm3jax.nn import decoder

    @jax.jit
    def following(params, row, end):
        b, t = row.shape
        place = jnp.broadcast_to(jnp.arange(t), (b, t))
        hidden, _ = model.apply({"params": params}, row, place, (place < end).astype(jnp.int32))
        last = jax.lax.dynamic_index_in_dim(hidden, end - 1, 1, keepdims=False)
        logits = decoder.logits(params, model.config, last)[:, vocab.image_start : vocab.sentinel_start]
        return vocab.image_start + jnp.argmax(logits, -1)

    def draw() -> np.ndarray:
        end = ids.shape[1]
        row = np.zeros((len(ids), -(-(end + steps) // 64) * 64), np.int32)
        row[:, :end] = ids
        for i in range(end, end + steps):
            row[:, i] = following(params, row[:, : -(-i // 64) * 64], i)
        return row[:, end : end + steps]

    return draw


# ---------------------------------------------------------------------------------------------------------------- data


def data(rounds: int = 5, pairs: int = 4000, steps: int = 200) -> list[Row]:
    """Return tokens/s of making the paper's batches (chop, 4096) and ours (whole, 4352).

    First the work alone in this process on one core, then as training gets it: read, masked and packed in worker
    processes, taken over by this one; per core, all on one core and with a worker a core on all of them.
    """
    from cm3jax.data import tokens

    vocab, alone = vocabulary.Vocab(), {}
    with tempfile.TemporaryDirectory() as folder:
        tokens.write(folder, "train", fake_documents(vocab, pairs))
        stored = tokens.Tokens(folder, "train")
        stages = {}
        for kind, length in (("chop", 4096), ("whole", 4352)):
            packing = configs.Packing(kind=kind, length=length)
            stages[kind] = configs.DecoderStage(packing=packing, training=configs.Training(batch=16))
            alone[f"{kind}, rows of {length}"] = functools.partial(epoch, stored, stages[kind], vocab)
        with one_core():
            rates = alternate(alone, rounds)
            piped = through_workers(folder, stages, vocab, rounds, 1, steps)
        cores = count_cores()
        if cores > 1:
            piped |= through_workers(folder, stages, vocab, rounds, cores, steps)
    note = f"{pairs} pairs of 1024 codes and a caption, one core"
    return [row(f"causal mask + packing, {name}", values, "tokens/s", note) for name, values in rates.items()] + [
        row(
            f"pipeline, {kind}, {workers} worker{'s' * (workers > 1)}", values, "tokens/s a core", f"on {workers} cores"
        )
        for (kind, workers), values in piped.items()
    ]


def through_workers(folder, stages, vocab: vocabulary.Vocab, rounds: int, workers: int, steps: int) -> dict:
    """Return {(kind, workers): tokens/s per core of each round} of batches that as many workers as cores make."""
    from cm3jax.data import pipeline

    def taking(stream) -> Callable[[], int]:
        return lambda: int(sum((next(stream)["segments"] > 0).sum() for _ in range(steps)))

    with contextlib.ExitStack() as stack:
        contestants = {}
        for kind, stage in stages.items():
            training = dataclasses.replace(stage.training, workers=workers)
            stream = pipeline.batches(folder, "train", dataclasses.replace(stage, training=training), vocab)
            stack.callback(stream.close)
            contestants[kind, workers] = taking(stream)
        rates = alternate(contestants, rounds)
    return {name: [rate / workers for rate in values] for name, values in rates.items()}


def count_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fake_documents(vocab: vocabulary.Vocab, count: int):
    """Yield (key, ids) of made-up pairs: 5 to 20 text tokens, <break>, 1024 codes."""
    rng = np.random.default_rng(0)
    for i in range(count):
        text = rng.integers(vocab.text_start, vocab.image_start, rng.integers(5, 21))
        codes = rng.integers(vocab.image_start, vocab.sentinel_start, 1024)
        yield f"{i}", np.concatenate([text, [vocabulary.BREAK], codes]).astype(np.uint16)


def epoch(stored, stage: configs.DecoderStage, vocab: vocabulary.Vocab) -> int:
    """Plan an epoch and make its batches, but for the last that is not full; return the tokens that are not padding."""
    from cm3jax.data import pipeline

    make = pipeline.Batches(stored, stage, vocab)
    steps = len(make.epochs.plan(0)) // stage.training.batch
    return int(sum((make(step)["segments"] > 0).sum() for step in range(steps)))


@contextlib.contextmanager
def one_core():
    """Keep this thread on one core, where the system can."""
    before = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else set()
    if before:
        os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        if before:
            os.sched_setaffinity(0, before)


def prepare(rounds: int = 3, count: int = 400) -> list[Row]:
    """Return pictures/s of `cm3jax prepare` on JPEGs."""
    from cm3jax.data import prepare

    prepare.throughput(count=8)
    found = [prepare.throughput(count=count) for _ in range(rounds)]
    note = f"{count} JPEGs of 640 x 480 to 256 px, {found[0]['workers']} processes"
    return [row("prepare", [f["pictures_per_second"] for f in found], "pictures/s", note)]


def of_chameleon(shape: str, rounds: int) -> list[Row]:
    """Return the figures of `bench_chameleon`, which stands on this file."""
    from cm3jax import bench_chameleon

    return getattr(bench_chameleon, shape)(rounds)


# ---------------------------------------------------------------------------------------------------------------- main


def machine() -> dict[str, Any]:
    """Return what the figures were taken on."""
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines() if pathlib.Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {"cpu": model, "cores": os.cpu_count(), "device": jax.devices()[0].device_kind, "jax": jax.__version__}


def table(rows: list[Row]) -> str:
    """Return the figures as text."""
    cells = [(r.name, number(r.value), r.unit, f"{number(r.low)} to {number(r.high)}", r.note) for r in rows]
    widths = [max(len(c[i]) for c in cells) for i in range(4)]
    return "\n".join(
        f"{name:{widths[0]}}  {value:>{widths[1]}} {unit:{widths[2]}}  {spread:{widths[3]}}  {note}".rstrip()
        for name, value, unit, spread, note in cells
    )


def number(x: float) -> str:
    """Return 12345.6 as "12,346", 1.23456 as "1.23"."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


PARTS = ("train", "decode", "data", "prepare")
CHAMELEON = ("chameleon", "chameleon-7b")
"""Not in "all": one needs transformers, the other an accelerator."""


def main(what: str = "all", config: str = TINY, rounds: int = 5, compiled: bool = False, out: str = "") -> list[Row]:
    """Run one benchmark or all, print the figures, and return them.

    Args:
      what: One of PARTS or CHAMELEON, or "all" of PARTS.
      config: Recipe whose decoder `train` and `decode` measure.
      rounds: Rounds of each contestant.
      compiled: In `train`, compare with torch.compile too.
      out: JSON file to write too; "": none.

    Raises:
      UserError: before anything is measured, if an argument is wrong.
    """
    if what not in (*PARTS, *CHAMELEON, "all"):
        raise UserError(f"bench {what}: no such benchmark; one of {', '.join((*PARTS, *CHAMELEON))}, all")
    if rounds < 1:
        raise UserError(f"rounds = {rounds}: must be at least 1")
    if out and not pathlib.Path(out).absolute().parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {str(pathlib.Path(out).parent)!r}; make it, or name another")
    recipe = configs.load(config) if what in ("train", "decode", "all") else None
    here, rows = machine(), []
    print(", ".join(f"{k} {v}" for k, v in here.items()) + "; median, and range of the rounds", flush=True)
    for part in PARTS if what == "all" else (what,):
        found = {
            "train": lambda: train(recipe, rounds, compiled=compiled),
            "decode": lambda: decode(recipe, rounds),
            "data": lambda: data(rounds),
            "prepare": lambda: prepare(rounds),
            "chameleon": lambda: of_chameleon("small", rounds),
            "chameleon-7b": lambda: of_chameleon("big", rounds),
        }[part]()
        print(table(found), flush=True)
        rows += found
    if out:
        content = {"machine": here, "rows": [dataclasses.asdict(r) for r in rows]}
        pathlib.Path(out).write_text(json.dumps(content, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m cm3jax.bench")
    parser.add_argument("what", nargs="?", default="all", choices=[*PARTS, *CHAMELEON, "all"])
    parser.add_argument("--config", default=TINY)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--out", default="")
    main(**vars(parser.parse_args()))
