"""The ``inmerge`` command: a module for each command, imported without torch."""

from __future__ import annotations

try:
    import rich as _rich  # noqa: F401
    import typer as _typer  # noqa: F401
except ImportError as error:
    raise SystemExit(
        f'the inmerge command needs {error.name}: pip install "inmerge-wrap[cli]"'
    ) from error

# Each import registers its command, in the order of `inmerge --help`.
from inmerge_wrap.cli import train, predict, adapt, evaluate, plan, similarity, export  # noqa: F401, I001
from inmerge_wrap.cli.shell import app, main

__all__ = ["app", "main"]
