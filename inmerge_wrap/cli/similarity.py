"""``inmerge similarity``: how similar the kernels of trained weights are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from inmerge_wrap.cli.options import (
    Arch,
    AsJson,
    Exclude,
    InChans,
    Include,
    Key,
    NumClasses,
    Weights,
    load,
)
from inmerge_wrap.cli.shell import command, print_json, save_json, say
from inmerge_wrap.cli.tables import KEPT, Column, print_table

if TYPE_CHECKING:
    from torch import nn

    from inmerge_wrap.similarity import LayerSimilarity


@command(
    "inmerge similarity weights.safetensors --arch resnet34",
    "inmerge similarity checkpoints/epoch_9 --arch resnet18 --output pictures --theme dark",
    "inmerge similarity exported/ --include 'layer4.*' --json",
)
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
    network, _ = load(weights, arch, num_classes, in_chans, key)
    from inmerge_wrap.similarity import measure_similarity

    layers = measure_similarity(network, include=include, exclude=exclude or (), pairs=pairs)
    content = {
        "weights": str(weights),
        "arch": arch,
        "layers": [layer.to_dict() for layer in layers],
    }
    written = [output / "similarity.json"]
    save_json(written[0], content)
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
        print_json({**content, "files": [str(path) for path in written]})
    else:
        _print_similarity(weights, layers)
        say(f"written: {', '.join(map(str, written))}")


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
    footer = (
        "Cosines of all pairs of kernels of a layer: spread by chance, share above a "
        "threshold, highest, lowest; effective rank (1: orthogonal, 1/n: all identical)."
    )
    print_table(f"Kernels of {weights}", columns, footer=footer)
