"""inmerge export, and the checkpoints that it reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from inmerge_wrap import InMergeWrapper, export_timm
from inmerge_wrap.checkpoints import read_merging
from tests.cli.common import ARCH, complaint, run, run_json, same_weights


def test_export_takes_what_accelerate_saved(net: nn.Module, tmp_path: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(InMergeWrapper(net))
    accelerator.save_state(str(tmp_path / "epoch_9"))
    names = list(safetensors.torch.load_file(tmp_path / "epoch_9" / "model.safetensors"))
    assert "_extra_state" in names and all(n.startswith(("module.", "_extra")) for n in names)
    output = tmp_path / "plain.safetensors"
    content = run_json("export", tmp_path / "epoch_9", output, "--arch", ARCH)
    assert same_weights(output, net)
    loaded = eval(content["load"], {"timm": timm})
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(image), model.eval()(image))


@pytest.mark.parametrize(
    "form", ["plain", "compiled", "lightning", "container", "averaged", "half"]
)
def test_export_takes_other_forms_of_checkpoints(form: str, net: nn.Module, tmp_path: Path) -> None:
    state = net.state_dict()
    source = tmp_path / "last.pt"
    content: Any = state
    if form == "compiled":
        content = {f"module._orig_mod.{name}": value for name, value in state.items()}
    elif form == "lightning":
        content = {"epoch": 3, "state_dict": {f"net.{n}": v for n, v in state.items()}}
    elif form == "container":
        content = {"model": state, "step": 7}
    elif form == "averaged":
        content = torch.optim.swa_utils.AveragedModel(net).state_dict()
    elif form == "half":
        content = {n: v.half() if v.is_floating_point() else v for n, v in state.items()}
    torch.save(content, source)
    output = tmp_path / "plain.safetensors"
    run("export", source, output, "--arch", ARCH)
    if form == "half":
        found = safetensors.torch.load_file(output)["fc.weight"]
        assert torch.equal(found, state["fc.weight"].half().float())
    else:
        assert same_weights(output, net)


def test_what_an_export_leaves_behind_of_a_training_is_reported(tmp_path: Path) -> None:
    network = timm.create_model("test_resnet", num_classes=2)
    about = {"input_size": (3, 32, 32), "mean": [0.5] * 3, "std": [0.5] * 3}
    export_timm(network, tmp_path / "model", **about)
    assert run("export", tmp_path / "model", tmp_path / "a.safetensors").stderr == ""
    (tmp_path / "model" / "preparation.json").write_text("{}")
    said = run("export", tmp_path / "model", tmp_path / "b.safetensors").stderr
    assert "preparation.json (the range of values, the temperature, the thresholds) is not" in said


def test_outputs_and_channels_are_those_of_the_weights(tmp_path: Path) -> None:
    grey = timm.create_model(ARCH, num_classes=5, in_chans=1)
    safetensors.torch.save_file(grey.state_dict(), tmp_path / "grey.safetensors")
    output = tmp_path / "plain.safetensors"
    text = run("export", tmp_path / "grey.safetensors", output, "--arch", ARCH).stdout
    assert f'create_model("{ARCH}", num_classes=5, in_chans=1, ' in text
    assert same_weights(output, grey)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--arch", ARCH, "--num-classes", 3], "with num_classes=3: pass --num-classes 7"),
        (["--arch", ARCH, "--in-chans", 1], "with in_chans=1: pass --in-chans 3"),
        (["--arch", "resnet18"], "58 of its 122 tensors are in the file"),
        (["--arch", "resnet14t"], "does not fit resnet14t; missing: layer1.0.conv3.weight, "),
        (["--arch", "vgg11"], "these are not the weights of vgg11"),
        ([], "name the network with --arch"),
    ],
)
def test_weights_that_do_not_fit(
    options: list[Any], told: str, weights: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.safetensors"
    assert told in complaint("export", weights, output, *options)
    assert not output.exists()


def test_another_width_is_not_taken_for_another_number_of_classes(tmp_path: Path) -> None:
    wide = timm.create_model("mobilenetv3_small_075", num_classes=7)
    safetensors.torch.save_file(wide.state_dict(), tmp_path / "wide.safetensors")
    options = ("--arch", "mobilenetv3_small_050", "--num-classes", 7)
    told = complaint("export", tmp_path / "wide.safetensors", tmp_path / "o.safetensors", *options)
    assert "does not fit mobilenetv3_small_050; shapes: " in told and "--num-classes" not in told


def test_files_that_are_no_weights(weights: Path, tmp_path: Path) -> None:
    out, arch = tmp_path / "out.safetensors", ("--arch", ARCH)
    missing = complaint("export", weights.with_name("weight.safetensors"), out, *arch)
    assert "no such file" in missing and "weights.safetensors" in missing
    (tmp_path / "text.safetensors").write_text("hello")
    assert "is not a safetensors" in complaint("export", tmp_path / "text.safetensors", out, *arch)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "optimizer.bin").touch()
    told = complaint("export", tmp_path / "folder", out, *arch)
    assert "no model.safetensors (it holds optimizer.bin)" in told
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    assert "holds no weights" in complaint("export", tmp_path / "empty.pt", out, *arch)


def test_two_networks_in_one_checkpoint_are_not_guessed_at(net: nn.Module, tmp_path: Path) -> None:
    state = net.state_dict()
    both = {f"{who}.{name}": v for who in ("student", "teacher") for name, v in state.items()}
    torch.save(both, tmp_path / "both.pt")
    told = complaint("export", tmp_path / "both.pt", tmp_path / "o.safetensors", "--arch", ARCH)
    assert "2 times, under student., teacher." in told


def test_export_writes_a_timm_folder_with_its_card(
    net: nn.Module, weights: Path, tmp_path: Path
) -> None:
    card = {
        "title": "Seven classes",
        "license": "cc-by-4.0",
        "training_data": "Random numbers.",
        "results": [{"metric": "accuracy", "value": 0.5, "dataset": "Noise"}],
    }
    (tmp_path / "card.json").write_text(json.dumps(card))
    content = run_json(
        "export", weights, tmp_path / "out", "--arch", ARCH, "--input-size", 3, 64, 48,
        "--mean", 0.4, "--std", 0.2, "--label-names", "a, b,c,d,e,f,g",
        "--card", tmp_path / "card.json",
    )  # fmt: skip
    loaded = eval(content["load"], {"timm": timm}).eval()
    image = torch.rand(1, 3, 64, 48)
    with torch.no_grad():
        assert torch.equal(loaded(image), net(image))
    assert loaded.pretrained_cfg["label_names"] == [*"abcdefg"]
    config = timm.data.resolve_model_data_config(loaded)
    assert config["input_size"] == (3, 64, 48)
    assert list(config["mean"]) == [0.4] * 3 and list(config["std"]) == [0.2] * 3
    assert "# Seven classes" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("arch", [ARCH, "torchvision:squeezenet1_1"])
def test_the_printed_line_names_what_the_network_was_made_with(arch: str, tmp_path: Path) -> None:
    """SqueezeNet ends in a convolution: no linear layer tells how many classes it has."""
    torchvision = pytest.importorskip("torchvision")
    if arch == ARCH:
        net = timm.create_model(arch, num_classes=7, in_chans=1)
    else:
        net = torchvision.models.squeezenet1_1(weights=None, num_classes=7)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    path = tmp_path / "plain.safetensors"
    line = run_json("export", tmp_path / "net.pth", path, "--arch", arch)["load"]
    found: dict[str, Any] = {"torchvision": torchvision, "timm": timm, "safetensors": safetensors}
    exec(line if line.startswith("model = ") else f"model = {line}", found)
    state = net.state_dict()
    assert all(torch.equal(value, state[n]) for n, value in found["model"].state_dict().items())


def test_export_from_torchvision_tells_how_to_load(tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    net = torchvision.models.resnet18(weights=None, num_classes=4)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    path = tmp_path / "plain.safetensors"
    content = run_json("export", tmp_path / "net.pth", path, "--arch", "torchvision:resnet18")
    found: dict[str, Any] = {"torchvision": torchvision, "safetensors": safetensors}
    exec(content["load"], found)
    assert torch.equal(found["model"].fc.weight, net.fc.weight)
    told = complaint(
        "export", tmp_path / "net.pth", tmp_path / "folder", "--arch", "torchvision:resnet18",
        "--input-size", 3, 32, 32, "--mean", 0.5, "--std", 0.5,
    )  # fmt: skip
    assert "not a timm model" in told


@pytest.mark.parametrize(
    ("output", "options", "told"),
    [
        ("folder", [], "give --input-size, --mean and --std"),
        (
            "folder",
            ["--input-size", 3, 28, 28, "--mean", 127, "--std", 50],
            "--mean is 127, but pixels in [0, 1] need [0, 1]: for grey levels up to 255, pass "
            "0.498",
        ),
        (
            "folder",
            ["--input-size", 3, 28, 28, "--mean", 0.5, "--std", 0],
            "--std is 0, but pixels in [0, 1] need (0, 1]",
        ),
        ("folder", ["--input-size", 3, 0, 28], "--input-size is 3 0 28: channels, height"),
        (
            "file.safetensors",
            ["--label-names", "a,b"],
            "file.safetensors is one file, and --label-names can",
        ),
        (
            "file.safetensors",
            ["--mean", 0.5, "--std", 0.5],
            "--mean, --std can be written to a folder",
        ),
        (
            "folder",
            ["--input-size", 3, 8, 8, "--mean", 0, "--std", 1, "--card", "no.json"],
            "no.json cannot be read",
        ),
    ],
)
def test_export_answers_mistakes(
    output: str, options: list[Any], told: str, weights: Path, tmp_path: Path
) -> None:
    assert told in complaint("export", weights, tmp_path / output, "--arch", ARCH, *options)
    assert not (tmp_path / output).exists()


def test_the_card_of_a_checkpoint_counts_images_where_training_did(tmp_path: Path) -> None:
    net = timm.create_model("test_resnet", num_classes=3)
    model = InMergeWrapper.recommended(net, total_steps=100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.attach(optimizer)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "net.pt")
    report = read_merging(tmp_path / "net.pt")
    assert report is not None and report.unit == "images x channels"
    assert (report.drawn, report.merged) == (model.report().drawn, model.report().merged)


@pytest.mark.parametrize(
    "threshold,told",
    [(-1.0, "trained with in-model merging"), (1.0, "had no effect"), (None, None)],
    ids=["merged", "never fired", "plain"],
)
def test_the_card_says_what_the_checkpoint_knows_of_merging(
    tmp_path: Path, threshold: float | None, told: str | None
) -> None:
    net = timm.create_model("test_resnet", num_classes=3)
    model = net if threshold is None else InMergeWrapper(net, similarity_threshold=threshold)
    if isinstance(model, InMergeWrapper):
        model.merge_()
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "net.pt")
    (tmp_path / "card.json").write_text(
        json.dumps({"title": "Skin", "license": "mit", "training_data": "Ten images."})
    )
    run(
        "export", tmp_path / "net.pt", tmp_path / "net", "--arch", "test_resnet",
        "--input-size", 3, 32, 32, "--mean", 0.5, "--std", 0.5, "--card", tmp_path / "card.json",
    )  # fmt: skip
    card = (tmp_path / "net" / "README.md").read_text()
    assert ("- in-model-merging" in card) == (threshold == -1.0)
    assert (told or "Ten images.") in card
    if isinstance(model, InMergeWrapper):
        report = model.report()
        assert f"| merged pairs | {report.merged:,} of {report.drawn:,} drawn" in card
        assert "| optimizer steps | 1 |" in card
    else:
        assert "erging" not in card
