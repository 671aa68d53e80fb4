"""Blood cells of two other laboratories than BloodMNIST's, to test networks trained on it.

The file holds 64 px images of five of BloodMNIST's eight classes (Zheng et al. 2018, Micron 107;
Jiangxi Tecom and the CellaVision blog). Basophils are too few to count, so four classes are scored,
and the answers of a network are the four outputs of these. CellaVision's images are cropped to the
scale of BloodMNIST's cells. All go through 28 px, as the images that the networks were trained on.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inmerge_wrap import recalibrate
from studies.common.contributions import contributions
from studies.common.evaluation import metrics, predict
from studies.common.images import Normalised

SCORED = (1, 4, 5, 6)  # eosinophil, lymphocyte, monocyte, neutrophil in BloodMNIST's numbering
LABORATORIES = {  # name -> its images and labels in the file
    "Jiangxi": ("jiangxi_images", "jiangxi_labels"),
    "CellaVision": ("cellavision_crop_images", "cellavision_labels"),
}
PRIOR = 16  # images that the statistics of training count for, as in Schneider et al. 2020


@dataclass(frozen=True)
class Laboratory:
    """All images (N, 3, H, W), uint8, and the labels of those that are scored."""

    pixels: Tensor
    scored: Tensor  # rows of the images of SCORED
    labels: Tensor  # of these, 0 to 3


def read_laboratories(path: Path, size: int) -> dict[str, Laboratory]:
    """Reads the file ``wbc_labs.npz``.

    Raises:
        SystemExit: If it is missing.
    """
    if not path.exists():
        raise SystemExit(f"{path} is missing: it holds the cells of the other laboratories")
    found = {}
    with np.load(path) as file:
        for name, (images, labelled) in LABORATORIES.items():
            pixels = torch.from_numpy(file[images]).permute(0, 3, 1, 2).float()
            for side in (28, size):
                pixels = F.interpolate(
                    pixels, size=(side, side), mode="bilinear", antialias=True
                ).round()
            labels = torch.from_numpy(file[labelled]).long().flatten()
            rows = torch.isin(labels, torch.tensor(SCORED)).nonzero().flatten()
            place = torch.tensor([SCORED.index(label) for label in labels[rows].tolist()])
            found[name] = Laboratory(pixels.byte(), rows, place)
    return found


def adapted(network: nn.Module, batches: Iterable[Tensor], prior: int) -> nn.Module:
    """Returns a copy whose BatchNorm statistics are those of unlabelled images, mixed with its own.

    Each statistic becomes ``(prior * old + n * new) / (prior + n)`` for ``n`` images (arXiv
    2006.16971).
    """
    changed = copy.deepcopy(network)
    recalibrate(changed, batches, prior=prior)
    return changed


def in_laboratories(
    network: nn.Module, laboratories: dict[str, Laboratory], normalise: Normalised
) -> dict[str, Any]:
    """Returns scores and contributions in each laboratory, ``as trained`` and ``adapted``."""
    found: dict[str, Any] = {}
    for name, laboratory in laboratories.items():
        batches = normalise.batches(laboratory.pixels)
        ways = {"as trained": network, "adapted": adapted(network, batches, PRIOR)}
        found[name] = {}
        for way, one in ways.items():
            logits = predict(one, laboratory.pixels, normalise, 250)
            answers, labels = logits[laboratory.scored][:, list(SCORED)], laboratory.labels
            ones = torch.ones(len(labels))
            found[name][way] = metrics(answers, labels, "multiclass") | {
                "contributions": contributions({"clean": answers}, labels, ones, "multiclass")
            }
    return found
