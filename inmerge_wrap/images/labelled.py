"""Labelled images for an evaluation: MedMNIST files, and folders with one folder per class.

Pixels are in [0, 1] and not normalised, in a fixed order, as `evaluate_robustness` expects.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from inmerge_wrap.images.collection import spaced
from inmerge_wrap.images.files import DICOM, RASTER, decode, is_image
from inmerge_wrap.images.finding import canonical, files_below, inside, listed, parts_in

__all__ = ["ImageFolder", "fit_images", "read_npz"]

# What numpy raises on a file of another kind, of other arrays, or with damaged bytes.
_NOT_IN_LAYOUT = (KeyError, ValueError, OSError, EOFError, TypeError, BadZipFile, zlib.error)
_SUFFIXES = {*RASTER, *DICOM, ".webp", ".gif"}


def read_npz(path: str | Path, split: str = "test") -> tuple[Tensor, Tensor]:
    """Reads images and labels from a file in the MedMNIST layout.

    Args:
        path: An .npz with `SPLIT_images`, bytes of shape (N, H, W) or (N, H, W, 3), and
            `SPLIT_labels` (N, 1) or (N, L).
        split: "train", "val" or "test".

    Returns:
        Images (N, C, H, W) in [0, 1], labels (N,) or (N, L).

    Raises:
        ValueError: If the file has another layout.
    """
    if not Path(path).is_file():
        raise ValueError(f"no such file: {path}")
    try:
        with open(path, "rb") as file, np.load(file) as content:
            images, labels = content[f"{split}_images"], content[f"{split}_labels"]
    except _NOT_IN_LAYOUT as error:
        raise ValueError(
            f"{path} is not in the MedMNIST layout: an .npz with {split}_images (N, H, W) or "
            f"(N, H, W, 3), bytes, and {split}_labels (N, 1) or (N, L); {error}"
        ) from error
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or len(images) != len(labels):
        raise ValueError(
            f"{split}_images of {path} are {images.dtype} {images.shape} with {labels.shape} "
            "labels; bytes (N, H, W) or (N, H, W, 3) with one row of labels each are needed"
        )
    pixels = torch.from_numpy(images).float() / 255
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    targets = torch.from_numpy(labels.astype("int64"))
    return pixels.contiguous(), targets.squeeze(1) if targets.shape[1:] == (1,) else targets


def fit_images(images: Tensor, channels: int, size: tuple[int, int] | None = None) -> Tensor:
    """Converts images to the channels and size that a network takes.

    Args:
        images: (N, C, H, W) in [0, 1]; grey ones are repeated for a network of three channels.
        channels: Number of channels that the network takes.
        size: Height and width to resize to, in pixels; None to keep it.

    Raises:
        ValueError: If the channels do not fit.
    """
    found = images.shape[1]
    if found == 1 and channels == 3:
        images = images.expand(-1, 3, -1, -1)
    elif found != channels:
        raise ValueError(f"the images have {found} channels and the network reads {channels}")
    if size is not None and tuple(images.shape[-2:]) != size:
        images = nn.functional.interpolate(
            images, size, mode="bilinear", antialias=True, align_corners=False
        ).clamp(0, 1)
    return images


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """The images of FOLDER/SPLIT/CLASS/*, or of FOLDER/CLASS/* if it is not split.

    Images are resized and cropped as timm does at inference, read one by one on demand. In images
    of more than 8 bits, black is 0 and white the largest 16-bit number; DICOM is shown as the file
    says.

    Args:
        folder: Holds one folder for each class.
        split: "train", "val" or "test", if the folder has any of these; a folder that is not
            split is used as the test part as a whole.
        config: Size, interpolation and crop as timm stores them; `input_size` is required.
        classes: Names in the order of the outputs; those of the folders, sorted, if None.
        limit: Number of images to use, evenly spaced over all classes.

    Attributes:
        classes: Names in the order of the labels.
        paths: Paths of the images, class by class.
        labels: (N,), the index of each image's class in `classes`.
        part: The split, or "all" if the folder is not split.

    Raises:
        ValueError: If there is no such split, there are no images, or a folder is not among
            `classes`.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        config: Mapping[str, Any],
        split: str = "test",
        classes: Sequence[str] | None = None,
        limit: int | None = None,
    ) -> None:
        from timm.data import create_transform, resolve_data_config

        root = Path(folder)
        parts = parts_in(root) if root.is_dir() else {}
        if split not in parts and (parts or split != "test"):
            there = f"it has {listed(parts)}" if parts else "it is not split"
            raise ValueError(f"{root} holds no folder {split}: {there}")
        self.part = split if parts else "all"
        root = parts.get(split, root)
        found: dict[str, list[Path]] = {}
        for entry in inside(root, folders=True):
            if paths := _images_in(entry):
                found.setdefault(canonical(entry.name), []).extend(paths)
        if not found:
            raise ValueError(
                f"{root} holds no images in folders of classes: {split}/CLASS/*.png or CLASS/*.png "
                f"are needed, one of {', '.join(sorted(_SUFFIXES))}"
            )
        self.classes = list(found) if classes is None else list(map(canonical, classes))
        foreign = [name for name in found if name not in self.classes]
        if foreign:
            raise ValueError(
                f"{root} has folders that are not classes of the model: {', '.join(foreign[:5])}; "
                f"its classes are {', '.join(self.classes)}"
            )
        named = [(path, self.classes.index(name)) for name in found for path in found[name]]
        named = [named[place] for place in spaced(len(named), limit)]
        self.paths = [path for path, _ in named]
        self.labels = torch.tensor([label for _, label in named])
        prepared = resolve_data_config({}, pretrained_cfg=dict(config))
        self._channels = prepared["input_size"][0]
        prepared |= {"mean": (0.0,) * self._channels, "std": (1.0,) * self._channels}
        self._prepare = create_transform(**prepared, is_training=False)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Returns the pixels (C, H, W) in [0, 1] and the label.

        Raises:
            ValueError: If the file is not an image; the message names it.
        """
        path, label = self.paths[index], int(self.labels[index])
        return self._prepare(_open(path, self._channels)), label


def _images_in(folder: Path) -> list[Path]:
    files = files_below(folder)
    return [path for path in files if path.suffix.lower() in _SUFFIXES or is_image(path)]


def _open(path: Path, channels: int) -> Image.Image:
    """Returns the image upright, with eight bits in each of 1 or 3 channels."""
    try:
        decoded = decode(path, first_frame=True)
        fractions = decoded.kind == "floats"
        if fractions and not (0 <= decoded.values.min() and decoded.values.max() <= 1):
            raise ValueError("it holds fractions outside of [0, 1]: scale it to 8 bits")
        shown = decoded.to_bytes((0.0, 1.0 if fractions else 65535.0), override=False)
    except Exception as error:  # readers raise all sorts of things on broken files
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    return Image.fromarray(shown).convert("L" if channels == 1 else "RGB")
