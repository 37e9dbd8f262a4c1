"""Scores of a folder of pictures: against a reference, pair by pair, or against captions; each with its protocol.

A figure is only comparable with one of the same protocol: weights, resizing, dtype, numbers and data of the reference,
settings, code. So each carries its own in the result file, and `results.table` looks at them. Vectors of pictures are
kept in the cache (`tables`), so that a run that was interrupted continues, and a reference is seen once.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from cm3jax import config as configs
from cm3jax.data import metadata, sources_folder
from cm3jax.data.example import Bad
from cm3jax.evaluate import clip_score, features, frechet, kernel, lpips, manifold, picture_files, results, tables
from cm3jax.evaluate import pictures as closeness
from cm3jax.interop import tensors
from cm3jax.retrieval import encoder as encoders
from cm3jax.stages import write_text
from cm3jax.types import UserError

SEEN_BY = ("evaluate/features", "evaluate/resize", "data/pictures", "nn/inception", "nn/clip", "interop/inception")
"""Modules that decide a picture's vector."""
SCORED_BY = ("frechet", "kernel", "manifold", "clip_score", "pictures", "lpips", "score")
SCORED_BY = (*SEEN_BY, "nn/perceptual", *(f"evaluate/{name}" for name in SCORED_BY))
"""Modules that decide a figure."""
SSIM_SIDE = 11
"""Pixels of a side at least: those of its window."""


class Metric(NamedTuple):
    """What a figure is made of."""

    kind: str
    """sets: the vectors of both; pairs: pictures one by one; captions: a picture's vector and its caption's."""
    network: str
    """A field of `config.Weights`, or "" for none."""
    whole: bool = False
    """Of sets: needs all vectors, not their statistics."""


METRICS = {
    "fid": Metric("sets", "inception"),
    "rfid": Metric("sets", "inception", True),
    "kid": Metric("sets", "inception", True),
    "precision": Metric("sets", "inception", True),
    "recall": Metric("sets", "inception", True),
    "clip_fid": Metric("sets", "clip"),
    "clip_score": Metric("captions", "clip"),
    "r_precision": Metric("captions", "clip"),
    "psnr": Metric("pairs", ""),
    "ssim": Metric("pairs", ""),
    "lpips": Metric("pairs", "vgg"),
}


def at_once(settings: configs.Score) -> int:
    """Return how many pictures go through a network at one time."""
    return settings.batch or (16 if jax.default_backend() == "cpu" else 64)


class Tools:
    """The networks that the settings name, each loaded when it is first asked for."""

    def __init__(self, settings: configs.Score):
        self.settings = settings

    @functools.cached_property
    def inception(self) -> features.Network:
        s = self.settings
        return features.of_inception(s.weights.inception, s.resize, s.dtype, at_once(s))

    @functools.cached_property
    def encoder(self) -> encoders.Encoder:
        return encoders.load(self.settings.weights.clip, at_once(self.settings))

    @functools.cached_property
    def clip(self) -> features.Network:
        return features.of_clip(self.encoder, at_once(self.settings))

    @functools.cached_property
    def vgg(self) -> lpips.Network:
        return lpips.Network(self.settings.weights.vgg, at_once(self.settings))

    @functools.cached_property
    def vgg_weights(self) -> str:
        return tensors.checksum(pathlib.Path(self.settings.weights.vgg))


@dataclasses.dataclass(eq=False)
class Side:
    """One of the two sets: a folder of pictures, or the statistics of one."""

    path: pathlib.Path
    tools: Any
    settings: configs.Score
    cache: pathlib.Path

    @property
    def saved(self) -> bool:
        """Whether it is a file of statistics."""
        return self.path.suffix == ".npz"

    @functools.cached_property
    def files(self) -> list[picture_files.File]:
        return picture_files.found(self.path)

    def table(self, network: str) -> tables.Table:
        """Return the vectors that a network, "inception" or "clip", makes of the pictures."""
        net = getattr(self.tools, network)
        folder = self.cache / configs.digest(str(self.path.resolve()), net.about, results.code(SEEN_BY))
        name = f"{self.path.name}, {network}"
        return features.table(net, self.files, folder, name, self.settings.threads)

    def statistics(self, network: str) -> tuple[frechet.Moments | frechet.Statistics, dict[str, Any]]:
        """Return the moments of those vectors, and what a protocol tells of the set."""
        if not self.saved:
            table = self.table(network)
            return frechet.total(table, table.width), {"count": table.count, "data": table.data[0]}
        found, about = frechet.load(self.path)
        net = getattr(self.tools, network)
        if len(found.mean) != net.width:
            raise UserError(f"statistics {str(self.path)!r}: of {len(found.mean)} numbers, the network has {net.width}")
        if not about:
            file = tensors.checksum(self.path)[:16]
            return found, {"count": None, "data": f"statistics of unknown protocol, SHA-256 {file}"}
        if differing := results.differing([about.get("features", {}), net.about]):
            name, there, here = differing[0]
            raise UserError(
                f"statistics {str(self.path)!r}: made with {name} = {there!r}, now {here!r}; make them again, or score"
                " with the same"
            )
        return found, {"count": found.count, "data": about.get("data")}


def score(
    pictures,
    reference,
    settings: configs.Score,
    out,
    cache,
    captions: str = "",
    statistics: str = "",
    say: Callable[[str], Any] = print,
    tools: Any = None,
    made: Mapping[str, Any] = {},
) -> dict:
    """Score pictures, write the result file, and return what it holds.

    A figure that the file has already is kept, if nothing has changed that it follows from.

    Args:
      pictures: A folder, or an .npz of statistics.
      reference: The same; "": none, where no figure needs one.
      out: The result file; it is written again after each figure.
      cache: Folder for vectors, which other calls use too.
      captions: metadata.jsonl or .csv with the pictures' captions; "": the one in their folder.
      statistics: An .npz to write the statistics of `pictures` to.
      tools: The networks; None: those of the settings. Of given ones nobody knows, so that no figure is kept.
      made: How the pictures were made, for the protocol.

    Raises:
      UserError: for what cannot be scored so, before any work where that is known.
    """
    own, tools = tools is None, tools or Tools(settings)
    paths = [pathlib.Path(path) for path in (pictures, reference) if path]
    sides = [Side(path, tools, settings, pathlib.Path(cache)) for path in paths]
    check(settings, sides, bool(statistics), own)
    start, result, before = time.monotonic(), head(sides), results.figures(out) if own else {}
    for name in settings.metrics:
        if METRICS[name].kind != "captions" and len(sides) < 2:
            say(f"{name}: left out, as there is no reference")
            continue
        key = known(name, sides, settings, captions, made) if own else ""
        kept = bool(key) and before.get(name, {}).get("key") == key
        found = before[name] if kept else FIGURES[name](sides, settings, captions, name)
        if not kept:
            found["protocol"] |= {"code": results.code(SCORED_BY), **made}
        result["metrics"][name] = found | ({"key": key} if own else {})
        result["seconds"] = round(time.monotonic() - start, 2)
        pathlib.Path(out).parent.mkdir(parents=True, exist_ok=True)
        write_text(pathlib.Path(out), json.dumps(result, indent=1) + "\n")
        warning = f"; warning: {found['warning']}" if "warning" in found else ""
        say(f"{name}: {found['value']:.6g}{' (known)' if kept else ''}{warning}")
    if statistics:
        network = saved_by(settings)
        found, about = sides[0].statistics(network)
        told = {
            "features": getattr(sides[0].tools, network).about,
            "data": about["data"],
            "code": results.code(SEEN_BY),
        }
        frechet.save(statistics, found, told)
        say(f"statistics of {about['count']:,} pictures: {statistics}")
    return result


def saved_by(settings: configs.Score) -> str:
    """Return the network whose statistics are written: Inception, but for those who ask for CLIP-FID alone."""
    return "clip" if set(settings.metrics) == {"clip_fid"} else "inception"


def known(name: str, sides: Sequence[Side], settings: configs.Score, captions: str, made: Mapping[str, Any]) -> str:
    """Return 16 hex digits of all that a figure follows from; of files, their names, sizes and times."""
    network, paths = METRICS[name].network, [side.path for side in sides]  # captions may lie among the pictures
    paths += [pathlib.Path(path) for path in (captions, network and getattr(settings.weights, network)) if path]
    files = [sorted(path.rglob("*")) if path.is_dir() else [path] for path in paths]
    stats = [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in itertools.chain(*files) if f.is_file()]
    deciding = dataclasses.replace(settings, metrics=(), batch=1, threads=1)
    return configs.digest(name, deciding, results.code(SCORED_BY), dict(made), stats)


def needs(settings: configs.Score, prefix: str = "") -> None:
    """Raise a UserError for weights that the metrics need and the settings do not name.

    Args:
      prefix: Of the flags.
    """
    for name in settings.metrics:
        if (network := METRICS[name].network) and not getattr(settings.weights, network):
            raise UserError(f"{name}: needs --{prefix}weights.{network} PATH; cm3jax score --help says of what")


def check(settings: configs.Score, sides: Sequence[Side], statistics: bool, own: bool) -> None:
    """Raise a UserError for what the sides or the settings cannot give.

    Args:
      statistics: They are to be written.
      own: The networks are those of the settings.
    """
    if not settings.metrics:
        raise UserError(f"--metrics: names none of {', '.join(METRICS)}")
    if own:
        needs(settings)
    for name in settings.metrics:
        metric = METRICS[name]
        if metric.kind != "captions" and len(sides) < 2 and not statistics:
            raise UserError(f"{name}: needs a reference behind the pictures, a folder or statistics (.npz)")
        if own and statistics and not getattr(settings.weights, network := saved_by(settings)):
            raise UserError(f"{name}: needs --weights.{network} PATH; cm3jax score --help says of what")
        seen = sides[:1] if metric.kind == "captions" else sides if metric.kind == "pairs" or metric.whole else ()
        for side in seen:
            if side.saved:
                raise UserError(f"{name}: {side.path} holds mean and covariance only; give the folder of pictures")


def head(sides: Sequence[Side]) -> dict[str, Any]:
    """Return a result without a figure.

    Raises:
      UserError: for a folder that is not there or empty.
    """
    found: dict[str, Any] = {}
    for name, side in zip(("pictures", "reference"), sides, strict=False):
        found[name] = {"path": str(side.path), "files": 1 if side.saved else len(side.files)}
    device = jax.local_devices()[0].device_kind
    environment = {name: results.version(name) for name in ("jax", "jaxlib", "flax", "numpy", "pillow")}
    return found | {"metrics": {}, "environment": environment | {"device": device}}


# -------------------------------------------------------------------------------------------------------------- figures


def _frechet(sides: Sequence[Side], settings: configs.Score, captions: str, name: str) -> dict[str, Any]:
    network = METRICS[name].network
    if name == "rfid":
        picture_files.pairs(sides[0].files, sides[1].files)
    (a, mine), (b, reference) = (side.statistics(network) for side in sides)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = {"value": frechet.distance(a, b), "data": mine["data"]}
    if told := frechet.doubt(a, b):
        found["warning"] = told
    return found | {"protocol": _sets(sides[0], network, mine, reference)}


def _sets(side: Side, network: str, mine: dict, reference: dict) -> dict[str, Any]:
    return {"features": getattr(side.tools, network).about, "samples": mine["count"], "reference": reference}


def _kernel(sides: Sequence[Side], settings: configs.Score, captions: str, name: str) -> dict[str, Any]:
    mine, reference = (side.table("inception") for side in sides)
    own = {"subsets": settings.subsets, "subset_size": settings.subset_size, "seed": settings.seed}
    mean, deviation = kernel.distance(mine.all(), reference.all(), *own.values())
    protocol = _sets(sides[0], "inception", *(_told(table) for table in (mine, reference)))
    return {"value": mean, "deviation": deviation, "data": mine.data[0], "protocol": protocol | own}


def _told(table: tables.Table) -> dict[str, Any]:
    return {"count": table.count, "data": table.data[0]}


def _manifold(sides: Sequence[Side], settings: configs.Score, captions: str, name: str) -> dict[str, Any]:
    mine, reference = (side.table("inception") for side in sides)
    found = dict(zip(("precision", "recall"), _both(mine, reference, settings.neighbours), strict=True))
    protocol = _sets(sides[0], "inception", *(_told(table) for table in (mine, reference)))
    return {"value": found[name], "data": mine.data[0], "protocol": protocol | {"neighbours": settings.neighbours}}


@functools.lru_cache(1)
def _both(mine: tables.Table, reference: tables.Table, neighbours: int) -> tuple[float, float]:
    """Return precision and recall, which are found together and asked for one after the other."""
    return manifold.precision_recall(mine.all(), reference.all(), neighbours)


def _captions(sides: Sequence[Side], settings: configs.Score, captions: str, name: str) -> dict[str, Any]:
    side = sides[0]
    texts = read_captions(side.path, side.files, captions)
    table, encoder = side.table("clip"), side.tools.encoder
    shown, told = table.all(), encoder.texts(texts)
    shown /= np.maximum(np.linalg.norm(shown, axis=1, keepdims=True), 1e-12)
    if not told.any(1).all():
        empty = texts[int((~told.any(1)).argmax())]
        raise UserError(f"caption {empty!r}: has no token to score; leave its picture out")
    own = {"candidates": settings.candidates, "seed": settings.seed} if name == "r_precision" else {}
    value = clip_score.r_precision(texts, told, shown, *own.values()) if own else clip_score.score(told, shown)
    text = hashlib.sha256("\0".join(sorted(texts)).encode()).hexdigest()[:16]
    protocol = {"features": side.tools.clip.about, "samples": table.count, "captions": text, **own}
    return {"value": value, "data": table.data[0], "protocol": protocol}


def _pairs(sides: Sequence[Side], settings: configs.Score, captions: str, name: str) -> dict[str, Any]:
    side = sides[0]
    rows = picture_files.pairs(side.files, sides[1].files)
    about = {"weights": side.tools.vgg_weights} if name == "lpips" else {}
    where = [str(side.path.resolve()) for side in sides]
    folder = side.cache / configs.digest(name, where, about, results.code(SCORED_BY))
    compare = {"psnr": closeness.psnr, "ssim": closeness.ssim}.get(name) or side.tools.vgg
    work = functools.partial(_compared, compare=compare, settings=settings, smallest=SMALLEST.get(name, 1))
    table = tables.make(folder, rows, 1, work, f"{side.path.name}, {name}")
    values = table.all()[:, 0].astype(np.float64)
    same = np.isinf(values)  # PSNR of pictures that are equal
    if same.all():
        raise UserError(f"{name}: all {len(values)} pictures equal their reference; is it the same folder?")
    found = {"value": float(values[~same].mean()), "deviation": float(values[~same].std()), "data": table.data[0]}
    if same.any():
        found |= {"equal": int(same.sum()), "warning": f"without {same.sum():,} pictures that equal their reference"}
    reference = {"count": table.count, "data": table.data[1]}
    return found | {"protocol": {"samples": table.count, "reference": reference, **about}}


SMALLEST = {"ssim": SSIM_SIDE, "lpips": lpips.SMALLEST}
"""Pixels of a side at least."""


def _compared(rows: Sequence[tables.Row], compare, settings: configs.Score, smallest: int):
    """Return a figure of each pair, [n, 1], and the digests of the files; pairs of one size go together."""
    digests: list[str] = []

    def both(row: tables.Row) -> tuple[np.ndarray, np.ndarray, str, str]:
        (a, first), (b, second) = (picture_files.read(file) for file in row)
        if a.shape != b.shape:
            sizes = " and ".join(f"{x.shape[1]} x {x.shape[0]}" for x in (a, b))
            raise UserError(f"{row[0].path} and {row[1].path}: {sizes} pixels; pairs must be of one size")
        if min(a.shape[:2]) < smallest:
            raise UserError(f"{row[0].path}: {a.shape[1]} x {a.shape[0]} pixels; sides must be at least {smallest}")
        return a, b, first, second

    def read() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for a, b, first, second in picture_files.ahead(rows, both, settings.threads):
            digests.extend((first, second))
            yield a, b

    out: list[np.ndarray] = []
    for _, group in itertools.groupby(read(), lambda pair: pair[0].shape):
        while part := list(itertools.islice(group, at_once(settings))):
            out.append(compare(*(np.stack(side) for side in zip(*part, strict=True))))
    return np.concatenate(out)[:, None].astype(np.float32), digests


FIGURES: dict[str, Callable[..., dict[str, Any]]] = {
    "fid": _frechet,
    "rfid": _frechet,
    "clip_fid": _frechet,
    "kid": _kernel,
    "precision": _manifold,
    "recall": _manifold,
    "clip_score": _captions,
    "r_precision": _captions,
    "psnr": _pairs,
    "ssim": _pairs,
    "lpips": _pairs,
}


# ------------------------------------------------------------------------------------------------- captions


def read_captions(folder: pathlib.Path, files: Sequence[picture_files.File], path: str = "") -> list[str]:
    """Return the first caption of each picture, in the pictures' order.

    Args:
      path: metadata.jsonl or .csv with file_name, below `folder`, and text; "": the one in the folder.

    Raises:
      UserError: if there is none, or naming the picture without caption or the caption without picture.
    """
    names = [path] if path else [str(folder / name) for name in sources_folder.NAMES if (folder / name).is_file()]
    if not names:
        raise UserError(f"pictures {str(folder)!r}: no metadata.jsonl in it to take captions from; set --captions")
    if not pathlib.Path(names[0]).is_file():
        raise UserError(f"captions {names[0]!r}: no such file")
    found: dict[str, str] = {}
    for _, line, row in metadata.rows(pathlib.Path(names[0])):
        try:
            if isinstance(row, Bad):
                raise row
            name = row.get("file_name")
            if not isinstance(name, str) or name in found:
                raise Bad("file_name", f"{name!r} is {'there twice' if name in found else 'no name'}")
            found[name] = sources_folder.captions_of(row, "text")[0]
        except Bad as e:
            raise UserError(f"captions {names[0]}:{line}: {e}") from None
    wanted = {file.name for file in files}
    for name in sorted(wanted ^ set(found)):
        lacks = "a picture without caption" if name in wanted else "a caption without picture"
        raise UserError(f"captions {names[0]}: {name!r} is {lacks} ({len(wanted ^ set(found))} names do not match)")
    return [found[file.name] for file in files]
