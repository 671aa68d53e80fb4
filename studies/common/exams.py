"""Exams of trained networks: clean, by family of corruption, and calibration.

Every run of a data set is measured on the same images with the same corruptions, which are computed
once per process and kept. A large part is thinned by class: rare classes stay complete, and the
weights of the others restore the metrics of the whole part. The precision of balanced accuracy
depends on the rarest class, so little of it is lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from inmerge_wrap.robustness import classification_metrics
from inmerge_wrap.robustness.corruptions import corrupt
from studies.common.evaluation import predict
from studies.common.images import Images, Normalised

FAMILIES = {  # each corruption also fits grey images
    "noise": ("gaussian_noise", "impulse_noise"),
    "blur": ("gaussian_blur", "motion_blur"),
    "digital": ("jpeg_compression", "pixelate"),
    "colour": ("brightness_up", "contrast_down"),
    "artefact": ("dust", "characters"),
}
METRICS = ("accuracy", "balanced_error", "auroc", "ece", "nll", "scaled_ece", "scaled_nll")


@dataclass(frozen=True)
class Exam:
    """The images of an evaluation, uint8, clean and corrupted, with labels and weights."""

    pixels: Mapping[str, Tensor]  # "clean" or corruption/severity -> (N, C, H, W)
    labels: Tensor
    weights: Tensor  # (N,), how many images of the part each represents


def thin(labels: Tensor, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keeps about ``count`` rows, rare classes complete; returns also the weight of each row.

    Multi-label rows have no single class: of these it keeps a random ``count``.
    """
    if len(labels) <= count:
        return torch.arange(len(labels)), torch.ones(len(labels))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    if labels.ndim > 1:
        chosen = order[:count].sort().values
        return chosen, torch.full((count,), len(labels) / count)
    sizes = labels.bincount()
    cap = max(c for c in range(1, count + 1) if sizes.clamp_max(c).sum() <= count or c == 1)
    kept = torch.cat([order[labels[order] == label][:cap] for label in range(len(sizes))])
    kept = kept.sort().values
    return kept, (sizes / sizes.clamp_max(cap).clamp_min(1))[labels[kept]]


def make_exam(data: Images, part: str, count: int, severities: tuple[int, ...]) -> Exam:
    """Returns ``count`` images of a part, clean and under every corruption of FAMILIES."""
    images, labels = data.parts[part]
    rows, weights = thin(labels, count)
    pixels = {"clean": images[rows]}
    for name in (name for family in FAMILIES.values() for name in family):
        for severity in severities:
            damaged = corrupt(images[rows].float() / 255, name, severity, indices=rows.tolist())
            pixels[f"{name}/{severity}"] = (damaged * 255).round().byte()
    return Exam(pixels, labels[rows], weights)


def negative_log_likelihood(logits: Tensor, labels: Tensor, weights: Tensor, task: str) -> float:
    """Returns the loss in nats per image; the mean over the labels of a multi-label task."""
    if task == "multilabel":
        losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1)
    else:
        losses = F.cross_entropy(logits, labels, reduction="none")
    return float((losses * weights).sum() / weights.sum())


def fit_temperature(logits: Tensor, labels: Tensor, weights: Tensor, task: str) -> float:
    """Fits the temperature that maximises the likelihood of the labels (temperature scaling)."""
    found = minimize_scalar(
        lambda log: negative_log_likelihood(logits / 2.0**log, labels, weights, task),
        bounds=(-4, 6),
        method="bounded",
    )
    return float(2.0**found.x)


def score(
    logits: Tensor, labels: Tensor, weights: Tensor, task: str, temperature: float
) -> dict[str, float]:
    """Returns METRICS of one set of images; undefined ones are absent."""
    values: dict[str, float] = {}
    for prefix, scaled in (("", logits), ("scaled_", logits / temperature)):
        probabilities = scaled.sigmoid() if task == "multilabel" else scaled.softmax(1)
        found, _ = classification_metrics(
            probabilities, labels, task=task, weights=weights.unsqueeze(1)
        )
        values |= {f"{prefix}{name}": float(value) for name, value in found.items()}
        values[f"{prefix}nll"] = negative_log_likelihood(scaled, labels, weights, task)
    finite = {name: values[name] for name in METRICS if values[name] == values[name]}
    return {name: round(value, 5) for name, value in finite.items()}


Logits = dict[str, dict[str, Tensor]]  # exam -> condition -> (N, classes)


def answers(network: nn.Module, exams: Mapping[str, Exam], normalise: Normalised) -> Logits:
    """Returns the logits of every exam and condition; a 2D network changes its memory format."""
    if all(parameter.ndim < 5 for parameter in network.parameters()):
        network = network.to(memory_format=torch.channels_last)  # a seventh faster on a CPU
    return {
        part: {
            name: predict(network, pixels, normalise, 250) for name, pixels in exam.pixels.items()
        }
        for part, exam in exams.items()
    }


def scored(logits: Logits, exams: Mapping[str, Exam], task: str) -> dict[str, Any]:
    """Returns METRICS of each exam and condition, and the temperature fitted on ``validation``."""
    clean = exams["validation"]
    temperature = fit_temperature(logits["validation"]["clean"], clean.labels, clean.weights, task)
    rows = {
        part: {
            name: score(found, exams[part].labels, exams[part].weights, task, temperature)
            for name, found in conditions.items()
        }
        for part, conditions in logits.items()
    }
    images = {part: len(exam.labels) for part, exam in exams.items()}
    return {"measured_images": images, "temperature": temperature, **rows}


def by_family(rows: Mapping[str, Mapping[str, float]], metric: str) -> dict[str, float]:
    """Returns a metric clean, for each family, and ``corrupted``, the mean over the families."""
    of_family = {
        family: mean(row[metric] for name, row in rows.items() if name.partition("/")[0] in names)
        for family, names in FAMILIES.items()
    }
    return {"clean": rows["clean"][metric], **of_family, "corrupted": mean(of_family.values())}
