"""The launches of the Triton engine against the plain functions; test_triton.py runs this file.

Triton decides when it is imported whether it interprets or compiles, so that these tests need a
process of their own: under ``TRITON_INTERPRET=1`` they run on a CPU, else on a GPU.
"""

from __future__ import annotations

import os
import runpy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import JITFunction
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

from inmerge_wrap.discovery import ConvSite, MergePlan
from inmerge_wrap.engines import triton_kernels
from inmerge_wrap.engines import triton_launches as engine
from inmerge_wrap.merge_pass import merge_pairs_
from inmerge_wrap.merging import (
    blend_kernels,
    centre,
    draw_layers,
    pair_cosines,
    signed_weight,
)
from inmerge_wrap.thresholds import Fixed, Quantile, ZScore
from tests import reference

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Longer than a program reads at a time, not a multiple of anything, a single entry, aligned to 16
# bytes; all dense.
SHAPES = [(8, 250, 3, 3), (5, 7, 1, 5), (8, 1, 1, 1), (2, 3, 3, 3), (4, 192, 3, 3)]
BITS = {2: torch.int16, 4: torch.int32}

# The interpreter computes with NumPy, which warns of the NaN and infinities that are tested here.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def random_layers(dtype: torch.dtype, channels_last: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in SHAPES]
    if channels_last:
        layers = [layer.to(memory_format=torch.channels_last) for layer in layers]
    return layers


def everyone_with_another() -> tuple[list[int], Tensor, Tensor]:
    """Every kernel is a target, so that partners form cycles, and trees that end in one."""
    generator = torch.Generator().manual_seed(1)
    pairs = [shape[0] for shape in SHAPES]
    targets = [torch.arange(count) for count in pairs]
    sources = [
        (index + torch.randint(1, len(index), index.shape, generator=generator)) % len(index)
        for index in targets
    ]
    return pairs, torch.cat(targets).to(DEVICE), torch.cat(sources).to(DEVICE)


def some_mask(length: int, share: float) -> Tensor:
    return (torch.rand(length, generator=torch.Generator().manual_seed(2)) < share).to(DEVICE)


def compare(
    layers: list[Tensor],
    pairs: Sequence[int],
    targets: Tensor,
    sources: Tensor,
    centred: Sequence[bool] | None = None,
) -> Tensor:
    return engine.compare(engine.batch_of(layers, pairs, targets, sources, centred=centred))


def blend_(
    layers: list[Tensor],
    pairs: Sequence[int],
    targets: Tensor,
    sources: Tensor,
    changed: Tensor,
    merge_weight: float,
    **options: Any,
) -> tuple[engine.Batch, engine.Merged]:
    batch = engine.batch_of(layers, pairs, targets, sources)
    return batch, engine.merge_(batch, merge_weight, decided=changed, **options)


def drawn_on_host(pairs: Sequence[int], targets: Tensor, sources: Tensor) -> Tensor:
    places = torch.arange(len(pairs)).repeat_interleave(torch.tensor(pairs))
    return torch.stack([places, targets.cpu(), sources.cpu()])


def merge_(
    layers: list[Tensor],
    pairs: Sequence[int],
    targets: Tensor,
    sources: Tensor,
    threshold: float,
    merge_weight: float,
    **options: Any,
) -> engine.Merged:
    thresholds = [threshold] * len(pairs)
    drawn = drawn_on_host(pairs, targets, sources)
    batch = engine.batch_to_send(layers, pairs, drawn, thresholds=thresholds)
    return engine.merge_(batch, merge_weight, **options)


def bits(tensor: Tensor) -> Tensor:
    """What equality means where NaN may be."""
    return tensor.view(BITS[tensor.element_size()])


def test_it_is_available() -> None:
    assert engine.unavailable_reason(DEVICE) is None
    assert engine.available(DEVICE) and not engine.available(torch.device("meta"))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cosines(dtype: torch.dtype, channels_last: bool) -> None:
    layers = random_layers(dtype, channels_last)
    layers[0][3] = 0.0
    layers[0][4, 5] = float("nan")
    layers[0][7, 1] = float("inf")
    if dtype != torch.float16:
        layers[0][5] = 3e30  # its norm is beyond float32
    layers[1] += 100  # far from centred: the mean must go before the products are taken
    pairs, targets, sources = everyone_with_another()
    centred = [False, True, False, True, True]
    found = compare(layers, pairs, targets, sources, centred)
    assert found.dtype == torch.float32 and found.device == layers[0].device
    parts = zip(layers, found.split(pairs), targets.split(pairs), sources.split(pairs), strict=True)
    for number, ((layer, cosines, ours, theirs), mean) in enumerate(
        zip(parts, centred, strict=True)
    ):
        rows = layer.flatten(1).float()
        rows = centre(rows) if mean else rows
        expected = pair_cosines(rows[ours], rows[theirs])
        # What is left of numbers near 100 without their mean has five digits.
        tolerance = 2e-5 if number == 1 else 1e-6
        torch.testing.assert_close(cosines, expected, rtol=0, atol=tolerance, equal_nan=True)
    assert found.split(pairs)[0].isnan().sum() >= 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_cosine_is_beyond_one(dtype: torch.dtype) -> None:
    """Unlike the quotient of rounded numbers, for every second kernel and its double."""
    weight = torch.randn(40, 3, 1, 1, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = torch.cat([weight, weight, -weight]).to(DEVICE)
    targets = torch.arange(80).to(DEVICE)
    cosines = compare([weight], [80], targets, targets + 40, [False])
    assert cosines.abs().max() == 1 and cosines.abs().min() > 1 - 1e-6
    assert (cosines[:40] > 0).all() and (cosines[40:] < 0).all()


@triton.jit
def _rounded(values: tl.tensor, rounded: tl.tensor, stored: tl.constexpr) -> None:
    places = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    new = triton_kernels._narrowed(tl.load(values + places), stored)
    tl.store(rounded + places, new)


def test_bfloat16_is_rounded_as_pytorch_rounds_it() -> None:
    """Whatever the bits; the NaN that GPUs make is the one that would become a zero."""
    generator = torch.Generator().manual_seed(0)
    limit = torch.iinfo(torch.int32)
    pattern = torch.randint(limit.min, limit.max, (4096,), generator=generator, dtype=torch.int32)
    pattern[:512] &= ~0xFFFF  # representable,
    pattern[256:512] |= 0x8000  # and ties
    pattern[:4] = torch.tensor([0x7FFFFFFF, -1, 0x7F7FFFFF, 0x7F800000], dtype=torch.int32)
    values = pattern.view(torch.float32).to(DEVICE)
    found = torch.empty(4096, dtype=torch.uint16, device=DEVICE)
    _rounded[(4,)](values, found, tl.uint16)
    expected = values.to(torch.bfloat16)
    found = found.view(torch.bfloat16)
    defined = ~values.isnan()
    assert torch.equal(bits(found[defined]), bits(expected[defined]))
    assert found[~defined].isnan().all() and 10 < defined.logical_not().sum() < 100


@pytest.mark.parametrize("merge_weight", [0.0, 0.3, 0.8, 1.0, 1.7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_kernels_are_read_before_any_is_written(
    dtype: torch.dtype, merge_weight: float
) -> None:
    pairs, targets, sources = everyone_with_another()
    for share in (0.0, 0.6, 1.0):
        layers = random_layers(dtype)
        before = [layer.clone() for layer in layers]
        changed = some_mask(len(targets), share)
        blend_(layers, pairs, targets, sources, changed, merge_weight)
        parts = (part.split(pairs) for part in (targets, sources, changed))
        equal = []
        for layer, old, ours, theirs, mask in zip(layers, before, *parts, strict=True):
            exact = old.double()
            exact[ours[mask]] = (
                merge_weight * old[ours[mask]].double()
                + (1 - merge_weight) * old[theirs[mask]].double()
            )
            torch.testing.assert_close(layer, exact.to(dtype))
            equal.append((layer == exact.to(dtype)).flatten())
            left = ours[~mask]
            assert torch.equal(layer[left], old[left])
        if dtype != torch.float32:  # rounded to the nearest, of ties in float32 to either
            assert torch.cat(equal).float().mean() > 0.99


def test_blends_of_numbers_that_are_none_equal_plain_ones() -> None:
    for dtype in DTYPES:
        weight = random_layers(dtype)[1]
        weight[0, 0], weight[1, 1], weight[2, 2] = float("nan"), float("inf"), 0.0
        targets, sources = torch.arange(4).to(DEVICE), torch.tensor([4, 0, 1, 2]).to(DEVICE)
        expected = weight.clone()
        kernels, partners = (weight[index].flatten(1).float() for index in (targets, sources))
        blended = blend_kernels(kernels, partners, None, 0.8)
        expected[:4] = blended.to(dtype).unflatten(1, weight.shape[1:])
        blend_([weight], [4], targets, sources, some_mask(4, 1.0), 0.8)
        torch.testing.assert_close(weight, expected, equal_nan=True)
        assert weight.isnan().any() and weight.isinf().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grouped_layers_in_channels_last_merge_as_the_plain_function_merges(
    dtype: torch.dtype,
) -> None:
    counts, group_sizes = [24, 16, 12], [6, 16, 4]
    drawn, pairs = draw_layers(counts, group_sizes, 0.7, [1, 2, 3])
    _, targets, sources = drawn.to(DEVICE)
    torch.manual_seed(0)
    shapes = [(24, 2, 3, 3), (16, 3, 1, 1), (12, 5, 5, 3)]
    plain = [torch.randn(shape).to(DEVICE, dtype) for shape in shapes]
    plain = [layer.to(memory_format=torch.channels_last) for layer in plain]
    fused = [layer.clone() for layer in plain]
    merged = merge_(fused, pairs, targets, sources, 0.1, 0.8).merged
    ends = zip(targets.split(pairs), sources.split(pairs), merged.split(pairs), strict=True)
    for one, other, (ours, theirs, mask) in zip(plain, fused, ends, strict=True):
        found = merge_pairs_(one, ours, theirs, merge_weight=0.8, similarity_threshold=0.1)
        assert torch.equal(found, mask) and 0 < mask.sum() < len(mask)
        torch.testing.assert_close(other, one)
        assert one.stride() == other.stride()


def test_the_literal_loop_merges_the_same_pairs() -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        weight = torch.randn(30, 2, 3, 3) + torch.randn(2, 3, 3)
        targets = torch.randperm(30)[:20].sort().values
        sources = (targets + torch.randint(1, 30, (20,))) % 30
        expected, merged = reference.merge(
            weight, list(zip(targets.tolist(), sources.tolist(), strict=True)), 0.8, 0.4
        )
        weight, targets, sources = (part.to(DEVICE) for part in (weight, targets, sources))
        found = merge_([weight], [20], targets, sources, 0.4, 0.8).merged
        torch.testing.assert_close(weight.cpu(), expected)
        assert found.tolist() == merged


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kept_kernels_come_back_to_the_bit(
    share: float, dtype: torch.dtype, elsewhere: bool
) -> None:
    """Whatever the bits: NaN of any kind, infinities, subnormal numbers, both zeros."""
    pairs, targets, sources = everyone_with_another()
    mask = some_mask(len(targets), share)
    generator = torch.Generator().manual_seed(3)
    layers = []
    for number, shape in enumerate(SHAPES):
        limit = torch.iinfo(BITS[dtype.itemsize])
        pattern = torch.randint(limit.min, limit.max, shape, generator=generator)
        layer = pattern.to(BITS[dtype.itemsize]).view(dtype).to(DEVICE)
        layers.append(layer.to(memory_format=torch.channels_last) if number == 0 else layer)
    before = [layer.clone() for layer in layers]
    batch, merged = blend_(layers, pairs, targets, sources, mask, 0.8, keep=True)
    for layer in layers:
        layer.add_(1.0)
    moved = [layer.clone() for layer in layers]
    if elsewhere:
        layers = [layer.clone() for layer in layers]
    engine.restore_(batch, merged, layers)
    of_layers, masks = targets.split(pairs), mask.split(pairs)
    for layer, old, new, ours, back in zip(layers, before, moved, of_layers, masks, strict=True):
        assert torch.equal(bits(layer[ours[back]]), bits(old[ours[back]]))
        assert torch.equal(bits(layer[ours[~back]]), bits(new[ours[~back]]))
        assert not torch.equal(bits(new), bits(old))


def test_rows_of_every_layer_begin_where_a_gpu_can_read_them() -> None:
    """Also if they are single numbers of two bytes."""
    layers = [torch.ones(2, 1, 1, 1, device=DEVICE, dtype=torch.bfloat16) for _ in range(3)]
    targets = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    changed = torch.ones(3, dtype=torch.bool, device=DEVICE)
    _, merged = blend_(layers, [1, 1, 1], targets, targets + 1, changed, 0.8, keep=True)
    assert merged.kept is not None and merged.kept.shape == (48,)


def test_nothing_is_restored_that_was_not_kept() -> None:
    weight = torch.randn(8, 4, 3, 3, device=DEVICE)
    everyone = torch.arange(8, device=DEVICE)
    changed = torch.ones(8, dtype=torch.bool, device=DEVICE)
    batch, merged = blend_([weight], [8], everyone, everyone.roll(1), changed, 0.8)
    with pytest.raises(ValueError, match=r"call merge_\(\) with keep=True"):
        engine.restore_(batch, merged)


@pytest.mark.parametrize("aligned", [False, True])
def test_a_signed_move_is_that_of_the_plain_function(aligned: bool) -> None:
    """Also in rows that begin at any byte."""
    pairs, targets, sources = [6, 8], torch.arange(14) % 8, (torch.arange(14) + 3) % 8
    targets[:6], sources[:6] = torch.arange(6), torch.arange(6).roll(2)
    torch.manual_seed(0)
    shapes = [(8, 4, 3, 3), (8, 7, 3, 3)] if not aligned else [(8, 4, 3, 3), (8, 700, 1, 1)]
    layers = [torch.randn(shape).to(DEVICE) for shape in shapes]
    signs = 1 - 2 * (torch.arange(14) % 2)
    places = torch.tensor([0] * 6 + [1] * 8)
    drawn = torch.stack([places, targets, sources])
    expected = [layer.clone() for layer in layers]
    targets, sources = targets.to(DEVICE), sources.to(DEVICE)
    parts = zip(targets.split(pairs), sources.split(pairs), signs.split(pairs), strict=True)
    for layer, (ours, theirs, way) in zip(expected, parts, strict=True):
        kernels, partners = layer.flatten(1)[ours], layer.flatten(1)[theirs]
        weight = signed_weight(kernels, partners, way.to(DEVICE), 0.3)
        blended = blend_kernels(kernels, partners, None, weight)
        layer[ours] = blended.view(len(ours), *layer.shape[1:])
    batch = engine.batch_to_send(layers, pairs, drawn, thresholds=[-1.1, -1.1], signs=signs)
    assert engine.merge_(batch, 0.3).merged.all()
    for layer, wanted in zip(layers, expected, strict=True):
        torch.testing.assert_close(layer, wanted)


def test_many_kernels_have_indices_that_do_not_fit_in_two_bytes() -> None:
    weight = torch.randn(40_000, 1, 1, 2, device=DEVICE)
    before = weight.clone()
    drawn = torch.tensor([[0, 0], [39_999, 5], [33_000, 39_999]])
    batch = engine.batch_to_send([weight], [2], drawn, thresholds=[-1.1])
    engine.merge_(batch, 0.5)
    expected = before.clone()
    expected[39_999] = (before[39_999] + before[33_000]) / 2
    expected[5] = (before[5] + before[39_999]) / 2
    torch.testing.assert_close(weight, expected)
    assert torch.equal(before[6:39_999], weight[6:39_999])


def test_positions_in_the_plan_come_back(launches: Launches) -> None:
    layers = [torch.randn(8, 2, 1, 1, device=DEVICE) for _ in range(2)]
    drawn = torch.tensor([[3, 3, 40_000], [0, 1, 2], [1, 0, 3]])
    batch = engine.batch_to_send(layers, [2, 1], drawn, in_order=False)
    assert batch.numbers.tolist() == [3, 3, 40_000] and batch.place.tolist() == [0, 0, 1]
    assert launches.messages == 1


@pytest.mark.parametrize("rule", [Fixed(0.1), ZScore(0.5)], ids=str)
@pytest.mark.parametrize("overflow", [None, 0.0, 1.0])
def test_decisions(rule: Fixed | ZScore, overflow: float | None) -> None:
    """Those of the threshold's rule for each layer; a kernel without a cosine does not merge."""
    layers = random_layers(torch.float32)
    layers[0][3], layers[0][4, 5] = 0.0, float("nan")
    before = [layer.clone() for layer in layers]
    pairs, targets, sources = everyone_with_another()
    skip = None if overflow is None else torch.tensor([overflow], device=DEVICE)
    fan_ins = [layer[0].numel() for layer in layers]
    drawn = drawn_on_host(pairs, targets, sources)
    bounds = [rule.bound(fan_in) for fan_in in fan_ins]
    batch = engine.batch_to_send(layers, pairs, drawn, thresholds=bounds)
    done = engine.merge_(batch, 0.8, skip=skip)
    expected = compare(before, pairs, targets, sources)
    assert torch.equal(bits(done.cosines), bits(expected)) and expected.isnan().any()
    rules = zip(expected.split(pairs), fan_ins, strict=True)
    wanted = torch.cat([rule.alike(part, fan_in) for part, fan_in in rules])
    assert wanted.any()
    assert torch.equal(done.merged, torch.zeros_like(wanted) if overflow else wanted)
    changed = any(not torch.equal(bits(a), bits(b)) for a, b in zip(layers, before, strict=True))
    assert changed != bool(overflow)


def test_a_cosine_on_the_threshold_does_not_merge() -> None:
    """Of its own layer, whether or not the layer before it has drawn a pair; one below does."""
    _, *layers, _ = random_layers(torch.float32)
    pairs = [5, 0, 2]
    targets = torch.tensor([0, 1, 2, 3, 4, 0, 1]).to(DEVICE)
    sources = torch.tensor([1, 2, 3, 4, 0, 1, 0]).to(DEVICE)
    cosines = compare(layers, pairs, targets, sources)
    first, last = float(cosines[2]), float(cosines[5])
    for bound, merges in ((last, False), (float(np.nextafter(np.float32(last), -2)), True)):
        weights = [layer.clone() for layer in layers]
        drawn = drawn_on_host(pairs, targets, sources)
        batch = engine.batch_to_send(weights, pairs, drawn, thresholds=[first, -1.1, bound])
        merged = engine.merge_(batch, 0.8).merged
        assert torch.equal(merged[:5], cosines[:5] > first) and not merged[2]
        assert merged[5:].tolist() == [merges, merges]


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_quantiles(share: float) -> None:
    pairs = [5, 0, 700, 1, 3]
    torch.manual_seed(0)
    cosines = (2 * torch.rand(sum(pairs)) - 1).to(DEVICE)
    cosines[[0, 100, 704]] = float("nan")
    cosines[705] = float("nan")
    cosines[5:8] = cosines[8]  # ties at a quantile
    bounds = engine.layer_quantiles(cosines, pairs, share)
    places = torch.arange(len(pairs)).repeat_interleave(torch.tensor(pairs)).to(DEVICE)
    found = engine.reach_quantiles(cosines, places, pairs, share)
    rule = Quantile(share)
    assert torch.equal(found, torch.cat([rule.alike(part, 9) for part in cosines.split(pairs)]))
    assert bounds[[1, 3]].isnan().all() and bounds[[0, 2, 4]].isfinite().all()


def test_a_backward_pass_over_weights_that_were_written_is_refused() -> None:
    """As after any other write: PyTorch must learn of it, and of no write that cannot have been."""
    everyone = torch.arange(8, device=DEVICE)
    changed = torch.ones(8, dtype=torch.bool, device=DEVICE)
    images = torch.randn(1, 4, 5, 5, requires_grad=True, device=DEVICE)

    ends = everyone, everyone.roll(1)
    done: list[tuple[engine.Batch, engine.Merged]] = []

    def look(weights: list[Tensor]) -> None:
        compare(weights, [8, 0], *ends)

    def blend(weights: list[Tensor]) -> None:
        done[:] = [blend_(weights, [8, 0], *ends, changed, 0.8, keep=True)]

    def restore(weights: list[Tensor]) -> None:
        engine.restore_(*done[0], weights)

    calls: list[tuple[Callable[[list[Tensor]], object], bool]]
    calls = [(look, False), (blend, True), (restore, True)]
    for call, writes in calls:
        weights = [torch.randn(8, 4, 3, 3, requires_grad=True, device=DEVICE) for _ in range(2)]
        losses = [torch.nn.functional.conv2d(images, weight).sum() for weight in weights]
        call([weight.detach() for weight in weights])
        if writes:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                losses[0].backward()
        else:
            losses[0].backward()
        losses[1].backward()


def test_arguments_that_are_not_dense_are_read_aright() -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 4, 3, 3, device=DEVICE)
    ends = torch.stack([torch.arange(8), torch.arange(8).roll(3)], dim=1).to(DEVICE)
    mask = torch.tensor([[True, False], [False, True]], device=DEVICE).repeat(4, 1)[:, 0]
    results = []
    for dense in (False, True):
        layer, (targets, sources), changed = weight.clone(), ends.unbind(1), mask
        if dense:
            targets, sources, changed = targets.clone(), sources.clone(), mask.clone()
        assert targets.is_contiguous() == changed.is_contiguous() == dense
        cosines = compare([layer], [8], targets, sources)
        batch, merged = blend_([layer], [8], targets, sources, changed, 0.8, keep=True)
        blended = layer.clone()
        engine.restore_(batch, merged)
        assert torch.equal(layer, weight) and not torch.equal(blended, weight)
        results.append([cosines, blended])
    assert all(map(torch.equal, *results))


def test_without_pairs_nothing_happens() -> None:
    layers = random_layers(torch.float32)
    before = [layer.clone() for layer in layers]
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    pairs = [0] * len(layers)
    cosines = compare(layers, pairs, none, none)
    bars = engine.layer_quantiles(cosines, pairs, 0.5)
    batch = engine.batch_to_send(layers, pairs, torch.empty(3, 0, dtype=torch.int64))
    merged = engine.merge_(batch, 0.8, keep=True)
    blend_(layers, pairs, none, none, merged.merged, 0.8)
    engine.restore_(batch, merged)
    assert cosines.shape == merged.merged.shape == (0,) and merged.merged.dtype == torch.bool
    assert bars.isnan().all()
    assert all(map(torch.equal, layers, before))


def test_what_is_taken() -> None:
    weight = torch.randn(8, 4, 3, 3, device=DEVICE)
    assert engine.takes(weight) and engine.takes(weight.to(memory_format=torch.channels_last))
    assert engine.takes(weight.bfloat16()) and engine.takes(weight.half())
    assert not engine.takes(weight.double())
    assert not engine.takes(weight.to("meta"))
    assert not engine.takes(torch.nn.Parameter(weight))
    assert not engine.takes(weight[:, :2]) and not engine.takes(weight.transpose(2, 3))
    assert not engine.takes(torch.eye(3, device=DEVICE).to_sparse())


class Launches(TorchDispatchMode):
    """Counts launches of Triton, messages to the device, and what PyTorch does besides."""

    # Without a launch: memory that is not written, other views of it, and numbers of the host.
    FREE = ("empty", "empty_like", "view", "slice", "detach", "lift_fresh", "split", "unbind")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.kernels, self.messages, self.operations = [], 0, []
        for kind in (InterpretedFunction, JITFunction):
            monkeypatch.setattr(kind, "run", self._counting(kind.run))
        monkeypatch.setattr(engine, "_there", self._on_host(engine._there, messages=1))
        # What the host prepares is launched nowhere.
        monkeypatch.setattr(engine, "batch_to_send", self._on_host(engine.batch_to_send))

    def _counting(self, run: Any) -> Any:
        def counted(function: Any, *args: Any, **kwargs: Any) -> Any:
            self.kernels.append(function.fn.__name__)
            with torch.utils._python_dispatch._disable_current_modes():
                return run(function, *args, **kwargs)

        return counted

    def _on_host(self, work: Any, messages: int = 0) -> Any:
        def done(*args: Any, **options: Any) -> Any:
            self.messages += messages
            with torch.utils._python_dispatch._disable_current_modes():
                return work(*args, **options)

        return done

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in self.FREE:
            self.operations.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    yield Launches(monkeypatch)


def one_pass(layers: list[Tensor], pairs: Sequence[int], drawn: Tensor, quantile: bool) -> Any:
    """As an engine makes it: what is drawn is sent, compared, decided on, blended, put back."""
    batch = engine.batch_to_send(layers, pairs, drawn, thresholds=[0.0] * len(layers))
    decided = None
    if quantile:
        decided = engine.reach_quantiles(engine.compare(batch), batch.place, pairs, 0.5)
    return batch, engine.merge_(batch, 0.8, decided=decided, keep=True)


def test_launches_do_not_grow_with_the_layers(launches: Launches) -> None:
    for number in (3, 12):
        layers = [torch.randn(6, 2, 3, 3, device=DEVICE) for _ in range(number)]
        drawn, pairs = draw_layers([6] * number, [6] * number, 0.6, list(range(number)))
        launches.kernels.clear()
        launches.messages = 0
        with launches:
            done = one_pass(layers, pairs, drawn, quantile=False)
            engine.restore_(*done)
        assert launches.kernels == ["merge", "copy", "copy"]
        assert launches.messages == 1
        assert launches.operations == []  # nothing else is launched, and nothing is waited for


def test_a_quantile_takes_as_many_operations_for_any_number_of_layers(launches: Launches) -> None:
    found = []
    for number in (3, 12):
        layers = [torch.randn(6, 2, 3, 3, device=DEVICE) for _ in range(number)]
        drawn, pairs = draw_layers([6] * number, [6] * number, 0.6, list(range(number)))
        launches.operations.clear()
        with launches:
            one_pass(layers, pairs, drawn, quantile=True)
        found.append(list(launches.operations))
    assert found[0] == found[1]
    assert "_local_scalar_dense" not in found[0] and "nonzero" not in found[0]


if DEVICE.type == "cuda":

    @pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
    def test_nothing_waits_for_the_device() -> None:
        layers = [torch.randn(6, 2, 3, 3, device=DEVICE) for _ in range(3)]
        drawn, pairs = draw_layers([6] * 3, [6] * 3, 0.6, [0, 1, 2])
        for quantile in (False, True):
            one_pass(layers, pairs, drawn, quantile)  # compiles
            try:
                torch.cuda.set_sync_debug_mode("error")
                one_pass(layers, pairs, drawn, quantile)
            finally:
                torch.cuda.set_sync_debug_mode("default")

else:

    @pytest.mark.parametrize(("share", "threshold"), [(0.0, 1.1), (1.0, -1.1)])
    def test_the_calculated_budget_is_what_the_interpreter_counts(
        launches: Launches, monkeypatch: pytest.MonkeyPatch, share: float, threshold: float
    ) -> None:
        """Launches, and the bytes of kernels, which are all float32 but the cosines."""
        script = Path(__file__).parent.parent / "benchmarks" / "gpu_budget.py"
        budget = runpy.run_path(str(script))
        shapes = [(12, 250, 3, 3), (24, 4, 3, 3), (6, 3, 1, 1)]
        sites = [ConvSite(str(n), n, shape, centred=n == 1) for n, shape in enumerate(shapes)]
        plan = MergePlan(merged=tuple(sites), skipped=())
        draws = budget["draw"](plan, 0.6)
        pairs = [len(targets) for targets, _ in draws]
        targets, sources = (torch.cat(part) for part in zip(*draws, strict=True))
        layers = [torch.randn(shape) for shape in shapes]
        moved = {"bytes": 0}

        def count(pointers: Any, mask: Any) -> None:
            if pointers.get_element_ty() == tl.float32:
                moved["bytes"] += 4 * int(mask.data.sum())

        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

        def counted_load(self: Any, pointers: Any, mask: Any, *others: Any) -> Any:
            count(pointers, mask)
            return load(self, pointers, mask, *others)

        def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *others: Any) -> Any:
            count(pointers, mask)
            return store(self, pointers, value, mask, *others)

        monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
        monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counted_store)
        batch = engine.batch_to_send(
            layers,
            pairs,
            drawn_on_host(pairs, targets, sources),
            centred=[site.centred for site in sites],
            thresholds=[threshold] * 3,
        )
        done = engine.merge_(batch, 0.8, keep=True)
        engine.restore_(batch, done)
        moved["bytes"] -= 4 * len(done.cosines)
        expected = budget["fused_pass"](plan, draws, share, torch.float32)
        expected += budget["fused_transience"](plan, draws, share, torch.float32)
        assert (len(launches.kernels) + launches.messages, moved["bytes"]) == (
            expected.launches,
            expected.moved,
        )
