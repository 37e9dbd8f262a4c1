"""Laws of the sources: what their rows become. Broken rows are in test_bad_inputs.py, scenes in test_prepare.py."""

import csv
import io
import json
import os
import struct
import subprocess
import sys

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from cm3jax import config
from cm3jax.data import metadata, sources, sources_tfds, sources_webdataset
from cm3jax.data.example import Bad, Example
from cm3jax.tasks import templates
from cm3jax.types import ANSWER, Region, UserError
from tests import broken


def examples(source, shards: int = 1, **settings) -> list[Example]:
    """Return everything that a source yields."""
    opened = sources.open(config.Prepare(source=str(source), **settings))
    return [item for job in opened.jobs(shards) for item in opened.read(json.loads(json.dumps(job)))]


def folder(root, *rows: dict, name="metadata.jsonl"):
    """Write rows and the pictures that they name."""
    root.mkdir(exist_ok=True)
    (root / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for i in range(4):
        (root / f"{i}.png").write_bytes(broken.encoded(seed=i))
    return root


# ------------------------------------------------------------------------------------------------------------- metadata

CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)


@hypothesis.given(st.lists(st.tuples(CELLS, CELLS), max_size=12), st.integers(0, 12), st.booleans())
def test_any_csv_comes_back_whole_and_from_the_middle(tmp_path_factory, cells, start, quote_all):
    cells = [pair for pair in cells if pair != ("", "")]  # reads as a blank line
    path = tmp_path_factory.mktemp("csv") / "metadata.csv"
    buffer = io.StringIO(newline="")
    style = csv.QUOTE_ALL if quote_all else csv.QUOTE_MINIMAL
    csv.writer(buffer, quoting=style).writerows([("file_name", "text"), *cells])
    path.write_bytes(buffer.getvalue().encode())
    rows = list(metadata.rows(path))
    assert [(row["file_name"], row["text"]) for _, _, row in rows] == cells
    for offset, line, _ in rows[start : start + 1]:
        assert list(metadata.rows(path, offset, None, line)) == rows[start:]


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_the_data(tmp_path):
    (tmp_path / "metadata.csv").write_bytes(b'\xef\xbb\xbffile_name,text\r\n0.png,"a\r\nb"\r\n\r\n1.png,c\r\n')
    rows = [row for _, _, row in metadata.rows(tmp_path / "metadata.csv")]
    assert rows == [{"file_name": "0.png", "text": "a\r\nb"}, {"file_name": "1.png", "text": "c"}]
    (tmp_path / "metadata.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n \r\n{"a": 2}')
    assert [(line, row) for _, line, row in metadata.rows(tmp_path / "metadata.jsonl")] == [
        (1, {"a": 1}),
        (3, {"a": 2}),
    ]


def test_an_unclosed_quote_swallows_no_other_row(tmp_path):
    lines = [b"file_name,text", b'0.png,"open', b"1.png,b", b'2.png,"c"', b'3.png,"two\nlines"', b'4.png,5" wide']
    (tmp_path / "metadata.csv").write_bytes(b"\n".join(lines))
    rows = [row for _, _, row in metadata.rows(tmp_path / "metadata.csv")]
    assert isinstance(rows[0], Bad)
    assert [row["text"] for row in rows[1:]] == ["b", "c", "two\nlines", '5" wide']


# --------------------------------------------------------------------------------------------------------------- folder


def test_a_row_becomes_a_pair_with_all_that_it_says(tmp_path):
    row = {
        "file_name": "0.png", "text": "a cat", "license": "CC0-1.0", "source": "me", "split": "test", "group": 7,
        "regions": [{"box": [0.1, 0.2, 0.5, 0.6], "kind": "face", "label": "Ada"}, {"box": [0, 0, 1, 1]}], "year": 1999,
    }  # fmt: skip
    (found,) = examples(folder(tmp_path, row))
    assert found.parts == ("a cat", broken.encoded(seed=0))
    assert (found.license, found.source, found.split, found.group) == ("CC0-1.0", "me", "test", "7")
    assert found.regions == (Region(1, "face", (0.1, 0.2, 0.5, 0.6), "Ada"), Region(1, "object", (0.0, 0.0, 1.0, 1.0)))
    assert found.fields == {"year": 1999}


def test_a_row_with_parts_becomes_an_interleaved_document(tmp_path):
    parts = ["before", {"file_name": "1.png"}, {"text": "between"}, {"file_name": "2.png"}]
    (found,) = examples(folder(tmp_path, {"parts": parts, "regions": [{"box": [0, 0, 1, 1], "part": 3}]}))
    assert found.parts == ("before", broken.encoded(seed=1), "between", broken.encoded(seed=2))
    assert found.regions[0].part == 3


def test_a_row_with_a_task_becomes_its_document_with_the_answer_marked(tmp_path):
    row = {
        "task": "depth",
        "feature_image": {"file_name": "1.png"},
        "caption": "a cat",
        "image": {"file_name": "2.png"},
    }
    asked = {
        "task": "question",
        "question": "What is it?",
        "answer": "a cat",
        "image": {"file_name": "0.png"},
        "year": 3,
    }
    lacks, unknown = {"task": "depth", "caption": "a cat"}, {"task": "smell"}
    info = {"task": "depth", "file_name": "3.png", "text": "a plain pair"}
    drawn, told, *bad, plain = examples(folder(tmp_path, row, asked, lacks, unknown, info))
    assert drawn.parts[1:] == (broken.encoded(seed=1), "a cat", broken.encoded(seed=2))
    assert [(r.part, r.kind, r.label) for r in drawn.regions] == [(3, ANSWER, "image")]
    assert drawn.fields == {"task": "depth", "wording": 0, "truth": {}}
    assert templates.read("question", told.parts) == {
        "question": "What is it?",
        "answer": "a cat",
        "image": told.parts[1],
    }
    assert told.fields["year"] == 3 and told.regions[0].label == "answer"
    assert [reject.reason for reject in bad] == ["bad task"] * 2
    assert "feature_image" in bad[0].detail and "smell" in bad[1].detail
    assert plain.parts == ("a plain pair", broken.encoded(seed=3)) and plain.fields == {"task": "depth"}


def test_of_several_captions_the_first_is_the_documents_and_all_are_kept(tmp_path):
    (found,) = examples(folder(tmp_path, {"file_name": "0.png", "text": ["a cat", "a pet"]}))
    assert found.parts[0] == "a cat" and found.fields == {"captions": ["a cat", "a pet"]}


def test_csv_and_jsonl_say_the_same(tmp_path):
    row = {"file_name": "0.png", "text": "a cat", "license": "CC0-1.0"}
    regions = [{"box": [0, 0, 0.5, 1]}]
    (first,) = examples(folder(tmp_path / "a", {**row, "regions": regions}))
    folder(tmp_path / "b")
    (tmp_path / "b" / "metadata.jsonl").unlink()
    with (tmp_path / "b" / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([[*row, "regions"], [*row.values(), json.dumps(regions)]])
    (second,) = examples(tmp_path / "b")
    assert (first.parts, first.license, first.regions) == (second.parts, second.license, second.regions)


def test_sub_folders_name_the_split(tmp_path):
    for name in ("train", "val", "cats"):
        folder(tmp_path / name, {"file_name": "0.png", "text": name})
    assert {e.parts[0]: e.split for e in examples(tmp_path)} == {"train": "train", "val": "validation", "cats": ""}


def test_a_picture_may_lie_deeper_and_behind_an_inner_link(tmp_path):
    folder(tmp_path, {"file_name": "deep/link.png", "text": "a"})
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "link.png").symlink_to(tmp_path / "2.png")
    assert examples(tmp_path)[0].parts[1] == broken.encoded(seed=2)


def test_another_column_may_hold_the_caption(tmp_path):
    source = folder(tmp_path, {"file_name": "0.png", "title": "a cat"})
    assert examples(source, text_feature="title")[0].parts[0] == "a cat"


@pytest.mark.parametrize("shards", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_any_number_of_shards_reads_the_same_rows_in_order(tmp_path, shards, count):
    for name in ("a", "b"):
        folder(tmp_path / name, *[{"file_name": f"{i % 4}.png", "text": f"{name}{i}"} for i in range(4)])
    expected = [f"{name}{i}" for name in "ab" for i in range(4)][: count or None]
    found = examples(tmp_path, shards, count=count)
    assert [e.parts[0] for e in found] == expected
    assert len({e.key for e in found}) == len(expected)
    opened = sources.open(config.Prepare(source=str(tmp_path), count=count))
    assert opened.total(opened.jobs(shards)) == len(expected)


def test_the_fingerprint_follows_the_metadata(tmp_path):
    def fingerprint():
        return sources.open(config.Prepare(source=str(tmp_path))).fingerprint()

    folder(tmp_path, {"file_name": "0.png", "text": "a"})
    before = fingerprint()
    assert before == fingerprint()
    folder(tmp_path, {"file_name": "0.png", "text": "b"})
    assert before != fingerprint()


# ----------------------------------------------------------------------------------------------------------- WebDataset


def tars(root, *tars: list[bytes]) -> str:
    for i, pieces in enumerate(tars):
        (root / f"{i:05d}.tar").write_bytes(b"".join(pieces) + bytes(1024))
    return str(root)


def test_what_img2dataset_writes_becomes_pairs(tmp_path):
    values = {"caption": "from json", "url": "https://example.com/a", "key": "0", "status": "success", "license": None}
    pieces = [
        broken.example("0001", b"a cat", json=json.dumps(values).encode()),
        broken.example("0002", None, json=json.dumps(values).encode()),
        broken.member("folder/0003.a.JPG", b"other"),
        broken.member("folder/0003.JPEG", broken.encoded("jpeg")) + broken.member("folder/0003.txt", b"a dog"),
    ]
    found = examples(tars(tmp_path, pieces))
    assert [e.parts[0] for e in found] == ["a cat", "from json", "a dog"]
    assert found[0].source == "https://example.com/a" and found[0].fields == {"key": "0", "status": "success"}
    assert found[2].parts[1] == broken.encoded("jpeg")
    assert [e.key for e in found] == ["00000.tar/0001", "00000.tar/0002", "00000.tar/folder/0003"]


def test_a_key_that_comes_again_stays_unique(tmp_path):
    found = examples(tars(tmp_path, [broken.example("a"), broken.example("b"), broken.example("a")]))
    assert [e.key for e in found] == ["00000.tar/a", "00000.tar/b", "00000.tar/a#2"]


@pytest.mark.parametrize("count, shards", [(0, 0), (0, 2), (1, 0), (4, 0), (5, 1), (99, 2)])
def test_tars_are_read_in_order_up_to_the_count(tmp_path, count, shards):
    tars(tmp_path, *[[broken.example(f"{t}{i}", f"{t}{i}".encode()) for i in range(3)] for t in range(3)])
    expected = [f"{t}{i}" for t in range(3) for i in range(3)][: count or None]
    assert [e.parts[0] for e in examples(f"{tmp_path}/{{00000..00002}}.tar", shards, count=count)] == expected


def test_braces_multiply_and_keep_leading_zeros():
    assert sources_webdataset.expand("a.tar") == ["a.tar"]
    assert sources_webdataset.expand("{a,b}/{08..10}.tar") == [f"{x}/{n}.tar" for x in "ab" for n in ("08", "09", "10")]


def test_a_glob_and_equal_names_in_two_folders_work(tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        tars(tmp_path / name, [broken.example("a")])
    found = examples(f"{tmp_path}/{{x,y}}/*.tar")
    assert [e.key for e in found] == [os.path.join(name, "00000.tar/a") for name in ("x", "y")]


# ----------------------------------------------------------------------------------------------------------------- tfds


def build(root, splits: dict[str, int], file_format: str = "array_record", **more) -> str:
    """Write a tiny set in tfds's published format (`more`: further features, {name: (feature, value)})."""
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(),
        "image/filename": tfds.features.Text(),
        "image/id": np.int64,
        "captions": tfds.features.Sequence({"id": np.int64, "text": tfds.features.Text()}),
        "label": tfds.features.ClassLabel(names=["cat", "dog"]),
    }

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        __module__ = "tiny"  # of no package: tfds need not look for checksums
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            every = {**features, **{name: feature for name, (feature, _) in more.items()}}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(every))

        def _split_generators(self, _):
            return {name: self._generate_examples(name, count) for name, count in splits.items()}

        def _generate_examples(self, split, count):
            for i in range(count):
                captions = [{"id": 0, "text": f"é {split} {i}"}, {"id": 1, "text": "again"}]
                yield i, {
                    "image": io.BytesIO(broken.encoded(seed=i)), "image/filename": f"{i}.png", "image/id": i,
                    "captions": captions, "label": i % 2, **{name: value for name, (_, value) in more.items()},
                }  # fmt: skip

    Tiny(data_dir=str(root)).download_and_prepare(file_format=file_format)
    return "tfds:tiny"


def check_tiny(found: list[Example]):
    assert len(found) == 5 and len({e.key for e in found}) == 5
    for e in found:
        i = e.fields["image/id"]
        assert e.parts == (f"é train {i}", broken.encoded(seed=i))
        assert e.fields["captions"] == [f"é train {i}", "again"] and e.fields["label"] == ["cat", "dog"][i % 2]


def test_a_tfds_set_gives_its_pictures_and_captions_without_tensorflow(tmp_path):
    found = examples(build(tmp_path, {"train": 5}), 3, tfds_dir=str(tmp_path))
    check_tiny(found)
    assert {e.split for e in found} == {""} and found[0].held_out == ("validation", "test")
    assert len(examples("tfds:tiny", count=2, tfds_dir=str(tmp_path))) == 2


@pytest.mark.slow
def test_a_tfds_set_in_tfrecord_files_reads_the_same(tmp_path):
    check_tiny(examples(build(tmp_path, {"train": 5}, "tfrecord"), 2, tfds_dir=str(tmp_path)))


def test_prepare_of_a_tfds_set_imports_neither_tensorflow_nor_jax(tmp_path):
    settings = f"source={build(tmp_path / 'in', {'train': 3})!r}, tfds_dir={str(tmp_path / 'in')!r}, workers=1"
    script = f"""
import sys
from cm3jax import config
from cm3jax.data import prepare
prepare.prepare(config.Prepare({settings}), {str(tmp_path / "out")!r})
assert not {{"jax", "tensorflow", "torch"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": os.getcwd()}, check=True)


def test_tfds_splits_are_kept_and_the_missing_ones_taken_from_train(tmp_path):
    name = build(tmp_path, {"train": 2, "restval": 2, "test": 2})
    found = {(e.where.split(".")[0], e.split, e.held_out) for e in examples(name, tfds_dir=str(tmp_path))}
    assert found == {
        ("tiny-train", "", ("validation",)), ("tiny-restval", "", ("validation",)), ("tiny-test", "test", ()),
    }  # fmt: skip


def test_a_tfds_label_may_serve_as_the_caption(tmp_path):
    found = examples(build(tmp_path, {"train": 2}), tfds_dir=str(tmp_path), text_feature="label")
    assert {e.parts[0] for e in found} == {"cat", "dog"}


def test_a_choice_of_tfds_features_is_the_users(tmp_path):
    import tensorflow_datasets as tfds

    name = build(tmp_path, {"train": 1}, title_caption=(tfds.features.Text(), "a title"))
    with pytest.raises(UserError, match="prepare.text_feature = '': choose one of .*captions/text.*title_caption"):
        examples(name, tfds_dir=str(tmp_path))
    assert examples(name, tfds_dir=str(tmp_path), text_feature="title_caption")[0].parts[0] == "a title"
    with pytest.raises(UserError, match="prepare.image_feature = 'picture': choose one of image"):
        examples(name, tfds_dir=str(tmp_path), text_feature="title_caption", image_feature="picture")


@pytest.mark.parametrize("error, message", [
    (ModuleNotFoundError("No module named 'tensorflow'"), r"'tensorflow'; .*pip install 'cm3jax\[tfds\]'"),
    (OSError("no network\nat all"), "OSError: no network$"),
])  # fmt: skip
def test_a_tfds_set_that_cannot_be_prepared_here_says_what_is_missing(tmp_path, monkeypatch, error, message):
    import tensorflow_datasets as tfds

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    with pytest.raises(UserError, match=message):
        examples("tfds:mnist", tfds_dir=str(tmp_path))


def frame(data: bytes) -> bytes:
    """Return one record of a TFRecord file, with checksums that nobody reads."""
    return struct.pack("<Q4x", len(data)) + data + bytes(4)


@pytest.mark.parametrize("tail, lost", [(frame(b"three")[:-1], 2), (struct.pack("<Q4x", 2**40), 2), (b"\1\2", 2)])
def test_a_damaged_tfrecord_file_costs_only_what_follows(tmp_path, tail, lost):
    (tmp_path / "a.tfrecord").write_bytes(frame(b"one") + frame(b"two") + tail)
    found = list(sources_tfds._tfrecords(str(tmp_path / "a.tfrecord"), 1, 4))
    assert found[0] == (1, b"two")
    assert len(found) == 2 and found[1][0] == lost and "examples 2 to 3 are lost" in found[1][1].detail


def test_damaged_tfds_examples_cost_only_themselves(tmp_path):
    name = build(tmp_path, {"train": 40})
    (path,) = tmp_path.glob("tiny/1.0.0/*.array_record*")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    found = examples(name, tfds_dir=str(tmp_path))
    bad = [item for item in found if not isinstance(item, Example)]
    assert len(found) == 40 and {item.reason for item in bad} <= {"unreadable example"}
    path.write_bytes(data[:100])
    (lost,) = examples(name, tfds_dir=str(tmp_path))
    assert lost.reason == "unreadable shard"


def test_bytes_that_are_no_example_are_bad():
    with pytest.raises(Bad, match="unreadable example"):
        sources_tfds._parse(b"\xff" * 9, ())
