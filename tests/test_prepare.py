"""Laws of prepare: splits, continuing, counting, and what it never does."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from cm3jax import config
from cm3jax.data import example, prepare, prepare_shard, shards, sources
from cm3jax.data.example import Bad, Example, Reject
from cm3jax.types import Region, UserError
from tests import broken

SCENES = config.Prepare(source="scenes:easy", resolution=16, count=40, shards=3, workers=1)


def run(out, settings=SCENES, **changes):
    redo = changes.pop("redo", False)
    return prepare.prepare(dataclasses.replace(settings, **changes), out, progress=False, redo=redo)


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(pathlib.Path(folder).iterdir())}


def captioned(root, *rows: dict) -> str:
    root.mkdir(exist_ok=True)
    rows = [{"text": "a", **row} for row in rows]
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(root)


@pytest.fixture(autouse=True)
def few_held_out_scenes(monkeypatch):
    monkeypatch.setattr(sources.sources_scenes, "HELD_OUT", 7)


@dataclasses.dataclass(frozen=True)
class Made:
    """A source of `count` text documents, two jobs, that does `act` at each row (runs in workers too)."""

    count: int = 8
    act: str = ""

    def fingerprint(self):
        return [self.count]

    def total(self, jobs):
        return self.count

    def jobs(self, shards):
        return [[0, self.count // 2], [self.count // 2, self.count]]

    def read(self, job):
        for i in range(*job):
            if self.act == "die" and i == 5:
                os._exit(3)
            if self.act == "fail" and i == 5:
                raise RuntimeError("a fault of the source")
            yield Example(
                f"{i}", (f"text {i}",), fields={"jax": "jax" in sys.modules, "tf": "tensorflow" in sys.modules}
            )


def made(monkeypatch, **values) -> None:
    monkeypatch.setattr(sources, "open", lambda _: Made(**values))


# ---------------------------------------------------------------------------------------------------------- the scenes


@pytest.mark.parametrize("level", ["easy", "full"])
def test_scenes_give_their_four_splits(tmp_path, level):
    summary = run(tmp_path, source=f"scenes:{level}")
    assert {split: counts["records"] for split, counts in summary["splits"].items()} == {
        "train": 40, "validation": 7, "test": 7, "composition": 7,
    }  # fmt: skip
    assert shards.splits(tmp_path) == ["composition", "test", "train", "validation"]
    reader = shards.Reader(tmp_path, "composition")
    assert reader[0].parts[1].shape == (16, 16, 3) and json.loads(reader[0].fields["scene"])
    assert len({record.key for split in shards.splits(tmp_path) for record in shards.Reader(tmp_path, split)}) == 61


def test_the_output_does_not_depend_on_the_number_of_processes(tmp_path):
    run(tmp_path / "one")
    run(tmp_path / "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_the_records_do_not_depend_on_the_number_of_shards(tmp_path):
    run(tmp_path / "one", shards=1)
    run(tmp_path / "many", shards=5)
    keys = [[record.key for record in shards.Reader(tmp_path / name, "train")] for name in ("one", "many")]
    assert keys[0] == keys[1]


# ----------------------------------------------------------------------------------------------------- again, and go on


def test_a_finished_folder_is_left_as_it_is(tmp_path, monkeypatch):
    first = run(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    monkeypatch.setattr(prepare_shard, "run", lambda *_: pytest.fail("worked again"))
    assert run(tmp_path) == first
    assert run(tmp_path, workers=5) == first
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}


@pytest.mark.parametrize("harm", [pathlib.Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_a_shard_that_is_lost_or_cut_is_made_again(tmp_path, harm):
    run(tmp_path)
    before = contents(tmp_path)
    harm(tmp_path / shards.name("train", 1, 3))
    run(tmp_path)
    assert contents(tmp_path) == before


def test_another_config_is_refused_by_the_name_of_the_field(tmp_path):
    run(tmp_path)
    with pytest.raises(UserError, match=r"prepared with another resolution \(16, now 8\)"):
        run(tmp_path, resolution=8)
    source = captioned(tmp_path / "in", {"file_name": "0.png"})
    (tmp_path / "in" / "0.png").write_bytes(broken.encoded())
    run(tmp_path / "out", source=source)
    captioned(tmp_path / "in", {"file_name": "0.png", "text": "b"})
    with pytest.raises(UserError, match="prepared with another fingerprint"):
        run(tmp_path / "out", source=source)


def test_redo_replaces_everything(tmp_path):
    run(tmp_path / "a", shards=5)
    run(tmp_path / "a", shards=2, redo=True)
    run(tmp_path / "b", shards=2)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    run(tmp_path / "a", shards=2, redo=True)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_folder_with_a_foreign_summary_is_not_touched(tmp_path):
    (tmp_path / "summary.json").write_text("[]")
    with pytest.raises(UserError, match="not a summary of `prepare`"):
        run(tmp_path)


def test_a_folder_that_cannot_be_made_gives_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write there"):
        run(tmp_path / "file" / "out")


@pytest.mark.parametrize("workers", [1, 2])
def test_finished_pieces_are_kept_when_a_later_one_fails(tmp_path, monkeypatch, workers):
    made(monkeypatch, act="fail")
    with pytest.raises(RuntimeError, match="a fault of the source"):
        run(tmp_path, workers=workers)
    assert not (tmp_path / "summary.json").exists()
    pieces = sorted(path.name for path in tmp_path.glob(".work-*/*"))
    assert pieces in (["00000"], [])  # the second process may fail before the first is done
    made(monkeypatch)
    read = []
    monkeypatch.setattr(Made, "read", lambda self, job, old=Made.read: (read.append(job), *old(self, job))[1:])
    assert run(tmp_path)["records"] == 8
    assert read == ([[4, 8]] if pieces else [[0, 4], [4, 8]])
    assert not list(tmp_path.glob(".work-*"))


def test_a_process_that_dies_gives_one_line(tmp_path, monkeypatch):
    made(monkeypatch, act="die")
    with pytest.raises(UserError, match="a worker process died .*run it again to continue"):
        run(tmp_path, workers=2)


@pytest.mark.parametrize("moved", range(0, 12, 3))
def test_a_stop_while_the_pieces_get_their_names_is_made_good(tmp_path, monkeypatch, moved):
    run(tmp_path / "whole")
    left, replace = [moved], pathlib.Path.replace

    def cut_off(self, target):
        left[0] -= self.suffix == ".array_record"
        if left[0] < 0:
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pathlib.Path, "replace", cut_off)
        run(tmp_path / "cut")
    monkeypatch.setattr(sources.sources_scenes.Scenes, "read", lambda *_: pytest.fail("read again"))
    run(tmp_path / "cut")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


SCRIPT = """
import sys
from cm3jax import config
from cm3jax.data import prepare
if __name__ == "__main__":
    prepare.prepare(config.Prepare("scenes:easy", 32, 1200, shards=6, workers=2), sys.argv[1])
"""


def heed_ctrl_c() -> None:
    """Undo what a shell does to a command in the background, pytest perhaps: Ctrl-C is ignored by all below it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_killed_continues_to_the_same_bytes(tmp_path, how):
    (tmp_path / "script.py").write_text(SCRIPT)
    out = tmp_path / "out"
    command = [sys.executable, str(tmp_path / "script.py"), str(out)]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    process = subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=heed_ctrl_c
    )
    while process.poll() is None and not list(out.glob(".work-*/?????")):
        time.sleep(0.02)
    os.killpg(process.pid, how)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode != 0 and not (out / "summary.json").exists()
    assert how == signal.SIGKILL or "KeyboardInterrupt" in errors
    assert how == signal.SIGKILL or not list(out.glob(".work-*/*.tmp"))
    subprocess.run(command, env=environment, check=True, timeout=300)
    command[-1] = str(tmp_path / "whole")
    subprocess.run(command, env=environment, check=True, timeout=300)
    assert contents(out) == contents(tmp_path / "whole")


# -------------------------------------------------------------------------------------------------------------- splits


def decide(parts=("a",), settings=SCENES, **values) -> str:
    item = Example("k", parts, **values)
    return prepare_shard.split(item, list(parts), settings)


def test_splits_by_hash_have_the_sizes_asked_for():
    settings = dataclasses.replace(SCENES, validation=0.1, test=0.2)
    found = [decide((f"text {i}",), settings) for i in range(4000)]
    shares = {name: found.count(name) / len(found) for name in ("train", "validation", "test")}
    assert shares == pytest.approx({"train": 0.7, "validation": 0.1, "test": 0.2}, abs=0.025)


def test_a_share_of_nothing_gives_nothing():
    settings = dataclasses.replace(SCENES, validation=0.0, test=0.0)
    assert {decide((f"text {i}",), settings) for i in range(500)} == {"train"}


def test_a_split_that_the_source_has_is_not_taken_from_train():
    settings = dataclasses.replace(SCENES, validation=0.4, test=0.4)
    assert {decide((f"text {i}",), settings, held_out=("test",)) for i in range(200)} == {"train", "test"}


def test_a_picture_never_straddles_two_splits_whatever_its_file_caption_or_resolution(tmp_path):
    rows = []
    (tmp_path / "in").mkdir()
    for i in range(30):
        picture = broken.picture(i)
        for kind in ("png", "bmp", "tiff"):
            broken.Image.fromarray(picture).save(tmp_path / "in" / f"{i}.{kind}")
            rows.append({"file_name": f"{i}.{kind}", "text": f"{i}"})
    source = captioned(tmp_path / "in", *rows)
    homes = {}
    for side in (8, 16):
        out = tmp_path / f"out{side}"
        summary = run(out, source=source, count=0, resolution=side, validation=0.3, test=0.3)
        assert (summary["records"], summary["duplicates"], summary["straddling"]) == (90, 60, 0)
        for split in shards.splits(out):
            for record in shards.Reader(out, split):
                homes.setdefault(record.parts[0], set()).add(split)
    assert {len(splits) for splits in homes.values()} == {1}
    assert set.union(*homes.values()) == {"train", "validation", "test"}


def test_a_group_stays_together():
    settings = dataclasses.replace(SCENES, validation=0.3, test=0.3)
    found = {group: {decide((f"{i}",), settings, group=group) for i in range(20)} for group in "abcdefgh"}
    assert {len(splits) for splits in found.values()} == {1} and len(set.union(*found.values())) > 1


@pytest.mark.parametrize(
    "given, kept", [("train", "train"), ("val", "validation"), ("Dev", "validation"), ("x2", "x2")]
)
def test_a_given_split_is_kept_under_its_usual_name(given, kept):
    assert decide(split=given) == kept


def test_given_splits_that_share_a_picture_are_reported(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.png").write_bytes(broken.encoded())
    rows = [{"file_name": "0.png", "split": split} for split in ("train", "test", "test")]
    summary = run(tmp_path / "out", source=captioned(tmp_path / "in", *rows))
    assert (summary["duplicates"], summary["straddling"]) == (2, 1)


# ------------------------------------------------------------------------------------------------------------- records


def test_regions_are_moved_with_the_crop_and_dropped_outside_it():
    wide = np.zeros((10, 20, 3), np.uint8)
    regions = (Region(1, "face", (0.5, 0.0, 0.75, 1.0)), Region(1, "face", (0.0, 0.0, 0.2, 1.0)))
    record = prepare_shard.to_record(Example("k", ("a", wide), regions=regions), ["a", wide], SCENES)
    assert record.regions == (Region(1, "face", (0.5, 0.0, 1.0, 1.0)),)


def test_a_text_longer_than_the_limit_and_one_at_it():
    assert prepare_shard.decode(Example("k", ("a" * prepare_shard.MAX_TEXT,)))
    with pytest.raises(Bad, match="caption too long"):
        prepare_shard.decode(Example("k", ("a" * (prepare_shard.MAX_TEXT + 1),)))


def test_the_summary_counts_what_there_is(tmp_path):
    sources = ["me", "https://user:word@Example.org/a.png?x=1", "https://example.org/b.png"]
    rows = [{"file_name": f"{i}.png", "license": "CC0-1.0" if i else "", "source": sources[i]} for i in range(3)]
    rows += [{"file_name": "none.png"}, {"file_name": "0.png", "text": ""}, {"file_name": "1.png", "text": " "}]
    source = captioned(tmp_path / "in", *rows)
    for i in range(3):
        broken.Image.fromarray(broken.picture(i, 10 * (i + 1), 40)).save(tmp_path / "in" / f"{i}.png")
    summary = run(tmp_path / "out", source=source, shards=1, validation=0.0, test=0.0)
    assert summary == json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["rows"], summary["records"]) == (6, 3)
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("train*"))
    assert summary["splits"] == {"train": {"records": 3, "pictures": 3, "shards": 1, "bytes": size}}
    assert summary["licenses"] == {"CC0-1.0": 2, "": 1} and summary["sources"] == {"example.org": 2, "me": 1}
    assert summary["rejects"] == {"empty caption": 2, "missing file": 1}
    assert summary["sizes"] == {"shorter_side": {"min": 10, "median": 20, "max": 30}, "enlarged": 1}
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [line["where"] for line in lines] == [f"metadata.jsonl:{i}" for i in (4, 5, 6)]
    assert lines[0] == dataclasses.asdict(
        Reject("none.png#metadata.jsonl:4", "metadata.jsonl:4", "missing file", "none.png")
    )


@pytest.mark.parametrize(
    "rows, asked, shard_count", [(0, 0, 1), (1, 0, 1), (2048, 0, 1), (2049, 0, 2), (5, 9, 5), (9, 2, 2)]
)
def test_shards_follow_the_rows_unless_asked_for(rows, asked, shard_count):
    assert example.shards(rows, asked) == shard_count


# --------------------------------------------------------------------------------------------------- what it never does


def test_no_worker_imports_jax_or_tensorflow(tmp_path, monkeypatch):
    made(monkeypatch)
    run(tmp_path, workers=2, validation=0.0, test=0.0)
    assert [record.fields for record in shards.Reader(tmp_path, "train")] == [{"jax": False, "tf": False}] * 8


def test_throughput_is_measured_on_pictures_made_for_it():
    found = prepare.throughput(resolution=16, count=4, workers=1, side=(24, 32))
    assert found["pictures"] == 4 and found["pictures_per_second"] > 0
