"""New images and their labels: a row of probabilities for each file, prepared as in training."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inmerge_wrap.app.model import Progress, Read, TrainedModel, read_files, silent
from inmerge_wrap.errors import ArgumentError, ArgumentWarning
from inmerge_wrap.images.files import counted, named
from inmerge_wrap.images.finding import (
    canonical,
    images_below,
    is_unknown,
    name_in,
    read_marks,
)
from inmerge_wrap.images.looks import unlike, warnings_about
from inmerge_wrap.images.preparation import Recipe
from inmerge_wrap.images.tables import numbered_rows, write_table


@dataclass(frozen=True)
class Prediction:
    """What the network says of one file, or why it cannot be read."""

    name: str
    probabilities: tuple[float, ...] | None = None
    predicted: tuple[str, ...] = ()  # the most probable class, or the labels above thresholds
    unlike: tuple[str, ...] = ()  # see `looks.unlike`
    error: str | None = None


def find_files(sources: Sequence[Path], path_column: str = "path") -> list[tuple[str, Path]]:
    """Returns name and path of each image of files, folders and CSV files."""
    found: list[tuple[str, Path]] = []
    alone = len(sources) == 1  # names in two folders or tables can be equal
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
            found += [
                ((path.relative_to(source) if alone else path).as_posix(), path) for path in images
            ]
        elif source.suffix.lower() == ".csv":
            for number, row in numbered_rows(source, {path_column: "path_column"}):
                name = _name_in_row(f"{source}, row {number}", row[path_column], path_column)
                path = source.parent / name
                found.append((name if alone else path.as_posix(), path))
        elif source.exists():
            found.append((str(source), source))
        else:
            raise ArgumentError(f"no such file or folder: {source}")
    return found


def _name_in_row(place: str, cell: str, path_column: str) -> str:
    if not cell:
        raise ArgumentError(f"{place} without a {path_column}: fill it in, or remove the row")
    return name_in(cell)


def read_labels(table: Path, recipe: Recipe, path_column: str = "path") -> dict[str, Any]:
    """Returns the label of each image by its name, without those of which none is known.

    It is a class index; or for a multi-label task a tuple of 0, 1 and NaN.
    """
    labels = recipe.classes if recipe.task == "multilabel" else ["label"]
    found: dict[str, Any] = {}
    rows: dict[str, int] = {}
    for number, row in numbered_rows(table, dict.fromkeys([path_column, *labels])):
        if all(is_unknown(row[label]) for label in labels):
            continue
        place = f"{table}, row {number}"
        name = _name_in_row(place, row[path_column], path_column)
        if recipe.task == "multilabel":
            label: Any = read_marks(place, row, recipe.classes)
        elif (text := canonical(row["label"])) in recipe.classes:
            label = recipe.classes.index(text)
        else:
            raise ArgumentError(
                f"{place}: label {text!r} is no class of the network; its classes are "
                f"{', '.join(recipe.classes)}"
            )
        first = rows.setdefault(name, number)
        if str(found.setdefault(name, label)) != str(label):  # as texts, because of NaN
            raise ArgumentError(
                f"{place}: {name} has another label in row {first}: keep one of the rows"
            )
    if not found:
        raise ArgumentError(f"{table} holds no label")
    return found


def predict(
    model: TrainedModel,
    files: Sequence[tuple[str, Path]],
    *,
    batch_size: int = 64,
    workers: int = 0,
    progress: Progress = silent,
) -> list[Prediction]:
    """Returns the network's answer to each file, given by name and path."""
    batches = read_files(
        files, model.recipe.preparation, batch_size=batch_size, workers=workers, progress=progress
    )
    return [answer for batch, pixels in batches for answer in _answers(model, batch, pixels)]


def _answers(model: TrainedModel, batch: Sequence[Read], pixels: Tensor) -> list[Prediction]:
    recipe, seen = model.recipe, model.recipe.seen
    rows = recipe.probabilities(model.scores(pixels)) if len(pixels) else torch.empty(0, 1)
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
    if broken := sum(entry.error is not None for entry in found):
        said.append(
            f"{broken} of {counted(len(found), 'file')} cannot be read: see the column error"
        )
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
        values = [round(value, 7) for value in entry.probabilities or ()]
        cells: list[Any] = values or [""] * len(recipe.classes)
        said = "; ".join(entry.predicted), *cells, "; ".join(entry.unlike), entry.error or ""
        rows.append([entry.name, *said])
    others = "image", "prediction", "unlike training", "error"
    write_table(path, [*others[:2], *class_columns(recipe.classes, others), *others[2:]], rows)


def class_columns(classes: Sequence[str], others: Sequence[str]) -> list[str]:
    """Returns the columns of probabilities: the classes, told from other columns of their name."""
    return [f"probability of {name}" if name in others else name for name in classes]
