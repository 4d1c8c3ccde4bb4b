"""The notebooks in samples/: valid, small, executed without errors, and running from end to end."""

import copy
import os
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

from tests.test_docs import broken_link, links

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "samples" / "notebooks"
IMAGE_STYLE, PEFT_DORA = FOLDER / "image_style.ipynb", FOLDER / "peft_dora.ipynb"
LARGEST_IMAGE, ALL_NOTEBOOKS = 60_000, 150_000  # bytes
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/<])(?:/\w[\w.-]*/|~/|[A-Za-z]:\\)")


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(notebook: NotebookNode) -> list[str]:
    """The sources, and the outputs that are text."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    data = [value for output in outputs for kind, value in output.get("data", {}).items() if kind.startswith("text/")]
    return [*(cell.source for cell in notebook.cells), *(output.get("text", "") for output in outputs), *data]


def problems(notebook: NotebookNode) -> list[str]:
    """What a notebook in the repository must not have."""
    found = [f"the path {match[0]}" for text in texts(notebook) for match in ABSOLUTE_PATH.finditer(text)]
    cells = code_cells(notebook)
    if [cell.execution_count for cell in cells] != [*range(1, len(cells) + 1)]:
        found.append("cells that were not executed in order")
    for output in (output for cell in cells for output in cell.outputs):
        if output.output_type == "error":
            found.append(f"the error {output.ename}")
        images = [value for kind, value in output.get("data", {}).items() if kind.startswith("image/")]
        found += [f"an image of {len(value)} bytes" for value in images if len(value) > LARGEST_IMAGE]
    return found


@pytest.mark.parametrize("path", [IMAGE_STYLE, PEFT_DORA], ids=lambda path: path.stem)
def test_a_notebook_is_valid_and_was_executed_without_errors(path):
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    assert problems(notebook) == []
    targets = [target for cell in notebook.cells if cell.cell_type == "markdown" for target in links(cell.source)]
    assert targets
    assert [problem for target in targets if (problem := broken_link(path, target))] == []


def test_the_notebooks_are_small():
    files = sorted(FOLDER.glob("*"))
    assert [*files] == [IMAGE_STYLE, PEFT_DORA]
    assert sum(file.stat().st_size for file in files) < ALL_NOTEBOOKS


def test_problems_of_a_notebook_are_found():
    right = nbformat.read(PEFT_DORA, as_version=4)
    wrong = copy.deepcopy(right)
    first, second = code_cells(wrong)[:2]
    first.execution_count, second.execution_count = 2, 1
    first.outputs = [
        nbformat.v4.new_output("stream", name="stderr", text="/opt/venv/lib/tqdm.py:21: a warning"),
        nbformat.v4.new_output("error", ename="KeyError", evalue="'a'", traceback=[]),
    ]
    second.outputs = [nbformat.v4.new_output("display_data", {"image/png": "A" * (LARGEST_IMAGE + 1)})]
    assert problems(wrong) == [
        "the path /opt/",
        "cells that were not executed in order",
        "the error KeyError",
        f"an image of {LARGEST_IMAGE + 1} bytes",
    ]


# --- from end to end -------------------------------------------------------------------------------------------------


@pytest.fixture
def executed(tmp_path, monkeypatch):
    """A function that runs a notebook with the package of this checkout, in a temporary folder."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    folder = tmp_path / "samples" / "notebooks"
    folder.mkdir(parents=True)

    def execute(path: Path) -> NotebookNode:
        notebook = nbformat.read(path, as_version=4)
        for cell in code_cells(notebook):
            cell.outputs, cell.execution_count = [], None
        settings = {"timeout": 900, "kernel_name": "python3", "resources": {"metadata": {"path": str(folder)}}}
        NotebookClient(notebook, **settings).execute()  # an error in a cell is raised
        return notebook

    return execute


@pytest.mark.slow
def test_the_notebook_of_an_image_style_ends_with_the_contact_sheet(executed, tmp_path):
    for name in ("tiny-sdxl", "lego"):
        shutil.copytree(ROOT / "samples" / name, tmp_path / "samples" / name)
    notebook = executed(IMAGE_STYLE)
    assert problems(notebook) == []
    (last,) = code_cells(notebook)[-1].outputs
    assert "image/jpeg" in last.data
    assert (tmp_path / "runs" / "brick_style" / "001" / "sheet.png").exists()


@pytest.mark.slow
def test_the_notebook_of_peft_ends_with_the_table(executed):
    notebook = executed(PEFT_DORA)
    assert problems(notebook) == []
    (last,) = code_cells(notebook)[-1].outputs
    _, _, *rows = [
        [cell.strip() for cell in row.strip("|").split("|")] for row in last.data["text/markdown"].split("\n")
    ]
    assert [name for name, *_ in rows] == ["PEFT LoRA", "PEFT DoRA", "PEFT DoRA, fused"]
    (_, _, lora), (_, dora, dora_loss), (_, fused, fused_loss) = [values for _, *values in rows]
    assert dora_loss == fused_loss != lora
    assert float(fused) < float(dora)
