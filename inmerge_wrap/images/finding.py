"""Lists the images of class folders or of a table, with whatever is known of each."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from inmerge_wrap.images.collection import PARTS, ImageCollection, ImageFile, counted, named
from inmerge_wrap.images.files import DataError, is_image
from inmerge_wrap.images.tables import read_table

_MEANT = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "dev", "development", "tuning"),
    "test": ("test", "testing", "tst", "holdout", "eval", "evaluation"),
}
_PART_OF = {word: part for part, words in _MEANT.items() for word in words}


def find_images(
    directory: Path,
    *,
    table: Path | None = None,
    labels: Sequence[str] = ("label",),
    path_column: str = "path",
    groups: str | None = None,
    marks: Sequence[str] = (),
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
        marks: What else is to be known of each image, such as its site: likewise.

    Raises:
        DataError: If there is nothing to train on, a class is empty or the table is malformed.
    """
    if not directory.is_dir():
        raise DataError(f"{directory} is no folder")
    rows: list[dict[str, str]] = []
    if table is None:
        found = _from_folders(directory)
    else:
        rows = _rows_of(table, path_column, labels)
        found = _from_table(table, rows, directory, list(labels), path_column)
    images = list(found.images)
    if groups is not None:
        values = _values_of(groups, "<groups>", images, rows)
        images = [replace(i, group=v or None) for i, v in zip(images, values, strict=True)]
        alone = sum(not value for value in values)
        if alone:
            found = found.noted(
                f"{counted(alone, 'image')} without a {groups}, each taken as a group of its own."
            )
    known = {name: _values_of(name, "<site> or <subgroups>", images, rows) for name in marks}
    images = [
        replace(image, marks=tuple((name, values[n]) for name, values in known.items()))
        for n, image in enumerate(images)
    ]
    return replace(found, images=tuple(images))


def _values_of(
    what: str, option: str, images: Sequence[ImageFile], rows: Sequence[Mapping[str, str]]
) -> list[str]:
    """The column of a table, or what a pattern finds in each image's name."""
    if rows and what in rows[0]:
        return ["" if is_unknown(row[what]) else row[what] for row in rows]
    try:
        expression = re.compile(what)
    except re.error as error:
        raise DataError(
            f"{option} {what!r} is no column and no regular expression ({error})"
        ) from error
    matches = [expression.search(image.name) for image in images]
    unmatched = [i.name for i, match in zip(images, matches, strict=True) if match is None]
    if unmatched:
        raise DataError(
            f"{option} {what!r} is no column of a table, and as a pattern it is not found in "
            f"{counted(len(unmatched), 'name')}: {named(unmatched)}",
            names=unmatched,
        )
    return [(m[1] if expression.groups else m[0]) or "" for m in matches if m is not None]


# -- folders ---------------------------------------------------------------------------------------


def _from_folders(directory: Path) -> ImageCollection:
    def below(path: Path) -> str:
        return path.relative_to(directory).as_posix()

    parts, notes = _parts_of(directory)
    roots: list[tuple[str | None, Path]] = [*parts.items()] if parts else [(None, directory)]
    files: list[tuple[str | None, str, Path]] = []
    ignored: list[str] = []
    empty: list[str] = []
    warnings: list[str] = []
    for part, root in roots:
        folders = inside(root, folders=True)
        loose = [path for path in inside(root, folders=False) if is_image(path)]
        if part and loose and not folders:
            warnings.append(
                f"{root.name} holds {counted(len(loose), 'image')} and no class folders: without "
                "labels they say nothing about the network, and were left out. inmerge predict "
                "answers for them."
            )
            continue
        ignored += map(below, loose)
        for folder in folders:
            images, others = images_below(folder)
            files += [(part, class_name(folder.name), path) for path in images]
            ignored += map(below, others)
            if not images:
                empty.append(below(folder))
    if not files:
        raise DataError(
            f"{directory} holds no images in class folders: DIR/CLASS/image.png, or "
            "DIR/train/CLASS/image.png, or a CSV file that names the images"
        )
    if empty:
        raise DataError(
            f"no image in {counted(len(empty), 'class folder')}: {named(empty)}; "
            "add images or remove the folder",
            names=empty,
        )
    classes = tuple(sorted({name for _, name, _ in files}, key=_natural))
    index = {name: number for number, name in enumerate(classes)}
    found = [ImageFile(path, below(path), index[name], part=part) for part, name, path in files]
    collection = ImageCollection(classes, "multiclass", tuple(found))
    collection = collection.noted(*notes).warned(*warnings)
    if ignored:
        what = counted(len(ignored), "file")
        collection = collection.listed(f"{what} ignored, not images in a class", ignored)
    return collection


def parts_in(directory: Path) -> dict[str, Path]:
    """The folders of train, val and test, whatever they are called; none if there are none.

    Raises:
        DataError: If two look like the same part, or folders can be parts as well as classes.
    """
    folders = inside(directory, folders=True)
    meant = {folder: part for folder in folders if (part := _part_named(folder.name))}
    exact = [folder for folder in meant if folder.name in PARTS]
    if not exact and len(set(meant.values())) < 2:
        _refuse_equal_insides(directory, folders)
        return {}
    parts: dict[str, Path] = {}
    for folder, part in meant.items():
        if part in parts:
            raise DataError(f"{parts[part]} and {folder} both look like {part}: keep one")
        parts[part] = folder
    return {part: parts[part] for part in PARTS if part in parts}


def listed(parts: Mapping[str, Path]) -> str:
    """The names of the folders of parts, for an error."""
    return " and ".join(sorted(folder.name for folder in parts.values()))


def _parts_of(directory: Path) -> tuple[dict[str, Path], list[str]]:
    """All folders as parts of a training, and notes on their names; none if they are classes.

    Raises:
        DataError: As `parts_in`, or if there are other folders, or none of training images.
    """
    parts = parts_in(directory)
    if not parts:
        return {}, []
    folders = inside(directory, folders=True)
    others = named([folder.name for folder in folders if folder not in parts.values()])
    if others:
        raise DataError(
            f"{directory} has {listed(parts)} and also {others}: is that a part, or a class? Put "
            "the parts into a folder of their own, or name the images in a CSV file"
        )
    if "train" not in parts:
        raise DataError(f"{directory} has {listed(parts)} but no train")
    return parts, [
        f"The folder {folder.name} was taken as the part {part}."
        for part, folder in parts.items()
        if folder.name != part
    ]


def _part_named(name: str) -> str | None:
    """The part that a folder's name means: ``Train``, ``training_set``, ``02-Validation``."""
    words = re.findall(r"[a-z]+", name.lower())
    words = [re.sub(r"(set|data|images?)$", "", word) or word for word in words]
    words = [word for word in words if word not in ("set", "data", "images", "image", "split")]
    return _PART_OF.get(words[0]) if len(words) == 1 else None


def _refuse_equal_insides(directory: Path, folders: Sequence[Path]) -> None:
    insides = [tuple(inner.name for inner in inside(f, folders=True)) for f in folders]
    if len(folders) > 1 and len(set(insides)) == 1 and len(insides[0]) > 1:
        raise DataError(
            f"all folders of {directory} ({named([f.name for f in folders])}) hold the folders "
            f"{named(insides[0])}: which of them are the classes? Name the outer ones train, val "
            "and test if they are parts, move the images up if they are classes, or name the "
            "images in a CSV file"
        )


def images_below(folder: Path) -> tuple[list[Path], list[Path]]:
    """The images in a folder and the folders in it, and its other files."""
    images: list[Path] = []
    others: list[Path] = []
    for path in files_below(folder):
        (images if is_image(path) else others).append(path)
    return images, others


def files_below(folder: Path) -> list[Path]:
    """All files in a folder and the folders in it, but hidden ones; links are followed."""
    found: list[Path] = []
    seen: set[str] = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not _hidden(name))
        found += [Path(parent, name) for name in files if not _hidden(name)]
    return sorted(found)


def inside(directory: Path, *, folders: bool) -> list[Path]:
    entries = sorted(path for path in directory.iterdir() if not _hidden(path.name))
    return [path for path in entries if path.is_dir() == folders]


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db", "desktop.ini")


def _natural(name: str) -> tuple[Any, ...]:
    """Sorts 2 before 10, and numbers before words."""
    return (0, int(name), name) if name.isdigit() else (1, 0, name)


def class_name(text: str) -> str:
    """The name of a class: of an accent, which is one character or two, always the one."""
    return unicodedata.normalize("NFC", text)


# -- tables ----------------------------------------------------------------------------------------


def _rows_of(table: Path, path_column: str, labels: Sequence[str]) -> list[dict[str, str]]:
    rows = read_table(table, {path_column: "path_column"} | dict.fromkeys(labels, "labels"))
    seen: dict[str, int] = {}
    for number, row in enumerate(rows, start=2):
        path, place = row[path_column], f"{table}, row {number}"
        if not path:
            raise DataError(f"{place}: no path")
        if path in seen:
            raise DataError(f"{place}: {path} was named in row {seen[path]} already")
        seen[path] = number
        part = row.get("part", "")
        if part and part not in PARTS:
            raise DataError(f"{place}: part is {part!r}; give train, val or test")
        if len(labels) == 1 and is_unknown(row[labels[0]]):
            raise DataError(f"{place}: {path} has no {labels[0]}")
    return rows


def _from_table(
    table: Path, rows: list[dict[str, str]], directory: Path, labels: list[str], path_column: str
) -> ImageCollection:
    several = len(labels) > 1
    if not several:
        rows = [row | {labels[0]: class_name(row[labels[0]])} for row in rows]
    classes = labels if several else sorted({row[labels[0]] for row in rows}, key=_natural)
    index = {name: number for number, name in enumerate(classes)}
    root, images = directory.resolve(), []
    for number, row in enumerate(rows, start=2):
        path = Path(row[path_column].replace("\\", "/"))
        label: int | tuple[float, ...]
        if several:
            label = tuple(mark_of(table, number, name, row[name]) for name in labels)
        else:
            label = index[row[labels[0]]]
        name = (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()
        images.append(ImageFile(directory / path, name, label, part=row.get("part") or None))
    return ImageCollection(tuple(classes), "multilabel" if several else "multiclass", tuple(images))


def is_unknown(cell: str) -> bool:
    """Whether a cell is empty, as programs write it."""
    return cell.lower() in ("", "nan", "na")


def mark_of(table: Path, row: int, column: str, text: str) -> float:
    """Reads one of several labels: 0, 1, or NaN for unknown.

    Raises:
        DataError: If it is none of these.
    """
    if is_unknown(text):
        return float("nan")
    if text in ("0", "0.0", "1", "1.0"):
        return float(text)
    raise DataError(
        f"{table}, row {row}: {column} is {text!r}; of several labels each is 0, 1 or empty"
    )
