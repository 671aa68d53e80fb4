"""A data set of image files: found, checked, split without leaks, and read.

    DIR/train|val|test/CLASS/...    parts as they are; a part that is missing is split off train
    DIR/CLASS/...                   split by us
    a CSV file                      path, label (or several labels), and if wanted group and part

`open_images` does all of it in order: `find_images`, `examine_all`, `without_broken`, `split`,
`check`. What is wrong is a `DataError` that names the files; what is only suspicious becomes a
warning. `ImageSet` is the data set of one part, for a DataLoader:

- an item is ``(pixels, label)``: uint8 (C, S, S) and a class index, or float32 (labels,) of 0, 1
  and NaN for unknown; in a fixed order;
- pixels are not normalised: divided by 255 they are what corruptions act on.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from inmerge_wrap.files import replacing, write_json
from inmerge_wrap.images.collection import (
    PARTS,
    ImageCollection,
    ImageFile,
    check,
    counted,
    named,
    split,
)
from inmerge_wrap.images.files import DataError, Facts, examine, is_image, range_of
from inmerge_wrap.images.preparation import Preparation

_PART_LIKE = {"training": "train", "valid": "val", "validation": "val", "dev": "val"}
_PART_LIKE |= {"testing": "test"}


# -- finding ---------------------------------------------------------------------------------------


def find_images(
    directory: Path,
    *,
    table: Path | None = None,
    labels: Sequence[str] = ("label",),
    path_column: str = "path",
    groups: str | None = None,
) -> ImageCollection:
    """Lists the images of a directory, or those that a CSV file names.

    Args:
        directory: Holds the class folders, or what the paths of the table are relative to.
        table: CSV file with a header. A column ``part`` (train, val, test), if there is one, is
            obeyed.
        labels: Its column of class names; or several columns of 0, 1 and nothing for unknown,
            which make a multi-label task.
        path_column: Its column of paths.
        groups: A column of the table, or a regular expression that is searched for in the image's
            name (path below the directory); its first group, or all of it, is whose image it is.

    Raises:
        DataError: If there is nothing to train on, a class is empty or the table is malformed.
    """
    if not directory.is_dir():
        raise DataError(f"--data-dir {directory} is no folder")
    if table is None:
        found = _from_folders(directory)
    else:
        found = _from_table(table, directory, list(labels), path_column, groups)
        if groups in _columns(table):
            groups = None  # read with the table
    return found if groups is None else _grouped_by_name(found, groups)


def _from_folders(directory: Path) -> ImageCollection:
    folders = _folders(directory)
    names = {folder.name for folder in folders}
    for folder in folders:
        meant = _PART_LIKE.get(folder.name.lower(), folder.name.lower())
        if meant in PARTS and folder.name != meant and (names & set(PARTS)):
            raise DataError(f"{folder} looks like a part: name it {meant}")
    in_parts = "train" in names
    if not in_parts and names & set(PARTS):
        raise DataError(f"{directory} has {' and '.join(sorted(names & set(PARTS)))} but no train")
    if in_parts and names - set(PARTS):
        others = named(sorted(names - set(PARTS)))
        raise DataError(f"{directory} has train and also {others}: is that a part, or a class?")
    roots = [(folder.name, folder) for folder in folders] if in_parts else [(None, directory)]
    files: list[tuple[str | None, str, Path]] = []
    ignored: list[str] = []
    empty: list[str] = []
    for part, root in roots:
        ignored += [str(path.relative_to(directory)) for path in _files(root) if is_image(path)]
        for folder in _folders(root):
            images = []
            for path in sorted(folder.rglob("*")):
                inside = path.relative_to(folder).parts
                if path.is_dir() or any(_hidden(name) for name in inside):
                    continue
                if is_image(path):
                    images.append((part, folder.name, path))
                else:
                    ignored.append(path.relative_to(directory).as_posix())
            if not images:
                empty.append(folder.relative_to(directory).as_posix())
            files += images
    if not files:
        raise DataError(
            f"{directory} holds no images in class folders: DIR/CLASS/image.png, or "
            "DIR/train/CLASS/image.png, or --csv FILE"
        )
    if empty:
        raise DataError(
            f"no image in {counted(len(empty), 'class folder')}: {named(empty)}; "
            "add images or remove the folder"
        )
    classes = tuple(sorted({name for _, name, _ in files}, key=_natural))
    index = {name: number for number, name in enumerate(classes)}
    collection = ImageCollection(
        classes,
        "multiclass",
        tuple(
            ImageFile(path, path.relative_to(directory).as_posix(), index[name], part=part)
            for part, name, path in files
        ),
    )
    if ignored:
        what = counted(len(ignored), "file")
        collection = collection.noted(f"{what} ignored, not images in a class: {named(ignored)}.")
    return collection


def _folders(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.is_dir() and not _hidden(path.name))


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.is_file() and not _hidden(path.name))


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db", "desktop.ini")


def _natural(name: str) -> tuple[Any, ...]:
    """Sorts 2 before 10, and numbers before words."""
    return (0, int(name), name) if name.isdigit() else (1, 0, name)


def _columns(table: Path) -> list[str]:
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            return next(csv.reader(file), [])
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--csv {table} cannot be read: {error}") from error


def _from_table(
    table: Path, directory: Path, labels: list[str], path_column: str, groups: str | None
) -> ImageCollection:
    columns = _columns(table)
    options = {path_column: "--path-column"} | dict.fromkeys(labels, "--labels")
    for wanted, option in options.items():
        if wanted not in columns:
            raise DataError(
                f"{table} has no column {wanted!r}: name it with {option}; "
                f"it has {named(columns, 20) or 'none'}"
            )
    with open(table, newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise DataError(f"{table} has a header and no rows")
    group_column = groups if groups in columns else None
    seen: dict[str, int] = {}
    for number, row in enumerate(rows, start=2):
        path = (row[path_column] or "").strip()
        if not path:
            raise DataError(f"{table}, row {number}: no path")
        if path in seen:
            raise DataError(f"{table}, row {number}: {path} was named in row {seen[path]} already")
        seen[path] = number
        part = (row.get("part") or "").strip()
        if part and part not in PARTS:
            raise DataError(f"{table}, row {number}: part is {part!r}; give train, val or test")
        if len(labels) == 1 and not (row[labels[0]] or "").strip():
            raise DataError(f"{table}, row {number}: {path} has no {labels[0]}")
    several = len(labels) > 1
    if several:
        classes = tuple(labels)
    else:
        classes = tuple(sorted({row[labels[0]].strip() for row in rows}, key=_natural))
    index = {name: number for number, name in enumerate(classes)}
    images = []
    for number, row in enumerate(rows, start=2):
        path = Path(row[path_column].strip())
        label: int | tuple[float, ...]
        if several:
            label = tuple(_mark(table, number, name, row[name]) for name in labels)
        else:
            label = index[row[labels[0]].strip()]
        group = (row[group_column] or "").strip() if group_column else ""
        place = directory / path
        name = path.as_posix() if not path.is_absolute() else _below(path, directory)
        part = (row.get("part") or "").strip()
        images.append(ImageFile(place, name, label, group or None, part or None))
    collection = ImageCollection(classes, "multilabel" if several else "multiclass", tuple(images))
    alone = sum(image.group is None for image in images) if group_column else 0
    if alone:
        collection = collection.noted(
            f"{counted(alone, 'image')} without a {group_column}, each taken as a group of its own."
        )
    return collection


def _mark(table: Path, row: int, column: str, text: str | None) -> float:
    value = (text or "").strip().lower()
    if value in ("", "nan", "na"):
        return float("nan")
    if value in ("0", "0.0", "1", "1.0"):
        return float(value)
    raise DataError(
        f"{table}, row {row}: {column} is {text!r}; of several labels each is 0, 1 or empty"
    )


def _below(path: Path, directory: Path) -> str:
    try:
        return path.relative_to(directory.resolve()).as_posix()
    except ValueError:
        return path.as_posix()


def _grouped_by_name(collection: ImageCollection, pattern: str) -> ImageCollection:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise DataError(
            f"--groups {pattern!r} is no column and no regular expression ({error})"
        ) from error
    images, unmatched = [], []
    for image in collection.images:
        match = expression.search(image.name)
        if match is None:
            unmatched.append(image.name)
            continue
        images.append(replace(image, group=match[1] if expression.groups else match[0]))
    if unmatched:
        raise DataError(
            f"--groups {pattern!r} is no column of a table, and as a pattern it is not found in "
            f"{counted(len(unmatched), 'name')}: {named(unmatched)}"
        )
    return replace(collection, images=tuple(images))


# -- examining -------------------------------------------------------------------------------------


class _Examined(Dataset):
    def __init__(self, images: Sequence[ImageFile]) -> None:
        self.paths = [image.path for image in images]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Facts | str:
        try:
            return examine(self.paths[index])
        except DataError as error:  # a worker's traceback would bury the message
            return str(error)


def examine_all(
    collection: ImageCollection, *, workers: int = 0, memory: Path | None = None
) -> list[Facts]:
    """Reads every file once, with a progress bar.

    Args:
        collection: The images.
        workers: Processes that read; 0 for this one.
        memory: JSON file in which what was found is kept; files that have not changed since are
            not read again.

    Raises:
        DataError: If a package is missing.
    """
    known: dict[str, Any] = {}
    if memory is not None and memory.exists():
        known = json.loads(memory.read_text())
    stamps = {str(image.path): _stamp(image.path) for image in collection.images}
    unchanged = {
        path for path, stamp in stamps.items() if path in known and known[path]["stamp"] == stamp
    }
    fresh = [image for image in collection.images if str(image.path) not in unchanged]
    loader = DataLoader(_Examined(fresh), batch_size=None, num_workers=workers)
    bar = tqdm(loader, desc="checking images", unit="image", disable=not fresh)
    for image, facts in zip(fresh, bar, strict=True):
        if isinstance(facts, str):
            raise DataError(facts)
        known[str(image.path)] = {"stamp": stamps[str(image.path)], "facts": asdict(facts)}
    if memory is not None and fresh:
        write_json(memory, {path: known[path] for path in stamps})
    return [Facts(**known[str(image.path)]["facts"]) for image in collection.images]


def _stamp(path: Path) -> list[int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def without_broken(
    collection: ImageCollection, facts: Sequence[Facts], *, skip: bool
) -> tuple[ImageCollection, list[Facts]]:
    """The images that can be read, with their digests, and what is known of them.

    Raises:
        DataError: If there are broken ones that are not to be skipped; or a class has no others.
    """
    broken = [
        (image, entry.error)
        for image, entry in zip(collection.images, facts, strict=True)
        if entry.error is not None
    ]
    images = tuple(
        replace(image, digest=entry.digest)
        for image, entry in zip(collection.images, facts, strict=True)
    )
    collection = replace(collection, images=images)
    if not broken:
        return collection, list(facts)
    shown = "\n".join(f"  {image.name}: {error}" for image, error in broken[:10])
    more = f"\n  and {len(broken) - 10:,} more" if len(broken) > 10 else ""
    title = f"{len(broken):,} of {counted(len(facts), 'image')} cannot be read"
    if not skip:
        raise DataError(
            f"{title}:\n{shown}{more}\nMend or remove them, or leave them out with --skip-broken"
        )
    kept = [
        (image, entry)
        for image, entry in zip(collection.images, facts, strict=True)
        if entry.error is None
    ]
    left = replace(collection, images=tuple(image for image, _ in kept))
    counts = left.counts(left.images)
    gone = [name for name, count in zip(left.classes, counts, strict=True) if not count]
    if gone:
        raise DataError(f"{title}, and so no image is left of {named(gone)}:\n{shown}{more}")
    note = f"{title} and were left out: {named([image.name for image, _ in broken])}."
    return left.warned(note), [entry for _, entry in kept]


# -- reading ---------------------------------------------------------------------------------------


class ImageSet(Dataset):
    """The images of one part, in order. See the top of this file for what an item is."""

    def __init__(
        self,
        images: Sequence[ImageFile],
        preparation: Preparation,
        *,
        pixels: np.ndarray | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Takes the images.

        Args:
            images: Of one collection.
            preparation: Makes pixels of a file.
            pixels: The same pixels (N, C, S, S), read before; see `keep_pixels`.
            transform: Applied to the uint8 pixels of an item, such as an augmentation.
        """
        self.images, self.preparation = images, preparation
        self.pixels, self.transform = pixels, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if self.pixels is None:
            pixels = self.preparation(self.images[index].path)
        else:
            pixels = torch.from_numpy(np.array(self.pixels[index]))
        if self.transform is not None:
            pixels = self.transform(pixels)
        return pixels, torch.tensor(self.images[index].label)

    @property
    def labels(self) -> Tensor:
        """Class indices (N,), or 0, 1 and NaN (N, labels)."""
        return torch.tensor([image.label for image in self.images])

    def with_transform(self, transform: Callable[[Tensor], Tensor]) -> ImageSet:
        """The same images, augmented."""
        return ImageSet(self.images, self.preparation, pixels=self.pixels, transform=transform)


def keep_pixels(images: ImageSet, path: Path, *, workers: int = 0) -> ImageSet:
    """The same set, its pixels decoded once into a file that all processes map into memory.

    An existing file is used as it is: its name must be of these images and this preparation.

    Raises:
        DataError: If the disk has no room for it.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (len(images), images.preparation.channels, *[images.preparation.size] * 2)
        needed, free = int(np.prod(shape)), shutil.disk_usage(path.parent).free
        if needed > 0.9 * free:
            raise DataError(
                f"the decoded images take {needed / 1e9:.1f} GB in {path.parent} and "
                f"{free / 1e9:.1f} GB are free: pass --no-cache to decode them in every epoch"
            )
        loader = DataLoader(images, batch_size=None, num_workers=workers)
        with replacing(path) as draft:
            pixels = np.lib.format.open_memmap(draft, mode="w+", dtype=np.uint8, shape=shape)
            bar = tqdm(loader, desc=f"reading {path.stem}", unit="image")
            for index, (one, _) in enumerate(bar):
                pixels[index] = one.numpy()
            pixels.flush()
            del pixels
    return ImageSet(
        images.images,
        images.preparation,
        pixels=np.load(path, mmap_mode="r"),
        transform=images.transform,
    )


# -- all of it -------------------------------------------------------------------------------------


def open_images(
    directory: Path,
    *,
    size: int,
    channels: int | None = None,
    crop_mode: str = "squash",
    pixel_range: tuple[float, float] | None = None,
    table: Path | None = None,
    labels: Sequence[str] = ("label",),
    path_column: str = "path",
    groups: str | None = None,
    shares: Mapping[str, float] | None = None,
    seed: int = 0,
    skip_broken: bool = False,
    allow_overlap: bool = False,
    workers: int = 0,
    memory: Path | None = None,
) -> tuple[ImageCollection, Preparation]:
    """Finds, checks and splits the images, and settles how they are read.

    Args:
        directory: See `find_images`, as for the table, its columns and the groups.
        size: Side in pixels that the network takes.
        channels: 1 or 3; if None, 3 as soon as one image shows colours.
        crop_mode: See `Preparation`.
        pixel_range: Values that become black and white; found by `range_of` if None.
        table: CSV file.
        labels: Its columns.
        path_column: Its column of paths.
        groups: A column, or a pattern of the name.
        shares: Of train, val and test where they are split; see `split`.
        seed: Of the split.
        skip_broken: Leave out files that cannot be read.
        allow_overlap: Train although images or groups stand in several parts.
        workers: Processes that read.
        memory: JSON file for what was found in the files.

    Raises:
        DataError: With the names, if something is wrong.
    """
    collection = find_images(
        directory, table=table, labels=labels, path_column=path_column, groups=groups
    )
    facts = examine_all(collection, workers=workers, memory=memory)
    collection, facts = without_broken(collection, facts, skip=skip_broken)
    preparation = prepare(facts, size, channels, crop_mode, pixel_range)
    collection = split(collection, shares=shares, seed=seed)
    collection = check(collection, allow_overlap=allow_overlap)
    return collection.warned(*_suspicious(facts)), preparation


def _suspicious(facts: Sequence[Facts]) -> list[str]:
    warnings = []
    unwindowed = sum(entry.kind == "unwindowed" for entry in facts)
    if unwindowed:
        warnings.append(
            f"{counted(unwindowed, 'DICOM file')} without a window: all of the values that the "
            "bits can hold are shown, unless --pixel-range gives others."
        )
    shapes = [(entry.width, entry.height) for entry in facts]
    long = sum(max(shape) > 1.5 * min(shape) for shape in shapes)
    if long:
        warnings.append(
            f"{counted(long, 'image')} with one side more than half as long again as the other: "
            "--crop-mode squash changes their proportions, center cuts off their ends."
        )
    return warnings


def prepare(
    facts: Sequence[Facts],
    size: int,
    channels: int | None = None,
    crop_mode: str = "squash",
    pixel_range: tuple[float, float] | None = None,
) -> Preparation:
    """How files with these facts are read.

    Raises:
        DataError: If it cannot be guessed, or a setting is out of range.
    """
    if pixel_range is not None and all(entry.kind == "bytes" for entry in facts):
        raise DataError("--pixel-range would do nothing: all images are of 8 bits")
    colour = any(entry.colour for entry in facts)
    return Preparation(
        size=size,
        channels=channels or (3 if colour else 1),
        crop_mode=crop_mode,
        pixel_range=range_of(list(facts), pixel_range),
        override_windows=pixel_range is not None,
    )


def read_part(
    directory: Path,
    part: str,
    *,
    size: int,
    preparation: Preparation | None = None,
    classes: Sequence[str] | None = None,
) -> tuple[Tensor, Tensor, ImageCollection]:
    """One part of images that are split already, whole in memory, for an evaluation.

    Args:
        directory: A folder ``DIR/part/CLASS/...``, a folder ``DIR/CLASS/...`` that is taken whole,
            or the ``split.csv`` that a training wrote.
        part: train, val or test.
        size: Side in pixels, where no preparation is given.
        preparation: As the network was trained with; guessed from these files if None.
        classes: Names in the order of the network's outputs; those found, sorted, if None.

    Returns:
        Pixels uint8 (N, C, S, S), labels, and the collection of this part.

    Raises:
        DataError: If there is no such part, a class is not among ``classes``, or a file is broken.
    """
    if directory.is_file():
        columns = [name for name in _columns(directory) if name not in ("path", "group", "part")]
        collection = find_images(directory.parent, table=directory, labels=columns)
    else:
        parts = [name for name in PARTS if (directory / name).is_dir()]
        if parts and part not in parts:
            raise DataError(f"{directory} has {' and '.join(parts)} but no {part}")
        alone = parts and "train" not in parts
        collection = find_images(directory / part if alone else directory)
    if any(image.part is not None for image in collection.images):
        collection = replace(collection, images=collection.part(part))
    if not collection.images:
        raise DataError(f"{directory} has no part {part}")
    if classes is not None:
        collection = _in_order(collection, classes)
    facts = examine_all(collection)
    collection, facts = without_broken(collection, facts, skip=False)
    images = ImageSet(collection.images, preparation or prepare(facts, size))
    pixels = torch.stack([images[index][0] for index in range(len(images))])
    return pixels, images.labels, collection


def _in_order(collection: ImageCollection, classes: Sequence[str]) -> ImageCollection:
    """The same images, labelled by the places of their classes among others."""
    foreign = [name for name in collection.classes if name not in classes]
    if foreign:
        raise DataError(
            f"no class of the model: {named(foreign)}; its classes are {', '.join(classes)}"
        )
    if collection.task == "multilabel":
        if tuple(classes) != collection.classes:
            raise DataError(
                f"the labels are {', '.join(collection.classes)} and those of the model are "
                f"{', '.join(classes)}: bring the columns into its order"
            )
        return collection
    places = [classes.index(name) for name in collection.classes]
    images = tuple(
        replace(image, label=places[image.label])
        for image in collection.images
        if isinstance(image.label, int)
    )
    return replace(collection, classes=tuple(classes), images=images)


def write_split(collection: ImageCollection, path: Path) -> None:
    """The images with labels, groups and parts, as a table that ``--csv`` and `read_part` take."""
    several = collection.task == "multilabel"
    names = list(collection.classes) if several else ["label"]
    with replacing(path) as draft, open(draft, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", *names, "group", "part"])
        for image in collection.images:
            marks: list[str]
            if isinstance(image.label, int):
                marks = [collection.classes[image.label]]
            else:
                marks = ["" if value != value else f"{value:.0f}" for value in image.label]
            writer.writerow([image.path.resolve(), *marks, image.group or "", image.part])
