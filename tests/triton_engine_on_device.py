"""The Triton engine inside of the wrapper; run by test_triton.py in a process of its own.

Triton decides when it is imported whether it interprets or compiles.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from torch import nn
from triton.runtime import JITFunction
from triton.runtime.interpreter import InterpretedFunction

from inmerge_wrap import InMergeWrapper, Quantile, Schedule, ZScore
from tests.test_wrapper import states_equal

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")


def network(layers: int = 3, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    convs = [nn.Conv2d(6, 6, 3, padding=1, groups=1 + n % 2) for n in range(layers)]
    return nn.Sequential(nn.Conv2d(3, 6, 1), *convs).to(DEVICE, dtype)


def wrapped(net: nn.Module, engine: Any, **settings: Any) -> InMergeWrapper:
    return InMergeWrapper(
        net, engine=engine, **{"shallow_layers": 1, "inspect_every": 0, **settings}
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "settings",
    [
        {"similarity_threshold": 0.0},
        {"similarity_threshold": ZScore(0.5), "merge_probability": 0.8},
        {"similarity_threshold": Quantile(0.5), "merge_probability": 0.8},
        {"similarity_threshold": -1.0, "partner": "most_similar", "merge_probability": 0.8},
        {"similarity_threshold": -1.0, "direction": "signed", "merge_probability": 0.8},
        {"similarity_threshold": -1.0, "keep_norm": True, "merge_probability": 0.8},
        {"similarity_threshold": 0.0, "schedule": Schedule(end=3, decay="linear")},
    ],
    ids=["fixed", "z", "quantile", "nearest", "signed", "norm kept", "schedule"],
)
def test_the_engine_merges_what_plain_torch_merges(
    settings: dict[str, Any], dtype: torch.dtype
) -> None:
    models = [wrapped(network(dtype=dtype), engine, **settings) for engine in ("torch", "triton")]
    for _ in range(4):
        for model in models:
            model.merge_()
    plain, fused = models
    assert "triton (3 layers)" in str(fused.report())
    for ours, theirs in zip(fused.report(), plain.report(), strict=True):
        assert (ours.drawn, ours.merged, ours.passes) == (
            theirs.drawn,
            theirs.merged,
            theirs.passes,
        )
        assert ours.mean_cosine == pytest.approx(theirs.mean_cosine, abs=1e-5)
    assert fused.report().merged > 0
    for ours, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_layers_of_several_dtypes_merge_as_in_plain_torch() -> None:
    """Each dtype in launches of its own, also where layers of the plan alternate."""
    models = []
    for engine in ("torch", "triton"):
        net = network(layers=5)
        models.append(wrapped(net, engine, similarity_threshold=0.0, merge_probability=0.8))
        for number, dtype in ((2, torch.bfloat16), (3, torch.float16), (4, torch.bfloat16)):
            net[number].to(dtype)
        for _ in range(3):
            models[-1].merge_()
    plain, fused = models
    assert "triton (5 layers)" in str(fused.report())
    for ours, theirs in zip(fused.report(), plain.report(), strict=True):
        assert (ours.drawn, ours.merged) == (theirs.drawn, theirs.merged)
        assert ours.merged > 0
    for ours, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("where", ["in place", "elsewhere", "converted"])
def test_kernels_merged_for_a_gradient_are_put_back(where: str) -> None:
    """Also if the weights were exchanged or converted in the meantime."""
    model = wrapped(network(), "triton", similarity_threshold=-1.0, transient=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.attach(optimizer)
    whole = copy.deepcopy(model.state_dict())
    model.train()(torch.randn(2, 3, 5, 5, device=DEVICE))
    merged = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert any(not torch.equal(merged[name], whole[name]) for name in merged)
    if where == "elsewhere":
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    if where == "converted":
        model.double()
        whole = {name: value.double() for name, value in whole.items()}
    model.eval()
    now = {name: value for name, value in model.state_dict().items() if name in merged}
    assert states_equal(now, {name: whole[name] for name in merged})


def test_launches_of_a_pass_do_not_grow_with_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    for kind in (InterpretedFunction, JITFunction):
        run = kind.run

        def counted(function: Any, *args: Any, run: Any = run, **kwargs: Any) -> Any:
            launched.append(function.fn.__name__)
            return run(function, *args, **kwargs)

        monkeypatch.setattr(kind, "run", counted)
    for layers in (3, 9):
        model = wrapped(network(layers), "triton", similarity_threshold=-1.0)
        model.merge_()
        launched.clear()
        model.merge_()
        assert launched == ["merge", "copy"]
