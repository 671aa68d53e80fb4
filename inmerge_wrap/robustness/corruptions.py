"""A registry of image corruptions, as cameras, scanners, slides and file formats cause them.

Every entry of `CORRUPTIONS` names a pure batched function and its parameters at five severities;
`corrupt` applies one of them, and `PRESETS` lists those of each imaging modality.

The assignment of corruptions to modalities follows MedMNIST-C: F. Di Salvo, S. Doerrich, C. Ledig,
"MedMNIST-C: Comprehensive benchmark and improved classifier robustness by simulating realistic
image corruptions", arXiv 2406.17536 (2024). The implementations and the severities are our own: one
scale for every data set, and lengths as a share of the image side so that 28 px and 224 px images
are corrupted alike. Error rates measured here are comparable with each other, not with the tables
of that paper.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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

# 3 x 5 dot-matrix digits, one string of rows per digit, for text burnt into the image.
_DIGITS = (
    "111101101101111",
    "010110010010111",
    "111001111100111",
    "111001111001111",
    "101101111001001",
    "111100111001111",
    "111100111101111",
    "111001010010010",
    "111101111101111",
    "111101111001111",
)

# Optical-density directions of haematoxylin, eosin and the rest (A. Ruifrok, D. Johnston,
# "Quantification of histochemical staining by color deconvolution", 2001).
_STAINS = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))


class Draws:
    """Random numbers for a batch, from one independent CPU stream per image.

    The stream of an image depends only on the seed, the corruption's name and the image's index,
    not on its batch, the device or the global generators, which are left
    untouched. The severity is deliberately not part of the key. All five severities of an image
    reuse one draw (the same noise field made stronger, the same bubble grown larger), so the
    difference between two severities is due to the severity and not to chance.
    """

    def __init__(self, name: str, indices: Sequence[int], *, seed: int) -> None:
        """Opens one random stream per image.

        Args:
            name: Name of the corruption.
            indices: Index of each image of the batch within its data set.
            seed: Seed of the whole evaluation.
        """
        # torch's CPU generator reads only the low 32 bits of a seed: hash the key down to them.
        self._generators = [
            torch.Generator().manual_seed(
                int.from_bytes(
                    hashlib.blake2b(f"{seed}/{name}/{index}".encode(), digest_size=4).digest(),
                    "big",
                )
            )
            for index in indices
        ]

    def normal(self, *shape: int, like: Tensor) -> Tensor:
        """Draws standard normal numbers (B, *shape), on the device and in the dtype of `like`."""
        drawn = torch.stack([torch.randn(shape, generator=g) for g in self._generators])
        return drawn.to(like)

    def uniform(self, *shape: int, like: Tensor) -> Tensor:
        """Draws uniform numbers in [0, 1) (B, *shape), on the device and in the dtype of `like`."""
        drawn = torch.stack([torch.rand(shape, generator=g) for g in self._generators])
        return drawn.to(like)

    def poisson(self, rates: Tensor) -> Tensor:
        """Draws Poisson counts for `rates` (B, ...), drawn on the CPU and moved back."""
        pairs = zip(rates.cpu(), self._generators, strict=True)
        return torch.stack([torch.poisson(rate, generator=g) for rate, g in pairs]).to(rates)


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


# --- helpers --------------------------------------------------------------------------------------


def _kornia() -> Any:
    """Imports kornia on first use; the registry itself can be read without it."""
    try:
        import kornia
    except ImportError as error:
        raise ImportError(
            'this corruption needs kornia: pip install "inmerge-wrap[robustness]"'
        ) from error
    return kornia


def _side(images: Tensor) -> int:
    """Returns the shorter side in pixels, the unit of every length in the registry."""
    return min(images.shape[-2:])


def _pixel_grid(images: Tensor) -> tuple[Tensor, Tensor]:
    """Returns rows (H, 1) and columns (1, W) of the pixel centres, from the top left corner."""
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=images.device, dtype=images.dtype) + 0.5
    columns = torch.arange(width, device=images.device, dtype=images.dtype) + 0.5
    return rows[:, None], columns[None, :]


def _discs(images: Tensor, places: Tensor, radii: Tensor) -> Tensor:
    """Returns the antialiased coverage (B, 1, H, W) of one disc per image.

    Args:
        images: Gives size, device and dtype.
        places: Centres (B, 2) as shares of height and width.
        radii: Radii (B,) in pixels.
    """
    rows, columns = _pixel_grid(images)
    centre_row = (places[:, 0] * images.shape[-2])[:, None, None]
    centre_column = (places[:, 1] * images.shape[-1])[:, None, None]
    distance = torch.hypot(rows - centre_row, columns - centre_column)
    return (radii[:, None, None] - distance + 0.5).clamp(0, 1)[:, None]


def _blend(images: Tensor, colour: Tensor | float, opacity: Tensor) -> Tensor:
    """Paints `colour` over the images with an opacity in [0, 1] per pixel."""
    return images + opacity * (colour - images)


# --- noise ----------------------------------------------------------------------------------------


def _gaussian_noise(images: Tensor, draws: Draws, *, sigma: float) -> Tensor:
    return images + sigma * draws.normal(*images.shape[1:], like=images)


def _shot_noise(images: Tensor, draws: Draws, *, photons: float) -> Tensor:
    return draws.poisson(images.clamp_min(0) * photons) / photons


def _impulse_noise(images: Tensor, draws: Draws, *, share: float) -> Tensor:
    # One uniform number decides both whether a value is hit and whether it turns black or white,
    # so that the values hit at one severity are hit at all higher ones.
    lot = draws.uniform(*images.shape[1:], like=images)
    black, white = lot < share / 2, lot >= 1 - share / 2
    return images.masked_fill(black, 0.0).masked_fill(white, 1.0)


def _speckle_noise(images: Tensor, draws: Draws, *, sigma: float) -> Tensor:
    return images * (1 + sigma * draws.normal(*images.shape[1:], like=images))


# --- blur -----------------------------------------------------------------------------------------


def _gaussian_blur(images: Tensor, draws: Draws, *, sigma: float) -> Tensor:
    pixels = sigma * _side(images)
    size = 2 * math.ceil(3 * pixels) + 1
    return _kornia().filters.gaussian_blur2d(images, (size, size), (pixels, pixels))


def _defocus_blur(images: Tensor, draws: Draws, *, radius: float) -> Tensor:
    pixels = radius * _side(images)
    reach = math.ceil(pixels)
    offsets = torch.arange(-reach, reach + 1, device=images.device, dtype=images.dtype)
    disc = (pixels + 0.5 - torch.hypot(offsets[:, None], offsets[None, :])).clamp(0, 1)
    return _kornia().filters.filter2d(images, disc[None] / disc.sum())


def _motion_blur(images: Tensor, draws: Draws, *, length: float) -> Tensor:
    # kornia's own motion kernel has odd whole lengths only: at 28 px that is 3, 5 or 7 and nothing
    # between. Here a line of any length is laid on the grid point by point with linear weights.
    pixels = length * _side(images)
    reach = math.ceil(pixels / 2)
    angles = math.pi * draws.uniform(1, like=images)
    points = 4 * reach
    steps = pixels * ((torch.arange(points).to(images) + 0.5) / points - 0.5)
    offsets = torch.arange(-reach, reach + 1, device=images.device, dtype=images.dtype)
    by_row = (1 - (offsets - (angles.sin() * steps)[..., None]).abs()).clamp_min(0)
    by_column = (1 - (offsets - (angles.cos() * steps)[..., None]).abs()).clamp_min(0)
    kernels = by_row.transpose(1, 2) @ by_column
    return _kornia().filters.filter2d(images, kernels / kernels.sum((1, 2), keepdim=True))


def _zoom_blur(images: Tensor, draws: Draws, *, zoom: float) -> Tensor:
    # Enough steps that the border moves by a pixel at most between two of them.
    steps = max(4, math.ceil(zoom * max(images.shape[-2:]) / 2) + 1)
    total = torch.zeros_like(images)
    for factor in torch.linspace(1, 1 + zoom, steps).tolist():
        window = torch.tensor([[1 / factor, 0, 0], [0, 1 / factor, 0]]).to(images)
        grid = F.affine_grid(window[None], [1, *images.shape[1:]], align_corners=False)
        total += F.grid_sample(
            images,
            grid.expand(len(images), -1, -1, -1),
            padding_mode="reflection",
            align_corners=False,
        )
    return total / steps


# --- digital --------------------------------------------------------------------------------------


def _jpeg_compression(images: Tensor, draws: Draws, *, quality: float) -> Tensor:
    channels, height, width = images.shape[1:]
    # The codec works on colour images made of whole 16 x 16 blocks.
    padded = F.pad(images, (0, -width % 16, 0, -height % 16), mode="replicate")
    coded = _kornia().enhance.jpeg_codec_differentiable(
        padded.expand(-1, 3, -1, -1), torch.tensor([quality]).to(images)
    )
    decoded = coded[:, :, :height, :width]
    return decoded if channels == 3 else decoded.mean(1, keepdim=True)


def _pixelate(images: Tensor, draws: Draws, *, scale: float) -> Tensor:
    small = (max(1, round(scale * images.shape[-2])), max(1, round(scale * images.shape[-1])))
    return F.interpolate(
        F.adaptive_avg_pool2d(images, small), size=images.shape[-2:], mode="nearest-exact"
    )


# --- colour ---------------------------------------------------------------------------------------


def _brightness(images: Tensor, draws: Draws, *, factor: float) -> Tensor:
    return images * factor


def _contrast(images: Tensor, draws: Draws, *, factor: float) -> Tensor:
    return _kornia().enhance.adjust_contrast_with_mean_subtraction(images, factor)


def _gamma(images: Tensor, draws: Draws, *, gamma: float) -> Tensor:
    return _kornia().enhance.adjust_gamma(images, gamma)


def _saturate(images: Tensor, draws: Draws, *, factor: float) -> Tensor:
    return _kornia().enhance.adjust_saturation_with_gray_subtraction(images, factor)


def _colour_cast(images: Tensor, draws: Draws, *, strength: float) -> Tensor:
    # A random direction of chroma: gains that multiply to one, so that no light is added.
    direction = draws.normal(3, like=images)
    direction = direction - direction.mean(1, keepdim=True)
    direction = F.normalize(direction, dim=1)
    return images * torch.exp(strength * direction)[:, :, None, None]


def _stain_shift(images: Tensor, draws: Draws, *, strength: float) -> Tensor:
    # Separate the image into its stains, scale each of them, and recombine.
    stains = F.normalize(torch.tensor(_STAINS), dim=1).to(images)
    density = -torch.log(images.clamp_min(1 / 255))
    amounts = torch.einsum("bchw,cs->bshw", density, torch.linalg.inv(stains))
    angle = 2 * math.pi * draws.uniform(1, like=images)
    change = strength * torch.cat([angle.cos(), angle.sin(), torch.zeros_like(angle)], dim=1)
    amounts = amounts * torch.exp(change)[:, :, None, None]
    return torch.exp(-torch.einsum("bshw,sc->bchw", amounts, stains))


# --- artefacts ------------------------------------------------------------------------------------


def _black_corner(images: Tensor, draws: Draws, *, radius: float) -> Tensor:
    # Distances in half sides: 1 is the inscribed ellipse, 1.41 the corner.
    rows, columns = _pixel_grid(images)
    height, width = images.shape[-2:]
    distance = torch.hypot(2 * rows / height - 1, 2 * columns / width - 1)
    return images * ((radius - distance) * _side(images) / 2 + 0.5).clamp(0, 1)


def _bubble(images: Tensor, draws: Draws, *, count: int, radius: float) -> Tensor:
    lots = draws.uniform(_MOST_BUBBLES, 3, like=images)
    for lot in lots.unbind(1)[:count]:
        radii = radius * _side(images) * (0.7 + 0.6 * lot[:, 2])
        inside = _discs(images, lot[:, :2], radii)
        rim = inside - _discs(images, lot[:, :2], 0.7 * radii)
        images = _blend(_blend(images, 1.0, 0.45 * inside), 0.1, 0.7 * rim.clamp_min(0))
    return images


def _dust(images: Tensor, draws: Draws, *, count: int) -> Tensor:
    lots = draws.uniform(_MOST_SPECKS, 3, like=images)
    for lot in lots.unbind(1)[:count]:
        # At least half a pixel, or a speck between four pixel centres would vanish.
        radii = (_side(images) * (0.01 + 0.02 * lot[:, 2])).clamp_min(0.5)
        images = _blend(images, 0.05, 0.85 * _discs(images, lot[:, :2], radii))
    return images


def _stain_deposit(images: Tensor, draws: Draws, *, area: float) -> Tensor:
    coarse = draws.normal(1, 6, 6, like=images)
    field = F.interpolate(coarse, size=images.shape[-2:], mode="bicubic", align_corners=False)
    values = field.flatten(1)
    # The level above which `area` of the image lies; torch.quantile refuses large inputs.
    level = values.kthvalue(max(1, round((1 - area) * values.shape[1])), dim=1).values
    opacity = (4 * (field - level[:, None, None, None]) + 0.5).clamp(0, 0.9)
    purple = torch.tensor([0.23, 0.10, 0.35]).to(images)[:, None, None]
    return _blend(images, purple, opacity)


def _bars(images: Tensor, draws: Draws, *, count: int) -> Tensor:
    # 28 detector stripes; the first `count` in a random order are dead.
    width = images.shape[-1]
    ranks = draws.uniform(_STRIPES, like=images).argsort(1).argsort(1)
    stripe = torch.arange(width, device=images.device) * _STRIPES // width
    dead = ranks[:, stripe] < count
    return images.masked_fill(dead[:, None, None, :], 0.0)


def _border(images: Tensor, draws: Draws, *, width: float) -> Tensor:
    height_px, width_px = images.shape[-2:]
    rows, columns = _pixel_grid(images)
    to_row_edge = torch.minimum(rows, height_px - rows)
    to_edge = torch.minimum(to_row_edge, torch.minimum(columns, width_px - columns))
    return images * (to_edge + 0.5 - width * _side(images)).clamp(0, 1)


def _characters(images: Tensor, draws: Draws, *, count: int, size: float) -> Tensor:
    lots = draws.uniform(_MOST_CHARACTERS, 3, like=images)
    font = torch.tensor([[int(dot) for dot in digit] for digit in _DIGITS]).to(images)
    font = font.view(-1, 1, 5, 3)
    # White on a dark image, black on a bright one, so that the marker is visible.
    ink = (images.mean((1, 2, 3), keepdim=True) < 0.5).to(images)
    high = size * _side(images)
    rows, columns = _pixel_grid(images)
    rows, columns = rows.expand(images.shape[-2:]), columns.expand(images.shape[-2:])
    for lot in lots.unbind(1)[:count]:
        # On a pixel's centre, so that a small glyph falls on whole pixels and stays legible.
        centre = ((0.1 + 0.8 * lot[:, :2]) * torch.tensor(images.shape[-2:]).to(images)).floor()
        centre = centre + 0.5
        down = (rows - centre[:, :1, None]) / (high / 2)
        across = (columns - centre[:, 1:, None]) / (0.6 * high / 2)
        glyphs = font[(lot[:, 2] * len(_DIGITS)).long()]
        # Nearest dot, and nothing outside the glyph.
        opacity = F.grid_sample(
            glyphs, torch.stack([across, down], dim=-1), mode="nearest", align_corners=False
        )
        images = _blend(images, ink, opacity)
    return images


# --- the registry ---------------------------------------------------------------------------------

# How many things are drawn per image, whatever the severity: a higher one shows more of them.
_MOST_BUBBLES, _MOST_SPECKS, _MOST_CHARACTERS, _STRIPES = 8, 32, 6, 28


def _five(**values: tuple[float, float, float, float, float]) -> tuple[Mapping[str, float], ...]:
    """Turns {parameter: five values} into five {parameter: value}."""
    return tuple(
        MappingProxyType({name: row[level] for name, row in values.items()}) for level in range(5)
    )


def _registry() -> Mapping[str, Corruption]:
    entries = (
        Corruption(
            "gaussian_noise", "noise", _gaussian_noise, _five(sigma=(0.04, 0.08, 0.12, 0.18, 0.26)),
            "Normal noise of standard deviation sigma on every value: read-out electronics.",
            random=True,
        ),
        Corruption(
            "shot_noise", "noise", _shot_noise, _five(photons=(100, 50, 25, 12, 6)),
            "Poisson noise with this many photons for a white pixel: low dose, short exposure.",
            random=True,
        ),
        Corruption(
            "impulse_noise", "noise", _impulse_noise, _five(share=(0.01, 0.03, 0.06, 0.10, 0.17)),
            "This share of the values turns black or white: dead pixels, bit errors.",
            random=True,
        ),
        Corruption(
            "speckle_noise", "noise", _speckle_noise, _five(sigma=(0.08, 0.15, 0.25, 0.35, 0.50)),
            "Noise in proportion to the signal: coherent imaging, such as ultrasound and OCT.",
            random=True,
        ),
        Corruption(
            "gaussian_blur", "blur", _gaussian_blur,
            _five(sigma=(0.014, 0.020, 0.028, 0.038, 0.05)),
            "Gaussian blur; sigma as a share of the side.",
        ),
        Corruption(
            "defocus_blur", "blur", _defocus_blur,
            _five(radius=(0.020, 0.028, 0.038, 0.050, 0.065)),
            "Every point becomes a disc; radius as a share of the side.",
        ),
        Corruption(
            "motion_blur", "blur", _motion_blur, _five(length=(0.05, 0.08, 0.11, 0.15, 0.20)),
            "Every point becomes a line of a random direction; length as a share of the side.",
            random=True,
        ),
        Corruption(
            "zoom_blur", "blur", _zoom_blur, _five(zoom=(0.06, 0.11, 0.16, 0.22, 0.30)),
            "Mean of images magnified by 1 to 1 + zoom: movement towards the lens.",
        ),
        Corruption(
            "jpeg_compression", "digital", _jpeg_compression, _five(quality=(50, 30, 18, 10, 6)),
            "JPEG at this quality.",
        ),
        Corruption(
            "pixelate", "digital", _pixelate, _five(scale=(0.80, 0.60, 0.45, 0.33, 0.25)),
            "Reduced to this share of the side and magnified again without smoothing.",
        ),
        Corruption(
            "brightness_up", "colour", _brightness, _five(factor=(1.10, 1.20, 1.35, 1.50, 1.70)),
            "Every value times the factor: overexposure.",
        ),
        Corruption(
            "brightness_down", "colour", _brightness, _five(factor=(0.85, 0.70, 0.57, 0.45, 0.35)),
            "Every value times the factor: underexposure.",
        ),
        Corruption(
            "contrast_up", "colour", _contrast, _five(factor=(1.20, 1.40, 1.70, 2.00, 2.50)),
            "Distance to the mean grey of the image times the factor.",
        ),
        Corruption(
            "contrast_down", "colour", _contrast, _five(factor=(0.80, 0.65, 0.50, 0.38, 0.25)),
            "Distance to the mean grey of the image times the factor.",
        ),
        Corruption(
            "gamma_up", "colour", _gamma, _five(gamma=(1.20, 1.40, 1.70, 2.00, 2.50)),
            "Value to the power gamma: middle tones darken.",
        ),
        Corruption(
            "gamma_down", "colour", _gamma, _five(gamma=(0.85, 0.70, 0.57, 0.46, 0.36)),
            "Value to the power gamma: middle tones brighten.",
        ),
        Corruption(
            "saturate", "colour", _saturate, _five(factor=(1.30, 1.70, 2.20, 2.80, 3.50)),
            "Distance of each colour to its grey times the factor.",
            rgb_only=True,
        ),
        Corruption(
            "colour_cast", "colour", _colour_cast, _five(strength=(0.08, 0.15, 0.24, 0.35, 0.50)),
            "Gains of the three channels in a random direction: white balance, lamp, filter.",
            random=True, rgb_only=True,
        ),
        Corruption(
            "stain_shift", "colour", _stain_shift, _five(strength=(0.15, 0.30, 0.45, 0.60, 0.80)),
            "More or less haematoxylin and eosin, in a random direction: another laboratory.",
            random=True, rgb_only=True,
        ),
        Corruption(
            "black_corner", "artefact", _black_corner, _five(radius=(1.25, 1.15, 1.05, 0.95, 0.85)),
            "Black outside a circle; radius in half sides: the tube of a dermatoscope.",
        ),
        Corruption(
            "bubble", "artefact", _bubble,
            _five(count=(2, 3, 4, 6, 8), radius=(0.05, 0.07, 0.09, 0.11, 0.13)),
            "Bright discs with a dark rim; radius as a share of the side: air under the glass.",
            random=True,
        ),
        Corruption(
            "dust", "artefact", _dust, _five(count=(4, 8, 14, 22, 32)),
            "This many dark specks of 1 to 3 % of the side.",
            random=True,
        ),
        Corruption(
            "stain_deposit", "artefact", _stain_deposit, _five(area=(0.03, 0.06, 0.10, 0.15, 0.22)),
            "Purple blots over this share of the image: precipitated dye.",
            random=True, rgb_only=True,
        ),
        Corruption(
            "bars", "artefact", _bars, _five(count=(1, 2, 4, 6, 9)),
            f"This many of {_STRIPES} vertical stripes are black: dead detector elements.",
            random=True,
        ),
        Corruption(
            "border", "artefact", _border, _five(width=(0.03, 0.06, 0.10, 0.14, 0.19)),
            "Black frame; width as a share of the side: collimation, padding.",
        ),
        Corruption(
            "characters", "artefact", _characters,
            _five(count=(1, 2, 3, 4, 6), size=(0.18, 0.18, 0.18, 0.18, 0.18)),
            "This many digits burnt in; height as a share of the side: scales and markers.",
            random=True,
        ),
    )  # fmt: skip
    return MappingProxyType({entry.name: entry for entry in entries})


CORRUPTIONS: Mapping[str, Corruption] = _registry()
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
