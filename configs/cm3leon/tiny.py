"""CM3Leon's parts at 5,242,880 parameters, 64 px: for laptops, tests and `cm3jax bench` (ours).

cm3jax run configs/cm3leon/tiny.py --data SOURCE --out runs/tiny
"""

from cm3jax.config import (
    VQGAN,
    Decoder,
    DecoderStage,
    Image,
    Mask,
    Optimizer,
    Packing,
    Prepare,
    Recipe,
    Training,
    Vocab,
)

config = Recipe(
    name="cm3leon-tiny",
    vocab=Vocab(text=1024, image=512, sentinels=16),
    prepare=Prepare(resolution=64),
    image=Image(
        model=VQGAN(width=32, multipliers=(1, 1, 2, 4), z=32, attention=()),
        training=Training(steps=20_000, batch=16, ema=0.99, optimizer=Optimizer(peak_lr=1e-3, warmup=100)),
    ),
    decoder=DecoderStage(
        model=Decoder(layers=6, width=256, heads=8, init_std=0.02, dtype="float32", remat="none"),
        packing=Packing(kind="whole", length=256),
        mask=Mask(spans=1.0, rotate=0.5),
        training=Training(steps=20_000, batch=16, optimizer=Optimizer(peak_lr=1e-3, warmup=200)),
    ),
)
