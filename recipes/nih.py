"""ChestX-ray14 (NIH) for ``chestxray.py``: the parts of the data, and fast reading.

It reads the official release as downloaded, or a Hugging Face data set of the same images from the
Hub or a folder. In both, a tenth of the training patients, drawn by a hash of seed and patient, is
the validation part if none is given, and no patient is in two parts.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from images import Images
from PIL import Image
from records import write_json
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

FINDINGS = (  # in the column order of the paper's table
    *("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia"),
    *("Pneumothorax", "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening"),
    "Hernia",
)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NAME = re.compile(r"(\d{8})_\d{3}\.\w+")  # patient_visit.png, the release's names


@dataclass(frozen=True)
class Part:
    """Names, labels (N, 14) of 0 and 1, and images that are decoded on access.

    An image is a path, a PIL image or, from a cache, an array of grey levels (side, side).
    """

    names: list[str]
    labels: Tensor
    images: Sequence[Any]

    def __len__(self) -> int:
        return len(self.names)


# -- the official release --------------------------------------------------------------------------


def read_release(root: Path, seed: int) -> dict[str, Part]:
    """Returns the three parts of the NIH release.

    Raises:
        SystemExit: If something is missing or a patient is in two parts.
    """
    tables = sorted(root.glob("Data_Entry_2017*.csv"))
    lists = {name: root / f"{name}_list.txt" for name in ("train_val", "test")}
    for path in [*tables[:1], *lists.values()] if tables else [root / "Data_Entry_2017_v2020.csv"]:
        if not path.is_file():
            raise SystemExit(f"{path} is missing: --data-root must hold the NIH release")
    with open(tables[-1], newline="") as file:
        entries = {row["Image Index"]: row for row in csv.DictReader(file)}
    paths = {path.name: path for path in root.glob("images*/**/*.png")}
    listed = {name: path.read_text().split() for name, path in lists.items()}
    for name in (image for images in listed.values() for image in images):
        if name not in entries or name not in paths:
            where = tables[-1].name if name not in entries else f"{root}/images*/"
            raise SystemExit(
                f"{name} is listed but not found in {where}: the release is incomplete"
            )
    patients = {
        part: [entries[name]["Patient ID"] for name in names] for part, names in listed.items()
    }
    parts = {}
    for part, (source, rows) in split(patients, seed).items():
        names = [listed[source][row] for row in rows]
        found = [entries[name]["Finding Labels"].split("|") for name in names]
        parts[part] = Part(names, label_matrix(names, found), [paths[name] for name in names])
    return parts


def split(patients: dict[str, list[str]], seed: int) -> dict[str, tuple[str, list[int]]]:
    """Maps each part to its source and rows; a source ``train_val`` is split by patient.

    Raises:
        SystemExit: If a part is empty or a patient is in two of them.
    """
    parts: dict[str, tuple[str, list[int]]] = {}
    for source, column in patients.items():
        if source != "train_val":
            parts[source] = source, list(range(len(column)))
            continue
        drawn = {  # 26 of 256: a tenth of the patients
            patient: hashlib.sha256(f"{seed}:{patient}".encode()).digest()[0] < 26
            for patient in set(column)
        }
        parts["train"] = source, [row for row, name in enumerate(column) if not drawn[name]]
        parts["val"] = source, [row for row, name in enumerate(column) if drawn[name]]
    people = {
        part: {patients[source][row] for row in rows} for part, (source, rows) in parts.items()
    }
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        shared = people[one] & people[other]
        if shared:
            raise SystemExit(f"patients {sorted(shared)[:5]} are in both {one} and {other}")
    for part, members in people.items():
        if not members:
            raise SystemExit(f"the part {part} has no patients")
    return {part: parts[part] for part in ("train", "val", "test")}


def label_matrix(names: Sequence[str], findings: Sequence[Sequence[str]]) -> Tensor:
    """Returns a matrix of 0 and 1, shape (N, 14), from the names of the findings."""
    for name, found in zip(names, findings, strict=True):
        unknown = {*found} - {*FINDINGS, "No Finding"}
        if unknown:
            raise SystemExit(f"{name} has the unknown findings {sorted(unknown)}")
    return torch.tensor([[float(one in found) for one in FINDINGS] for found in findings])


# -- a data set of Hugging Face --------------------------------------------------------------------


def read_dataset(name: str, revision: str | None, seed: int) -> dict[str, Part]:
    """Returns the three parts of a data set of the Hub, or of a folder of parquet files or images.

    ``datasets`` copies it once into its own cache and maps those Arrow files into memory; only
    labels and patients are read here.

    Raises:
        SystemExit: If it is not available or does not fit.
    """
    import datasets

    local = Path(name).is_dir()
    if local and revision:
        raise SystemExit(f"--revision is for a data set of the Hub, but {name} is a folder")
    if not local and not re.fullmatch("[0-9a-f]{40}", revision or ""):
        raise SystemExit(
            f"{name} is not a folder, and a data set of the Hub can change: pass "
            f"--revision COMMIT, 40 hex digits from https://huggingface.co/datasets/{name}/commits"
        )
    try:
        loaded = datasets.load_dataset(name, revision=revision)
    except Exception as error:  # hub, network and each file format raise their own errors
        cause = " ".join(str(error.__cause__ or error).split())
        raise SystemExit(f"{name} cannot be loaded: {type(error).__name__}: {cause}") from error
    missing = {"train", "test"} - {*loaded}
    if missing:
        raise SystemExit(f"{name} has the splits {sorted(loaded)}: {sorted(missing)} is missing")
    own_validation = "validation" in loaded
    sources = {"train" if own_validation else "train_val": "train", "test": "test"}
    if own_validation:
        sources["val"] = "validation"
    columns = {source: Columns(loaded[key], name, key) for source, key in sources.items()}
    patients = {source: column.patients for source, column in columns.items()}
    parts = {}
    for part, (source, rows) in split(patients, seed).items():
        column = columns[source]
        names = [column.names[row] for row in rows]
        labels = label_matrix(names, [column.findings[row] for row in rows])
        parts[part] = Part(names, labels, column.table.select(rows)["image"])
    return parts


class Columns:
    """The names, findings and patients of one split, row by row."""

    def __init__(self, table: Any, name: str, split: str) -> None:
        import datasets

        self.table = table
        self._complaint = (
            f"{name}, split {split}, has the columns "
            f"{', '.join(f'{key} ({type(kind).__name__})' for key, kind in table.features.items())}"
            ": it needs image (Image), one of label, labels or 'Finding Labels' (names in a list "
            "or joined by |, or ClassLabel), and 'Patient ID' or patient_id or else names such as "
            "00000061_012.png in 'Image Index' or as the images' file names"
        )
        if not isinstance(table.features.get("image"), datasets.Image):
            raise SystemExit(self._complaint)
        self.names = self._read_names(split)
        self.findings = self._read_findings()
        self.patients = self._read_patients()

    def _first(self, *names: str) -> str | None:
        return next((name for name in names if name in self.table.features), None)

    def _read_names(self, split: str) -> list[str]:
        if self._first("Image Index"):
            return self.table["Image Index"][:]
        import pyarrow.compute

        # Only the stored path: reading the column from the data set would read the images.
        paths = pyarrow.compute.struct_field(self.table.data.column("image"), "path").to_pylist()
        return [Path(path).name if path else f"{split} {row}" for row, path in enumerate(paths)]

    def _read_findings(self) -> list[list[str]]:
        import datasets

        key = self._first("label", "labels", "Finding Labels")
        kind = self.table.features[key] if key else None
        inner = getattr(kind, "feature", kind)  # of a list
        to_text: Callable[[Any], str] = str
        if isinstance(inner, datasets.ClassLabel):
            to_text = inner.int2str
        elif getattr(inner, "dtype", "") not in ("string", "large_string"):
            raise SystemExit(self._complaint)  # numbers without names could be any finding
        values = self.table[key][:]
        rows = [value if isinstance(value, list) else [value] for value in values]
        return [[one for value in row for one in to_text(value).split("|")] for row in rows]

    def _read_patients(self) -> list[str]:
        key = self._first("Patient ID", "patient_id")
        if key:
            patients = self.table[key][:]
        else:
            found = [NAME.fullmatch(name) for name in self.names]
            patients = [int(match[1]) if match else None for match in found]
        if None in patients:
            raise SystemExit(self._complaint)
        return [str(patient) for patient in patients]


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


class Radiographs(Dataset):
    """Grey images, uint8 (1, size, size) of a square of ``side`` pixels, with their 14 labels."""

    def __init__(self, part: Part, size: int, side: int, *, train: bool) -> None:
        self.part, self.side = part, side
        self.transform = v2.Compose([v2.CenterCrop(size), v2.RandomHorizontalFlip(0.5 * train)])

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        square = grey_square(self.part.images[index], self.side)
        return self.transform(square), self.part.labels[index]


def in_memory(parts: dict[str, Part], size: int) -> Images:
    """Returns all parts as ``Images``, centre-cropped and read once, for a small release."""
    read = {}
    for name, part in parts.items():
        radiographs = Radiographs(part, size, resized_side(size), train=False)
        read[name] = torch.stack([image for image, _ in radiographs]), part.labels
    return Images("chest", "multilabel", FINDINGS, read)


class Standardised:
    """Turns uint8 (N, 1, H, W) into floats (N, 3, H, W) for ImageNet networks, on a device.

    On the device, because grey bytes are a twelfth of the data that workers would have to transfer.
    """

    def __init__(self, device: torch.device) -> None:
        self._mean, self._std = (torch.tensor(x, device=device).view(3, 1, 1) for x in (MEAN, STD))

    def __call__(self, grey: Tensor) -> Tensor:
        return (grey / 255 - self._mean) / self._std


def images_per_second(loader: DataLoader, batches: int) -> float:
    """Measures the speed of the loader alone, including the start of its workers."""
    began, count = time.perf_counter(), 0
    for _, (images, _labels) in zip(range(batches), loader, strict=False):
        count += len(images)
    return count / (time.perf_counter() - began)


# -- the cache -------------------------------------------------------------------------------------


class Squares(Sequence[np.ndarray]):
    """Grey squares in a file that each process maps itself; a pickled map would be a full copy."""

    def __init__(self, path: Path, holds: Mapping[str, Any]) -> None:
        self.path, self.holds = path, holds

    @cached_property
    def _array(self) -> np.ndarray:
        array = np.load(self.path, mmap_mode="r")
        # After the map, which keeps the file: a run that writes it again first deletes the note.
        if described(self.path) != self.holds:
            raise RuntimeError(
                f"another run has written {self.path} again, for other images: runs at the same "
                "time with other seeds or sizes need a --cache each"
            )
        return array

    def __len__(self) -> int:
        return self.holds["images"]

    def __getitem__(self, index: int) -> np.ndarray:  # type: ignore[override]
        return self._array[index]

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "holds": self.holds}


def described(path: Path) -> dict[str, Any]:
    """Returns what the note next to a cache says of it; empty without one."""
    note = path.with_suffix(".json")
    return json.loads(note.read_text()) if path.exists() and note.exists() else {}


def cached(part: Part, path: Path, source: str, side: int, workers: int) -> Part:
    """Returns the part with its images from ``path``, written first if it does not match.

    A ``.json`` next to it describes the content. Images that changed under the same name and source
    are not detected: delete the cache after such a change.
    """
    note = path.with_suffix(".json")
    names = hashlib.sha256("\n".join(part.names).encode()).hexdigest()
    holds = {"source": source, "images": len(part), "names_sha256": names, "side": side}
    before = described(path)
    if before != holds:
        if path.exists():
            now = ", ".join(
                f"{key} {before.get(key)}, not {value}"
                for key, value in holds.items()
                if before.get(key) != value
            )
            print(f"{path} is stale ({now}): writing it again")
        note.unlink(missing_ok=True)  # first, so that it never describes other images
        write_squares(Radiographs(part, side, side, train=False), path, workers)
        write_json(note, holds)
    return replace(part, images=Squares(path, holds))


def write_squares(squares: Radiographs, path: Path, workers: int) -> None:
    """Decodes and resizes every image once, into a file that is written atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=".draft-")
    try:
        # Written, not mapped: on a full disk, a map ends the process without an error message.
        with os.fdopen(handle, "wb") as file:
            shape = (len(squares), squares.side, squares.side)
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for images, _ in tqdm(
                DataLoader(squares, batch_size=64, num_workers=workers), desc=f"writing {path}"
            ):
                file.write(images.numpy().tobytes())
        os.chmod(draft, 0o644)  # temporary files are for their owner alone
        os.replace(draft, path)
    finally:
        Path(draft).unlink(missing_ok=True)
