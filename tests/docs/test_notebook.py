"""The notebooks run from their first cell to their last, in an empty folder."""

import os
import sys
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
nbformat = pytest.importorskip("nbformat", reason="needs the docs extra (make docs)")


@pytest.mark.parametrize("name", ["quickstart", "audio"])
def test_the_committed_notebook_has_no_outputs(name):
    cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells
    assert [cell.outputs for cell in cells if cell.cell_type == "code" and (cell.outputs or cell.execution_count)] == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_quickstart_runs(tmp_path, monkeypatch):
    notebook = execute("quickstart", tmp_path, monkeypatch)
    assert (tmp_path / "runs/a/report.html").is_file()
    assert (tmp_path / "runs/classifier/model").is_dir()
    assert sum("image/png" in output.get("data", {}) for output in outputs(notebook)) == 3


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_audio_runs(tmp_path, monkeypatch):
    pytest.importorskip("soundfile", reason="needs the audio extra")
    pytest.importorskip("onnxruntime", reason="needs the onnx extra")
    notebook = execute("audio", tmp_path, monkeypatch)
    assert (tmp_path / "runs/classifier/model").is_dir()
    assert sum("image/png" in output.get("data", {}) for output in outputs(notebook)) == 1
    assert outputs(notebook)[-1]["data"]["text/plain"] == "[(1, 25, 96), (1, 96)]"  # of the ONNX file


def execute(name, folder, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="needs the docs extra (make docs)")
    pytest.importorskip("ipykernel", reason="needs the docs extra (make docs)")
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
