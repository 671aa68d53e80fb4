"""Pictures of kernels: cosines over the depth, cosine matrices, and the paper's Figure 1.

Each function takes what :func:`inmerge_wrap.similarity.measure_similarity` gave and returns a
matplotlib figure that nothing has shown or stored yet.

    plot_pairs(measure_similarity(model)).savefig("pairs.png")
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from inmerge_wrap.errors import check_choice
from inmerge_wrap.similarity import KernelPair, LayerSimilarity, pairs_of, similarity_histogram
from inmerge_wrap.thresholds import Threshold, as_threshold

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_matrices", "plot_overview", "plot_pairs"]

Theme = Literal["light", "dark"]

# With the meanings that they have in every picture of the project; docs/.diagram.py has them all.
_COLOURS = {
    "light": {"ground": "#ffffff", "ink": "#1a1a1a", "merging": "#d55e00", "chance": "#009e73"},
    "dark": {"ground": "#16181d", "ink": "#ececec", "merging": "#ff9a52", "chance": "#2fbf94"},
}
_SHARES = {"light": ("#c8c8c8", "#4a4a4a"), "dark": ("#4a4a4a", "#e0e0e0")}  # few, many pairs


def plot_overview(
    layers: Sequence[LayerSimilarity],
    *,
    thresholds: Sequence[float] = (0.1, 0.3, 0.5),
    merged: Collection[str] = (),
    similarity_threshold: float | Threshold = 0.3,
    theme: Theme = "light",
) -> Figure:
    """Cosines, share of similar pairs and effective rank of all layers, over the depth.

    Args:
        layers: What :func:`measure_similarity` gave.
        thresholds: Cosines above which the share of pairs is drawn.
        merged: Names of the layers that merging acts in, which are shaded and printed in bold.
        similarity_threshold: Of merging, drawn into those layers; a number or a rule.
        theme: ``"light"`` for paper, ``"dark"`` for a dark notebook.

    Returns:
        A figure with three panels.

    Raises:
        ValueError: If ``layers`` is empty, or a merged layer is none of them.
    """
    _check_layers(layers)
    unknown = sorted(set(merged) - {layer.name for layer in layers})
    if unknown:
        raise ValueError(f"merged names layers that were not measured: {unknown}")
    rule = as_threshold(similarity_threshold)
    with _themed(theme) as figure_of:
        colours = _COLOURS[theme]
        figure = figure_of(4.2, 5.6)  # a telephone shows no more without shrinking the letters
        axes = figure.subplots(3, 1, sharex=True, height_ratios=(2, 1, 1))
        _draw_histograms(axes[0], layers, theme)
        acting = {place: layer for place, layer in enumerate(layers, 1) if layer.name in merged}
        for axis, place in itertools.product(axes, acting):
            sides = place - 0.5, place + 0.5
            axis.axvspan(*sides, color=colours["merging"], alpha=0.15, lw=0, zorder=-1)
        if acting:
            bounds = [_bound(rule, layer) for layer in acting.values()]
            left, right = ([place + side for place in acting] for side in (-0.5, 0.5))
            line: dict[str, Any] = {"colors": colours["merging"], "linewidth": 2.2}
            axes[0].hlines(bounds, left, right, **line, label="threshold of merging")
        _draw_shares(axes[1], layers, thresholds, colours["ink"])
        # Above the panels: inside of them, any corner may hold data.
        above: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1, 1)}
        axes[0].legend(**above)
        axes[1].legend(ncols=3, columnspacing=1, handletextpad=0.4, **above)
        ranks = [layer.effective_rank for layer in layers]
        axes[2].plot(range(1, len(layers) + 1), ranks, "o-", c=colours["ink"], ms=3.5, lw=1)
        shaded = "; shaded, in bold: merged" if merged else ""
        axes[2].set(ylim=(0, 1.05), ylabel="effective rank")
        axes[2].set_xlabel(f"convolution, in depth order{shaded}")
        shown = range(0, len(layers), math.ceil(len(layers) / 24))
        axes[2].set_xticks([i + 1 for i in shown], [layers[i].name for i in shown], rotation=90)
        for label in axes[2].get_xticklabels():
            label.set_fontweight("bold" if label.get_text() in merged else "normal")
    return figure


def plot_matrices(
    layers: Sequence[LayerSimilarity],
    *,
    most: int = 48,
    columns: int = 4,
    theme: Theme = "light",
) -> Figure:
    """One cosine matrix per layer, its kernels ordered by cluster.

    A deep layer has too many kernels for a small picture, and most of its pairs are not similar:
    each panel shows those kernels that have the closest partners. They are clustered by the mean
    cosine between clusters, so that groups of similar kernels are squares on the diagonal.
    Colours reach as far as the cosines of each layer do; a kernel with itself is left out.

    Args:
        layers: What :func:`measure_similarity` gave.
        most: Kernels per panel.
        columns: Panels per row.
        theme: ``"light"`` for paper, ``"dark"`` for a dark notebook.

    Returns:
        A figure with one panel per layer, each with its scale.
    """
    _check_layers(layers)
    columns = min(columns, len(layers))
    rows = math.ceil(len(layers) / columns)
    with _themed(theme) as figure_of:
        figure = figure_of(max(3.2, 1.85 * columns), 0.35 + 1.75 * rows)
        panels = figure.subplots(rows, columns, squeeze=False).flatten()
        for panel, layer in zip(panels, layers, strict=False):
            chosen = _clustered(layer.cosines, most)
            shown = layer.cosines[chosen][:, chosen].fill_diagonal_(math.nan)
            reach = max(0.01, shown.nan_to_num().abs().max().item())
            image = panel.imshow(
                shown.numpy(), cmap="RdBu_r", vmin=-reach, vmax=reach, rasterized=True
            )
            panel.set_title(_shortened(layer.name))
            panel.set_xlabel(f"{len(chosen)} of {layer.shape[0]} kernels")
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_visible(False)
            bar = figure.colorbar(image, ax=panel, shrink=0.85, aspect=14, pad=0.03)
            bar.outline.set_visible(False)
        for panel in panels[len(layers) :]:
            panel.set_axis_off()
        figure.suptitle("cosine of two kernels")
    return figure


def plot_pairs(
    layers: Sequence[LayerSimilarity], *, count: int = 4, theme: Theme = "light"
) -> Figure:
    """The most and the least similar pairs of kernels as pictures, as in the paper's Figure 1.

    Pairs are taken from the layers whose kernels have a width, at most one of each kind per layer
    while there are layers enough; from 1x1 kernels, which have nothing to look at, where there are
    no others. A kernel is drawn as a mosaic of its input channels, the 16 that weigh most in the
    pair; a 1x1 kernel as a square of its heaviest weights, at most 256; a kernel of three channels
    as a colour picture. Each pair says how many of its channels that is. Kernels over volumes or
    videos show their central slice, those along a single dimension are strips. Both kernels of a
    pair share one scale, each after division by its own length: the cosine does not see the length
    either. The colour bar is in shares of the pair's largest weight.

    Args:
        layers: What :func:`measure_similarity` gave.
        count: Pairs of each kind.
        theme: ``"light"`` for paper, ``"dark"`` for a dark notebook.

    Returns:
        A figure with two rows of pairs.

    Raises:
        ValueError: If no layer has a pair.
    """
    _check_layers(layers)
    wide = [layer for layer in layers if math.prod(layer.shape[2:]) > 1 and layer.most_similar]
    layers = wide or layers
    rows = {
        "most similar": _extremes([(layer, layer.most_similar) for layer in layers], count, -1),
        "least similar": _extremes([(layer, layer.least_similar) for layer in layers], count, 1),
    }
    columns = len(rows["most similar"])
    if not columns:
        raise ValueError("no layer has a pair of comparable kernels to draw")
    with _themed(theme) as figure_of:
        figure = figure_of(max(3.6, 1.9 * columns), 3.5)
        for half, (title, chosen) in zip(figure.subfigures(2, 1), rows.items(), strict=True):
            half.suptitle(title, x=0.01, ha="left")
            widths = [1.0, 1.0, 0.25] * columns  # two kernels and a gap
            panels = half.subplots(1, 3 * columns - 1, width_ratios=widths[:-1])
            for gap in panels[2::3]:
                gap.set_axis_off()
            for place, (layer, pair) in enumerate(chosen):
                _draw_pair(panels[3 * place : 3 * place + 2], layer, pair)
            scaled = [
                image for panel in panels for image in panel.images if image.get_array().ndim == 2
            ]
            if scaled:  # colours have no scale
                bar = half.colorbar(scaled[0], ax=panels.tolist(), shrink=0.8, aspect=18, pad=0.01)
                bar.set_label("weight / largest of the pair")
                bar.outline.set_visible(False)
    return figure


def _check_layers(layers: Sequence[LayerSimilarity]) -> None:
    if not layers:
        raise ValueError("layers is empty: pass what measure_similarity(model) returned")


@contextmanager
def _themed(theme: Theme) -> Iterator[Any]:
    """Gives a function that makes figures, which keep their colours on any background.

    The figures are made without pyplot: nothing global changes, and no window opens.
    """
    check_choice("theme", theme, tuple(_COLOURS))
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "inmerge-wrap[cli]"') from error
    ground, ink = _COLOURS[theme]["ground"], _COLOURS[theme]["ink"]
    settings: dict[Any, Any] = {
        "font.size": 7,
        "axes.titlesize": 7,
        "axes.titlepad": 3,
        "axes.labelpad": 2,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.titlesize": 9,
        "figure.dpi": 150,
        "savefig.dpi": 200,
        "legend.fontsize": 7,
        "legend.frameon": False,
    }
    for part in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"):
        settings[part] = ink
    for part in ("axes.facecolor", "figure.facecolor", "savefig.facecolor"):
        settings[part] = ground
    with mpl.rc_context(settings):
        yield lambda width, height: Figure(figsize=(width, height), layout="constrained")


def _draw_histograms(axes: Axes, layers: Sequence[LayerSimilarity], theme: Theme) -> None:
    """One column per layer: how its pairs spread over the cosines, and what chance would give."""
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    density = torch.stack([similarity_histogram(layer.cosines)[0] for layer in layers], dim=1)
    share = 100 * density / density.sum(dim=0).clamp_min(1)
    image = axes.imshow(
        share.masked_fill(share == 0, math.nan).numpy(),
        origin="lower",
        aspect="auto",
        extent=(0.5, len(layers) + 0.5, -1, 1),
        norm=LogNorm(1e-3, 100),
        cmap=LinearSegmentedColormap.from_list("shares", _SHARES[theme]),
        interpolation="nearest",
        rasterized=True,
    )
    chance = torch.tensor([2 * layer.chance for layer in layers])
    style: dict[str, Any] = {"c": _COLOURS[theme]["chance"], "lw": 1.4, "drawstyle": "steps-mid"}
    for bound, label in ((chance, "two standard deviations of random kernels"), (-chance, None)):
        axes.plot(range(1, len(layers) + 1), bound, label=label, **style)
    furthest = [_off_diagonal(layer.cosines).abs().max() for layer in layers]
    reach = min(1.0, 1.1 * max(*furthest, chance.max()).item())
    axes.set(ylim=(-reach, reach), ylabel="cosine of two kernels")
    axes.figure.colorbar(image, ax=axes, label="pairs of the layer [%]", pad=0.01)


def _draw_shares(
    axes: Axes, layers: Sequence[LayerSimilarity], thresholds: Sequence[float], colour: str
) -> None:
    """How many pairs of each layer lie above each cosine; the highest is the darkest."""
    for rank, (threshold, marker) in enumerate(zip(thresholds, itertools.cycle("osD^vP")), start=1):
        axes.plot(
            range(1, len(layers) + 1),
            [100 * layer.share_above(threshold) for layer in layers],
            marker=marker,
            color=colour,
            alpha=0.3 + 0.7 * rank / len(thresholds),
            markersize=3.5,
            linewidth=1,
            label=f"cosine > {threshold:g}",
        )
    axes.set_yscale("symlog", linthresh=0.1)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("pairs [%]")


def _draw_pair(panels: Sequence[Axes], layer: LayerSimilarity, pair: KernelPair) -> None:
    """Two kernels side by side, named, and above them what is shown of which layer."""
    pictures, extent = _pictures(pair.kernels)
    for panel, picture, index in zip(panels, pictures, (pair.first, pair.second), strict=True):
        height, width = picture.shape[:2]
        panel.imshow(
            picture.numpy(),
            cmap="RdBu_r",
            vmin=-1,
            vmax=1,
            interpolation="nearest",
            aspect=max(1.0, width / (4 * height)),  # a signal would be a hair line
        )
        panel.set(xticks=[], yticks=[], xlabel=f"#{index}")
        panel.spines[:].set(visible=True, linewidth=0.5)  # or two mosaics run into one
    title = f"{_shortened(layer.name)}\n{extent}\ncos = {pair.cosine:.2f}"
    panels[0].set_title(title, loc="left")


def _bound(rule: Threshold, layer: LayerSimilarity) -> float:
    """Returns the bound of a rule, or the smallest cosine that it lets pass; NaN if none does."""
    fan_in = math.prod(layer.shape[1:])
    if callable(bound := getattr(rule, "bound", None)):
        return float(bound(fan_in))
    cosines = pairs_of(layer.cosines)
    passing = cosines[rule.is_similar(cosines, fan_in)]
    return passing.min().item() if len(passing) else math.nan


def _off_diagonal(cosines: Tensor) -> Tensor:
    """Without each kernel with itself, and 0 where there is nothing to compare."""
    return cosines.nan_to_num(0.0).fill_diagonal_(0.0)


def _clustered(cosines: Tensor, most: int) -> list[int]:
    """Kernels with the closest partners, in the order of clustering by average cosine."""
    likeness = cosines.nan_to_num(-1.0).fill_diagonal_(-1.0)
    chosen = likeness.amax(dim=1).topk(min(most, len(likeness))).indices
    # Average linkage: the sums of cosines between clusters, over the numbers of their pairs.
    sums = _off_diagonal(cosines[chosen][:, chosen].double())
    sizes = torch.ones(len(chosen), dtype=torch.double)
    clusters = [[index] for index in chosen.tolist()]
    while len(clusters) > 1:
        mean = (sums / sizes.outer(sizes)).fill_diagonal_(-math.inf)
        first, second = sorted(divmod(int(mean.argmax()), len(clusters)))
        sums[first] += sums[second]
        sums[:, first] += sums[:, second]
        sizes[first] += sizes[second]
        clusters[first] += clusters.pop(second)
        kept = torch.arange(len(sizes)) != second
        sums, sizes = sums[kept][:, kept], sizes[kept]
    return clusters[0]


def _extremes(
    offers: Sequence[tuple[LayerSimilarity, tuple[KernelPair, ...]]], count: int, sign: int
) -> list[tuple[LayerSimilarity, KernelPair]]:
    """The most extreme pairs; a layer's second pair only where the layers' first do not suffice."""
    ranked = [
        (rank, sign * pair.cosine, layer, pair)
        for layer, pairs in offers
        for rank, pair in enumerate(pairs)
    ]
    first = sorted(ranked, key=itemgetter(0, 1))[:count]
    return [(layer, pair) for _, _, layer, pair in sorted(first, key=itemgetter(1))]


def _pictures(kernels: Tensor) -> tuple[list[Tensor], str]:
    """Pictures of two kernels (2, C, *size), and how many of their channels that is.

    They are (rows, columns), or (height, width, 3) for colours.
    """
    norms = kernels.flatten(1).norm(dim=1).view(-1, *[1] * (kernels.dim() - 1))
    unit = _flat_maps(kernels / norms)
    scaled = unit / unit.abs().amax()
    channels, height, width = scaled.shape[1:]
    alone = height * width == 1  # weights without a width, of which more fit into a picture
    if channels == 3 and not alone:
        return list((scaled.permute(0, 2, 3, 1) + 1) / 2), "3 channels, as colours"
    side = math.isqrt(min(channels, 256 if alone else 16))
    heaviest = scaled.square().sum((0, 2, 3)).topk(side * side).indices.sort().values
    tiles = scaled[:, heaviest].reshape(-1, side, side, height, width)
    # A line of NaN between the tiles is drawn as the background.
    gap = 0 if alone else 1
    framed = nn.functional.pad(tiles, (gap, 0, gap, 0), value=math.nan)
    mosaic = framed.permute(0, 1, 3, 2, 4).reshape(2, side * (height + gap), side * (width + gap))
    extent = f"heaviest {side * side} of {channels} channels"
    if side * side == channels:
        extent = f"all {channels} channels" if channels > 1 else "its one channel"
    return list(mosaic[:, gap:, gap:]), extent


def _flat_maps(kernels: Tensor) -> Tensor:
    """Kernels (2, C, *size) as (2, C, height, width): a map, the central slice, or a strip."""
    channels, *size = kernels.shape[1:]
    if len(size) == 2:
        return kernels
    wide = [length for length in size if length > 1] or [1]
    kernels = kernels.reshape(2, channels, *wide)
    if len(wide) == 3:
        kernels = kernels.select(2, wide[0] // 2)
    return kernels.reshape(2, channels, -1, wide[-1])


def _shortened(name: str) -> str:
    return name if len(name) <= 24 else "…" + name[-23:]
