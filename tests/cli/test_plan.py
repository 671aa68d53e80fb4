"""inmerge plan."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
from torch import nn

from inmerge_wrap import InMergeWrapper, plan_merging
from tests.cli.common import ARCH, complaint, run, run_json


def test_plan_is_the_librarys_plan(net: nn.Module) -> None:
    content = run_json("plan", ARCH, "--shallow-layers", "5", "--exclude", "*downsample*")
    expected = plan_merging(net, shallow_layers=5, exclude="*downsample*")
    assert [site["name"] for site in content["merged"]] == [site.name for site in expected.merged]
    assert {site["name"]: site["reason"] for site in content["skipped"]} == {
        site.name: site.reason for site in expected.skipped
    }
    assert content["merged"][0]["fan_in"] == expected.merged[0].fan_in


def test_plan_prints_a_row_for_each_convolution_and_explains_what_is_skipped() -> None:
    text = run("plan", "timm:efficientnet_b0").stdout
    sites = run_json("plan", "timm:efficientnet_b0")
    rows = {line.split()[1]: line for line in text.splitlines() if line[:6].strip().isdigit()}
    for site in sites["merged"]:
        assert rows[site["name"]].rstrip().endswith("merged")
    for site in sites["skipped"]:
        assert not rows[site["name"]].rstrip().endswith("merged")
    assert len(rows) == len(sites["merged"]) + len(sites["skipped"]) == 81
    assert "depthwise: every kernel reads a different channel" in text
    assert f"{len(sites['merged'])} of 81 convolutions are merged" in text


def test_plan_takes_kinds_patterns_shares_and_image_sizes() -> None:
    plain = run_json("plan", "mobilenetv3_small_050")
    more = run_json("plan", "mobilenetv3_small_050", "--also-merge", "depthwise")
    assert len(more["merged"]) > len(plain["merged"])
    half = run_json("plan", ARCH, "--shallow-layers", "0.5")
    assert len(half["merged"]) == len(run_json("plan", ARCH)["merged"]) + 2
    named = run_json("plan", ARCH, "--include", "layer1.0.conv1", "--include", "layer4.*conv2")
    assert [site["name"] for site in named["merged"]] == ["layer1.0.conv1", "layer4.0.conv2"]
    grey = run_json("plan", ARCH, "--input-size", 1, 28, 28)
    assert grey["skipped"][0]["shape"][1] == 1


def test_the_recommended_plan_is_that_of_the_recommended_wrapper(net: nn.Module) -> None:
    content = run_json("plan", ARCH, "--recommended")
    expected = InMergeWrapper.recommended(copy.deepcopy(net), total_steps=10).plan
    assert [site["name"] for site in content["merged"]] == [site.name for site in expected.merged]
    assert content["mode"] == "outputs" and run_json("plan", ARCH)["mode"] == "step"
    assert len(content["merged"]) > len(run_json("plan", ARCH)["merged"])
    text = " ".join(run("plan", ARCH, "--recommended").stdout.split())
    assert "in each forward pass of the training" in text
    fewer = run_json("plan", ARCH, "--recommended", "--shallow-layers", 5)
    assert len(fewer["merged"]) == len(content["merged"]) - 5


def test_plan_knows_torchvision() -> None:
    pytest.importorskip("torchvision")
    timm_net, vision_net = run_json("plan", "resnet18"), run_json("plan", "torchvision:resnet18")
    assert [s["name"] for s in vision_net["merged"]] == [s["name"] for s in timm_net["merged"]]
    assert run_json("plan", "squeezenet1_1")["merged"], "a name that only torchvision has"
    assert "3 channels" in complaint("plan", "torchvision:resnet18", "--input-size", 1, 28, 28)


def test_a_network_without_kernels_is_answered_in_options_not_in_python() -> None:
    told = complaint("plan", "vit_tiny_patch16_224")
    assert "the patch embedding, which the option --include merges anyway" in told
    assert not re.search(r"\w+=|[\[(]\.\.\.", told)


def test_a_segmentation_network_is_planned() -> None:
    pytest.importorskip("torchvision")
    content = run_json("plan", "torchvision:fcn_resnet50")
    assert len(content["merged"]) > 10
    assert {site["reason_kind"] for site in content["skipped"]} >= {"shallow", "head"}


@pytest.mark.parametrize("width", [40, 50])
def test_narrow_tables_keep_the_answer(
    width: int, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    lines = run("plan", "mobilenetv3_small_050").stdout.splitlines()
    assert max(map(len, lines)) <= width
    plan = run_json("plan", "mobilenetv3_small_050")
    for site in plan["merged"]:
        row = next(line for line in lines if site["name"] in line.split())
        assert row.rstrip().endswith("merged")
    assert sum(line.rstrip().endswith("depthwise") for line in lines) == 11
    assert any("Too narrow for" in line and "chance" in line for line in lines)
    options = ("--arch", ARCH, "--output", tmp_path, "--no-pictures")
    lines = run("similarity", weights, *options).stdout.splitlines()
    assert max(len(line) for line in lines if line.startswith(" layer")) <= width
    for layer in run_json("similarity", weights, *options)["layers"]:
        row = next(line.split() for line in lines if line.split()[:1] == [layer["name"]])
        assert row[-1] == f"{layer['effective_rank']:.3f}"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["resnet10x"], "close names: resnet10t"),
        (["jax:resnet18"], "timm:NAME or torchvision:NAME"),
        ([ARCH, "--shallow-layers", "many"], "a count such as 10 or a share such as 0.625"),
        ([ARCH, "--shallow-layers", "99"], "nothing to merge"),
        ([ARCH, "--include", "layer9*"], "matches none"),
        ([ARCH, "--also-merge", "everything"], "--also-merge must be among"),
        (["vit_tiny_patch16_224"], "choose a convolutional network"),
        ([ARCH, "--input-size", "3", "-1", "4"], "--input-size is 3 -1 4: channels, height"),
        ([ARCH, "--exclude", "layer9*"], "--exclude 'layer9*' matches none"),
    ],
)
def test_plan_answers_mistakes(arguments: list[str], told: str) -> None:
    assert told in complaint("plan", *arguments)
