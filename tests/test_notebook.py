import os
import pathlib
import re
import subprocess
import sys

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parent.parent
PATH = ROOT / "notebooks" / "1_quickstart.ipynb"
SMALL = (
    "--prepare.count 200 --image.training.steps 30 --image.seed_after 10 --decoder.training.steps 20"
    " --evaluate.samples 8 --evaluate.validation_samples 4 --evaluate.sheet 4"
)


def load():
    return nbformat.read(PATH, as_version=4)


def code(notebook) -> str:
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")


def parameters(notebook):
    """Return the one cell that holds what a user may change."""
    (cell,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    return cell


def setup(notebook, **values) -> str:
    """Return the code up to the check of the accelerator, with other parameters."""
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    end = next(i for i, source in enumerate(cells) if "jax.default_backend()" in source)
    return "\n".join([*cells[:1], *(f"{k} = {v!r}" for k, v in values.items()), *cells[1 : end + 1]])


def execute(source: str, cwd) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", source], cwd=cwd, capture_output=True, text=True)


def test_the_notebook_is_valid_and_its_parameters_come_first():
    notebook = load()
    nbformat.validate(notebook)
    assert next(cell for cell in notebook.cells if cell.cell_type == "code") is parameters(notebook)


def test_every_code_cell_compiles():
    for cell in load().cells:
        if cell.cell_type == "code":
            compile(cell.source, "cell", "exec")


def test_no_output_tells_of_an_error_or_of_the_machine_that_made_it():
    text = PATH.read_text()
    assert '"output_type": "error"' not in text
    assert not re.search(r"/(home|root|work|tmp)/", text)


def test_a_colab_badge_stands_only_where_the_repository_has_an_address():
    has_address = re.search(r"^Repository\s*=", (ROOT / "pyproject.toml").read_text(), re.M)
    assert has_address or "colab" not in PATH.read_text().lower()


def test_another_accelerator_than_the_chosen_one_stops_with_one_line():
    out = execute(setup(load(), ACCELERATOR="tpu"), ROOT)
    assert out.returncode == 1
    assert out.stderr.strip().splitlines()[-1] == (
        "jax runs on cpu, not on tpu: set ACCELERATOR = 'cpu', or change the runtime"
    )


def test_outside_a_clone_it_stops_with_one_line(tmp_path):
    out = execute(setup(load()), tmp_path)
    assert out.returncode == 1 and "is not inside a clone of the repository" in out.stderr
    assert len(out.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom_with_small_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")  # one device, as a user has
    notebook = load()
    parameters(notebook).source += f"\nFLAGS = {SMALL!r}\nRUN = {str(tmp_path / 'run')!r}"
    nbclient.NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(PATH.parent)}}).execute()
    kinds = [key for cell in notebook.cells for out in cell.get("outputs", []) for key in out.get("data", {})]
    assert kinds.count("image/png") == 5
    assert (tmp_path / "run" / "report.html").is_file()
    assert os.listdir(tmp_path) == ["run"]
