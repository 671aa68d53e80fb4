"""plan_merging: the order, the kinds, what it leaves alone, and what a user can ask for."""

from __future__ import annotations

import copy
import random
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.models import detection, segmentation

from inmerge_wrap import InMergeWrapper, MergePlan, plan_merging
from inmerge_wrap.discovery import SKIPPED_KINDS


def timm_model(name: str, **settings: Any) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **settings)


def torchvision_model(name: str, **settings: Any) -> nn.Module:
    with torch.device("meta"):
        return torchvision.models.get_model(name, weights=None, **settings)


def kinds(plan: MergePlan) -> dict[str, str]:
    return {site.name: site.kind for site in plan.merged + plan.skipped}


def of_kind(plan: MergePlan, kind: str) -> list[str]:
    return [name for name, found in kinds(plan).items() if found == kind]


def reasons(plan: MergePlan) -> dict[str, str | None]:
    return {site.name: site.reason for site in plan.skipped}


def reason_kinds(plan: MergePlan) -> dict[str, str | None]:
    return {site.name: site.reason_kind for site in plan.skipped}


def merged(plan: MergePlan) -> list[str]:
    return [site.name for site in plan.merged]


def in_order(plan: MergePlan) -> list[str]:
    sites = [site for site in plan.merged + plan.skipped if site.depth is not None]
    return [site.name for site in sorted(sites, key=lambda site: site.depth or 0)]


class Net(nn.Module):
    """Registered in the reverse of the order of execution: c runs first, a last."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(12, 16, 3, padding=1)
        self.b = nn.Conv2d(8, 12, 3, padding=1)
        self.c = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)

    def features(self, x: Tensor) -> Tensor:
        return self.norm(self.a(self.b(self.c(x).relu()).relu())).relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


# -- the order --------------------------------------------------------------------------------


def test_depth_is_the_order_of_execution() -> None:
    plan = plan_merging(Net(), shallow_layers=1)
    assert plan.found_by == "trace"
    assert in_order(plan) == ["c", "b", "a"]
    assert merged(plan) == ["b", "a"]
    assert reasons(plan) == {"c": "shallow"}


@pytest.mark.parametrize("name", ["xception41", "botnet26t_256", "hrnet_w18_small", "repvgg_a0"])
def test_order_of_models_that_register_otherwise(name: str) -> None:
    network = timm_model(name)
    order: dict[str, None] = {}
    for part, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda *_, part=part: order.setdefault(part))
    size = network.pretrained_cfg["input_size"]
    network.eval()(torch.empty(1, *size, device="meta"))
    found = in_order(plan_merging(network))
    assert found == list(order)
    registered = [n for n, layer in network.named_modules() if isinstance(layer, nn.Conv2d)]
    assert found != registered


def test_a_reused_layer_counts_at_its_first_call() -> None:
    class Twice(Net):
        def features(self, x: Tensor) -> Tensor:
            x = self.c(x).relu()
            return self.norm(self.a(self.b(self.c(x[:, :3]) + x).relu()))

    assert in_order(plan_merging(Twice())) == ["c", "b", "a"]


# -- it leaves no trace -------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Bytes of all new tensors that have memory."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        old = {t.untyped_storage()._cdata for t in tree_leaves(args) if isinstance(t, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and not leaf.is_meta:
                storage = leaf.untyped_storage()
                self.bytes += 0 if storage._cdata in old else storage.nbytes()
        return result


class Hoard(Net):
    """Keeps tensors and a network where torch does not look for them."""

    def __init__(self) -> None:
        super().__init__()
        self.bank = [torch.zeros(1000, 1000)]
        self.teacher = [nn.Linear(1000, 1000)]


@pytest.mark.parametrize("make", [lambda: timm.create_model("resnet18"), Hoard])
def test_the_trace_allocates_no_second_network(make: Callable[[], nn.Module]) -> None:
    network = make()
    with Allocations() as whole:
        copy.deepcopy(network)
    with Allocations() as counted:
        assert plan_merging(network).found_by == "trace"
    assert whole.bytes > 4_000_000  # else this test would see nothing
    assert counted.bytes < 100_000


class Restless(Net):
    """Uses and changes whatever a forward pass can."""

    def __init__(self, on_meta: bool = True) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.on_meta, self.count, self.cache = on_meta, 0, None

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.calls += 1
        self.cache = x.shape
        noise = random.random() + float(np.random.rand()) + torch.rand(()).to(x.device)
        if not self.on_meta:
            assert not bool(x.isnan().any())
        self.norm.momentum = 0.5
        return super().forward(F.dropout(x, 0.5, training=True) + noise)


@pytest.mark.parametrize("on_meta", [True, False])
def test_planning_leaves_the_network_and_the_generators_alone(on_meta: bool) -> None:
    network = Restless(on_meta)
    network.train()
    network.norm.eval()
    network.b.requires_grad_(False)
    before = copy.deepcopy(network.state_dict())
    flags = {name: part.training for name, part in network.named_modules()}
    attributes = {name: dict(vars(part)) for name, part in network.named_modules()}
    identities = [id(tensor) for tensor in network.state_dict(keep_vars=True).values()]
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    python_state = random.getstate()

    with quiet_fallback() as told:
        plan = plan_merging(network, example_input=torch.zeros(2, 3, 16, 16))

    assert plan.found_by == ("trace" if on_meta else "forward")
    assert bool(told) is not on_meta
    assert {name: part.training for name, part in network.named_modules()} == flags
    for name, part in network.named_modules():
        assert vars(part).keys() == attributes[name].keys()
        assert all(vars(part)[key] is value for key, value in attributes[name].items())
    assert [id(tensor) for tensor in network.state_dict(keep_vars=True).values()] == identities
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()
    assert random.getstate() == python_state


@contextmanager
def quiet_fallback() -> Iterator[list[str]]:
    """Catches the warnings of a fallback and gives their texts."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    texts += [str(warning.message) for warning in caught]


@pytest.mark.parametrize("on_meta", [True, False])
def test_planning_runs_and_keeps_nobodys_hooks(on_meta: bool) -> None:
    network = Restless(on_meta)
    ran: list[str] = []
    handles = [
        network.register_forward_pre_hook(lambda *_: ran.append("pre")),
        network.a.register_forward_hook(lambda *_: ran.append("forward")),
        network.a.register_forward_hook(lambda *_, **__: ran.append("kw"), with_kwargs=True),
        network.a.register_forward_hook(lambda *_: ran.append("always"), always_call=True),
        network.b.register_full_backward_hook(lambda *_: None),
        torch_module.register_module_forward_hook(lambda *_: ran.append("global")),
        torch_module.register_module_forward_pre_hook(lambda *_: ran.append("global pre")),
    ]
    try:
        hooks = [dict(part._forward_hooks) for part in network.modules()]
        with quiet_fallback():
            plan_merging(network, example_input=torch.randn(2, 3, 16, 16))
        assert ran == []
        assert [dict(part._forward_hooks) for part in network.modules()] == hooks
        network.on_meta = True
        network(torch.randn(2, 3, 8, 8))
        assert {"pre", "forward", "kw", "always", "global", "global pre"} <= set(ran)
    finally:
        for handle in handles:
            handle.remove()


def test_planning_calls_no_overridden_train() -> None:
    class Guarded(Net):
        def train(self, mode: bool = True) -> Net:
            raise AssertionError("freezing layers here is common, and must not happen")

    assert merged(plan_merging(Guarded(), shallow_layers=1)) == ["b", "a"]


# -- when the network does not run on meta tensors ----------------------------------------------


class Undecided(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.c(x).relu()
        x = self.b(x).relu() if x.mean().item() > -1 else x.new_zeros(2, 12, 8, 8)
        return self.head(self.norm(self.a(x)).mean((2, 3)))


class Locked(Net):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


@pytest.mark.parametrize(("make", "cause"), [(Undecided, "item"), (Locked, "lock")])
def test_fallback_to_a_real_forward_pass(make: Callable[[], nn.Module], cause: str) -> None:
    with pytest.warns(UserWarning, match=f"real forward pass.*{cause}"):
        plan = plan_merging(make(), shallow_layers=1)
    assert plan.found_by == "forward"
    assert in_order(plan) == ["c", "b", "a"]


class TwoInputs(Net):
    def forward(self, image: Tensor, table: Tensor) -> Tensor:
        return super().forward(image) + table.sum(1, keepdim=True)


def test_fallback_to_the_order_of_registration() -> None:
    with pytest.warns(UserWarning, match="no forward pass was possible.*missing 1 required"):
        plan = plan_merging(TwoInputs(), shallow_layers=1)
    assert plan.found_by == "registration"
    assert in_order(plan) == ["a", "b", "c"]


@pytest.mark.parametrize("make", [TwoInputs, lambda: torch.compile(TwoInputs())])
@pytest.mark.parametrize(
    "example",
    [
        (torch.zeros(2, 3, 16, 16), torch.zeros(2, 4)),
        [torch.zeros(2, 3, 16, 16), torch.zeros(2, 4)],
        {"table": torch.zeros(2, 4), "image": torch.zeros(2, 3, 16, 16)},
    ],
    ids=["tuple", "list", "dict"],
)
def test_example_input_tells_how_to_call(make: Callable[[], nn.Module], example: Any) -> None:
    plan = plan_merging(make(), shallow_layers=1, example_input=example)
    assert plan.found_by == "trace"
    assert [name.removeprefix("_orig_mod.") for name in in_order(plan)] == ["c", "b", "a"]


def test_an_example_input_that_does_not_fit_is_reported() -> None:
    with pytest.warns(UserWarning, match="no forward pass was possible.*to have 3 channels"):
        plan_merging(Net(), example_input=torch.zeros(2, 4, 16, 16))


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels_need_no_example(channels: int) -> None:
    network = timm_model("resnet18", in_chans=channels)
    assert plan_merging(network).found_by == "trace"


@pytest.mark.parametrize(
    "name", ["vit_small_r26_s32_224", "coatnet_0_rw_224", "samvit_base_patch16"]
)
def test_another_image_size_than_the_configured_one_needs_no_example(name: str) -> None:
    network = timm_model(name, img_size=192)
    assert network.pretrained_cfg["input_size"][1] != 192
    plan = plan_merging(network)
    assert plan.found_by == "trace"
    assert merged(plan) == merged(plan_merging(timm_model(name)))


def test_lazy_layers() -> None:
    class Lazy(Net):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LazyBatchNorm2d()
            self.b = nn.LazyConv2d(12, 3)
            self.head = nn.LazyLinear(5)

    network = Lazy()
    calls: list[int] = []
    network.b.register_forward_hook(lambda *_: calls.append(1))
    plan = plan_merging(network, shallow_layers=0)
    assert plan.found_by == "trace"
    assert merged(plan) == ["c", "a"]
    assert "lazy" in (reasons(plan)["b"] or "")
    assert reason_kinds(plan)["b"] == "unwritable"
    assert calls == []
    assert isinstance(network.head.weight, nn.parameter.UninitializedParameter)
    assert isinstance(network.b.weight, nn.parameter.UninitializedParameter)
    network(torch.zeros(2, 3, 16, 16))  # the network still infers its shapes
    assert calls == [1]
    assert merged(plan_merging(network, shallow_layers=0)) == ["c", "b", "a"]


def test_a_lazy_network_is_never_really_run() -> None:
    class LazyUndecided(Undecided):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.LazyLinear(5)

    network = LazyUndecided()
    with pytest.warns(UserWarning, match="no forward pass was possible"):
        plan = plan_merging(network)
    assert plan.found_by == "registration"
    assert isinstance(network.head.weight, nn.parameter.UninitializedParameter)


@pytest.mark.parametrize(
    ("name", "merges"), [("r3d_18", 8), ("mc3_18", 8), ("r2plus1d_18", 14), ("s3d", 29)]
)
def test_video_networks_need_no_example(name: str, merges: int) -> None:
    plan = plan_merging(torchvision_model(name))  # s3d wants larger clips than the others
    assert plan.found_by == "trace"
    assert len(merged(plan)) == merges
    assert all(len(site.shape) == 5 for site in plan.merged)


@pytest.mark.parametrize("side", [32, 96])
def test_a_network_of_one_volume_size_states_it_or_is_tried_with_the_usual_ones(side: int) -> None:
    class Volumes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(4, 8, 3, padding=1))
            self.classes = nn.Linear(8 * side**3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.classes(self.convs(x).flatten(1))

    with torch.device("meta"):
        network = Volumes()
    assert plan_merging(network, shallow_layers=0).found_by == "trace"
    network.classes = nn.Linear(8 * 24**3, 2, device="meta")
    with pytest.warns(UserWarning, match="no forward pass was possible.*example_input"):
        plan_merging(network)
    network.img_size = (24, 24, 24)
    assert plan_merging(network, shallow_layers=0).found_by == "trace"


def test_a_network_of_several_ranks_is_planned_as_one() -> None:
    class Clip(nn.Module):
        """Frames one by one, then a convolution along the time."""

        def __init__(self) -> None:
            super().__init__()
            self.time = nn.Conv1d(8, 12, 3)
            self.frame = nn.Conv2d(3, 8, 3)
            self.volume = nn.Conv3d(1, 1, 3, padding=1)
            self.classes = nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            seen = self.frame(self.volume(x.unsqueeze(1)).squeeze(1)).relu().mean((2, 3))
            return self.classes(self.time(seen.T.unsqueeze(0)).relu().mean(2))

    plan = plan_merging(Clip(), shallow_layers=1, example_input=torch.zeros(5, 3, 9, 9))
    assert in_order(plan) == ["volume", "frame", "time"]
    assert reasons(plan) == {
        "volume": "one kernel: there is nothing to pair it with",
        "frame": "shallow",
    }


def test_a_list_is_the_arguments_or_the_one_argument_of_a_network_that_takes_lists() -> None:
    class Detector(Net):
        def forward(self, images: Any) -> Any:
            assert isinstance(images, list)
            return super().forward(torch.stack(images))

    plan = plan_merging(Detector(), shallow_layers=1, example_input=[torch.zeros(3, 16, 16)] * 2)
    assert plan.found_by == "trace"
    assert in_order(plan) == ["c", "b", "a"]


# -- forms of networks --------------------------------------------------------------------------


def test_a_weight_used_by_the_functional_form() -> None:
    class Functional(Net):
        def features(self, x: Tensor) -> Tensor:
            x = F.conv2d(input=x, weight=self.c.weight, bias=self.c.bias, padding=1)
            return self.norm(self.a(F.conv2d(x, self.b.weight, padding=1)))

    plan = plan_merging(Functional(), shallow_layers=0)
    assert merged(plan) == ["c", "b", "a"]


def test_a_shared_module_and_a_tied_weight_are_merged_once() -> None:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.again = self.b
            self.d = nn.Conv2d(12, 16, 3, padding=1)
            self.d.weight = self.a.weight

        def features(self, x: Tensor) -> Tensor:
            x = self.b(self.c(x))
            return self.norm(self.d(x) + self.a(x) + 0 * self.again(self.c(x[:, :3])).sum())

    plan = plan_merging(Tied(), shallow_layers=0)
    assert merged(plan) == ["c", "b", "d"]  # d runs before a
    assert reasons(plan) == {"a": "shares its weight with d"}
    assert reason_kinds(plan) == {"a": "shared"}


def test_compiled_networks() -> None:
    expected = merged(plan_merging(Net(), shallow_layers=1))
    whole, inside, part = torch.compile(Net()), Net(), Net()
    inside.compile()
    part.a = torch.compile(part.a)
    assert merged(plan_merging(whole, shallow_layers=1)) == [f"_orig_mod.{n}" for n in expected]
    assert merged(plan_merging(inside, shallow_layers=1)) == expected
    assert merged(plan_merging(part, shallow_layers=1)) == ["b", "a._orig_mod"]
    for network in (whole, inside, part):
        assert plan_merging(network).found_by == "trace"
        assert InMergeWrapper(network, similarity_threshold=-1.0).merge_() is None


def test_a_compiled_network_is_not_compiled_to_be_planned() -> None:
    compiled: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(1)
        return graph.forward

    undecided = Locked()
    undecided.compile(backend=backend)
    for network in (torch.compile(Net(), backend=backend), undecided):
        with quiet_fallback():
            plan_merging(network)
    assert compiled == []


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.to(memory_format=torch.channels_last),
        lambda net: net.bfloat16(),
        lambda net: net.double(),
        lambda net: nn.Sequential(net),
        lambda net: parametrizations.weight_norm(net.a) and net,
        lambda net: prune.l1_unstructured(net.a, "weight", 0.2) and net,
    ],
    ids=["channels_last", "bfloat16", "float64", "inside", "weight_norm", "pruned"],
)
def test_other_forms_of_a_network_have_the_same_plan(change: Callable[[Any], nn.Module]) -> None:
    plan = plan_merging(change(Net()), shallow_layers=1)
    assert plan.found_by == "trace"
    assert [name.removeprefix("0.") for name in merged(plan)] == ["b", "a"]


def test_a_weight_computed_in_the_forward_pass_is_skipped() -> None:
    class FakeQuantised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            scale = self.weight.abs().max() / 127
            return self._conv_forward(x, (self.weight / scale).round() * scale, self.bias)

    network = Net()
    network.b = FakeQuantised(8, 12, 3, padding=1)
    plan = plan_merging(network, shallow_layers=0)
    assert merged(plan) == ["c", "a"]
    assert reasons(plan) == {"b": "FakeQuantised computes its weight in its forward pass"}
    assert reason_kinds(plan) == {"b": "unwritable"}


class StandardisedConv3d(nn.Conv3d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3, 4), True), self.bias)


def test_standardised_weights_of_other_ranks_are_skipped_with_the_reason() -> None:
    network = nn.Sequential(nn.Conv3d(1, 4, 3), StandardisedConv3d(4, 6, 3), nn.Conv3d(6, 6, 3))
    plan = plan_merging(network, shallow_layers=0)
    assert merged(plan) == ["0", "2"]
    assert reasons(plan) == {"1": "StandardisedConv3d computes its weight in its forward pass"}


def test_quantisation_aware_training_gets_a_remedy_that_helps() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.ReLU())
    network.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")  # type: ignore
    with quiet_fallback():  # torch.ao.quantization is deprecated
        prepared = torch.ao.quantization.prepare_qat(network.train())
    message = (
        "2 torch.*qat.modules.conv.Conv2d computes its weight.*wrap and train the network first"
    )
    with pytest.raises(ValueError, match=message), quiet_fallback():
        plan_merging(prepared)


@pytest.mark.parametrize("mode", ["step", "outputs", "weights"])
def test_complex_convolutions_are_in_the_plan_with_the_reason(mode: Any) -> None:
    class Spectrum(nn.Module):
        """As networks on k-space data of MR: complex first, magnitudes from then on."""

        def __init__(self) -> None:
            super().__init__()
            self.waves = nn.Conv2d(1, 6, 3, padding=1, dtype=torch.complex64)
            self.body = nn.Conv2d(6, 8, 3)
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.body(self.waves(x.to(torch.complex64)).abs())
            return self.head(x.relu().mean((2, 3)))

    images = torch.randn(2, 1, 8, 8)
    model = InMergeWrapper(
        Spectrum(), mode=mode, shallow_layers=0, similarity_threshold=-1.0, example_input=images
    )
    assert merged(model.plan) == ["body"]
    assert reasons(model.plan)["waves"] == "complex: kernels of complex numbers are not compared"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.attach(optimizer)
    model(images).sum().backward()
    optimizer.step()
    assert model.step == 1
    with pytest.raises(ValueError, match="include names 'waves', which cannot be merged: complex"):
        plan_merging(model.module, mode=mode, include="waves", example_input=images)


def test_quantised_convolutions_are_in_the_plan_with_the_reason() -> None:
    class Mixed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.integers = torch.ao.nn.quantized.Conv2d(3, 8, 3, padding=1)
            self.enter = torch.ao.nn.quantized.Quantize(0.1, 0, torch.quint8)
            self.leave = torch.ao.nn.quantized.DeQuantize()

        def features(self, x: Tensor) -> Tensor:
            x = self.leave(self.integers(self.enter(x)))
            return self.norm(self.a(self.b(x).relu())).relu()

    with quiet_fallback():
        plan = plan_merging(Mixed(), shallow_layers=0)
    assert reasons(plan)["integers"] == "quantised: integers, which no optimizer trains"
    assert {"a", "b"} <= set(merged(plan))


def test_a_network_that_is_quantised_as_a_whole_is_refused_with_the_reason() -> None:
    with quiet_fallback():  # torch warns of quantised tensors once in a process
        network = nn.Sequential(
            torch.ao.nn.quantized.Quantize(0.1, 0, torch.quint8),
            torch.ao.nn.quantized.Conv2d(3, 8, 3),
            torch.ao.nn.quantized.DeQuantize(),
        )
    with quiet_fallback(), pytest.raises(ValueError, match="1 quantised: integers"):
        plan_merging(network)


class Adapted(nn.Module):
    """A convolution as peft leaves it: frozen, with a low-rank update."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        first = nn.Conv2d(base.in_channels, 4, base.kernel_size, padding=base.padding, bias=False)
        self.lora_A = nn.ModuleDict({"default": first})
        self.lora_B = nn.ModuleDict({"default": nn.Conv2d(4, base.out_channels, 1, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def test_factors_of_low_rank_updates_are_no_kernels() -> None:
    network = Net()
    network.b, network.a = Adapted(network.b), Adapted(network.a)
    network.lora_Atrous = nn.Conv2d(16, 16, 1)  # a name that only begins like it
    plan = plan_merging(network, shallow_layers=0)
    factors = [f"{name}.lora_{factor}.default" for name in "ba" for factor in "AB"]
    assert sorted(of_kind(plan, "adapter")) == sorted(factors)
    assert {reasons(plan)[name] for name in factors} == {SKIPPED_KINDS["adapter"]}
    assert of_kind(plan, "frozen") == ["b.base_layer", "a.base_layer"]
    assert kinds(plan)["lora_Atrous"] == "unused"
    assert merged(plan) == ["c"]
    network.c.requires_grad_(False)
    with pytest.raises(ValueError, match=r"4 adapter.*trains only through adapters"):
        plan_merging(network)


def test_weight_standardised_models_are_planned_with_centred_comparison() -> None:
    plan = plan_merging(timm_model("resnetv2_50x1_bit"))
    assert plan.merged and all(site.centred for site in plan.merged)
    assert not any(site.centred for site in plan_merging(timm_model("resnet18")).merged)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(3, 3), "Linear has no convolution"),
        (lambda: torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 3))), "TorchScript"),
        (
            lambda: nn.DataParallel(Net()),
            r"before DataParallel: InMergeWrapper\(network\) first",
        ),
    ],
)
def test_what_is_no_network_to_plan_is_refused(make: Callable[[], nn.Module], message: str) -> None:
    with quiet_fallback():  # torch.jit.script is deprecated
        network = make()
    with pytest.raises(ValueError, match=message):
        plan_merging(network)


# -- kinds --------------------------------------------------------------------------------------


def test_depthwise_layers_are_skipped_and_grouped_ones_pair_inside_of_their_group() -> None:
    plan = plan_merging(timm_model("mobilenetv2_100"), shallow_layers=0)
    network = timm_model("mobilenetv2_100")
    depthwise = [n for n, m in network.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert sorted(of_kind(plan, "depthwise")) == sorted(depthwise)
    grouped = plan_merging(timm_model("resnext50_32x4d"), shallow_layers=0)
    assert {site.pair_groups for site in grouped.merged} == {1, 32}
    included = plan_merging(network, include=[depthwise[0]]).merged[0]
    assert included.pair_groups == 1


@pytest.mark.parametrize(
    ("name", "gates"),
    [
        ("seresnet18", [".se."]),
        ("efficientnet_b0", [".se."]),
        ("regnety_002", [".se."]),
        ("skresnet18", [".attn.fc"]),
        ("resnest14d", [".conv2.fc"]),
        ("gcresnet33ts", [".mlp_add."]),
        ("mobilenetv3_small_050", [".se.", "conv_head"]),
    ],
)
def test_gates_are_vectors(name: str, gates: list[str]) -> None:
    network = timm_model(name)
    expected = {
        part
        for part, layer in network.named_modules()
        if isinstance(layer, nn.Conv2d) and any(gate in part for gate in gates)
    }
    assert len(expected) > 3
    assert expected <= set(of_kind(plan_merging(network), "vector"))
    plan = plan_merging(network, also_merge=["vector", "depthwise"], shallow_layers=0)
    assert expected <= set(merged(plan))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: timm_model("vgg11"), {"pre_logits.fc1": "dense", "pre_logits.fc2": "vector"}),
        (lambda: torchvision_model("squeezenet1_1"), {"classifier.1": "head"}),
        (lambda: timm_model("resnetv2_50"), {"head.fc": "head"}),
        (lambda: timm_model("dla34"), {"fc": "head"}),
        (lambda: timm_model("convnext_atto"), {"stem.0": "patch_embedding"}),
        (
            lambda: torchvision_model("googlenet", init_weights=False, aux_logits=True),
            {"aux1.conv.conv": "auxiliary", "aux2.conv.conv": "auxiliary"},
        ),
        (
            lambda: torchvision_model("inception_v3", init_weights=False),
            {"AuxLogits.conv0.conv": "auxiliary", "AuxLogits.conv1.conv": "auxiliary"},
        ),
        (
            lambda: timm_model("inception_v3", aux_logits=True),
            {"AuxLogits.conv0.conv": "auxiliary", "AuxLogits.conv1.conv": "auxiliary"},
        ),
        (
            lambda: timm_model("gcresnet33ts"),
            {},  # its one-kernel attention convolutions are kernels by kind
        ),
    ],
)
def test_other_kinds_of_real_models(
    make: Callable[[], nn.Module], expected: dict[str, str]
) -> None:
    network = make()
    plan = plan_merging(network)
    special = {
        name: kind
        for name, kind in kinds(plan).items()
        if kind not in {"kernels", "depthwise"} and ".attn." not in name
    }
    assert special == {name: kind for name, kind in expected.items()}
    for name, kind in expected.items():
        assert reasons(plan)[name] == SKIPPED_KINDS[kind]
        assert reason_kinds(plan)[name] == kind
    if expected:
        also = plan_merging(network, also_merge=set(expected.values()), shallow_layers=0)
        assert expected.keys() <= set(merged(also))


def test_single_kernels_have_nothing_to_pair_with() -> None:
    plan = plan_merging(timm_model("gcresnet33ts"), shallow_layers=0)
    single = [site for site in plan.skipped if site.shape[0] == 1]
    assert single and {site.reason for site in single} == {
        "one kernel: there is nothing to pair it with"
    }
    assert {site.reason_kind for site in single} == {"one_kernel"}
    network = Net()
    network.b = nn.Conv2d(8, 4, 3, padding=1, groups=4)
    network.a = nn.Conv2d(4, 16, 3, padding=1)
    plan = plan_merging(network, shallow_layers=0)
    assert "one kernel in each group" in (reasons(plan)["b"] or "")
    assert reason_kinds(plan)["b"] == "one_kernel"
    with pytest.raises(ValueError, match=r"include names 'b', .* one kernel in each group"):
        plan_merging(network, include=["a", "b"])


def test_downsampling_patches_are_kernels_but_patches_of_the_image_are_not() -> None:
    plan = plan_merging(timm_model("convnext_atto"), shallow_layers=0)
    assert {"stages.1.downsample.1", "stages.3.downsample.1"} <= set(merged(plan))
    assert of_kind(plan, "patch_embedding") == ["stem.0"]
    hybrid = plan_merging(timm_model("vit_small_r26_s32_224"))
    assert of_kind(hybrid, "patch_embedding") == []
    assert "patch_embed.proj" in merged(hybrid)


def test_frozen_layers_count_as_depth_but_are_not_merged() -> None:
    network = timm_model("resnet18")
    for parameter in network.layer4.parameters():
        parameter.requires_grad_(False)
    open_plan = plan_merging(timm_model("resnet18"))
    plan = plan_merging(network)
    assert merged(plan) == [name for name in merged(open_plan) if not name.startswith("layer4")]
    assert set(of_kind(plan, "frozen")) == {n for n in in_order(plan) if n.startswith("layer4")}
    assert merged(plan_merging(network, also_merge=["frozen"])) == merged(open_plan)
    network.requires_grad_(False)
    with pytest.raises(ValueError, match=r"20 frozen.*unfreeze"):
        plan_merging(network)


def test_a_layer_that_never_runs_is_unused() -> None:
    class Spare(Net):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Conv2d(3, 8, 3)

    plan = plan_merging(Spare())
    assert kinds(plan)["spare"] == "unused"
    assert next(site for site in plan.skipped if site.name == "spare").depth is None


def test_outputs_of_deep_supervision_are_heads_though_evaluation_drops_them() -> None:
    class Supervised(Net):
        def __init__(self) -> None:
            super().__init__()
            self.middle = nn.Conv2d(12, 5, 1)
            self.last = nn.Conv2d(16, 5, 1)

        def forward(self, x: Tensor) -> Any:
            x = self.b(self.c(x).relu()).relu()
            outputs = [self.middle(x), self.last(self.a(x).relu())]
            return outputs if self.training else outputs[-1]

    assert of_kind(plan_merging(Supervised()), "head") == ["middle", "last"]


class Recurrent(nn.Module):
    """Convolutions before and after a recurrent layer; wrong shapes are an error."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.before, self.layer = nn.Conv2d(3, 6, 3, padding=1), layer
        ways = 2 if layer.bidirectional else 1
        self.after = nn.Conv2d(ways * layer.num_layers * layer.hidden_size, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        lines = self.before(x).mean(2).movedim(2, 1 if self.layer.batch_first else 0)
        found, states = self.layer(lines)
        ways = 2 if self.layer.bidirectional else 1
        size = self.layer.hidden_size
        assert found.shape == (*lines.shape[:2], ways * size)
        hidden, *cell = states if isinstance(states, tuple) else (states,)
        assert hidden.shape == (ways * self.layer.num_layers, len(x), size)
        assert all(each.shape == hidden.shape for each in cell)
        return self.after(hidden.movedim(0, 1).reshape(len(x), -1, 1, 1))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(
    "settings",
    [
        {"hidden_size": 4},
        {"hidden_size": 4, "num_layers": 2, "bidirectional": True, "batch_first": True},
    ],
)
def test_a_recurrent_layer_is_not_run_step_by_step(
    kind: type[nn.RNNBase], settings: dict[str, Any]
) -> None:
    network, counted = Recurrent(kind(6, **settings)), 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
            nonlocal counted
            counted += 1
            return func(*args, **(kwargs or {}))

    with Count():
        plan = plan_merging(network, shallow_layers=0, example_input=torch.zeros(2, 3, 8, 900))
    assert plan.found_by == "trace" and [site.name for site in plan.merged] == ["before"]
    assert counted < 300  # a few for each of the 900 places otherwise


def test_a_packed_sequence_passes_the_trace() -> None:
    class Packed(Recurrent):
        def forward(self, x: Tensor) -> Tensor:
            lines = self.before(x).mean(2).transpose(1, 2)
            packed = nn.utils.rnn.pack_padded_sequence(lines, [5] * len(x), batch_first=True)
            _, (hidden, _) = self.layer(packed)
            return self.after(hidden.movedim(0, 1).reshape(len(x), 4, 1, 1))

    network = Packed(nn.LSTM(6, 4))
    plan = plan_merging(network, shallow_layers=0, example_input=torch.zeros(2, 3, 8, 8))
    assert "before" in [site.name for site in plan.merged]


def test_what_the_trace_cannot_follow_is_no_head() -> None:
    class Swish(torch.autograd.Function):
        """As the memory-efficient ones of some libraries: torch does not see it in a trace."""

        @staticmethod
        def forward(context: Any, x: Tensor) -> Tensor:
            return x * x.sigmoid()

    class Hidden(Net):
        def features(self, x: Tensor) -> Tensor:
            return self.norm(self.a(Swish.apply(self.b(Swish.apply(self.c(x))))))

    assert of_kind(plan_merging(Hidden()), "head") == []


def test_a_gate_along_the_channels_is_no_step_of_depth() -> None:
    network, plain = timm_model("eca_resnet33ts"), timm_model("resnet33ts")
    plan = plan_merging(network)
    gates = [site for site in plan.skipped if site.shape[:2] == (1, 1)]
    assert len(gates) == 10 and {site.reason_kind for site in gates} == {"one_kernel"}
    assert merged(plan) == merged(plan_merging(plain))


def test_an_auxiliary_head_of_a_users_network_is_found_with_its_example() -> None:
    class Deep(TwoInputs):
        def __init__(self) -> None:
            super().__init__()
            self.aux = nn.Conv2d(16, 5, 1)

        def forward(self, image: Tensor, table: Tensor) -> Any:
            logits = super().forward(image, table)
            return (logits, self.aux(self.features(image))) if self.training else logits

    example = torch.zeros(2, 3, 16, 16), torch.zeros(2, 4)
    assert kinds(plan_merging(Deep(), example_input=example))["aux"] == "auxiliary"


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_small_images_make_no_vectors(name: str) -> None:
    plan = plan_merging(timm_model(name), example_input=torch.zeros(2, 3, 28, 28))
    assert set(kinds(plan).values()) == {"kernels"}
    assert plan.merged == plan_merging(timm_model(name)).merged


def test_small_images_still_show_gates() -> None:
    small = plan_merging(timm_model("seresnet18"), example_input=(torch.zeros(2, 3, 28, 28),))
    assert kinds(small) == kinds(plan_merging(timm_model("seresnet18")))
    assert of_kind(small, "vector")


def test_a_dense_layer_of_a_network_of_one_size() -> None:
    network = nn.Sequential(  # LeNet: its last convolution covers the whole map
        *(nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Conv2d(16, 120, 5), nn.Tanh(), nn.Flatten(), nn.Linear(120, 10)),
    )
    plan = plan_merging(network, example_input=torch.zeros(1, 1, 28, 28), shallow_layers=1)
    assert of_kind(plan, "dense") == ["6"]
    assert merged(plan) == ["3"]


# -- heads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("name", ["vgg11", "alexnet"])
def test_features_alone_have_no_head(name: str, pool: bool) -> None:
    features = torchvision_model(name).features
    if pool:
        features = nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert of_kind(plan_merging(features), "head") == []


@pytest.mark.parametrize(
    "settings",
    [{"num_classes": 0}, {"num_classes": 0, "global_pool": ""}, {"features_only": True}],
    ids=["pooled", "map", "features_only"],
)
@pytest.mark.parametrize(
    "name", ["resnet18", "resnetv2_50", "mobilenetv3_small_050", "vgg11", "test_nfnet"]
)
def test_headless_models_have_no_head(name: str, settings: dict[str, Any]) -> None:
    plan = plan_merging(timm_model(name, **settings))
    assert plan.found_by == "trace"
    assert of_kind(plan, "head") == []


def test_squeezenet_features_have_no_head() -> None:
    assert of_kind(plan_merging(torchvision_model("squeezenet1_1").features), "head") == []


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, padding=1)
        self.deep = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.deeper = nn.Conv2d(16, 16, 3, padding=1)
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.join = nn.Conv2d(16, 8, 3, padding=1)
        self.classes = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x).relu()
        y = self.deeper(self.deep(x).relu()).relu()
        return self.classes(self.join(torch.cat([x, self.up(y)], 1)).relu()).sigmoid()


def test_a_head_is_found_in_whatever_the_network_returns() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
            self.head = nn.Conv2d(8, 5, 1)

        def forward(self, x: Tensor) -> Any:
            found = self.head(self.second(self.first(x).relu()).relu())
            return types.SimpleNamespace(logits=found.mean((2, 3)))

    plan = plan_merging(Wrapped(), shallow_layers=0)
    assert [site.name for site in plan.merged] == ["first", "second"]
    assert plan.skipped[0].kind == "head"


def test_the_last_layer_of_a_users_segmentation_network_is_its_head() -> None:
    plan = plan_merging(UNet(), shallow_layers=0)
    assert of_kind(plan, "head") == ["classes"]
    assert merged(plan) == ["down", "deep", "deeper", "up", "join"]


class Restored(nn.Module):
    """Ends as MONAI's UNet does: as many channels as classes before the last layer, and after."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1))
        self.up = nn.ConvTranspose2d(8, 4, 2, 2)
        self.last = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.down(x)).relu()
        return x + self.last(x)


def test_a_map_that_is_as_large_as_the_image_again_is_of_the_classes() -> None:
    plan = plan_merging(Restored(), shallow_layers=0)
    assert of_kind(plan, "head") == ["last"]
    assert [site.name for site in plan.merged] == ["down.0", "down.2", "up"]


def test_a_map_that_never_shrank_may_be_of_features() -> None:
    features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1))
    assert of_kind(plan_merging(features), "head") == []


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("fcn_resnet50", ["classifier.4"]),
        ("deeplabv3_resnet50", ["classifier.4"]),
        ("lraspp_mobilenet_v3_large", ["classifier.low_classifier", "classifier.high_classifier"]),
    ],
)
def test_torchvision_segmentation(name: str, heads: list[str]) -> None:
    with torch.device("meta"):
        network = getattr(segmentation, name)(weights=None, weights_backbone=None)
    plan = plan_merging(network)
    assert plan.found_by == "trace"
    assert sorted(of_kind(plan, "head")) == sorted(heads)
    backbone = plan_merging(network.backbone)
    assert of_kind(backbone, "head") == []
    with_aux = "lraspp" not in name
    if with_aux:
        with torch.device("meta"):
            network = getattr(segmentation, name)(weights_backbone=None, aux_loss=True)
        found = of_kind(plan_merging(network, example_input=torch.zeros(2, 3, 64, 64)), "head")
        assert sorted(found) == ["aux_classifier.4", *heads]


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("fasterrcnn_mobilenet_v3_large_320_fpn", ["rpn.head.bbox_pred", "rpn.head.cls_logits"]),
        ("ssdlite320_mobilenet_v3_large", None),
        (
            "retinanet_resnet50_fpn",
            ["head.classification_head.cls_logits", "head.regression_head.bbox_reg"],
        ),
        (
            "maskrcnn_resnet50_fpn",
            [
                "rpn.head.bbox_pred",
                "rpn.head.cls_logits",
                "roi_heads.mask_predictor.mask_fcn_logits",
            ],
        ),
    ],
)
def test_torchvision_detection(name: str, heads: list[str] | None) -> None:
    small = {"min_size": 64, "max_size": 64} if "320" not in name else {}
    network = getattr(detection, name)(weights=None, weights_backbone=None, **small)
    backbone = plan_merging(network.backbone)
    assert backbone.found_by == "trace"
    assert of_kind(backbone, "head") == []
    before = copy.deepcopy(network.state_dict())
    images = [torch.rand(3, 64, 80), torch.rand(3, 70, 64)]
    with pytest.warns(UserWarning, match="real forward pass"):
        plan = plan_merging(network, example_input=(images,))
    assert plan.found_by == "forward"
    if heads is None:  # one for each of six scales and two tasks
        heads = [
            f"head.{task}_head.module_list.{scale}.1"
            for task in ("classification", "regression")
            for scale in range(6)
        ]
    assert sorted(of_kind(plan, "head")) == sorted(heads)
    assert any(site.name.startswith("backbone") for site in plan.merged)
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


def test_a_users_network_around_a_cnn() -> None:
    class Study(nn.Module):
        """Images of both eyes and a table of findings."""

        def __init__(self) -> None:
            super().__init__()
            self.eyes = timm.create_model("resnet18", num_classes=0)
            self.table = nn.Linear(7, 16)
            self.grade = nn.Linear(2 * 512 + 16, 5)

        def forward(self, left: Tensor, right: Tensor, *, table: Tensor) -> dict[str, Tensor]:
            seen = torch.cat([self.eyes(left), self.eyes(right), self.table(table)], 1)
            return {"grade": self.grade(seen)}

    with torch.device("meta"):
        study = Study()
    image = torch.zeros(2, 3, 64, 64)
    example = {"left": image, "right": image, "table": torch.zeros(2, 7)}
    plan = plan_merging(study, example_input=example)
    alone = plan_merging(timm_model("resnet18"))
    assert merged(plan) == [f"eyes.{name}" for name in merged(alone)]
    assert set(kinds(plan).values()) == {"kernels"}


# -- what a user can ask for --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("include", "expected"),
    [
        ("layer4.1.*", ["layer4.1.conv1", "layer4.1.conv2"]),
        (["conv1", "layer3.?.conv2"], ["conv1", "layer3.0.conv2", "layer3.1.conv2"]),
        (lambda site: site.depth <= 2, ["conv1", "layer1.0.conv1"]),
        (["conv1", lambda site: site.shape[0] == 512 and site.fan_in == 256],
         ["conv1", "layer4.0.downsample.0"]),
    ],
)  # fmt: skip
def test_include_merges_exactly_that(include: Any, expected: list[str]) -> None:
    plan = plan_merging(timm_model("resnet18"), include=include)
    assert merged(plan) == expected
    assert {site.reason for site in plan.skipped} == {"not included"}
    assert {site.reason_kind for site in plan.skipped} == {"not_included"}
    assert {site.reason_kind for site in plan.merged} == {None}


def test_exclude_leaves_out_and_shifts_no_depth() -> None:
    network = timm_model("resnet18")
    plan = plan_merging(network)
    fewer = plan_merging(network, exclude=["*.downsample.0", lambda site: site.depth == 20])
    assert reasons(fewer)["layer4.0.downsample.0"] == "excluded"
    assert set(reason_kinds(fewer).values()) == {"shallow", "excluded"}
    left_out = {"layer3.0.downsample.0", "layer4.0.downsample.0", in_order(plan)[-1]}
    assert merged(fewer) == [name for name in merged(plan) if name not in left_out]
    both = plan_merging(network, include="layer4.*", exclude="layer4.0.*")
    assert merged(both) == ["layer4.1.conv1", "layer4.1.conv2"]
    unchanged = plan_merging(network, exclude=lambda site: site.fan_in < 9)
    assert merged(unchanged) == merged(plan)  # a rule may match nothing; a name must not


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"include": "layer4.0.conv"}, "include='layer4.0.conv' matches none.*layer4.0.conv1"),
        ({"exclude": ["layer5.*"]}, r"exclude='layer5.\*' matches none of the 20.*layer"),
        ({"include": ["layer4.*", "fc"]}, "include='fc' matches none"),
        ({"include": lambda site: False}, "nothing to merge in ResNet: 20 not included"),
        ({"also_merge": ["gates"]}, "also_merge must be among .*depthwise.*got .*gates"),
        ({"also_merge": "depthwise"}, "must be a collection"),
        ({"shallow_layers": 20}, "shallow_layers=20 leaves none of the 20 counted layers"),
        ({"shallow_layers": 1.0}, "shallow_layers must be a count"),
        ({"shallow_layers": -1}, "shallow_layers must be"),
        ({"shallow_layers": True}, "shallow_layers must be"),
    ],
)
def test_wrong_requests_raise_an_error_with_the_remedy(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plan_merging(timm_model("resnet18"), **settings)


def test_a_ready_plan_is_taken_as_it_is() -> None:
    network = timm.create_model("resnet18")
    plan = plan_merging(network, include="layer4.*")
    assert InMergeWrapper(network, plan=plan).plan is plan
    for arguments in ({"exclude": "layer4.0.*"}, {"shallow_layers": 1}):
        with pytest.raises(ValueError, match="either a plan or its arguments"):
            InMergeWrapper(network, plan=plan, **arguments)
    with pytest.raises(ValueError, match="the plan belongs to another network"):
        InMergeWrapper(timm.create_model("resnet10t"), plan=plan)


@pytest.mark.parametrize(
    ("shallow_layers", "expected"),
    [(0, 20), (10, 10), (0.0, 20), (0.5, 10), (0.625, 8), (0.999, 1), (0.001, 19)],
)
def test_shallow_layers_as_count_and_share(shallow_layers: float, expected: int) -> None:
    plan = plan_merging(timm_model("resnet18"), shallow_layers=shallow_layers)
    assert len(plan.merged) == expected
    assert merged(plan) == in_order(plan)[20 - expected :]


def test_the_authors_share_of_vgg19() -> None:
    plan = plan_merging(torchvision_model("vgg19"))
    assert len(plan.merged) == 6 and len(plan.skipped) == 10


def test_a_network_with_nothing_to_merge_is_refused_with_the_reason() -> None:
    vit = timm_model("vit_tiny_patch16_224")
    with pytest.raises(ValueError, match=r"1 patch embedding.*choose a convolutional.*include"):
        plan_merging(vit)
    assert len(plan_merging(vit, include="*").merged) == 1  # the remedy holds
    with pytest.raises(ValueError, match=r"1 shallow.*too shallow.*shallow_layers=0"):
        plan_merging(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))


def test_the_plan_prints_every_convolution_with_its_reason() -> None:
    text = str(plan_merging(timm_model("seresnet18")))
    lines = text.splitlines()
    assert lines[0].split()[:3] == ["depth", "convolution", "weight"]
    assert lines[1].split() == ["1", "conv1", "64x3x7x7", "1", "skipped", "(shallow)"]
    assert len(lines) == 2 + 36
    assert sum(line.endswith("merged") for line in lines) == 8
    assert lines[-1] == "8 of 36 convolutions are merged."
    assert sum(SKIPPED_KINDS["vector"] in line for line in lines) == 16
