"""InstructPix2Pix (arXiv 2211.09800), as the hub holds it: timbrooks/instructpix2pix-clip-filtered.

data/train-00000-of-00262-HASH.parquet   original_prompt, original_image {bytes, path}, edit_prompt,
                                         edited_prompt, edited_image {bytes, path}
"""

import pathlib
from collections.abc import Iterator

from cm3jax.data.sets import item
from cm3jax.data.sets.item import Item
from cm3jax.types import UserError

COLUMNS = ("original_prompt", "original_image", "edit_prompt", "edited_prompt", "edited_image")
BATCH = 16  # rows of two pictures each in memory


def names(split: str) -> tuple[str, ...]:
    """Return where the files may lie."""
    return f"data/{split}-*.parquet", f"{split}-*.parquet", f"{split}.parquet"


def edits(folder: pathlib.Path, split: str, first: int = 0) -> Iterator[Item]:
    """Yield one item a row, from row `first` on: the picture, the instruction, the edited picture."""
    start = 0
    for path in _files(folder, split):
        file = _open(path)
        for number in range(file.num_row_groups):
            length = file.metadata.row_group(number).num_rows
            if start + length > first:
                yield from _group(file, number, path, start, first)
            start += length


def count(folder: pathlib.Path, split: str) -> int:
    """Return the number of rows, from the files' heads."""
    return sum(_open(path).metadata.num_rows for path in _files(folder, split))


def _files(folder: pathlib.Path, split: str) -> list[pathlib.Path]:
    found = item.find(folder, *names(split))
    return sorted(path for path in found.parent.glob("*.parquet") if path.name.split("-")[0].split(".")[0] == split)


def _open(path: pathlib.Path):
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(f"{str(path)!r}: reading parquet needs pyarrow; pip install 'cm3jax[sets]'") from None
    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError, ValueError) as e:
        raise UserError(f"{str(path)!r}: no parquet file: {str(e).splitlines()[0][:100]}") from None
    if missing := [name for name in COLUMNS if name not in file.schema_arrow.names]:
        found = ", ".join(file.schema_arrow.names)
        raise UserError(f"{str(path)!r}: no column {missing[0]!r}; it has {found}")
    return file


def _group(file, number: int, path: pathlib.Path, start: int, first: int) -> Iterator[Item]:
    """Yield the rows of one row group that begins at row `start`."""
    at = start
    for batch in file.iter_batches(BATCH, row_groups=[number], columns=list(COLUMNS)):
        for row in batch.to_pylist():
            if at >= first:
                yield _item(row, at, path)
            at += 1


def _item(row: dict, number: int, path: pathlib.Path) -> Item:
    key = f"{number:07d}"
    for name in COLUMNS:
        value = row[name]["bytes"] if name.endswith("image") and row[name] else row[name]
        if not value:
            raise UserError(f"{str(path)!r}: id {key}: {name!r} is empty")
    values = {
        "image": row["original_image"]["bytes"],
        "instruction": row["edit_prompt"],
        "edited_image": row["edited_image"]["bytes"],
    }
    return Item(key, "edit", values, {"before": row["original_prompt"], "after": row["edited_prompt"]}, key)
