"""Instruction tuning of the 7B: arXiv 2309.02591 table 4, on the tasks of its table 5; begins with `cm3leon/7b`'s run.

Every set is a run folder of its own, prepared as documents of its tasks and encoded by the pretrained run's tokenizers:

    cm3jax prepare set:instruct_pix2pix:/data/ip2p sets/edits --resolution 256
    cm3jax encode sets/edits --tokenizers runs/7b
    cm3jax prepare set:vqa_v2:/data/vqa sets/vqa --resolution 256 && cm3jax encode sets/vqa --tokenizers runs/7b
    cm3jax train configs/sft/7b.py --inputs sets/edits --out runs/sft-7b --decoder.start runs/7b \\
        --decoder.mixture.sets sets/vqa/tokens
    cm3jax tasks runs/sft-7b

`cm3jax prepare --help` names the sets, `--decoder.mixture.weights` gives them other than equal shares, and the last
command counts every task in the rows. The paper: learning rate 5e-5, warm-up 150, batch 2M tokens, 30B tokens, rows of
4096, sets up- and down-sampled with thresholds 3 and 0.3. Read by us: 2M as 512 rows, 2**21 tokens; a threshold as how
often an epoch passes over a set; and ours is that half of the documents mask exactly their task's answer. The other
half keeps whole masked stretches (mask.rotate 0.5), which guidance needs; but a question masked with all its words is
like a masked caption, and our small model then wrote questions for captions (RESULTS.md). --decoder.mask.rotate 0 ends
that, where tasks are drawn without guidance.

Not run here: no weights are public. `cm3jax plan configs/sft/7b.py --topology v5e-256` tells if it fits, and how long.
"""

import dataclasses
import pathlib

from cm3jax import config as configs

pretrained = configs.load(pathlib.Path(__file__).parents[1] / "cm3leon" / "7b.py")
change = dataclasses.replace
before = pretrained.decoder

config = change(
    pretrained,
    name="sft-7b",
    decoder=change(
        before,
        mask=change(before.mask, answers=0.5),
        mixture=configs.Mixture(least=0.3, most=3.0),
        training=change(
            before.training,
            steps=14_305,  # 30e9 tokens
            batch=512,
            accumulate=2,
            optimizer=change(before.training.optimizer, peak_lr=5e-5, warmup=150),
        ),
    ),
)
