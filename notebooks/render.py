"""Runs the notebooks and writes them as pages of the site, outputs and pictures included.

    python notebooks/render.py                        # all
    python notebooks/render.py 02_what_merging_does

The notebooks themselves are stored without outputs. Hardware and time: two minutes on a CPU.
"""

from __future__ import annotations

import re
import runpy
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "notebooks"
VECTORS = """\
import matplotlib
matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "inmerge"})
%config InlineBackend.figure_formats = ["svg"]
%config InlineBackend.print_figure_kwargs = {"bbox_inches": "tight", "metadata": {"Date": None}}
"""
DIAGRAMS = runpy.run_path(str(ROOT / "docs" / ".diagram.py"))


def style() -> str:
    """Gives a picture of matplotlib the font and the dark colours of the drawn pictures."""
    (ink, dark), *others = DIAGRAMS["PALETTE"].values()
    pairs = [(ink, dark), ("#000000", dark), *others]
    swapped = "".join(
        f'[style*="{part}: {light}"]{{{part}:{dark}!important}}'
        for light, dark in pairs
        for part in ("fill", "stroke")
    )
    return (
        f'<style>{DIAGRAMS["FONT"].replace("}", "!important}")}[style*="fill: #ffffff"]'
        f"{{fill:none!important}}text{{fill:{ink}}}"
        f"@media (prefers-color-scheme:dark){{text{{fill:{dark}}}{swapped}}}</style>"
    )


def page_of(notebook: Any, name: str) -> tuple[str, dict[str, str]]:
    """An executed notebook as markdown, and its pictures by file name."""
    source = f"<!-- made by notebooks/render.py from notebooks/{name}.ipynb -->"
    parts: list[str] = [source]
    pictures: dict[str, str] = {}
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for stream, outputs in groupby(cell.outputs, lambda output: output.get("name")):
            if stream == "stdout":
                printed = "".join(output.text for output in outputs).rstrip()
                text = re.sub(r"/tmp/\w+", "/tmp/exported", printed)
                parts.append(f"```text\n{text}\n```")
                continue
            for output in outputs:
                if "image/svg+xml" in output.get("data", {}):
                    file = f"{name}-{len(pictures) + 1}.svg"
                    drawn = output.data["image/svg+xml"]
                    pictures[file] = drawn.replace("<defs>", f"{style()}<defs>", 1)
                    parts.append(f"![Output of the cell above]({file})")
    return "\n\n".join(parts) + "\n", pictures


def main() -> None:
    PAGES.mkdir(exist_ok=True)
    known = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
    if unknown := set(sys.argv[1:]) - set(known):
        raise SystemExit(f"no notebook {', '.join(unknown)}; there are {', '.join(known)}")
    for name in sys.argv[1:] or known:
        notebook = nbformat.read(known[name], as_version=4)
        notebook.cells.insert(0, nbformat.v4.new_code_cell(VECTORS))
        NotebookClient(notebook, timeout=3600, kernel_name="python3").execute()
        del notebook.cells[0]
        text, pictures = page_of(notebook, name)
        (PAGES / f"{name}.md").write_text(text, encoding="utf-8")
        for file, content in pictures.items():
            (PAGES / file).write_text(content, encoding="utf-8")
        print(f"{name}: {len(pictures)} pictures")


if __name__ == "__main__":
    main()
