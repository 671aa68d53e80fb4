"""ChestX-ray14: its sources agree, and the cache holds the same pixels."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from inmerge_wrap.errors import ArgumentError, for_command_line
from inmerge_wrap.images import nih

datasets = pytest.importorskip("datasets")

LABELS = ["No Finding", "Mass|Edema", "Hernia", "Effusion"]


def picture(seed: int, width: int = 60, height: int = 60, mode: str = "L") -> Image.Image:
    channels = len(mode)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(), mode=None)


def row(patient: int, **other: Any) -> dict[str, Any]:
    """What every form of the data must say of a patient's one image."""
    name = f"{patient:08d}_000.png"
    return {
        "image": picture(patient),
        "label": LABELS[patient % 4].split("|"),
        "name": name,
    } | other


# -- pixels ----------------------------------------------------------------------------------------


@pytest.fixture
def part(tmp_path: Path) -> Any:
    """Square, wide, high and RGBA files, larger and smaller than what is made of them."""
    pictures = [
        picture(0, 80, 80),
        picture(1, 91, 60),
        picture(2, 60, 95),
        picture(3, 80, 80, "RGBA"),
        picture(4, 20, 20),
    ]
    paths = [tmp_path / f"{number}.png" for number in range(len(pictures))]
    for image, path in zip(pictures, paths, strict=True):
        image.save(path)
    return nih.Part([path.name for path in paths], torch.eye(5, 14), paths)


def test_pixels_are_those_of_torchvisions_transforms(part: Any) -> None:
    direct = v2.Compose(
        [
            *(v2.Resize(64), v2.CenterCrop(56), v2.RandomHorizontalFlip(), v2.PILToTensor()),
        ]
    )
    ours = nih.Radiographs(part, 56, train=True)
    square = [0, 3, 4]
    torch.manual_seed(0)
    pixels = torch.stack([ours[index][0] for index in square])
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 1, 56, 56)
    torch.manual_seed(0)
    expected = [direct(Image.open(part.images[i]).convert("L")) for i in square]
    assert torch.equal(pixels, torch.stack(expected))


def test_of_a_wide_image_the_middle_is_kept() -> None:
    pixels = np.zeros((40, 80), dtype=np.uint8)
    pixels[:, 20:60] = 200
    assert (nih.grey_square(Image.fromarray(pixels), 40) == 200).all()
    assert (nih.grey_square(Image.fromarray(pixels.T.copy()), 40) == 200).all()


@pytest.mark.parametrize("train", [True, False])
def test_the_cache_gives_the_same_pixels(part: Any, tmp_path: Path, train: bool) -> None:
    cached = nih.cached(part, tmp_path / "cache" / "train.npy", "here", 56)
    seen = []
    for source in (part, cached):
        torch.manual_seed(0)
        images = nih.Radiographs(source, 56, train=train)
        seen.append([images[index] for index in range(len(part))])
    for (direct, label), (read, same) in zip(*seen, strict=True):
        assert torch.equal(direct, read) and torch.equal(label, same)
    read.fill_(0)  # a view of the file, which is mapped for reading, could not be written to
    copied = pickle.dumps(cached.images)
    assert len(copied) < 1000 and np.array_equal(pickle.loads(copied)[3], cached.images[3])


def test_other_images_have_another_cache(part: Any, tmp_path: Path) -> None:
    """Two runs with other seeds or sizes share a folder."""
    path = tmp_path / "cache" / "train.npy"
    first = nih.cached(part, path, "here", 56)
    before = [(file, file.stat().st_mtime_ns) for file in path.parent.iterdir()]
    nih.cached(part, path, "here", 56)
    assert [(file, file.stat().st_mtime_ns) for file in path.parent.iterdir()] == before
    others = nih.Part(part.names[::-1], part.labels, part.images[::-1])
    for changed, source, size in [(part, "there", 56), (part, "here", 28), (others, "here", 56)]:
        read = nih.cached(changed, path, source, size)
        side = size * 8 // 7
        assert np.array_equal(read.images[0], nih.grey_square(changed.images[0], side)[0])
    assert len(list(path.parent.iterdir())) == 4
    assert np.array_equal(first.images[0], nih.grey_square(part.images[0], 64)[0])


def test_a_cache_is_written_atomically(part: Any, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    part.images[4].write_bytes(b"broken")
    with pytest.raises(OSError):
        nih.cached(part, folder / "train.npy", "here", 56)
    assert list(folder.iterdir()) == []


# -- a data set of Hugging Face --------------------------------------------------------------------


def write_parquet(folder: Path, splits: dict[str, Any]) -> str:
    folder.mkdir()
    for name, rows in splits.items():
        table = rows if isinstance(rows, datasets.Dataset) else datasets.Dataset.from_list(rows)
        table.to_parquet(folder / f"{name}-00000-of-00001.parquet")
    return str(folder)


def load(folder: str, cache: Path) -> Any:
    return datasets.load_dataset(folder, cache_dir=str(cache / "hf"))


def write_image_folder(folder: Path, splits: dict[str, list[dict[str, Any]]]) -> str:
    for name, rows in splits.items():
        (folder / name).mkdir(parents=True)
        lines = ["file_name,Finding Labels"]
        for entry in rows:
            entry["image"].save(folder / name / entry["name"])
            lines.append(f"{entry['name']},{'|'.join(entry['label'])}")
        (folder / name / "metadata.csv").write_text("\n".join(lines))
    return str(folder)


def as_class_labels(rows: list[dict[str, Any]]) -> Any:
    known = datasets.ClassLabel(names=["No Finding", "Hernia", "Edema", "Mass", "Effusion"])
    features = {
        "image": datasets.Image(),
        "labels": datasets.List(known),
        "patient_id": datasets.Value("int64"),
    }
    entries = [
        {"image": r["image"], "labels": r["label"], "patient_id": int(r["name"][:8])} for r in rows
    ]
    return datasets.Dataset.from_list(entries, features=datasets.Features(features))


FORMS = {
    "lists": lambda rows: [
        {"image": r["image"], "label": r["label"], "Patient ID": int(r["name"][:8])} for r in rows
    ],
    "joined": lambda rows: [
        {"image": r["image"], "label": "|".join(r["label"]), "Image Index": r["name"]} for r in rows
    ],
    "class labels": as_class_labels,
}


@pytest.mark.filterwarnings("ignore:unclosed file .*metadata.csv:ResourceWarning")  # of datasets
@pytest.mark.parametrize("form", [*FORMS, "image folder"])
def test_every_form_says_the_same(tmp_path: Path, form: str) -> None:
    splits = {"train": [row(p) for p in range(1, 31)], "test": [row(p) for p in range(31, 35)]}
    if form == "image folder":
        name = write_image_folder(tmp_path / "set", splits)
    else:
        name = write_parquet(tmp_path / "set", {k: FORMS[form](v) for k, v in splits.items()})
    parts = nih.read_dataset(load(name, tmp_path), seed=0)
    drawn = [hashlib.sha256(f"0:{p}".encode()).digest()[0] < 0.1 * 256 for p in range(1, 31)]
    rows = {"train": [], "val": [], "test": range(30, 34)}
    for index, is_val in enumerate(drawn):
        rows["val" if is_val else "train"].append(index)
    assert 1 <= len(rows["val"]) <= 6
    for part, expected in rows.items():
        found = [[LABELS[(index + 1) % 4].split("|")] for index in expected]
        assert torch.equal(parts[part].labels, nih.label_matrix(found, [x for (x,) in found]))
        for place, index in enumerate(expected):
            seen = nih.grey_square(parts[part].images[place], 60)[0]
            assert np.array_equal(seen, np.asarray(picture(index + 1)))


def test_a_given_validation_split_is_used(tmp_path: Path) -> None:
    splits = {"train": range(1, 9), "validation": range(9, 12), "test": range(12, 14)}
    made = {k: FORMS["lists"]([row(p) for p in v]) for k, v in splits.items()}
    parts = nih.read_dataset(load(write_parquet(tmp_path / "set", made), tmp_path), seed=0)
    assert {name: len(part) for name, part in parts.items()} == {"train": 8, "val": 3, "test": 2}


@pytest.mark.parametrize(
    "drop,change,message",
    [
        ("image", {}, r"split train has the columns label \(List\), Patient ID \(Value\)"),
        ("label", {}, "it needs image .* one of label, labels or 'Finding Labels'"),
        ("Patient ID", {}, "and 'Patient ID' or patient_id or else names such as"),
        ("", {"Patient ID": None}, "and 'Patient ID' or patient_id or else names such as"),
        ("", {"label": [1, 0]}, "names in a list or joined"),
        ("", {"label": ["Cough"]}, r"train 0 has the unknown findings \['Cough'\]"),
    ],
)
def test_what_is_missing_is_said_in_one_line(
    tmp_path: Path, drop: str, change: dict[str, Any], message: str
) -> None:
    splits = {}
    for split, patients in (("train", range(1, 31)), ("test", range(31, 33))):
        rows = [entry | change for entry in FORMS["lists"]([row(p) for p in patients])]
        splits[split] = [{k: v for k, v in entry.items() if k != drop} for entry in rows]
    with pytest.raises(ValueError, match=message) as stop:
        nih.read_dataset(load(write_parquet(tmp_path / "set", splits), tmp_path), seed=0)
    assert "\n" not in str(stop.value)


def test_a_missing_split_is_named(tmp_path: Path) -> None:
    lists = FORMS["lists"]([row(p) for p in range(1, 5)])
    with pytest.raises(ValueError, match=r"has the splits \['test'\]: \['train'\] is missing"):
        nih.read_dataset(load(write_parquet(tmp_path / "one", {"test": lists}), tmp_path), seed=0)


@pytest.mark.parametrize("part", ["validation", "test"])
def test_a_patient_in_two_splits_is_refused(tmp_path: Path, part: str) -> None:
    splits = {"train": range(1, 9), "validation": range(9, 12), "test": range(12, 14)}
    splits[part] = range(8, 9 + len(splits[part]))
    made = {k: FORMS["lists"]([row(p) for p in v]) for k, v in splits.items()}
    with pytest.raises(ValueError, match=r"patients \['8'\] are in both train"):
        nih.read_dataset(load(write_parquet(tmp_path / "set", made), tmp_path), seed=0)


@pytest.mark.parametrize("revision", [None, "main", "0123456789ab"])
def test_a_hub_name_needs_a_commit(revision: str | None) -> None:
    with pytest.raises(ArgumentError, match="can change: pass revision=COMMIT") as stop:
        nih.read_hub("owner/name", revision, seed=0)
    assert "pass --revision COMMIT" in for_command_line(stop.value)


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^revision is for a data set of the hub"):
        nih.read_hub(str(tmp_path), 40 * "0", seed=0)


def test_what_cannot_be_loaded_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be loaded: ") as stop:
        nih.read_hub(str(tmp_path), None, seed=0)
    assert "\n" not in str(stop.value)
