"""The nearest documents of a bank by inner product (arXiv 2309.02591 §2.1): one interface, four ways.

    search.open(bank, settings).search(queries [q, size], k) -> scores float32 [q, k], ids int64 [q, k]

Scores fall; of equal ones the lower id comes first; -1 stands where the bank, or an approximate index, has no more.

- `flat` reads the memory-mapped vectors block by block, so that a bank larger than memory can be searched exactly. The
  product is BLAS's, as in faiss's own flat index, which would hold all vectors in memory as float32;
- `ivf_pq` and `hnsw` are faiss's, made once beside the bank. Of what they propose, more than k, the scores are taken
  anew from the bank's own vectors, so that every way gives a document the same score;
- `mesh` is `search_mesh`: the vectors lie in the memory of the accelerators.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32, Int64

from cm3jax import config as configs
from cm3jax.retrieval import bank as banks
from cm3jax.types import UserError

BLOCK = 65_536
"""Vectors looked at at one time: of 512 numbers, 128 MiB as float32."""
QUERIES = 256
"""Queries at one time: their scores with a block take 64 MiB."""
REFINE = 4
"""Candidates per document asked for whose scores are taken anew."""
REFINED = 400
"""Such candidates of ivf_pq at least, whose own order is rough: of 1M vectors 40 hold 0.71 of the ten nearest, 400 0.99
(RESULTS.md)."""
PER_LIST = 39
"""Vectors per cell that faiss wants to train on at least; more makes it slower and hardly better."""
HALF = 64
"""hnsw: candidates kept while the index is built, twice faiss's default of links."""
APPROXIMATE = ("ivf_pq", "hnsw")

Found = tuple[Float32[np.ndarray, "q k"], Int64[np.ndarray, "q k"]]


@runtime_checkable
class Searcher(Protocol):
    """What `open` returns."""

    def search(self, queries: Float[np.ndarray, "q z"], k: int) -> Found: ...


def open(bank: banks.Bank, settings: configs.Bank) -> Searcher:
    """Return the way to search that the settings name.

    Raises:
      UserError: if the index is not there, belongs to another bank, or faiss is not installed.
    """
    if settings.search == "flat":
        return Flat(bank)
    if settings.search == "mesh":
        from cm3jax.retrieval import search_mesh

        return search_mesh.Mesh(bank)
    return Approximate(bank, read(bank, settings), settings)


# ---------------------------------------------------------------------------------------------------------------- exact


@dataclasses.dataclass(frozen=True)
class Flat:
    """Every vector is looked at."""

    bank: banks.Bank

    def search(self, queries: Float[np.ndarray, "q z"], k: int) -> Found:
        check(self.bank, queries, k)
        rows = [self._some(queries[at : at + QUERIES], k) for at in range(0, len(queries), QUERIES)]
        return joined(rows, k)

    def _some(self, queries: np.ndarray, k: int) -> Found:
        queries = np.asarray(queries, np.float32)
        best = filled(np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64), k)
        for first, block in self.bank.blocks(BLOCK):
            scores = queries @ block.astype(np.float32).T
            row, at = better(scores, best[0][:, -1:], k)
            best = merged(best, row, scores[row, at], at + first)
        return best


def better(scores: Float32[np.ndarray, "q n"], worst: Float32[np.ndarray, "q 1"], k: int):
    """Return row and column of the scores that may be among the k best, given the worst of those found before."""
    if np.isneginf(worst).any() and scores.shape[1] > k:  # nothing to hold against them yet
        return np.nonzero(scores >= np.partition(scores, -k, 1)[:, -k, None])
    return np.nonzero(scores > worst)  # an equal one has the higher id


def merged(best: Found, row: np.ndarray, scores: np.ndarray, ids: np.ndarray) -> Found:
    """Return the best of each row from those found before and more of some rows."""
    count, k = best[0].shape
    row = np.concatenate([np.repeat(np.arange(count), k), row])
    scores, ids = np.concatenate([best[0].ravel(), scores]), np.concatenate([best[1].ravel(), ids])
    order = np.lexsort((ids, -scores, row))
    first = np.searchsorted(row[order], np.arange(count))[:, None]
    chosen = order[first + np.arange(k)]
    return scores[chosen], ids[chosen]


def check(bank: banks.Bank, queries: np.ndarray, k: int) -> None:
    if k < 1:
        raise UserError(f"count = {k}: must be at least 1")
    if queries.ndim != 2 or queries.shape[1] != bank.size:
        raise UserError(
            f"queries of shape {queries.shape}: the vectors of {str(bank.folder)!r} have {bank.size} numbers"
        )


def take(scores: Float32[np.ndarray, "q n"], ids: Int64[np.ndarray, "q n"], k: int) -> Found:
    """Return the k best of each row, by score and then by id."""
    order = np.lexsort((ids, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)


def filled(scores: np.ndarray, ids: np.ndarray, k: int) -> Found:
    """Return rows of k entries: score -inf and id -1 where there are fewer."""
    more = ((0, 0), (0, k - scores.shape[1]))
    return np.pad(scores, more, constant_values=-np.inf), np.pad(ids, more, constant_values=-1)


def joined(rows: list, k: int) -> Found:
    """Return the answers to several batches of queries as one."""
    empty = np.zeros((0, k), np.float32), np.zeros((0, k), np.int64)
    return tuple(np.concatenate(x) for x in zip(empty, *rows, strict=True))


# ---------------------------------------------------------------------------------------------------------- approximate


@dataclasses.dataclass(frozen=True)
class Approximate:
    """A faiss index proposes, the bank's own vectors decide."""

    bank: banks.Bank
    index: Any
    settings: configs.Bank

    def search(self, queries: Float[np.ndarray, "q z"], k: int) -> Found:
        check(self.bank, queries, k)
        rows = [self._some(queries[at : at + QUERIES], k) for at in range(0, len(queries), QUERIES)]
        return joined(rows, k)

    def _some(self, queries: np.ndarray, k: int) -> Found:
        queries = np.ascontiguousarray(queries, np.float32)
        count = min(proposed(self.settings, k), len(self.bank))
        _, ids = self.index.search(queries, count, params=parameters(self.settings, k))
        scores = np.einsum("qd,qnd->qn", queries, self.bank.vectors(ids))
        return filled(*take(np.where(ids < 0, np.float32(-np.inf), scores), ids, k), k)


def faiss():
    """Return the faiss module.

    Raises:
      UserError: if it is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise UserError(
            "bank.search: ivf_pq and hnsw need faiss: pip install 'cm3jax[retrieval]', or take flat or mesh"
        ) from None
    return faiss


def proposed(settings: configs.Bank, k: int) -> int:
    """Return how many candidates for k documents have their scores taken anew."""
    return max(REFINE * k, REFINED if settings.search == "ivf_pq" else 0)


def parameters(settings: configs.Bank, k: int):
    """Return faiss's parameters of one search."""
    if settings.search == "ivf_pq":
        return faiss().SearchParametersIVF(nprobe=settings.probes)
    return faiss().SearchParametersHNSW(efSearch=max(settings.breadth, proposed(settings, k)))


def path(bank: banks.Bank, settings: configs.Bank) -> pathlib.Path:
    return bank.folder / f"{settings.search}.faiss"


def identity(bank: banks.Bank, settings: configs.Bank) -> str:
    """Return 16 hex digits of all that an index is made of."""
    names = {"ivf_pq": ("search", "lists", "code_bytes"), "hnsw": ("search", "links")}[settings.search]
    return configs.digest(banks.fingerprint(bank), [getattr(settings, name) for name in names])


def read(bank: banks.Bank, settings: configs.Bank) -> Any:
    """Return the faiss index beside a bank.

    Raises:
      UserError: if there is none, or it was made of another bank or with other settings.
    """
    file = path(bank, settings)
    try:
        made = file.with_suffix(".txt").read_text().strip()
        if made != identity(bank, settings):
            raise UserError(
                f"{str(file)!r}: made of another bank, or with other settings; cm3jax retrieve build makes it"
            )
        return faiss().read_index(str(file))
    except (OSError, RuntimeError) as e:
        text = " ".join(str(e).split())[-100:]
        raise UserError(
            f"{str(file)!r}: missing or damaged ({text}); make it with: cm3jax retrieve build RUN"
        ) from None


def build(bank: banks.Bank, settings: configs.Bank, say: Callable[[str], Any] = print) -> None:
    """Make the faiss index that the settings name, beside the bank; nothing if it is there."""
    file, made = path(bank, settings), identity(bank, settings)
    if file.is_file() and file.with_suffix(".txt").is_file() and file.with_suffix(".txt").read_text().strip() == made:
        return
    file.with_suffix(".txt").unlink(missing_ok=True)
    start = time.monotonic()
    index = empty(bank, settings)
    for _, block in bank.blocks(BLOCK):
        index.add(block.astype(np.float32))
    partial = file.with_suffix(".partial")
    faiss().write_index(index, str(partial))
    partial.replace(file)
    file.with_suffix(".txt").write_text(made + "\n")
    size, seconds = file.stat().st_size / 2**20, time.monotonic() - start
    say(f"bank: {settings.search} index of {len(bank):,} vectors, {size:,.1f} MiB, made in {seconds:.1f} s")


def empty(bank: banks.Bank, settings: configs.Bank) -> Any:
    """Return a trained faiss index with nothing in it yet.

    Raises:
      UserError: if the settings do not fit the vectors.
    """
    library = faiss()
    inner = library.METRIC_INNER_PRODUCT
    if settings.search == "hnsw":
        index = library.IndexHNSWSQ(bank.size, library.ScalarQuantizer.QT_fp16, settings.links, inner)
        index.hnsw.efConstruction = HALF
        index.is_trained = True  # fp16 has nothing to learn
        return index
    if bank.size % settings.code_bytes:
        raise UserError(f"bank.code_bytes = {settings.code_bytes}: must divide the vectors' width, {bank.size}")
    lists = settings.lists or max(1, round(4 * len(bank) ** 0.5))
    if len(bank) < max(lists, LEAST):
        raise UserError(
            f"bank of {len(bank):,} documents: ivf_pq needs at least {max(lists, LEAST)} to learn {lists} cells and"
            " 256 codes from; take flat"
        )
    name = f"IVF{lists},PQ{settings.code_bytes}np"  # np: nothing here asks for codes in an order for Hamming distances
    index = library.index_factory(bank.size, name, inner)
    index.train(sample(bank, max(PER_LIST * lists, 256 * PER_LIST)))
    return index


LEAST = 256
"""Vectors that a product quantizer of 8 bits learns from at least."""


def sample(bank: banks.Bank, count: int) -> Float32[np.ndarray, "n z"]:
    """Return evenly spread vectors of the bank, at most `count`."""
    return bank.vectors(np.unique(np.linspace(0, len(bank) - 1, min(count, len(bank))).astype(np.int64)))


def recall(found: Int64[np.ndarray, "q k"], exact: Int64[np.ndarray, "q k"]) -> float:
    """Return the share of the exactly nearest documents that were found."""
    hits = sum(len(set(a[a >= 0]) & set(b[b >= 0])) for a, b in zip(found, exact, strict=True))
    return hits / max(int((exact >= 0).sum()), 1)


def measured(bank: banks.Bank, settings: configs.Bank, queries: Float[np.ndarray, "q z"], k: int = 10) -> str:
    """Return a line with the recall and the speed of an approximate index, against looking at every vector."""
    exact, start = Flat(bank).search(queries, k)[1], time.monotonic()
    between = open(bank, settings)
    opened = time.monotonic()
    found = between.search(queries, k)[1]
    rate = len(queries) / (time.monotonic() - opened)
    return (
        f"bank: {settings.search} finds {recall(found, exact):.1%} of the {k} nearest of {len(queries)} queries,"
        f" {rate:,.0f} queries a second (opened in {opened - start:.1f} s)"
    )
