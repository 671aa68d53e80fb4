"""The application itself: how commands are registered, report errors, and show progress."""

from __future__ import annotations

import functools
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console

# Only modules that do not import torch: help, completion and usage errors must not wait for it.
from inmerge_wrap import __version__
from inmerge_wrap.cli.help import Command, Group
from inmerge_wrap.cli.tables import AS_IT_IS
from inmerge_wrap.errors import for_command_line

app = typer.Typer(
    name="inmerge",
    cls=Group,
    help="In-model merging (InMerge) for CNNs, and classifiers for your own images.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
)

# Arguments of Python whose option has another name.
_OPTIONS = {"example_input": "--input-size"}


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def command(
    *examples: str, **settings: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a function as the command of its name, with examples for its help.

    User errors are reported on stderr, with exit code 1; any other exception goes through.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> None:
            try:
                function(*args, **kwargs)
            except typer.Exit:  # a RuntimeError, too
                raise
            except (ValueError, OSError, ImportError, RuntimeError) as error:
                text = f"error: {for_command_line(error, _OPTIONS)}"
                Console(stderr=True, **AS_IT_IS).print(text, style="red", soft_wrap=True)
                raise typer.Exit(1) from error

        app.command(cls=Command, epilog="\n".join(examples), **settings)(guarded)
        return guarded

    return register


@contextmanager
def progress(totals: Mapping[str, int]) -> Iterator[Callable[[str, int], None]]:
    """Shows progress bars on stderr if it is a terminal: names, and how much there is to do.

    Yields a function that takes the name of a bar and how much more of it was done.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn())
    console, hidden = Console(stderr=True), not sys.stderr.isatty()
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        tasks = {name: bar.add_task(name, total=total) for name, total in totals.items()}
        yield lambda name, count: bar.update(tasks[name], advance=count)


def warn(text: str) -> None:
    """Prints a warning on stderr."""
    Console(stderr=True, **AS_IT_IS).print(f"warning: {text}", soft_wrap=True, highlight=False)


def say(text: str) -> None:
    """Prints a line for people."""
    Console(**AS_IT_IS).print(text, soft_wrap=True, highlight=False)


def print_json(content: Any) -> None:
    """Prints the result of a command for programs."""
    print(json.dumps(content, indent=1, allow_nan=False))  # other programs cannot read NaN


def main() -> None:
    """Runs the command; a warning is one line, without the source line that raised it."""

    def show(message: Any, *_: Any) -> None:
        warn(for_command_line(message, _OPTIONS))

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        app(prog_name="inmerge")
