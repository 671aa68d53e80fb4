"""recipes/quickstart.py: trains, exports and says what is certain."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm

from tests.recipes.running import ACCELERATE, TWO_PROCESSES, recipe, run

TINY = ["--arch", "test_resnet", "--epochs", "1"]


@pytest.mark.parametrize("launcher", [ACCELERATE, TWO_PROCESSES], ids=["one", "two processes"])
def test_it_ends_with_what_is_certain(tmp_path: Path, launcher: list[str]) -> None:
    done = run(*launcher, recipe("quickstart"), *TINY, folder=tmp_path)
    assert done.stdout.count("convolutions are merged.") == 1, "one process reports"
    assert "The exported weights give equal logits in plain timm" in done.stdout
    paired = "accelerate launch recipes/medmnist_2d.py --dataset digits --seeds 5"
    assert done.stdout.splitlines()[-1].strip() == paired
    out = tmp_path / "runs" / "quickstart"
    result = json.loads((out / "results.json").read_text(), parse_constant=pytest.fail)
    assert 0 < result["test_accuracy"] < 1 and len(result["val_accuracy"]) == 1
    assert result["environment"]["processes"] == (2 if launcher == TWO_PROCESSES else 1)
    assert result["environment"]["command"].startswith("python ")
    # 1,100 images in batches of 32 over all processes, however many these are.
    assert {layer["steps"] for layer in result["merging"].values()} == {34}
    assert any(layer["merged"] for layer in result["merging"].values())
    loaded = timm.create_model(f"local-dir:{out / 'model'}", pretrained=True)
    assert loaded.num_classes == 10 and loaded.pretrained_cfg["input_size"] == (1, 32, 32)
