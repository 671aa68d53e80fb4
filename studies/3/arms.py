"""The arms, data and training of the third study."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from studies.common.channels import ChannelDropout, ChannelNoise, RandomErasing
from studies.common.merging import Fade, Merge
from studies.common.methods import EMA, Method
from studies.common.networks import PACKAGES
from studies.common.training import Run

# -- arms ------------------------------------------------------------------------------------------

EVERYWHERE = {"shallow_layers": 0, "similarity_threshold": -1.0, "merge_probability": 1.0}
FADING = Fade(decay="cosine", anneals="strength")
CONSTANT = Fade(decay="constant", anneals="strength")

ARMS: dict[str, tuple[Method, ...]] = {
    "plain": (),
    "merging per image": (Merge({**EVERYWHERE, "mode": "outputs", "direction": "signed"}, FADING),),
    "merging per step": (
        Merge({**EVERYWHERE, "mode": "weights", "direction": "signed", "radius": 0.3}, FADING),
    ),
    "channel noise": (ChannelNoise(0.3),),
    "channel dropout": (ChannelDropout(0.1),),
    "random erasing": (RandomErasing(0.5),),
    "EMA": (EMA(0.98),),
    "DAMP": (
        Merge(
            {**EVERYWHERE, "mode": "weights", "direction": "multiplicative", "radius": 0.2},
            CONSTANT,
        ),
    ),
}

# -- training --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Length:
    """Steps and peak rate of the one-cycle schedule, chosen for plain training."""

    steps: int
    lr: float = 0.02


TRAINING = {  # by augmentation; see protocol.md
    "none": Length(600),
    "flips": Length(600),
    "noise and blur": Length(1000),
    "trivial": Length(1000),
    "augmix": Length(1000),
    "trivial and jitter": Length(1500),
}
LENGTHS = (300, 600, 1000, 1500, 3000)  # that ``lengths`` compares ...
RATES = (0.01, 0.02, 0.04)  # ... and ``rates``, at the length chosen

# -- data ------------------------------------------------------------------------------------------

IMAGES = (150, 600, 2400)
CHOOSING = ("bloodmnist", "dermamnist")
LITE0 = "tf_efficientnet_lite0"
VOLUMES = "bloodmnist volumes"  # eight slices of 28 px each, for the network "volumes_small"
NETWORKS = {
    **{arch: package for package, arch in PACKAGES.items()},
    "resnet18": "",
    "volumes_small": "",
}


@dataclass(frozen=True)
class Cell:
    """A data set, a number of training images (0 for all), an augmentation and a network."""

    dataset: str
    images: int
    augmentation: str
    arch: str = LITE0


CONFIRMING = tuple(
    Cell(dataset, images, augmentation, arch)
    for arch in (LITE0, "tf_efficientnet_lite1", "tf_efficientnet_lite2", "resnet18")
    for dataset, images in (
        ("bloodmnist", 600),  # for the other laboratories alone
        ("pneumoniamnist", 600),
        ("breastmnist", 0),
        ("chest", 0),
    )
    for augmentation in ("flips", "trivial")
)
FIRST_CONFIRMING_SEED = 1000  # no seed of the choice
# In the other laboratories, before which nobody looks, see protocol.md.
LABORATORY_PAIRS = dict.fromkeys(ARMS, 5) | dict.fromkeys(
    ("plain", "merging per image", "channel noise", "channel dropout"), 10
)


def run_of(cell: Cell, arm: str, seed: int, length: Length | None = None) -> Run:
    """Returns one run; the length is the augmentation's unless it is given."""
    length = length or TRAINING[cell.augmentation]
    return Run(
        arm=arm,
        seed=seed,
        dataset=cell.dataset,
        size=28 if cell.dataset == VOLUMES else 64,
        arch=cell.arch,
        train_images=cell.images,
        epochs=0,
        steps=length.steps,
        batch_size=32,
        lr=length.lr,
        weights=NETWORKS[cell.arch],
        augmentation=cell.augmentation,
        equal="epochs",
        channels_last=cell.dataset != VOLUMES,
        method=ARMS[arm],
    )


def runs_of(cells: Sequence[Cell], arms: Sequence[str], seeds: Sequence[int]) -> Iterator[Run]:
    """Returns the runs seed by seed, so that a stopped sweep stays paired."""
    for seed in seeds:
        for cell in cells:
            for arm in arms:
                yield run_of(cell, arm, seed)


def frozen_content(augmentation: str) -> dict[str, Any]:
    """Returns arms, training and cells of an augmentation, as its freeze file holds them."""
    from studies.common.freezing import described

    return {
        "arms": described(ARMS),
        "training": {augmentation: vars(TRAINING[augmentation])},
        "cells": {
            f"{cell.arch}, {cell.dataset}": vars(cell)
            for cell in CONFIRMING
            if cell.augmentation == augmentation
        },
    }
