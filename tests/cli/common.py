"""What the tests of the command line share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn
from typer.testing import CliRunner

from inmerge_wrap.cli import app

ARCH = "resnet10t"
PREPARED = ("--mean", 0.5, "--std", 0.5)


def run(*arguments: Any, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(part) for part in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def run_json(*arguments: Any) -> Any:
    return json.loads(run(*arguments, "--json").stdout)


def complaint(*arguments: Any) -> str:
    """What stderr says, without line breaks of the terminal; nothing may be on stdout."""
    result = run(*arguments, code=1)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    return " ".join(result.stderr.split())


def same_weights(path: Path, net: nn.Module) -> bool:
    stored = safetensors.torch.load_file(path)
    expected = net.state_dict()
    return stored.keys() == expected.keys() and all(
        torch.equal(stored[name], expected[name]) for name in expected
    )
