"""CM3Leon 350M: arXiv 2309.02591 table 3; 373,030,912 parameters.

    cm3jax run configs/cm3leon/350m.py --data SOURCE --out runs/350m

The paper: 256 accelerators, batch 8M tokens, 1.4T tokens. Not run here: no weights and no such data are public.
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
