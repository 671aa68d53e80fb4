"""The data of the studies: sets of images that fit into memory, and their preprocessing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from inmerge_wrap.app.model import Normalise


@dataclass(frozen=True)
class Images:
    """A data set that fits into memory: uint8 pixels (N, C, H, W) and labels for each part.

    Labels are class indices (N,), or 0 and 1 of shape (N, classes) for a multi-label task.
    """

    name: str
    task: str
    classes: tuple[str, ...]
    parts: Mapping[str, tuple[Tensor, Tensor]]

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return tuple(self.parts["train"][0].shape[1:])  # type: ignore[return-value]

    def statistics(self) -> tuple[list[float], list[float]]:
        """Returns the mean and standard deviation of the training pixels in [0, 1], per channel."""
        pixels = self.parts["train"][0].float() / 255
        return pixels.mean((0, 2, 3)).tolist(), pixels.std((0, 2, 3)).tolist()

    def to(self, device: torch.device) -> Images:
        """Moves the images to a device."""
        parts = {name: (x.to(device), y.to(device)) for name, (x, y) in self.parts.items()}
        return replace(self, parts=parts)

    def first_labels(self, count: int, seed: int) -> Images:
        """Keeps a random ``count`` of the training images, to study small data sets.

        Raises:
            SystemExit: If there are fewer.
        """
        images, labels = self.parts["train"]
        if not 1 <= count <= len(images):
            raise SystemExit(f"--train-images must lie in [1, {len(images)}], got {count}")
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]
        return self.trained_on(images[chosen], labels[chosen])

    def first_tests(self, count: int) -> Images:
        """Keeps the first ``count`` of the test images.

        Raises:
            SystemExit: If there are fewer.
        """
        images, labels = self.parts["test"]
        if not 1 <= count <= len(images):
            raise SystemExit(f"--test-images must lie in [1, {len(images)}], got {count}")
        return replace(self, parts={**self.parts, "test": (images[:count], labels[:count])})

    def resized(self, size: int) -> Images:
        """Resizes the images to another side, bilinearly."""
        return self._changed(
            lambda pixels: (
                F.interpolate(pixels.float(), size=(size, size), mode="bilinear", antialias=True)
                .round()
                .byte()
            )
        )

    def in_colour(self) -> Images:
        """Repeats a grey channel three times."""
        return self._changed(lambda pixels: pixels.expand(-1, 3, -1, -1))

    def stacked(self, depth: int, seed: int) -> Images:
        """Makes a volume of each image: it and ``depth - 1`` of its class and part.

        The others are drawn with replacement, so that now and then two are equal.

        The slices stand one above the other in a picture (C, depth x H, W), as ``volumes_small``
        of networks.py takes it, so that augmentation and corruption treat it as any other.
        """
        generator = torch.Generator().manual_seed(seed)
        parts = {}
        for name, (pixels, labels) in self.parts.items():
            rows = torch.arange(len(labels)).repeat(depth, 1)
            for label in labels.unique():
                own = (labels == label).nonzero().flatten()
                drawn = torch.randint(len(own), (depth - 1, len(own)), generator=generator)
                rows[1:, own] = own[drawn]
            parts[name] = (torch.cat([pixels[row] for row in rows], dim=2), labels)
        return replace(self, name=f"{self.name} volumes", parts=parts)

    def _changed(self, change: Callable[[Tensor], Tensor]) -> Images:
        parts = {
            name: (torch.cat([change(some) for some in pixels.split(1000)]), labels)
            for name, (pixels, labels) in self.parts.items()
        }
        return replace(self, parts=parts)

    def trained_on(self, images: Tensor, labels: Tensor) -> Images:
        """Replaces the training images."""
        return replace(self, parts={**self.parts, "train": (images, labels)})


def load_digits(size: int = 32) -> Images:
    """Loads the 1,797 scanned digits that scikit-learn ships, enlarged from 8 x 8 pixels."""
    from sklearn.datasets import load_digits as read

    digits = read()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    images, labels = (images * 255).round().byte(), torch.from_numpy(digits.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    parts = dict(zip(("train", "val", "test"), order.split([1100, 200, 497]), strict=True))
    return Images(
        "digits",
        "multiclass",
        tuple(str(name) for name in digits.target_names),
        {name: (images[index], labels[index]) for name, index in parts.items()},
    )


def load_images(name: str, root: Path, size: int) -> Images:
    """Loads a MedMNIST data set of the given size, or ``"digits"``."""
    return load_digits(size) if name == "digits" else load_medmnist(name, root, size)


def load_medmnist(flag: str, root: Path, size: int = 28) -> Images:
    """Loads a 2D MedMNIST data set from its npz file, downloading it if it is missing.

    Raises:
        SystemExit: If the file is missing and cannot be downloaded.
    """
    try:
        import medmnist
    except ImportError as error:
        raise SystemExit('medmnist is missing: pip install "inmerge-wrap[recipes]"') from error
    if flag not in medmnist.INFO or "3d" in flag:
        flat = sorted(name for name in medmnist.INFO if "3d" not in name)
        raise SystemExit(f"unknown data set {flag!r}; the 2D sets are {', '.join(flat)}")
    info = medmnist.INFO[flag]
    path = root / (f"{flag}.npz" if size == 28 else f"{flag}_{size}.npz")
    if not path.exists():
        _download(medmnist, info, path, size)
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    multilabel = info["task"].startswith("multi-label")
    parts = {}
    for part in ("train", "val", "test"):
        pixels, labels = arrays[f"{part}_images"], torch.from_numpy(arrays[f"{part}_labels"])
        images = torch.from_numpy(pixels if pixels.ndim == 4 else pixels[..., None])
        labels = labels.float() if multilabel else labels.long().flatten()
        parts[part] = (images.permute(0, 3, 1, 2).contiguous(), labels)
    names = tuple(info["label"][str(index)] for index in range(len(info["label"])))
    return Images(flag, "multilabel" if multilabel else "multiclass", names, parts)


def _download(package: Any, info: Mapping[str, Any], path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        data_set = getattr(package, info["python_class"])
        data_set(split="train", download=True, root=str(path.parent), size=size)
    except Exception as error:  # medmnist hides the cause of a failed download
        address = info["url" if size == 28 else f"url_{size}"]
        raise SystemExit(
            f"{path} is missing and the download failed ({error}).\n"
            f"Download it from {address} and put it there, or pass its folder as --data-root."
        ) from error


class Normalised(Normalise):
    """Standardises by mean and standard deviation, by default those of the training images."""

    def __init__(
        self,
        data: Images,
        device: torch.device,
        statistics: tuple[Sequence[float], Sequence[float]] | None = None,
    ) -> None:
        super().__init__(*(statistics or data.statistics()), device)

    def batches(self, images: Tensor, size: int = 500) -> Iterator[Tensor]:
        """Yields all images in order, as the network takes them."""
        return (self(part) for part in images.split(size))
