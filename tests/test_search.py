import dataclasses

import fake_encoder
import jax
import numpy as np
import pytest

from cm3jax import config as configs
from cm3jax.retrieval import bank, search, search_mesh
from cm3jax.types import UserError


def made(folder, vectors, cuts=(0,)):
    """Return a bank of these vectors, cut into shards."""
    ends = [*cuts[1:], len(vectors)]
    plan = [bank.Shard("train", i, len(cuts), a, b) for i, (a, b) in enumerate(zip(cuts, ends, strict=True))]
    for shard in plan:
        some = vectors[shard.first : shard.stop].astype(np.float32)
        records = [fake_encoder.pair(str(i), fake_encoder.WORDS[:4], i % 251) for i in range(shard.first, shard.stop)]
        there = np.ones(len(some), bool)
        bank.write(folder, shard, [(records, some, there, there)])
    bank.seal(folder, plan, np.zeros(0, np.uint64), "fake")
    return bank.open(folder)


def whole(rng, *shape):
    """Return vectors of small whole numbers: every product is exact, and many are equal."""
    return rng.integers(-2, 3, shape).astype(np.float32)


def by_hand(vectors, queries, k):
    """Return the k nearest by score and then id, by sorting everything."""
    scores = queries @ vectors.T
    ids = np.stack([np.lexsort((np.arange(len(vectors)), -row)) for row in scores])[:, :k]
    found = np.take_along_axis(scores, ids, 1)
    missing = ((0, 0), (0, k - ids.shape[1]))
    return np.pad(found, missing, constant_values=-np.inf), np.pad(ids, missing, constant_values=-1)


def test_flat_finds_the_nearest_and_of_equal_ones_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "BLOCK", 37)
    monkeypatch.setattr(search, "QUERIES", 11)
    rng = np.random.default_rng(0)
    vectors, queries = whole(rng, 211, 7), whole(rng, 23, 7)
    found = made(tmp_path, vectors, (0, 59, 130))
    for k in (1, 13, 211, 230):
        scores, ids = search.open(found, configs.Bank()).search(queries, k)
        expected = by_hand(vectors, queries, k)
        assert np.array_equal(scores, expected[0])
        assert np.array_equal(ids, expected[1])


@pytest.mark.parametrize("count", [1, 5, 8, 211])
@pytest.mark.parametrize("devices, block", [(8, 5), (8, 65536), (3, 16)])
def test_a_search_over_devices_is_the_flat_one_with_ties_and_padded_shards(tmp_path, count, devices, block):
    rng = np.random.default_rng(count)
    vectors, queries = whole(rng, count, 7), whole(rng, 23, 7)
    found = made(tmp_path, vectors, (0, count // 3) if count > 3 else (0,))
    mesh = search_mesh.Mesh(found, jax.devices()[:devices], block)
    for k in (1, 13):
        expected = by_hand(vectors, queries, k)
        assert np.array_equal(mesh.search(queries, k)[0], expected[0])
        assert np.array_equal(mesh.search(queries, k)[1], expected[1])


def test_the_approximate_selection_is_exact_where_it_does_not_approximate(tmp_path):
    rng = np.random.default_rng(0)
    vectors, queries = rng.permutation(211)[:, None].astype(np.float32), np.ones((3, 1), np.float32)  # no two are equal
    mesh = search_mesh.Mesh(made(tmp_path, vectors), block=16, approximate=True)
    expected = by_hand(vectors, queries, 13)
    assert np.array_equal(mesh.search(queries, 13)[0], expected[0])
    assert np.array_equal(mesh.search(queries, 13)[1], expected[1])


def test_the_vectors_lie_split_over_the_devices(tmp_path):
    found = made(tmp_path, whole(np.random.default_rng(0), 40, 7))
    assert {x.data.shape for x in search_mesh.Mesh(found).vectors.addressable_shards} == {(5, 7)}


@pytest.fixture(scope="module")
def clustered(tmp_path_factory):
    """Return a bank of vectors in clusters, and queries near to some."""
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(40, 32))
    vectors = fake_encoder.unit(centers[rng.integers(0, 40, 2000)] + 0.4 * rng.normal(size=(2000, 32)))
    queries = fake_encoder.unit(vectors[::100] + 0.05 * rng.normal(size=(20, 32))).astype(np.float32)
    return made(tmp_path_factory.mktemp("bank"), vectors, (0, 700)), queries


def test_a_search_over_devices_finds_among_real_numbers_what_the_flat_one_does(clustered):
    found, queries = clustered
    scores, ids = search_mesh.Mesh(found, block=100).search(queries, 10)
    exact = search.Flat(found).search(queries, 10)
    assert np.allclose(scores, exact[0], rtol=0, atol=1e-6)
    assert np.array_equal(ids, exact[1])  # the seed's scores lie further apart than rounding


@pytest.mark.parametrize("settings", [{"search": "ivf_pq", "lists": 16, "code_bytes": 8}, {"search": "hnsw"}])
def test_an_approximate_index_gives_the_scores_of_the_flat_one_and_nearly_its_documents(clustered, settings, capsys):
    found, queries = clustered
    settings = configs.Bank(**settings)
    search.build(found, settings)
    scores, ids = search.open(found, settings).search(queries, 10)
    exact = search.Flat(found).search(queries, 10)
    assert search.recall(ids, exact[1]) > 0.9
    products = np.einsum("qz,qkz->qk", queries, found.vectors(ids))
    assert np.allclose(scores, products, atol=1e-6)
    assert (np.diff(scores, axis=1) <= 0).all()
    line = search.measured(found, settings, queries)
    share = float(line.partition("finds ")[2].partition("%")[0])
    assert share == pytest.approx(100 * search.recall(ids, exact[1]), abs=0.06)


def test_an_index_of_another_bank_or_other_settings_is_refused_and_made_again(clustered, capsys):
    found, queries = clustered
    settings = configs.Bank(search="hnsw", links=16)
    search.build(found, settings)
    other = dataclasses.replace(settings, links=8)
    with pytest.raises(UserError, match=r"hnsw.faiss.*other settings"):
        search.open(found, other)
    search.build(found, other)
    assert search.open(found, other).search(queries, 3)[1].min() >= 0
    capsys.readouterr()
    search.build(found, other)
    assert not capsys.readouterr().out  # it is there


def test_a_missing_or_broken_index_is_a_clear_error(tmp_path):
    found = made(tmp_path, whole(np.random.default_rng(0), 40, 8))
    settings = configs.Bank(search="hnsw")
    with pytest.raises(UserError, match="missing or damaged.*retrieve build"):
        search.open(found, settings)
    search.build(found, settings, lambda line: None)
    search.path(found, settings).write_bytes(b"no index")
    with pytest.raises(UserError, match="missing or damaged.*retrieve build"):
        search.open(found, settings)


@pytest.mark.parametrize(
    "settings, message",
    [({"lists": 50}, "needs at least 256"), ({"code_bytes": 5}, "must divide the vectors' width, 8")],
)
def test_settings_that_do_not_fit_the_bank_are_refused(tmp_path, settings, message):
    found = made(tmp_path, whole(np.random.default_rng(0), 40, 8))
    with pytest.raises(UserError, match=message):
        search.build(found, configs.Bank(**{"search": "ivf_pq", "code_bytes": 4, **settings}))


def test_without_faiss_the_error_names_the_extra(clustered, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(UserError, match=r"pip install 'cm3jax\[retrieval\]'"):
        search.build(clustered[0], configs.Bank(search="ivf_pq", lists=7, code_bytes=8))


@pytest.mark.parametrize("shape, k, message", [((3, 6), 1, "have 8 numbers"), ((3, 8), 0, "count = 0")])
def test_queries_that_do_not_fit_are_refused(tmp_path, shape, k, message):
    found = made(tmp_path, whole(np.random.default_rng(0), 40, 8))
    with pytest.raises(UserError, match=message):
        search.Flat(found).search(np.zeros(shape, np.float32), k)
