"""Settings of the whole test run."""

from __future__ import annotations

import os

import torch

from inmerge_wrap.engines import native

# The networks of the tests are tiny, and several tests run at once: more threads only wait for
# each other. Processes that the tests start inherit the setting.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


def pytest_sessionstart() -> None:
    """Compiles native code before anything is timed or compared between processes.

    A process that finds no library waits two seconds for one, which may be too short while other
    tests run; it would then compute in plain torch, and round differently from its twin.
    """
    native.problem(insist=True)
