"""Results files: the environment of a run, atomic writing, and one line a run in a .jsonl.gz."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import accelerate
import timm
import torch

from inmerge_wrap import __version__
from inmerge_wrap.files import replacing


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


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    with replacing(path) as draft:
        draft.write_bytes(content)


def name_of(run: Mapping[str, Any]) -> str:
    """A readable name of a run's settings, unique to them; ``run`` is ``Run.to_dict()``."""
    digest = hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()
    readable = f"{run['dataset']}-{run['arm']}-{run['seed']}"
    return "".join(c if c.isalnum() else "-" for c in readable) + f"-{digest[:10]}"


# -- one line a run --------------------------------------------------------------------------------


def read_runs(path: Path) -> list[dict[str, Any]]:
    """Returns the runs of a .jsonl.gz file; none where there is no file."""
    if not path.exists():
        return []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_runs(path: Path, runs: Iterable[Mapping[str, Any]]) -> None:
    """Writes one sorted line a run; the same runs give the same bytes."""
    lines = sorted(json.dumps(run, sort_keys=True, separators=(",", ":")) for run in runs)
    text = "".join(f"{line}\n" for line in lines)
    write_atomically(path, gzip.compress(text.encode(), mtime=0))


def raw_runs(folder: Path) -> list[dict[str, Any]]:
    """Returns the runs of a folder of JSON files."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def add_runs(path: Path, folder: Path) -> int:
    """Adds the runs of a folder of JSON files to a .jsonl.gz; returns how many were new.

    Runs that the file holds stay as they are: it is only appended to.
    """
    kept = {name_of(run["run"]): run for run in read_runs(path)}
    found = {name_of(run["run"]): run for run in raw_runs(folder)}
    new = {name: run for name, run in found.items() if name not in kept}
    if new:
        write_runs(path, [*kept.values(), *new.values()])
    return len(new)
