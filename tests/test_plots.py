"""Pictures of kernels, against what they must show."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from matplotlib.image import AxesImage
from torch import nn

from inmerge_wrap import Quantile, ZScore
from inmerge_wrap.plots import plot_matrices, plot_overview, plot_pairs
from inmerge_wrap.similarity import LayerSimilarity, measure_similarity
from tests.test_similarity import TwoConvs


@pytest.fixture(scope="module")
def layers() -> list[LayerSimilarity]:
    torch.manual_seed(0)
    net = timm.create_model("resnet10t", num_classes=2)
    return measure_similarity(net, exclude="layer4.*")


def brightness(path: Path) -> float:
    from matplotlib.image import imread

    return float(imread(path)[..., :3][:4, :4].mean())


@pytest.mark.parametrize("plot", [plot_overview, plot_matrices, plot_pairs])
def test_pictures_have_their_own_ground(
    plot: object, layers: list[LayerSimilarity], tmp_path: Path
) -> None:
    for theme, bright in (("light", True), ("dark", False)):
        path = tmp_path / f"{theme}.png"
        plot(layers, theme=theme).savefig(path)  # type: ignore[operator]
        assert (brightness(path) > 0.9) is bright
    with pytest.raises(ValueError, match="theme"):
        plot(layers, theme="sepia")  # type: ignore[operator]
    with pytest.raises(ValueError, match="empty"):
        plot([])  # type: ignore[operator]


def test_drawing_leaves_no_global_trace(layers: list[LayerSimilarity]) -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    plot_pairs(layers)
    assert dict(mpl.rcParams) == before
    code = (
        "import sys, inmerge_wrap.plots as s; "
        "from inmerge_wrap.similarity import measure_similarity; "
        "assert 'matplotlib' not in sys.modules; "
        "import torch; from torch import nn; "
        "s.plot_pairs(measure_similarity(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))));"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_figure_1_names_kernels_and_cosines(layers: list[LayerSimilarity]) -> None:
    figure = plot_pairs(layers, count=2)
    similar, apart = figure.subfigs
    titles = [axes.get_title(loc="left") for half in (similar, apart) for axes in half.axes]
    told = [title for title in titles if title]
    wide = [layer for layer in layers if layer.shape[2:] != (1, 1)]  # 1x1 kernels look like noise
    assert len(wide) < len(layers)
    best = sorted((layer.most_similar[0].cosine for layer in wide), reverse=True)[:2]
    worst = sorted(layer.least_similar[0].cosine for layer in wide)[:2]
    assert [title.split("cos = ")[1] for title in told] == [f"{c:.2f}" for c in best + worst]


def test_a_single_layer_gives_several_pairs(layers: list[LayerSimilarity]) -> None:
    figure = plot_pairs(layers[-1:], count=3)
    told = [axes.get_title(loc="left") for axes in figure.subfigs[0].axes]
    cosines = [float(title.split("cos = ")[1]) for title in told if title]
    assert cosines == sorted(cosines, reverse=True) and len(cosines) == 3


def test_pairs_are_drawn_on_one_scale_after_division_by_their_length() -> None:
    pair = measure_similarity(TwoConvs())[1]
    axes = [a for a in plot_pairs([pair], count=1).subfigs[0].axes if a.images]
    left, right = (torch.as_tensor(a.images[0].get_array().filled(math.nan)) for a in axes)
    assert left.shape == right.shape == (7, 7)  # 4 of 6 channels of 3 x 3, and a line between
    # Kernel 5 is twice kernel 1: the pictures of the pair are equal.
    assert torch.allclose(left, right, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert left.nan_to_num().abs().max() <= 1


def test_pairs_say_what_their_picture_shows(layers: list[LayerSimilarity]) -> None:
    figure = plot_pairs(layers, count=2)
    titles = [axes.get_title(loc="left").splitlines() for axes in figure.subfigs[0].axes]
    told = {lines[0]: lines[1] for lines in titles if lines}
    for name, extent in told.items():
        channels = next(layer.shape[1] for layer in layers if layer.name == name)
        assert extent == (
            "3 channels, as colours" if channels == 3 else f"heaviest 16 of {channels} channels"
        )
    bars = [axes for axes in figure.axes if "largest of the pair" in axes.get_ylabel()]
    assert len(bars) == 2  # one for each row
    narrow = [layer for layer in layers if layer.shape[2:] == (1, 1)]
    titles = [axes.get_title(loc="left") for axes in plot_pairs(narrow).subfigs[0].axes]
    assert any("heaviest" in title or "all" in title for title in titles)


def test_a_matrix_shows_each_kernel_once_and_leaves_out_itself() -> None:
    layer = measure_similarity(TwoConvs())[1]
    shown = torch.as_tensor(plot_matrices([layer], most=2).axes[0].images[0].get_array().data)
    assert shown.isnan().tolist() == [[True, False], [False, True]]
    assert shown[0, 1].item() == pytest.approx(1.0)  # kernels 1 and 5
    everything = torch.as_tensor(plot_matrices([layer]).axes[0].images[0].get_array().data)
    assert everything.shape == (8, 8)
    sums = everything.nan_to_num(1.0).sum(0).sort().values
    torch.testing.assert_close(sums, layer.cosines.sum(0).sort().values)


def test_kernels_of_a_cluster_are_side_by_side() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 4, 3, 3, generator=generator)
    group = torch.arange(12)[torch.randperm(12, generator=generator)] % 3
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 12, 3), nn.Conv2d(12, 2, 3))
    with torch.no_grad():
        noise = torch.randn(12, 4, 3, 3, generator=generator)
        network[1].weight.copy_(centres[group] + 0.3 * noise)
    (layer,) = measure_similarity(network, include="1", example_input=torch.zeros(1, 1, 9, 9))
    panel = plot_matrices([layer]).axes[0]
    shown = torch.as_tensor(panel.images[0].get_array().data)
    blocks = torch.arange(12) // 4
    together = blocks[:, None] == blocks
    assert (shown[together & ~shown.isnan()] > 0.5).all() and (shown[~together] < 0.5).all()
    low, high = panel.images[0].get_clim()
    furthest = layer.cosines.clone().fill_diagonal_(0).abs().max().item()
    assert high == -low == pytest.approx(furthest)  # not 1, which would leave it pale


def test_the_overview_draws_a_line_for_each_threshold(layers: list[LayerSimilarity]) -> None:
    thresholds = [number / 10 for number in range(1, 9)]
    legend = plot_overview(layers, thresholds=thresholds).axes[1].get_legend()
    assert legend is not None and len(legend.get_texts()) == 8


@pytest.mark.parametrize("threshold", [0.1, ZScore(2.0), Quantile(0.25)])
def test_the_overview_marks_merged_layers_and_their_threshold(
    layers: list[LayerSimilarity], threshold: float | ZScore | Quantile
) -> None:
    merged = [layer for layer in layers if layer.name.startswith("layer3")]
    figure = plot_overview(
        layers, merged=[layer.name for layer in merged], similarity_threshold=threshold
    )
    top, _, ranks, _ = figure.axes
    bold = [text.get_text() for text in ranks.get_xticklabels() if text.get_weight() == "bold"]
    assert bold == [layer.name for layer in merged]
    (drawn,) = [lines for lines in top.collections if lines.get_label() == "threshold of merging"]
    for layer, segment in zip(merged, drawn.get_segments(), strict=True):
        middle = layers.index(layer) + 1
        assert segment[:, 0].tolist() == [middle - 0.5, middle + 0.5]
        (bound,) = set(segment[:, 1].tolist())
        if isinstance(threshold, Quantile):
            assert layer.share_above(bound - 1e-6) == pytest.approx(0.25, abs=0.001)
        else:
            z = layer.chance * 2.0
            assert bound == pytest.approx(z if isinstance(threshold, ZScore) else 0.1)
    with pytest.raises(ValueError, match=r"not measured: \['head'\]"):
        plot_overview(layers, merged=["head"])


def test_nothing_to_draw_is_an_error() -> None:
    net = TwoConvs()
    with torch.no_grad():
        net.second.weight.zero_()
    with pytest.raises(ValueError, match="no layer has a pair"):
        plot_pairs(measure_similarity(net, include="second"))


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        ((5,), lambda kernels: kernels[:, :, None, :]),
        ((5, 3, 4), lambda kernels: kernels[:, :, 2]),
        ((5, 1, 1), lambda kernels: kernels.reshape(2, 1, 1, 5)),
        ((1, 3, 4), lambda kernels: kernels[:, :, 0]),
        ((3, 1, 4), lambda kernels: kernels[:, :, :, 0]),
        ((3, 4), lambda kernels: kernels),
    ],
)
def test_a_signal_is_a_strip_and_of_a_volume_the_central_slice_is_drawn(
    size: tuple[int, ...], shown: Any
) -> None:
    kernels = torch.randn(2, 1, *size, generator=torch.Generator().manual_seed(0))
    network = nn.Sequential(layer_of(1, 2, size), nn.ReLU(), layer_of(2, 2, size))
    with torch.no_grad():
        network[0].weight.copy_(kernels)
    (measured,) = measure_similarity(network, include="0")
    figure = plot_pairs([measured], count=1)
    pictures = [image.get_array() for image in figure.findobj(AxesImage)]
    (pair,) = measured.most_similar
    unit = kernels / kernels.flatten(1).norm(dim=1).reshape(2, 1, *[1] * len(size))
    expected = shown(unit[[pair.first, pair.second]])[:, 0]
    for picture, kernel in zip(pictures[:2], expected / expected.abs().max(), strict=True):
        torch.testing.assert_close(torch.tensor(picture.data), kernel)


def test_a_long_signal_is_no_hair_line() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv1d(1, 4, 25), nn.ReLU(), nn.Conv1d(4, 2, 3))
    figure = plot_pairs(measure_similarity(network, include="0"), count=1)
    figure.draw_without_rendering()
    boxes = [image.axes.get_window_extent() for image in figure.findobj(AxesImage)]
    assert len(boxes) == 4
    for box in boxes:
        assert box.height == pytest.approx(box.width / 4, rel=0.05)


def layer_of(inputs: int, outputs: int, size: tuple[int, ...]) -> nn.Module:
    return getattr(nn, f"Conv{len(size)}d")(inputs, outputs, size)
