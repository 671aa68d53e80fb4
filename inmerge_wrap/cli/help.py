"""Help that no terminal is too narrow for: names on a line of their own, what they mean below."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from typing import Any

import typer.core
from rich.console import Console
from rich.markdown import Markdown
from rich.padding import Padding

_AT_COMPLETION = ("install_completion", "show_completion")


def _print_help(command: Any, ctx: Any, formatter: Any) -> None:
    console = Console(highlight=False)
    pieces = [ctx.command_path, "[OPTIONS]"]
    pieces += [names_of(entry) for entry in command.params if entry.param_type_name == "argument"]
    pieces += ["COMMAND ..."] if isinstance(command, typer.core.TyperGroup) else []
    console.print(f"Usage: {' '.join(pieces)}\n", markup=False)
    console.print(Markdown(command.help or ""))
    for title, entries in _sections(command, ctx):
        console.print(f"\n{title}", style="bold")
        for names, meaning in entries:
            console.print(f"  {names}", style="cyan", markup=False, soft_wrap=True)
            console.print(Padding(Markdown(meaning), (0, 2, 0, 6)))
    if command.epilog:
        console.print("\nExamples", style="bold")
        for line in command.epilog.splitlines():
            # As one line, however long: a line that the terminal breaks can still be pasted.
            console.print(f"  {line}", markup=False, soft_wrap=True)


def _sections(command: Any, ctx: Any) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    parameters = [entry for entry in command.get_params(ctx) if not entry.hidden]
    arguments = [entry for entry in parameters if entry.param_type_name == "argument"]
    options = [entry for entry in parameters if entry.param_type_name == "option"]
    if arguments:
        yield "Arguments", [(names_of(entry), meaning_of(entry)) for entry in arguments]
    if isinstance(command, typer.core.TyperGroup):
        texts = {name: command.commands[name].help or "" for name in command.list_commands(ctx)}
        yield "Commands", [(name, text.partition("\n")[0]) for name, text in texts.items()]
    yield "Options", [(names_of(entry), meaning_of(entry)) for entry in options]


def names_of(parameter: Any) -> str:
    """Returns how an argument or an option is written, with a word for its value."""
    value = str(parameter.metavar or parameter.name.upper())
    if parameter.param_type_name == "argument":
        return value
    names = ", ".join([*sorted(parameter.opts, key=len), *parameter.secondary_opts])
    return names if parameter.is_flag or parameter.name in _AT_COMPLETION else f"{names} {value}"


def meaning_of(parameter: Any) -> str:
    """Returns the help of an argument or an option, with its default value."""
    said = parameter.help or ""
    default = parameter.default
    if parameter.param_type_name == "option" and parameter.required:
        said += " Required."
    elif _worth_showing(default):
        shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else default
        said += f" Default: `{shown}`."
    return " ".join(said.split())


def _worth_showing(default: Any) -> bool:
    if default is None or isinstance(default, bool) or callable(default):
        return False
    return not (isinstance(default, Iterable) and not isinstance(default, str) and not [*default])


class Command(typer.core.TyperCommand):
    """A command with such a help; options that give none take it from the docstring's Args."""

    format_help = _print_help

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        text = inspect.cleandoc(self.callback.__doc__ or "")  # none with python -OO
        self.help, _, described = text.partition("\n\nArgs:\n")
        said = dict(re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", described, re.MULTILINE))
        parameters: list[Any] = self.params
        for parameter in parameters:
            parameter.help = parameter.help or " ".join(said.get(parameter.name, "").split())


class Group(typer.core.TyperGroup):
    """The command that holds all others, with such a help and the first line of each command."""

    format_help = _print_help
