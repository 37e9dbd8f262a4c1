"""Fixed places: positions of a document's tokens that do not depend on the length of its caption (ours).

A picture's codes take the last positions of the row's table, the same in every document; everything else counts without
them. What is masked leaves its place free: the codes behind a gap keep theirs, and a moved span has the positions from
which it came, so that filling in is drawing or writing at the same positions as ever. (DALL-E, arXiv 2102.12092 §2.2,
gives its codes rows and columns of their own.) Pictures of retrieved documents take the places before, each its own,
the one that stands nearest to the query the nearest: so the query's picture has its place whatever is retrieved, and
the same place of a retrieved picture is always as far away. Numpy only; imports no jax.
"""

import numpy as np

from cm3jax.vocab import BREAK, EOD, Vocab


def hidden(ids: np.ndarray, spans: np.ndarray, vocab: Vocab) -> np.ndarray:
    """Return how many codes each span [n, 2] of an unmasked row takes away, int64 [n]; 0 for text."""
    return np.where(vocab.is_image(ids[spans[:, 0]]), spans[:, 1] - spans[:, 0], 0)


def places(
    ids: np.ndarray,
    hidden,
    vocab: Vocab,
    first: int,
    segments: np.ndarray | None = None,
    retrieved: np.ndarray | None = None,
    picture: int = 0,
) -> np.ndarray:
    """Return the position of each id of a masked row, or of a beginning of one, int32 [t].

    Args:
      ids: [t] without padding; pictures are whole but for what the spans took.
      hidden: The codes behind each sentinel that stands in its place.
      first: Position of a picture's first code.
      segments: [t] of several documents: the count begins anew with each. None: one document.
      retrieved: bool [t], tokens of retrieved documents, which stand before others of their document. None: none is.
      picture: Codes of a picture; needed if some are retrieved.
    """
    at = np.flatnonzero(vocab.is_sentinel(ids))
    n = len(hidden)
    body = ids[: at[n]] if len(at) > n else ids
    codes = vocab.is_image(body).astype(int)
    codes[at[:n]] = hidden
    seen, place = np.cumsum(codes), np.zeros(len(ids), np.int32)
    closed = np.maximum.accumulate(np.where((body == BREAK) | (body == EOD), seen, 0))  # codes of earlier pictures
    gap = vocab.is_sentinel(body)  # stands where the token before the first missing code would
    in_picture = first + seen - closed - codes - gap
    if retrieved is not None:
        in_picture -= picture * ahead(codes > 0, retrieved[: len(body)])
    others = np.cumsum(codes == 0)
    begin = 0
    if segments is not None:
        opens = np.diff(segments[: len(body)], prepend=-1) != 0
        begin = np.maximum.accumulate(np.where(opens, others - (codes == 0), 0))
    place[: len(body)] = np.where(codes > 0, in_picture, others - 1 - begin)
    for there, here, end in zip(at[:n], at[n:], [*at[n + 1 :], len(ids)], strict=False):
        place[here:end] = place[there] + np.arange(end - here)
    return place


def ahead(drawn: np.ndarray, retrieved: np.ndarray) -> np.ndarray:
    """Return for each token of a retrieved picture how many pictures, it included, come before the query; else 0.

    Args:
      drawn, retrieved: bool [t], tokens of pictures, and of retrieved documents, those of one query in a row.
    """
    drawn = drawn & retrieved
    begins = np.cumsum(drawn & ~np.concatenate([[False], drawn])[:-1])
    last = np.flatnonzero(retrieved & ~np.concatenate([retrieved, [False]])[1:])
    at = np.flatnonzero(drawn)
    out = np.zeros(len(drawn), int)
    out[at] = begins[last[np.searchsorted(last, at)]] - begins[at] + 1
    return out


def following(ids: np.ndarray, place: np.ndarray, hidden, vocab: Vocab, first: int) -> tuple[int, int]:
    """Return the positions of what comes after a prompt: of the next token if it is none of a picture, and if it is."""
    at = np.flatnonzero(vocab.is_sentinel(ids))
    n = len(hidden)
    if len(at) > n:  # a moved span goes on
        return int(place[-1]) + 1, int(place[-1]) + 1
    others = ~vocab.is_image(ids)
    others[at] = np.asarray(hidden) == 0
    drawing = bool(vocab.is_image(ids[-1]))
    return int(place[others].max(initial=-1)) + 1, int(place[-1]) + 1 if drawing else first
