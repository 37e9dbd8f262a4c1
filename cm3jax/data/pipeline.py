"""Batches for the decoder by random access: step s of any host, from token shards (see `packing.arrays`).

Rows are numbered through all epochs: row g of the run is row r of epoch e. Batch s holds rows s * b .. (s + 1) * b - 1,
of which each host reads its own consecutive share. Masks are drawn from (seed, epoch, row). So nothing depends on the
number of hosts, workers or threads, and a run resumes at any step: the state of the data in a checkpoint is the step
and `fingerprint`. Imports no jax.
"""

import collections
import dataclasses
import hashlib
import threading
from collections.abc import Iterator

import absl.flags
import grain
import numpy as np

import cm3jax.config as configs
from cm3jax.config import DecoderStage, Mask
from cm3jax.data import mixing, packing, retrieved
from cm3jax.data.tokens import Tokens
from cm3jax.objectives import causal_mask
from cm3jax.tokenizers import document
from cm3jax.types import UserError
from cm3jax.vocab import EOD, Vocab

FOREVER = 2**40  # steps
Batch = dict[str, np.ndarray]


class Epochs:
    """The plans of all epochs, each computed when first asked for."""

    def __init__(self, tokens: Tokens, seed: int, settings: configs.Packing):
        self._arguments = (tokens, seed, settings)
        # every epoch has as many rows as the first
        cut = settings.kind == "chop" and not isinstance(tokens, retrieved.Retrieving)
        self._same = tokens.mix is None and (cut or settings.documents == 1)
        self._lock, self._plans, self._starts = threading.Lock(), {}, [0]

    def plan(self, epoch: int) -> packing.Plan:
        """Return the plan of an epoch."""
        return self._planned(epoch)[0]

    def _planned(self, epoch: int) -> tuple[packing.Plan, Tokens]:
        """Return plan and documents of an epoch; the two last made are kept, since a batch may straddle two epochs."""
        if epoch not in self._plans:
            tokens, seed, settings = self._arguments
            shown = tokens.at(seed, epoch)
            plan = packing.plan(shown.lengths, seed, epoch, settings, tokens.mix)
            self._plans = dict([*self._plans.items()][-1:]) | {epoch: (plan, shown)}
        return self._plans[epoch]

    def locate(self, g: int) -> tuple[tuple[packing.Plan, Tokens], int, int]:
        """Return ((plan, documents), epoch, row in the epoch) of row g of the run."""
        with self._lock:
            if self._same:
                epoch, r = divmod(g, self._rows(0))
                return self._planned(epoch), epoch, r
            while g >= self._starts[-1]:
                self._starts.append(self._starts[-1] + len(self.plan(len(self._starts) - 1)))
            epoch = int(np.searchsorted(self._starts, g, "right")) - 1
            return self._planned(epoch), epoch, g - self._starts[epoch]

    def _rows(self, epoch: int) -> int:
        if len(self._starts) == 1:
            self._starts.append(len(self.plan(epoch)))
        return self._starts[1]


class Batches:
    """This host's share of every batch: `make(step)`. A copy in another process opens the files again.

    Attributes:
      epochs: `Epochs`.
    """

    def __init__(
        self, tokens: Tokens, stage: DecoderStage, vocab: Vocab, process_index: int = 0, process_count: int = 1
    ):
        self._arguments = (tokens, stage, vocab, process_index, process_count)
        self.share = share(stage, process_count)
        self.epochs = Epochs(tokens, stage.training.seed, stage.packing)
        self.epochs.locate(0)  # a plan that cannot be made fails here, not in a thread

    def __reduce__(self):
        return Batches, self._arguments

    def __call__(self, step: int) -> Batch:
        """Return the batch of `step` (see `packing.arrays`)."""
        _, stage, vocab, process_index, _ = self._arguments
        start = step * stage.training.batch + process_index * self.share
        rows = [self.row(g) for g in range(start, start + self.share)]
        return packing.arrays(rows, vocab, stage.packing, stage.mask, stage.retrieved.weight)

    def row(self, g: int) -> packing.Row:
        """Return row g of the run, masked."""
        _, stage, vocab, _, _ = self._arguments
        ids, owner, spans, part = self.unmasked(g)
        return packing.masked(ids, owner, spans, vocab, stage.packing, part)

    def unmasked(self, g: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return row g before masking: ids [t], document numbers [t], spans [n, 2], parts [t]."""
        _, stage, vocab, _, _ = self._arguments
        (plan, tokens), epoch, r = self.epochs.locate(g)
        draw = stage.training.seed, ("mask", "answers"), epoch
        return packing.unmasked(plan, r, tokens, vocab, stage.mask, stage.packing, *draw)


def share(stage: DecoderStage, process_count: int) -> int:
    """Return the rows of a batch that one host reads."""
    if stage.training.batch % process_count:
        raise UserError(f"training.batch = {stage.training.batch}: must be a multiple of the {process_count} processes")
    return stage.training.batch // process_count


def batches(
    folder,
    split: str,
    stage: DecoderStage,
    vocab: Vocab,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    source: retrieved.Source | None = None,
) -> Iterator[Batch]:
    """Yield this host's share of the batches from `start_step` on, without end (see `packing.arrays`).

    If the stage has a mixture, the folder's documents are mixed with those of its sets.

    Args:
      source: Where retrieved documents come from; None: nowhere.

    The iterator has a `close()` that stops its threads or processes.

    Raises:
      UserError: if the split is missing or broken, no row can be filled, or the batch does not divide over the hosts.
    """
    make = Batches(mixing.open(folder, split, stage, source), stage, vocab, process_index, process_count)
    return iter(iterate(grain.MapDataset.range(start_step, FOREVER).map(make), stage.training.workers))


def iterate(dataset: grain.MapDataset, workers: int) -> grain.IterDataset:
    """Read ahead, in order: with `workers` processes, or with threads of this one."""
    if not workers:
        return dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
    if not absl.flags.FLAGS.is_parsed():
        absl.flags.FLAGS.mark_as_parsed()  # grain's workers read absl flags, which only absl apps parse
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return dataset.to_iter_dataset(options).mp_prefetch(grain.MultiprocessingOptions(workers, per_worker_buffer_size=2))


def read(reader, first: int, stop: int, workers: int = 0) -> Iterator:
    """Yield items `first` .. `stop` - 1 of anything with random access, read ahead, in order."""
    dataset = grain.MapDataset.range(first, stop).map(reader.__getitem__)
    return iter(iterate(dataset, workers))


def eval_batches(
    folder,
    split: str,
    stage: DecoderStage,
    vocab: Vocab,
    masked: bool = True,
    process_index: int = 0,
    process_count: int = 1,
    source: retrieved.Source | None = None,
) -> Iterator[Batch]:
    """Yield the same batches at every call: at most `training.evaluate_batches`, every row at most once.

    Order, masks and retrieved documents come from `eval_mask_seed`. Rows that the split does not fill are padding,
    weight 0. A mixture's other sets play no part.

    Args:
      masked: False leaves the rows causal, for perplexity by modality.
      source: Where retrieved documents come from; None: nowhere.
    """
    alone, mine = dataclasses.replace(stage, mixture=configs.Mixture()), share(stage, process_count)
    tokens = mixing.open(folder, split, alone, source).at(stage.eval_mask_seed, 0)
    plan = packing.plan(tokens.lengths, stage.eval_mask_seed, 0, stage.packing)
    mask = stage.mask if masked else Mask(spans=0.0)

    def row(r: int) -> packing.Row:
        if r >= len(plan):
            return packing.EMPTY
        draw = stage.eval_mask_seed, ("evaluate", "evaluate answers"), 0
        ids, owner, spans, part = packing.unmasked(plan, r, tokens, vocab, mask, stage.packing, *draw)
        return packing.masked(ids, owner, spans, vocab, stage.packing, part)

    batch = stage.training.batch
    for start in range(0, min(len(plan), batch * stage.training.evaluate_batches), batch):
        first = start + process_index * mine  # every host gives as many batches as the others
        rows = [row(r) for r in range(first, first + mine)]
        yield packing.arrays(rows, vocab, stage.packing, stage.mask, stage.retrieved.weight)


# ------------------------------------------------------------------------------------------------------- what is in it


def fingerprint(tokens: Tokens, stage: DecoderStage, vocab: Vocab) -> str:
    """Return 16 hex digits that identify all batches: documents, what is retrieved, packing, masks, batch and seed."""
    lengths = hashlib.sha256(tokens.lengths.astype("<i4").tobytes()).hexdigest()
    more = [tokens.mix] if tokens.mix else []
    if own := retrieving(tokens):
        more += [own.fingerprint(), stage.retrieved]
    if stage.mask.answers and len(tokens.marks):
        more.append(hashlib.sha256(tokens.marks.astype("<i4").tobytes()).hexdigest())
    return configs.digest(lengths, stage.packing, stage.mask, vocab, stage.training.batch, stage.training.seed, *more)


def retrieving(tokens: Tokens) -> retrieved.Retrieving | None:
    """Return the set, of one or of a mixture, for whose documents others are retrieved."""
    sets = tokens.sets if isinstance(tokens, mixing.Mixed) else [tokens]
    return next((one for one in sets if isinstance(one, retrieved.Retrieving)), None)


def describe(tokens: Tokens, stage: DecoderStage) -> dict[str, int | float]:
    """Return counts of the first epoch, for the log.

    Returns:
      documents, tokens: Of the split, without [eod]s and retrieved documents.
      rows: Of the epoch.
      too_long: Documents that no row holds and that are left out (packing whole).
      filled: Share of the rows' slots that are not padding, before the mask adds its markers.
      retrieved: Documents that are shown before the split's, if all of those are shown once.
      given_up: Retrieved documents for which a row had no room (packing whole).
    """
    shown = tokens.at(stage.training.seed, 0)
    plan = packing.plan(shown.lengths, stage.training.seed, 0, stage.packing, tokens.mix)
    used = shown.lengths[plan.documents].sum(dtype=np.int64) + packing.frame(stage.packing) * len(plan.documents)
    slots = len(plan) * stage.packing.length
    own = retrieving(tokens)
    found = own.at(stage.training.seed, 0) if own else None
    return {
        "documents": len(tokens),
        "tokens": int(tokens.lengths.sum(dtype=np.int64)),
        "rows": len(plan),
        "too_long": plan.too_long,
        "filled": 1.0 if stage.packing.kind == "chop" else float(used / slots),
        "retrieved": found.retrieved if found else 0,
        "given_up": found.given_up if found else 0,
    }


def prompt_frequencies(
    tokens: Tokens, stage: DecoderStage, vocab: Vocab, rows: int = 2000, literal: bool = False
) -> dict[str, float]:
    """Return for each prompt kind the share of the first `rows` rows (blocks) that teach it (`document.KINDS`).

    A row teaches a kind if one of its whole documents, with the spans that left it, begins with such a prompt and its
    answer. Where documents in a row see each other, other documents stand between the two; `literal` counts only rows
    that as a whole begin with the prompt and its answer.
    """
    make, counts = Batches(tokens, stage, vocab), collections.Counter()
    for g in range(rows):
        ids, _, spans, _ = make.unmasked(g)
        spans, keep = causal_mask.fit(spans, len(ids), stage.packing.length)
        whole = literal and not stage.packing.isolate
        views = [causal_mask.mask(ids[:keep], spans, vocab)] if whole else alone(ids[:keep], spans, vocab)
        counts.update({kind for view in views for kind in document.kinds(view, vocab)})
    return {kind: counts[kind] / rows for kind in document.KINDS}


def alone(ids: np.ndarray, spans: np.ndarray, vocab: Vocab) -> Iterator[np.ndarray]:
    """Yield each whole document of a row, [eod]s included, masked as if it were the row's only one."""
    at = np.flatnonzero(ids == EOD)
    for start, end in zip(at[:-1], at[1:] + 1, strict=True):
        if end - start > 2:  # else the two [eod]s between two documents
            inside = spans[(spans[:, 0] > start) & (spans[:, 0] < end)]
            yield causal_mask.mask(ids[start:end], inside - start, vocab)
