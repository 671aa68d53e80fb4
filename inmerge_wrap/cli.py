"""The ``inmerge`` command: see what would be merged, what kernels look like, export, evaluate."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal
from zipfile import BadZipFile

import torch
from torch import Tensor, nn

try:
    import typer
    from rich import box
    from rich.console import Console
    from rich.table import Table
except ImportError as error:
    raise SystemExit(
        f'the inmerge command needs {error.name}: pip install "inmerge-wrap[cli]"'
    ) from error

from inmerge_wrap import __version__
from inmerge_wrap.discovery import SKIPPED_KINDS, ConvSite, MergePlan, plan_merging
from inmerge_wrap.export import export_timm, export_weights
from inmerge_wrap.robustness import Attack, RobustnessResult, evaluate_robustness
from inmerge_wrap.robustness.corruptions import DATASET_PRESETS
from inmerge_wrap.similarity import LayerSimilarity, measure_similarity
from inmerge_wrap.similarity_plots import plot_matrices, plot_overview, plot_pairs

__all__ = ["app", "main"]

app = typer.Typer(
    name="inmerge",
    help="In-model merging (InMerge) for CNNs of timm and torchvision.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="markdown",
)

_CONTAINERS = ("state_dict", "model_state_dict", "model")  # where training scripts put weights


# --- options that several commands share ----------------------------------------------------------


def _complete_model(incomplete: str) -> list[str]:
    return [name for name in _known_models() if name.startswith(incomplete)]


Arch = Annotated[
    str | None,
    typer.Option(
        "--arch",
        help="Model of timm or torchvision, also `timm:NAME` or `torchvision:NAME`. A folder "
        "written by `inmerge export` brings its own.",
        autocompletion=_complete_model,
    ),
]
NumClasses = Annotated[
    int | None, typer.Option(min=1, help="Outputs; those of the weights if not given.")
]
InChans = Annotated[
    int | None, typer.Option(min=1, help="Image channels; those of the weights if not given.")
]
Include = Annotated[
    list[str] | None,
    typer.Option(help="Exactly the convolutions that match, `*` for any characters. Repeatable."),
]
Exclude = Annotated[
    list[str] | None, typer.Option(help="Leave out the convolutions that match. Repeatable.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Weights = Annotated[
    Path,
    typer.Argument(
        help="A .safetensors file, a state dict (.pt, .pth), a checkpoint folder of Accelerate, or "
        "a timm folder.",
        show_default=False,
    ),
]


def _reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Tells the user's mistakes on stderr, with exit code 1; anything else is a bug and raises."""

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (ValueError, OSError, ImportError, RuntimeError) as error:
            Console(stderr=True).print(f"error: {error}", style="red", markup=False, soft_wrap=True)
            raise typer.Exit(1) from error

    return guarded


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
            help="Model of timm or torchvision, or a timm folder.",
            autocompletion=_complete_model,
            show_default=False,
        ),
    ],
    shallow_layers: Annotated[
        str,
        typer.Option(help="First convolutions left alone: a count, or a share such as 0.5."),
    ] = "0.625",
    include: Include = None,
    exclude: Exclude = None,
    also_merge: Annotated[
        list[str] | None,
        typer.Option(help=f"Kind to merge as well: {', '.join(SKIPPED_KINDS)}. Repeatable."),
    ] = None,
    input_size: Annotated[
        tuple[int, int, int] | None,
        typer.Option(help="Channels, height, width of an image; the model's own if not given."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Which convolutions would be merged, and why the others would not."""
    network = _build(model, in_chans=None if input_size is None else input_size[0])
    found = plan_merging(
        network,
        shallow_layers=_count_or_share(shallow_layers),
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
    table = _table(f"Convolutions of {model}")
    for heading, justify in (("depth", "right"), ("convolution", "left"), ("weight", "right")):
        table.add_column(heading, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("chance", justify="right", no_wrap=True)
    table.add_column("")
    sites = sorted(
        found.merged + found.skipped, key=lambda site: (site.depth is None, site.depth or 0)
    )
    for site in sites:
        groups = f" /{site.groups}" if site.groups > 1 else ""
        table.add_row(
            "-" if site.depth is None else str(site.depth),
            site.name,
            ("x".join(map(str, site.shape)) or "?") + groups,
            f"{1 / math.sqrt(site.fan_in):.3f}" if site.shape else "-",
            "merged" if site.reason is None else _short_reason(site),
            style="bold green" if site.reason is None else "dim",
        )
    console = Console()
    console.print(table)
    kinds = {site.reason_kind for site in found.skipped}
    for kind, reason in SKIPPED_KINDS.items():
        if kind in kinds:
            kind = kind.replace("_", " ")
            console.print(f"{kind}: {reason.removeprefix(f'{kind}: ')}", highlight=False)
    weights = sum(math.prod(site.shape) for site in found.merged)
    console.print(
        f"{len(found.merged)} of {len(sites)} convolutions are merged, {weights:,} weights. "
        "chance: spread of the cosine of two random kernels; a threshold far above it fires only "
        "where training made kernels alike.",
        highlight=False,
    )


def _short_reason(site: ConvSite) -> str:
    """The kind alone, where many layers of a network share the reason."""
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
    include: Include = None,
    exclude: Exclude = None,
    output: Annotated[
        Path, typer.Option(help="Folder for similarity.json and the pictures.")
    ] = Path("similarity"),
    pictures: Annotated[bool, typer.Option(help="Whether to draw pictures.")] = True,
    pairs: Annotated[int, typer.Option(min=1, help="Extreme pairs, listed and drawn.")] = 4,
    theme: Annotated[Literal["light", "dark"], typer.Option(help="Of the pictures.")] = "light",
    as_json: AsJson = False,
) -> None:
    """How alike the kernels of trained weights are, in numbers and pictures."""
    network, _ = _load(weights, arch, num_classes, in_chans)
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
        figures = {
            "overview": plot_overview(layers, theme=theme),
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


def _print_similarity(weights: Path, layers: list[LayerSimilarity]) -> None:
    thresholds = (0.1, 0.3)
    table = _table(f"Kernels of {weights}")
    headings = ["chance", *(f"> {tau:g}" for tau in thresholds), "most", "least", "rank"]
    table.add_column("convolution", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in layers:
        table.add_row(
            layer.name,
            f"{layer.chance:.3f}",
            *(f"{layer.share_above(tau):.2%}" for tau in thresholds),
            *(
                f"{pairs[0].cosine:.2f}" if pairs else "-"
                for pairs in (layer.most_similar, layer.least_similar)
            ),
            f"{layer.effective_rank:.3f}",
        )
    console = Console()
    console.print(table)
    console.print(
        "Cosines of all pairs of kernels of a layer: spread by chance, share above a "
        "threshold, highest, lowest; effective rank (1: orthogonal, 1/n: all alike).",
        highlight=False,
    )


def _table(title: str) -> Table:
    return Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1)
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
    input_size: Annotated[
        tuple[int, int, int] | None,
        typer.Option(help="Channels, height, width in training; needed for a folder."),
    ] = None,
    mean: Annotated[
        list[float] | None, typer.Option(help="Of pixels in [0, 1], one or one per channel.")
    ] = None,
    std: Annotated[list[float] | None, typer.Option(help="In the same units.")] = None,
    label_names: Annotated[
        str | None, typer.Option(help="Names of the classes, separated by commas.")
    ] = None,
    card: Annotated[
        Path | None, typer.Option(help="JSON file with the fields of the model card.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Turn a training checkpoint into weights that stock timm and torchvision load.

    Prefixes of wrappers (`module.`, `_orig_mod.`) and the state of merging are taken away.
    """
    network, arguments = _load(weights, arch, num_classes, in_chans)
    if output.suffix == ".safetensors":
        if card is not None or label_names is not None:
            raise ValueError("a card and label names need a folder as the output, not one file")
        export_weights(network, output)
        arch = arch or _read_json(weights / "config.json")["architecture"]
        load = _loading_line(arch, arguments, output)
    elif not hasattr(network, "pretrained_cfg"):
        raise ValueError(
            f"{arch} is not a timm model, and only timm loads such a folder: name a .safetensors "
            "file as the output"
        )
    else:
        if input_size is None or not mean or not std:
            raise ValueError(
                "a timm folder stores how images are prepared: give --input-size, --mean and --std "
                "of the training; or name a .safetensors file as the output for weights alone"
            )
        load = export_timm(
            network,
            output,
            input_size=input_size,
            mean=_per_channel(mean, input_size[0]),
            std=_per_channel(std, input_size[0]),
            label_names=None if label_names is None else label_names.split(","),
            card=None if card is None else _read_json(card),
        )
    if as_json:
        _print_json({"output": str(output), "load": load})
    else:
        Console().print(f"written: {output}\nload it with: {load}", soft_wrap=True, highlight=False)


def _loading_line(arch: str, arguments: Mapping[str, Any], path: Path) -> str:
    library, name = _resolve(arch)
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
        "inmerge evaluate weights.safetensors --arch resnet18 --data dermamnist.npz --mean 0.5 "
        "--std 0.5 --output derma.json",
        "inmerge evaluate exported/ --data pneumoniamnist.npz --preset quick --severity 3 --json",
    )
)
@_reports_errors
def evaluate(
    weights: Weights,
    data: Annotated[
        Path,
        typer.Option(
            help="An .npz in the MedMNIST layout: test_images, test_labels.", show_default=False
        ),
    ],
    arch: Arch = None,
    num_classes: NumClasses = None,
    in_chans: InChans = None,
    mean: Annotated[
        list[float] | None,
        typer.Option(help="Of pixels in [0, 1], as in training; a timm folder brings its own."),
    ] = None,
    std: Annotated[list[float] | None, typer.Option(help="As for --mean.")] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="Corruptions: a preset or a MedMNIST name; by the file's name if unset."),
    ] = None,
    severity: Annotated[
        list[int] | None, typer.Option(help="1 to 5; all if unset. Repeatable.")
    ] = None,
    attack: Annotated[list[str] | None, typer.Option(help="fgsm or pgd. Repeatable.")] = None,
    eps: Annotated[float, typer.Option(help="Of the attacks, in grey levels of 255.")] = 2.0,
    task: Annotated[
        str | None, typer.Option(help="multiclass, binary or multilabel; by the labels if unset.")
    ] = None,
    split: Annotated[Literal["test", "val", "train"], typer.Option(help="Part to use.")] = "test",
    size: Annotated[
        int | None, typer.Option(min=1, help="Side to resize to; that of a timm folder if unset.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first images.")] = None,
    seed: Annotated[int, typer.Option(help="Of corruptions, attacks and bootstrap.")] = 0,
    bootstrap: Annotated[int, typer.Option(min=0, help="Resamples for the intervals.")] = 1000,
    batch_size: Annotated[int, typer.Option(min=1, help="No effect on the figures.")] = 256,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    output: Annotated[Path | None, typer.Option(help="JSON file for all rows.")] = None,
    as_json: AsJson = False,
) -> None:
    """Accuracy, AUROC, calibration: clean, corrupted, and attacked."""
    images, labels = _read_npz(data, split, limit)
    network, _ = _load(weights, arch, num_classes, in_chans)
    network.to(device)
    folder = _is_timm_folder(weights)
    config: Mapping[str, Any] = network.pretrained_cfg if folder else {}  # type: ignore[assignment]
    images = _fit_images(
        images,
        network,
        size or (config["input_size"][-1] if folder else None),
    )
    mean, std = mean or list(config.get("mean", [])), std or list(config.get("std", []))
    if not mean or not std:
        raise ValueError(
            f"{weights} does not say how its images were prepared: give --mean and --std of the "
            "training"
        )
    with torch.no_grad():
        outputs = network.eval()(images[:1].to(device)).shape[-1]
    chosen = preset or DATASET_PRESETS.get(data.stem.split("_")[0], "quick")
    result = evaluate_robustness(
        network,
        [
            (images[start : start + batch_size], labels[start : start + batch_size])
            for start in range(0, len(images), batch_size)
        ],
        preset=chosen,
        task=task or _guess_task(labels, outputs),
        mean=mean,
        std=std,
        severities=sorted(severity) if severity else (1, 2, 3, 4, 5),
        seed=seed,
        attacks=[Attack(name, eps=eps / 255) for name in attack or ()],
        bootstrap=bootstrap,
    )
    result.settings |= {
        "weights": str(weights),
        "data": data.name,
        "split": split,
        "preset": chosen,
        "mean": mean,
        "std": std,
    }
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        result.to_json(output)
    if as_json:
        print(result.to_json())
    else:
        _print_result(result)


def _print_result(result: RobustnessResult) -> None:
    settings = result.settings
    table = _table(
        f"{settings['weights']} on {settings['data']} ({settings['split']}, {settings['n']} images)"
    )
    metrics = [m for m in ("accuracy", "auroc", "balanced_error", "ece") if m in result.rows[0]]
    table.add_column("corruption", no_wrap=True)
    for metric in metrics:
        table.add_column(metric.replace("_", " "), justify="right")
    for row in result.rows:
        if row["severity"] not in (0, "mean") and row["kind"] != "attack":
            continue
        name = str(row["corruption"])
        name = {"clean": "none", "all": "mean of all"}.get(name, name)
        if row["kind"] == "attack":
            name += f" (eps {row['severity'] * 255:g}/255)"
        cells = []
        for metric in metrics:
            cell = f"{row[metric]:.3f}" if metric in row else "-"
            # Four intervals do not fit a terminal; the JSON has them all.
            if f"{metric}_low" in row and metric != "ece":
                cell += f" ({row[f'{metric}_low']:.3f}-{row[f'{metric}_high']:.3f})"
            cells.append(cell)
        table.add_row(name, *cells, style="bold" if row["corruption"] in ("clean", "all") else "")
    console = Console()
    console.print(table)
    severities = ", ".join(map(str, settings["severities"]))
    console.print(
        f"Corruptions of preset {settings['preset']}, mean over severities {severities}; "
        f"normalised with mean {settings['mean']}, std {settings['std']}. In brackets: 95 % "
        "interval over the choice of images.",
        highlight=False,
    )


# --- models and checkpoints -----------------------------------------------------------------------


@functools.cache
def _timm_models() -> frozenset[str]:
    import timm

    return frozenset(timm.list_models())


@functools.cache
def _torchvision_models() -> frozenset[str]:
    try:
        import torchvision
    except ImportError:
        return frozenset()
    return frozenset(torchvision.models.list_models(module=torchvision.models))


def _known_models() -> list[str]:
    return sorted(_timm_models() | _torchvision_models())


def _is_timm_folder(path: str | Path) -> bool:
    return (Path(path) / "config.json").is_file() and (Path(path) / "model.safetensors").is_file()


def _resolve(name: str) -> tuple[str, str]:
    """("timm" or "torchvision", the model's name there); where both know it, timm."""
    library, _, rest = name.rpartition(":")
    known = {"timm": _timm_models, "torchvision": _torchvision_models}
    if library and library not in known:
        raise ValueError(f"{name!r}: a model is NAME, timm:NAME or torchvision:NAME")
    for candidate in [library] if library else list(known):
        # timm names a set of weights after a dot, as in resnet34.tv_in1k.
        if rest in known[candidate]() or (
            candidate == "timm" and rest.partition(".")[0] in known["timm"]()
        ):
            return candidate, rest
    choices = sorted(known[library]()) if library else _known_models()
    close = difflib.get_close_matches(rest, choices, n=5, cutoff=0.5)
    hint = f"close names: {', '.join(close)}" if close else "see timm.list_models()"
    raise ValueError(f"no model is called {name!r}; {hint}")


def _build(name: str, num_classes: int | None = None, in_chans: int | None = None) -> nn.Module:
    """An untrained model."""
    import timm

    wanted = {"num_classes": num_classes, "in_chans": in_chans}
    given: dict[str, Any] = {key: value for key, value in wanted.items() if value is not None}
    if _is_timm_folder(name):
        return timm.create_model(f"local-dir:{name}", pretrained=True, **given)
    library, name = _resolve(name)
    if library == "timm":
        return timm.create_model(name, **given)
    import torchvision

    if given.pop("in_chans", 3) != 3:
        raise ValueError(f"torchvision's {name} reads 3 channels; take a model of timm for others")
    with warnings.catch_warnings():
        # GoogLeNet and Inception announce a slow initialisation, which weights overwrite anyway.
        warnings.simplefilter("ignore", FutureWarning)
        return torchvision.models.get_model(name, weights=None, **given)


def _load(
    weights: Path, arch: str | None, num_classes: int | None, in_chans: int | None
) -> tuple[nn.Module, dict[str, Any]]:
    """A network with the weights of a checkpoint, whatever wrapped it when it was written.

    Returns:
        The network, and the arguments that its architecture is created with.

    Raises:
        ValueError: If they do not fit the network; the message says what would.
    """
    if _is_timm_folder(weights):
        if arch is not None:
            raise ValueError(f"{weights} brings its own architecture: leave out --arch")
        config = _read_json(weights / "config.json")
        arguments = {"num_classes": config["num_classes"], **config.get("model_args", {})}
        return _build(str(weights), num_classes, in_chans), arguments
    state = _read_state(weights)
    if arch is None:
        raise ValueError(f"{weights} holds weights alone: name the network with --arch")
    network = _build(arch, num_classes, in_chans)
    fitted = _without_prefix(state, network, arch)
    fitting = _fitting_arguments(fitted, network)
    asked = {"num_classes": num_classes, "in_chans": in_chans}
    if fitting:
        if any(asked[key] is not None for key in fitting):
            options = shlex.join(
                part
                for key, value in fitting.items()
                for part in (f"--{key.replace('_', '-')}", str(value))
            )
            raise ValueError(
                f"{weights} does not fit {arch} with "
                f"{', '.join(f'{key}={asked[key]}' for key in fitting if asked[key] is not None)}: "
                f"call it with {options}, or leave it out"
            )
        asked |= fitting
        network = _build(arch, **asked)
    _check_shapes(fitted, network, weights, arch)
    network.load_state_dict(fitted)
    return network, {key: value for key, value in asked.items() if value is not None}


def _read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, by name."""
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        there = [entry.name for entry in path.parent.glob("*")] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, there, n=3, cutoff=0.5)
        hint = f"; in {path.parent} there is {', '.join(close)}" if close else ""
        raise ValueError(f"no such file or folder: {path}{hint}")
    if path.suffix == ".safetensors":
        import safetensors
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file ({error})") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle raises anything at all
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{path} can not be read as a state dict ({reason}): write one with "
            "torch.save(model.state_dict(), path) or export_weights(model, path)"
        ) from error
    for key in _CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    state = {
        str(name): value
        for name, value in (content.items() if isinstance(content, Mapping) else ())
        if isinstance(value, Tensor)
    }
    if not state:
        raise ValueError(f"{path} holds no state dict, but {type(content).__name__}")
    return state


def _read_folder(path: Path) -> dict[str, Tensor]:
    """The weights of a folder that Accelerate wrote, in one file or in shards."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(_read_json(index)["weight_map"].values()))
        return {
            name: tensor for shard in shards for name, tensor in _read_state(path / shard).items()
        }
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return _read_state(path / name)
    found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
    raise ValueError(
        f"{path} holds no model.safetensors (it holds {found}); name the file of the weights"
    )


def _without_prefix(
    state: Mapping[str, Tensor], network: nn.Module, arch: str
) -> dict[str, Tensor]:
    """The network's own entries of a state dict, under their own names.

    Whatever a wrapper or a training framework put before the names (``module.``, ``model.``,
    ``net.``) is found by comparison with the names that the network has.
    """
    plain = {
        name.replace("_orig_mod.", ""): value
        for name, value in state.items()
        if not name.endswith("_extra_state")
    }
    own = list(network.state_dict())
    prefixes = {
        name.removesuffix(mine)
        for mine in (own[0], own[-1])
        for name in plain
        if name == mine or name.endswith(f".{mine}")
    } or {""}
    held = {prefix: sum(f"{prefix}{name}" in plain for name in own) for prefix in sorted(prefixes)}
    best = max(held, key=lambda prefix: held[prefix])
    rivals = [prefix for prefix in held if held[prefix] == held[best] > 0]
    if len(rivals) > 1:
        raise ValueError(
            f"the checkpoint holds {arch} {len(rivals)} times, under {', '.join(rivals)}; save the "
            "state dict of the one that is meant"
        )
    if held[best] < 0.5 * len(own):
        first = next(iter(plain), "nothing")
        raise ValueError(
            f"these are not the weights of {arch}: {held[best]} of its {len(own)} tensors are "
            f"there (the file begins with {first!r}, the network with {own[0]!r})"
        )
    return {
        name.removeprefix(best): value for name, value in plain.items() if name.startswith(best)
    }


def _fitting_arguments(state: Mapping[str, Tensor], network: nn.Module) -> dict[str, int]:
    """Outputs and image channels of the weights, where they are not those of the network."""
    layers = [m for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    outputs = getattr(network, "num_classes", layers[-1].weight.shape[0])
    channels = next((m.in_channels for m in layers if isinstance(m, nn.Conv2d)), None)
    fitting = {}
    for name, mine in network.state_dict().items():
        theirs = state.get(name)
        if theirs is None or theirs.ndim != mine.ndim or theirs.ndim == 0:
            continue
        (my_rows, *my_rest), (rows, *rest) = mine.shape, theirs.shape
        if rest == my_rest and my_rows == outputs != rows:
            fitting["num_classes"] = rows
        elif mine.ndim == 4 and rows == my_rows and my_rest[0] == channels != rest[0]:
            fitting["in_chans"] = rest[0]
    return fitting


def _check_shapes(
    state: Mapping[str, Tensor], network: nn.Module, weights: Path, arch: str
) -> None:
    own = network.state_dict()
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    wrong = [
        f"{name} is {tuple(state[name].shape)} and not {tuple(mine.shape)}"
        for name, mine in own.items()
        if name in state and state[name].shape != mine.shape
    ]
    problems = [
        f"{what}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
        for what, names in (("missing", missing), ("not in it", unexpected), ("shapes", wrong))
        if names
    ]
    if problems:
        raise ValueError(f"{weights} does not fit {arch}; {'; '.join(problems)}")


# --- data and small things ------------------------------------------------------------------------


def _read_npz(path: Path, split: str, limit: int | None) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) in [0, 1] and labels (N,) or (N, L) of a file in MedMNIST's layout."""
    import numpy as np

    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    try:
        with open(path, "rb") as file, np.load(file) as content:
            images, labels = content[f"{split}_images"], content[f"{split}_labels"]
    except (KeyError, ValueError, OSError, EOFError, TypeError, BadZipFile) as error:
        raise ValueError(
            f"{path} is not in the MedMNIST layout: an .npz with {split}_images (N, H, W) or "
            f"(N, H, W, 3), bytes, and {split}_labels (N, 1) or (N, L); {error}"
        ) from error
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or len(images) != len(labels):
        raise ValueError(
            f"{split}_images of {path} are {images.dtype} {images.shape} with {labels.shape} "
            "labels; bytes (N, H, W) or (N, H, W, 3) with one row of labels each are needed"
        )
    pixels = torch.from_numpy(images[:limit]).float() / 255
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    targets = torch.from_numpy(labels[:limit].astype("int64"))
    return pixels.contiguous(), targets.squeeze(1) if targets.shape[1:] == (1,) else targets


def _fit_images(images: Tensor, network: nn.Module, size: int | None) -> Tensor:
    """Images of the size and with the channels that the network reads."""
    reads = next(m.in_channels for m in network.modules() if isinstance(m, nn.Conv2d))
    channels = images.shape[1]
    if channels == 1 and reads == 3:
        images = images.expand(-1, 3, -1, -1)
    elif channels != reads:
        raise ValueError(f"the images have {channels} channels and the network reads {reads}")
    if size is not None and size != images.shape[-1]:
        images = nn.functional.interpolate(
            images, (size, size), mode="bilinear", antialias=True, align_corners=False
        ).clamp(0, 1)
    return images


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
            f"--shallow-layers is a count such as 10 or a share such as 0.625, not {text!r}"
        ) from None


def _per_channel(values: list[float], channels: int) -> list[float]:
    return values * channels if len(values) == 1 else values


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} can not be read as JSON: {error}") from error


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=1, allow_nan=False))


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings as one line for people, without the source line that raised them."""
    shown = warnings.showwarning

    def show(message: Any, *_: Any) -> None:
        print(f"warning: {message}", file=sys.stderr)

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
