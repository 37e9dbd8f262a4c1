"""A sheet of what was retrieved: the query, and behind it each document's picture with its score and its text."""

import textwrap
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from cm3jax.data import pair_batches
from cm3jax.types import Record

SIDE, MARGIN, LINE, LINES = 192, 12, 16, 6
"""Pixels of a picture and around it, and of a line of text; lines under a picture."""
COLUMNS = 28
"""Letters of a line that are about as wide as a picture."""
INK, PAPER = (30, 30, 30), (255, 255, 255)


def draw(query: str | np.ndarray, records: Sequence[Record], scores: Sequence[float]) -> UInt8[np.ndarray, "h w 3"]:
    """Return the sheet of one query, text or picture uint8 [h, w, 3], and the documents found for it, in order."""
    head = Record("", (query,))
    titles = ["query", *(f"{i + 1}: {score:.3f}" for i, score in enumerate(scores))]
    cells = [cell(title, record) for title, record in zip(titles, [head, *records], strict=True)]
    return np.concatenate(cells, 1)


def cell(title: str, record: Record) -> UInt8[np.ndarray, "h w 3"]:
    """Return a document as a picture with a line above and its text below."""
    texts, pictures = pair_batches.parts(record)
    canvas = Image.new("RGB", (SIDE + 2 * MARGIN, SIDE + 3 * MARGIN + LINE * (LINES + 1)), PAPER)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(LINE - 4)
    pen.text((MARGIN, MARGIN), title, INK, font)
    top = 2 * MARGIN + LINE
    for picture in pictures[:1]:
        shown = Image.fromarray(picture)
        shown.thumbnail((SIDE, SIDE))
        scale = SIDE / max(shown.size)
        canvas.paste(shown.resize([round(n * scale) for n in shown.size], Image.Resampling.NEAREST), (MARGIN, top))
    lines = textwrap.wrap(" / ".join(texts), COLUMNS, max_lines=LINES, placeholder=" ...")
    below = top + (SIDE + MARGIN // 2 if pictures else 0)
    for i, line in enumerate(lines):
        pen.text((MARGIN, below + i * LINE), line, INK, font)
    return np.asarray(canvas)
