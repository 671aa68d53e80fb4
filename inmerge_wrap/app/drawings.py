"""Drawings of a report as plain data: marks at pixels, which the template turns into SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

QUARTERS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass
class Drawing:
    """Axes and what is on them."""

    title: str
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    size: tuple[int, int]  # of the area inside the axes, in pixels
    left: int = 52  # pixels left of it, for labels
    x_ticks: Sequence[float] = ()
    y_ticks: Sequence[float] = ()
    x_label: str = ""
    y_label: str = ""
    marks: list[dict[str, Any]] = field(default_factory=list)

    def x(self, value: float) -> float:
        """Pixel of a value."""
        low, high = self.x_range
        return round(self.left + (value - low) / (high - low) * self.size[0], 1)

    def y(self, value: float) -> float:
        """Pixel of a value; the larger, the higher."""
        low, high = self.y_range
        return round(10 + (high - value) / (high - low) * self.size[1], 1)

    def line(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        """Adds a line through points; ``kind`` is its classes of style."""
        places = " ".join(f"{self.x(across)},{self.y(up)}" for across, up in points)
        self.marks.append({"shape": "line", "kind": kind, "points": places})

    def dot(self, at: tuple[float, float], kind: str, radius: float, title: str = "") -> None:
        """Adds a dot; a title shows under the pointer."""
        place = {"x": self.x(at[0]), "y": self.y(at[1]), "radius": round(radius, 1)}
        self.marks.append({"shape": "dot", "kind": kind, "title": title, **place})

    def text(self, x: float, y: float, text: str) -> None:
        """Adds words that end at pixels."""
        self.marks.append({"shape": "text", "x": x, "y": y, "text": text})


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Returns round numbers inside a range."""
    rough = max(high - low, 1e-9) / about
    power = 10.0 ** np.floor(np.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    first = np.ceil(low / step - 1e-9) * step + 0.0  # which turns -0 into 0
    return [float(round(value, 6)) for value in np.arange(first, high + step / 1e6, step)]


def draw_reliability(bins: Sequence[Mapping[str, Any]]) -> Drawing:
    """Draws stated probability against how often it was right; a dot's area is its images."""
    drawing = Drawing(
        "Reliability diagram", (0, 1), (0, 1), (320, 320), x_ticks=QUARTERS, y_ticks=QUARTERS,
        x_label="probability the network states", y_label="how often it is right",
    )  # fmt: skip
    drawing.line([(0, 0), (1, 1)], "ideal")
    most = max((entry["n"] for entry in bins), default=1)
    for entry in bins:
        at = entry["stated"]
        drawing.line([(at, entry["low"]), (at, entry["high"])], "blue thin")
        title = f"{entry['n']} images: stated {at:.2f}, right {entry['value']:.2f}"
        drawing.dot((at, entry["value"]), "blue", 3 + 7 * (entry["n"] / most) ** 0.5, title)
    return drawing


def draw_roc(entry: Mapping[str, Any]) -> Drawing:
    """Draws the ROC of one class; the dot is the operating point that is in use."""
    drawing = Drawing(
        f"ROC of {entry['class']}", (0, 1), (0, 1), (220, 220), x_ticks=QUARTERS, y_ticks=QUARTERS,
        x_label="1 − specificity", y_label="sensitivity",
    )  # fmt: skip
    drawing.line([(0, 0), (1, 1)], "ideal")
    drawing.line(entry["roc"], "line blue")
    sensitivity, specificity = entry["sensitivity"]["value"], entry["specificity"]["value"]
    if sensitivity is not None and specificity is not None:
        title = f"sensitivity {sensitivity:.3f}, specificity {specificity:.3f}"
        drawing.dot((1 - specificity, sensitivity), "orange", 6, title)
    return drawing


def draw_families(families: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> Drawing:
    """Draws balanced accuracy by corruption family with intervals; a line marks clean images."""
    ends = [
        entry.get(f"balanced_accuracy{suffix}", entry["balanced_accuracy"])
        for entry in families
        for suffix in ("", "_low", "_high")
    ]
    count, low, high = len(families), max(0.0, min(ends) - 0.03), min(1.0, max(ends) + 0.03)
    drawing = Drawing(
        "Balanced accuracy by family of damage", (low, high), (0, count),
        (282, 34 * count), left=128, x_ticks=ticks(low, high, 4), x_label="balanced accuracy",
    )  # fmt: skip
    for place, entry in enumerate(reversed(families)):
        value, middle = entry["balanced_accuracy"], place + 0.5
        if entry["family"] == "clean":
            drawing.line([(value, 0), (value, count)], "ideal")
        if "balanced_accuracy_low" in entry:
            span = [(entry[f"balanced_accuracy_{end}"], middle) for end in ("low", "high")]
            drawing.line(span, "line blue")
        drawing.dot((value, middle), "blue", 5.5)
        drawing.text(116, drawing.y(middle) + 4, names[entry["family"]])
        drawing.text(460, drawing.y(middle) + 4, f"{value:.3f}")
    return drawing


def draw_course(runs: Sequence[Mapping[str, Any]]) -> Drawing | None:
    """Draws validation AUROC over the epochs of every run; a ring marks the epoch that was kept.

    Returns None if it is undefined or there is only one epoch.
    """
    values = [e["val_auroc"] for run in runs for e in run["history"] if e["val_auroc"] is not None]
    epochs = max(len(run["history"]) for run in runs)
    if not values or epochs < 2:
        return None
    low, high = max(0.0, min(values) - 0.02), min(1.0, max(values) + 0.02)
    whole = sorted({1, *(round(tick) for tick in ticks(1, epochs, 6))})
    drawing = Drawing(
        "AUROC on validation over the epochs", (1, epochs), (low, high), (400, 216),
        x_ticks=whole, y_ticks=ticks(low, high), x_label="epoch",
    )  # fmt: skip
    for run in runs:
        # Dashed, because the two of a pair are drawn over each other where they agree.
        colour = "orange dashed" if run["method"] == "merged" else "blue"
        history = [entry for entry in run["history"] if entry["val_auroc"] is not None]
        points = [(entry["epoch"], entry["val_auroc"]) for entry in history]
        drawing.line(points, f"line {colour}")
        for at in points:
            if at[0] == run["best_epoch"]:
                drawing.dot(at, f"{colour} ring", 5)
    return drawing
