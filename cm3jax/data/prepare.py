"""Turn a source into records of one size: shards, summary.json, rejects.jsonl.

Works by shard, in processes, and continues by shard: a piece is written under a temporary name in `.work-HASH` and
renamed when whole; HASH names the config and what the source holds. When all are there they get their final names,
and summary.json is written last.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import tempfile
import time

import numpy as np
from PIL import Image

from cm3jax import config
from cm3jax.data import index, prepare_shard, shards, sources
from cm3jax.data import progress as bars
from cm3jax.tasks import features
from cm3jax.types import UserError

VERSION = 4  # part of HASH; raise it when the same config would give other records
SUMMARY, REJECTS = "summary.json", "rejects.jsonl"


def prepare(settings: config.Prepare, out, progress: bool = True, redo: bool = False) -> dict:
    """Write `settings.source` to folder `out` and return its summary; a finished folder is left as it is.

    Args:
      progress: Show a progress bar on stderr.
      redo: Replace what another config, or a changed source, left in `out`.

    Raises:
      UserError: for a bad setting or source, if `out` holds other data and not `redo`, or if no row gives a record.
    """
    check(settings)
    out, source = pathlib.Path(out), sources.open(settings)
    name, identity = _identity(settings, source)
    if not redo and (finished := _finished(out, name, identity)):
        return finished
    work = _work(out, name, redo)
    jobs = source.jobs(settings.shards)
    _run(source, jobs, range(len(jobs)), settings, work, progress)
    return _finish(out, work, len(jobs), {"hash": name, "config": identity})


def part(settings: config.Prepare, out, host: int, hosts: int, progress: bool = True) -> bool:
    """Write the pieces host, host + hosts, ...; return whether those of all hosts are there, for `prepare` to finish.

    The hosts see the source and `out` under the same paths, on a disk that they share; they may run at any time and in
    any order, and again. A piece does not depend on who makes it.

    Raises:
      UserError: as `prepare`.
    """
    check(settings)
    out, source = pathlib.Path(out), sources.open(settings)
    name, identity = _identity(settings, source)
    if _finished(out, name, identity):
        return True
    work, jobs = _work(out, name, False), source.jobs(settings.shards)
    _run(source, jobs, range(host, len(jobs), hosts), settings, work, progress)
    there = all(prepare_shard.folder(work, i).exists() for i in range(len(jobs)))
    if _finished(out, name, identity):  # by another host; looked at last, as finishing removes the pieces
        shutil.rmtree(work, ignore_errors=True)
        return True
    return there


def _identity(settings: config.Prepare, source) -> tuple[str, dict]:
    """Return the digest, and what it is of: all that decides the output."""
    identity = {**config.to_json(dataclasses.replace(settings, workers=0)), "fingerprint": source.fingerprint()}
    return config.digest(VERSION, identity), identity


def check(settings: config.Prepare) -> None:
    """Raise `UserError` for a value outside its limits."""
    if not 1 <= settings.resolution <= 4096:
        raise UserError(f"prepare.resolution = {settings.resolution}: must be from 1 to 4096 pixels")
    for field in ("count", "shards", "workers"):
        if getattr(settings, field) < 0:
            raise UserError(f"prepare.{field} = {getattr(settings, field)}: must be 0 (decide itself) or more")
    shares = settings.validation, settings.test
    if min(shares) < 0 or sum(shares) >= 1:
        raise UserError(f"prepare.validation = {shares[0]}, prepare.test = {shares[1]}: must be >= 0 and add up to < 1")
    if settings.feature:
        features.find(*settings.feature.split("=", 1))


def _finished(out: pathlib.Path, name: str, identity: dict) -> dict | None:
    """Return the summary in `out` if this very job wrote it, None if `out` is free.

    Raises:
      UserError: naming the first field that differs.
    """
    if not (out / SUMMARY).exists():
        return None
    try:
        summary = json.loads((out / SUMMARY).read_text())
        old = summary["config"]
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{str(out / SUMMARY)!r}: not a summary of `prepare`; choose another folder or delete it"
        ) from None
    if summary["hash"] == name:
        return summary if _whole(out, summary) else None
    own = config.to_json(identity)
    changed = next((key for key in old | own if old.get(key) != own.get(key)), "version")
    then, now = (str(values.get(changed))[:60] for values in (old, own))
    raise UserError(
        f"{str(out)!r} was prepared with another {changed} ({then}, now {now}); choose another folder, or redo this one"
    )


def _whole(out: pathlib.Path, summary: dict) -> bool:
    """Tell whether every shard is there, in its size."""
    for split, counts in summary["splits"].items():
        paths = [out / shards.name(split, i, counts["shards"]) for i in range(counts["shards"])]
        if sum(path.stat().st_size for path in paths if path.exists()) != counts["bytes"]:
            return False
    return (out / index.FILE).exists()


def _work(out: pathlib.Path, name: str, redo: bool) -> pathlib.Path:
    try:
        if redo and (out / SUMMARY).exists():
            (out / SUMMARY).unlink()
            shutil.rmtree(out / f".work-{name}", ignore_errors=True)
        (out / f".work-{name}").mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{str(out)!r}: cannot write there: {e.strerror}; choose another folder") from None
    return out / f".work-{name}"


# ------------------------------------------------------------------------------------------------------ many processes

_shared = None  # in a worker: (rows done, stop), from the main process


def _start_worker(rows, stop) -> None:
    global _shared
    _shared = rows, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the main process, which sets `stop`


def _tick() -> None:
    rows, stop = _shared
    with rows.get_lock():
        rows.value += 1
    if stop.is_set():
        raise prepare_shard.Stopped


def _work_on(*arguments) -> None:
    prepare_shard.run(*arguments, _tick)


def _workers(settings: config.Prepare, jobs: int) -> int:
    """Return the number of processes: as asked, else one per core that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(settings.workers or cores, jobs))


def _run(source, jobs: list, mine, settings: config.Prepare, work: pathlib.Path, progress: bool) -> None:
    """Write every piece of the numbers `mine` that is not there yet."""
    left = [i for i in mine if not prepare_shard.folder(work, i).exists()]
    done = sum(_read_done(work, i)["rows"] for i in set(mine) - set(left))
    total = source.total([jobs[i] for i in mine]) or None
    with bars.bar(total, done, "rows", "prepare", quiet=not progress) as bar:
        if _workers(settings, len(left)) == 1:
            for i in left:
                prepare_shard.run(source, jobs[i], i, settings, work, bar.update)
        else:
            _run_pool(source, [(jobs[i], i) for i in left], settings, work, bar)


def _run_pool(source, jobs: list, settings: config.Prepare, work: pathlib.Path, bar) -> None:
    # spawn: a forked copy of a process that has used jax or threads can hang
    context = multiprocessing.get_context("spawn")
    rows, stop = context.Value("q", 0), context.Event()
    pool = concurrent.futures.ProcessPoolExecutor(_workers(settings, len(jobs)), context, _start_worker, (rows, stop))
    with pool, contextlib.ExitStack() as stack:
        stack.callback(pool.shutdown, cancel_futures=True)  # waits: a piece under way is thrown away before we return
        stack.callback(stop.set)  # on any way out; called before the shutdown
        waiting = {pool.submit(_work_on, source, job, i, settings, work) for job, i in jobs}
        seen = 0
        while waiting:
            finished, waiting = concurrent.futures.wait(waiting, 0.2, concurrent.futures.FIRST_EXCEPTION)
            seen, before = rows.value, seen
            bar.update(seen - before)
            _raise_errors(finished)
        stack.pop_all()


def _raise_errors(finished) -> None:
    try:
        for future in finished:
            future.result()
    except concurrent.futures.process.BrokenProcessPool:
        raise UserError(
            "prepare: a worker process died (out of memory?); run it again to continue, with fewer --workers"
        ) from None


# ------------------------------------------------------------------------------------------------- pieces to a data set


def _read_done(work: pathlib.Path, number: int) -> dict:
    return json.loads((prepare_shard.folder(work, number) / prepare_shard.DONE).read_text())


def _finish(out: pathlib.Path, work: pathlib.Path, pieces: int, head: dict) -> dict:
    """Give the pieces their final names and write the summary. If it is cut off, calling it again goes on."""
    done = [_read_done(work, i) for i in range(pieces)]
    summary = {**head, **_summary(done, work, head["config"]["resolution"])}
    with _replace(out / REJECTS) as file:
        for i in range(pieces):
            file.write((prepare_shard.folder(work, i) / "rejects.jsonl").read_text("ascii"))
    if not summary["records"]:
        shutil.rmtree(work)
        raise UserError(_nothing(out, summary))
    for split, paths in _move_shards(out, work, done).items():
        summary["splits"][split] |= {"shards": len(paths), "bytes": sum(path.stat().st_size for path in paths)}
    index.write(out)
    with _replace(out / SUMMARY) as file:
        file.write(json.dumps(summary, indent=1) + "\n")
    for old in out.glob(".work-*"):
        shutil.rmtree(old)
    return summary


def _move_shards(out: pathlib.Path, work: pathlib.Path, done: list[dict]) -> dict[str, list[pathlib.Path]]:
    """Return the shards of each split, now under their final names; remove those of another config."""
    moved = {}
    for split in sorted({split for piece in done for split in piece["splits"]}):
        numbers = [i for i, piece in enumerate(done) if split in piece["splits"]]
        moved[split] = [out / shards.name(split, shard, len(numbers)) for shard in range(len(numbers))]
        for number, target in zip(numbers, moved[split], strict=True):
            piece = prepare_shard.folder(work, number) / split / shards.name(split, 0, 1)
            if piece.exists():
                piece.replace(target)
    wanted = {path for paths in moved.values() for path in paths}
    for path in out.iterdir():
        if shards.NAME.fullmatch(path.name) and path not in wanted:
            path.unlink()
    return moved


@contextlib.contextmanager
def _replace(path: pathlib.Path):
    """Write a text file under a temporary name, then rename it."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        yield file
    temporary.replace(path)


def _nothing(out: pathlib.Path, summary: dict) -> str:
    """Say why there is no record."""
    if not summary["rows"]:
        return f"source {summary['config']['source']!r}: holds no rows"
    first = json.loads((out / REJECTS).read_text("ascii").partition("\n")[0])
    return (
        f"source {summary['config']['source']!r}: none of {summary['rows']} rows is usable; first: {first['where']}:"
        f" {first['reason']} {first['detail']}".rstrip()
        + f"; all in {str(out / REJECTS)!r}"
    )


def _summary(done: list[dict], work: pathlib.Path, resolution: int) -> dict:
    """Add up the pieces' counts."""

    def add(name):
        return sum((collections.Counter(piece.get(name, {})) for piece in done), collections.Counter())

    splits = collections.defaultdict(collections.Counter)
    for piece in done:
        for split, counts in piece["splits"].items():
            splits[split].update(counts)
    return {
        "rows": sum(piece["rows"] for piece in done),
        "records": sum(counts["records"] for counts in splits.values()),
        "splits": {split: dict(splits[split]) for split in sorted(splits)},
        "sizes": _sizes(add("sides"), resolution),
        "licenses": dict(add("licenses").most_common(100)),
        "sources": dict(add("sources").most_common(100)),  # an interrupted older version's pieces have none
        **_duplicates(done, work),
        "rejects": dict(add("rejects").most_common()),
    }


def _sizes(sides: collections.Counter, resolution: int) -> dict:
    """Describe the pictures' shorter sides, in pixels before the crop."""
    if not sides:
        return {}
    values = np.array(sorted((int(side), count) for side, count in sides.items()))
    median = values[np.searchsorted(np.cumsum(values[:, 1]), values[:, 1].sum() / 2), 0]
    enlarged = values[values[:, 0] < resolution, 1].sum()
    low, high = values[0, 0], values[-1, 0]
    return {"shorter_side": {"min": int(low), "median": int(median), "max": int(high)}, "enlarged": int(enlarged)}


def _duplicates(done: list[dict], work: pathlib.Path) -> dict:
    """Count pictures whose pixels were seen before, and pictures that lie in more than one (given) split."""
    order = sorted({split for piece in done for split in piece["order"]})
    pieces = []
    for i, piece in enumerate(done):
        rows = np.load(prepare_shard.folder(work, i) / "hashes.npy")
        rows["split"] = np.array([order.index(split) for split in piece["order"]], "<u2")[rows["split"]]
        pieces.append(rows)
    rows = np.concatenate(pieces)
    distinct = np.unique(rows["hash"]).size
    return {"duplicates": int(rows.size - distinct), "straddling": int(np.unique(rows).size - distinct)}


# ------------------------------------------------------------------------------------------------------------- how fast


def throughput(resolution: int = 256, count: int = 400, workers: int = 0, side: tuple[int, int] = (480, 640)) -> dict:
    """Measure pictures/s of a folder of JPEGs, made for it in a temporary folder: read, decode, crop, write.

    Args:
      side: Height and width of the JPEGs; the default is that of many COCO pictures.

    Returns:
      {"pictures_per_second": ..., "seconds": ..., "pictures": count, "workers": processes used}
    """
    with tempfile.TemporaryDirectory() as folder:
        _photographs(pathlib.Path(folder), count, side)
        settings = config.Prepare(folder, resolution, workers=workers, shards=8)
        start = time.perf_counter()
        prepare(settings, pathlib.Path(folder, "out"), progress=False)
        seconds = time.perf_counter() - start
    used = _workers(settings, 8)
    return {"pictures_per_second": count / seconds, "seconds": seconds, "pictures": count, "workers": used}


def _photographs(folder: pathlib.Path, count: int, side: tuple[int, int]) -> None:
    """Write JPEGs with the statistics of photographs, roughly: smooth, with some noise."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        rough = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize(
            side[::-1], Image.Resampling.BICUBIC
        )
        noisy = np.clip(np.asarray(rough) + rng.normal(0, 6, (*side, 1)), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{i}.jpg", quality=90)
        rows.append(json.dumps({"file_name": f"{i}.jpg", "text": f"picture {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
