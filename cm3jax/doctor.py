"""`cm3jax doctor`: what this machine has, what is missing, and how to get it."""

import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import shutil
import sys

import psutil

GIB = 2**30
CORE = "jax jaxlib flax optax orbax-checkpoint grain array_record sentencepiece numpy pillow tyro".split()  # noqa: SIM905
EXTRAS = {
    "tfds": ("tensorflow_datasets", "tensorflow"),
    "retrieval": ("faiss",),
    "eval": ("skimage", "sklearn"),
    "dev": ("pytest", "hypothesis", "beartype", "torch", "transformers", "nbclient"),
}
"""Extra of pyproject.toml -> modules that it brings."""
NEEDED_MEMORY, NEEDED_DISK = 4 * GIB, 2 * GIB
"""What the quickstart needs at most."""


def main() -> int:
    """Print the findings; return 0 if cm3jax can run here, 1 if not."""
    problems = []
    for name, check in (("Python", python), ("packages", packages), ("devices", devices), ("machine", machine)):
        lines, faults = check()
        print(f"{name}\n" + "\n".join(f"  {line}" for line in lines + [f"! {fault}" for fault in faults]))
        problems += faults
    print("extras\n" + "\n".join(f"  {line}" for line in extras()))
    print(f"\n{len(problems)} problem(s), marked ! above" if problems else "\nAll that the quickstart needs is here.")
    return 1 if problems else 0


def python() -> tuple[list[str], list[str]]:
    """Return (lines, faults) about the interpreter."""
    fault = [] if sys.version_info >= (3, 11) else ["needs Python 3.11 or newer: make the environment with one"]
    return [f"{platform.python_version()} at {sys.executable}", platform.platform()], fault


def packages() -> tuple[list[str], list[str]]:
    """Return (lines, faults) about what the core imports."""
    found = {name: version(name) for name in ["cm3jax", *CORE]}
    faults = [f"{name} is missing: pip install -e ." for name, v in found.items() if not v]
    return [f"{name} {v}" for name, v in found.items() if v], faults


def version(name: str) -> str:
    """Return a distribution's version, "" if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def devices() -> tuple[list[str], list[str]]:
    """Return (lines, faults) about what jax computes on."""
    if not importlib.util.find_spec("jax"):
        return [], []
    import jax

    try:
        found = jax.devices()
    except RuntimeError as e:
        first = str(e).splitlines()[0]
        return [], [f"jax finds no device ({first}); JAX_PLATFORMS is {os.environ.get('JAX_PLATFORMS', 'not set')}"]
    lines = [f"{len(found)} x {found[0].device_kind} ({found[0].platform}), {jax.process_count()} process(es)"]
    return lines + device_memory(found[0]) + hints(found[0].platform), []


def device_memory(device) -> list[str]:
    """Return a line with the device's own memory, if it tells."""
    stats = device.memory_stats() or {}
    return [f"{stats['bytes_limit'] / GIB:.1f} GiB on each"] if "bytes_limit" in stats else []


def hints(platform: str) -> list[str]:
    """Return what to install if this machine has an accelerator that jax does not use."""
    libtpu = version("libtpu")
    lines = [f"libtpu {libtpu}: compiles for TPUs"] if libtpu else []
    if platform != "cpu":
        return lines
    if shutil.which("nvidia-smi"):
        lines.append("an NVIDIA driver is here, but jax runs on the CPU: pip install -e '.[cuda]'")
    if list(pathlib.Path("/dev").glob("accel*")) or list(pathlib.Path("/dev/vfio").glob("[0-9]*")):
        lines.append("TPU device files are here, but jax runs on the CPU: pip install -e '.[tpu]'")
    return lines


def machine() -> tuple[list[str], list[str]]:
    """Return (lines, faults) about cores, memory and disk."""
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(".")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    lines = [
        f"{cores} CPU cores",
        f"memory: {memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free",
        f"disk here: {disk.free / GIB:.1f} of {disk.total / GIB:.1f} GiB free",
    ]
    faults = []
    if memory.available < NEEDED_MEMORY:
        faults.append(f"the quickstart takes up to {NEEDED_MEMORY // GIB} GiB of memory: close something else")
    if disk.free < NEEDED_DISK:
        faults.append(f"the quickstart takes up to {NEEDED_DISK // GIB} GiB of disk: free some, or use --out elsewhere")
    return lines, faults


def extras() -> list[str]:
    """Return a line for each extra: what of it is missing, and how to get it."""
    lines = []
    for name, modules in EXTRAS.items():
        missing = [module for module in modules if not importlib.util.find_spec(module)]
        how = f"missing {', '.join(missing)}: pip install -e '.[{name}]'" if missing else "installed"
        lines.append(f"[{name}] {how}")
    return lines
