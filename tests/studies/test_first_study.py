"""The arms of the study against their definitions, and the report against scipy."""

from __future__ import annotations

import csv
import importlib
import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from scipy import stats
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from studies.common import methods, training
from studies.common.images import load_digits
from studies.common.names import in_words

first, report_module, variants = (
    importlib.import_module(f"studies.1.{name}") for name in ("run", "report", "variants")
)

SMALL = {"dataset": "digits", "arch": "test_resnet", "train_images": 96, "batch_size": 32}


@pytest.fixture
def digits() -> Any:
    return load_digits()


def test_sam_steps_back_from_where_the_gradient_pointed() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    images = torch.randn(8, 1, 4, 4)
    network(images).square().sum().backward()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    gradients = {name: p.grad.clone() for name, p in network.named_parameters()}
    length = torch.cat([g.flatten() for g in gradients.values()]).norm()
    with methods.climbed(network, 0.5):
        for name, parameter in network.named_parameters():
            assert parameter.grad is None
            expected = before[name] + 0.5 * gradients[name] / length
            torch.testing.assert_close(parameter.detach(), expected)
        network(images).square().sum().backward()
    after = network.state_dict()
    for name, value in before.items():
        if "num_batches" not in name:
            torch.testing.assert_close(after[name], value, msg=name)
    climbed = torch.cat([p.grad.flatten() for p in network.parameters()])
    plain = torch.cat([g.flatten() for g in gradients.values()])
    assert not torch.allclose(climbed, plain)
    assert network[1].momentum == 0.1


def test_an_ensemble_answers_with_its_mean_probability() -> None:
    members = [nn.Linear(5, 3) for _ in range(3)]
    x = torch.randn(4, 5)
    for task, activation in (("multiclass", lambda z: z.softmax(1)), ("multilabel", torch.sigmoid)):
        expected = sum(activation(member(x)) for member in members) / 3
        torch.testing.assert_close(
            activation(methods.MeanProbability(members, task)(x)), expected, rtol=1e-4, atol=1e-5
        )


def test_label_noise_touches_its_share_and_the_subset_is_the_same(digits: Any) -> None:
    clean = training.Run(arm="a", seed=3, **{**SMALL, "train_images": 1000})
    noisy = training.Run(arm="a", seed=3, label_noise=0.4, **{**SMALL, "train_images": 1000})
    images, labels = training.training_part(clean, digits).parts["train"]
    same, wrong = training.training_part(noisy, digits).parts["train"]
    assert torch.equal(images, same)
    share = (labels != wrong).float().mean().item()
    assert abs(share - 0.4 * 0.9) < 0.05  # a tenth of the random labels are right
    assert digits.parts["test"] is training.training_part(noisy, digits).parts["test"]


def test_clusters_pull_kernels_to_means_and_unit_keeps_norms() -> None:
    torch.manual_seed(0)
    centres = torch.randn(2, 36)
    weight = (centres.repeat(16, 1) + 0.1 * torch.randn(32, 36)).view(32, 4, 3, 3)
    spread = weight.flatten(1).var(dim=0).sum()
    generator = torch.Generator().manual_seed(1)
    moved = weight.clone()
    variants.merge_variant_(moved, generator, probability=1.0, merge_weight=0.0, toward="clusters")
    assert len(moved.flatten(1).unique(dim=0)) <= 4  # of four centres at most, merged entirely
    assert moved.flatten(1).var(dim=0).sum() > 0.8 * spread  # the two clusters stay apart
    kept = weight.clone()
    variants.merge_variant_(kept, generator, probability=1.0, merge_weight=0.5, toward="unit")
    changed = (kept != weight).flatten(1).any(dim=1)
    assert 12 <= int(changed.sum()) <= 20
    torch.testing.assert_close(kept.flatten(1).norm(dim=1), weight.flatten(1).norm(dim=1))


def test_fine_tuning_takes_all_but_the_head(tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    trained = timm.create_model("test_resnet", num_classes=7, in_chans=1)
    save_file(trained.state_dict(), tmp_path / "weights.safetensors")
    run = training.Run(arm="a", seed=0, weights=str(tmp_path / "weights.safetensors"), **SMALL)
    network = training.build(run, classes=10, channels=1)
    same = {
        name: torch.equal(value, trained.state_dict()[name])
        for name, value in network.state_dict().items()
        if value.shape == trained.state_dict()[name].shape
    }
    assert all(same.values()) and set(network.state_dict()) - set(same) == {"fc.weight", "fc.bias"}
    with pytest.raises(SystemExit, match="only"):
        training.build(training.Run(**{**vars(run), "arch": "test_vit"}), 10, 1)
    with pytest.raises(SystemExit, match="vgg_small takes no weights"):
        training.build(training.Run(**{**vars(run), "arch": "vgg_small"}), 10, 1)


def test_every_arm_of_the_study_keeps_to_the_budget(digits: Any) -> None:
    arms = first.ARMS
    accelerator = Accelerator(cpu=True)
    for part in ("val", "test"):
        digits.parts[part] = tuple(values[:50] for values in digits.parts[part])
    outcome = {}
    for arm, method in arms.items():
        run = training.Run(arm=arm, seed=0, epochs=6, method=method, **SMALL)
        result = training.train(run, digits, accelerator, first.under_corruption)
        assert result["training_passes"] == 6, arm  # which every share divides
        assert result["inference_passes"] == (3 if "ensemble" in arm else 1)
        assert json.loads(json.dumps(result["run"])) == result["run"], arm
        assert len(result["test"]) == 5
        assert all(np.isfinite(v) for row in result["test"].values() for v in row.values()), arm
        if "merge" in result["run"]["method"] and arm != "paper":
            assert result["merging"]["merged"] > 0, arm
        outcome[arm] = result["test"]["clean"]["brier"]
    # At the paper's threshold nearly nothing merges, so that run may equal the plain one.
    assert len(set(outcome.values())) >= len(arms) - 1


def test_transient_changes_what_merges_and_nothing_else() -> None:
    for arm, parts in first.ARMS.items():
        changed = first.transient(parts)
        written = [{part.name: part.to_dict() for part in group} for group in (parts, changed)]
        if "merge" in written[0]:
            assert written[1]["merge"].pop("transient") is True, arm
        assert written[0] == written[1], arm


def test_the_budget_is_rounded_to_whole_epochs(digits: Any) -> None:
    run = training.Run(arm="sam", seed=0, epochs=3, method=(methods.SAM(0.05),), **SMALL)
    result = training.train(run, digits, Accelerator(cpu=True), first.under_corruption)
    assert result["training_passes"] == 2 * 2  # two epochs of two passes for a budget of three


def test_swa_averages_at_a_rate_that_moves_the_weights(digits: Any) -> None:
    rates: list[float] = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"])
    )
    run = training.Run(arm="swa", seed=0, epochs=4, method=(methods.SWA(0.5),), lr=0.05, **SMALL)
    try:
        training.train(run, digits, Accelerator(cpu=True), first.under_corruption)
    finally:
        hook.remove()
    epochs = np.array(rates).reshape(4, -1)
    assert epochs.shape == (4, 3) and epochs[:2].max() == pytest.approx(0.05, rel=0.1)
    np.testing.assert_allclose(epochs[2:], 0.05 / 5)  # the first averaged epoch as the others


# -- the report ------------------------------------------------------------------------------------


def write_run(
    folder: Path, arm: str, seed: int, method: dict[str, Any], auroc: float, **other: Any
) -> None:
    row = {"accuracy": auroc - 0.1, "balanced_error": 1.1 - auroc, "auroc": auroc}
    test = {
        "clean": row,
        "a/3": {**row, "auroc": auroc - 0.2},
        "b/3": {**row, "auroc": auroc - 0.4},
    }
    run = {"arm": arm, "seed": seed, "dataset": "digits", "arch": arm.partition(":")[0], "lr": 0.1}
    run |= {"train_images": 9, "epochs": 1, "batch_size": 3, "weight_decay": 5e-4, "weights": ""}
    run |= {"label_noise": 0.0, "method": method, "size": 28}
    if ":" not in arm:
        run["arch"] = "test_resnet"
    run |= other
    result = {"run": run, "training_passes": 1.0, "inference_passes": 1, "test": test}
    if "merge" in method:
        result["merging"] = {"drawn": 200, "merged": 50}
    name = "-".join([arm, str(seed), *map(str, other.values())])
    (folder / f"{name}.json".replace(":", "").replace("/", "")).write_text(json.dumps(result))


def report(monkeypatch: pytest.MonkeyPatch, sweep: str, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["report.py", "--sweep", sweep, *arguments])
    report_module.main()


def test_the_report_computes_paired_differences_as_scipy_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = np.random.default_rng(0)
    plain = generator.uniform(0.6, 0.9, 5)
    better = plain + generator.normal(0.03, 0.005, 5)
    other = plain + generator.normal(0.0, 0.02, 5)
    for seed in range(5):
        write_run(tmp_path, "plain", seed, {}, plain[seed])
        write_run(tmp_path, "better", seed, {"merge": {}}, better[seed])
        write_run(tmp_path, "ema .98", seed, {"ema": 0.98}, other[seed])
    report(monkeypatch, "study", "--runs", str(tmp_path), "--out", str(tmp_path / "out"))
    with open(tmp_path / "out" / "differences.csv", newline="") as file:
        rows = {(r["arm"], r["metric"], r["images"]): r for r in csv.DictReader(file)}
    tests = {arm: stats.ttest_rel(v, plain) for arm, v in (("better", better), ("ema .98", other))}
    adjusted = stats.false_discovery_control([tests[arm].pvalue for arm in ("better", "ema .98")])
    for (arm, test), p in zip(tests.items(), adjusted, strict=True):
        interval = test.confidence_interval(0.95)
        for metric, images in product(("AUROC", "balanced accuracy"), ("clean", "corrupted")):
            row = rows[arm, metric, images]
            got = [float(row[name]) for name in ("low", "high", "p_t", "p_adjusted")]
            assert got == pytest.approx([*interval, test.pvalue, p], abs=1e-5)
    mean = float(rows["better", "AUROC", "corrupted"]["mean"])
    assert mean == pytest.approx(better.mean() - 0.3, abs=1e-5)
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| better | 5 | 1, 1 | 25.0% |" in text
    balanced, area, cost = (line for line in text.splitlines() if line.startswith("| better"))
    assert balanced.count("**") == area.count("**") == 4 and "**" not in cost  # clean, corrupted
    alternative = [line for line in text.splitlines() if "(EMA 0.98)" in line]
    assert len(alternative) == 3 and not any("**" in line for line in alternative)


def test_an_arm_without_a_pair_has_empty_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a sweep that was stopped."""
    for arm, seed in (("plain", 0), ("better", 0), ("better", 1), ("late", 1)):
        write_run(tmp_path, arm, seed, {}, 0.8)
    report(monkeypatch, "study", "--runs", str(tmp_path), "--out", str(tmp_path))
    lines = [x for x in (tmp_path / "table.md").read_text().splitlines() if x.startswith("| late")]
    assert lines == ["| late |  |  |"] * 2 + ["| late | 1 | 1, 1 |  | 0.700 |"]


def test_every_arm_has_a_name_of_its_own_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, 2):
        arms = importlib.import_module(f"studies.{number}.run").ARMS
        names = {arm: in_words(arm) for arm in arms}
        assert len(set(names.values())) == len(names)
        unnamed = [arm for arm, name in names.items() if name == arm]
        assert set(unnamed) <= {"mixup"}
        assert max(map(len, names.values())) <= 50  # a row's label
    joined = in_words("resnet18: transient, random + EMA .98")
    assert joined == "resnet18: merge in the weights, random partner and EMA 0.98"
    assert in_words("a=0.5, p=0.3") == "a=0.5, p=0.3"


@pytest.mark.parametrize(
    "sweep,arms",
    [
        ("figure2", {"a": {"merge_weight": 0.5, "merge_probability": 0.3}}),
        ("figure3", {"b": {"shallow_layers": 0.5, "similarity_threshold": 0.1}}),
    ],
)
def test_a_sweep_of_settings_is_compared_with_plain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sweep: str, arms: dict[str, Any]
) -> None:
    write_run(tmp_path, "plain", 0, {}, 0.8)
    for arm, merge in arms.items():
        write_run(tmp_path, arm, 0, {"merge": merge}, 0.85)
    report(monkeypatch, sweep, "--runs", str(tmp_path), "--out", str(tmp_path))
    assert "+0.050" in (tmp_path / "table.md").read_text()


def test_architectures_are_compared_with_their_own_plain_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for arch, plain in (("test_resnet", 0.7), ("test_vit", 0.9)):
        for seed in range(2):
            write_run(tmp_path, f"{arch}: plain", seed, {}, plain)
            write_run(tmp_path, f"{arch}: paper", seed, {"merge": {}}, plain + 0.01 + 0.01 * seed)
    write_run(tmp_path, "test_vgg: plain", 0, {}, 0.8)  # as in a sweep that was stopped
    report(monkeypatch, "architectures", "--runs", str(tmp_path), "--out", str(tmp_path))
    text = (tmp_path / "table.md").read_text()
    assert text.count("+0.015") == 8 and "0.700 ± 0.000" in text and "0.900 ± 0.000" in text
    assert "| test_vgg: plain training | 1 | 1, 1 |  | 0.700 |" in text


@pytest.mark.parametrize(
    "field,values,titles",
    [
        ("size", (28, 64), ("28 px", "64 px")),
        ("weights", ("one/best/model.safetensors", "two/best/model.safetensors"), None),
    ],
)
def test_runs_of_different_settings_are_not_paired(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    field: str,
    values: tuple[Any, Any],
    titles: tuple[str, str] | None,
) -> None:
    for value, plain in zip(values, (0.7, 0.9), strict=True):
        write_run(tmp_path, "plain", 0, {}, plain, **{field: value})
        write_run(tmp_path, "better", 0, {"merge": {}}, plain + 0.01, **{field: value})
    report(monkeypatch, "study", "--runs", str(tmp_path), "--out", str(tmp_path))
    heads = [
        line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("### ")
    ]
    assert len(heads) == 2
    for title in titles or [f"from {value}" for value in values]:
        assert sum(title in head for head in heads) == 1
    with open(tmp_path / "differences.csv", newline="") as file:
        differences = {row["difference"] for row in csv.DictReader(file)}
    assert differences == {"0.01000"}


def test_the_report_refuses_what_it_can_not_compare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match="there are no runs"):
        report(monkeypatch, "study", "--runs", str(tmp_path), "--out", str(tmp_path))
    write_run(tmp_path, "better", 0, {"merge": {}}, 0.8)
    with pytest.raises(SystemExit, match=r"28 px, .*: there is no run of 'plain' to compare"):
        report(monkeypatch, "study", "--runs", str(tmp_path), "--out", str(tmp_path))
    folder = tmp_path / "architectures"
    folder.mkdir()
    write_run(folder, "a_net: paper", 0, {"merge": {}}, 0.8)
    with pytest.raises(SystemExit, match="a_net: there is no run of 'a_net: plain' to compare"):
        report(monkeypatch, "architectures", "--runs", str(folder), "--out", str(folder))
