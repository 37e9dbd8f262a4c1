"""CM3Leon 350M: arXiv 2309.02591 table 3; 373,030,912 parameters.

    cm3jax run configs/cm3leon/350m.py --data SOURCE --out runs/350m

The paper: 256 accelerators, batch 8M tokens, 1.4T tokens. Not run here: no weights and no such data are public.
Meant for v5e-64. What `cm3jax plan configs/cm3leon/350m.py --topology v5e-64` printed, an estimate (libtpu 0.0.42):

    v5e-64    5.78 of 15.75 GiB a chip   MFU 0.354 to 0.545   6.6 to 10.2 days

Heads of 64 fill half of a matrix unit of 128: attention takes as long as if it were twice the work.
"""

from cm3jax.config import Decoder, DecoderStage, Mask, Optimizer, Packing, Recipe, Training

config = Recipe(
    name="cm3leon-350m",
    decoder=DecoderStage(
        model=Decoder(layers=24, width=1024, heads=16),
        packing=Packing(kind="chop", length=4096),
        mask=Mask(spans=1.0, rotate=0.5),
        training=Training(
            steps=167_000, batch=2048, accumulate=4, optimizer=Optimizer(peak_lr=6e-4, warmup=1500), save_every=1000
        ),
    ),
)
