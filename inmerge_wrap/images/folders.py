"""A data set of image files: found, checked, split without leaks, and read.

    DIR/train|val|test/CLASS/...    parts as they are; a part that is missing is split off train
    DIR/CLASS/...                   split by us
    a CSV file                      path, label (or several labels), and if wanted group and part

`open_images` does all of it in order. What is wrong is a `DataError` that names the files; what is
only suspicious becomes a warning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from inmerge_wrap.images.collection import ImageCollection, check, counted, named, split
from inmerge_wrap.images.files import DataError, Facts, range_of
from inmerge_wrap.images.finding import find_images, listed, parts_in
from inmerge_wrap.images.preparation import Preparation
from inmerge_wrap.images.sets import ImageSet, examine_all, without_broken
from inmerge_wrap.images.tables import read_table, write_table


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
    site: tuple[str, str] | None = None,
    subgroups: Sequence[str] = (),
    shares: Mapping[str, float] | None = None,
    seed: int = 0,
    skip_broken: bool = False,
    allow_overlap: bool = False,
    workers: int = 0,
    memory: Path | None = None,
) -> tuple[ImageCollection, Preparation, dict[Path, Facts]]:
    """Finds, checks and splits the images, and settles how they are read.

    Args:
        directory: See `find_images`.
        size: Side in pixels that the network takes.
        channels: 1 or 3; if None, 3 as soon as one image shows colours.
        crop_mode: See `Preparation`.
        pixel_range: Values that become black and white; found by `range_of` if None.
        table, labels, path_column, groups: See `find_images`.
        site: A column or pattern, and the site whose images are the test part.
        subgroups: Columns or patterns by which results are reported.
        shares: Of train, val and test where they are split; see `split`.
        seed: Of the split.
        skip_broken: Leave out files that cannot be read.
        allow_overlap: Train although images or groups stand in several parts.
        workers: Processes that read.
        memory: JSON file for what was found in the files.

    Returns:
        The images with their parts, how they are read, and what was found in each file.

    Raises:
        DataError: With the names, if something is wrong.
    """
    marks = [*([site[0]] if site else []), *subgroups]
    collection = find_images(
        directory, table=table, labels=labels, path_column=path_column, groups=groups, marks=marks
    )
    facts = examine_all(collection, workers=workers, memory=memory)
    collection, facts = without_broken(collection, facts, skip=skip_broken, memory=memory)
    names = [image.name for image in collection.images]
    preparation = prepare(facts, size, channels, crop_mode, pixel_range, names)
    if site is not None:
        collection = hold_out(collection, *site)
    collection = split(collection, shares=shares, seed=seed)
    collection = check(collection, allow_overlap=allow_overlap)
    by_path = {image.path: entry for image, entry in zip(collection.images, facts, strict=True)}
    return collection.warned(*_suspicious(facts)), preparation, by_path


def hold_out(collection: ImageCollection, column: str, site: str) -> ImageCollection:
    """The images of one site as the test part, all others for training and validation.

    Raises:
        DataError: If the images have parts already, or none is of this site, or all are.
    """
    if any(image.part is not None for image in collection.images):
        raise DataError("<site> makes the test part, and the data have parts already: leave it out")
    there = [image.mark(column) == site for image in collection.images]
    if not any(there) or all(there):
        known = sorted({image.mark(column) for image in collection.images})
        raise DataError(f"<site={column} {site}>: there are {named(known, 20)}; two are needed")
    images = tuple(
        replace(image, part="test" if held else "train")
        for image, held in zip(collection.images, there, strict=True)
    )
    note = f"The test part is all {counted(sum(there), 'image')} of {column} {site}, and no other."
    collection = replace(collection, images=images).noted(note)
    unknown = sum(not image.mark(column) for image in images)
    if unknown:
        collection = collection.warned(
            f"{counted(unknown, 'image')} without a {column}, used in training: they may be of "
            f"{site} too."
        )
    return collection


def _suspicious(facts: Sequence[Facts]) -> list[str]:
    warnings = []
    unwindowed = sum(entry.kind == "unwindowed" for entry in facts)
    if unwindowed:
        warnings.append(
            f"{counted(unwindowed, 'DICOM file')} without a window: all of the values that the "
            "bits can hold are shown, unless a pixel range is given."
        )
    long = sum(entry.sides[1] > 1.5 * entry.sides[0] for entry in facts)
    if long:
        warnings.append(
            f"{counted(long, 'image')} with one side more than half as long again as the other: "
            "the crop mode squash changes their proportions, center cuts off their ends."
        )
    return warnings


def prepare(
    facts: Sequence[Facts],
    size: int,
    channels: int | None = None,
    crop_mode: str = "squash",
    pixel_range: tuple[float, float] | None = None,
    names: Sequence[str] | None = None,
) -> Preparation:
    """How files with these facts are read.

    Raises:
        DataError: If it cannot be guessed, or a setting is out of range.
    """
    if pixel_range is not None and all(entry.kind == "bytes" for entry in facts):
        raise DataError("<pixel_range> would do nothing: all images are of 8 bits")
    colour = any(entry.colour for entry in facts)
    return Preparation(
        size=size,
        channels=channels or (3 if colour else 1),
        crop_mode=crop_mode,
        pixel_range=range_of(facts, pixel_range, names),
        override_windows=pixel_range is not None,
    )


def read_part(
    directory: Path,
    part: str,
    *,
    size: int,
    preparation: Preparation | None = None,
    classes: Sequence[str] | None = None,
    several: bool | None = None,
) -> tuple[Tensor, Tensor, ImageCollection]:
    """One part of images that are split already, whole in memory, for an evaluation.

    Args:
        directory: A folder ``DIR/part/CLASS/...``, a folder ``DIR/CLASS/...`` that is taken whole,
            or a CSV file: the ``split.csv`` that a training wrote, or any with the columns path and
            label, or path and those of ``classes``.
        part: train, val or test.
        size: Side in pixels, where no preparation is given.
        preparation: As the network was trained with; guessed from these files if None.
        classes: Names in the order of the network's outputs; those found, sorted, if None.
        several: Whether the task is multi-label; as the columns say if None.

    Returns:
        Pixels uint8 (N, C, S, S), labels, and the collection of this part.

    Raises:
        DataError: If there is no such part, a class is not among ``classes``, or a file is broken.
    """
    if directory.is_file():
        columns = list(read_table(directory)[0])
        collection = find_images(
            directory.parent,
            table=directory,
            labels=_label_columns(columns, classes, several),
            groups="group" if "group" in columns else None,
        )
    else:
        parts = parts_in(directory)
        if parts and part not in parts:
            raise DataError(f"{directory} has {listed(parts)} but no {part}")
        collection = find_images(parts.get(part, directory))
        if parts:
            images = tuple(replace(image, part=part) for image in collection.images)
            collection = replace(collection, images=images)
    if any(image.part is not None for image in collection.images):
        collection = replace(collection, images=collection.part(part))
    if not collection.images:
        raise DataError(f"{directory} has no part {part}")
    if classes is not None:
        collection = _in_order(collection, classes)
    facts = examine_all(collection)
    collection, facts = without_broken(collection, facts, skip=False)
    names = [image.name for image in collection.images]
    opened = ImageSet(collection.images, preparation or prepare(facts, size, names=names))
    places = tqdm(range(len(opened)), desc="reading images", unit="image", leave=False)
    pixels = torch.stack([opened[place][0] for place in places])
    return pixels, opened.labels, collection


def _label_columns(
    columns: list[str], classes: Sequence[str] | None, several: bool | None
) -> list[str]:
    if several is not False and classes is not None and set(classes) <= set(columns):
        return list(classes)
    if several is False or "label" in columns or "group" not in columns:
        return ["label"]
    return columns[1 : columns.index("group")]


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
                f"{', '.join(classes)}: add the columns that are missing, empty if unknown"
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
    """The images with labels, groups, parts and marks: a table for ``--csv`` and `read_part`."""
    several = collection.task == "multilabel"
    names = list(collection.classes) if several else ["label"]
    extra = [name for name, _ in collection.images[0].marks]
    rows = []
    for image in collection.images:
        known = [image.group or "", image.part, *(image.mark(name) for name in extra)]
        rows.append([str(image.path.resolve()), *collection.cells(image), *known])
    write_table(path, ["path", *names, "group", "part", *extra], rows)
