"""The third study: its disturbances, other laboratories, and its runs and report."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from torch import nn

from studies.common import channels, chest, laboratories, mechanism, networks, training
from studies.common.contributions import contributions
from studies.common.exams import FAMILIES, METRICS
from studies.common.images import Normalised, load_digits
from studies.common.methods import Training
from studies.common.records import read_runs, write_runs

arms, run, analysis, report = (
    importlib.import_module(f"studies.3.{name}") for name in ("arms", "run", "analysis", "report")
)


class Small(nn.Module):
    """Two convolutions with a depthwise one between them, and a 1x1 classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1, bias=False)
        self.middle = nn.Conv2d(8, 8, 3, groups=8)
        self.last = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.last(self.middle(self.first(x))).mean((2, 3)))


# -- disturbances ----------------------------------------------------------------------------------


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """plan_merging for Small, whose input it cannot know."""
    own = channels.plan_merging
    example = torch.zeros(1, 3, 8, 8)
    monkeypatch.setattr(channels, "plan_merging", lambda n, **s: own(n, example_input=example, **s))


def started(method: Any, network: nn.Module) -> Any:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    return method.follow(Training(network, network, optimizer, 1, 10, 0.1, 0))


def outputs(network: Small, inputs: torch.Tensor) -> torch.Tensor:
    """Of the first convolution, with its hooks."""
    return network.first(inputs).detach()


@pytest.mark.usefixtures("plan")
def test_noise_multiplies_channels_of_each_image_and_fades() -> None:
    network, inputs = Small(), torch.rand(400, 3, 4, 4) + 0.1
    plain = outputs(network, inputs)
    follower = started(channels.ChannelNoise(0.3), network)
    assert {id(layer) for layer in channels.convolutions(network)} == {
        id(network.first), id(network.last),
    }  # fmt: skip
    factors = outputs(network, inputs) / plain
    spread = factors.amax((2, 3)) - factors.amin((2, 3))
    assert float(spread.max()) < 1e-3  # one factor for each image and channel
    z = (factors.mean((2, 3)) - 1) / 0.3
    assert abs(float(z.mean())) < 0.06 and float(z.std()) == pytest.approx(1, abs=0.05)
    network.eval()
    assert torch.equal(outputs(network, inputs), plain)
    network.train()
    follower.after_step(9)  # the last of ten
    torch.testing.assert_close(outputs(network, inputs), plain)
    follower.after_step(-1)
    follower.finish(network, list)
    assert torch.equal(outputs(network, inputs), plain)


@pytest.mark.usefixtures("plan")
def test_dropout_zeroes_channels_of_each_image_and_keeps_the_mean() -> None:
    network, inputs = Small(), torch.rand(500, 3, 4, 4) + 0.1
    plain = outputs(network, inputs)
    started(channels.ChannelDropout(0.1), network)
    found = outputs(network, inputs)
    gone = (found == 0).flatten(2).all(2)
    assert float(gone.float().mean()) == pytest.approx(0.1, abs=0.02)
    kept = ~gone[:, :, None, None].expand_as(found)
    torch.testing.assert_close(found[kept], plain[kept] / 0.9)


def test_erasing_fills_a_rectangle_of_half_of_the_images() -> None:
    inputs = torch.full((400, 3, 32, 32), 7.0)
    generator = torch.Generator().manual_seed(0)
    found, targets = channels.RandomErasing(0.5).batch(inputs, torch.arange(400), 4, generator)
    changed = (found != inputs).any(1)
    share = changed.float().mean((1, 2))
    assert float((share > 0).float().mean()) == pytest.approx(0.5, abs=0.08)
    erased = share[share > 0]
    assert 0.01 < float(erased.min()) and float(erased.max()) < 0.36
    for mask in changed[share > 0][:20]:
        rows, columns = mask.any(1), mask.any(0)
        assert int(mask.sum()) == int(rows.sum() * columns.sum())  # one rectangle
    assert torch.equal(inputs, torch.full_like(inputs, 7.0)) and len(targets) == 400


# -- networks, volumes, laboratories, mechanism ----------------------------------------------------


def test_a_volume_is_an_image_and_others_of_its_class_and_part() -> None:
    data = load_digits(28)
    volumes = data.stacked(networks.DEPTH, seed=0)
    for part, (pictures, labels) in volumes.parts.items():
        images, own = data.parts[part]
        assert torch.equal(labels, own) and pictures.shape[2:] == (networks.DEPTH * 28, 28)
        assert torch.equal(pictures[:, :, :28], images)
        for picture, label in zip(pictures[:20], labels[:20], strict=True):
            slices = {slice_.numpy().tobytes() for slice_ in picture.split(28, dim=1)}
            same = {image.numpy().tobytes() for image in images[own == label]}
            assert slices <= same and len(slices) > 4


@torch.no_grad()
def test_a_network_of_volumes_takes_every_arm_and_none_of_its_slices_apart() -> None:
    torch.manual_seed(0)
    network = networks.build("volumes_small", "", classes=4, channels=3)
    assert len(channels.convolutions(network)) == 6
    pictures = torch.rand(2, 3, networks.DEPTH * 28, 28)
    volumes = torch.stack(pictures.split(28, dim=2), dim=2)
    first = network.features[1](volumes)
    assert torch.equal(network.features[:2](pictures), first)
    started(channels.ChannelNoise(0.3), network)
    factors = network.features[:2](pictures) / first
    assert float((factors.amax((2, 3, 4)) - factors.amin((2, 3, 4))).max()) < 1e-2
    assert float(factors.mean((2, 3, 4)).std()) > 0.1
    found = mechanism.mechanism(network, pictures, pictures * 0.9)
    assert found["moved_by_mixing"] > 0 and found["cka_under_noise"] > 0


def test_adapting_is_the_formula_and_leaves_the_network() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network[0].running_mean.fill_(2.0)
    images = torch.randn(48, 3, 4, 4)
    found = laboratories.adapted(network.eval(), [images], 16)
    mean = (16 * 2.0 + 48 * images.mean((0, 2, 3))) / 64
    torch.testing.assert_close(found[0].running_mean, mean)
    assert network[0].running_mean.tolist() == [2.0] * 3 and not network.training


def test_laboratories_are_scored_on_their_classes_before_and_after(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    path, content = tmp_path / "labs.npz", {}
    for images, labels in laboratories.LABORATORIES.values():
        content[images] = generator.integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
        content[labels] = np.array([0, 1, 4, 5, 6] * 8)[:, None]
    np.savez(path, **content)
    found = laboratories.read_laboratories(path, 64)
    assert found["Jiangxi"].labels.tolist() == [0, 1, 2, 3] * 8
    assert found["Jiangxi"].pixels.shape == (40, 3, 64, 64)
    digits = load_digits(64).in_colour()
    network = timm.create_model("test_resnet", num_classes=8).eval()
    scores = laboratories.in_laboratories(network, found, Normalised(digits, torch.device("cpu")))
    for name in laboratories.LABORATORIES:
        assert scores[name]["as trained"] != scores[name]["adapted"]
        assert 0 <= scores[name]["adapted"]["balanced_error"] <= 1
    assert json.loads(json.dumps(scores)) == scores
    with pytest.raises(SystemExit, match="is missing: it holds the cells"):
        laboratories.read_laboratories(tmp_path / "none.npz", 64)


def test_similarity_of_features_is_one_after_a_rotation_and_low_for_noise() -> None:
    torch.manual_seed(0)
    features = torch.randn(200, 6)
    rotation = torch.linalg.qr(torch.randn(6, 6)).Q
    assert mechanism.linear_cka(features, 3 * features @ rotation + 1) == pytest.approx(1)
    assert mechanism.linear_cka(features, torch.randn(200, 6)) < 0.2
    twins = features[:, :1].repeat(1, 3) * torch.tensor([1.0, -2.0, 0.5])
    assert mechanism.channel_correlation(twins) == pytest.approx(1)
    network = timm.create_model("test_resnet", num_classes=4)
    found = mechanism.mechanism(network, torch.randn(8, 3, 32, 32), torch.randn(8, 3, 32, 32))
    assert found["moved_by_mixing"] > 0 and network.training  # as it was


def test_chest_x_rays_are_split_by_patient(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "images").mkdir()
    names = [f"{patient:08d}_{visit:03d}.png" for patient in range(40) for visit in range(2)]
    lines = ["Image Index,Finding Labels,Patient ID"]
    for place, name in enumerate(names):
        Image.new("L", (90, 80), place).save(tmp_path / "images" / name)
        lines.append(f"{name},{'Mass|Nodule' if place % 2 else 'No Finding'},{place // 2}")
    (tmp_path / "Data_Entry_2017_v2020.csv").write_text("\n".join(lines))
    (tmp_path / "train_val_list.txt").write_text("\n".join(names[:60]))
    (tmp_path / "test_list.txt").write_text("\n".join(names[60:]))
    data = chest.load_chest(tmp_path, 32)
    sizes = {part: len(labels) for part, (_, labels) in data.parts.items()}
    assert sizes["test"] == 20 and sizes["train"] + sizes["val"] == 60 and sizes["val"] % 2 == 0
    pixels, labels = data.parts["test"]
    assert pixels.shape == (20, 1, 32, 32) and pixels[:, 0, 16, 16].tolist() == [*range(60, 80)]
    assert labels.sum(1).tolist() == [0.0, 2.0] * 10
    (tmp_path / "images" / names[0]).unlink()
    with pytest.raises(SystemExit, match="listed but not found"):
        chest.load_chest(tmp_path, 32)


# -- runs and report -------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The study on digits with a tiny network; returns the folder of its files."""
    monkeypatch.setattr(run, "load", lambda *_: load_digits().in_colour())
    monkeypatch.setattr(run, "RUNS", tmp_path / "runs.jsonl.gz")
    monkeypatch.setattr(run, "HERE", tmp_path)
    monkeypatch.setitem(arms.NETWORKS, "test_resnet", "")
    for name in arms.TRAINING:
        monkeypatch.setitem(arms.TRAINING, name, arms.Length(4))
    return tmp_path


def carry_out(folder: Path, *arguments: str) -> None:
    run.main(run.parse([*arguments, "--out", str(folder / "raw"), "--archs", "test_resnet"]))


def test_the_confirmation_begins_at_no_seed_of_the_choice() -> None:
    def seeds(*given: str) -> list[int]:
        runs = run.planned(run.parse(["confirm", "--arms", "plain", "--seeds", "2", *given]))
        return sorted({each.seed for each in runs})

    assert seeds() == [1000, 1001] and seeds("--first-seed", "1003") == [1003, 1004]
    with pytest.raises(SystemExit, match="--first-seed: the confirmation has 1000 or more"):
        seeds("--first-seed", "0")


def test_a_rate_tried_after_the_confirmation_stays_out_of_it() -> None:
    given = ["confirm", "--datasets", "chest", "--augmentations", "trivial", "--arms", "plain"]
    frozen, tried = (run.planned(run.parse([*given, *rate])) for rate in ([], ["--lr", "0.04"]))
    assert {each.lr for each in frozen} == {0.02}
    assert tried == [dataclasses.replace(each, lr=0.04) for each in frozen]
    with pytest.raises(SystemExit, match="--lr: only confirm has it"):
        run.planned(run.parse(["map", "--lr", "0.04"]))


def test_the_command_carries_out_what_is_missing(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["arms", "--arms", "plain", "channel noise", "EMA", "--augmentations", "flips"]
    command += ["--images", "64", "--seeds", "1"]
    carry_out(small, *command)
    assert capsys.readouterr().out.count("accuracy") == 3
    carry_out(small, *command)
    carry_out(small, "collect")
    for path in (small / "raw").glob("*.json"):
        path.unlink()
    carry_out(small, *command)  # they are in runs.jsonl.gz
    said = capsys.readouterr().out
    assert "accuracy" not in said and "3 new runs" in said
    (first, *_) = read_runs(small / "runs.jsonl.gz")
    assert first["run"]["steps"] == 4 and first["training_passes"] == 2  # two steps an epoch
    assert set(first["mechanism"]) == {"moved_by_mixing", "channel_correlation", "cka_under_noise"}
    assert len(list((small / "raw" / "logits").glob("*.npz"))) == 3
    with np.load(next((small / "raw" / "logits").glob("*.npz"))) as logits:
        assert len(logits.files) == 11 and logits["clean"].dtype == np.float16


def test_nothing_is_confirmed_before_it_is_frozen(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = ["--augmentations", "flips"]
    with pytest.raises(SystemExit, match="is missing: write it with freeze"):
        carry_out(small, "confirm", *only)
    carry_out(small, "freeze", *only)
    run.check_frozen(run.frozen_content("flips"), small / "frozen-flips.json")
    with pytest.raises(SystemExit, match=r"frozen-trivial\.json is missing"):
        carry_out(small, "confirm")
    for command in ("freeze", "confirm"):
        with pytest.raises(SystemExit, match="the confirmation has flips, trivial"):
            carry_out(small, command, "--augmentations", "none")
    with pytest.raises(SystemExit, match="no run of this command matches"):
        carry_out(small, "confirm", *only, "--datasets", "dermamnist")
    monkeypatch.setitem(arms.TRAINING, "flips", arms.Length(5))
    with pytest.raises(SystemExit, match=r"the training \['flips'\] are not what"):
        carry_out(small, "confirm", *only)


def test_every_arm_trains(small: Path) -> None:
    data = load_digits(64).in_colour()
    for arm in arms.ARMS:
        one = arms.run_of(arms.Cell("digits", 64, "flips", "test_resnet"), arm, 0)
        network, seen = training.train_run(
            one, training.training_part(one, data), Accelerator(cpu=True)
        )
        assert seen["passes"] == 2 and all(torch.isfinite(p).all() for p in network.parameters())
        if arm.startswith("merging"):
            assert seen["merging"]["merged"] > 0, arm


def made_up(gains: dict[str, float], seeds: int = 5) -> list[dict[str, Any]]:
    """Results of a confirmation on three data sets, with logits that are better by a gain."""
    found = []
    names = [name for family in FAMILIES.values() for name in family]
    for dataset, images in (("pneumoniamnist", 600), ("breastmnist", 0), ("chest", 0)):
        for arm, gain in gains.items():
            for seed in range(1000, 1000 + seeds):
                generator = torch.Generator().manual_seed(seed)
                labels = torch.arange(60) % 2
                noise = torch.randn(60, 2, generator=generator)
                right = torch.nn.functional.one_hot(labels, 2)
                more = 0.01 * torch.randn(60, 2, generator=generator) * len(arm)
                conditions = {"clean": noise + right + more}
                conditions |= {f"{name}/3": noise + (0.5 + gain) * right for name in names}
                row = dict.fromkeys(METRICS, 0.2)
                one = arms.run_of(arms.Cell(dataset, images, "flips"), arm, seed).to_dict()
                packed = contributions(conditions, labels, torch.ones(60), "multiclass")
                found.append(
                    {
                        "run": one,
                        "test": dict.fromkeys(conditions, row),
                        "contributions": packed,
                        "mechanism": {"moved_by_mixing": gain},
                    }
                )
    return found


def test_the_report_pools_what_was_confirmed(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "runs.jsonl.gz"
    gains = {"plain": 0.0, "merging per image": 1.0, "channel noise": 0.9}
    afterwards = made_up({"plain": 0.9, "merging per image": 0.0})
    for result in afterwards:
        result["run"]["lr"] = 0.5
    write_runs(path, [*made_up(gains), *afterwards])
    monkeypatch.setattr("sys.argv", ["report.py", "--runs", str(path), "--out", str(tmp_path)])
    report.main()
    with open(tmp_path / "pooled.csv", newline="") as file:
        rows = {
            (r["arm"], r["baseline"], r["measure"], r["tested_on"]): r
            for r in csv.DictReader(file)
            if not r["data"].startswith("without")
        }
    gain = rows["merging per image", "plain", "AUROC", "corrupted"]
    assert float(gain["mean"]) > 0.1 and float(gain["low"]) > 0
    control = rows["merging per image", "channel noise", "AUROC", "corrupted"]
    assert 0 < float(control["mean"]) < 0.3 * float(gain["mean"])
    # Holm counts the three members of the primary family, also the one that has not been run.
    smaller = min(float(gain["p"]), float(control["p"]))
    held = gain if float(gain["p"]) == smaller else control
    assert float(held["p_holm"]) == pytest.approx(3 * smaller, abs=1e-4)
    assert not rows["channel noise", "plain", "AUROC", "corrupted"]["p_holm"]
    level = rows["merging per image", "plain", "balanced accuracy", "clean"]
    assert abs(float(level["mean"])) < 0.05 and level["p_level"] and level["p_loss"]
    assert not (tmp_path / "laboratories.csv").exists()


def test_the_map_pairs_merging_with_plain_training_of_the_same_seeds() -> None:
    names = ["clean", *(f"{name}/3" for family in FAMILIES.values() for name in family)]

    def result(arm: str, seed: int, auroc: float, length: Any = None) -> dict[str, Any]:
        row = dict.fromkeys(METRICS, 0.2) | {"auroc": auroc}
        one = arms.run_of(arms.Cell("bloodmnist", 150, "none"), arm, seed, length)
        return {"run": one.to_dict(), "test": dict.fromkeys(names, row)}

    results = [
        result("plain", 0, 0.7),
        result("plain", 1, 0.1),  # without a partner
        result("merging per image", 0, 0.8),
        result("merging per image", 1000, 0.2),  # of the confirmation
        result("plain", 0, 0.3, arms.Length(77)),  # trained for another length
    ]
    auroc, clean = analysis.chart(analysis.grouped(results))
    assert (auroc["images"], auroc["augmentation"], auroc["pairs"]) == (150, "none", 1)
    assert (auroc["measure"], clean["measure"]) == ("AUROC", "balanced accuracy")
    found = [auroc[name] for name in ("plain", "merging", "difference")]
    assert found == pytest.approx([0.7, 0.8, 0.1])
    assert [clean[name] for name in ("plain", "merging", "difference")] == [0.8, 0.8, 0.0]


def test_the_laboratories_are_reported_when_all_pairs_have_run() -> None:
    labels = torch.arange(40) % 4  # as many of each class: balanced accuracy is the share of hits
    right = torch.nn.functional.one_hot(labels, 4)
    gains = {
        "plain": {"as trained": 0.4, "adapted": 1.2},
        "channel noise": {"as trained": 0.8, "adapted": 1.2},
        "EMA": {"as trained": 0.4, "adapted": 1.2},  # of the arms for which five pairs do
    }
    hits: dict[tuple[str, str], list[float]] = {}
    results = []
    for seed in range(1000, 1010):
        noise = torch.randn(40, 4, generator=torch.Generator().manual_seed(seed))
        for arm, ways in gains.items() if seed < 1005 else [*gains.items()][:2]:
            scores = {}
            for way, gain in ways.items():
                logits = noise + gain * right
                packed = contributions({"clean": logits}, labels, torch.ones(40), "multiclass")
                scores[way] = {"contributions": packed}
                hits.setdefault((arm, way), []).append(
                    float((logits.argmax(1) == labels).float().mean())
                )
            one = arms.run_of(arms.Cell("bloodmnist", 600, "flips"), arm, seed).to_dict()
            results.append({"run": one, "laboratories": {"north": scores}})
    rows = analysis.laboratories(analysis.grouped(results))
    found = {(row["measure"], row["arm"], row["baseline"], row["way"]): row for row in rows}
    for (arm, way), shares in hits.items():
        mean = found["balanced accuracy", arm, "", way]["mean"]
        assert mean == pytest.approx(np.mean(shares))
    gain = found["balanced accuracy", "channel noise", "plain", "as trained"]
    wanted = np.mean(hits["channel noise", "as trained"]) - np.mean(hits["plain", "as trained"])
    assert gain["mean"] == pytest.approx(wanted) and gain["low"] > 0 and gain["runs"] == 10
    assert found["AUROC", "plain", "", "adapted - as trained"]["low"] > 0
    level = found["balanced accuracy", "channel noise", "plain", "adapted"]
    assert level["mean"] == level["low"] == level["high"] == 0
    few = found["balanced accuracy", "EMA", "plain", "as trained"]
    assert (few["mean"], few["runs"]) == (0, 5)
    kept = {row["arm"] for row in analysis.laboratories(analysis.grouped(results[:-1]))}
    assert kept == {"plain", "EMA"}
    only = [one for one in results if one["run"]["arm"] == "EMA"][:-1]
    assert not analysis.laboratories(analysis.grouped(only))


def test_two_runs_of_a_seed_are_refused() -> None:
    runs = made_up({"plain": 0.0}, seeds=1)
    with pytest.raises(SystemExit, match="a second run of 'plain', seed 1000"):
        analysis.grouped([*runs, runs[0]])
