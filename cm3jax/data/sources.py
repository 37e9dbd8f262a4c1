"""Where examples come from: one small class per kind of source, all with the same four methods.

    jobs(shards)    cut the source into pieces, one output shard each; plain JSON values
    read(job)       yield the piece's examples, and a `Reject` for every row that is none
    total(jobs)     rows in all, for the progress bar; 0: not known
    fingerprint()   what besides the config decides the output (contents of the metadata, sizes of the tars)

Sources are small and can be pickled: `read` runs in worker processes. Nothing here imports jax.
"""

import pathlib
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

from cm3jax import config
from cm3jax.data import paths, sources_folder, sources_scenes, sources_sets, sources_tfds, sources_webdataset
from cm3jax.data.example import Example, Reject
from cm3jax.types import UserError

KINDS = (
    "scenes:easy, scenes:full, scenes:rare, scenes:captions, scenes:tasks, tfds:NAME, set:NAME:FOLDER, a folder with"
    " metadata.jsonl or metadata.csv, or WebDataset tars such as 'data/{00000..00009}.tar'"
)


@runtime_checkable
class Source(Protocol):
    """Anything that `prepare` can read."""

    def jobs(self, shards: int) -> list[Any]: ...

    def read(self, job: Any) -> Iterator[Example | Reject]: ...

    def total(self, jobs: list[Any]) -> int: ...

    def fingerprint(self) -> Any: ...


def open(prepare: config.Prepare) -> Source:
    """Return the source that `prepare.source` names.

    Raises:
      UserError: if there is no such source, with what to write instead.
    """
    name = prepare.source
    if name.startswith("scenes:"):
        return sources_scenes.open(prepare)
    if name.startswith("tfds:"):
        return sources_tfds.open(prepare)
    if name.startswith(sources_sets.PREFIX):
        return sources_sets.open(prepare)
    if "://" in name or name.startswith("pipe:"):
        raise UserError(
            f"source {name!r}: only files on a disk of this machine are read; mount the bucket, or download it first"
        )
    path = pathlib.Path(name)
    if name and paths.within(path.is_dir, name):
        tars = not any((path / file).is_file() for file in sources_folder.NAMES) and any(path.glob("*.tar"))
        return sources_webdataset.open(prepare) if tars else sources_folder.open(prepare)
    if name.endswith(".tar"):
        return sources_webdataset.open(prepare)
    raise UserError(_nothing_there(name, path))


def _nothing_there(name: str, path: pathlib.Path) -> str:
    if name.endswith((".tar.gz", ".tgz", ".tar.zst")):
        return f"source {name!r}: compressed; unpack it to .tar first"
    if path.name in sources_folder.NAMES:
        return f"source {name!r}: give the folder that it lies in, {str(path.parent)!r}"
    return f"source {name!r}: no such folder; a source is {KINDS}"
