"""``inmerge plan``: which convolutions would be merged."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from inmerge_wrap._constants import DEFAULT_SHALLOW_SHARE, SKIPPED_KINDS
from inmerge_wrap.architectures import build
from inmerge_wrap.cli import options
from inmerge_wrap.cli.options import check_image, complete_model
from inmerge_wrap.cli.shell import command, print_json
from inmerge_wrap.cli.tables import KEPT, Column, print_table
from inmerge_wrap.errors import ArgumentError

if TYPE_CHECKING:
    from inmerge_wrap.plan import ConvSite, MergePlan


_SHALLOW = (
    "First convolutions not to merge: a count, or a share such as 0.5. Default: "
    f"{DEFAULT_SHALLOW_SHARE}; with `--recommended` 0."
)
_ALSO = f"Also merge this kind: {', '.join(SKIPPED_KINDS)}. Repeatable."


@command(
    "inmerge plan resnet34",
    "inmerge plan resnet34 --recommended",
    "inmerge plan torchvision:vgg19 --shallow-layers 10",
    "inmerge plan efficientnet_b0 --also-merge depthwise --json",
    "inmerge plan resnet50 --include 'layer4.*' --exclude '*downsample*'",
)
def plan(
    model: Annotated[str, Argument(autocompletion=complete_model)],
    recommended: Annotated[bool, Option("--recommended")] = False,
    shallow_layers: Annotated[str | None, Option(help=_SHALLOW)] = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    also_merge: Annotated[list[str] | None, Option(help=_ALSO)] = None,
    input_size: options.InputSize = None,
    as_json: options.AsJson = False,
) -> None:
    """Show which convolutions would be merged, and why the others would not.

    Args:
        model: A timm or torchvision model, or a timm folder.
        recommended: The plan of `InMergeWrapper.recommended`, which merges inside the forward
            pass; otherwise that of the paper, which merges after each step.
    """
    check_image(input_size)
    share = None if shallow_layers is None else _count_or_share(shallow_layers)
    network = build(model, in_chans=None if input_size is None else input_size[0])
    import torch

    from inmerge_wrap.discovery import plan_merging
    from inmerge_wrap.settings import recommended_settings

    settings: dict[str, Any] = {"mode": "step", "shallow_layers": DEFAULT_SHALLOW_SHARE}
    if recommended:
        settings = {key: recommended_settings(1)[key] for key in settings}
    found = plan_merging(
        network,
        mode=settings["mode"],
        shallow_layers=settings["shallow_layers"] if share is None else share,
        include=include,
        exclude=exclude or (),
        also_merge=also_merge or (),
        example_input=None if input_size is None else torch.zeros(2, *input_size),
    )
    if as_json:
        content = {"model": model, "mode": settings["mode"], "found_by": found.found_by}
        for name, sites in {"merged": found.merged, "skipped": found.skipped}.items():
            content[name] = [{**dataclasses.asdict(site), "fan_in": site.fan_in} for site in sites]
        print_json(content)
    else:
        _print_plan(model, found, recommended)


_LAST_WORDS = {
    True: "The outputs of these convolutions are merged in each forward pass of the training; "
    "their weights stay as they are. chance: standard deviation of the cosine of two random "
    "kernels.",
    False: "chance: standard deviation of the cosine of two random kernels; only where training "
    "made kernels similar do pairs pass a threshold far above it.",
}


def _print_plan(model: str, found: MergePlan, recommended: bool) -> None:
    sites = found.sites
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
    kinds = {site.reason_kind for site in found.skipped}
    shown = {kind.replace("_", " "): SKIPPED_KINDS[kind] for kind in SKIPPED_KINDS if kind in kinds}
    weights = sum(math.prod(site.shape) for site in found.merged)
    footer = [
        *(f"{kind}: {reason.removeprefix(f'{kind}: ')}" for kind, reason in shown.items()),
        f"{found.summary}, {weights:,} weights. {_LAST_WORDS[recommended]}",
    ]
    print_table(f"Convolutions of {model}", columns, styles, "\n".join(footer))


def _shape(site: ConvSite) -> str:
    groups = f" /{site.groups}" if site.groups > 1 else ""
    return ("x".join(map(str, site.shape)) or "?") + groups


def _short_reason(site: ConvSite) -> str:
    """Returns a short reason: the kind alone, without its explanation."""
    shared = site.reason_kind in SKIPPED_KINDS
    return str(site.reason_kind).replace("_", " ") if shared else str(site.reason)


def _count_or_share(text: str) -> int | float:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    raise ArgumentError(
        f"<shallow_layers> is a count such as 10 or a share such as {DEFAULT_SHALLOW_SHARE}, "
        f"not {text!r}"
    )
