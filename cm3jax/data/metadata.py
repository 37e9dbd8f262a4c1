"""Rows of metadata.jsonl and metadata.csv, read so that a broken row costs that row only.

Rows are found by byte offset: the main process cuts a file into ranges, each worker reads its own. Every reader here
yields (offset, line number, row), where a row is a dict, or the `Bad` that says what is wrong with it.
"""

import collections
import csv
import io
import itertools
import json
import pathlib
from collections.abc import Iterator

from cm3jax.data.example import Bad
from cm3jax.types import UserError

MAX_LINE = 2**24  # bytes
MAX_LINES = 200  # of one quoted CSV row
BOM = b"\xef\xbb\xbf"

Row = tuple[int, int, dict | Bad]


def rows(path: pathlib.Path, start: int = 0, stop: int | None = None, line: int = 1) -> Iterator[Row]:
    """Yield the rows that begin in bytes [start, stop), the first of them on `line`; blank lines are no rows."""
    return (_csv_rows if path.suffix == ".csv" else _jsonl_rows)(path, start, stop, line)


def _lines(path: pathlib.Path, start: int, stop: int | None, line: int) -> Iterator[tuple[int, int, bytes | None]]:
    """Yield (offset, line number, bytes), None for a line over MAX_LINE; lines end with \\n alone."""
    with path.open("rb") as file:
        file.seek(start)
        for number in itertools.count(line):
            offset = file.tell()
            if stop is not None and offset >= stop:
                return
            if not (data := file.readline(MAX_LINE)):
                return
            whole = data.endswith(b"\n") or len(data) < MAX_LINE
            while not whole and data and not data.endswith(b"\n"):
                data = file.readline(MAX_LINE)
            yield offset, number, data.removeprefix(BOM if offset == 0 else b"") if whole else None


def decode_text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise Bad("bad UTF-8", f"byte 0x{data[e.start]:02x} at {e.start}") from None


def load_json(data: bytes) -> dict:
    """Return the JSON object that bytes hold.

    Raises:
      Bad: "bad UTF-8" or "broken metadata".
    """
    try:
        value = json.loads(decode_text(data))
    except (ValueError, RecursionError) as e:
        raise Bad("broken metadata", f"not JSON: {e}") from None
    if not isinstance(value, dict):
        raise Bad("broken metadata", f"a JSON {type(value).__name__}, expected an object {{...}}")
    return value


def _jsonl_rows(path, start, stop, line) -> Iterator[Row]:
    for offset, number, data in _lines(path, start, stop, line):
        try:
            if data is None:
                raise Bad("broken metadata", f"line longer than {MAX_LINE} bytes")
            if data.strip():
                yield offset, number, load_json(data.rstrip(b"\r\n"))
        except Bad as e:
            yield offset, number, e


# ------------------------------------------------------------------------------------------------------------------ CSV


def header(path: pathlib.Path) -> list[str]:
    """Return the column names of a CSV file.

    Raises:
      UserError: if the first line is not a header.
    """
    _, _, first = next(_lines(path, 0, None, 1), (0, 1, b""))
    try:
        names = next(csv.reader([decode_text(first or b"")], strict=True), [])
    except (Bad, csv.Error) as e:
        raise UserError(f"{str(path)!r}: the first line is no CSV header in UTF-8: {e}") from None
    if len(set(names)) != len(names):
        raise UserError(f"{str(path)!r}: two columns have the same name; header: {', '.join(names)}")
    return names


def _csv_rows(path, start, stop, line) -> Iterator[Row]:
    names = header(path)
    ahead = collections.deque()
    source = _lines(path, start, stop, line)
    while ahead or (ahead := collections.deque(itertools.islice(source, 1))):
        offset, number, first = ahead[0]
        used, row = _take(ahead, source, names)
        for _ in range(used):
            ahead.popleft()
        if offset and (first is None or first.strip()):  # offset 0 is the header
            yield offset, number, row


def _take(ahead: collections.deque, source: Iterator, names: list[str]) -> tuple[int, dict | Bad]:
    """Parse the row at the head of `ahead`, which is filled from `source`; return (lines used, row).

    A quoted field may hold newlines. A quote that is never closed must not swallow the rows after it: if the lines up
    to the next closing quote are no valid row, the first line alone is broken.
    """
    if ahead[0][2] is None:
        return 1, Bad("broken metadata", f"line longer than {MAX_LINE} bytes")
    alone = _parse(ahead[0][2], names)
    if isinstance(alone, dict) or ahead[0][2].count(b'"') % 2 == 0:
        return 1, alone
    text = b""
    for used in range(1, MAX_LINES + 1):
        if used > len(ahead):
            ahead.extend(itertools.islice(source, 1))
        if used > len(ahead) or ahead[used - 1][2] is None or len(text) > MAX_LINE:
            break
        text += ahead[used - 1][2]
        if text.count(b'"') % 2 == 0:
            row = _parse(text, names)
            return (used, row) if isinstance(row, dict) or row.reason == "bad UTF-8" else (1, row)
    return 1, Bad("broken metadata", "a quote is never closed")


def _parse(data: bytes, names: list[str]) -> dict | Bad:
    """Return one CSV row as a dict."""
    try:
        parsed = list(csv.reader(io.StringIO(decode_text(data), newline=""), strict=True))
    except csv.Error as e:
        return Bad("broken metadata", f"not CSV: {e}")
    except Bad as e:
        return e
    if len(parsed) != 1 or len(parsed[0]) != len(names):
        found = len(parsed[0]) if len(parsed) == 1 else f"{len(parsed)} rows of"
        return Bad("broken metadata", f"{found} columns, the header has {len(names)}")
    return dict(zip(names, parsed[0], strict=True))
