"""Unwrapping: what is inside of which wrapper, against the objects that went in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from inmerge_wrap import InMergeWrapper
from inmerge_wrap.unwrapping import find_wrapper, named_wrappers, unwrap


class MyWrapper(InMergeWrapper):
    """A user's own kind of wrapper is one all the same."""


@pytest.fixture
def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda net: net,
        InMergeWrapper,
        MyWrapper,
        torch.compile,
        nn.DataParallel,
        lambda net: nn.DataParallel(torch.compile(InMergeWrapper(net))),
        lambda net: torch.compile(InMergeWrapper(torch.compile(net))),
    ],
)
def test_the_network_is_found_inside_of_any_wrapper(
    wrap: Callable[[nn.Module], Any], net: nn.Module
) -> None:
    assert unwrap(wrap(net)) is net


@pytest.mark.parametrize("average", [AveragedModel, timm.utils.ModelEmaV2, timm.utils.ModelEmaV3])
def test_an_average_is_opened(average: Any, net: nn.Module) -> None:
    averaged = average(InMergeWrapper(net))
    inner = unwrap(averaged)
    assert type(inner) is nn.Sequential and inner is not net
    assert inner is averaged.module.module


def test_a_network_with_a_part_called_module_is_no_wrapper() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Conv2d(3, 4, 3)

    holder = Holder()
    assert unwrap(holder) is holder


def test_wrappers_are_found_wherever_they_are(net: nn.Module) -> None:
    assert find_wrapper(net) is None
    wrapper = MyWrapper(net)
    assert find_wrapper(nn.DataParallel(torch.compile(wrapper))) is wrapper
    larger = nn.ModuleDict({"backbone": wrapper, "head": nn.Linear(8, 2)})
    assert list(named_wrappers(larger)) == [("backbone", wrapper)]
    assert unwrap(larger) is larger
