"""Chest X-rays in the layout of the NIH release, read into memory for the studies."""

from __future__ import annotations

from pathlib import Path

import torch
from torchvision.transforms.v2 import functional as F

from inmerge_wrap.images import nih
from studies.common.images import Images


def load_chest(root: Path, size: int) -> Images:
    """Reads all images as grey squares, resized by 256 / 224 and centre-cropped.

    A tenth of the training patients, drawn by a hash of the patient, is the validation part.

    Raises:
        SystemExit: If something is missing or a patient is in two parts.
    """
    try:
        release = nih.read_release(root, seed=0)
    except ValueError as error:
        raise SystemExit(f"--chest-root: {error}") from None
    side = nih.resized_side(size)
    parts = {}
    for name, part in release.items():
        squares = (nih.grey_square(path, side) for path in part.images)
        pixels = torch.stack([F.center_crop(square, [size, size]) for square in squares])
        parts[name] = (pixels, part.labels)
    return Images("chest", "multilabel", nih.FINDINGS, parts)
