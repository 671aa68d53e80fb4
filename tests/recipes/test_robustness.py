"""recipes/robustness.py: exported networks on corrupted images, several seeds of each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import medmnist
import numpy as np
import pytest
import timm
import torch
from matplotlib.figure import Figure
from PIL import Image

from inmerge_wrap import export_timm
from tests.app.trained import pictures, trained
from tests.cli.common import run_json
from tests.recipes.running import offline, recipe, refusal, run_here

TINY = ["--preset", "gaussian_noise", "bars", "--severities", "1", "5", "--bootstrap", "20"]


def export(
    folder: Path, seed: int, classes: int, channels: int = 3, **about: Any
) -> torch.nn.Module:
    torch.manual_seed(seed)
    network = timm.create_model("test_resnet", num_classes=classes, in_chans=channels).eval()
    about = {"mean": [0.3] * channels, "std": [0.4] * channels} | about
    export_timm(network, folder, input_size=(channels, 28, 28), **about)
    return network


def start(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> dict[str, Any]:
    """Runs the recipe in this process; returns what it wrote."""
    run_here(monkeypatch, recipe("robustness"), *arguments)
    out = Path(arguments[[*arguments].index("--out") + 1])  # type: ignore[arg-type]
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"
    return json.loads((out / "robustness.json").read_text(), parse_constant=pytest.fail)


def test_two_methods_two_seeds_and_attacks(
    blood: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = []
    for seed in (0, 1):
        for label in ("plain", "merged"):  # the same weights under both labels
            export(blood / f"{label}{seed}", seed, classes=8)
            entries.append(f"{label}={blood / f'{label}{seed}'}")
    monkeypatch.setenv("COLUMNS", "160")
    content = start(
        monkeypatch, *entries, "--data", "bloodmnist", "--data-root", blood, *TINY, "--attacks",
        "fgsm", "--eps", "4", "--out", blood / "out",
    )  # fmt: skip
    shown = capsys.readouterr().out
    assert "40 images, with one SD over the seeds" in shown
    assert "merged - plain, clean images, accuracy: +0.0000 (+0.0000 to +0.0000), 2 pairs" in shown
    assert {label: len(runs) for label, runs in content["models"].items()} == {
        "plain": 2,
        "merged": 2,
    }
    assert "recipes/robustness.py" in content["environment"]["command"]
    plain, merged = (content["models"][label][1]["rows"] for label in ("plain", "merged"))
    named = ["clean"] + 3 * ["gaussian_noise"] + 3 * ["bars"] + ["all", "fgsm"]
    assert [row["corruption"] for row in plain] == named
    assert plain[-1]["severity"] == pytest.approx(4 / 255)
    assert merged[-2]["balanced_error"] == plain[-2]["balanced_error"]
    assert merged[-2]["be"] == pytest.approx(1)
    assert len(content["paired_differences"]) == 8
    assert all(entry["mean"] == 0 for entry in content["paired_differences"])


def test_each_of_many_labels_has_its_own_curve(
    blood: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    export(blood / "net", 0, classes=8)
    drawn: list[tuple[str, str, str]] = []
    legend = Figure.legend

    def seen(figure: Figure, *, handles: Any, **settings: Any) -> Any:
        drawn.extend((x.get_label(), x.get_color(), x.get_linestyle()) for x in handles)
        return legend(figure, handles=handles, **settings)

    monkeypatch.setattr(Figure, "legend", seen)
    labels = [f"net{number}" for number in range(9)]
    start(
        monkeypatch, *(f"{label}={blood / 'net'}" for label in labels), "--data", "bloodmnist",
        "--data-root", blood, *TINY, "--bootstrap", "0", "--out", blood / "out",
    )  # fmt: skip
    assert [label for label, _, _ in drawn] == labels
    assert len({(colour, line) for _, colour, line in drawn}) == 9


def test_grey_images_are_prepared_as_the_folder_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (12, 28, 28), dtype=np.uint8)
    labels = np.arange(12, dtype=np.uint8)[:, None] % 2
    np.savez(tmp_path / "pneumoniamnist.npz", test_images=pixels, test_labels=labels)
    about = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    network = export(tmp_path / "net", 0, classes=2, **about)
    content = start(
        monkeypatch, f"net={tmp_path / 'net'}", "--data", "pneumoniamnist", "--data-root",
        tmp_path, "--severities", "3", "--bootstrap", "0", "--out", tmp_path / "out",
    )  # fmt: skip
    (result,) = content["models"]["net"]
    assert (
        result["settings"]["task"] == "binary" and "gamma_up" in result["settings"]["corruptions"]
    )
    mean, std = (torch.tensor(about[name]).view(3, 1, 1) for name in ("mean", "std"))
    images = torch.from_numpy(pixels)[:, None].expand(-1, 3, -1, -1) / 255
    with torch.no_grad():
        scores = network((images - mean) / std).softmax(1)[:, 1]
    brier = (scores - torch.from_numpy(labels).flatten()).square().mean().item()
    assert result["rows"][0]["brier"] == pytest.approx(brier, abs=1e-5)


def test_a_folder_of_images_and_a_split_of_own_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ["path,label,group,part"]
    for n in range(24):
        part, label = ("train", "test")[n % 2], "ab"[n // 12]
        path = tmp_path / "data" / part / label / f"{n:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng(n).integers(0, 255, (20, 26), dtype=np.uint8)
        Image.fromarray(values).save(path)
        rows.append(f"{path},{label},,{part}")
    (tmp_path / "split.csv").write_text("\n".join(rows))
    export(tmp_path / "net", 0, classes=2, channels=1, label_names=["a", "b"])
    digests = []
    for data in (tmp_path / "data", tmp_path / "split.csv"):
        out = tmp_path / f"out-{data.name}"
        content = start(
            monkeypatch, f"net={tmp_path / 'net'}", "--data", data, "--size", "28", *TINY,
            "--limit", "6", "--out", out,
        )  # fmt: skip
        settings = content["models"]["net"][0]["settings"]
        assert settings["n"] == 6
        assert "auroc" in content["models"]["net"][0]["rows"][0]  # of both classes, not of one
        digests.append(settings["data_sha256"])
    assert digests[0] == digests[1]
    export(tmp_path / "other", 0, classes=2, channels=1, label_names=["b", "a"])
    both = [f"{name}={tmp_path / name}" for name in ("net", "other")]
    stopped = refusal(monkeypatch, "robustness", *both, "--data", tmp_path / "data")
    assert "differ in label_names or preparation.json" in str(stopped)
    alone = tmp_path / "data" / "train" / "a"
    stopped = refusal(monkeypatch, "robustness", f"net={tmp_path / 'net'}", "--data", alone)
    assert "holds no images in class folders" in str(stopped)


def test_a_trained_network_is_measured_as_inmerge_evaluate_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures(tmp_path / "images", "multilabel", count=12)
    trained(tmp_path / "net", "multilabel", tmp_path / "images")
    paths = sorted((tmp_path / "images").iterdir())
    rows = [f"{path},{n % 2},{n // 6},{n % 3 // 2},p{n // 2}" for n, path in enumerate(paths)]
    table = tmp_path / "t.csv"
    table.write_text("\n".join(["path,a,b,c,group", *rows]))
    settings = ["--data", table, "--bootstrap", "20"]
    shutil.copytree(tmp_path / "net", tmp_path / "bare")
    (tmp_path / "bare" / "preparation.json").unlink()
    both = [f"{name}={tmp_path / name}" for name in ("bare", "net")]
    stopped = refusal(monkeypatch, "robustness", *both, *settings)
    assert "net and " in str(stopped) and "differ in label_names or preparation.json" in str(
        stopped
    )
    content = start(
        monkeypatch, f"net={tmp_path / 'net'}", *settings, "--preset", "quick", "--severities", "3",
        "--out", tmp_path / "out",
    )  # fmt: skip
    (found,) = content["models"]["net"]
    other = run_json("evaluate", tmp_path / "net", *settings, "--severity", "3")
    for row, expected in zip(found["rows"], other["rows"], strict=True):
        figures = {name: value for name, value in expected.items() if isinstance(value, float)}
        assert {name: row[name] for name in figures} == pytest.approx(figures, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--data", "bloodmnist"], "'nowhere': pass label=path, a timm folder"),
        (["a=.", "--data", "bloodmnist"], "'a=.': pass label=path, a timm folder"),
        (["a=net", "--data", "nomnist"], "--data nomnist is neither a folder, a file nor a Med"),
        (["a=net", "--data", "dermamnist", "--size", "64"], "data/dermamnist_64.npz is missing"),
        (["a=net", "--data", "bloodmnist", "--preset", "qick"], "did you mean quick"),
        (["a=net", "--data", "bloodmnist", "--baseline", "b"], "not among the labels"),
        (["a=net", "a=net", "b=net", "--data", "bloodmnist"], "same number of seeds"),
    ],
)
def test_mistakes_end_with_one_sentence(
    blood: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr(medmnist, "DermaMNIST", offline)
    monkeypatch.chdir(blood)
    export(blood / "net", 0, classes=8)
    if "bloodmnist" in arguments:
        arguments = [*arguments, "--data-root", "."]
    assert message in str(refusal(monkeypatch, "robustness", *arguments))


def test_the_size_of_attacks_needs_an_attack(
    blood: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    export(blood / "net", 0, classes=8)
    arguments = [f"a={blood / 'net'}", "--data", "bloodmnist", "--eps", 4]
    assert refusal(monkeypatch, "robustness", *arguments) == 2
    assert "--eps is the size of an attack: give --attacks" in capsys.readouterr().err


def test_of_several_processes_one_evaluates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    run_here(monkeypatch, recipe("robustness"), "a=nowhere", "--data", "nowhere")
