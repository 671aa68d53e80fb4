"""inmerge evaluate."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from inmerge_wrap import export_timm
from inmerge_wrap.cli import main
from inmerge_wrap.cli.evaluate import _cell
from inmerge_wrap.images.preparation import Preparation, Recipe
from inmerge_wrap.robustness import RobustnessResult, evaluate_robustness
from tests.cli.common import ARCH, PREPARED, complaint, run, run_json


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
    assert "10 images" in text and "preset dermatoscopy, severity 1; normalised" in text
    assert "mean [0.3, 0.3, 0.3], std [0.2, 0.2, 0.2]" in text
    content = run_json("evaluate", folder, *options)
    arrays = read(data)
    chosen = np.linspace(0, len(arrays["test_images"]) - 1, 10).round().astype(int)
    images = torch.from_numpy(arrays["test_images"][chosen]).float().permute(0, 3, 1, 2) / 255
    small = (
        nn.functional.interpolate(images, (32, 32), mode="bilinear", antialias=True) - 0.3
    ) / 0.2
    with torch.no_grad():
        right = net(small).argmax(1) == torch.from_numpy(arrays["test_labels"][chosen, 0]).long()
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
        (["--eps", 4], "--eps is the size of an attack: give --attack"),
        (["--split", "train"], "MedMNIST layout"),
    ],
)
def test_evaluate_answers_mistakes(
    options: list[Any], told: str, weights: Path, data: Path
) -> None:
    common = ("evaluate", weights, "--arch", ARCH, "--data", data)
    assert told in complaint(*common, *PREPARED, *options)


def test_evaluate_does_not_write_over_what_it_reads(weights: Path, data: Path) -> None:
    for path in (weights, data):
        before = path.read_bytes()
        common = ("evaluate", weights, "--arch", ARCH, "--data", data, *PREPARED)
        assert "is one of the files to read" in complaint(*common, "--output", path)
        assert path.read_bytes() == before


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
    np.savez_compressed(tmp_path / "damaged.npz", **arrays)
    content = bytearray((tmp_path / "damaged.npz").read_bytes())
    content[200:210] = bytes(10)
    (tmp_path / "damaged.npz").write_bytes(content)
    assert "not in the MedMNIST layout" in complaint(*common, tmp_path / "damaged.npz")
    np.savez(tmp_path / "float.npz", **arrays | {"test_images": arrays["test_images"] / 255})
    assert "bytes" in complaint(*common, tmp_path / "float.npz")
    np.savez(tmp_path / "nine.npz", **arrays | {"test_labels": arrays["test_labels"] + 2})
    assert "check num_classes" in complaint(*common, tmp_path / "nine.npz", "--preset", "quick")


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


def test_bare_weights_are_compared_with_a_folder_as_its_images_are_prepared(
    weights: Path, net: nn.Module, folder: Path, tmp_path: Path
) -> None:
    about: dict[str, Any] = {"mean": [0.3] * 3, "std": [0.2] * 3, "crop_pct": 0.9}
    for size in (24, 32):
        export_timm(net, tmp_path / f"{size}", input_size=(3, size, size), **about)
    alone = run_json("evaluate", tmp_path / "24", "--data", folder, *QUICKLY)
    told = f"before={weights} after={tmp_path / '24'} --arch {ARCH} --mean 0.3 --std 0.2".split()
    both = run_json("evaluate", *told, "--data", folder, *QUICKLY)["models"]
    assert both["after"]["rows"][:2] == alone["rows"][:2]
    assert both["before"]["rows"][1]["accuracy"] == alone["rows"][1]["accuracy"]
    other = complaint("evaluate", *told, f"other={tmp_path / '32'}", "--data", folder)
    assert "after and other cannot be compared on the same images: size is (24, 24)" in other
    assert "--size makes them equal" in other
    told = complaint("evaluate", tmp_path / "24", "--arch", "resnet18", "--data", folder)
    assert f"holds a {ARCH}, not resnet18: leave out --arch; if other weights need it" in told


def test_a_single_output_is_that_of_the_folder_of_its_name(tmp_path: Path) -> None:
    net = timm.create_model(ARCH, num_classes=1).eval()
    prepared: dict[str, Any] = {"input_size": (3, 32, 32), "mean": [0.3] * 3, "std": [0.2] * 3}
    export_timm(net, tmp_path / "model", **prepared, label_names=["disease"])
    generator, hits = np.random.default_rng(0), []
    for index in range(12):
        name = ("disease", "healthy")[index % 2]
        path = tmp_path / "photos" / name / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        with torch.no_grad():
            score = net((torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255 - 0.3) / 0.2)
        hits.append((float(score) > 0) == (name == "disease"))
    command = ("evaluate", tmp_path / "model", "--data", tmp_path / "photos")
    content = run_json(*command, *QUICKLY)
    assert content["rows"][0]["accuracy"] == pytest.approx(np.mean(hits))
    (tmp_path / "photos" / "healthy").rename(tmp_path / "photos" / "sick")
    assert run_json(*command, *QUICKLY)["rows"][0]["accuracy"] == pytest.approx(np.mean(hits))
    (tmp_path / "photos" / "disease").rename(tmp_path / "photos" / "ill")
    assert "must hold two folders, disease and one other" in complaint(*command)


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
    recipe = Recipe(
        preparation, mean=(0.3,) * 3, std=(0.2,) * 3, task="multiclass", classes=tuple("abcdefg")
    )
    recipe.write(model)
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
    assert (
        "cannot be compared on the same images: crop_mode is squash and center; evaluate each"
        in told
    )


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
        assert all(f"{entry['difference']:+.3f}" in text for entry in differences)


def test_a_figure_is_shown_with_the_interval_that_it_has() -> None:
    formats = "{:+.3f}", " ({:+.3f}…{:+.3f})"
    row = {"accuracy": 1.0, "difference": 0.1}
    assert _cell(row, "difference", *formats) == "+0.100"
    row |= {"difference_low": -0.02, "difference_high": 0.22}
    assert _cell(row, "difference", *formats) == "+0.100 (-0.020…+0.220)"
    assert _cell(row, "difference", "{:.3f}") == "0.100" and _cell(row, "ece", *formats) == "-"


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
    terminal: bool,
    exported: dict[str, Path],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty() if terminal else os.pipe()
    parts: list[bytes] = []

    def read() -> None:  # meanwhile: a terminal that nobody reads is full after 4 KiB
        with contextlib.suppress(OSError):  # a terminal whose other side is closed
            while part := os.read(ours, 65536):
                parts.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    command = ["inmerge", "evaluate", f"net={exported['plain']}", "--data", str(folder)]
    monkeypatch.setattr(sys, "argv", [*command, *map(str, QUICKLY), "--json"])
    with os.fdopen(theirs, "w") as stderr, contextlib.redirect_stderr(stderr):
        with pytest.raises(SystemExit) as stop:
            main()
    reader.join()
    os.close(ours)
    shown = b"".join(parts)
    assert not stop.value.code, shown
    json.loads(capsys.readouterr().out)
    assert (b"net" in shown) is terminal and (shown != b"") is terminal
