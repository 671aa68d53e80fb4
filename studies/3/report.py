"""Tables of the third study's runs.

    python -m studies.3.report

``training.csv``: plain training by augmentation, length and rate, scored on the validation part.
``differences.csv``: every cell, arm minus plain, channel noise and channel dropout.
``mechanism.csv``: what each network is like inside. ``map.csv``: plain training and merging per
image by augmentation and number of images. ``pooled.csv``: the confirmation over its data
sets, with the primary family. ``laboratories.csv``: the other laboratories, when all their pairs
have run. What has no runs yet is not written. ``docs/.diagram.py`` draws the pictures of the pages.

Hardware and time: a minute on a CPU. Expected: README.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import pandas

from studies.common.records import read_runs

from .analysis import (
    Arms,
    Group,
    chart,
    differences,
    grouped,
    inside,
    laboratories,
    pooled,
    training,
)

HERE = Path(__file__).parent
RUNS = HERE / "runs.jsonl.gz"


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=RUNS, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=HERE, help="(default: the study's folder)")
    options = parser.parse_args()
    runs = read_runs(options.runs)
    if not runs:
        raise SystemExit(f"{options.runs} holds no runs: python -m studies.3.run, then collect")
    groups = grouped(runs)
    options.out.mkdir(parents=True, exist_ok=True)
    write_tables(groups, options.out)


if __name__ == "__main__":
    main()
