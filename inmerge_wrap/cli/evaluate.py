"""``inmerge evaluate``: how good one model is, or which of several is better."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, Option

from inmerge_wrap.cli import options
from inmerge_wrap.cli.options import check_file, check_there, load
from inmerge_wrap.cli.shell import command, print_json, progress, warn
from inmerge_wrap.cli.tables import KEPT, Column, print_table
from inmerge_wrap.errors import ArgumentError, check_pixels
from inmerge_wrap.files import write_json

if TYPE_CHECKING:
    from inmerge_wrap.robustness import RobustnessResult


@command(
    "inmerge evaluate runs/mine/model --data runs/mine/split.csv",
    "inmerge evaluate exported/ --data dermamnist.npz",
    "inmerge evaluate exported/ --data photos/ --preset dermatoscopy",
    "inmerge evaluate plain=plain/ merged=merged/ --data photos/ --output compared.json",
    "inmerge evaluate weights.safetensors --arch resnet18 --data dermamnist.npz --mean 0.5 "
    "--std 0.5 --severity 3 --json",
)
def evaluate(
    models: Annotated[list[str], Argument(metavar="[NAME=]WEIGHTS...")],
    data: Annotated[Path, Option()],
    arch: options.Arch = None,
    num_classes: options.NumClasses = None,
    in_chans: options.InChans = None,
    key: options.Key = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    preset: str | None = None,
    severity: list[int] | None = None,
    attack: list[str] | None = None,
    eps: float | None = None,
    task: str | None = None,
    split: Literal["test", "val", "train"] = "test",
    size: Annotated[int | None, Option(min=1)] = None,
    limit: Annotated[int | None, Option(min=1)] = None,
    seed: int = 0,
    bootstrap: Annotated[int, Option(min=0)] = 1000,
    batch_size: options.BatchSize = 256,
    device: options.Device = "cpu",
    output: Path | None = None,
    as_json: options.AsJson = False,
) -> None:
    """Evaluate or compare models on clean, corrupted and attacked images.

    Args:
        models: Weights, as for `inmerge export`. Several are compared with the first; `NAME=`
            before each gives its name in the tables.
        data: A folder with one folder of images for each class, FOLDER/CLASS/* or
            FOLDER/test/CLASS/*; an .npz in the MedMNIST layout; or, for a network of `inmerge
            train`, a CSV file such as its split.csv.
        mean: Mean of the training images, pixels in [0, 1]: one value, or one per channel (repeat
            the option); a timm folder records its own.
        std: Standard deviation, likewise.
        preset: Corruptions: a preset or a MedMNIST name; default: by the name of a MedMNIST file,
            otherwise quick.
        severity: Severity, 1 to 5; default: all. Repeatable.
        attack: fgsm or pgd. Repeatable.
        eps: Size of the attacks, in units of 1/255; default: 2.
        task: multiclass, binary or multilabel; default: by the labels.
        split: Part of the data to use: test, val or train.
        size: Side to resize to; default: that of the timm folder.
        limit: Number of images to use, evenly spaced over all.
        seed: Seed of corruptions, attacks and bootstrap.
        bootstrap: Number of bootstrap resamples; 0 for no intervals.
        output: JSON file for all rows.
    """
    paths = _named_paths(models)
    check_there(data)
    check_pixels(mean, std)
    _check_options(eps, attack, output, (data, *paths.values()))
    networks = {n: load(path, arch, num_classes, in_chans, key)[0] for n, path in paths.items()}
    from inmerge_wrap.app import evaluating
    from inmerge_wrap.robustness import Attack
    from inmerge_wrap.robustness.corruptions import DATASET_PRESETS, resolve_preset

    contenders = [
        evaluating.contender(name, paths[name], network.to(device), mean=mean, std=std, size=size)
        for name, network in networks.items()
    ]
    images = evaluating.open_data(data, contenders, part=split, limit=limit, batch_size=batch_size)
    for warning in evaluating.seen_in_training(contenders, images):
        warn(warning)
    chosen = preset or DATASET_PRESETS.get(data.stem.split("_")[0], "quick")
    severities = sorted(severity or (1, 2, 3, 4, 5))
    attacks = [Attack(name, eps=(2.0 if eps is None else eps) / 255) for name in attack or ()]
    conditions = 1 + len(resolve_preset(chosen)) * len(severities) + len(attacks)
    lengths = dict.fromkeys(paths, conditions * len(images.labels))
    with progress(lengths | {evaluating.INTERVALS: len(contenders) * conditions}) as show:
        results = evaluating.evaluate_all(
            contenders,
            images,
            task=task,
            progress=show,
            preset=chosen,
            severities=severities,
            seed=seed,
            attacks=attacks,
            bootstrap=bootstrap,
        )
    for result in results.values():
        result.settings |= {"data": data.name, "preset": chosen}
    _report(results, output, as_json)


def _check_options(
    eps: float | None, attack: list[str] | None, output: Path | None, sources: Sequence[Path]
) -> None:
    check_file(output, sources=sources)
    if eps is not None and not attack:
        raise ArgumentError("<eps> is the size of an attack: give <attack> fgsm or pgd, too")


def _report(results: dict[str, RobustnessResult], output: Path | None, as_json: bool) -> None:
    from inmerge_wrap.robustness import compare_results

    first, *others = results
    differences = {name: compare_results(results[name], results[first]) for name in others}
    models = {name: json.loads(result.to_json()) for name, result in results.items()}
    content = models[first]
    if others:
        content = {"models": models, "minus": first, "differences": differences}
    if output is not None:
        write_json(output, content, allow_nan=False)
    if as_json:
        print_json(content)
    else:
        _print_table(results, differences)


def _named_paths(models: Sequence[str]) -> dict[str, Path]:
    """Returns the paths, keyed by the names that the tables show."""
    paths: dict[str, Path] = {}
    for entry in models:
        name, found, path = entry.partition("=")
        if not found or not name or Path(entry).exists():
            name = path = entry
        if name in paths:
            raise ValueError(f"two models are called {name!r}: name each one, NAME=WEIGHTS")
        paths[name] = Path(path)
    return paths


def _print_table(
    results: Mapping[str, RobustnessResult], differences: Mapping[str, list[dict[str, Any]]]
) -> None:
    """Prints the metrics of one model, or the errors of several and how they differ from the first.

    A row is a corruption: the mean over its severities, or an attack.
    """
    first, result = next(iter(results.items()))
    rows = [row for row in result.rows if row["severity"] in (0, "mean") or row["kind"] == "attack"]
    columns = [Column("corruption", [_row_name(row) for row in rows], KEPT, justify="left")]

    def add(heading: str, importance: int, found: list[dict[str, Any]], *cell: str) -> None:
        known = {(row["corruption"], row["severity"]): row for row in found}
        there = [known.get((row["corruption"], row["severity"]), {}) for row in rows]
        cells = [_cell(row, *cell) for row in there]
        columns.append(Column(heading, cells, importance, wraps=True))

    if differences:
        for name, each in results.items():
            add(name, 0, each.rows, "balanced_error", "{:.3f}")
        for name, found in differences.items():
            add(f"{name} - {first}", KEPT, found, "difference", "{:+.3f}", " ({:+.3f}…{:+.3f})")
    else:
        metrics = {"accuracy": 1, "auroc": 2, "balanced_error": KEPT, "ece": 0}
        for metric, importance in metrics.items():
            if metric in result.rows[0]:
                interval = "" if metric == "ece" else " ({:.3f}-{:.3f})"
                add(metric.replace("_", " "), importance, result.rows, metric, "{:.3f}", interval)
    settings = result.settings
    subject = "Balanced error" if differences else settings["weights"]
    print_table(
        f"{subject} on {settings['data']} ({settings['split']}, {settings['n']} images)",
        columns,
        ["bold" if row["corruption"] in ("clean", "all") else "" for row in rows],
        _note(settings, first if differences else None),
    )


def _note(settings: Mapping[str, Any], first: str | None) -> str:
    """Returns what a reader of the table must know; ``first`` is what others are compared with."""
    from inmerge_wrap.images.files import counted

    severities = ", ".join(map(str, settings["severities"]))
    several = len(settings["severities"]) > 1
    at = f"mean over severities {severities}" if several else f"severity {severities}"
    note = f"Corruptions of preset {settings['preset']}, {at}"
    units = counted(settings["groups"], "group") if settings["groups"] else "images"
    if first is None:
        mean, std = (", ".join(f"{v:.4g}" for v in settings[name]) for name in ("mean", "std"))
        note += f"; normalised with mean [{mean}], std [{std}]."
        if settings["bootstrap"]:
            note += f" In brackets: 95% confidence interval over {units}."
        return note
    note += f". A difference below 0 is better than {first}"
    if settings["bootstrap"]:
        note += f"; in brackets: paired 95% confidence interval over {units}"
    return note + ". It does not cover the variation between training seeds."


def _row_name(row: Mapping[str, Any]) -> str:
    name = str(row["corruption"])
    if row["kind"] == "attack":
        return f"{name} (eps {row['severity'] * 255:g}/255)"
    return {"clean": "none", "all": "mean of all"}.get(name, name)


def _cell(row: Mapping[str, Any], metric: str, figure: str, interval: str = "") -> str:
    """Returns a figure and its interval, which may wrap between the two, in these formats."""
    if metric not in row:
        return "-"
    ends = [row[end] for end in (f"{metric}_low", f"{metric}_high") if end in row]
    return figure.format(row[metric]) + (interval.format(*ends) if ends else "")
