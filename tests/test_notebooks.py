"""Notebooks: each runs from a clean kernel on data that needs no download, and is stored bare."""

from __future__ import annotations

import os
import re
import runpy
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_the_three_notebooks_are_there() -> None:
    names = [path.stem for path in NOTEBOOKS]
    assert names == ["01_quickstart", "02_what_merging_does", "03_robustness"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
    assert path.stat().st_size < 30_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_site_shows_the_notebook_as_it_is(path: Path) -> None:
    page = (ROOT / "docs" / "notebooks" / f"{path.stem}.md").read_text(encoding="utf-8")
    rest = page
    for cell in nbformat.read(path, as_version=4).cells:
        assert cell.source in rest, "run notebooks/render.py again"
        rest = rest.partition(cell.source)[2]
    pictures = re.findall(r"^!\[.*\]\((.*)\)$", page, re.MULTILINE)
    assert all((ROOT / "docs" / "notebooks" / name).stat().st_size > 5_000 for name in pictures)


def test_a_notebook_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["render.py", "02_merging"])
    with pytest.raises(SystemExit, match="no notebook 02_merging; there are 01_quickstart, 02_"):
        runpy.run_path(str(ROOT / "notebooks" / "render.py"), run_name="__main__")


# The kernel's own machinery warns of its transport, which is no concern of ours.
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_a_clean_kernel(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, known)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=900,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    told = "".join(out.text for out in outputs if out.get("name") == "stderr")
    # tqdm's word on a missing progress widget is about the machine, not the notebook.
    told = "".join(line for line in told.splitlines(keepends=True) if "tqdm" not in line)
    assert told == "", "a notebook for people runs without warnings"
    pictures = sum("image/png" in out.get("data", {}) for out in outputs)
    assert (
        pictures == {"01_quickstart": 0, "02_what_merging_does": 8, "03_robustness": 2}[path.stem]
    )
