"""Weighted classification metrics, and confidence intervals.

Every metric takes image weights, so that its value and its bootstrap replicates come from the same
code. A metric that is undefined is absent, never zero.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

__all__ = [
    "bootstrap_weights",
    "classification_metrics",
    "paired_difference",
    "percentile_interval",
]

_TASKS = {
    "multiclass": "multiclass",
    "binary": "binary",
    "multilabel": "multilabel",
    # The names that MedMNIST uses. Grades are scored as classes, as MedMNIST and MedMNIST-C do.
    "multi-class": "multiclass",
    "ordinal-regression": "multiclass",
    "binary-class": "binary",
    "multi-label, binary-class": "multilabel",
    "multi-label": "multilabel",
}
_ECE_BINS = 15
_ROUNDED = 1e-5  # of a sum of probabilities in half precision
LEVEL = 0.95  # of every interval
_MOST_EXACT_FLIPS = 13


def bootstrap_weights(
    n: int, resamples: int, *, seed: int = 0, groups: Sequence[Hashable] | None = None
) -> np.ndarray:
    """Draws how often each of `n` images occurs in each bootstrap resample.

    Weights rather than indices: every statistic becomes a matrix product over all resamples, and
    two models that are given the same weights are compared on the same resamples.

    Args:
        n: Number of images.
        resamples: Number of resamples.
        seed: Seed of the draw.
        groups: Whose image each is, such as patients: whole groups are drawn then, because images
            of one are not independent (cluster bootstrap).

    Returns:
        Counts of shape (n, resamples), float32; without groups every column sums to n.

    Raises:
        ValueError: If `n` is below 1, `resamples` below 0, or there is not one group an image.
    """
    if groups is not None:
        # The entries of a tensor are no keys: two of the same value are not the same.
        groups = groups.tolist() if isinstance(groups, Tensor) else groups
        if len(groups) != n:
            raise ValueError(f"groups has {len(groups)} entries for {n} images; give one each")
        places = {group: place for place, group in enumerate(dict.fromkeys(groups))}
        drawn = bootstrap_weights(len(places), resamples, seed=seed)
        return drawn[[places[group] for group in groups]]
    if n < 1 or resamples < 0:
        raise ValueError(f"n is {n} and resamples {resamples}; they must be >= 1 and >= 0")
    generator = np.random.default_rng(seed)
    weights = np.empty((n, resamples), dtype=np.float32)
    for column in range(resamples):
        weights[:, column] = np.bincount(generator.integers(0, n, n), minlength=n)
    return weights


def percentile_interval(replicates: ArrayLike) -> tuple[float, float] | None:
    """Returns the 95% percentile interval of bootstrap replicates.

    Args:
        replicates: Values of the statistic; those that are not finite are left out.

    Returns:
        Lower and upper end, or None where no replicate is finite or all agree: an interval without
        width would look like certainty.
    """
    values = np.asarray(replicates, dtype=float)
    values = values[np.isfinite(values)]
    if values.size == 0:
        return None
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return (float(low), float(high)) if low < high else None


def paired_difference(a: ArrayLike, b: ArrayLike, *, seed: int = 0) -> dict[str, float]:
    """Returns the mean of a - b over pairs, such as two methods trained from the same seeds.

    Args:
        a: One value per seed.
        b: The other method's value for the same seeds, in the same order.
        seed: Seed of the sign flips if there are too many to enumerate.

    Returns:
        `n` and `mean`; from two pairs on `low` and `high` of the 95% t interval, `p_t` of the
        paired t test and `p_sign_flip` of the sign-flip test (exact up to 13 pairs; it cannot fall
        below 2 / 2^n). `p_t` is absent where all differences are equal.

    Raises:
        ValueError: If the lengths differ, nothing is given, or a value is not finite.
    """
    first, second = np.asarray(a, dtype=float).ravel(), np.asarray(b, dtype=float).ravel()
    if first.shape != second.shape or first.size == 0:
        raise ValueError(
            f"a has {first.size} values and b {second.size}; give one value per seed, the same "
            "seeds in the same order"
        )
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("a and b must be finite; leave out the seeds where a value is undefined")
    differences = first - second
    summary = {"n": len(differences), "mean": float(differences.mean())}
    if len(differences) < 2:
        return summary
    try:
        from scipy import stats
    except ImportError as error:
        raise ImportError(
            'paired_difference needs scipy: pip install "inmerge-wrap[robustness]"'
        ) from error
    if np.ptp(differences) > 1e-12:
        test = stats.ttest_1samp(differences, 0.0)
        summary["low"], summary["high"] = map(float, test.confidence_interval(LEVEL))
        summary["p_t"] = float(test.pvalue)
    else:
        summary["low"] = summary["high"] = summary["mean"]
    # Not scipy's permutation_test: it takes equal sums that differ by rounding for unequal, as of
    # accuracies, which are counts over one number of images.
    if len(differences) <= _MOST_EXACT_FLIPS:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(differences))))
    else:
        drawn = np.random.default_rng(seed).choice((1.0, -1.0), (9999, len(differences)))
        # The observed data are one of the possible outcomes.
        signs = np.vstack([np.ones(len(differences)), drawn])
    extreme = np.abs(signs @ differences) >= abs(differences.sum()) - 1e-12
    summary["p_sign_flip"] = float(extreme.mean())
    return summary


def classification_metrics(
    probabilities: Tensor,
    targets: Tensor,
    *,
    task: str = "multiclass",
    threshold: float | Sequence[float] = 0.5,
    weights: Tensor | None = None,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Scores probabilities against labels, for any number of image weightings at once.

    - `accuracy`, `error` = 1 - accuracy.
    - `balanced_error` = 1 - mean recall over the classes that occur (undefined with one class).
    - `auroc`: area under the ROC curve, ties counted half; mean over classes, one against the rest.
    - `ece`: expected calibration error, 15 equal bins, of the top class (multi-class) or of the
      positive class (binary, multi-label); the conventions of torchmetrics.
    - `brier`: mean squared distance to the one-hot label, summed over classes (multi-class, 0 to
      2), or of the positive class (binary, multi-label, 0 to 1).

    Multi-label figures are the mean of the binary ones over the labels. A label or class for which
    a figure is undefined (no positives, no negatives) is left out of that mean and named; where all
    are, the figure is NaN here and absent from the rows of `evaluate_robustness`.

    Args:
        probabilities: (N, K) for multi-class; (N,), (N, 1) of the positive class for binary; (N, L)
            for multi-label.
        targets: Class indices (N,) or (N, 1); 0/1 labels (N,) or (N, 1); or 0/1 labels (N, L),
            where NaN marks an unknown one.
        task: "multiclass", "binary" or "multilabel", or a task name of MedMNIST.
        threshold: Probability above which a label is predicted (binary, multi-label; one for all or
            one per label).
        weights: (N, R), counts such as those of bootstrap resamples; all ones (R = 1) if None.

    Returns:
        Values of shape (R,) by name, and the reason for everything left out, by name.

    Raises:
        ValueError: If shapes, labels or settings do not fit, or values are no probabilities.
    """
    task = resolve_task(task)
    if probabilities.ndim == 1:
        probabilities = probabilities[:, None]
    probabilities = probabilities.detach().double().cpu()
    if not bool(((probabilities >= 0) & (probabilities <= 1 + _ROUNDED)).all()):
        raise ValueError("probabilities must lie in [0, 1]: apply softmax or sigmoid to logits")
    targets = check_targets(targets, probabilities.shape, task).cpu()
    if weights is None:
        weights = torch.ones(len(targets), 1, dtype=torch.float64)
    if weights.ndim != 2 or len(weights) != len(targets):
        raise ValueError(
            f"weights have shape {tuple(weights.shape)} for {len(targets)} images; give (N, R)"
        )
    if not weights.is_floating_point():
        weights = weights.double()
    if bool((weights < 0).any()):
        raise ValueError(f"weights must not be negative, the smallest is {float(weights.min()):g}")
    if task == "multiclass":
        return _multiclass_metrics(probabilities, targets, weights)

    names = probabilities.shape[1]
    cuts = torch.as_tensor(threshold, dtype=torch.float64)
    thresholds = [cuts.item()] * names if cuts.ndim == 0 else cuts.tolist()
    if len(thresholds) != names or not all(0 <= value <= 1 for value in thresholds):
        raise ValueError(
            f"threshold is {threshold!r}; give a probability in [0, 1], or one for each of the "
            f"{names} labels"
        )
    scores = []
    for label, cut in enumerate(thresholds):
        known = ~targets[:, label].isnan()
        of_label = probabilities[known, label], targets[known, label], weights[known]
        scores.append(_binary_metrics(*of_label, cut))
    metrics, left_out = {}, {}
    for name in scores[0]:
        metrics[name] = torch.stack([each[name] for each in scores]).nanmean(0)
        # Without both classes among the labels themselves no resample can define the figure.
        undefined = [label for label, each in enumerate(scores) if each[name].isnan().all()]
        if undefined:
            left_out[name] = _why_left_out(undefined, targets, task)
    return metrics, left_out


def _why_left_out(labels: list[int], targets: Tensor, task: str) -> str:
    unknown = [label for label in labels if targets[:, label].isnan().all()]
    one_sided = [label for label in labels if label not in unknown]
    reasons = []
    if one_sided:
        among = "" if task == "binary" else f" among labels {one_sided}"
        reasons.append(f"no positives or no negatives{among}")
    if unknown:
        reasons.append(f"no known values of labels {unknown}")
    return "; ".join(reasons)


def _binary_metrics(
    scores: Tensor, labels: Tensor, weights: Tensor, threshold: float
) -> dict[str, Tensor]:
    positive = labels == 1
    correct = ((scores > threshold) == positive).to(weights)
    recall = _weighted_mean(correct[positive], weights[positive])
    specificity = _weighted_mean(correct[~positive], weights[~positive])
    accuracy = _weighted_mean(correct, weights)
    return {
        "accuracy": accuracy,
        "error": 1 - accuracy,
        "balanced_error": 1 - (recall + specificity) / 2,
        "auroc": _auroc(scores, positive, weights),
        "ece": _calibration_error(scores, positive.to(weights), weights),
        "brier": _weighted_mean((scores - labels).square(), weights),
    }


def _multiclass_metrics(
    probabilities: Tensor, targets: Tensor, weights: Tensor
) -> tuple[dict[str, Tensor], dict[str, str]]:
    classes = probabilities.shape[1]
    one_hot = F.one_hot(targets, classes)
    confidence, predicted = probabilities.max(1)
    correct = (predicted == targets).to(weights)
    accuracy = _weighted_mean(correct, weights)
    members = one_hot.to(weights)
    recalls = ((members * correct[:, None]).T @ weights) / (members.T @ weights)
    present = one_hot.any(0)
    # One class against the rest needs both: a class of all images is as undefined as an empty one.
    rankable = present & ~one_hot.all(0)
    undefined = torch.full_like(accuracy, math.nan)
    areas = [
        _auroc(probabilities[:, label], targets == label, weights)
        for label in rankable.nonzero().flatten().tolist()
    ]
    reason = ""
    if not present.all():
        reason = f"no images of classes {(~present).nonzero().flatten().tolist()}"
    if present.sum() < 2:
        reason = "all images are of one class"
    metrics = {
        "accuracy": accuracy,
        "error": 1 - accuracy,
        "balanced_error": (1 - recalls.nanmean(0)).where(recalls.isfinite().sum(0) > 1, math.nan),
        "auroc": torch.stack(areas).nanmean(0) if areas else undefined,
        "ece": _calibration_error(confidence, correct, weights),
        "brier": _weighted_mean((probabilities - one_hot).square().sum(1), weights),
    }
    return metrics, dict.fromkeys(("auroc", "balanced_error"), reason) if reason else {}


def _weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    return values.to(weights) @ weights / weights.sum(0)


def _auroc(scores: Tensor, positive: Tensor, weights: Tensor) -> Tensor:
    """Returns the weighted share of correctly ordered (positive, negative) pairs (Mann-Whitney)."""
    negatives, order = scores[~positive].sort()
    below = F.pad(weights[~positive][order].cumsum(0), (0, 0, 1, 0))
    # Negatives strictly below a positive count in full, those of equal score half.
    strictly = torch.searchsorted(negatives, scores[positive].contiguous(), right=False)
    up_to = torch.searchsorted(negatives, scores[positive].contiguous(), right=True)
    wins = (weights[positive] * (below[strictly] + below[up_to]) / 2).sum(0)
    return wins / (weights[positive].sum(0) * below[-1])


def _calibration_error(confidence: Tensor, correct: Tensor, weights: Tensor) -> Tensor:
    inner = torch.linspace(0, 1, _ECE_BINS + 1, dtype=confidence.dtype)[1:-1]
    members = F.one_hot(torch.bucketize(confidence, inner, right=True), _ECE_BINS).to(weights)
    gaps = (members * (confidence.to(weights) - correct)[:, None]).T @ weights
    return gaps.abs().sum(0) / weights.sum(0)


def resolve_task(task: str) -> str:
    if task not in _TASKS:
        raise ValueError(f"task is {task!r}; choose one of {', '.join(_TASKS)}")
    return _TASKS[task]


def check_targets(targets: Tensor, shape: Sequence[int], task: str) -> Tensor:
    """Converts labels to what the metrics take: (N,) classes, or (N, L) floats of 0, 1, NaN."""
    targets = torch.as_tensor(targets)
    n, outputs = shape
    expected = {
        "multiclass": f"({n},) or ({n}, 1) class indices",
        "binary": f"({n},) or ({n}, 1) of 0 and 1",
        "multilabel": f"{tuple(shape)} of 0, 1 and NaN for unknown",
    }[task]
    fitting = [(n, outputs)] if task == "multilabel" else [(n,), (n, 1)]
    if tuple(targets.shape) not in fitting:
        raise ValueError(
            f"labels have shape {tuple(targets.shape)} for task {task!r} and outputs "
            f"{tuple(shape)}; give {expected}"
        )
    if task == "multiclass":
        targets = targets.reshape(-1)
        whole = targets.long()
        fits = torch.equal(whole.to(targets.dtype), targets)
        if not (fits and whole.min() >= 0 and whole.max() < outputs):
            raise ValueError(
                f"labels lie in [{targets.min()}, {targets.max()}]; whole numbers from 0 to "
                f"{outputs - 1} fit the {outputs} outputs: check num_classes"
            )
        return whole
    labels = targets.double().reshape(tuple(shape))
    allowed = (labels == 0) | (labels == 1) | (labels.isnan() & (task == "multilabel"))
    if not allowed.all():
        raise ValueError(
            f"labels hold {labels[~allowed][0].item():g}; give {expected} for task {task!r}"
        )
    return labels


def check_logits(outputs: Any, images: Tensor, task: str) -> Tensor:
    """Converts a model's output to (B, K) logits, (B, 1) for a binary task."""
    logits = getattr(outputs, "logits", outputs)
    if not isinstance(logits, Tensor):
        raise ValueError(f"the model returned {type(outputs).__name__}; logits are needed")
    if logits.ndim == 1 and task == "binary":
        logits = logits[:, None]
    if logits.ndim != 2 or len(logits) != len(images) or logits.shape[1] == 0:
        raise ValueError(
            f"the model returned shape {tuple(logits.shape)} for {len(images)} images; logits "
            "(batch, outputs) are needed"
        )
    if task == "binary" and logits.shape[1] == 2:
        # The sigmoid of this difference is the softmax of the two.
        logits = logits[:, 1:] - logits[:, :1]
    count = logits.shape[1]
    needed = {"binary": (count == 1, "1 or 2"), "multiclass": (count > 1, "at least 2")}
    fits, wanted = needed.get(task, (True, ""))
    if not fits:
        raise ValueError(
            f"the model has {count} output(s); task {task!r} needs {wanted}: check the task"
        )
    if not logits.isfinite().all():
        raise ValueError(
            "the model returned logits that are not finite (NaN or infinite): check the weights, "
            "the normalisation and the precision it runs in"
        )
    return logits


def to_probabilities(logits: Tensor, task: str) -> Tensor:
    # Double precision keeps apart the confidences that single precision would round to 1.
    logits = logits.double()
    return logits.softmax(1) if task == "multiclass" else logits.sigmoid()
