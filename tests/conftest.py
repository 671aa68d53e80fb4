"""Settings of the whole test run."""

from __future__ import annotations

import os

import torch

# The networks of the tests are tiny, and several tests run at once: more threads only wait for
# each other. Processes that the tests start inherit the setting.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
