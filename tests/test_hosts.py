"""Several processes on one run: what they agree on, that their losses are one process's, how they stop and go on."""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax._src import clusters

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import toy_hosts as toy

from cm3jax import checkpoint, hosts, metrics, trees
from cm3jax import config as configs
from cm3jax.types import UserError

ROOT = pathlib.Path(__file__).parent.parent
MESHES = {"replica": (8, 1, 1), "fsdp": (1, 8, 1), "cube": (2, 2, 2)}


@pytest.mark.parametrize(
    "settings, message",
    [
        (configs.Hosts(coordinator="lead"), "--coordinator = 'lead': must be HOST:PORT"),
        (configs.Hosts(coordinator="lead:99"), "--coordinator: needs --processes N and --process I too"),
        (configs.Hosts(processes=2, process=2), "--process = 2: must be below --processes = 2"),
        (configs.Hosts(process=1), "--process = 1: must be below --processes = 0"),
    ],
)
def test_flags_that_do_not_go_together_say_so_in_one_line(settings, message, monkeypatch):
    monkeypatch.setattr(hosts, "_cluster", lambda: False)
    with pytest.raises(UserError, match=re.escape(message)) as e:
        hosts.start(settings)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("settings", [configs.Hosts(), configs.Hosts(processes=1)])
def test_a_machine_of_its_own_starts_nothing(settings, monkeypatch):
    monkeypatch.setattr(hosts, "_cluster", lambda: False)
    hosts.start(settings)
    assert not hosts.started() and hosts.lead() and (hosts.index(), hosts.count()) == (0, 1)


def test_jax_is_told_the_flags_and_a_heartbeat_of_at_most_30_seconds(monkeypatch):
    told = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: told.update(k, where=a))
    hosts.start(configs.Hosts("lead:99", 4, 3))
    assert told["where"] == ("lead:99", 4, 3) and 0 < told["heartbeat_timeout_seconds"] <= 30


@pytest.mark.parametrize("sign", hosts.SIGNS)
def test_on_a_cluster_jax_finds_the_others_by_itself(sign, monkeypatch):
    told = []
    monkeypatch.setenv(sign, "1")
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: told.append(a))
    hosts.start(configs.Hosts())
    assert told == [(None, None, None)]


def test_slurm_alone_tells_jax_all_it_needs(monkeypatch):
    slurm = dict(JOB_ID="77", STEP_NODELIST="node[3-4]", NTASKS="2", PROCID="1", LOCALID="0")
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    found = clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, 1)
    assert found[0].startswith("node3:") and found[1:3] == (2, 1)


def test_one_process_agrees_with_itself():
    hosts.barrier("alone")
    assert hosts.gathered({"a": [1]}) == [{"a": [1]}] and hosts.leads("x") == "x"
    x = jax.numpy.arange(3)
    np.testing.assert_array_equal(hosts.whole({"x": x})["x"], [0, 1, 2])


# ---------------------------------------------------------------------------------------------------------- same losses


def losses(folder) -> np.ndarray:
    return np.array([line["train/loss"] for line in metrics.lines(pathlib.Path(folder) / "metrics.jsonl")])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """20 steps on one device: the folder, with a checkpoint each 5."""
    folder = tmp_path_factory.mktemp("alone")
    toy.train(folder, mesh=(1, 1, 1))
    return folder


IN, OUT = (None, "fsdp", "tensor"), (None, "tensor", "fsdp")
SPECS = {
    "layers/attention/k/w": IN,
    "layers/attention/out/w": OUT,
    "layers/attention/q/w": IN,
    "layers/attention/v/w": IN,
    "layers/mlp/down/w": OUT,
    "layers/mlp/up/w": IN,
    "positions": (None, "fsdp"),
    "table": (("tensor", "fsdp"), None),
}


@pytest.mark.parametrize("name", MESHES)
def test_20_losses_on_eight_devices_are_those_on_one(name, alone, tmp_path):
    state = toy.train(tmp_path, mesh=MESHES[name], save_every=100)
    found = trees.named_leaves(state.params)
    assert {n: tuple(leaf.sharding.spec) for n, leaf in found.items()} == SPECS
    assert all(tuple(leaf.sharding.mesh.shape.values()) == MESHES[name] for leaf in found.values())
    assert len(losses(tmp_path)) == 20
    np.testing.assert_allclose(losses(tmp_path), losses(alone), rtol=0, atol=1e-5)


def test_accumulating_8_parts_is_4_parts_of_twice_the_rows(alone, tmp_path):
    for parts in (8, 4):
        toy.train(tmp_path / str(parts), mesh=(1, 1, 1), accumulate=parts, save_every=100)
        np.testing.assert_allclose(losses(tmp_path / str(parts)), losses(alone), rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ processes


def start(folder, count, devices=1, **options):
    """Start `count` processes of `devices` virtual devices each."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    found = []
    for i in range(count):
        what = {"coordinator": f"localhost:{port}", "processes": count, "process": i, **options}
        command = [sys.executable, "-u", str(ROOT / "tests" / "toy_hosts.py"), str(folder), json.dumps(what)]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        found.append(subprocess.Popen(command, cwd=ROOT, env=environment, **pipes))
    return found


def outputs(processes, seconds=600, code=0):
    """Wait for processes; return what they printed."""
    try:
        texts = [p.communicate(timeout=seconds)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [code] * len(processes), "\n".join(texts)
    return texts


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """20 steps by two processes of two devices: the folder and what they printed."""
    folder = tmp_path_factory.mktemp("two")
    return folder, outputs(start(folder, 2, 2, mesh=(1, 2, 2)))


@pytest.mark.slow
def test_20_losses_of_two_processes_are_those_of_one(two, alone):
    np.testing.assert_allclose(losses(two[0]), losses(alone), rtol=0, atol=1e-5)
    for text in two[1]:
        specs = json.loads(text.splitlines()[-1])["specs"]
        assert specs == {name: str(jax.sharding.PartitionSpec(*spec)) for name, spec in SPECS.items()}


@pytest.mark.slow
def test_20_losses_of_four_processes_are_those_of_one(alone, tmp_path):
    outputs(start(tmp_path, 4, mesh=(2, 2, 1), save_every=100))
    np.testing.assert_allclose(losses(tmp_path), losses(alone), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 1, 4), (2, 1, 4)])
def test_20_losses_of_hosts_that_share_a_group_of_tensor_devices_are_those_of_one(mesh, alone, tmp_path):
    outputs(start(tmp_path, 2 * mesh[0], 2, mesh=mesh, save_every=100))
    np.testing.assert_allclose(losses(tmp_path), losses(alone), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_only_the_lead_writes_and_tells(two):
    lead, other = two[1]
    assert "step 20: checkpoint committed" in lead and "step 20/20, loss" in lead
    assert "step" not in other.replace('{"step": 20', "")
    assert [line["step"] for line in metrics.lines(two[0] / "metrics.jsonl")] == list(range(1, 21))
    assert checkpoint.steps(two[0]) == [5, 10, 15, 20]


def back_to(folder, step, target):
    """A copy of a run as it was after `step`."""
    shutil.copytree(folder, target)
    for later in [s for s in checkpoint.steps(target) if s > step]:
        shutil.rmtree(target / "checkpoints" / str(later))
    return target


@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 2, 1), (2, 2, 1)])
def test_what_eight_devices_saved_goes_on_on_fewer(mesh, eight, alone, tmp_path):
    folder = back_to(eight, 10, tmp_path / "run")
    toy.train(folder, mesh=mesh, save_every=100)
    np.testing.assert_allclose(losses(folder), losses(alone), rtol=0, atol=1e-5)
    assert len(losses(folder)) == 20


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eight")
    toy.train(folder, mesh=(2, 2, 2))
    return folder


@pytest.mark.slow
def test_what_two_processes_saved_goes_on_on_one_device_and_on_four_processes(two, alone, tmp_path):
    one, four = (back_to(two[0], 10, tmp_path / name) for name in ("one", "four"))
    toy.train(one, mesh=(1, 1, 1), save_every=100)
    outputs(start(four, 4, mesh=(1, 4, 1), save_every=100))
    for folder in (one, four):
        np.testing.assert_allclose(losses(folder), losses(alone), rtol=0, atol=1e-5)
        assert len(losses(folder)) == 20


@pytest.mark.slow
def test_all_hosts_pass_over_the_same_damaged_checkpoint_and_end_as_if_it_had_been_whole(two, tmp_path):
    folder = back_to(two[0], 15, tmp_path / "run")
    path = max((folder / "checkpoints" / "15" / "state").rglob("d/*"), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    lead, _ = outputs(start(folder, 2, 2, mesh=(1, 2, 2)))
    assert f"{path.name} has crc32c" in lead and "10 of 20 done" in lead
    for ema in (False, True):
        a, b = (trees.named_leaves(checkpoint.load_params(f, ema, 20)) for f in (folder, two[0]))
        assert all(np.array_equal(a[name], b[name]) for name in b)


def wait_for(folder, step, processes, seconds=400):
    """Wait until a step is logged."""
    deadline = time.monotonic() + seconds
    while not any(line["step"] >= step for line in metrics.lines(folder / "metrics.jsonl")):
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes)
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("host, number", [(1, signal.SIGTERM), (0, signal.SIGINT)])
def test_a_signal_to_one_host_stops_all_at_one_step_and_they_go_on_from_it(host, number, two, tmp_path):
    processes = start(tmp_path, 2, 2, mesh=(1, 2, 2), save_every=100, pause=0.5)
    wait_for(tmp_path, 3, processes)
    processes[host].send_signal(number)
    stopped = {re.search(r"stopped at step (\d+) and saved", text)[1] for text in outputs(processes)}
    assert len(stopped) == 1 and checkpoint.steps(tmp_path) == [int(*stopped)] and int(*stopped) < 20
    outputs(start(tmp_path, 2, 2, mesh=(1, 2, 2), save_every=100))
    a, b = (trees.named_leaves(checkpoint.load_params(f, step=20)) for f in (tmp_path, two[0]))
    assert all(np.array_equal(a[name], b[name]) for name in b)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_host_takes_the_others_down_within_a_minute(victim, tmp_path):
    processes = start(tmp_path, 2, 2, mesh=(1, 2, 2), pause=0.5)
    wait_for(tmp_path, 2, processes)
    processes[victim].kill()
    began, other = time.monotonic(), processes[1 - victim]
    text = other.communicate(timeout=120)[0]
    processes[victim].communicate()
    assert time.monotonic() - began < 60 and other.returncode not in (0, None)
    assert "another host has ended" in text or "another task died" in text, text
