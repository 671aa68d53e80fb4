"""Model names: what is read from source files, against what the libraries say of themselves."""

from __future__ import annotations

import pytest
import timm
from torch import nn

from inmerge_wrap import plan_merging
from inmerge_wrap.architectures import build, known_models, resolve


def test_the_names_of_timm_are_those_that_timm_lists() -> None:
    assert known_models("timm") == set(timm.list_models())


def test_the_names_of_torchvision_are_those_of_its_image_and_video_families() -> None:
    models = pytest.importorskip("torchvision").models
    families = (models, models.segmentation, models.detection, models.video)
    listed = {name for family in families for name in models.list_models(module=family)}
    assert known_models("torchvision") == listed


def test_a_library_that_is_not_there_has_no_models() -> None:
    assert known_models.__wrapped__("no_such_library_here") == frozenset()


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("resnet18", ("timm", "resnet18")),
        ("torchvision:resnet18", ("torchvision", "resnet18")),
        ("resnet34.tv_in1k", ("timm", "resnet34.tv_in1k")),
        ("googlenet", ("torchvision", "googlenet")),
        ("torchvision:fcn_resnet50", ("torchvision", "fcn_resnet50")),
        ("fasterrcnn_resnet50_fpn", ("torchvision", "fasterrcnn_resnet50_fpn")),
        ("r3d_18", ("torchvision", "r3d_18")),
    ],
)
def test_a_name_is_found_in_its_library(name: str, found: tuple[str, str]) -> None:
    assert resolve(name) == found


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("resnt34", "close names: resnet34"),
        ("torchvision:r3d_19", "close names: r3d_18"),
        ("torchvision:resnet10t", "close names: resnet101"),
        ("keras:resnet18", "NAME, timm:NAME or torchvision:NAME"),
        ("qqqqqqqqqq", "timm.list_models"),
    ],
)
def test_an_unknown_name_is_answered_with_close_ones(name: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        resolve(name)


def test_a_segmentation_network_is_built_without_a_download_and_planned() -> None:
    """Its backbone's ImageNet weights are torchvision's default: offline, that fails."""
    pytest.importorskip("torchvision")
    network = build("torchvision:lraspp_mobilenet_v3_large", num_classes=4)
    assert isinstance(network, nn.Module) and plan_merging(network).merged


def test_channels_are_the_models_own_in_torchvision() -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(ValueError, match="reads 3 channels"):
        build("torchvision:resnet18", in_chans=1)
