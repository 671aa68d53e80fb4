"""Runs the notebooks and writes them as pages of the site, outputs and pictures included.

    python notebooks/render.py                        # all
    python notebooks/render.py 02_what_merging_does

The notebooks themselves are stored without outputs. Hardware and time: two minutes on a CPU.
"""

from __future__ import annotations

import base64
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "notebooks"


def page_of(notebook: Any, name: str) -> tuple[str, dict[str, bytes]]:
    """An executed notebook as markdown, and its pictures by file name."""
    source = f"<!-- made by notebooks/render.py from notebooks/{name}.ipynb -->"
    parts: list[str] = [source]
    pictures: dict[str, bytes] = {}
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for output in cell.outputs:
            if output.get("name") == "stdout":
                text = re.sub(r"/tmp/\w+", "/tmp/exported", output.text.rstrip())
                parts.append(f"```text\n{text}\n```")
            elif "image/png" in output.get("data", {}):
                file = f"{name}-{len(pictures) + 1}.png"
                pictures[file] = base64.b64decode(output.data["image/png"])
                parts.append(f"![Output of the cell above]({file})")
    return "\n\n".join(parts) + "\n", pictures


def main() -> None:
    PAGES.mkdir(exist_ok=True)
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        if sys.argv[1:] and path.stem not in sys.argv[1:]:
            continue
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
        text, pictures = page_of(notebook, path.stem)
        (PAGES / f"{path.stem}.md").write_text(text, encoding="utf-8")
        for file, content in pictures.items():
            (PAGES / file).write_bytes(content)
        print(f"{path.stem}: {len(pictures)} pictures")


if __name__ == "__main__":
    main()
