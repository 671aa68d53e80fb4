"""Docs: code runs, commands parse, links lead somewhere, every public name is documented."""

from __future__ import annotations

import ast
import html
import importlib
import inspect
import os
import pkgutil
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
import yaml

import inmerge_wrap
from inmerge_wrap.app.options import parser
from inmerge_wrap.cli import app

ROOT = Path(__file__).parents[1]
REPOSITORY = "https://example.org/owner/name"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN_ELSEWHERE = {"training-loops.md": "test_trainers.py", "what-is-merged.md": "test_zoo.py"}
NOT_EXECUTED = re.compile(r"<!-- not executed: \S.* -->\s*$")
PRINTED = re.compile(r"<!-- printed -->\n```text\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(text: str, language: str) -> list[tuple[int, str]]:
    """(line of the first code line, code) of every block that is to be run."""
    found = []
    for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        before = text[: match.start()]
        if not NOT_EXECUTED.search(before):
            found.append((before.count("\n") + 2, match[1]))
    return found


def named(paths: list[Path]) -> Any:
    return pytest.mark.parametrize("page", paths, ids=[path.name for path in paths])


# -- code ----------------------------------------------------------------------------------------


# The packages that a page imports may be behind the newest torch.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@named([page for page in PAGES if page.name not in RUN_ELSEWHERE])
def test_the_code_of_a_page_runs(
    page: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, Any] = {"__name__": "page"}
    try:
        for line, code in blocks(page.read_text(encoding="utf-8"), "python"):
            # Line numbers of errors are then those of the page.
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)
    finally:
        if "accelerate" in sys.modules:
            from accelerate.state import AcceleratorState

            AcceleratorState._reset_state(reset_partial_state=True)
    printed = iter(capsys.readouterr().out.splitlines())
    for shown in PRINTED.findall(page.read_text(encoding="utf-8")):
        for line in shown.splitlines():
            assert line == "..." or line in printed, f"{page.name} shows {line!r}"


@named(sorted((ROOT / "docs").rglob("*.md")))
def test_code_fits_its_column(page: Path) -> None:
    fenced = re.findall(r"^ *```\w*\n(.*?)^ *```$", page.read_text("utf-8"), re.DOTALL | re.M)
    assert [line for code in fenced for line in code.splitlines() if len(line) > 100] == []


def test_pages_that_run_elsewhere_do() -> None:
    for name, test in RUN_ELSEWHERE.items():
        assert name in (ROOT / "tests" / test).read_text(encoding="utf-8")


def test_unexecuted_code_gives_its_reason_and_is_python_all_the_same() -> None:
    text = "<!-- not executed: it needs a GPU -->\n```python\nx = 1\n```\n\n```python\ny = 2\n```\n"
    assert blocks(text, "python") == [(7, "y = 2\n")]
    assert len(blocks(text.replace(": it needs a GPU", ""), "python")) == 2
    for page in PAGES:
        for match in re.finditer(r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.M):
            if ">>>" not in match[1]:
                compile(match[1], str(page), "exec")


def commands() -> list[str]:
    """Every inmerge command that a page or a help text shows."""
    texts = [code for page in PAGES for _, code in blocks(page.read_text(), "bash")]
    texts += [
        example
        for command in app.registered_commands
        for example in re.findall(r"`(inmerge [^`]*)`", str(command.epilog))
    ]
    lines = "\n".join(texts).replace("\\\n", " ").splitlines()
    return sorted({line for line in lines if line.startswith("inmerge ")})


def test_commands_are_shown() -> None:
    assert len(commands()) > 10


@pytest.mark.parametrize("line", commands())
def test_a_shown_command_parses(line: str) -> None:
    group = typer.main.get_command(app)
    name, *arguments = shlex.split(line)[1:]
    context = group.commands[name].make_context(name, [*arguments])  # type: ignore[attr-defined]
    if name == "train":  # which reads its options itself
        assert parser.parse_args(arguments).data_dir
    else:
        assert context.params


# -- names ---------------------------------------------------------------------------------------


def documented() -> dict[str, list[str]]:
    pages = (ROOT / "docs" / "api").glob("*.md")
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    return {
        module: re.findall(r"^ {8}- (\w+)$", members, re.MULTILINE)
        for module, members in re.findall(
            r"^::: (inmerge_wrap[.\w]+)\n {4}options:\n {6}members:\n((?: {8}- \w+\n)*)",
            text,
            re.MULTILINE,
        )
    }


# Modules that are no part of the public face: what they hold may change between versions.
INSIDE = {
    "_constants", "architectures", "counts", "driver", "errors", "files", "forward", "images",
    "images.collection", "images.dicom", "images.files", "images.finding",
    "images.folders", "images.looks", "images.nih", "images.preparation", "images.sets",
    "images.tables", "inputs", "kernels", "kinds", "markdown", "neighbours", "optimizers",
    "outputs", "pairs", "persistent", "proxy", "replicas", "robustness.attacks",
    "robustness.effects", "robustness.evaluation", "robustness.metrics", "robustness.results",
    "robustness.scoring",
    "steps", "tally", "tracing", "trial", "weights",
}  # fmt: skip
# Modules that share names with each other, or hold names that only the package uses.
PARTLY = {"merging", "settings", "watch", "wrapper"}
PROGRAMS = {"app", "cli"}  # used as commands


def test_the_api_page_shows_the_public_face_and_no_more() -> None:
    shown = {name.partition(".")[2]: members for name, members in documented().items()}
    modules = {
        found.name.partition(".")[2]: importlib.import_module(found.name)
        for found in pkgutil.walk_packages(inmerge_wrap.__path__, "inmerge_wrap.")
    }
    hidden = {name for name in modules.keys() - shown.keys() if name.split(".")[0] not in PROGRAMS}
    assert hidden == INSIDE
    for name, members in shown.items():
        public = set(modules[name].__all__)
        assert len(members) == len(set(members)) and public.issuperset(members)
        assert name in PARTLY or public == set(members)
    index = (ROOT / "docs" / "api" / "index.md").read_text(encoding="utf-8")
    listed = ", ".join(re.findall(r"^<!-- names of (.*) -->$", index, re.MULTILINE)).split(", ")
    assert sorted(listed) == sorted(shown)
    everywhere = [member for members in shown.values() for member in members]
    for name in inmerge_wrap.__all__:
        assert everywhere.count(name) == 1


def test_every_public_name_says_what_it_is() -> None:
    for module_name, names in documented().items():
        module = importlib.import_module(module_name)
        for name in names:
            value = getattr(module, name)
            if callable(value):
                assert (value.__doc__ or "").strip(), f"{module_name}.{name} has no docstring"


def with_methods(name: str, value: Any) -> list[tuple[str, Any]]:
    """A public name and, of a class, its public methods."""
    found = [(name, value)]
    for own, method in vars(value).items() if isinstance(value, type) else ():
        method = getattr(method, "__func__", method)  # of a class method
        if inspect.isfunction(method) and not own.startswith("_"):
            found.append((f"{name}.{own}", method))
    return found


def undescribed(value: Any) -> list[str]:
    """Its parameters that no line of its docstring describes, if it has two or more."""
    parameters = [
        name
        for name, parameter in inspect.signature(value).parameters.items()
        if name not in ("self", "cls")
        and not name.startswith("_")
        and parameter.kind.name[:4] != "VAR_"
    ]
    text = value.__doc__ or ""
    if isinstance(value, type):
        text += value.__init__.__doc__ or ""
    if len(parameters) < 2 or text.startswith("See "):
        return []
    return [name for name in parameters if not re.search(rf"^ +\*?{name}: ", text, re.MULTILINE)]


def test_every_parameter_is_described() -> None:
    missing = {
        name: names
        for module, members in documented().items()
        for member in members
        if callable(value := getattr(importlib.import_module(module), member))
        and not (isinstance(value, type) and issubclass(value, Warning))
        for name, one in with_methods(member, value)
        if (names := undescribed(one))
    }
    # Its fields are the arguments of the wrapper, which describes them.
    settings = missing.pop("MergeSettings")
    assert set(settings) <= set(inspect.signature(inmerge_wrap.InMergeWrapper).parameters)
    assert missing == {}


# -- messages ------------------------------------------------------------------------------------

# Whose warnings and errors people meet while they wrap, train, resume and export.
SPEAKING = [
    "discovery", "driver", "errors", "export", "forward", "kernels", "neighbours", "optimizers",
    "pairs", "persistent", "plan", "proxy", "recalibration", "replicas", "schedule", "settings",
    "steps", "tally", "thresholds", "trial", "unwrapping", "watch", "weights", "wrapper",
]  # fmt: skip
OF_TORCH = 'Unexpected key(s) in state_dict: "_extra_state"'  # test_export.py raises it


def messages(source: str, *, returned: bool = False) -> list[str]:
    """What a module raises, warns of or returns, with "..." for what is filled in later."""

    def text(node: ast.AST) -> str:
        if isinstance(node, ast.Constant):
            return str(node.value)
        if isinstance(node, ast.FormattedValue):
            return "..."
        return "".join(text(child) for child in ast.iter_child_nodes(node))

    found = []
    for node in ast.walk(ast.parse(source)):
        if returned and isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
            found += [text(part) for part in node.value.elts]
        if isinstance(node, ast.FunctionDef) and node.name in ("replaced", "bypassed"):
            ends = [part.value for part in node.body if isinstance(part, ast.Return)]
            found += [text(value) for value in ends if isinstance(value, ast.JoinedStr)]
        if isinstance(node, ast.FunctionDef) and node.name == "_contradictions":
            dicts = [part for part in ast.walk(node) if isinstance(part, ast.Dict)]
            found += [text(key) for part in dicts for key in part.keys if key is not None]
        call = node.exc if isinstance(node, ast.Raise) else node
        if not isinstance(call, ast.Call):
            continue
        said = call.args
        if isinstance(node, ast.Call):
            name = ast.unparse(call.func).rpartition(".")[2]
            said = {"warn": call.args[:1], "warn_once": call.args[1:2]}.get(name, [])
        found += [text(part) for part in said if isinstance(part, ast.JoinedStr | ast.Constant)]
    found = [re.sub(r"<([a-z_.]+(?:=[\w.]+)?)>", r"\1", message) for message in found]
    return [re.sub(r"(\.\.\.)+", "...", message) for message in found]


def test_messages_are_found_however_they_are_written() -> None:
    source = """
def f():
    raise ValueError(f"one is {x!r}" " and two")
    warnings.warn("three", UserWarning, stacklevel=2)
    self.watch.warn_once("key", f"four {'five' if x else y}")
    raise KeyError(name) from error
    print("six")
"""
    assert messages(source) == ["one is ... and two", "three", "four ..."]


def test_every_message_has_its_entry_and_every_entry_its_message() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    firsts = re.findall(r"^\| (`.*?`) \|", page, re.MULTILINE)
    entries = [phrase for first in firsts for phrase in first.strip("`").split("`, `")]
    assert len(entries) == len(set(entries)) > 50
    said = [
        message
        for module in SPEAKING
        for message in messages((ROOT / "inmerge_wrap" / f"{module}.py").read_text("utf-8"))
    ]
    assert len(said) > 60
    assert [m for m in said if not any(entry in m for entry in entries)] == []
    # Those of discovery are written where the forward pass is tried.
    said += messages((ROOT / "inmerge_wrap" / "tracing.py").read_text("utf-8"), returned=True)
    assert [e for e in entries if not any(e in m for m in said)] == [OF_TORCH]


# -- links ---------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings]
    return {re.sub(r"[\s-]+", "-", heading) for heading in plain}


@named(PAGES)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), f"{page.name} links to {target}"
        if anchor and linked.suffix == ".md":
            assert anchor in anchors(linked), f"{page.name} links to {target}"


def test_the_navigation_holds_every_page_under_its_heading() -> None:
    config = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader=yaml.BaseLoader)

    def leaves(entries: list[dict[str, Any]]) -> list[tuple[str, str]]:
        found = []
        for label, entry in ((label, entry) for part in entries for label, entry in part.items()):
            found += [(label, entry)] if isinstance(entry, str) else leaves(entry)
        return found

    every = [path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")]
    shown = leaves(config["nav"])
    assert sorted(page for _, page in shown) == sorted(every)
    for label, page in shown:
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        heading = re.search(r"^# (.*)$", text, re.MULTILINE)
        assert heading and heading[1] == (label if page != "index.md" else "inmerge-wrap")


@named([ROOT / "docs" / f"{name}.md" for name in ("evidence", "settings", "training-loops")])
def test_tables_have_few_columns(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    rules = re.findall(r"^\|(?:-+\|)+$", text, re.MULTILINE)
    assert rules and max(rule.count("|") - 1 for rule in rules) <= 5, "a telephone shows no more"


def test_where_the_site_is_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    load_config = pytest.importorskip("mkdocs.config").load_config
    for site, repository in (("", ""), ("https://example.org/docs/", "https://example.org/code")):
        monkeypatch.setenv("SITE_URL", site)
        monkeypatch.setenv("REPO_URL", repository)
        config = load_config(str(ROOT / "mkdocs.yml"))
        assert (config.site_url or "", config.repo_url or "") == (site, repository)


def test_the_diagrams_are_those_that_their_script_draws() -> None:
    pictures = runpy.run_path(str(ROOT / "docs" / ".diagram.py"))["PICTURES"]
    assert {path.name for path in (ROOT / "docs" / "images").glob("*.svg")} == pictures.keys()
    for name, draw in pictures.items():
        assert draw() == (ROOT / "docs" / "images" / name).read_text(encoding="utf-8")


def test_every_colour_is_one_of_the_palette() -> None:
    palette = runpy.run_path(str(ROOT / "docs" / ".diagram.py"))["PALETTE"]
    known = {colour for both in palette.values() for colour in both}
    drawing = [ROOT / "inmerge_wrap" / "plots.py", *(ROOT / "notebooks").glob("*.ipynb")]
    for path in drawing:
        used = re.findall(r"(#[0-9A-Fa-f]{6})\b", path.read_text(encoding="utf-8"))
        coloured = {c.lower() for c in used if len({c[1:3], c[3:5], c[5:7]}) > 1}  # no greys
        assert coloured - known <= {"#16181d"}, path  # the ground of a dark picture


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    result = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "REPO_URL": REPOSITORY},
    )
    assert result.returncode == 0, result.stderr
    pages = {page.parent.name: page for page in (tmp_path / "api").rglob("index.html")}
    api = "".join(page.read_text(encoding="utf-8") for page in pages.values())
    index = pages["api"].read_text(encoding="utf-8")
    for module, names in documented().items():
        page = module.partition(".")[2].replace(".", "-")
        for name in names:
            own = pages[page].read_text(encoding="utf-8")
            assert f'id="{module}.{name}"' in own
            assert f'href="{page}/#{module}.{name}"' in index
            assert own.count(f'href="{REPOSITORY}/blob/main/inmerge_wrap/') >= len(names)
    assert "<blockquote>" not in api, "an example in a docstring is shown as a quotation"
    assert not re.search(r":(func|class|attr|meth):", api), "Sphinx roles are left over"
    options = (tmp_path / "cli" / "index.html").read_text(encoding="utf-8")
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        assert f'id="inmerge-{name}"' in options
        for parameter in command.params:
            shown = parameter.opts[0] if parameter.param_type_name == "option" else parameter.help
            assert html.escape(str(shown).split("`")[0], quote=False) in options
    loops = (tmp_path / "training-loops" / "index.html").read_text(encoding="utf-8")
    assert [
        name for name in ("accelerate", "lightning", "timm") if f'id="{name}"' not in loops
    ] == []
    assert 'class="tabbed-set' in loops and 'class="admonition warning"' in loops
    start = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert 'id="does-it-help-me"' in start and 'href="adapt/"' in start, "not the README's start"
    notebook = tmp_path / "notebooks" / "02_what_merging_does"
    assert (notebook / "index.html").read_text().count("<img") == 8
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(r'(?:src|<link[^>]*href)="(https?://[^"]*)"', page.read_text())
        assert not [url for url in loaded if "fonts." in url], f"{page} loads from elsewhere"
