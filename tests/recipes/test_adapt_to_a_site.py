"""recipes/adapt_to_a_site.py: what another scanner costs, and what an adaptation gives back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch

from inmerge_wrap import export_timm
from tests.recipes.running import recipe, refusal, run_here

TINY = ["--arch", "test_resnet", "--epochs", "1"]


def test_the_formula_and_what_plain_timm_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run_here(monkeypatch, recipe("adapt_to_a_site"), *TINY)
    assert "Adapted on 200 images without labels" in capsys.readouterr().out
    out = tmp_path / "runs" / "adapt_to_a_site"
    found = json.loads((out / "results.json").read_text(), parse_constant=pytest.fail)
    first, before, after = (row["accuracy"] for row in found["results"].values())
    assert before < after < first
    assert all(sum(row["shares"]) == pytest.approx(1) for row in found["results"].values())

    # Adapted once more on a few images of the first digits only.
    again = ["--model", "runs/adapt_to_a_site/model", "--digits", "0", "1", "--images", "9"]
    run_here(monkeypatch, recipe("adapt_to_a_site"), *again, "--out", "runs/again")
    old, new = (
        timm.create_model(f"local-dir:runs/{name}/model", pretrained=True).state_dict()
        for name in ("adapt_to_a_site", "again")
    )
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    assert moved == {name for name in old if "running_" in name or "num_batches" in name}
    assert json.loads(Path("runs/again/results.json").read_text())["images"] == 9


def test_a_network_of_other_images_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    network = timm.create_model("test_resnet", num_classes=3)
    export_timm(network, "colour", input_size=(3, 32, 32), mean=[0.5] * 3, std=[0.5] * 3)
    stopped = refusal(monkeypatch, "adapt_to_a_site", "--model", "colour")
    assert "--model colour takes 3 channels and tells 3 classes apart" in str(stopped)


def test_without_batch_norm_it_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stopped = refusal(monkeypatch, "adapt_to_a_site", "--arch", "test_convnext", "--epochs", "1")
    assert "no BatchNorm: fine-tune it on labelled images" in str(stopped)
