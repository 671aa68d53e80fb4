"""What the kernels of a network look like: cosines, redundancy and the paper's Figure 1.

The functions that measure take tensors or any ``nn.Module`` and give arrays; those that draw take
what was measured and give a matplotlib figure, which nothing has shown or stored yet.

    layers = measure_similarity(model)
    layers[0].share_above(0.3), layers[0].effective_rank
    plot_pairs(layers).savefig("pairs.png")
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from inmerge_wrap.discovery import SKIPPED_KINDS, ConvSite, Pattern, plan_merging
from inmerge_wrap.export import unwrap
from inmerge_wrap.merging import centre
from inmerge_wrap.stores import store_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "KernelPair",
    "LayerSimilarity",
    "cosine_matrix",
    "effective_rank",
    "extreme_pairs",
    "measure_similarity",
    "plot_matrices",
    "plot_overview",
    "plot_pairs",
    "read_kernels",
    "similarity_histogram",
]

Theme = Literal["light", "dark"]

THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.9)
"""Thresholds at which the share of similar pairs is told; 0.3 is the paper's."""

# Okabe and Ito's colours, told apart by every kind of colour vision, and readable on both grounds.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MOSAIC = 16  # channels of a kernel that a picture shows


# --- measuring ------------------------------------------------------------------------------------


def effective_rank(kernels: Tensor, groups: int = 1) -> Tensor:
    """Share of directions that a bank of kernels uses: n / ||G||_F^2, G its cosine matrix.

    This is the participation ratio of the spectrum of G over the number of kernels n: 1 where the
    kernels are orthogonal, 1 / n where all point the same way. A fan-in d smaller than n bounds it
    by d / n. Kernels of length zero, or with NaN or Inf, are left out. Nothing waits for the
    device.

    Args:
        kernels: (n, fan_in), one flattened kernel a row.
        groups: Of the convolution. Kernels of different groups read different channels, so they
            count as orthogonal.

    Returns:
        A scalar in [groups / n, 1], of float32 or wider; NaN where no kernel has a direction.
    """
    with torch.autocast(kernels.device.type, enabled=False):
        unit, known = _directions(kernels)
        banks = unit.unflatten(0, (groups, -1))
        # ||U U^T||_F = ||U^T U||_F: the smaller of the two products.
        gram = banks @ banks.mT if banks.shape[1] <= banks.shape[2] else banks.mT @ banks
        return known.sum() / gram.square().sum()


def cosine_matrix(kernels: Tensor, groups: int = 1) -> Tensor:
    """Cosine of every kernel with every other (eq. 1 and 2 of the paper).

    Args:
        kernels: (n, fan_in), one flattened kernel a row.
        groups: Of the convolution.

    Returns:
        (n, n), symmetric, ones on the diagonal, of float32 or wider. NaN where there is nothing to
        compare: a kernel of length zero or with NaN or Inf, or kernels of different groups, which
        read different channels.
    """
    with torch.autocast(kernels.device.type, enabled=False):
        unit, known = _directions(kernels)
        cosines = (unit @ unit.T).clamp(-1.0, 1.0)
    bank = torch.arange(groups, device=unit.device).repeat_interleave(len(unit) // groups)
    comparable = (bank[:, None] == bank) & known[:, None] & known
    cosines.fill_diagonal_(1.0)
    return torch.where(comparable, cosines, math.nan)


def similarity_histogram(cosines: Tensor, bins: int = 80) -> tuple[Tensor, Tensor]:
    """How many pairs of kernels have which cosine.

    Args:
        cosines: A cosine matrix (n, n); every pair counts once, the diagonal and NaN not at all.
        bins: Number of equal bins over [-1, 1].

    Returns:
        Counts (bins,) and edges (bins + 1,).

    Raises:
        ValueError: If ``bins`` is below 1.
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    counts = torch.histc(_pairs_of(cosines).float().cpu(), bins, -1.0, 1.0)
    return counts.long(), torch.linspace(-1.0, 1.0, bins + 1)


def extreme_pairs(cosines: Tensor, count: int = 4) -> tuple[list[tuple[int, int, float]], ...]:
    """The most and the least similar pairs of kernels.

    Args:
        cosines: A cosine matrix (n, n).
        count: Pairs of each kind; fewer where there are not so many.

    Returns:
        Two lists of (first, second, cosine), the most similar pairs (highest cosine first) and the
        least similar ones (lowest first).
    """
    rows, columns = torch.triu_indices(len(cosines), len(cosines), offset=1, device=cosines.device)
    values = cosines[rows, columns]
    comparable = ~values.isnan()
    rows, columns, values = rows[comparable], columns[comparable], values[comparable]

    def pick(largest: bool) -> list[tuple[int, int, float]]:
        found = values.topk(min(count, len(values)), largest=largest).indices
        return list(
            zip(rows[found].tolist(), columns[found].tolist(), values[found].tolist(), strict=True)
        )

    return pick(True), pick(False)


@dataclass(frozen=True)
class KernelPair:
    """Two kernels of one layer.

    Attributes:
        first: Index of the first kernel.
        second: Index of the second one.
        cosine: Of the two.
        kernels: Their weights, shape (2, C_in / groups, kH, kW).
    """

    first: int
    second: int
    cosine: float
    kernels: Tensor = field(repr=False, compare=False)


@dataclass(frozen=True)
class LayerSimilarity:
    """How alike the kernels of one convolution are.

    Attributes:
        name: The convolution.
        depth: Its place in the order of execution, from 1; None if it never runs.
        shape: Of its weight, (C_out, C_in / groups, kH, kW).
        groups: Groups inside which kernels are compared.
        cosines: The cosine matrix, (C_out, C_out), on the CPU; see :func:`cosine_matrix`.
        effective_rank: See :func:`effective_rank`.
        undefined: Kernels without a direction: zero, or with NaN or Inf.
        most_similar: Pairs of the highest cosine, that one first.
        least_similar: Pairs of the lowest cosine, that one first.
    """

    name: str
    depth: int | None
    shape: tuple[int, ...]
    groups: int
    cosines: Tensor = field(repr=False, compare=False)
    effective_rank: float
    undefined: int
    most_similar: tuple[KernelPair, ...] = field(repr=False)
    least_similar: tuple[KernelPair, ...] = field(repr=False)

    @property
    def pairs(self) -> int:
        """Pairs that have a cosine."""
        return len(_pairs_of(self.cosines))

    @property
    def mean_cosine(self) -> float:
        """Mean over all pairs; NaN without a pair."""
        return _pairs_of(self.cosines).double().mean().item()

    @property
    def chance(self) -> float:
        """Standard deviation of the cosine of two random kernels of this fan-in."""
        return 1.0 / math.sqrt(math.prod(self.shape[1:]))

    def share_above(self, threshold: float) -> float:
        """Share of the pairs whose cosine is above a threshold; NaN without a pair."""
        return (_pairs_of(self.cosines) > threshold).double().mean().item()

    def to_dict(self, thresholds: Sequence[float] = THRESHOLDS, bins: int = 80) -> dict[str, Any]:
        """Plain numbers for a JSON file: no matrix, and None in place of NaN."""

        def listed(pairs: Sequence[KernelPair]) -> list[dict[str, Any]]:
            return [{"kernels": [p.first, p.second], "cosine": p.cosine} for p in pairs]

        counts, edges = similarity_histogram(self.cosines, bins)
        return {
            "name": self.name,
            "depth": self.depth,
            "shape": list(self.shape),
            "groups": self.groups,
            "pairs": self.pairs,
            "undefined_kernels": self.undefined,
            "mean_cosine": _finite(self.mean_cosine),
            "chance": self.chance,
            "effective_rank": _finite(self.effective_rank),
            "share_above": {f"{tau:g}": _finite(self.share_above(tau)) for tau in thresholds},
            "histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
            "most_similar": listed(self.most_similar),
            "least_similar": listed(self.least_similar),
        }


@torch.no_grad()
def measure_similarity(
    model: nn.Module,
    *,
    include: Pattern | Sequence[Pattern] | None = None,
    exclude: Pattern | Sequence[Pattern] = (),
    example_input: Any = None,
    pairs: int = 4,
) -> list[LayerSimilarity]:
    """Compares all kernels of each convolution, as the forward pass uses them.

    Kernels are compared as merging compares them: inside their group, and without their mean where
    the forward pass standardises them. Convolutions whose kernels can not be compared (one kernel
    in a group, a weight that is computed in the forward pass or shared with an earlier layer) are
    left out; ``plan_merging(model)`` says which and why. The model is not changed.

    Args:
        model: Any network, also inside InMergeWrapper, DDP or torch.compile.
        include: Only the convolutions that match, as for :func:`inmerge_wrap.plan_merging`.
        exclude: Of these, leave out what matches.
        example_input: See :func:`inmerge_wrap.plan_merging`.
        pairs: How many most and least similar pairs to keep of each layer.

    Returns:
        One entry per convolution, in depth order.

    Raises:
        ValueError: If no convolution is left, or a pattern matches none.
    """
    network = unwrap(model)
    plan = plan_merging(
        network,
        shallow_layers=0,
        include=include,
        exclude=exclude,
        also_merge=SKIPPED_KINDS,
        example_input=example_input,
    )
    return [_measure_layer(network, site, pairs) for site in plan.merged]


def _measure_layer(network: nn.Module, site: ConvSite, pairs: int) -> LayerSimilarity:
    kernels = read_kernels(network.get_submodule(site.name), centred=site.centred)
    cosines = cosine_matrix(kernels, site.pair_groups).cpu()
    weights = kernels.reshape(site.shape)

    def with_weights(found: list[tuple[int, int, float]]) -> tuple[KernelPair, ...]:
        return tuple(
            KernelPair(first, second, cosine, weights[[first, second]].cpu())
            for first, second, cosine in found
        )

    most, least = extreme_pairs(cosines, pairs)
    return LayerSimilarity(
        name=site.name,
        depth=site.depth,
        shape=site.shape,
        groups=site.pair_groups,
        cosines=cosines,
        effective_rank=effective_rank(kernels, site.pair_groups).item(),
        undefined=int(cosines.diagonal().isnan().sum()),
        most_similar=with_weights(most),
        least_similar=with_weights(least),
    )


def read_kernels(conv: nn.Module, *, centred: bool = False) -> Tensor:
    """A copy of the kernels that the forward pass uses, (C_out, fan_in), float32 or wider.

    Args:
        conv: A convolution. Under FSDP2 all ranks must call this together.
        centred: Take the mean of each kernel away, for layers that standardise their weight.
    """
    assert isinstance(conv, nn.Conv2d)
    with store_of(conv).opened() as stored:
        kernels = stored.read(torch.arange(len(stored.weight), device=stored.weight.device))
    return centre(kernels) if centred else kernels


def _directions(kernels: Tensor) -> tuple[Tensor, Tensor]:
    """Unit kernels (n, fan_in), zero where there is no direction, and where there is one (n,)."""
    wide = kernels.detach().to(torch.promote_types(kernels.dtype, torch.float32))
    # Scaled by the largest entry first, or the squares of very small or large kernels would not
    # be finite.
    largest = wide.abs().amax(dim=1, keepdim=True)
    scaled = wide / largest
    known = largest.isfinite() & (largest > 0)
    unit = torch.where(known, scaled / scaled.norm(dim=1, keepdim=True), 0.0)
    return unit, known.squeeze(1)


def _pairs_of(cosines: Tensor) -> Tensor:
    """The cosine of each comparable pair once, flat."""
    rows, columns = torch.triu_indices(len(cosines), len(cosines), offset=1, device=cosines.device)
    values = cosines[rows, columns]
    return values[~values.isnan()]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# --- drawing --------------------------------------------------------------------------------------


def plot_overview(
    layers: Sequence[LayerSimilarity],
    *,
    thresholds: Sequence[float] = (0.1, 0.3, 0.5),
    theme: Theme = "light",
) -> Figure:
    """Cosines, share of similar pairs and effective rank of all layers, over the depth.

    Args:
        layers: What :func:`measure_similarity` gave.
        thresholds: Cosines above which the share of pairs is drawn.
        theme: ``"light"`` for paper, ``"dark"`` for a dark notebook.

    Returns:
        A figure with three panels.
    """
    _check_layers(layers)
    with _themed(theme) as figure_of:
        figure = figure_of(7.0, 6.0)
        axes = figure.subplots(3, 1, sharex=True, height_ratios=(2.2, 1, 1))
        places = range(1, len(layers) + 1)
        _draw_histograms(axes[0], layers)
        for threshold, colour, marker in zip(thresholds, _COLOURS, "osD^vP", strict=False):
            shares = [100 * layer.share_above(threshold) for layer in layers]
            label = f"cosine > {threshold:g}"
            axes[1].plot(places, shares, marker, ls="-", c=colour, ms=3.5, lw=1, label=label)
        axes[1].set_ylabel("pairs [%]")
        axes[1].set_yscale("symlog", linthresh=0.1)
        axes[1].set_ylim(bottom=0)
        # Above the panel: inside of it, any corner may hold data.
        axes[1].legend(
            ncols=len(thresholds), loc="lower right", bbox_to_anchor=(1, 1), frameon=False
        )
        ranks = [layer.effective_rank for layer in layers]
        axes[2].plot(places, ranks, "o-", c=_COLOURS[0], ms=3.5, lw=1)
        axes[2].set_ylim(0, 1.05)
        axes[2].set_ylabel("effective rank")
        axes[2].set_xlabel("convolution, in depth order")
        step = math.ceil(len(layers) / 24)
        shown = range(0, len(layers), step)
        axes[2].set_xticks([i + 1 for i in shown], [layers[i].name for i in shown], rotation=90)
    return figure


def plot_matrices(
    layers: Sequence[LayerSimilarity],
    *,
    most: int = 48,
    columns: int = 6,
    theme: Theme = "light",
) -> Figure:
    """One cosine matrix per layer.

    A deep layer has too many kernels for a small picture, and most pairs are alike in being
    unlike: each panel shows those kernels that have the closest partners, neighbours side by side.

    Args:
        layers: What :func:`measure_similarity` gave.
        most: Kernels per panel.
        columns: Panels per row.
        theme: ``"light"`` for paper, ``"dark"`` for a dark notebook.

    Returns:
        A figure with one panel per layer and one scale for all.
    """
    _check_layers(layers)
    columns = min(columns, len(layers))
    rows = math.ceil(len(layers) / columns)
    with _themed(theme) as figure_of:
        figure = figure_of(max(3.2, 1.25 * columns), 0.9 + 1.4 * rows)
        panels = figure.subplots(rows, columns, squeeze=False).flatten()
        for panel, layer in zip(panels, layers, strict=False):
            chosen = _closest_kernels(layer.cosines, most)
            image = panel.imshow(
                layer.cosines[chosen][:, chosen].numpy(),
                cmap="RdBu_r",
                vmin=-1,
                vmax=1,
                rasterized=True,
            )
            panel.set_title(_shortened(layer.name, 20), fontsize=7, pad=2)
            panel.set_xlabel(f"{len(chosen)} of {layer.shape[0]}", fontsize=6, labelpad=1)
            panel.set_xticks([])
            panel.set_yticks([])
            panel.spines[:].set_visible(False)
        for panel in panels[len(layers) :]:
            panel.set_axis_off()
        bar = figure.colorbar(image, ax=panels.tolist(), location="bottom", shrink=0.5, aspect=40)
        bar.set_label("cosine of two kernels")
    return figure


def plot_pairs(
    layers: Sequence[LayerSimilarity],
    *,
    count: int = 4,
    theme: Theme = "light",
) -> Figure:
    """The most and the least similar pairs of kernels as pictures, as in the paper's Figure 1.

    Pairs are taken from all layers given, at most one of each kind per layer while there are
    layers enough. A kernel is drawn as a mosaic of its input channels, the 16 that weigh most in
    the pair; a 1x1 kernel as a square of its heaviest weights, at most 256; a kernel of three
    channels as a colour picture. Both kernels of a pair share one scale, each after division by
    its own length: the cosine does not see the length either.

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
    similar = _choose_pairs([(layer, layer.most_similar) for layer in layers], count, highest=True)
    apart = _choose_pairs([(layer, layer.least_similar) for layer in layers], count, highest=False)
    if not similar:
        raise ValueError("no layer has a pair of comparable kernels to draw")
    with _themed(theme) as figure_of:
        figure = figure_of(max(3.4, 1.75 * len(similar)), 3.1)
        halves = figure.subfigures(2, 1)
        for half, title, chosen in zip(
            halves, ("most similar", "least similar"), (similar, apart), strict=True
        ):
            half.suptitle(title, fontsize=9, x=0.01, ha="left")
            panels = half.subplots(1, 3 * len(chosen) - 1, width_ratios=_with_gaps(len(chosen)))
            for gap in panels[2::3]:
                gap.set_axis_off()
            for place, (layer, pair) in enumerate(chosen):
                left, right = panels[3 * place], panels[3 * place + 1]
                for panel, picture in zip((left, right), _pictures(pair.kernels), strict=True):
                    panel.imshow(
                        picture.numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest"
                    )
                    panel.set_xticks([])
                    panel.set_yticks([])
                    panel.spines[:].set_visible(True)  # or two mosaics run into one
                    panel.spines[:].set_linewidth(0.5)
                left.set_xlabel(f"#{pair.first}", fontsize=7, labelpad=2)
                right.set_xlabel(f"#{pair.second}", fontsize=7, labelpad=2)
                left.set_title(
                    f"{_shortened(layer.name, 22)}\ncos = {pair.cosine:.2f}",
                    fontsize=7,
                    loc="left",
                    pad=3,
                )
    return figure


def _check_layers(layers: Sequence[LayerSimilarity]) -> None:
    if not layers:
        raise ValueError("layers is empty: pass what measure_similarity(model) returned")


@contextmanager
def _themed(theme: Theme) -> Iterator[Any]:
    """Gives a function that makes figures, which keep their colours on any background.

    The figures are made without pyplot: nothing global changes, and no window opens.
    """
    if theme not in ("light", "dark"):
        raise ValueError(f"theme must be 'light' or 'dark', got {theme!r}")
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "inmerge-wrap[cli]"') from error
    ground, ink = ("#ffffff", "#1a1a1a") if theme == "light" else ("#16181d", "#e8e8e8")
    settings: dict[Any, Any] = {
        "font.size": 8,
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.edgecolor": ink,
        "axes.facecolor": ground,
        "figure.facecolor": ground,
        "savefig.facecolor": ground,
        "xtick.color": ink,
        "ytick.color": ink,
        "xtick.labelsize": 6.5,
        "ytick.labelsize": 7,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.dpi": 150,
        "savefig.dpi": 200,
    }
    with mpl.rc_context(settings):
        yield lambda width, height: Figure(figsize=(width, height), layout="constrained")


def _draw_histograms(axes: Axes, layers: Sequence[LayerSimilarity]) -> None:
    """One column per layer: how its pairs spread over the cosines, and what chance would give."""
    from matplotlib.colors import LogNorm

    density = torch.stack([similarity_histogram(layer.cosines)[0] for layer in layers], dim=1)
    share = 100 * density / density.sum(dim=0).clamp_min(1)
    image = axes.imshow(
        share.masked_fill(share == 0, math.nan).numpy(),
        origin="lower",
        aspect="auto",
        extent=(0.5, len(layers) + 0.5, -1, 1),
        norm=LogNorm(1e-3, 100),
        cmap="viridis",
        interpolation="nearest",
        rasterized=True,
    )
    chance = [2 * layer.chance for layer in layers]
    places = range(1, len(layers) + 1)
    style: dict[str, Any] = {"c": _COLOURS[1], "lw": 1, "drawstyle": "steps-mid"}
    axes.plot(places, chance, **style, label="two standard deviations of random kernels")
    axes.plot(places, [-value for value in chance], **style)
    axes.set_ylim(-1, 1)
    axes.set_ylabel("cosine of two kernels")
    axes.legend(loc="lower right", frameon=False)
    axes.figure.colorbar(image, ax=axes, label="pairs of the layer [%]", pad=0.01)


def _closest_kernels(cosines: Tensor, most: int) -> list[int]:
    """Kernels with the closest partners, each followed by the one most like it of those left."""
    likeness = cosines.nan_to_num(-1.0).fill_diagonal_(-1.0)
    chosen = likeness.amax(dim=1).topk(min(most, len(likeness))).indices
    likeness = likeness[chosen][:, chosen]
    path, left = [0], set(range(1, len(chosen)))
    while left:
        nearest = max(left, key=lambda i: likeness[path[-1], i].item())
        path.append(nearest)
        left.remove(nearest)
    return chosen[path].tolist()


def _choose_pairs(
    offers: Sequence[tuple[LayerSimilarity, tuple[KernelPair, ...]]], count: int, *, highest: bool
) -> list[tuple[LayerSimilarity, KernelPair]]:
    """The most extreme pairs; a layer's second pair only where the layers' first do not suffice."""
    ranked = [
        (rank, pair.cosine, layer, pair)
        for layer, pairs in offers
        for rank, pair in enumerate(pairs)
    ]
    ranked.sort(key=lambda entry: (entry[0], -entry[1] if highest else entry[1]))
    taken = sorted(ranked[:count], key=lambda entry: entry[1], reverse=highest)
    return [(layer, pair) for _, _, layer, pair in taken]


def _pictures(kernels: Tensor) -> list[Tensor]:
    """Pictures of two kernels (2, C, kH, kW): (rows, columns), or (kH, kW, 3) for colours."""
    flat = kernels.flatten(1)
    unit = (flat / flat.norm(dim=1, keepdim=True)).view_as(kernels)
    scaled = unit / unit.abs().amax()
    channels, height, width = scaled.shape[1:]
    if channels == 3 and height * width > 1:
        return list((scaled.permute(0, 2, 3, 1) + 1) / 2)
    if height * width == 1:  # a kernel of weights alone: all of them, as square as possible
        height = width = max(1, math.isqrt(min(channels, 256)))
        weight = scaled.flatten(1)
        heaviest = weight.square().sum(0).topk(height * width).indices.sort().values
        return list(weight[:, heaviest].reshape(-1, height, width))
    side = max(1, math.isqrt(min(channels, _MOSAIC)))
    heaviest = scaled.square().sum((0, 2, 3)).topk(side * side).indices.sort().values
    tiles = scaled[:, heaviest].reshape(-1, side, side, height, width)
    # A line of NaN between the tiles is drawn as the background.
    framed = nn.functional.pad(tiles, (0, 1, 0, 1), value=math.nan)
    mosaic = framed.permute(0, 1, 3, 2, 4).reshape(-1, side * (height + 1), side * (width + 1))
    return list(mosaic[:, :-1, :-1])


def _with_gaps(pairs: int) -> list[float]:
    return ([1.0, 1.0, 0.25] * pairs)[:-1]


def _shortened(name: str, length: int) -> str:
    return name if len(name) <= length else "…" + name[1 - length :]
