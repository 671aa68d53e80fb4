"""Who may import whom, and that importing the library is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "inmerge_wrap"
PURE = {"merging", "schedule", "thresholds", "kernels", "replicas", "report", "recalibration"}
FORBIDDEN = {"accelerate", "medmnist", "datasets", "recipes", "tests"}


def imports_of(path: Path, *, top_level: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_imports_point_one_way(path: Path) -> None:
    imported = imports_of(path)
    roots = {name.split(".")[0] for name in imported}
    assert not roots & FORBIDDEN
    own = {name.split(".")[1] for name in imported if name.startswith("inmerge_wrap.")}
    standard = set(sys.stdlib_module_names) | {"__future__", "inmerge_wrap"}
    if path.stem in PURE:
        assert roots - standard <= {"torch"}
        assert own <= PURE
    if path.stem == "discovery":
        assert own <= {"kernels", "tracing"}
    if path.stem in {"export", "similarity", "robustness", "corruptions"}:
        assert "wrapper" not in own


def test_importing_needs_only_the_hard_dependencies() -> None:
    script = (
        "import sys, inmerge_wrap\n"
        "loaded = {name.split('.')[0] for name in sys.modules}\n"
        "print(sorted(loaded & {'timm', 'torchvision', 'kornia', 'matplotlib', 'sklearn', 'rich', "
        "'typer', 'accelerate', 'medmnist', 'datasets', 'scipy'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
