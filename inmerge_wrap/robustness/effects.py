"""What happens to an image under each corruption: pure batched functions of pixels.

Every effect takes images (B, C, H, W), floats in [0, 1], the random numbers of the batch and its
own parameters, and returns new images of the same shape. The line above it registers it, with its
parameters at five severities. It may overshoot [0, 1]: `corrupt` clamps.
Lengths are shares of the image side, so that images of 28 px and 224 px are damaged to the same
degree.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

__all__ = ["Corruption", "Draws"]

_Effect = TypeVar("_Effect", bound=Callable[..., Tensor])

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

# How many things are drawn per image, whatever the severity: a higher one shows more of them.
_MOST_BUBBLES, _MOST_SPECKS, _MOST_CHARACTERS, _STRIPES = 8, 32, 6, 28

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
        rgb_only: Whether it needs colour, so that it does not apply to one-channel images.
    """

    name: str
    kind: str
    function: Callable[..., Tensor]
    severities: tuple[Mapping[str, float], ...]
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


REGISTRY: dict[str, Corruption] = {}


def _corruption(
    kind: str,
    name: str | None = None,
    *,
    rgb_only: bool = False,
    **five: tuple[float, float, float, float, float],
) -> Callable[[_Effect], _Effect]:
    """Registers an effect by the name of its function, or by another where there are two of it.

    ``five`` are the values of each parameter at the five severities.
    """
    severities = tuple(
        MappingProxyType(dict(zip(five, values, strict=True)))
        for values in zip(*five.values(), strict=True)
    )

    def register(effect: _Effect) -> _Effect:
        entry = Corruption(name or effect.__name__, kind, effect, severities, rgb_only)
        REGISTRY[entry.name] = entry
        return effect

    return register


def seed_of(key: str) -> int:
    """Returns a seed of 32 bits, as many as torch's CPU generator reads."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "big")


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
        self._generators = [
            torch.Generator().manual_seed(seed_of(f"{seed}/{name}/{index}")) for index in indices
        ]

    def normal(self, *shape: int, like: Tensor) -> Tensor:
        """Draws standard normal numbers (B, *shape), with the device and the dtype of `like`."""
        return torch.stack([torch.randn(shape, generator=g) for g in self._generators]).to(like)

    def uniform(self, *shape: int, like: Tensor) -> Tensor:
        """Draws uniform numbers in [0, 1), (B, *shape), with the device and the dtype of `like`."""
        return torch.stack([torch.rand(shape, generator=g) for g in self._generators]).to(like)

    def poisson(self, rates: Tensor) -> Tensor:
        """Draws Poisson counts for `rates` (B, ...), drawn on the CPU and moved back."""
        pairs = zip(rates.cpu(), self._generators, strict=True)
        return torch.stack([torch.poisson(rate, generator=g) for rate, g in pairs]).to(rates)


def _side(images: Tensor) -> int:
    """Returns the shorter side in pixels, the unit of every length in the registry."""
    return min(images.shape[-2:])


def _pixel_grid(images: Tensor) -> tuple[Tensor, Tensor]:
    """Returns rows (H, 1) and columns (1, W) of the pixel centres, from the top left corner."""
    rows, columns = (torch.arange(side).to(images) + 0.5 for side in images.shape[-2:])
    return rows[:, None], columns[None, :]


def _offsets(images: Tensor, pixels: float) -> Tensor:
    """Returns the places of a kernel that reaches this far to either side of a pixel."""
    reach = math.ceil(pixels)
    return torch.arange(-reach, reach + 1).to(images)


def _discs(images: Tensor, places: Tensor, radii: Tensor) -> Tensor:
    """Returns the antialiased coverage (B, 1, H, W) of one disc per image.

    Its centres (B, 2) are shares of height and width, its radii (B,) are in pixels.
    """
    rows, columns = _pixel_grid(images)
    centre_row = (places[:, 0] * images.shape[-2])[:, None, None]
    centre_column = (places[:, 1] * images.shape[-1])[:, None, None]
    distance = torch.hypot(rows - centre_row, columns - centre_column)
    return (radii[:, None, None] - distance + 0.5).clamp(0, 1)[:, None]


def _grey(images: Tensor) -> Tensor:
    """Returns the luma (B, 1, H, W) of ITU-R BT.601; images of one channel are their own."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)
    return (0.299 * red).add(green, alpha=0.587).add(blue, alpha=0.114)[:, None]


def _filtered(images: Tensor, kernels: Tensor) -> Tensor:
    """Filters each image with its kernel, (B or 1, h, w) of odd sides, reflected at the border."""
    count, channels = images.shape[:2]
    down, across = kernels.shape[1] // 2, kernels.shape[2] // 2
    padded = F.pad(images, (across, across, down, down), mode="reflect")
    each = kernels.expand(count, -1, -1).repeat_interleave(channels, dim=0)[:, None]
    found = F.conv2d(padded.flatten(0, 1)[None], each, groups=count * channels)
    return found.view(images.shape)


def _blend(images: Tensor, colour: Tensor | float, opacity: Tensor) -> Tensor:
    """Paints `colour` over the images with an opacity in [0, 1] per pixel."""
    return images + opacity * (colour - images)


@_corruption("noise", sigma=(0.04, 0.08, 0.12, 0.18, 0.26))
def gaussian_noise(images: Tensor, draws: Draws, *, sigma: float) -> Tensor:
    """Normal noise of standard deviation sigma on every value: read-out electronics."""
    return images + sigma * draws.normal(*images.shape[1:], like=images)


@_corruption("noise", photons=(100, 50, 25, 12, 6))
def shot_noise(images: Tensor, draws: Draws, *, photons: float) -> Tensor:
    """Poisson noise with this many photons for a white pixel: low dose, short exposure."""
    return draws.poisson(images.clamp_min(0) * photons) / photons


@_corruption("noise", share=(0.01, 0.03, 0.06, 0.10, 0.17))
def impulse_noise(images: Tensor, draws: Draws, *, share: float) -> Tensor:
    """This share of the values turns black or white: dead pixels, bit errors."""
    # One uniform number decides both whether a value is hit and whether it turns black or white,
    # so that the values hit at one severity are hit at all higher ones.
    lot = draws.uniform(*images.shape[1:], like=images)
    black, white = lot < share / 2, lot >= 1 - share / 2
    return images.masked_fill(black, 0.0).masked_fill(white, 1.0)


@_corruption("noise", sigma=(0.08, 0.15, 0.25, 0.35, 0.50))
def speckle_noise(images: Tensor, draws: Draws, *, sigma: float) -> Tensor:
    """Noise in proportion to the signal: coherent imaging, such as ultrasound and OCT."""
    return images * (1 + sigma * draws.normal(*images.shape[1:], like=images))


@_corruption("blur", sigma=(0.014, 0.020, 0.028, 0.038, 0.05))
def gaussian_blur(images: Tensor, draws: Draws, *, sigma: float) -> Tensor:
    """Gaussian blur; sigma as a share of the side."""
    # One axis after the other: torchvision's square kernel, of 69 px at 224 px, takes 35 times as
    # many multiplications.
    pixels = sigma * _side(images)
    offsets = _offsets(images, 3 * pixels)
    bell = torch.exp(-offsets.square() / (2 * images.new_tensor(pixels).square()))
    bell = bell / bell.sum()
    return _filtered(_filtered(images, bell[None, None, :]), bell[None, :, None])


@_corruption("blur", radius=(0.020, 0.028, 0.038, 0.050, 0.065))
def defocus_blur(images: Tensor, draws: Draws, *, radius: float) -> Tensor:
    """Every point becomes a disc; radius as a share of the side."""
    pixels = radius * _side(images)
    offsets = _offsets(images, pixels)
    disc = (pixels + 0.5 - torch.hypot(offsets[:, None], offsets[None, :])).clamp(0, 1)
    return _filtered(images, disc[None] / disc.sum())


@_corruption("blur", length=(0.05, 0.08, 0.11, 0.15, 0.20))
def motion_blur(images: Tensor, draws: Draws, *, length: float) -> Tensor:
    """Every point becomes a line of a random direction; length as a share of the side."""
    # A line of any length, laid on the grid point by point with linear weights: of whole odd
    # lengths there would be only 3, 5 and 7 at 28 px.
    pixels = length * _side(images)
    offsets = _offsets(images, pixels / 2)
    angles = math.pi * draws.uniform(1, like=images)
    points = 2 * (len(offsets) - 1)
    steps = pixels * ((torch.arange(points).to(images) + 0.5) / points - 0.5)
    by_row = (1 - (offsets - (angles.sin() * steps)[..., None]).abs()).clamp_min(0)
    by_column = (1 - (offsets - (angles.cos() * steps)[..., None]).abs()).clamp_min(0)
    kernels = by_row.transpose(1, 2) @ by_column
    return _filtered(images, kernels / kernels.sum((1, 2), keepdim=True))


@_corruption("blur", zoom=(0.06, 0.11, 0.16, 0.22, 0.30))
def zoom_blur(images: Tensor, draws: Draws, *, zoom: float) -> Tensor:
    """Mean of images magnified by 1 to 1 + zoom: movement towards the lens."""
    # Enough steps that the border moves by a pixel at most between two of them.
    steps = max(4, math.ceil(zoom * max(images.shape[-2:]) / 2) + 1)
    total = torch.zeros_like(images)
    for factor in torch.linspace(1, 1 + zoom, steps).tolist():
        window = torch.tensor([[1 / factor, 0, 0], [0, 1 / factor, 0]]).to(images)
        grid = F.affine_grid(window[None], [1, *images.shape[1:]], align_corners=False)
        grid = grid.expand(len(images), -1, -1, -1)
        total += F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    return total / steps


@_corruption("digital", quality=(50, 30, 18, 10, 6))
def jpeg_compression(images: Tensor, draws: Draws, *, quality: float) -> Tensor:
    """JPEG at this quality."""
    decoded = []
    for image in (images.cpu() * 255).round().to(torch.uint8):
        file = io.BytesIO()
        vision.to_pil_image(image).save(file, "JPEG", quality=int(quality))
        decoded.append(vision.pil_to_tensor(Image.open(file)))
    return torch.stack(decoded).to(images) / 255


@_corruption("digital", scale=(0.80, 0.60, 0.45, 0.33, 0.25))
def pixelate(images: Tensor, draws: Draws, *, scale: float) -> Tensor:
    """Reduced to this share of the side and magnified again without smoothing."""
    small = (max(1, round(scale * images.shape[-2])), max(1, round(scale * images.shape[-1])))
    return F.interpolate(
        F.adaptive_avg_pool2d(images, small), size=images.shape[-2:], mode="nearest-exact"
    )


@_corruption("colour", "brightness_down", factor=(0.85, 0.70, 0.57, 0.45, 0.35))
@_corruption("colour", "brightness_up", factor=(1.10, 1.20, 1.35, 1.50, 1.70))
def brightness(images: Tensor, draws: Draws, *, factor: float) -> Tensor:
    """Every value times the factor: overexposure, underexposure."""
    return images * factor


@_corruption("colour", "contrast_down", factor=(0.80, 0.65, 0.50, 0.38, 0.25))
@_corruption("colour", "contrast_up", factor=(1.20, 1.40, 1.70, 2.00, 2.50))
def contrast(images: Tensor, draws: Draws, *, factor: float) -> Tensor:
    """Distance to the mean grey of the image times the factor."""
    grey = _grey(images).mean((2, 3), keepdim=True)
    return images * factor + grey * (1 - images.new_tensor(factor))


@_corruption("colour", "gamma_down", gamma=(0.85, 0.70, 0.57, 0.46, 0.36))
@_corruption("colour", "gamma_up", gamma=(1.20, 1.40, 1.70, 2.00, 2.50))
def gamma(images: Tensor, draws: Draws, *, gamma: float) -> Tensor:
    """Value to the power gamma: middle tones darken above 1, brighten below."""
    return images.clamp_min(0).pow(gamma)


@_corruption("colour", rgb_only=True, factor=(1.30, 1.70, 2.20, 2.80, 3.50))
def saturate(images: Tensor, draws: Draws, *, factor: float) -> Tensor:
    """Distance of each colour to its grey times the factor."""
    return images * factor + _grey(images) * (1 - images.new_tensor(factor))


@_corruption("colour", rgb_only=True, strength=(0.08, 0.15, 0.24, 0.35, 0.50))
def colour_cast(images: Tensor, draws: Draws, *, strength: float) -> Tensor:
    """Gains of the three channels in a random direction: white balance, lamp, filter."""
    # A random direction of chroma: gains that multiply to one, so that no light is added.
    direction = draws.normal(3, like=images)
    direction = F.normalize(direction - direction.mean(1, keepdim=True), dim=1)
    return images * torch.exp(strength * direction)[:, :, None, None]


@_corruption("colour", rgb_only=True, strength=(0.15, 0.30, 0.45, 0.60, 0.80))
def stain_shift(images: Tensor, draws: Draws, *, strength: float) -> Tensor:
    """More or less haematoxylin and eosin, in a random direction: another laboratory."""
    # Separate the image into its stains, scale each of them, and recombine.
    stains = F.normalize(torch.tensor(_STAINS), dim=1).to(images)
    density = -torch.log(images.clamp_min(1 / 255))
    amounts = torch.einsum("bchw,cs->bshw", density, torch.linalg.inv(stains))
    angle = 2 * math.pi * draws.uniform(1, like=images)
    change = strength * torch.cat([angle.cos(), angle.sin(), torch.zeros_like(angle)], dim=1)
    amounts = amounts * torch.exp(change)[:, :, None, None]
    return torch.exp(-torch.einsum("bshw,sc->bchw", amounts, stains))


@_corruption("artefact", radius=(1.25, 1.15, 1.05, 0.95, 0.85))
def black_corner(images: Tensor, draws: Draws, *, radius: float) -> Tensor:
    """Black outside a circle; radius in half sides: the tube of a dermatoscope."""
    # Distances in half sides: 1 is the inscribed ellipse, 1.41 the corner.
    rows, columns = _pixel_grid(images)
    height, width = images.shape[-2:]
    distance = torch.hypot(2 * rows / height - 1, 2 * columns / width - 1)
    return images * ((radius - distance) * _side(images) / 2 + 0.5).clamp(0, 1)


@_corruption("artefact", count=(2, 3, 4, 6, 8), radius=(0.05, 0.07, 0.09, 0.11, 0.13))
def bubble(images: Tensor, draws: Draws, *, count: int, radius: float) -> Tensor:
    """Bright discs with a dark rim; radius as a share of the side: air under the glass."""
    lots = draws.uniform(_MOST_BUBBLES, 3, like=images)
    for lot in lots.unbind(1)[:count]:
        radii = radius * _side(images) * (0.7 + 0.6 * lot[:, 2])
        inside = _discs(images, lot[:, :2], radii)
        rim = inside - _discs(images, lot[:, :2], 0.7 * radii)
        images = _blend(_blend(images, 1.0, 0.45 * inside), 0.1, 0.7 * rim.clamp_min(0))
    return images


@_corruption("artefact", count=(4, 8, 14, 22, 32))
def dust(images: Tensor, draws: Draws, *, count: int) -> Tensor:
    """This many dark specks of 1 to 3% of the side."""
    lots = draws.uniform(_MOST_SPECKS, 3, like=images)
    for lot in lots.unbind(1)[:count]:
        # At least half a pixel, or a speck between four pixel centres would vanish.
        radii = (_side(images) * (0.01 + 0.02 * lot[:, 2])).clamp_min(0.5)
        images = _blend(images, 0.05, 0.85 * _discs(images, lot[:, :2], radii))
    return images


@_corruption("artefact", rgb_only=True, area=(0.03, 0.06, 0.10, 0.15, 0.22))
def stain_deposit(images: Tensor, draws: Draws, *, area: float) -> Tensor:
    """Purple blots over this share of the image: precipitated dye."""
    coarse = draws.normal(1, 6, 6, like=images)
    field = F.interpolate(coarse, size=images.shape[-2:], mode="bicubic", align_corners=False)
    values = field.flatten(1)
    # The level above which `area` of the image lies; torch.quantile refuses large inputs.
    level = values.kthvalue(max(1, round((1 - area) * values.shape[1])), dim=1).values
    opacity = (4 * (field - level[:, None, None, None]) + 0.5).clamp(0, 0.9)
    purple = torch.tensor([0.23, 0.10, 0.35]).to(images)[:, None, None]
    return _blend(images, purple, opacity)


@_corruption("artefact", count=(1, 2, 4, 6, 9))
def bars(images: Tensor, draws: Draws, *, count: int) -> Tensor:
    """This many of 28 vertical stripes are black: dead detector elements."""
    # Dead are the first in a random order; of a narrower image the same share of its columns.
    width = images.shape[-1]
    stripes = min(_STRIPES, width)
    ranks = draws.uniform(_STRIPES, like=images)[:, :stripes].argsort(1).argsort(1)
    stripe = torch.arange(width, device=images.device) * stripes // width
    dead = ranks[:, stripe] < count * stripes / _STRIPES
    return images.masked_fill(dead[:, None, None, :], 0.0)


@_corruption("artefact", width=(0.03, 0.06, 0.10, 0.14, 0.19))
def border(images: Tensor, draws: Draws, *, width: float) -> Tensor:
    """Black frame; width as a share of the side: collimation, padding."""
    height_px, width_px = images.shape[-2:]
    rows, columns = _pixel_grid(images)
    to_row_edge = torch.minimum(rows, height_px - rows)
    to_edge = torch.minimum(to_row_edge, torch.minimum(columns, width_px - columns))
    return images * (to_edge + 0.5 - width * _side(images)).clamp(0, 1)


@_corruption("artefact", count=(1, 2, 3, 4, 6))
def characters(images: Tensor, draws: Draws, *, count: int) -> Tensor:
    """This many digits burnt in, 18% of the side in height: scales and markers."""
    lots = draws.uniform(_MOST_CHARACTERS, 3, like=images)
    font = torch.tensor([[int(dot) for dot in digit] for digit in _DIGITS]).to(images)
    font = font.view(-1, 1, 5, 3)
    # White on a dark image, black on a bright one, so that the marker is visible.
    ink = (images.mean((1, 2, 3), keepdim=True) < 0.5).to(images)
    high = 0.18 * _side(images)
    rows, columns = _pixel_grid(images)
    rows, columns = rows.expand(images.shape[-2:]), columns.expand(images.shape[-2:])
    for lot in lots.unbind(1)[:count]:
        # On a pixel's centre, so that a small glyph falls on whole pixels and stays legible.
        places = (0.1 + 0.8 * lot[:, :2]) * torch.tensor(images.shape[-2:]).to(images)
        centre = places.floor() + 0.5
        down = (rows - centre[:, :1, None]) / (high / 2)
        across = (columns - centre[:, 1:, None]) / (0.6 * high / 2)
        glyphs = font[(lot[:, 2] * len(_DIGITS)).long()]
        grid = torch.stack([across, down], dim=-1)
        # Nearest dot, and nothing outside the glyph.
        opacity = F.grid_sample(glyphs, grid, mode="nearest", align_corners=False)
        images = _blend(images, ink, opacity)
    return images
