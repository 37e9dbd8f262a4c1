"""Kill trainings at random moments, let them continue, and compare the end with that of a run which was left alone.

    nice -n 5 .venv/bin/python launch/kill_test.py --out /tmp/kills --kills 50 --seed 0

Each cell trains the decoder, the image tokenizer or the retriever through `cm3jax train`, in one process or in two over
loopback. A kill is SIGKILL or SIGTERM to one process or to both, at a moment drawn from the start-up and the first
steps of a life; in the cell `large` (a state of more than 500 MB), within the time from 'save started' to 'committed'.
Then the same command is given again. A run that reaches its end must equal the undisturbed one: every step's loss and
batch bit for bit on every host, each step logged once, and all final weights. Exit code 0 if every law held; the report
is OUT/report.json.
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import random
import re
import signal
import socket
import sys
import time
import traceback
import zlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
if "--out" in sys.argv[:-1]:  # a second start of a training need not compile again
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", sys.argv[sys.argv.index("--out") + 1] + "/cache")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

# All that a training imports, before this process forks: a fork then starts at once. No device is used here.
import numpy as np

from cm3jax import checkpoint, cli, config, hosts, metrics, run, sharding, trees  # noqa: F401
from cm3jax.data import pair_batches, pipeline, tokens  # noqa: F401
from cm3jax.train import clip, lm, loop, vqgan  # noqa: F401

REACH = 8
"""Most steps that a life does before it is killed: two saves."""
MINUTE = 60.0
"""A dead host must have taken the others down by then."""
COMPARED = (
    "loss",
    "gradient",
    "temperature",
    "text_accuracy",
    "image_accuracy",
    "perplexity",
    "usage",
    "psnr",
    "l1",
    "l2",
)
"""Metrics that do not depend on time, by how their names begin."""
RECIPE = '''"""Made by launch/kill_test.py."""
import dataclasses
from cm3jax import config as c
base, replace = c.load({quickstart!r}), dataclasses.replace
image, decoder = base.image, base.decoder
often = dict(batch={batch}, steps={steps}, save_every={save}, evaluate_every=7, evaluate_batches=1, log_every=1,
             sample_every=0, workers=0)
config = replace(
    base,
    name="kills",
    prepare=replace(base.prepare, count=400, resolution=32, shards=2),
    text=replace(base.text, sample=300),
    image=replace(image, model=replace(image.model, width=16, decoder_blocks=1), seed_after=5,
                  training=replace(image.training, **often, ema=0.9)),
    retriever=c.Retriever(
        model=c.CLIP(resolution=32, patch=8, vision_width={width}, vision_layers=1, vision_heads=2, context=24,
                     text_width={width}, text_layers=1, text_heads=2, size=16),
        training=replace(base.decoder.training, **often, ema=0.9)),
    decoder=replace(decoder, model=replace(decoder.model, layers={layers}, width={width}, heads=2),
                    packing=replace(decoder.packing, picture=16),
                    training=replace(decoder.training, **often, ema=0.9)),
)
'''


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is trained, by how many processes, and how often it is killed."""

    name: str
    stage: str
    processes: int
    share: float
    """Of all kills."""
    steps: int = 30
    save: int = 4
    batch: int = 8
    layers: int = 1
    width: int = 32
    aimed: bool = False
    """Kill between 'save started' and 'committed'."""


CELLS = (
    Cell("decoder-2", "decoder", 2, 0.24),
    Cell("image-2", "image", 2, 0.16),
    Cell("decoder-1", "decoder", 1, 0.2),
    Cell("image-1", "image", 1, 0.16),
    Cell("retriever-2", "retriever", 2, 0.16),
    Cell("large", "decoder", 2, 0.24, steps=14, save=2, batch=2, layers=1, width=1920, aimed=True),
)


def main() -> int:
    options = arguments()
    out = pathlib.Path(options.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    base = pathlib.Path(options.base).absolute() if options.base else prepare(out)
    report = {"seed": options.seed, "kills": [], "laws": [], "broken": []}
    for cell in CELLS:
        if not options.cell or cell.name in options.cell:
            draw = random.Random(f"{options.seed}/{cell.name}")
            campaign(cell, base, out / cell.name, round(options.kills * cell.share), draw, report)
            (out / "report.json").write_text(json.dumps(report | {"summary": summary(report)}, indent=1) + "\n")
    print(json.dumps(summary(report), indent=1))
    return 1 if report["broken"] else 0


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="folder for runs, logs and report.json")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base", default="", help="run folder with prepared/, text/, image/, tokens/ of this recipe")
    parser.add_argument("--cell", nargs="*", default=[], help=f"of {', '.join(c.name for c in CELLS)}; all")
    return parser.parse_args()


def prepare(out: pathlib.Path) -> pathlib.Path:
    """Make what the trainings read, once."""
    base, recipe = out / "base", write_recipe(out / "base.py", CELLS[0])
    if not (base / "tokens" / "stage.json").exists():
        source = config.load(recipe).prepare.source
        settings = ["--count", "400", "--resolution", "32", "--shards", "2"]
        verbs = [["prepare", source, str(base), *settings]]
        verbs += [["train", str(recipe), "--inputs", str(base), "--stage", s] for s in ("text", "image")]
        verbs += [["encode", str(base)]]
        for i, verb in enumerate(verbs):
            child = fork(verb, out / f"base{i}.log", None)
            if os.waitpid(child, 0)[1]:
                raise SystemExit(f"{' '.join(verb)}: failed, see {out}/base{i}.log")
    return base


def write_recipe(path: pathlib.Path, cell: Cell) -> pathlib.Path:
    values = {k: getattr(cell, k) for k in ("batch", "steps", "save", "layers", "width")}
    path.write_text(RECIPE.format(quickstart=str(ROOT / "configs" / "quickstart.py"), **values))
    return path


# ------------------------------------------------------------------------------------------------------------ processes


def fork(argv: list[str], log: pathlib.Path, seen: pathlib.Path | None) -> int:
    """Start `cm3jax ARGV` as a process of its own group that writes to `log`, and what it trains on to `seen`."""
    sys.stdout.flush()
    if child := os.fork():
        return child
    code = 99
    try:
        os.setsid()
        file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(file, number)
        if seen:
            watch(seen)
        code = cli.main(argv)
        if hosts.started():
            sys.modules["jax"].distributed.shutdown()  # as at an ordinary exit
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def watch(seen: pathlib.Path) -> None:
    """Write each step's batch and, on the lead, its metrics at full precision to a file."""
    place, write, step = loop._Run.update, metrics.Writer.write, collections.Counter()

    def note(entry: dict) -> None:
        with seen.open("a") as f:
            f.write("\n" + json.dumps(entry) + "\n")  # a line that a kill cut short ends there

    def update(self, rows):
        def noted():
            for batch in rows:
                crc = 0
                for name in sorted(batch):
                    crc = zlib.crc32(np.ascontiguousarray(batch[name]).tobytes(), crc)
                note({"step": self.step + 1, "batch": crc})
                yield batch

        return place(self, step.setdefault(id(rows), noted()))

    def exact(self, number, seconds, group, values):
        kept = {k: float(v).hex() for k, v in values.items() if k.startswith(COMPARED)}
        note({"step": number, "group": group, "values": kept})
        return write(self, number, seconds, group, values)

    loop._Run.update, metrics.Writer.write = update, exact


class Life:
    """The processes of one start of a training."""

    def __init__(self, cell: Cell, base: pathlib.Path, folder: pathlib.Path, number: int):
        folder.mkdir(parents=True, exist_ok=True)
        recipe, n, port = write_recipe(folder.parent / f"{cell.name}.py", cell), cell.processes, free_port()
        argv = ["train", str(recipe), "--inputs", str(base), "--stage", cell.stage, "--out", str(folder / "run")]
        self.logs = [folder / f"life{number}.host{i}.log" for i in range(n)]
        several = ["--coordinator", f"localhost:{port}", "--processes", str(n)]
        self.left, self.seen, self.before = {}, folder / "seen0.jsonl", 0
        self.before = self.steps()
        for i in range(n):
            more = [*several, "--process", str(i)] if n > 1 else []
            self.left[fork(argv + more, self.logs[i], folder / f"seen{i}.jsonl")] = i
        self.pids = list(self.left)
        self.codes: dict[int, int] = {}

    def poll(self) -> bool:
        """Tell whether some process is still there."""
        for pid in list(self.left):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self.codes[self.left.pop(pid)] = os.waitstatus_to_exitcode(status)
        return bool(self.left)

    def wait(self, seconds: float) -> bool:
        """Wait until all have ended; whether they have."""
        deadline = time.monotonic() + seconds
        while self.poll() and time.monotonic() < deadline:
            time.sleep(0.02)
        return not self.left

    def until(self, test, seconds: float = 900.0) -> bool:
        """Wait until test() or the end of a process; whether the test held."""
        deadline = time.monotonic() + seconds
        while not test():
            self.poll()
            if self.codes or time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def end(self) -> None:
        for pid in self.left:
            os.kill(pid, signal.SIGKILL)
        self.wait(30)

    def log(self, host: int = 0) -> str:
        return self.logs[host].read_text(errors="replace") if self.logs[host].exists() else ""

    def steps(self) -> int:
        """Return how many steps the lead has begun in this life."""
        return sum("batch" in line for line in metrics.lines(self.seen)) - self.before

    def up(self) -> bool:
        """Tell whether all hosts have found each other."""
        n = len(self.logs)
        return n == 1 or all(f"host {i} of {n}" in self.log(i) for i in range(n))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


# ----------------------------------------------------------------------------------------------------------- one cell


def campaign(cell: Cell, base: pathlib.Path, out: pathlib.Path, kills: int, draw: random.Random, report: dict) -> None:
    """Kill a cell's training `kills` times; verify every run that reached its end."""
    begun = time.monotonic()
    life = Life(cell, base, out / "whole", 0)
    if not life.wait(1800) or any(life.codes.values()):
        life.end()
        raise SystemExit(f"{cell.name}: the undisturbed run failed, see {out}/whole")
    length, truth = time.monotonic() - begun, outcome(cell, out / "whole")
    say(f"{cell.name}: undisturbed {length:.0f} s, state of {truth['bytes']:,} bytes")
    window, done, attempt, number = 1.0, 0, 0, 0
    while True:
        folder, number = out / f"attempt{attempt}", number + 1
        life = Life(cell, base, folder, number)
        if done < kills and aim(cell, life, window, draw):
            window = hit(cell, life, draw, report, window)
            done += 1
            continue
        if not life.wait(1800) or any(life.codes.values()):
            life.end()
            broken(report, f"{cell.name}: life {number} of attempt {attempt} ended with {life.codes}, see {folder}")
            return
        verify(cell, folder, truth, report)
        attempt, number = attempt + 1, 0
        if done >= kills:
            return


def aim(cell: Cell, life: Life, window: float, draw: random.Random) -> bool:
    """Wait for the moment of a kill; whether the run is still there then."""
    if not life.until(life.up):
        return False
    begun, steps = time.monotonic(), draw.randrange(1 + REACH)
    if cell.aimed:
        skip = draw.randrange(2)  # which of this life's saves
        if not life.until(lambda: life.log().count("save started") > skip):
            return False
        time.sleep(draw.uniform(0, window))
    elif life.until(lambda: life.steps() >= steps):
        time.sleep(draw.uniform(0, (time.monotonic() - begun) / steps if steps else 5.0))
    return life.poll() and not life.codes


def hit(cell: Cell, life: Life, draw: random.Random, report: dict, window: float) -> float:
    """Kill, wait for the end of all processes, note where it landed; return how long a save takes."""
    sign = draw.choice(
        (signal.SIGKILL, signal.SIGTERM) if not cell.aimed else (signal.SIGKILL,) * 3 + (signal.SIGTERM,)
    )
    victims = draw.sample(range(cell.processes), draw.randint(1, cell.processes))
    where, at = landed(life.log(), cell), time.monotonic()
    for i in victims:
        os.kill(life.pids[i], sign)
    ended = life.wait(600)
    took = time.monotonic() - at
    life.end()
    entry = {
        "cell": cell.name,
        "signal": sign.name,
        "victims": victims,
        "landed": where,
        "exit": [life.codes.get(i) for i in range(cell.processes)],
        "all_ended_after": round(took, 1),
    }
    report["kills"].append(entry)
    say(json.dumps(entry))
    if not ended or (sign == signal.SIGKILL and took > MINUTE):
        broken(report, f"{cell.name}: after {sign.name} at {where!r} the others took {took:.0f} s to end")
    if sign == signal.SIGTERM and "step" in where and any(code not in (0, -15) for code in entry["exit"]):
        broken(report, f"{cell.name}: SIGTERM at {where!r} ended with {entry['exit']}")
    found = [float(s) for s in re.findall(r"committed, [\d,]+ bytes in ([\d.]+) s", life.log())]
    return sum(found) / len(found) if found else window


def landed(log: str, cell: Cell) -> str:
    """Return where the lead was, by its log."""
    started = re.findall(r"step (\d+): checkpoint save started", log)
    committed = re.findall(r"step (\d+): checkpoint committed", log)
    if len(started) > len(committed):
        return f"between 'save started' and 'committed' of step {started[-1]}"
    if committed:
        return f"after the commit of step {committed[-1]} of {cell.steps}"
    if found := re.search(r"parameters, mesh .*, step (\d+) of", log):
        return f"between step {found[1]}, where it began, and the first save"
    return "before the training began"


def outcome(cell: Cell, folder: pathlib.Path) -> dict:
    """Return what a finished run left: batches, metrics, weights, bytes of its last checkpoint."""
    stage = folder / "run" / run.STAGES[cell.stage].output
    batches, values = collections.defaultdict(set), collections.defaultdict(set)
    for i in range(cell.processes):
        for line in metrics.lines(folder / f"seen{i}.jsonl"):
            if "batch" in line:
                batches[i, line["step"]].add(line["batch"])
            else:
                values[line["group"], line["step"]].add(json.dumps(line["values"], sort_keys=True))
    logged = collections.Counter((line["step"], k) for line in metrics.lines(stage / "metrics.jsonl") for k in line)
    last = stage / "checkpoints" / str(cell.steps)
    return {
        "batches": dict(batches),
        "values": dict(values),
        "logged": {k: n for k, n in logged.items() if k[1].endswith("/loss")},
        "weights": digest(stage, cell.steps),
        "bytes": sum(p.stat().st_size for p in last.rglob("*") if p.is_file()),
    }


def digest(stage: pathlib.Path, step: int) -> dict[str, int]:
    """Return a checksum of each array of the weights and averaged weights (in a fork: this process uses no device)."""
    read, write = os.pipe()
    if not (child := os.fork()):
        both = {name: checkpoint.load_params(stage, ema, step) for name, ema in (("params", False), ("ema", True))}
        found = {k: zlib.crc32(np.asarray(x).tobytes()) for k, x in trees.named_leaves(both).items()}
        os.write(write, json.dumps(found).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as f:
        text = f.read()
    os.waitpid(child, 0)
    return json.loads(text)


def verify(cell: Cell, folder: pathlib.Path, truth: dict, report: dict) -> None:
    """Compare a run that was killed with the one left alone."""
    found = outcome(cell, folder)
    for what in ("batches", "values", "logged", "weights"):
        if found[what] != truth[what]:
            odd = [k for k in {**truth[what], **found[what]} if truth[what].get(k) != found[what].get(k)]
            broken(report, f"{cell.name}: {what} differ from the undisturbed run's at {odd[:3]}, see {folder}")
    if any(n != 1 for n in found["logged"].values()) or not found["weights"]:
        broken(report, f"{cell.name}: a step is logged twice or there are no weights, see {folder}")
    law = f"{cell.name}: {len(found['batches'])} batches, {len(found['values'])} lines of metrics and"
    report["laws"].append(f"{law} {len(found['weights'])} arrays equal those of the undisturbed run ({folder.name})")
    say(report["laws"][-1])


def broken(report: dict, text: str) -> None:
    report["broken"].append(text)
    say(f"BROKEN: {text}")


def summary(report: dict) -> dict:
    kills = report["kills"]
    saving = [k for k in kills if k["landed"].startswith("between 'save started'")]
    killed = [k["all_ended_after"] for k in kills if k["signal"] == "SIGKILL" and len(k["exit"]) > len(k["victims"])]
    return {
        "kills": len(kills),
        "signals": collections.Counter(k["signal"] for k in kills),
        "one process of several": sum(len(k["victims"]) < len(k["exit"]) for k in kills),
        "between save started and committed": len(saving),
        "of these on the large state": sum(k["cell"] == "large" for k in saving),
        "slowest end of the others after SIGKILL to one, s": max(killed, default=0.0),
        "runs compared": len(report["laws"]),
        "broken": report["broken"],
    }


def say(line: str) -> None:
    print(f"{time.strftime('%T')} {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
