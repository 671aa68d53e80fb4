"""What every family of networks must do in every mode and dtype."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from inmerge_wrap import InMergeWrapper, export_weights

FAMILIES = ["test_resnet", "test_efficientnet", "test_convnext", "test_nfnet", "test_vgg_like"]
MODES = ["step", "outputs", "weights"]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def network(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if family != "test_vgg_like":
        return timm.create_model(family, num_classes=3)
    widths = [3, 8, 12, 16]
    layers: list[torch.nn.Module] = []
    for before, after in pairwise(widths):
        layers += [torch.nn.Conv2d(before, after, 3, padding=1), torch.nn.ReLU()]
    return torch.nn.Sequential(
        *layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(16, 3)
    )


def wrapped(family: str, mode: str, dtype: torch.dtype) -> tuple[InMergeWrapper, Any]:
    settings: dict[str, Any] = {"similarity_threshold": -1.0, "shallow_layers": 1}
    if mode != "step":
        settings |= {"direction": "signed", "merge_probability": 1.0, "shallow_layers": 0}
    model = InMergeWrapper(
        network(family).to(dtype),
        mode=mode,  # type: ignore[arg-type]
        inspect_every=0,
        example_input=torch.zeros(2, 3, 48, 48, dtype=dtype),
        **settings,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model.attach(optimizer)
    return model, optimizer


def train(model: torch.nn.Module, optimizer: Any, steps: range, dtype: torch.dtype) -> None:
    for step in steps:
        torch.manual_seed(step)
        images = torch.randn(3, 3, 48, 48).to(dtype)
        loss = torch.nn.functional.cross_entropy(model(images).float(), torch.tensor([0, 1, 2]))
        assert loss.isfinite()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_trains_resumes_and_leaves_a_plain_network(
    family: str, mode: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, optimizer = wrapped(family, mode, dtype)
    plain = network(family).to(dtype)
    train(plain, torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.9), range(3), dtype)
    train(model, optimizer, range(2), dtype)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, range(2, 3), dtype)
    report = model.report()
    assert report.drawn > 0 and report.merged == report.drawn - sum(x.undefined for x in report)

    resumed, optimizer = wrapped(family, mode, dtype)
    resumed.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    train(resumed, optimizer, range(2, 3), dtype)
    trained = model.module.state_dict()
    assert all(torch.equal(v, trained[k]) for k, v in resumed.module.state_dict().items())
    assert any(not torch.equal(v, trained[k]) for k, v in plain.state_dict().items())

    model.statistics_measured()
    export_weights(model.eval(), tmp_path / "weights.safetensors")
    fresh = network(family).to(dtype).eval()
    timm.models.load_checkpoint(fresh, str(tmp_path / "weights.safetensors"))
    images = torch.randn(2, 3, 48, 48).to(dtype)
    assert torch.equal(fresh(images), model(images))
