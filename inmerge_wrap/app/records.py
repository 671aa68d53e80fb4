"""What a reader needs to judge a figure: command, versions and machine."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from importlib.metadata import version
from typing import Any

import torch

from inmerge_wrap import __version__


def environment() -> dict[str, Any]:
    """Returns the command, the versions and the machine."""
    packages = ("torch", "timm", "accelerate")
    return {
        "command": shlex.join(["python", *sys.argv]),
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
