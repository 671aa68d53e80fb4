"""Similarity: the numbers against plain loops."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import timm
import torch
from torch import Tensor, nn

from inmerge_wrap import InMergeWrapper
from inmerge_wrap.similarity import (
    cosine_matrix,
    effective_rank,
    extreme_pairs,
    measure_similarity,
    read_kernels,
    similarity_histogram,
)


def kernels(n: int, fan_in: int, seed: int = 0) -> Tensor:
    return torch.randn(n, fan_in, generator=torch.Generator().manual_seed(seed))


class TwoConvs(nn.Module):
    """A network whose second convolution holds two equal and two opposite kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 8, 3, padding=1)
        self.head = nn.Linear(8, 2)
        with torch.no_grad():
            self.second.weight.copy_(kernels(8, 54).view(8, 6, 3, 3))
            self.second.weight[5] = 2 * self.second.weight[1]
            self.second.weight[6] = -3 * self.second.weight[2]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).mean((2, 3)))


# -- effective rank ------------------------------------------------------------------------------


def test_effective_rank_of_orthogonal_equal_and_random_kernels() -> None:
    assert effective_rank(torch.eye(8)).item() == 1.0
    assert effective_rank(3 * torch.ones(8, 5)).item() == pytest.approx(1 / 8)
    assert effective_rank(torch.tensor([[1.0, 2.0], [-1.0, -2.0]])).item() == pytest.approx(0.5)
    assert effective_rank(kernels(1, 7)).item() == pytest.approx(1.0)
    # n random directions in d dimensions: n / (n + n (n - 1) / d) in expectation.
    n, d = 64, 576
    assert effective_rank(kernels(n, d)).item() == pytest.approx(1 / (1 + (n - 1) / d), rel=0.02)


@pytest.mark.parametrize(("n", "fan_in"), [(40, 9), (9, 40), (16, 16)])
def test_effective_rank_is_the_participation_ratio_of_the_spectrum(n: int, fan_in: int) -> None:
    unit = nn.functional.normalize(kernels(n, fan_in).double(), dim=1)
    spectrum = torch.linalg.eigvalsh(unit @ unit.T)
    expected = spectrum.sum() ** 2 / spectrum.square().sum() / n
    # float32 against float64
    assert effective_rank(kernels(n, fan_in)).item() == pytest.approx(expected.item(), rel=1e-5)
    assert effective_rank(kernels(n, fan_in)) <= fan_in / n + 1e-6


def test_effective_rank_leaves_out_kernels_without_a_direction() -> None:
    good = kernels(6, 10)
    bad = torch.zeros(3, 10)
    bad[1, 2], bad[2, 3] = math.nan, math.inf
    assert effective_rank(torch.cat([good, bad])).item() == pytest.approx(
        effective_rank(good).item(), rel=1e-6
    )
    assert effective_rank(bad).isnan()


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_effective_rank_does_not_see_lengths(scale: float) -> None:
    stretched = kernels(12, 20) * scale
    stretched[::2] *= 100
    expected = effective_rank(kernels(12, 20)).item()
    assert effective_rank(stretched).item() == pytest.approx(expected, rel=1e-5)


def test_effective_rank_counts_groups_as_orthogonal() -> None:
    bank = kernels(4, 9)
    both = torch.cat([bank, bank])  # equal kernels that read different channels
    assert effective_rank(both, groups=2).item() == pytest.approx(effective_rank(bank).item())
    assert effective_rank(both) < 0.6 * effective_rank(both, groups=2)


def test_effective_rank_is_exact_for_half_precision_inside_autocast() -> None:
    half = kernels(24, 90).bfloat16()
    expected = effective_rank(half.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(effective_rank(half), expected)
    assert effective_rank(half).dtype == torch.float32
    assert effective_rank(kernels(4, 5).double()).dtype == torch.float64


# -- cosines -------------------------------------------------------------------------------------


def test_cosine_matrix_agrees_with_torch_pair_by_pair() -> None:
    rows = kernels(9, 14)
    found = cosine_matrix(rows)
    for i, j in itertools.product(range(9), repeat=2):
        expected = nn.functional.cosine_similarity(rows[i], rows[j], dim=0)
        assert found[i, j].item() == pytest.approx(expected.item(), abs=1e-6)
    assert torch.equal(found, found.T)
    assert found.diagonal().eq(1).all()


def test_cosine_matrix_is_nan_where_there_is_nothing_to_compare() -> None:
    rows = kernels(6, 4)
    rows[1] = 0
    rows[4, 0] = math.nan
    found = cosine_matrix(rows, groups=2)
    for i, j in itertools.product(range(6), repeat=2):
        comparable = i // 3 == j // 3 and not {i, j} & {1, 4}
        assert found[i, j].isnan().item() is not comparable


def test_histogram_counts_each_pair_once() -> None:
    matrix = cosine_matrix(kernels(10, 6))
    matrix[2, 3] = matrix[3, 2] = math.nan
    counts, edges = similarity_histogram(matrix, bins=4)
    values = [matrix[i, j].item() for i, j in itertools.combinations(range(10), 2)]
    expected = [
        sum(low <= value < high for value in values)
        for low, high in itertools.pairwise(edges.tolist())
    ]
    assert counts.tolist() == expected
    assert counts.sum() == 44
    assert edges.tolist() == [-1.0, -0.5, 0.0, 0.5, 1.0]
    with pytest.raises(ValueError, match="bins"):
        similarity_histogram(matrix, bins=0)


def test_histogram_keeps_the_ends_of_the_range() -> None:
    rows = torch.tensor([[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0]])
    counts, _ = similarity_histogram(cosine_matrix(rows), bins=2)
    assert counts.tolist() == [2, 1]


def test_extreme_pairs_are_the_extremes() -> None:
    matrix = cosine_matrix(kernels(12, 5))
    most, least = extreme_pairs(matrix, 3)
    ranked = sorted(
        ((matrix[i, j].item(), i, j) for i, j in itertools.combinations(range(12), 2)), reverse=True
    )
    assert [(c, i, j) for i, j, c in most] == ranked[:3]
    assert [(c, i, j) for i, j, c in least] == ranked[:-4:-1]
    assert extreme_pairs(torch.ones(1, 1), 3) == ([], [])


# -- whole networks ------------------------------------------------------------------------------


def test_a_network_is_measured_layer_by_layer() -> None:
    net = TwoConvs()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    first, second = measure_similarity(net)
    assert (first.name, first.depth, second.name, second.depth) == ("first", 1, "second", 2)
    assert (second.most_similar[0].first, second.most_similar[0].second) == (1, 5)
    assert second.most_similar[0].cosine == pytest.approx(1.0)
    assert (second.least_similar[0].first, second.least_similar[0].second) == (2, 6)
    assert torch.equal(second.most_similar[0].kernels, net.second.weight[[1, 5]])
    matrix = cosine_matrix(net.second.weight.flatten(1))
    assert torch.equal(second.cosines, matrix)
    pairs = [matrix[i, j].item() for i, j in itertools.combinations(range(8), 2)]
    assert second.pairs == len(pairs) == 28
    assert second.share_above(0.1) == sum(value > 0.1 for value in pairs) / 28
    assert second.mean_cosine == pytest.approx(sum(pairs) / 28, abs=1e-6)
    assert second.chance == pytest.approx(54**-0.5)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_wrapper_and_a_compiled_network_are_looked_into() -> None:
    net = TwoConvs()
    plain = [layer.effective_rank for layer in measure_similarity(net)]
    wrapped = InMergeWrapper(net, shallow_layers=1)
    assert [layer.effective_rank for layer in measure_similarity(wrapped)] == plain
    assert [layer.name for layer in measure_similarity(torch.compile(wrapped))] == [
        "first",
        "second",
    ]


def test_include_and_exclude_choose_layers() -> None:
    net = timm.create_model("resnet10t", num_classes=2)
    names = [layer.name for layer in measure_similarity(net, include="layer4.*")]
    assert names and all(name.startswith("layer4.") for name in names)
    rest = [layer.name for layer in measure_similarity(net, exclude="layer4.*")]
    assert rest and not set(rest) & set(names)
    assert len(rest) + len(names) == sum(isinstance(m, nn.Conv2d) for m in net.modules())
    with pytest.raises(ValueError, match="matches none"):
        measure_similarity(net, include="layer9.*")


def test_kernels_are_those_that_the_forward_pass_uses() -> None:
    net = TwoConvs()
    net.second = nn.utils.parametrizations.weight_norm(net.second)
    with torch.no_grad():
        net.second.parametrizations.weight.original0[3] = 0  # the norm of one kernel
    used = read_kernels(net.second)
    assert torch.allclose(used, net.second.weight.flatten(1), rtol=1e-5, atol=1e-6)
    assert measure_similarity(net)[1].undefined == 1


def test_standardised_kernels_are_compared_without_their_mean() -> None:
    net = timm.create_model("resnetv2_50x1_bit", num_classes=2)
    conv = net.stages[3].blocks[2].conv2
    with torch.no_grad():
        conv.weight += 10 * conv.weight.std()
    layer = measure_similarity(net, include="stages.3.blocks.2.conv2")[0]
    assert cosine_matrix(conv.weight.flatten(1)).mean() > 0.9
    assert abs(layer.mean_cosine) < 0.05


def test_grouped_and_depthwise_layers() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 12, 3, groups=4)
    )
    dense, depthwise, grouped = measure_similarity(net, example_input=torch.zeros(1, 3, 16, 16))
    assert (dense.groups, depthwise.groups, grouped.groups) == (1, 1, 4)
    assert (depthwise.pairs, grouped.pairs) == (28, 4 * 3)
    expected = effective_rank(net[2].weight.flatten(1), groups=4).item()
    assert grouped.effective_rank == pytest.approx(expected)


def test_plain_numbers_survive_json() -> None:
    net = TwoConvs()
    with torch.no_grad():
        net.first.weight.zero_()
    layers = measure_similarity(net)
    content = json.loads(json.dumps([layer.to_dict() for layer in layers], allow_nan=False))
    assert content[0]["mean_cosine"] is content[0]["effective_rank"] is None
    assert content[0]["undefined_kernels"] == 6
    assert sum(content[1]["histogram"]["counts"]) == content[1]["pairs"] == 28
    assert content[1]["most_similar"][0]["kernels"] == [1, 5]
    assert content[1]["share_above"]["0.9"] == pytest.approx(1 / 28)
