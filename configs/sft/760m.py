"""Instruction tuning of the 760M, with the settings of `sft/7b`, arXiv 2309.02591 table 4; what it reports is the 7B's.

    cm3jax train configs/sft/760m.py --inputs sets/edits --out runs/sft-760m --decoder.start runs/760m \\
        --decoder.mixture.sets sets/vqa/tokens

`sft/7b` tells how the sets are made. Not run here.
"""

import dataclasses
import pathlib

from cm3jax import config as configs

here, change = pathlib.Path(__file__).parent, dataclasses.replace
smaller, pretrained = configs.load(here / "350m.py"), configs.load(here.parent / "cm3leon" / "760m.py")

config = change(pretrained, name="sft-760m", decoder=change(smaller.decoder, model=pretrained.decoder.model))
