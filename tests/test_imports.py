"""Imports point one way: the floors of ARCHITECTURE.md."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "cm3jax"
FLOORS = [
    {"config", "vocab", "types"},
    {"sharding", "rng", "trees", "hosts"},
    {"nn"},
    {"tokenizers", "objectives"},
    {"tasks"},
    {"data"},
    {"checkpoint", "optim", "metrics", "stages", "provenance"},
    {"retrieval"},
    {"interop"},
    {"train", "sample"},
    {"evaluate"},
    {"plan"},
    {
        "run",
        "parts",
        "report",
        "curves",
        "bench",
        "bench_chameleon",
        "doctor",
        "hooks",
        "card",
        "png",
        "pages",
        "flags",
        "foreign",
    },
    {"cli"},
]
"""From the ground up. A module imports only lower floors, its own folder, and single files of its own floor."""
APART = {"train", "sample"}
"""Neighbours on one floor that never import each other."""
NO_JAX = [
    "cm3jax.data",
    "cm3jax.tasks",
    "cm3jax.tokenizers.text",
    "cm3jax.tokenizers.document",
    "cm3jax.tokenizers.clip",
    "cm3jax.tokenizers.turns",
]
NO_JAX += ["cm3jax.objectives.causal_mask", "cm3jax.objectives.places"]
HEAVY = {"tensorflow", "tensorflow_datasets", "torch", "transformers", "faiss", "sklearn", "skimage", "matplotlib"}


def modules():
    """Return {dotted name: path} of all modules of cm3jax."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(name, top_level=False):
    """Return the cm3jax modules that a module imports, anywhere in it or when it is itself imported."""
    tree = ast.parse(MODULES[name].read_text())
    nodes = tree.body if top_level else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: imports by full name, not relative ones"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else node.module)
    return {f for f in found if f.split(".")[0] == "cm3jax"} - {"cm3jax"}


def part(name):
    """Return "train" of cm3jax.train.loop."""
    return name.split(".")[1]


def floor(name):
    return next((i for i, parts in enumerate(FLOORS) if part(name) in parts), None)


PARTS = [name for name in MODULES if name != "cm3jax"]


@pytest.mark.parametrize("name", PARTS)
def test_every_module_stands_on_a_floor(name):
    assert floor(name) is not None, f"{name}: give its place in FLOORS and in ARCHITECTURE.md"


@pytest.mark.parametrize("name", PARTS)
def test_a_module_imports_only_what_is_below_it(name):
    for other in imported(name):
        assert floor(other) <= floor(name), f"{name} imports {other}, which stands above it"
        same = part(name) == part(other)
        assert same or not {part(name), part(other)} <= APART, f"{name} and {other} must not know each other"


def test_imports_make_no_circle():
    graph = {name: imported(name, top_level=True) & set(PARTS) for name in PARTS}
    while leaves := [name for name, found in graph.items() if not found & set(graph)]:
        for name in leaves:
            del graph[name]
    assert not graph, f"these import each other in a circle: {sorted(graph)}"


@pytest.mark.parametrize("name", PARTS)
def test_an_init_file_holds_nothing_but_words(name):
    path = MODULES[name]
    if path.name == "__init__.py":
        assert all(isinstance(n, ast.Expr) for n in ast.parse(path.read_text()).body), f"{name}: no re-exports"


def loaded_after(code):
    """Return the top-level modules that a fresh interpreter holds after running code."""
    command = f"import sys\n{code}\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    out = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(out.stdout.split())


def test_the_core_needs_no_heavy_optional_package():
    """All modules load where these packages are not installed. (tensorboardX takes torch along where it is.)"""
    absent = [f"sys.modules[{name!r}] = None" for name in HEAVY]
    loads = [f"importlib.import_module({name!r})" for name in PARTS]
    loaded_after("\n".join(["import importlib", *absent, *loads]))


@pytest.mark.parametrize("name", PARTS)
def test_a_module_loads_no_heavy_optional_package_itself(name):
    assert not external(name, top_level=True) & HEAVY


DATA = [n for n in PARTS if any(n == x or n.startswith(x + ".") for x in NO_JAX)]


@pytest.mark.parametrize("name", DATA)
def test_a_data_module_does_not_import_jax(name):
    assert not external(name) & {"jax", "flax", "jaxlib"}


def external(name, top_level=False):
    """Return the packages that a module imports, anywhere in it or when it is itself imported."""
    tree = ast.parse(MODULES[name].read_text())
    tree = tree.body if top_level else list(ast.walk(tree))
    whole = {alias.name for node in tree if isinstance(node, ast.Import) for alias in node.names}
    return {m.split(".")[0] for m in whole | {node.module for node in tree if isinstance(node, ast.ImportFrom)}}


def test_reading_data_never_loads_jax():
    """But for what reads with grain, which imports jax by itself; there, no backend is started."""
    with_grain = {f"cm3jax.data.{name}" for name in ("pipeline", "picture_batches", "pair_batches", "census")}
    loads = [f"importlib.import_module({n!r})" for n in DATA if n not in with_grain]
    assert len(loads) > 10
    assert not loaded_after("\n".join(["import importlib", *loads])) & (HEAVY | {"jax", "flax"})


def test_reading_batches_starts_no_jax_backend():
    loads = [f"importlib.import_module({n!r})" for n in DATA]
    check = "from jax._src import xla_bridge\nassert not xla_bridge._backends"
    assert "grain" in loaded_after("\n".join(["import importlib", *loads, check]))


def test_preparing_data_from_the_command_line_never_loads_jax(tmp_path):
    loaded = loaded_after(
        "from cm3jax import cli\n"
        f"assert not cli.main(['prepare', 'scenes:easy', {str(tmp_path)!r}, '--resolution', '16', '--count', '20'])\n"
        "print()"
    )
    assert not loaded & {"jax", "flax"}
