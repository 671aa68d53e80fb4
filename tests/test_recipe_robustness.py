"""The recipe, run as a user runs it, at a tiny setting."""

import importlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

for package in ("accelerate", "kornia", "matplotlib", "rich", "sklearn"):
    pytest.importorskip(package)
medmnist = pytest.importorskip("medmnist")

ROOT = Path(__file__).parents[1]
TINY = ["--preset", "gaussian_noise", "bars", "--severities", "1", "5", "--bootstrap", "20"]


def run_here(monkeypatch, capsys, *arguments) -> tuple[object, str]:
    """The script in this process, which saves its imports: exit code or message, and the output."""
    monkeypatch.syspath_prepend(ROOT / "recipes")
    monkeypatch.setattr(sys, "argv", ["recipes/robustness.py", *map(str, arguments)])
    code: object = 0
    try:
        runpy.run_path(str(ROOT / "recipes" / "robustness.py"), run_name="__main__")
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr().out


def run(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "robustness.py"), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=300,
    )


TEST_RESNET = ["--arch", "test_resnet"]


def save_model(path: Path, seed: int, **settings) -> Path:
    torch.manual_seed(seed)
    model = timm.create_model("test_resnet", **settings)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    return path


def test_digits_two_methods_two_seeds(tmp_path):
    models = [
        f"{label}={save_model(tmp_path / f'{label}{seed}.safetensors', seed, **settings)}"
        for seed, settings in enumerate([{"num_classes": 10, "in_chans": 1}] * 2)
        for label in ("plain", "merged")
    ]
    out = tmp_path / "out"
    done = run(
        *models, "--data", "digits", "--size", "32", "--limit", "40", "--arch", "test_resnet",
        "--mean", "0.3", "--std", "0.4", *TINY, "--output", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Overview, 40 images" in done.stdout and "paired over seeds" in done.stdout
    content = json.loads((out / "robustness.json").read_text())
    made_by = content["environment"]
    assert content["seed"] == 0 and "recipes/robustness.py" in made_by["command"]
    assert set(made_by["versions"]) >= {"python", "torch", "kornia"}
    assert {label: len(runs) for label, runs in content["models"].items()} == {
        "plain": 2,
        "merged": 2,
    }
    # The same weights stand under both labels: same rows, and a BE of one.
    plain, merged = (content["models"][label][1]["rows"] for label in ("plain", "merged"))
    assert [row["corruption"] for row in plain] == ["clean"] + 3 * ["gaussian_noise"] + 3 * [
        "bars"
    ] + ["all"]
    assert merged[-1]["balanced_error"] == plain[-1]["balanced_error"]
    assert merged[-1]["be"] == pytest.approx(1)
    assert all(entry["mean"] == 0 for entry in content["paired_differences"])
    for name in ("curves.png", "rbe.png", "corruptions.png"):
        assert (out / name).read_bytes()[:4] == b"\x89PNG"


def test_no_digit_was_trained_on_by_another_recipe(monkeypatch, capsys, tmp_path):
    """The figures are those of the test part of images.load_digits, computed by hand."""
    monkeypatch.syspath_prepend(ROOT / "recipes")
    images = importlib.import_module("images")
    net = save_model(tmp_path / "net.safetensors", 0, num_classes=10, in_chans=1)
    code, _ = run_here(
        monkeypatch, capsys,
        f"net={net}", "--data", "digits", "--size", "32", *TEST_RESNET, "--mean", "0.3",
        "--std", "0.4", "--preset", "bars", "--severities", "1", "--bootstrap", "0",
        "--output", tmp_path,
    )  # fmt: skip
    assert code == 0
    (result,) = json.loads((tmp_path / "robustness.json").read_text())["models"]["net"]
    parts = images.load_digits(32).parts
    pixels, labels = parts["test"]
    assert result["settings"]["n"] == len(pixels) == 497
    model = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    model.load_state_dict(load_file(net))
    with torch.no_grad():
        logits = model.eval()((pixels / 255 - 0.3) / 0.4)
    scores = logits.softmax(1) - torch.nn.functional.one_hot(labels, 10)
    clean = next(row for row in result["rows"] if row["corruption"] == "clean")
    assert clean["brier"] == pytest.approx(scores.square().sum(1).mean().item(), abs=1e-5)
    trained = {image.numpy().tobytes() for part in ("train", "val") for image in parts[part][0]}
    assert not trained & {image.numpy().tobytes() for image in pixels}


def test_medmnist_layout_with_a_timm_folder_and_grey_repeated(tmp_path, monkeypatch, capsys):
    generator = np.random.default_rng(0)
    arrays = {}
    for part in ("train", "val", "test"):
        arrays[f"{part}_images"] = generator.integers(0, 256, (12, 28, 28), dtype=np.uint8)
        arrays[f"{part}_labels"] = np.arange(12, dtype=np.uint8)[:, None] % 2
    np.savez(tmp_path / "pneumoniamnist.npz", **arrays)
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=2)
    model.pretrained_cfg |= {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    timm.models.save_for_hf(model, tmp_path / "folder", safe_serialization=True)
    out = tmp_path / "out"
    code, _ = run_here(
        monkeypatch, capsys,
        f"net={tmp_path / 'folder'}", "--data", "pneumoniamnist", "--data-root", tmp_path,
        "--severities", "3", "--bootstrap", "0", "--output", out,
    )  # fmt: skip
    assert code == 0
    content = json.loads((out / "robustness.json").read_text())
    (result,) = content["models"]["net"]
    assert result["settings"]["task"] == "binary" and result["settings"]["n"] == 12
    assert "gamma_up" in result["settings"]["corruptions"]
    # The folder says how its images were prepared; evaluated by hand, that gives the same figure.
    with np.load(tmp_path / "pneumoniamnist.npz") as data:
        pixels = torch.from_numpy(data["test_images"]).unsqueeze(1).expand(-1, 3, -1, -1) / 255
        labels = torch.from_numpy(data["test_labels"]).flatten()
    mean, std = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]).view(2, 3, 1, 1)
    with torch.no_grad():
        scores = model.eval()((pixels - mean) / std).softmax(1)
    brier = (scores[:, 1] - labels).square().mean().item()
    clean = next(row for row in result["rows"] if row["corruption"] == "clean")
    assert clean["brier"] == pytest.approx(brier, abs=1e-5)
    assert not (out / "rbe.png").exists(), "one model has nothing to be relative to"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--data", "digits"], "pass label=path"),
        (["a=.", "--data", "nomnist"], "unknown data set 'nomnist'; the 2D sets are"),
        (["a=.", "--data", "dermamnist", "--size", "64"], "data/dermamnist_64.npz is missing and"),
        (["a=.", "--data", "digits", "--preset", "qick"], "did you mean quick"),
        (["a=.", "--data", "digits", "--baseline", "b"], "not among the labels"),
        (["a=.", "a=.", "b=.", "--data", "digits"], "same number of seeds"),
        (["a=NET", "--data", "digits", "--size", "32", *TEST_RESNET], "give --mean and --std"),
    ],
)
def test_mistakes_end_with_one_sentence(arguments, message, monkeypatch, capsys, tmp_path):
    def offline(*_, **__):
        raise RuntimeError("no network")

    monkeypatch.setattr(medmnist, "DermaMNIST", offline)
    monkeypatch.chdir(tmp_path)
    net = save_model(tmp_path / "net.safetensors", 0, num_classes=10, in_chans=1)
    arguments = [argument.replace("NET", str(net)) for argument in arguments]
    code, _ = run_here(monkeypatch, capsys, *arguments)
    assert isinstance(code, str) and message in code


def test_help_explains_every_argument(monkeypatch, capsys):
    code, shown = run_here(monkeypatch, capsys, "--help")
    assert code == 0
    assert "label=path" in shown and "--threshold" in shown and "Expected:" in shown


def test_a_folder_of_images_and_a_split_of_own_images(tmp_path, monkeypatch, capsys):
    from PIL import Image

    rows = ["path,label,group,part"]
    for n in range(24):
        part, label = ("train", "test")[n % 2], "ab"[n // 12]
        path = tmp_path / "data" / part / label / f"{n:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng(n).integers(0, 255, (20, 26), dtype=np.uint8)
        Image.fromarray(values).save(path)
        rows.append(f"{path},{label},,{part}")
    (tmp_path / "split.csv").write_text("\n".join(rows))
    weights = save_model(tmp_path / "m.safetensors", 0, num_classes=2, in_chans=1)
    common = [
        f"m={weights}", *TEST_RESNET, "--size", "24", "--mean", "0.5", "--std", "0.5", *TINY,
    ]  # fmt: skip
    digests = []
    for data in (tmp_path / "data", tmp_path / "split.csv"):
        out = tmp_path / f"out-{data.name}"
        code, _ = run_here(monkeypatch, capsys, *common, "--data", data, "--output", out)
        assert code == 0
        settings = json.loads((out / "robustness.json").read_text())["models"]["m"][0]["settings"]
        assert settings["n"] == 12
        digests.append(settings["data_sha256"])
    assert digests[0] == digests[1]
    code, _ = run_here(monkeypatch, capsys, *common, "--data", tmp_path / "data" / "train" / "a")
    assert "holds no images in class folders" in str(code)


def test_pictures_draw_what_is_defined_and_label_severities(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "recipes")
    recipe = importlib.import_module("robustness")
    assert Path(recipe.__file__).parent == ROOT / "recipes"
    figures = []
    monkeypatch.setattr(recipe.plt, "close", figures.append)

    def result(**ratios: float) -> recipe.RobustnessResult:
        rows = [
            {"corruption": name, "severity": 1, **({"rbe": ratios[name]} if name in ratios else {})}
            for name in ("bars", "border", "dust")
        ]
        return recipe.RobustnessResult(rows, {"corruptions": ["bars", "border", "dust"]}, {})

    results = {"plain": [result()], "merged": [result(border=0.5)]}
    recipe.draw_ratios(results, tmp_path / "rbe.png")
    image = torch.rand(3, 28, 28)
    recipe.draw_contact_sheet(image, ["bars"], [1, 3], 0, 0, tmp_path / "sheet.png")
    (ratios,), (sheet,) = (figure.axes for figure in figures)
    assert [label.get_text() for label in ratios.get_yticklabels()] == ["border"]
    assert [bar.get_width() for bar in ratios.patches] == [0.5]
    assert "plain loses nothing: bars, dust" in ratios.get_xlabel()
    assert "severity" in sheet.get_xlabel()
    assert [label.get_text() for label in sheet.get_xticklabels()] == ["clean", "1", "3"]
