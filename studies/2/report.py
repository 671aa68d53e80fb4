"""Power, tables and pictures of the second study's runs.

    python -m studies.2.report power
    python -m studies.2.report report
    python -m studies.2.report report --part validation --out DIR   # for choosing

``power`` says, from pilot runs, how the paired differences scatter and how many pairs would find
one of .01 in four cases of five: ``power.json`` and ``power.md``. ``report`` writes
``differences.csv`` (every arm minus plain, minus EMA and minus noise of the same size, per data set
and pooled over seeds, with 95% intervals and adjusted p), ``table.md``, ``reanalysis.csv`` and
``.md`` (pooled over data sets with random effects, see reanalysis.py), and into ``--pictures``
``forest-*.png``, ``auroc-*.png`` and ``calibration-*.png`` (differences with intervals),
``families-*.png`` (by family of corruption) and, of the dial's arms, ``dial.png``.

Hardware and time: a minute on a CPU, and ten with the pictures. Expected: docs/evidence.md.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Mapping, Sequence
from itertools import product
from math import sqrt
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
import numpy as np
import pandas

from inmerge_wrap.files import write_json
from studies.common.exams import FAMILIES
from studies.common.forest import Mark, draw_forest
from studies.common.names import GLOSSARY, in_words
from studies.common.records import (
    difference_text,
    environment,
    raw_runs,
    read_runs,
    spread,
)
from studies.common.statistics import pairs_needed

from .paired import (
    BETTER_BELOW,
    POOLED,
    SCALED,
    Difference,
    Key,
    Runs,
    Setting,
    by_setting,
    compare,
    pools,
    values,
)
from .reanalysis import reanalysis, reanalysis_table
from .run import ARMS, CONFIRMING, HERE, RUNS, STEPS_OF_THE_DIAL, dial_arms

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

# -- settings --------------------------------------------------------------------------------------

BASELINES = ("plain", "EMA .98", "Gaussian noise 0.3")
CLAIMS = [  # what the study wants to say something about, and so computes the power of
    ("balanced accuracy", "clean"),
    ("balanced accuracy", "corrupted"),
    ("AUROC", "corrupted"),
    ("calibration error", "clean"),
    ("calibration error", "corrupted"),
]
BLOCKS = (  # of the table: few columns, so that a page shows them whole
    (("balanced accuracy", "clean"), ("balanced accuracy", "corrupted")),
    (("AUROC", "corrupted"), ("retained", "corrupted")),
    (("calibration error", "clean"), ("calibration error", "corrupted")),
)
DRAWN = {"balanced accuracy": "forest", "AUROC": "auroc", "calibration error": "calibration"}
# Okabe and Ito's colours, distinct to every kind of colour vision.
GROUPS = {
    "merging after each step, as in the paper": "#D55E00",
    "merging in the weights, for the gradient alone": "#0072B2",
    "noise of the same size": "#009E73",
    "other methods": "#555555",
}
MARKERS = "osD^v<>P"
EFFECT = 0.01
CONFIRMED = {regime.dataset for regime in CONFIRMING.values()}
ENOUGH_PAIRS = 3  # to be drawn


def group_of(arm: str) -> str:
    """What kind of method an arm is, by its name."""
    if " noise " in arm:  # also where the change stays
        return "noise of the same size"
    for start, group in zip(("persistent", "transient"), GROUPS, strict=False):
        if arm.startswith(start):
            return group
    return "other methods"


def in_order(arms: Sequence[str]) -> list[str]:
    """Arms as study.py lists them, combinations after the first of theirs."""
    places = {arm: place for place, arm in enumerate((*ARMS, SCALED))}
    return sorted(arms, key=lambda arm: (places.get(arm.split(" + ")[0], len(places)), arm))


def drawn_arms(found: Mapping[Key, Difference], name: str, measure: str) -> list[str]:
    """The arms of a picture: those with enough pairs, if any arm has enough.

    A temperature changes no decision, so it is drawn for calibration alone.
    """
    pairs = {
        arm: one.n
        for (setting, arm, what, _), one in found.items()
        if (setting, what) == (name, measure) and (arm != SCALED or what == "calibration error")
    }
    enough = min(ENOUGH_PAIRS, max(pairs.values()))
    return in_order([arm for arm, count in pairs.items() if count >= enough])


def slug(name: str) -> str:
    """A name as part of a file name."""
    return "-".join(re.findall(r"[a-z0-9.]+", name.lower()))


# -- power -----------------------------------------------------------------------------------------


def power_rows(found: Mapping[Key, Difference]) -> list[dict[str, Any]]:
    """Of each comparison the scatter of one pair, and the pairs that an effect of .01 needs.

    The row "typical" has the root mean square over the arms, which a handful of pairs of one arm
    estimates badly.
    """
    rows = []
    for setting in dict.fromkeys(key[0] for key in found):
        for measure, where in CLAIMS:
            sds = {
                arm: one.sd
                for (place, arm, *what), one in found.items()
                if place == setting and what == [measure, where] and one.sd
            }
            if not sds:
                continue
            sds = {arm: sds[arm] for arm in in_order(list(sds))}
            sds["typical"] = sqrt(mean(sd**2 for sd in sds.values()))
            for arm, sd in sds.items():
                row = {"setting": setting, "arm": arm, "measure": measure, "images": where}
                one = found.get((setting, arm, measure, where))
                row |= {"pilot_pairs": one.n if one else None, "sd": round(sd, 5)}
                rows.append(row | {"pairs_needed": pairs_needed(sd, EFFECT)})
    return rows


def power_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: pairs needed, and in brackets the standard deviation of a paired difference."""
    lines = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        cells = {
            (row["arm"], row["measure"], row["images"]): row
            for row in rows
            if row["setting"] == setting
        }
        heads = ["arm", *(f"{measure}, {where}" for measure, where in CLAIMS)]
        lines += [f"### {setting}", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for arm in dict.fromkeys(arm for arm, *_ in cells):
            texts = [in_words(arm)]
            for claim in CLAIMS:
                row = cells.get((arm, *claim))
                many = row and (row["pairs_needed"] or "> 10,000")
                texts.append(f"{many} ({row['sd']:.3f})" if row else "")
            lines.append(f"| {' | '.join(texts)} |")
        lines.append("")
    lines.append(
        f"Pairs with which a difference of {EFFECT} from plain is found in 80% of studies (paired "
        "t test, two-sided, 5%); in brackets the standard deviation of one paired difference. "
        "Pooled: pairs on every data set."
    )
    return "\n".join(lines) + "\n"


# -- tables ----------------------------------------------------------------------------------------


def write_csv(found: Mapping[str, Mapping[Key, Difference]], path: Path) -> None:
    """One line for each difference; baseline -> differences."""
    names = ["baseline", "setting", "arm", "measure", "images"]
    numbers = ["n", "mean", "low", "high", "sd", "p", "p_adjusted"]
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*names, *numbers])
        for baseline, differences in found.items():
            for key, one in differences.items():
                cells = [getattr(one, name) for name in numbers]
                writer.writerow([baseline, *key, *map(as_cell, cells)])


def as_cell(value: float | int | None) -> str:
    """A number of the CSV file."""
    if value is None:
        return ""
    return f"{value:.5f}" if isinstance(value, float) else str(value)


def text_of(one: Difference) -> str:
    """Mean and interval; bold where the adjusted p is below 5%."""
    text = difference_text({k: v for k, v in vars(one).items() if v is not None})
    return f"**{text}**" if one.p_adjusted is not None and one.p_adjusted < 0.05 else text


def table(
    settings: Mapping[Setting, Runs], found: Mapping[Key, Difference], part: str, baseline: str
) -> str:
    """Markdown: the baseline's own figures, then every arm's differences from it."""
    by_name = {str(setting): runs for setting, runs in settings.items()}
    lines = []
    for name in dict.fromkeys(key[0] for key in found):
        arms = in_order(list(dict.fromkeys(key[1] for key in found if key[0] == name)))
        lines += [f"### {name}", ""]
        for claims in BLOCKS:
            heads = ["arm", *(f"{measure}, {where}" for measure, where in claims), "pairs"]
            lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
            if name in by_name:
                scores = [values(result, part) for result in by_name[name][baseline].values()]
                own = [spread([score[claim] for score in scores]) for claim in claims]
                cells = [in_words(baseline), *own, str(len(scores))]
                lines.append(f"| {' | '.join(cells)} |")
            for arm in arms:
                here = [found.get((name, arm, *claim)) for claim in claims]
                if any(here):
                    pairs = max(one.n for one in here if one)
                    cells = [in_words(arm), *(text_of(one) if one else "" for one in here)]
                    lines.append(f"| {' | '.join([*cells, str(pairs)])} |")
            lines.append("")
    lines.append(
        f"Paired differences from {in_words(baseline)} with their 95% interval, {part} part; its "
        "own row: means ± standard deviations. Bold: p below 5% after adjustment for the number of "
        "arms. Retained: the share of the clean balanced accuracy that is left under corruption. "
        f"{GLOSSARY}"
    )
    return "\n".join(lines) + "\n"


# -- pictures --------------------------------------------------------------------------------------


def save(figure: Any, path: Path) -> None:
    """White behind it, so that a dark page shows it as it is."""
    figure.savefig(path, dpi=150, facecolor="white")
    plt.close(figure)


def draw_differences(
    found: Mapping[Key, Difference], names: Sequence[str], measure: str, title: str, path: Path
) -> None:
    """A forest plot of one measure: arms by rows, clean and corrupted images side by side.

    The first of ``names`` is drawn large; small hollow marks are the data sets that it pools.
    """
    arms = drawn_arms(found, names[0], measure)
    marks = [
        Mark(name, MARKERS[n % len(MARKERS)], filled=not n, size=3.5 if n else 5.5)
        for n, name in enumerate(names)
    ]
    cells = {}
    for arm, where, (number, name) in product(arms, ("clean", "corrupted"), enumerate(names)):
        if one := found.get((name, arm, measure, where)):
            ends = (None, None) if number else (one.low, one.high)
            cells[in_words(arm), f"{where} images", name] = (one.mean, *ends)
    better = "← better      worse →" if measure in BETTER_BELOW else "← worse      better →"
    draw_forest(
        {in_words(arm): group_of(arm) for arm in arms},
        ["clean images", "corrupted images"],
        marks,
        cells,
        GROUPS,
        title=title,
        axis_label=f"{measure}\nminus plain training\n{better}",
        path=path,
    )


def draw_families(found: Mapping[Key, Difference], name: str, title: str, path: Path) -> None:
    """Arms by rows, families of corruption by columns: differences in balanced accuracy."""
    arms = drawn_arms(found, name, "balanced accuracy")
    columns = ("clean", *FAMILIES)
    cells = [[found[name, arm, "balanced accuracy", where] for where in columns] for arm in arms]
    grid = np.array([[one.mean for one in row] for row in cells])
    reach = max(0.005, float(np.abs(grid).max()))
    figure, axis = plt.subplots(figsize=(9.5, 1.6 + 0.3 * len(arms)), layout="constrained")
    image = axis.imshow(grid, cmap="PuOr_r", vmin=-reach, vmax=reach, aspect="auto")
    for (row, column), value in np.ndenumerate(grid):
        p = cells[row][column].p_adjusted
        axis.text(
            *(column, row, f"{value:+.3f}"),
            ha="center",
            va="center",
            fontsize=8,
            fontweight="bold" if p is not None and p < 0.05 else "normal",
            color="white" if abs(value) > 0.65 * reach else "black",
        )
    axis.set_xticks(range(len(columns)), columns, fontsize=8)
    axis.set_yticks(range(len(arms)), list(map(in_words, arms)), fontsize=8)
    axis.set_title(f"{title}\nbold: adjusted p below 5%", fontsize=9)
    figure.colorbar(image, ax=axis, label="balanced accuracy minus plain", aspect=40, pad=0.02)
    save(figure, path)


def draw_dial(found: Mapping[Key, Difference], names: Sequence[str], path: Path) -> None:
    """From kernels pushed apart to kernels pulled together: clean and corrupted, minus plain."""
    kinds = {
        "transient": "merging in the weights, for the gradient alone",
        "persistent": "merging after each step, as in the paper",
    }
    columns = [("balanced accuracy", "clean"), ("balanced accuracy", "corrupted")]
    figure, axes = plt.subplots(
        len(names), 2, figsize=(10, 1 + 2.9 * len(names)), layout="constrained", squeeze=False
    )
    for line, name in zip(axes, names, strict=True):
        for axis, (measure, where) in zip(line, columns, strict=True):
            axis.axhline(0, color="0.8", linewidth=0.8)
            for kind, group in kinds.items():
                points: list[tuple[float, Difference]] = [(0.0, Difference(0.0, 0))]
                for step in STEPS_OF_THE_DIAL:
                    way = "apart" if step < 0 else "together"
                    one = found.get((name, f"{kind}, {way} {abs(step)}", measure, where))
                    if one is not None:
                        points.append((step, one))
                if len(points) > 1:
                    # A little aside, so that neither interval hides the other.
                    aside = 0.004 if kind == "persistent" else -0.004
                    points.sort(key=lambda point: point[0])
                    shifted = [(step + aside, one) for step, one in points]
                    draw_line(axis, shifted, GROUPS[group], kind)
            axis.set_title(f"{name}: {where} images", fontsize=9)
            axis.set_xlabel(
                "← pushed apart    share of the difference    pulled together →", fontsize=8.5
            )
            axis.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel("balanced accuracy\nminus plain, 95% interval")
    axes[0, 0].legend(frameon=False, fontsize=8)
    save(figure, path)


def draw_line(
    axis: Axes, points: Sequence[tuple[float, Difference]], colour: str, label: str
) -> None:
    """Means joined by a line, each with its interval."""
    means = [one.mean for _, one in points]
    axis.plot([x for x, _ in points], means, "-o", color=colour, label=label)
    for x, one in points:
        if one.low is not None:
            axis.plot([x, x], [one.low, one.high], color=colour, lw=1, alpha=0.6)


# -- what is asked for -----------------------------------------------------------------------------


def results(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The runs of the study, or of a folder."""
    return raw_runs(options.runs) if options.runs else read_runs(RUNS)


def write_power(options: argparse.Namespace) -> None:
    """power.json and power.md."""
    rows = power_rows(compare(by_setting(results(options)), "plain", options.part))
    if not rows:
        raise SystemExit("the power needs two seeds of plain and of another arm")
    content = {"part": options.part, "effect": EFFECT, "rows": rows, "environment": environment()}
    write_json(options.out / "power.json", content)
    text = power_table(rows)
    (options.out / "power.md").write_text(text)
    print(text)


def write_report(options: argparse.Namespace) -> None:
    """differences.csv, table.md and the pictures."""
    settings = by_setting(results(options))
    found = {name: compare(settings, name, options.part) for name in BASELINES}
    differences = found["plain"]
    if not differences:
        raise SystemExit("there is no run of 'plain' and another arm to compare")
    write_csv(found, options.out / "differences.csv")
    if options.part == "test" and any(s.dataset in CONFIRMED for s in settings):
        rows = reanalysis(settings)
        frame = pandas.DataFrame(rows)
        frame.to_csv(options.out / "reanalysis.csv", index=False, float_format="%.5f")
        (options.out / "reanalysis.md").write_text(reanalysis_table(rows))
    text = table(settings, differences, options.part, "plain")
    (options.out / "table.md").write_text(text)
    print(text)
    if options.pictures:
        draw_all(settings, differences, options)


def draw_all(
    settings: Mapping[Setting, Runs], differences: Mapping[Key, Difference], options: Any
) -> None:
    """All pictures."""
    options.pictures.mkdir(parents=True, exist_ok=True)
    dial = {key: one for key, one in differences.items() if is_of_dial(key[1])}
    others = {key: one for key, one in differences.items() if not is_inside_of_dial(key[1])}
    for name in dict.fromkeys(key[0] for key in others if key[1] != SCALED):
        members = pools(settings).get(name, [])
        title = f"{name}: paired differences from plain, {options.part} part, 95% intervals"
        for measure, kind in DRAWN.items():
            place = options.pictures / f"{kind}-{slug(name)}.png"
            draw_differences(others, [name, *members], measure, title, place)
        place = options.pictures / f"families-{slug(name)}.png"
        draw_families(others, name, f"{name}: by family of corruption", place)
    if dial:
        names = list(dict.fromkeys(key[0] for key in dial))
        names.sort(key=lambda name: not name.startswith(POOLED))
        draw_dial(dial, names, options.pictures / "dial.png")


def is_of_dial(arm: str) -> bool:
    """Returns whether an arm is one of the dial's; its controls are not."""
    return arm in dial_arms()


def is_inside_of_dial(arm: str) -> bool:
    """Returns whether an arm lies between the ends of the dial, and so is drawn there alone."""
    return is_of_dial(arm) and not arm.endswith(f" {max(STEPS_OF_THE_DIAL)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["power", "report"], help="what to write")
    parser.add_argument(
        "--runs", type=Path, help="folder of JSON files (default: the study's runs.jsonl.gz)"
    )
    parser.add_argument(
        "--part",
        choices=["validation", "test"],
        default="test",
        help="of the images; choices are made on validation (default: %(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, default=HERE, help="where to write (default: the study's folder)"
    )
    parser.add_argument("--pictures", type=Path, help="where the PNG files go (default: none)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    write_power(options) if options.command == "power" else write_report(options)


if __name__ == "__main__":
    main()
