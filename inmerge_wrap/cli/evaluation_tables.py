"""Tables of ``inmerge evaluate``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from inmerge_wrap.cli.tables import KEPT, Column, print_table

if TYPE_CHECKING:
    from inmerge_wrap.robustness import RobustnessResult


def print_result(result: RobustnessResult) -> None:
    settings = result.settings
    rows = _shown_rows(result)
    metrics = {"accuracy": 1, "auroc": 2, "balanced_error": KEPT, "ece": 0}
    columns = [Column("corruption", [_row_name(row) for row in rows], KEPT, justify="left")]
    columns += [
        Column(
            metric.replace("_", " "),
            [_interval_cell(row, metric) for row in rows],
            importance,
            wraps=True,
        )
        for metric, importance in metrics.items()
        if metric in result.rows[0]
    ]
    title = f"{settings['weights']} on {settings['data']} ({_part(settings)})"
    footer = (
        f"{_corruptions_said(settings)}; normalised with mean {_rounded(settings['mean'])}, "
        f"std {_rounded(settings['std'])}. In brackets: 95% confidence interval over "
        f"{_units(settings)}."
    )
    print_table(title, columns, [_row_style(row) for row in rows], footer)


def print_comparison(
    results: Mapping[str, RobustnessResult], differences: Mapping[str, list[dict[str, Any]]]
) -> None:
    first = next(iter(results))
    settings = results[first].settings
    rows = _shown_rows(results[first])
    columns = [Column("corruption", [_row_name(row) for row in rows], KEPT, justify="left")]
    for name, result in results.items():
        theirs = [result.row(row["corruption"], row["severity"]) for row in rows]
        cells = [f"{r['balanced_error']:.3f}" if "balanced_error" in r else "-" for r in theirs]
        columns.append(Column(name, cells, 0, wraps=True))
    for name, found in differences.items():
        by_row = {(entry["corruption"], entry["severity"]): entry for entry in found}
        entries = [by_row.get((row["corruption"], row["severity"]), {}) for row in rows]
        heading = f"{name} - {first}"
        cells = [_interval_cell(entry, "difference", sign="+") for entry in entries]
        columns.append(Column(heading, cells, KEPT, wraps=True))
    title = f"Balanced error on {settings['data']} ({_part(settings)})"
    footer = (
        f"{_corruptions_said(settings)}. A difference below 0 is better than {first}; in brackets: "
        f"paired 95% confidence interval over {_units(settings)}. It does not cover the variation "
        "between training seeds."
    )
    print_table(title, columns, [_row_style(row) for row in rows], footer)


def _shown_rows(result: RobustnessResult) -> list[dict[str, Any]]:
    return [row for row in result.rows if row["severity"] in (0, "mean") or row["kind"] == "attack"]


def _row_name(row: Mapping[str, Any]) -> str:
    name = str(row["corruption"])
    if row["kind"] == "attack":
        return f"{name} (eps {row['severity'] * 255:g}/255)"
    return {"clean": "none", "all": "mean of all"}.get(name, name)


def _row_style(row: Mapping[str, Any]) -> str:
    return "bold" if row["corruption"] in ("clean", "all") else ""


def _interval_cell(row: Mapping[str, Any], metric: str, sign: str = "") -> str:
    """Returns a figure and its interval, which may wrap between the two."""
    if metric not in row:
        return "-"
    cell = f"{row[metric]:{sign}.3f}"
    low, high = row.get(f"{metric}_low"), row.get(f"{metric}_high")
    if low is None or metric == "ece":
        return cell
    return f"{cell} ({low:.3f}-{high:.3f})" if not sign else f"{cell} ({low:+.3f}…{high:+.3f})"


def _units(settings: Mapping[str, Any]) -> str:
    return f"{settings['groups']} groups" if settings["groups"] else "images"


def _rounded(values: Sequence[float]) -> str:
    shown = ", ".join(f"{value:.4g}" for value in values)
    return f"[{shown}]"


def _part(settings: Mapping[str, Any]) -> str:
    return f"{settings['split']}, {settings['n']} images"


def _corruptions_said(settings: Mapping[str, Any]) -> str:
    severities = ", ".join(map(str, settings["severities"]))
    return f"Corruptions of preset {settings['preset']}, mean over severities {severities}"
