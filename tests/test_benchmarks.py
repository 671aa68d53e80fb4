"""The benchmark runs at a tiny setting and writes what it measured."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

from tests.recipes.running import ROOT, run


def test_the_overhead_benchmark_runs(tmp_path: Path) -> None:
    ways = ["after each step, every pair", "forward pass, outputs", "forward pass, weights"]
    command = [sys.executable, str(ROOT / "benchmarks" / "overhead.py"), "--models", "test_resnet"]
    command += ["--size", "32", "--batch-size", "4", "--repeats", "3", "--ways", *ways]
    done = run(*command, folder=tmp_path)
    found = json.loads((tmp_path / "runs" / "overhead.json").read_text())
    rows = {row["way"]: row for row in found["rows"]}
    assert next(iter(found)) == "command" and "--ways" in found["command"]
    assert [*rows] == ways
    for row in rows.values():
        assert row["merged_share"] == 1.0 and row["step_ms"] > 0
        assert 0 < row["quartiles"][0] <= row["quartiles"][2]
    assert rows["forward pass, outputs"]["layers"] > rows[ways[0]]["layers"]
    assert done.stdout.count("| test_resnet | 4 x 32 px |") == 3


def test_launches_are_counted_without_a_gpu() -> None:
    """Two ranges forward, three operators backward for each layer of ResNet-18, and the draws."""
    count = runpy.run_path(str(ROOT / "benchmarks" / "launches.py"))["count"]
    plain, merged = (count("resnet18", 28, merging) for merging in (False, True))
    added = merged.launches - plain.launches
    assert 5 * 20 <= added < 8 * 20
    assert merged.bytes > plain.bytes
