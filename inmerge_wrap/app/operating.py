"""Temperature and thresholds of a network, chosen on labelled images."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor

from inmerge_wrap.images.preparation import Recipe
from inmerge_wrap.robustness import classification_metrics

_FEW = 20  # labelled images, below which a warning is given
_RARE = 10  # images with a label, or without it, likewise
_BOUNDS = (math.log(0.05), math.log(20.0))  # of the temperature's logarithm


def balanced_accuracy(recipe: Recipe, scores: Tensor, labels: Tensor) -> float:
    """Returns the balanced accuracy, of several labels the mean over the labels."""
    found, _ = classification_metrics(
        recipe.probabilities(scores), labels, task=recipe.task, threshold=recipe.thresholds or 0.5
    )
    return 1 - float(found["balanced_error"])


def operating_point(recipe: Recipe, scores: Tensor, labels: Tensor) -> tuple[Recipe, list[str]]:
    """Returns the recipe with the temperature, and thresholds if it has any, of these images.

    The temperature minimises the cross-entropy (Guo et al. 2017, arXiv 1706.04599); a threshold
    has the best balanced accuracy of its label.
    """
    found = minimize_scalar(
        lambda log: float(cross_entropy(scores.double() / math.exp(log), labels)),
        bounds=_BOUNDS,
        method="bounded",
    )
    what = "a temperature" if recipe.thresholds is None else "a temperature and thresholds"
    notes = []
    if min(abs(found.x - bound) for bound in _BOUNDS) < 0.01:
        low = found.x < 0
        why = "all of them are answered without a mistake" if low else "the answers fit them badly"
        notes.append(
            f"the temperature stays {recipe.temperature:.3g}: these labelled images do not say "
            f"which is right, as {why}"
        )
    else:
        recipe = replace(recipe, temperature=math.exp(found.x))
    if len(labels) < _FEW:
        notes.append(f"{len(labels)} labelled images are few to choose {what} on")
    if recipe.thresholds is None:
        return recipe, notes
    thresholds = list(recipe.thresholds)
    probabilities, rare = recipe.probabilities(scores), []
    for place, name in enumerate(recipe.classes):
        chosen = chosen_threshold(probabilities[:, place], labels[:, place])
        if chosen is not None:
            thresholds[place] = chosen
            counts = [int((labels[:, place] == mark).sum()) for mark in (1, 0)]
            if min(counts) < _RARE:
                rare.append(f"{name} ({counts[0]} with it, {counts[1]} without)")
        else:
            notes.append(
                f"{name} keeps its threshold of {thresholds[place]:.3f}: the labelled images do "
                "not hold both answers"
            )
    if rare:
        notes.append(
            f"thresholds chosen on fewer than {_RARE} labelled images with or without the label "
            f"are uncertain: {', '.join(rare)}. Check them on more images before you use them"
        )
    return replace(recipe, thresholds=tuple(thresholds)), notes


def chosen_threshold(probabilities: Tensor, marks: Tensor) -> float | None:
    """Returns the threshold of a label with the best balanced accuracy, None of one answer."""
    positive, negative = (probabilities[marks == mark].sort().values for mark in (1, 0))
    if not len(positive) or not len(negative):
        return None
    values = torch.cat([positive, negative]).unique()
    between = (values[1:] + values[:-1]) / 2 if len(values) > 1 else values
    missed, spared = (
        torch.searchsorted(each, between, right=True).double() / len(each)
        for each in (positive, negative)
    )
    return float(between[(spared - missed).argmax()])


def cross_entropy(scores: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Returns the mean cross-entropy; of several labels the binary one, over those that are known.

    Args:
        scores: A network's outputs (N, classes).
        labels: Class indices (N,), or 0, 1 and NaN for unknown (N, labels).
        weights: One for each class, or one for the positives of each label.
    """
    if labels.ndim == 1:
        return F.cross_entropy(scores, labels, weight=weights)
    known = ~labels.isnan()
    losses = F.binary_cross_entropy_with_logits(
        scores, labels.nan_to_num(), pos_weight=weights, reduction="none"
    )
    return (losses * known).sum() / known.sum().clamp_min(1)
