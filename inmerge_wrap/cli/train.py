"""``inmerge train``: a classifier for one's own images."""

from __future__ import annotations

import typer

from inmerge_wrap.cli.shell import command


@command(
    "inmerge train --data-dir photos/ --out runs/mine",
    "inmerge train --help",
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    },
)
def train(options: typer.Context) -> None:
    """Train a classifier on a folder of images or a CSV file, and write a report.

    `inmerge train --help` lists its options. It writes the folder `model/` that `inmerge predict`,
    `inmerge adapt` and `inmerge evaluate` read.
    """
    try:
        from inmerge_wrap.app import train as application
    except ImportError as error:
        if (error.name or "").startswith("inmerge_wrap"):
            raise  # a broken installation, which no extra mends
        raise ImportError(
            f'training needs {error.name}: pip install "inmerge-wrap[app]"'
        ) from error
    application.main(options.args, program="inmerge train")
