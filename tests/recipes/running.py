"""Starts recipes as a user does: from the command line, in a folder of its own, offline."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.scripts.common import forget_accelerator

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


def run_here(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: object) -> None:
    """Runs a script in this process and folder: a process of its own takes seconds to import.

    One test of each recipe starts it from the command line; the others need no more than this.
    """
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    forget_accelerator()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a process of its own, whose sums are compared with these
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        torch.set_num_threads(threads)
        forget_accelerator()


def refusal(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> str | int | None:
    """Runs a recipe that must stop, in this process; returns its exit code or message."""
    with pytest.raises(SystemExit) as stop:
        run_here(monkeypatch, recipe(name), *arguments)
    return stop.value.code


def offline(*_: object, **__: object) -> None:
    """In place of a download."""
    raise RuntimeError("no network")
