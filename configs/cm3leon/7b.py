"""CM3Leon 7B: arXiv 2309.02591 table 3; 6,726,615,040 parameters.

    cm3jax run configs/cm3leon/7b.py --data SOURCE --out runs/7b

The paper: 512 accelerators, batch 8M tokens, 2.4T tokens. Not run here: no weights and no such data are public.
Meant for v5e-256 (there --decoder.accumulate 2 has four times fewer exchanges) and larger; fits smaller slices too.
What `cm3jax plan configs/cm3leon/7b.py --topology SLICE` printed, an estimate (libtpu 0.0.42):

    v5e-256   6.31 of 15.75 GiB a chip   MFU 0.469 to 0.730   33 to 51 days
    v5p-64   27.15 of 95.74 GiB a chip   MFU 0.574 to 0.730   113 to 143 days
    v6e-64   14.65 of 31.25 GiB a chip   MFU 0.387 to 0.664   31 to 53 days
    v4-128   15.20 of 30.75 GiB a chip   MFU 0.567 to 0.730   94 to 121 days
"""

from cm3jax.config import Decoder, DecoderStage, Mask, Optimizer, Packing, Recipe, Training

config = Recipe(
    name="cm3leon-7b",
    decoder=DecoderStage(
        model=Decoder(layers=32, width=4096, heads=32),
        packing=Packing(kind="chop", length=4096),
        mask=Mask(spans=1.0, rotate=0.5),
        training=Training(
            steps=286_000, batch=2048, accumulate=8, optimizer=Optimizer(peak_lr=1.2e-4, warmup=1500), save_every=1000
        ),
    ),
)
