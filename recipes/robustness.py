"""Compares exported weights on corrupted images: table, JSON and three figures.

    python recipes/robustness.py --data dermamnist --data-root data/medmnist \
        --arch resnet18 --attacks fgsm pgd --output runs/robustness_derma \
        plain=plain.safetensors merged=merged.safetensors

Each model is `label=path`: a safetensors file of plain weights, or a folder that timm can load
(`config.json` and `model.safetensors`). Repeat a label for several training seeds of one
method, in the same order for every label; differences are then paired.

Data: the test part of a MedMNIST data set (`FLAG.npz` or `FLAG_SIZE.npz` in the data root,
downloaded if missing), or `--data digits`, the 497 test digits of the other
recipes, which need no file and are enlarged to `--size` pixels. Or your own images: a folder
`DIR/test/CLASS/*`, a folder `DIR/CLASS/*`, or the `split.csv` that own_images.py wrote; they are
read as the `preparation.json` next to the first model's weights specifies, if there is one.

Hardware and time: a CPU suffices at 28 px; each model sees the test part once for every corruption
and severity. Expected: a balanced error that grows with the severity; see
docs/evidence.md for measured figures.
"""

import argparse
import json
import os
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from textwrap import wrap

import matplotlib
import numpy as np
import timm
import torch
import torch.nn.functional as F
from images import Images, load_images
from records import environment, write_json
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset

from inmerge_wrap.images.files import DataError
from inmerge_wrap.images.folders import read_part
from inmerge_wrap.images.preparation import Preparation
from inmerge_wrap.robustness import (
    Attack,
    RobustnessResult,
    evaluate_robustness,
    paired_difference,
)
from inmerge_wrap.robustness.corruptions import (
    CORRUPTIONS,
    DATASET_PRESETS,
    PRESETS,
    corrupt,
    resolve_preset,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Okabe and Ito's colours, safe for every kind of colour vision; yellow is too faint for lines.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = "osD^vPX"


# --- settings -------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("models", nargs="+", metavar="label=path", help="weights file or timm folder, with a name")
    add("--data", required=True, help="MedMNIST flag such as bloodmnist, digits, or a folder of "
        "images or a split.csv of own_images.py")  # fmt: skip
    add("--data-root", type=Path, default=Path("data"), help="folder of the npz file")
    add("--size", type=int, default=28, help="image side in pixels (28 reads FLAG.npz)")
    add("--limit", type=int, help="use only the first LIMIT test images")
    add(
        "--arch",
        default="resnet18",
        help="timm model, or torchvision:NAME; timm folders have their own",
    )
    add("--num-classes", type=int, help="outputs of the model; default: as many as the data have")
    add(
        "--in-channels",
        type=int,
        choices=(1, 3),
        help="channels of the model; default: those of the data",
    )
    add("--mean", type=float, nargs="+", help="mean of pixels in [0, 1] in training; "
        "timm folders have their own")  # fmt: skip
    add("--std", type=float, nargs="+", help="standard deviation, as for --mean")
    add("--preset", nargs="+", help="a preset, or corruptions by name; default: that of the data")
    add("--severities", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="severities, 1 to 5")
    add("--attacks", nargs="*", default=[], choices=("fgsm", "pgd"), help="also attack the models")
    add("--eps", type=float, default=2.0, help="size of the attacks, in units of 1/255")
    add("--threshold", type=float, default=0.5, help="operating point for binary and multi-label")
    add("--baseline", help="label that BE and rBE are relative to; default: the first")
    add("--seed", type=int, default=0, help="seed of corruptions, attacks and bootstrap")
    add("--bootstrap", type=int, default=1000, help="resamples for the intervals; 0 for none")
    add("--batch-size", type=int, default=256, help="images per batch; does not affect the results")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--example", type=int, default=0, help="test image shown on the contact sheet")
    add("--output", type=Path, default=Path("runs/robustness"), help="folder to write into")
    return parser.parse_args()


def group_models(entries: list[str], baseline: str | None) -> dict[str, list[Path]]:
    """Groups paths by label, the baseline first."""
    groups: dict[str, list[Path]] = {}
    for entry in entries:
        label, found, path = entry.partition("=")
        if not found or not label or not Path(path).exists():
            raise SystemExit(f"{entry!r}: pass label=path with an existing file or folder")
        groups.setdefault(label, []).append(Path(path))
    first = baseline or next(iter(groups))
    if first not in groups:
        raise SystemExit(f"--baseline {first!r} is not among the labels {', '.join(groups)}")
    counts = {label: len(paths) for label, paths in groups.items()}
    if len(set(counts.values())) > 1:
        raise SystemExit(f"every label needs the same number of seeds, in the same order: {counts}")
    return {first: groups.pop(first), **groups}


def read_test_part(arguments: argparse.Namespace) -> Images:
    """Reads the test part: pixels in [0, 1], labels as the metrics take them."""
    own = Path(arguments.data)
    if own.exists() and arguments.data not in (*DATASET_PRESETS, "digits"):
        data = read_own_images(own, arguments)
    else:
        data = load_images(arguments.data, arguments.data_root, arguments.size)
    pixels, labels = (column[: arguments.limit] for column in data.parts["test"])
    if not labels.isnan().any():  # unknown labels of a multi-label task stay floats
        labels = labels.long()
    return replace(data, parts={"test": (pixels.float() / 255, labels)})


def read_own_images(place: Path, arguments: argparse.Namespace) -> Images:
    """Reads the test part of a folder or split with the preprocessing of the first model."""
    folders = [Path(entry.partition("=")[2]) for entry in arguments.models]
    stored = [folder / "preparation.json" for folder in folders]
    described = [json.loads(path.read_text()) for path in stored if path.is_file()]
    configs = [folder / "config.json" for folder in folders]
    read = [json.loads(path.read_text()) for path in configs if path.is_file()]
    names = [config["label_names"] for config in read if config.get("label_names")]
    if any(entry != names[0] for entry in names):
        raise SystemExit("the models have other classes, or in another order: compare apart")
    if any(entry != described[0] for entry in described):
        raise SystemExit("the models had different preprocessing: compare them separately")
    try:
        preparation = Preparation.from_dict(described[0]) if described else None
        pixels, labels, images = read_part(
            place,
            "test",
            size=arguments.size,
            preparation=preparation,
            classes=names[0] if names else None,
        )
    except DataError as error:
        raise SystemExit(f"--data {place}: {error}") from error
    return Images(place.name, images.task, images.classes, {"test": (pixels, labels)})


def choose_task(data: Images, num_classes: int | None) -> tuple[str, int]:
    """Returns task and number of outputs, from the data set and the options."""
    classes = num_classes or len(data.classes)
    if data.task == "multilabel":
        return "multilabel", classes
    return ("binary" if classes <= 2 else "multiclass"), classes


# --- models ---------------------------------------------------------------------------------------


def load_model(path: Path, arch: str, num_classes: int, in_channels: int) -> torch.nn.Module:
    """Loads plain weights into a network of timm or torchvision."""
    if path.is_dir():
        return timm.create_model(f"local-dir:{path}", pretrained=True)
    if arch.startswith("torchvision:"):
        from torchvision.models import get_model

        model = get_model(arch.removeprefix("torchvision:"), num_classes=num_classes)
        model.load_state_dict(load_file(path))
        return model
    return timm.create_model(
        arch, num_classes=num_classes, in_chans=in_channels, checkpoint_path=str(path)
    )


def preparation(path: Path, arguments: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Returns the mean and standard deviation that a model was trained with."""
    config = json.loads((path / "config.json").read_text()) if path.is_dir() else {}
    stored = config.get("pretrained_cfg", {})
    mean, std = arguments.mean or stored.get("mean"), arguments.std or stored.get("std")
    if not mean or not std:
        raise SystemExit(f"{path} does not record its preprocessing: give --mean and --std")
    return mean, std


def make_normalise(model: torch.nn.Module, mean: list[float], std: list[float]):
    """Returns a function that normalises pixels, repeating grey for a three-channel network."""
    stem = next(module for module in model.modules() if isinstance(module, torch.nn.Conv2d))
    centre, scale = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)

    def normalise(pixels: torch.Tensor) -> torch.Tensor:
        repeated = pixels.expand(-1, max(stem.in_channels, pixels.shape[1]), -1, -1)
        return (repeated - centre.to(pixels)) / scale.to(pixels)

    return normalise


# --- evaluation -----------------------------------------------------------------------------------


def evaluate_all(
    arguments: argparse.Namespace,
    groups: dict[str, list[Path]],
    data: Images,
    preset: str | list[str],
    console: Console,
) -> dict[str, list[RobustnessResult]]:
    """Evaluates every model of every label, relative to the baseline of the same seed."""
    task, num_classes = choose_task(data, arguments.num_classes)
    images, _ = data.parts["test"]
    loader = DataLoader(TensorDataset(*data.parts["test"]), batch_size=arguments.batch_size)
    baseline = next(iter(groups))
    results: dict[str, list[RobustnessResult]] = {}
    for label, paths in groups.items():
        for number, path in enumerate(paths):
            channels = arguments.in_channels or images.shape[1]
            model = load_model(path, arguments.arch, num_classes, channels).to(arguments.device)
            result = evaluate_robustness(
                model,
                track(loader, description=f"{label} ({path.name})", console=console),
                preset=preset,
                task=task,
                normalize=make_normalise(model, *preparation(path, arguments)),
                severities=arguments.severities,
                seed=arguments.seed,
                baseline=None if label == baseline else results[baseline][number],
                attacks=[Attack(name, eps=arguments.eps / 255) for name in arguments.attacks],
                threshold=arguments.threshold,
                bootstrap=arguments.bootstrap,
            )
            results.setdefault(label, []).append(result)
    return results


# --- report ---------------------------------------------------------------------------------------


def summarise(
    results: list[RobustnessResult], metric: str, corruption: str, severity: int | str | None = None
) -> tuple[float, float, float] | None:
    """Returns value and interval: bootstrap for one run, mean and SD for several."""
    rows = [result.row(corruption, severity) for result in results]
    values = [row[metric] for row in rows if metric in row]
    if not values:
        return None
    if len(rows) == 1:
        value = values[0]
        return value, rows[0].get(f"{metric}_low", value), rows[0].get(f"{metric}_high", value)
    mean, spread = float(np.mean(values)), float(np.std(values, ddof=min(1, len(values) - 1)))
    return mean, mean - spread, mean + spread


def cell(summary: tuple[float, float, float] | None) -> str:
    if summary is None:
        return "-"
    value, low, high = summary
    return f"{value:.3f}" if low == high else f"{value:.3f}\n[{low:.3f}, {high:.3f}]"


def print_tables(results: dict[str, list[RobustnessResult]], console: Console) -> None:
    first = next(iter(results.values()))[0]
    seeds = len(next(iter(results.values())))
    brackets = "95 % bootstrap interval over images" if seeds == 1 else "mean -/+ one sd over seeds"
    overview = Table(title=f"Overview, {first.settings['n']} images ({brackets})")
    overview.add_column("figure", no_wrap=True)
    for label in results:
        overview.add_column(label, justify="right")
    lines = [
        ("clean accuracy", "accuracy", "clean"),
        ("clean balanced error", "balanced_error", "clean"),
        ("clean AUROC", "auroc", "clean"),
        ("clean ECE", "ece", "clean"),
        ("clean Brier score", "brier", "clean"),
        *(
            (f"clean accuracy, surest {coverage:.0%}", f"selective_accuracy_{coverage:g}", "clean")
            for coverage in first.settings["coverages"]
        ),
        ("corrupted accuracy", "accuracy", "all"),
        ("corrupted balanced error", "balanced_error", "all"),
        ("corrupted AUROC", "auroc", "all"),
        ("corrupted ECE", "ece", "all"),
        ("BE", "be", "all"),
        ("rBE", "rbe", "all"),
        *(
            (f"{entry['name'].upper()} accuracy", "accuracy", entry["name"])
            for entry in first.settings["attacks"]
        ),
    ]
    for title, metric, corruption in lines:
        cells = [cell(summarise(runs, metric, corruption)) for runs in results.values()]
        if metric in ("be", "rbe"):
            cells[0] = "1 (baseline)"
        overview.add_row(title, *cells)
    console.print(overview)

    details = Table(title="Balanced error (rBE)", caption="mean over the severities")
    details.add_column("corruption")
    for label in results:
        details.add_column(label, justify="right")
    for name in first.settings["corruptions"]:
        cells = []
        for runs in results.values():
            error, ratio = (summarise(runs, metric, name) for metric in ("balanced_error", "rbe"))
            shown = "-" if error is None else f"{error[0]:.3f}"
            cells.append(shown + (f" ({ratio[0]:.2f})" if ratio else ""))
        details.add_row(name, *cells)
    console.print(details)


def compare_seeds(results: dict[str, list[RobustnessResult]]) -> list[dict]:
    """Compares every label with the baseline, paired over the seeds."""
    baseline, *others = results
    comparisons = []
    for label in others:
        for corruption in ("clean", "all"):
            for metric in ("accuracy", "balanced_error", "auroc", "ece"):
                pairs = zip(results[label], results[baseline], strict=True)
                values = [[run.value(metric, corruption) for run in pair] for pair in pairs]
                if any(None in pair for pair in values):
                    continue
                a, b = zip(*values, strict=True)
                named = {"label": label, "minus": baseline, "on": corruption, "metric": metric}
                comparisons.append(named | paired_difference(a, b))
    return comparisons


def print_comparisons(comparisons: list[dict], console: Console) -> None:
    table = Table(title="Differences paired over seeds (95 % t interval)")
    for column in ("models", "images", "metric", "difference", "p (t)", "p (sign flip)"):
        table.add_column(column)
    for entry in comparisons:
        table.add_row(
            f"{entry['label']} - {entry['minus']}",
            "clean" if entry["on"] == "clean" else "corrupted",
            entry["metric"],
            f"{entry['mean']:+.4f} [{entry['low']:+.4f}, {entry['high']:+.4f}]",
            f"{entry['p_t']:.3f}" if "p_t" in entry else "-",
            f"{entry['p_sign_flip']:.3f}",
        )
    console.print(table)


def pretty(name: str) -> str:
    return "JPEG compression" if name == "jpeg_compression" else name.replace("_", " ")


def draw_curves(results: dict[str, list[RobustnessResult]], path: Path) -> None:
    """Draws balanced error over severity, one panel per corruption."""
    settings = next(iter(results.values()))[0].settings
    names, levels = settings["corruptions"], [0, *settings["severities"]]
    # The width that leaves the fewest panels empty.
    columns = min((5, 6, 4), key=lambda width: -len(names) % width)
    columns = min(columns, len(names))
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(1.2 + 1.75 * columns, 1.0 + 1.65 * rows),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, name in zip(axes.flat, names, strict=False):
        for index, (label, runs) in enumerate(results.items()):
            points = [
                summarise(runs, "balanced_error", "clean" if level == 0 else name, level)
                for level in levels
            ]
            shown = [(x, *point) for x, point in zip(levels, points, strict=True) if point]
            if not shown:
                continue
            x, middle, low, high = zip(*shown, strict=True)
            colour = COLOURS[index % len(COLOURS)]
            marker = MARKERS[index % len(MARKERS)]
            axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
            axis.plot(
                x, middle, color=colour, marker=marker, markersize=3.5, linewidth=1.3, label=label
            )
        axis.set_title(pretty(name), fontsize=9)
        axis.set_xticks(levels, ["clean" if level == 0 else str(level) for level in levels])
        axis.tick_params(labelsize=7.5)
        axis.grid(color="0.9", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    # A column that ends early still needs the numbers under its last panel.
    for column in range(columns):
        last = max(row for row in range(rows) if row * columns + column < len(names))
        axes[last, column].tick_params(labelbottom=True)
    figure.supxlabel("severity", fontsize=10)
    figure.supylabel("balanced error", fontsize=10)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=max(1, len(labels)), frameon=False
    )
    figure.savefig(path, dpi=200, facecolor="white")
    plt.close(figure)


def draw_ratios(results: dict[str, list[RobustnessResult]], path: Path) -> None:
    """Draws rBE of every corruption for which it is defined, one bar per model except the baseline.

    A bar is pale if the ratio has no interval: the baseline's loss is indistinguishable from zero.
    Corruptions that cost the baseline nothing have no ratio; they are named below.
    """
    baseline, *others = results
    every = results[baseline][0].settings["corruptions"]
    names = [
        name
        for name in every
        if any(summarise(results[label], "rbe", name) is not None for label in others)
    ]
    height = 0.8 / len(others)
    figure, axis = plt.subplots(
        figsize=(6.4, 1.9 + len(names) * (0.12 + 0.14 * len(others))), layout="constrained"
    )
    tallest, pale = 1.0, False
    for index, label in enumerate(others):
        for line, name in enumerate(names):
            summary = summarise(results[label], "rbe", name)
            place = line - 0.4 + (index + 0.5) * height
            if summary is None:
                axis.text(0.01, place, "undefined", fontsize=6.5, va="center", color="0.45")
                continue
            value, low, high = summary
            tallest = max(tallest, value)
            certain = high > low
            pale = pale or not certain
            axis.barh(
                place,
                value,
                height=height * 0.92,
                color=COLOURS[(index + 1) % len(COLOURS)],
                alpha=1.0 if certain else 0.35,
                xerr=[[max(0.0, value - low)], [max(0.0, high - value)]] if certain else None,
                error_kw={"elinewidth": 0.8, "capsize": 1.5, "ecolor": "0.25"},
            )
    lowest = min([0.0, *(bar.get_width() for bar in axis.patches)])
    # Ratios of small losses have very long intervals: the axis follows the bars.
    axis.set_xlim(1.25 * lowest, 1.35 * tallest)
    axis.axvline(1, color="black", linewidth=1)
    axis.axvline(0, color="0.6", linewidth=0.6)
    axis.set_yticks(range(len(names)), [pretty(name) for name in names], fontsize=8)
    axis.set_ylim(max(len(names), 1) - 0.4, -0.6)
    axis.tick_params(axis="x", labelsize=8)
    axis.tick_params(axis="y", length=0)
    notes = [f"relative balanced error (rBE); line at 1: {baseline}"]
    if pale:
        notes.append(f"pale: no interval, the loss of {baseline} is indistinguishable from zero")
    if missing := [pretty(name) for name in every if name not in names]:
        left_out = f"undefined, {baseline} loses nothing: {', '.join(missing)}"
        notes += wrap(left_out, 80)
    axis.set_xlabel("\n".join(notes), fontsize=8.5)
    axis.spines[["top", "right", "left"]].set_visible(False)
    handles = [
        matplotlib.patches.Patch(color=COLOURS[(index + 1) % len(COLOURS)], label=label)
        for index, label in enumerate(others)
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(others), frameon=False)
    figure.savefig(path, dpi=200, facecolor="white")
    plt.close(figure)


def draw_contact_sheet(
    image: torch.Tensor, names: list[str], levels: list[int], seed: int, index: int, path: Path
) -> None:
    """Draws one image under every corruption and severity; in two blocks where there are many."""
    tile, gap = max(image.shape[-1], 56), 3
    blocks = 1 if len(names) <= 8 else 2
    per_block = -(-len(names) // blocks)
    step = tile + gap
    figure, axes = plt.subplots(
        1,
        blocks,
        figsize=(blocks * (1.5 + 0.62 * (1 + len(levels))), 0.5 + 0.62 * per_block),
        squeeze=False,
        layout="constrained",
    )
    for block, axis in enumerate(axes[0]):
        part = names[block * per_block : (block + 1) * per_block]
        canvas = np.ones((per_block * step, (1 + len(levels)) * step, 3))
        for row, name in enumerate(part):
            damaged = [
                corrupt(image[None], name, level, seed=seed, indices=[index])[0] for level in levels
            ]
            for column, picture in enumerate([image, *damaged]):
                shown = F.interpolate(picture[None], size=(tile, tile), mode="nearest-exact")[0]
                top, left = row * step, column * step
                canvas[top : top + tile, left : left + tile] = shown.permute(1, 2, 0).numpy()
        axis.imshow(canvas, interpolation="nearest")
        axis.set_yticks(
            [row * step + tile / 2 for row in range(len(part))],
            [pretty(name) for name in part],
            fontsize=8,
        )
        axis.set_xticks(
            [column * step + tile / 2 for column in range(1 + len(levels))],
            ["clean", *(str(level) for level in levels)],
            fontsize=8,
        )
        axis.xaxis.tick_top()
        axis.xaxis.set_label_position("top")
        axis.set_xlabel("severity, 1 mild to 5 severe", fontsize=8)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    figure.savefig(path, dpi=250, facecolor="white", bbox_inches="tight")
    plt.close(figure)


def write_results(
    results: dict[str, list[RobustnessResult]],
    groups: dict[str, list[Path]],
    comparisons: list[dict],
    arguments: argparse.Namespace,
    path: Path,
) -> None:
    made_by = environment()
    made_by["versions"]["kornia"] = version("kornia")  # which draws the corruptions
    content = {
        "seed": arguments.seed,
        "device": arguments.device,
        "models": {
            label: [
                {"path": str(weights), **json.loads(result.to_json())}
                for weights, result in zip(groups[label], runs, strict=True)
            ]
            for label, runs in results.items()
        },
        "paired_differences": comparisons,
        "environment": made_by,
    }
    write_json(path, content)


def main() -> None:
    arguments = parse_arguments()
    if os.environ.get("RANK", "0") != "0":
        return  # a launcher started several, and a second one would write the same files
    console = Console()
    groups = group_models(arguments.models, arguments.baseline)

    data = read_test_part(arguments)
    images, _ = data.parts["test"]

    fallback = "grey" if images.shape[1] == 1 else "all"
    chosen = arguments.preset or [DATASET_PRESETS.get(arguments.data, fallback)]
    # One word is a preset unless it names a corruption; several are corruptions.
    preset = chosen if len(chosen) > 1 or chosen[0] in CORRUPTIONS else chosen[0]
    try:
        names = [entry.name for entry in resolve_preset(preset)]
    except ValueError as error:
        raise SystemExit(f"--preset: {error} (presets: {', '.join(PRESETS)})") from error

    results = evaluate_all(arguments, groups, data, preset, console)

    comparisons = compare_seeds(results) if len(next(iter(groups.values()))) > 1 else []
    print_tables(results, console)
    if comparisons:
        print_comparisons(comparisons, console)

    arguments.output.mkdir(parents=True, exist_ok=True)
    write_results(results, groups, comparisons, arguments, arguments.output / "robustness.json")
    draw_curves(results, arguments.output / "curves.png")
    if len(results) > 1:
        draw_ratios(results, arguments.output / "rbe.png")
    draw_contact_sheet(
        images[arguments.example],
        names,
        arguments.severities,
        arguments.seed,
        arguments.example,
        arguments.output / "corruptions.png",
    )
    console.print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
