"""BatchNorm's statistics, measured again with a prior: held against a literal computation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from inmerge_wrap import recalibrate


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)
    )
    for layer in (net[1], net[4]):
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    return net.eval()


def literal(net: nn.Sequential, batches: list[Tensor], prior: float) -> dict[str, Tensor]:
    """(prior x old + n x new) / (prior + n), with new written out from the activations."""
    n = sum(len(batch) for batch in batches)
    expected = {}
    activations = batches
    for index, layer in enumerate(net):
        if isinstance(layer, nn.BatchNorm2d):
            means = [a.mean((0, 2, 3)) for a in activations]
            variances = [a.var((0, 2, 3), unbiased=True) for a in activations]
            for name, found in (("running_mean", means), ("running_var", variances)):
                new = sum(len(b) * value for b, value in zip(batches, found, strict=True)) / n
                old = getattr(layer, name)
                expected[f"{index}.{name}"] = (prior * old + n * new) / (prior + n)
            activations = [
                (a - m[:, None, None])
                / (a.var((0, 2, 3), unbiased=False) + layer.eps)[:, None, None].sqrt()
                for a, m in zip(activations, means, strict=True)
            ]
        else:
            activations = [layer(a) for a in activations]
    return expected


@pytest.mark.parametrize("prior", [0.0, 16.0, 1e6])
def test_the_statistics_are_those_of_the_literal_formula(prior: float) -> None:
    """Batches of unequal size count by their images."""
    net = network()
    batches = [3 + 2 * torch.randn(count, 3, 9, 9) for count in (8, 8, 3)]
    with torch.no_grad():
        expected = literal(net, batches, prior)
    assert recalibrate(net, batches, prior=prior) == 3
    for name, value in expected.items():
        torch.testing.assert_close(net.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    assert not any(module.training for module in net.modules())
    assert [net[1].momentum, net[4].momentum] == [0.1, 0.1]


def test_without_a_prior_old_statistics_that_are_not_finite_are_forgotten() -> None:
    net = network()
    net[1].running_var.fill_(float("inf"))
    recalibrate(net, [torch.randn(4, 3, 9, 9)])
    assert net[1].running_var.isfinite().all()


@pytest.mark.parametrize("prior", [-1.0, float("nan"), float("inf")])
def test_a_prior_is_a_number_of_images(prior: float) -> None:
    with pytest.raises(ValueError, match=r"^prior must be a number of images >= 0, got"):
        recalibrate(network(), [torch.randn(2, 3, 9, 9)], prior=prior)


class Views(nn.Module):
    """One norm for both views of an image, and one that no image reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.other = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
        self.scale = nn.Parameter(torch.ones(()))
        self.other.running_mean.fill_(7.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * sum(self.norm(view) for view in x.unbind(1))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_norm_that_runs_twice_counts_both_and_one_that_does_not_run_is_kept(
    compiled: bool,
) -> None:
    net = Views()
    batches = [torch.randn(count, 2, 2, 4, 4) + torch.arange(2.0)[:, None, None, None] * 10
               for count in (8, 4)]  # fmt: skip
    model = torch.compile(net, backend="eager") if compiled else net
    model(batches[0])  # compiled before there are hooks
    recalibrate(model, batches, prior=6)
    old = nn.BatchNorm2d(2)
    old(batches[0][:, 0])
    old(batches[0][:, 1])
    means = [batch[:, view].mean((0, 2, 3)) for batch in batches for view in (0, 1)]
    new = (8 * means[0] + 8 * means[1] + 4 * means[2] + 4 * means[3]) / 24
    expected = (6 * old.running_mean + 12 * new) / 18
    torch.testing.assert_close(net.norm.running_mean, expected)
    assert net.other.running_mean.tolist() == [7.0, 7.0] and net.norm.momentum == 0.1


def test_images_that_reach_no_norm_are_refused_and_nothing_changes() -> None:
    net = Views()
    with pytest.raises(ValueError, match="no BatchNorm runs in the forward pass"):
        recalibrate(net, [torch.randn(2, 0, 2, 4, 4).expand(2, 0, 2, 4, 4)])
    assert net.other.running_mean.tolist() == [7.0, 7.0]
