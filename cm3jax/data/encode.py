"""Records to token shards, with the two tokenizers; by shard, and continues by shard. Imports no jax.

Several hosts share the work: host i of n writes shards i, i + n, ... of all splits. A shard does not depend on who
writes it, so the hosts may come in any order, and again; `finish` writes the index once all shards are there.
"""

import itertools
import pathlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from cm3jax.config import Form
from cm3jax.data import index, progress, shards, tokens
from cm3jax.tokenizers import document, text, turns
from cm3jax.types import Part, Record
from cm3jax.vocab import Vocab

Codes = Callable[[np.ndarray], np.ndarray]
"""Pictures uint8 [b, h, w, 3] -> image codes uint16 [b, n]."""
Shard = tuple[str, int, int]
"""A split, the number of a shard of it, and how many it has."""


def encode(
    prepared,
    out,
    codes: Codes,
    tokenizer: text.Tokenizer,
    vocab: Vocab,
    batch: int,
    host: int = 0,
    hosts: int = 1,
    workers: int = 0,
    form: Form = Form(),
) -> None:
    """Write this host's token shards to `out`: one for each record shard in `prepared` that has none yet.

    Args:
      batch: Pictures that go through the image tokenizer at once.
      workers: Processes that read and decode the records ahead; 0: threads of this one.
      form: How documents are written.
    """
    mine, left = all_shards(prepared)[host::hosts], missing(prepared, out, host, hosts)
    found = shards.files(prepared)
    paths = [found[split][i] for split, i, _ in left]
    stream = records(paths, workers) if paths else iter(())
    with progress.bar(len(mine), len(mine) - len(left), "shards", "encode") as bar:
        for (split, i, count), path in zip(left, paths, strict=True):
            own = itertools.islice(stream, shards.count(path))
            tokens.write(out, split, documents(own, codes, tokenizer, vocab, batch, form), i, count)
            bar.update()
    getattr(stream, "close", lambda: None)()


def all_shards(prepared) -> list[Shard]:
    """Return the shards of all splits, in order."""
    return [(split, i, len(paths)) for split, paths in shards.files(prepared).items() for i in range(len(paths))]


def missing(prepared, out, host: int = 0, hosts: int = 1) -> list[Shard]:
    """Return the shards of a host that have no token shard, or one that is not as the index says."""
    mine, out = all_shards(prepared)[host::hosts], pathlib.Path(out)
    wrong = {tokens.FILE.fullmatch(name)["stem"] for name in index.faults(out)} if (out / index.FILE).exists() else ()
    return [(split, i, n) for split, i, n in mine if not whole(out, tokens.stem(split, i, n), wrong)]


def whole(out: pathlib.Path, stem: str, wrong) -> bool:
    return (out / f"{stem}.ids.npy").is_file() and stem not in wrong


def finish(prepared, out) -> bool:
    """Write the index if the token shards of all hosts are there; return whether they are."""
    if missing(prepared, out):
        return False
    index.write(out)
    return True


def records(paths: list[pathlib.Path], workers: int) -> Iterator[Record]:
    """Yield the records of several shards in order, read ahead."""
    import grain  # which imports jax, and starts no backend

    from cm3jax.data import pipeline

    reader = shards.Reader.of(paths)
    return iter(pipeline.iterate(grain.MapDataset.range(len(reader)).map(reader.__getitem__), workers))


def documents(
    records: Iterable[Record], codes: Codes, tokenizer: text.Tokenizer, vocab: Vocab, batch: int, form: Form = Form()
) -> Iterator[tuple]:
    """Yield (key, ids, answers) of records, or (key, ids) of form chameleon, which marks no answers.

    At most `batch` pictures, plus those of one record, are tokenized at a time.
    """
    waiting, count = [], 0
    for record in records:
        waiting.append(record)
        count += sum(map(is_picture, record.parts))
        if count >= batch:
            yield from encode_records(waiting, codes, tokenizer, vocab, form)
            waiting, count = [], 0
    yield from encode_records(waiting, codes, tokenizer, vocab, form)


def encode_records(
    records: list[Record], codes: Codes, tokenizer: text.Tokenizer, vocab: Vocab, form: Form = Form()
) -> Iterator[tuple]:
    """Yield what `documents` does of records whose pictures all go through the image tokenizer at once."""
    pictures = [part for record in records for part in record.parts if is_picture(part)]
    drawn = iter(codes(np.stack(pictures)) if pictures else ())
    for record in records:
        parts = [next(drawn) if is_picture(part) else part for part in record.parts]
        if form.kind == "chameleon":
            yield record.key, turns.encode(parts, tokenizer, vocab, form)
        else:
            yield record.key, *document.marked(parts, record.regions, tokenizer, vocab)


def is_picture(part: Part) -> bool:
    return not isinstance(part, str) and part.ndim == 3
