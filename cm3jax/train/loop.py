"""The one training loop: a task's pure functions on a device mesh, with checkpoints, evaluation, logs and signals.

The order within a step, which the rest relies on: update, log, save, evaluate, hooks. What a checkpoint's step still
owes (evaluation, hooks) when a run is interrupted behind the save is done first when it continues.
"""

import dataclasses
import itertools
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

from cm3jax import checkpoint, hosts, metrics, rng, sharding
from cm3jax import config as configs
from cm3jax.train import state as states
from cm3jax.train import summary, watch
from cm3jax.types import UserError

Hook = tuple[int, Callable[[states.TrainState, int], Any]]
"""(every, f(state, step)): called after each `every` steps (0: not) and at the end; must bear being called again."""

AHEAD = 2  # steps that the host may run ahead of the devices: enough to keep them busy, few enough to stop soon


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM (`number`): the state of `step` is saved, and the same command continues there."""

    def __init__(self, step: int, number: int = signal.SIGINT):
        super().__init__(f"stopped at step {step} and saved; the same command continues from there")
        self.step, self.number = step, number


def train(
    task: states.Task,
    batches: Callable[[int], Iterator[Any]],
    eval_batches: Callable[[], Iterator[Any]] | None,
    training: configs.Training,
    folder,
    hooks: list[Hook] | tuple[Hook, ...] = (),
    name: str = "train",
    meta: dict[str, Any] | None = None,
    devices=None,
    weights: Callable[[Any], Any] | None = None,
) -> states.TrainState:
    """Train to `training.steps`, from the latest checkpoint in `folder` if there is one; return the final state.

    Args:
      task: What to train.
      batches: start step -> iterator of the batches of steps start, start + 1, ... (the first is 0): trees of numpy
        arrays [rows of this host, ...], a function of the step alone.
      eval_batches: () -> iterator of validation batches, best of one size; None: no evaluation.
      training: Steps, intervals, mesh, seed.
      folder: Takes checkpoints/, metrics.jsonl and TensorBoard's files.
      hooks: What else happens at intervals, such as sample pictures.
      name: Names the random stream and the progress bar.
      meta: JSON values that must be the same when a run continues: hashes of the config and of the data plan.
      devices: Devices of the mesh; None: all.
      weights: Tree of `jax.ShapeDtypeStruct` with shardings -> parameters to begin with; None: the task's own.

    Raises:
      UserError: if a checkpoint does not fit, a batch does not divide over the mesh, or the loss stops being finite.
      Interrupted: on Ctrl-C or SIGTERM, once the step is finished and saved.
    """
    check_batch(training, mesh := sharding.mesh(training.mesh, devices), name)
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    compiled = compile(task, training, mesh, name)
    manager = checkpoint.open(folder, training.keep, say=lambda line: metrics.say(f"{name}: {line}"))
    identity = {"name": name, "seed": training.seed, "batch": training.batch, **(meta or {})}
    try:
        state, start, seconds = _begin(compiled, manager, training, identity, weights)
        run = _Run(compiled, training, manager, folder, hooks, name, eval_batches, identity, state, start, seconds)
        with _Signals() as signals:
            return run.train(batches, signals)
    finally:
        manager.close()  # waits for a save that is under way


# ------------------------------------------------------------------------------------------------------------ compiling


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A task's functions, jitted for one mesh.

    Attributes:
      mesh: The devices.
      abstract: The state's shapes and shardings, unboxed.
      init: () -> state.
      step: (state, batch) -> (state, metrics); the old state is donated.
      evaluate: (state, batch) -> metrics, or None.
      flops: The task's model FLOPs of a step.
    """

    mesh: jax.sharding.Mesh
    abstract: Any
    init: Callable
    step: Callable
    evaluate: Callable | None
    flops: float = 0.0


def compile(task: states.Task, training: configs.Training, mesh: jax.sharding.Mesh, name: str = "train") -> Compiled:
    """Return the task's functions jitted with shardings from the axis names of its parameters.

    The key of a step is `rng.key(seed, name, step)`, of the initial weights `rng.key(seed, name + "/init")`.
    """
    first = rng.key(training.seed, f"{name}/init")
    boxed = jax.eval_shape(task.init, first)
    placed = sharding.shardings(mesh, boxed)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def step(state, batch):
        return task.step(state, batch, rng.key(training.seed, name, state.step))

    init = jax.jit(lambda key: sharding.unbox(task.init(key)), out_shardings=placed)
    return Compiled(
        mesh=mesh,
        abstract=jax.tree.map(_shape, sharding.unbox(boxed), placed),
        init=lambda: init(first),  # outside the mesh's context: initializers see one made-up row
        step=jax.jit(step, donate_argnums=0, out_shardings=(placed, whole)),
        evaluate=task.evaluate and jax.jit(task.evaluate, out_shardings=whole),
        flops=task.flops,
    )


def _shape(leaf, placed) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed)


@jax.jit
def _all_finite(tree):
    """Return whether all floating-point leaves are finite."""
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in floats]))


def check_batch(training: configs.Training, mesh, name: str) -> None:
    """Raise UserError if the batch does not divide over a mesh."""
    ways = mesh.shape["replica"] * mesh.shape["fsdp"] * training.accumulate
    if training.batch % ways:
        raise UserError(
            f"{name}.training.batch = {training.batch}: not a multiple of {ways} = replica {mesh.shape['replica']} x"
            f" fsdp {mesh.shape['fsdp']} x accumulate {training.accumulate}; change --{name}.training.batch or the mesh"
        )


# ------------------------------------------------------------------------------------------------- starting, continuing


def _begin(
    compiled: Compiled, manager, training: configs.Training, identity, weights=None
) -> tuple[states.TrainState, int, float]:
    """Return the state to go on from, its step and the seconds trained so far."""
    damage = None
    for step in checkpoint.uncommitted(manager) if hosts.lead() else ():
        print(f"WARNING: {manager.directory / str(step)}: the save of this checkpoint did not end", file=sys.stderr)
    for step in checkpoint.candidates(manager):
        try:
            saved = checkpoint.load_meta(manager, step)
            _check_identity(manager.directory, step, saved["identity"], identity, training)
            return checkpoint.restore(manager, step, compiled.abstract), step, saved["seconds"]
        except checkpoint.Damaged as e:
            damage = e
            if hosts.lead():
                print(f"WARNING: {e}\nWARNING: trying the checkpoint before it", file=sys.stderr, flush=True)
    if damage:
        raise damage  # better than to begin again, and overwrite what a person may still want to look at
    return _given(compiled, weights) if weights else compiled.init(), 0, 0.0


def _given(compiled: Compiled, weights) -> states.TrainState:
    """Return the state of step 0 with weights from elsewhere, their average too; never two sets in memory."""
    state = compiled.init().replace(params=None)
    averaged = isinstance(state.extra, dict) and "ema" in state.extra
    if averaged:
        state = state.replace(extra={**state.extra, "ema": None})
    state = state.replace(params=weights(compiled.abstract.params))
    # copies, as the step donates each of its arrays once
    return state.replace(extra={**state.extra, "ema": jax.tree.map(jnp.copy, state.params)}) if averaged else state


def _check_identity(folder, step: int, saved, now, training: configs.Training) -> None:
    """Raise unless the run that saved a checkpoint was this one."""
    saved, now = _flat(saved), _flat(now)
    for key in sorted(set(saved) | set(now)):
        if saved.get(key) != now.get(key):
            raise UserError(
                f"checkpoint {str(folder / str(step))!r} was made with {key} = {saved.get(key)!r}, this run has"
                f" {now.get(key)!r}; use the old settings, or remove the folder (--redo) to train anew"
            )
    if step > training.steps:
        raise UserError(
            f"checkpoint {str(folder / str(step))!r} is past training.steps = {training.steps}; raise"
            f" --{now['name']}.training.steps, or remove the folder (--redo) to train anew"
        )


def _flat(tree, where: str = "") -> dict[str, Any]:
    """Return {"a.b.c": value} of nested dicts, so that a message can name the one field that differs."""
    if not isinstance(tree, dict):
        return {where: list(tree) if isinstance(tree, tuple) else tree}
    return {k: v for name, x in tree.items() for k, v in _flat(x, f"{where}.{name}" if where else name).items()}


# ------------------------------------------------------------------------------------------------------------- training


@dataclasses.dataclass
class _Run:
    """One call of `train`: what its parts share. `state` is that after `step` updates, `seconds` their wall time."""

    compiled: Compiled
    training: configs.Training
    manager: Any
    folder: pathlib.Path
    hooks: Any
    name: str
    eval_batches: Any
    identity: dict[str, Any]
    state: Any
    step: int
    seconds: float

    def __post_init__(self):
        self.saved = self.step
        self.pending: list[states.Metrics] = []  # metrics still on the devices, of the last len(pending) steps
        self.compiling = True  # until the first step is done; its time is in no rate
        self.first = hosts.lead()
        self.writer = metrics.Writer(self.folder, self.step) if self.first else None
        self.meter = metrics.Meter(self.seconds)
        self.waited = 0  # of the pending steps, how many are known to be done
        self.profile = watch.Profile(self.training.profile if self.first else (), self.folder)
        self.progress = metrics.Progress(self.name, self.training.steps, self.step, quiet=not self.first)

    def train(self, batches, signals: "_Signals") -> states.TrainState:
        """Do the steps that are left."""
        rows = iter(())
        try:
            self.progress.say(summary.table(self.compiled.abstract, self.compiled.mesh, self.training, self.step))
            if self.step:
                self.after(signals)
                self.leave_if_asked(signals)
            if self.step < self.training.steps:
                rows = batches(self.step)
            while self.step < self.training.steps:
                self.update(rows)
                self.after_update(signals)
            return self.state
        finally:
            getattr(rows, "close", lambda: None)()  # ends the workers of a pipeline that has some
            self.profile.close()
            self.progress.close()
            if self.writer:
                self.writer.close()

    def update(self, rows) -> None:
        """Do one step; return before the devices are done with it."""
        asked = time.monotonic()
        batch = next(rows, None)
        self.meter.waited(time.monotonic() - asked)
        if batch is None:
            raise UserError(f"{self.name}: the data ended at step {self.step} of {self.training.steps}")
        batch = sharding.place(self.compiled.mesh, batch, self.training.batch)
        with jax.set_mesh(self.compiled.mesh), self.profile.step(self.step + 1, self.pending[-1:]):
            self.state, found = self.compiled.step(self.state, batch)
        self.step += 1
        self.pending.append(found)
        if self.compiling and len(self.pending) == 1:
            self.wait_for_compiler(found)
        else:
            self.wait(AHEAD)
        if told := self.profile.after(self.step, found):
            self.progress.say(told)

    def wait(self, ahead: int) -> None:
        """Wait until at most `ahead` steps are under way, and note the time at which each one is done."""
        while self.waited < len(self.pending) - ahead:
            jax.block_until_ready(self.pending[self.waited])
            self.waited += 1
            self.meter.done()

    def wait_for_compiler(self, found) -> None:
        """Wait for the first step (and what `log` computes), and let its time count in no rate."""
        jax.block_until_ready((found, watch.norm(self.state.params)))
        self.waited = 1
        self.meter.pause()

    def after_update(self, signals: "_Signals") -> None:
        """Log and save where it is time, stop if asked to, then do what the step owes."""
        t, stop = self.training, signals.agreed()
        save = stop or self.step == t.steps or _due(self.step, t.save_every)
        if save or _due(self.step, t.log_every) or self.owes():
            self.log()
        if save:
            self.save(wait=stop)
        if stop:
            raise Interrupted(self.step, signals.number)
        self.after(signals)
        self.leave_if_asked(signals)

    def leave_if_asked(self, signals: "_Signals") -> None:
        """Stop between two pieces of work that follow a step; several hosts stop together after the next step."""
        if signals.asked and hosts.count() == 1:
            self.save(wait=True)
            raise Interrupted(self.step, signals.number)

    def log(self) -> None:
        """Fetch the pending metrics, stop on one that is not finite, write and show the others."""
        self.wait(0)
        found, norm = jax.device_get((self.pending, watch.norm(self.state.params)))
        for i, one in enumerate(found):
            if bad := metrics.not_finite(one):
                self.stop_not_finite(bad, self.step - len(found) + 1 + i)
        timed = found[1:] if self.compiling else found
        self.pending, self.waited, self.compiling = [], 0, self.compiling and not found
        if found and self.first:
            sums = metrics.total(found)
            values = {**metrics.means(sums), "parameter_norm": float(norm), **self.rates(timed)}
            self.writer.write(self.step, self.meter.seconds, "train", values)
            self.progress.show(self.step, values)

    def rates(self, timed) -> dict[str, float]:
        """Return how fast the steps since the last log were, and how full the chips are."""
        rates, devices = self.meter.rates(metrics.total(timed), len(timed)), list(self.compiled.mesh.devices.flat)
        return {**rates, **watch.per_chip(rates, self.compiled.flops, devices), **watch.memory(devices)}

    def stop_not_finite(self, what: str, step: int) -> None:
        """Raise the error that names the step; the checkpoints before it stay."""
        self.manager.wait()
        good = checkpoint.candidates(self.manager)
        kept = f"the last good checkpoint is step {good[0]}" if good else "there is no checkpoint yet"
        raise UserError(
            f"{self.name}: {what} is not finite at step {step}; {kept}."
            f" Lower the learning rate or --{self.name}.training.optimizer.clip, or look at the data of that step"
        )

    def save(self, wait: bool) -> None:
        """Save the state, unless it holds a NaN that the metrics did not show."""
        if self.step != self.saved:
            self.save_new()
        if wait or self.step == self.training.steps:
            self.manager.wait()
        self.meter.pause()

    def save_new(self) -> None:
        if not bool(_all_finite(self.state.params)):
            self.stop_not_finite("a parameter", self.step)
        settings = configs.to_json(self.training)
        meta = {"identity": self.identity, "seconds": self.meter.seconds, "training": settings}
        checkpoint.save(self.manager, self.step, self.state, meta)
        self.saved = self.step

    def owes(self) -> bool:
        """Tell whether this step ends with an evaluation or a hook."""
        last = self.step == self.training.steps
        return last or any(
            _due(self.step, every) for every in (self.training.evaluate_every, *(h[0] for h in self.hooks))
        )

    def after(self, signals: "_Signals") -> None:
        """Evaluate and call the hooks that are due at this step."""
        last = self.step == self.training.steps
        if self.owes():
            if last or _due(self.step, self.training.evaluate_every):
                self.evaluate(signals)
            for every, hook in self.hooks:
                if last or _due(self.step, every):
                    hook(self.state, self.step)
            self.meter.pause()

    def evaluate(self, signals: "_Signals") -> None:
        """Write the metrics of the validation batches, unless an earlier run has done so at this step."""
        if self.eval_batches is None or self.compiled.evaluate is None:
            return
        if hosts.leads(self.first and (self.step, "validation") in self.writer.seen):
            return
        found = []
        for batch in itertools.islice(self.eval_batches(), self.training.evaluate_batches):
            batch = sharding.place(self.compiled.mesh, batch)
            with jax.set_mesh(self.compiled.mesh):
                found.append(jax.device_get(self.compiled.evaluate(self.state, batch)))
            self.leave_if_asked(signals)
        if found and self.first:
            values = metrics.means(metrics.total(found))
            self.writer.write(self.step, self.meter.seconds, "validation", values)
            shown = ", ".join(f"{k} {v:.4g}" for k, v in values.items())
            self.progress.say(f"step {self.step}, validation: {shown}")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


_asked = itertools.count(1)  # numbers the questions to the other hosts, through all trainings of this process


class _Signals:
    """Turns the first SIGINT or SIGTERM into a request to stop after the step, the second into an exit at once.

    On several hosts the request may reach one only. There jax's runtime takes SIGTERM and tells the others which step
    to stop at, the same for all; SIGINT is passed on as SIGTERM.
    """

    def __init__(self):
        self.number = 0  # the signal that asked
        self.old: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        return self.number != 0

    def __enter__(self):
        mine = (signal.SIGINT, signal.SIGTERM) if hosts.count() == 1 else (signal.SIGINT,)
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self.old = {s: signal.signal(s, self.handle) for s in mine}
        return self

    def __exit__(self, *_):
        for number, handler in self.old.items():
            signal.signal(number, handler)

    def handle(self, number, frame) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.number = number
        if hosts.count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)
        print("\nstopping after this step; Ctrl-C again aborts at once", file=sys.stderr, flush=True)

    def agreed(self) -> bool:
        """Tell whether to stop after this step; all hosts ask after every step, which costs them nothing."""
        if hosts.count() > 1 and multihost_utils.reached_preemption_sync_point(next(_asked)):
            self.number = self.number or signal.SIGTERM
            return True
        return hosts.count() == 1 and self.asked
