"""jax's persistent compilation cache, as launch/ sets it up: a second start compiles nothing."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = """
import collections, json, sys
sys.path.insert(0, {tests!r})
import jax
events = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: events.update([name.split("/")[-1]]))
import toy_task as toy
from cm3jax import config as configs
from cm3jax.train import loop

class Stop(Exception):
    pass

def stop(state, step):
    if {dies}:
        raise Stop

training = toy.training(mesh=configs.Mesh(2, 2, 2), steps=6, save_every=4, evaluate_every=4)
try:
    loop.train(toy.task(training), toy.batches, toy.eval_batches, training, {folder!r}, [(4, stop)])
except Stop:
    print("died")
print(json.dumps(events))
"""


def start(tmp_path, dies):
    """One start of a training; its last line: how often jax looked into the cache, found, and did not find."""
    text = SCRIPT.format(tests=str(pathlib.Path(__file__).parent), folder=str(tmp_path / "run"), dies=dies)
    settings = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    done = subprocess.run(
        [sys.executable, "-c", text], env={**os.environ, **settings}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_second_start_of_a_run_that_died_compiles_nothing(tmp_path):
    out, first = start(tmp_path, dies=True)
    assert "died" in out and first["cache_misses"] >= 3  # init, step, evaluation
    out, second = start(tmp_path, dies=False)
    assert "4 of 6 done" in out and second["cache_hits"] >= 2 and second.get("cache_misses", 0) == 0, second
