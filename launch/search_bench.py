"""Measure the search of a large memory bank: recall and queries a second of ivf_pq and hnsw against looking at all.

    python launch/search_bench.py WORK --documents 1000000 --json search.json

In the folder WORK it trains a small CLIP with vectors of 512 numbers on 10,000 scenes (scenes:easy, 32 px), embeds that
many scenes of another seed, text and picture, into a bank, and asks it with the texts and the pictures of held-out
scenes.
Every phase is a process of its own, whose peak memory is that of the phase. What is there is not made again: the same
command continues, embedding by shards of 20,000.
"""

import argparse
import functools
import json
import os
import pathlib
import subprocess
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

from cm3jax import config as configs
from cm3jax import metrics
from cm3jax.retrieval import bank as banks
from cm3jax.retrieval import search

SHARD, RESOLUTION, K = 20_000, 32, 10
SEED = 1  # of the bank's scenes; the encoder is trained on seed 0
WAYS = ("flat", "ivf_pq", "hnsw")
RECIPE = configs.Recipe(
    prepare=configs.Prepare(source="scenes:easy", resolution=RESOLUTION, count=10_000),
    retrieve=True,
    retriever=configs.Retriever(
        model=configs.CLIP(
            resolution=RESOLUTION,
            patch=8,
            vision_width=64,
            vision_layers=2,
            vision_heads=2,
            context=48,
            text_width=64,
            text_layers=2,
            text_heads=2,
            size=512,
        ),
        training=configs.Training(steps=400, batch=128, optimizer=configs.Optimizer(peak_lr=2e-3, warmup=20)),
    ),
)


def shards(documents: int) -> list[banks.Shard]:
    count = -(-documents // SHARD)
    return [banks.Shard("train", i, count, i * SHARD, min(documents, (i + 1) * SHARD)) for i in range(count)]


def train(work: pathlib.Path, documents: int) -> dict:
    from cm3jax import run

    for stage in ("prepare", "text", "retriever"):
        run.run(RECIPE, work / "run", only=stage)
    return {}


def embed(work: pathlib.Path, documents: int) -> dict:
    from cm3jax.data import scenes
    from cm3jax.retrieval import encoder

    found, start, made = encoder.load(work / "run" / "retriever"), time.monotonic(), 0
    for shard in shards(documents):
        if (work / "bank" / f"{shard.stem}.vectors.npy").is_file():
            continue
        records = (scenes.record("easy", SEED, i, "train", RESOLUTION) for i in range(shard.first, shard.stop))
        banks.write(work / "bank", shard, encoder.embed(found, records))
        made += shard.stop - shard.first
        print(
            f"{shard.stop:,} of {documents:,} documents, {made / (time.monotonic() - start):.0f} a second", flush=True
        )
    banks.seal(work / "bank", shards(documents), np.zeros(0, np.uint64), found.identity)
    records = [scenes.record("easy", SEED, i, "test", RESOLUTION) for i in range(512)]
    pictures, texts = np.stack([r.parts[1] for r in records]), [r.parts[0] for r in records]
    np.save(work / "queries.npy", np.concatenate([found.texts(texts), found.pictures(pictures)]))
    return {"documents_per_second": made / (time.monotonic() - start)} if made else {}


def index(way: str):
    def phase(work: pathlib.Path, documents: int) -> dict:
        start = time.monotonic()
        bank, settings = banks.open(work / "bank"), configs.Bank(search=way)
        opened = time.monotonic()
        if way != "flat":
            search.build(bank, settings)
        file = search.path(bank, settings)
        size = file.stat().st_size if way != "flat" else 0
        return {"open_seconds": opened - start, "build_seconds": time.monotonic() - opened, "index_bytes": size}

    return phase


def ask(way: str):
    def phase(work: pathlib.Path, documents: int) -> dict:
        queries, bank = np.load(work / "queries.npy"), banks.open(work / "bank")
        start = time.monotonic()
        searcher = search.open(bank, configs.Bank(search=way))
        opened = time.monotonic() - start
        searcher.search(queries[: search.QUERIES], K)  # the file's pages come into memory
        start = time.monotonic()
        found = searcher.search(queries, K)[1]
        rate = len(queries) / (time.monotonic() - start)
        if way == "flat":
            np.save(work / "exact.npy", found)
        recall = {
            name: search.recall(found[rows], np.load(work / "exact.npy")[rows])
            for name, rows in (("texts", slice(0, 512)), ("pictures", slice(512, None)))
        }
        return {"queries_per_second": rate, "recall": recall, "open_seconds": opened}

    return phase


def compare(work: pathlib.Path, documents: int) -> dict:
    """Ask faiss's own flat index, which holds the vectors in memory as float32."""
    faiss, bank, queries = search.faiss(), banks.open(work / "bank"), np.load(work / "queries.npy")
    flat = faiss.IndexFlatIP(bank.size)
    for _, block in bank.blocks(search.BLOCK):
        flat.add(block.astype(np.float32))
    flat.search(queries[: search.QUERIES], K)
    start = time.monotonic()
    scores, _ = flat.search(queries, K)
    rate, mine = len(queries) / (time.monotonic() - start), search.Flat(bank).search(queries, K)[0]
    return {"queries_per_second": rate, "largest_difference_of_scores": float(np.abs(scores - mine).max())}


def bins(block: int) -> int:
    """Return into how many bins a TPU's approx_max_k sorts a block's scores: jax's own arithmetic."""
    import jax

    from cm3jax.retrieval import search_mesh

    scores = jax.ShapeDtypeStruct((1, block), np.float32)
    pick = functools.partial(jax.lax.approx_max_k, k=K, recall_target=search_mesh.RECALL, aggregate_to_topk=False)
    return jax.eval_shape(pick, scores)[0].shape[-1]


def model(work: pathlib.Path, documents: int) -> dict:
    """Find what a TPU would, by a model of its partial reduction (arXiv 2206.14286 §4): not by running it.

    Of each block's scores those whose places are equal modulo the number of bins share a bin, and only a bin's best
    is kept; the K best of these are exact. So a document is lost where a better one of its block shares its bin.
    """
    from cm3jax.retrieval import search_mesh

    queries, bank = np.load(work / "queries.npy"), banks.open(work / "bank")
    exact, block = np.load(work / "exact.npy"), min(search_mesh.BLOCK, len(bank))
    count, kept = bins(block), []
    for first in range(0, len(bank), block):  # as a device holds them, whatever files they come from
        vectors = search_mesh.rows(bank, first, min(first + block, len(bank)))
        scores = np.full((len(queries), -(-block // count) * count), -np.inf, np.float32)
        scores[:, : len(vectors)] = queries @ vectors.astype(np.float32).T
        scores = scores.reshape(len(queries), -1, count)
        row = scores.argmax(1)
        kept.append((scores.max(1), first + row * count + np.arange(count)))
    best, ids = (np.concatenate(x, 1) for x in zip(*kept, strict=True))
    found = np.take_along_axis(ids, np.argsort(-best, axis=1, kind="stable")[:, :K], 1)
    recall = {
        name: search.recall(found[rows], exact[rows])
        for name, rows in (("texts", slice(0, 512)), ("pictures", slice(512, None)))
    }
    return {"recall": recall, "bins": count, "block": block, "asked": search_mesh.RECALL}


PHASES = {"train": train, "embed": embed}
PHASES |= {f"{verb} {way}": make(way) for way in WAYS for verb, make in (("index", index), ("ask", ask))}
PHASES |= {"faiss flat": compare, "model of approx_max_k": model}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=pathlib.Path)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--json", type=pathlib.Path, help="file to write the figures to")
    parser.add_argument("--phase", choices=PHASES, help="this one alone, in this process")
    given = parser.parse_args()
    if given.phase:
        figures = PHASES[given.phase](given.work, given.documents)
        figures |= {"peak_memory_gib": metrics.peak_memory_gib()}
        (given.work / "figures.json").write_text(json.dumps(figures))
        return 0
    given.work.mkdir(parents=True, exist_ok=True)
    report = {"documents": given.documents, "width": RECIPE.retriever.model.size, "k": K}
    for name in PHASES:
        command = [sys.executable, __file__, str(given.work), "--documents", str(given.documents), "--phase", name]
        subprocess.run(command, check=True)
        report[name] = json.loads((given.work / "figures.json").read_text())
        print(f"{name}: {json.dumps(report[name])}", flush=True)
    if given.json:
        given.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
