"""What the pages are written in and markdown does not know.

Docstrings hold Sphinx roles, and examples without a fence. Pages, which are read in the repository
too, mark with comments what only the site can show: the start of the README on the first page,
sections as tabs, the options of the commands.
"""

import re
from pathlib import Path
from textwrap import indent
from typing import Any

import griffe
import typer.main
from markdown import Markdown
from markdown.extensions import Extension
from markdown.preprocessors import Preprocessor

API = Path(__file__).parent / "api"
OPTIONS = "<!-- the options of each command -->"
FRONT = "<!-- the start of README.md -->"
NAMES = re.compile(r"<!-- names of (.*) -->")


class _Examples(Preprocessor):
    """Puts ``>>>`` lines into a code block; markdown would quote them three times."""

    def run(self, lines: list[str]) -> list[str]:
        result: list[str] = []
        fenced = example = False
        for line in lines:
            if line.lstrip().startswith("```"):
                fenced = not fenced
            starts = line.startswith(">>> ") and not fenced
            if example and not line.strip():
                result.append("```")
                example = False
            elif starts and not example:
                result.append("```pycon")
                example = True
            result.append(line)
        return [*result, "```"] if example else result


class _Extension(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        # Before fenced blocks are taken out of the text.
        md.preprocessors.register(_Examples(md), "examples", 40)


def on_config(config: Any) -> Any:
    """Adds the code block for examples."""
    config.markdown_extensions.append(_Extension())
    return config


def tabs(markdown: str) -> str:
    """Sections between ``<!-- tabs -->`` and ``<!-- end of tabs -->`` as tabs."""

    def side_by_side(found: re.Match[str]) -> str:
        _, *sections = re.split(r"^## ", found[1], flags=re.MULTILINE)
        parts = (section.partition("\n") for section in sections)
        return "\n".join(f'=== "{title}"\n{indent(text, "    ")}' for title, _, text in parts)

    pattern = r"^<!-- tabs -->\n(.*?)^<!-- end of tabs -->$"
    return re.sub(pattern, side_by_side, markdown, flags=re.DOTALL | re.MULTILINE)


def front() -> str:
    """The README up to its section on own images, with its links as those of a page."""
    text = Path(__file__).parents[1].joinpath("README.md").read_text(encoding="utf-8")
    part = text.partition("\n")[2].partition("\n## Train on your own images\n")[0]
    return part.strip().replace("](docs/", "](")


def options_of_commands() -> str:
    """A table of arguments and options for each command of ``inmerge``."""
    from inmerge_wrap.cli import app
    from inmerge_wrap.cli.help import meaning_of, names_of

    lines = []
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        lines += [f"### inmerge {name}", "", str(command.help), ""]
        if not command.params:  # its options are those of a program of its own
            continue
        lines += ["| option | meaning |", "|---|---|"]
        for parameter in command.params:
            said = meaning_of(parameter).replace("|", "\\|")
            lines.append(f"| `{names_of(parameter)}` | {said} |")
        lines.append("")
    return "\n".join(lines)


def names_of_modules(modules: list[str]) -> str:
    """A table of the names that the pages of some modules show, with the first line of each."""
    package = griffe.load("inmerge_wrap", search_paths=[Path(__file__).parents[1]])
    lines = ["| name | what it is |", "|---|---|"]
    for module in modules:
        page = (API / f"{module.replace('.', '-')}.md").read_text(encoding="utf-8")
        for name in re.findall(r"^ {8}- (\w+)$", page, re.MULTILINE):
            shown = name if name in package.exports else f"{module}.{name}"
            first = package[f"{module}.{name}"].docstring.value.partition("\n\n")[0]
            said = " ".join(first.split()).replace("|", "\\|")
            lines.append(f"| [`{shown}`][inmerge_wrap.{module}.{name}] | {said} |")
    return "\n".join(lines)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Writes what the comments stand for."""
    if FRONT in markdown:
        markdown = markdown.replace(FRONT, front())
    if OPTIONS in markdown:
        markdown = markdown.replace(OPTIONS, options_of_commands())
    markdown = NAMES.sub(lambda found: names_of_modules(found[1].split(", ")), markdown)
    return tabs(markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Drops the role of ``:func:`name``` and its kin; says where a line may break and where not."""
    html = re.sub(r":(?:func|class|meth|attr|data|mod):(?=<code)", "", html)
    html = re.sub(r"<td[^>]*>.*?</td>", breakable, html, flags=re.DOTALL)
    return re.sub(r"(?<=<code>)[^<]*(?=</code>)", whole_options, html)


def whole_options(code: re.Match[str]) -> str:
    """An option such as ``--out`` does not break at its hyphens."""
    return re.sub(r"(?<![\w-])--?[a-z][\w-]*", r'<span class="whole">\g<0></span>', code[0])


def breakable(cell: re.Match[str]) -> str:
    """Names in a table break after ``_ / . (`` and before a capitalised word, intervals nowhere."""
    text = re.sub(r"\([-+\d.]+ to [-+\d.]+\)", r'<span class="interval">\g<0></span>', cell[0])
    return re.sub(
        r"(?<=<code>)[^<\s]*(?=</code>)",
        lambda name: re.sub(r"[_/.]|\((?!\))|[A-Za-z](?=[A-Z][a-z])", r"\g<0><wbr>", name[0]),
        text,
    )
