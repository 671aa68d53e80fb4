"""Settings of the whole test run."""

from __future__ import annotations

import os

import pytest
import torch

# The networks of the tests are tiny, and several tests run at once: more threads only wait for
# each other. Processes that the tests start inherit the setting.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

LONGEST = ("tests/test_notebooks.py", "tests/test_distributed.py", "tests/recipes/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Starts the longest tests first, or one process waits for the other at the end."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))
