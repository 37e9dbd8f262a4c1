"""How common each task is in what a decoder trains on, and how often exactly its answer is masked. Imports no jax.

A prompt that a model is to understand must be common in its training. A document teaches its task's prompt if it stands
whole in a row with exactly its answer masked; where a picture that ends it is the answer, with nothing masked.
"""

import collections
import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from cm3jax import config as configs
from cm3jax.config import DecoderStage
from cm3jax.data import mixing, packing, paths, pipeline, progress, retrieved, shards
from cm3jax.data.tokens import Tokens
from cm3jax.objectives import causal_mask
from cm3jax.types import UserError
from cm3jax.vocab import Vocab

NONE = "(no task)"
"""What a document without a task is counted as."""


@dataclasses.dataclass
class Count:
    """Of one task, in some rows.

    Attributes:
      documents: That begin in these rows; one that goes on in the next row counts once.
      tokens: With [eod]s and retrieved documents.
      whole: Documents that stand whole in their row.
      taught: Of these, with exactly the answer masked.
    """

    documents: int = 0
    tokens: int = 0
    whole: int = 0
    taught: int = 0


def count(
    tokens: Tokens, stage: DecoderStage, vocab: Vocab, tasks: Sequence[str], rows: int = 2000
) -> dict[str, Count]:
    """Return the counts of each task in the first rows that a stage trains on.

    Args:
      tasks: Of each document of `tokens`, its task's name, "" where it has none.
      rows: Through as many epochs as they take.
    """
    make, found = pipeline.Batches(tokens, stage, vocab), collections.defaultdict(Count)
    for g in range(rows):
        ids, owner, spans, _ = make.unmasked(g)
        spans, keep = causal_mask.fit(spans, len(ids), stage.packing.length)
        (plan, shown), _, r = make.epochs.locate(g)
        documents, skip = plan.row(r)
        asked = packing.answers(plan, r, shown, stage.packing)
        of_spans = owner[spans[:, 0]]
        for number, i in enumerate(documents.tolist(), 1):
            one, here = found[tasks[i] or NONE], np.flatnonzero(owner == number)
            one.documents += number > 1 or not skip
            one.tokens += len(here)
            if number in asked and here[-1] < keep:
                one.whole += 1
                one.taught += np.array_equal(spans[of_spans == number], asked[number])
    return dict(found)


def names(prepared, split: str) -> list[str]:
    """Return the task of each record of a split, in the order of its token shards; "" where it has none."""
    reader = shards.Reader(prepared, split)
    with progress.bar(len(reader), 0, "records", str(prepared)) as bar:
        found = []
        for i in range(len(reader)):
            found.append(shards.fields(reader.read_bytes(i)).get("task", ""))
            bar.update()
    return found


def of_run(run, rows: int = 2000) -> str:
    """Return a table of what the decoder of a run trains on: its tokens and those of its mixture.

    Args:
      run: Folder with recipe.json, prepared/ and tokens/.
      rows: Of the first epoch, at most.

    Raises:
      UserError: if one of the sets has no records beside its tokens, or others than those.
    """
    run = pathlib.Path(run)
    recipe = configs.load(run / "recipe.json")
    sets = tuple(str(paths.at_hand(name, run / ".sets")) for name in recipe.decoder.mixture.sets)
    stage = dataclasses.replace(recipe.decoder, mixture=dataclasses.replace(recipe.decoder.mixture, sets=sets))
    found = mixing.open(run / "tokens", "train", stage, retrieved.source(recipe, run))
    tasks = []
    for one in found.sets if isinstance(found, mixing.Mixed) else [found]:
        prepared = pathlib.Path(one.folder).parent / "prepared"
        own = names(prepared, "train")
        if len(own) != len(one):
            raise UserError(
                f"{str(prepared)!r}: {len(own):,} records, but {one.folder} has {len(one):,} documents; encode it again"
            )
        tasks += own
    total = len(pipeline.Epochs(found, stage.training.seed, stage.packing).plan(0))
    counts = count(found, stage, recipe.vocab, tasks, min(rows, total))
    return "\n".join([f"{min(rows, total):,} of {total:,} rows of the first epoch", *table(counts)])


def table(counts: dict[str, Count]) -> list[str]:
    """Return the lines of a table, the most common task first."""
    total = Count(*(sum(x) for x in zip(*map(dataclasses.astuple, counts.values()), strict=True)))
    rows = [("task", "documents", "", "tokens", "", "whole", "answer masked", "")]
    for name, one in sorted(counts.items(), key=lambda pair: -pair[1].documents):
        share = (one.documents / total.documents, one.tokens / total.tokens, one.taught / max(1, one.documents))
        a, b, c = (f"{x:.1%}" for x in share)
        rows.append((name, f"{one.documents:,}", a, f"{one.tokens:,}", b, f"{one.whole:,}", f"{one.taught:,}", c))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
