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

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from inmerge_wrap.files import write_json
from inmerge_wrap.images.files import DataError, Decoded, decode

FILE = "preparation.json"
TASKS = ("multi-class", "multi-label")
CROP_MODES = ("squash", "center")  # as timm names them


@dataclass(frozen=True)
class Preparation:
    """How a file becomes the pixels of a network. Calling it on a path gives uint8 (C, S, S).

    On 8-bit files it equals timm's evaluation transform with ``crop_pct=1``, bicubic.

    Attributes:
        size: Side S in pixels.
        channels: C, 1 for grey or 3 for colour. Grey is repeated, colour is turned to grey.
        crop_mode: ``"squash"`` keeps the whole image and gives up its proportions, ``"center"``
            the other way round.
        pixel_range: Values that become black and white where the file does not say so.
        override_windows: Use that range in place of the windows of DICOM files too.
    """

    size: int
    channels: int
    crop_mode: str = "squash"
    pixel_range: tuple[float, float] | None = None
    override_windows: bool = False

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
        return self.pixels_of(decode(path))

    def pixels_of(self, decoded: Decoded) -> Tensor:
        """The same of a file that is read already."""
        values = decoded.to_bytes(self.pixel_range, override=self.override_windows)
        image = Image.fromarray(values).convert("L" if self.channels == 1 else "RGB")
        bicubic = v2.InterpolationMode.BICUBIC
        if self.crop_mode == "squash":
            image = v2.functional.resize(image, [self.size, self.size], bicubic)
        else:
            image = v2.functional.resize(image, [self.size], bicubic)
            image = v2.functional.center_crop(image, [self.size, self.size])
        pixels = np.array(image).reshape(self.size, self.size, self.channels)
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, from which ``from_dict`` makes the same."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Preparation:
        """Reads what ``to_dict`` gave, also by way of JSON and among other keys."""
        own = {field.name: content[field.name] for field in fields(cls) if field.name in content}
        found = own.get("pixel_range")
        return cls(**{**own, "pixel_range": tuple(found) if found is not None else None})


@dataclass(frozen=True)
class Seen:
    """What the training images were like: new images that differ are worth a warning.

    Attributes:
        images: How many were looked at.
        kinds: Kinds of file among them, as `Decoded.kind` calls them.
        colour: Share of them that showed colours.
        low: The smallest value in a file, before the preparation.
        high: The largest value in a file.
        smallest: Shortest side of a file, in pixels.
        largest: Longest side of a file, in pixels.
        means: The 1st and the 99th percentile over the images of an image's mean, where prepared
            pixels run from 0 to 1.
        spreads: The same of an image's standard deviation.
    """

    images: int
    kinds: tuple[str, ...]
    colour: float
    low: float
    high: float
    smallest: int
    largest: int
    means: tuple[float, float]
    spreads: tuple[float, float]


@dataclass(frozen=True)
class Recipe:
    """All that a trained network needs beside its weights.

    Attributes:
        preparation: How a file becomes uint8 pixels.
        mean: Subtracted from the pixels in [0, 1], for each channel.
        std: Divides them after that.
        task: "multi-class" (a softmax over two classes or more) or "multi-label" (a sigmoid for
            each label).
        classes: Names in the order of the outputs.
        temperature: Divides the outputs before the softmax or sigmoid.
        thresholds: Of a multi-label task, for each label the probability above which it is named;
            after the temperature.
        seen: What the training images were like; None if it is not known.
        class_shares: For each class, the share of the training images that show it, of several
            labels among those where it is known; None if it is not known.
        trained_on: Digests of the images that training or its choices saw (`digest_of`), sorted.
    """

    preparation: Preparation
    mean: tuple[float, ...]
    std: tuple[float, ...]
    task: str
    classes: tuple[str, ...]
    temperature: float = 1.0
    thresholds: tuple[float, ...] | None = None
    seen: Seen | None = None
    class_shares: tuple[float, ...] | None = None
    trained_on: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise DataError(f"task must be one of {', '.join(TASKS)}, got {self.task!r}")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise DataError(f"temperature must be positive, got {self.temperature}")
        if (self.task == "multi-label") != (self.thresholds is not None):
            raise DataError(
                f"thresholds are {self.thresholds} and the task is {self.task}: a multi-label task "
                "has one for each label, any other has none"
            )

    def probabilities(self, logits: Tensor) -> Tensor:
        """The outputs (N, classes) as probabilities, in double precision."""
        scaled = logits.double() / self.temperature
        return scaled.sigmoid() if self.task == "multi-label" else scaled.softmax(1)

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
        own: dict[str, Any] = {
            field.name: tuple(value) if isinstance(value, list) else value
            for field in fields(cls)
            if field.name in content and (value := content[field.name]) is not None
        }
        if "seen" in own:
            seen: dict[str, Any] = dict(own["seen"])
            seen |= {name: tuple(seen[name]) for name in ("kinds", "means", "spreads")}
            own["seen"] = Seen(**seen)
        return cls(preparation=Preparation.from_dict(content), **own)

    def write(self, folder: Path) -> None:
        """Writes ``preparation.json`` beside the weights."""
        write_json(folder / FILE, self.to_dict())

    @classmethod
    def read(cls, folder: Path) -> Recipe:
        """Reads the ``preparation.json`` of an exported folder.

        Raises:
            DataError: If there is none, or it is not whole.
        """
        try:
            return cls.from_dict(json.loads((folder / FILE).read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise DataError(
                f"{folder} has no {FILE}, which says how images are prepared: give the folder "
                "model/ that a training wrote"
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder / FILE} cannot be used: {error}") from error


def digest_of(digest: str) -> str:
    """The part of a file's digest that is kept of training images: 64 bits."""
    return digest[:16]
