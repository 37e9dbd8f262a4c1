"""launch/search_bench.py: its model of a TPU's partial reduction by hand, and all phases at toy size."""

import dataclasses
import json
import pathlib
import sys
import types

import numpy as np
import pytest
import test_search

from cm3jax.data import sources_scenes
from cm3jax.retrieval import bank, search, search_mesh

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "launch"))

import search_bench as bench

TEXTS = 512  # of the queries, the first are texts


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Ask a bank of eight documents in two files: the two best of every text are 1 and 5, of every picture 1 and 6."""
    monkeypatch.setattr(bench, "K", 2)
    text, picture = np.zeros((2, 8), np.float32)
    text[[1, 5]] = picture[[1, 6]] = 4, 3
    test_search.made(tmp_path / "bank", np.eye(8), (0, 5))
    queries = np.concatenate([np.tile(text, (TEXTS, 1)), np.tile(picture, (3, 1))])
    np.save(tmp_path / "queries.npy", queries)
    np.save(tmp_path / "exact.npy", test_search.by_hand(np.eye(8), queries, 2)[1])
    return tmp_path


@pytest.mark.parametrize(
    ("block", "bins", "texts", "why"),
    [
        (8, 8, 1.0, "every document has a bin of its own"),
        (8, 128, 1.0, "there are more bins than documents"),
        (8, 4, 0.5, "1 and 5 share a bin, and the better one is kept"),
        (8, 5, 1.0, "1 and 5 do not share one: 5 is in that of 0"),
        (4, 4, 1.0, "1 and 5 are of different blocks"),
    ],
)
def test_a_document_is_lost_where_a_better_one_of_its_block_shares_its_bin(asked, monkeypatch, block, bins, texts, why):
    monkeypatch.setattr(search_mesh, "BLOCK", block)
    monkeypatch.setattr(bench, "bins", lambda size: bins)
    # of pictures, 1 and 6 share a bin of five
    assert bench.model(asked, 8)["recall"] == {"texts": texts, "pictures": 0.5 if bins == 5 else 1.0}, why


@pytest.mark.parametrize("bins", [40, 64, 13])
def test_the_model_finds_the_best_of_what_brute_force_leaves_in_each_bin(tmp_path, monkeypatch, bins):
    monkeypatch.setattr(bench, "bins", lambda size: bins)
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(40, 6)).astype(np.float16)
    queries = rng.normal(size=(TEXTS + 20, 6)).astype(np.float32)
    test_search.made(tmp_path / "bank", vectors, (0, 13))
    exact = test_search.by_hand(vectors.astype(np.float32), queries, bench.K)[1]
    np.save(tmp_path / "queries.npy", queries)
    np.save(tmp_path / "exact.npy", exact)
    every = test_search.by_hand(vectors.astype(np.float32), queries, 40)[1]
    hits = [len(set(row % bins)) for row in every[:, : bench.K]]  # the best of each bin that the K best lie in
    assert bins < 40 or hits == [bench.K] * len(hits)
    expected = {"texts": np.mean(hits[:TEXTS]) / bench.K, "pictures": np.mean(hits[TEXTS:]) / bench.K}
    assert bench.model(tmp_path, 40)["recall"] == pytest.approx(expected)


def toy():
    change, r = dataclasses.replace, bench.RECIPE
    training = change(r.retriever.training, steps=2, batch=16, evaluate_every=0)
    small = dict(vision_width=16, vision_layers=1, vision_heads=1, text_width=16, text_layers=1, text_heads=1, size=64)
    retriever = change(r.retriever, model=change(r.retriever.model, **small), training=training)
    return change(r, prepare=change(r.prepare, count=32, workers=1), retriever=retriever)


@pytest.mark.slow
def test_all_phases_run_at_toy_size_and_continue(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sources_scenes, "HELD_OUT", 16)
    monkeypatch.setattr(bench, "RECIPE", toy())
    monkeypatch.setattr(bench, "SHARD", 150)

    def here(command, check):
        """Run a phase in this process, where the recipe is the toy."""
        monkeypatch.setattr(sys, "argv", command[1:])
        assert bench.main() == 0 and check

    monkeypatch.setattr(bench, "subprocess", types.SimpleNamespace(run=here))

    def call():
        words = [bench.__file__, str(tmp_path / "work"), "--documents", "300", "--json", str(tmp_path / "found.json")]
        monkeypatch.setattr(sys, "argv", words)
        assert bench.main() == 0
        return json.loads((tmp_path / "found.json").read_text())

    found = call()
    assert set(found) == {"documents", "width", "k", *bench.PHASES} and found["documents"] == 300
    assert all(found[phase]["peak_memory_gib"] > 0 for phase in bench.PHASES)
    assert found["ask flat"]["recall"] == {"texts": 1.0, "pictures": 1.0}
    for way in ("ivf_pq", "hnsw"):
        assert found[f"index {way}"]["index_bytes"] > 0
        assert all(0 < share <= 1 for share in found[f"ask {way}"]["recall"].values())
    assert found["faiss flat"]["largest_difference_of_scores"] < 1e-5
    model = found["model of approx_max_k"]
    assert model["block"] == 300 and all(0.9 < share <= 1 for share in model["recall"].values())
    made = bank.open(tmp_path / "work" / "bank")
    assert len(made) == 300 and len(made.shards) == 2
    queries, exact = (np.load(tmp_path / "work" / name) for name in ("queries.npy", "exact.npy"))
    assert np.array_equal(search.Flat(made).search(queries, bench.K)[1], exact)

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "work" / "bank").glob("train*.npy")}
    again = call()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert again["embed"].keys() == {"peak_memory_gib"}, "nothing was embedded again"
