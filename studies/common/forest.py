"""Forest plots: one row for each arm, its difference from a baseline with the 95% interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

WIDTH = 7.6  # inches; a page shows it at about 700 px, where 8 points are still read


@dataclass(frozen=True)
class Mark:
    """How one kind of difference is drawn in every row.

    Attributes:
        label: For the legend.
        marker: matplotlib's.
        filled: Whether the marker is; hollow and faint ones are secondary.
        size: Of the marker, in points.
        below: Distance from the middle of the row, in rows.
    """

    label: str
    marker: str = "o"
    filled: bool = True
    size: float = 5.5
    below: float = 0.0


Interval = tuple[float, float | None, float | None]  # mean, low, high
Cell = tuple[str, str, str]  # row, column, label of the mark


def draw_forest(
    rows: Mapping[str, str],
    columns: Sequence[str],
    marks: Sequence[Mark],
    cells: Mapping[Cell, Interval],
    colours: Mapping[str, str],
    *,
    title: str,
    axis_label: str,
    path: Path,
) -> None:
    """Writes the picture, on a white ground that a dark page shows as it is.

    Args:
        rows: Name of each row -> its group, a key of ``colours``; the first is on top.
        columns: Headings of the panels, which share one axis.
        marks: What is drawn in each row.
        cells: The differences; what is missing is left out.
        colours: Of each group, in the order of the legend.
        title: Above the panels.
        axis_label: Below each panel: what the difference is of, and which side is better.
        path: Of the PNG file.
    """
    pitch = 0.25 if len(marks) == 1 else 0.3
    figure, axes = plt.subplots(
        *(1, len(columns)),
        figsize=(WIDTH, 1.9 + pitch * len(rows)),
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for axis, column in zip(axes, columns, strict=True):
        _panel(axis, column, rows, marks, cells, colours)
        axis.set_xlabel(axis_label, fontsize=8.5)
    axes[0].set_yticks(range(len(rows)), list(rows), fontsize=8.5)
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    _legend(figure, rows, marks, colours)
    figure.suptitle(fill(title, 95), fontsize=9.5)
    figure.savefig(path, dpi=200, facecolor="white")
    plt.close(figure)


def _panel(
    axis: Axes,
    column: str,
    rows: Mapping[str, str],
    marks: Sequence[Mark],
    cells: Mapping[Cell, Interval],
    colours: Mapping[str, str],
) -> None:
    """Draws the differences of one column."""
    for place in range(1, len(rows), 2):
        axis.axhspan(place - 0.5, place + 0.5, color="0.955", linewidth=0)
    axis.axvline(0, color="0.45", linewidth=1)
    for place, (row, group) in enumerate(rows.items()):
        for mark in marks:
            if (row, column, mark.label) not in cells:
                continue
            middle, low, high = cells[row, column, mark.label]
            colour, line = colours[group], place + mark.below
            if low is not None and high is not None:
                width = 1.7 if mark.filled else 0.9
                axis.plot([low, high], [line] * 2, color=colour, lw=width)
            axis.plot(
                *(middle, line, mark.marker),
                color=colour,
                ms=mark.size,
                mfc=colour if mark.filled else "white",
                mew=0.9,
            )
    axis.set_title(column, fontsize=9.5)
    axis.tick_params(labelsize=8)
    axis.tick_params(axis="y", length=0)
    axis.locator_params(axis="x", nbins=5)
    axis.grid(axis="x", color="0.9", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)


def _legend(
    figure: Any, rows: Mapping[str, str], marks: Sequence[Mark], colours: Mapping[str, str]
) -> None:
    """Draws the groups that have rows and, of several marks, each of them."""
    handles = [
        plt.Line2D([], [], color=colour, marker="s", ls="", label=group)
        for group, colour in colours.items()
        if group in rows.values()
    ]
    if len(marks) > 1:
        handles += [
            plt.Line2D(
                *([], []),
                color="0.25",
                marker=mark.marker,
                ls="",
                ms=mark.size,
                mfc="0.25" if mark.filled else "white",
                label=mark.label,
            )
            for mark in marks
        ]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=legend_columns([str(handle.get_label()) for handle in handles]),
        frameon=False,
        fontsize=8.5,
    )


def legend_columns(labels: Sequence[str], widest: int = 105) -> int:
    """Returns the number of columns of a legend that fit into the width, in characters.

    Each column is as wide as its longest label, and a marker takes the room of six characters.
    """
    for count in range(min(len(labels), 4), 1, -1):
        columns = np.array_split(labels, count)
        if sum(max(map(len, column)) + 6 for column in columns) <= widest:
            return count
    return 1
