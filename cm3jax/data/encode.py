"""Records to token shards, with the two tokenizers; by shard, and continues by shard. Imports no jax."""

import pathlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from cm3jax.data import progress, shards, tokens
from cm3jax.tokenizers import document, text
from cm3jax.types import Part, Record
from cm3jax.vocab import Vocab

Codes = Callable[[np.ndarray], np.ndarray]
"""Pictures uint8 [b, h, w, 3] -> image codes uint16 [b, n]."""


def encode(prepared, out, codes: Codes, tokenizer: text.Tokenizer, vocab: Vocab, batch: int) -> None:
    """Write a token shard to `out` for each record shard in `prepared` that has none yet, of every split."""
    found = [(split, i, paths) for split, paths in shards.files(prepared).items() for i in range(len(paths))]
    done = {(split, i) for split, paths in shards.files(prepared).items() for i in written(out, split, len(paths))}
    with progress.bar(len(found), len(done), "shards", "encode") as bar:
        for split, i, paths in found:
            if (split, i) not in done:
                pairs = documents(records(paths[i]), codes, tokenizer, vocab, batch)
                tokens.write(out, split, pairs, i, len(paths))
                bar.update()


def written(out, split: str, shards: int) -> list[int]:
    return tokens.written(out, split, shards) if pathlib.Path(out).is_dir() else []


def records(path: pathlib.Path) -> Iterator[Record]:
    """Yield the records of one shard."""
    reader = shards.open_file(path)
    return (shards.decode(reader.read([i])[0]) for i in range(reader.num_records()))


def documents(
    records: Iterable[Record], codes: Codes, tokenizer: text.Tokenizer, vocab: Vocab, batch: int
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (key, ids) of records, with at most `batch` pictures, plus those of one record, tokenized at a time."""
    waiting, count = [], 0
    for record in records:
        waiting.append(record)
        count += sum(map(is_picture, record.parts))
        if count >= batch:
            yield from encode_records(waiting, codes, tokenizer, vocab)
            waiting, count = [], 0
    yield from encode_records(waiting, codes, tokenizer, vocab)


def encode_records(
    records: list[Record], codes: Codes, tokenizer: text.Tokenizer, vocab: Vocab
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (key, ids) of records whose pictures all go through the image tokenizer at once."""
    pictures = [part for record in records for part in record.parts if is_picture(part)]
    drawn = iter(codes(np.stack(pictures)) if pictures else ())
    for record in records:
        parts = [next(drawn) if is_picture(part) else part for part in record.parts]
        yield record.key, document.encode(parts, tokenizer, vocab)


def is_picture(part: Part) -> bool:
    return not isinstance(part, str) and part.ndim == 3
