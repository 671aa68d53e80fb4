"""Results files: the environment of a run, atomic writing, and formatting of figures."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import accelerate
import timm
import torch

from inmerge_wrap import __version__


def environment() -> dict[str, Any]:
    """Returns what a reader needs to judge a figure: command, versions and machine."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "versions": {
            "inmerge_wrap": __version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "accelerate": accelerate.__version__,
            "python": platform.python_version(),
        },
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def spread(values: Sequence[float]) -> str:
    """Formats the mean and, of several values, the standard deviation."""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def difference_text(paired: Mapping[str, float]) -> str:
    """Formats the result of ``paired_difference``: the mean and, of several pairs, its 95% CI."""
    text = f"{paired['mean']:+.3f}"
    return text + (f" ({paired['low']:+.3f} to {paired['high']:+.3f})" if "low" in paired else "")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a results file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=".draft-")
    with os.fdopen(handle, "w") as file:
        json.dump(content, file, indent=1)
    os.chmod(draft, 0o644)  # temporary files are for their owner alone
    os.replace(draft, path)
