"""Trackers of a training run: those of Accelerate, or a file of JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, get_available_trackers
from torch import nn

from inmerge_wrap import InMergeWrapper


class JsonLines(GeneralTracker):
    """Writes one JSON line for each ``Accelerator.log``; the file needs no package to read."""

    name, requires_logging_directory = "jsonl", False

    def __init__(self, path: Path) -> None:
        self.tracker = path
        super().__init__()  # which looks for the attributes

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        """Appends values to the file, so that a resumed run continues it."""
        self.tracker.parent.mkdir(parents=True, exist_ok=True)
        with open(self.tracker, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def tracking(name: str | None, folder: Path) -> dict[str, Any]:
    """Returns the arguments of Accelerator for a tracker that writes into ``folder``.

    Raises:
        SystemExit: If its package is missing; Accelerate would silently track nothing.
    """
    if name is None:
        return {}
    if name == "jsonl":
        return {"log_with": JsonLines(folder / "log.jsonl")}
    if name not in map(str, get_available_trackers()):
        raise SystemExit(f"--tracker {name}: the package {name} is missing: pip install {name}")
    return {"log_with": name, "project_dir": folder}


def merged_share(model: nn.Module) -> dict[str, float]:
    """Returns the share of merged pairs for a tracker; empty without merging.

    Waits for the device, so call it at the end of an epoch, not in every step.
    """
    if not isinstance(model, InMergeWrapper):
        return {}
    report = model.report()
    return {"merged_share": report.merged / report.drawn if report.drawn else 0.0}
