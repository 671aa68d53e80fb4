"""The inmerge command: what it prints, what it writes, and what it says to mistakes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from inmerge_wrap import InMergeWrapper, __version__, export_timm, plan_merging
from inmerge_wrap.cli import _in_options, app
from inmerge_wrap.images.preparation import Preparation
from inmerge_wrap.robustness import RobustnessResult, evaluate_robustness
from inmerge_wrap.similarity import measure_similarity

ARCH = "resnet10t"


def run(*arguments: Any, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(part) for part in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def run_json(*arguments: Any) -> Any:
    return json.loads(run(*arguments, "--json").stdout)


def complaint(*arguments: Any) -> str:
    """What stderr says, without line breaks of the terminal; nothing may be on stdout."""
    result = run(*arguments, code=1)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    return " ".join(result.stderr.split())


@pytest.fixture(scope="module")
def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model(ARCH, num_classes=7).eval()


@pytest.fixture(scope="module")
def weights(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    safetensors.torch.save_file(net.state_dict(), path)
    return path


def same_weights(path: Path, net: nn.Module) -> bool:
    stored = safetensors.torch.load_file(path)
    expected = net.state_dict()
    return stored.keys() == expected.keys() and all(
        torch.equal(stored[name], expected[name]) for name in expected
    )


# -- the command itself --------------------------------------------------------------------------


def test_the_command_runs_as_a_program_and_tells_mistakes_without_a_traceback() -> None:
    command = [sys.executable, "-m", "inmerge_wrap.cli", "plan", "resnt34"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.returncode == 1
    assert found.stdout == "" and "Traceback" not in found.stderr
    assert "close names: " in found.stderr and "resnet34" in found.stderr


def test_help_has_examples_for_every_command() -> None:
    assert __version__ in run("--version").stdout
    overview = run("--help").stdout
    for command in ("plan", "similarity", "export", "evaluate"):
        assert command in overview
        text = run(command, "--help").stdout
        assert "Examples" in text and f"inmerge {command} " in text
        assert "--json" in text


def test_shell_completion_offers_models() -> None:
    assert "--install-completion" in run("--help").stdout
    result = CliRunner().invoke(
        app,
        [],
        env={
            "_INMERGE_COMPLETE": "complete_bash",
            "COMP_WORDS": "inmerge plan resnet10",
            "COMP_CWORD": "2",
        },
        prog_name="inmerge",
    )
    assert "resnet10t" in result.stdout.split()


def test_usage_errors_have_their_own_exit_code() -> None:
    assert "no-such" in run("plan", ARCH, "--no-such", code=2).stderr
    run("nothing", code=2)


SLOW = {"torch", "timm", "torchvision", "numpy", "kornia", "matplotlib", "PIL"}


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("--help", 0),
        ("plan -h", 0),
        ("evaluate --help", 0),
        ("--version", 0),
        ("nothing", 2),
        ("plan resnet10t --no-such", 2),
        ("export only_one", 2),
        ("plan resnt34", 1),
        ("plan resnet10t --shallow-layers many", 1),
        ("plan resnet10t --input-size 3 -1 4", 1),
        ("export no_such_file out --arch resnet10t", 1),
        ("export README.md out --arch resnt34", 1),
        ("evaluate README.md --data no_such_folder", 1),
        ("evaluate README.md --data README.md --mean 127 --std 50", 1),
    ],
)
def test_help_and_mistakes_do_not_wait_for_slow_imports(line: str, code: int) -> None:
    """They took 3 to 6 seconds; how long they take now depends on what is imported alone."""
    script = (
        "import sys\n"
        "from inmerge_wrap.cli import main\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    print('imported:', *sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", script, *line.split()],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        timeout=120,
    )
    assert found.returncode == code, found.stderr
    imported = found.stdout.splitlines()[-1]
    assert imported.startswith("imported: ")
    assert SLOW & {name.split(".")[0] for name in imported.split()} == set()


def test_completion_does_not_wait_for_slow_imports() -> None:
    script = (
        "import sys\n"
        "from inmerge_wrap.cli import _complete_model\n"
        "print(*_complete_model('resnet10'), *_complete_model('fcn_'))\n"
        "print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    offered, imported = done.stdout.splitlines()
    assert {"resnet10t", "fcn_resnet50"} <= set(offered.split())
    assert SLOW & {name.split(".")[0] for name in imported.split()} == set()


# -- plan ----------------------------------------------------------------------------------------


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


def test_plan_knows_torchvision() -> None:
    pytest.importorskip("torchvision")
    timm_net, vision_net = run_json("plan", "resnet18"), run_json("plan", "torchvision:resnet18")
    assert [s["name"] for s in vision_net["merged"]] == [s["name"] for s in timm_net["merged"]]
    assert run_json("plan", "squeezenet1_1")["merged"], "a name that only torchvision has"
    assert "3 channels" in complaint("plan", "torchvision:resnet18", "--input-size", 1, 28, 28)


def test_a_network_without_kernels_is_answered_in_options_not_in_python() -> None:
    told = complaint("plan", "vit_tiny_patch16_224")
    assert "the patch embedding, which --include merges anyway" in told
    assert not re.search(r"\w+=|[\[(]\.\.\.", told)
    frozen = "nothing to merge; pass also_merge=('frozen',) or shallow_layers=0 to merge it all"
    expected = "nothing to merge; pass --also-merge frozen or --shallow-layers 0 to merge it all"
    assert _in_options(frozen) == expected


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


# -- reading checkpoints -------------------------------------------------------------------------


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


def shard(net: nn.Module, folder: Path) -> Path:
    names = list(net.state_dict())
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in parts.items():
        safetensors.torch.save_file({n: net.state_dict()[n] for n in own}, folder / file)
    index = {"weight_map": {name: file for file, own in parts.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(
    "form", ["plain", "compiled", "lightning", "container", "averaged", "shards", "half"]
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
    if form == "shards":
        source = shard(net, tmp_path)
    else:
        torch.save(content, source)
    output = tmp_path / "plain.safetensors"
    run("export", source, output, "--arch", ARCH)
    if form == "half":
        found = safetensors.torch.load_file(output)["fc.weight"]
        assert torch.equal(found, state["fc.weight"].half().float())
    else:
        assert same_weights(output, net)


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
    assert "no state dict" in complaint("export", tmp_path / "empty.pt", out, *arch)


def test_a_pickle_is_not_run(tmp_path: Path) -> None:
    torch.save(timm.create_model(ARCH, num_classes=2), tmp_path / "whole_model.pt")
    told = complaint(
        "export", tmp_path / "whole_model.pt", tmp_path / "o.safetensors", "--arch", ARCH
    )
    assert "torch.save(model.state_dict(), path)" in told


def test_two_networks_in_one_checkpoint_are_not_guessed_at(net: nn.Module, tmp_path: Path) -> None:
    state = net.state_dict()
    both = {f"{who}.{name}": v for who in ("student", "teacher") for name, v in state.items()}
    torch.save(both, tmp_path / "both.pt")
    told = complaint("export", tmp_path / "both.pt", tmp_path / "o.safetensors", "--arch", ARCH)
    assert "2 times, under student., teacher." in told


# -- export --------------------------------------------------------------------------------------


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
        "--mean", 0.4, "--std", 0.2, "--label-names", "a,b,c,d,e,f,g",
        "--card", tmp_path / "card.json",
    )  # fmt: skip
    loaded = eval(content["load"], {"timm": timm}).eval()
    image = torch.rand(1, 3, 64, 48)
    with torch.no_grad():
        assert torch.equal(loaded(image), net(image))
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
        ("file.safetensors", ["--label-names", "a,b"], "need a folder"),
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


# -- similarity ----------------------------------------------------------------------------------


def test_similarity_writes_numbers_and_pictures(
    net: nn.Module, weights: Path, tmp_path: Path
) -> None:
    options = ["--arch", ARCH, "--include", "layer3.*", "--output", tmp_path / "out"]
    content = run_json("similarity", weights, *options)
    expected = measure_similarity(net, include="layer3.*")
    assert content["layers"] == [layer.to_dict() for layer in expected]
    stored = json.loads((tmp_path / "out" / "similarity.json").read_text())
    assert stored["layers"] == content["layers"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "matrices.png",
        "overview.png",
        "pairs.png",
        "similarity.json",
    ]
    for path in (tmp_path / "out").glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    assert sorted(content["files"]) == sorted(map(str, (tmp_path / "out").iterdir()))


def test_similarity_of_a_timm_folder_prints_a_table(net: nn.Module, tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    export_timm(net, folder, input_size=(3, 64, 64), mean=[0.5] * 3, std=[0.5] * 3)
    out = tmp_path / "out"
    text = run("similarity", folder, "--no-pictures", "--output", out).stdout
    for layer in measure_similarity(net):
        row = next(line for line in text.splitlines() if line.split()[:1] == [layer.name])
        assert row.split()[-1] == f"{layer.effective_rank:.3f}"
    assert [path.name for path in out.iterdir()] == ["similarity.json"]
    told = complaint("similarity", folder, "--arch", ARCH)
    assert "leave out --arch" in told


# -- evaluate ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "dermamnist.npz"
    np.savez(
        path,
        test_images=generator.integers(0, 256, (24, 28, 28, 3), dtype=np.uint8),
        test_labels=(np.arange(24) % 7).astype(np.uint8)[:, None],
        val_images=generator.integers(0, 256, (8, 28, 28), dtype=np.uint8),
        val_labels=generator.integers(0, 2, (8, 7), dtype=np.uint8),
    )
    return path


PREPARED = ("--mean", 0.5, "--std", 0.5)


def read(data: Path) -> dict[str, np.ndarray]:
    with np.load(data) as content:
        return dict(content)


def test_evaluate_is_the_librarys_evaluation(
    net: nn.Module, weights: Path, data: Path, tmp_path: Path
) -> None:
    content = run_json(
        "evaluate", weights, "--arch", ARCH, "--data", data, "--preset", "quick", "--severity", 3,
        "--mean", 0.4, "--std", 0.3, "--bootstrap", 20, "--batch-size", 7,
        "--output", tmp_path / "rows.json",
    )  # fmt: skip
    arrays = read(data)
    images = torch.from_numpy(arrays["test_images"]).float().permute(0, 3, 1, 2) / 255
    labels = torch.from_numpy(arrays["test_labels"]).long().squeeze(1)
    expected = evaluate_robustness(
        net, [(images, labels)], preset="quick", mean=0.4, std=0.3, severities=[3], bootstrap=20
    )
    assert len(content["rows"]) == len(expected.rows)
    for mine, theirs in zip(content["rows"], expected.rows, strict=True):
        assert mine.keys() == theirs.keys()
        # The size of a batch may move the last digits of a logit.
        assert mine["accuracy"] == theirs["accuracy"]
        assert mine["brier"] == pytest.approx(theirs["brier"], rel=1e-5)
    assert content["settings"]["mean"] == [0.4]
    assert RobustnessResult.from_json(tmp_path / "rows.json").rows == content["rows"]


def test_evaluate_takes_settings_from_the_file_name_and_the_folder(
    net: nn.Module, data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "exported"
    export_timm(net, folder, input_size=(3, 32, 32), mean=[0.3] * 3, std=[0.2] * 3)
    options = ["--data", data, "--severity", 1, "--bootstrap", 0, "--limit", 10]
    text = " ".join(run("evaluate", folder, *options).stdout.split())
    assert "10 images" in text and "preset dermatoscopy" in text
    assert "mean [0.3, 0.3, 0.3], std [0.2, 0.2, 0.2]" in text
    content = run_json("evaluate", folder, *options)
    arrays = read(data)
    images = torch.from_numpy(arrays["test_images"][:10]).float().permute(0, 3, 1, 2) / 255
    small = (
        nn.functional.interpolate(images, (32, 32), mode="bilinear", antialias=True) - 0.3
    ) / 0.2
    with torch.no_grad():
        right = net(small).argmax(1) == torch.from_numpy(arrays["test_labels"][:10, 0]).long()
    assert content["rows"][0]["accuracy"] == pytest.approx(right.double().mean().item())


def test_evaluate_takes_grey_images_and_several_labels(weights: Path, data: Path) -> None:
    content = run_json(
        "evaluate", weights, "--arch", ARCH, "--data", data, "--split", "val", "--preset", "oct",
        "--severity", 5, "--bootstrap", 0, *PREPARED,
    )  # fmt: skip
    assert content["settings"]["task"] == "multilabel"
    assert content["settings"]["n"] == 8


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--preset", "dermatology"], "did you mean dermatoscopy"),
        (["--severity", 6], "choose some of 1, 2, 3, 4, 5"),
        (["--attack", "deepfool"], "choose fgsm or pgd"),
        (["--split", "train"], "MedMNIST layout"),
    ],
)
def test_evaluate_answers_mistakes(
    options: list[Any], told: str, weights: Path, data: Path
) -> None:
    common = ("evaluate", weights, "--arch", ARCH, "--data", data)
    assert told in complaint(*common, *PREPARED, *options)


def test_evaluate_does_not_guess_how_images_were_prepared(weights: Path, data: Path) -> None:
    told = complaint("evaluate", weights, "--arch", ARCH, "--data", data, "--mean", 0.5)
    assert "give --mean and --std of the training" in told


def test_evaluate_refuses_other_layouts_and_labels_beyond_the_outputs(
    weights: Path, data: Path, tmp_path: Path
) -> None:
    common = ("evaluate", weights, "--arch", ARCH, *PREPARED, "--data")
    assert "no such file" in complaint(*common, tmp_path / "no.npz")
    cut = tmp_path / "cut.npz"
    cut.write_bytes(data.read_bytes()[:1000])
    np.save(tmp_path / "array.npy", np.zeros(3))
    for broken in (cut, tmp_path / "array.npy"):
        assert "is not in the MedMNIST layout" in complaint(*common, broken)
    arrays = read(data)
    np.savez(tmp_path / "float.npz", **arrays | {"test_images": arrays["test_images"] / 255})
    assert "bytes" in complaint(*common, tmp_path / "float.npz")
    np.savez(tmp_path / "nine.npz", **arrays | {"test_labels": arrays["test_labels"] + 2})
    assert "check num_classes" in complaint(*common, tmp_path / "nine.npz", "--preset", "quick")


# -- several models, folders of images, progress -------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures of 24 files in the folders of 7 classes, whose names are not in order."""
    root = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for index in range(24):
        place = root / "test" / "gfedcba"[index % 7]
        place.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{index:02}.png")
    return root


@pytest.fixture(scope="module")
def exported(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    other = timm.create_model(ARCH, num_classes=7)
    with torch.no_grad():
        for parameter, start in zip(other.parameters(), net.parameters(), strict=True):
            parameter.copy_(start * 0.5)
        other.get_classifier().bias.normal_(generator=torch.Generator().manual_seed(0))
    for name, model in (("plain", net), ("merged", other)):
        export_timm(
            model,
            root / name,
            input_size=(3, 32, 32),
            mean=[0.3] * 3,
            std=[0.2] * 3,
            label_names=list("gfedcba"),
        )
    return {name: root / name for name in ("plain", "merged")}


QUICKLY = ("--severity", 3, "--bootstrap", 50, "--preset", "quick")


def test_evaluate_reads_folders_in_the_order_of_the_models_classes(
    net: nn.Module, exported: dict[str, Path], folder: Path
) -> None:
    content = run_json("evaluate", exported["plain"], "--data", folder, *QUICKLY)
    right = []
    for path in sorted((folder / "test").glob("*/*.png")):
        pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None] / 255
        with torch.no_grad():
            answer = net((pixels - 0.3) / 0.2).argmax().item()
        right.append("gfedcba"[int(answer)] == path.parent.name)
    assert content["settings"]["n"] == 24
    assert content["rows"][0]["accuracy"] == pytest.approx(np.mean(right))


def test_evaluate_reads_images_as_the_model_was_trained_on_them(
    net: nn.Module, tmp_path: Path
) -> None:
    """The squashed 12-bit images of a run of recipes/own_images.py, and its preparation.json."""
    model = tmp_path / "model"
    prepared: dict[str, Any] = {"input_size": (3, 32, 32), "mean": [0.3] * 3, "std": [0.2] * 3}
    export_timm(net, model, **prepared, crop_mode="squash", label_names=list("abcdefg"))
    generator = np.random.default_rng(0)
    preparation = Preparation(size=32, channels=3, pixel_range=(0.0, 4095.0))
    pictures, labels = [], []
    for index in range(28):
        path = tmp_path / "photos" / "test" / "abcdefg"[index // 4] / f"{index:02}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 4096, (32, 64)).astype(np.uint16)).save(path)
        pictures.append(preparation(path) / 255)
        labels.append(index // 4)
    (model / "preparation.json").write_text(json.dumps(preparation.to_dict()))
    content = run_json("evaluate", model, "--data", tmp_path / "photos", *QUICKLY)
    batch = (torch.stack(pictures), torch.tensor(labels))
    expected = evaluate_robustness(
        net, [batch], preset=["contrast_up"], mean=0.3, std=0.2, bootstrap=0
    )
    for metric in ("accuracy", "brier", "auroc"):
        assert content["rows"][0][metric] == pytest.approx(expected.rows[0][metric], abs=1e-6)
    other = tmp_path / "other"
    export_timm(net, other, **prepared, crop_mode="center", label_names=list("abcdefg"))
    told = complaint("evaluate", model, other, "--data", tmp_path / "photos")
    assert "cannot be compared on the same images: crop_mode is squash and center" in told


def test_evaluate_compares_models_in_pairs(
    exported: dict[str, Path], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [f"{name}={path}" for name, path in exported.items()]
    options = ("--data", folder, *QUICKLY, "--output", tmp_path / "compared.json")
    content = run_json("evaluate", *models, *options)
    assert json.loads((tmp_path / "compared.json").read_text()) == content
    for name, path in exported.items():
        alone = run_json("evaluate", path, "--data", folder, *QUICKLY)["rows"]
        assert [row["balanced_error"] for row in content["models"][name]["rows"]] == [
            row["balanced_error"] for row in alone
        ]
    plain, merged = (content["models"][name]["rows"] for name in ("plain", "merged"))
    assert content["minus"] == "plain"
    (differences,) = content["differences"].values()
    assert [entry["difference"] for entry in differences] == pytest.approx(
        [a["balanced_error"] - b["balanced_error"] for a, b in zip(merged, plain, strict=True)]
    )
    for width in (40, 50, 80):
        monkeypatch.setenv("COLUMNS", str(width))
        text = run("evaluate", *models, *options).stdout
        assert max(map(len, text.splitlines())) <= width
        last = differences[-1]
        assert f"{last['difference']:+.3f}" in text and f"{last['difference_low']:+.3f}" in text


def test_evaluate_tells_what_cannot_be_compared(
    net: nn.Module, exported: dict[str, Path], folder: Path, weights: Path, tmp_path: Path
) -> None:
    larger = tmp_path / "larger"
    export_timm(net, larger, input_size=(3, 48, 48), mean=[0.3] * 3, std=[0.2] * 3)
    plain, data = f"plain={exported['plain']}", ("--data", folder)
    told = complaint("evaluate", plain, f"larger={larger}", *data)
    assert "size is (32, 32) and (48, 48); --size makes them equal" in told
    assert "two models are called 'plain'" in complaint("evaluate", plain, plain, *data)
    told = complaint("evaluate", weights, "--arch", ARCH, *PREPARED, *data)
    assert "pass --size, the side in training" in told
    (tmp_path / "two" / "yes").mkdir(parents=True)
    for name in ("no", "yes"):
        (tmp_path / "two" / name).mkdir(exist_ok=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "two" / name / "0.png")
    options = ("--arch", ARCH, *PREPARED, "--size", 32, "--data", tmp_path / "two")
    assert "has the classes no, yes, and" in complaint("evaluate", weights, *options)


def test_a_network_that_is_no_classifier_is_not_evaluated(tmp_path: Path, data: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    net = torchvision.models.get_model("lraspp_mobilenet_v3_large", weights_backbone=None)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    arch = ("--arch", "torchvision:lraspp_mobilenet_v3_large")
    told = complaint("evaluate", tmp_path / "net.pth", *arch, "--data", data, *PREPARED)
    assert "choose a classifier" in told


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_on_a_terminal_alone(
    terminal: bool, exported: dict[str, Path], folder: Path
) -> None:
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty() if terminal else os.pipe()
    command = [sys.executable, "-m", "inmerge_wrap.cli", "evaluate", f"net={exported['plain']}"]
    command += ["--data", str(folder), *map(str, QUICKLY), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, text=True, timeout=300)
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # a terminal whose other side is closed
            break
        if not part:
            break
        shown += part
    os.close(ours)
    assert done.returncode == 0, shown
    json.loads(done.stdout)
    assert (b"net" in shown) is terminal and (shown != b"") is terminal


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
