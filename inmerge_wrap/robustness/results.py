"""The result of an evaluation: plain rows, found by name, and compared with another model's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from inmerge_wrap.files import write_json
from inmerge_wrap.robustness.metrics import percentile_interval

__all__ = ["RobustnessResult", "compare_results"]

Row = dict[str, Any]
Condition = tuple[str, int | float | str]


@dataclass
class RobustnessResult:
    """The result of `evaluate_robustness`.

    Attributes:
        rows: One plain dict per condition. `corruption` and `severity` identify it: "clean" and 0,
            a corruption and 1 ... 5 or "mean" (over its severities), "all" and "mean" (over the
            corruptions), or an attack and its eps. Then `kind`, `n`, and each metric by name with
            `_low` and `_high`, which are absent without a bootstrap and where all resamples agree.
            An undefined metric is absent; `left_out` gives the reason, and names the classes that
            a mean leaves out.
        settings: What the figures depend on, with a fingerprint of the data.
        seconds: Wall-clock time in corruption, inference, attacks and statistics.
        replicates: Bootstrap values of the balanced error by corruption and severity, for intervals
            of ratios between two models; not written to JSON.
        logits: What the model returned for the clean images (N, outputs); not written to JSON.
    """

    rows: list[Row]
    settings: dict[str, Any]
    seconds: dict[str, float]
    replicates: dict[Condition, np.ndarray] = field(default_factory=dict, repr=False)
    logits: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)

    def row(self, corruption: str = "clean", severity: int | float | str | None = None) -> Row:
        """Returns the row of a condition.

        Args:
            corruption: "clean", a corruption, "all" or an attack.
            severity: 1 ... 5, "mean", or the eps of an attack; if None: the only row of "clean" or
                of an attack, and the mean over the severities of a corruption.

        Raises:
            ValueError: If there is no such row, or more than one.
        """
        rows = [row for row in self.rows if row["corruption"] == corruption]
        if severity is None and len(rows) > 1:
            severity = "mean"
        found = [row for row in rows if severity is None or row["severity"] == severity]
        if len(found) != 1:
            known = ", ".join(dict.fromkeys(str(row["corruption"]) for row in self.rows))
            have = [row["severity"] for row in rows]
            raise ValueError(
                f"{len(found)} rows for {corruption!r} at severity {severity!r}; "
                + (f"choose one of {have}" if rows else f"choose from {known}")
            )
        return found[0]

    def value(
        self, metric: str, corruption: str = "clean", severity: int | float | str | None = None
    ) -> float | None:
        """Returns a figure of the row that `row` finds, or None where it is undefined.

        Args:
            metric: Such as "accuracy", "balanced_error" or "auroc".
            corruption: See `row`.
            severity: See `row`.
        """
        return self.row(corruption, severity).get(metric)

    def to_json(self, path: str | Path | None = None) -> str:
        """Returns rows, settings and seconds as JSON text, also written to `path` if given."""
        content = {"settings": self.settings, "seconds": self.seconds, "rows": self.rows}
        if path is not None:
            write_json(path, content, allow_nan=False)
        return json.dumps(content, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, path: str | Path) -> RobustnessResult:
        """Reads a file of `to_json`. As a baseline it yields BE and rBE without intervals."""
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(content["rows"], content["settings"], content["seconds"])


def compare_results(result: RobustnessResult, baseline: RobustnessResult) -> list[Row]:
    """Compares the balanced error of two models on the same images; below 0 is better.

    Both models are scored on the same resamples of the images, so that the effect
    of an image's difficulty on both cancels: the interval is narrower than the two would suggest.

    Args:
        result: Result of the model in question.
        baseline: Result of the model to compare with, on the same data with the same settings.

    Returns:
        One dict for each condition, in the order of `result.rows`: `corruption`, `severity`,
        `kind`, `difference`, and its 95% percentile interval `difference_low`, `difference_high`
        if both results were computed with a bootstrap in this process. Conditions where a
        balanced error is undefined are absent.

    Raises:
        ValueError: If the two were measured on different data, with different settings, or under
            different corruptions or attacks.
    """
    check_baseline(baseline, result.settings)
    if extra := set(baseline.settings["corruptions"]) - set(result.settings["corruptions"]):
        raise ValueError(
            f"the baseline was also measured under {', '.join(sorted(extra))}, so its mean of all "
            "is another: run both with the same preset"
        )
    measured = {(row["corruption"], row["severity"]) for row in baseline.rows}
    differences = []
    for row in result.rows:
        condition = row["corruption"], row["severity"]
        if condition not in measured:
            raise ValueError(
                f"the baseline was not measured under {condition[0]} with eps {condition[1]:g}: "
                "run both with the same attacks"
            )
        theirs = baseline.value("balanced_error", *condition)
        if "balanced_error" not in row or theirs is None:
            continue
        entry: Row = {name: row[name] for name in ("corruption", "severity", "kind")}
        entry["difference"] = row["balanced_error"] - theirs
        mine_drawn, their_drawn = (of.replicates.get(condition) for of in (result, baseline))
        if mine_drawn is not None and their_drawn is not None:
            add_interval(entry, "difference", mine_drawn - their_drawn)
        differences.append(entry)
    return differences


def add_interval(row: Row, name: str, drawn: ArrayLike) -> None:
    """Adds the ends of the interval of a figure to a row, if it has one."""
    interval = percentile_interval(drawn)
    if interval is not None:
        row[f"{name}_low"], row[f"{name}_high"] = interval


def check_baseline(baseline: RobustnessResult, settings: Mapping[str, Any]) -> None:
    """Refuses a baseline that was measured on other data or with other settings."""
    # Not the threshold, which each network has of its own, chosen on validation data.
    names = ["data_sha256", "task", "severities", "seed"]
    if baseline.replicates:
        names += ["bootstrap", "resamples_sha256"]
    for name in names:
        theirs = baseline.settings.get(name)
        if theirs != settings[name]:
            raise ValueError(
                f"the baseline was measured with {name} {theirs!r}, not {settings[name]!r}: run it "
                "again on the same data with the same settings"
            )
    for attack in settings["attacks"]:
        for other in baseline.settings["attacks"]:
            same = (attack["name"], attack["eps"]) == (other["name"], other["eps"])
            if same and attack != other:
                raise ValueError(
                    f"the baseline was measured under {other}, not {attack}: run it again"
                )
    missing = sorted(set(settings["corruptions"]) - set(baseline.settings["corruptions"]))
    if missing:
        raise ValueError(
            f"the baseline was not measured under {', '.join(missing)}: run it with the same preset"
        )
