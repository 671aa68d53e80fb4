"""``inmerge evaluate``: how good one model is, or which of several is better."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from inmerge_wrap.cli.evaluation_tables import print_comparison, print_result
from inmerge_wrap.cli.options import (
    Arch,
    AsJson,
    BatchSize,
    Device,
    InChans,
    Key,
    NumClasses,
    check_pixels,
    check_there,
    load,
)
from inmerge_wrap.cli.shell import command, print_json, progress, save_json, warn

if TYPE_CHECKING:
    from inmerge_wrap.robustness import RobustnessResult


_Models = Annotated[
    list[str],
    typer.Argument(
        metavar="[NAME=]WEIGHTS...",
        help="Weights, as for `inmerge export`. Several are compared with the first; "
        "`NAME=` before each gives its name in the tables.",
        show_default=False,
    ),
]
_Data = Annotated[
    Path,
    typer.Option(
        help="A folder with one folder of images for each class, FOLDER/CLASS/* or "
        "FOLDER/test/CLASS/*; an .npz in the MedMNIST layout; or, for a network of `inmerge "
        "train`, a CSV file such as its split.csv.",
        show_default=False,
    ),
]
_Mean = Annotated[
    list[float] | None,
    typer.Option(help="Mean of pixels in [0, 1] in training; a timm folder has its own."),
]
_Preset = Annotated[
    str | None,
    typer.Option(help="Corruptions: a preset or MedMNIST name; default: by the data's name."),
]
_Severity = Annotated[
    list[int] | None, typer.Option(help="Severity, 1 to 5; default: all. Repeatable.")
]
_Task = Annotated[
    str | None, typer.Option(help="multiclass, binary or multilabel; default: by the labels.")
]
_Size = Annotated[
    int | None, typer.Option(min=1, help="Side to resize to; default: that of the timm folder.")
]
_Limit = Annotated[
    int | None,
    typer.Option(min=1, help="Image count: the first of an .npz, or spread over a folder."),
]


@command(
    "inmerge evaluate runs/mine/model --data runs/mine/split.csv",
    "inmerge evaluate exported/ --data dermamnist.npz",
    "inmerge evaluate exported/ --data photos/ --preset dermatoscopy",
    "inmerge evaluate plain=plain/ merged=merged/ --data photos/ --output compared.json",
    "inmerge evaluate weights.safetensors --arch resnet18 --data dermamnist.npz --mean 0.5 "
    "--std 0.5 --severity 3 --json",
)
def evaluate(
    models: _Models,
    data: _Data,
    arch: Arch = None,
    num_classes: NumClasses = None,
    in_chans: InChans = None,
    key: Key = None,
    mean: _Mean = None,
    std: Annotated[list[float] | None, typer.Option(help="Standard deviation, likewise.")] = None,
    preset: _Preset = None,
    severity: _Severity = None,
    attack: Annotated[list[str] | None, typer.Option(help="fgsm or pgd. Repeatable.")] = None,
    eps: Annotated[float, typer.Option(help="Size of the attacks, in units of 1/255.")] = 2.0,
    task: _Task = None,
    split: Annotated[Literal["test", "val", "train"], typer.Option(help="Part to use.")] = "test",
    size: _Size = None,
    limit: _Limit = None,
    seed: Annotated[int, typer.Option(help="Seed of corruptions, attacks and bootstrap.")] = 0,
    bootstrap: Annotated[int, typer.Option(min=0, help="Bootstrap resamples.")] = 1000,
    batch_size: BatchSize = 256,
    device: Device = "cpu",
    output: Annotated[Path | None, typer.Option(help="JSON file for all rows.")] = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate or compare models on clean, corrupted and attacked images."""
    paths = _named_paths(models)
    check_there(data)
    check_pixels(mean, std)
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
    severities = sorted(severity) if severity else (1, 2, 3, 4, 5)
    attacks = [Attack(name, eps=eps / 255) for name in attack or ()]
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


def _report(results: dict[str, RobustnessResult], output: Path | None, as_json: bool) -> None:
    from inmerge_wrap.robustness import compare_results

    first, *others = results
    differences = {name: compare_results(results[name], results[first]) for name in others}
    models = {name: json.loads(result.to_json()) for name, result in results.items()}
    content = models[first]
    if others:
        content = {"models": models, "minus": first, "differences": differences}
    if output is not None:
        save_json(output, content)
    if as_json:
        print_json(content)
    elif others:
        print_comparison(results, differences)
    else:
        print_result(results[first])


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
