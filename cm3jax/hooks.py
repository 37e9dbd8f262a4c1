"""What the training loop calls at intervals: sheets of sample pictures, as PNG files and in TensorBoard."""

import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorboardX
from PIL import Image

from cm3jax import config as configs
from cm3jax import provenance
from cm3jax.config import Recipe
from cm3jax.data import encode, shards

COUNT = 8
"""Pictures of a sheet."""


def drawings(recipe: Recipe, run: pathlib.Path) -> Callable[[Any, int], None]:
    """Return f(parameters, step) that draws the first validation captions with the decoder."""
    from cm3jax.nn import decoder
    from cm3jax.sample import generate
    from cm3jax.tokenizers import image, text
    from cm3jax.train import lm

    model = lm.model(recipe.decoder, recipe.vocab)
    tokenizers = text.load(run / "text"), image.load(run / "image")
    prompts = captions(run / "prepared")

    def draw(params, step: int) -> None:
        generator = generate.of(recipe, model, decoder.apart(params), *tokenizers, COUNT)
        sampling = recipe.evaluate.draw[0]
        drawn = provenance.Model(recipe.name, step, "not recorded")  # these may never be saved
        made = provenance.Made(drawn, "\n".join(prompts), 0, 0, configs.to_json(sampling))
        pictures = generator.text_to_image(prompts, made.seed, sampling)
        save(run / "decoder", "samples", step, [pictures], provenance.fields(made))

    return draw if prompts else lambda params, step: None


def reconstructions(recipe: Recipe, run: pathlib.Path) -> Callable[[Any, int], None]:
    """Return f(parameters, step) that shows the first validation pictures above what the tokenizer makes of them."""
    from cm3jax.tokenizers import image

    originals = pictures(run / "prepared")

    def rebuild(params, step: int) -> None:
        side = recipe.prepare.resolution
        tokenizer = image.Tokenizer(recipe.image.model, recipe.vocab.image, side, params, batch=COUNT)
        save(run / "image", "samples", step, [originals, tokenizer.decode(tokenizer.encode(originals))])

    return rebuild


def captions(prepared) -> list[str]:
    """Return the first text of the first validation records (training records if there are none), up to COUNT."""
    found = (next((p for p in r.parts if isinstance(p, str)), "") for r in held_out(prepared))
    return [text for text, _ in zip((t for t in found if t), range(COUNT), strict=False)]


def pictures(prepared) -> np.ndarray:
    """Return the first pictures of the validation split (training split if there is none), uint8 [COUNT, h, w, 3]."""
    found = (part for record in held_out(prepared) for part in record.parts if encode.is_picture(part))
    return np.stack([picture for picture, _ in zip(found, range(COUNT), strict=False)])


def held_out(prepared) -> shards.Reader:
    return shards.Reader(prepared, "validation" if "validation" in shards.splits(prepared) else "train")


def save(folder: pathlib.Path, name: str, step: int, rows: list[np.ndarray], fields=None) -> None:
    """Write rows of pictures [n, h, w, 3] as one sheet: FOLDER/NAME/STEP.png with these fields, and an image event."""
    sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
    path = folder / name / f"{step:07d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(path, pnginfo=fields)
    with tensorboardX.SummaryWriter(str(folder), filename_suffix=f".{name}") as events:
        events.add_image(name, sheet, step, dataformats="HWC")
