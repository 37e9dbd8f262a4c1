"""Instruction tuning of the 350M, with the settings of `sft/7b`, arXiv 2309.02591 table 4; what it reports is the 7B's.

    cm3jax train configs/sft/350m.py --inputs sets/edits --out runs/sft-350m --decoder.start runs/350m \\
        --decoder.mixture.sets sets/vqa/tokens

`sft/7b` tells how the sets are made. Not run here.
"""

import dataclasses
import pathlib

from cm3jax import config as configs

here, change = pathlib.Path(__file__).parent, dataclasses.replace
tuning, pretrained = configs.load(here / "7b.py"), configs.load(here.parent / "cm3leon" / "350m.py")

config = change(
    pretrained,
    name="sft-350m",
    decoder=change(
        tuning.decoder,
        model=pretrained.decoder.model,
        training=change(tuning.decoder.training, accumulate=1),
    ),
)
