"""Lists the images of class folders or of a table, with whatever is known of each."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from inmerge_wrap.images.collection import PARTS, ImageCollection, ImageFile
from inmerge_wrap.images.files import DICOM, RASTER, DataError, counted, is_image, named
from inmerge_wrap.images.tables import numbered_rows

_MEANT = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "dev", "development", "tuning"),
    "test": ("test", "testing", "tst", "holdout", "eval", "evaluation"),
}
_PART_OF = {word: part for part, words in _MEANT.items() for word in words}
_MARKS = {"0": 0.0, "0.0": 0.0, "1": 1.0, "1.0": 1.0}
_UNKNOWN = ("", "nan", "na", "n/a", "#na", "#n/a", "null")
_OF_SYSTEMS = (
    *("__MACOSX", "Thumbs.db", "desktop.ini"),
    *("System Volume Information", "$RECYCLE.BIN", "lost+found"),  # at the top of disks
)
_UNDECODED = re.compile("[\udc80-\udcff]")  # how Python holds the bytes of a name in Latin-1

_Row = dict[str, str]


def find_images(
    directory: Path,
    *,
    table: Path | None = None,
    labels: Sequence[str] = ("label",),
    path_column: str = "path",
    groups: str | None = None,
    marks: Sequence[str] = (),
    classes: Sequence[str] | None = None,
) -> ImageCollection:
    """Lists the images of a directory's class folders, or those that a CSV file names.

    ``groups`` and each of ``marks`` is a column of the table, or a regular expression that is
    searched for in the image's name; its first group, or all of it, is the value. Without
    ``groups``, a column ``group`` of the table is used, as `write_split` writes it. ``classes``
    are in the order of a network's outputs; None for those found, sorted.
    """
    if not directory.is_dir():
        raise DataError(f"{directory} is no folder")
    if len(set(labels)) < len(labels):
        raise DataError(f"<labels> names a column twice: {', '.join(labels)}")
    several = set(labels) if len(labels) > 1 else set()
    if taken := several & {"path", "group", "part"}:
        raise DataError(
            f"<labels> names {min(taken)!r}, another column of split.csv: rename it in the table"
        )
    rows: Sequence[Mapping[str, str]] = []
    if table is None:
        found = _from_folders(directory, classes)
    else:
        found, rows = _from_table(table, directory, labels, path_column, classes)
    if alike := _alike(found.classes):
        found = found.warned(
            "Classes that differ only in upper and lower case, or are one number in two forms: "
            f"{named(alike)}. If they are one class, write them alike."
        )
    names = [image.name for image in found.images]
    if taken := {"path", "label", "group", "part", *several}.intersection(marks):
        raise DataError(
            f"<site> or <subgroups> names {min(taken)!r}, a column of split.csv too: rename yours"
        )
    known = {mark: _values_of(mark, "<site> or <subgroups>", names, rows) for mark in marks}
    unnamed = groups is None and "group" not in labels
    if unnamed and any(_value(row.get("group", "")) for row in rows):
        groups = "group"
        found = found.noted(f"The groups are those of the column group of {table}.")
    owners = [""] * len(names) if groups is None else _values_of(groups, "<groups>", names, rows)
    if groups is not None and (alone := owners.count("")):
        found = found.noted(
            f"{counted(alone, 'image')} without a {groups}, each taken as a group of its own."
        )
    images = [
        replace(
            image,
            group=owners[n] or None,
            marks=tuple((mark, values[n]) for mark, values in known.items()),
        )
        for n, image in enumerate(found.images)
    ]
    return replace(found, images=tuple(images))


def _values_of(
    what: str, option: str, names: Sequence[str], rows: Sequence[Mapping[str, str]]
) -> list[str]:
    """The column of a table, or what a pattern finds in each image's name."""
    if rows and what in rows[0]:
        return [_value(row[what]) for row in rows]
    try:
        expression = re.compile(unicodedata.normalize("NFC", what))
    except re.error as error:
        raise DataError(
            f"{option} {what!r} is no column and no regular expression ({error})"
        ) from error
    matches = [expression.search(canonical(name)) for name in names]
    unmatched = [name for name, match in zip(names, matches, strict=True) if match is None]
    if unmatched:
        there = f" (it has {', '.join(rows[0])})" if rows else ""
        raise DataError(
            f"{option} {what!r} is no column of a table{there}, and as a pattern it is not found "
            f"in {counted(len(unmatched), 'name')}: {named(unmatched)}",
            names=unmatched,
        )
    return [_value(m[min(expression.groups, 1)] or "") for m in matches if m is not None]


def _value(text: str) -> str:
    return "" if is_unknown(text) else canonical(text)


def _places_of(names: Iterable[str], classes: Sequence[str] | None) -> dict[str, int]:
    """The place of each class among the outputs: 2 before 10, and numbers before words."""

    def natural(name: str) -> tuple[int, int, str]:
        return (0, int(name), name) if name.isdecimal() else (1, 0, name)

    found = sorted(set(names), key=natural)
    outputs = found if classes is None else list(map(canonical, classes))
    if foreign := [name for name in found if name not in outputs]:
        raise DataError(
            f"no class of the model: {named(foreign)}; its classes are {', '.join(outputs)}"
        )
    return {name: place for place, name in enumerate(outputs)}


def _alike(classes: Sequence[str]) -> list[str]:
    """``A = a`` and ``1 = 1.0``, which spreadsheets and pandas write for each other."""
    same: dict[float | str, list[str]] = {}
    for name in classes:
        try:
            same.setdefault(float(name), []).append(name)
        except ValueError:
            same.setdefault(name.casefold(), []).append(name)
    return [" = ".join(names) for names in same.values() if len(names) > 1]


# -- folders ---------------------------------------------------------------------------------------


def _from_folders(directory: Path, classes: Sequence[str] | None) -> ImageCollection:
    def below(path: Path) -> str:
        return path.relative_to(directory).as_posix()

    parts = _training_parts(directory)
    files: list[tuple[str | None, str, Path]] = []
    ignored: list[str] = []
    hidden: list[str] = []
    empty: list[str] = []
    warnings: list[str] = []
    for part, root in parts.items() if parts else [(None, directory)]:
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
        hidden += map(below, _hidden_with_images(root))
        for folder in folders:
            images, others = images_below(folder)
            files += [(part, canonical(folder.name), path) for path in images]
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
    places = _places_of((name for _, name, _ in files), classes)
    if unknown := [name for _, name, _ in files if is_unknown(name)]:
        raise DataError(
            f"the class folder {unknown[0]!r} is called what tables write for no label: rename it"
        )
    found = [ImageFile(path, below(path), places[name], part=part) for part, name, path in files]
    renamed = [
        f"The folder {folder.name} was taken as the part {part}."
        for part, folder in parts.items()
        if folder.name != part
    ]
    collection = ImageCollection(tuple(places), "multiclass", tuple(found))
    collection = collection.noted(*renamed).warned(*warnings)
    if ignored:
        what = counted(len(ignored), "file")
        collection = collection.listed(f"{what} ignored, not images in a class", ignored)
    if hidden:
        what = counted(len(hidden), "folder")
        collection = collection.listed(f"{what} with images ignored, as hidden", hidden)
    return collection


def _hidden_with_images(directory: Path) -> list[Path]:
    """The hidden folders that may be meant as classes, such as ``.5 mg``."""
    hidden = _in_unicode(path for path in directory.iterdir() if path.name.startswith("."))
    readable = (path for path in hidden if path.is_dir() and os.access(path, os.R_OK | os.X_OK))
    return [
        path for path in readable if any(e.suffix.lower() in RASTER + DICOM for e in path.iterdir())
    ]


def parts_in(directory: Path) -> dict[str, Path]:
    """The folders of train, val and test, whatever they are called; none if there are none."""
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


def _training_parts(directory: Path) -> dict[str, Path]:
    """As `parts_in`, but with a part train and without other folders, if there are any."""
    parts = parts_in(directory)
    if not parts:
        return {}
    folders = inside(directory, folders=True)
    others = named([folder.name for folder in folders if folder not in parts.values()])
    if others:
        raise DataError(
            f"{directory} has {listed(parts)} and also {others}: is that a part, or a class? Put "
            "the parts into a folder of their own, or name the images in a CSV file"
        )
    if "train" not in parts:
        raise DataError(f"{directory} has {listed(parts)} but no train")
    return parts


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
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=_refuse_unreadable):
        real = os.path.realpath(parent)
        if real in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not _hidden(name))
        found += [Path(parent, name) for name in files if not _hidden(name)]
    return _in_unicode(found)


def _refuse_unreadable(error: OSError) -> None:
    """What `os.walk` would leave out without a word."""
    raise DataError(
        f"the folder {error.filename} cannot be read ({error.strerror}): make it readable, or move "
        "it away"
    ) from error


def inside(directory: Path, *, folders: bool) -> list[Path]:
    entries = _in_unicode(path for path in directory.iterdir() if not _hidden(path.name))
    return [path for path in entries if path.is_dir() == folders]


def _in_unicode(paths: Iterable[Path]) -> list[Path]:
    """The paths, sorted; an error of names that no table and no report can hold."""
    found = sorted(paths)
    if odd := [ascii(str(path)) for path in found if _UNDECODED.search(str(path))]:
        raise DataError(
            f"{counted(len(odd), 'name')} not in UTF-8: {named(odd)}; rename them, for example "
            "with convmv",
            names=odd,
        )
    return found


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in _OF_SYSTEMS


def canonical(text: str) -> str:
    """A name in one form: an accent, which is one character or two, as one; no space around it."""
    return unicodedata.normalize("NFC", text).strip()


# -- tables ----------------------------------------------------------------------------------------


def _from_table(
    table: Path,
    directory: Path,
    labels: Sequence[str],
    path_column: str,
    classes: Sequence[str] | None,
) -> tuple[ImageCollection, list[_Row]]:
    """The images that a table names, and the row of each."""
    numbered = numbered_rows(table, {path_column: "path_column"} | dict.fromkeys(labels, "labels"))
    root = directory.resolve()
    distinct: dict[tuple[str, ...], tuple[int, _Row]] = {}
    repeated = []
    for number, row in numbered:
        file = _file(root, row[path_column])
        cells = (file, *{**row, path_column: ""}.values())
        if distinct.setdefault(cells, (number, row))[0] != number:
            repeated.append(row[path_column])
    _refuse_faults(table, list(distinct.values()), root, labels, path_column)
    rows = [row for _, row in distinct.values()]
    several = len(labels) > 1
    names = [] if several else [canonical(row[labels[0]]) for row in rows]
    places = _places_of(names, classes)
    images = []
    for n, row in enumerate(rows):
        path = Path(name_in(row[path_column]))
        name = (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()
        label = read_marks(str(table), row, labels) if several else places[names[n]]
        images.append(ImageFile(directory / path, name, label, part=_part(row)))
    task = "multilabel" if several else "multiclass"
    found = ImageCollection(tuple(labels if several else places), task, tuple(images))
    if repeated:
        what = f"{counted(len(repeated), 'row')} left out that only repeated another one"
        found = found.listed(what, repeated, warn=True)
    return found, rows


def _refuse_faults(
    table: Path,
    rows: Sequence[tuple[int, _Row]],
    root: Path,
    labels: Sequence[str],
    path_column: str,
) -> None:
    """Raises an error that names all rows with a fault, by what is wrong with them."""
    faults: dict[tuple[str, str], list[str]] = {}

    def fault(place: str, what: str, remedy: str) -> None:
        faults.setdefault((what, remedy), []).append(place)

    in_parts = any(_part(row) for _, row in rows)
    seen: dict[str, int] = {}
    for number, row in rows:
        text, part, place = row[path_column], _part(row), f"row {number}"
        if not text:
            fault(place, f"without a {path_column}", "fill it in, or remove the row")
            continue
        first = seen.setdefault(_file(root, text), number)
        if first != number:
            remedy = "keep one row for each image"
            fault(f"{place} ({text}, as row {first})", "with an image of another row", remedy)
        if part not in (None, *PARTS):
            fault(f"{place} ({part!r})", "with an unknown part", "give train, val or test")
        if in_parts and part is None:
            remedy = "give every image a part, or none"
            fault(f"{place} ({text})", "without a part", remedy)
        if len(labels) > 1:
            for name in _wrong_marks(row, labels):
                remedy = "of several labels each is 0, 1 or empty"
                fault(f"{place} ({name} is {row[name]!r})", "with another label", remedy)
        elif is_unknown(row[labels[0]]):
            fault(f"{place} ({text})", f"without a {labels[0]}", "fill it in, or remove the row")
    if faults:
        lines = [
            f"{table}, {counted(len(places), 'row')} {what}: {named(places)}; {remedy}"
            for (what, remedy), places in faults.items()
        ]
        raise DataError("\n".join(lines), names=[p for places in faults.values() for p in places])


def _part(row: _Row) -> str | None:
    return _value(row.get("part", "")) or None


def _file(root: Path, text: str) -> str:
    """One form of the whole path, which can be written in several ways."""
    return os.path.normpath(root / name_in(text))


def name_in(cell: str) -> str:
    """The path in a cell, in one form: ``./a/b.png`` and, of Windows, ``a\\b.png`` as a/b.png."""
    return PurePosixPath(cell.replace("\\", "/")).as_posix()


def is_unknown(cell: str) -> bool:
    """Whether a cell is empty, as programs write it."""
    return cell.lower() in _UNKNOWN


def read_marks(place: str, row: Mapping[str, str], labels: Sequence[str]) -> tuple[float, ...]:
    """Several labels of a row: 0, 1, or NaN for unknown."""
    for name in _wrong_marks(row, labels):
        raise DataError(
            f"{place}: {name} is {row[name]!r}; of several labels each is 0, 1 or empty"
        )
    return tuple(_MARKS.get(row[name], float("nan")) for name in labels)


def _wrong_marks(row: Mapping[str, str], labels: Sequence[str]) -> list[str]:
    return [name for name in labels if row[name] not in _MARKS and not is_unknown(row[name])]
