"""Half precision, loss scaling and memory formats: the same merge, and none on a skipped step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from inmerge_wrap import InMergeWrapper
from inmerge_wrap.schedule import Schedule
from inmerge_wrap.thresholds import Quantile, ZScore
from tests import reference
from tests.scripts.common import (
    MERGED,
    attached,
    equal,
    loss_of,
    next_pairs,
    sgd,
    train,
    weights_of,
    wrapped,
)

ALPHA, TAU = 0.7, 0.0


pytestmark = pytest.mark.usefixtures("own_accelerator_state")


def by_the_book(model: Any, before: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """The merged layers after the pass that ``model`` would do next, by the paper's loop."""
    expected, count, pairs = {}, 0, next_pairs(model)
    for layer, name in enumerate(MERGED):
        weight = before[f"module.{name}.weight"]
        weight, merged = reference.merge(weight, pairs[layer], ALPHA, TAU)
        expected[name] = weight
        count += sum(merged)
    return expected, count


# -- dtypes --------------------------------------------------------------------------------------


def test_half_precision_is_blended_wide_and_rounded_once() -> None:
    model = wrapped(merge_weight=ALPHA, similarity_threshold=TAU).half()
    before = weights_of(model)
    expected, count = by_the_book(model, before)
    model.merge_()
    assert count > 0 and model.report().merged == count
    for name, weight in expected.items():
        actual = model.get_submodule(name).weight
        assert actual.dtype == torch.float16
        # At most a tie that rounds the other way.
        torch.testing.assert_close(actual, weight, rtol=torch.finfo(torch.float16).eps, atol=0.0)
        untouched = before[f"module.{name}.weight"] == weight
        assert torch.equal(actual[untouched], weight[untouched])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_inside_of_autocast_merges_as_outside(dtype: torch.dtype) -> None:
    """autocast would run the dot product of the cosine in half precision."""
    inside, outside = (wrapped(similarity_threshold=0.1) for _ in range(2))
    for model in (inside, outside):
        optimizer = sgd(model)
        model.attach(optimizer)
        for number in range(10):
            optimizer.zero_grad()
            loss_of(model, number).backward()
            with torch.autocast("cpu", dtype=dtype, enabled=model is inside):
                optimizer.step()
    assert equal(weights_of(inside), weights_of(outside))
    assert inside.report() == outside.report() and inside.report().merged > 0


def test_bf16_autocast_under_accelerate() -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = wrapped(merge_weight=ALPHA, similarity_threshold=TAU)
    twin = copy.deepcopy(model)
    optimizer, twin_optimizer = sgd(model), sgd(twin)
    model.attach(optimizer)
    prepared, prepared_optimizer = accelerator.prepare(model, optimizer)
    prepared_twin, _ = accelerator.prepare(twin, twin_optimizer)
    seen = []
    model.head.register_forward_hook(lambda *args: seen.append(args[-1].dtype))
    for number in range(4):
        for m, o in ((prepared, prepared_optimizer), (prepared_twin, twin_optimizer)):
            o.zero_grad()
            accelerator.backward(loss_of(m, number))
        twin_optimizer.step()
        expected, count = by_the_book(model, weights_of(twin))
        prepared_optimizer.step()
        assert count > 0
        for name, weight in expected.items():
            actual = model.get_submodule(name).weight
            assert actual.dtype == torch.float32
            torch.testing.assert_close(actual, weight, rtol=1e-5, atol=1e-6)
        twin.load_state_dict(model.state_dict())
    assert set(seen) == {torch.bfloat16} and model.step == 4
    accelerator.end_training()


def test_channels_last_keeps_its_layout_and_the_outcome() -> None:
    plain = wrapped()
    other = wrapped().to(memory_format=torch.channels_last)
    for _ in range(3):
        plain.merge_()
        other.merge_()
    assert equal(weights_of(plain), weights_of(other)) and plain.report().merged > 0
    for name in MERGED:
        weight = other.get_submodule(name).weight
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert not weight.is_contiguous()
    optimizer = sgd(other)
    other.attach(optimizer)
    train(other, optimizer, 2)
    assert other.step == 5


def test_a_default_device_elsewhere_changes_nothing() -> None:
    plain, other = wrapped(), wrapped()
    for _ in range(3):
        plain.merge_()
    with torch.device("meta"):
        for _ in range(3):
            other.merge_()
        state = other.state_dict()
        report = other.report()
        wrapped_there = copy.deepcopy(plain)
        wrapped_there.load_state_dict(state)
    assert equal(weights_of(plain), weights_of(other)) and report == plain.report()
    assert equal(plain.state_dict(), state)
    assert equal(plain.state_dict(), wrapped_there.state_dict())


# -- loss scaling --------------------------------------------------------------------------------

SCALED = {
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), False),
    "sgd foreach": (lambda p: torch.optim.SGD(p, lr=0.05, foreach=True), False),
    "adamw": (lambda p: torch.optim.AdamW(p, lr=1e-3), False),
    "sgd fused": (lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True), True),
    "adam fused": (lambda p: torch.optim.Adam(p, lr=1e-3, fused=True), True),
    "adamw fused": (lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True), True),
    "adagrad fused": (lambda p: torch.optim.Adagrad(p, lr=1e-2, fused=True), True),
}


@pytest.mark.parametrize("through_accelerate", [False, True])
@pytest.mark.parametrize("kind", SCALED)
def test_a_step_skipped_for_overflow_merges_nothing(kind: str, through_accelerate: bool) -> None:
    make, fused = SCALED[kind]
    model = wrapped(similarity_threshold=-1.0, merge_probability=1.0)
    optimizer = make(model.parameters())
    model.attach(optimizer)
    hook_calls: list[int] = []
    optimizer.register_step_post_hook(lambda *_: hook_calls.append(1))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    stepping: Any = optimizer
    if through_accelerate:
        Accelerator(cpu=True)  # its optimizer reads the process state
        stepping = AcceleratedOptimizer(optimizer, scaler=scaler)
    for number in range(6):
        overflow = number in (1, 4)
        optimizer.zero_grad()
        scaler.scale(loss_of(model, number)).backward()
        if overflow:
            model.last.weight.grad[0, 0, 0, 0] = float("inf")
        before, merged = weights_of(model), model.report().merged
        if through_accelerate:
            stepping.step()
        else:
            scaler.step(stepping)
            scaler.update()
        assert equal(before, weights_of(model)) == overflow
        # All pairs pass: the 7 and 9 kernels of the two layers, or none.
        assert model.report().merged - merged == (0 if overflow else 7 + 9)
    # The trap of fused optimizers: their hooks run on skipped steps as well.
    assert len(hook_calls) == model.step == (6 if fused else 4)


def test_no_pass_waits_for_the_device() -> None:
    """On the meta device nothing has a value: whatever asks the device for one raises.

    The draws are made in host memory and sent; all else must run without an answer.
    """
    model = wrapped(merge_probability=1.0, inspect_every=0).to("meta")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)

    def after_a_fused_step(optimizer: Any, *_: Any) -> None:
        if model.step == 3:
            optimizer.found_inf = torch.zeros((), device="meta")  # left there by the scaler

    optimizer.register_step_post_hook(after_a_fused_step)  # before ours
    model.attach(optimizer)
    for _ in range(4):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert model.step == 4 and optimizer.found_inf.is_meta
    with pytest.raises(RuntimeError, match="meta"):
        model.report()  # the control: this one does ask


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"partner": "most_similar", "keep_norm": True},
        {"similarity_threshold": ZScore(1.0)},
        {"similarity_threshold": Quantile(0.5)},
        {"schedule": Schedule(end=10, decay="cosine")},
    ],
)
@pytest.mark.parametrize("normalised", [False, True])
def test_no_option_waits_for_the_device(settings: dict[str, Any], normalised: bool) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 6, 1))
    if normalised:
        nn.utils.parametrizations.weight_norm(net[1])
    settings = {"example_input": torch.zeros(1, 3, 8, 8), "inspect_every": 0, **settings}
    model = InMergeWrapper(net, include=["1", "2"], merge_probability=1.0, **settings)
    model.to("meta").merge_()
    assert model.step == 1


# -- capture -------------------------------------------------------------------------------------


def test_cuda_graph_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = attached()
    loss_of(model, 0).backward()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"would repeat.* run optimizer\.step\(\) outside the"):
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"would repeat.* run merge_\(\) outside the graph"):
        model.merge_()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    optimizer.step()
    assert model.step == 1
