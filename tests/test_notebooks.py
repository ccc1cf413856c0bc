"""Every notebook runs, in short, and is committed tidy.

All but a newcomer's first run in `make test-all` alone, for half a minute each.
"""

import os
import pathlib
import re
import sys

import nbclient
import nbformat
import pytest
from long_run import rest_long
from waiting import HANGING_SECONDS

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

FIRST = FOLDER / "nlcg_in_five_minutes.ipynb"

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_notebooks_are_found():
    assert NOTEBOOKS


def printed(cell):
    return "".join(
        output.text
        for output in cell.get("outputs", [])
        if output.output_type == "stream" and output.name == "stderr"
    )


@pytest.mark.parametrize(
    "path", rest_long(NOTEBOOKS, [FIRST]), ids=lambda path: path.stem
)
def test_runs(path, tmp_path, monkeypatch):
    """A cell that raises fails, and so does one that warns."""
    notebook = nbformat.read(path, as_version=4)
    for name, value in {
        "NLCG_NOTEBOOK_SHORT": "1",
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "3",  # XLA complains of slow machines
        "PYTHONPATH": os.pathsep.join(sys.path),
        # Jupyter's and IPython's own files; the kernel is this Python's.
        "JUPYTER_CONFIG_DIR": str(tmp_path / "config"),
        "JUPYTER_DATA_DIR": str(tmp_path / "data"),
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"),
        "IPYTHONDIR": str(tmp_path / "ipython"),
    }.items():
        monkeypatch.setenv(name, value)
    nbclient.NotebookClient(
        notebook,
        timeout=HANGING_SECONDS,
        startup_timeout=HANGING_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    warned = "\n".join(filter(None, map(printed, notebook.cells)))
    assert not warned, warned


def first_cell(path, here, monkeypatch, absent):
    """Runs the first cell in a folder, some modules absent; what it would install."""
    notebook = nbformat.read(path, as_version=4)
    cell = next(cell for cell in notebook.cells if cell.cell_type == "code").source
    called = "%pip install --quiet {packages}"
    assert cell.count(called) == 1
    installed = []
    monkeypatch.chdir(here)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name not in absent)
    cell = cell.replace(called, "installed.append(packages)")
    exec(cell, {"installed": installed})
    return installed


@each_notebook
def test_the_first_cell_installs_what_is_missing(path, tmp_path, monkeypatch):
    ours = {"nlcg_optax"}
    # Installed already.
    assert first_cell(path, tmp_path, monkeypatch, set()) == []
    missing = first_cell(path, tmp_path, monkeypatch, {"matplotlib"})
    assert missing == ['"matplotlib"']
    # In a checkout, from any folder of it; its name may have a space.
    checkout = tmp_path / "a checkout"
    (checkout / "nlcg_optax").mkdir(parents=True)
    (checkout / "examples" / "notebooks").mkdir(parents=True)
    extra = "[train]" if path.stem == "huge_batches_on_a_mesh" else ""
    for folder in (checkout, checkout / "examples" / "notebooks"):
        installed = first_cell(path, folder, monkeypatch, ours)
        assert installed == [f'"{checkout}{extra}"']
    both = first_cell(path, checkout, monkeypatch, {*ours, "jax"})
    assert both == [f'"jax" "{checkout}{extra}"']
    # Nothing there, as in Colab at first; then with the wheel uploaded.
    elsewhere = tmp_path / "content"
    elsewhere.mkdir()
    with pytest.raises(ModuleNotFoundError, match="`make dist` .* upload .*whl"):
        first_cell(path, elsewhere, monkeypatch, ours)
    wheel = elsewhere / "nlcg_optax-0.1.0-py3-none-any.whl"
    wheel.touch()
    installed = first_cell(path, elsewhere, monkeypatch, ours)
    assert installed == [f'"{wheel}{extra}"']


@each_notebook
def test_is_committed_tidy(path):
    """With the outputs of one whole run, and nothing of the machine it ran on."""
    assert path.stat().st_size < 300_000
    text = path.read_text()
    # Not within a picture, whose base64 has slashes too.
    assert not re.search(r"(?<![\w+/])/(home|root|tmp|work|Users|content)/", text)
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec"}, "see the folder's README.md"
    assert notebook.metadata.kernelspec.name == "python3"
    assert not any(cell.metadata for cell in notebook.cells), "see README.md there"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    counts = [cell.execution_count for cell in code]
    assert counts == list(range(1, len(code) + 1)), "not run in order, from the start"
    outputs = [output for cell in code for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output.output_type == "error" for output in outputs)
    assert not any(map(printed, code))
