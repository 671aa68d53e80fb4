"""A registry of image corruptions, as cameras, scanners, slides and file formats cause them.

`effects` holds the functions and their parameters at five severities; `corrupt` applies one of
them, and `PRESETS` lists those of each imaging modality.

The assignment of corruptions to modalities follows MedMNIST-C: F. Di Salvo, S. Doerrich, C. Ledig,
"MedMNIST-C: Comprehensive benchmark and improved classifier robustness by simulating realistic
image corruptions", arXiv 2406.17536 (2024). The implementations and the severities are our own: one
scale for every data set, and lengths as a share of the image side so that 28 px and 224 px images
are corrupted to the same degree. Error rates measured here are comparable with each other, not with
the tables of that paper.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from inmerge_wrap.robustness.effects import REGISTRY, Corruption, Draws

__all__ = [
    "CORRUPTIONS",
    "DATASET_PRESETS",
    "PRESETS",
    "Corruption",
    "Draws",
    "check_images",
    "corrupt",
    "resolve_preset",
]


def check_images(images: Tensor) -> None:
    """Checks that a batch holds pixels as every function of this module expects them.

    Args:
        images: The batch.

    Raises:
        ValueError: If it is not a floating tensor (B, 1 or 3, H, W) with values in [0, 1].
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        found = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(
            f"images are {found}; a floating tensor with pixels in [0, 1] is required "
            "(for bytes: images.float() / 255)"
        )
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"images have shape {tuple(images.shape)}; give (batch, 1 or 3 channels, height, width)"
        )
    if images.numel() == 0:
        raise ValueError(f"images have shape {tuple(images.shape)}: nothing in it to corrupt")
    low, high = (float(value) for value in torch.aminmax(images))
    # The comparison is written so that NaN fails it too.
    if not (low >= -1e-6 and high <= 1 + 1e-6):
        raise ValueError(
            f"images lie in [{low:.4g}, {high:.4g}]; corruptions act on pixels in [0, 1]: leave "
            "the normalisation out of the data and pass it as mean and std"
        )


@torch.no_grad()
def corrupt(
    images: Tensor,
    corruption: str | Corruption,
    severity: int,
    *,
    seed: int = 0,
    indices: Sequence[int] | None = None,
) -> Tensor:
    """Applies a corruption to a batch of images.

    The result depends on the images, the corruption, the severity, the seed and each image's index.
    It does not depend on the size of the batch (up to rounding in the last digit), nor on global
    generators, which are neither read nor advanced.

    Args:
        images: Pixels in [0, 1], shape (B, C, H, W), C = 1 or 3, any device and floating dtype.
        corruption: A name of `CORRUPTIONS`, or a `Corruption` of your own.
        severity: 1 (mild) to 5 (severe).
        seed: Seed of the random corruptions.
        indices: Index of each image within its data set; 0 ... B - 1 if None.

    Returns:
        New images of the same shape, dtype and device, in [0, 1].

    Raises:
        ValueError: If the images are not pixels in [0, 1], the corruption is unknown or needs
            colour, the severity is out of 1 ... 5, or `indices` has another length than the batch.
    """
    check_images(images)
    chosen = _look_up(corruption) if isinstance(corruption, str) else corruption
    if severity not in (1, 2, 3, 4, 5):
        raise ValueError(f"severity is {severity!r}; choose 1, 2, 3, 4 or 5")
    if chosen.rgb_only and images.shape[1] == 1:
        raise ValueError(
            f"corruption {chosen.name!r} needs colour and the images have one channel; choose the "
            'preset "grey" or that of the modality'
        )
    if indices is None:
        indices = range(len(images))
    if len(indices) != len(images):
        raise ValueError(
            f"indices has {len(indices)} entries for {len(images)} images; give one each"
        )
    # Half precision would round away mild noise, and the CPU lacks kernels for it.
    pixels = images.float() if images.element_size() < 4 else images
    draws = Draws(chosen.name, indices, seed=seed)
    damaged = chosen.function(pixels, draws, **chosen.severities[severity - 1])
    return damaged.clamp(0, 1).to(images.dtype)


CORRUPTIONS: Mapping[str, Corruption] = MappingProxyType(REGISTRY)
"""Every corruption by name."""

_DIGITAL = ("pixelate", "jpeg_compression")
_NOISE = ("gaussian_noise", "speckle_noise", "impulse_noise", "shot_noise")
_LIGHT = ("brightness_up", "brightness_down", "contrast_up", "contrast_down")
_STAINED = (
    *_DIGITAL, "defocus_blur", "motion_blur", *_LIGHT, "saturate", "stain_deposit", "bubble",
)  # fmt: skip
_RADIOGRAPH = (*_DIGITAL, *_NOISE, "gaussian_blur", *_LIGHT, "gamma_up", "gamma_down")

PRESETS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        # The ten modalities hold what the registry of MedMNIST-C lists for them.
        "pathology": _STAINED,
        "blood": _STAINED,
        "dermatoscopy": (
            *_DIGITAL, *_NOISE, "defocus_blur", "motion_blur", "zoom_blur", *_LIGHT,
            "black_corner", "characters",
        ),
        "fundus": (
            *_DIGITAL, "gaussian_noise", "speckle_noise", "defocus_blur", "motion_blur",
            "brightness_down", "contrast_down",
        ),
        "tissue": (*_DIGITAL, "impulse_noise", "gaussian_blur", *_LIGHT),
        "oct": (*_DIGITAL, "speckle_noise", "defocus_blur", "motion_blur", "contrast_down"),
        "ultrasound": (
            *_DIGITAL, "speckle_noise", "motion_blur", "brightness_up", "brightness_down",
            "contrast_down",
        ),
        "chest_xray": _RADIOGRAPH,
        "pneumonia": _RADIOGRAPH,
        "abdominal_ct": _RADIOGRAPH,
        # Ours.
        "quick": (
            "gaussian_noise", "defocus_blur", "jpeg_compression", "brightness_up", "contrast_down",
        ),
        "grey": tuple(name for name, entry in CORRUPTIONS.items() if not entry.rgb_only),
        "all": tuple(CORRUPTIONS),
    }
)  # fmt: skip
"""Corruptions of each modality, by name; "grey" is "all" without those that need colour."""

DATASET_PRESETS: Mapping[str, str] = MappingProxyType(
    {
        "pathmnist": "pathology",
        "bloodmnist": "blood",
        "dermamnist": "dermatoscopy",
        "retinamnist": "fundus",
        "tissuemnist": "tissue",
        "octmnist": "oct",
        "breastmnist": "ultrasound",
        "chestmnist": "chest_xray",
        "pneumoniamnist": "pneumonia",
        "organamnist": "abdominal_ct",
        "organcmnist": "abdominal_ct",
        "organsmnist": "abdominal_ct",
    }
)
"""MedMNIST flag to preset."""


def _look_up(name: str) -> Corruption:
    if name not in CORRUPTIONS:
        raise ValueError(f"corruption {name!r} is unknown; {_suggest(name, CORRUPTIONS)}")
    return CORRUPTIONS[name]


def _suggest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"choose from {', '.join(known)}"


def resolve_preset(preset: str | Sequence[str | Corruption]) -> tuple[Corruption, ...]:
    """Turns a preset into its corruptions.

    Args:
        preset: A name of `PRESETS`, a MedMNIST flag such as "bloodmnist", or a sequence of names of
            `CORRUPTIONS` and corruptions of your own.

    Returns:
        The corruptions in order.

    Raises:
        ValueError: If a name is unknown (close names are given) or repeated, or none is given.
    """
    if isinstance(preset, str):
        name = DATASET_PRESETS.get(preset, preset)
        if name not in PRESETS:
            known = {**PRESETS, **DATASET_PRESETS}
            hint = f"; for one corruption pass [{preset!r}]" if preset in CORRUPTIONS else ""
            raise ValueError(f"preset {preset!r} is unknown; {_suggest(preset, known)}{hint}")
        preset = PRESETS[name]
    chosen = tuple(_look_up(entry) if isinstance(entry, str) else entry for entry in preset)
    if not chosen:
        raise ValueError(f"preset is empty; choose from {', '.join(PRESETS)}")
    names = [entry.name for entry in chosen]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"corruption {name!r} occurs twice in the preset; name it once")
    return chosen
