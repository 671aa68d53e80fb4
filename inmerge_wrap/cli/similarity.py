"""``inmerge similarity``: how similar the kernels of trained weights are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Option

from inmerge_wrap.cli import options
from inmerge_wrap.cli.options import load
from inmerge_wrap.cli.shell import command, print_json, say
from inmerge_wrap.cli.tables import KEPT, Column, print_table
from inmerge_wrap.errors import ArgumentError
from inmerge_wrap.files import replacing, write_json

if TYPE_CHECKING:
    from torch import nn

    from inmerge_wrap.similarity import LayerSimilarity


@command(
    "inmerge similarity weights.safetensors --arch resnet34",
    "inmerge similarity checkpoints/epoch_9 --arch resnet18 --output pictures --theme dark",
    "inmerge similarity exported/ --include 'layer4.*' --json",
)
def similarity(
    weights: options.Weights,
    arch: options.Arch = None,
    num_classes: options.NumClasses = None,
    in_chans: options.InChans = None,
    key: options.Key = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    output: Path = Path("similarity"),
    pictures: bool = True,
    pairs: Annotated[int, Option(min=1)] = 4,
    theme: Literal["light", "dark"] | None = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure and draw how similar the kernels of trained weights are.

    Args:
        output: Folder for similarity.json and the figures.
        pictures: Whether to draw figures.
        pairs: Number of extreme pairs to list and draw.
        theme: Figure theme; default: light.
    """
    if theme and not pictures:
        raise ArgumentError("<theme> is the look of the pictures, which --no-pictures leaves out")
    network, _ = load(weights, arch, num_classes, in_chans, key)
    from inmerge_wrap.similarity import measure_similarity

    layers = measure_similarity(network, include=include, exclude=exclude or (), pairs=pairs)
    content = {
        "weights": str(weights),
        "arch": arch,
        "layers": [layer.to_dict() for layer in layers],
    }
    written = [output / "similarity.json"]
    write_json(written[0], content, allow_nan=False)
    if pictures:
        from inmerge_wrap.plots import plot_matrices, plot_overview, plot_pairs

        theme = theme or "light"
        figures = {
            "overview": plot_overview(
                layers, merged=_merged_by_default(network, layers), theme=theme
            ),
            "matrices": plot_matrices(layers, theme=theme),
            "pairs": plot_pairs(layers, count=pairs, theme=theme),
        }
        for name, figure in figures.items():
            written.append(output / f"{name}.png")
            with replacing(written[-1]) as draft:
                figure.savefig(draft)
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
