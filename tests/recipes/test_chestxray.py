"""recipes/chestxray.py: two phases and a control, resumed after a kill."""

from __future__ import annotations

import csv
import json
import os
import runpy
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from inmerge_wrap import InMergeWrapper
from tests.recipes.running import (
    ACCELERATE,
    TWO_PROCESSES,
    patched,
    recipe,
    refusal,
    run,
    run_here,
)

TINY = ["--arch", "test_resnet", "--weights", "none", "--size", "32", "--workers", "0"]
TINY += ["--batch-size", "16", "--lr", "0.01"]
NIH = [*TINY, "--data-root", "nih", "--epochs", "1", "1"]


def result_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text(), parse_constant=pytest.fail)


def without_times(result: dict[str, Any]) -> dict[str, Any]:
    for phase in ("first", "control", "merged"):
        for epoch in result.get(phase, {}).get("history", []):
            del epoch["seconds"]
    return {name: result[name] for name in ("first", "control", "merged") if name in result}


class Sure(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (22 + images.mean((1, 2, 3)))[:, None].expand(-1, 14)


def test_answers_that_are_sure_are_ranked() -> None:
    """Of logits of 20 and 24, single precision makes one probability."""
    functions = runpy.run_path(recipe("chestxray"))
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(-1, -1, 4, 4)
    batches = [(images, torch.tensor([0.0, 1.0])[:, None].expand(-1, 14))]
    found = functions["predict"](Accelerator(cpu=True), Sure(), batches)
    assert functions["aurocs"](*found)["mean"] == 1


def test_two_phases_and_a_control(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = release.parent, release.parent / "runs" / "chestxray"
    arguments = [*NIH, "--control", "--cache", "cache"]
    done = run(*ACCELERATE, recipe("chestxray"), *arguments, folder=folder)
    result = result_of(out)
    for phase in ("first", "control", "merged"):
        assert {"model.safetensors", "config.json", "checkpoint.pt"} <= {*os.listdir(out / phase)}
        assert len(result[phase]["history"]) == 1
        areas = result[phase]["test_auroc"]
        assert areas["Hernia"] is None and 0 <= areas["Mass"] <= 1 and 0 <= areas["mean"] <= 1
        assert f"\n{phase:12} " in done.stdout
    assert [phase for phase in result if "merging" in result[phase]] == ["merged"]
    images = {part: int(result["settings"][f"{part} images"]) for part in ("train", "val", "test")}
    assert sum(images.values()) == 80 and images["test"] == 20
    steps = {layer["steps"] for layer in result["merged"]["merging"].values()}
    assert steps == {images["train"] // 16}
    own, apart = done.stdout.split("NOT COMPARABLE: published for 25,596 official images")
    assert "CheXGCN" in apart and "CheXGCN" not in own
    (kept,) = (folder / "cache").glob("train-*.npy")
    assert len(np.load(kept)) == images["train"]
    monkeypatch.chdir(folder)
    again = refusal(monkeypatch, "chestxray", *arguments)
    assert "runs/chestxray holds a run: continue it" in str(again)
    assert result_of(out) == result


def test_the_control_sees_what_the_merged_phase_sees(
    release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With merging that merges nothing the two are one and the same training."""

    def nothing(network: nn.Module, seed: int, **_: object) -> InMergeWrapper:
        return InMergeWrapper(network, seed=seed, similarity_threshold=1.0)

    monkeypatch.setattr(InMergeWrapper, "recommended", nothing)
    monkeypatch.chdir(release.parent)
    run_here(monkeypatch, recipe("chestxray"), *NIH, "--control")
    result = without_times(result_of(release.parent / "runs" / "chestxray"))
    assert result["merged"].pop("merging")
    assert result["merged"] == result["control"] != result["first"]


def test_a_killed_run_ends_as_an_uninterrupted_one(
    release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the second of the merged epochs, before its checkpoint is written."""
    folder = release.parent
    arguments = [*NIH[:-2], "1", "2"]
    dying = (
        "save, count = torch.save, []; torch.save = lambda *a, **k: "
        "(count.append(1), len(count) == 3 and os._exit(9), save(*a, **k))"
    )
    command = [*patched("chestxray", dying), *arguments, "--out", "killed"]
    assert run(*command, folder=folder, check=False).returncode == 9
    assert not (folder / "killed" / "results.json").exists()
    resume = [*arguments, "--out", "killed", "--resume"]
    monkeypatch.chdir(folder)
    other = refusal(monkeypatch, "chestxray", *resume, "--seed", "1", "--lr", "0.02")
    assert "lr=0.01, not 0.02; seed=0, not 1" in str(other)
    # What changes no figure may differ.
    run_here(monkeypatch, recipe("chestxray"), *resume, "--cache", "cache")
    run_here(monkeypatch, recipe("chestxray"), *arguments, "--out", "whole")
    resumed, whole = (without_times(result_of(folder / name)) for name in ("killed", "whole"))
    assert resumed == whole and len(whole["merged"]["history"]) == 2
    weights = [
        load_file(folder / name / "merged/model.safetensors") for name in ("killed", "whole")
    ]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_two_processes_train_one_network(release: Path) -> None:
    command = [*TWO_PROCESSES, recipe("chestxray"), *NIH, "--cache", "cache"]
    done = run(*command, folder=release.parent)
    assert done.stdout.count("Results: ") == 1
    assert done.stderr.count("reading train:   0%") == 1, "one process writes"
    result = result_of(release.parent / "runs" / "chestxray")
    steps = int(result["settings"]["train images"]) // 16
    assert {layer["steps"] for layer in result["merged"]["merging"].values()} == {steps}


@pytest.mark.filterwarnings("ignore:unclosed file .*metadata.csv:ResourceWarning")  # of datasets
def test_without_merging_from_a_data_set_of_hugging_face(
    release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", release.parent / "cache")
    monkeypatch.chdir(release.parent)
    table = csv.DictReader((release / "Data_Entry_2017_v2020.csv").read_text().splitlines())
    entries = {row["Image Index"]: row["Finding Labels"] for row in table}
    for split, listed in (("train", "train_val"), ("test", "test")):
        folder = release.parent / "hf" / split
        folder.mkdir(parents=True)
        lines = ["file_name,labels"]
        for name in (release / f"{listed}_list.txt").read_text().split():
            shutil.copy(release / "images_001" / "images" / name, folder)
            lines.append(f"{name},{entries[name]}")
        (folder / "metadata.csv").write_text("\n".join(lines))
    arguments = [*TINY, "--dataset", "hf", "--mode", "none", "--epochs", "1", "0"]
    run_here(monkeypatch, recipe("chestxray"), *arguments)
    result = result_of(release.parent / "runs" / "chestxray")
    assert set(result) == {"settings", "first", "environment"}
    assert sum(int(result["settings"][f"{part} images"]) for part in ("train", "val", "test")) == 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*NIH, "--resume"], "runs/chestxray holds no run, or choose another --out"),
        ([*NIH, "--weights", "nowhere.pth"], "--weights nowhere.pth"),
        ([*NIH, "--batch-size", "61"], "--batch-size 61 exceeds the "),
        ([*TINY, "--data-root", "nowhere"], "nowhere/Data_Entry_2017_v2020.csv is missing"),
        ([*TINY, "--dataset", "owner/name"], "can change: pass --revision COMMIT"),
    ],
)
def test_what_is_missing_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, release: Path, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(release.parent)
    stopped = str(refusal(monkeypatch, "chestxray", *arguments))
    assert message in stopped and "\n" not in stopped


def test_options_that_do_not_fit_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        (
            ["--epochs", "1", "0"],
            "--epochs 1 0 is a first phase alone: it needs epochs and --mode none",
        ),
        (["--epochs", "0", "0", "--mode", "none"], "--epochs 0 0 is a first phase alone"),
        (["--workers", "-1"], "argument --workers: must lie in [0, inf), got -1"),
        (["--paper", "--mode", "none"], "--paper merges after each step: leave out --mode none"),
        ([], "one of the arguments --data-root --dataset is required"),
    ):
        source = ["--data-root", "nih"] if arguments else []
        assert refusal(monkeypatch, "chestxray", *source, *arguments) == 2
        assert message in capsys.readouterr().err
