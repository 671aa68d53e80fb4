"""InMergeWrapper: when it merges, what it leaves alone, how it resumes, what it says."""

from __future__ import annotations

import copy
import itertools
import math
import multiprocessing
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from inmerge_wrap import (
    InMergeWrapper,
    NoEffectWarning,
    Quantile,
    Schedule,
    ZScore,
    plan_merging,
)
from inmerge_wrap.pairs import draw_layer
from tests.scripts.common import equal, sgd


class SmallNet(nn.Module):
    """Four convolutions with batch normalisation and dropout."""

    def __init__(self) -> None:
        super().__init__()
        widths = [3, 8, 12, 16, 16]
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:])
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x)).relu()
        return self.head(self.drop(x.mean((2, 3))))


def small_net(seed: int = 0) -> SmallNet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SmallNet()


def wrapped(**settings: Any) -> InMergeWrapper:
    settings = {"similarity_threshold": 0.0, "shallow_layers": 2, **settings}
    return InMergeWrapper(small_net(), **settings)


def attached(**settings: Any) -> tuple[InMergeWrapper, torch.optim.Optimizer]:
    """A wrapped small network and the optimizer after whose steps it merges."""
    model = wrapped(**settings)
    optimizer = sgd(model)
    model.attach(optimizer)
    return model, optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> None:
    """Some steps on data that depend on the step alone; the same for every model."""
    model.train()
    for step in range(start, start + steps):
        torch.manual_seed(1000 + step)
        images, labels = torch.randn(4, 3, 12, 12), torch.randint(5, (4,))

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)  # noqa: B023
            loss.backward()
            return loss

        optimizer.step(closure)


def drawn(model: InMergeWrapper, layer: int, step: int, probability: float) -> Tensor:
    """What a layer draws in a step: targets and sources, shape (2, pairs)."""
    return torch.stack(draw_layer(model.plan.merged[layer], probability, model.seed, step))


# -- when it merges ------------------------------------------------------------------------------


def test_validation_never_merges() -> None:
    model = wrapped()
    model.attach(sgd(model))
    before = copy.deepcopy(model.state_dict())
    model.eval()
    for _ in range(3):
        model(torch.randn(4, 3, 12, 12))
    assert equal(before, model.state_dict())


def test_attaching_twice_merges_once_and_removing_ends_it() -> None:
    model = wrapped()
    optimizer = sgd(model)
    handle = model.attach(optimizer)
    assert model.attach(optimizer) is handle
    train(model, optimizer, 2)
    assert model.step == 2
    handle.remove()
    train(model, optimizer, 1)
    assert model.step == 2
    model.attach(optimizer)
    train(model, optimizer, 1)
    assert model.step == 3


def test_a_pass_by_hand_merges_all_planned_layers() -> None:
    model = wrapped(similarity_threshold=-1.0, merge_probability=1.0)
    before = copy.deepcopy(model.module.state_dict())
    model.merge_()
    changed = {
        name for name, value in model.module.state_dict().items() if not value.equal(before[name])
    }
    assert changed == {"convs.2.weight", "convs.3.weight"}
    assert model.step == 1


def test_a_pass_by_hand_waits_under_paused_as_the_steps_do() -> None:
    model = wrapped(similarity_threshold=-1.0, merge_probability=1.0)
    before = copy.deepcopy(model.state_dict())
    with model.paused():
        model.merge_()
    assert model.step == 0 and equal(before, model.state_dict())
    model.merge_()
    assert model.step == 1 and not equal(before, model.state_dict())


def test_what_is_no_optimizer_is_refused() -> None:
    with pytest.raises(TypeError, match=r"attach needs a torch\.optim\.Optimizer, got dict"):
        wrapped().attach({})


def test_two_wrappers_of_one_network_do_not_share_an_optimizer() -> None:
    network = small_net()
    first = InMergeWrapper(network, shallow_layers=2)
    optimizer = sgd(network)
    handle = first.attach(optimizer)
    second = InMergeWrapper(network, shallow_layers=2)  # the cell of a notebook, run again
    with pytest.raises(ValueError, match=r"another InMergeWrapper of this .* handle\.remove\(\)"):
        second.attach(optimizer)
    handle.remove()
    second.attach(optimizer)
    train(second, optimizer, 1)
    assert (first.step, second.step) == (0, 1)
    other = wrapped()  # two networks may share an optimizer
    optimizer.add_param_group({"params": other.parameters()})
    other.attach(optimizer)


def test_networks_that_share_a_weight_do_not_merge_it_twice_in_a_step() -> None:
    first, second = small_net(), small_net()
    name = InMergeWrapper(small_net(), shallow_layers=2).plan.merged[0].name
    second.set_submodule(name, first.get_submodule(name))
    one, other = (InMergeWrapper(network, shallow_layers=2) for network in (first, second))
    parameters = dict.fromkeys([*one.parameters(), *other.parameters()])
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    one.attach(optimizer)
    with pytest.raises(ValueError, match=rf"already merges {name} for .* \(exclude='{name}'\)"):
        other.attach(optimizer)
    InMergeWrapper(second, shallow_layers=2, exclude=name).attach(optimizer)
    # A second optimizer merges in steps of its own.
    other.attach(torch.optim.SGD(second.parameters(), lr=0.1))


# -- it leaves no trace --------------------------------------------------------------------------


def test_wrapping_touches_neither_random_state_nor_network() -> None:
    net = small_net()
    net.norms[0].eval()
    flags = {name: module.training for name, module in net.named_modules()}
    before = copy.deepcopy(net.state_dict())
    random_state = torch.get_rng_state()
    model = InMergeWrapper(net, shallow_layers=2)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert {name: module.training for name, module in net.named_modules()} == flags
    assert equal(net.state_dict(), before)
    assert not any(module._forward_hooks for module in net.modules())
    assert model.module is net


def test_merging_does_not_touch_the_global_generator() -> None:
    model = wrapped()
    random_state = torch.get_rng_state()
    model.merge_()
    assert torch.equal(torch.get_rng_state(), random_state)


def members(part: object) -> list[object]:
    """What one of the wrapper's own objects holds."""
    return list(getattr(part, "__dict__", {}).values())


def test_the_wrapper_holds_no_copy_of_a_parameter() -> None:
    net = small_net()
    model = InMergeWrapper(net, shallow_layers=2)
    own = {id(parameter) for parameter in net.parameters()}
    assert {id(parameter) for parameter in model.parameters()} == own
    parts = [*vars(model).values(), *vars(model._driver).values()]
    held = [value for part in parts for value in (part, *members(part))]
    tensors = [value for value in held if isinstance(value, torch.Tensor)]
    assert 0 < sum(tensor.numel() for tensor in tensors) <= 5 * len(model.plan.merged)


def test_forward_passes_everything_through() -> None:
    class TwoInputs(SmallNet):
        def forward(self, x: torch.Tensor, *, scale: float) -> dict[str, torch.Tensor]:
            return {"logits": super().forward(x) * scale}

    net = TwoInputs().eval()
    image = torch.randn(2, 3, 12, 12)
    model = InMergeWrapper(net, shallow_layers=2, example_input={"x": image, "scale": 2.0})
    assert torch.equal(model(image, scale=3.0)["logits"], net(image, scale=3.0)["logits"])


# -- resuming ------------------------------------------------------------------------------------


def test_draws_depend_on_seed_step_and_layer_only() -> None:
    def draws(model: InMergeWrapper) -> list[list[int]]:
        layers = range(len(model.plan.merged))
        return [drawn(model, layer, model.step, 0.3)[0].tolist() for layer in layers]

    model, same, other = wrapped(), wrapped(), wrapped(seed=1)
    torch.randn(5)
    assert draws(model) == draws(same) != draws(other)
    assert draws(model)[0] != draws(model)[1]
    before = draws(model)
    model.merge_()
    assert draws(model) != before
    alone = wrapped(exclude="convs.2")
    assert draws(alone) == [draws(same)[1]]


def test_another_seed_or_plan_in_the_checkpoint_is_reported() -> None:
    model = wrapped()
    model.merge_()
    with pytest.warns(UserWarning, match="trained with seed=0, this wrapper draws with seed=4"):
        wrapped(seed=4).load_state_dict(model.state_dict())
    longer = wrapped(schedule=Schedule(end=500))
    with pytest.warns(UserWarning, match=r"another schedule: at step 1 this one.*restart\(\)"):
        longer.load_state_dict(model.state_dict())
    assert longer.step == 1
    fewer = wrapped(exclude="convs.2")
    other = wrapped(mode="outputs", include="convs.[12]")
    for new, plan in ((fewer, r"1 of this plan \(drawn"), (other, r"2 of this plan \(images")):
        with pytest.warns(UserWarning, match=rf"merged 2 layers \(drawn pairs\), not the {plan}"):
            new.load_state_dict(model.state_dict())
        assert new.step == 1 and new.report().drawn == 0
    another = wrapped(include="convs.[01]", shallow_layers=0)
    assert len(another.plan.merged) == 2 and another.plan.merged != model.plan.merged
    with pytest.warns(UserWarning, match="not the 2 of this plan"):
        another.load_state_dict(model.state_dict())
    assert another.step == 1 and another.report().drawn == 0


# -- it behaves like its network -----------------------------------------------------------------


def test_copies_and_pickles_are_independent_and_drive_no_optimizer() -> None:
    model, optimizer = attached()
    train(model, optimizer, 1)
    with model.paused():  # which no copy is
        twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for twin in twins:
        assert twin.step == 1
        train(model, optimizer, 1)
        assert twin.step == 1
        own = sgd(twin)
        twin.attach(own)
        train(twin, own, 1)
        assert twin.step == 2
        model.load_state_dict(model.state_dict())


def step_elsewhere(models: list[InMergeWrapper], merged: Any) -> None:
    """What another process does with the models that it was sent."""
    for model in models:
        own = sgd(model)
        model.attach(own)
        train(model, own, 1)
        merged.put(model.report().merged)


def test_a_process_that_was_sent_a_model_leaves_the_counts_of_its_parent_alone() -> None:
    """The two share the memory of all tensors that were sent."""
    settings = {"similarity_threshold": -1.0, "merge_probability": 1.0}
    pairs = [attached(mode=mode, **settings) for mode in ("step", "outputs", "weights")]
    for model, optimizer in pairs:
        train(model, optimizer, 1)
    models = [model for model, _ in pairs]
    counted = [copy.deepcopy(model).report() for model in models]
    context = multiprocessing.get_context("spawn")
    merged = context.Queue()
    process = context.Process(target=step_elsewhere, args=(models, merged))
    process.start()
    twice = [merged.get(timeout=300) for _ in models]
    process.join()
    assert twice == [2 * report.merged for report in counted]
    assert [model.report() for model in models] == counted


def test_timm_sees_its_model_through_the_wrapper() -> None:
    model = InMergeWrapper(timm.create_model("resnet18", num_classes=3))
    assert model.num_classes == 3
    assert model.pretrained_cfg["architecture"] == "resnet18"
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = model.nonsense


# -- nothing silent ------------------------------------------------------------------------------


def test_training_without_an_optimizer_warns_once() -> None:
    model = wrapped()
    with pytest.warns(NoEffectWarning, match=r"10 training forward passes.*model\.attach"):
        for _ in range(10):
            model(torch.randn(4, 3, 12, 12))
    for _ in range(30):  # a second warning would be an error here
        model(torch.randn(4, 3, 12, 12))


def test_merging_by_hand_counts_as_merging() -> None:
    model = wrapped()
    for _ in range(3):
        model.merge_()
        for _ in range(20):  # accumulated gradients: many forward passes to a step
            model(torch.randn(4, 3, 12, 12))
    with pytest.warns(NoEffectWarning, match=r"merge_\(\) is no longer called"):
        for _ in range(1000):
            model(torch.zeros(1, 3, 12, 12))


def test_parts_of_the_network_are_not_lost_on_the_wrapper() -> None:
    model = InMergeWrapper(timm.create_model("test_resnet"))
    for value in (nn.Linear(16, 2), nn.Parameter(torch.zeros(2))):
        with pytest.raises(AttributeError, match=r"a fc of its own.*model\.module\.fc = "):
            model.fc = value
    assert list(dict(model.named_children())) == ["module"]
    model.module.fc = nn.Linear(model.module.fc.in_features, 2)
    assert model.fc.out_features == 2
    model.loss = nn.CrossEntropyLoss()  # what the network does not have may stand on the wrapper
    model.module = model.module


def test_an_attribute_of_the_network_is_set_where_its_forward_pass_reads_it() -> None:
    network: Any = timm.create_model("test_resnet")
    network.plan = "of the network"
    network.register_buffer("scale", torch.ones(1))
    model = InMergeWrapper(network)
    model.drop_rate, model.scale, model.note = 0.5, torch.zeros(1), "of the wrapper"
    assert network.drop_rate == 0.5 and not network.scale and not hasattr(network, "note")
    assert network.plan == "of the network" and model.plan.merged


def test_timm_freezes_a_wrapped_network_as_it_does_a_bare_one() -> None:
    network = timm.create_model("resnet10t", num_classes=3)
    model = InMergeWrapper(network)
    timm.utils.freeze(model, ["conv1", "layer1"])
    timm.utils.freeze(model, ["bn1"])
    assert type(network.bn1).__name__ == "FrozenBatchNorm2d" and "bn1" not in model._modules
    frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
    wanted = [name for name, _ in network.named_parameters()]
    assert frozen == {name for name in wanted if name.startswith(("conv1.", "layer1."))}


def test_another_network_cannot_take_the_place_of_the_wrapped_one() -> None:
    model = wrapped()
    with pytest.raises(AttributeError, match="wrap that network, InMergeWrapper"):
        model.module = small_net()
    model.module = torch.compile(model.module)  # it is the same
    model.module = model.module._orig_mod


def test_settings_changed_later_are_checked_as_at_first() -> None:
    model = wrapped(similarity_threshold=1.0, merge_probability=1.0)
    model.merge_()
    assert model.report().merged == 0
    model.similarity_threshold = -1.0
    model.merge_()
    assert 0 < model.report().merged < model.report().drawn
    for name, value, message in (
        ("similarity_threshold", 1.5, r"must lie in \[-1, 1\], got 1.5"),
        ("merge_weight", -0.1, r"merge_weight must lie in \[0, 2\], got -0.1"),
    ):
        before = getattr(model, name)
        with pytest.raises(ValueError, match=message):
            setattr(model, name, value)
        assert getattr(model, name) == before
    with pytest.raises(TypeError, match="schedule must be a Schedule, got 'cosine'"):
        model.schedule = "cosine"
    model.settings = replace(model.settings, merge_weight=1.0)  # no kernel changes any more
    assert model.merge_weight == 1.0
    before = copy.deepcopy(model.module.state_dict())
    with pytest.warns(NoEffectWarning, match=r"merge_weight=1\.0 leaves every kernel as it is"):
        model.merge_()
    assert equal(before, model.module.state_dict())
    with pytest.raises(AttributeError, match="the plan cannot change"):
        model.plan = plan_merging(model.module)


def test_going_back_to_an_earlier_checkpoint_goes_back_in_the_history() -> None:
    model, optimizer = attached(similarity_threshold=-1.0, merge_weight=0.999, inspect_every=5)
    train(model, optimizer, 8)
    state = copy.deepcopy(model.state_dict())
    train(model, optimizer, 20)
    model.load_state_dict(state)
    assert {entry.step for entry in model.history} == {1, 6}
    train(model, optimizer, 10)
    assert all(entry.share == 1.0 for entry in model.history)  # every pair passes
    assert not model.load_state_dict(state).missing_keys and not model.statistics_lag


def test_layers_that_never_run_have_draws_of_their_own() -> None:
    net = timm.create_model("test_resnet", num_classes=3)
    net.idle = nn.ModuleList([nn.Conv2d(8, 40, 3), nn.Conv2d(8, 40, 3)])
    model = InMergeWrapper(net, also_merge=["unused"], merge_probability=0.5)
    layers = [n for n, site in enumerate(model.plan.merged) if site.depth is None]
    first, second = (drawn(model, layer, 0, 0.5) for layer in layers)
    assert first.shape != second.shape or not torch.equal(first, second)


def test_inference_and_attached_training_do_not_warn() -> None:
    model = wrapped()
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(4, 3, 12, 12))
    optimizer = sgd(model)
    model.attach(optimizer)
    train(model, optimizer, 30)


@pytest.mark.parametrize("threshold", [0.999, ZScore(1000.0)], ids=["fixed", "rule"])
def test_a_threshold_that_never_fires_is_reported_with_what_works(threshold: Any) -> None:
    model = wrapped(similarity_threshold=threshold)
    optimizer = sgd(model, lr=0.0)
    model.attach(optimizer)
    with pytest.warns(NoEffectWarning) as caught:
        train(model, optimizer, 100)
    assert len(caught) == 1
    message = str(caught[0].message)
    best = max(model.report(), key=lambda layer: layer.max_cosine or -1.0)
    assert best.name in message and f"{best.max_cosine:.4f}" in message
    ((z_score, quantile),) = re.findall(
        r"use similarity_threshold=(ZScore\(.*?\))|or similarity_threshold=(Quantile\(.*?\))",
        message,
    )
    advised = eval(z_score or quantile, {"ZScore": ZScore, "Quantile": Quantile})
    again = [wrapped(similarity_threshold=advised)]
    if "InMergeWrapper.recommended(network, total_steps=..., mode='step')" in message:
        settings = {"total_steps": 200, "mode": "step", "shallow_layers": 2}
        again += [InMergeWrapper.recommended(small_net(), **settings)]
    assert len(again) == (2 if threshold == 0.999 else 1)
    for model in again:
        optimizer = sgd(model, lr=0.0)
        model.attach(optimizer)
        train(model, optimizer, 100)  # a warning would be an error here
        assert model.report().share > 0.005


@pytest.mark.parametrize(
    "schedule,last_silent",
    [(Schedule(end=3), 102), (Schedule(start=5, end=25), 224), (Schedule(end=3, every=2), 102)],
)
def test_training_long_past_the_schedule_is_reported(schedule: Schedule, last_silent: int) -> None:
    model = wrapped(schedule=schedule)
    for _ in range(last_silent):
        model.merge_()
    with pytest.warns(NoEffectWarning, match=rf"ended at step {schedule.end}, .* not epochs"):
        model.merge_()
    for _ in range(200):
        model.merge_()  # once
    for settings in ({}, {"schedule": Schedule(start=3)}):
        endless = wrapped(merge_weight=0.999, inspect_every=0, **settings)
        for _ in range(200):
            endless.merge_()


def test_the_report_says_when_merging_ended() -> None:
    model = wrapped(schedule=Schedule(end=3, decay="cosine"))
    for step in range(5):
        ended = "Merging ended at step 3, as its schedule says; training has run to step"
        assert (ended in str(model.report())) == (model.report().ended == 3) == (step > 3)
        model.merge_()
    assert str(model.report()).splitlines()[-1].endswith("training has run to step 5.")


def test_the_report_says_why_nothing_ever_merged() -> None:
    model = wrapped()
    assert model.report().idle is None  # it has not trained yet
    model(torch.randn(4, 3, 12, 12)).sum().backward()
    last = str(model.report()).splitlines()[-1]
    assert last == "Never merged: no optimizer is attached. Call model.attach(optimizer)."
    optimizer = sgd(model)
    model.attach(optimizer)
    assert "never completed a step" in str(model.report().idle)
    train(model, optimizer, 1)
    model(torch.randn(4, 3, 12, 12))
    assert model.report().idle is None
    resumed = wrapped()
    resumed.load_state_dict(model.state_dict())
    resumed(torch.randn(4, 3, 12, 12))
    assert resumed.report().idle is None and "Never" not in str(resumed.report())


def test_a_probability_of_zero_is_reported() -> None:
    model = wrapped(merge_probability=0.0)
    with pytest.warns(NoEffectWarning, match="no pair was drawn in 100 steps"):
        for _ in range(100):
            model.merge_()


@pytest.mark.parametrize(
    "settings",
    [{"merge_weight": 1.0}, {"direction": "signed", "radius": 0.0}],
    ids=["merge_weight", "radius"],
)
def test_a_change_of_size_zero_is_reported(settings: dict[str, Any]) -> None:
    """At once: the report counts all pairs as merged, so that nothing else would show it."""
    model = wrapped(similarity_threshold=-1.0, **settings)
    name, value = list(settings.items())[-1]
    with pytest.warns(NoEffectWarning, match=f"{name}={value} leaves every kernel as it is"):
        model.merge_()
    model.merge_()  # once
    assert model.report().merged > 0


def test_no_name_of_the_wrapper_is_one_that_a_library_calls_by_itself() -> None:
    """fastai calls ``reset`` of a model before each fit: a resumed run once began again."""
    assert not hasattr(InMergeWrapper, "reset")


# -- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"merge_weight": 2.01}, r"merge_weight must lie in \[0, 2\], got 2.01"),
        ({"merge_weight": math.nan}, r"merge_weight must lie in \[0, 2\], got nan"),
        ({"similarity_threshold": -1.01}, r"similarity_threshold must lie in \[-1, 1\], got -1.01"),
        ({"merge_probability": 3}, r"merge_probability must lie in \[0, 1\], got 3"),
        ({"seed": -1}, r"seed must be an integer in \[0, 2\*\*32\), got -1"),
        ({"seed": 2**32}, r"seed must be an integer in \[0, 2\*\*32\), got 4294967296"),
        ({"partner": "best"}, "partner must be 'random' or 'most_similar'.*, got 'best'"),
        ({"inspect_every": -1}, "inspect_every must be a count of steps >= 0, got -1"),
        ({"check_replicas_every": 0.5}, "check_replicas_every must be a count of steps >= 0"),
    ],
)
def test_bad_arguments_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrapped(**settings)


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"merge_weight": "a"}, r"merge_weight must be a number in \[0, 2\], got 'a'"),
        ({"merge_probability": None}, r"merge_probability must be a number in \[0, 1\], got None"),
        ({"similarity_threshold": "a"}, r"must be a number in \[-1, 1\] or a rule .* got 'a'"),
        (
            {"alpha": 0.9},
            r"alpha=0.9: .* is merge_weight \(in \[0, 2\]\), so write merge_weight=0.9",
        ),
        ({"tau": 0.1}, r"tau=0.1: .* is similarity_threshold \(in \[-1, 1\].*write similarity_th"),
        ({"p": 1.0}, r"p=1.0: .* is merge_probability \(in \[0, 1\]\)"),
        ({"L_s": 3}, r"L_s=3: .* is shallow_layers \(a count"),
        ({"colour": 3}, "unexpected keyword argument 'colour'"),
    ],
)
def test_arguments_of_another_type_or_name_are_named(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        InMergeWrapper(small_net(), **settings)
    with pytest.raises(TypeError, match=message):
        InMergeWrapper.recommended(small_net(), total_steps=10, **settings)


@pytest.mark.parametrize("steps", ["ten", 0, None])
def test_a_course_of_no_steps_is_named(steps: Any) -> None:
    with pytest.raises(
        ValueError, match=f"total_steps must be a count of steps >= 1, got {steps!r}"
    ):
        InMergeWrapper.recommended(small_net(), total_steps=steps)


def test_what_is_no_network_is_refused_with_the_way_to_one() -> None:
    told = r"got 'resnet18': build the network first, for example timm\.create_model\('resnet18'\)"
    with pytest.raises(TypeError, match=told):
        InMergeWrapper("resnet18")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=told):
        plan_merging("resnet18")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got <class .*: pass the network itself, not its class"):
        InMergeWrapper(SmallNet)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "outer,place",
    [
        (lambda model: model, "module"),
        (torch.compile, "_orig_mod.module"),
        (nn.Sequential, "0.module"),
    ],
    ids=["alone", "compiled", "inside"],
)
def test_wrapping_twice_is_refused(outer: Callable[[nn.Module], nn.Module], place: str) -> None:
    once = outer(wrapped())
    with pytest.raises(ValueError, match=rf"already wrapped.* the bare network, model\.{place}$"):
        InMergeWrapper(once, shallow_layers=2)
    InMergeWrapper(once.get_submodule(place), shallow_layers=2)  # the remedy


def test_a_layer_that_was_replaced_is_reported() -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3))
    model = InMergeWrapper(net, shallow_layers=0)
    net[1] = nn.Conv2d(16, 8, 3)
    with pytest.raises(RuntimeError, match=r"1 have the shape \(8, 16, 3, 3\) instead of"):
        model.merge_()
