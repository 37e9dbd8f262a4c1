"""Planned packing: which documents stand in which row of which epoch, and the row's arrays.

Packing is planned, not streamed: row r of epoch e follows from (seed, e, lengths, packing) alone, so it is the same
for any number of hosts and workers, and step s is read by random access. Imports no jax.
"""

import dataclasses
import zlib

import numpy as np

from cm3jax.config import Mask, Packing
from cm3jax.data.tokens import Tokens
from cm3jax.objectives import causal_mask, places
from cm3jax.types import UserError
from cm3jax.vocab import EOD, PAD, Vocab

TEXT, IMAGE, INFILL, OTHER = range(4)
"""Modality of a target: text, image code, text or code of a moved span, anything else."""

RETRIEVED = 4
"""Added to the modality of a target that belongs to a retrieved document."""

Row = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""A masked row: ids [t], segments [t], the length of the moved span that each token is of [t], 0 for none, the codes of
each span [n], the part that each token has in its document [t]: `OWN`, `SHOWN`, `CONTEXT` or `END`."""

PLAIN = Mask()
"""All tokens weigh the same."""

OWN, SHOWN, CONTEXT, END = range(4)
"""Parts: a document's own token, one of a document retrieved for it, what stands around an answer that is asked for,
the last two tokens of such an answer that is moved."""

EMPTY: Row = tuple(np.zeros(0, kind) for kind in (np.uint16, np.int32, np.int64, np.int64, np.int8))
"""A row of padding."""


def stream(seed: int, name: str, epoch: int, row: int = 0, start: int = 0) -> np.random.Generator:
    """Return the random stream of (seed, name, epoch, row), from its 4 `start`-th number on.

    Streams are counters far apart in one Philox sequence, which gives four numbers at one count.
    """
    key = np.array([seed % 2**64, zlib.crc32(name.encode())], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([start, 0, row, epoch], np.uint64)))


# ---------------------------------------------------------------------------------------------------------------- plan


@dataclasses.dataclass(frozen=True)
class Plan:
    """The rows of one epoch: row r holds documents[first[r]:end[r]].

    Attributes:
      documents: int64 [m] document ids in row order.
      first, end: int64 [rows].
      skip: int64 [rows], chop only: framed tokens of the first document that stand in an earlier row.
      too_long: Documents left out because no row holds them (whole).
    """

    documents: np.ndarray
    first: np.ndarray
    end: np.ndarray
    skip: np.ndarray
    too_long: int = 0

    def __len__(self) -> int:
        return len(self.first)

    def row(self, r: int) -> tuple[np.ndarray, int]:
        """Return the documents of row r, and how much of the first one to skip."""
        return self.documents[self.first[r] : self.end[r]], int(self.skip[r])


def frame(packing: Packing) -> int:
    """Return the tokens that each document costs: `[eod] doc [eod]`, or the plain stream's one separator.

    The first one is `packing.opening`, which is [eod] but for documents of another form.
    """
    return 2 if packing.kind == "whole" or packing.isolate else 1


def plan(lengths: np.ndarray, seed: int, epoch: int, packing: Packing, mix=None) -> Plan:
    """Return the rows of one epoch over documents of `lengths` [n] (ids without [eod]s).

    Args:
      mix: `mixing.Mix`, which says how often each document is used in this epoch; None: at most once.

    Raises:
      UserError: if no row can be filled.
    """
    order = mix.order(seed, epoch) if mix else stream(seed, "order", epoch).permutation(len(lengths))
    sizes = np.asarray(lengths, np.int64)[order] + frame(packing)
    return (
        plan_whole(order, sizes, seed, epoch, packing) if packing.kind == "whole" else plan_chop(order, sizes, packing)
    )


def plan_chop(order: np.ndarray, sizes: np.ndarray, packing: Packing) -> Plan:
    """Cut the documents, end to end in `order`, into rows; what is left at the end of the epoch is not used."""
    ends = np.cumsum(sizes)
    total = int(sizes.sum()) + (frame(packing) == 1)  # the stream's last [eod]
    if packing.length < 8 or total < packing.length:
        raise UserError(
            f"packing.length = {packing.length}: must be 8 to {total}, the tokens of the data; lower it or add data"
        )
    begin = np.arange(total // packing.length) * packing.length
    first = np.searchsorted(ends, begin, "right")
    end = np.minimum(np.searchsorted(ends, begin + packing.length, "left") + 1, len(order))
    return Plan(order, first, end, begin - (ends - sizes)[first])


def plan_whole(order: np.ndarray, sizes: np.ndarray, seed: int, epoch: int, packing: Packing) -> Plan:
    """Fill rows with uncut documents up to what leaves room for the markers; row order is shuffled.

    Rows that opened early are fuller than the last ones, hence the second shuffle.
    """
    room = packing.length - causal_mask.MARKERS * packing.most_spans
    fits = sizes <= room
    if not fits.any():
        raise UserError(
            f"packing.length = {packing.length}: no document fits, the shortest takes {sizes.min(initial=2**31)} tokens"
            f" and {packing.length - room} for the mask's markers; raise it, or use packing.kind chop"
        )
    order, sizes = order[fits], sizes[fits]
    row_of = best_fit(sizes, room, packing.documents)
    rows = int(row_of.max()) + 1
    row_of = stream(seed, "rows", epoch).permutation(rows)[row_of]
    ends = np.cumsum(np.bincount(row_of, minlength=rows))
    documents = order[np.argsort(row_of, kind="stable")]
    first = np.concatenate([[0], ends[:-1]])
    return Plan(documents, first, ends, np.zeros(rows, np.int64), int((~fits).sum()))


def best_fit(sizes: np.ndarray, room: int, most: int) -> np.ndarray:
    """Return the row of each size, int64 [n]: the open row that it fills best, else a new one.

    About a microsecond per document: the open rows lie in stacks by their free tokens, and the smallest stack that is
    large enough is the lowest bit of one int.

    Args:
      room: Tokens of a row.
      most: Documents of a row at most; 0: as many as fit.
    """
    if most == 1:
        return np.arange(len(sizes))
    smallest = int(sizes.min())
    stacks: list[list[int]] = [[] for _ in range(room + 1)]
    filled, row_of, rows, available = {}, [], 0, 0
    for size in sizes.tolist():
        above = available >> size
        if above:
            free = (above & -above).bit_length() - 1 + size
            stack = stacks[free]
            row = stack.pop()
            if not stack:
                available ^= 1 << free
        else:
            free, row, rows = room, rows, rows + 1
        row_of.append(row)
        free -= size
        if most:
            filled[row] = filled.get(row, 0) + 1
        if free >= smallest and not (most and filled[row] == most):
            stacks[free].append(row)
            available |= 1 << free
    return np.array(row_of)


# ----------------------------------------------------------------------------------------------------------------- row


def read(plan: Plan, r: int, tokens: Tokens, packing: Packing) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return row r before masking, without padding.

    Args:
      tokens: As the plan's epoch shows them (`Tokens.at`).

    Returns:
      ids: uint16 [t], t <= packing.length.
      document: int32 [t], 1, 2, ... within the row; a document and what was retrieved for it are one.
      retrieved: bool [t], tokens of retrieved documents, with the <break> behind each.
    """
    documents, skip = plan.row(r)
    opening, eod, none = np.array([packing.opening], np.uint16), np.array([EOD], np.uint16), np.zeros(0, np.uint16)
    closing, pieces, sizes, left = eod if frame(packing) == 2 else none, [], [], packing.length
    retrieved = np.zeros(packing.length, bool)
    for i in documents.tolist():
        body = tokens.read(i, max(0, skip - 1), skip - 1 + left)
        piece = [none if skip else opening, body, closing]
        pieces += piece
        first = packing.length - left
        retrieved[first + (not skip) : first + max(0, tokens.before(i) + 1 - skip)] = True
        sizes.append(min(left, sum(map(len, piece))))
        left, skip = left - sizes[-1], 0
    if left and packing.kind == "chop":
        pieces.append(eod)  # the last row of an epoch may end with the stream's last separator
        sizes[-1] += 1
    ids = np.concatenate(pieces)[: packing.length]
    return ids, np.repeat(np.arange(1, len(sizes) + 1, dtype=np.int32), sizes), retrieved[: len(ids)]


def draw_spans(ids: np.ndarray, vocab: Vocab, mask: Mask, packing: Packing, rng: np.random.Generator) -> np.ndarray:
    """Return the spans to move in a row, [n, 2], as `causal_mask.spans` draws them and the packing has room for."""
    return causal_mask.spans(ids, vocab, mask, rng, packing.most_spans if packing.kind == "whole" else None)


def answers(plan: Plan, r: int, tokens: Tokens, packing: Packing) -> dict[int, np.ndarray]:
    """Return where in row r the answers of its whole documents stand, of those that have any.

    Returns:
      {number of the document, as `read` counts: int64 [k, 2]}; without an answer that ends its document, which is
      what comes after all else already: its prompt is the document before it.
    """
    documents, skip = plan.row(r)
    found, at = {}, 0
    for number, i in enumerate(documents.tolist(), 1):
        length, spans = int(tokens.lengths[i]), tokens.answers(i)
        if len(spans) and not skip and at + length + 2 <= packing.length:
            found[number] = spans[spans[:, 1] < length] + at + 1
        at, skip = at + length + frame(packing) - skip, 0
    return found


def with_answers(
    spans: np.ndarray,
    document: np.ndarray,
    found: dict[int, np.ndarray],
    vocab: Vocab,
    mask: Mask,
    packing: Packing,
    rng: np.random.Generator,
) -> np.ndarray:
    """Return the spans to move in a row where a share `mask.answers` of the documents masks exactly its answers.

    The others keep the spans that the CM3 law drew for them. Where a row has no room for the markers of all, documents
    further back keep theirs, and those give way.

    Args:
      spans: From `draw_spans`.
      document: As from `read`.
      found: From `answers`.
    """
    most = min(packing.most_spans, vocab.sentinels - 1) if packing.kind == "whole" else vocab.sentinels - 1
    chosen, count = {}, 0
    for (number, own), u in zip(found.items(), rng.random(len(found)), strict=True):
        if u < mask.answers and count + len(own) <= most:
            chosen[number], count = own, count + len(own)
    others = spans[~np.isin(document[spans[:, 0]], list(chosen))][: most - count]
    together = np.concatenate([others, *chosen.values()])
    return together[np.argsort(together[:, 0], kind="stable")]


def context(
    plan: Plan, r: int, tokens: Tokens, document: np.ndarray, spans: np.ndarray, asked: dict[int, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Return what stands around the answers of the documents in row r that mask exactly these, and their last two
    tokens where they are moved, bool [t] each.

    The [eod] behind a document ends what was asked for, and is not among them.

    Args:
      document: As from `read`.
      spans: What is moved.
      asked: From `answers`.
    """
    documents, _ = plan.row(r)
    found, ends, of_spans = np.zeros(len(document), bool), np.zeros(len(document), bool), document[spans[:, 0]]
    for number, own in asked.items():
        if np.array_equal(spans[of_spans == number], own):
            i, start = int(documents[number - 1]), int(np.searchsorted(document, number))
            found[start : start + 1 + int(tokens.lengths[i])] = True
            for first, end in tokens.answers(i) + start + 1:
                found[first:end] = False
            for first, end in own:
                ends[max(first, end - 2) : end] = True
    return found, ends


def unmasked(
    plan: Plan,
    r: int,
    tokens: Tokens,
    vocab: Vocab,
    mask: Mask,
    packing: Packing,
    seed: int,
    names: tuple[str, str],
    epoch: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return row r before masking: ids [t], document [t], spans to move [n, 2], part of each token [t].

    The spans are those of the CM3 law, and in a share `mask.answers` of the documents exactly the answers.

    Args:
      names: Of the random streams, of the law and of who masks its answers.
    """
    ids, document, retrieved = read(plan, r, tokens, packing)
    spans = draw_spans(ids, vocab, mask, packing, stream(seed, names[0], epoch, r))
    part = np.where(retrieved, np.int8(SHOWN), np.int8(OWN))
    apart = mask.context_weight != 1 or mask.end_weight > 0
    if not mask.answers and not apart:
        return ids, document, spans, part
    asked = answers(plan, r, tokens, packing)
    if mask.answers:
        spans = with_answers(spans, document, asked, vocab, mask, packing, stream(seed, names[1], epoch, r))
    if apart:
        around, ends = context(plan, r, tokens, document, spans, asked)
        part[around & ~retrieved], part[ends & vocab.is_text(ids)] = CONTEXT, END
    return ids, document, spans, part


def masked(
    ids: np.ndarray,
    document: np.ndarray,
    spans: np.ndarray,
    vocab: Vocab,
    packing: Packing,
    part: np.ndarray | None = None,
) -> Row:
    """Move the spans of a row.

    With `isolate` a moved span, markers included, takes the segment of the document that it left, and sentinel
    numbers count per document.

    Args:
      part: As from `unmasked`; None: all is `OWN`.

    Returns:
      ids: uint16 [t]; segments: int32 [t]; moved: int64 [t], the length of its moved span, 0 for other tokens; hidden:
      int64 [n], codes of each; part: int8 [t], of moved spans too, markers included.
    """
    spans, keep = causal_mask.fit(spans, len(ids), packing.length)
    segments = document if packing.isolate else np.ones_like(document)
    part = np.full(len(ids), OWN, np.int8) if part is None else part
    if not len(spans):
        return ids, segments, np.zeros(len(ids), np.int64), np.zeros(0, np.int64), part
    source, moved, marker = causal_mask.layout(spans, keep)
    number = np.arange(len(spans))
    if packing.isolate:
        owner = document[spans[:, 0]]
        number -= np.searchsorted(owner, owner)
    out = causal_mask.with_markers(ids[source], marker, number[marker // 2], vocab)
    return out, segments[source], moved, places.hidden(ids, spans, vocab), part[source]


def arrays(
    rows: list[Row], vocab: Vocab, packing: Packing, mask: Mask = PLAIN, retrieved_weight: float = 1.0
) -> dict[str, np.ndarray]:
    """Return a batch from the rows that `masked` gave.

    Args:
      mask: Its `span_weight`, `end_weight` and `context_weight`.
      retrieved_weight: Of targets that belong to retrieved documents.

    Returns:
      inputs: int32 [b, t] ids, t = packing.length; padding is <pad>.
      targets: int32 [b, t], the next token of the same segment; <pad> where there is none.
      weights: float32 [b, t], 1 where there is a target, else 0; all tokens weigh the same (arXiv 2309.02591 §2.2)
        unless `retrieved_weight` or the mask say otherwise.
      positions: int32 [b, t] from 0; with isolate they count from each document's start and go on in its moved spans.
        With packing.picture they are fixed places (`objectives.places`).
      segments: int32 [b, t], 0 for padding, else 1, or with isolate 1, 2, ... by document.
      modality: int8 [b, t] of the target: TEXT 0, IMAGE 1, INFILL 2 (text or code of a moved span), OTHER 3; RETRIEVED,
        4, more in a retrieved document.
    """
    shape = (len(rows), packing.length)
    ids, segments, moved = np.full(shape, PAD, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.int64)
    part = np.full(shape, OWN, np.int8)
    for i, (row_ids, row_segments, row_moved, _, row_part) in enumerate(rows):
        n = len(row_ids)
        ids[i, :n], segments[i, :n], moved[i, :n], part[i, :n] = row_ids, row_segments, row_moved, row_part
    positions, following = order(segments, packing.isolate)
    if packing.picture:
        for place, (row_ids, row_segments, _, hidden, row_part) in zip(positions, rows, strict=True):
            first = packing.length - packing.picture
            place[: len(row_ids)] = places.places(
                row_ids, hidden, vocab, first, row_segments, row_part == SHOWN, packing.picture
            )
    has_target = following >= 0
    targets = np.where(has_target, np.take_along_axis(ids, following, 1), PAD).astype(np.int32)
    kind = modality(ids, moved > 0, vocab) + np.int8(RETRIEVED) * (part == SHOWN)
    kind = np.where(has_target, np.take_along_axis(kind, following, 1), OTHER).astype(np.int8)
    weights = np.where(kind >= RETRIEVED, retrieved_weight, has_target)
    length = np.take_along_axis(moved, following, 1)
    weights = weights * np.where(length > 0, np.maximum(1, mask.span_weight / np.maximum(1, length)), 1)
    part = np.take_along_axis(part, following, 1)
    final = (part == END) & (length > 0)  # a span's markers have the part of a token of it
    weights = np.where(final, np.maximum(weights, mask.end_weight), weights)
    weights = weights * np.where(part == CONTEXT, mask.context_weight, 1)
    return {
        "inputs": ids,
        "targets": targets,
        "weights": weights.astype(np.float32),
        "positions": positions,
        "segments": segments,
        "modality": kind,
    }


def order(segments: np.ndarray, isolate: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return each token's position in its segment, and the index of the segment's next token (-1: none), [b, t]."""
    b, t = segments.shape
    place = np.broadcast_to(np.arange(t, dtype=np.int32), (b, t))
    if not isolate:
        real = segments > 0
        last = real.sum(axis=1, keepdims=True) - 1
        return np.where(real, place, 0), np.where(place < last, place + 1, -1)
    key = np.where(segments > 0, segments, np.iinfo(np.int16).max).astype(np.int16)
    by_segment = np.argsort(key, axis=1, kind="stable").astype(np.int32)
    ordered = np.take_along_axis(segments, by_segment, 1)
    opens = np.ones((b, t), bool)
    opens[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    rank = place - np.maximum.accumulate(np.where(opens, place, 0), axis=1)
    after = np.full((b, t), -1, np.int32)
    after[:, :-1] = np.where(opens[:, 1:], -1, by_segment[:, 1:])
    positions, following = np.zeros((b, t), np.int32), np.empty((b, t), np.int32)
    np.put_along_axis(positions, by_segment, rank, 1)
    np.put_along_axis(following, by_segment, after, 1)
    real = segments > 0
    return np.where(real, positions, 0), np.where(real, following, -1)


def modality(ids: np.ndarray, moved: np.ndarray, vocab: Vocab) -> np.ndarray:
    """Return TEXT, IMAGE, INFILL or OTHER for each token, int8 of the shape of `ids`."""
    kind = np.where(vocab.is_text(ids), TEXT, np.where(vocab.is_image(ids), IMAGE, OTHER))
    return np.where(moved, INFILL, kind).astype(np.int8)
