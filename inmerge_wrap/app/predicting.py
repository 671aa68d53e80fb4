"""New images and their labels: a row of probabilities for each file, prepared as in training."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from inmerge_wrap.app.model import Read, TrainedModel, read_files
from inmerge_wrap.errors import ArgumentError, ArgumentWarning
from inmerge_wrap.images.files import counted, named
from inmerge_wrap.images.finding import class_name, images_below, is_unknown, mark_of
from inmerge_wrap.images.looks import unlike, warnings_about
from inmerge_wrap.images.preparation import Recipe
from inmerge_wrap.images.tables import read_table, write_table

__all__ = [
    "Prediction",
    "find_files",
    "predict",
    "read_labels",
    "warnings_of",
    "write_predictions",
]


@dataclass(frozen=True)
class Prediction:
    """What the network says of one file.

    Attributes:
        name: As it was given; of a single folder, below it.
        probabilities: One for each class; None if the file could not be read.
        predicted: The most probable class, or the labels above their thresholds.
        unlike: In which respects the image differs from those of the training, as words.
        error: Why the file could not be read, or None.
    """

    name: str
    probabilities: tuple[float, ...] | None = None
    predicted: tuple[str, ...] = ()
    unlike: tuple[str, ...] = ()
    error: str | None = None


def find_files(sources: Sequence[Path], path_column: str = "path") -> list[tuple[str, Path]]:
    """Returns name and path of each image.

    Args:
        sources: Image files, folders of images (with the folders in them), or one CSV file with a
            column of paths relative to its own folder.
        path_column: That column.

    Raises:
        ArgumentError: If a source does not exist, or there is no image in it.
    """
    found: list[tuple[str, Path]] = []
    for source in sources:
        if source.is_dir():
            images, others = images_below(source)
            if not images:
                raise ArgumentError(f"no image in {source}: PNG, JPEG, TIFF, BMP or DICOM")
            if others:
                names = [path.relative_to(source).as_posix() for path in others]
                message = (
                    f"{counted(len(others), 'file')} in {source} left out, as not PNG, JPEG, TIFF, "
                    f"BMP or DICOM: {named(names)}"
                )
                warnings.warn(ArgumentWarning(message), stacklevel=2)
            alone = len(sources) == 1  # names in two folders can be equal
            found += [
                ((path.relative_to(source) if alone else path).as_posix(), path) for path in images
            ]
        elif source.suffix.lower() == ".csv":
            rows = read_table(source, {path_column: "path_column"})
            names = [row[path_column].replace("\\", "/") for row in rows]
            found += [(name, source.parent / name) for name in names]
        elif source.exists():
            found.append((str(source), source))
        else:
            raise ArgumentError(f"no such file or folder: {source}")
    return found


def read_labels(table: Path, recipe: Recipe, path_column: str = "path") -> dict[str, Any]:
    """Returns the label of each image by its name.

    Args:
        table: CSV file with a column of names. A column ``label`` holds the class; of a multi-label
            task, a column for each label holds 0, 1 or nothing (unknown). Rows without a label are
            left out.
        recipe: Of the network.
        path_column: Column of the names.

    Returns:
        Class indices; or for a multi-label task tuples of 0, 1 and NaN.

    Raises:
        ArgumentError: If a column is missing, or a label is none of the network.
    """
    several = recipe.task == "multi-label"
    needed = [path_column, *(recipe.classes if several else ["label"])]
    found: dict[str, Any] = {}
    for number, row in enumerate(read_table(table, dict.fromkeys(needed)), start=2):
        name = row[path_column].replace("\\", "/")
        if several:
            marks = tuple(mark_of(table, number, label, row[label]) for label in recipe.classes)
            if any(mark == mark for mark in marks):
                found[name] = marks
        elif not is_unknown(row["label"]):
            label = class_name(row["label"])
            if label not in recipe.classes:
                raise ArgumentError(
                    f"{table}, row {number}: label {label!r} is no class of the network; its "
                    f"classes are {', '.join(recipe.classes)}"
                )
            found[name] = recipe.classes.index(label)
    if not found:
        raise ArgumentError(f"{table} holds no label")
    return found


def predict(
    model: TrainedModel,
    files: Sequence[tuple[str, Path]],
    *,
    batch_size: int = 64,
    workers: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[Prediction]:
    """Returns the network's answer to each file; a file that cannot be read has its reason.

    Args:
        model: The network and its recipe.
        files: Name and path of each.
        batch_size: Images at a time.
        workers: Processes that read; 0 for this one.
        progress: Called with the number of files after each batch.
    """
    found: list[Prediction] = []
    preparation = model.recipe.preparation
    for batch in read_files(files, preparation, batch_size=batch_size, workers=workers):
        found += _answers(model, batch)
        if progress is not None:
            progress(len(batch))
    return found


def _answers(model: TrainedModel, batch: Sequence[Read]) -> list[Prediction]:
    pixels = [entry.pixels for entry in batch if entry.pixels is not None]
    recipe, seen = model.recipe, model.recipe.seen
    rows = recipe.probabilities(model.scores(torch.stack(pixels))) if pixels else torch.empty(0, 1)
    answers = zip(rows, recipe.named(rows), strict=True)
    found = []
    for entry in batch:
        if entry.look is None:
            found.append(Prediction(entry.name, error=entry.error))
            continue
        row, named = next(answers)
        found.append(
            Prediction(
                entry.name,
                probabilities=tuple(row.tolist()),
                predicted=tuple(n for n, is_so in zip(recipe.classes, named, strict=True) if is_so),
                unlike=tuple(unlike(entry.look, seen)) if seen is not None else (),
            )
        )
    return found


def warnings_of(found: Sequence[Prediction], recipe: Recipe) -> list[str]:
    """Returns what a reader of the predictions must know first."""
    said = []
    broken = sum(entry.error is not None for entry in found)
    if broken:
        said.append(f"{broken} of {len(found)} files cannot be read: see the column error")
    if recipe.seen is None:
        said.append(
            "preparation.json does not say what the training images were like, so it cannot be "
            "checked whether these images resemble them"
        )
        return said
    differences = [entry.unlike for entry in found if entry.error is None]
    sentences = warnings_about(differences, recipe.seen)
    return said + [f"{sentence}; the network may be wrong on them" for sentence in sentences]


def write_predictions(found: Sequence[Prediction], recipe: Recipe, path: Path) -> None:
    """Writes a CSV file with one row a file: its name, the answer, the probability of each class.

    Labels that are named together are separated by a semicolon.
    """
    rows = []
    for entry in found:
        values: Sequence[Any] = [round(value, 7) for value in entry.probabilities or ()]
        rows.append(
            [
                entry.name,
                "; ".join(entry.predicted),
                *(values or [""] * len(recipe.classes)),
                "; ".join(entry.unlike),
                entry.error or "",
            ]
        )
    write_table(path, ["image", "prediction", *recipe.classes, "unlike training", "error"], rows)
