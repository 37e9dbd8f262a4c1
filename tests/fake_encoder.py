"""An encoder without weights, for the tests of what is built on one, and small folders of records for it.

A text's vector is a sum of seeded random vectors of its words, a picture's that of the words which its pixels name. The
interface is that of `retrieval.encoder.Encoder`.
"""

import zlib

import numpy as np

from cm3jax.data import index, shards
from cm3jax.retrieval import encoder
from cm3jax.types import Record

SIZE = 64
WORDS = "red green blue small large circle square star top left right bottom".split()  # noqa: SIM905


def unit(x):
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


class Fake:
    size, batch, devices = SIZE, 5, (type("Device", (), {"device_kind": "none"})(),)

    def __init__(self, identity="fake"):
        self.identity = identity

    def _word(self, word):
        return np.random.default_rng(zlib.crc32(word.encode())).normal(size=SIZE)

    def texts(self, texts, dropout=0.0, seeds=None):
        rows = [text.split() for text in texts]
        if dropout:
            rows = [encoder.dropped(row, dropout, seed) for row, seed in zip(rows, seeds, strict=True)]
        found = [sum((self._word(word) for word in row), np.zeros(SIZE)) for row in rows]
        return unit(np.array(found, np.float32).reshape(-1, SIZE)).astype(np.float32)

    def pictures(self, pictures):
        """A picture's columns hold word numbers in their first row; the last row is noise that only hashes see."""
        shown = [" ".join(f"{WORDS[n % len(WORDS)]} seen" for n in picture[0, :, 0]) for picture in pictures]
        return self.texts(shown)

    def documents(self, records):
        return encoder.Encoder.documents(self, records)


def picture(words, noise=0):
    """Return a picture that shows words, and differs from others of the same words by `noise`."""
    out = np.zeros((2, 4, 3), np.uint8)
    out[0, :, 0] = [WORDS.index(word) for word in words]
    out[1] = noise
    return out


def pair(key, words, noise=0, **values):
    return Record(key, (" ".join(words), picture(words, noise)), source="made up", license="CC0", **values)


def some(rng):
    """Return four words."""
    return [str(word) for word in rng.choice(WORDS, 4, replace=False)]


def write(folder, splits, count=2):
    """Write records {split: [Record, ...]} as prepared/ would hold them; return them in their order on disk."""
    for split, records in splits.items():
        with shards.Writer(folder, split, count) as writer:
            for record in records:
                writer.write(record)
    index.write(folder)
    return {split: list(shards.Reader(folder, split)) for split in splits}
