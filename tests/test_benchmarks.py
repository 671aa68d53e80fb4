"""The benchmarks run at a tiny setting and write what they measured."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.recipes.running import ROOT, run


@pytest.mark.parametrize("engine", ["auto", "torch"])
def test_the_overhead_benchmark_runs(engine: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "overhead.py"), "--models", "test_resnet"]
    command += ["--size", "32", "--batch-size", "4", "--repeats", "4", "--engine", engine]
    done = run(*command, folder=tmp_path)
    found = json.loads((tmp_path / "runs" / "overhead.json").read_text())
    rows = {row["way"]: row for row in found["rows"]}
    assert next(iter(found)) == "command" and "--engine" in found["command"]
    assert rows["every pair"]["merged_share"] == rows["transient, p = 1"]["merged_share"] == 1.0
    assert all(row["floor_ms"] > 0 for row in rows.values())
    assert all(row["quartiles"]["with merging over training step"] for row in rows.values())
    assert rows["every pair"]["merge_over_floor"] > 1
    assert done.stdout.count("| test_resnet | 4 x 32 px |") == len(rows) == 6
    if engine == "torch":
        assert rows["0.3"]["engine"].startswith("torch (")


@pytest.mark.skipif(shutil.which("c++") is None, reason="compiled passes need a C++ compiler")
def test_the_scaling_benchmark_counts_no_message_for_merging(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "scaling.py"), "--widths", "8", "16"]
    command += ["--depths", "1", "2", "--processes", "2", "--repeats", "2", "--out", "scaling.json"]
    run(*command, folder=tmp_path)
    result = json.loads((tmp_path / "scaling.json").read_text())
    messages = result["processes"]["2"]["collectives"]
    assert messages["with"] == messages["without"] > 0
    assert set(result["kernels"]["all drawn merge, native"]) == {"8", "16"}
    assert result["layers"]["no pair merges, torch"]["2"] > 0
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
