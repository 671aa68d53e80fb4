"""A data set of image files: found, checked, split without leaks, and read.

    DIR/train|val|test/CLASS/...    parts as they are; a part that is missing is split off train
    DIR/CLASS/...                   split by us
    a CSV file                      path, label (or several labels), and if wanted group and part

`open_images` does all of it in order. What is wrong is a `DataError` that names the files; what is
only suspicious becomes a warning.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PureWindowsPath

import torch
from torch import Tensor

from inmerge_wrap.images.collection import ImageCollection, check, spaced, split
from inmerge_wrap.images.files import DataError, counted, named, range_of
from inmerge_wrap.images.finding import find_images, listed, parts_in
from inmerge_wrap.images.preparation import Preparation
from inmerge_wrap.images.sets import ImageSet, examine_all
from inmerge_wrap.images.tables import check_columns, numbered_rows, write_table


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
    split_seed: int | None = None,
    skip_broken: bool = False,
    allow_overlap: bool = False,
    workers: int = 0,
    memory: Path | None = None,
) -> tuple[ImageCollection, Preparation]:
    """Finds, checks and splits the images, and settles how they are read.

    Arguments are those of `find_images`, `Preparation`, `examine_all`, `split` and `check`; a site
    is a column or pattern, and its value in the test part.
    """
    marks = [*([site[0]] if site else []), *subgroups]
    collection = find_images(
        directory, table=table, labels=labels, path_column=path_column, groups=groups, marks=marks
    )
    if table is not None:
        _refuse_if_none_is_there(collection, directory, "name that folder with <data_dir>")
    collection = examine_all(collection, skip_broken=skip_broken, workers=workers, memory=memory)
    preparation = _prepare(collection, size, channels, crop_mode, pixel_range)
    if site is not None:
        collection = _hold_out(collection, *site)
    collection = split(collection, shares=shares, seed=split_seed)
    checked = check(collection, allow_overlap=allow_overlap)
    return _suspicious(checked, windows=not preparation.override_windows), preparation


def _refuse_if_none_is_there(collection: ImageCollection, directory: Path, remedy: str) -> None:
    paths = [image.path for image in collection.images]
    if any(map(os.path.lexists, paths)):
        return
    if PureWindowsPath(collection.images[0].name).anchor:  # of /x.png and of C:/x.png
        remedy = "mend the paths in the table"
    else:
        start = directory.absolute()
        remedy = f"its paths start from {start}; if they are those of another folder, {remedy}"
    raise DataError(
        f"none of the {counted(len(paths), 'image')} of the table is there. No such file: "
        f"{paths[0].absolute()}; {remedy}",
        names=[str(path.absolute()) for path in paths],
    )


def _hold_out(collection: ImageCollection, column: str, site: str) -> ImageCollection:
    """The images of one site as the test part, all others for training and validation."""
    if any(image.part is not None for image in collection.images):
        raise DataError("<site> makes the test part, and the data have parts already: leave it out")
    there = [image.mark(column) == site for image in collection.images]
    if not any(there) or all(there):
        known = sorted({image.mark(column) for image in collection.images})
        raise DataError(f"<site={column} {site}>: there are {named(known, 20)}; two are needed")
    collection = collection.in_parts("test" if held else "train" for held in there).noted(
        f"The test part is all {counted(sum(there), 'image')} of {column} {site}, and no other."
    )
    if unknown := sum(not image.mark(column) for image in collection.images):
        collection = collection.warned(
            f"{counted(unknown, 'image')} without a {column}, used in training: they may be of "
            f"{site} too."
        )
    return collection


def _suspicious(collection: ImageCollection, *, windows: bool) -> ImageCollection:
    """Warns of what may be shown otherwise than people think; ``windows`` are those of DICOM."""
    facts = [image.facts for image in collection.images]
    unwindowed = sum(entry.kind == "unwindowed" for entry in facts)
    if windows and unwindowed:
        collection = collection.warned(
            f"{counted(unwindowed, 'DICOM file')} without a window: all of the values that the "
            "bits can hold are shown. --pixel-range sets another range."
        )
    if long := sum(entry.sides[1] > 1.5 * entry.sides[0] for entry in facts):
        collection = collection.warned(
            f"{counted(long, 'image')} with one side more than half as long again as the other: "
            "the crop mode squash changes their proportions, center cuts off their ends."
        )
    return collection


def _prepare(
    collection: ImageCollection,
    size: int,
    channels: int | None = None,
    crop_mode: str = "squash",
    pixel_range: tuple[float, float] | None = None,
) -> Preparation:
    """How the files are read."""
    facts = [image.facts for image in collection.images]
    if pixel_range is not None and all(entry.kind == "bytes" for entry in facts):
        raise DataError("<pixel_range> would do nothing: all images are of 8 bits")
    names = [image.name for image in collection.images]
    return Preparation(
        size=size,
        channels=channels or (3 if any(entry.colour for entry in facts) else 1),
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
    limit: int | None = None,
) -> tuple[Tensor, Tensor, ImageCollection]:
    """One part of images that are split already, read into memory, for an evaluation.

    Args:
        directory: A folder ``DIR/part/CLASS/...``, a folder ``DIR/CLASS/...`` that is taken whole,
            or a CSV file: the ``split.csv`` that a training wrote, or any with the columns path and
            label, or path and those of ``classes``.
        part: train, val or test; only test of what is not split.
        size: Side in pixels, where no preparation is given.
        preparation: As the network was trained with; guessed from these files if None.
        classes: Names in the order of the network's outputs; those found, sorted, if None.
        several: Whether the task is multi-label; as the columns say if None.
        limit: Number of images to read, evenly spaced over all.

    Returns:
        Pixels uint8 (N, C, S, S), labels, and the collection of what was read.
    """
    if directory.is_file():
        columns = list(numbered_rows(directory, {"path": None})[0][1])
        labels = _label_columns(columns, classes, several)
        check_columns(directory, columns, dict.fromkeys(["path", *labels]))
        collection = find_images(directory.parent, table=directory, labels=labels, classes=classes)
        remedy = "move the table there, or write whole paths"
        _refuse_if_none_is_there(collection, directory.parent, remedy)
    else:
        parts = parts_in(directory)
        if parts and part not in parts:
            raise DataError(f"{directory} has {listed(parts)} but no {part}")
        collection = find_images(parts.get(part, directory), classes=classes)
        if parts:
            collection = collection.in_parts([part] * len(collection.images))
    if any(image.part is not None for image in collection.images):
        collection = replace(collection, images=collection.part(part))
    elif part != "test":
        raise DataError(
            f"{directory} is not split, so it has no part {part}: it is used whole, as the part "
            "test"
        )
    if not collection.images:
        raise DataError(f"{directory} has no part {part}")
    for title, names in collection.lists:
        warnings.warn(f"{title}: {named(names)}", stacklevel=2)
    if preparation is None:  # a range holds for all of them
        preparation = _prepare(examine_all(collection, skip_broken=None), size)
    chosen = tuple(collection.images[n] for n in spaced(len(collection.images), limit))
    collection = examine_all(replace(collection, images=chosen), skip_broken=None)
    opened = ImageSet(collection.images, preparation)
    pixels = torch.stack([pixels for _, pixels in opened.sample(None, "reading images")])
    return pixels, opened.labels, collection


def _label_columns(
    columns: list[str], classes: Sequence[str] | None, several: bool | None
) -> list[str]:
    if classes is not None and (several or (several is None and set(classes) <= set(columns))):
        return list(classes)
    if several is False or "label" in columns or "group" not in columns:
        return ["label"]
    return columns[1 : columns.index("group")] if classes is None else list(classes)


def write_split(collection: ImageCollection, path: Path) -> None:
    """The images with labels, groups, parts and marks: a table for ``--csv`` and `read_part`."""
    several = collection.task == "multilabel"
    names = list(collection.classes) if several else ["label"]
    extra = [name for name, _ in collection.images[0].marks]
    rows = []
    for image in collection.images:
        known = [image.group or "", image.part, *(image.mark(name) for name in extra)]
        place = image.path.parent.resolve() / image.path.name  # two links are two images
        rows.append([str(place), *collection.cells(image), *known])
    write_table(path, ["path", *names, "group", "part", *extra], rows)
