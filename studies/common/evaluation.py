"""Evaluation of a trained network: predictions and metrics on clean and corrupted images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from inmerge_wrap.robustness import classification_metrics
from inmerge_wrap.robustness.corruptions import corrupt
from studies.common.images import Images, Normalised

CORRUPTIONS = ("gaussian_noise", "gaussian_blur", "contrast_down", "brightness_up")
SEVERITY = 3  # the middle one
BATCH = 500  # images


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switches to eval mode, then restores the mode of every module, frozen BatchNorm included."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def predict(model: nn.Module, pixels: Tensor, normalise: Normalised, batch_size: int) -> Tensor:
    """Returns logits for uint8 or float pixels, shape (N, classes), in eval mode, on the CPU."""
    with evaluating(model):
        outputs = [model(part).float().cpu() for part in normalise.batches(pixels, batch_size)]
    return torch.cat(outputs)


def metrics(logits: Tensor, labels: Tensor, task: str) -> dict[str, float]:
    """Computes accuracy, balanced error, AUROC, calibration and more; undefined ones are absent."""
    probabilities = logits.sigmoid() if task == "multilabel" else logits.softmax(1)
    values, _ = classification_metrics(probabilities, labels.cpu(), task=task)
    return {name: float(value) for name, value in values.items()}


def evaluate(model: nn.Module, data: Images, normalise: Normalised) -> dict[str, dict[str, float]]:
    """Computes metrics of the test part, clean and under each corruption, ``name/severity``.

    Every model sees the same corrupted images: the draws depend only on the image's index.
    """
    pixels, labels = data.parts["test"]
    rows = {"clean": metrics(predict(model, pixels, normalise, BATCH), labels, data.task)}
    for name in CORRUPTIONS:
        damaged = [
            corrupt(pixels[index].float() / 255, name, SEVERITY, indices=index.tolist())
            for index in torch.arange(len(pixels)).split(BATCH)
        ]
        logits = predict(model, torch.cat(damaged), normalise, BATCH)
        rows[f"{name}/{SEVERITY}"] = metrics(logits, labels, data.task)
    return rows
