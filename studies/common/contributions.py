"""What each test image contributes to a score, so that intervals can count images without logits.

Balanced accuracy and the AUROC are means over images to first order. The contribution of an image
is its part of that mean: the contributions of all images sum to the score, and a bootstrap over
images weighs them. For balanced accuracy this is exact within classes; for the AUROC it is the
linear part (the placement values of DeLong, DeLong and Clarke-Pearson, 1988), whose variance is
the one that their interval uses.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping

import numpy as np
from scipy.stats import rankdata
from torch import Tensor

from studies.common.exams import FAMILIES

Measure = str  # "balanced accuracy" or "AUROC"


def one_against_others(logits: Tensor, labels: Tensor, task: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns scores and truths (N, classes); each class is held against all others."""
    if task == "multilabel":
        return logits.double().sigmoid().numpy(), labels.numpy() == 1
    truth = labels.numpy()[:, None] == np.arange(logits.shape[1])
    return logits.double().softmax(1).numpy(), truth


def of_auroc(logits: Tensor, labels: Tensor, weights: Tensor, task: str) -> np.ndarray:
    """Returns each image's contribution (N,) to the macro AUROC; classes without both are left out.

    ``weights`` say how many images of the part each row represents.
    """
    scores, truths = one_against_others(logits, labels, task)
    parts = [
        _placements(score, truth, weights.double().numpy())
        for score, truth in zip(scores.T, truths.T, strict=True)
        if truth.any() and not truth.all()
    ]
    return np.mean(parts, axis=0)


def _placements(score: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns contributions (N,) that sum to the weighted AUROC.

    Each is the share of the other side that the image is placed right against. Both sides say the
    whole AUROC, so half of it is taken from each, evenly: a constant, which no draw changes.
    """
    order = rankdata(score, method="dense") - 1
    below = {}
    for side in (True, False):
        held = np.bincount(order[truth == side], weights[truth == side], minlength=order.max() + 1)
        below[side] = (np.cumsum(held) - held / 2) / held.sum()
    placed = np.where(truth, below[False][order], 1 - below[True][order])
    share = np.where(truth, weights / weights[truth].sum(), weights / weights[~truth].sum())
    area = float((placed * share)[truth].sum())
    return (placed - area / 2) * share


def of_balanced_accuracy(logits: Tensor, labels: Tensor, weights: Tensor, task: str) -> np.ndarray:
    """Returns each image's contribution (N,) to the balanced accuracy.

    Of a multi-label task it is the mean over the labels of sensitivity and specificity at .5.
    """
    w = weights.double().numpy()
    if task != "multilabel":
        truth, right = labels.numpy(), (logits.argmax(1) == labels).numpy()
        held = np.bincount(truth, w)
        return right * w / held[truth] / (held > 0).sum()
    scores, truths = one_against_others(logits, labels, task)
    parts = []
    for score, truth in zip(scores.T, truths.T, strict=True):
        if truth.any() and not truth.all():
            right = (score > 0.5) == truth
            parts.append(right * np.where(truth, w / w[truth].sum(), w / w[~truth].sum()) / 2)
    return np.mean(parts, axis=0)


MEASURES = {"balanced accuracy": of_balanced_accuracy, "AUROC": of_auroc}


def contributions(
    conditions: Mapping[str, Tensor], labels: Tensor, weights: Tensor, task: str
) -> dict[str, dict[str, str]]:
    """Returns measure -> ``"clean"`` and, where there are corruptions, ``"corrupted"`` -> packed.

    Corrupted is the mean over severities, then corruptions, then families, as in the exams. Under
    ``"classes"`` stands the class of each image, to be drawn again within; 0 of multi-label ones.
    """
    classes = labels if task != "multilabel" else labels.new_zeros(len(labels))
    packed = base64.b64encode(classes.numpy().astype("u1").tobytes()).decode()
    found: dict[str, dict[str, str]] = {"classes": {"packed": packed}}
    for measure, function in MEASURES.items():
        each = {name: function(x, labels, weights, task) for name, x in conditions.items()}
        found[measure] = {"clean": pack(each["clean"])}
        if len(each) > 1:
            families = [
                np.mean([x for name, x in each.items() if name.partition("/")[0] in names], axis=0)
                for names in FAMILIES.values()
            ]
            found[measure]["corrupted"] = pack(np.mean(families, axis=0))
    return found


def pack(values: np.ndarray) -> str:
    """Returns an array as base64: its least value and a step in float64, then steps in 16 bits."""
    low, step = float(values.min()), max(float(np.ptp(values)) / 65535, 1e-30)
    steps = np.round((values - low) / step).astype("<u2")
    return base64.b64encode(np.array([low, step], "<f8").tobytes() + steps.tobytes()).decode()


def unpack(text: str) -> np.ndarray:
    """Returns the contributions (N,) that ``pack`` wrote."""
    content = base64.b64decode(text)
    low, step = np.frombuffer(content[:16], "<f8")
    return low + step * np.frombuffer(content[16:], "<u2")


def classes_of(found: Mapping[str, Mapping[str, str]]) -> np.ndarray:
    """Returns the class (N,) of each image from the result of ``contributions``."""
    return np.frombuffer(base64.b64decode(found["classes"]["packed"]), "u1").astype(int)
