"""Robustness, measured: corruptions, attacks, calibration, and the uncertainty of every figure.

`evaluate_robustness` runs one model over one set of images, clean and damaged, and gives plain
rows. It takes any `nn.Module` that maps (B, C, H, W) to logits and leaves no trace: train mode per
module, gradients, buffers and the global random generators are as they were.

    result = evaluate_robustness(model, loader, preset="dermatoscopy", mean=0.5, std=0.5)
    result.value("balanced_error", "motion_blur", severity=3)
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor, nn

from inmerge_wrap.corruptions import Corruption, check_images, corrupt, resolve_preset

__all__ = [
    "Attack",
    "RobustnessResult",
    "bootstrap_weights",
    "classification_metrics",
    "evaluate_robustness",
    "paired_difference",
    "percentile_interval",
]

_TASKS = {
    "multiclass": "multiclass",
    "binary": "binary",
    "multilabel": "multilabel",
    # The names MedMNIST uses. Grades are scored as classes, as MedMNIST and MedMNIST-C do.
    "multi-class": "multiclass",
    "ordinal-regression": "multiclass",
    "binary-class": "binary",
    "multi-label, binary-class": "multilabel",
}
_ECE_BINS = 15
_LEVEL = 0.95
_MOST_EXACT_FLIPS = 13
_CLEAN = ("clean", 0)

Row = dict[str, Any]
Condition = tuple[str, int | str]


# --- uncertainty: pure functions on arrays --------------------------------------------------------


def bootstrap_weights(n: int, resamples: int, *, seed: int = 0) -> np.ndarray:
    """Draw how often each of `n` images stands in each bootstrap resample.

    Weights rather than indices: every statistic becomes a matrix product over all resamples, and
    two models that are given the same weights are compared on the same resamples.

    Args:
        n: Number of images.
        resamples: Number of resamples.
        seed: Seed of the draw.

    Returns:
        Counts of shape (n, resamples), float32; every column sums to n.

    Raises:
        ValueError: If `n` is below 1 or `resamples` below 0.
    """
    if n < 1 or resamples < 0:
        raise ValueError(f"n is {n} and resamples {resamples}; they must be >= 1 and >= 0")
    generator = np.random.default_rng(seed)
    weights = np.empty((n, resamples), dtype=np.float32)
    for column in range(resamples):
        weights[:, column] = np.bincount(generator.integers(0, n, n), minlength=n)
    return weights


def percentile_interval(
    replicates: ArrayLike, *, level: float = _LEVEL
) -> tuple[float, float] | None:
    """Percentile interval of bootstrap replicates.

    Args:
        replicates: Values of the statistic; those that are not finite are left out.
        level: Share of the replicates inside.

    Returns:
        Lower and upper end, or None where no replicate is finite.

    Raises:
        ValueError: If `level` is not in (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; it must lie in (0, 1), for instance 0.95")
    values = np.asarray(replicates, dtype=float)
    values = values[np.isfinite(values)]
    if values.size == 0:
        return None
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_difference(
    a: ArrayLike, b: ArrayLike, *, level: float = _LEVEL, seed: int = 0
) -> dict[str, float]:
    """Mean of a - b over pairs, such as two methods trained from the same seeds.

    Args:
        a: One value per seed.
        b: The other method's value for the same seeds, in the same order.
        level: Confidence of the interval.
        seed: Seed of the sign flips where there are too many to try them all.

    Returns:
        `n` and `mean`; from two pairs on `low` and `high` of the t interval, `p_t` of the paired t
        test and `p_sign_flip` of the sign-flip test (exact up to 13 pairs; it cannot fall below
        2 / 2^n). `p_t` is absent where all differences are equal.

    Raises:
        ValueError: If the lengths differ, nothing is given, a value is not finite, or `level` is
            not in (0, 1).
    """
    first, second = np.asarray(a, dtype=float).ravel(), np.asarray(b, dtype=float).ravel()
    if first.shape != second.shape or first.size == 0:
        raise ValueError(
            f"a has {first.size} values and b {second.size}; give one value per seed, the same "
            "seeds in the same order"
        )
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("a and b must be finite; leave out the seeds where a value is undefined")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; it must lie in (0, 1), for instance 0.95")
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
    half_width = stats.sem(differences) * stats.t.ppf((1 + level) / 2, len(differences) - 1)
    summary["low"] = summary["mean"] - float(half_width)
    summary["high"] = summary["mean"] + float(half_width)
    if np.ptp(differences) > 1e-12:
        summary["p_t"] = float(stats.ttest_1samp(differences, 0.0).pvalue)
    if len(differences) <= _MOST_EXACT_FLIPS:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(differences))))
    else:
        drawn = np.random.default_rng(seed).choice((1.0, -1.0), (9999, len(differences)))
        # The data as they are belong to the possible outcomes.
        signs = np.vstack([np.ones(len(differences)), drawn])
    extreme = np.abs(signs @ differences) >= abs(differences.sum()) - 1e-12
    summary["p_sign_flip"] = float(extreme.mean())
    return summary


# --- metrics: every one takes weights, so that the point value and the bootstrap share one code ---


def classification_metrics(
    probabilities: Tensor,
    targets: Tensor,
    *,
    task: str = "multiclass",
    threshold: float | Sequence[float] = 0.5,
    coverages: Sequence[float] = (0.5, 0.8, 0.9),
    weights: Tensor | None = None,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Score probabilities against labels, for any number of weightings of the images at once.

    - `accuracy`, `error` = 1 - accuracy.
    - `balanced_error` = 1 - mean recall over the classes that occur (undefined with one class).
    - `auroc`: area under the ROC curve, ties counted half; mean over classes, one against the rest.
    - `ece`: expected calibration error, 15 equal bins, of the top class (multi-class) or of the
      positive class (binary, multi-label); the conventions of torchmetrics.
    - `brier`: mean squared distance to the one-hot label, summed over classes (multi-class, 0 to
      2), or of the positive class (binary, multi-label, 0 to 1).
    - `selective_accuracy_c`: accuracy on the share c of the images the model is surest about.

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
        coverages: Shares c in (0, 1] for the selective accuracy.
        weights: (N, R), such as counts of bootstrap resamples; all ones (R = 1) if None.

    Returns:
        Values of shape (R,) by name, and the reason for everything left out, by name.

    Raises:
        ValueError: If shapes, labels or settings do not fit.
    """
    task = _task(task)
    _check_coverages(coverages)
    if probabilities.ndim == 1:
        probabilities = probabilities[:, None]
    probabilities = probabilities.detach().double().cpu()
    targets = _check_targets(targets, probabilities.shape, task).cpu()
    if weights is None:
        weights = torch.ones(len(targets), 1, dtype=torch.float64)
    if weights.ndim != 2 or len(weights) != len(targets):
        raise ValueError(
            f"weights have shape {tuple(weights.shape)} for {len(targets)} images; give (N, R)"
        )
    if task == "multiclass":
        return _multiclass_metrics(probabilities, targets, weights, coverages)

    names = probabilities.shape[1]
    thresholds = [threshold] * names if isinstance(threshold, int | float) else list(threshold)
    if len(thresholds) != names or not all(0 <= value <= 1 for value in thresholds):
        raise ValueError(
            f"threshold is {threshold!r}; give a probability in [0, 1], or one for each of the "
            f"{names} labels"
        )
    per_label: dict[str, list[Tensor]] = {}
    left_out: dict[str, list[int]] = {}
    for label in range(names):
        known = ~targets[:, label].isnan()
        scores = _binary_metrics(
            probabilities[known, label],
            targets[known, label],
            weights[known],
            thresholds[label],
            coverages,
        )
        for name, values in scores.items():
            # Without both classes among the labels themselves no resample can define the figure.
            if values.isnan().all():
                left_out.setdefault(name, []).append(label)
            else:
                per_label.setdefault(name, []).append(values)
    nothing = torch.full((weights.shape[1],), math.nan, dtype=weights.dtype)
    metrics = {
        name: torch.stack(per_label[name]).nanmean(0) if name in per_label else nothing
        for name in scores
    }
    reasons = {
        name: "no positives or no negatives"
        + ("" if task == "binary" else f" among labels {labels}")
        for name, labels in left_out.items()
    }
    return metrics, reasons


def _binary_metrics(
    scores: Tensor,
    labels: Tensor,
    weights: Tensor,
    threshold: float,
    coverages: Sequence[float],
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
        **_selective_accuracy(torch.maximum(scores, 1 - scores), correct, weights, coverages),
    }


def _multiclass_metrics(
    probabilities: Tensor, targets: Tensor, weights: Tensor, coverages: Sequence[float]
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
    left_out = {}
    if not present.all():
        missing = (~present).nonzero().flatten().tolist()
        left_out["auroc"] = left_out["balanced_error"] = f"no images of classes {missing}"
    if present.sum() < 2:
        left_out["auroc"] = left_out["balanced_error"] = "all images are of one class"
    metrics = {
        "accuracy": accuracy,
        "error": 1 - accuracy,
        "balanced_error": 1 - recalls.nanmean(0) if present.sum() >= 2 else undefined,
        "auroc": torch.stack(areas).nanmean(0) if areas else undefined,
        "ece": _calibration_error(confidence, correct, weights),
        "brier": _weighted_mean((probabilities - one_hot).square().sum(1), weights),
        **_selective_accuracy(confidence, correct, weights, coverages),
    }
    return metrics, left_out


def _weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    return values.to(weights) @ weights / weights.sum(0)


def _auroc(scores: Tensor, positive: Tensor, weights: Tensor) -> Tensor:
    """Share of (positive, negative) pairs in the right order (Mann-Whitney), under weights."""
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


def _selective_accuracy(
    confidence: Tensor, correct: Tensor, weights: Tensor, coverages: Sequence[float]
) -> dict[str, Tensor]:
    order = confidence.argsort(descending=True, stable=True)
    weights, correct = weights[order], correct[order]
    running = weights.cumsum(0)
    accuracies = {}
    for coverage in coverages:
        # The subtrahend undoes rounding: 0.55 * 100 is 55.00000000000001 and must not become 56.
        budget = (coverage * running[-1].double() - 1e-6).ceil().to(weights)
        taken = (weights - (running - budget).clamp_min(0)).clamp_min(0)
        accuracies[f"selective_accuracy_{coverage:g}"] = correct @ taken / budget
    return accuracies


# --- checks ---------------------------------------------------------------------------------------


def _task(task: str) -> str:
    if task not in _TASKS:
        raise ValueError(f"task is {task!r}; choose one of {', '.join(_TASKS)}")
    return _TASKS[task]


def _check_coverages(coverages: Sequence[float]) -> None:
    for coverage in coverages:
        if not 0 < coverage <= 1:
            raise ValueError(f"coverage is {coverage}; it must lie in (0, 1], for instance 0.8")


def _check_targets(targets: Tensor, shape: Sequence[int], task: str) -> Tensor:
    """Bring labels into the shape the metrics take: (N,) classes, or (N, L) floats of 0, 1, NaN."""
    targets = torch.as_tensor(targets)
    expected = {
        "multiclass": f"({shape[0]},) or ({shape[0]}, 1) class indices",
        "binary": f"({shape[0]},) or ({shape[0]}, 1) of 0 and 1",
        "multilabel": f"{tuple(shape)} of 0, 1 and NaN for unknown",
    }[task]
    if task == "multilabel":
        fits = tuple(targets.shape) == tuple(shape)
    else:
        fits = len(targets) == shape[0] and targets.numel() == shape[0] and targets.ndim <= 2
    if not fits:
        raise ValueError(
            f"labels have shape {tuple(targets.shape)} for task {task!r} and outputs "
            f"{tuple(shape)}; give {expected}"
        )
    if task == "multiclass":
        whole = targets.reshape(-1).long()
        if not torch.equal(whole.to(targets.dtype), targets.reshape(-1)) or not (
            0 <= int(whole.min()) and int(whole.max()) < shape[1]
        ):
            raise ValueError(
                f"labels lie in [{targets.min()}, {targets.max()}]; whole numbers from 0 to "
                f"{shape[1] - 1} fit the {shape[1]} outputs: check num_classes"
            )
        return whole
    labels = targets.double().reshape(tuple(shape))
    allowed = (labels == 0) | (labels == 1)
    if task == "multilabel":
        allowed |= labels.isnan()
    if not allowed.all():
        raise ValueError(
            f"labels hold {labels[~allowed][0].item():g}; give {expected} for task {task!r}"
        )
    return labels


def _check_logits(outputs: Any, images: Tensor, task: str) -> Tensor:
    """Bring a model's answer into (B, K) logits, (B, 1) of them for a binary task."""
    logits = getattr(outputs, "logits", outputs)
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"the model returned {type(outputs).__name__}; a tensor of logits is needed"
        )
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
    wrong = {"binary": logits.shape[1] != 1, "multiclass": logits.shape[1] < 2}.get(task, False)
    if wrong:
        raise ValueError(
            f"the model has {logits.shape[1]} output(s); task {task!r} needs "
            f"{'1 or 2' if task == 'binary' else 'at least 2'}: check the task"
        )
    if not logits.isfinite().all():
        raise ValueError(
            "the model returned logits that are not finite (NaN or infinite): check the weights, "
            "the normalisation and the precision it runs in"
        )
    return logits


def _to_probabilities(logits: Tensor, task: str) -> Tensor:
    # Double precision keeps apart the confidences that single precision would round to 1.
    logits = logits.double()
    return logits.softmax(1) if task == "multiclass" else logits.sigmoid()


def _normaliser(
    mean: float | Sequence[float] | None,
    std: float | Sequence[float] | None,
    normalize: Callable[[Tensor], Tensor] | None,
) -> Callable[[Tensor], Tensor]:
    if normalize is not None:
        if mean is not None or std is not None:
            raise ValueError("give mean and std, or normalize, not both")
        return normalize
    if mean is None and std is None:
        return lambda pixels: pixels
    if mean is None or std is None:
        raise ValueError(f"mean is {mean} and std is {std}; give both or neither")
    centre = torch.as_tensor(mean, dtype=torch.float32).reshape(-1, 1, 1)
    scale = torch.as_tensor(std, dtype=torch.float32).reshape(-1, 1, 1)
    if not (scale > 0).all():
        raise ValueError(f"std is {std}; every entry must be positive")

    def apply(pixels: Tensor) -> Tensor:
        for name, values in (("mean", centre), ("std", scale)):
            if len(values) not in (1, pixels.shape[1]):
                raise ValueError(
                    f"{name} has {len(values)} entries for {pixels.shape[1]} channels; give one, "
                    "or one each"
                )
        return (pixels - centre.to(pixels)) / scale.to(pixels)

    return apply


# --- attacks --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attack:
    """A white-box attack of bounded largest change per pixel (L-infinity), on pixels in [0, 1].

    FGSM: one step along the sign of the gradient (I. Goodfellow et al., arXiv 1412.6572). PGD: many
    small ones from a random start inside the bound (A. Madry et al., arXiv 1706.06083).

    Attributes:
        name: "fgsm" or "pgd".
        eps: Largest change of a pixel, in pixel units of the [0, 1] range: 2 grey levels are 2/255.
        steps: Steps of PGD.
        step_size: Size of one of them, in the same unit; 2.5 eps / steps if None.
    """

    name: str
    eps: float = 2 / 255
    steps: int = 10
    step_size: float | None = None

    def __post_init__(self) -> None:
        if self.name not in ("fgsm", "pgd"):
            raise ValueError(f"attack {self.name!r} is unknown; choose fgsm or pgd")
        if not 0 < self.eps <= 1:
            raise ValueError(
                f"eps is {self.eps}; it must lie in (0, 1], as a share of the pixel range (2 grey "
                "levels are 2/255)"
            )
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; at least 1 is needed")
        if self.step_size is not None and not self.step_size > 0:
            raise ValueError(f"step_size is {self.step_size}; it must be positive")


class _PixelClassifier(nn.Module):
    """The attacked network: pixels in [0, 1] go in, so that eps means what it says."""

    def __init__(self, model: nn.Module, normalise: Callable[[Tensor], Tensor], task: str) -> None:
        super().__init__()
        self.model = model
        self.normalise = normalise
        self.task = task

    def forward(self, pixels: Tensor) -> Tensor:
        logits = _check_logits(self.model(self.normalise(pixels)), pixels, self.task)
        # A single logit z becomes (0, z): the same probability as a two-class softmax.
        return F.pad(logits, (1, 0)) if self.task == "binary" else logits


class _TrueLabels(nn.Module):
    """Cross-entropy against the labels of the batch at hand, whatever labels ART passes.

    ART knows one class per image: it divides every row of labels by its sum, which spoils several
    labels and gives NaN for none. Unknown labels (NaN) do not count.
    """

    def __init__(self, targets: Tensor) -> None:
        super().__init__()
        self.targets = targets

    def forward(self, logits: Tensor, _: Tensor) -> Tensor:
        truth = self.targets.to(logits)
        return F.binary_cross_entropy_with_logits(
            logits, truth.nan_to_num(), weight=(~truth.isnan()).to(logits), reduction="sum"
        )


def _attack_batch(
    attack: Attack,
    network: _PixelClassifier,
    images: Tensor,
    targets: Tensor,
    *,
    outputs: int,
    seed: int,
) -> Tensor:
    """Adversarial images for one batch, through the Adversarial Robustness Toolbox."""
    try:
        from art.attacks.evasion import FastGradientMethod, ProjectedGradientDescent
        from art.estimators.classification import PyTorchClassifier
    except ImportError as error:
        raise ImportError('attacks need ART: pip install "inmerge-wrap[attacks]"') from error
    device = images.device
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"attacks run on cpu or cuda, not on {device}; move the model")
    size = len(images)
    classes = max(2, outputs)
    loss: nn.Module = nn.CrossEntropyLoss()
    labels = targets.reshape(-1)[:size].long()
    if network.task == "multilabel":
        # One batch per call, so that the labels stay in step with the images.
        loss, labels = _TrueLabels(targets), torch.zeros(size, dtype=torch.long)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        classifier = PyTorchClassifier(
            network,
            loss=loss,
            input_shape=tuple(images.shape[1:]),
            nb_classes=classes,
            clip_values=(0.0, 1.0),
            device_type="gpu" if device.type == "cuda" else "cpu",
        )
        if attack.name == "fgsm":
            method = FastGradientMethod(classifier, eps=attack.eps, batch_size=size)
        else:
            method = ProjectedGradientDescent(
                classifier,
                eps=attack.eps,
                eps_step=attack.step_size or 2.5 * attack.eps / attack.steps,
                max_iter=attack.steps,
                num_random_init=1,
                batch_size=size,
                verbose=False,
            )
        # ART starts PGD from numpy's global generator; the caller puts its state back.
        np.random.seed(seed % 2**32)
        with torch.enable_grad():
            found = method.generate(
                x=images.detach().float().cpu().numpy(),
                y=F.one_hot(labels, classes).float().cpu().numpy(),
            )
    moved = torch.as_tensor(found).to(images)
    # Rounding must not carry a pixel beyond what eps promises.
    return (images + (moved - images).clamp(-attack.eps, attack.eps)).clamp(0, 1)


def _worst_case(
    clean: Tensor,
    attacked: Tensor,
    targets: Tensor,
    task: str,
    threshold: float | Sequence[float],
) -> Tensor:
    """Logits of the attacked image, or of the clean one where the attack helped the model.

    The attacker may leave a picture alone, so an attack never raises the number of right answers.
    """
    if task == "multiclass":
        better = (attacked.argmax(1) == targets) & (clean.argmax(1) != targets)
    else:
        cuts = torch.as_tensor(threshold).to(clean).logit()
        right, right_clean = (((logits > cuts) == targets).sum(1) for logits in (attacked, clean))
        better = right > right_clean
    return torch.where(better[:, None], clean, attacked)


# --- the evaluation -------------------------------------------------------------------------------


@dataclass
class RobustnessResult:
    """What `evaluate_robustness` found.

    Attributes:
        rows: One plain dict per condition. `corruption` and `severity` say which: "clean" and 0, a
            corruption and 1 ... 5 or "mean" (over its severities), "all" and "mean" (over the
            corruptions), or an attack and its eps. Then `kind`, `n`, and each metric by name with
            `_low` and `_high`. A metric that is undefined is absent; `left_out` says why, and names
            the classes that a mean had to do without.
        settings: What the figures depend on, with a fingerprint of the data.
        seconds: Wall-clock time in corruption, inference, attacks and statistics.
        replicates: Bootstrap values of the balanced error per condition, from which intervals of
            ratios between two models are made; not written to JSON.
    """

    rows: list[Row]
    settings: dict[str, Any]
    seconds: dict[str, float]
    replicates: dict[Condition, np.ndarray] = field(default_factory=dict, repr=False)

    def row(self, corruption: str = "clean", severity: int | float | str | None = None) -> Row:
        """The row of a condition.

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
        self,
        metric: str,
        corruption: str = "clean",
        severity: int | float | str | None = None,
    ) -> float | None:
        """A figure of the row that `row` finds, or None where it is undefined."""
        return self.row(corruption, severity).get(metric)

    def to_json(self, path: str | Path | None = None) -> str:
        """Rows, settings and seconds as JSON text, also written to `path` if one is given."""
        content = {"settings": self.settings, "seconds": self.seconds, "rows": self.rows}
        text = json.dumps(content, indent=1, allow_nan=False)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, path: str | Path) -> RobustnessResult:
        """Read what `to_json` wrote. As a baseline it gives BE and rBE without intervals."""
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(content["rows"], content["settings"], content["seconds"])


def evaluate_robustness(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    preset: str | Sequence[str | Corruption],
    task: str = "multiclass",
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    normalize: Callable[[Tensor], Tensor] | None = None,
    severities: Sequence[int] = (1, 2, 3, 4, 5),
    seed: int = 0,
    baseline: RobustnessResult | None = None,
    attacks: Sequence[Attack | str] = (),
    threshold: float | Sequence[float] = 0.5,
    coverages: Sequence[float] = (0.5, 0.8, 0.9),
    bootstrap: int = 1000,
    device: torch.device | str | None = None,
) -> RobustnessResult:
    """Measure how a model fares on damaged pictures.

    The loader is read once; each batch goes through the model clean, at every corruption and
    severity, and under every attack. Images are damaged as pixels in [0, 1] and normalised after
    that. An image's damage depends on its place in the loader and on `seed` alone, so every model
    that is given the same data sees the same pictures, whatever its batch size.

    Against a baseline model, with E the balanced error, c a corruption and s a severity:

        BE_c  = mean_s E(c, s) / mean_s E_base(c, s)
        rBE_c = (mean_s E(c, s) - E(clean)) / (mean_s E_base(c, s) - E_base(clean))

    and BE, rBE are their means over the corruptions (F. Di Salvo et al., MedMNIST-C, arXiv
    2406.17536, with AlexNet for a baseline; after D. Hendrycks, T. Dietterich, arXiv 1903.12261).
    Below 1 is better than the baseline. Where the denominator is not positive (a baseline that
    makes no error or loses nothing to the corruption) the ratio is undefined: absent, and left out
    of the mean over the corruptions. Its interval is absent where more than 2.5 % of the resamples
    leave it undefined: the baseline's loss cannot be told from none.

    Intervals are 95 % percentile intervals of a bootstrap over images. All conditions, and all
    models on data of the same size and the same seed, share the resamples, so those of BE and rBE
    are paired. That of the ECE is shifted by the bootstrap's estimate of its bias, which is upward:
    resampling adds to the scatter within the bins what the data set already has. Intervals hold
    what the choice of test images does, not what another training seed would do: for that, compare
    seeds with `paired_difference`.

    Args:
        model: Maps (B, C, H, W) to logits: (B, classes); for a binary task (B,), (B, 1) or (B, 2);
            for a multi-label one (B, labels). It runs in eval mode and is given back as it was.
        loader: Iterable of batches (images, labels, ...), images floats in [0, 1] *before* any
            normalisation, in a fixed order.
        preset: A name of `PRESETS`, a MedMNIST flag, or a sequence of corruptions.
        task: "multiclass", "binary" or "multilabel", or a task name of MedMNIST.
        mean: Subtracted from the pixels before the model, one or one per channel.
        std: Divides them after that.
        normalize: Any function of (B, C, H, W) pixels, in place of mean and std.
        severities: Which of 1 ... 5.
        seed: Seed of the corruptions, of PGD's starts and of the bootstrap.
        baseline: Result of the model to compare with, on the same data with the same settings.
        attacks: `Attack` objects, or "fgsm" and "pgd" for their defaults (eps 2/255). An attacker
            may leave an image alone: one that the attack puts right counts as it was.
        threshold: Operating point of a binary or multi-label task, one or one per label. Choose it
            on validation data: with rare labels, 0.5 predicts nothing.
        coverages: Shares of the images for the selective accuracy.
        bootstrap: Number of resamples; 0 for no intervals.
        device: Where the model is; taken from its parameters if None.

    Returns:
        Rows, settings and times.

    Raises:
        ValueError: If a setting is out of range, the loader is empty or shuffles, images are not in
            [0, 1], labels do not fit the outputs, logits are not finite, or the baseline was
            measured on other data.
        ImportError: If kornia (or, for attacks, the Adversarial Robustness Toolbox) is missing.
    """
    task = _task(task)
    corruptions = resolve_preset(preset)
    normalise = _normaliser(mean, std, normalize)
    _check_coverages(coverages)
    levels = tuple(severities)
    if not levels or len(set(levels)) < len(levels) or not set(levels) <= {1, 2, 3, 4, 5}:
        raise ValueError(f"severities is {levels}; choose some of 1, 2, 3, 4, 5, each once")
    if bootstrap < 0:
        raise ValueError(f"bootstrap is {bootstrap}; it must be >= 0")
    if isinstance(getattr(loader, "sampler", None), torch.utils.data.RandomSampler):
        raise ValueError(
            "the loader shuffles, and the damage of an image depends on its place: every model "
            "would see other pictures; build it with shuffle=False"
        )
    chosen_attacks = [Attack(entry) if isinstance(entry, str) else entry for entry in attacks]
    names = [(attack.name, attack.eps) for attack in chosen_attacks]
    if len(set(names)) < len(names):
        raise ValueError(f"attacks repeat a name and eps: {names}; give each once")
    where = _device_of(model, device)

    with _undisturbed(model, where):
        run = _run(
            model,
            loader,
            corruptions,
            levels,
            chosen_attacks,
            normalise=normalise,
            task=task,
            threshold=threshold,
            seed=seed,
            device=where,
        )
    settings = {
        "task": task,
        "corruptions": [entry.name for entry in corruptions],
        "severities": list(levels),
        "seed": seed,
        "threshold": threshold if isinstance(threshold, int | float) else list(threshold),
        "coverages": list(coverages),
        "bootstrap": bootstrap,
        "attacks": [asdict(attack) for attack in chosen_attacks],
        "n": len(run.targets),
        "data_sha256": run.digest,
    }
    if baseline is not None:
        _check_baseline(baseline, settings)

    started = time.perf_counter()
    weights = bootstrap_weights(len(run.targets), bootstrap, seed=seed)
    scores = {
        condition: _score(logits, run.targets, task, threshold, coverages, weights)
        for condition, logits in run.logits.items()
    }
    rows = _rows(scores, corruptions, levels, chosen_attacks, len(run.targets), baseline)
    run.seconds["statistics"] = time.perf_counter() - started
    replicates = {
        condition: score.replicates["balanced_error"]
        for condition, score in scores.items()
        if "balanced_error" in score.replicates
    }
    return RobustnessResult(rows, settings, run.seconds, replicates)


@dataclass
class _Run:
    """Raw outcome of one pass over the loader."""

    logits: dict[Condition, Tensor]
    targets: Tensor
    digest: str
    seconds: dict[str, float]


@dataclass
class _Score:
    """Metrics of one condition: value, bootstrap values, and what is left out of which and why."""

    values: dict[str, float]
    replicates: dict[str, np.ndarray]
    left_out: dict[str, str]


def _device_of(model: nn.Module, device: torch.device | str | None) -> torch.device:
    tensor = next(iter([*model.parameters(), *model.buffers()]), None)
    if device is None:
        return tensor.device if tensor is not None else torch.device("cpu")
    wanted = torch.device(device)
    if tensor is not None and (
        tensor.device.type != wanted.type or wanted.index not in (None, tensor.device.index)
    ):
        raise ValueError(f"device is {wanted} and the model is on {tensor.device}; move the model")
    return tensor.device if tensor is not None else wanted


@contextmanager
def _undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluate in eval mode; give back modes, gradients and the global generators as they were."""
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            # Flags, not eval(): a module may override eval() and leave its own flag untouched.
            for module, _ in modes:
                module.training = False
            for parameter, _, _ in parameters:
                parameter.requires_grad_(False)
            yield
        finally:
            for module, training in modes:
                module.training = training
            for parameter, requires_grad, gradient in parameters:
                parameter.requires_grad_(requires_grad)
                parameter.grad = gradient
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def _run(
    model: nn.Module,
    loader: Iterable[Any],
    corruptions: Sequence[Corruption],
    levels: Sequence[int],
    attacks: Sequence[Attack],
    *,
    normalise: Callable[[Tensor], Tensor],
    task: str,
    threshold: float | Sequence[float],
    seed: int,
    device: torch.device,
) -> _Run:
    """Pass every batch through the model, clean, damaged and attacked."""
    logits: dict[Condition, list[Tensor]] = {}
    targets: list[Tensor] = []
    digest = hashlib.sha256()
    seconds = {"corruption": 0.0, "inference": 0.0, "attacks": 0.0}
    network = _PixelClassifier(model, normalise, task)
    seen = 0

    @contextmanager
    def clock(what: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds[what] += time.perf_counter() - started

    def infer(pixels: Tensor) -> Tensor:
        with torch.no_grad(), clock("inference"):
            found = _check_logits(model(normalise(pixels)), pixels, task)
        if any(module.training for module in model.modules()):
            raise RuntimeError("the model put itself into train mode: its outputs are worthless")
        return found

    for batch in loader:
        if not isinstance(batch, list | tuple) or len(batch) < 2:
            raise ValueError(
                f"the loader gave a {type(batch).__name__}; batches (images, labels) are needed"
            )
        images, labels = batch[0], torch.as_tensor(batch[1])
        check_images(images)
        digest.update(images.detach().float().cpu().contiguous().numpy().tobytes())
        images = images.to(device)
        clean = infer(images)
        truth = _check_targets(labels, clean.shape, task)
        targets.append(truth.cpu())
        logits.setdefault(_CLEAN, []).append(clean.float().cpu())
        indices = range(seen, seen + len(images))
        for entry in corruptions:
            for level in levels:
                with clock("corruption"):
                    damaged = corrupt(images, entry, level, seed=seed, indices=indices)
                logits.setdefault((entry.name, level), []).append(infer(damaged).float().cpu())
        for attack in attacks:
            with clock("attacks"):
                moved = _attack_batch(
                    attack,
                    network,
                    images,
                    truth.to(device),
                    outputs=clean.shape[1],
                    seed=seed + seen,
                )
            worst = _worst_case(clean, infer(moved), truth.to(device), task, threshold)
            logits.setdefault((attack.name, str(attack.eps)), []).append(worst.float().cpu())
        seen += len(images)
    if not targets:
        raise ValueError("the loader is empty; give it at least one batch (images, labels)")
    joined = torch.cat(targets)
    digest.update(joined.numpy().tobytes())
    return _Run(
        {condition: torch.cat(parts) for condition, parts in logits.items()},
        joined,
        digest.hexdigest(),
        seconds,
    )


def _score(
    logits: Tensor,
    targets: Tensor,
    task: str,
    threshold: float | Sequence[float],
    coverages: Sequence[float],
    weights: np.ndarray,
) -> _Score:
    def metrics(given: Tensor | None) -> tuple[dict[str, Tensor], dict[str, str]]:
        return classification_metrics(
            probabilities,
            targets,
            task=task,
            threshold=threshold,
            coverages=coverages,
            weights=given,
        )

    probabilities = _to_probabilities(logits, task)
    points, left_out = metrics(None)
    values = {name: float(point) for name, point in points.items() if not point.isnan()}
    # Resamples in portions, so that a large data set does not need them all in memory at once.
    portion = max(1, 20_000_000 // len(targets))
    parts = [
        metrics(torch.from_numpy(weights[:, start : start + portion]))[0]
        for start in range(0, weights.shape[1], portion)
    ]
    replicates = {
        name: np.concatenate([part[name].double().numpy() for part in parts])
        for name in values
        if parts
    }
    return _Score(values, replicates, left_out)


def _rows(
    scores: Mapping[Condition, _Score],
    corruptions: Sequence[Corruption],
    levels: Sequence[int],
    attacks: Sequence[Attack],
    n: int,
    baseline: RobustnessResult | None,
) -> list[Row]:
    """Every condition, then each corruption's mean, then the mean over all of them."""
    clean = scores[_CLEAN]
    rows = [_row("clean", "clean", 0, n, clean)]
    means = []
    for entry in corruptions:
        per_level = [scores[entry.name, level] for level in levels]
        rows += [
            _row(entry.name, entry.kind, level, n, score)
            for level, score in zip(levels, per_level, strict=True)
        ]
        mean = _mean_score(per_level)
        if baseline is not None:
            _add_ratios(mean, entry.name, clean, baseline)
        means.append(mean)
        rows.append(_row(entry.name, entry.kind, "mean", n, mean))
    rows.append(_row("all", "all", "mean", n, _mean_score(means)))
    rows += [
        _row(attack.name, "attack", attack.eps, n, scores[attack.name, str(attack.eps)])
        for attack in attacks
    ]
    return rows


def _row(corruption: str, kind: str, severity: int | float | str, n: int, score: _Score) -> Row:
    row: Row = {"corruption": corruption, "kind": kind, "severity": severity, "n": n}
    for name, value in score.values.items():
        row[name] = value
        drawn = score.replicates.get(name, np.empty(0))
        if name == "ece" and drawn.size:
            drawn = np.maximum(0, drawn - (drawn.mean() - value))
        interval = percentile_interval(drawn)
        if interval is not None:
            row[f"{name}_low"], row[f"{name}_high"] = interval
    if score.left_out:
        row["left_out"] = score.left_out
    return row


def _mean_score(scores: Sequence[_Score]) -> _Score:
    """Mean of every figure over those conditions for which it is defined."""
    values, replicates = {}, {}
    for name in dict.fromkeys(name for score in scores for name in score.values):
        defined = [score for score in scores if name in score.values]
        values[name] = float(np.mean([score.values[name] for score in defined]))
        # An interval is of the same mean as the value, or of nothing.
        if all(name in score.replicates for score in defined):
            replicates[name] = np.mean([score.replicates[name] for score in defined], axis=0)
    reasons: dict[str, list[str]] = {}
    for score in scores:
        for name, reason in score.left_out.items():
            if reason not in reasons.setdefault(name, []):
                reasons[name].append(reason)
    return _Score(values, replicates, {name: "; ".join(why) for name, why in reasons.items()})


def _add_ratios(score: _Score, corruption: str, clean: _Score, baseline: RobustnessResult) -> None:
    """Add BE and rBE of one corruption to its mean over the severities, where they are defined."""
    if "balanced_error" not in score.values:
        return
    base = baseline.value("balanced_error", corruption, "mean")
    base_clean = baseline.value("balanced_error")
    if base is None or base_clean is None:
        return
    drawn, base_drawn = None, None
    condition_means = [
        values for (name, _), values in baseline.replicates.items() if name == corruption
    ]
    if condition_means and "balanced_error" in score.replicates:
        drawn = score.replicates["balanced_error"]
        base_drawn = np.mean(condition_means, axis=0)
    value = score.values["balanced_error"]
    terms = {
        "be": (value, base, drawn, base_drawn),
        "rbe": (
            value - clean.values["balanced_error"],
            base - base_clean,
            None if drawn is None else drawn - clean.replicates["balanced_error"],
            None if base_drawn is None else base_drawn - baseline.replicates[_CLEAN],
        ),
    }
    for name, (above, below, above_drawn, below_drawn) in terms.items():
        if below <= 1e-12:
            what = "makes no error under" if name == "be" else "loses nothing to"
            score.left_out[name] = f"the baseline {what} {corruption}"
            continue
        score.values[name] = above / below
        if above_drawn is None or below_drawn is None:
            continue
        defined = below_drawn > 1e-12
        if np.mean(~defined) <= (1 - _LEVEL) / 2:
            score.replicates[name] = np.where(
                defined, above_drawn / np.where(defined, below_drawn, 1.0), math.nan
            )


def _check_baseline(baseline: RobustnessResult, settings: Mapping[str, Any]) -> None:
    names = ["data_sha256", "task", "severities", "seed", "threshold"]
    if baseline.replicates:
        names.append("bootstrap")
    for name in names:
        theirs = baseline.settings.get(name)
        if theirs != settings[name]:
            raise ValueError(
                f"the baseline was measured with {name} {theirs!r}, not {settings[name]!r}: run it "
                "again on the same data with the same settings"
            )
    missing = sorted(set(settings["corruptions"]) - set(baseline.settings["corruptions"]))
    if missing:
        raise ValueError(
            f"the baseline was not measured under {', '.join(missing)}: run it with the same preset"
        )
