"""What each record of an evaluation scored: samples.jsonl, for the spread of figures and for figures by group.

One line a record: split, key, its attributes, and {task: figures}. Figures are what can be added up: right, of and
whole where a judge counts (`evaluate.scenes.Score`), psnr and ssim where pictures are compared.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cm3jax import stages
from cm3jax.data import prepare_shard
from cm3jax.evaluate.scenes import Score
from cm3jax.types import Record, UserError

FILE = "samples.jsonl"
LONGEST = 64
"""Characters of an attribute at most: a longer text tells records apart and makes no groups."""
Table = dict[tuple[str, str], dict[str, Any]]
"""(split, key) -> {"attributes": {name: value}, "scores": {task: {figure: number}}}."""


@dataclasses.dataclass(frozen=True)
class Named:
    """A record without its parts: which it is, and what is known of it."""

    split: str
    key: str
    attributes: dict[str, Any]


def named(record: Record, split: str) -> Named:
    """Return a record's key and attributes: source (of an address, the host), license, group, and its fields.

    Of a field that is an object, its inner ones are attributes, as "field.inner".

    Only words, whole numbers and truth values count. A text that is a JSON object counts as that object.
    """
    fields = {name: _opened(value) for name, value in record.fields.items()}
    own = {"source": prepare_shard.origin(record.source), "license": record.license, "group": record.group}
    return Named(split, record.key, {k: v for k, v in (stages.flatten(fields) | own).items() if _tells(v)})


def _opened(value):
    if not (isinstance(value, str) and value.startswith("{")):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _tells(value) -> bool:
    return isinstance(value, int) or (isinstance(value, str) and 0 < len(value) <= LONGEST)


def put(table: Table, task: str, rows: Sequence[Named], figures: Sequence[Score | Mapping[str, float | None]]) -> None:
    """Add one task's figures of records to a table."""
    for row, found in zip(rows, figures, strict=True):
        found = counts(found) if isinstance(found, Score) else found
        line = table.setdefault((row.split, row.key), {"attributes": row.attributes, "scores": {}})
        line["scores"].setdefault(task, {}).update(found)


def counts(score: Score) -> dict[str, int | bool]:
    """Return a judge's score as figures of a table."""
    return {"right": int(score.matched), "of": int(score.of), "whole": bool(score.whole)}


def write(folder: pathlib.Path, table: Table) -> None:
    """Write samples.jsonl."""
    lines = ({"split": split, "key": key, **row} for (split, key), row in table.items())
    folder.mkdir(parents=True, exist_ok=True)
    stages.write_text(folder / FILE, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def read(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Return the lines of samples.jsonl; none if there is no such file.

    Raises:
      UserError: if it is not what `write` wrote.
    """
    path = folder / FILE
    try:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    except ValueError as e:
        raise UserError(f"{path}: not readable ({e}); make it again with: cm3jax evaluate RUN") from None


# ------------------------------------------------------------------------------------------------------------- figures

FIGURES = {"accuracy": ("right", "of"), "whole": ("whole", ""), "psnr": ("psnr", ""), "ssim": ("ssim", "")}
"""Figure -> what is added up, over what ("": the records)."""
DRAWS = 1000
LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure of some records.

    Attributes:
      low, high: The interval that 95 % of bootstrap resamples of the records fall into; None where none differs from
        another, as with one record, or with none that is right: nothing is known of the spread then.
    """

    value: float
    low: float | None
    high: float | None
    records: int


def estimates(lines: Sequence[Mapping[str, Any]], task: str) -> dict[str, Estimate]:
    """Return {figure: `Estimate`} of a task, over those of the lines that have it."""
    rows = [line["scores"][task] for line in lines if task in line["scores"]]
    found = {}
    for name, (above, below) in FIGURES.items():
        pairs = [(row[above], row[below] if below else 1) for row in rows if row.get(above) is not None]
        if sum(b for _, b in pairs):
            found[name] = estimate(np.array(pairs, float))
    return found


def estimate(pairs: np.ndarray, seed: int = 0) -> Estimate:
    """Return the ratio of sums of pairs [n, 2], with its spread over records (percentile bootstrap)."""
    n, (above, below) = len(pairs), pairs.sum(0)
    rng, resampled = np.random.default_rng(seed), []
    for _ in range(DRAWS):
        sums = pairs[rng.integers(0, n, n)].sum(0)
        resampled.append(sums[0] / sums[1] if sums[1] else math.nan)
    low, high = np.nanquantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    spread = (None, None) if math.isclose(low, high) else (float(low), float(high))
    return Estimate(float(above / below), *spread, n)
