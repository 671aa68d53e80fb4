"""How a file becomes what a network sees, and what its answers mean: plain data beside the weights.

`preparation.json` in an exported folder is a `Recipe` as JSON, one flat object.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from inmerge_wrap.errors import check_pixels
from inmerge_wrap.files import write_json
from inmerge_wrap.images.files import DataError, Decoded, counted, decode

FILE = "preparation.json"
TASKS = ("multiclass", "multilabel")
CROP_MODES = ("squash", "center")  # as timm names them


@dataclass(frozen=True)
class Preparation:
    """How a file becomes the pixels of a network. Calling it on a path gives uint8 (C, S, S).

    On 8-bit files it equals timm's evaluation transform with ``crop_pct=1``, bicubic; the middle of
    a strip, of which one side is more than 8 times the other, may be shifted by a pixel.
    """

    size: int  # side S in pixels
    channels: int  # C, 1 for grey or 3 for colour
    crop_mode: str = "squash"  # keeps the whole image; "center" keeps its proportions
    pixel_range: tuple[float, float] | None = None  # what becomes black and white, if unsaid
    override_windows: bool = False  # use that range in place of the windows of DICOM files too

    def __post_init__(self) -> None:
        if self.size < 8:
            raise DataError(f"<size> must be at least 8 pixels, got {self.size}")
        if self.channels not in (1, 3):
            raise DataError(f"<channels> must be 1 or 3, got {self.channels}")
        if self.crop_mode not in CROP_MODES:
            raise DataError(f"<crop_mode> must be one of {CROP_MODES}, got {self.crop_mode!r}")
        if self.pixel_range is not None:
            black, white = self.pixel_range
            if not (math.isfinite(black) and math.isfinite(white) and black < white):
                raise DataError(f"<pixel_range> must be BLACK < WHITE, got {black:g} {white:g}")

    def __call__(self, path: Path) -> Tensor:
        decoded = decode(path)
        try:
            return self.pixels_of(decoded)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error

    def pixels_of(self, decoded: Decoded) -> Tensor:
        """The same of a file that is read already."""
        values = decoded.to_bytes(self.pixel_range, override=self.override_windows)
        image = Image.fromarray(values).convert("L" if self.channels == 1 else "RGB")
        bicubic = v2.InterpolationMode.BICUBIC
        if self.crop_mode == "squash":
            image = v2.functional.resize(image, [self.size, self.size], bicubic)
        else:
            # The ends of a strip are cut off before they are resized, which can take gigabytes.
            x, y = (max(0, (side - 8 * min(image.size)) // 2) for side in image.size)
            image = image.crop((x, y, image.width - x, image.height - y))
            image = v2.functional.resize(image, [self.size], bicubic)
            image = v2.functional.center_crop(image, [self.size, self.size])
        return v2.functional.pil_to_tensor(image).contiguous()


@dataclass(frozen=True)
class Seen:
    """What the training images were like: new images that differ are worth a warning."""

    images: int
    kinds: tuple[str, ...]  # as `Decoded.kind` calls them
    colour: float  # share of them that showed colours
    low: float  # the smallest value in a file, before the preparation
    high: float
    dimmest: float  # the highest value of the image in which it is smallest
    smallest: int  # shortest side of a file, in pixels
    largest: int
    means: tuple[float, float]  # of prepared pixels in [0, 1], 1st and 99th percentile over images
    spreads: tuple[float, float]  # the same of an image's standard deviation


@dataclass(frozen=True)
class Recipe:
    """All that a trained network needs beside its weights."""

    preparation: Preparation
    mean: tuple[float, ...]  # of each channel, of pixels in [0, 1]
    std: tuple[float, ...]
    task: str  # "multiclass" (a softmax) or "multilabel" (a sigmoid for each label)
    classes: tuple[str, ...]  # in the order of the outputs
    temperature: float = 1.0  # divides the outputs
    thresholds: tuple[float, ...] | None = None  # of several labels, above which each is named
    seen: Seen | None = None
    class_shares: tuple[float, ...] | None = None  # of training images, where a label is known
    trained_on: tuple[str, ...] = ()  # `digest_of` what training or its choices saw, sorted

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise DataError(f"task must be one of {', '.join(TASKS)}, got {self.task!r}")
        if len(set(self.classes)) < len(self.classes):
            raise DataError(f"classes must have different names, got {', '.join(self.classes)}")
        check_pixels(self.mean, self.std)
        channels, outputs = self.preparation.channels, len(self.classes)
        for name, values, count in (
            ("mean", self.mean, channels),
            ("std", self.std, channels),
            ("class_shares", self.class_shares, outputs),
        ):
            if values is not None and len(values) != count:
                raise DataError(f"{name} must be {counted(count, 'number')}, got {len(values)}")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise DataError(f"temperature must be positive, got {self.temperature}")
        wanted = len(self.classes) if self.task == "multilabel" else None
        if wanted != (None if self.thresholds is None else len(self.thresholds)):
            raise DataError(
                f"thresholds are {self.thresholds}, and the task is {self.task}: a multi-label "
                f"task has one for each label: {', '.join(self.classes)}; any other has none"
            )
        if not all(0 <= threshold <= 1 for threshold in self.thresholds or ()):
            raise DataError(f"thresholds must lie in [0, 1], as probabilities: {self.thresholds}")

    def probabilities(self, logits: Tensor) -> Tensor:
        """The outputs (N, classes) as probabilities, in double precision."""
        scaled = logits.double() / self.temperature
        return scaled.sigmoid() if self.task == "multilabel" else scaled.softmax(1)

    def named(self, probabilities: Tensor) -> Tensor:
        """Whether each class is part of the answer, (N, classes).

        It is the most probable class, or each label above its threshold.
        """
        if self.thresholds is not None:
            return probabilities > torch.tensor(self.thresholds, dtype=probabilities.dtype)
        best = probabilities.argmax(1, keepdim=True)
        return torch.zeros_like(probabilities, dtype=torch.bool).scatter(1, best, True)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, flat but for ``seen``."""
        content = asdict(self)
        return content.pop("preparation") | content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Recipe:
        """Reads what ``to_dict`` gave, also by way of JSON."""
        own = _fields_of(cls, content)
        if "seen" in own:
            own["seen"] = Seen(**_fields_of(Seen, own["seen"]))
        return cls(preparation=Preparation(**_fields_of(Preparation, content)), **own)

    def write(self, folder: Path) -> None:
        """Writes ``preparation.json`` beside the weights."""
        write_json(folder / FILE, self.to_dict())

    @classmethod
    def read(cls, folder: Path) -> Recipe:
        """Reads the ``preparation.json`` of an exported folder."""
        try:
            return cls.from_dict(json.loads((folder / FILE).read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise DataError(
                f"{folder} has no {FILE}, which says how images are prepared: give the folder "
                "model/ that a training wrote"
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder / FILE} cannot be used: {error}") from error


def _fields_of(kind: Any, content: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass among others; JSON has lists in place of tuples."""
    return {
        field.name: tuple(value) if isinstance(value, list) else value
        for field in fields(kind)
        if field.name in content and (value := content[field.name]) is not None
    }


def digest_of(digest: str) -> str:
    """The part of a file's digest that is kept of training images: 64 bits."""
    return digest[:16]
