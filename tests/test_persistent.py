"""The pass after a step, compiled: the same function makes the same weights."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from inmerge_wrap import InMergeWrapper, Quantile, Schedule

pytestmark = pytest.mark.skipif(
    shutil.which("c++") is None, reason="compiling needs a C++ compiler"
)


def layers(*modules: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    network = nn.Sequential(*modules)
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    return network


def permuted(network: nn.Sequential) -> nn.Sequential:
    for conv in network:  # as weights of TensorFlow come
        hwio = conv.weight.detach().permute(2, 3, 1, 0).contiguous()
        conv.weight = nn.Parameter(hwio.permute(3, 2, 0, 1))
    return network


NETWORKS: dict[str, Callable[[], nn.Sequential]] = {
    "float32": lambda: layers(nn.Conv2d(3, 40, 3), nn.Conv2d(40, 24, 1)),
    "channels_last": lambda: layers(nn.Conv2d(3, 40, 3), nn.Conv2d(40, 24, 3)).to(
        memory_format=torch.channels_last
    ),
    "bfloat16": lambda: layers(nn.Conv2d(3, 40, 3), nn.Conv2d(40, 24, 1)).bfloat16(),
    "permuted": lambda: permuted(layers(nn.Conv2d(3, 40, 3), nn.Conv2d(40, 24, 2))),
    "weight_norm": lambda: layers(
        nn.Conv2d(3, 40, 3), nn.utils.parametrizations.weight_norm(nn.Conv2d(40, 24, 3))
    ),
}


@pytest.mark.parametrize(
    "settings",
    [
        {"similarity_threshold": 0.05},
        {"similarity_threshold": Quantile(0.5), "direction": "signed", "keep_norm": True},
    ],
)
def test_compiled_passes_equal_plain_ones(settings: dict[str, Any]) -> None:
    for name, make in NETWORKS.items():
        plain, compiled = (
            InMergeWrapper(
                copy.deepcopy(network),
                shallow_layers=0,
                merge_probability=0.6,
                schedule=Schedule(end=6, decay="linear", anneals="strength"),
                compiled=way,
                **settings,
            )
            for network in (make(),)
            for way in (False, True)
        )
        for _ in range(5):
            plain.merge_()
            compiled.merge_()
        for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
            assert one.stride() == other.stride(), name
            tolerance = {"rtol": 2e-2, "atol": 2e-2} if one.dtype == torch.bfloat16 else {}
            torch.testing.assert_close(one, other, msg=name, **tolerance)
        counts = [[(layer.merged, layer.drawn) for layer in m.report()] for m in (plain, compiled)]
        assert counts[0] == counts[1]
        assert all(0 < merged < drawn for merged, drawn in counts[0])
