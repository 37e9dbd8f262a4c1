"""Pages: a document of text and pictures as Markdown, with its pictures as PNG files beside it."""

import pathlib
from collections.abc import Sequence

from cm3jax import png, provenance
from cm3jax.types import Part, UserError


def write(folder, parts: Sequence[Part], made: provenance.Made, given: int = 0) -> pathlib.Path:
    """Write a document, text and pictures uint8 [h, w, 3] in reading order; return the path of its Markdown file.

    The text stands there as the model wrote it. Names, and the fields of the pictures' files, are as `png.write` has
    them.

    Args:
      given: Pictures at its beginning that the model did not draw: their files say nothing of it.

    Raises:
      UserError: if it cannot be written there.
    """
    folder = pathlib.Path(folder)
    path, blocks, count = folder / f"{png.named(made)}.md", [], 0
    for part in parts:
        if isinstance(part, str):
            blocks.append(part.strip("\n"))
            continue
        count += 1
        fields = provenance.fields(made) if count > given else None
        picture = png.save(folder / f"{path.stem}-{count}.png", part, fields)
        blocks.append(f"![picture {count}]({picture.name})")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text("\n\n".join(block for block in blocks if block.strip()) + "\n", encoding="utf-8")
    except OSError as e:
        raise UserError(f"page {str(path)!r}: {e.strerror or e}; choose another folder with --out") from None
    return path
