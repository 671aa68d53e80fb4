"""The mathematics of merging against the literal loop of tests/reference.py."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from inmerge_wrap.kernels import tensor_store
from inmerge_wrap.merging import draw_pairs
from inmerge_wrap.persistent import merge_pairs_
from inmerge_wrap.settings import MergeSettings
from tests import reference

SHAPES = [  # weight shape, groups
    ((16, 3, 3, 3), 1),
    ((8, 4, 1, 1), 1),
    ((12, 2, 3, 1), 3),
    ((6, 5, 5, 5), 2),
    ((2, 4, 3, 3), 1),
    ((1, 4, 3, 3), 1),
    ((4, 1, 3, 3), 4),
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def alike_kernels(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Kernels whose cosines cover the whole range, so that a threshold splits them."""
    noise = torch.randn(shape, generator=generator(seed))
    common = torch.randn(shape[1:], generator=generator(seed + 1))
    return noise + common * torch.randn(shape[0], 1, 1, 1, generator=generator(seed + 2))


def merge_on(
    weight: Tensor,
    targets: Tensor,
    sources: Tensor,
    *,
    merge_weight: float,
    similarity_threshold: float,
) -> Tensor:
    """What a step does to a weight for which it drew these pairs; returns which merged."""
    settings = MergeSettings(
        merge_weight=merge_weight,
        similarity_threshold=similarity_threshold,  # type: ignore[arg-type]
    )
    with torch.no_grad():
        return merge_pairs_(tensor_store(weight), targets, sources, settings, merge_weight)[1]


@pytest.mark.parametrize("shape,groups", SHAPES)
@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    "merge_weight,threshold", [(0.8, 0.3), (0.0, 0.0), (1.0, -1.0), (0.5, 1.0), (0.8, -1.0)]
)
def test_a_hundred_steps_in_lockstep_with_the_paper(
    shape: tuple[int, ...], groups: int, probability: float, merge_weight: float, threshold: float
) -> None:
    weight = alike_kernels(shape)
    expected = weight.clone()
    draws = generator(5)
    noise = generator(6)
    for _ in range(100):
        step = 0.05 * torch.randn(shape, generator=noise)  # an optimizer step between two passes
        weight += step
        expected += step
        targets, sources = draw_pairs(shape[0], probability, draws, groups)
        before = weight.clone()
        merged = merge_on(
            weight, targets, sources, merge_weight=merge_weight, similarity_threshold=threshold
        )
        pairs = list(zip(targets.tolist(), sources.tolist(), strict=True))
        decided = reference.merge_on(
            expected, pairs, merge_weight=merge_weight, similarity_threshold=threshold
        )
        assert merged.tolist() == decided
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)
        untouched = torch.ones(shape[0], dtype=torch.bool)
        untouched[targets[merged]] = False
        assert torch.equal(weight[untouched], before[untouched])


@pytest.mark.parametrize(
    # One rounding to the storage type after float32 arithmetic: half a unit in the last place.
    "dtype,rounding",
    [(torch.bfloat16, 2**-8), (torch.float16, 2**-11), (torch.float64, 1e-12)],
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_other_dtypes_round_once_and_keep_their_layout(
    dtype: torch.dtype, rounding: float, memory_format: torch.memory_format
) -> None:
    weight = alike_kernels((32, 8, 3, 3)).to(dtype).to(memory_format=memory_format)
    weight = torch.nn.Parameter(weight)
    strides, storage = weight.stride(), weight.data_ptr()
    before = weight.detach().clone()
    targets, sources = draw_pairs(32, 0.5, generator())
    merged = merge_on(weight, targets, sources, merge_weight=0.7, similarity_threshold=0.1)
    pairs = list(zip(targets.tolist(), sources.tolist(), strict=True))
    expected, decided = reference.merge(before.double(), pairs, 0.7, 0.1)
    assert merged.tolist() == decided
    assert 0 < merged.sum() < len(merged)
    torch.testing.assert_close(weight.detach().double(), expected, rtol=rounding, atol=1e-7)
    assert (weight.dtype, weight.stride(), weight.data_ptr()) == (dtype, strides, storage)
    assert weight.requires_grad and weight.is_leaf


def test_all_kernels_are_read_before_any_is_written() -> None:
    weight = torch.stack([torch.full((1, 2, 2), float(i + 1)) for i in range(3)])
    merge_on(
        weight,
        torch.tensor([0, 1, 2]),
        torch.tensor([1, 2, 0]),
        merge_weight=0.5,
        similarity_threshold=0.9,
    )
    assert weight[:, 0, 0, 0].tolist() == [1.5, 2.5, 2.0]


@pytest.mark.parametrize("broken", [0.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("threshold", [-1.0, 0.3])
def test_broken_kernels_neither_merge_nor_spread(broken: float, threshold: float) -> None:
    weight = torch.ones(4, 2, 3, 3)
    if math.isfinite(broken):
        weight[1] = broken
    else:
        weight[1, 0, 0, 0] = broken  # one bad entry among good ones is enough
    before = weight.clone()
    targets, sources = torch.tensor([0, 1, 2]), torch.tensor([1, 0, 3])
    merged = merge_on(weight, targets, sources, merge_weight=0.5, similarity_threshold=threshold)
    assert merged.tolist() == [False, False, True]
    assert torch.equal(weight[[0, 2, 3]], torch.ones(3, 2, 3, 3))
    torch.testing.assert_close(weight[1], before[1], rtol=0, atol=0, equal_nan=True)


def test_a_threshold_of_one_never_fires_even_for_equal_kernels() -> None:
    weight = torch.randn(1, 16, 3, 3, generator=generator()).repeat(8, 1, 1, 1)
    targets, sources = draw_pairs(8, 1.0, generator())
    kwargs = {"merge_weight": 0.5, "similarity_threshold": 1.0}
    assert not merge_on(weight, targets, sources, **kwargs).any()


@pytest.mark.parametrize(
    "num_kernels,groups,probability", [(12, 1, 0.3), (12, 3, 0.6), (4, 2, 1.0)]
)
def test_draws_follow_their_distribution(num_kernels: int, groups: int, probability: float) -> None:
    counts = torch.zeros(num_kernels, num_kernels)
    draws, rounds = generator(11), 20_000
    for _ in range(rounds):
        targets, sources = draw_pairs(num_kernels, probability, draws, groups)
        counts[targets, sources] += 1
    size = num_kernels // groups
    same_group = torch.block_diag(*[torch.ones(size, size)] * groups).bool()
    possible = same_group & ~torch.eye(num_kernels, dtype=torch.bool)
    assert not counts[~possible].any()
    observed = counts[possible].tolist()
    # The number of targets varies, so the partner test is given the observed total.
    assert chisquare(observed).pvalue > 1e-3
    expected = rounds * num_kernels * probability
    deviation = math.sqrt(expected * (1 - probability)) or 0.5
    assert abs(sum(observed) - expected) < 4 * deviation


def test_draws_are_sorted_distinct_and_reproducible() -> None:
    targets, sources = draw_pairs(100, 0.5, generator(3))
    again = draw_pairs(100, 0.5, generator(3))
    assert torch.equal(targets, again[0]) and torch.equal(sources, again[1])
    assert targets.dtype == sources.dtype == torch.int64
    assert (targets.diff() > 0).all()
    other = draw_pairs(100, 0.5, generator(4))
    assert not torch.equal(targets, other[0])


@pytest.mark.parametrize(
    "arguments,message",
    [
        ((8, -0.1), "probability must lie in"),
        ((8, 1.1), "got 1.1"),
        ((8, math.nan), "got nan"),
        ((8, 0.5, 3), "8 kernels cannot be divided into 3"),
        ((0, 0.5), "0 kernels"),
    ],
)
def test_bad_draw_arguments_are_named(arguments: tuple[float, ...], message: str) -> None:
    count, probability, *groups = arguments
    with pytest.raises(ValueError, match=message):
        draw_pairs(count, probability, generator(), *groups)
