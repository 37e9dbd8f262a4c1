"""The scripts of launch/: what they print, what they do with stand-ins for the cloud, and their one-line errors."""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
TRAIN = ["cm3jax", "train", "configs/cm3leon/7b.py", "--inputs", "/mnt/cm3jax/my runs/it's $7b"]
TPU = ["--zone", "us-west4-a", "--type", "v5e-256", "--bucket", "my-bucket"]
GKE = [
    "--cluster",
    "c",
    "--zone",
    "us-west4-a",
    "--type",
    "v5p-128",
    "--image",
    "registry/i:1",
    "--bucket",
    "b",
    "--spot",
]
VERBS = {
    "tpu_vm.sh": ["create", "wait", "install", "run", "watch", "resume", "stop", "delete"],
    "gke.sh": ["create", "install", "run", "watch", "resume", "stop", "delete"],
    "slurm.sh": ["install", "run", "watch", "resume", "stop", "delete"],
}
OPTIONS = {"tpu_vm.sh": TPU, "gke.sh": GKE, "slurm.sh": ["--nodes", "3"]}


def bash(*arguments, **changes):
    settings = {"capture_output": True, "text": True, "timeout": 120, "cwd": ROOT, **changes}
    return subprocess.run(["bash", *map(str, arguments)], **settings)


def dry(script, verb, *arguments, command=TRAIN):
    """The commands that a script would run, each as a list of words."""
    end = ["--", *command] if command else []
    done = bash(LAUNCH / script, verb, "my-run", *arguments, "--dry-run", *end)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines() if not line.startswith("#")]


def option(words, name):
    """The value of --name=VALUE."""
    (value,) = (w.removeprefix(f"--{name}=") for w in words if w.startswith(f"--{name}="))
    return value


def test_the_scripts_pass_shellcheck():
    program = pathlib.Path(sys.executable).parent / "shellcheck"
    scripts = [*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch"), ROOT / ".ci" / "run"]
    done = subprocess.run([program, "-x", *scripts], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", VERBS)
def test_help_names_every_subcommand_and_option(script):
    done = bash(LAUNCH / script, "--help")
    assert done.returncode == 0 and done.stdout.startswith("Trains on")
    text = (LAUNCH / script).read_text()
    valued, plain = re.search(r'^arguments "(.*?)" (?:\\\n\s*)?"(.*?)"', text, re.M).groups()
    for word in [*VERBS[script], *valued.split(), *plain.split(), "--dry-run"]:
        assert re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", done.stdout), word


@pytest.mark.parametrize(
    "words", [["a b"], ["it's"], ["", "$HOME", "`x`"], ['"', "\\", "a\\'b"], ["*", "~", "#"], ["a=b,c:d"]]
)
def test_a_printed_line_can_be_pasted(words):
    line = bash("-c", 'source launch/cloud.sh; quote "$@"', "-", *words).stdout
    assert shlex.split(line) == words
    back = bash("-c", f"printf '%s\\0' {line}").stdout
    assert back.split("\0")[:-1] == words


# ------------------------------------------------------------------------------------------------------ what is printed


def test_a_slice_goes_through_create_install_run_and_delete():
    (create,) = dry("tpu_vm.sh", "create", *TPU, "--spot", "--project", "p")
    start = ["gcloud", "compute", "tpus", "queued-resources"]
    assert create == [
        *start,
        "create",
        "my-run",
        "--zone=us-west4-a",
        "--project=p",
        "--accelerator-type=v5litepod-256",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--node-id=my-run",
        "--spot",
    ]
    assert [words[4] for words in dry("tpu_vm.sh", "wait", *TPU)] == ["describe"]
    pack, copy, install = dry("tpu_vm.sh", "install", *TPU)
    assert pack[0] == "tar" and copy[4:7] == ["scp", pack[pack.index("-czf") + 1], "my-run:cm3jax.tar.gz"]
    assert install[4] == "ssh" and {"--worker=all", "--node=all"} <= set(install) & set(copy)
    assert option(install, "command").endswith("bash cm3jax/launch/host.sh install my-bucket")
    (delete,) = dry("tpu_vm.sh", "delete", *TPU)
    assert delete == [*start, "delete", "my-run", "--zone=us-west4-a", "--force", "--quiet"]


def test_several_slices_are_one_queued_resource():
    (create,) = dry("tpu_vm.sh", "create", *TPU, "--slices", "2")
    assert {"--node-count=2", "--node-prefix=my-run"} <= set(create) and "--node-id=my-run" not in create


@pytest.mark.parametrize(
    "asked, kind, runtime",
    [
        ("v4-128", "v4-128", "tpu-ubuntu2204-base"),
        ("v5litepod-64", "v5litepod-64", "v2-alpha-tpuv5-lite"),
        ("v5p-64", "v5p-64", "v2-alpha-tpuv5"),
        ("v6e-64", "v6e-64", "v2-alpha-tpuv6e"),
    ],
)
def test_a_type_is_what_plan_calls_it_and_has_its_software(asked, kind, runtime):
    (create,) = dry("tpu_vm.sh", "create", "--zone", "z", "--type", asked)
    assert option(create, "accelerator-type") == kind and option(create, "runtime-version") == runtime


def test_the_hosts_get_the_words_of_the_command_as_they_were():
    (words,) = dry("tpu_vm.sh", "run", *TPU)
    assert shlex.split(option(words, "command")) == ["bash", "cm3jax/launch/host.sh", "start", *TRAIN]
    words = dry("gke.sh", "run", *GKE)[-1]
    assert shlex.split(option(words, "command")) == ["exec", *TRAIN]
    (words,) = dry("slurm.sh", "run")
    assert words[words.index("launch/slurm.sbatch") + 1 :] == TRAIN


@pytest.mark.parametrize("script", VERBS)
def test_resuming_is_the_same_command(script):
    assert dry(script, "resume", *OPTIONS[script])[-1] == dry(script, "run", *OPTIONS[script])[-1]


def test_resuming_on_a_lost_slice_is_delete_create_wait_install_run():
    verbs = [words[4] for words in dry("tpu_vm.sh", "resume", *TPU) if words[0] == "gcloud"]
    assert verbs == ["describe", "delete", "create", "describe", "scp", "ssh", "ssh"]


def test_watching_with_the_command_starts_it_where_it_was_lost():
    look, keep, log = dry("tpu_vm.sh", "watch", *TPU)
    assert look[4] == "describe" and shlex.split(option(keep, "command"))[2:] == ["keep", *TRAIN]
    assert option(log, "command") == "bash cm3jax/launch/host.sh log" and "--worker=0" in log
    assert len(dry("tpu_vm.sh", "watch", *TPU, command=[])) == 2


def test_a_cluster_goes_through_create_image_workload_and_delete():
    cluster, storage = dry("gke.sh", "create", *GKE)
    assert cluster[:3] == ["xpk", "cluster", "create"] and {"--tpu-type=v5p-128", "--spot"} <= set(cluster)
    assert storage[:4] == ["xpk", "storage", "attach", "my-run"] and "--mount-point=/mnt/cm3jax" in storage
    build, push = dry("gke.sh", "install", *GKE)
    assert build[:2] == ["docker", "build"] and push == ["docker", "push", "registry/i:1"]
    assert pathlib.Path(option(build, "file")).is_file()
    (workload,) = dry("gke.sh", "run", *GKE, "--slices=2", "--restarts", "7")
    assert {"--num-slices=2", "--max-restarts=7", "--cluster=c", "--workload=my-run"} <= set(workload)
    assert "--env=JAX_COMPILATION_CACHE_DIR=/mnt/cm3jax/compilation-cache" in workload
    assert dry("gke.sh", "delete", *GKE) == [
        ["xpk", "cluster", "delete", "--force", "--cluster=c", "--zone=us-west4-a"]
    ]


def test_a_slurm_job_has_a_process_per_gpu_and_is_told_of_its_end():
    (words,) = dry("slurm.sh", "run", "--nodes=2", "--gpus=4", "--partition", "gpu a")
    assert {"--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--partition=gpu a"} <= set(words)
    assert {"--requeue", "--signal=B:USR1@300", "--job-name=my-run"} <= set(words) and words[0] == "sbatch"


PAGE = (LAUNCH / "README.md").read_text()
COMMANDS = [line.strip() for line in PAGE.splitlines() if line.startswith("    bash launch/")]


@pytest.mark.parametrize("line", COMMANDS)
def test_the_scripts_take_every_command_of_the_page(line):
    words = shlex.split(line)
    at = words.index("--") if "--" in words else len(words)
    done = bash(*words[1:at], "--dry-run", *words[at:])
    assert done.returncode == 0 and done.stdout, done.stderr


def test_the_page_shows_every_script_and_subcommand_of_a_slice():
    assert {shlex.split(line)[2] for line in COMMANDS if "tpu_vm.sh" in line} == set(VERBS["tpu_vm.sh"])
    assert all(script in PAGE for script in VERBS)


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["tpu_vm.sh", "fly"], "'fly': must be create, wait"),
        (["tpu_vm.sh", "run"], "the name is missing"),
        (["tpu_vm.sh", "run", "my run", *TPU], "name 'my run': must be lower-case letters"),
        (["tpu_vm.sh", "run", "r", "--type", "v5e-256", "--", "x"], "--zone is missing"),
        (["tpu_vm.sh", "run", "r", *TPU], "no command; put it last: -- cm3jax train"),
        (["tpu_vm.sh", "run", "r", *TPU, "cm3jax"], "'cm3jax': not understood; the command to run stands behind --"),
        (["tpu_vm.sh", "run", "r", "--zone"], "--zone needs a value"),
        (["tpu_vm.sh", "create", "r", "--zone", "z"], "--type is missing"),
        (["tpu_vm.sh", "create", "r", "--zone", "z", "--type", "v9-8"], "--type = 'v9-8': must be like v5e-256"),
        (["tpu_vm.sh", "create", "r", *TPU, "--slices", "two"], "--slices = 'two': must be a whole number from 1 on"),
        (["tpu_vm.sh", "create", "r", *TPU, "--spot", "--reserved"], "--spot and --reserved exclude each other"),
        (["tpu_vm.sh", "create", "r", *TPU, "--spt"], "--spt: no such option"),
        (["tpu_vm.sh", "create", "r", *TPU, "--spot=1"], "--spot takes no value"),
        (["gke.sh", "run", "r", "--zone", "z"], "--cluster is missing"),
        (["gke.sh", "run", "r", "--cluster", "c", "--zone", "z", "--type", "v6e-8", "--", "x"], "--image is missing"),
        (["gke.sh", "create", "r", *GKE, "--on-demand"], "give one of --spot, --on-demand and --reservation NAME"),
        (["gke.sh", "install", "r"], "--image is missing"),
        (["slurm.sh", "run", "r", "--gpus", "0", "--", "x"], "--gpus = '0': must be a whole number"),
        (["slurm.sh", "run", "r"], "no command"),
        (["again.sh"], "no command"),
        (["host.sh", "fly"], "'fly': must be install, start, keep, log or stop"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message):
    script, *rest = arguments
    at = rest.index("--") if "--" in rest else len(rest)
    shown = [] if script in ("again.sh", "host.sh") or len(rest) < 2 else ["--dry-run"]
    done = bash(LAUNCH / script, *(shown and rest[:2]), *shown, *rest[2 if shown else 0 : at], *rest[at:])
    assert done.returncode == 2 and message in done.stderr, done
    assert done.stderr.startswith(f"{script}: ") and done.stderr.count("\n") == 1 and not done.stdout


@pytest.fixture
def tools(tmp_path):
    """A folder to be the whole PATH, with the ordinary programs only; the function adds one of a test's own."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for (
        name
    ) in "bash basename dirname sed tr tail cat date hostname setsid nohup sleep rm mkdir tar gzip mountpoint".split():  # noqa: SIM905
        (folder / name).symlink_to(shutil.which(name))

    def add(name, text):
        (folder / name).write_text(f"#!{sys.executable}\n{text}")
        (folder / name).chmod(0o755)

    add.path = str(folder)
    return add


@pytest.mark.parametrize(
    "script, options, tool", [("tpu_vm.sh", TPU, "gcloud"), ("gke.sh", GKE, "xpk"), ("slurm.sh", [], "sbatch")]
)
def test_a_tool_that_is_missing_is_named_with_where_to_get_it(tools, script, options, tool):
    done = bash(LAUNCH / script, "run", "my-run", *options, "--", "x", env={"PATH": tools.path})
    assert done.returncode == 2 and re.fullmatch(rf"{script}: {tool} is not installed; .+\n", done.stderr), done.stderr


# ------------------------------------------------------------------------------------------------------------ stand-ins

GCLOUD = """
import json, os, pathlib, shlex, subprocess, sys
here, words = pathlib.Path({here!r}), sys.argv[1:]
with (here / "calls").open("a") as f:
    f.write(json.dumps(words) + "\\n")
if words[3] == "describe":
    states = (here / "states").read_text().split()
    (here / "states").write_text(" ".join(states[1:] or states))
    if states[0] == "ABSENT":
        sys.exit("ERROR: (gcloud) NOT_FOUND: no such resource")
    print(states[0])
if words[3] == "ssh":
    (line,) = (w.removeprefix("--command=") for w in words if w.startswith("--command="))
    if "host.sh install" not in line:  # a host has sudo, uv and the internet
        sys.exit(subprocess.run(["bash", "-c", line], cwd=here / "host").returncode)
"""


@pytest.fixture
def cloud(tmp_path, tools):
    """A slice of one host, which is a folder here; a function that calls tpu_vm.sh on it, and that with its calls."""
    tools("gcloud", GCLOUD.format(here=str(tmp_path)))
    shutil.copytree(LAUNCH, tmp_path / "host" / "cm3jax" / "launch")
    env = {"PATH": tools.path, "TMPDIR": str(tmp_path), "WATCH_EVERY": "0.2", "AGAIN_PAUSE": "0.1"}

    def call(verb, states, *command):
        (tmp_path / "states").write_text(states)
        (tmp_path / "calls").write_text("")
        done = bash(LAUNCH / "tpu_vm.sh", verb, "my-run", *TPU, *(["--", *command] if command else []), env=env)
        calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
        return done, [words[3] for words in calls]

    call.host = tmp_path / "host" / "cm3jax"
    yield call
    bash(call.host / "launch" / "host.sh", "stop", env=env)


def python(text):
    return [sys.executable, "-c", text]


def test_waiting_ends_when_the_slice_is_there(cloud):
    done, calls = cloud("wait", "WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
    assert done.returncode == 0 and calls == ["describe"] * 3


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED", "ABSENT"])
def test_waiting_for_what_will_not_come_ends_with_the_fix(cloud, state):
    done, _ = cloud("wait", f"WAITING_FOR_RESOURCES {state}")
    assert done.returncode == 2 and f"my-run is {state} and will not come; ask again: resume" in done.stderr


def test_a_run_is_watched_to_its_end_and_its_words_arrive_whole(cloud):
    words = ["a b", "it's", "$HOME", "*"]
    done, calls = cloud("run", "ACTIVE", *python("import sys; print(sys.argv[1:])"), *words)
    assert done.returncode == 0 and calls == ["ssh"], done.stderr
    done, _ = cloud("watch", "ACTIVE")
    assert done.returncode == 0 and repr(words) in done.stdout and "== ended 0" in done.stdout


def test_a_mistake_in_the_input_ends_the_watch(cloud):
    cloud("run", "ACTIVE", *python("import sys; print('no such file'); sys.exit(2)"))
    done, _ = cloud("watch", "ACTIVE")
    assert done.returncode == 2 and "no such file" in done.stdout and "a mistake in the input" in done.stderr


def test_a_slice_that_is_taken_is_asked_for_again_and_the_run_goes_on(cloud):
    command = python("print('goes on')")
    done, calls = cloud("watch", "SUSPENDED SUSPENDED WAITING_FOR_RESOURCES ACTIVE", *command)
    asked = ["describe", "describe", "delete", "create", "describe", "describe", "scp", "ssh", "ssh"]
    assert done.returncode == 0 and calls[: len(asked)] == asked and "goes on" in done.stdout, done.stderr


def test_without_the_command_a_lost_slice_ends_the_watch_with_the_fix(cloud):
    done, calls = cloud("watch", "SUSPENDED")
    assert done.returncode == 2 and "go on with: resume" in done.stderr and calls == ["describe"]


def test_resuming_on_a_slice_that_is_there_only_starts_the_command(cloud):
    _, calls = cloud("resume", "ACTIVE", *python("pass"))
    assert calls == ["describe", "ssh"]


def test_a_slice_that_never_was_is_made(cloud):
    _, calls = cloud("resume", "ABSENT ACTIVE", *python("pass"))
    assert calls == ["describe", "create", "describe", "scp", "ssh", "ssh"]


READY = 'print("started", flush=True)'
SLEEPER = f"""
import pathlib, signal, sys, time
def end(*_):
    print("saved", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
{READY}
time.sleep(60)
"""


def test_a_run_that_is_told_to_stop_saves_and_counts_as_ended(cloud):
    cloud("run", "ACTIVE", *python(SLEEPER))
    wait_for(lambda: "started" in (cloud.host / "run.log").read_text())
    done, _ = cloud("run", "ACTIVE", *python("print('never')"))
    assert "is at work already" in done.stdout
    done, _ = cloud("stop", "ACTIVE")
    assert done.returncode == 0 and "stopped" in done.stdout, done
    log = (cloud.host / "run.log").read_text()
    assert "saved" in log and "never" not in log and (cloud.host / "run.code").read_text() == "0\n"


def test_a_host_that_restarted_gets_the_command_again_and_one_that_ended_does_not(cloud):
    (cloud.host / "run.log").write_text("before the power went\n")
    (cloud.host / "run.pid").write_text("999999999")
    done, _ = cloud("watch", "ACTIVE", *python("print('back')"))
    assert done.returncode == 0 and "back" in done.stdout
    cloud("watch", "ACTIVE", *python("print('twice')"))
    assert "twice" not in (cloud.host / "run.log").read_text()


def wait_for(true, seconds=60):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ----------------------------------------------------------------------------------------------------- starting again

COUNT = """
import pathlib, sys
path = pathlib.Path(sys.argv[1])
path.write_text(path.read_text() + "x" if path.exists() else "x")
sys.exit(int(sys.argv[2:][len(path.read_text()) - 1]))
"""


@pytest.mark.parametrize(
    "codes, starts",
    [("0", 1), ("1 1 0", 3), ("134 2 0", 2), ("1 1 1 1 1", 4)],
    ids=["well", "crash", "mistake", "most"],
)
def test_a_command_starts_again_until_it_ends_well_or_by_a_mistake(tmp_path, codes, starts):
    env = {**os.environ, "AGAIN_PAUSE": "0", "AGAIN_MOST": "3"}
    done = bash(LAUNCH / "again.sh", *python(COUNT), tmp_path / "n", *codes.split(), env=env)
    assert len((tmp_path / "n").read_text()) == starts and str(done.returncode) == codes.split()[starts - 1]


def test_sigterm_reaches_the_command_and_nothing_starts_again(tmp_path):
    command = ["bash", LAUNCH / "again.sh", *python(SLEEPER.replace("sys.exit(0)", "sys.exit(7)"))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[0] == "saved\n" and process.returncode == 7


RECORD = (
    "import pathlib, sys\nwith pathlib.Path({log!r}).open('a') as f:\n    f.write(' '.join(sys.argv[1:]) + chr(10))\n"
)
SRUN = "import os, sys\nassert sys.argv[1] == '--kill-on-bad-exit=1'\nos.execvp(sys.argv[2], sys.argv[2:])\n"


@pytest.fixture
def slurm(tmp_path, tools):
    """Starts slurm.sbatch with a command; its second result is what it asked of SLURM."""
    log = tmp_path / "asked"
    tools("srun", SRUN)
    tools("scontrol", RECORD.format(log=str(log)))
    end = f"import os, signal\nos.kill(int(os.readlink({str(tmp_path / 'pid')!r})), signal.SIGTERM)"
    tools("scancel", RECORD.format(log=str(log)) + end)

    def start(*command, restarts=0, late=False):
        env = {"PATH": tools.path, "SLURM_JOB_ID": "42", "SLURM_RESTART_COUNT": str(restarts)}
        process = subprocess.Popen(
            ["bash", LAUNCH / "slurm.sbatch", *command], stdout=subprocess.PIPE, text=True, env=env, cwd=tmp_path
        )
        if late:
            wait_for((tmp_path / "pid").is_symlink)
            process.send_signal(signal.SIGUSR1)
        process.communicate(timeout=60)
        return process.returncode, log.read_text().splitlines() if log.exists() else []

    start.pid = tmp_path / "pid"
    return start


@pytest.mark.parametrize("code, asked", [(0, []), (2, []), (1, ["requeue 42"]), (134, ["requeue 42"])])
def test_a_job_queues_itself_anew_after_a_crash_only(slurm, code, asked):
    assert slurm(*python(f"import sys; sys.exit({code})")) == (code, asked)


def test_a_job_gives_up_in_the_end(slurm):
    assert slurm(*python("import sys; sys.exit(1)"), restarts=50) == (1, [])


def test_a_job_whose_time_is_up_saves_and_queues_itself_anew(slurm):
    tell = f"import os; os.symlink(str(os.getpid()), {str(slurm.pid)!r})"  # a link is there as a whole or not at all
    assert slurm(*python(f"{SLEEPER.replace(READY, tell)}"), late=True) == (0, ["--signal=TERM 42", "requeue 42"])
