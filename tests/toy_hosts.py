"""One of several processes that train a tiny decoder: what test_hosts.py starts.

python tests/toy_hosts.py FOLDER '{"process": 0, "processes": 2, "coordinator": "localhost:1234", "steps": 20, ...}'
"""

import json
import sys
import time

import numpy as np

from cm3jax import cli, hosts, sharding, trees, vocab
from cm3jax import config as configs
from cm3jax.train import lm, loop

VOCAB = vocab.Vocab(text=40, image=16, sentinels=4, multiple=8)
BATCH, LENGTH = 16, 12


def stage(mesh=(1, -1, 1), steps=20, accumulate=1, save_every=5) -> configs.DecoderStage:
    return configs.DecoderStage(
        model=configs.Decoder(layers=2, width=16, heads=4, dtype="float32"),
        packing=configs.Packing(length=LENGTH),
        training=configs.Training(
            steps=steps,
            batch=BATCH,
            accumulate=accumulate,
            optimizer=configs.Optimizer(peak_lr=3e-3, warmup=4),
            mesh=configs.Mesh(*mesh),
            ema=0.9,
            log_every=1,
            save_every=save_every,
            keep=0,
        ),
    )


def batch(step: int) -> dict[str, np.ndarray]:
    """All rows of a step: a function of the step alone; weights differ, so that a mean of means would show."""
    draw = np.random.default_rng((3, step))
    ids = draw.integers(0, VOCAB.size, (BATCH, LENGTH + 1)).astype(np.int32)
    return {
        "inputs": ids[:, :-1],
        "targets": ids[:, 1:],
        "weights": draw.integers(0, 2, (BATCH, LENGTH)).astype(np.float32),
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (BATCH, 1)),
        "segments": np.ones((BATCH, LENGTH), np.int32),
        "modality": draw.integers(0, 3, (BATCH, LENGTH)).astype(np.int8),
    }


def batches(settings: configs.DecoderStage, start: int, pause: float = 0.0):
    """This host's rows of the batches from `start` on."""
    i, n = sharding.host_share(sharding.mesh(settings.training.mesh))
    mine, step = slice(i * BATCH // n, (i + 1) * BATCH // n), start
    while True:
        time.sleep(pause)
        yield {name: x[mine] for name, x in batch(step).items()}
        step += 1


def train(folder, pause: float = 0.0, **changes):
    settings = stage(**changes)
    rows = lambda start: batches(settings, start, pause)  # noqa: E731
    return loop.train(lm.task(settings, VOCAB), rows, None, settings.training, folder)


def main(folder: str, options: dict) -> None:
    hosts.start(configs.Hosts(*(options.pop(k) for k in ("coordinator", "processes", "process"))))
    try:
        state = train(folder, **options)
    except loop.Interrupted as e:
        print(e)
    else:
        specs = {name: str(leaf.sharding.spec) for name, leaf in trees.named_leaves(state.params).items()}
        print(json.dumps({"step": int(state.step), "specs": specs}))


if __name__ == "__main__":
    cli.settle_platform()
    try:
        main(sys.argv[1], json.loads(sys.argv[2]))
        cli.ended(0)
    except Exception:
        sys.excepthook(*sys.exc_info())
        print(cli.LOST.format(cli.several()), file=sys.stderr)
        cli.failed(1)
