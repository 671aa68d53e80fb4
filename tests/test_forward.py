"""Merging in the forward pass: the outputs of merged kernels, and no weight is ever written."""

from __future__ import annotations

import copy
import itertools
import pickle
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from schedulefree import AdamWScheduleFree
from timm.layers import StdConv2d
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

from inmerge_wrap import InMergeWrapper, NoEffectWarning, Quantile, Schedule, plan_merging
from inmerge_wrap.counts import Counts
from inmerge_wrap.kernels import find_layers, layout_of
from inmerge_wrap.merging import draw_bits, draw_ways, fingerprint, mix_channels
from inmerge_wrap.pairs import shared_shift
from inmerge_wrap.plan import ConvSite
from inmerge_wrap.replicas import compared_weights
from tests import reference

ALWAYS: dict[str, Any] = {
    "similarity_threshold": -1.0,
    "merge_probability": 1.0,
    "shallow_layers": 0,
    "inspect_every": 0,
}


class Net(nn.Module):
    """Three convolutions with bias, groups and BatchNorm, in double precision."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, 3, groups=2)
        self.last = nn.Conv2d(12, 6, 3, bias=False)
        self.head = nn.Linear(6, 4)

    def features(self, x: Tensor) -> Tensor:
        return self.last(self.grouped(self.norm(self.stem(x)).relu()).relu())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


def net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().double()


def images(step: int = 0, count: int = 5) -> Tensor:
    return torch.randn(count, 3, 10, 10, generator=torch.Generator().manual_seed(step)).double()


def made(
    mode: str = "outputs", network: nn.Module | None = None, **settings: Any
) -> tuple[InMergeWrapper, torch.optim.SGD]:
    network = net() if network is None else network
    chosen: dict[str, Any] = {**ALWAYS, "example_input": images(), **settings}
    model = InMergeWrapper(network, mode=mode, **chosen)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model.attach(optimizer)
    return model, optimizer


def gradients(model: nn.Module, forward: Callable[[], Tensor]) -> list[Tensor]:
    model.zero_grad()
    forward().square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def repeat_features(network: Any, reentrant: bool) -> None:
    """Makes the backward pass run the features of a network again."""
    network.features = partial(checkpoint, network.features, use_reentrant=reentrant)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    optimizer.zero_grad()
    model(images(number)).square().mean().backward()
    optimizer.step()


# -- the blend of channels -------------------------------------------------------------------------

LAYERS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    f"{kind}{dims}d, groups={groups}": lambda kind=kind, dims=dims, groups=groups: (
        getattr(nn, f"{kind}{dims}d")(4, 6, 3, groups=groups),
        torch.randn(3, 4, *[6] * dims),
    )
    for kind, dims, groups in itertools.product(["Conv", "ConvTranspose"], [1, 2, 3], [1, 2])
    if kind == "Conv" or groups == 1
}


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("form", LAYERS)
def test_mixed_channels_are_the_outputs_of_merged_kernels(form: str, own: bool) -> None:
    torch.manual_seed(3)
    conv, batch = LAYERS[form]()
    conv, batch = conv.double(), batch.double()
    groups = conv.groups
    size = 6 // groups
    shares = torch.rand(3, 6).double() * 2 - 1
    shifts = [1, 2, 1] if own else [size - 1] * 3
    pairs = [[i - i % size + (i % size + s) % size for i in range(6)] for s in shifts]
    expected = reference.mixed_outputs(conv, batch, pairs, shares.tolist())
    shift: Any = torch.tensor(shifts).unsqueeze(1) if own else shifts[0]
    got = mix_channels(conv(batch), shares, shift, groups, conv.bias)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shift", [2, torch.tensor([[2]]), torch.tensor([[1], [2]])])
def test_the_gradient_is_exact_to_the_second_order(shift: Any) -> None:
    outputs = torch.randn(2, 6, 3, 2, dtype=torch.float64, requires_grad=True)
    shares = torch.rand(2, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda y: mix_channels(y, shares, shift, 2), outputs)
    assert torch.autograd.gradgradcheck(lambda y: mix_channels(y, shares, shift, 2), outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shift", [3, torch.tensor([[3]]), torch.tensor([[1], [2]])])
def test_dtype_and_memory_format_survive(dtype: torch.dtype, shift: Any) -> None:
    outputs = torch.randn(2, 8, 4, 4).to(dtype).to(memory_format=torch.channels_last)
    outputs.requires_grad_()
    mixed = mix_channels(outputs, torch.rand(2, 8), shift)
    assert mixed.dtype == dtype and mixed.stride() == outputs.stride()
    (gradient,) = torch.autograd.grad(mixed.float().square().sum(), outputs)
    assert gradient.dtype == dtype and gradient.stride() == outputs.stride()


# -- the draws -------------------------------------------------------------------------------------


def test_bits_are_fair_and_independent() -> None:
    rows, columns = torch.arange(400) * 0x3C6EF35F & 0xFFFFFFFF, torch.arange(500)
    bits = draw_bits(rows, columns)
    assert bits.min() >= 0 and bits.max() < 2**32
    signs = draw_ways(rows, columns[:64])
    assert signs.shape == (400, 512) and set(signs.unique().tolist()) == {-1.0, 1.0}
    for other in (torch.ones(()), signs.roll(1, 0), signs.roll(1, 1), signs.roll(8, 1)):
        assert abs((signs * other).mean()) < 4 / 204_800**0.5  # fair; neighbours independent
    shares = (bits >> 8).double() / 2**24
    counts = torch.histc(shares, 10, 0, 1)
    assert ((counts - 20_000).abs() < 4 * 20_000**0.5).all()
    assert torch.equal(bits[:, 7], draw_bits(rows, columns[7:8])[:, 0])


def test_shared_shifts_give_every_partner_the_same_chance() -> None:
    site = ConvSite("conv", depth=1, shape=(12, 2, 3, 3), groups=2)
    counts = torch.bincount(torch.tensor([shared_shift(site, 5, n) for n in range(5000)]))
    assert len(counts) == 6 and counts[0] == 0
    assert ((counts[1:] - 1000).abs() < 4 * 1000**0.5).all()
    alone = ConvSite("conv", depth=1, shape=(4, 2, 3, 3), groups=4)
    assert shared_shift(alone, 1, 2) == 0  # one kernel in each group


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.uint8, torch.complex64]
)
def test_a_fingerprint_tells_batches_apart_whatever_their_layout(dtype: torch.dtype) -> None:
    batch = (torch.rand(4, 3, 8, 8) * 200).to(dtype)
    other = batch.clone()
    other[0, 0, 0, 0] += 1
    assert fingerprint(batch) != fingerprint(other)
    assert fingerprint(batch) == fingerprint(batch.to(memory_format=torch.channels_last))


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_a_fingerprint_reads_what_torch_computes_later_and_what_is_sparse() -> None:
    waves = torch.fft.fft2(torch.randn(4, 3, 8, 8)).conj()
    assert fingerprint(waves) == fingerprint(waves.resolve_conj())
    assert fingerprint(waves.imag) == fingerprint(waves.imag.resolve_neg()) != fingerprint(waves)
    graph = torch.eye(4)
    assert fingerprint(graph.to_sparse()) == fingerprint(graph.to_sparse_csr()) == 4 * 0x3F800000


def test_draws_follow_seed_step_and_images_and_leave_the_global_generator_alone() -> None:
    def losses(seed: int = 0, steps: int = 3) -> list[float]:
        model, optimizer = made(direction="signed", seed=seed)
        optimizer.param_groups[0]["lr"] = 0.0
        found = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model(images()).square().sum()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    state = torch.get_rng_state()
    first = losses()
    assert torch.equal(torch.get_rng_state(), state)
    assert len(set(first)) == 3  # other pairs in each step, for the same images
    assert losses() == first != losses(seed=1)


def test_each_image_has_signs_of_its_own_unless_they_are_shared() -> None:
    twice = images(count=1).repeat(2, 1, 1, 1)
    for shared in (False, True):
        model, _ = made(direction="signed", shared_sign=shared)
        first, second = model(twice)
        assert torch.equal(first, second) == shared


@pytest.mark.parametrize("own", [False, True])
def test_partners_are_shared_by_the_batch_or_of_each_image(own: bool) -> None:
    conv, x = nn.Conv2d(3, 64, 1, bias=False), images(count=6).float()
    model, _ = made(
        network=conv, shared_partner=not own, merge_weight=0.0, include="", example_input=x
    )
    merged = model(x)
    plain = copy.deepcopy(model.module)(x)
    with torch.no_grad():  # with alpha = 0 each channel is its partner's
        partner = [
            [int((plain[n] - y).flatten(1).abs().sum(1).argmin()) for y in merged[n]]
            for n in range(6)
        ]
    shifts = [{(j - i) % 64 for i, j in enumerate(row)} for row in partner]
    assert all(len(shift) == 1 and shift != {0} for shift in shifts)
    assert (len(set.union(*shifts)) > 1) == own


# -- what is merged --------------------------------------------------------------------------------


def test_a_step_on_the_outputs_is_one_along_the_gradient_of_merged_kernels() -> None:
    """Against copies of the network, one for each image, with merged kernels in the weights."""
    model, _ = made(merge_weight=0.7)  # toward the partner, so that shares are known
    pairs = {name: sources.tolist() for name, (_, sources) in model.next_pairs().items()}  # type: ignore[union-attr]
    x = images()
    model.module.norm.eval()  # else the images of a batch depend on each other
    ours = gradients(model, lambda: model(x))
    plain = net()
    plain.norm.eval()

    def merged_forward() -> Tensor:
        def blended(name: str) -> Tensor:
            weight = plain.get_submodule(name).weight
            return weight + 0.3 * (weight[pairs[name]] - weight)

        weights = {f"{name}.weight": blended(name) for name in pairs}
        return torch.func.functional_call(plain, weights, (x,))

    theirs = gradients(plain, merged_forward)
    for one, other in zip(ours, theirs, strict=True):  # shares are float32
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-8)


def test_a_step_in_the_weights_is_the_references() -> None:
    model, optimizer = made("weights", similarity_threshold=0.0, merge_probability=0.6)
    for number in range(4):
        pairs = {
            name: list(zip(targets.tolist(), sources.tolist(), strict=True))  # type: ignore[union-attr]
            for name, (targets, sources) in model.next_pairs().items()
        }
        twin = copy.deepcopy(model.module)
        for hooks in (m._forward_hooks for m in twin.modules()):
            hooks.clear()
        for hooks in (m._forward_pre_hooks for m in twin.modules()):
            hooks.clear()
        before = {name: twin.get_submodule(name).weight.detach().clone() for name in pairs}
        for name, drawn in pairs.items():
            reference.merge_on(
                twin.get_submodule(name).weight, drawn, merge_weight=0.8, similarity_threshold=0.0
            )
        twin.zero_grad()
        twin(images(number)).square().mean().backward()
        step(model, optimizer, number)
        for name in pairs:
            gradient = twin.get_submodule(name).weight.grad
            expected = reference.forward_step(
                before[name],
                pairs[name],
                lambda _, g=gradient: g,
                lr=0.05,
                merge_weight=0.8,
                similarity_threshold=0.0,
            )
            torch.testing.assert_close(model.module.get_submodule(name).weight, expected)
    assert 0 < model.report().merged < model.report().drawn


class Folded(nn.Module):
    """Folds two frames of each image into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(torch.cat([x, x + 1]))


@pytest.mark.parametrize("mode", ["outputs", "weights"])
@pytest.mark.parametrize("threshold", [0.0, Quantile(0.5)])
@pytest.mark.parametrize("frames", [1, 2])
def test_a_threshold_compares_kernels_once_and_decides_for_all_images(
    mode: str, threshold: Any, frames: int
) -> None:
    network = net() if frames == 1 else Folded()
    model, optimizer = made(mode, network, similarity_threshold=threshold)
    step(model, optimizer, 0)
    for layer in model.report():
        kernels = model.module.get_submodule(layer.name).weight.shape[0]
        factor = 5 * frames if mode == "outputs" else 1
        assert layer.drawn == layer.compared == factor * kernels
        assert 0 < layer.merged < layer.drawn and layer.merged % factor == 0
        assert layer.mean_cosine is not None and abs(layer.mean_cosine) < 1


def test_a_quantile_in_the_weights_is_one_of_the_pairs_that_were_drawn() -> None:
    model, optimizer = made("weights", similarity_threshold=Quantile(0.5), merge_probability=0.4)
    expected = {}
    for name, (targets, sources) in model.next_pairs().items():
        kernels = model.module.get_submodule(name).weight.detach().flatten(1)
        cosines = nn.functional.cosine_similarity(kernels[targets], kernels[sources])
        expected[name] = int((cosines >= cosines.median()).sum()), len(targets)
    step(model, optimizer, 0)
    found = {layer.name: (layer.merged, layer.drawn) for layer in model.report()}
    assert found == expected and all(0 < merged < drawn for merged, drawn in found.values())


def test_a_radius_is_relative_to_the_kernel() -> None:
    conv = nn.Conv2d(3, 16, 3, bias=False).double()
    model, optimizer = made(network=conv, radius=0.25, include="")
    ((_, sources),) = model.next_pairs().values()
    assert sources is not None
    kernels = conv.weight.detach()
    shares = [
        0.25 * float(k.norm() / (kernels[j] - k).norm())
        for k, j in zip(kernels, sources.tolist(), strict=True)
    ]
    expected = reference.mixed_outputs(conv, images(), [sources.tolist()] * 5, [shares] * 5)
    torch.testing.assert_close(model(images()), expected, rtol=1e-6, atol=1e-6)
    assert optimizer.param_groups  # alive: a model merges as long as its optimizer exists


def test_a_users_own_direction_and_partner_are_objects_with_one_method() -> None:
    class TowardSimilar:
        """Moves a kernel the more, the more similar its partner is."""

        def weight(self, kernels: Tensor, partners: Tensor) -> Tensor:
            cosines = torch.nn.functional.cosine_similarity(kernels, partners)
            return 1.0 - 0.5 * cosines.clamp(min=0).unsqueeze(1)

    class Next:
        def sources(self, kernels: Tensor, targets: Tensor, groups: int) -> Tensor:
            size = len(kernels) // groups
            return targets - targets % size + (targets + 1) % size

    x = images()
    for mode, partner in (("outputs", "random"), ("weights", Next()), ("step", Next())):
        model, optimizer = made(mode, direction=TowardSimilar(), partner=partner)
        plain = net()
        before = plain(x)
        after = model(x) if mode != "step" else None
        if mode == "step":
            model.merge_()
            after = model.module(x)
        assert after is not None and not torch.allclose(before, after)
        step(model, optimizer, 0)
        assert model.report().merged == model.report().drawn > 0


class Sources:
    """A partner rule that returns what it was made with, for every target."""

    def __init__(self, source: Callable[[Tensor, int], Tensor]) -> None:
        self.source = source

    def sources(self, kernels: Tensor, targets: Tensor, groups: int) -> Tensor:
        return self.source(targets, len(kernels))


class Weight:
    def weight(self, kernels: Tensor, partners: Tensor) -> Tensor:
        return torch.full((len(kernels),), 0.8)  # square 1x1 kernels would broadcast it


@pytest.mark.parametrize("mode", ["weights", "step"])
@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ({"partner": Sources(lambda t, n: (t + n // 2) % n)}, "same group, here of 4 kernels"),
        ({"partner": Sources(lambda t, n: t)}, "another kernel of the same group"),
        ({"partner": Sources(lambda t, n: t - n)}, "gave kernel -8 of 8 as the partner of 0"),
        ({"partner": Sources(lambda t, n: t + n)}, "gave kernel 8 of 8 as the partner of 0"),
        ({"direction": Weight()}, r"one weight for each of the 8 pairs, of shape \(8, 1\), got"),
    ],
)
def test_a_users_rule_that_breaks_its_promise_is_refused(
    mode: str, rule: dict[str, Any], reason: str
) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 2, groups=2))
    only = "0" if "direction" in rule else "1"
    model, _ = made(mode, network, include=only, example_input=torch.randn(2, 8, 6, 6), **rule)
    with pytest.raises(ValueError, match=reason):
        model.merge_() if mode == "step" else model(torch.randn(2, 8, 6, 6))


FORMS: dict[str, Callable[[], nn.Module]] = {
    "weight_norm": lambda: parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Conv2d(8, 8, 3, padding=1)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Conv2d(8, 8, 1)),
    "standardised": lambda: StdConv2d(8, 8, 3, padding=1),
    "transposed": lambda: nn.ConvTranspose2d(8, 8, 3, padding=1),
    "grouped": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=4),
}


@pytest.mark.parametrize("mode", ["outputs", "weights"])
@pytest.mark.parametrize("form", FORMS)
def test_every_kind_of_layer_merges(form: str, mode: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 1), FORMS[form](), nn.ReLU(), nn.Conv2d(8, 2, 1))
    example = torch.randn(4, 3, 6, 6)
    model, optimizer = made(mode, network, example_input=example, direction="signed")
    assert "1" in [site.name for site in model.plan.merged]
    stored = {name: value.clone() for name, value in network.state_dict().items()}
    out = model(example)
    layer = model.report()["1"]
    assert layer.merged == layer.drawn > 0
    out.sum().backward()
    assert all(p.grad is not None for p in network[1].parameters())
    for name, value in network.state_dict().items():
        if "._v" not in name and "._u" not in name:  # a forward pass moves these estimates
            assert torch.equal(value, stored[name])
    kernels = layout_of(network[1]).shape(network[1].weight)
    assert len(kernels) == 4
    optimizer.step()


@pytest.mark.parametrize("mode", ["outputs", "weights"])
def test_a_network_of_computed_weights_alone_counts_its_steps(mode: str) -> None:
    """No step could write these weights, and the schedule must end all the same."""
    conv = parametrizations.orthogonal(nn.Conv2d(4, 4, 1))
    example = torch.randn(2, 4, 5, 5)
    model, optimizer = made(mode, conv, include="", example_input=example, schedule=Schedule(end=2))
    for _ in range(3):
        optimizer.zero_grad()
        model(example).square().sum().backward()
        optimizer.step()
    assert model.step == 3 and model.report()[""].steps == 3
    assert model.report().drawn == 2 * 4 * (2 if mode == "outputs" else 1)
    compared = compared_weights(find_layers(model.module, model.plan.merged))
    assert list(compared) == [".parametrizations.weight.original"], "what replicas compare"


def test_what_no_hook_can_reach_is_in_the_plan_with_its_reason() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Conv2d(3, 8, 3)
            self.called = nn.Conv2d(8, 8, 3)
            self.depthwise = nn.Conv2d(8, 8, 3, groups=8)

        def forward(self, x: Tensor) -> Tensor:
            x = nn.functional.conv2d(x, self.used.weight, self.used.bias)
            return self.depthwise(self.called(x).relu())

    plan = plan_merging(Functional(), shallow_layers=0, mode="outputs", also_merge=["depthwise"])
    reasons = {site.name: site.reason for site in plan.skipped}
    assert [site.name for site in plan.merged] == ["called"]
    assert "without calling the module, so that no hook runs" in (reasons["used"] or "")
    assert "its channels read different inputs" in (reasons["depthwise"] or "")
    in_step = plan_merging(Functional(), shallow_layers=0, also_merge=["depthwise"])
    assert len(in_step.merged) == 3
    with pytest.raises(ValueError, match=r"made for mode='step'.*, mode='outputs'\)"):
        InMergeWrapper(Functional(), mode="outputs", plan=in_step)
    with pytest.raises(ValueError, match=r"made for mode='outputs'.*, mode='step'\)"):
        InMergeWrapper(Functional(), plan=plan)
    model = InMergeWrapper.recommended(Functional(), total_steps=10, plan=plan)
    assert model.plan is plan and model.mode == "outputs"


def test_a_convolution_called_twice_merges_in_both_calls_alike() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x))

    network = Twice()
    batch = torch.randn(3, 4, 5, 5).double()
    model, optimizer = made(network=network, example_input=batch, merge_weight=0.6)
    sources = model.next_pairs()["conv"][1]
    assert sources is not None
    pairs, shares = [sources.tolist()] * 3, [[0.4] * 4] * 3
    once = reference.mixed_outputs(network.conv, batch, pairs, shares)
    expected = reference.mixed_outputs(network.conv, once, pairs, shares)
    torch.testing.assert_close(model(batch), expected, rtol=1e-6, atol=1e-6)
    assert model.report().drawn == 2 * 3 * 4 and optimizer.param_groups


def test_a_computed_weight_that_is_read_twice_in_a_call_is_counted_once() -> None:
    network = nn.Sequential(parametrizations.weight_norm(StdConv2d(3, 8, 3)), nn.Conv2d(8, 8, 3))
    example = torch.randn(2, 3, 8, 8)
    model, optimizer = made("weights", network, example_input=example)
    model(example)
    assert [layer.drawn for layer in model.report()] == [8, 8]
    assert optimizer.param_groups  # alive: a model merges as long as its optimizer exists


def test_a_batch_of_one_and_an_image_without_a_batch() -> None:
    conv = nn.Conv2d(3, 8, 3)
    x = torch.randn(1, 3, 6, 6)
    model, _ = made(network=conv, include="", direction="signed", example_input=x)
    assert model(x).shape == (1, 8, 4, 4) and model(x[0]).shape == (8, 4, 4)
    assert model.report().drawn == 16


# -- no weight is written --------------------------------------------------------------------------


def doings(model: InMergeWrapper, optimizer: torch.optim.Optimizer) -> Iterator[str]:
    """What may happen between two steps of a training loop, one thing after the other."""
    x = images().float()
    with torch.no_grad():
        model(x)
    yield "a pass without gradients"
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            model(x)
        loss = model(x).float().square().mean()
    yield "both kinds of pass in one autocast region"
    average = torch.optim.swa_utils.AveragedModel(model.module)
    average.update_parameters(model.module)
    yield "an average in the middle of a step"
    loss.backward()
    yield "the backward pass"
    pickle.loads(pickle.dumps(model.module.state_dict()))
    copy.deepcopy(model)
    yield "copies"
    with pytest.warns(FutureWarning, match=r"torch\.jit\.trace"):
        torch.jit.trace(model.eval().module, x, check_trace=False)
    model.train()
    yield "a trace between backward pass and step"
    checkpoint(model, x.clone().requires_grad_(), use_reentrant=True).sum().backward()
    yield "a checkpoint around the model"
    with pytest.raises(KeyboardInterrupt):
        interrupted(model, x)
    yield "an interrupt in the middle of a forward pass"


def interrupted(model: InMergeWrapper, x: Tensor) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    last = model.module.get_submodule(model.plan.merged[-1].name)
    for place in (last.register_forward_pre_hook, last.register_forward_hook):
        handle = place(stop)
        try:
            model(x)
        finally:
            handle.remove()


@pytest.mark.parametrize("mode", ["outputs", "weights"])
def test_no_parameter_is_ever_written(mode: str) -> None:
    model, optimizer = made(mode, net().float(), direction="signed", example_input=images().float())
    for _ in range(2):
        versions = {name: p._version for name, p in model.named_parameters()}
        whole = {name: p.detach().clone() for name, p in model.named_parameters()}
        parameters = {name: id(p) for name, p in model.named_parameters()}
        for what in doings(model, optimizer):
            for name, parameter in model.named_parameters():
                assert parameter._version == versions[name], what
                assert torch.equal(parameter, whole[name]) and id(parameter) == parameters[name]
            for module in model.modules():
                assert "weight" not in vars(module), what
        optimizer.step()
        optimizer.zero_grad()
    assert model.report().merged > 0


@pytest.mark.parametrize("mode", ["outputs", "weights"])
def test_another_thread_reads_the_weights_as_they_are(mode: str) -> None:
    model, optimizer = made(mode, direction="signed")
    optimizer.param_groups[0]["lr"] = 0.0
    whole = [p.detach().clone() for p in model.parameters()]
    wrong, stop = [], threading.Event()

    def reads() -> None:
        while not stop.is_set():
            state = [v for n, v in model.state_dict().items() if "norm" not in n]
            read = [v for v in state if v.ndim == 4]
            wrong.extend(
                v for v in read if not any(torch.equal(v, w) for w in whole if w.ndim == 4)
            )

    reader = threading.Thread(target=reads)
    reader.start()
    for number in range(10):
        step(model, optimizer, number)
    stop.set()
    reader.join()
    assert not wrong


def test_autocast_in_any_order_gives_the_gradient_of_merged_kernels() -> None:
    """Autocast keeps half-precision copies of weights: what changes a weight is not seen."""
    found = []
    for first in (False, True):
        model, _ = made(network=net().float(), example_input=images().float())
        with torch.autocast("cpu", torch.bfloat16):
            if first:
                with torch.no_grad():
                    model.eval()(images().float())
            model.train()
            loss = model(images().float()).float().square().sum()
        loss.backward()
        found.append([p.grad for p in model.parameters()])
        assert model.report().merged > 0
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("mode", ["outputs", "weights"])
def test_evaluation_is_plain(mode: str) -> None:
    model, optimizer = made(mode, direction="signed")
    step(model, optimizer, 0)
    model.eval()
    assert torch.equal(model(images()), copy.deepcopy(model.module)(images()))
    before = model.report().drawn
    model.train()
    model.module.eval()  # BatchNorm frozen by hand, inside a wrapper in train mode
    model(images())
    assert model.report().drawn == before  # nothing is counted that did not act


def test_an_empty_batch_passes() -> None:
    model, _ = made(direction="signed")
    assert model(images(count=0)[:, :, :9]).shape == (0, 4)
    assert model.report().drawn == 0


def test_passes_are_counted_however_often_the_counts_are_read() -> None:
    model, optimizer = made()
    for number in range(4):
        optimizer.zero_grad()
        for _ in range(2):  # of a gradient that is accumulated
            model(images(number)).sum().backward()
            for _ in range(2):
                assert {layer.passes for layer in model.report()} == {number + 1}
        optimizer.step()
        assert {layer.passes for layer in model.report()} == {number + 1}


def test_a_layer_is_merged_as_long_as_its_weight_is_trained() -> None:
    model, _ = made()
    model.module.stem.weight.requires_grad_(False)  # after attach
    model(images())
    assert [layer.drawn > 0 for layer in model.report()] == [False, True, True]
    model.module.stem.weight.requires_grad_(True)
    model(images())
    assert [layer.drawn for layer in model.report()] == [5 * 8, 10 * 12, 10 * 6]
    network = net()
    parametrizations.weight_norm(network.stem)
    network.stem.bias.requires_grad_(False)  # the first parameter, which is not merged
    model, _ = made(network=network)
    model(images())
    assert all(layer.drawn for layer in model.report())


class Called(nn.Module):
    """A network whose arguments and result are whatever its test needs."""

    def __init__(self, inner: nn.Module, result: Callable[[Tensor], Any] = lambda x: x) -> None:
        super().__init__()
        self.inner, self.result = inner, result

    def forward(self, *, labels: Tensor | None = None, pixels: Any) -> Any:
        return self.result(self.inner(getattr(pixels, "tensors", pixels)))


@pytest.mark.parametrize("held", [False, True])
def test_draws_follow_the_images_wherever_they_are_in_the_call(held: bool) -> None:
    """Labels come first in the batches of transformers, and DETR's images are in an object."""
    model, _ = made(network=Called(net()), direction="signed",
                    example_input={"pixels": images()})  # fmt: skip

    def mixed(number: int) -> Tensor:
        pixels = types.SimpleNamespace(tensors=images(number)) if held else images(number)
        found = []
        hook = model.module.inner.stem.register_forward_hook(lambda *a: found.append(a[2]))
        model(labels=torch.arange(5) + number, pixels=pixels)
        hook.remove()
        plain = model.module.inner.stem._conv_forward(
            images(number), model.module.inner.stem.weight, model.module.inner.stem.bias
        )
        shift = model.next_pairs()["inner.stem"][1]
        return ((found[0] - plain) / (plain[:, shift] - plain)).mean((2, 3)).sign()

    signs = [mixed(number) for number in (0, 1)]
    assert 0.2 < float((signs[0] == signs[1]).double().mean()) < 0.8


@dataclass
class Output:
    logits: Any


@pytest.mark.parametrize(
    "activation", [torch.relu, torch.relu_, nn.functional.leaky_relu_, nn.ReLU(inplace=True)]
)
@pytest.mark.parametrize("computed", [False, True])
def test_a_convolution_that_goes_on_after_itself_is_left_out_of_the_outputs(
    activation: Callable[[Tensor], Tensor], computed: bool
) -> None:
    class Conv2d(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return activation(super().forward(x))

    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), Conv2d(8, 8, 3), Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
    )
    if computed:
        for conv in network:
            nn.utils.parametrizations.weight_norm(conv)
    plan = plan_merging(network, mode="outputs", shallow_layers=0, example_input=images().float())
    assert [site.name for site in plan.merged] == ["0", "3"]
    assert all("goes on after its convolution" in str(site.reason) for site in plan.skipped)
    other = plan_merging(network, mode="weights", shallow_layers=0, example_input=images().float())
    assert len(other.merged) == 4


def test_hooks_leave_the_network_with_the_last_optimizer() -> None:
    model, optimizer = made()
    others = [torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2)]
    handles = [model.attach(other) for other in others]
    convolutions = [m for m in model.module.modules() if isinstance(m, nn.Conv2d)]
    for handle in handles:
        handle.remove()
    assert all(conv._forward_hooks for conv in convolutions)
    model.attach(optimizer).remove()
    assert not any(conv._forward_hooks or conv._forward_pre_hooks for conv in convolutions)
    model.attach(optimizer)
    step(model, optimizer, 0)
    assert model.report().merged > 0


def test_a_layer_that_was_replaced_before_attach_is_named() -> None:
    model = InMergeWrapper(net(), mode="outputs", **ALWAYS, example_input=images())
    model.module.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)).double()
    with pytest.raises(ValueError, match="has no convolution 'stem'"):
        model.attach(torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("mode", ["outputs", "weights"])
def test_a_weight_that_is_computed_in_a_way_of_ones_own_is_merged_and_inspected(mode: str) -> None:
    class Low(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = nn.Parameter(torch.randn(8, 2).double())
            self.right = nn.Parameter(torch.randn(2, 27).double())

        def forward(self, weight: Tensor) -> Tensor:
            return weight + (self.left @ self.right).reshape(weight.shape)

    network = net()
    nn.utils.parametrize.register_parametrization(network.stem, "weight", Low())
    model, optimizer = made(mode, network=network, inspect_every=1)
    step(model, optimizer, 0)
    assert model.report()["stem"].merged > 0
    assert {entry.name for entry in model.history} == {"stem", "grouped", "last"}


CHANGES: dict[str, tuple[Callable[[nn.Module], Any], Callable[[nn.Module], Any]]] = {
    "parametrization": (
        lambda conv: parametrize.register_parametrization(conv, "weight", nn.Identity()),
        lambda conv: parametrize.remove_parametrizations(conv, "weight"),
    ),
    "pruning": (
        lambda conv: prune.identity(conv, "weight"),
        lambda conv: prune.remove(conv, "weight"),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_computes_a_weight_may_come_and_go_after_attach_but_not_unnoticed(change: str) -> None:
    add, remove = CHANGES[change]
    model, optimizer = made("weights", direction="signed")
    expected = model(images())
    model, optimizer = made("weights", direction="signed")
    plain = model.module(images())
    add(model.module.last)
    with pytest.raises(RuntimeError, match=r"last: .* call model.attach\(optimizer\) again"):
        model(images())
    assert torch.equal(model.module(images()), plain)
    model.attach(optimizer)
    assert torch.allclose(model(images()), expected)
    remove(model.module.last)
    assert torch.allclose(model(images()), expected)
    assert not torch.allclose(expected, plain)


def test_layers_in_eval_mode_are_reported_as_what_they_are_not_merged() -> None:
    model, optimizer = made()
    with pytest.warns(NoEffectWarning, match="no pair was drawn in 100 steps; call the wrapper"):
        for number in range(100):
            model.train()
            model.module.eval()
            step(model, optimizer, number)
    assert model.report().drawn == model.report().merged == 0


# -- passes that are run again ---------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["outputs", "weights"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("where", ["around", "inside"])
def test_recomputed_activations_draw_the_same(mode: str, reentrant: bool, where: str) -> None:
    """Two micro-batches before one backward pass, so that the second must not answer for both."""
    settings = {"direction": "signed", "shared_partner": mode == "weights"}
    first, second = images(1).requires_grad_(), images(2).requires_grad_()
    model, _ = made(mode, **settings)
    plain = gradients(model, lambda: torch.cat([model(first), model(second)]))
    again, _ = made(mode, **settings)
    if where == "around":

        def forward(x: Tensor) -> Tensor:
            return checkpoint(again, x, use_reentrant=reentrant)
    else:
        repeat_features(again.module, reentrant)
        forward = again
    repeated = gradients(again, lambda: torch.cat([forward(first), forward(second)]))
    for one, other in zip(plain, repeated, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert again.report().drawn == model.report().drawn  # counted once


@pytest.mark.parametrize("mode", ["outputs", "weights"])
def test_an_interrupted_backward_pass_leaves_nothing_to_the_next(mode: str) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    found = []
    for interrupts in (False, True):
        model, _ = made(mode, direction="signed")
        kept: list[Tensor] = []
        repeat_features(model.module, reentrant=False)
        model.module.head.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0]))
        if interrupts:
            loss = model(images(1)).sum()
            handle = model.module.last.register_forward_pre_hook(stop)
            with pytest.raises(KeyboardInterrupt):
                loss.backward()
            handle.remove()
        model.zero_grad()
        model(images(2))
        kept[-1].square().sum().backward()  # no output leads to the draws of this pass
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert all("weight" not in vars(module) for module in model.modules())
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("mode", ["outputs", "weights"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_result_in_an_object_is_followed_into_the_backward_pass(
    mode: str, reentrant: bool
) -> None:
    found = []
    for again in (False, True):
        network = Called(net(), Output)
        model, _ = made(mode, network, direction="signed", example_input={"pixels": images()})
        if again:
            repeat_features(network.inner, reentrant)
        x = images(1).requires_grad_()
        found.append(gradients(model, lambda m=model, x=x: m(pixels=x).logits))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("mode", ["outputs", "weights"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_loss_of_features_alone_repeats_the_draws_of_their_pass(
    mode: str, reentrant: bool
) -> None:
    found = []
    for again in (False, True):
        model, _ = made(mode, direction="signed")
        kept: list[Tensor] = []
        if again:
            repeat_features(model.module, reentrant)
        model.module.head.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0]))
        for number in (1, 2):  # micro-batches, and the second of them twice

            def features(
                model: nn.Module = model, number: int = number, kept: list[Tensor] = kept
            ) -> Tensor:
                model(images(number).requires_grad_())
                return kept[-1]

            found.append(gradients(model, features))
        model.zero_grad()
        features().square().sum().backward(retain_graph=True)
        kept[-1].square().sum().backward()
        found.append([p.grad.clone() / 2 for p in model.parameters() if p.grad is not None])
    half = len(found) // 2
    for plain, repeated in zip(found[:half], found[half:], strict=True):
        for one, other in zip(plain, repeated, strict=True):
            torch.testing.assert_close(one, other)


def test_a_pass_that_cannot_be_found_is_an_error_where_it_would_matter() -> None:
    network = Called(net(), lambda x: Output(Output(Output(x))))
    model, optimizer = made(network=network, direction="signed", example_input={"pixels": images()})
    x = images().requires_grad_()

    def two() -> Tensor:
        first, second = (model(pixels=x + n).logits.logits.logits for n in (0, 1))
        return first + second

    gradients(model, two)
    optimizer.step()
    repeat_features(network.inner, reentrant=True)
    with pytest.raises(RuntimeError, match="cannot be found which of 2, so"):
        gradients(model, two)


@pytest.mark.parametrize("mode", ["outputs", "weights"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("order", [(0, 1), (1, 0), (1, 0, 1)])
def test_a_plain_pass_beside_a_merged_one_is_repeated_plain(
    mode: str, reentrant: bool, direct: bool, order: Sequence[int]
) -> None:
    """The loss of one pass, or of both: a plain branch beside a merged one."""
    found = []
    for again in (False, True):
        model, _ = made(mode, direction="signed")
        if again:
            repeat_features(model.module, reentrant)

        def passed(is_plain: int, model: InMergeWrapper = model) -> Tensor:
            x = images(is_plain).requires_grad_()
            if not is_plain:
                return model(x)
            if direct:
                return model.module(x)
            with model.paused():
                return model(x)

        found += gradients(model, lambda passed=passed: torch.stack([*map(passed, order)]))
        for is_plain in order:
            found += gradients(model, partial(passed, is_plain))
    half = len(found) // 2
    for one, other in zip(found[:half], found[half:], strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("mode", ["outputs", "weights"])
def test_a_checkpoint_around_a_paused_model_is_repeated_plain(mode: str) -> None:
    """Its backward pass comes when the block has ended."""
    found = []
    for again in (False, True):
        model, _ = made(mode, direction="signed")
        merged = model(images(1).requires_grad_())
        with model.paused():
            x = images(2).requires_grad_()
            plain = checkpoint(model, x, use_reentrant=False) if again else model(x)
        found.append(gradients(model, lambda both=(merged, plain): torch.cat(both)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("mode", ["outputs", "weights"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_networks_that_share_convolutions_repeat_their_own_draws(
    mode: str, reentrant: bool
) -> None:
    found = []
    for again in (False, True):
        networks = [net(), net()]
        networks[1].stem, networks[1].grouped = networks[0].stem, networks[0].grouped
        pairs = [made(mode, n, direction="signed", seed=seed) for seed, n in enumerate(networks)]
        for network in networks if again else ():
            repeat_features(network, reentrant)
        first, second = (model for model, _ in pairs)
        both = nn.ModuleList([first, second])
        x = images().requires_grad_()
        found.append(gradients(both, lambda a=first, b=second, x=x: a(x) + 2 * b(x)))
        found.append(gradients(both, lambda a=first, b=second, x=x: b(x) - a(x)))
    for plain, repeated in zip(found[:2], found[2:], strict=True):
        for expected, actual in zip(plain, repeated, strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_backward_pass_that_raised_leaves_no_draw_to_the_next(reentrant: bool) -> None:
    """As after an error for want of memory, with a loss of features alone."""
    found = []
    for again in (False, True):
        model, _ = made(direction="signed")
        kept: list[Tensor] = []
        if again:
            repeat_features(model.module, reentrant)
        model.module.head.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0]))
        handle = model.module.grouped.weight.register_hook(lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(images(1).requires_grad_()).sum().backward()
        handle.remove()

        def features(model: nn.Module = model, kept: list[Tensor] = kept) -> Tensor:
            model(images(2).requires_grad_())
            return kept[-1]

        found.append(gradients(model, features))
    for plain, repeated in zip(*found, strict=True):
        torch.testing.assert_close(plain, repeated)


def step_in_the_backward_pass(model: InMergeWrapper, lr: float) -> None:
    """Gives each parameter an attached optimizer that steps as soon as its gradient is there."""
    each = {p: torch.optim.SGD([p], lr=lr) for p in model.parameters()}

    def steps(parameter: Tensor) -> None:
        each[parameter].step()
        parameter.grad = None

    for parameter, optimizer in each.items():
        model.attach(optimizer)
        parameter.register_post_accumulate_grad_hook(steps)


@pytest.mark.parametrize("settings", [{}, {"radius": 0.3}, {"mode": "weights"}])
def test_optimizers_in_the_backward_pass_leave_what_is_repeated_alone(
    settings: dict[str, Any],
) -> None:
    found = []
    for again in (False, True):
        model, _ = made(direction="signed", **settings)
        if again:
            repeat_features(model.module, reentrant=False)
        step_in_the_backward_pass(model, lr=0.1)
        for number in range(3):
            model(images(number)).square().mean().backward()
        found.append(list(model.parameters()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_counts_go_to_another_device_with_the_network() -> None:
    counts = Counts(2, torch.device("cpu"))
    counts.add(1, 40, torch.tensor(30))
    counts.add_cosines(1, torch.tensor([0.5, torch.nan, 0.25]), 2)
    counts.add_all(0, 7)
    counts.end_pass(is_repeated=False)
    there = Counts(2, torch.device("cpu"))
    there.take_over(counts)
    numbers, cosines = there.take()
    assert numbers.tolist() == [[7, 7, 0, 0], [40, 30, 2, 4]]
    assert cosines.tolist() == [[0.0, -2.0], [1.5, 0.5]]


def test_layers_on_two_devices_merge_where_they_are() -> None:
    network = net()
    model, _ = made(network=network, direction="signed")
    network.last.to("meta")
    network.forward = lambda x: network.last(  # type: ignore[method-assign]
        network.grouped(network.norm(network.stem(x)).relu()).relu().to("meta")
    )
    assert model(images()).device.type == "meta"


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "outputs", "similarity_threshold": 0.0},
        {"mode": "outputs", "merge_probability": 0.5},
        {"mode": "weights"},
    ],
)
def test_a_network_may_go_to_its_device_after_attach(settings: dict[str, Any]) -> None:
    """As in Accelerate's prepare(). Fake tensors check which devices meet, and need no GPU."""
    conv = nn.Conv2d(3, 8, 3)
    example = torch.randn(2, 3, 6, 6)
    model, optimizer = made(network=conv, include="", example_input=example, **settings)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for name, parameter in list(conv.named_parameters()):
            setattr(conv, name, nn.Parameter(torch.empty_like(parameter, device="cuda")))
        assert model(torch.empty_like(example, device="cuda")).device.type == "cuda"
    assert optimizer.param_groups  # alive: a model merges as long as its optimizer exists


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "outputs", "direction": "signed"},
        {"mode": "outputs", "similarity_threshold": 0.0, "radius": 0.3, "direction": "signed"},
        {"mode": "weights", "direction": "signed", "radius": 0.3},
    ],
)
def test_one_whole_graph_is_compiled_once_for_all_steps(
    settings: dict[str, Any], inside: bool
) -> None:
    torch._dynamo.reset()
    eager, first = made(**settings)
    # The graphs are what is tested here; the compiler behind them would take a minute.
    compile_whole = partial(torch.compile, fullgraph=True, backend="aot_eager")
    model, second = made(**settings, network=compile_whole(net()) if inside else net())
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = model if inside else compile_whole(model)
    for number in range(4):
        step(eager, first, number)
        step(compiled, second, number)
    assert counters["stats"]["unique_graphs"] == 1
    for one, other in zip(eager.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
    reports = [[(layer.drawn, layer.merged) for layer in m.report()] for m in (eager, model)]
    assert reports[0] == reports[1] and all(merged > 0 for _, merged in reports[0])


@pytest.mark.parametrize(
    "settings",
    [
        {"direction": "signed"},
        {"mode": "weights", "direction": "signed", "radius": 0.3},
        {"mode": "weights", "direction": "gaussian", "radius": 0.3},
    ],
)
def test_a_captured_pass_repeats_no_draw(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CUDA graph repeats the operations on the tensors of the capture, as a trace does."""
    eager, first = made(**settings)
    model, second = made(**settings)
    inputs = images(0)
    for each, optimizer in ((eager, first), (model, second)):
        each(inputs).sum().backward()
        optimizer.step()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    graph = make_fx(lambda x: model(x))(inputs)
    monkeypatch.undo()
    counted = model.report().merged
    seen = []
    for _ in range(3):
        expected = eager(inputs)
        seen.append(graph(inputs))
        torch.testing.assert_close(seen[-1], expected)
        for each, optimizer in ((eager, first), (model, second)):
            each.zero_grad()
            optimizer.step()
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    assert model.report().merged > counted
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"would repeat .* run optimizer\.step\(\) outside"):
        second.step()


@pytest.mark.parametrize("mode", ["outputs", "weights"])
@pytest.mark.parametrize("strict", [False, True])
def test_a_model_that_merges_cannot_be_exported_with_its_draw(mode: str, strict: bool) -> None:
    model, _ = made(mode=mode)
    inputs = images()
    with pytest.raises(Exception, match="pairs of one forward pass for good"):
        torch.export.export(model, (inputs,), strict=strict)
    with pytest.warns(FutureWarning), pytest.raises(RuntimeError, match="for good"):
        torch.jit.trace(model, inputs)
    model.eval()
    program = torch.export.export(model, (inputs,), strict=strict)
    torch.testing.assert_close(program.module()(inputs), model.module(inputs))


@pytest.mark.parametrize("mode", ["outputs", "weights"])
@pytest.mark.parametrize("detached", [False, True])
def test_a_network_that_was_compiled_without_hooks_merges_with_them(
    mode: str, detached: bool
) -> None:
    network = torch.compile(net(), backend="eager")
    model = InMergeWrapper(network, mode=mode, example_input=images(), **ALWAYS)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    if detached:
        handle = model.attach(optimizer)
        step(model, optimizer, 0)
        handle.remove()
    model(images()).sum().backward()  # in train mode and plain
    before = model.report().drawn
    model.attach(optimizer)
    step(model, optimizer, 1)
    assert model.report().drawn - before == (130 if mode == "outputs" else 26)


@pytest.mark.parametrize("mode", ["outputs", "weights"])
@torch._dynamo.config.patch(skip_nnmodule_hook_guards=True)  # as in a new process
def test_a_compiled_network_does_not_take_the_graph_of_a_plain_one(mode: str) -> None:
    """A process that compares has two networks of a class, one of which merges."""
    torch._dynamo.reset()
    eager, first = made(mode=mode)
    torch._dynamo.config.skip_nnmodule_hook_guards = True  # type: ignore[assignment]
    plain, network = (torch.compile(net(), backend="eager") for _ in range(2))
    model, second = made(mode=mode, network=network)
    for number in range(3):
        plain(images(number))
        step(eager, first, number)
        step(model, second, number)
    for one, other in zip(eager.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    assert model.report().merged == eager.report().merged > 0


def test_a_compiled_backward_pass_draws_nothing_again() -> None:
    wide = [nn.Conv2d(8, 64, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    network = nn.Sequential(nn.Conv2d(3, 8, 3), *wide, nn.Conv2d(64, 96, 1), nn.ReLU())
    model, optimizer = made(network=network.double(), direction="signed")
    found: dict[str, list[str]] = {}

    def keep(name: str, graph: torch.fx.GraphModule, _: Any) -> Any:
        found[name] = [str(node.target) for node in graph.graph.nodes if "xor" in str(node.target)]
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=partial(keep, "forward"),
        bw_compiler=partial(keep, "backward"),
        decompositions=select_decomp_table(),
        partition_fn=min_cut_rematerialization_partition,  # what is cheap is computed again
    )
    torch._dynamo.reset()
    step(torch.compile(model, fullgraph=True, backend=backend), optimizer, 0)
    assert found["forward"] and not found["backward"]


def test_a_compiler_keeps_the_memory_format_of_the_gradient() -> None:
    """It would transpose it, and back again for the convolution, in every layer."""

    def gradient(outputs: Tensor, given: Tensor, *places: Tensor) -> tuple[Tensor, Tensor]:
        mixed = mix_channels(outputs, torch.full_like(outputs[:, :, 0, 0], 0.2), places)
        return mixed, torch.autograd.grad(mixed.relu().square(), outputs, given)[0]

    maps = torch.rand(2, 8, 5, 5).requires_grad_(), torch.rand(2, 8, 5, 5)
    places = torch.arange(8).roll(-3), torch.arange(8).roll(3)
    graph = make_fx(gradient, select_decomp_table(), tracing_mode="fake")(*maps, *places)
    # It chooses the format after the trace, and asks each operation of it for that of its result.
    last = [each.detach().to(memory_format=torch.channels_last) for each in maps]
    FakeTensorProp(graph).propagate(*last, *places)
    (returned,) = next(node for node in graph.graph.nodes if node.op == "output").args
    for node in returned:
        assert node.meta["val"].is_contiguous(memory_format=torch.channels_last)


def test_a_whole_graph_begins_and_ends_with_the_schedule() -> None:
    schedule = Schedule(start=1, end=3)
    torch._dynamo.reset()
    eager, first = made(direction="signed", schedule=schedule)
    model, second = made(direction="signed", schedule=schedule)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for number in range(5):
        step(eager, first, number)
        step(compiled, second, number)
    for one, other in zip(eager.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
    drawn = [layer.drawn for layer in model.report()]
    assert drawn == [layer.drawn for layer in eager.report()] == [2 * 5 * n for n in (8, 12, 6)]


@pytest.mark.parametrize("gone", [False, True])
def test_a_compiled_network_without_an_optimizer_is_plain(gone: bool) -> None:
    model, optimizer = made(direction="signed")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    plain = model.module(images())
    assert not torch.allclose(compiled(images()), plain)
    twin = torch.compile(copy.deepcopy(model), backend="aot_eager")
    torch.testing.assert_close(twin(images()), plain)
    if gone:
        del optimizer
    else:
        model.attach(optimizer).remove()
    torch.testing.assert_close(compiled(images()), plain)
    model.attach(torch.optim.SGD(model.parameters(), lr=0.05))
    assert torch.allclose(compiled(images()), plain)  # the new optimizer is gone at once
    kept = torch.optim.SGD(model.parameters(), lr=0.05)
    model.attach(kept)
    assert not torch.allclose(compiled(images()), plain)


# -- optimizers ------------------------------------------------------------------------------------


def test_second_derivatives_and_optimizers_in_the_backward_pass() -> None:
    model, _ = made(direction="signed")
    loss = model(images()).square().mean()
    first = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), list(model.parameters()))
    assert all(g.isfinite().all() for g in second)
    step_in_the_backward_pass(model, lr=0.01)
    before = model.step
    for number in range(3):
        model(images(number)).square().mean().backward()
    assert model.step == before + 3


def test_adahessian_and_lbfgs_train() -> None:
    from timm.optim import Adahessian

    for make in (
        lambda p: Adahessian(p, lr=0.1),
        lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4),
    ):
        model, _ = made(direction="signed")
        optimizer: Any = make(list(model.parameters()))
        model.attach(optimizer)
        losses = []

        def closure(model: InMergeWrapper = model, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = (model(images()) - 1).square().mean()
            second_order = isinstance(optimizer, Adahessian)
            loss.backward(create_graph=second_order)
            losses.append(loss.item())  # noqa: B023
            return loss

        for _ in range(5):
            if isinstance(optimizer, Adahessian):
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", ".*create_graph=True")
                    closure()
                optimizer.step()
            else:
                optimizer.step(closure)
        assert losses[-1] < losses[0] and model.step == 5


def test_an_average_taken_after_a_skipped_step_holds_the_weights() -> None:
    model, _ = made()
    average = torch.optim.swa_utils.AveragedModel(model.module)
    average.update_parameters(model.module)
    model(images()).sum().backward()
    average.update_parameters(model.module)  # the scaler skipped the step
    for one, other in zip(average.module.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("mode", ["outputs", "weights"])
def test_a_batch_without_a_step_leaves_what_a_schedule_free_optimizer_evaluates(mode: str) -> None:
    found = []
    for last_batch in (False, True):
        model = InMergeWrapper(net(), mode=mode, **ALWAYS, example_input=images())  # type: ignore[arg-type]
        optimizer = AdamWScheduleFree(model.parameters(), lr=0.01)
        model.attach(optimizer)
        optimizer.train()
        for number in range(3):
            step(model, optimizer, number)
        if last_batch:
            model(images(3)).square().mean().backward()
        for change in (optimizer.eval, optimizer.train):
            change()
            found.append([parameter.detach().clone() for parameter in model.parameters()])
    for without, after in zip(found[:2], found[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(without, after, strict=True))
    assert not torch.equal(found[0][0], found[1][0])  # evaluated and trained weights differ


# -- schedule, pause, reset, resume ----------------------------------------------------------------


def test_it_fades_and_ends() -> None:
    fade = Schedule(end=4, decay="linear", anneals="strength")
    model, optimizer = made(schedule=fade)
    sizes = []
    for number in range(6):
        with torch.no_grad():
            plain = copy.deepcopy(model.module)
            moved = model(images()) - plain(images())
        sizes.append(float(moved.abs().max()))
        step(model, optimizer, number)
    assert sizes[4] == sizes[5] == 0.0 and all(size > 0 for size in sizes[:4])
    assert sizes[0] > sizes[3]
    assert not model.statistics_lag and model.report().ended == 4


def test_a_head_that_is_trained_alone_counts_the_steps_of_what_merges_before_it() -> None:
    model = made(schedule=Schedule(end=2))[0]
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.05)
    model.attach(optimizer)
    step(model, optimizer, 0)
    other = torch.optim.SGD(model.last.parameters(), lr=0.05)
    model.attach(other)
    optimizer.step()  # of two, the one that trains a merged layer counts
    assert model.step == 1
    del other
    for number in (1, 2):
        step(model, optimizer, number)
    assert model.step == 3 and model.report()["last"].drawn == 2 * 5 * 6


def test_a_pass_under_paused_merges_nothing_for_a_step_outside_of_it() -> None:
    model, optimizer = made()
    step(model, optimizer, 0)
    with model.paused():
        loss = model(images(1)).square().mean()
    loss.backward()
    with pytest.warns(NoEffectWarning, match=r"merged before the step.* outside of paused\(\)"):
        optimizer.step()
    step(model, optimizer, 2)
    assert {(layer.steps, layer.passes) for layer in model.report()} == {(3, 2)}


def test_paused_trains_plainly_and_the_schedule_waits() -> None:
    model, optimizer = made(schedule=Schedule(end=2))
    plain = net()
    with model.paused():
        assert torch.equal(model(images()), plain(images()))
        for number in range(5):
            step(model, optimizer, number)
    assert model.step == 0 and model.report().drawn == 0
    step(model, optimizer, 5)
    assert model.step == 1 and model.report().merged > 0


@pytest.mark.parametrize("mode", ["step", "outputs"])
def test_a_restarted_wrapper_begins_again_in_each_fold(mode: str) -> None:
    model, optimizer = made(mode, schedule=Schedule(end=3))
    drawn = []
    for fold in range(3):
        if fold:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
            with pytest.warns(NoEffectWarning, match="schedule ended at step 3"):
                model.attach(optimizer)
            model.restart()
        for number in range(4):
            step(model, optimizer, number)
        drawn.append(model.report().drawn)
    assert drawn[0] == drawn[1] == drawn[2] > 0


@pytest.mark.parametrize("mode", ["outputs", "weights"])
def test_a_resumed_run_continues_to_the_bit(mode: str) -> None:
    fade = Schedule(end=8, decay="cosine", anneals="strength")
    straight, optimizer = made(mode, direction="signed", schedule=fade)
    for number in range(3):
        step(straight, optimizer, number)
    saved = copy.deepcopy(straight.state_dict()), copy.deepcopy(optimizer.state_dict())
    for number in range(3, 6):
        step(straight, optimizer, number)
    resumed, optimizer = made(mode, direction="signed", schedule=fade)
    resumed.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    for number in range(3, 6):
        step(resumed, optimizer, number)
    for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    assert straight.report() == resumed.report()


# -- nothing silent --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"direction": "gaussian", "radius": 0.3}, "no form on the outputs"),
        ({"partner": "most_similar"}, "needs mode='step' or 'weights'"),
        ({"keep_norm": True}, "keep_norm=True needs mode='step' or 'weights'"),
        ({"merge_momentum": True}, "no effect with mode='outputs'"),
        ({"compiled": True}, r"use torch\.compile\(model\)"),
        ({"shared_partner": False, "radius": 0.3}, "shared_partner=False needs a constant size"),
        ({"shared_partner": False, "similarity_threshold": 0.3}, "compares nothing"),
        ({"mode": "step", "shared_partner": False}, "shared_partner=False needs mode='outputs'"),
        ({"mode": "weights", "shared_sign": True}, "shared_sign=True needs mode='outputs'"),
        ({"shared_sign": True}, "shared_sign=True has no effect with direction='partner'"),
        ({"mode": "step", "direction": Weight(), "compiled": True}, "whose pass is not compiled"),
        ({"mode": "step", "direction": "gaussian"}, "set radius, for example radius=0.3"),
        ({"merge_weight": 0.7, "radius": 0.3}, "set one of the two"),
        ({"mode": "both"}, "mode must be 'step' or 'outputs' or 'weights', got 'both'"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(**{"mode": "outputs", **settings})


@pytest.mark.parametrize("mode", ["outputs", "weights"])
def test_weights_must_be_placed_before_an_optimizer_is_attached(mode: str) -> None:
    with torch.device("meta"):
        network = Net().double()
    model = InMergeWrapper(network, mode=mode, example_input=images(), **ALWAYS)  # type: ignore[arg-type]
    first = torch.optim.SGD(model.parameters(), lr=0.05)
    model.attach(first)
    assert model(images().to("meta")).is_meta  # to count what a step does
    model.to_empty(device="cpu")
    with pytest.raises(RuntimeError, match="on the meta device when the optimizer was attached"):
        model(images())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model.attach(optimizer)
    step(model, optimizer, 0)
    assert model.report().drawn > 0


def test_what_the_mode_cannot_do_says_so() -> None:
    model, optimizer = made()
    with pytest.raises(RuntimeError, match="mode='outputs' merges in the forward pass"):
        model.merge_()
    with pytest.raises(ValueError, match="mode='outputs' cannot become 'step'"):
        model.mode = "step"
    with pytest.raises(ValueError, match="already wrapped"):
        InMergeWrapper(nn.Sequential(model), mode="outputs")
    with pytest.raises(ValueError, match="none of the parameters of this network"):
        model.attach(torch.optim.SGD(net().parameters(), lr=0.1))
    with pytest.warns(NoEffectWarning, match="no forward pass of this model merged before"):
        optimizer.step()
    model.module.grouped = nn.Conv2d(8, 12, 3, groups=2).double()
    model.module.grouped.__class__ = type("Blurred", (nn.Conv2d,), {})
    told = r"grouped: a Blurred took the place of the convolution after the network was wrapped"
    with pytest.raises(RuntimeError, match=told):
        optimizer.step()
    with pytest.raises(RuntimeError, match=told):
        model.attach(torch.optim.SGD(model.parameters(), lr=0.1))


def test_frozen_layers_are_left_alone() -> None:
    model, optimizer = made()
    model.module.grouped.requires_grad_(False)
    step(model, optimizer, 0)  # the layers of a step are chosen when it begins
    before = model.report()["grouped"].drawn
    step(model, optimizer, 1)
    assert model.report()["grouped"].drawn == before
    assert model.report()["last"].drawn == 2 * 5 * 6
    for number in (2, 3):
        model.module.grouped.requires_grad_(number == 2)
        step(model, optimizer, number)
    assert [layer.passes for layer in model.report()] == [4, 1, 4]
