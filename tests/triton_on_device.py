"""The launches of the Triton engine against the plain functions; test_triton.py runs this file.

Triton decides when it is imported whether it interprets or compiles, so that these tests need a
process of their own: under ``TRITON_INTERPRET=1`` they run on a CPU, else on a GPU.
"""

from __future__ import annotations

import math
import os
import runpy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

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
)
from inmerge_wrap.pairs import Outcome
from inmerge_wrap.tally import Tally
from inmerge_wrap.thresholds import Fixed, Quantile, ZScore
from tests import reference

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Longer than a program reads at a time, not a multiple of anything, a single entry; all dense.
SHAPES = [(8, 250, 3, 3), (5, 7, 1, 5), (8, 1, 1, 1), (2, 3, 3, 3)]
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
    centred = [False, True, False, True]
    found = engine.compare(layers, pairs, targets, sources, centred)
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
    cosines = engine.compare([weight], [80], targets, targets + 40, [False])
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
        engine.blend_(layers, pairs, targets, sources, changed, merge_weight)
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
        engine.blend_([weight], [4], targets, sources, some_mask(4, 1.0), 0.8)
        torch.testing.assert_close(weight, expected, equal_nan=True)
        assert weight.isnan().any() and weight.isinf().any()


@pytest.mark.parametrize("dtypes", [*((dtype,) * 3 for dtype in DTYPES), DTYPES], ids=str)
def test_grouped_layers_in_channels_last_merge_as_the_plain_function_merges(
    dtypes: Sequence[torch.dtype],
) -> None:
    counts, group_sizes = [24, 16, 12], [6, 16, 4]
    drawn, pairs = draw_layers(counts, group_sizes, 0.7, [1, 2, 3])
    _, targets, sources = drawn.to(DEVICE)
    torch.manual_seed(0)
    shapes = [(24, 2, 3, 3), (16, 3, 1, 1), (12, 5, 5, 3)]
    plain = [torch.randn(s).to(DEVICE, dtype) for s, dtype in zip(shapes, dtypes, strict=True)]
    plain = [layer.to(memory_format=torch.channels_last) for layer in plain]
    fused = [layer.clone() for layer in plain]
    cosines = engine.compare(fused, pairs, targets, sources, [False] * 3)
    merged = engine.decide(cosines, pairs, [0.1] * 3)
    engine.blend_(fused, pairs, targets, sources, merged, 0.8)
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
        cosines = engine.compare([weight], [20], targets, sources, [False])
        found = engine.decide(cosines, [20], [0.4])
        engine.blend_([weight], [20], targets, sources, found, 0.8)
        torch.testing.assert_close(weight.cpu(), expected)
        assert found.tolist() == merged


@pytest.mark.parametrize("share", [None, 0.5])
def test_saved_kernels_come_back_to_the_bit(share: float | None) -> None:
    """Whatever the bits: NaN of any kind, infinities, subnormal numbers, both zeros."""
    pairs, targets, _ = everyone_with_another()
    mask = None if share is None else some_mask(len(targets), share)
    generator = torch.Generator().manual_seed(3)
    layers = []
    for number, shape in enumerate(SHAPES):
        dtype = DTYPES[number % 3]
        limit = torch.iinfo(BITS[dtype.itemsize])
        pattern = torch.randint(limit.min, limit.max, shape, generator=generator)
        layer = pattern.to(BITS[dtype.itemsize]).view(dtype).to(DEVICE)
        layers.append(layer.to(memory_format=torch.channels_last) if number == 0 else layer)
    before = [layer.clone() for layer in layers]
    kept = engine.save(layers, pairs, targets, mask)
    for layer in layers:
        layer.add_(1.0)
    moved = [layer.clone() for layer in layers]
    engine.restore_(layers, pairs, targets, kept, mask)
    of_layers = targets.split(pairs)
    masks = [torch.ones_like(ours, dtype=torch.bool) for ours in of_layers]
    masks = masks if mask is None else [*mask.split(pairs)]
    for layer, old, new, ours, back in zip(layers, before, moved, of_layers, masks, strict=True):
        assert torch.equal(bits(layer[ours[back]]), bits(old[ours[back]]))
        assert torch.equal(bits(layer[ours[~back]]), bits(new[ours[~back]]))
        assert not torch.equal(bits(new), bits(old))


def test_rows_of_every_layer_begin_where_a_gpu_can_read_them() -> None:
    """Single numbers of two bytes each are followed by layers of four."""
    layers = [torch.ones(2, 1, 1, 1, device=DEVICE, dtype=dtype) for dtype in reversed(DTYPES)]
    targets = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    assert engine.save(layers, [1, 1, 1], targets).shape == (48,)


def test_a_buffer_of_other_layers_is_refused() -> None:
    weight = torch.randn(8, 4, 3, 3, device=DEVICE)
    targets = torch.arange(6, device=DEVICE)
    kept = engine.save([weight], [6], targets)
    with pytest.raises(ValueError, match="must be the 720 bytes that save"):
        engine.restore_([weight], [5], targets[:5], kept)
    with pytest.raises(ValueError, match=r"got torch.float32 of shape \(216,\)"):
        engine.restore_([weight], [6], targets, kept.view(torch.float32))


@pytest.mark.parametrize("rule", [Fixed(0.1), ZScore(0.5), Quantile(0.3), Quantile(1.0)], ids=str)
@pytest.mark.parametrize("overflow", [None, 0.0, 1.0])
def test_decisions_and_counts(rule: Any, overflow: float | None) -> None:
    """Those of the threshold's rule for each layer, and of the tally."""
    pairs, fan_ins, rows = [5, 0, 700, 1, 3], [9, 36, 100, 1, 9], [4, 0, 1, 5, 2]
    torch.manual_seed(0)
    cosines = (2 * torch.rand(sum(pairs)) - 1).to(DEVICE)
    cosines[[0, 100, 704]] = float("nan")
    cosines[705] = float("nan")
    cosines[706:] = 0.1  # on the threshold
    cosines[5:8] = cosines[8]  # and ties at a quantile
    skip = None if overflow is None else torch.tensor([overflow], device=DEVICE)
    tally = Tally(6)
    counts = engine.Counts(
        torch.zeros(6, dtype=torch.int64, device=DEVICE),
        torch.zeros(6, dtype=torch.int64, device=DEVICE),
        torch.zeros(6, dtype=torch.float64, device=DEVICE),
        torch.full((6,), -2.0, device=DEVICE),
    )
    of_layer = torch.tensor(rows).repeat_interleave(torch.tensor(pairs)).to(DEVICE)
    for _ in range(2):
        if isinstance(rule, Quantile):
            bars: Any = engine.layer_quantiles(cosines, pairs, rule.share)
        elif isinstance(rule, ZScore):
            bars = [rule.z / math.sqrt(fan_in) for fan_in in fan_ins]
        else:
            bars = [rule.tau] * len(pairs)
        inclusive = isinstance(rule, Quantile)
        found = engine.decide(
            cosines, pairs, bars, inclusive=inclusive, skip=skip, counts=counts, rows=rows
        )
        expected = torch.cat(
            [rule.alike(part, d) for part, d in zip(cosines.split(pairs), fan_ins, strict=True)]
        )
        if overflow:
            expected = torch.zeros_like(expected)
        assert torch.equal(found, expected) and bool(found.any()) != bool(overflow)
        tally.add(rows, Outcome(of_layer, cosines, expected, tuple(pairs)))
        cosines = cosines.flip(0)
        pairs, fan_ins, rows, of_layer = pairs[::-1], fan_ins[::-1], rows[::-1], of_layer.flip(0)
    tally.report([""] * 6)  # counts what waits
    assert torch.equal(counts.merged, tally._merged)
    assert torch.equal(counts.undefined, tally._undefined) and counts.undefined.sum() == 8
    assert torch.equal(counts.cosine_max, tally._cosine_max)
    torch.testing.assert_close(counts.cosine_sum, tally._cosine_sum)


def test_a_backward_pass_over_weights_that_were_written_is_refused() -> None:
    """As after any other write: PyTorch must learn of it, and of no write that cannot have been."""
    everyone = torch.arange(8, device=DEVICE)
    changed = torch.ones(8, dtype=torch.bool, device=DEVICE)
    images = torch.randn(1, 4, 5, 5, requires_grad=True, device=DEVICE)

    def blend(weights: list[Tensor]) -> None:
        engine.blend_(weights, [8, 0], everyone, everyone.roll(1), changed, 0.8)

    def save(weights: list[Tensor]) -> Tensor:
        return engine.save(weights, [8, 0], everyone)

    def restore(weights: list[Tensor]) -> None:
        engine.restore_(weights, [8, 0], everyone, save(weights))

    calls: list[tuple[Callable[[list[Tensor]], object], bool]]
    calls = [(blend, True), (save, False), (restore, True)]
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
        cosines = engine.compare([layer], [8], targets, sources, [False])
        kept = engine.save([layer], [8], targets, changed)
        engine.blend_([layer], [8], targets, sources, changed, 0.8)
        blended = layer.clone()
        engine.restore_([layer], [8], targets, kept, changed)
        assert torch.equal(layer, weight) and not torch.equal(blended, weight)
        decided = engine.decide(cosines.repeat_interleave(2)[::2], [8], [0.0])
        results.append([cosines, blended, decided])
    assert all(map(torch.equal, *results))


def test_without_pairs_nothing_happens() -> None:
    layers = random_layers(torch.float32)
    before = [layer.clone() for layer in layers]
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    pairs = [0] * len(layers)
    cosines = engine.compare(layers, pairs, none, none, [False] * len(layers))
    bars = engine.layer_quantiles(cosines, pairs, 0.5)
    changed = engine.decide(cosines, pairs, bars)
    engine.blend_(layers, pairs, none, none, changed, 0.8)
    engine.restore_(layers, pairs, none, engine.save(layers, pairs, none))
    assert cosines.shape == changed.shape == (0,) and changed.dtype == torch.bool
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
        monkeypatch.setattr(engine, "_send", self._sending(engine._send))

    def _counting(self, run: Any) -> Any:
        def counted(function: Any, *args: Any, **kwargs: Any) -> Any:
            self.kernels.append(function.fn.__name__)
            with torch.utils._python_dispatch._disable_current_modes():
                return run(function, *args, **kwargs)

        return counted

    def _sending(self, send: Any) -> Any:
        def sent(*args: Any) -> Any:
            self.messages += 1
            with torch.utils._python_dispatch._disable_current_modes():
                return send(*args)

        return sent

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in self.FREE:
            self.operations.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    yield Launches(monkeypatch)


def one_pass(layers: list[Tensor], pairs: list[int], drawn: Tensor, quantile: bool) -> None:
    """As an engine makes it: what is drawn is sent, compared, decided on and blended."""
    _, targets, sources = engine._send(drawn, DEVICE)
    cosines = engine.compare(layers, pairs, targets, sources, [False] * len(layers))
    bars: Any = [0.0] * len(layers)
    if quantile:
        bars = engine.layer_quantiles(cosines, pairs, 0.5)
    counts = engine.Counts(
        torch.empty(len(layers), dtype=torch.int64, device=DEVICE),
        torch.empty(len(layers), dtype=torch.int64, device=DEVICE),
        torch.empty(len(layers), dtype=torch.float64, device=DEVICE),
        torch.empty(len(layers), device=DEVICE),
    )
    changed = engine.decide(cosines, pairs, bars, inclusive=quantile, counts=counts)
    engine.blend_(layers, pairs, targets, sources, changed, 0.8)


@pytest.mark.parametrize("dtypes", [1, 3])
def test_launches_do_not_grow_with_the_layers(launches: Launches, dtypes: int) -> None:
    for number in (3, 12):
        layers = [
            torch.randn(6, 2, 3, 3, device=DEVICE).to(DTYPES[n % dtypes]) for n in range(number)
        ]
        drawn, pairs = draw_layers([6] * number, [6] * number, 0.6, list(range(number)))
        launches.kernels.clear()
        launches.messages = 0
        with launches:
            one_pass(layers, pairs, drawn, quantile=False)
        assert launches.kernels == (
            ["compare"] * dtypes + ["decide"] + ["blend"] * dtypes + ["copy"] * dtypes
        )
        assert launches.messages == 4
        assert launches.operations == []  # nothing else is launched, and nothing is waited for
    assert len(launches.kernels) + launches.messages <= (8 if dtypes == 1 else 14)


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


def test_saving_and_restoring_are_one_launch_each(launches: Launches) -> None:
    for number in (3, 12):
        layers = [torch.randn(6, 2, 3, 3, device=DEVICE) for _ in range(number)]
        drawn, pairs = draw_layers([6] * number, [6] * number, 0.6, list(range(number)))
        targets = drawn[1].to(DEVICE)
        launches.kernels.clear()
        launches.messages = 0
        with launches:
            kept = engine.save(layers, pairs, targets)
            engine.restore_(layers, pairs, targets, kept)
        assert launches.kernels == ["copy", "copy"] and launches.messages == 2
        assert launches.operations == []


if DEVICE.type == "cuda":

    def test_nothing_waits_for_the_device() -> None:
        layers = [torch.randn(6, 2, 3, 3, device=DEVICE) for _ in range(3)]
        drawn, pairs = draw_layers([6] * 3, [6] * 3, 0.6, [0, 1, 2])
        for quantile in (False, True):
            one_pass(layers, pairs, drawn, quantile)  # compiles
            torch.cuda.set_sync_debug_mode("error")
            try:
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
        drawn = engine._send(torch.stack([targets, sources]), DEVICE)
        cosines = engine.compare(layers, pairs, *drawn, [site.centred for site in sites])
        changed = engine.decide(cosines, pairs, [threshold] * 3)
        moved["bytes"] -= 4 * 2 * len(cosines)  # written by the one and read by the other
        engine.blend_(layers, pairs, *drawn, changed, 0.8)
        expected = budget["fused_pass"](plan, draws, share, torch.float32)
        assert (len(launches.kernels) + launches.messages, moved["bytes"]) == (
            expected.launches,
            expected.moved,
        )
        kept = engine.save(layers, pairs, drawn[0], changed)
        engine.restore_(layers, pairs, drawn[0], kept, changed)
        expected += budget["fused_transience"](plan, draws, share, torch.float32)
        assert (len(launches.kernels) + launches.messages, moved["bytes"]) == (
            expected.launches,
            expected.moved,
        )
