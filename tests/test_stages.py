import dataclasses
import json
import multiprocessing
import os
import time

import pytest

from cm3jax import config, run, stages
from cm3jax.types import UserError

SETTINGS = {"decoder": {"training": {"steps": 100, "workers": 2, "mesh": {"fsdp": -1}}, "mask": {"spans": 1.0}}}


def changed(**training):
    inner = {**SETTINGS["decoder"], "training": {**SETTINGS["decoder"]["training"], **training}}
    return {"decoder": inner}


def test_a_record_reads_back_as_written(tmp_path):
    record = stages.Record(SETTINGS, "h", {"tokens": "t"}, True, "r", {"decoder/x": 3}, 1.5, 0.25)
    stages.write(tmp_path, record)
    assert stages.read(tmp_path) == record


def test_a_folder_without_a_record_has_none(tmp_path):
    assert stages.read(tmp_path) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"unknown": 1}', "3"])
def test_a_broken_record_is_a_user_error_that_names_the_file(tmp_path, text):
    (tmp_path / "stage.json").write_text(text)
    with pytest.raises(UserError, match=r"stage\.json: not readable"):
        stages.read(tmp_path)


def test_a_changed_setting_is_named_with_both_values():
    found = stages.differences(SETTINGS, changed(steps=200))
    assert found == [("decoder.training.steps", 100, 200)]
    assert stages.describe(found) == "decoder.training.steps was 100 and is now 200"


def test_settings_that_do_not_decide_the_result_may_change():
    assert stages.differences(SETTINGS, changed(workers=7, mesh={"fsdp": 4}, save_every=3)) == []


def test_a_way_to_compute_attention_may_change_and_where_the_tokenizer_has_attention_may_not():
    old, new = ({"decoder": {"model": {"attention": a, "remat": a}}} for a in ("xla", "splash"))
    assert not stages.differences(old, new)
    assert stages.significant(new["decoder"]["model"], "decoder.model") == {}
    assert stages.differences({"image": {"model": {"attention": [3]}}}, {"image": {"model": {"attention": []}}})


def test_a_setting_that_the_record_lacks_counts_as_changed():
    assert stages.differences(SETTINGS, changed(ema=0.5)) == [("decoder.training.ema", "(absent)", 0.5)]


def test_a_later_setting_is_in_no_record_at_its_default_and_counts_where_it_has_another_value():
    recipe = config.load("configs/quickstart.py")
    old, model = run.STAGES["image"].settings(recipe), recipe.image.model
    assert not {"latents", "quantizer", "shortcut_kernel", "decoder"} & set(old["image"]["model"])
    other = dataclasses.replace(recipe.image, model=dataclasses.replace(model, latents=9, width=40))
    now = run.STAGES["image"].settings(dataclasses.replace(recipe, image=other))
    assert stages.differences(old, now) == [
        ("image.model.width", 64, 40),
        ("image.model.latents", "(absent)", 9),
    ]


def test_a_setting_that_the_program_no_longer_has_counts_as_changed():
    now = run.STAGES["image"].settings(config.Recipe())
    old = {"image": {**now["image"], "gone": 3}, "vocab": now["vocab"]}
    assert stages.differences(old, now) == [("image.gone", 3, "(absent)")]


def test_an_older_runs_stage_is_not_refused_and_one_with_other_settings_is(tmp_path):
    recipe, stage = config.load("configs/quickstart.py"), run.STAGES["image"]
    now = stage.settings(recipe)
    stages.write(tmp_path / "image", stages.Record(config=now, complete=True))
    run.refuse_changes(stage, recipe, tmp_path, "--redo image")
    model = dataclasses.replace(recipe.image.model, latents=9)
    other = dataclasses.replace(recipe, image=dataclasses.replace(recipe.image, model=model))
    with pytest.raises(UserError, match=r'image\.model\.latents was "\(absent\)" and is now 9'):
        run.refuse_changes(stage, other, tmp_path, "--redo image")


def test_logs_and_hidden_files_are_no_result(tmp_path):
    for name in (
        "weights",
        "metrics.jsonl",
        "events.out.tfevents.1",
        "stage.json",
        ".partial",
        "samples/1.png",
        "profile/x.pb",
    ):
        path = tmp_path / "decoder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    assert stages.files(tmp_path, "decoder") == {"decoder/weights": 1}


def test_a_missing_or_shortened_file_is_found(tmp_path):
    (tmp_path / "a").write_text("abc")
    record = stages.Record(files={"a": 3})
    assert stages.missing(tmp_path, record) == ""
    (tmp_path / "a").write_text("ab")
    assert stages.missing(tmp_path, record) == "a has 2 bytes instead of 3"
    (tmp_path / "a").unlink()
    assert stages.missing(tmp_path, record) == "a is missing"


@pytest.mark.parametrize("size", [0, 1, 1000, stages.BLOCK * 16, stages.BLOCK * 16 + 1, stages.BLOCK * 40 + 7])
def test_a_fingerprint_sees_names_sizes_first_and_last_bytes(tmp_path, size):
    def fingerprint(data, name="a"):
        (tmp_path / name).write_bytes(data)
        return stages.fingerprint(tmp_path, [name])

    data = bytes(size)
    found = [fingerprint(data), fingerprint(data, "b"), fingerprint(data + b"\0")]
    if size:
        found += [fingerprint(b"x" + data[1:]), fingerprint(data[:-1] + b"y")]
    assert len(set(found)) == len(found)
    assert fingerprint(data) == found[0]


def test_time_adds_up_over_interruptions(tmp_path):
    record = stages.Record(seconds=5.0)
    with pytest.raises(KeyboardInterrupt), stages.measured(tmp_path, record):
        time.sleep(0.05)
        raise KeyboardInterrupt
    found = stages.read(tmp_path)
    assert 5.05 <= found.seconds < 6
    assert not found.complete
    assert found.peak_memory_gib > 0.05  # this process holds jax


def test_devices_count_as_long_as_they_are_held(tmp_path):
    record = stages.Record(seconds=5.0, device_seconds={"a chip": 8.0})
    with stages.measured(tmp_path, record, devices={"a chip": 4, "another": 2}):
        time.sleep(0.05)
    found = stages.read(tmp_path)
    assert found.device_seconds["a chip"] == pytest.approx(8 + 4 * (found.seconds - 5), abs=0.1)
    assert found.device_seconds["another"] == pytest.approx(2 * (found.seconds - 5), abs=0.1)


def test_time_survives_a_kill(tmp_path):
    """The record on disk is kept true while the stage runs, not only at its end."""
    record = stages.Record()
    with stages.measured(tmp_path, record, every=0.02, sample=0.01):
        time.sleep(0.3)
        assert stages.read(tmp_path).seconds > 0.1


def eat(size, ready, done):
    data = bytearray(os.urandom(1)) * size
    ready.set()
    done.wait(20)
    return data


def test_memory_counts_child_processes():
    before = stages.memory()
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    child = context.Process(target=eat, args=(2**28, ready, done))
    child.start()
    ready.wait(20)
    grown = stages.memory() - before
    done.set()
    child.join()
    assert grown > 2**28


def test_a_run_folder_is_held_by_one_process(tmp_path):
    with stages.locked(tmp_path), pytest.raises(UserError, match="another cm3jax is working"), stages.locked(tmp_path):
        pass
    with stages.locked(tmp_path):
        pass


def test_a_run_folder_that_cannot_be_made_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another folder"), stages.locked(tmp_path / "file" / "run"):
        pass


def test_removing_a_link_leaves_what_it_points_to(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "x").write_text("x")
    (tmp_path / "text").symlink_to("real")
    stages.remove(tmp_path / "text")
    stages.remove(tmp_path / "absent")
    assert (tmp_path / "real" / "x").exists() and not (tmp_path / "text").exists()


def test_a_summary_has_the_seconds_of_each_stage_and_the_largest_memory(tmp_path):
    stages.write(tmp_path / "a", stages.Record(seconds=1.0, peak_memory_gib=0.5))
    stages.write(tmp_path / "b", stages.Record(seconds=2.0, peak_memory_gib=0.25))
    found = stages.summary(tmp_path, {"one": "a", "two": "b", "three": "c"})
    assert found == {"seconds": {"one": 1.0, "two": 2.0}, "peak_memory_gib": 0.5}
    json.dumps(found)
