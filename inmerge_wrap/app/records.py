"""What a run leaves: what a reader needs to judge a figure, and files for a second start."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from inmerge_wrap import __version__


def environment() -> dict[str, Any]:
    """Returns the command, the versions and the machine."""
    packages = ("torch", "timm", "accelerate")
    program, *arguments = sys.argv
    called = ["inmerge"] if Path(program).stem == "inmerge" else ["python", program]
    return {
        "command": shlex.join([*called, *arguments]),
        "versions": {
            "inmerge_wrap": __version__,
            **{package: version(package) for package in packages},
            "python": platform.python_version(),
        },
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


@contextmanager
def of_an_earlier_start(path: Path, *, remove: Path) -> Iterator[None]:
    """Replaces whatever goes wrong with a file of an earlier start by one line with a remedy."""
    try:
        yield
    except Exception as error:  # a damaged file can make its reader raise anything
        lines = str(error).splitlines() or [""]
        raise SystemExit(
            f"{path} of an earlier start cannot be used ({type(error).__name__}: "
            f"{lines[0][:200]}). Remove {remove}, and the same command makes it again"
        ) from error
