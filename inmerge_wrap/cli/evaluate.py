"""``inmerge evaluate``: how good one model is, or which of several is better."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from inmerge_wrap.architectures import is_timm_folder
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
    load,
)
from inmerge_wrap.cli.shell import command, progress
from inmerge_wrap.errors import ArgumentError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from inmerge_wrap.robustness import RobustnessResult


@command(
    "inmerge evaluate exported/ --data dermamnist.npz",
    "inmerge evaluate exported/ --data photos/ --preset dermatoscopy",
    "inmerge evaluate plain=plain/ merged=merged/ --data photos/ --output compared.json",
    "inmerge evaluate weights.safetensors --arch resnet18 --data dermamnist.npz --mean 0.5 "
    "--std 0.5 --severity 3 --json",
)
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]WEIGHTS...",
            help="Weights, as for `inmerge export`. Several are compared with the first; "
            "`NAME=` before each gives its name in the tables.",
            show_default=False,
        ),
    ],
    data: Annotated[
        Path,
        typer.Option(
            help="A folder with one folder of images for each class, FOLDER/CLASS/* or "
            "FOLDER/test/CLASS/*; or an .npz in the MedMNIST layout.",
            show_default=False,
        ),
    ],
    arch: Arch = None,
    num_classes: NumClasses = None,
    in_chans: InChans = None,
    key: Key = None,
    mean: Annotated[
        list[float] | None,
        typer.Option(help="Mean of pixels in [0, 1] in training; a timm folder has its own."),
    ] = None,
    std: Annotated[list[float] | None, typer.Option(help="Standard deviation, likewise.")] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="Corruptions: a preset or MedMNIST name; default: by the data's name."),
    ] = None,
    severity: Annotated[
        list[int] | None, typer.Option(help="Severity, 1 to 5; default: all. Repeatable.")
    ] = None,
    attack: Annotated[list[str] | None, typer.Option(help="fgsm or pgd. Repeatable.")] = None,
    eps: Annotated[float, typer.Option(help="Size of the attacks, in units of 1/255.")] = 2.0,
    task: Annotated[
        str | None, typer.Option(help="multiclass, binary or multilabel; default: by the labels.")
    ] = None,
    split: Annotated[Literal["test", "val", "train"], typer.Option(help="Part to use.")] = "test",
    size: Annotated[
        int | None, typer.Option(min=1, help="Side to resize to; default: that of the timm folder.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Image count: the first of an .npz, or spread over a folder."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of corruptions, attacks and bootstrap.")] = 0,
    bootstrap: Annotated[int, typer.Option(min=0, help="Bootstrap resamples.")] = 1000,
    batch_size: BatchSize = 256,
    device: Device = "cpu",
    output: Annotated[Path | None, typer.Option(help="JSON file for all rows.")] = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate or compare models on clean, corrupted and attacked images."""
    paths = _named_paths(models)
    if not data.exists():
        raise ValueError(f"no such file or folder: {data}")
    check_pixels(mean, std)
    networks = {n: load(path, arch, num_classes, in_chans, key)[0] for n, path in paths.items()}
    from inmerge_wrap.robustness import Attack, compare_results, evaluate_robustness
    from inmerge_wrap.robustness.corruptions import DATASET_PRESETS, resolve_preset

    prepared = {
        name: _preparation(paths[name], network, mean, std, size)
        for name, network in networks.items()
    }
    loader, labels = _open_data(data, networks, prepared, split, limit, batch_size)
    chosen = preset or DATASET_PRESETS.get(data.stem.split("_")[0], "quick")
    severities = sorted(severity) if severity else (1, 2, 3, 4, 5)
    attacks = [Attack(name, eps=eps / 255) for name in attack or ()]
    conditions = 1 + len(resolve_preset(chosen)) * len(severities) + len(attacks)
    results: dict[str, RobustnessResult] = {}
    with progress(len(networks) * conditions * len(labels)) as show:
        for name, network in networks.items():
            network.to(device)
            result = evaluate_robustness(
                network,
                loader,
                preset=chosen,
                task=task or _guess_task(labels, _outputs(network, loader, device)),
                mean=prepared[name]["mean"],
                std=prepared[name]["std"],
                severities=severities,
                seed=seed,
                baseline=next(iter(results.values()), None),
                attacks=attacks,
                bootstrap=bootstrap,
                progress=functools.partial(show, name),
            )
            result.settings |= {
                "weights": str(paths[name]),
                "data": data.name,
                "split": getattr(loader.dataset, "part", split),
                "preset": chosen,
                "mean": prepared[name]["mean"],
                "std": prepared[name]["std"],
            }
            results[name] = result
    first, *others = results
    if not others:
        text = results[first].to_json()
    else:
        differences = {name: compare_results(results[name], results[first]) for name in others}
        content = {
            "models": {name: json.loads(result.to_json()) for name, result in results.items()},
            "minus": first,
            "differences": differences,
        }
        text = json.dumps(content, indent=1, allow_nan=False)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n", encoding="utf-8")
    if as_json:
        print(text)
    elif not others:
        print_result(results[first])
    else:
        print_comparison(results, differences)


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


def _preparation(
    path: Path,
    network: nn.Module,
    mean: list[float] | None,
    std: list[float] | None,
    size: int | None,
) -> dict[str, Any]:
    """Returns the preprocessing of a model: from its folder, unless options override it."""
    config: Mapping[str, Any] = network.pretrained_cfg if is_timm_folder(path) else {}  # type: ignore[assignment]
    mean, std = mean or list(config.get("mean", [])), std or list(config.get("std", []))
    if not mean or not std:
        raise ArgumentError(
            f"{path} does not record how its images were preprocessed: give <mean> and <std> "
            "of the training"
        )
    stored = tuple(config["input_size"][1:]) if config else None
    from inmerge_wrap.images.preparation import Preparation

    described = path / "preparation.json"  # of recipes/own_images.py, beside its model
    preparation = None
    if config and described.is_file():
        preparation = Preparation.from_dict(json.loads(described.read_text(encoding="utf-8")))
        if size is not None:
            preparation = dataclasses.replace(preparation, size=size)
    return {
        "channels": _image_channels(network),
        "size": (size, size) if size is not None else stored,
        "preparation": preparation,
        "mean": mean,
        "std": std,
        "crop_mode": config.get("crop_mode", "center"),
        "crop_pct": config.get("crop_pct", 1.0),
        "interpolation": config.get("interpolation", "bicubic"),
        "label_names": config.get("label_names"),
    }


def _image_channels(network: nn.Module) -> int:
    from torch import nn

    return next(m.in_channels for m in network.modules() if isinstance(m, nn.Conv2d))


def _open_data(
    data: Path,
    networks: Mapping[str, nn.Module],
    prepared: Mapping[str, Mapping[str, Any]],
    split: str,
    limit: int | None,
    batch_size: int,
) -> tuple[Any, Tensor]:
    """Returns the batches of images and labels in a fixed order, and all labels."""
    from torch.utils.data import DataLoader, TensorDataset

    from inmerge_wrap.images.labelled import ImageFolder, fit_images, read_npz

    (first, wanted), *others = prepared.items()
    agree = ["channels", "size", "label_names"]
    agree += ["crop_mode", "crop_pct", "interpolation", "preparation"] if data.is_dir() else []
    for name, theirs in others:
        for what in agree:
            if theirs[what] != wanted[what] and None not in (theirs[what], wanted[what]):
                raise ArgumentError(
                    f"{first} and {name} cannot be compared on the same images: {what} is "
                    f"{wanted[what]} and {theirs[what]}"
                    + ("; <size> makes them equal" if what == "size" else "")
                )
    size = next((p["size"] for p in prepared.values() if p["size"] is not None), None)
    if not data.is_dir():
        images, labels = read_npz(data, split)
        images = fit_images(images[:limit], wanted["channels"], size)
        labels = labels[:limit]
        return DataLoader(TensorDataset(images, labels), batch_size=batch_size), labels
    if size is None:
        raise ArgumentError(f"{data} holds images of any size: pass <size>, the side in training")
    folder = ImageFolder(
        data,
        config={**wanted, "input_size": (wanted["channels"], *size)},
        preparation=next((p["preparation"] for p in prepared.values() if p["preparation"]), None),
        split=split,
        classes=next((p["label_names"] for p in prepared.values() if p["label_names"]), None),
        limit=limit,
    )
    loader = DataLoader(folder, batch_size=batch_size)
    for name, network in networks.items():
        outputs = _outputs(network, loader, "cpu")
        if max(outputs, 2) != len(folder.classes):
            raise ArgumentError(
                f"{data} has the classes {', '.join(folder.classes)}, and {name} has {outputs} "
                "outputs: rename or add folders, or export the model with <label_names>, which "
                "map outputs to classes"
            )
    return loader, folder.labels


def _outputs(network: nn.Module, loader: Any, device: str) -> int:
    import torch

    image, _ = loader.dataset[0]
    with torch.no_grad():
        answer = network.eval()(image[None].to(device))
    if not isinstance(answer, torch.Tensor) or answer.ndim > 2:
        raise ValueError(
            f"{type(network).__name__} returns {type(answer).__name__}, not class scores: choose "
            "a classifier"
        )
    return answer.shape[-1]


def _guess_task(labels: Tensor, outputs: int) -> str:
    if labels.ndim == 2:
        return "multilabel"
    return "binary" if outputs == 1 else "multiclass"
