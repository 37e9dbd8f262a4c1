"""The training loop on a toy task: meshes, resuming, stopping, what it writes."""

import dataclasses
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import toy_task as toy

from cm3jax import checkpoint, metrics, sharding, trees
from cm3jax import config as configs
from cm3jax.train import loop
from cm3jax.types import UserError

CUBE = configs.Mesh(2, 2, 2)
ONE = configs.Mesh(1, 1, 1)


class Stop(Exception):
    pass


def stop(state, step):
    """A hook that dies, as a machine would."""
    raise Stop(step)


@pytest.fixture(scope="module", autouse=True)
def compile_each_task_once():
    """Give runs of one task on one mesh the same compiled functions: most tests are not about compiling."""
    compile, kept = loop.compile, {}

    def cached(task, training, mesh, name="train"):
        key = (task, training.seed, mesh, name)
        if key not in kept:
            kept[key] = compile(task, training, mesh, name)
        return kept[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "compile", cached)
        yield compile


def run(folder, hooks=(), batches=toy.batches, meta=None, evaluation=toy.eval_batches, hidden=toy.HIDDEN, **changes):
    training = toy.training(**{"mesh": CUBE, **changes})
    return loop.train(toy.task(training, hidden=hidden), batches, evaluation, training, folder, hooks, meta=meta)


def equal(a, b, **tolerance):
    a, b = (trees.named_leaves(jax.device_get(x)) for x in (a, b))
    assert set(a) == set(b)
    for name in a:
        np.testing.assert_allclose(a[name], b[name], err_msg=name, **tolerance or {"rtol": 0, "atol": 0})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of 6 steps on a 2 x 2 x 2 mesh: its final state, folder and hook calls."""
    folder, calls = tmp_path_factory.mktemp("whole"), []
    state = run(
        folder, [(4, lambda state, step: calls.append((4, step))), (0, lambda s, step: calls.append((0, step)))]
    )
    return state, folder, calls


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """The folder of the same run, which died right behind the checkpoint of step 4."""
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.raises(Stop, match="4"):
        run(folder, [(4, stop)])
    return folder


@pytest.fixture
def copy(interrupted, tmp_path):
    shutil.copytree(interrupted, tmp_path / "run")
    return tmp_path / "run"


def test_a_sharded_run_equals_a_run_on_one_device(whole, tmp_path):
    equal(run(tmp_path, mesh=ONE), whole[0], rtol=2e-4, atol=2e-6)


def test_every_array_of_the_state_is_split_as_the_table_says(whole):
    state, up, down, scale = whole[0], (None, "fsdp", "tensor"), (None, "tensor", "fsdp"), (None, None)
    for tree in (state.params, state.extra["ema"], state.opt_state[1][0].mu, state.opt_state[1][0].nu):
        specs = {name: leaf.sharding.spec for name, leaf in trees.named_leaves(tree).items()}
        table = {"layers/up": up, "layers/down": down, "layers/scale": scale}
        assert specs == {k: PartitionSpec(*v) for k, v in table.items()}
    assert state.params["layers"]["up"].addressable_shards[0].data.shape == (toy.LAYERS, 8, 16)


def test_accumulation_gives_the_same_state():
    states = []
    for n in (1, 4):  # without the toy's noise, which draws from each part's own key
        training = toy.training(mesh=configs.Mesh(1, 2, 1), accumulate=n)
        mesh = sharding.mesh(training.mesh)
        compiled = loop.compile(toy.task(training, noise=0.0), training, mesh)
        state = compiled.init()
        for step in range(2):
            with jax.set_mesh(mesh):
                state, found = compiled.step(state, sharding.place(mesh, toy.batch(step), 16))
        states.append((state.params, found["loss"]))
    equal(*states, rtol=1e-5, atol=1e-6)


def test_resuming_is_bit_exact_and_reads_the_batches_from_its_step(whole, copy):
    starts = []
    state = run(copy, batches=lambda start: starts.append(start) or toy.batches(start))
    assert starts == [4]
    equal(state, whole[0])


def test_a_run_continues_on_another_mesh(whole, copy):
    state = run(copy, mesh=configs.Mesh(1, 4, 1))
    assert state.params["layers"]["up"].sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    assert state.params["layers"]["up"].sharding.mesh.shape["fsdp"] == 4
    equal(state, whole[0], rtol=2e-4, atol=2e-6)


def test_an_evaluation_that_the_interruption_cut_off_is_done_first(interrupted, tmp_path):
    shutil.copytree(interrupted, tmp_path / "run")
    calls = []
    run(tmp_path / "run", [(4, lambda state, step: calls.append(step))], evaluate_every=4)
    validated = [
        line["step"] for line in metrics.lines(tmp_path / "run" / "metrics.jsonl") if "validation/loss" in line
    ]
    assert validated == [3, 4, 6] and calls == [4, 6]


def test_hooks_are_called_at_their_intervals_and_at_the_end(whole):
    assert whole[2] == [(4, 4), (4, 6), (0, 6)]


def test_a_finished_run_trains_no_more(whole, tmp_path):
    shutil.copytree(whole[1], tmp_path / "run")
    equal(run(tmp_path / "run", batches=lambda start: pytest.fail("asked for a batch")), whole[0])
    assert checkpoint.steps(tmp_path / "run") == [2, 4, 6]


def test_metrics_are_written_once_for_each_step(whole):
    found = metrics.lines(whole[1] / "metrics.jsonl")
    assert [line["step"] for line in found if "train/loss" in line] == [2, 3, 4, 6]
    assert [line["step"] for line in found if "validation/loss" in line] == [3, 6]
    seconds = [line["seconds"] for line in found]
    assert seconds == sorted(seconds)
    assert any(line.get("train/items_per_second", 0) > 0 for line in found)
    assert list(whole[1].glob("events*"))


def test_averaged_weights_are_what_sampling_loads(whole):
    equal(checkpoint.load_params(whole[1]), whole[0].extra["ema"])


def test_the_step_compiles_once_and_not_again_for_a_restored_state(whole):
    training, mesh = toy.training(mesh=CUBE), sharding.mesh(CUBE)
    compiled = loop.compile(toy.task(training), training, mesh)  # by the two runs, or here
    restored = checkpoint.restore(checkpoint.open(whole[1], keep=3), 4, compiled.abstract)
    for state in (compiled.init(), restored):
        for step in range(2):
            with jax.set_mesh(mesh):
                state, _ = compiled.step(state, sharding.place(mesh, toy.batch(step), 16))
    assert compiled.step._cache_size() == 1


def poisoned(at):
    """Batches of which that of step `at` is NaN."""
    return lambda start: (toy.batch(step, nan=step == at) for step in range(start, 100))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(copy):
    with pytest.raises(UserError, match="loss is not finite at step 5; the last good checkpoint is step 4") as e:
        run(copy, batches=poisoned(4))
    assert "\n" not in str(e.value)
    assert checkpoint.steps(copy) == [2, 4]


def test_a_weight_that_is_not_finite_is_never_saved(tmp_path):
    # the loss of the last step is that before its update, so only the weights show what the update did
    training = toy.training(mesh=ONE, steps=2)
    with pytest.raises(UserError, match="a parameter is not finite at step 2; there is no checkpoint yet"):
        loop.train(toy.task(training, break_at=2), toy.batches, None, training, tmp_path)
    assert checkpoint.steps(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_same_command_continues(whole, copy, number):
    before = signal.getsignal(number)
    batches = lambda start: (os.kill(os.getpid(), number) or toy.batch(s) for s in range(start, 9))  # noqa: E731
    with pytest.raises(loop.Interrupted, match="stopped at step 5 and saved; the same command continues") as e:
        run(copy, batches=batches)
    assert e.value.step == 5 and e.value.number == number and checkpoint.steps(copy)[-1] == 5
    assert signal.getsignal(number) is before
    equal(run(copy), whole[0])


def kill(*_):
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_during_a_hook_stops_behind_it(copy):
    with pytest.raises(loop.Interrupted, match="stopped at step 4"):
        run(copy, [(4, kill)])


def test_a_signal_during_an_evaluation_stops_it_and_it_is_done_later(copy):
    with pytest.raises(loop.Interrupted, match="stopped at step 6"):
        run(copy, evaluation=lambda: kill() or toy.eval_batches())
    assert checkpoint.steps(copy)[-1] == 6
    run(copy)
    validated = [line["step"] for line in metrics.lines(copy / "metrics.jsonl") if "validation/loss" in line]
    assert validated == [3, 6]


def test_a_second_signal_aborts_at_once(copy):
    def twice(start):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        yield toy.batch(start)

    with pytest.raises(KeyboardInterrupt) as e:
        run(copy, batches=twice)
    assert not isinstance(e.value, loop.Interrupted)
    assert checkpoint.steps(copy) == [2, 4]


def test_a_run_whose_meta_changed_names_the_field(tmp_path):
    with pytest.raises(Stop):
        run(tmp_path, [(2, stop)], meta={"model": {"width": 16}, "plan": "abc"}, mesh=ONE)
    with pytest.raises(UserError, match=r"made with model.width = 16, this run has 32; .*--redo"):
        run(tmp_path, meta={"model": {"width": 32}, "plan": "abc"}, mesh=ONE)
    with pytest.raises(UserError, match="made with batch = 16, this run has 32"):
        run(tmp_path, meta={"model": {"width": 16}, "plan": "abc"}, mesh=ONE, batch=32)
    with pytest.raises(UserError, match="made with plan = 'abc', this run has None"):
        run(tmp_path, meta={"model": {"width": 16}}, mesh=ONE)


def test_a_checkpoint_past_the_last_step_is_refused(interrupted):
    with pytest.raises(UserError, match="4' is past training.steps = 3; raise --train.training.steps"):
        run(interrupted, steps=3)


def test_a_checkpoint_of_another_model_is_refused(interrupted):
    with pytest.raises(UserError, match=r"layers/\w+ has shape .* the config is not the one"):
        run(interrupted, hidden=64)


def damage(folder):
    for path in (folder / "state").rglob("d/*"):
        path.write_bytes(b"")


def test_a_damaged_checkpoint_gives_way_to_the_one_before_with_a_warning(whole, copy, capsys):
    damage(copy / "checkpoints" / "4")
    equal(run(copy), whole[0])
    equal(checkpoint.load_params(copy, step=4), checkpoint.load_params(whole[1], step=4))  # written anew
    warning = capsys.readouterr().err
    assert (
        "WARNING: checkpoint" in warning
        and "has 0 bytes, expected" in warning
        and "trying the checkpoint before it" in warning
    )


def test_wherever_a_bit_flips_the_file_is_named_and_the_checkpoint_before_is_taken(whole, copy, capsys):
    training, folder = toy.training(mesh=ONE), copy / "checkpoints" / "4"
    compiled = loop.compile(toy.task(training), training, sharding.mesh(ONE))
    identity = {"name": "train", "seed": 0, "batch": 16}
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    ends = np.cumsum([p.stat().st_size for p in files])
    for seed in range(100):
        draw = np.random.default_rng(seed)
        offset = int(draw.integers(ends[-1]))
        path = files[int(np.searchsorted(ends, offset, "right"))]
        data, at = path.read_bytes(), offset - int(ends[-1]) + sum(p.stat().st_size for p in files[files.index(path) :])
        path.write_bytes(data[:at] + bytes([data[at] ^ (1 << int(draw.integers(8)))]) + data[at + 1 :])
        state, step, _ = loop._begin(compiled, checkpoint.open(copy), training, identity)
        assert (step, int(state.step)) == (2, 2), (seed, path)
        assert f"4' is damaged: {path.relative_to(folder)} " in capsys.readouterr().err, (seed, path)
        path.write_bytes(data)
    assert loop._begin(compiled, checkpoint.open(copy), training, identity)[1] == 4


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_run_goes_on_from_the_checkpoint_before_one_with_a_file_cut_short_or_missing(damage, whole, copy, capsys):
    files = [p for p in (copy / "checkpoints" / "4").rglob("*") if p.is_file() and p.name != checkpoint.MANIFEST]
    path = sorted(files)[len(files) // 2]
    path.unlink() if damage == "missing" else path.write_bytes(path.read_bytes()[:-3])
    equal(run(copy), whole[0])
    assert f"{path.name} " in capsys.readouterr().err


def test_a_run_never_begins_anew_over_damaged_checkpoints(copy):
    for step in (2, 4):
        damage(copy / "checkpoints" / str(step))
    with pytest.raises(checkpoint.Damaged, match="has 0 bytes, expected"):
        run(copy)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch": 12}, "training.batch = 12: not a multiple of 8 = replica 1 x fsdp 8 x accumulate 1"),
        ({"accumulate": 3}, "training.batch = 16: not a multiple of 24 = replica 1 x fsdp 8 x accumulate 3"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_before_anything_compiles(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path, mesh=configs.Mesh(), **changes)


def test_data_that_ends_early_say_so(copy):
    with pytest.raises(UserError, match="the data ended at step 5 of 6"):
        run(copy, batches=lambda start: iter([toy.batch(start)]))


def test_training_overfits_one_batch(tmp_path):
    training = toy.training(mesh=ONE, steps=60, optimizer=configs.Optimizer(name="muon", peak_lr=3e-3), log_every=1)
    batches = lambda start: iter([toy.batch(0)] * 60)  # noqa: E731
    loop.train(toy.task(training), batches, None, dataclasses.replace(training, save_every=100), tmp_path)
    curve = [line["train/loss"] for line in metrics.lines(tmp_path / "metrics.jsonl") if "train/loss" in line]
    assert len(curve) == 60 and curve[-1] < 0.1 * curve[0]


SCRIPT = """
import signal, sys, time
sys.path.insert(0, {tests!r})
import toy_task as toy
from cm3jax import config as configs
from cm3jax.train import loop
training = toy.training(mesh=configs.Mesh(1, 1, 1), steps=40, save_every=1000, evaluate_every=0, log_every=1)
def batches(start):
    for step in range(start, 40):
        if {slow}:
            time.sleep(0.2)
        yield toy.batch(step)
try:
    loop.train(toy.task(training), batches, toy.eval_batches, training, {folder!r})
except loop.Interrupted as e:
    print(e)
    sys.exit(e.number != signal.SIGTERM)
"""


def script(folder, slow):
    text = SCRIPT.format(tests=str(pathlib.Path(__file__).parent), folder=str(folder), slow=slow)
    return subprocess.Popen(
        [sys.executable, "-u", "-c", text], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
def test_a_process_told_to_end_saves_and_the_next_one_ends_where_one_would_have(tmp_path):
    process, deadline = script(tmp_path / "a", slow=True), time.monotonic() + 240
    while not metrics.lines(tmp_path / "a" / "metrics.jsonl") and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "the same command continues" in out, out
    (step,) = checkpoint.steps(tmp_path / "a")
    assert 0 < step < 40
    for folder in ("a", "b"):
        process = script(tmp_path / folder, slow=False)
        assert process.wait(timeout=240) == 0, process.stdout.read()
    equal(checkpoint.load_params(tmp_path / "a"), checkpoint.load_params(tmp_path / "b"))
    lines = [line["step"] for line in metrics.lines(tmp_path / "a" / "metrics.jsonl") if "train/loss" in line]
    assert lines == list(range(1, 41))
