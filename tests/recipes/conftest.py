"""Data sets in the layout of the real ones, small enough for a test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def blood(tmp_path: Path) -> Path:
    """A folder with a file in BloodMNIST's layout whose classes differ in brightness."""
    generator = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 96), ("val", 40), ("test", 40)):
        labels = np.arange(count) % 8
        noise = generator.integers(0, 40, (count, 28, 28, 3))
        arrays[f"{part}_images"] = (noise + 25 * labels[:, None, None, None]).astype(np.uint8)
        arrays[f"{part}_labels"] = labels[:, None].astype(np.uint8)
    np.savez(tmp_path / "bloodmnist.npz", **arrays)
    return tmp_path


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A folder in the layout of the NIH release: 40 patients, no hernia among the test images."""
    generator = np.random.default_rng(0)
    root = tmp_path / "nih"
    images = root / "images_001" / "images"
    images.mkdir(parents=True)
    rows = ["Image Index,Finding Labels,Follow-up #,Patient ID"]
    names = []
    for patient in range(1, 41):
        for visit in range(2):
            name = f"{patient:08d}_{visit:03d}.png"
            names.append(name)
            findings = ["Mass|Edema", "No Finding", "Hernia", "Effusion"][patient % 4]
            if patient > 30 and findings == "Hernia":
                findings = "Nodule"
            rows.append(f"{name},{findings},{visit},{patient}")
            pixels = generator.integers(0, 255, (40, 40), dtype=np.uint8)
            Image.fromarray(pixels).save(images / name)
    (root / "Data_Entry_2017_v2020.csv").write_text("\n".join(rows))
    (root / "train_val_list.txt").write_text("\n".join(names[:60]))
    (root / "test_list.txt").write_text("\n".join(names[60:]))
    return root
