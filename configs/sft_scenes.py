"""Every task of the paper's table 5 on the embedded world, small: edits, boxes, feature images, questions; 48 px.

    cm3jax run configs/sft_scenes.py

Meant for at most 45 minutes on two CPU cores; not yet timed on a quiet machine, and without figures. Half of the
documents mask exactly what their task asks for (arXiv 2309.02591 §4; the share is ours), the others by the CM3 law.
"""

import dataclasses
import pathlib

from cm3jax import config as configs

quickstart = configs.load(pathlib.Path(__file__).with_name("quickstart.py"))
change = dataclasses.replace

config = change(
    quickstart,
    name="sft-scenes",
    vocab=configs.Vocab(text=1024, image=1024, sentinels=16, multiple=64),
    # 6 x 6 codes a picture: two of them and an instruction are at most 98 tokens, the longest reasoning 114.
    prepare=change(quickstart.prepare, source="scenes:tasks", resolution=48, count=60_000),
    image=change(quickstart.image, training=change(quickstart.image.training, steps=2000)),
    decoder=change(
        quickstart.decoder,
        model=change(quickstart.decoder.model, layers=6, width=192, heads=6),
        packing=change(quickstart.decoder.packing, length=256, documents=0, isolate=True, most_spans=8, picture=36),
        mask=change(quickstart.decoder.mask, spans=2.0, answers=0.5),
        training=change(quickstart.decoder.training, steps=4000, batch=8),
    ),
)
