"""The harder level of the embedded world: free places, relations, stripes, drawn words; one larger model, 64 px.

    cm3jax run configs/scenes.py

Meant for at most three hours on two CPU cores: 80 minutes on a machine that it shared with other work. What it
reached (RESULTS.md): objects drawn as asked 0.27, of 0.48 that the image tokenizer lets through.
"""

import dataclasses
import pathlib

from cm3jax import config as configs

quickstart = configs.load(pathlib.Path(__file__).with_name("quickstart.py"))
change = dataclasses.replace

config = change(
    quickstart,
    name="scenes",
    vocab=configs.Vocab(text=1024, image=1024, sentinels=16, multiple=64),
    prepare=change(quickstart.prepare, source="scenes:full", count=60_000),
    image=change(quickstart.image, training=change(quickstart.image.training, steps=2000)),
    decoder=change(
        quickstart.decoder,
        model=change(quickstart.decoder.model, layers=6, width=192, heads=6),
        # Captions of 10 to 80 tokens: two documents a row, which do not see each other, fill it to 89 %; one, to 52 %.
        packing=change(quickstart.decoder.packing, length=224, documents=0, isolate=True),
        mask=change(quickstart.decoder.mask, spans=2.0),  # one a document, as in the quickstart
        training=change(quickstart.decoder.training, steps=5000, batch=8),
    ),
)
