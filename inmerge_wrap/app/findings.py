"""What a trained network does on the test part, as plain data for a results file and a report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor

from inmerge_wrap.robustness import (
    RobustnessResult,
    bootstrap_weights,
    classification_metrics,
    percentile_interval,
)
from inmerge_wrap.robustness.corruptions import KINDS

BINS = 15  # as many as the calibration error has


def probabilities_of(logits: Tensor, task: str) -> Tensor:
    """(N, classes) in double precision, which keeps apart what single would round to 1."""
    logits = logits.double()
    return logits.sigmoid() if task == "multilabel" else logits.softmax(1)


def proportion(successes: int, trials: int) -> dict[str, Any]:
    """A share with its 95% Wilson interval, which holds for few trials too; None of no trials."""
    if not trials:
        return {"value": None, "n": 0}
    low, high = binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    return {"value": successes / trials, "low": float(low), "high": float(high), "n": trials}


def chosen_thresholds(probabilities: Tensor, labels: Tensor) -> list[float]:
    """For each label of a multi-label task the threshold with the best balanced accuracy.

    Args:
        probabilities: (N, labels) on validation images.
        labels: (N, labels) of 0, 1 and NaN.

    Returns:
        Thresholds; 0.5 where the images are all positive or all negative.
    """
    thresholds = []
    for scores, marks in zip(probabilities.T, labels.T, strict=True):
        positive, negative = scores[marks == 1], scores[marks == 0]
        if not len(positive) or not len(negative):
            thresholds.append(0.5)
            continue
        values = torch.cat([positive, negative]).unique()
        between = (values[1:] + values[:-1]) / 2 if len(values) > 1 else values
        recalls = (positive > between[:, None]).double().mean(1)
        specificities = (negative <= between[:, None]).double().mean(1)
        thresholds.append(float(between[(recalls + specificities).argmax()]))
    return thresholds


def class_table(
    probabilities: Tensor,
    labels: Tensor,
    classes: Sequence[str],
    task: str,
    thresholds: Sequence[float],
    *,
    resamples: int,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """For each class: how many images, sensitivity, specificity, precision and AUROC.

    Each figure has ``value``, ``low``, ``high`` and ``n``; of counts by Wilson, of the AUROC by a
    bootstrap over images. One class is always held against all others.
    """
    predicted = _predicted(probabilities, task, thresholds)
    rows = []
    for index, name in enumerate(classes):
        if task == "multilabel":
            known = ~labels[:, index].isnan()
            truth = labels[known, index] == 1
        else:
            known = torch.ones(len(labels), dtype=torch.bool)
            truth = labels == index
        said, scores = predicted[known, index], probabilities[known, index]
        hits, alarms = int((truth & said).sum()), int((~truth & said).sum())
        positives, negatives = int(truth.sum()), int((~truth).sum())
        rows.append(
            {
                "class": name,
                "n": positives,
                "sensitivity": proportion(hits, positives),
                "specificity": proportion(negatives - alarms, negatives),
                "precision": proportion(hits, hits + alarms),
                "auroc": _auroc(scores, truth, resamples, seed),
                "threshold": thresholds[index] if task == "multilabel" else None,
            }
        )
    return rows


def _predicted(probabilities: Tensor, task: str, thresholds: Sequence[float]) -> Tensor:
    """(N, classes), whether the network says that the image shows the class."""
    if task == "multilabel":
        return probabilities > torch.tensor(thresholds, dtype=probabilities.dtype)
    best = probabilities.argmax(1, keepdim=True)
    return torch.zeros_like(probabilities, dtype=torch.bool).scatter(1, best, True)


def _auroc(scores: Tensor, truth: Tensor, resamples: int, seed: int) -> dict[str, Any]:
    if not truth.any() or truth.all():
        return {"value": None, "n": len(truth)}
    found: dict[str, Any] = {"n": len(truth)}
    value, _ = classification_metrics(scores, truth.long(), task="binary")
    found["value"] = float(value["auroc"])
    if resamples:
        weights = torch.from_numpy(bootstrap_weights(len(truth), resamples, seed=seed))
        drawn, _ = classification_metrics(scores, truth.long(), task="binary", weights=weights)
        interval = percentile_interval(drawn["auroc"].numpy())
        if interval is not None:
            found["low"], found["high"] = interval
    return found


def confusion(probabilities: Tensor, labels: Tensor) -> list[list[int]]:
    """Counts by true class (row) and predicted class (column)."""
    classes = probabilities.shape[1]
    pairs = labels * classes + probabilities.argmax(1)
    return pairs.bincount(minlength=classes**2).reshape(classes, classes).tolist()


def reliability(probabilities: Tensor, labels: Tensor, task: str) -> list[dict[str, Any]]:
    """How often the network was right in each of 15 equal bins of its stated probability.

    Multi-class: the probability of the class it named. Multi-label: that of each label, all in one.
    """
    if task == "multilabel":
        known = ~labels.isnan()
        stated, right = probabilities[known], labels[known] == 1
    else:
        stated, best = probabilities.max(1)
        right = best == labels
    edges = torch.linspace(0, 1, BINS + 1, dtype=stated.dtype)
    place = torch.bucketize(stated, edges[1:-1], right=True)
    bins = []
    for number in range(BINS):
        inside = place == number
        count = int(inside.sum())
        if count:
            share = proportion(int(right[inside].sum()), count)
            bins.append({"stated": float(stated[inside].mean()), **share})
    return bins


def worst_mistakes(
    probabilities: Tensor,
    labels: Tensor,
    task: str,
    thresholds: Sequence[float],
    limit: int,
) -> list[dict[str, Any]]:
    """The images about which the network was surest and wrong, worst first.

    Each has the ``index``, the ``truth`` and ``said`` class indices and the ``stated`` probability
    of what it said. Of a multi-label task ``said`` is the one label it was most wrong about, and
    ``present`` says whether that label was there.
    """
    if task == "multilabel":
        wrong = _predicted(probabilities, task, thresholds) != (labels == 1)
        wrong &= ~labels.isnan()
        distance = torch.where(wrong, (probabilities - labels.nan_to_num()).abs(), -1.0)
        worst, said = distance.max(1)
        order = worst.argsort(descending=True, stable=True)[:limit].tolist()
        return [
            {
                "index": n,
                "said": int(said[n]),
                "present": bool(labels[n, said[n]] == 1),
                "stated": float(probabilities[n, said[n]]),
            }
            for n in order
            if worst[n] >= 0
        ]
    stated, said = probabilities.max(1)
    stated = torch.where(said != labels, stated, -1.0)
    order = stated.argsort(descending=True, stable=True)[:limit].tolist()
    return [
        {"index": n, "truth": int(labels[n]), "said": int(said[n]), "stated": float(stated[n])}
        for n in order
        if stated[n] >= 0
    ]


def by_family(result: RobustnessResult) -> list[dict[str, Any]]:
    """Balanced accuracy of clean images, of each family of corruptions, and of all of them.

    A family's figure is the mean over its corruptions and severities; its interval is of the same
    mean over the same resamples.
    """
    measured = [row for row in result.rows if row["severity"] != "mean"]
    families = [("clean", [row for row in measured if row["kind"] == "clean"])]
    families += [(kind, [row for row in measured if row["kind"] == kind]) for kind in KINDS]
    families.append(("all", [row for row in measured if row["kind"] in KINDS]))
    table = []
    for name, rows in families:
        rows = [row for row in rows if "balanced_error" in row]
        if not rows:
            continue
        entry: dict[str, Any] = {
            "family": name,
            "corruptions": list(dict.fromkeys(row["corruption"] for row in rows)),
            "balanced_accuracy": 1 - float(np.mean([row["balanced_error"] for row in rows])),
        }
        drawn = [result.replicates.get((row["corruption"], row["severity"])) for row in rows]
        known = [values for values in drawn if values is not None]
        if len(known) == len(drawn):
            interval = percentile_interval(1 - np.mean(known, axis=0))
            if interval is not None:
                entry["balanced_accuracy_low"], entry["balanced_accuracy_high"] = interval
        areas = [row["auroc"] for row in rows if "auroc" in row]
        entry |= {"auroc": float(np.mean(areas))} if areas else {}
        entry["ece"] = float(np.mean([row["ece"] for row in rows]))
        table.append(entry)
    return table
