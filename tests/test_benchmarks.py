"""The benchmark runs at a tiny setting and writes what it measured."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from tests.recipes.running import ROOT, run_here


def test_the_overhead_benchmark_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ways = ["after each step, every pair", "forward pass, outputs", "forward pass, weights"]
    settings = ["--models", "test_resnet", "--size", "32", "--batch-size", "4", "--repeats", "3"]
    settings += ["--threads", "1"]
    monkeypatch.chdir(tmp_path)
    run_here(monkeypatch, str(ROOT / "benchmarks" / "overhead.py"), *settings, "--ways", *ways)
    found = json.loads((tmp_path / "runs" / "overhead.json").read_text())
    rows = {row["way"]: row for row in found["rows"]}
    assert next(iter(found)) == "command" and "--ways" in found["command"]
    assert [*rows] == ways
    for row in rows.values():
        assert row["merged_share"] == 1.0 and row["step_ms"] > 0
        assert 0 < row["quartiles"][0] <= row["quartiles"][2]
    assert rows["forward pass, outputs"]["layers"] > rows[ways[0]]["layers"]
    assert capsys.readouterr().out.count("| test_resnet | 4 x 32 px |") == 3


def test_launches_are_counted_without_a_gpu() -> None:
    """Two ranges forward, three operators backward for each layer of ResNet-18, and the draws."""
    count = runpy.run_path(str(ROOT / "benchmarks" / "launches.py"))["count"]
    plain, merged = (count("resnet18", 28, merging) for merging in (False, True))
    added = merged.launches - plain.launches
    assert 5 * 20 <= added < 8 * 20
    assert merged.bytes > plain.bytes
