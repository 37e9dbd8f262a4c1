"""`cm3jax plan`: plans, and what a person or a program reads of them."""

import json
import sys

from cm3jax.config import Recipe
from cm3jax.plan import published as runs
from cm3jax.plan import sampling as drawing
from cm3jax.plan import searching as searches
from cm3jax.plan import slices, table
from cm3jax.plan import training as trainings


def training(recipe: Recipe, topology: str, count: int, search: bool, as_json: bool) -> int:
    """Plan a training and print it; return 0 if it fits, 1 if not."""
    target = slices.parse(topology, count)
    plan = trainings.plan(recipe, target)
    change = None if plan.fits else trainings.likely(plan, recipe, target.chips)
    if not plan.fits and search:
        print(table.text(plan, recipe.decoder.training, change), file=sys.stderr, flush=True)
        if found := trainings.search(recipe, target, lambda line: print(line, file=sys.stderr, flush=True)):
            change, plan = found
            print(f"fits with {change.flags}", file=sys.stderr)
    print(json.dumps(plan.to_json()) if as_json else table.text(plan, recipe.decoder.training, change))
    return 0 if plan.fits else 1


def sampling(recipe: Recipe, topology: str, count: int, rows: int, dtype: str, as_json: bool) -> int:
    """Plan drawing a batch of pictures and print it; return 0 if it fits, 1 if not."""
    target = slices.parse(topology, count)
    plan = drawing.plan(recipe, target, rows, dtype)
    if target.chips > slices.HOST:
        print(f"plan: drawing takes the chips of one host, which has at most {slices.HOST}", file=sys.stderr)
    print(json.dumps(plan.to_json()) if as_json else table.text(plan))
    return 0 if plan.fits else 1


def searching(recipe: Recipe, topology: str, count: int, documents: int, as_json: bool) -> int:
    """Plan the search of a memory bank and print it; return 0 if it fits, 1 if not."""
    target = slices.parse(topology, count)
    plan = searches.plan(target, documents, recipe.retriever.model.size, recipe.neighbours.candidates)
    print(json.dumps(plan.to_json()) if as_json else plan.text())
    return 0 if plan.fits else 1


def published() -> int:
    """Plan the published runs of others and print theirs beside ours; return 0 if most lie between our two figures."""
    found = []
    for run in runs.RUNS:
        found.append(line := runs.compare(run))
        print(f"{run.name}: {line.seconds:.0f} s", file=sys.stderr, flush=True)
    print(runs.text(found))
    return 0 if sum(line.inside for line in found) > len(found) / 2 else 1
