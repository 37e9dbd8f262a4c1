"""Staleness on toy stages: what `run` skips, continues, refuses and makes again."""

import dataclasses
import json
import shutil

import pytest

from cm3jax import checkpoint, config, run, stages
from cm3jax.data import shards
from cm3jax.types import UserError

RECIPE = config.Recipe(name="toy", prepare=config.Prepare(source="scenes:easy", count=100))
NAMES = ["prepare", "text", "image", "tokens", "decoder", "evaluate"]


@pytest.fixture
def toy(monkeypatch):
    """Replace every stage's work by writing one file; return the list of stages that worked."""
    worked, table = [], {}

    def call(stage):
        def work(recipe, folder):
            worked.append(stage.name)
            path = stage.folder(folder) / "result"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(stage.name + json.dumps(stage.settings(recipe)))

        return work

    for name, stage in run.STAGES.items():
        table[name] = dataclasses.replace(stage, call=call(stage))
    monkeypatch.setattr(run, "STAGES", table)
    monkeypatch.setattr(run, "publish", lambda folder: (folder / "report.json").write_text("{}"))
    return worked


def with_steps(recipe, steps, **training):
    stage = recipe.decoder
    return dataclasses.replace(
        recipe,
        decoder=dataclasses.replace(stage, training=dataclasses.replace(stage.training, steps=steps, **training)),
    )


def test_a_run_makes_all_stages_in_order(toy, tmp_path):
    run.run(RECIPE, tmp_path)
    assert toy == NAMES
    assert config.load(tmp_path / "recipe.json") == RECIPE
    record = stages.read(tmp_path / "decoder")
    assert record.complete and record.config["vocab"]["image"] == 8192
    assert record.inputs == {"tokens": stages.read(tmp_path / "tokens").result}
    assert set(record.device_seconds) == {"cpu"} and stages.read(tmp_path / "prepared").device_seconds == {}


def test_a_second_run_does_nothing(toy, tmp_path, capsys):
    run.run(RECIPE, tmp_path)
    toy.clear()
    run.run(RECIPE, tmp_path)
    assert toy == []
    assert capsys.readouterr().out.count("up to date") == len(NAMES)


def test_a_changed_setting_stops_the_run_before_any_work(toy, tmp_path):
    run.run(RECIPE, tmp_path)
    (tmp_path / "text" / "result").unlink()
    toy.clear()
    with pytest.raises(UserError, match=r"decoder\.training\.steps was 167000 and is now 5; .*--redo decoder"):
        run.run(with_steps(RECIPE, 5), tmp_path)
    assert toy == []
    assert config.load(tmp_path / "recipe.json") == RECIPE


def test_how_a_stage_runs_may_change_between_runs(toy, tmp_path):
    run.run(RECIPE, tmp_path)
    toy.clear()
    run.run(with_steps(RECIPE, 167_000, workers=3, save_every=7), tmp_path)
    assert toy == []


def test_redo_makes_a_stage_and_what_needs_it(toy, tmp_path):
    run.run(RECIPE, tmp_path)
    toy.clear()
    run.run(with_steps(RECIPE, 5), tmp_path, redo="decoder")
    assert toy == ["decoder", "evaluate"]
    toy.clear()
    run.run(with_steps(RECIPE, 5), tmp_path, redo="text")
    assert toy == ["text", "tokens", "decoder", "evaluate"]


def test_a_redo_that_is_refused_deletes_nothing(toy, tmp_path):
    run.run(RECIPE, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    other = dataclasses.replace(RECIPE, prepare=config.Prepare(source="scenes:easy", count=99))
    with pytest.raises(UserError, match="prepare.count was 100 and is now 99"):
        run.run(other, tmp_path, redo="text")
    stages.remove(tmp_path / "prepared")
    with pytest.raises(UserError, match="prepared: not there, and needed here"):
        run.run(RECIPE, tmp_path, redo="text", only="text")
    assert sorted(tmp_path.rglob("*")) == [p for p in before if p.parent.name != "prepared" and p.name != "prepared"]


def test_a_redo_from_a_changed_source_deletes_nothing(toy, tmp_path):
    (tmp_path / "data").mkdir()
    metadata = tmp_path / "data" / "metadata.jsonl"
    metadata.write_text('{"file_name": "a.png", "text": "a"}\n')
    recipe = dataclasses.replace(RECIPE, prepare=config.Prepare(source=str(metadata.parent)))
    run.run(recipe, tmp_path / "run")
    metadata.write_text('{"file_name": "a.png", "text": "b"}\n')
    with pytest.raises(UserError, match="made from another source"):
        run.run(recipe, tmp_path / "run", redo="decoder")
    assert (tmp_path / "run" / "decoder" / "result").exists()


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("prepare", {"source": "nowhere"}, "source 'nowhere': no such folder"),
        ("prepare", {"validation": 2.0}, "prepare.validation = 2.0"),
        ("prepare", {"resolution": 250}, "250: not a multiple of image.model's 8 pixels per code; take 248"),
        ("decoder", {"packing": config.Packing(kind="whole", length=1027)}, "picture of 1024 codes and a caption"),
    ],
)
def test_what_cannot_work_stops_the_run_before_it_writes(toy, tmp_path, section, values, message):
    recipe = dataclasses.replace(RECIPE, **{section: dataclasses.replace(getattr(RECIPE, section), **values)})
    with pytest.raises(UserError, match=message):
        run.run(recipe, tmp_path / "run")
    assert toy == [] and not (tmp_path / "run").exists()


def test_records_without_a_test_split_stop_the_run_before_it_trains(toy, tmp_path, monkeypatch):
    def train_only(recipe, folder):
        (folder / "prepared" / shards.name("train", 0, 1)).touch()

    monkeypatch.setitem(run.STAGES, "prepare", dataclasses.replace(run.STAGES["prepare"], call=train_only))
    with pytest.raises(UserError, match=r"no record in the test split.* --redo prepare"):
        run.run(RECIPE, tmp_path)
    assert toy == []
    run.run(RECIPE, tmp_path, only="text")  # a single stage needs no test split
    assert toy == ["text"]


def test_the_way_to_make_a_stage_again_fits_the_verb(toy, tmp_path):
    run.run(RECIPE, tmp_path)
    other = dataclasses.replace(RECIPE, prepare=config.Prepare(source="scenes:easy", count=99))
    with pytest.raises(UserError, match="again with --redo, or keep both in another run folder"):
        run.run(other, tmp_path, only="prepare")


def test_redo_of_an_unknown_stage_lists_the_stages(toy, tmp_path):
    with pytest.raises(UserError, match="no such stage; stages: prepare, text"):
        run.run(RECIPE, tmp_path, redo="decode")


def test_a_damaged_result_is_made_again(toy, tmp_path, capsys):
    run.run(RECIPE, tmp_path)
    (tmp_path / "image" / "result").unlink()
    toy.clear()
    run.run(RECIPE, tmp_path)
    assert toy == ["image"]
    assert "image/result is missing" in capsys.readouterr().out


def test_a_stage_whose_input_is_another_one_stops_the_run(toy, tmp_path):
    run.run(RECIPE, tmp_path)
    other = dataclasses.replace(RECIPE, text=config.Text(seed=5))
    stages.remove(tmp_path / "text")
    with pytest.raises(UserError, match="tokens: made from another text .*--redo tokens"):
        run.run(other, tmp_path)


def test_an_interrupted_stage_continues_with_its_time(toy, tmp_path, monkeypatch, capsys):
    def stop(recipe, folder):
        (folder / "image" / "half").write_text("x")
        raise KeyboardInterrupt

    whole = run.STAGES["image"]
    monkeypatch.setitem(run.STAGES, "image", dataclasses.replace(whole, call=stop))
    with pytest.raises(KeyboardInterrupt):
        run.run(RECIPE, tmp_path)
    record = stages.read(tmp_path / "image")
    assert not record.complete
    stages.write(tmp_path / "image", dataclasses.replace(record, seconds=1000.0))
    monkeypatch.setitem(run.STAGES, "image", whole)
    toy.clear()
    run.run(RECIPE, tmp_path)
    assert toy == ["image", "tokens", "decoder", "evaluate"]
    assert (tmp_path / "image" / "half").exists()  # what was there stays, for the stage to go on from
    assert stages.read(tmp_path / "image").seconds >= 1000
    assert "was interrupted" in capsys.readouterr().out


def test_an_interrupted_stage_refuses_other_settings(toy, tmp_path, monkeypatch):
    def stop(recipe, folder):
        raise KeyboardInterrupt

    monkeypatch.setitem(run.STAGES, "decoder", dataclasses.replace(run.STAGES["decoder"], call=stop))
    with pytest.raises(KeyboardInterrupt):
        run.run(RECIPE, tmp_path)
    with pytest.raises(UserError, match=r"decoder\.training\.steps was"):
        run.run(with_steps(RECIPE, 5), tmp_path)


def test_a_data_folder_that_changed_stops_the_run(toy, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}\n')
    recipe = dataclasses.replace(RECIPE, prepare=config.Prepare(source=str(data)))
    run.run(recipe, tmp_path / "run")
    (data / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "other"}\n')
    with pytest.raises(UserError, match="prepared: made from another source .*--redo prepare"):
        run.run(recipe, tmp_path / "run")


def test_one_stage_needs_the_earlier_ones(toy, tmp_path):
    with pytest.raises(UserError, match="tokens: not there, and needed here; make it with: cm3jax encode"):
        run.run(RECIPE, tmp_path, only="decoder")
    run.run(RECIPE, tmp_path)
    (tmp_path / "tokens" / "result").unlink()
    with pytest.raises(UserError, match="tokens/result is missing"):
        run.run(RECIPE, tmp_path, only="decoder")


def test_every_stage_says_how_to_make_it():
    assert run.HOW.keys() == run.STAGES.keys()


def test_inputs_stand_before_the_stage_that_reads_them():
    names = list(run.STAGES)
    for i, stage in enumerate(run.STAGES.values()):
        assert set(stage.inputs) <= set(names[:i])


def test_adopting_takes_the_earlier_stages_from_disk(toy, tmp_path):
    made = dataclasses.replace(
        RECIPE, prepare=config.Prepare(source="scenes:easy", resolution=64), text=config.Text(seed=9)
    )
    run.run(made, tmp_path)
    mine = with_steps(RECIPE, 5)
    adopted = run.adopt(mine, tmp_path, "decoder")
    assert adopted == dataclasses.replace(made, decoder=mine.decoder)


def test_adopting_refuses_another_vocabulary(toy, tmp_path):
    run.run(RECIPE, tmp_path)
    other = dataclasses.replace(RECIPE, vocab=config.Vocab(image=512))
    with pytest.raises(UserError, match=r"vocab\.image = 512, but .* was made with 8192; add --vocab\.image 8192"):
        run.adopt(other, tmp_path, "decoder")


def test_a_linked_run_trains_beside_the_first_one(toy, tmp_path):
    run.run(RECIPE, tmp_path / "a")
    run.link("decoder", tmp_path / "a", tmp_path / "b")
    toy.clear()
    run.run(with_steps(RECIPE, 5), tmp_path / "b", only="decoder")
    assert toy == ["decoder"]
    assert (tmp_path / "b" / "tokens").is_symlink() and not (tmp_path / "b" / "decoder").is_symlink()
    run.run(RECIPE, tmp_path / "a")
    assert toy == ["decoder"]  # the first run is still whole


def test_the_report_goes_when_a_stage_is_made_again(toy, tmp_path, monkeypatch):
    def stop(recipe, folder):
        raise KeyboardInterrupt

    run.run(RECIPE, tmp_path)
    assert (tmp_path / "report.json").exists()
    monkeypatch.setitem(run.STAGES, "decoder", dataclasses.replace(run.STAGES["decoder"], call=stop))
    with pytest.raises(KeyboardInterrupt):
        run.run(RECIPE, tmp_path, redo="decoder")
    assert not (tmp_path / "report.json").exists()


# ------------------------------------------------------------------------------------------ beginning with another run


@pytest.fixture
def first(toy, tmp_path, monkeypatch):
    """A finished run that another begins with; its folder."""
    run.run(RECIPE, tmp_path / "first")
    monkeypatch.setattr(checkpoint, "steps", lambda folder: [1] if folder.is_dir() else [])
    toy.clear()
    return tmp_path / "first"


def begun(first, **changes):
    decoder = dataclasses.replace(RECIPE.decoder, start=str(first))
    return dataclasses.replace(RECIPE, decoder=decoder, **changes)


def test_a_run_that_begins_with_another_takes_its_tokenizers(toy, first, tmp_path):
    more = dataclasses.replace(RECIPE.image, training=config.Training(steps=3))  # of no matter: it is not trained
    recipe = begun(first, image=more)
    run.run(recipe, tmp_path / "second")
    assert toy == ["prepare", "tokens", "decoder", "evaluate"]
    for name in ("text", "image"):
        assert (tmp_path / "second" / name / "result").read_text() == (first / name / "result").read_text()
        record = stages.read(tmp_path / "second" / name)
        assert record.imported == str(first) and record.result == stages.read(first / name).result
    run.check_start(first, tmp_path / "second" / "tokens")
    toy.clear()
    run.run(recipe, tmp_path / "second")
    assert toy == []


def test_tokenizers_of_another_kind_are_refused_before_any_work(toy, first, tmp_path):
    model = dataclasses.replace(RECIPE.image.model, width=32)
    recipe = begun(first, image=dataclasses.replace(RECIPE.image, model=model))
    with pytest.raises(UserError, match=r"its image\.model\.width is 128, this recipe's 32"):
        run.run(recipe, tmp_path / "second")
    drawn = dataclasses.replace(RECIPE.decoder, start=str(first), unseen="drawn")
    shutil.move(first / "tokens", tmp_path / "elsewhere")
    with pytest.raises(UserError, match="first: has no tokens/ to say which pieces its model saw; set decoder.unseen"):
        run.run(dataclasses.replace(RECIPE, decoder=drawn), tmp_path / "second")
    (first / "image" / "result").unlink()
    with pytest.raises(UserError, match="result"):
        run.run(begun(first), tmp_path / "second")
    assert toy == [] and not (tmp_path / "second" / "recipe.json").exists()


def test_tokenizers_of_its_own_are_refused(toy, first, tmp_path):
    run.run(dataclasses.replace(RECIPE, prepare=config.Prepare(source="scenes:easy", count=200)), tmp_path / "other")
    (tmp_path / "other" / "image" / "result").write_text("trained on something else")
    run.taken(tmp_path / "other", "image", run.decided(RECIPE, "image"), "elsewhere")
    with pytest.raises(UserError, match="image: not that of .*first"):
        run.take_tokenizers(first, tmp_path / "other")
