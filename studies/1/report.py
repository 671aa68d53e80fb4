"""Tables of the first study's runs.

    python -m studies.1.report
    python -m studies.1.report --sweep study --runs DIR --out DIR    # of JSON files in a folder

Every arm is compared with the plain run of the same seed and setting. ``table.md`` holds the paired
differences with their 95% t interval, ``differences.csv`` the same with the p-value, as it is and
adjusted for the number of arms (Benjamini and Hochberg). Metrics under corruption are means over
the corruptions of a run.

Hardware and time: a minute on a CPU. Expected: docs/evidence.md.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

from scipy.stats import false_discovery_control

from inmerge_wrap.robustness.metrics import paired_difference
from studies.common.names import GLOSSARY, in_words
from studies.common.records import difference_text, name_of, raw_runs, read_runs, spread

from .run import RUNS

# -- settings --------------------------------------------------------------------------------------

METRICS = {  # shown, higher is better -> field of a run
    "accuracy": "accuracy",
    "balanced accuracy": "balanced_error",
    "AUROC": "auroc",
}
COMPARED = ("balanced accuracy", "AUROC")
WHERE = ("clean", "corrupted")
SETTING = {  # field of a run -> how a title names it
    "dataset": "{}",
    "arch": "{}",
    "size": "{} px",
    "train_images": "{} images",
    "epochs": "{} epochs",
    "batch_size": "batch {}",
    "lr": "lr {:g}",
    "weight_decay": "weight decay {:g}",
    "label_noise": "{:.0%} random labels",
    "weights": "from {}",
}
SILENT = {"label_noise": 0.0, "weights": "", "weight_decay": 5e-4}

Runs = dict[str, dict[int, dict[str, Any]]]  # arm -> seed -> result
Row = dict[str, Any]


# -- numbers ---------------------------------------------------------------------------------------


def by_setting(results: list[Row], *, by_architecture: bool = True) -> dict[str, Runs]:
    """Setting -> arm -> seed -> result.

    Raises:
        SystemExit: If there is no run, or two of the same arm, seed and setting.
    """
    settings: dict[str, Runs] = defaultdict(lambda: defaultdict(dict))
    if not results:
        raise SystemExit("there are no runs: make some with python -m studies.1.run")
    for result in sorted(results, key=lambda result: name_of(result["run"])):
        run = result["run"]
        shown = {name: run[name] for name in SETTING if run[name] != SILENT.get(name)}
        if not by_architecture:
            del shown["arch"]
        setting = ", ".join(SETTING[name].format(value) for name, value in shown.items())
        arm, seed = settings[setting][run["arm"]], run["seed"]
        if seed in arm:
            raise SystemExit(f"{setting}: there is a second run of {run['arm']!r}, seed {seed}")
        arm[seed] = result
    return settings


def best_first(runs: Runs) -> Runs:
    """Plain, then the others by their mean AUROC on clean images."""

    def place(arm: str) -> tuple[bool, float]:
        return arm != "plain", -mean(value(run, "AUROC", "clean") for run in runs[arm].values())

    return {arm: runs[arm] for arm in sorted(runs, key=place)}


def value(result: dict[str, Any], metric: str, where: str) -> float:
    """A metric of one run, higher is better; under corruption the mean over the corruptions."""
    rows = [row for name, row in result["test"].items() if (name == "clean") == (where == "clean")]
    found = mean(row[METRICS[metric]] for row in rows)
    return 1.0 - found if metric == "balanced accuracy" else found


def merged_share(done: dict[int, dict[str, Any]]) -> float | None:
    """Merged over drawn pairs of all runs of an arm; None where it drew none."""
    found = [run["merging"] for run in done.values() if "merging" in run]
    drawn = sum(run["drawn"] for run in found)
    return sum(run["merged"] for run in found) / drawn if drawn else None


def compare(runs: Runs, setting: str, baseline: str) -> list[Row]:
    """Each arm against the baseline's runs of the same seeds, with adjusted p-values.

    Raises:
        SystemExit: If the baseline has no run.
    """
    if baseline not in runs:
        raise SystemExit(f"{setting}: there is no run of {baseline!r} to compare with")
    rows: list[Row] = []
    for metric in COMPARED:
        for where in WHERE:
            block: list[Row] = []
            for arm, done in runs.items():
                seeds = sorted(set(done) & set(runs[baseline]))
                if arm == baseline or not seeds:
                    continue
                mine, plain = (
                    [value(runs[name][seed], metric, where) for seed in seeds]
                    for name in (arm, baseline)
                )
                row = {"setting": setting, "arm": arm, "metric": metric, "images": where}
                row |= {"mean": mean(mine), "difference": paired_difference(mine, plain)}
                block.append(row)
            tested = [row for row in block if "p_t" in row["difference"]]
            if tested:
                adjusted = false_discovery_control([row["difference"]["p_t"] for row in tested])
                for row, p in zip(tested, adjusted, strict=True):
                    row["p_adjusted"] = float(p)
            rows += block
    return rows


def write_csv(rows: list[Row], path: Path) -> None:
    fields = ["sweep", "setting", "arm", "metric", "images", "n", "mean", "difference"]
    fields += ["low", "high", "p_t", "p_adjusted"]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            found = row["difference"]
            flat = {**found, **row, "difference": found["mean"]}
            writer.writerow(
                {
                    name: f"{flat[name]:.5f}" if isinstance(flat.get(name), float) else flat[name]
                    for name in fields
                    if name in flat
                }
            )


def table(setting: str, runs: Runs, rows: list[Row], baseline: str) -> str:
    """Markdown: differences from the baseline, and what each arm cost."""
    found = {(row["arm"], row["metric"], row["images"]): row for row in rows}

    def cell(arm: str, metric: str, where: str) -> str:
        if arm == baseline:
            return spread([value(run, metric, where) for run in runs[arm].values()])
        if (arm, metric, where) not in found:  # no seed that the baseline has, too
            return ""
        row = found[arm, metric, where]
        text = difference_text(row["difference"])
        return f"**{text}**" if row.get("p_adjusted", 1.0) < 0.05 else text

    lines = [f"### {setting}", ""]
    for metric in COMPARED:
        heads = ["arm", *(f"{metric}, {where}" for where in WHERE)]
        lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for arm in runs:
            cells = [in_words(arm), *(cell(arm, metric, where) for where in WHERE)]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    heads = ["arm", "seeds", "passes: train, test", "pairs merged", "accuracy, clean"]
    lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for arm, done in runs.items():
        some, share = next(iter(done.values())), merged_share(done)
        passes = f"{some['training_passes']:g}, {some['inference_passes']}"
        cells = [in_words(arm), str(len(done)), passes]
        cells.append("" if share is None else f"{share:.1%}")
        cells.append(spread([value(run, "accuracy", "clean") for run in done.values()]))
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"The row of {in_words(baseline)}: means over the seeds, ± their standard deviation. The "
        "other rows: paired differences from it, with 95% intervals. Bold: an adjusted p below "
        f"0.05. {GLOSSARY}",
    ]
    return "\n".join(lines) + "\n"


# -- what is asked for -----------------------------------------------------------------------------

SWEEPS = {  # as the runs name them -> heading of the table
    "study": "All arms",
    "figure2": "Merge weight and probability",
    "figure2-transient": "Merge weight and probability, no merge stays",
    "figure3": "Merged depth and threshold",
    "figure3-transient": "Merged depth and threshold, no merge stays",
    "architectures": "Architectures",
    "architectures-transient": "Architectures, no merge stays",
}


def report(sweep: str, results: list[Row]) -> tuple[str, list[Row]]:
    """Returns the tables of a sweep and its differences."""
    architectures = sweep.removesuffix("-transient") == "architectures"
    settings = by_setting(results, by_architecture=not architectures)
    rows: list[Row] = []
    text = []
    for setting, runs in settings.items():
        if architectures:
            groups = [
                (
                    f"{setting}, {arch}",
                    {arm: done for arm, done in runs.items() if arm.startswith(f"{arch}: ")},
                    f"{arch}: plain",
                )
                for arch in dict.fromkeys(arm.split(": ")[0] for arm in runs)
            ]
        else:
            groups = [(setting, best_first(runs), "plain")]
        for name, own, baseline in groups:
            found = compare(own, name, baseline)
            text.append(table(name, own, found, baseline))
            rows += found
    return "\n".join(text), [{"sweep": sweep, **row} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sweep", nargs="+", choices=list(SWEEPS), default=list(SWEEPS), help="(default: all)"
    )
    parser.add_argument(
        "--runs", type=Path, help="folder of JSON files of one sweep (default: runs.jsonl.gz)"
    )
    parser.add_argument(
        "--out", type=Path, default=RUNS.parent, help="where to write (default: the study's folder)"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    kept = [] if options.runs else read_runs(RUNS)
    rows: list[Row] = []
    text = []
    for sweep in options.sweep:
        own = raw_runs(options.runs) if options.runs else [r for r in kept if r["sweep"] == sweep]
        tables, found = report(sweep, own)
        text.append(f"## {SWEEPS[sweep]}\n\n{tables}")
        rows += found
    write_csv(rows, options.out / "differences.csv")
    (options.out / "table.md").write_text("\n".join(text))
    print(f"Written: differences.csv and table.md to {options.out}")


if __name__ == "__main__":
    main()
