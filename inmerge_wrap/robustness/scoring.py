"""From the logits of every condition to rows: metrics, intervals, means and ratios."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inmerge_wrap.robustness.corruptions import Corruption
from inmerge_wrap.robustness.metrics import LEVEL, classification_metrics, to_probabilities
from inmerge_wrap.robustness.results import Condition, RobustnessResult, Row, add_interval

CLEAN: Condition = ("clean", 0)


@dataclass
class Score:
    """Metrics of one condition: values, bootstrap values, and what is left out and why."""

    values: dict[str, float]
    replicates: dict[str, np.ndarray]
    left_out: dict[str, str]


def score(
    logits: Tensor,
    targets: Tensor,
    task: str,
    threshold: float | Sequence[float],
    weights: np.ndarray,
) -> Score:
    """Scores the logits of one condition, and its bootstrap resamples by ``weights`` (N, R)."""
    metrics = partial(
        classification_metrics,
        to_probabilities(logits, task),
        targets,
        task=task,
        threshold=threshold,
    )
    points, left_out = metrics()
    values = {name: float(point) for name, point in points.items() if not point.isnan()}
    # Resamples in chunks, so that a large data set does not need them all in memory at once.
    portion = max(1, 20_000_000 // len(targets))
    parts = [
        metrics(weights=torch.from_numpy(weights[:, start : start + portion]))[0]
        for start in range(0, weights.shape[1], portion)
    ]
    replicates = {
        name: np.concatenate([part[name].double().numpy() for part in parts])
        for name in values
        if parts
    }
    return Score(values, replicates, left_out)


def rows_of(
    scores: Mapping[Condition, Score],
    settings: Mapping[str, Any],
    corruptions: Sequence[Corruption],
    baseline: RobustnessResult | None,
) -> tuple[list[Row], dict[Condition, np.ndarray]]:
    """Returns the rows, corruption by corruption with its mean, and their drawn balanced errors."""
    clean = scores[CLEAN]
    kinds = {"clean": "clean", "all": "all"} | {entry.name: entry.kind for entry in corruptions}
    table, means = {CLEAN: clean}, []
    for entry in corruptions:
        per_level = {
            (entry.name, level): scores[entry.name, level] for level in settings["severities"]
        }
        mean = _mean_score([*per_level.values()])
        if baseline is not None:
            _add_ratios(mean, entry.name, clean, baseline)
        means.append(mean)
        table |= per_level | {(entry.name, "mean"): mean}
    table["all", "mean"] = _mean_score(means)
    table |= {(at["name"], at["eps"]): scores[at["name"], at["eps"]] for at in settings["attacks"]}
    rows = [
        _row(name, kinds.get(name, "attack"), severity, settings["n"], score)
        for (name, severity), score in table.items()
    ]
    drawn = {
        condition: score.replicates["balanced_error"]
        for condition, score in table.items()
        if "balanced_error" in score.replicates
    }
    return rows, drawn


def _row(corruption: str, kind: str, severity: int | float | str, n: int, score: Score) -> Row:
    row: Row = {"corruption": corruption, "kind": kind, "severity": severity, "n": n}
    for name, value in score.values.items():
        row[name] = value
        drawn = score.replicates.get(name, np.empty(0))
        if name == "ece" and np.isfinite(drawn).any():  # not where no label of a resample is known
            drawn = np.maximum(0, drawn - (np.nanmean(drawn) - value))
        add_interval(row, name, drawn)
    if score.left_out:
        row["left_out"] = score.left_out
    return row


def _mean_score(scores: Sequence[Score]) -> Score:
    """Returns the mean of every figure over those conditions for which it is defined."""
    values, replicates = {}, {}
    for name in dict.fromkeys(name for score in scores for name in score.values):
        defined = [score for score in scores if name in score.values]
        values[name] = float(np.mean([score.values[name] for score in defined]))
        # An interval must belong to the same mean as the value, or be absent.
        if all(name in score.replicates for score in defined):
            replicates[name] = np.mean([score.replicates[name] for score in defined], axis=0)
    reasons: dict[str, list[str]] = {}
    for score in scores:
        for name, reason in score.left_out.items():
            if reason not in reasons.setdefault(name, []):
                reasons[name].append(reason)
    return Score(values, replicates, {name: "; ".join(why) for name, why in reasons.items()})


def _add_ratios(score: Score, corruption: str, clean: Score, baseline: RobustnessResult) -> None:
    """Adds BE and rBE of one corruption to its mean over the severities, where they are defined."""
    value = score.values.get("balanced_error")
    base = baseline.value("balanced_error", corruption, "mean")
    base_clean = baseline.value("balanced_error")
    if value is None or base is None or base_clean is None:
        return
    drawn: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    mine, theirs = (
        score.replicates.get("balanced_error"),
        baseline.replicates.get((corruption, "mean")),
    )
    if mine is not None and theirs is not None:
        clean_drawn = clean.replicates["balanced_error"]
        drawn = {"be": (mine, theirs)}
        drawn["rbe"] = mine - clean_drawn, theirs - baseline.replicates[CLEAN]
    for name, above, below, fault in (
        ("be", value, base, "makes no error under"),
        ("rbe", value - clean.values["balanced_error"], base - base_clean, "loses nothing to"),
    ):
        if below <= 1e-12:
            score.left_out[name] = f"the baseline {fault} {corruption}"
            continue
        score.values[name] = above / below
        if drawn:
            above_drawn, below_drawn = drawn[name]
            defined = below_drawn > 1e-12
            if np.mean(~defined) <= (1 - LEVEL) / 2:
                score.replicates[name] = above_drawn / np.where(defined, below_drawn, math.nan)
