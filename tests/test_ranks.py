"""Convolutions over signals, images and volumes, transposed ones too, from plan to export."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from inmerge_wrap import InMergeWrapper, ZScore, export_weights, plan_merging
from inmerge_wrap.similarity import measure_similarity
from tests import reference

DIMS = [1, 2, 3]


def layer(kind: str, dims: int) -> Any:
    """``nn.Conv3d`` for ``"Conv"`` and 3."""
    return getattr(nn, f"{kind}{dims}d")


class HourGlass(nn.Module):
    """Down by a stride, up by a transposed convolution, in groups on the way."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        conv, up = layer("Conv", dims), layer("ConvTranspose", dims)
        self.stem = conv(2, 8, 3, padding=1)
        self.norm = layer("BatchNorm", dims)(8)
        self.down = conv(8, 12, 3, stride=2, padding=1)
        self.grouped = conv(12, 12, 3, padding=1, groups=2)
        self.depthwise = conv(12, 12, 3, padding=1, groups=12)
        self.gate = conv(12, 12, 1)
        self.up_grouped = up(12, 10, 3, padding=1, groups=2)
        self.up = up(10, 6, 2, 2)
        self.classes = conv(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(self.norm(self.stem(x)).relu()).relu()
        x = self.depthwise(self.grouped(x).relu()).relu()
        x = x * self.gate(x.mean(tuple(range(2, x.ndim)), keepdim=True)).sigmoid()
        return self.classes(self.up(self.up_grouped(x).relu()).relu())


MERGED = ["stem", "down", "grouped", "up_grouped", "up"]


def hourglass(dims: int) -> HourGlass:
    with torch.random.fork_rng():
        torch.manual_seed(dims)
        return HourGlass(dims)


def wrapped(dims: int, **settings: Any) -> InMergeWrapper:
    chosen: dict[str, Any] = {"similarity_threshold": 0.0, "shallow_layers": 0, **settings}
    return InMergeWrapper(hourglass(dims), **chosen)


def batch(dims: int, seed: int = 0) -> Tensor:
    return torch.randn(2, 2, *[6] * dims, generator=torch.Generator().manual_seed(seed))


def bank(conv: nn.Module, tensor: Tensor) -> Tensor:
    """A copy of the kernels in a tensor of the weight's shape, found one by one."""
    assert isinstance(conv, _ConvNd)
    if not conv.transposed:
        return tensor.detach().clone()
    inputs, outputs = conv.in_channels // conv.groups, conv.out_channels // conv.groups
    kernels = [
        torch.stack([tensor[group * inputs + i, o] for i in range(inputs)])
        for group in range(conv.groups)
        for o in range(outputs)
    ]
    return torch.stack(kernels).detach()


def set_bank_(conv: nn.Module, tensor: Tensor, kernels: Tensor) -> None:
    """The way back of :func:`bank`."""
    assert isinstance(conv, _ConvNd)
    with torch.no_grad():
        if not conv.transposed:
            tensor.copy_(kernels)
            return
        inputs, outputs = conv.in_channels // conv.groups, conv.out_channels // conv.groups
        for number, kernel in enumerate(kernels):
            group, o = divmod(number, outputs)
            for i in range(inputs):
                tensor[group * inputs + i, o] = kernel[i]


def backward(model: nn.Module, dims: int, step: int) -> None:
    model.zero_grad()
    model(batch(dims, step)).square().mean().backward()


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


# -- the plan -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", DIMS)
def test_kinds_are_those_of_images(dims: int) -> None:
    plan = plan_merging(hourglass(dims), shallow_layers=0)
    assert plan.found_by == "trace"
    assert [site.name for site in plan.merged] == MERGED
    assert {site.name: site.kind for site in plan.skipped} == {
        "depthwise": "depthwise",
        "gate": "vector",
        "classes": "head",
    }


@pytest.mark.parametrize("dims", DIMS)
def test_shapes_are_those_of_the_kernels(dims: int) -> None:
    network = hourglass(dims)
    plan = plan_merging(network, shallow_layers=0, also_merge=["depthwise"])
    for site in plan.merged:
        conv = cast(_ConvNd, network.get_submodule(site.name))
        kernels = bank(conv, conv.weight)
        assert site.shape == kernels.shape
        assert site.fan_in == kernels[0].numel()
        assert site.pair_groups == {"grouped": 2, "up_grouped": 2}.get(site.name, 1)


def test_a_transposed_depthwise_layer_pairs_across_its_kernels() -> None:
    network = nn.Sequential(nn.Conv1d(2, 6, 3), nn.ConvTranspose1d(6, 6, 3, groups=6), nn.ReLU())
    assert plan_merging(network, shallow_layers=0).skipped[0].kind == "depthwise"
    (site,) = plan_merging(network, include="1").merged
    assert (site.shape, site.pair_groups) == ((6, 1, 3), 1)


@pytest.mark.parametrize("dims", DIMS)
def test_patches_and_dense_layers(dims: int) -> None:
    conv = layer("Conv", dims)
    network = nn.Sequential(
        *(conv(1, 8, 4, 4), nn.ReLU(), conv(8, 8, 3, padding=1), nn.ReLU()),
        *(layer("AdaptiveAvgPool", dims)(2), conv(8, 16, 2), nn.ReLU(), nn.Flatten()),
        nn.Linear(16, 3),
    )
    plan = plan_merging(network, shallow_layers=0)
    assert [site.name for site in plan.merged] == ["2"]
    kinds = {site.name: site.kind for site in plan.skipped}
    assert kinds == {"0": "patch_embedding", "5": "dense"}
    small = torch.zeros(2, 1, *[8] * dims)
    assert plan_merging(network, shallow_layers=0, example_input=small) == plan


# -- merging --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", DIMS)
def test_each_step_is_the_literal_one_momentum_included(dims: int) -> None:
    model = wrapped(dims, merge_probability=0.5, merge_momentum=True)
    twin = hourglass(dims)
    optimizer, plain = sgd(model), sgd(twin)
    model.attach(optimizer)
    merged = 0
    for step in range(3):
        drawn = model.next_pairs()
        backward(model, dims, step)
        backward(twin, dims, step)
        optimizer.step()
        plain.step()
        for name, (targets, sources) in drawn.items():
            conv = cast(_ConvNd, twin.get_submodule(name))
            pairs = list(zip(targets.tolist(), sources.tolist(), strict=True))  # type: ignore
            kernels, similar = reference.merge(bank(conv, conv.weight), pairs, 0.8, 0.0)
            momentum = plain.state[conv.weight]["momentum_buffer"]
            moved = [pair for pair, merge in zip(pairs, similar, strict=True) if merge]
            whole = bank(conv, momentum)
            new = whole.clone()
            for i, j in moved:
                new[i] = (0.8 * whole[i].double() + 0.2 * whole[j].double()).float()
            set_bank_(conv, conv.weight, kernels)
            set_bank_(conv, momentum, new)
            merged += len(moved)
            torch.testing.assert_close(
                model.module.get_submodule(name).weight, conv.weight, rtol=1e-5, atol=1e-6
            )
    assert merged == model.report().merged > 0
    for name, parameter in model.module.named_parameters():
        ours, theirs = (o.state[p]["momentum_buffer"] for o, p in (
            (optimizer, parameter), (plain, twin.get_parameter(name))
        ))  # fmt: skip
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("partner", ["random", "most_similar"])
@pytest.mark.parametrize("dims", DIMS)
def test_partners_are_of_the_same_group(dims: int, partner: Any) -> None:
    """Kernels of the second group are set to zero, and must neither merge nor spread."""
    model = wrapped(dims, merge_probability=1.0, partner=partner, similarity_threshold=-1.0)
    for name in ("grouped", "up_grouped"):
        conv = cast(_ConvNd, model.module.get_submodule(name))
        kernels = bank(conv, conv.weight)
        kernels[len(kernels) // 2 :] = 0
        set_bank_(conv, conv.weight, kernels)
    before = {
        name: bank(m, m.weight) for name, m in model.module.named_children() if name != "norm"
    }
    model.merge_()
    for name in ("grouped", "up_grouped"):
        conv = cast(_ConvNd, model.module.get_submodule(name))
        kernels, half = bank(conv, conv.weight), conv.out_channels // 2
        assert not kernels[half:].any()
        assert all(not torch.equal(kernels[i], before[name][i]) for i in range(half))
        assert model.report()[name].undefined == half


@pytest.mark.parametrize("direction", ["signed", "gaussian", "multiplicative"])
def test_other_directions_and_kept_norms_reach_transposed_layers(direction: Any) -> None:
    model = wrapped(
        2,
        direction=direction,
        radius=0.3,
        keep_norm=True,
        merge_probability=1.0,
        similarity_threshold=-1.0,
    )
    conv = model.module.up_grouped
    before = bank(conv, conv.weight)
    model.merge_()
    after = bank(conv, conv.weight)
    assert all(not torch.equal(a, b) for a, b in zip(after, before, strict=True))
    norms = [kernels.flatten(1).norm(dim=1) for kernels in (after, before)]
    torch.testing.assert_close(*norms, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dims", DIMS)
def test_adaptive_thresholds_see_the_entries_of_a_kernel(dims: int) -> None:
    """A z-score of the layer's own fan-in; the cosine of the pair lies on either side of it."""
    network = hourglass(dims)
    kernel = torch.randn(12 // 2 * 3**dims, generator=torch.Generator().manual_seed(0))
    other = torch.randn(kernel.shape, generator=torch.Generator().manual_seed(1))
    other -= other @ kernel / kernel.square().sum() * kernel
    for z, merges in ((1.9, True), (2.1, False)):
        cosine = 2.0 / len(kernel) ** 0.5
        partner = cosine * kernel / kernel.norm() + (1 - cosine**2) ** 0.5 * other / other.norm()
        rows = [kernel / kernel.norm(), *[partner] * 4] * 2
        set_bank_(
            network.up_grouped,
            network.up_grouped.weight,
            torch.stack(rows).reshape(10, 6, *[3] * dims),
        )
        model = InMergeWrapper(
            network,
            similarity_threshold=ZScore(z),
            merge_probability=1.0,
            include="up_grouped",
            partner="random",
        )
        targets, sources = model.next_pairs()["up_grouped"]
        assert sources is not None
        at_limit = int(((targets % 5 == 0) != (sources % 5 == 0)).sum())  # the others are equal
        model.merge_()
        assert model.report().merged == len(targets) - (0 if merges else at_limit)
        assert at_limit > 0


# -- what is measured, and what comes out ---------------------------------------------------------


@pytest.mark.parametrize("dims", DIMS)
def test_similarity_is_that_of_the_kernels(dims: int) -> None:
    network = hourglass(dims)
    measured = {layer.name: layer for layer in measure_similarity(network)}
    for name in ("down", "up_grouped", "up"):
        conv = cast(_ConvNd, network.get_submodule(name))
        kernels = bank(conv, conv.weight)
        found = measured[name]
        assert found.shape == kernels.shape
        assert found.cosines[0, 1].item() == pytest.approx(
            reference.cosine(kernels[0], kernels[1]), abs=1e-6
        )
        pair = found.most_similar[0]
        torch.testing.assert_close(pair.kernels, kernels[[pair.first, pair.second]])
    assert measured["up_grouped"].cosines[0, 9].isnan()


@pytest.mark.parametrize("dims", DIMS)
def test_statistics_are_measured_again(dims: int) -> None:
    model = wrapped(dims)
    expected = hourglass(dims).stem(batch(dims)).transpose(0, 1).flatten(1).mean(1)
    assert model.recalibrate([batch(dims)]) == 1
    torch.testing.assert_close(model.module.norm.running_mean, expected)


@pytest.mark.parametrize("name", ["mc3_18", "r2plus1d_18", "s3d"])
def test_torchvision_loads_a_merged_video_network_bit_for_bit(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = torchvision.models.get_model(name, weights=None, num_classes=3)
    model = InMergeWrapper(network, similarity_threshold=-1.0, merge_probability=1.0)
    model.merge_()
    assert model.report().merged == model.report().drawn > 1000
    model.statistics_measured()  # or the export warns that they lag, which does not matter here
    path = export_weights(model, tmp_path / "weights.safetensors")
    stock = torchvision.models.get_model(name, weights=None, num_classes=3)
    stock.load_state_dict(safetensors.torch.load_file(path))
    clip = torch.rand(1, 3, *((16, 224, 224) if name == "s3d" else (4, 32, 32)))
    with torch.no_grad():
        assert torch.equal(stock.eval()(clip), network.eval()(clip))
