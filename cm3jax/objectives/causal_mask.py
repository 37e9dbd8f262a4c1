"""The CM3 objective's mask: spans move to the end of the row (arXiv 2309.02591 §2.2, arXiv 2201.07520).

    [eod] a red circle <break> IMG [eod]   ->   [eod] a <sentinel:0> <break> IMG [eod] <sentinel:0> red circle <eoss>

Numpy only; imports no jax.
"""

import numpy as np

from cm3jax.config import Mask
from cm3jax.vocab import EOSS, Vocab

MARKERS = 3  # tokens that one span adds: its sentinel twice, and <eoss>


def spans(ids: np.ndarray, vocab: Vocab, mask: Mask, rng: np.random.Generator, most: int | None = None) -> np.ndarray:
    """Draw the spans to move: disjoint, sorted, none across a <break> or [eod], none at position 0.

    The number is n = min(Poisson(mask.spans), sentinels - 1, most). A share `mask.rotate` of the blocks with n >= 1
    masks n whole stretches between breaks (of these a share `mask.captions` exactly one, of text); the others draw
    spans over the whole block, each then clipped to the stretch that it overlaps most. Fewer than n may be left.

    Args:
      ids: [L] one block, not masked, no padding.

    Returns:
      int64 [n, 2] of (start, end), end not included.
    """
    n = min(int(rng.poisson(mask.spans)), vocab.sentinels - 1 if most is None else min(most, vocab.sentinels - 1))
    if n == 0:
        return np.zeros((0, 2), np.int64)
    found = stretches(ids)
    if rng.random() < mask.rotate:
        if mask.captions and rng.random() < mask.captions:
            texts = found[vocab.is_text(ids[found[:, 0]])]
            return texts[rng.permutation(len(texts))[:1]]
        return found[np.sort(rng.permutation(len(found))[:n])]
    return clip(draw(len(ids), n, rng), found)


def stretches(ids: np.ndarray) -> np.ndarray:
    """Return int64 [k, 2]: the runs of text and codes between <break>s and [eod]s, after position 0."""
    inside = np.zeros(len(ids) + 1, np.int8)
    inside[1:-1] = ids[1:] > EOSS  # all specials are below: see vocab
    edges = np.flatnonzero(inside[1:] != inside[:-1]) + 1
    return edges.reshape(-1, 2)


def draw(length: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw at most n disjoint non-empty spans of a block of `length` tokens: int64 [k, 2], in order.

    One span: two sorted uniforms. More: n * n candidate pairs, of which those that meet no earlier one are kept.
    """
    u = np.sort(rng.random((1 if n == 1 else n * n, 2)), axis=1) * length
    kept: list[tuple[int, int]] = []
    candidates = np.stack([np.maximum(1, u[:, 0].astype(int)), (u[:, 1] + 0.5).astype(int)], axis=1)
    for start, end in candidates.tolist():
        if start < end and all(end <= a or b <= start for a, b in kept):
            kept.append((start, end))
            if len(kept) == n:
                break
    return np.array(sorted(kept), np.int64).reshape(-1, 2)


def clip(drawn: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Cut each span to the one stretch that it overlaps most (the first of equals); without overlap it goes."""
    if not len(drawn) or not len(found):
        return np.zeros((0, 2), np.int64)
    start = np.maximum(drawn[:, None, 0], found[None, :, 0])
    end = np.minimum(drawn[:, None, 1], found[None, :, 1])
    best = (np.arange(len(drawn)), (end - start).argmax(axis=1))
    cut = np.stack([start[best], end[best]], axis=1)
    return cut[cut[:, 0] < cut[:, 1]]


def fit(drawn: np.ndarray, length: int, room: int) -> tuple[np.ndarray, int]:
    """Return (spans, tokens of the block that stay) such that the masked block fits into `room` tokens.

    Where the block has no room for the markers its tail gives way: with n spans the first room - 3n tokens stay.
    A span that begins in the cut tail goes, one that ends in it is shortened; what goes makes room again, so this
    takes the most spans for which it comes out even.
    """
    n = len(drawn)
    while n and drawn[n - 1, 0] >= room - MARKERS * n:
        n -= 1
    keep = min(length, room - MARKERS * n)
    return np.minimum(drawn[:n], keep), keep


def layout(spans: np.ndarray, keep: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return where each token of the masked block comes from.

    Returns:
      source: int64 [t] index into the block; a marker's is the first token of its span.
      moved: int64 [t], the length of its span for a token of a moved span, 0 for others and for markers.
      marker: int64 [t]: -1 for none, 2i for <sentinel:i>, 2i + 1 for the <eoss> of span i.
    """
    place, tail = [], []
    at = 0
    for i, (start, end) in enumerate(spans.tolist()):
        place += [(at, start, -1, 0), (start, start + 1, 2 * i, 0)]
        tail += [(start, start + 1, 2 * i, 0), (start, end, -1, end - start), (start, start + 1, 2 * i + 1, 0)]
        at = end
    pieces = [*place, (at, keep, -1, 0), *tail]
    sizes = [end - start for start, end, _, _ in pieces]
    source = np.concatenate([np.arange(start, end) for start, end, _, _ in pieces])
    return source, np.repeat([p[3] for p in pieces], sizes), np.repeat([p[2] for p in pieces], sizes)


def mask(ids: np.ndarray, spans: np.ndarray, vocab: Vocab, room: int | None = None) -> np.ndarray:
    """Return the masked block: `<sentinel:i>` for span i, at the end `<sentinel:i> span <eoss>` for each.

    Args:
      ids: [L] block without padding.
      spans: [n, 2] from `spans`.
      room: Tokens that the result may have; the block's tail gives way (see `fit`). None: as many as it takes.
    """
    spans, keep = fit(spans, len(ids), len(ids) + MARKERS * len(spans) if room is None else room)
    source, _, marker = layout(spans, keep)
    return with_markers(ids[source], marker, marker // 2, vocab)


def with_markers(ids: np.ndarray, marker: np.ndarray, number: np.ndarray, vocab: Vocab) -> np.ndarray:
    """Return `ids` [t] with the markers of `layout` written in; `number` [t] is the sentinel number of each."""
    out, at = ids.copy(), np.flatnonzero(marker >= 0)
    out[at] = np.where(marker[at] % 2, EOSS, vocab.sentinel_start + number[at])
    return out


def unmask(ids: np.ndarray, vocab: Vocab) -> np.ndarray:
    """Undo `mask`: return the block, or with a cut tail the part of it that stayed. Padding at the end is dropped.

    Raises:
      ValueError: if the markers do not pair up.
    """
    ids = np.trim_zeros(ids, "b")  # PAD is 0
    at = np.flatnonzero(vocab.is_sentinel(ids))
    ends = np.flatnonzero(ids == EOSS)
    n = len(ends)
    if len(at) != 2 * n or not np.array_equal(ids[at[:n]], ids[at[n:]]):
        raise ValueError(f"{len(at)} sentinels and {n} <eoss>: not a masked row")
    if n == 0:
        return ids
    body, pieces, last = ids[: at[n]], [], 0
    for place, start, end in zip(at[:n], at[n:], ends, strict=True):
        pieces += [body[last:place], ids[start + 1 : end]]
        last = place + 1
    return np.concatenate([*pieces, body[last:]])
