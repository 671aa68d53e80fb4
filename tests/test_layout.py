"""Who may import whom: what CONTRIBUTING.md says, held against every import of the package."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import inmerge_wrap

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "inmerge_wrap"
FORBIDDEN = {"accelerate", "medmnist", "datasets", "recipes", "tests"}
# Modules of Python by which code reaches out of its process.
REACHING_OUT = {
    "asyncio", "ctypes", "multiprocessing", "os", "pathlib", "shutil", "signal", "socket",
    "subprocess", "tempfile", "threading", "urllib",
}  # fmt: skip


def modules_of(package: Path) -> dict[str, Path]:
    """File by name, "robustness.metrics"; a package by its own name, the whole as "__init__"."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name or "__init__"] = path
    return found


MODULES = modules_of(PACKAGE)


def statements(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """Everything that runs: not what only type checkers read."""
    for statement in body:
        if isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING":
            yield from statements(statement.orelse)
        else:
            yield statement
            for children in (getattr(statement, name, []) for name in ("body", "orelse")):
                yield from statements(children if isinstance(children, list) else [])
            for part in (*getattr(statement, "handlers", []), *getattr(statement, "cases", [])):
                yield from statements(part.body)
            yield from statements(getattr(statement, "finalbody", []))


def imports_of(
    name: str, modules: dict[str, Path], package: str = "inmerge_wrap"
) -> tuple[set[str], set[str]]:
    """Own modules and foreign ones that a module imports, at its top or inside of a function.

    ``from package import x`` is the module x where there is one; else the module that the name
    ``x`` comes from, for the package itself looks it up late.
    """
    path = modules[name]
    here = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    here = [] if name == "__init__" else here
    own, foreign = set(), set()

    def add(full: str, member: str | None = None) -> None:
        first, _, rest = full.partition(".")
        if first != package:
            foreign.add(full)
        elif member is not None and f"{rest}.{member}".strip(".") in modules:
            own.add(f"{rest}.{member}".strip("."))
        elif rest:
            own.add(rest)
        else:
            own.add(inmerge_wrap._HOME_OF.get(str(member), "__init__"))

    for statement in statements(ast.parse(path.read_text(encoding="utf-8")).body):
        if isinstance(statement, ast.Import):
            for alias in statement.names:
                add(alias.name)
        elif isinstance(statement, ast.ImportFrom):
            base = statement.module or ""
            if statement.level:
                outer = here[: len(here) - statement.level + 1]
                base = ".".join([package, *outer, *filter(None, [statement.module])])
            for alias in statement.names:
                add(base, alias.name)
    return own, foreign


OWN = {name: imports_of(name, MODULES)[0] for name in MODULES}
FOREIGN = {
    name: {module.split(".")[0] for module in imports_of(name, MODULES)[1]} for name in MODULES
}


def inside(name: str, group: set[str]) -> bool:
    """Whether a module or a package that it is in belongs to a group."""
    return bool({name, name.split(".")[0]} & group)


def reached_from(name: str) -> dict[str, str]:
    """Every module that importing one may lead to, and by which way."""
    ways = {name: name}
    queue = [name]
    while queue:
        current = queue.pop()
        for following in OWN[current] - ways.keys():
            ways[following] = f"{ways[current]} -> {following}"
            queue.append(following)
    return ways


def layers() -> dict[str, set[str]]:
    """The groups of modules that CONTRIBUTING.md names, by what it says of them."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text[text.index("- **Layers.**") : text.index("- **Maths first")]
    lines = [" ".join(part.split()) for part in section.split("\n  - ")[1:]]

    def named(pattern: str) -> set[str]:
        (found,) = [match for line in lines if (match := re.search(pattern, line))]
        return set(re.findall(r"`([\w.]+)`", found[1]))

    return {
        "pure": named(r"^(.*) are pure:"),
        "out of the wrapper's reach": named(r"never reaches (.*), not even"),
        "any module": named(r"^(.*) take any `nn.Module`"),
        "at once": named(r"^(.*) answer at once"),
    }


LAYERS = layers()


def test_contributing_names_modules_that_exist() -> None:
    """A module that is renamed must not fall out of its rule."""
    for group, names in LAYERS.items():
        assert names and names <= MODULES.keys(), group


@pytest.mark.parametrize("name", sorted(LAYERS["pure"]))
def test_a_pure_module_imports_torch_and_pure_modules_alone(name: str) -> None:
    assert OWN[name] <= LAYERS["pure"]
    assert FOREIGN[name] - set(sys.stdlib_module_names) <= {"torch"}
    assert FOREIGN[name] & REACHING_OUT == set()


def test_the_wrapper_reaches_nothing_above_it() -> None:
    ways = reached_from("wrapper")
    above = LAYERS["out of the wrapper's reach"]
    assert [way for name, way in ways.items() if inside(name, above)] == []


@pytest.mark.parametrize("name", [n for n in MODULES if inside(n, LAYERS["any module"])])
def test_what_takes_any_module_never_reaches_the_wrapper(name: str) -> None:
    assert reached_from(name).get("wrapper") is None


@pytest.mark.parametrize("name", sorted(MODULES))
def test_nothing_imports_training_libraries_recipes_or_tests(name: str) -> None:
    allowed = {"accelerate"} if inside(name, {"app"}) else set()
    allowed |= {"datasets"} if name == "images.nih" else set()
    assert FOREIGN[name] & FORBIDDEN <= allowed


@pytest.mark.parametrize("name", [n for n in MODULES if not inside(n, {"app", "cli"})])
def test_only_the_command_line_imports_the_application(name: str) -> None:
    assert [module for module in OWN[name] if inside(module, {"app"})] == []


@pytest.mark.parametrize("name", sorted(LAYERS["at once"]))
def test_importing_what_answers_at_once_imports_no_torch(name: str) -> None:
    imported = "inmerge_wrap" if name == "__init__" else f"inmerge_wrap.{name}"
    script = f"import sys, {imported}; print('torch' in sys.modules)"
    assert run(script) == "False"


def test_importing_everything_public_needs_only_the_hard_dependencies() -> None:
    script = (
        "import sys\n"
        "from inmerge_wrap import *\n"
        "assert InMergeWrapper.__module__ == 'inmerge_wrap.wrapper'\n"
        "loaded = {name.split('.')[0] for name in sys.modules}\n"
        "print(sorted(loaded & {'timm', 'torchvision', 'kornia', 'matplotlib', 'sklearn', 'rich', "
        "'typer', 'accelerate', 'medmnist', 'datasets', 'scipy'}))"
    )
    assert run(script) == "[]"


def test_the_public_names_are_listed_alike_for_people_and_for_type_checkers() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (checked,) = [node for node in tree.body if isinstance(node, ast.If)]
    for_checkers = {
        alias.name: str(node.module).removeprefix("inmerge_wrap.")
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert for_checkers == inmerge_wrap._HOME_OF
    assert sorted(for_checkers) == sorted(inmerge_wrap.__all__)
    assert set(inmerge_wrap.__all__) <= set(dir(inmerge_wrap))
    for name in inmerge_wrap.__all__:
        assert getattr(inmerge_wrap, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'merge'"):
        _ = inmerge_wrap.merge  # type: ignore[attr-defined]


def run(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return done.stdout.strip()


def long_functions(path: Path) -> list[str]:
    """Functions of more than 60 lines, not counting their docstrings."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            lines -= (first.end_lineno or first.lineno) - first.lineno + 1
        if lines > 60:
            found.append(f"{path.name}: {node.name} has {lines} lines")
    return found


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_file_and_no_function_outgrows_its_reader(name: str) -> None:
    path = MODULES[name]
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500
    # The constructor lists each setting once as a parameter and once as a value.
    allowed = ["wrapper.py: __init__"]
    found = [line for line in long_functions(path) if not line.startswith(tuple(allowed))]
    assert found == []


def test_only_merging_after_a_step_writes_a_parameter() -> None:
    """Who calls what writes kernels, and nobody else writes in place."""
    writers = {
        name
        for name, path in MODULES.items()
        if re.search(r"\b(merge_step|merge_pairs_|put_rows_|write_)\(", path.read_text())
    }
    assert writers == {"driver", "weights", "kernels", "persistent"}
    # In the forward pass a stand-in is filled, a new tensor that no parameter shares.
    weights = MODULES["weights"].read_text(encoding="utf-8")
    assert re.findall(r".*put_rows_.*", weights) == [
        "            layout_of(module).put_rows_(new, everyone, rows)"
    ]
    assert "new = weight.detach().clone()" in weights


def test_imports_are_found_however_they_are_written(tmp_path: Path) -> None:
    """The rules above are worth what this finds: it once took a module for the package."""
    (tmp_path / "inner").mkdir()
    for name in ("__init__", "native", "merging", "inner/__init__", "inner/deep"):
        (tmp_path / f"{name}.py").write_text("")
    source = {
        "one": "from inmerge_wrap import native",
        "two": "import inmerge_wrap.inner.deep\nfrom inmerge_wrap.inner import deep",
        "three": "def f():\n    if x:\n        from . import native as other",
        "four": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import numpy\n"
        "else:\n    import ctypes",
        "five": "from inmerge_wrap.merging import draw\ntry:\n    import rich\n"
        "except ImportError:\n    import os.path",
        "six": "from inmerge_wrap import InMergeWrapper, __version__",
        "inner/seven": "from ..merging import draw\nfrom .deep import x\nwith y:\n    import glob",
    }
    for name, text in source.items():
        (tmp_path / f"{name}.py").write_text(text)
    modules = modules_of(tmp_path)
    assert {"__init__", "inner", "inner.deep", "inner.seven"} <= modules.keys()
    found = {name.replace("/", "."): imports_of(name.replace("/", "."), modules) for name in source}
    assert found == {
        "one": ({"native"}, set()),
        "two": ({"inner.deep"}, set()),
        "three": ({"native"}, set()),
        "four": (set(), {"typing", "ctypes"}),
        "five": ({"merging"}, {"rich", "os.path"}),
        "six": ({"wrapper", "__init__"}, set()),
        "inner.seven": ({"merging", "inner.deep"}, {"glob"}),
    }
