"""`prepare` and `encode` shared by hosts that know nothing of each other but a disk: `--host I --hosts N`.

Each host makes its shards whenever it runs, and again where it was cut off. The host that then finds all shards there
finishes the stage as one host alone would: summary, index, stage.json. What is left on disk is the same to the byte.
"""

import pathlib
from collections.abc import Callable

from cm3jax import run, stages
from cm3jax.config import Recipe
from cm3jax.types import UserError


def prepare(recipe: Recipe, folder: pathlib.Path, host: int, hosts: int) -> bool:
    from cm3jax.data import prepare

    return prepare.part(recipe.prepare, folder / "prepared", host, hosts)


def tokens(recipe: Recipe, folder: pathlib.Path, host: int, hosts: int) -> bool:
    from cm3jax.data import encode

    run.encode_shards(recipe, folder, host, hosts)
    return not encode.missing(folder / "prepared", folder / "tokens")


SHARES: dict[str, Callable[[Recipe, pathlib.Path, int, int], bool]] = {"prepare": prepare, "tokens": tokens}
"""What a host does of a stage, and whether nothing is left for any host."""


def part(recipe: Recipe, folder, stage: str, host: int, hosts: int) -> None:
    """Do one host's share of a stage, and finish the stage if that was the last.

    Raises:
      UserError: for a wrong number, if the stage was begun with other settings, or if its inputs are not there.
    """
    if not 0 <= host < hosts:
        raise UserError(f"--host = {host}: must be 0 to --hosts - 1 = {hosts - 1}")
    folder, entry = pathlib.Path(folder), run.STAGES[stage]
    run.refuse_changes(entry, recipe, folder, run.again(stage, stage))
    run.require(entry.inputs, folder)
    record = stages.read(entry.folder(folder))
    if (record and record.complete) or SHARES[stage](recipe, folder, host, hosts):
        try:
            run.run(recipe, folder, only=stage)
        except stages.Locked:
            run.say(f"{stage}: another host is finishing it")
    else:
        run.say(f"{stage}: host {host} of {hosts} is done; the last of the others to end finishes the stage")
