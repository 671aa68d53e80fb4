"""What every recipe keeps: it stands alone, explains itself, and writes into runs/."""

from __future__ import annotations

import argparse
import ast
import runpy
import sys
from pathlib import Path

import pytest

import inmerge_wrap
from tests.recipes.running import ROOT, recipe

RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.py"))
WITH_OPTIONS = ["adapt_to_a_site", "quickstart", "medmnist_2d", "chestxray", "robustness"]
PUBLIC = {
    *("inmerge_wrap", "accelerate", "datasets", "matplotlib", "medmnist", "numpy", "rich"),
    *("safetensors", "sklearn", "timm", "torch", "torchvision", "tqdm"),
}


def parser_of(monkeypatch: pytest.MonkeyPatch, script: str) -> argparse.ArgumentParser:
    """The parser of a script, which is stopped where it would parse."""
    seen: list[argparse.ArgumentParser] = []

    def stop(parser: argparse.ArgumentParser, *_: object) -> None:
        seen.append(parser)
        raise SystemExit

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(SystemExit):
        runpy.run_path(script, run_name="__main__")
    (parser,) = seen
    return parser


def test_these_are_the_recipes() -> None:
    assert {*RECIPES} >= {*WITH_OPTIONS, "own_images"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_can_be_copied_without_anything_else(name: str) -> None:
    text = Path(recipe(name)).read_text()
    assert len(text.splitlines()) <= 300
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(str(node.module).split(".")[0])
    assert imported - sys.stdlib_module_names <= PUBLIC


def test_who_copies_the_quickstart_copies_public_names_alone() -> None:
    taken = [
        (node.module, alias.name)
        for node in ast.walk(ast.parse(Path(recipe("quickstart")).read_text()))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("inmerge_wrap")
        for alias in node.names
    ]
    public = {("inmerge_wrap", name) for name in [*inmerge_wrap.__all__, "__version__"]}
    assert taken and set(taken) <= public


@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_help_explains_every_option(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    parser = parser_of(monkeypatch, recipe(name))
    assert [action.dest for action in parser._actions if not action.help] == []
    shown = parser.format_help()  # which fails on a stray percent sign
    assert all(word in shown for word in ("What it does:", "Cost:", "Expected:"))
    assert parser.get_default("out").parts[0] == "runs", "what is committed is never overwritten"
