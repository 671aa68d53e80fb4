"""ChestX-ray14 (NIH): the parts of the data, and fast reading.

`read_release` takes the official release as downloaded, `read_hub` a Hugging Face data set of the
same images. In both, a tenth of the training patients, drawn by a hash of seed and patient, is
the validation part if none is given, and no patient is in two parts.

    parts = read_release(Path("nih"), seed=0)
    images, findings = Radiographs(parts["train"], size=224, train=True)[0]

A cache of decoded images (`cached`) is read much faster than PNG files of 1024 px.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from inmerge_wrap.errors import ArgumentError
from inmerge_wrap.images.collection import PARTS
from inmerge_wrap.images.sets import decoded_once

__all__ = ["FINDINGS", "Part", "Radiographs", "cached", "read_dataset", "read_hub", "read_release"]

FINDINGS = (  # in the column order of the paper's table
    *("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia"),
    *("Pneumothorax", "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening"),
    "Hernia",
)
_NAME = re.compile(r"(\d{8})_\d{3}\.\w+")  # patient_visit.png, the release's names


@dataclass(frozen=True)
class Part:
    """Names, labels (N, 14) of 0 and 1, and images that are decoded on access.

    An image is a path, a PIL image or, from a cache, an array of grey levels (side, side).
    """

    names: list[str]
    labels: Tensor
    images: Any  # a sequence of them

    def __len__(self) -> int:
        return len(self.names)

    def rows(self, rows: list[int]) -> Part:
        """Some of them."""
        return Part([self.names[row] for row in rows], self.labels[rows], Subset(self.images, rows))


# -- the official release --------------------------------------------------------------------------


def read_release(root: Path, seed: int) -> dict[str, Part]:
    """Returns the parts ``train``, ``val`` and ``test`` of the NIH release.

    Args:
        root: Holds ``images*/`` folders with the PNG files, at any depth, ``Data_Entry_2017*.csv``,
            ``train_val_list.txt`` and ``test_list.txt``.
        seed: Seed of the validation patients.

    Raises:
        ValueError: If something is missing or a patient is in two parts.
    """
    table = max(root.glob("Data_Entry_2017*.csv"), default=root / "Data_Entry_2017_v2020.csv")
    lists = {name: root / f"{name}_list.txt" for name in ("train_val", "test")}
    for path in (table, *lists.values()):
        if not path.is_file():
            raise ValueError(f"{path} is missing: the folder must hold the NIH release")
    with open(table, newline="") as file:
        entries = {row["Image Index"]: row for row in csv.DictReader(file)}
    paths = {path.name: path for path in root.glob("images*/**/*.png")}
    listed = {name: path.read_text().split() for name, path in lists.items()}
    for name in (image for images in listed.values() for image in images):
        if name not in entries or name not in paths:
            where = table.name if name not in entries else f"{root}/images*/"
            raise ValueError(
                f"{name} is listed but not found in {where}: the release is incomplete"
            )
    sources = {}
    for source, names in listed.items():
        found = [entries[name] for name in names]
        labels = label_matrix(names, [row["Finding Labels"].split("|") for row in found])
        part = Part(names, labels, [paths[name] for name in names])
        sources[source] = part, [row["Patient ID"] for row in found]
    return _by_patient(sources, seed)


def _by_patient(sources: dict[str, tuple[Part, list[str]]], seed: int) -> dict[str, Part]:
    """Train, val and test of parts with the patient of each image; ``train_val`` is split."""
    if "train_val" in sources:
        whole, patients = sources.pop("train_val")
        held_out = {  # 26 of 256: a tenth of the patients
            patient
            for patient in set(patients)
            if hashlib.sha256(f"{seed}:{patient}".encode()).digest()[0] < 26
        }
        for part in ("train", "val"):
            rows = [n for n, one in enumerate(patients) if (one in held_out) == (part == "val")]
            sources[part] = whole.rows(rows), [patients[row] for row in rows]
    people = {part: set(patients) for part, (_, patients) in sources.items()}
    for one, other in combinations(PARTS, 2):
        if shared := people[one] & people[other]:
            raise ValueError(f"patients {sorted(shared)[:5]} are in both {one} and {other}")
    for part in PARTS:
        if not people[part]:
            raise ValueError(f"the part {part} has no patients")
    return {part: sources[part][0] for part in PARTS}


def label_matrix(names: Sequence[str], findings: Sequence[Sequence[str]]) -> Tensor:
    """Returns a matrix of 0 and 1, shape (N, 14), from the names of the findings."""
    for name, found in zip(names, findings, strict=True):
        unknown = {*found} - {*FINDINGS, "No Finding"}
        if unknown:
            raise ValueError(f"{name} has the unknown findings {sorted(unknown)}")
    return torch.tensor([[float(one in found) for one in FINDINGS] for found in findings])


# -- a data set of Hugging Face --------------------------------------------------------------------


def read_dataset(loaded: Mapping[str, Any], seed: int) -> dict[str, Part]:
    """Returns the parts of a data set that ``datasets.load_dataset`` returned.

    Only labels and patients are read here; an image is decoded when it is needed.

    Args:
        loaded: Needs the splits train and test, and may have validation. Columns: image (Image);
            label, labels or "Finding Labels" (names in a list or joined by |, or ClassLabel);
            "Patient ID" or patient_id, or else file names such as 00000061_012.png.
        seed: Seed of the validation patients, if there is no validation split.

    Raises:
        ValueError: If it does not fit, or a patient is in two parts.
    """
    if missing := {"train", "test"} - {*loaded}:
        raise ValueError(
            f"the data set has the splits {sorted(loaded)}: {sorted(missing)} is missing"
        )
    sources = {"train_val": "train", "test": "test"}
    if "validation" in loaded:
        sources = {"train": "train", "val": "validation", "test": "test"}
    return _by_patient({source: _read(loaded[key], key) for source, key in sources.items()}, seed)


def read_hub(name: str, revision: str | None, seed: int) -> dict[str, Part]:
    """Loads a data set of the Hugging Face hub, or of a local folder, and returns its parts.

    Args:
        name: OWNER/NAME on the hub, or a folder of parquet files or images.
        revision: Commit of a data set on the hub, 40 hex digits; None for a folder.
        seed: See :func:`read_dataset`.

    Raises:
        ValueError: If it cannot be loaded, or as :func:`read_dataset` does.
    """
    import datasets

    local = Path(name).is_dir()
    if local and revision:
        raise ArgumentError(f"<revision> is for a data set of the hub, but {name} is a folder")
    if not local and not re.fullmatch("[0-9a-f]{40}", revision or ""):
        raise ArgumentError(
            f"{name} is not a folder, and a data set of the hub can change: pass "
            f"<revision=COMMIT>, 40 hex digits from https://huggingface.co/datasets/{name}/commits"
        )
    try:
        loaded = datasets.load_dataset(name, revision=revision)
    except Exception as error:  # hub, network and each file format raise their own errors
        cause = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"{name} cannot be loaded: {type(error).__name__}: {cause}") from error
    return read_dataset(loaded, seed)


def _read(table: Any, split: str) -> tuple[Part, list[str]]:
    """One split of the data set, and the patient of each image."""
    kinds = table.features
    complaint = ValueError(
        f"split {split} has the columns "
        f"{', '.join(f'{key} ({type(kind).__name__})' for key, kind in kinds.items())}"
        ": it needs image (Image), one of label, labels or 'Finding Labels' (names in a list "
        "or joined by |, or ClassLabel), and 'Patient ID' or patient_id or else names such as "
        "00000061_012.png in 'Image Index' or as the images' file names"
    )
    if type(kinds.get("image")).__name__ != "Image":
        raise complaint
    if "Image Index" in kinds:
        names = table["Image Index"][:]
    else:
        # Only the stored path: reading the column from the data set would read the images.
        chunks = table.data.column("image").chunks
        paths = [path for chunk in chunks for path in chunk.field("path").to_pylist()]
        names = [Path(path).name if path else f"{split} {row}" for row, path in enumerate(paths)]

    label = next((key for key in ("label", "labels", "Finding Labels") if key in kinds), None)
    kind = kinds.get(label)
    inner = getattr(kind, "feature", kind)  # of a list
    to_text = getattr(inner, "int2str", str)  # of a ClassLabel
    if to_text is str and getattr(inner, "dtype", "") not in ("string", "large_string"):
        raise complaint  # numbers without names could be any finding
    rows = [value if isinstance(value, list) else [value] for value in table[label][:]]
    findings = [[one for value in row for one in to_text(value).split("|")] for row in rows]

    owner = next((key for key in ("Patient ID", "patient_id") if key in kinds), None)
    if owner:
        patients = table[owner][:]
    else:
        found = [_NAME.fullmatch(name) for name in names]
        patients = [int(match[1]) if match else None for match in found]
    if None in patients:
        raise complaint
    part = Part(names, label_matrix(names, findings), table["image"])
    return part, [str(patient) for patient in patients]


# -- images ----------------------------------------------------------------------------------------


def resized_side(size: int) -> int:
    """Returns the side that images are resized to before the crop, as 256 for 224."""
    return round(size * 256 / 224)


def grey_square(image: Path | Image.Image | np.ndarray, side: int) -> Tensor:
    """Returns uint8 (1, side, side); images that are not square are centre-cropped."""
    if isinstance(image, np.ndarray):
        return torch.from_numpy(image.copy()).unsqueeze(0)  # the map itself is read-only
    with Image.open(image) if isinstance(image, Path) else image as opened:
        # "L": a few files of the release are RGBA.
        small = F.center_crop(F.resize(opened.convert("L"), [side]), [side, side])
    return F.pil_to_tensor(small)


class Radiographs(Dataset[tuple[Tensor, Tensor]]):
    """Grey images, uint8 (1, size, size), with their 14 labels.

    The centre of the image, resized so that ``size`` of 256 / 224 ``size`` pixels are seen; in
    training half of the images are flipped.

    Args:
        part: The part of the data.
        size: Side of the crop in pixels.
        train: Whether to flip.
        side: Side before the crop; that of ``resized_side`` if None.
    """

    def __init__(
        self, part: Part, size: int, *, train: bool = False, side: int | None = None
    ) -> None:
        self.part, self.side = part, side or resized_side(size)
        self.transform = v2.Compose([v2.CenterCrop(size), v2.RandomHorizontalFlip(0.5 * train)])

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        square = grey_square(self.part.images[index], self.side)
        return self.transform(square), self.part.labels[index]


# -- the cache -------------------------------------------------------------------------------------


def cached(part: Part, path: Path, source: str, size: int, workers: int = 0) -> Part:
    """Returns the part with its images from a file, written first if there is none.

    Its name ends in a digest of source, names and size, so other images have another file. Images
    that changed under the same name and source are not detected: delete the file after such a
    change.

    Args:
        part: The part, whose images are read once if they are not in the cache.
        path: An .npy file of all images, resized for a crop of ``size``, without the digest.
        source: Where the images come from, such as their folder.
        size: Side of the later crop, in pixels.
        workers: Processes that decode.
    """
    side = resized_side(size)
    about = "\n".join([source, str(side), *part.names])
    path = path.with_stem(f"{path.stem}-{hashlib.sha256(about.encode()).hexdigest()[:12]}")
    squares = Radiographs(part, side, side=side)
    return replace(
        part, images=decoded_once(squares, (len(part), side, side), path, workers=workers)
    )
