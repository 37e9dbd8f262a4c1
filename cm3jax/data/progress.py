"""The progress bar of long work on data."""

import sys

import tqdm


def bar(total: int | None, done: int, unit: str, name: str, quiet: bool = False) -> tqdm.tqdm:
    """Return a bar on stderr; into a log, where it cannot be redrawn, it writes once a minute."""
    every = 0.1 if sys.stderr.isatty() else 60
    return tqdm.tqdm(total=total, initial=done, unit=" " + unit, desc=name, mininterval=every, disable=quiet)
