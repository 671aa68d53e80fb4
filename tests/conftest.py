"""Settings of the whole test run."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from tests.stranger import Stranger

# The networks of the tests are tiny, and several tests run at once: more threads only wait for
# each other. Processes that the tests start inherit the setting.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

LONGEST = ("tests/test_notebooks.py", "tests/test_distributed.py", "tests/recipes/")


def pytest_configure(config: pytest.Config) -> None:
    """Lets a process that is done take over what the other has left.

    By default pytest-xdist gives each process an eighth of all tests for good, which holds all of
    the longest, and then hands out the tests of a file in turn, so that both make its fixtures.
    """
    if config.getoption("dist", "no") == "load":
        config.option.dist = "worksteal"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Starts the longest tests first, or one process waits for the other at the end."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))


@pytest.fixture
def own_accelerator_state() -> Iterator[None]:
    from tests.scripts.common import forget_accelerator  # imports Accelerate, which takes a while

    forget_accelerator()
    yield
    forget_accelerator()


@pytest.fixture(scope="session")
def stranger() -> Iterator[Stranger]:
    """A process that cannot import this library."""
    process = Stranger()
    yield process
    process.end()
