"""Monitoring: the logged numbers are the report's and the weights', and trackers take them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from inmerge_wrap import Fixed, InMergeWrapper
from inmerge_wrap.monitoring import tracker_values
from inmerge_wrap.similarity import effective_rank
from tests.test_wrapper import SmallNet, attached, train, wrapped


def test_values_are_those_of_the_report_and_of_the_weights() -> None:
    model, optimizer = attached(similarity_threshold=0.05)
    train(model, optimizer, 6)
    report, values = model.report(), tracker_values(model)
    assert report.merged > 0
    assert values["merge/step"] == 6
    assert values["merge/share"] == report.merged / report.drawn
    for layer in report:
        assert values[f"merge_share/{layer.name}"] == layer.share
        assert values[f"merge_cosine/{layer.name}"] == pytest.approx(layer.mean_cosine)
        weight = model.module.get_submodule(layer.name).weight
        rank = effective_rank(weight.flatten(1)).item()
        assert values[f"merge_rank/{layer.name}"] == pytest.approx(rank)
    assert len(values) == 2 + 3 * len(report)
    assert all(type(value) is float and math.isfinite(value) for value in values.values())


def test_since_gives_the_pairs_of_the_window_alone() -> None:
    model, optimizer = attached(similarity_threshold=-1.0, merge_probability=0.8)
    train(model, optimizer, 3)
    earlier = model.report()
    assert all(layer.share == 1.0 for layer in earlier)
    model.similarity_threshold = Fixed(1.0)  # nothing merges from now on
    train(model, optimizer, 2, start=3)
    now = model.report()
    values = tracker_values(model, since=earlier, prefix="m")
    assert values["m/share"] == 0.0 and now.merged > 0
    for before, after in zip(earlier, now, strict=True):
        assert values[f"m_share/{after.name}"] == 0.0
        total = after.mean_cosine * after.drawn - before.mean_cosine * before.drawn
        expected = total / (after.drawn - before.drawn)
        assert values[f"m_cosine/{after.name}"] == pytest.approx(expected, abs=1e-9)


def test_a_report_from_before_a_restart_is_refused() -> None:
    model, optimizer = attached(similarity_threshold=-1.0)
    train(model, optimizer, 3)
    earlier = model.report()
    model.restart()
    train(model, optimizer, 1)
    with pytest.raises(ValueError, match=r"drawn pairs and the model .* after restart"):
        tracker_values(model, since=earlier)


def test_a_value_that_does_not_exist_is_absent() -> None:
    model = wrapped()
    with torch.no_grad():
        model.module.convs[3].weight.zero_()
    names = set(tracker_values(model))
    assert names == {"merge/step", "merge_rank/convs.2"}


def test_it_looks_into_what_prepare_gives_and_refuses_what_does_not_merge() -> None:
    model = wrapped()
    assert tracker_values(nn.Sequential(model)) == tracker_values(model)
    with pytest.raises(TypeError, match="no InMergeWrapper in this SmallNet"):
        tracker_values(SmallNet())
    other = InMergeWrapper(SmallNet(), shallow_layers=1)
    with pytest.raises(ValueError, match="other merged layers"):
        tracker_values(model, since=other.report())


def test_it_changes_nothing() -> None:
    model = wrapped(similarity_threshold=-1.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    tracker_values(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the tensorboard package
def test_one_line_logs_to_tensorboard(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    pytest.importorskip("tensorboard")
    accelerator = accelerate.Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
    accelerator.init_trackers("run")
    assert accelerator.trackers, "accelerate drops a tracker whose package is missing"
    model, optimizer = attached(similarity_threshold=-1.0)
    model, optimizer = accelerator.prepare(model, optimizer)
    logged = []
    for step in range(3):
        train(model, optimizer, 1, start=step)
        accelerator.log(tracker_values(model), step=step)
        logged.append(tracker_values(model))
    accelerator.end_training()

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next(tmp_path.rglob("events.*")).parent)).Reload()
    assert set(events.Tags()["scalars"]) == set(logged[-1])
    for name in logged[-1]:
        stored = [(event.step, event.value) for event in events.Scalars(name)]
        assert stored == [(s, pytest.approx(v[name])) for s, v in enumerate(logged)]
