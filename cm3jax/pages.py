"""Pages: a document of text and pictures as Markdown, with its pictures as PNG files beside it."""

import pathlib
from collections.abc import Sequence
from typing import Any

from cm3jax import png
from cm3jax.types import Part, UserError


def write(folder, parts: Sequence[Part], prompt: str, seed: int, index: int, settings: Any) -> pathlib.Path:
    """Write a document, text and pictures uint8 [h, w, 3] in reading order; return the path of its Markdown file.

    The text stands there as the model wrote it. Names, and the fields of the pictures' files, are as `png.write` has
    them; the arguments are also its.

    Raises:
      UserError: if it cannot be written there.
    """
    folder, made = pathlib.Path(folder), (prompt, seed, index, settings)
    path, blocks, count = folder / f"{png.stem(*made)}.md", [], 0
    for part in parts:
        if isinstance(part, str):
            blocks.append(part.strip("\n"))
            continue
        count += 1
        picture = png.save(folder / f"{path.stem}-{count}.png", part, png.fields(*made))
        blocks.append(f"![picture {count}]({picture.name})")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text("\n\n".join(block for block in blocks if block.strip()) + "\n", encoding="utf-8")
    except OSError as e:
        raise UserError(f"page {str(path)!r}: {e.strerror or e}; choose another folder with --out") from None
    return path
