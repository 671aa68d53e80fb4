"""Tables and pictures of the third study's runs.

    python -m studies.3.report                                  # differences.csv and others
    python -m studies.3.report --pictures docs/images/study3

``training.csv``: plain training by augmentation, length and rate, scored on the validation part.
``differences.csv``: every cell, arm minus plain, channel noise and channel dropout.
``mechanism.csv``: what each network is like inside. ``map.csv``: plain training and merging per
image by augmentation and number of images. ``pooled.csv``: the confirmation over its data
sets, with the primary family. ``laboratories.csv``: the other laboratories, when all their pairs
have run. Pictures:
``forest-*.png`` (each data set of the confirmation, and pooled), ``choice.png`` (the pilot). What
has no runs yet is not written. ``docs/.diagram.py`` draws the pictures of the pages.

Hardware and time: a minute on a CPU. Expected: README.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import matplotlib
import pandas

from studies.common.forest import Mark, draw_forest
from studies.common.records import read_runs
from studies.common.statistics import random_effects

from .analysis import (
    Arms,
    Group,
    by_data_set,
    chart,
    differences,
    grouped,
    inside,
    laboratories,
    pooled,
    training,
)
from .arms import ARMS, LITE0

matplotlib.use("Agg")

HERE = Path(__file__).parent
RUNS = HERE / "runs.jsonl.gz"
AUGMENTATIONS = {  # as the runs name them -> in words
    "none": "none",
    "flips": "flips",
    "noise and blur": "flips, noise, blur",
    "trivial": "TrivialAugment",
    "augmix": "AugMix",
    "trivial and jitter": "TrivialAugment, colour jitter",
}
COLOURS = {
    "merging": "#0072B2",
    "other disturbances for each image": "#009E73",
    "other methods": "#555555",
}
MARKERS = "osD^v"
BETTER = "← worse      better →"


def group_of(arm: str) -> str:
    """What kind of method an arm is."""
    if arm.startswith("merging"):
        return "merging"
    each = ("channel noise", "channel dropout", "random erasing")
    return "other disturbances for each image" if arm in each else "other methods"


def write_tables(groups: Mapping[Group, Arms], out: Path) -> None:
    """Writes each table that has rows."""
    tables = {
        "training": training,
        "mechanism": inside,
        "map": chart,
        "differences": differences,
        "pooled": pooled,
        "laboratories": laboratories,
    }
    for name, table in tables.items():
        rows = table(groups)
        if rows:
            path = out / f"{name}.csv"
            pandas.DataFrame(rows).to_csv(path, index=False, float_format="%.5f")
            print(f"Written: {path}, {len(rows)} rows")


# -- pictures --------------------------------------------------------------------------------------


def draw_confirmation(groups: Mapping[Group, Arms], augmentation: str, path: Path) -> bool:
    """A forest plot of the confirmation: every data set with its interval, and pooled."""
    columns = {"AUROC": "AUROC, corrupted images", "balanced accuracy": "balanced accuracy, clean"}
    cells, names = {}, []
    for measure, images in (("AUROC", "corrupted"), ("balanced accuracy", "clean")):
        for arm in ARMS:
            found = by_data_set(groups, arm, "plain", augmentation, measure, images)
            if arm == "plain" or not found:
                continue
            for name, one in found.items():
                names += [name] if name not in names else []
                cells[arm, columns[measure], name] = (one.mean, one.low, one.high)
            if len(found) > 1:
                one = random_effects(list(found.values()))
                cells[arm, columns[measure], "pooled"] = (one.mean, one.low, one.high)
    if not cells:
        return False
    arms = dict.fromkeys(arm for arm, _, _ in cells)
    marks = [Mark("pooled", "o", below=-0.34)]
    marks += [
        Mark(name, MARKERS[1 + place], filled=False, size=3.5, below=-0.08 + 0.2 * place)
        for place, name in enumerate(names)
    ]
    draw_forest(
        {arm: group_of(arm) for arm in arms},
        list(columns.values()),
        marks,
        cells,
        COLOURS,
        title=f"Minus plain training, augmented by {AUGMENTATIONS[augmentation]}; 95% intervals",
        axis_label=f"minus plain training\n{BETTER}",
        path=path,
    )
    return True


def draw_choice(groups: Mapping[Group, Arms], path: Path) -> bool:
    """A forest plot of the arms on 600 images of blood cells: a row for each augmentation."""
    columns = {
        ("AUROC", "corrupted"): "AUROC, corrupted images",
        ("balanced accuracy", "clean"): "balanced accuracy, clean",
    }
    cell = {"dataset": "bloodmnist", "images": 600, "arch": LITE0, "confirmation": False}
    cells, rows = {}, {}
    for row in differences(groups):
        column = columns.get((row["measure"], row["tested_on"]))
        if column and row["baseline"] == "plain" and cell.items() <= row.items():
            beside = AUGMENTATIONS[row["augmentation"]]
            name = f"{row['arm']}, {beside} ({row['pairs']} pairs)"
            rows[name] = group_of(row["arm"])
            cells[name, column, "difference"] = (row["mean"], row["low"], row["high"])
    if not rows:
        return False
    draw_forest(
        rows,
        list(columns.values()),
        [Mark("difference")],
        cells,
        COLOURS,
        title="Blood cells, 600 images: paired differences from plain training; 95% intervals",
        axis_label=f"minus plain training\n{BETTER}",
        path=path,
    )
    return True


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=RUNS, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=HERE, help="(default: the study's folder)")
    parser.add_argument("--pictures", type=Path, help="where the PNG files go (default: none)")
    options = parser.parse_args()
    runs = read_runs(options.runs)
    if not runs:
        raise SystemExit(f"{options.runs} holds no runs: python -m studies.3.run, then collect")
    groups = grouped(runs)
    options.out.mkdir(parents=True, exist_ok=True)
    write_tables(groups, options.out)
    if not options.pictures:
        return
    options.pictures.mkdir(parents=True, exist_ok=True)
    drawn = {
        f"forest-{a}": draw_confirmation(groups, a, options.pictures / f"forest-{a}.png")
        for a in ("flips", "trivial")
    }
    drawn["choice"] = draw_choice(groups, options.pictures / "choice.png")
    for name, done in drawn.items():
        print(f"{name}: {'drawn' if done else 'no runs yet'}")


if __name__ == "__main__":
    main()
