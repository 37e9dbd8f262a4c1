"""Result files side by side; figures of different protocols are refused, or marked where that is asked for.

`code` is a protocol's part that tells the version of the program.
"""

import functools
import hashlib
import json
import pathlib
from collections.abc import Sequence
from importlib import metadata as packages
from typing import Any

from cm3jax import stages
from cm3jax.types import UserError

ROOT = pathlib.Path(__file__).parent.parent
MARKS = "abcdefghijklmnopqrstuvwxyz"


def read(path) -> dict[str, Any]:
    """Return what a result file holds.

    Raises:
      UserError: if it is none.
    """
    try:
        found = json.loads(pathlib.Path(path).read_text())
        for metric in found["metrics"].values():
            float(metric["value"]), dict(metric["protocol"])
    except OSError as e:
        raise UserError(f"result {str(path)!r}: {e.strerror or e}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"result {str(path)!r}: not a file that cm3jax score writes ({e!r})") from None
    return found


def figures(path) -> dict[str, Any]:
    """Return the figures of a result file; {} if there is none, or it cannot be read and is to be made again."""
    try:
        return read(path)["metrics"]
    except UserError:
        return {}


def table(paths: Sequence[Any], mixed: bool = False) -> str:
    """Return the figures of result files as a table in Markdown, a row a file.

    Args:
      mixed: Show figures of different protocols too, each with a mark that is explained below the table.

    Raises:
      UserError: naming the figure, two files and the field in which their protocols differ, unless `mixed`.
    """
    found = {str(path): read(path) for path in paths}
    metrics = list(dict.fromkeys(name for result in found.values() for name in result["metrics"]))
    cells: dict[tuple[str, str], str] = {}
    notes: list[str] = []
    for metric in metrics:
        own = {path: result["metrics"][metric] for path, result in found.items() if metric in result["metrics"]}
        groups = protocols(metric, own, mixed)
        for path, figure in own.items():
            mark = f" [{MARKS[groups.index(figure['protocol']) % len(MARKS)]}]" if len(groups) > 1 else ""
            cells[path, metric] = f"{figure['value']:.4g}{mark}"
        notes += explained(metric, groups) if len(groups) > 1 else []
    rows = [["result", *metrics], ["---", *["---:"] * len(metrics)]]
    rows += [[name, *(cells.get((path, metric), "") for metric in metrics)] for path, name in named(found).items()]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, *(["", "Figures with different marks cannot be compared:", *notes] if notes else [])])


def protocols(metric: str, own: dict[str, dict], mixed: bool) -> list[dict]:
    """Return the different protocols of a figure in the order of the files."""
    groups: list[dict] = []
    first = next(iter(own))
    for path, figure in own.items():
        if figure["protocol"] in groups:
            continue
        if groups and not mixed:
            name, a, b = differing([groups[0], figure["protocol"]])[0]
            raise UserError(
                f"{metric}: {first} and {path} have different protocols, {name} = {a!r} and {b!r}, and cannot be"
                " compared; --mixed shows them with marks"
            )
        groups.append(figure["protocol"])
    return groups


def differing(groups: Sequence[dict]) -> list[tuple]:
    """Return (field, its value in each protocol) for the fields that are not the same in all; an absent one is None."""
    flat = [stages.flatten(group) for group in groups]
    names = dict.fromkeys(name for group in flat for name in group)
    rows = [(name, *(group.get(name) for group in flat)) for name in names]
    return [row for row in rows if any(value != row[1] for value in row[2:])]


def explained(metric: str, groups: Sequence[dict]) -> list[str]:
    """Return a line for each protocol: in what it differs from the others."""
    fields = differing(groups)
    return [
        f"- {metric} [{MARKS[i % len(MARKS)]}]: {', '.join(f'{field[0]} = {field[1 + i]!r}' for field in fields)}"
        for i in range(len(groups))
    ]


def named(found: dict[str, Any]) -> dict[str, str]:
    """Return a name for each file: its own without the ending, or the whole path where two would be the same."""
    stems = [pathlib.Path(path).stem for path in found]
    return {path: stem if stems.count(stem) == 1 else path for path, stem in zip(found, stems, strict=True)}


@functools.cache
def code(modules: tuple[str, ...]) -> dict[str, str]:
    """Return the version of the program, and 16 hex digits of the modules that decide a figure."""
    made = hashlib.sha256()
    for name in modules:
        made.update((ROOT / f"{name}.py").read_bytes())
    return {"cm3jax": version("cm3jax"), "modules": made.hexdigest()[:16]}


def version(name: str) -> str:
    """Return the version of a package."""
    try:
        return packages.version(name)
    except packages.PackageNotFoundError:
        return "not installed"
