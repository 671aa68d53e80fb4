"""Starts recipes as a user does: from the command line, in a folder of its own, offline."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = [sys.executable]
ACCELERATE = [*PYTHON, "-m", "accelerate.commands.launch", "--num_processes", "1"]
TWO_PROCESSES = [
    *(*PYTHON, "-m", "torch.distributed.run", "--nproc_per_node", "2"),
    *("--master_port", "0", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"),
]


def recipe(name: str) -> str:
    return str(ROOT / "recipes" / f"{name}.py")


def run(*command: object, folder: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs a command in a folder, with one thread."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
        "HOME": str(folder),
    }
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done


def patched(name: str, patch: str) -> list[str]:
    """A command that runs a recipe after a statement, in its process."""
    path = recipe(name)
    code = f"import os, runpy, sys, torch; sys.argv[0] = {path!r}; {patch}"
    return [*PYTHON, "-c", f"{code}; runpy.run_path({path!r}, run_name='__main__')"]


def refusal(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> str | int | None:
    """Runs a recipe that must stop, in this process; returns its exit code or message."""
    monkeypatch.setattr(sys, "argv", [recipe(name), *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(recipe(name), run_name="__main__")
    return stop.value.code
