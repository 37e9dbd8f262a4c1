"""CM3Leon's parts at 101,498,880 parameters, 256 px: for one Colab TPU chip or a T4 (ours; the paper starts at 350M).

    cm3jax run configs/cm3leon/100m.py --data SOURCE --out runs/100m

One pair per row (1,024 image codes, captions up to 100 tokens). Not trained here: this machine has no accelerator.
"""

from cm3jax.config import Decoder, DecoderStage, Mask, Optimizer, Packing, Recipe, Training

config = Recipe(
    name="cm3leon-100m",
    decoder=DecoderStage(
        model=Decoder(layers=12, width=640, heads=10),
        packing=Packing(kind="whole", length=1152, documents=1),
        mask=Mask(spans=1.0, rotate=0.5),
        training=Training(steps=100_000, batch=64, accumulate=8, optimizer=Optimizer(peak_lr=1e-3, warmup=1000)),
    ),
)
