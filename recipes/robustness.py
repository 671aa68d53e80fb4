"""Compares exported networks on corrupted and attacked images: tables, JSON and a figure.

    python recipes/robustness.py plain=DIR/plain-seed0 plain=DIR/plain-seed1 \
        merged=DIR/merged-seed0 merged=DIR/merged-seed1 --data dermamnist --attacks fgsm pgd

What it does: runs each network over the test part, clean, under every corruption of the data set's
modality, and under attacks. Each network is `label=path` of a timm folder, as the other recipes and
`inmerge export` write it. Repeat a label for several training seeds of one method, in one order for
every label, so that differences are paired. Writes `robustness.json` and `curves.png` into --out.

Data: the test part of a MedMNIST set (`FLAG.npz` or `FLAG_SIZE.npz` in --data-root, downloaded if
missing), of a folder of class folders, or of the `split.csv` that own_images.py wrote.

Cost: 500 images of 28 px, 14 corruptions at three severities: 25 s of one CPU core for a network.
Expected: a balanced error that grows with the severity.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from itertools import cycle, product
from pathlib import Path
from typing import Any

import medmnist
import numpy as np
import timm
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from inmerge_wrap.app.model import Tempered
from inmerge_wrap.app.records import environment
from inmerge_wrap.errors import at_least
from inmerge_wrap.files import read_json, write_json
from inmerge_wrap.images.collection import spaced, units_of
from inmerge_wrap.images.files import DataError
from inmerge_wrap.images.folders import read_part
from inmerge_wrap.images.labelled import fit_images, read_npz
from inmerge_wrap.images.preparation import FILE, Recipe
from inmerge_wrap.robustness import Attack, RobustnessResult, evaluate_robustness, paired_difference
from inmerge_wrap.robustness.corruptions import CORRUPTIONS, DATASET_PRESETS, resolve_preset

# -- options ---------------------------------------------------------------------------------------

CELL = "{:.3f}", "{:.3f} [{:.3f}, {:.3f}]"  # without an interval, and with one
# Okabe and Ito's colours, safe for every kind of colour vision; yellow is too faint for lines.
STYLES = [*product("-:", "#000000 #0072B2 #D55E00 #009E73 #CC79A7 #56B4E9 #E69F00".split())]

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
add = parser.add_argument
add("models", nargs="+", metavar="label=path", help="a name and a timm folder")
add("--data", required=True, help="a 2D MedMNIST flag, a folder of images, or a split.csv")
add("--data-root", type=Path, default=Path("data"), help="folder of the npz file")
add("--size", type=int, default=28, help="side if no preparation.json says (default: %(default)s)")
add("--limit", type=at_least(1), help="use only LIMIT of the test images, evenly spaced")
add("--preset", nargs="+", help="a preset, or corruptions by name (default: that of the data)")
add("--severities", type=int, nargs="+", choices=range(1, 6), default=range(1, 6), help="1 to 5")
add("--attacks", nargs="*", default=[], choices=("fgsm", "pgd"), help="also attack the networks")
add("--eps", type=float, help="size of the attacks, in units of 1/255 (default: 2)")
add("--threshold", type=float, help="of binary and multi-label (default: as trained, or 0.5)")
add("--baseline", help="label to compare the others with (default: the first)")
add("--seed", type=int, default=0, help="seed of corruptions, attacks and bootstrap")
add("--bootstrap", type=int, default=1000, help="resamples for the intervals; 0 for none")
add("--batch-size", type=int, default=256, help="images per batch; does not affect the results")
add("--out", type=Path, default=Path("runs/robustness"), help="folder (default: %(default)s)")

Groups, Results = dict[str, list[Path]], dict[str, list[RobustnessResult]]
Data = tuple[Tensor, Tensor, str, list[str] | None]  # pixels in [0, 1], labels, task, patients


# -- data and networks -----------------------------------------------------------------------------


def read_test_part(options: argparse.Namespace, folders: list[Path]) -> Data:
    flag = options.data in medmnist.INFO  # whose pixels are read without a preparation
    facts = [(r and r.preparation, names) for r, names in map(expected, folders)]
    prepare, names = facts[0][0], next((names for _, names in facts if names), None)
    for folder, (other, others) in zip(folders, facts, strict=True):
        if (prepare != other and not flag) or (others and others != names):
            raise SystemExit(f"{folder} and {folders[0]} differ in label_names or {FILE}")
    if flag:
        info, suffix = medmnist.INFO[options.data], "" if options.size == 28 else f"_{options.size}"
        path = options.data_root / f"{options.data}{suffix}.npz"
        if not path.exists():
            options.data_root.mkdir(parents=True, exist_ok=True)
            settings = {"root": options.data_root, "size": options.size, "download": True}
            try:
                getattr(medmnist, info["python_class"])(split="test", **settings)
            except Exception as error:  # medmnist hides the cause of a failed download
                raise SystemExit(
                    f"{path} is missing and cannot be downloaded: get it from "
                    f"{info['url' + suffix]}, or pass its folder as --data-root"
                ) from error
        pixels, labels = read_npz(path)
        chosen = spaced(len(labels), options.limit)
        return pixels[chosen], labels[chosen], info["task"], None
    if not Path(options.data).exists():
        raise SystemExit(f"--data {options.data} is neither a folder, a file nor a MedMNIST flag")
    try:
        about = {"size": options.size, "preparation": prepare, "limit": options.limit}
        pixels, labels, found = read_part(Path(options.data), "test", classes=names, **about)
    except DataError as error:
        raise SystemExit(f"--data {options.data}: {error}") from error
    return pixels.float() / 255, labels, found.task, units_of(found.images)


def group_models(entries: list[str], baseline: str | None) -> Groups:
    """Groups paths by label, the baseline first."""
    groups = Groups()
    for entry in entries:
        label, _, path = entry.partition("=")
        if not label or not path or not (Path(path) / "config.json").is_file():
            raise SystemExit(f"{entry!r}: pass label=path, a timm folder with its config.json")
        groups.setdefault(label, []).append(Path(path))
    first = baseline or next(iter(groups))
    if first not in groups:
        raise SystemExit(f"--baseline {first!r} is not among the labels {', '.join(groups)}")
    counts = {label: len(paths) for label, paths in groups.items()}
    if len(set(counts.values())) > 1:
        raise SystemExit(f"every label needs the same number of seeds, in the same order: {counts}")
    return {first: groups.pop(first), **groups}


def expected(folder: Path) -> tuple[Recipe | None, list[str] | None]:
    """Returns the recipe of a training of the application, and the order of the classes."""
    recipe = Recipe.read(folder) if (folder / FILE).exists() else None
    return recipe, read_json(folder / "config.json").get("label_names")


def normaliser(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """Returns the function from pixels in [0, 1] to the network's input; grey may be repeated."""
    about = network.pretrained_cfg
    center, scale = (torch.tensor(about[name]).view(-1, 1, 1) for name in ("mean", "std"))

    def normalise(pixels: Tensor) -> Tensor:
        return (fit_images(pixels, about["input_size"][0]) - center.to(pixels)) / scale.to(pixels)

    return normalise


# -- evaluation ------------------------------------------------------------------------------------


def evaluate_all(
    options: argparse.Namespace, groups: Groups, data: Data, preset: str | list[str]
) -> Results:
    """Evaluates every network, relative to the baseline of the same seed."""
    loader = DataLoader(TensorDataset(*data[:2]), batch_size=options.batch_size)
    baseline, results = next(iter(groups)), Results()
    eps = 2.0 if options.eps is None else options.eps
    for label, paths in groups.items():
        for seed, path in enumerate(paths):
            network = timm.create_model(f"local-dir:{path}", pretrained=True)
            recipe, _ = expected(path)
            threshold = (recipe and recipe.thresholds) or 0.5
            tempered = Tempered(network, recipe.temperature if recipe else 1.0)
            result = evaluate_robustness(
                tempered.to("cuda" if torch.cuda.is_available() else "cpu"),
                track(loader, description=f"{label} ({path.name})"),
                preset=preset,
                task=data[2],
                normalize=normaliser(network),
                severities=options.severities,
                seed=options.seed,
                baseline=None if label == baseline else results[baseline][seed],
                attacks=[Attack(name, eps=eps / 255) for name in options.attacks],
                threshold=threshold if options.threshold is None else options.threshold,
                bootstrap=options.bootstrap,
                groups=data[3],
            )
            results.setdefault(label, []).append(result)
    return results


def summarise(
    runs: list[RobustnessResult], metric: str, corruption: str, severity: int | str | None = None
) -> tuple[float, float, float] | None:
    """Returns value and interval: bootstrap for one run, mean and one SD for several."""
    rows = [run.row(corruption, severity) for run in runs]
    values = [row[metric] for row in rows if metric in row]
    if not values:
        return None
    if len(rows) == 1:
        return tuple(rows[0].get(metric + end, values[0]) for end in ("", "_low", "_high"))
    center, spread = float(np.mean(values)), float(np.std(values, ddof=min(1, len(values) - 1)))
    return center, center - spread, center + spread


def compare_seeds(results: Results) -> list[dict[str, Any]]:
    """Compares every label with the baseline, paired over the seeds."""
    baseline, *others = results
    comparisons, measures = [], ("accuracy", "balanced_error", "auroc", "ece")
    for label, corruption, metric in product(others, ("clean", "all"), measures):
        mine, theirs = (
            [run.value(metric, corruption) for run in results[name]] for name in (label, baseline)
        )
        if None not in (*mine, *theirs):
            about = {"models": f"{label} - {baseline}", "on": corruption, "metric": metric}
            comparisons.append(about | paired_difference(mine, theirs))
    return comparisons


# -- report ----------------------------------------------------------------------------------------


def print_tables(results: Results, comparisons: list[dict[str, Any]]) -> None:
    first, *more = next(iter(results.values()))
    settings, spread = first.settings, "one SD over the seeds" if more else "95% intervals"
    table = Table("images", "measure", *results, title=f"{settings['n']} images, with {spread}")
    measures = ("accuracy", "balanced_error", "auroc", "ece", "brier")
    lines = [*product(("clean", "all"), measures), ("all", "be"), ("all", "rbe")]
    lines += [(attack["name"], "accuracy") for attack in settings["attacks"]]
    lines += [(name, "balanced_error") for name in settings["corruptions"]]
    for on, measure in lines:
        found = [summarise(runs, measure, on) for runs in results.values()]
        cells = ["-" if x is None else CELL[x[1] < x[2]].format(*x) for x in found]
        table.add_row("all corruptions" if on == "all" else on, measure, *cells)
    Console().print(table)
    for row in comparisons:  # paired over the seeds
        about = f"{row['models']}, {row['on']} images, {row['metric']}: {row['mean']:+.4f}"
        print(f"{about} ({row['low']:+.4f} to {row['high']:+.4f}), {row['n']} pairs")


def draw_curves(results: Results, path: Path) -> None:
    """Draws balanced error over severity, one panel per corruption."""
    settings = next(iter(results.values()))[0].settings
    names, levels = settings["corruptions"], [0, *settings["severities"]]
    rows, columns = -(-len(names) // 5), min(5, len(names))
    figure = Figure(figsize=(1.2 + 1.75 * columns, 1.0 + 1.65 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axis, name in zip(axes.flat, names, strict=False):
        for (label, runs), (line, colour) in zip(results.items(), cycle(STYLES), strict=False):
            at = {v: summarise(runs, "balanced_error", name if v else "clean", v) for v in levels}
            if known := {level: point for level, point in at.items() if point}:
                middle, low, high = zip(*known.values(), strict=True)
                axis.fill_between([*known], low, high, color=colour, alpha=0.15, linewidth=0)
                axis.plot([*known], middle, line, marker="o", c=colour, ms=3, label=label)
        axis.set_title(name.replace("_", " "), fontsize=9)
        axis.set_xticks(levels, ["clean" if level == 0 else str(level) for level in levels])
        axis.tick_params(labelsize=7.5, labelbottom=True)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(names) :]:
        axis.remove()
    figure.supxlabel("severity", fontsize=10)
    figure.supylabel("balanced error", fontsize=10)
    figure.legend(handles=axes[0, 0].lines, loc="outside upper center", ncols=7, frameon=False)
    figure.savefig(path, dpi=200, facecolor="white")


def main() -> None:
    options = parser.parse_args()
    if os.environ.get("RANK", "0") != "0":
        return  # a launcher started several, and a second one would write the same files
    if options.eps is not None and not options.attacks:
        parser.error("--eps is the size of an attack: give --attacks fgsm or pgd, too")
    groups = group_models(options.models, options.baseline)
    data = read_test_part(options, [path for paths in groups.values() for path in paths])
    usual = DATASET_PRESETS.get(options.data, "grey" if data[0].shape[1] == 1 else "all")
    chosen = options.preset or [usual]
    # One word is a preset unless it names a corruption; several are corruptions.
    preset = chosen if len(chosen) > 1 or chosen[0] in CORRUPTIONS else chosen[0]
    try:
        resolve_preset(preset)
    except ValueError as error:
        raise SystemExit(f"--preset: {error}") from error
    results = evaluate_all(options, groups, data, preset)
    comparisons = compare_seeds(results) if len(next(iter(groups.values()))) > 1 else []
    print_tables(results, comparisons)
    content = {
        "settings": {name: str(value) for name, value in vars(options).items()},
        "models": {
            label: [
                {"path": str(path), **json.loads(run.to_json())}
                for path, run in zip(groups[label], runs, strict=True)
            ]
            for label, runs in results.items()
        },
        "paired_differences": comparisons,
        "environment": environment(),
    }
    write_json(options.out / "robustness.json", content)
    draw_curves(results, options.out / "curves.png")
    print(f"Results: {options.out}/robustness.json; figure: {options.out}/curves.png")


if __name__ == "__main__":
    main()
