"""Any tensorflow-datasets set with a picture and a caption, read without TensorFlow.

A prepared set is read as its published format says: files of tf.train.Example protocol buffers, in array_record or
TFRecord framing, feature names joined by "/". TensorFlow is needed only where tfds must first prepare the set.
"""

import dataclasses
import itertools
import os
import pathlib
import struct
from collections.abc import Iterator

from cm3jax import config
from cm3jax.data import example, metadata, shards, sources_folder
from cm3jax.data.example import Bad, Example, Reject
from cm3jax.types import UserError

SPLITS = {"restval": "train"}  # COCO: the part of the validation pictures that Karpathy's split trains on
FORMATS = ("array_record", "tfrecord")
MAX_EXAMPLE = 2**30  # bytes
NO_CAPTION = ("filename", "file_name", "id", "url")  # text features that are none


@dataclasses.dataclass(frozen=True)
class Feature:
    """A feature that is read: "text", "label" (an index into `names`), "integer" or "image"."""

    name: str
    kind: str
    names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class File:
    """One file of a split, with its number of examples."""

    path: str
    split: str
    held_out: tuple[str, ...]
    length: int


@dataclasses.dataclass(frozen=True)
class Tfds:
    """Prepared files; a job is [[file, first example, stop], ...]."""

    name: str
    files: tuple[File, ...]
    image: str
    text: str
    features: tuple[Feature, ...]
    count: int = 0

    def fingerprint(self) -> list:
        return [self.name, [[file.split, file.length] for file in self.files]]

    def total(self, jobs: list) -> int:
        return sum(stop - first for job in jobs for _, first, stop in job)

    def jobs(self, shards: int) -> list[list]:
        total = sum(file.length for file in self.files)
        total = min(total, self.count or total)
        shards = example.shards(total, shards)
        ends = [total * i // shards for i in range(shards + 1)]
        return [self._ranges(first, stop) for first, stop in itertools.pairwise(ends)]

    def _ranges(self, first: int, stop: int) -> list[list[int]]:
        """Return [file, first, stop] for examples first..stop of all files in a row."""
        ends = list(itertools.accumulate((file.length for file in self.files), initial=0))
        cut = ((i, max(first - a, 0), min(stop, b) - a) for i, (a, b) in enumerate(itertools.pairwise(ends)))
        return [[i, low, high] for i, low, high in cut if low < high]

    def read(self, job: list) -> Iterator[Example | Reject]:
        for number, first, stop in job:
            file = self.files[number]
            name = os.path.basename(file.path)
            for index, data in _records(file.path, first, stop):
                where = f"{name}:{index}"
                try:
                    yield self._example(data, where, file)
                except Bad as e:
                    yield e.reject(where, where)

    def _example(self, data: bytes | Bad, where: str, file: File) -> Example:
        if isinstance(data, Bad):
            raise data
        row = _parse(data, self.features)
        picture = row.pop(self.image, b"")
        made = sources_folder.to_example(row, where, where, self.text, file.split, lambda _: picture)
        return dataclasses.replace(made, held_out=file.held_out)


def open(prepare: config.Prepare) -> Tfds:
    """Return the source of `tfds:NAME`, where NAME may hold a config and a version, "coco_captions/2014:1.1.0".

    Raises:
      UserError: if tfds has no such set or cannot prepare it here, or if its features leave a choice.
    """
    name = prepare.source.removeprefix("tfds:")
    builder = _prepared(name, prepare.tfds_dir)
    suffix = builder.info.file_format.file_suffix
    if suffix not in FORMATS:
        raise UserError(f"source {prepare.source!r}: prepared as {suffix}; prepare it as one of {', '.join(FORMATS)}")
    found = list(_features(builder.info.features))
    image = _choose("image_feature", prepare.image_feature, [f.name for f in found if f.kind == "image"], "image")
    text = _choose("text_feature", prepare.text_feature, *_captions(found))
    files = tuple(_files(builder.info.splits))
    return Tfds(builder.info.full_name, files, image, text, tuple(found), prepare.count)


def _prepared(name: str, folder: str):
    """Return tfds's builder of a set whose files are there; prepare it if they are not."""
    import tensorflow_datasets as tfds  # half a second, and only this kind of source needs it

    try:
        builder = tfds.builder(name, data_dir=folder or None)
    except Exception as e:  # tfds raises a dozen kinds
        raise UserError(f"source 'tfds:{name}': {_line(e)}; the sets are listed at tensorflow.org/datasets") from None
    if builder.info.splits:
        return builder
    try:
        settings = tfds.download.DownloadConfig(try_download_gcs=False)
        builder.download_and_prepare(download_config=settings, file_format="array_record")
    except Exception as e:
        raise UserError(_not_prepared(name, builder, e)) from None
    return builder


def _not_prepared(name: str, builder, error: Exception) -> str:
    head = f"source 'tfds:{name}': not prepared in {str(builder.data_dir)!r}, and tfds cannot do it here"
    if isinstance(error, ImportError):
        return f"{head}: {_line(error)}; install what it needs: pip install 'cm3jax[tfds]'"
    return f"{head}: {type(error).__name__}: {_line(error)}"


def _line(error: Exception) -> str:
    """Return the first line of an error."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _files(splits) -> Iterator[File]:
    """Yield the files of all splits.

    A set of one split is split by the hash of the pixels; one without validation gives a part of train to it.
    """
    known = {name: SPLITS.get(name, example.split_name(name)) for name in splits}
    missing = tuple(name for name in example.HELD_OUT if name not in known.values())
    for name, info in splits.items():
        free = known[name] == "train" and (len(known) == 1 or "validation" in missing)
        for part in info.file_instructions:
            split = "" if free else known[name]
            yield File(str(part.filename), split, missing if free else (), part.examples_in_shard)


# ------------------------------------------------------------------------------------------------------ which features


def _features(features, path: tuple[str, ...] = ()) -> Iterator[Feature]:
    """Yield the features of the kinds that are read, at any depth of dicts and sequences."""
    import tensorflow_datasets as tfds

    kinds = tfds.features
    name = "/".join(path)
    if isinstance(features, kinds.FeaturesDict):
        for key, feature in features.items():
            yield from _features(feature, (*path, key))
    elif isinstance(features, kinds.Sequence):
        inner = features.feature
        yield from (f for f in _features(inner, path) if f.kind != "image")
    elif isinstance(features, kinds.ClassLabel):
        yield Feature(name, "label", tuple(features.names or ()))
    elif isinstance(features, kinds.Image):
        yield Feature(name, "image")
    elif isinstance(features, kinds.Text):
        yield Feature(name, "text")
    elif isinstance(features, kinds.Tensor) and features.shape == () and "int" in str(features.np_dtype):
        yield Feature(name, "integer")


def _captions(found: list[Feature]) -> tuple[list[str], str]:
    """Return the features that may serve as a caption, and the one that stands out ("" if none does)."""
    texts = [f.name for f in found if f.kind == "text"]
    likely = [name for name in texts if name.rpartition("/")[2] not in NO_CAPTION]
    named = [name for name in likely if "caption" in name] or likely
    labels = [f.name for f in found if f.kind == "label"]
    return texts + labels, named[0] if len(named) == 1 else ""


def _choose(flag: str, asked: str, known: list[str], default: str) -> str:
    """Return the feature asked for, else the one that stands out.

    Raises:
      UserError: listing what there is.
    """
    if asked in known:
        return asked
    if default in known and not asked:
        return default
    if flag == "image_feature" and asked == "image" and len(known) == 1:  # the default of the config, not a wish
        return known[0]
    raise UserError(
        f"prepare.{flag} = {asked!r}: choose one of {', '.join(sorted(known)) or 'none: the set has no such feature'}"
    )


# ------------------------------------------------------------------------------------------------------ bytes to values


def _records(path: str, first: int, stop: int) -> Iterator[tuple[int, bytes | Bad]]:
    """Yield (index, bytes) of the examples first..stop of one file."""
    return (_array_records if ".array_record" in os.path.basename(path) else _tfrecords)(path, first, stop)


def _array_records(path: str, first: int, stop: int) -> Iterator[tuple[int, bytes | Bad]]:
    try:
        reader = shards.open_file(path)
    except UserError:
        yield first, Bad("unreadable shard", f"examples {first} to {stop - 1} are lost")
        return
    for index in range(first, stop):
        try:
            yield index, reader.read([index])[0]
        except (RuntimeError, IndexError) as e:
            yield index, Bad("unreadable example", str(e)[:200])


def _tfrecords(path: str, first: int, stop: int) -> Iterator[tuple[int, bytes | Bad]]:
    """Read TFRecord framing: length, its checksum, data, its checksum (unchecked: a bad picture shows when decoded)."""
    try:
        with pathlib.Path(path).open("rb") as file:
            for index in range(stop):
                (length,) = struct.unpack("<Q4x", file.read(12))
                if length > MAX_EXAMPLE:
                    raise ValueError(f"an example of {length} bytes")
                if index < first:
                    file.seek(length + 4, os.SEEK_CUR)
                    continue
                data = file.read(length + 4)
                if len(data) < length + 4:
                    raise ValueError("the file is cut short")
                first = index + 1
                yield index, data[:-4]
    except (OSError, ValueError, struct.error) as e:
        yield first, Bad("unreadable shard", f"examples {first} to {stop - 1} are lost: {e}")


def _parse(data: bytes, features: tuple[Feature, ...]) -> dict:
    """Return {name: bytes of a picture, or the text, texts, number or numbers of another feature}.

    Raises:
      Bad: if the bytes are no tf.train.Example, or a text is no UTF-8.
    """
    from google.protobuf import message
    from tensorflow_datasets.proto import tf_example_generated_pb2

    try:
        values = tf_example_generated_pb2.Example.FromString(data).features.feature
    except message.DecodeError as e:
        raise Bad("unreadable example", str(e)) from None
    row = {feature.name: _value(values[feature.name], feature) for feature in features if feature.name in values}
    return {name: value for name, value in row.items() if value != []}


def _value(value, feature: Feature):
    if feature.kind == "image":
        return b"".join(value.bytes_list.value[:1])
    if feature.kind == "text":
        return _single([metadata.decode_text(item) for item in value.bytes_list.value])
    numbers = list(value.int64_list.value)
    if feature.kind == "label" and feature.names:
        numbers = [feature.names[i] if 0 <= i < len(feature.names) else "" for i in numbers]
    return _single(numbers)


def _single(values: list):
    return values[0] if len(values) == 1 else values
