"""The command line: what it prints, its exit codes, and that a mistake is one line."""

import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from cm3jax import cli, config, run
from cm3jax.retrieval import memory
from cm3jax.types import UserError

ROOT = pathlib.Path(__file__).parent.parent
CM3JAX = [sys.executable, "-m", "cm3jax.cli"]


def refuse(capsys, *argv):
    """Run a command that is wrong; return its one line."""
    assert cli.main(list(argv)) == 2
    found = capsys.readouterr()
    assert found.err.startswith("cm3jax: ") and found.err.count("\n") == 1
    return found.err


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_without_a_verb_the_help_is_printed(capsys, argv):
    assert cli.main(argv) == 0
    text = capsys.readouterr().out
    assert all(f"  {verb}" in text for verb in cli.VERBS)


def test_the_issues_verbs_are_there():
    verbs = "prepare train encode run generate caption infill evaluate bench doctor"
    assert set(verbs.split()) <= set(cli.VERBS)


@pytest.mark.parametrize("verb", list(cli.VERBS))
def test_every_verb_has_help_with_its_words(capsys, verb):
    with pytest.raises(SystemExit) as caught:
        cli.main([verb, "--help"])
    assert not caught.value.code
    assert cli.VERBS[verb].__doc__.split()[0] in capsys.readouterr().out


def test_help_is_quick_and_loads_no_jax():
    code = "import sys; from cm3jax import cli; cli.main([]); print('jax' in sys.modules)"
    start = time.monotonic()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.splitlines()[-1] == "False"
    assert time.monotonic() - start < 15  # 0.3 s on an idle machine


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("cm3jax 0.")


def test_a_recipes_help_shows_the_recipes_values(capsys):
    with pytest.raises(SystemExit):
        cli.main(["run", str(ROOT / "configs" / "quickstart.py"), "--help"])
    assert "scenes:easy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["runn"], "'runn': no such verb; did you mean 'run'?"),
        (["qqqq"], "'qqqq': no such verb; verbs: prepare, train"),
        (["run"], "run: needs RECIPE as its first argument; see cm3jax run --help"),
        (["run", "--decoder.steps", "3"], "run: needs RECIPE as its first argument"),
        (["run", "configs/nothing.py"], "config 'configs/nothing.py': no such file"),
        (["train"], "train: needs CONFIG as its first argument"),
        (["train", "CONFIG"], "--inputs"),
        (["train", "CONFIG", "--inputs", "nowhere"], "run folder 'nowhere': no such folder"),
        (["train", "CONFIG", "--inputs", "RUN", "--stage", "vqgan"], "'vqgan'"),
        (["run", "CONFIG", "--redo", "decode"], "'decode'"),
        (["encode", "nowhere"], "run folder 'nowhere': no such folder"),
        (["evaluate", "RUN"], "has no recipe.json; make a run with: cm3jax run"),
        (["generate", "nowhere", "a circle"], "run folder 'nowhere': no such folder"),
        (["generate", "RUN"], "needs a caption behind the run folder"),
        (["generate", "RUN", "a circle", " "], "caption ' ': is empty; say what the picture shows"),
        (["infill", "RUN", "x.png", "", "--box", "0", "0", "1", "1"], "caption '': is empty"),
        (["generate", "RUN", "x", "--count", "0"], "--count = 0: must be at least 1"),
        (["caption", "RUN"], "needs a picture file behind the run folder"),
        (["caption", "RUN", "nowhere.png"], "picture 'nowhere.png': No such file or directory"),
        (["caption", "RUN", "NOPICTURE"], "not a picture"),
        (["infill", "RUN", "x.png", "a circle"], "needs either --box X0 Y0 X1 Y1, or <mask> in the text"),
        (["infill", "RUN", "x.png", "a <mask>", "--box", "0", "0", "1", "1"], "needs either --box"),
        (["infill", "RUN", "x.png", "a circle", "--box", "0", "0", "1"], "--box: 3 numbers; needs four"),
        (["prepare", "scenes:easy"], "OUT"),
        (["prepare", "scenes:medium", "OUT"], "scenes:medium"),
        (["prepare", "scenes:easy", "OUT", "--count", "many"], "--count"),
        (["prepare", "scenes:easy", "OUT", "--resolutoin", "64"], "did you mean --resolution?"),
        (["prepare", "scenes:easy", "OUT", "--count", "-3"], "prepare.count = -3"),
        (["prepare", "scenes:easy", "OUT", "--source", "x"], "--source x: the source stands first"),
        (["prepare", "scenes:easy", "OUT", "--seed", "-1"], "prepare.seed = -1: must be from 0 to 4294967295"),
        (["generate", "RUN", "x", "--temperature", "-1"], "sampling.temperature = -1.0: must be 0 (greedy) or more"),
        (["generate", "RUN", "x", "--temperature", "inf"], "sampling.temperature = inf"),
        (["run", "CONFIG", "--prepare.resolution", "100"], "decoder.packing.picture = 64"),
        (["run", "CONFIG", "--decoder.heads", "0"], "decoder.model.heads = 0: must be at least 1"),
        (["run", "CONFIG", "--decoder.seed", "-1"], "training.seed = -1"),
        (["evaluate", "MADE", "--decoder.steps", "3"], "--decoder.training.steps: does nothing here"),
        (["encode", "MADE", "--evaluate.samples", "3"], "to: --tokens.*"),
        (["train", "CONFIG", "--inputs", "MADE", "--image.steps", "3"], "to: --decoder.*, --vocab.*, --name"),
        (["bench", "speed"], "'speed'"),
        (["bench", "decode", "--config", "nowhere.py"], "config 'nowhere.py': no such file"),
        (["bench", "data", "--out", "nowhere/a.json"], "--out nowhere/a.json: there is no folder 'nowhere'"),
        (["bench", "data", "--rounds", "0"], "rounds = 0: must be at least 1"),
        (["run", "CONFIG", "--vocab.image", "65536"], "more than the 65536 that uint16 shards hold"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, tmp_path, argv, message):
    (tmp_path / "RUN").mkdir()
    (tmp_path / "NOPICTURE").write_text("no picture at all")
    (tmp_path / "MADE").mkdir()
    (tmp_path / "MADE" / "recipe.json").write_text(json.dumps(config.to_json(config.Recipe())))
    places = {"CONFIG": str(ROOT / "configs" / "quickstart.py")}
    places |= {name: str(tmp_path / name) for name in ("RUN", "MADE", "OUT", "NOPICTURE")}
    assert message in refuse(capsys, *[places.get(word, word) for word in argv])


def test_sampling_starts_from_what_the_evaluation_chose(tmp_path, capsys):
    plain = cli.defaults("generate", [str(tmp_path), "x"]).sampling
    assert plain == config.Sampling()
    scores = {"text_to_image": {"sampling": config.to_json(config.Sampling(temperature=0.25))}}
    (tmp_path / "report.json").write_text(json.dumps(scores))
    assert cli.defaults("generate", [str(tmp_path), "x"]).sampling.temperature == 0.25
    assert cli.defaults("caption", [str(tmp_path), "x"]).sampling.temperature == 0.0


def test_a_model_of_chameleons_form_starts_from_the_defaults_of_its_own_code(tmp_path):
    text = config.Vocab(text=300, image=16)
    form = config.Form("chameleon", begin=text.text_start, turn=text.text_start + 1)
    packing = config.Packing("whole", opening=form.begin)
    decoder = config.DecoderStage(packing=packing, mask=config.Mask(spans=0.0))
    recipe = config.Recipe(vocab=text, form=form, decoder=decoder)
    (tmp_path / "recipe.json").write_text(json.dumps(config.to_json(recipe)))
    draw, write = (cli.defaults(verb, [str(tmp_path), "x"]).sampling for verb in ("generate", "caption"))
    for sampling in (draw, write):
        assert (sampling.temperature, sampling.top_p, sampling.repetition_penalty) == (0.7, 0.9, 1.2)
    assert (draw.guidance, draw.image_guidance, write.guidance) == (3.0, 1.2, 1.0)


def test_the_mesh_is_that_of_training_unless_a_flag_says_otherwise(tmp_path, monkeypatch):
    from cm3jax.sample import generate

    asked = []

    def load(run, batch, step, mesh):
        asked.append(mesh)
        raise UserError("enough")

    monkeypatch.setattr(generate, "load", load)
    for words in ([], ["--mesh.tensor", "4"], ["--mesh.replica", "2", "--mesh.fsdp", "1"]):
        assert cli.main(["generate", str(tmp_path), "a red circle", *words]) == 2
    assert asked == [None, config.Mesh(tensor=4), config.Mesh(replica=2, fsdp=1)]


def test_the_checkpoint_is_the_one_that_the_evaluation_chose(tmp_path):
    assert cli.chosen_checkpoint(tmp_path) is None
    (tmp_path / "report.json").write_text('{"protocol": {"checkpoint": {"step": 7}}}')
    assert cli.chosen_checkpoint(tmp_path) == 7


def test_as_many_documents_are_shown_as_the_evaluation_chose_unless_the_flag_says_otherwise(tmp_path, capsys):
    assert cli.documents(-1, tmp_path, "generate") == 0
    (tmp_path / "report.json").write_text('{"text_to_image": {"documents": 2}, "image_to_text": {"documents": 1}}')
    assert [cli.documents(n, tmp_path, "generate") for n in (-1, 0, 3)] == [2, 0, 3]
    assert cli.documents(-1, tmp_path, "caption") == 1
    assert "--documents = -2: must be at least 0" in refuse(capsys, "generate", str(tmp_path), "x", "--documents", "-2")
    assert "--candidates = 0: must be at least 1" in refuse(capsys, "generate", str(tmp_path), "x", "--candidates", "0")


def test_what_was_shown_is_told_and_what_is_missing_too(capsys):
    found = [memory.Found(7, 0.8125, "bank", 3, "a-key", *origin) for origin in (("made up", "CC0"), ("", ""))]
    cli.tell(found, 3)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["    with bank/a-key, score 0.812 (made up, CC0)", "    with bank/a-key, score 0.812"]
    assert lines[2].startswith("    2 of 3 documents:") and len(lines) == 3


@pytest.mark.parametrize("text", ["{", "[]", '{"text_to_image": {"sampling": {"temp": 1}}}', '{"text_to_image": 3}'])
def test_a_broken_report_is_one_line(tmp_path, capsys, text):
    (tmp_path / "report.json").write_text(text)
    assert "report.json: not readable" in refuse(capsys, "generate", str(tmp_path), "x")


def test_a_near_run_folder_is_suggested(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    (tmp_path / "runs" / "quickstart" / "recipe.json").write_text("{}")
    assert "did you mean 'runs/quickstart'?" in refuse(capsys, "encode", "runs/quikstart")


def test_the_traceback_is_there_on_request(monkeypatch):
    with pytest.raises(UserError):
        cli.main(["qqqq", "--traceback"])
    monkeypatch.setenv("CM3JAX_TRACEBACK", "1")
    with pytest.raises(UserError):
        cli.main(["qqqq"])


def test_run_takes_data_and_flags_and_its_default_folder(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(run, "run", lambda *a, **k: calls.append((a, k)) or pathlib.Path(a[1]))
    path = str(ROOT / "configs" / "quickstart.py")
    assert cli.main(["run", path, "--data", "pictures", "--decoder.steps", "100", "--redo", "text"]) == 0
    (recipe, out), options = calls[0]
    assert recipe.prepare.source == "pictures" and recipe.decoder.training.steps == 100
    assert recipe.vocab == config.load(path).vocab
    assert out == "runs/quickstart" and options == {"redo": "text"}


def test_ctrl_c_is_one_line_and_exit_code_130(capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt("stopped at step 3 and saved; the same command continues from there")

    monkeypatch.setattr(run, "run", interrupt)
    assert cli.main(["run", str(ROOT / "configs" / "quickstart.py")]) == 130
    assert capsys.readouterr().err.strip() == (
        "cm3jax: stopped at step 3 and saved; the same command continues from there"
    )


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "x"), RuntimeError("write() failed: No space left on device")])
def test_a_full_disk_is_one_line(capsys, monkeypatch, error):
    def write(*_, **__):
        try:
            raise error
        finally:
            raise ValueError("what orbax makes of it")

    monkeypatch.setattr(run, "run", write)
    assert "the disk is full; free some space" in refuse(capsys, "run", str(ROOT / "configs" / "quickstart.py"))


def test_a_bug_shows_where_it_is(monkeypatch):
    monkeypatch.setattr(run, "run", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["run", str(ROOT / "configs" / "quickstart.py")])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of 40 captioned pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(40):
        Image.fromarray(np.full((20, 24, 3), 6 * i, np.uint8)).save(folder / f"{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "text": f"grey number {i}"}) for i in range(40)]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


def test_prepare_writes_a_run_folder(pictures, tmp_path):
    assert cli.main(["prepare", pictures, str(tmp_path), "--resolution", "16", "--workers", "1"]) == 0
    assert config.load(tmp_path / "recipe.json").prepare.resolution == 16
    assert json.loads((tmp_path / "prepared" / "stage.json").read_text())["complete"]


def test_prepare_again_with_other_settings_names_them(pictures, tmp_path, capsys):
    prepare = ["prepare", pictures, str(tmp_path), "--workers", "1"]
    assert cli.main([*prepare, "--resolution", "16"]) == 0
    capsys.readouterr()
    assert "prepare.resolution was 16 and is now 32" in refuse(capsys, *prepare, "--resolution", "32")
    assert cli.main([*prepare, "--resolution", "32", "--redo"]) == 0


@pytest.mark.parametrize("ignored", [False, True], ids=["heard", "ignored"])
def test_ctrl_c_inside_a_callback_of_compiled_code_ends_the_process_with_one_line(ignored):
    """An exception in __del__ is lost, as in many functions that C++ calls."""
    code = (
        "import os, signal, sys; from cm3jax import cli, config\n"
        "class Lost:\n"
        "    def __del__(self): os.kill(os.getpid(), signal.SIGINT); sum(range(1000))\n"
        "def load(path): Lost(); print('went on'); return config.Recipe()\n"
        "cli.configs.load = load; sys.argv = ['cm3jax', 'run', 'CONFIG', '--help']; cli.main()"
    )
    handler = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.SIG_DFL)  # noqa: E731
    heard = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, preexec_fn=handler)
    if ignored:  # as after `nohup` or `&`
        assert heard.returncode == 0 and "went on" in heard.stdout
    else:
        assert heard.returncode == 130 and heard.stdout == ""
        assert heard.stderr.strip() == f"cm3jax: {cli.INTERRUPTED}"


def test_ctrl_c_while_preparing_leaves_what_continues(tmp_path):
    command = [*CM3JAX, "prepare", "scenes:easy", str(tmp_path), "--resolution", "64", "--count", "100000"]
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731 (tests run by `&` or nohup ignore it)
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True, preexec_fn=heard
    )
    wait_for(tmp_path / "prepared" / "stage.json")
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "cm3jax: interrupted; the same command continues" in error.splitlines()
    assert not json.loads((tmp_path / "prepared" / "stage.json").read_text())["complete"]


def test_the_mask_of_the_command_line_is_that_of_sampling():
    from cm3jax.sample import generate

    assert cli.MASK == generate.MASK


def wait_for(path, seconds=60):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.05)


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m cm3jax.cli run --help | head -1"
    out = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert "Traceback" not in out.stderr
