"""inmerge similarity."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from inmerge_wrap import export_timm
from inmerge_wrap.similarity import measure_similarity
from tests.cli.common import ARCH, complaint, run, run_json


def test_similarity_writes_numbers_and_pictures(
    net: nn.Module, weights: Path, tmp_path: Path
) -> None:
    options = ["--arch", ARCH, "--include", "layer3.*", "--output", tmp_path / "out"]
    content = run_json("similarity", weights, *options)
    expected = measure_similarity(net, include="layer3.*")
    assert content["layers"] == [layer.to_dict() for layer in expected]
    stored = json.loads((tmp_path / "out" / "similarity.json").read_text())
    assert stored["layers"] == content["layers"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "matrices.png",
        "overview.png",
        "pairs.png",
        "similarity.json",
    ]
    for path in (tmp_path / "out").glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    assert sorted(content["files"]) == sorted(map(str, (tmp_path / "out").iterdir()))


def test_similarity_of_a_timm_folder_prints_a_table(net: nn.Module, tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    export_timm(net, folder, input_size=(3, 64, 64), mean=[0.5] * 3, std=[0.5] * 3)
    out = tmp_path / "out"
    text = run("similarity", folder, "--no-pictures", "--output", out).stdout
    for layer in measure_similarity(net):
        row = next(line for line in text.splitlines() if line.split()[:1] == [layer.name])
        assert row.split()[-1] == f"{layer.effective_rank:.3f}"
    assert [path.name for path in out.iterdir()] == ["similarity.json"]
    told = complaint("similarity", folder, "--no-pictures", "--theme", "dark", "--output", out)
    assert "--theme is the look of the pictures, which --no-pictures leaves out" in told
    told = complaint("similarity", folder, "--arch", "resnet18")
    assert "leave out --arch" in told
