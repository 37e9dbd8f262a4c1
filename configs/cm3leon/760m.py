"""CM3Leon 760M: arXiv 2309.02591 table 3; 786,038,784 parameters.

    cm3jax run configs/cm3leon/760m.py --data SOURCE --out runs/760m

The paper: 256 accelerators, batch 8M tokens, 1.9T tokens. Not run here: no weights and no such data are public.
Meant for v5e-64. What `cm3jax plan configs/cm3leon/760m.py --topology v5e-64` printed, an estimate (libtpu 0.0.42):

    v5e-64    7.13 of 15.75 GiB a chip   MFU 0.448 to 0.661   14.7 to 21.7 days
"""

from cm3jax.config import Decoder, DecoderStage, Mask, Optimizer, Packing, Recipe, Training

config = Recipe(
    name="cm3leon-760m",
    decoder=DecoderStage(
        model=Decoder(layers=24, width=1536, heads=16),
        packing=Packing(kind="chop", length=4096),
        mask=Mask(spans=1.0, rotate=0.5),
        training=Training(
            steps=226_000, batch=2048, accumulate=4, optimizer=Optimizer(peak_lr=5e-4, warmup=1500), save_every=1000
        ),
    ),
)
