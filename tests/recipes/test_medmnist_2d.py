"""recipes/medmnist_2d.py: pairs of runs, continued where they stopped."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import medmnist
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.recipes.running import ACCELERATE, TWO_PROCESSES, offline, recipe, refusal, run, run_here

TINY = ["--arch", "test_resnet", "--epochs", "1", "--batch-size", "32", "--data-root", "."]


def results(folder: Path) -> list[Path]:
    return sorted((folder / "runs" / "medmnist").glob("*/result.json"))


def test_answers_that_are_sure_are_ranked() -> None:
    """Of logits of 20 and 25, single precision makes one probability."""
    parts = {"val": (torch.tensor([[0.0, 20.0], [0.0, 25.0]]), torch.tensor([0, 1]))}
    functions = runpy.run_path(recipe("medmnist_2d"))
    data = functions["Data"](parts, "multiclass", ["a", "b"])
    assert functions["validation_auroc"](torch.nn.Identity(), data, torch.nn.Identity()) == 1


def test_pairs_are_compared_and_not_repeated(
    blood: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*TINY, "--seeds", "2"]
    done = run(*ACCELERATE, recipe("medmnist_2d"), *arguments, folder=blood)
    paths = results(blood)
    assert len(paths) == 4
    runs = [json.loads(path.read_text(), parse_constant=pytest.fail) for path in paths]
    # Sorted by name: merged of both seeds, then plain.
    assert [("merging" in one) for one in runs] == [True, True, False, False]
    merged, plain = (
        [one["test"]["clean"]["accuracy"] for one in part] for part in (runs[:2], runs[2:])
    )
    page = (blood / "runs" / "medmnist" / "bloodmnist-28-test_resnet.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith("| clean, accuracy"))
    cells = row.split(" | ")[1:]
    assert cells[0].startswith(f"{np.mean(plain):.3f} ± ")
    assert cells[1].startswith(f"{np.mean(merged):.3f} ± ")
    assert cells[2].startswith(f"{np.mean(merged) - np.mean(plain):+.3f} (")
    assert (
        row in done.stdout and "| published (all images), accuracy | 0.941 ± 0.005 |" in done.stdout
    )
    assert set(runs[0]["test"]) >= {"clean", "gaussian_noise"}
    before = [path.stat().st_mtime_ns for path in paths]
    monkeypatch.chdir(blood)
    stopped = refusal(monkeypatch, "medmnist_2d", *arguments, "--lr", "0.5")
    assert "has lr=0.05, not 0.5: pass another --out" in str(stopped)
    run_here(monkeypatch, recipe("medmnist_2d"), *arguments)
    assert row in capsys.readouterr().out
    assert [path.stat().st_mtime_ns for path in paths] == before


def test_the_plain_run_of_a_pair_is_one_without_pairs(
    blood: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merging takes no random number from the images of the next run, and none from its own."""
    monkeypatch.chdir(blood)
    run_here(monkeypatch, recipe("medmnist_2d"), *TINY, "--seed", "3", "--seeds", "2")
    alone = ["--mode", "none", "--seed", "4", "--out", "alone"]
    run_here(monkeypatch, recipe("medmnist_2d"), *TINY, *alone)
    name = "bloodmnist-28-test_resnet-plain-seed4/model.safetensors"
    paired, single = (load_file(blood / out / name) for out in ("runs/medmnist", "alone"))
    assert all(torch.equal(value, single[key]) for key, value in paired.items())


def test_two_processes_share_a_batch_and_one_reports(blood: Path) -> None:
    done = run(*TWO_PROCESSES, recipe("medmnist_2d"), *TINY, folder=blood)
    assert done.stdout.count("Results and weights: ") == 1
    merged, _plain = (json.loads(path.read_text()) for path in results(blood))
    assert merged["environment"]["processes"] == 2
    assert {layer["steps"] for layer in merged["merging"].values()} == {3}


def test_the_papers_settings_on_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = ["--dataset", "digits", "--train-images", "96", "--paper"]
    monkeypatch.chdir(tmp_path)
    run_here(monkeypatch, recipe("medmnist_2d"), *TINY, *few)
    merged, plain = (json.loads(path.read_text()) for path in results(tmp_path))
    assert merged["settings"]["mode"] == "step" and "mode" not in plain["settings"]
    assert {layer["steps"] for layer in merged["merging"].values()} == {3}
    shallow = len(merged["merging"])
    assert 0 < shallow < 15, "the paper leaves the first layers alone"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "bloodmnits"], "unknown data set 'bloodmnits'; the 2D sets are"),
        (["--dataset", "pathmnist"], "data/pathmnist.npz is missing and cannot be downloaded"),
        (["--dataset", "pathmnist", "--size", "64"], "64.npz"),
    ],
)
def test_without_data_it_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr(medmnist, "PathMNIST", offline)
    monkeypatch.chdir(tmp_path)
    assert message in str(refusal(monkeypatch, "medmnist_2d", *arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--paper", "--mode", "outputs"], "--paper merges after each step: leave out --mode"),
        (["--train-images", "1101"], "--train-images must lie in [1, 1100], got 1101"),
        (["--train-images", "0"], "argument --train-images: must lie in [1, inf), got 0"),
        (["--seeds", "0"], "argument --seeds: must lie in [1, inf), got 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert refusal(monkeypatch, "medmnist_2d", "--dataset", "digits", *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_batch_that_no_images_fill_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    digits = ["--dataset", "digits", "--train-images", "32"]
    assert "--batch-size 64 exceeds the 32" in str(refusal(monkeypatch, "medmnist_2d", *digits))


def test_a_set_of_several_labels_in_grey_is_read(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {}
    for part in ("train", "val", "test"):
        arrays[f"{part}_images"] = np.arange(6 * 28 * 28, dtype=np.uint8).reshape(6, 28, 28)
        arrays[f"{part}_labels"] = np.eye(6, 14, dtype=np.uint8)
    np.savez(tmp_path / "chestmnist.npz", **arrays)
    data = runpy.run_path(recipe("medmnist_2d"))["read"]("chestmnist", tmp_path, 28)
    pixels, labels = data.parts["val"]
    assert data.task == "multilabel" and len(data.classes) == 14
    assert pixels.shape == (6, 1, 28, 28) and pixels.dtype == torch.uint8
    assert torch.equal(labels, torch.eye(6, 14)) and labels.dtype == torch.float32
