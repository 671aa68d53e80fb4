"""The calculated budget of a pass on a GPU; triton_on_device.py holds the Triton engine to it."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu_budget.py"


@pytest.fixture(scope="module")
def budget() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def test_the_ledger_counts_what_is_launched_and_what_it_moves(budget: dict[str, Any]) -> None:
    weight, index = torch.ones(8, 4, 3, device="meta"), torch.arange(2, device="meta")
    with budget["Ledger"]() as ledger:
        torch.ones(7).sum()  # on the host
        torch.empty(100, device="meta").view(10, 10).unsqueeze(0)
        assert ledger.cost == budget["Cost"](0, 0)
        rows = weight.index_select(0, index)  # two rows of 48 bytes read and written, and 2 x 8
        assert ledger.cost == budget["Cost"](1, 2 * 96 + 16)
        rows.mul_(rows[:, :, :1])  # 96 read and written, and 32 read
        assert ledger.cost == budget["Cost"](2, 2 * 96 + 16 + 2 * 96 + 32)
        weight.index_copy_(0, index, rows)
        assert ledger.cost == budget["Cost"](3, 2 * (2 * 96 + 16) + 2 * 96 + 32)


def test_plain_launches_grow_with_the_layers(budget: dict[str, Any]) -> None:
    """By one number for each, which the engine of Triton has for all of them."""
    launches = []
    for layers in (2, 3, 6):
        convs = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(layers))
        network = nn.Sequential(*convs).to("meta")
        example = torch.zeros(1, 8, 8, 8, device="meta")
        settings = {"shallow_layers": 0, "example_input": example}
        launches.append(budget["plain_pass"](network, 0.3, **settings).launches)
    each = launches[1] - launches[0]
    assert launches[2] - launches[1] == 3 * each and each > 10


def test_the_script(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "budget.json"
    command = [sys.executable, str(SCRIPT), "--models", "test_resnet", "--step-ms", "10"]
    command += ["--launch-us", "2", "--gpus", "h100", "t4", "--merged-share", "0.5"]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("A calculation, not a measurement.")
    found = json.loads(out.read_text())
    assert found["kind"] == "a calculation, not a measurement"
    assert found["devices"]["h100"]["bandwidth"] == 3.35e12
    assert all(device["source"].startswith("https://") for device in found["devices"].values())
    rows = {(row["rule"], row["engine"], row["mode"]): row for row in found["rows"]}
    assert len(rows) == len(found["rows"]) == 8
    for row in found["rows"]:
        for key, device in found["devices"].items():
            taken = 2 * row["launches"] + 1e6 * row["moved"] / device["bandwidth"]
            assert row["microseconds"][key] == pytest.approx(taken)
            assert row["share_of_step"][key] == pytest.approx(taken / 10_000)
            assert row["floor_microseconds"][key] < taken
    for rule in ("fixed", "quantile"):
        for mode in ("persistent", "transient"):
            fused, plain = (rows[rule, engine, mode] for engine in ("triton", "torch"))
            assert fused["launches"] < plain["launches"] and fused["moved"] < plain["moved"]
    assert rows["fixed", "triton", "persistent"]["launches"] == 3
