"""Pretraining for configs/sft_scenes.py: captioned pictures of all kinds that its tasks show, and no instruction.

cm3jax run configs/pretrain_scenes.py
"""

import dataclasses
import pathlib

from cm3jax import config as configs

quickstart = configs.load(pathlib.Path(__file__).with_name("quickstart.py"))
change = dataclasses.replace

config = change(
    quickstart,
    name="pretrain-scenes",
    # With 640 pieces no two letters of a word to draw are one piece; with 1,024 they often are, in any of 676 pairs.
    vocab=configs.Vocab(text=640, image=1024, sentinels=16, multiple=64),
    prepare=change(quickstart.prepare, source="scenes:captions", resolution=48, count=40_000),
    text=change(quickstart.text, splits=("train", "texts")),
    # The quickstart's network (width 64, z 8) gives back 0.80 of drawn letters after 5,000 steps, this one 0.99.
    image=change(
        quickstart.image,
        model=change(quickstart.image.model, width=96, z=16),
        training=change(quickstart.image.training, steps=3000),
    ),
    decoder=change(
        quickstart.decoder,
        model=change(quickstart.decoder.model, layers=6, width=192, heads=6),
        # 6 x 6 codes a picture: two of them and an instruction are at most 100 tokens, the longest reasoning 116.
        packing=change(quickstart.decoder.packing, length=256, documents=0, isolate=True, most_spans=8, picture=36),
        training=change(quickstart.decoder.training, steps=3500, batch=8),
    ),
)
