"""What a trained network does on the test part, as plain data for a results file and a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import binomtest
from torch import Tensor
from tqdm import tqdm

from inmerge_wrap.images.preparation import Recipe
from inmerge_wrap.robustness import RobustnessResult, classification_metrics, percentile_interval
from inmerge_wrap.robustness.effects import KINDS

BINS = 15  # as many as the calibration error has
ROC_POINTS = 200


def proportion(successes: int, trials: int) -> dict[str, Any]:
    """A share with its 95% Wilson interval, which holds for few trials too; None of no trials."""
    if not trials:
        return {"value": None, "n": 0}
    low, high = binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    return {"value": successes / trials, "low": float(low), "high": float(high), "n": trials}


def class_table(
    probabilities: Tensor,
    labels: Tensor,
    said: Tensor,
    recipe: Recipe,
    *,
    draws: Tensor | None,
    units: Sequence[str] | None = None,
    prevalences: Sequence[float | None] = (),
) -> list[dict[str, Any]]:
    """For each class: counts, the figures of its operating point, the AUROC and the ROC.

    One class is always held against all others. Each figure has ``value``, ``low``, ``high`` and
    ``n``. Intervals of counts are Wilson's for independent images; all others are percentiles of
    the draws (N, R), how often each image occurs in each resample; of whole patients with
    ``units``. Without a known positive nothing can be said of a class, and all figures are None.
    """
    rows, marks = [], marks_of(labels, len(recipe.classes))
    for index, name in enumerate(tqdm(recipe.classes, desc="classes", delay=1, leave=False)):
        known = ~marks[:, index].isnan()
        truth, hit = marks[known, index] == 1, said[known, index]
        scores = probabilities[known, index]
        weights = draws[known] if draws is not None else None
        given = prevalences[index] if prevalences else None
        owners = [units[n] for n in known.nonzero()[:, 0].tolist()] if units else None
        rows.append(
            {
                "class": name,
                "positives": int(truth.sum()),
                "negatives": int((~truth).sum()),
                "unknown": int((~known).sum()),
                "threshold": recipe.thresholds[index] if recipe.thresholds else None,
                **_operating_figures(truth, hit, weights, owners, given),
                "auroc": _auroc(scores, truth, weights),
                "roc": _roc(scores, truth),
            }
        )
    return rows


def marks_of(labels: Tensor, classes: int) -> Tensor:
    """Labels of either task as 0, 1 and, where it is unknown, NaN (N, classes)."""
    return labels if labels.ndim == 2 else F.one_hot(labels, classes).double()


def _operating_figures(
    truth: Tensor,
    hit: Tensor,
    weights: Tensor | None,
    owners: Sequence[str] | None,
    given: float | None,
) -> dict[str, Any]:
    """Sensitivity, specificity and predictive values, and those at another prevalence."""
    names = ("sensitivity", "specificity", "ppv", "npv")
    if not truth.any():
        nothing: dict[str, Any] = {"value": None, "n": 0}
        return dict.fromkeys(names, nothing) | {"prevalence": 0.0, "elsewhere": None}
    shares = {
        "sensitivity": (truth & hit, truth),
        "specificity": (~truth & ~hit, ~truth),
        "ppv": (truth & hit, hit),
        "npv": (~truth & ~hit, ~hit),
    }
    found: dict[str, Any] = {"prevalence": float(truth.double().mean()), "elsewhere": None}
    drawn: dict[str, Tensor | None] = dict.fromkeys(names)
    for name, (right, among) in shares.items():
        found[name] = proportion(int(right.sum()), int(among.sum()))
        if weights is not None:
            drawn[name] = right.to(weights) @ weights / (among.to(weights) @ weights)
        if owners is not None:
            found[name] = _by_owner(found[name], among, owners, drawn[name])
    if given is not None:
        values = [found[name]["value"] for name in names[:2]]
        point = [torch.nan if value is None else value for value in values]
        there = predictive(given, *torch.tensor(point, dtype=torch.float64))
        hits, calm = drawn["sensitivity"], drawn["specificity"]
        spread = (None, None) if hits is None or calm is None else predictive(given, hits, calm)
        ppv, npv = map(_figure, there, spread)
        found["elsewhere"] = {"prevalence": given, "ppv": ppv, "npv": npv}
    return found


def _by_owner(
    share: dict[str, Any], among: Tensor, owners: Sequence[str], drawn: Tensor | None
) -> dict[str, Any]:
    """A share with the interval over patients; Wilson's where all patients agree."""
    ends = _ends(drawn)
    if not ends and share["value"] in (0, 1):
        count = len({owners[n] for n in among.nonzero()[:, 0].tolist()})
        whole = proportion(count * int(share["value"]), count)
        ends = {end: whole[end] for end in ("low", "high")}
    return {"value": share["value"], "n": share["n"], **ends}


def predictive(
    prevalence: float, sensitivity: Tensor, specificity: Tensor
) -> tuple[Tensor, Tensor]:
    """Positive and negative predictive value at a prevalence, by Bayes' theorem."""
    hits, alarms = prevalence * sensitivity, (1 - prevalence) * (1 - specificity)
    rest, misses = (1 - prevalence) * specificity, prevalence * (1 - sensitivity)
    return hits / (hits + alarms), rest / (rest + misses)


def _figure(value: Tensor, drawn: Tensor | None) -> dict[str, Any]:
    """A figure, None where it is undefined, with the interval of its draws."""
    return {"value": float(value) if value.isfinite() else None, **_ends(drawn)}


def _ends(drawn: Tensor | None) -> dict[str, float]:
    interval = percentile_interval(drawn.numpy()) if drawn is not None else None
    return {} if interval is None else {"low": interval[0], "high": interval[1]}


def _metrics(
    scores: Tensor, labels: Tensor, weights: Tensor | None, **settings: Any
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """The metrics of the images, and of resamples if there are any."""
    point, _ = classification_metrics(scores, labels, **settings)
    if weights is None:
        return point, {}
    return point, classification_metrics(scores, labels, weights=weights, **settings)[0]


def _auroc(scores: Tensor, truth: Tensor, weights: Tensor | None) -> dict[str, Any]:
    if not truth.any() or truth.all():
        return {"value": None, "n": len(truth)}
    point, drawn = _metrics(scores, truth.long(), weights, task="binary")
    return {"n": len(truth), **_figure(point["auroc"], drawn.get("auroc"))}


def _roc(scores: Tensor, truth: Tensor) -> list[list[float]]:
    """(1 - specificity, sensitivity) at every threshold, thinned out; empty if it is undefined."""
    if not truth.any() or truth.all():
        return []
    order = scores.argsort(descending=True)
    last = torch.ones(len(order), dtype=torch.bool)  # of images with the same score
    last[:-1] = scores[order][1:] != scores[order][:-1]
    hits = truth[order].cumsum(0)[last] / truth.sum()
    alarms = (~truth)[order].cumsum(0)[last] / (~truth).sum()
    points = torch.stack([alarms, hits], 1)
    keep = torch.linspace(0, len(points) - 1, min(ROC_POINTS, len(points))).round().long()
    return [[0.0, 0.0], *points[keep].tolist()]


def subgroup_table(
    probabilities: Tensor,
    labels: Tensor,
    recipe: Recipe,
    marks: Mapping[str, Sequence[str]],
    draws: Tensor | None,
    units: Sequence[str] | None,
) -> list[dict[str, Any]]:
    """Balanced accuracy and AUROC in each subgroup of the test images.

    ``marks`` holds the value of each image by the name of the column.
    """
    rows = []
    groups = [(column, value) for column in marks for value in sorted(set(marks[column]))]
    for column, value in tqdm(groups, desc="subgroups", delay=1, leave=False):
        places = [place for place, one in enumerate(marks[column]) if one == value]
        row: dict[str, Any] = {"column": column, "value": value, "n": len(places)}
        if units is not None:
            row["units"] = len({units[place] for place in places})
        weights = draws[places] if draws is not None else None
        if weights is not None:
            weights = weights[:, weights.sum(0) > 0]  # a resample may hold no image of it
        point, drawn = _metrics(
            probabilities[places],
            labels[places],
            weights,
            task=recipe.task,
            threshold=recipe.thresholds or 0.5,
        )
        errors = drawn.get("balanced_error")
        row["balanced_accuracy"] = _figure(
            1 - point["balanced_error"], 1 - errors if errors is not None else None
        )
        row["auroc"] = _figure(point["auroc"], drawn.get("auroc"))
        rows.append(row)
    return rows


def confusion(probabilities: Tensor, labels: Tensor) -> list[list[int]]:
    """Counts by true class (row) and predicted class (column)."""
    classes = probabilities.shape[1]
    pairs = labels * classes + probabilities.argmax(1)
    return pairs.bincount(minlength=classes**2).reshape(classes, classes).tolist()


def calibration(probabilities: Tensor, labels: Tensor, task: str) -> dict[str, Any]:
    """The calibration error, and how often the network was right in bins of its probability.

    Multi-class: the probability of the class it named. Multi-label: that of each label, all in one.
    """
    found, _ = classification_metrics(probabilities, labels, task=task)
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
    return {"ece": float(found["ece"]), "bins": bins}


def worst_mistakes(
    probabilities: Tensor, labels: Tensor, said: Tensor, task: str, limit: int
) -> list[dict[str, Any]]:
    """The images about which the network was surest and wrong, worst first.

    Each has the ``index``, the ``truth`` and ``said`` class indices and the ``stated`` probability
    of what it said. Of a multi-label task ``said`` is the one label it was most wrong about, and
    ``present`` says whether that label was there.
    """
    if task == "multilabel":
        wrong = (said != (labels == 1)) & ~labels.isnan()
        distance = torch.where(wrong, (probabilities - labels.nan_to_num()).abs(), -1.0)
        worst, which = distance.max(1)
    else:
        stated, which = probabilities.max(1)
        worst = torch.where(which != labels, stated, -1.0)
    found = []
    for n in worst.argsort(descending=True, stable=True)[:limit].tolist():
        if worst[n] < 0:
            break
        named = int(which[n])
        entry = {"index": n, "said": named, "stated": float(probabilities[n, named])}
        several = labels.ndim == 2
        truth = {"present": bool(labels[n, named] == 1)} if several else {"truth": int(labels[n])}
        found.append(entry | truth)
    return found


def by_family(result: RobustnessResult) -> list[dict[str, Any]]:
    """Balanced accuracy of clean images, of each family of corruptions, and of all of them.

    A family's figure is the mean over its corruptions and severities; its interval is of the same
    mean over the same resamples.
    """
    measured = [r for r in result.rows if r["severity"] != "mean" and "balanced_error" in r]
    families = {name: (name,) for name in ("clean", *KINDS)} | {"all": tuple(KINDS)}
    table = []
    for name, kinds in families.items():
        rows = [row for row in measured if row["kind"] in kinds]
        if not rows:
            continue
        entry: dict[str, Any] = {
            "family": name,
            "corruptions": list(dict.fromkeys(row["corruption"] for row in rows)),
            "balanced_accuracy": 1 - float(np.mean([row["balanced_error"] for row in rows])),
        }
        if result.replicates:
            drawn = [result.replicates[row["corruption"], row["severity"]] for row in rows]
            ends = _ends(torch.from_numpy(1 - np.mean(drawn, axis=0)))
            entry |= {f"balanced_accuracy_{end}": value for end, value in ends.items()}
        areas = [row["auroc"] for row in rows if "auroc" in row]
        entry |= {"auroc": float(np.mean(areas))} if areas else {}
        entry["ece"] = float(np.mean([row["ece"] for row in rows]))
        table.append(entry)
    return table
