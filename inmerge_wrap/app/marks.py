"""Labels of new images from a CSV file, in the order of a network's classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from inmerge_wrap.errors import ArgumentError
from inmerge_wrap.images.finding import mark_of
from inmerge_wrap.images.preparation import Recipe
from inmerge_wrap.images.tables import read_table

__all__ = ["read_labels"]


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
        elif label := row["label"]:
            if label not in recipe.classes:
                raise ArgumentError(
                    f"{table}, row {number}: label {label!r} is no class of the network; its "
                    f"classes are {', '.join(recipe.classes)}"
                )
            found[name] = recipe.classes.index(label)
    if not found:
        raise ArgumentError(f"{table} holds no label")
    return found
