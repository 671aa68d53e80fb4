"""The ``inmerge`` command: shows plans and kernels, exports weights, evaluates models."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

try:
    import typer
    from rich.console import Console
except ImportError as error:
    raise SystemExit(
        f'the inmerge command needs {error.name}: pip install "inmerge-wrap[cli]"'
    ) from error

# Only modules that do not import torch: help, completion and usage errors must not wait for it.
from inmerge_wrap import __version__
from inmerge_wrap._constants import DEFAULT_SHALLOW_SHARE, SKIPPED_KINDS
from inmerge_wrap._tables import KEPT, Column, print_table
from inmerge_wrap.architectures import (
    build,
    creation_arguments,
    is_timm_folder,
    known_models,
    resolve,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from inmerge_wrap.card import ModelCard
    from inmerge_wrap.discovery import ConvSite, MergePlan
    from inmerge_wrap.robustness import RobustnessResult
    from inmerge_wrap.similarity import LayerSimilarity

__all__ = ["app", "main"]

app = typer.Typer(
    name="inmerge",
    help="In-model merging (InMerge) for timm and torchvision CNNs.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
)

# --- options that several commands share ----------------------------------------------------------


def _complete_model(incomplete: str) -> list[str]:
    known = known_models("timm") | known_models("torchvision")
    return sorted(name for name in known if name.startswith(incomplete))


Arch = Annotated[
    str | None,
    typer.Option(
        "--arch",
        help="Model name in timm or torchvision, or `timm:NAME`, `torchvision:NAME`. Not needed "
        "for a folder written by `inmerge export`.",
        autocompletion=_complete_model,
    ),
]
NumClasses = Annotated[
    int | None, typer.Option(min=1, help="Number of outputs; default: that of the weights.")
]
InChans = Annotated[
    int | None, typer.Option(min=1, help="Image channels; default: those of the weights.")
]
Include = Annotated[
    list[str] | None,
    typer.Option(help="Use exactly the convolutions that match (`*` is a wildcard). Repeatable."),
]
Exclude = Annotated[
    list[str] | None, typer.Option(help="Leave out convolutions that match. Repeatable.")
]
Key = Annotated[
    str | None,
    typer.Option(help="Checkpoint entry that holds the weights, such as `state_dict_ema`."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Weights = Annotated[
    Path,
    typer.Argument(
        help="A .safetensors file, a state dict (.pt, .pth), a checkpoint folder of Accelerate, or "
        "a timm folder.",
        show_default=False,
    ),
]


def _reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Reports user errors on stderr with exit code 1; lets any other exception through."""

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (ValueError, OSError, ImportError, RuntimeError) as error:
            message = _in_options(str(error))
            Console(stderr=True).print(
                f"error: {message}", style="red", markup=False, soft_wrap=True
            )
            raise typer.Exit(1) from error

    return guarded


def _in_options(message: str) -> str:
    """Rewrites a library error for the command line: options instead of Python arguments."""
    options = {
        "shallow_layers": "--shallow-layers",
        "also_merge": "--also-merge",
        "include": "--include",
        "exclude": "--exclude",
        "example_input": "--input-size",
    }
    for argument, option in options.items():
        # include=[...], also_merge=(...), also_merge=('frozen',), shallow_layers=0, include='x'
        message = re.sub(rf"\b{argument}=(\[\.\.\.\]|\(\.\.\.\))", option, message)
        message = re.sub(rf"\b{argument}=\('(\w+)',\)", rf"{option} \1", message)
        message = re.sub(rf"\b{argument}(=| (?=must|names))", f"{option} ", message)
    return message


def _examples(*lines: str) -> str:
    # Markdown ends a line of an epilog with two spaces; a paragraph each would waste the screen.
    return "**Examples**\n\n" + "\n\n".join(f"`{line}`" for line in lines)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


# --- plan -----------------------------------------------------------------------------------------


@app.command(
    epilog=_examples(
        "inmerge plan resnet34",
        "inmerge plan torchvision:vgg19 --shallow-layers 10",
        "inmerge plan efficientnet_b0 --also-merge depthwise --json",
        "inmerge plan resnet50 --include 'layer4.*' --exclude '*downsample*'",
    )
)
@_reports_errors
def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="A timm or torchvision model, or a timm folder.",
            autocompletion=_complete_model,
            show_default=False,
        ),
    ],
    shallow_layers: Annotated[
        str,
        typer.Option(help="First convolutions not to merge: a count, or a share such as 0.5."),
    ] = str(DEFAULT_SHALLOW_SHARE),
    include: Include = None,
    exclude: Exclude = None,
    also_merge: Annotated[
        list[str] | None,
        typer.Option(help=f"Also merge this kind: {', '.join(SKIPPED_KINDS)}. Repeatable."),
    ] = None,
    input_size: Annotated[
        tuple[int, int, int] | None,
        typer.Option(help="Channels, height and width of an image; default: the model's own."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show which convolutions would be merged, and why the others would not."""
    _check_image(input_size)
    share = _count_or_share(shallow_layers)
    network = build(model, in_chans=None if input_size is None else input_size[0])
    import torch

    from inmerge_wrap.discovery import plan_merging

    found = plan_merging(
        network,
        shallow_layers=share,
        include=include,
        exclude=exclude or (),
        also_merge=also_merge or (),
        example_input=None if input_size is None else torch.zeros(2, *input_size),
    )
    if as_json:
        _print_json({"model": model, **_plan_content(found)})
    else:
        _print_plan(model, found)


def _plan_content(found: MergePlan) -> dict[str, Any]:
    def listed(sites: Any) -> list[dict[str, Any]]:
        return [{**dataclasses.asdict(site), "fan_in": site.fan_in} for site in sites]

    return {
        "merged": listed(found.merged),
        "skipped": listed(found.skipped),
        "found_by": found.found_by,
    }


def _print_plan(model: str, found: MergePlan) -> None:
    sites = sorted(
        found.merged + found.skipped, key=lambda site: (site.depth is None, site.depth or 0)
    )
    columns = [
        Column("depth", ["-" if site.depth is None else str(site.depth) for site in sites], 2),
        Column("convolution", [site.name for site in sites], KEPT, justify="left"),
        Column("weight", [_shape(site) for site in sites], 1),
        Column(
            "chance",
            [f"{1 / math.sqrt(site.fan_in):.3f}" if site.shape else "-" for site in sites],
            0,
        ),
        Column(
            "",
            ["merged" if site.reason is None else _short_reason(site) for site in sites],
            KEPT,
            justify="left",
            wraps=True,
        ),
    ]
    styles = ["bold green" if site.reason is None else "dim" for site in sites]
    print_table(f"Convolutions of {model}", columns, styles)
    console = Console()
    kinds = {site.reason_kind for site in found.skipped}
    for kind, reason in SKIPPED_KINDS.items():
        if kind in kinds:
            kind = kind.replace("_", " ")
            console.print(f"{kind}: {reason.removeprefix(f'{kind}: ')}", highlight=False)
    weights = sum(math.prod(site.shape) for site in found.merged)
    console.print(
        f"{len(found.merged)} of {len(sites)} convolutions are merged, {weights:,} weights. "
        "chance: standard deviation of the cosine of two random kernels; only where training made "
        "kernels similar do pairs pass a threshold far above it.",
        highlight=False,
    )


def _shape(site: ConvSite) -> str:
    groups = f" /{site.groups}" if site.groups > 1 else ""
    return ("x".join(map(str, site.shape)) or "?") + groups


def _short_reason(site: ConvSite) -> str:
    """Returns a short reason: the kind alone, without its explanation."""
    shared = site.reason_kind in SKIPPED_KINDS
    return str(site.reason_kind).replace("_", " ") if shared else str(site.reason)


# --- similarity -----------------------------------------------------------------------------------


@app.command(
    epilog=_examples(
        "inmerge similarity weights.safetensors --arch resnet34",
        "inmerge similarity checkpoints/epoch_9 --arch resnet18 --output pictures --theme dark",
        "inmerge similarity exported/ --include 'layer4.*' --json",
    )
)
@_reports_errors
def similarity(
    weights: Weights,
    arch: Arch = None,
    num_classes: NumClasses = None,
    in_chans: InChans = None,
    key: Key = None,
    include: Include = None,
    exclude: Exclude = None,
    output: Annotated[
        Path, typer.Option(help="Folder for similarity.json and the figures.")
    ] = Path("similarity"),
    pictures: Annotated[bool, typer.Option(help="Whether to draw figures.")] = True,
    pairs: Annotated[int, typer.Option(min=1, help="Extreme pairs to list and draw.")] = 4,
    theme: Annotated[Literal["light", "dark"], typer.Option(help="Figure theme.")] = "light",
    as_json: AsJson = False,
) -> None:
    """Measure and draw how similar the kernels of trained weights are."""
    network, _ = _load(weights, arch, num_classes, in_chans, key)
    from inmerge_wrap.similarity import measure_similarity

    layers = measure_similarity(network, include=include, exclude=exclude or (), pairs=pairs)
    content = {
        "weights": str(weights),
        "arch": arch,
        "layers": [layer.to_dict() for layer in layers],
    }
    output.mkdir(parents=True, exist_ok=True)
    written = [output / "similarity.json"]
    written[0].write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if pictures:
        from inmerge_wrap.plots import plot_matrices, plot_overview, plot_pairs

        figures = {
            "overview": plot_overview(
                layers, merged=_merged_by_default(network, layers), theme=theme
            ),
            "matrices": plot_matrices(layers, theme=theme),
            "pairs": plot_pairs(layers, count=pairs, theme=theme),
        }
        for name, figure in figures.items():
            written.append(output / f"{name}.png")
            figure.savefig(written[-1])
    if as_json:
        _print_json({**content, "files": [str(path) for path in written]})
    else:
        _print_similarity(weights, layers)
        Console().print(f"written: {', '.join(map(str, written))}", soft_wrap=True, highlight=False)


def _merged_by_default(network: nn.Module, layers: Sequence[LayerSimilarity]) -> set[str]:
    """Names of the layers that the wrapper's defaults merge, of those that were measured."""
    from inmerge_wrap.discovery import plan_merging

    try:
        merged = {site.name for site in plan_merging(network).merged}
    except ValueError:  # there is nothing to merge
        return set()
    return merged & {layer.name for layer in layers}


def _print_similarity(weights: Path, layers: list[LayerSimilarity]) -> None:
    def extreme(pairs: Sequence[Any]) -> str:
        return f"{pairs[0].cosine:.2f}" if pairs else "-"

    columns = [
        Column("convolution", [layer.name for layer in layers], KEPT, justify="left"),
        Column("chance", [f"{layer.chance:.3f}" for layer in layers], 0),
        Column("> 0.1", [f"{layer.share_above(0.1):.2%}" for layer in layers], 2),
        Column("> 0.3", [f"{layer.share_above(0.3):.2%}" for layer in layers], 4),
        Column("most", [extreme(layer.most_similar) for layer in layers], 3),
        Column("least", [extreme(layer.least_similar) for layer in layers], 1),
        Column("rank", [f"{layer.effective_rank:.3f}" for layer in layers], KEPT),
    ]
    print_table(f"Kernels of {weights}", columns)
    Console().print(
        "Cosines of all pairs of kernels of a layer: spread by chance, share above a "
        "threshold, highest, lowest; effective rank (1: orthogonal, 1/n: all identical).",
        highlight=False,
    )


# --- export ---------------------------------------------------------------------------------------


@app.command(
    epilog=_examples(
        "inmerge export checkpoints/epoch_9 weights.safetensors --arch resnet34",
        "inmerge export model.safetensors exported/ --arch resnet18 --input-size 3 28 28 "
        "--mean 0.5 --std 0.5 --card card.json",
    )
)
@_reports_errors
def export(
    weights: Weights,
    output: Annotated[
        Path,
        typer.Argument(
            help="A .safetensors file for plain weights, or a folder for timm's `local-dir:`.",
            show_default=False,
        ),
    ],
    arch: Arch = None,
    num_classes: NumClasses = None,
    in_chans: InChans = None,
    key: Key = None,
    input_size: Annotated[
        tuple[int, int, int] | None,
        typer.Option(help="Channels, height and width in training; required for a folder."),
    ] = None,
    mean: Annotated[
        list[float] | None, typer.Option(help="Mean of pixels in [0, 1], one or one per channel.")
    ] = None,
    std: Annotated[list[float] | None, typer.Option(help="Standard deviation, likewise.")] = None,
    label_names: Annotated[
        str | None, typer.Option(help="Class names, separated by commas.")
    ] = None,
    card: Annotated[
        Path | None, typer.Option(help="JSON file with the fields of the model card.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Turn a training checkpoint into weights that stock timm and torchvision load.

    Prefixes of wrappers (`module.`, `_orig_mod.`) and the state of merging are removed.
    """
    _check_image(input_size)
    _check_pixels(mean, std)
    network, arguments = _load(weights, arch, num_classes, in_chans, key)
    from inmerge_wrap.export import export_timm, export_weights

    if output.suffix == ".safetensors":
        if card is not None or label_names is not None:
            raise ValueError("a card and label names need a folder as the output, not one file")
        export_weights(network, output)
        arch = arch or _read_json(weights / "config.json")["architecture"]
        load = _loading_line(arch, arguments, output)
    elif not hasattr(network, "pretrained_cfg"):
        raise ValueError(
            f"{arch} is not a timm model, and only timm loads such a folder: write to a "
            ".safetensors file"
        )
    else:
        if input_size is None or not mean or not std:
            raise ValueError(
                "a timm folder stores how images are prepared: give --input-size, --mean and --std "
                "of the training; or write the weights alone to a .safetensors file"
            )
        load = export_timm(
            network,
            output,
            input_size=input_size,
            mean=_per_channel(mean, input_size[0]),
            std=_per_channel(std, input_size[0]),
            label_names=None if label_names is None else label_names.split(","),
            card=None if card is None else _card(card, weights, key),
        )
    if as_json:
        _print_json({"output": str(output), "load": load})
    else:
        Console().print(f"written: {output}\nload it with: {load}", soft_wrap=True, highlight=False)


def _card(path: Path, weights: Path, key: str | None) -> ModelCard:
    """Returns the card in a JSON file, with what the checkpoint says of merging."""
    from inmerge_wrap.card import ModelCard
    from inmerge_wrap.checkpoints import read_merging

    card = ModelCard.from_dict(_read_json(path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # reading the file has warned already
        report = read_merging(weights, key=key)
    return card if report is None else card.with_report(report)


def _loading_line(arch: str, arguments: Mapping[str, Any], path: Path) -> str:
    library, name = resolve(arch)
    arguments = creation_arguments(library, name, arguments)
    given = "".join(f", {key}={value!r}" for key, value in arguments.items())
    if library == "torchvision":
        return (
            f'model = torchvision.models.get_model("{name}"{given}); '
            f'model.load_state_dict(safetensors.torch.load_file("{path}"))'
        )
    return f'timm.create_model("{name}"{given}, checkpoint_path="{path}")'


# --- evaluate -------------------------------------------------------------------------------------


@app.command(
    epilog=_examples(
        "inmerge evaluate exported/ --data dermamnist.npz",
        "inmerge evaluate exported/ --data photos/ --preset dermatoscopy",
        "inmerge evaluate plain=plain/ merged=merged/ --data photos/ --output compared.json",
        "inmerge evaluate weights.safetensors --arch resnet18 --data dermamnist.npz --mean 0.5 "
        "--std 0.5 --severity 3 --json",
    )
)
@_reports_errors
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
    batch_size: Annotated[int, typer.Option(min=1, help="Does not affect the results.")] = 256,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    output: Annotated[Path | None, typer.Option(help="JSON file for all rows.")] = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate or compare models on clean, corrupted and attacked images."""
    paths = _named_paths(models)
    if not data.exists():
        raise ValueError(f"no such file or folder: {data}")
    _check_pixels(mean, std)
    networks = {n: _load(path, arch, num_classes, in_chans, key)[0] for n, path in paths.items()}
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
    with _progress(len(networks) * conditions * len(labels)) as show:
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
        _print_result(results[first])
    else:
        _print_comparison(results, differences)


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
        raise ValueError(
            f"{path} does not record how its images were preprocessed: give --mean and --std "
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
                raise ValueError(
                    f"{first} and {name} cannot be compared on the same images: {what} is "
                    f"{wanted[what]} and {theirs[what]}"
                    + ("; --size makes them equal" if what == "size" else "")
                )
    size = next((p["size"] for p in prepared.values() if p["size"] is not None), None)
    if not data.is_dir():
        images, labels = read_npz(data, split)
        images = fit_images(images[:limit], wanted["channels"], size)
        labels = labels[:limit]
        return DataLoader(TensorDataset(images, labels), batch_size=batch_size), labels
    if size is None:
        raise ValueError(f"{data} holds images of any size: pass --size, the side in training")
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
            raise ValueError(
                f"{data} has the classes {', '.join(folder.classes)}, and {name} has {outputs} "
                "outputs: rename or add folders, or export the model with --label-names, which "
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


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str, int], None]]:
    """Shows a progress bar on stderr if it is a terminal; yields a function that advances it."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not sys.stderr.isatty()
    ) as bar:
        whole = bar.add_task("", total=total)
        yield lambda name, images: bar.update(whole, advance=images, description=name)


def _print_result(result: RobustnessResult) -> None:
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
    print_table(title, columns, [_row_style(row) for row in rows])
    Console().print(
        f"{_corruptions_said(settings)}; normalised with mean {settings['mean']}, std "
        f"{settings['std']}. In brackets: 95 % confidence interval over images.",
        highlight=False,
    )


def _print_comparison(
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
    print_table(title, columns, [_row_style(row) for row in rows])
    Console().print(
        f"{_corruptions_said(settings)}. A difference below 0 is better than {first}; in brackets: "
        "paired 95 % confidence interval over images. It does not cover the variation between "
        "training seeds.",
        highlight=False,
    )


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


def _part(settings: Mapping[str, Any]) -> str:
    return f"{settings['split']}, {settings['n']} images"


def _corruptions_said(settings: Mapping[str, Any]) -> str:
    severities = ", ".join(map(str, settings["severities"]))
    return f"Corruptions of preset {settings['preset']}, mean over severities {severities}"


# --- small things ------------------------------------------------------------------------


def _load(
    weights: Path,
    arch: str | None,
    num_classes: int | None,
    in_chans: int | None,
    key: str | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    # Usage errors first: they can be reported before torch is imported, which takes seconds.
    if not weights.exists():
        there = [e.name for e in weights.parent.glob("*")] if weights.parent.is_dir() else []
        close = difflib.get_close_matches(weights.name, there, n=3, cutoff=0.5)
        hint = f"; in {weights.parent} there is {', '.join(close)}" if close else ""
        raise ValueError(f"no such file or folder: {weights}{hint}")
    if arch is not None:
        resolve(arch)
    from inmerge_wrap.checkpoints import load_network

    return load_network(weights, arch, num_classes=num_classes, in_chans=in_chans, key=key)


def _check_image(input_size: tuple[int, int, int] | None) -> None:
    if input_size is not None and min(input_size) < 1:
        given = " ".join(map(str, input_size))
        raise ValueError(
            f"--input-size is {given}: channels, height and width are each at least 1, for "
            "example --input-size 3 224 224"
        )


def _check_pixels(mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    for option, values, wanted in (
        ("--mean", mean, "[0, 1]"),
        ("--std", std, "(0, 1]"),
    ):
        for value in values or ():
            if not 0 <= value <= 1 or (value == 0 and option == "--std"):
                remedy = (
                    f"for grey levels up to 255, pass {value / 255:.4g}"
                    if 1 < value <= 255
                    else "pass the values used in training"
                )
                raise ValueError(
                    f"{option} is {value:g}, but pixels in [0, 1] need {wanted}: {remedy}"
                )


def _guess_task(labels: Tensor, outputs: int) -> str:
    if labels.ndim == 2:
        return "multilabel"
    return "binary" if outputs == 1 else "multiclass"


def _count_or_share(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise ValueError(
            f"--shallow-layers is a count such as 10 or a share such as {DEFAULT_SHALLOW_SHARE}, "
            f"not {text!r}"
        ) from None


def _per_channel(values: list[float], channels: int) -> list[float]:
    return values * channels if len(values) == 1 else values


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=1, allow_nan=False))


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Prints warnings as one line, without the source line that raised them."""
    shown = warnings.showwarning

    def show(message: Any, *_: Any) -> None:
        print(f"warning: {_in_options(str(message))}", file=sys.stderr)

    warnings.showwarning = show  # type: ignore[assignment]
    try:
        yield
    finally:
        warnings.showwarning = shown


def main() -> None:
    """Runs the command."""
    with _plain_warnings():
        app(prog_name="inmerge")


if __name__ == "__main__":
    main()
