"""A registry of image corruptions, as cameras, scanners, slides and file formats cause them.

Every entry of `CORRUPTIONS` names a function of `effects` and its parameters at five severities;
`corrupt` applies one of them, and `PRESETS` lists those of each imaging modality.

The assignment of corruptions to modalities follows MedMNIST-C: F. Di Salvo, S. Doerrich, C. Ledig,
"MedMNIST-C: Comprehensive benchmark and improved classifier robustness by simulating realistic
image corruptions", arXiv 2406.17536 (2024). The implementations and the severities are our own: one
scale for every data set, and lengths as a share of the image side so that 28 px and 224 px images
are corrupted to the same
degree. Error rates measured here are comparable with each other, not with the tables
of that paper.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from inmerge_wrap.robustness import effects
from inmerge_wrap.robustness.effects import Draws

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

KINDS = ("noise", "blur", "digital", "colour", "artefact")


@dataclass(frozen=True)
class Corruption:
    """An image corruption at five severities.

    Attributes:
        name: Unique name; part of the key of the random draws.
        kind: One of noise, blur, digital, colour, artefact.
        function: Pure function `(images, draws, **parameters) -> images` on (B, C, H, W) floats in
            [0, 1]. It may overshoot the range: `corrupt` clamps.
        severities: Five mappings with the keyword arguments of `function`, mildest first.
        about: What happens to the image, in one sentence.
        random: Whether the result depends on the seed.
        rgb_only: Whether it needs colour, so that it does not apply to one-channel images.
    """

    name: str
    kind: str
    function: Callable[..., Tensor]
    severities: tuple[Mapping[str, float], ...]
    about: str
    random: bool = False
    rgb_only: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(
                f"kind of corruption {self.name!r} is {self.kind!r}; choose one of {KINDS}"
            )
        if len(self.severities) != 5:
            raise ValueError(
                f"corruption {self.name!r} has {len(self.severities)} severities; give exactly 5"
            )


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
            f"images have shape {tuple(images.shape)}; (batch, 1 or 3 channels, height, width) is "
            "needed"
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


# --- the registry ---------------------------------------------------------------------------------


def _corruption(
    name: str,
    kind: str,
    function: Callable[..., Tensor],
    about: str,
    *,
    random: bool = False,
    rgb_only: bool = False,
    **five: tuple[float, float, float, float, float],
) -> Corruption:
    """Builds an entry from each parameter's values at the five severities."""
    severities = tuple(
        MappingProxyType({parameter: values[level] for parameter, values in five.items()})
        for level in range(5)
    )
    return Corruption(name, kind, function, severities, about, random=random, rgb_only=rgb_only)


_ENTRIES = (
    _corruption(
        "gaussian_noise", "noise", effects.gaussian_noise,
        "Normal noise of standard deviation sigma on every value: read-out electronics.",
        random=True, sigma=(0.04, 0.08, 0.12, 0.18, 0.26),
    ),
    _corruption(
        "shot_noise", "noise", effects.shot_noise,
        "Poisson noise with this many photons for a white pixel: low dose, short exposure.",
        random=True, photons=(100, 50, 25, 12, 6),
    ),
    _corruption(
        "impulse_noise", "noise", effects.impulse_noise,
        "This share of the values turns black or white: dead pixels, bit errors.",
        random=True, share=(0.01, 0.03, 0.06, 0.10, 0.17),
    ),
    _corruption(
        "speckle_noise", "noise", effects.speckle_noise,
        "Noise in proportion to the signal: coherent imaging, such as ultrasound and OCT.",
        random=True, sigma=(0.08, 0.15, 0.25, 0.35, 0.50),
    ),
    _corruption(
        "gaussian_blur", "blur", effects.gaussian_blur,
        "Gaussian blur; sigma as a share of the side.",
        sigma=(0.014, 0.020, 0.028, 0.038, 0.05),
    ),
    _corruption(
        "defocus_blur", "blur", effects.defocus_blur,
        "Every point becomes a disc; radius as a share of the side.",
        radius=(0.020, 0.028, 0.038, 0.050, 0.065),
    ),
    _corruption(
        "motion_blur", "blur", effects.motion_blur,
        "Every point becomes a line of a random direction; length as a share of the side.",
        random=True, length=(0.05, 0.08, 0.11, 0.15, 0.20),
    ),
    _corruption(
        "zoom_blur", "blur", effects.zoom_blur,
        "Mean of images magnified by 1 to 1 + zoom: movement towards the lens.",
        zoom=(0.06, 0.11, 0.16, 0.22, 0.30),
    ),
    _corruption(
        "jpeg_compression", "digital", effects.jpeg_compression,
        "JPEG at this quality.",
        quality=(50, 30, 18, 10, 6),
    ),
    _corruption(
        "pixelate", "digital", effects.pixelate,
        "Reduced to this share of the side and magnified again without smoothing.",
        scale=(0.80, 0.60, 0.45, 0.33, 0.25),
    ),
    _corruption(
        "brightness_up", "colour", effects.brightness,
        "Every value times the factor: overexposure.",
        factor=(1.10, 1.20, 1.35, 1.50, 1.70),
    ),
    _corruption(
        "brightness_down", "colour", effects.brightness,
        "Every value times the factor: underexposure.",
        factor=(0.85, 0.70, 0.57, 0.45, 0.35),
    ),
    _corruption(
        "contrast_up", "colour", effects.contrast,
        "Distance to the mean grey of the image times the factor.",
        factor=(1.20, 1.40, 1.70, 2.00, 2.50),
    ),
    _corruption(
        "contrast_down", "colour", effects.contrast,
        "Distance to the mean grey of the image times the factor.",
        factor=(0.80, 0.65, 0.50, 0.38, 0.25),
    ),
    _corruption(
        "gamma_up", "colour", effects.gamma,
        "Value to the power gamma: middle tones darken.",
        gamma=(1.20, 1.40, 1.70, 2.00, 2.50),
    ),
    _corruption(
        "gamma_down", "colour", effects.gamma,
        "Value to the power gamma: middle tones brighten.",
        gamma=(0.85, 0.70, 0.57, 0.46, 0.36),
    ),
    _corruption(
        "saturate", "colour", effects.saturate,
        "Distance of each colour to its grey times the factor.",
        rgb_only=True, factor=(1.30, 1.70, 2.20, 2.80, 3.50),
    ),
    _corruption(
        "colour_cast", "colour", effects.colour_cast,
        "Gains of the three channels in a random direction: white balance, lamp, filter.",
        random=True, rgb_only=True, strength=(0.08, 0.15, 0.24, 0.35, 0.50),
    ),
    _corruption(
        "stain_shift", "colour", effects.stain_shift,
        "More or less haematoxylin and eosin, in a random direction: another laboratory.",
        random=True, rgb_only=True, strength=(0.15, 0.30, 0.45, 0.60, 0.80),
    ),
    _corruption(
        "black_corner", "artefact", effects.black_corner,
        "Black outside a circle; radius in half sides: the tube of a dermatoscope.",
        radius=(1.25, 1.15, 1.05, 0.95, 0.85),
    ),
    _corruption(
        "bubble", "artefact", effects.bubble,
        "Bright discs with a dark rim; radius as a share of the side: air under the glass.",
        random=True, count=(2, 3, 4, 6, 8), radius=(0.05, 0.07, 0.09, 0.11, 0.13),
    ),
    _corruption(
        "dust", "artefact", effects.dust,
        "This many dark specks of 1 to 3% of the side.",
        random=True, count=(4, 8, 14, 22, 32),
    ),
    _corruption(
        "stain_deposit", "artefact", effects.stain_deposit,
        "Purple blots over this share of the image: precipitated dye.",
        random=True, rgb_only=True, area=(0.03, 0.06, 0.10, 0.15, 0.22),
    ),
    _corruption(
        "bars", "artefact", effects.bars,
        f"This many of {effects.STRIPES} vertical stripes are black: dead detector elements.",
        random=True, count=(1, 2, 4, 6, 9),
    ),
    _corruption(
        "border", "artefact", effects.border,
        "Black frame; width as a share of the side: collimation, padding.",
        width=(0.03, 0.06, 0.10, 0.14, 0.19),
    ),
    _corruption(
        "characters", "artefact", effects.characters,
        "This many digits burnt in; height as a share of the side: scales and markers.",
        random=True, count=(1, 2, 3, 4, 6), size=(0.18, 0.18, 0.18, 0.18, 0.18),
    ),
)  # fmt: skip

CORRUPTIONS: Mapping[str, Corruption] = MappingProxyType({entry.name: entry for entry in _ENTRIES})
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


def _suggest(name: str, known: Mapping[str, Any]) -> str:
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
