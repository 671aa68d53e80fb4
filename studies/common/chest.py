"""Chest X-rays in the layout of the NIH release, read into memory for the studies."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from studies.common.images import Images

FINDINGS = (
    *("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia"),
    *("Pneumothorax", "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening"),
    "Hernia",
)


def load_chest(root: Path, size: int) -> Images:
    """Reads all images as grey squares, resized by 256 / 224 and centre-cropped.

    A tenth of the training patients, drawn by a hash of the patient, is the validation part.

    Raises:
        SystemExit: If something is missing.
    """
    tables = sorted(root.glob("Data_Entry_2017*.csv"))
    lists = {name: root / f"{name}_list.txt" for name in ("train_val", "test")}
    for path in [*tables[:1], *lists.values()] if tables else [root / "Data_Entry_2017_v2020.csv"]:
        if not path.is_file():
            raise SystemExit(f"{path} is missing: --chest-root must hold the NIH release")
    with open(tables[-1], newline="") as file:
        entries = {row["Image Index"]: row for row in csv.DictReader(file)}
    paths = {path.name: path for path in root.glob("images*/**/*.png")}
    names: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for source, path in lists.items():
        for name in path.read_text().split():
            if name not in entries or name not in paths:
                raise SystemExit(f"{name} is listed but not found: the release is incomplete")
            patient = entries[name]["Patient ID"]
            drawn = hashlib.sha256(f"0:{patient}".encode()).digest()[0] < 26  # a tenth of 256
            names["test" if source == "test" else "val" if drawn else "train"].append(name)
    parts = {
        part: (
            torch.stack([grey_square(paths[name], size) for name in listed]),
            torch.stack([findings(entries[name]["Finding Labels"]) for name in listed]),
        )
        for part, listed in names.items()
    }
    return Images("chest", "multilabel", FINDINGS, parts)


def findings(text: str) -> Tensor:
    """Returns 0 and 1 for each of FINDINGS, from names joined by ``|``."""
    said = text.split("|")
    return torch.tensor([float(one in said) for one in FINDINGS])


def grey_square(path: Path, size: int) -> Tensor:
    """Returns uint8 (1, size, size)."""
    side = round(size * 256 / 224)
    with Image.open(path) as image:  # "L": a few files of the release are RGBA
        small = F.center_crop(F.resize(image.convert("L"), [side]), [side, side])
    return F.center_crop(F.pil_to_tensor(small), [size, size])
