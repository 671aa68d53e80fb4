"""Fixtures of the command line's tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from tests.cli.common import ARCH


@pytest.fixture(scope="package")
def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model(ARCH, num_classes=7).eval()


@pytest.fixture(scope="package")
def weights(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    safetensors.torch.save_file(net.state_dict(), path)
    return path
