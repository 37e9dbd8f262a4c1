"""Peak memory of an FID of many pictures: python launch/stream_pictures.py 30000 [--inception]

The folder holds links to a few JPEGs of 256 px; all else is as in `cm3jax score`. Without --inception a cheap network
stands in for it, with as many features: it takes means of patches times a matrix. With it, its weights are random.
Prints JSON: pictures, seconds, GiB at the start (libraries loaded) and at the peak, and the FID.
"""

import argparse
import json
import pathlib
import tempfile
import time
import types

import numpy as np
from PIL import Image

from cm3jax import cli, metrics

DIFFERENT, SIDE = 97, 256


def fill(folder, count):
    """Make a folder of `count` pictures, of which DIFFERENT are different files."""
    rng, folder = np.random.default_rng(0), pathlib.Path(folder)
    (folder / ".files").mkdir(parents=True)
    for i in range(DIFFERENT):
        small = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
        small.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / ".files" / f"{i}.jpg", quality=90)
    for i in range(count):
        (folder / f"{i:06d}.jpg").symlink_to(folder / ".files" / f"{i % DIFFERENT}.jpg")
    return folder


def cheap():
    """Return a network of Inception's form that costs next to nothing."""
    import jax

    from cm3jax.evaluate import features, resize

    matrix = np.random.default_rng(1).normal(size=(13 * 13 * 3, 2048)).astype(np.float32)

    def apply(matrix, x):
        return x.reshape(-1, 13, 23, 13, 23, 3).mean((2, 4)).reshape(len(x), -1) @ matrix

    about = {"network": "means of patches times a matrix", "resize": "pytorch-fid"}
    devices = tuple(jax.local_devices())
    return features.Network(about, 2048, resize.pytorch_fid, apply, matrix, 64, devices)


def drawn():
    """Return FID's network with random weights."""
    import jax

    from cm3jax import config, sharding
    from cm3jax.evaluate import features, resize, score
    from cm3jax.nn import inception

    net = inception.Inception()
    params = sharding.unbox(jax.jit(net.init)(jax.random.key(0), np.zeros((1, 299, 299, 3), np.float32)))["params"]
    about = {"network": "Inception", "weights": "random", "resize": "pytorch-fid"}
    apply = lambda params, x: net.apply({"params": params}, x)[0]  # noqa: E731
    devices = tuple(jax.local_devices())
    return features.Network(about, 2048, resize.pytorch_fid, apply, params, score.at_once(config.Score()), devices)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("count", type=int)
    parser.add_argument("--inception", action="store_true")
    given = parser.parse_args()
    cli.settle_platform()
    from cm3jax import config
    from cm3jax.evaluate import score

    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        pictures = fill(folder / "drawn", given.count)
        np.savez(folder / "real.npz", mu=np.zeros(2048), sigma=np.eye(2048))
        tools = types.SimpleNamespace(inception=drawn() if given.inception else cheap())
        start, before = time.monotonic(), metrics.peak_memory_gib()
        files = folder / "real.npz", config.Score(), folder / "r.json", folder / "cache"
        found = score.score(pictures, *files, say=lambda line: None, tools=tools)
    figures = {"start_gib": round(before, 3), "peak_gib": round(metrics.peak_memory_gib(), 3)}
    seconds = round(time.monotonic() - start, 1)
    print(json.dumps({"pictures": given.count, "seconds": seconds, **figures, "fid": found["metrics"]["fid"]["value"]}))


if __name__ == "__main__":
    main()
