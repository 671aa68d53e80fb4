"""When merging runs, which pairs pass, and what else is blended: the options beside the paper's."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from inmerge_wrap import (
    CollapseWarning,
    Fixed,
    InMergeWrapper,
    NoEffectWarning,
    Quantile,
    Schedule,
    ZScore,
    recalibrate,
    recommended_settings,
)
from inmerge_wrap.kernels import store_of
from inmerge_wrap.merging import blend_kernels, nearest_kernels, norm_scale
from inmerge_wrap.settings import MergeSettings, Strength
from tests import reference
from tests.scripts.common import equal, sgd
from tests.test_wrapper import attached, drawn, small_net, train, wrapped

ROOT = Path(__file__).parents[1]

# -- schedule ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule,levels",
    [
        (Schedule(), [1, 1, 1, 1, 1]),
        (Schedule(start=2), [0, 0, 1, 1, 1]),
        (Schedule(start=1, end=3), [0, 1, 1, 0, 0]),
        (Schedule(every=2), [1, 0, 1, 0, 1]),
        (Schedule(start=1, every=3), [0, 1, 0, 0, 1]),
        (Schedule(end=4, decay="linear"), [1, 0.75, 0.5, 0.25, 0]),
        (Schedule(end=4, decay="cosine"), [1, 0.5 + math.sqrt(2) / 4, 0.5, 0.146447, 0]),
        (Schedule(start=1, end=3, decay="linear"), [0, 1, 0.5, 0, 0]),
    ],
)
def test_levels(schedule: Schedule, levels: list[float]) -> None:
    assert [schedule.level(step) for step in range(5)] == pytest.approx(levels, abs=1e-6)


def test_what_decays() -> None:
    halfway = {"end": 4, "decay": "linear"}
    rare = MergeSettings(merge_probability=0.4, schedule=Schedule(**halfway))
    assert rare.strength(2) == Strength(0.2, 0.8)
    weak = replace(rare, schedule=Schedule(**halfway, anneals="strength"))
    assert weak.strength(2) == Strength(0.4, pytest.approx(0.9))
    small = replace(weak, direction="signed", radius=0.5)
    assert small.strength(2) == Strength(0.4, 0.25)
    assert weak.strength(4) is None


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"start": -1}, "start must be a step >= 0, got -1"),
        ({"start": 5, "end": 5}, "end must come after start=5, got 5"),
        ({"every": 0}, "every must be .* got 0"),
        ({"decay": "linear"}, "decay='linear' needs an end"),
        ({"decay": "exp", "end": 3}, "decay must be .* got 'exp'"),
        ({"anneals": "tau"}, "anneals must be .* got 'tau'"),
    ],
)
def test_bad_schedules_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(**settings)


def test_numbers_of_numpy_are_numbers() -> None:
    schedule = Schedule(start=np.int64(1), end=np.float64(5.0), every=np.int32(2))
    assert schedule == Schedule(start=1, end=5, every=2)
    settings = MergeSettings(
        merge_weight=np.float32(0.5), radius=None, seed=np.int64(3), schedule=schedule
    )
    assert settings == MergeSettings(merge_weight=0.5, seed=3, schedule=schedule)
    assert {type(v) for v in (settings.merge_weight, settings.seed, schedule.end)} == {float, int}
    with pytest.raises(TypeError, match="merge_probability must be a number in"):
        MergeSettings(merge_probability=None)


def test_the_wrapper_follows_its_schedule_through_a_resume() -> None:
    settings = {"schedule": Schedule(start=2, end=6, every=2), "similarity_threshold": -1.0}
    model, optimizer = attached(**settings)
    merged = []
    for step in range(4):
        train(model, optimizer, 1, start=step)
        merged.append(model.report().merged)
    assert merged[0] == merged[1] == 0 < merged[2] == merged[3]
    again = wrapped(**settings)
    again.load_state_dict(model.state_dict())
    again_optimizer = sgd(again)
    again_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    again.attach(again_optimizer)
    for m, o in ((model, optimizer), (again, again_optimizer)):
        train(m, o, 4, start=4)
    assert equal(model.state_dict(), again.state_dict())
    assert model.step == 8 and model.report().merged > merged[3]


# -- thresholds ----------------------------------------------------------------------------------


def test_rules_against_their_definitions() -> None:
    cosines = torch.tensor([-0.5, 0.1, math.nan, 0.2, 0.9, 0.4])
    for rule, fan_in, passing in (
        (Fixed(0.2), 9, [4, 5]),
        (ZScore(3.0), 100, [4, 5]),
        (ZScore(3.0), 10_000, [1, 3, 4, 5]),
        (Quantile(0.4), 9, [4, 5]),
        (Quantile(1.0), 9, [0, 1, 3, 4, 5]),
    ):
        assert rule.is_similar(cosines, fan_in).nonzero().flatten().tolist() == passing
    nothing = torch.empty(0)
    assert all(
        rule.is_similar(nothing, 9).shape == (0,) for rule in (Fixed(0), ZScore(1), Quantile(1))
    )


@pytest.mark.parametrize("fan_in", [9, 144, 4608])
def test_a_z_score_means_the_same_in_every_layer(fan_in: int) -> None:
    kernels = torch.randn(2, 20_000, fan_in, generator=torch.Generator().manual_seed(0))
    cosines = torch.nn.functional.cosine_similarity(*kernels)
    assert ZScore(1.0).is_similar(cosines, fan_in).float().mean() == pytest.approx(0.159, abs=0.015)
    quarter = Quantile(0.25).is_similar(cosines, fan_in)
    assert quarter.float().mean() == pytest.approx(0.25, abs=1e-3)


@pytest.mark.parametrize("share", [0.0, -1, 1.1, math.nan])
def test_bad_shares_are_named(share: float) -> None:
    with pytest.raises(ValueError, match="share must lie in"):
        Quantile(share)


def test_a_bad_z_is_named() -> None:
    with pytest.raises(ValueError, match="got nan"):
        ZScore(math.nan)


@pytest.mark.parametrize("rule", [Quantile(0.5), ZScore(0.0)])
def test_the_wrapper_merges_the_pairs_that_the_rule_passes(rule: Quantile | ZScore) -> None:
    model = wrapped(similarity_threshold=rule, merge_probability=1.0)
    before = copy.deepcopy(model.module)
    draws = [drawn(model, layer, 0, 1.0) for layer in range(2)]
    model.merge_()
    for (targets, sources), site in zip(draws, model.plan.merged, strict=True):
        weight = before.get_submodule(site.name).weight
        pairs = list(zip(targets.tolist(), sources.tolist(), strict=True))
        cosines = torch.tensor([reference.cosine(weight[i], weight[j]) for i, j in pairs])
        passed = rule.is_similar(cosines, site.fan_in).tolist()
        chosen = [pair for pair, similar in zip(pairs, passed, strict=True) if similar]
        expected, _ = reference.merge(weight.detach(), chosen, 0.8, -2.0)
        assert 0 < len(chosen) < len(pairs)
        torch.testing.assert_close(model.module.get_submodule(site.name).weight, expected)


def test_a_rule_made_of_the_fixed_one_is_asked_in_each_layer() -> None:
    class Wide(Fixed):
        def is_similar(self, cosines: torch.Tensor, fan_in: int) -> torch.Tensor:
            return super().is_similar(cosines, fan_in) & (fan_in > 30)

    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3))
    model = InMergeWrapper(net, shallow_layers=0, similarity_threshold=Wide(-1.0))
    model.merge_()
    narrow, wide = model.report()
    assert narrow.merged == 0 < wide.merged == wide.drawn


@pytest.mark.parametrize("answer", [torch.tensor(True), torch.ones(3, dtype=torch.int64), None])
def test_a_rule_that_does_not_decide_on_each_pair_is_reported(answer: Any) -> None:
    class Mine:
        def is_similar(self, cosines: torch.Tensor, fan_in: int) -> torch.Tensor:
            return cosines.new_ones(cosines.shape) if answer is None else answer

    with pytest.raises(TypeError, match=r"its is_similar\(\) gave torch"):
        wrapped(similarity_threshold=Mine(), merge_probability=1.0).merge_()


# -- partner, norm, momentum ---------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 3])
def test_the_nearest_kernel_is_found_by_looking_at_all(groups: int) -> None:
    kernels = torch.randn(12, 5, generator=torch.Generator().manual_seed(1))
    kernels[4], kernels[7] = 0.0, math.nan
    targets = torch.arange(12)
    sources = nearest_kernels(kernels, targets, groups)
    size = 12 // groups
    for target, source in zip(targets.tolist(), sources.tolist(), strict=True):
        group = range(target // size * size, target // size * size + size)
        assert source in group and source != target
        cosines = {
            other: reference.cosine(kernels[target], kernels[other])
            for other in group
            if other != target
        }
        known = {other: value for other, value in cosines.items() if not math.isnan(value)}
        if known:
            assert cosines[source] == pytest.approx(max(known.values()), abs=1e-6)


def test_most_similar_partners_are_merged() -> None:
    random = wrapped(similarity_threshold=-1.0)
    nearest = wrapped(similarity_threshold=-1.0, partner="most_similar")
    for model in (random, nearest):
        model.merge_()
    for one, other in zip(random.report(), nearest.report(), strict=True):
        assert one.drawn == other.drawn and other.mean_cosine > one.mean_cosine


def test_the_norm_is_kept_on_demand() -> None:
    generator = torch.Generator().manual_seed(0)
    kernels, partners = torch.randn(2, 6, 50, generator=generator)
    shorter = blend_kernels(kernels, partners, 0.8)
    kept = shorter * norm_scale(kernels, shorter)
    assert (shorter.norm(dim=1) < kernels.norm(dim=1) * 0.95).all()
    torch.testing.assert_close(kept.norm(dim=1), kernels.norm(dim=1))
    cosines = torch.nn.functional.cosine_similarity(kept, shorter)
    torch.testing.assert_close(cosines, torch.ones(6))
    vanished = blend_kernels(kernels, -kernels, 0.5)
    assert (vanished * norm_scale(kernels, vanished)).isfinite().all()

    model = wrapped(similarity_threshold=-1.0, keep_norm=True, merge_probability=1.0)
    before = model.module.convs[3].weight.detach().clone()
    model.merge_()
    after = model.module.convs[3].weight.detach()
    assert not torch.equal(before, after)
    torch.testing.assert_close(after.flatten(1).norm(dim=1), before.flatten(1).norm(dim=1))


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_first_moments_follow_the_weights_on_demand(kind: str) -> None:
    def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
        return sgd(model) if kind == "sgd" else torch.optim.Adam(model.parameters(), lr=1e-3)

    key = "momentum_buffer" if kind == "sgd" else "exp_avg"
    settings = {"similarity_threshold": -1.0, "merge_probability": 0.5}
    plain, follows = wrapped(**settings), wrapped(**settings, merge_momentum=True)
    moments = {}
    for model in (plain, follows):
        optimizer = optimizer_of(model)
        model.attach(optimizer)
        train(model, optimizer, 1)
        moments[model] = [
            optimizer.state[model.module.get_submodule(site.name).weight]
            for site in model.plan.merged
        ]
    assert equal(plain.module.state_dict(), follows.module.state_dict())
    for layer, (before, after) in enumerate(zip(moments[plain], moments[follows], strict=True)):
        targets, sources = drawn(plain, layer, 0, 0.5)
        pairs = list(zip(targets.tolist(), sources.tolist(), strict=True))
        expected = before[key].clone()
        for target, source in pairs:
            expected[target] = 0.8 * before[key][target] + 0.2 * before[key][source]
        torch.testing.assert_close(after[key], expected, rtol=1e-5, atol=1e-8)
        if kind == "adam":
            assert torch.equal(after["exp_avg_sq"], before["exp_avg_sq"])


def computed(compute: Callable[[nn.Conv2d], nn.Module]) -> tuple[InMergeWrapper, Tensor, Any]:
    """A network of a computed weight after its first step: wrapper, stored weight, optimizer."""
    torch.manual_seed(0)
    layer = compute(nn.Conv2d(8, 12, 3))
    model = InMergeWrapper(
        nn.Sequential(nn.Conv2d(3, 8, 3), layer),
        include=["1"],
        similarity_threshold=-1.0,
        merge_probability=1.0,
        merge_momentum=True,
    )
    optimizer = sgd(model)
    model.attach(optimizer)
    model(torch.randn(2, 3, 12, 12)).square().mean().backward()
    weight = store_of(layer).parameters[0]  # type: ignore[arg-type]
    before = weight.grad.clone()  # type: ignore[union-attr]
    optimizer.step()
    return model, before, optimizer.state[weight]["momentum_buffer"]


@pytest.mark.parametrize(
    "compute",
    [
        nn.utils.parametrizations.spectral_norm,
        lambda conv: prune.random_unstructured(conv, "weight", amount=0.3),
    ],
    ids=["spectral_norm", "pruning"],
)
def test_the_moments_of_stored_kernels_follow(compute: Callable[[nn.Conv2d], nn.Module]) -> None:
    model, gradient, momentum = computed(compute)
    targets, sources = drawn(model, 0, 0, 1.0)
    expected = gradient.clone()  # the first momentum is the gradient
    expected[targets] = 0.8 * gradient[targets] + 0.2 * gradient[sources]
    torch.testing.assert_close(momentum, expected, rtol=1e-5, atol=1e-7)


def test_the_moments_of_a_direction_and_a_magnitude_are_reported_to_stay() -> None:
    with pytest.warns(NoEffectWarning, match="computed from a direction and a magnitude"):
        _, gradient, momentum = computed(nn.utils.parametrizations.weight_norm)
    assert torch.equal(momentum, gradient)


# -- statistics ----------------------------------------------------------------------------------


def test_recalibration_measures_what_the_weights_give() -> None:
    net = small_net()
    net.drop.train()
    net.norms[1].eval()
    modes = {name: module.training for name, module in net.named_modules()}
    images = torch.randn(3, 8, 3, 12, 12)
    assert recalibrate(net, [(batch, None) for batch in images]) == 3
    first = net.convs[0](images.flatten(0, 1)).detach()
    torch.testing.assert_close(net.norms[0].running_mean, first.mean((0, 2, 3)))
    batch_variances = [net.convs[0](batch).var((0, 2, 3)) for batch in images]
    torch.testing.assert_close(net.norms[0].running_var, torch.stack(batch_variances).mean(0))
    assert {name: module.training for name, module in net.named_modules()} == modes
    assert [norm.momentum for norm in net.norms] == [0.1] * 4
    assert recalibrate(nn.Sequential(nn.Conv2d(3, 3, 1)), images) == 0


@pytest.mark.parametrize(
    "loader,error,message",
    [
        ([], ValueError, "the loader yielded no batch"),
        ([{"image": 1}], TypeError, "got dict"),
        ([torch.randn(2, 3, 12, 12), torch.randn(2, 5, 12, 12)], RuntimeError, "channels"),
    ],
)
def test_a_failed_recalibration_changes_nothing(
    loader: list, error: type[Exception], message: str
) -> None:
    net = small_net()
    net(torch.randn(4, 3, 12, 12))
    net.eval()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(error, match=message):
        recalibrate(net, loader)
    assert equal(net.state_dict(), before)
    assert [norm.momentum for norm in net.norms] == [0.1] * 4
    assert not any(module.training for module in net.modules())


@pytest.mark.parametrize("way", ["paused", "removed"])
def test_statistics_fit_again_after_plain_steps(way: str) -> None:
    model = wrapped(similarity_threshold=-1.0)
    optimizer = sgd(model)
    handle = model.attach(optimizer)
    train(model, optimizer, 2)
    assert model.statistics_lag
    if way == "paused":
        with model.paused():
            train(model, optimizer, 1)
    else:
        handle.remove()
        train(model, optimizer, 1)
    assert not model.statistics_lag


def test_a_finished_run_that_is_loaded_after_attaching_is_told() -> None:
    finished, near = wrapped(schedule=Schedule(end=20)), wrapped(schedule=Schedule(end=20))
    for model, steps in ((finished, 22), (near, 20)):
        optimizer = sgd(model)
        model.attach(optimizer)
        train(model, optimizer, steps)
    model, optimizer = attached(schedule=Schedule(end=20))
    model.load_state_dict(near.state_dict())  # a run that is resumed near its end
    with pytest.warns(NoEffectWarning, match="ended at step 20 and 22 steps are counted"):
        model.load_state_dict(finished.state_dict())


def test_the_wrapper_knows_when_its_statistics_lag() -> None:
    model, optimizer = attached(similarity_threshold=-1.0, schedule=Schedule(end=2))
    assert not model.statistics_lag
    train(model, optimizer, 2)
    assert model.statistics_lag
    model.recalibrate([torch.randn(4, 3, 12, 12)])
    assert not model.statistics_lag
    for tell in (
        lambda again: recalibrate(nn.Sequential(again), [torch.randn(4, 3, 12, 12)]),
        lambda again: again.statistics_measured(),
    ):
        again = wrapped(similarity_threshold=-1.0)
        again.merge_()
        assert again.statistics_lag
        tell(again)
        assert not again.statistics_lag
    train(model, optimizer, 1, start=2)
    assert not model.statistics_lag  # the schedule has ended: this step merged nothing
    idle = wrapped(similarity_threshold=1.0)
    idle.merge_()
    assert not idle.statistics_lag  # nothing passed


# -- collapse ------------------------------------------------------------------------------------


def test_a_collapse_is_recorded_and_reported_before_it_is_complete() -> None:
    model = wrapped(similarity_threshold=-1.0, inspect_every=10)
    with pytest.warns(CollapseWarning) as caught:
        for _ in range(60):
            model.merge_()
    named = {str(warning.message).split(" are ")[0] for warning in caught}
    assert named == {"the kernels of convs.2", "the kernels of convs.3"}
    history = [entry for entry in model.history if entry.name == "convs.3"]
    assert [entry.step for entry in history] == [1, 11, 21, 31, 41, 51]
    ranks = [entry.effective_rank for entry in history]
    assert ranks == sorted(ranks, reverse=True) and ranks[0] > 0.8 and ranks[-1] < 0.2
    cosines = [entry.mean_cosine for entry in history]
    assert cosines[-1] > 0.9 and abs(cosines[0]) < 0.2
    assert all(entry.share == 1.0 for entry in history)


def test_without_inspection_nothing_is_recorded() -> None:
    model = wrapped(similarity_threshold=-1.0, inspect_every=0)
    for _ in range(60):
        model.merge_()
    assert model.history == []


def test_momentum_that_does_not_exist_is_reported() -> None:
    model = wrapped(similarity_threshold=-1.0, merge_momentum=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.attach(optimizer)
    with pytest.warns(NoEffectWarning, match="merge_momentum has no effect: SGD keeps no"):
        train(model, optimizer, 3)


def test_moments_of_another_shape_are_no_kernels() -> None:
    """As an optimizer keeps them that projects the gradients."""

    class Projecting(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["exp_avg"] = torch.zeros(2, 3)
            return super().step(closure)

    model = wrapped(similarity_threshold=-1.0, merge_momentum=True)
    optimizer = Projecting(model.parameters(), lr=0.01)
    model.attach(optimizer)
    with pytest.warns(NoEffectWarning, match=r"or exp_avg of the shape of convs.\d.weight"):
        train(model, optimizer, 3)


# -- what is recommended ---------------------------------------------------------------------------


def test_what_was_confirmed_is_still_there_as_the_mode_of_the_weights() -> None:
    frozen = json.loads((ROOT / "studies" / "2" / "frozen.json").read_text())
    confirmed = frozen["arms"]["transient, signed 0.3"]["merge"]
    fade = confirmed.pop("schedule")
    del confirmed["transient"]
    chosen = recommended_settings(1000, mode="weights")
    schedule = chosen.pop("schedule")
    assert chosen.pop("inspect_every") == 0  # which changes no draw
    assert chosen == confirmed | {"mode": "weights"}
    assert {name: getattr(schedule, name) for name in fade} == fade
    # The study let it fade until the last step; what is cut off is next to nothing.
    before = Schedule(end=1000, **fade)
    assert schedule.end == 950 and before.level(950) < 0.01


@pytest.mark.parametrize("mode", ["outputs", "weights"])
def test_what_is_recommended_merges_everywhere_and_fades_out(mode: Any) -> None:
    model = InMergeWrapper.recommended(small_net(), total_steps=100, mode=mode)
    assert (model.mode, model.direction) == (mode, "signed")
    assert not model.plan.skipped  # the first convolutions take part
    optimizer = sgd(model)
    model.attach(optimizer)
    train(model, optimizer, 100)  # a warning would be an error here
    assert model.report().merged == model.report().drawn > 0
    assert model.step == 100 and not model.statistics_lag
    assert model.history == []  # no kernel is written, so none is compared with the others
    plain = small_net()
    train(plain, sgd(plain), 100)
    assert not equal(plain.state_dict(), model.module.state_dict())


def test_merging_that_stays_merges_in_a_wide_layer_and_ends_with_the_training() -> None:
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Conv2d(3, 128, 1), nn.Conv2d(128, 256, 3), nn.Conv2d(256, 64, 3))
    example = torch.zeros(1, 3, 8, 8)
    settings = {"total_steps": 20, "shallow_layers": 1, "example_input": example, "seed": 3}
    settings["mode"] = "step"
    model = InMergeWrapper.recommended(wide, **settings)
    paper = InMergeWrapper(copy.deepcopy(wide), shallow_layers=1, example_input=example, seed=3)
    merged = []
    for _ in range(25):
        model.merge_()
        paper.merge_()
        merged.append(model.report().merged)
    assert paper.report().merged == 0  # at tau = 0.3 nothing passes at these fan-ins
    # By chance 2.3% of independent pairs lie more than two standard deviations above no likeness.
    assert 0.005 < model.report().merged / model.report().drawn < 0.08
    assert merged[18] == merged[-1] > 0
    assert not model.statistics_lag
    other = InMergeWrapper.recommended(wide, **settings, merge_probability=0.5, keep_norm=True)
    assert (other.merge_probability, other.keep_norm, other.schedule.end) == (0.5, True, 19)
