"""Every recipe runs from the command line at a tiny setting, without a network."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import importlib
import importlib.util
import inspect
import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from filelock import FileLock
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parent.parent
TINY = ["--arch", "test_resnet", "--train-images", "96", "--batch-size", "32"]


def run(*command: str, folder: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs in an empty folder, offline, with one thread and the native code that is there."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
        "HOME": str(folder),
        "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache")),  # native
    }
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done


def recipe(name: str) -> str:
    return str(ROOT / "recipes" / f"{name}.py")


@pytest.fixture
def blood(tmp_path: Path) -> Path:
    """A file in BloodMNIST's layout whose classes differ in brightness."""
    generator = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 96), ("val", 40), ("test", 40)):
        labels = np.arange(count) % 8
        noise = generator.integers(0, 40, (count, 28, 28, 3))
        arrays[f"{part}_images"] = (noise + 25 * labels[:, None, None, None]).astype(np.uint8)
        arrays[f"{part}_labels"] = labels[:, None].astype(np.uint8)
    np.savez(tmp_path / "bloodmnist.npz", **arrays)
    return tmp_path


def test_quickstart(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
    done = run(*launcher, recipe("quickstart"), *TINY, "--epochs", "1", folder=tmp_path)
    out = tmp_path / "runs" / "quickstart"
    assert "drawn pairs were merged" in done.stdout
    assert "identical logits in plain timm" in done.stdout
    assert "recipes/medmnist_2d.py --dataset digits --seeds 5" in done.stdout  # one is no evidence
    assert (out / "quickstart.png").stat().st_size > 10_000
    assert {"config.json", "model.safetensors"} <= {
        path.name for path in (out / "merged").iterdir()
    }
    written = json.loads((out / "results.json").read_text())
    assert set(written["results"]) == {"plain", "merged"}
    assert len(written["results"]["plain"]["test"]) == 5
    assert sum(layer["merged"] for layer in written["results"]["merged"]["merging"].values()) > 0


def test_medmnist_in_pairs_and_resumed(blood: Path) -> None:
    command = [sys.executable, recipe("medmnist_2d"), *TINY, "--data-root", ".", "--epochs", "1"]
    done = run(*command, "--seeds", "2", folder=blood)
    results = sorted((blood / "runs" / "medmnist").glob("*/result.json"))
    assert len(results) == 4
    assert "±" in done.stdout and "0.948 ± 0.004" in done.stdout
    table = (blood / "runs" / "medmnist" / "bloodmnist-28-test_resnet.md").read_text().splitlines()
    heads = "| images, metric | merged minus plain (95% interval) | plain | merged |"
    assert table[2] == heads and table[4].startswith("| clean, accuracy | ")
    values = [json.loads(path.read_text())["test"]["clean"]["accuracy"] for path in results]
    # Sorted by name: merged of both seeds, then plain.
    plain, merged = table[4].split(" | ")[2:]
    assert plain.startswith(f"{sum(values[2:]) / 2:.3f} ± ")
    assert merged.startswith(f"{sum(values[:2]) / 2:.3f} ± ")
    content = json.loads(results[0].read_text())
    assert content["merge"] and content["environment"]["command"].startswith("python ")
    assert set(content["test"]) >= {"clean", "gaussian_noise/3"}
    del content["settings"]["deterministic"]  # as in a file from before there was this argument
    results[0].write_text(json.dumps(content))
    before = [path.stat().st_mtime_ns for path in results]
    run(*command, "--seeds", "2", folder=blood)
    assert [path.stat().st_mtime_ns for path in results] == before
    other = run(*command, "--seeds", "2", "--lr", "0.5", folder=blood, check=False)
    assert other.returncode != 0 and "lr=0.05, not 0.5" in other.stderr


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--dataset", "bloodmnits"], "unknown data set 'bloodmnits'; the 2D sets are"),
        (["--dataset", "pathmnist", "--data-root", "nowhere"], "nowhere/pathmnist.npz is missing"),
    ],
)
def test_medmnist_without_data_says_what_to_do(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = run(sys.executable, recipe("medmnist_2d"), *arguments, folder=tmp_path, check=False)
    assert done.returncode != 0
    assert message in done.stderr and "Traceback" not in done.stderr.split(message)[-1]


def test_predicting_leaves_every_module_its_mode(
    evaluation: ModuleType, images: ModuleType
) -> None:
    """Not one ``model.train()``, which would thaw the BatchNorm that somebody froze."""
    network = timm.create_model("test_resnet", num_classes=10, in_chans=1).train()
    frozen = [part for part in network.modules() if isinstance(part, torch.nn.BatchNorm2d)][:2]
    for part in frozen:
        part.eval()
    digits = images.load_digits()
    normalise = images.Normalised(digits, torch.device("cpu"))
    pixels = digits.parts["val"][0]
    logits = evaluation.predict(network, pixels, normalise, 64)
    assert [part for part in network.modules() if not part.training] == frozen
    with torch.no_grad():
        torch.testing.assert_close(logits, network.eval()(normalise(pixels)))


def test_a_recipe_that_fades_out_does_not_warn_of_itself(tmp_path: Path) -> None:
    """Eight steps, of which the last would merge a pair or two if merging did not end before."""
    command = [sys.executable, "-W", "default", recipe("quickstart"), "--arch", "resnet10t"]
    command += ["--train-images", "128", "--batch-size", "32", "--epochs", "2"]
    done = run(*command, "--similarity-threshold", "-1", folder=tmp_path)
    assert "kernels were merged in the very last step" not in done.stderr
    merged = json.loads((tmp_path / "runs/quickstart/results.json").read_text())["results"]
    layers = merged["merged"]["merging"].values()
    assert {layer["steps"] for layer in layers} == {8} and any(x["merged"] for x in layers)


@pytest.mark.parametrize("name", ["quickstart", "medmnist_2d"])
def test_an_export_says_that_statistics_lag(blood: Path, name: str) -> None:
    """Merging to the last step leaves BatchNorm behind; only the wrapper knows of it."""
    command = [sys.executable, "-W", "default", recipe(name), *TINY, "--epochs", "1"]
    command += ["--decay", "constant", *(["--data-root", "."] * (name == "medmnist_2d"))]
    message = "kernels were merged in the very last step"
    for merges, tau in ((True, "-1"), (False, "1")):
        extra = ["--similarity-threshold", tau, "--out", f"merges-{merges}"]
        assert (message in run(*command, *extra, folder=blood).stderr) is merges


def test_medmnist_takes_the_files_of_earlier_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "recipes")
    medmnist = runpy.run_path(recipe("medmnist_2d"))
    paths = sorted((ROOT / "results" / "medmnist" / "recommended").glob("*.json"))
    assert len(paths) == 20
    for path in paths:
        result = json.loads(path.read_text())
        arm = "merged" if result["merge"] else "plain"
        _, script, *arguments = shlex.split(result["environment"]["command"])
        # What was recommended then is --persistent now.
        monkeypatch.setattr(sys, "argv", [script, *arguments, "--persistent"])
        options = medmnist["parse_run"](medmnist["parser"])
        medmnist["check_same_settings"](result, options, path, arm)
        options.merge_weight = 0.5
        if arm == "merged":
            with pytest.raises(SystemExit, match=r"merge_weight=0.8, not 0.5"):
                medmnist["check_same_settings"](result, options, path, arm)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["figure2", "--arms", "plain"], "figure2 defines its own arms: leave out --arms"),
        (["architectures", "--arch", "resnet50"], "architectures runs vgg_small, resnet18"),
        (["architectures", "--size", "28"], "--size 28 is too small for architectures"),
        (["study", "--arms", "best"], "unknown arms ['best']; choose from ['plain', 'ema .98'"),
    ],
)
def test_options_that_an_experiment_would_ignore_are_refused(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = run(sys.executable, recipe("ablation"), *arguments, folder=tmp_path, check=False)
    assert done.returncode == 2 and message in done.stderr


def test_every_architecture_takes_the_size_that_is_chosen_for_it(tmp_path: Path) -> None:
    command = [sys.executable, recipe("ablation"), "architectures", "--dataset", "digits"]
    command += ["--train-images", "64", "--epochs", "1", "--seeds", "1", "--arms", "plain"]
    done = run(*command, folder=tmp_path)
    names = ("vgg_small", "resnet18", "densenet121", "efficientnet_b0", "convnext_atto")
    assert all(f"{name}: plain" in done.stdout for name in names)
    files = list((tmp_path / "runs" / "ablation").glob("*.json"))
    assert [json.loads(path.read_text())["run"]["size"] for path in files] == [32] * 5


def test_runs_that_are_evaluated_on_fewer_images_are_runs_of_their_own(tmp_path: Path) -> None:
    command = [sys.executable, recipe("ablation"), "study", "--dataset", "digits", *TINY]
    command += ["--epochs", "1", "--seeds", "1", "--arms", "plain"]
    for extra in ([], ["--test-images", "7"]):
        assert run(*command, *extra, folder=tmp_path).stdout.count("accuracy") == 1
    files = (tmp_path / "runs" / "ablation").glob("*.json")
    runs = {
        one["run"].get("test_images", 0): one for one in map(json.loads, map(Path.read_text, files))
    }
    assert runs.keys() == {0, 7}
    right = 7 * runs[7]["test"]["clean"]["accuracy"]
    assert right == pytest.approx(round(right), abs=1e-4)


def test_ablation_claims_runs_and_resumes(tmp_path: Path) -> None:
    command = [sys.executable, recipe("ablation"), "study", "--dataset", "digits", *TINY]
    command += ["--epochs", "1", "--seeds", "1", "--arms", "plain", "ema .98", "top half, cosine"]
    out = tmp_path / "runs" / "ablation"
    out.mkdir(parents=True)
    first = run(*command, folder=tmp_path)
    assert first.stdout.count("accuracy") == 3
    files = sorted(path for path in out.iterdir() if path.is_file())
    assert len(files) == 3 and all(path.suffix == ".json" for path in files)
    merged = next(path for path in files if "top-half" in path.name)
    assert json.loads(merged.read_text())["merging"]["merged"] > 0
    merged.unlink()
    lock = out / ".locks" / f"{merged.stem}.lock"
    assert lock.exists(), "what a process leaves behind, however it ended"
    with FileLock(lock):  # as if another process were at it
        assert "accuracy" not in run(*command, folder=tmp_path).stdout
    again = run(*command, folder=tmp_path)
    assert again.stdout.count("accuracy") == 1 and merged.exists()


def test_a_run_that_was_finished_meanwhile_is_not_claimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "recipes")
    claim = importlib.import_module("sweeping").claim
    path = tmp_path / "run.json"
    first = claim(path)
    assert first is not None and claim(path) is None
    path.write_text("{}")
    first.release()
    assert claim(path) is None
    path.unlink()
    assert claim(path) is not None, "the refusal left no lock"


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A folder in the layout of the NIH release: 40 patients, no hernia among the test images."""
    from PIL import Image

    generator = np.random.default_rng(0)
    images = tmp_path / "nih" / "images_001" / "images"
    images.mkdir(parents=True)
    rows = ["Image Index,Finding Labels,Follow-up #,Patient ID"]
    names = []
    for patient in range(1, 41):
        for visit in range(2):
            name = f"{patient:08d}_{visit:03d}.png"
            names.append(name)
            findings = ["Mass|Edema", "No Finding", "Hernia", "Effusion"][patient % 4]
            if patient > 30 and findings == "Hernia":
                findings = "Nodule"
            rows.append(f"{name},{findings},{visit},{patient}")
            pixels = generator.integers(0, 255, (40, 40), dtype=np.uint8)
            Image.fromarray(pixels).save(images / name)
    root = tmp_path / "nih"
    (root / "Data_Entry_2017_v2020.csv").write_text("\n".join(rows))
    (root / "train_val_list.txt").write_text("\n".join(names[:60]))
    (root / "test_list.txt").write_text("\n".join(names[60:]))
    return root


CHEST = ["--arch", "test_resnet", "--weights", "none", "--size", "32", "--workers", "0"]
CHEST += ["--batch-size", "16", "--lr", "0.01", "--data-root"]


def test_chestxray_in_two_phases(tmp_path: Path, release: Path) -> None:
    command = [sys.executable, recipe("chestxray"), *CHEST, str(release)]
    done = run(*command, "--epochs", "1", "1", folder=tmp_path)
    out = tmp_path / "runs" / "chestxray"
    assert {"best", "best-of-phase-1", "state", "results.json"} <= set(os.listdir(out))
    assert os.listdir(out / "state") == ["epoch-0002"]
    result = json.loads((out / "results.json").read_text())
    assert result["test_auroc"]["Hernia"] is None and 0 <= result["test_auroc"]["Mass"] <= 1
    assert sum(result["images"].values()) == 80 and result["images"]["test"] == 20
    merged = result["merging"]
    epoch = result["images"]["train"] // 16
    assert all(layer["steps"] == 2 * epoch for layer in merged.values())
    assert sum(layer["merged"] for layer in merged.values()) > 0
    assert "without positives or negatives" in done.stdout
    own, apart = done.stdout.split("NOT COMPARABLE with the above: ")
    assert "test_resnet, merged" in own and "CheXGCN" not in own and "20 test images" in own
    assert "CheXGCN" in apart and "25,596" in apart
    again = run(*command, "--epochs", "1", "1", folder=tmp_path, check=False)
    assert again.returncode != 0 and "runs/chestxray already holds a run" in again.stderr
    assert json.loads((out / "results.json").read_text()) == result


def test_the_second_phase_and_its_control_start_alike(tmp_path: Path, release: Path) -> None:
    """With a threshold that no pair passes the two are one and the same training."""
    command = [sys.executable, recipe("chestxray"), *CHEST, str(release), "--epochs", "1", "1"]
    extra = ["--control", "--similarity-threshold", "1"]
    done = run(*command, *extra, "--out", "both", folder=tmp_path)
    result = json.loads((tmp_path / "both" / "results.json").read_text())
    _, control, merged = (
        {name: epoch[name] for name in ("train_loss", "val_loss", "lr")}
        for epoch in result["history"]
    )
    assert merged == control and result["test_auroc"] == result["control_test_auroc"]
    assert "test_resnet, control" in done.stdout and "test_resnet, merged" in done.stdout
    assert not (tmp_path / "both" / "end-of-phase-1").exists()
    steps = {layer["steps"] for layer in result["merging"].values()}
    assert steps == {2 * (result["images"]["train"] // 16)}
    # Without merging the second phase alone gives the same.
    run(*command, "--no-merge", "--out", "plain", folder=tmp_path)
    plain = json.loads((tmp_path / "plain" / "results.json").read_text())
    assert plain["test_auroc"] == result["control_test_auroc"]


def test_a_killed_control_resumes(tmp_path: Path, release: Path) -> None:
    arguments = [*CHEST, str(release), "--epochs", "1", "2", "--control"]
    dying = (
        "from accelerate import Accelerator as A; save = A.save_state; "
        "A.save_state = lambda self, folder: save(self, folder) and "
        "os.path.exists('killed/state/epoch-NUMBER') and os._exit(9)"
    )
    run(sys.executable, recipe("chestxray"), *arguments, "--out", "whole", folder=tmp_path)
    extra = ["--out", "killed"]
    for number in ("0002", "0003"):  # in the control, and at its end
        command = patched("chestxray", dying.replace("NUMBER", number))
        killed = run(*command, *arguments, *extra, folder=tmp_path, check=False)
        assert killed.returncode == 9
        extra = ["--out", "killed", "--resume"]
    run(sys.executable, recipe("chestxray"), *arguments, *extra, folder=tmp_path)
    whole, resumed = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "killed")
    )
    for figure in ("test_auroc", "control_test_auroc", "merging"):
        assert resumed[figure] == whole[figure]
    assert whole["test_auroc"] != whole["control_test_auroc"]


def test_chestxray_resumes_where_it_was_killed(tmp_path: Path, release: Path) -> None:
    """Killed while it saved the first epoch of the second phase, when best/ was written already."""
    arguments = [*CHEST, str(release), "--epochs", "1", "2"]
    dying = (
        "from accelerate import Accelerator as A; save = A.save_state; "
        "A.save_state = lambda self, folder: save(self, folder) and "
        "os.path.exists('killed/state/epoch-0001') and os._exit(9)"
    )
    killed = run(
        *patched("chestxray", dying), *arguments, "--out", "killed", folder=tmp_path, check=False
    )
    assert killed.returncode == 9
    out = tmp_path / "killed"
    assert sorted(os.listdir(out / "state")) == ["draft", "epoch-0001"]
    assert (out / "best" / "model.safetensors").exists()
    resume = [sys.executable, recipe("chestxray"), *arguments, "--out", "killed", "--resume"]
    other = run(*resume, "--seed", "1", "--lr", "0.02", folder=tmp_path, check=False)
    assert other.returncode != 0 and not (out / "results.json").exists()
    assert "lr=0.01, not 0.02; seed=0, not 1" in other.stderr
    # What changes no figure may differ, and so may where the run stands.
    run(*resume, "--tracker", "jsonl", "--cache", "cache", folder=tmp_path)
    assert os.listdir(out / "state") == ["epoch-0003"]
    run(sys.executable, recipe("chestxray"), *arguments, "--out", "whole", folder=tmp_path)
    results = [
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("killed", "whole")
    ]
    for result in results:
        assert len(result["history"]) == 3
        for epoch in result["history"]:
            del epoch["images_per_second"], epoch["share_waiting"]
    resumed, whole = results
    for figure in ("history", "test_auroc", "merging"):
        assert resumed[figure] == whole[figure]
    weights = [
        load_file(tmp_path / name / "best" / "model.safetensors") for name in ("killed", "whole")
    ]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_chestxray_has_something_to_resume(tmp_path: Path, release: Path) -> None:
    command = [sys.executable, recipe("chestxray"), *CHEST, str(release), "--resume"]
    done = run(*command, folder=tmp_path, check=False)
    assert done.returncode != 0 and "runs/chestxray/state holds no epoch" in done.stderr


@pytest.mark.parametrize(
    "break_it,message",
    [
        ("list", "test_list.txt is missing"),
        ("image", "00000001_000.png is listed but not found in"),
        ("patient", "patients ['1'] are in both"),
        ("finding", "has the unknown findings ['Cough']"),
        ("weights", "--weights nowhere.pth: there is no such file"),
        ("phase", "--epochs 1 0 leaves no epoch that merges"),
        ("hub", "owner/name cannot be loaded: ConnectionError"),
    ],
)
def test_chestxray_refuses_broken_data_in_one_line(
    tmp_path: Path, release: Path, break_it: str, message: str
) -> None:
    extra = []
    table = release / "Data_Entry_2017_v2020.csv"
    if break_it == "list":
        (release / "test_list.txt").unlink()
    elif break_it == "image":
        (release / "images_001" / "images" / "00000001_000.png").unlink()
    elif break_it == "patient":
        table.write_text(
            table.read_text().replace(
                "00000040_000.png,Mass|Edema,0,40", "00000040_000.png,Mass|Edema,0,1"
            )
        )
    elif break_it == "finding":
        table.write_text(table.read_text().replace("Nodule", "Cough"))
    elif break_it == "weights":
        extra = ["--weights", "nowhere.pth"]
    elif break_it == "phase":
        extra = ["--epochs", "1", "0"]
    source = ["--data-root", str(release)]
    if break_it == "hub":
        source = ["--dataset", "owner/name", "--revision", 40 * "0"]
    command = [sys.executable, recipe("chestxray"), *CHEST[:-1], *source, *extra]
    done = run(*command, folder=tmp_path, check=False)
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr


# -- every recipe, however it is started -----------------------------------------------------------

LAUNCHERS = {
    "python": [sys.executable],
    "accelerate": [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"],
    "two processes": [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"),
        *("--master_port", "0", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"),
    ],
}
CACHED = ["--cache", "cache", "--time-loading", "1", "--tracker", "jsonl", "--epochs", "1", "1"]
RECIPES = {  # arguments, the files they write, the last line they print
    "quickstart": (
        [*TINY, "--epochs", "1"],
        ["runs/quickstart/results.json", "runs/quickstart/merged/model.safetensors"],
        "Results and figure: ",
    ),
    "medmnist_2d": (
        [*TINY, "--data-root", ".", "--epochs", "1", "--tracker", "tensorboard"],
        [
            f"runs/medmnist/bloodmnist-28-test_resnet-{arm}-seed0/{name}"
            for arm in ("plain", "merged")
            for name in ("result.json", "model.safetensors")
        ],
        "Results and weights: ",
    ),
    "chestxray": (
        [*CHEST, "nih", *CACHED],
        [
            *("runs/chestxray/results.json", "runs/chestxray/best/model.safetensors"),
            *("cache/train.npy", "cache/val.npy", "cache/test.npy"),
        ],
        "Results: ",
    ),
    "robustness": (
        [
            *("net=net.safetensors", "--data", "bloodmnist", "--data-root", ".", "--limit", "16"),
            *("--arch", "test_resnet", "--mean", "0.3", "--std", "0.4", "--output", "runs"),
            *("--preset", "gaussian_noise", "--severities", "3", "--bootstrap", "0"),
        ],
        ["runs/robustness.json", "runs/curves.png"],
        "written to ",
    ),
    "ablation": (
        [
            *("study", "--dataset", "bloodmnist", "--data-root", ".", *TINY, "--epochs", "1"),
            *("--seeds", "1", "--arms", "plain", "top half, cosine"),
        ],
        ["runs/ablation/bloodmnist-plain-0-*.json", "runs/ablation/bloodmnist-top-half-*.json"],
        "[2/2] top half, cosine, seed 0: accuracy ",
    ),
}


@pytest.mark.parametrize(
    "name,launcher",
    [  # what the tests above and those of robustness do not start
        ("quickstart", "python"),
        ("quickstart", "two processes"),
        ("medmnist_2d", "accelerate"),
        ("medmnist_2d", "two processes"),
        ("chestxray", "accelerate"),
        ("chestxray", "two processes"),
        ("robustness", "accelerate"),
        ("robustness", "two processes"),
        ("ablation", "accelerate"),
        ("ablation", "two processes"),
    ],
)
def test_every_recipe_under_every_launcher(
    blood: Path, release: Path, name: str, launcher: str
) -> None:
    arguments, files, last = RECIPES[name]
    if name == "robustness":
        weights = timm.create_model("test_resnet", num_classes=8).state_dict()
        save_file(weights, blood / "net.safetensors")
    done = run(*LAUNCHERS[launcher], recipe(name), *arguments, folder=blood)
    assert done.stdout.count(last) == 1, "one process reports"
    for file in files:
        (path,) = blood.glob(file)
        assert path.stat().st_size > 0
        if path.suffix == ".json":
            figures = json.loads(path.read_text(), parse_constant=pytest.fail)  # NaN, Infinity
            assert figures["environment"]["processes"] == (2 if launcher == "two processes" else 1)
            figures = figures.get("results", {}).get("merged", figures)
            if name in ("quickstart", "medmnist_2d"):
                # 96 images in batches of 32 over all processes, however many these are.
                assert {layer["steps"] for layer in figures.get("merging", {}).values()} <= {3}
        elif path.suffix == ".safetensors":
            assert all(value.isfinite().all() for value in load_file(path).values())
    assert not [path for path in blood.rglob("*") if "draft" in path.name]
    if name == "chestxray":
        assert done.stderr.count("writing cache/train.npy:   0%") == 1, "one process writes"
        check_cached_and_tracked(blood)
    if name == "medmnist_2d":
        assert tags(blood / "runs" / "medmnist" / "medmnist") >= {
            f"bloodmnist-28-test_resnet-{arm}-seed0/{figure}"
            for arm, figure in [
                ("plain", "train_loss"),
                ("merged", "lr"),
                ("merged", "val_auroc"),
                ("merged", "merged_share"),
            ]
        }


def test_writing_and_timing_change_nothing_in_chestxray(tmp_path: Path, release: Path) -> None:
    command = [sys.executable, recipe("chestxray"), *CHEST, str(release), "--no-merge"]
    figures = []
    for extra in ([], ["--cache", "cache", "--time-loading", "1"]):
        out = f"runs/{len(extra)}"
        run(*command, "--epochs", "1", "0", *extra, "--out", out, folder=tmp_path)
        assert sorted(os.listdir(tmp_path / out)) == ["best", "results.json", "state"]
        result = json.loads((tmp_path / out / "results.json").read_text())
        (epoch,) = result["history"]
        figures.append((epoch["train_loss"], epoch["val_loss"], result["test_auroc"]))
    assert figures[0] == figures[1]


def check_cached_and_tracked(folder: Path) -> None:
    result = json.loads((folder / "runs/chestxray/results.json").read_text())
    assert len(np.load(folder / "cache" / "train.npy")) == result["images"]["train"]
    assert result["images_per_second"] > 0 and result["loader_images_per_second"] > 0
    assert 0 < result["share_waiting"] < 1
    lines = (folder / "runs/chestxray/log.jsonl").read_text().splitlines()
    first, second = map(json.loads, lines)
    assert (first["step"], second["step"]) == (1, 2)
    for line, figures in zip((first, second), result["history"], strict=True):
        assert line.items() >= {k: v for k, v in figures.items() if v is not None}.items()
    assert first["merged_share"] == 0 < second["merged_share"] == 1  # every drawn pair moves


def tags(folder: Path) -> set[str]:
    """What a TensorBoard folder holds."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return set(events.Tags()["scalars"])


def test_chestxray_without_merging_from_a_data_set(tmp_path: Path, release: Path) -> None:
    """CheXNet: its DenseNet, here on images in the layout of Hugging Face."""
    table = csv.DictReader((release / "Data_Entry_2017_v2020.csv").read_text().splitlines())
    entries = {row["Image Index"]: row["Finding Labels"] for row in table}
    for split, listed in (("train", "train_val"), ("test", "test")):
        folder = tmp_path / "hf" / split
        folder.mkdir(parents=True)
        lines = ["file_name,labels"]
        for name in (release / f"{listed}_list.txt").read_text().split():
            shutil.copy(release / "images_001" / "images" / name, folder)
            lines.append(f"{name},{entries[name]}")
        (folder / "metadata.csv").write_text("\n".join(lines))
    command = [sys.executable, recipe("chestxray"), *CHEST[:-1], "--dataset", "hf", "--no-merge"]
    command += ["--arch", "densenet121", "--epochs", "1", "0", "--cache", "cache"]
    done = run(*command, folder=tmp_path)
    result = json.loads((tmp_path / "runs" / "chestxray" / "results.json").read_text())
    assert "merging" not in result and sum(result["images"].values()) == 80
    assert len(result["history"]) == 1 and 0 <= result["test_auroc"]["Mass"] <= 1
    assert "densenet121, plain" in done.stdout
    about = json.loads((tmp_path / "cache" / "test.json").read_text())
    assert about["images"] == 20 and about["source"].endswith("hf")


# -- what they share -------------------------------------------------------------------------------


def module(name: str) -> Any:
    """A fixture: a module that recipes share."""

    @pytest.fixture(name=name)
    def load(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
        monkeypatch.syspath_prepend(ROOT / "recipes")
        return importlib.import_module(name)

    return load


images, running, tracking = module("images"), module("running"), module("tracking")
merging_options, evaluation = module("merging_options"), module("evaluation")


SCRIPTS = ["quickstart", "medmnist_2d", "chestxray", "robustness", "ablation", "study"]
SCRIPTS += ["ablation_report", "study_report"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_explains_every_option(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.syspath_prepend(ROOT / "recipes")
    parser = parser_of(monkeypatch, recipe(name))
    assert len(parser._actions) > (4 if name.endswith("report") else 9)
    assert [action.dest for action in parser._actions if not action.help] == []
    assert "Expected:" in parser.format_help()  # which fails on a stray percent sign


@pytest.mark.parametrize(
    "script", [*(f"recipes/{name}.py" for name in SCRIPTS), "benchmarks/scaling.py"]
)
def test_what_is_committed_is_never_written_by_default(
    monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    monkeypatch.syspath_prepend(ROOT / "recipes")
    parser = parser_of(monkeypatch, str(ROOT / script))
    folders = [parser.get_default(name) for name in ("out", "output")]
    assert all(folder is None or folder.parts[0] == "runs" for folder in folders)
    assert any(folders) or script.endswith("report.py")  # which needs to be told where its runs are


def parser_of(monkeypatch: pytest.MonkeyPatch, script: str) -> argparse.ArgumentParser:
    """The parser of a script, which is stopped where it would parse."""
    seen: list[argparse.ArgumentParser] = []

    def stop(parser: argparse.ArgumentParser, *_: object) -> None:
        seen.append(parser)
        raise SystemExit

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(SystemExit):
        runpy.run_path(script, run_name="__main__")
    (parser,) = seen
    return parser


RUNS = {"quickstart": [], "medmnist_2d": [], "chestxray": ["--data-root", "nih"]}


@pytest.mark.parametrize(
    "name,arguments,message",
    [
        *(
            (name, ["--paper", "--decay", "linear", "--merge-weight", "0"], "--paper would ignore "
             "--merge-weight, --decay: leave out one or the other")
            for name in RUNS
        ),
        ("medmnist_2d", ["--no-merge", "--paper"], "--no-merge would ignore --paper: "),
        ("medmnist_2d", ["--paper", "--persistent"], "--paper would ignore --persistent: "),
        ("medmnist_2d", ["--persistent", "--radius", ".2"], "--persistent would ignore --radius: "),
        ("quickstart", ["--merge-weight", "0.7"], "--merge-weight is for --persistent; the size of "
         "a transient move is --radius"),
        ("chestxray", ["--no-merge", "--shallow-layers", "0"], "would ignore --shallow-layers: "),
        ("quickstart", ["--no-merge"], "unrecognized arguments: --no-merge"),
    ],
)  # fmt: skip
def test_settings_of_merging_that_a_run_would_ignore_are_refused(
    tmp_path: Path, name: str, arguments: list[str], message: str
) -> None:
    command = [sys.executable, recipe(name), *RUNS[name], *arguments]
    done = run(*command, folder=tmp_path, check=False)
    assert done.returncode == 2 and message in done.stderr


def settings_in_force(
    merging_options: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    merging_options.add_merging_arguments(parser)
    monkeypatch.setattr(sys, "argv", ["recipe", *arguments])
    return merging_options.parse_run(parser)


def wrapped(merging_options: ModuleType, options: argparse.Namespace, **course: int) -> Any:
    """What a recipe wraps with these options."""
    from inmerge_wrap import InMergeWrapper

    network = timm.create_model("test_resnet")
    settings = merging_options.merging_settings(options, **course)
    return InMergeWrapper.recommended(network, total_steps=course["total_steps"], **settings)


def decisive(model: Any) -> dict[str, Any]:
    """What a wrapper was told, by its public attributes, and the layers that it merges."""
    from inmerge_wrap import InMergeWrapper

    of_the_plan = {"module", "plan", "shallow_layers", "example_input", "include", "exclude"}
    names = {*inspect.signature(InMergeWrapper).parameters} - of_the_plan - {"also_merge"}
    settings = {name: getattr(model, name) for name in names}
    settings["schedule"] = dataclasses.replace(settings["schedule"], start=0, end=99)
    return settings | {"plan": [site.name for site in model.plan.merged]}


def test_a_recipe_merges_as_recommended_or_as_in_the_paper(
    merging_options: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from inmerge_wrap import Fixed, InMergeWrapper, Schedule

    ours = settings_in_force(merging_options, monkeypatch)
    model = wrapped(merging_options, ours, total_steps=100)
    network = timm.create_model("test_resnet")
    recommended = InMergeWrapper.recommended(network, total_steps=100)
    assert decisive(model) == decisive(recommended)
    assert Fixed(ours.similarity_threshold) == recommended.similarity_threshold
    other = settings_in_force(merging_options, monkeypatch, "--radius", "0.5")
    assert other.radius == 0.5
    assert wrapped(merging_options, other, total_steps=100).radius == 0.5
    stays = settings_in_force(merging_options, monkeypatch, "--persistent")
    model = wrapped(merging_options, stays, total_steps=100)
    persistent = InMergeWrapper.recommended(network, total_steps=100, transient=False)
    assert decisive(model) == decisive(persistent) != decisive(recommended)
    both = "--persistent", "--merge-weight", "0.5"
    stays = settings_in_force(merging_options, monkeypatch, *both)
    assert wrapped(merging_options, stays, total_steps=100).merge_weight == 0.5
    linear = settings_in_force(merging_options, monkeypatch, "--decay", "linear")
    assert wrapped(merging_options, linear, total_steps=100).schedule.decay == "linear"
    paper = settings_in_force(merging_options, monkeypatch, "--paper", "--shallow-layers", "1")
    assert paper.decay == "constant" and paper.similarity_threshold == 0.3
    model = wrapped(merging_options, paper, total_steps=9, start=4)
    assert model.schedule == Schedule(start=4)
    # The paper's settings are the defaults of the library.
    assert decisive(model) == decisive(InMergeWrapper(network, shallow_layers=1))
    plain = settings_in_force(merging_options, monkeypatch, "--no-merge")
    assert {getattr(plain, name) for name in (*merging_options.GIVEN, "decay")} == {None}


@pytest.mark.parametrize("total_steps,start", [(8, 0), (8, 4), (470, 0), (100, 75)])
def test_merging_that_fades_is_over_before_the_training(
    merging_options: ModuleType, monkeypatch: pytest.MonkeyPatch, total_steps: int, start: int
) -> None:
    options = settings_in_force(merging_options, monkeypatch)
    model = wrapped(merging_options, options, total_steps=total_steps, start=start)
    levels = [model.schedule.level(step) for step in range(total_steps)]
    assert levels[-1] == 0 and levels[start] == 1 and not any(levels[:start])
    assert sum(levels) > 0.4 * (total_steps - start)


@pytest.mark.parametrize("seed", [0, 5])
def test_the_seed_of_quickstart_is_that_of_merging(
    images: ModuleType, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    quickstart = runpy.run_path(recipe("quickstart"))
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *TINY, "--epochs", "1", "--seed", str(seed)])
    options = quickstart["parse_run"](quickstart["parser"])
    data = images.load_digits().first_labels(options.train_images, seed=0)
    wrapper, _ = quickstart["train"](Accelerator(cpu=True), data, options, merge=True)
    assert wrapper.seed == seed


def test_a_batch_is_divided_over_the_processes_or_refused(running: ModuleType) -> None:
    assert running.per_process(64, 4) == 16
    for size in (0, -4, 3, 66):
        message = f"--batch-size {size} is the size over all processes: .* multiple of .* 4$"
        with pytest.raises(SystemExit, match=message):
            running.batches(types.SimpleNamespace(num_processes=4), 96, size, seed=0)


def patched(name: str, patch: str, check: str = "") -> list[str]:
    """Runs a recipe after a statement and before another, in its process."""
    path = recipe(name)
    code = f"import os, runpy, sys, timm, torch; sys.path.insert(0, {os.path.dirname(path)!r})"
    code += f"; sys.argv[0] = {path!r}; {patch}; runpy.run_path({path!r}, run_name='__main__')"
    return [sys.executable, "-c", f"{code}; {check}"]


def test_deterministic_runs_give_equal_bits(blood: Path) -> None:
    check = "assert torch.are_deterministic_algorithms_enabled()"
    check += "; assert os.environ['CUBLAS_WORKSPACE_CONFIG'] == ':4096:8'"
    command = [*patched("medmnist_2d", "pass", check), *TINY, "--data-root", ".", "--epochs", "1"]
    files = []
    for out in ("one", "two"):
        run(*command, "--deterministic", "--out", out, folder=blood)
        files.append(sorted((blood / out).glob("*/model.safetensors")))
    assert len(files[0]) == 2
    merged, plain = (path.read_bytes() for path in files[0])
    assert [merged, plain] == [path.read_bytes() for path in files[1]] and merged != plain


@pytest.mark.parametrize("name", ["quickstart", "medmnist_2d", "chestxray", "ablation"])
def test_out_of_memory_is_one_line(blood: Path, release: Path, name: str) -> None:
    patch = "timm.create_model = lambda *_, **__: torch.empty(10**15)"  # what no machine has
    done = run(*patched(name, patch), *RECIPES[name][0], folder=blood, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "out of memory: pass a smaller --batch-size (" in done.stderr.splitlines()[-1]


def test_what_counts_as_out_of_memory(running: ModuleType) -> None:
    message = "CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation"
    with pytest.raises(SystemExit, match=r"--batch-size \(CUDA out .* 2.00 GiB.\)$"):
        with running.one_line_if_out_of_memory():
            raise torch.OutOfMemoryError(message)
    with pytest.raises(RuntimeError, match="shapes"), running.one_line_if_out_of_memory():
        raise RuntimeError("shapes do not fit")


def test_a_tracker_without_its_package_is_refused(
    tracking: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    hidden = {"wandb", "trackio"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *_: None if name in hidden else find(name)
    )
    for name in hidden:
        message = f"--tracker {name}: the package {name} is missing: pip install {name}"
        with pytest.raises(SystemExit, match=message):
            tracking.tracking(name, tmp_path)


def test_waited_counts_the_loader_alone(
    running: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(running.time, "perf_counter", lambda: clock[0])

    def slow() -> Iterator[int]:
        for batch in range(3):
            clock[0] += 2
            yield batch
        clock[0] += 1

    waited, seen = running.Waited(slow()), []
    for batch in waited:
        clock[0] += 10
        seen.append(batch)
    assert seen == [0, 1, 2] and waited.seconds == 7


@pytest.mark.parametrize("engine", ["auto", "torch"])
def test_the_overhead_benchmark_runs(engine: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "overhead.py"), "--models", "test_resnet"]
    command += ["--size", "32", "--batch-size", "4", "--repeats", "4", "--engine", engine]
    done = run(*command, folder=tmp_path)
    found = json.loads((tmp_path / "runs" / "overhead.json").read_text())
    rows = {row["way"]: row for row in found["rows"]}
    assert next(iter(found)) == "command" and "--engine" in found["command"]
    assert rows["every pair"]["merged_share"] == rows["transient, p = 1"]["merged_share"] == 1.0
    assert all(row["floor_ms"] > 0 for row in rows.values())
    assert all(row["quartiles"]["with merging over training step"] for row in rows.values())
    assert rows["every pair"]["merge_over_floor"] > 1
    assert done.stdout.count("| test_resnet | 4 x 32 px |") == len(rows) == 6
    if engine == "torch":
        assert rows["0.3"]["engine"].startswith("torch (")


@pytest.mark.skipif(shutil.which("c++") is None, reason="compiled passes need a C++ compiler")
def test_the_scaling_benchmark_counts_no_message_for_merging(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "scaling.py"), "--widths", "8", "16"]
    command += ["--depths", "1", "2", "--processes", "2", "--repeats", "2", "--out", "scaling.json"]
    run(*command, folder=tmp_path)
    result = json.loads((tmp_path / "scaling.json").read_text())
    messages = result["processes"]["2"]["collectives"]
    assert messages["with"] == messages["without"] > 0
    assert set(result["kernels"]["all drawn merge, native"]) == {"8", "16"}
    assert result["layers"]["no pair merges, torch"]["2"] > 0
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def test_a_subset_of_more_images_than_there_are_is_refused(images: ModuleType) -> None:
    digits = images.load_digits()
    assert len(digits.first_labels(1100, seed=0).parts["train"][0]) == 1100
    for count in (1101, -5):
        message = rf"--train-images must lie in \[1, 1100\], got {count}"
        with pytest.raises(SystemExit, match=message):
            digits.first_labels(count, seed=0)
    first = digits.first_tests(5).parts
    assert torch.equal(first["test"][0], digits.parts["test"][0][:5]) and len(first["val"][1]) > 5
    for count in (-1, 0, 498):
        with pytest.raises(SystemExit, match=rf"--test-images must lie in \[1, 497\], got {count}"):
            digits.first_tests(count)


def test_thresholds_on_the_command_line(merging_options: ModuleType) -> None:
    from inmerge_wrap import Quantile, ZScore

    assert merging_options.threshold("0.3") == 0.3 and merging_options.threshold("-1") == -1.0
    assert merging_options.threshold("z=2") == ZScore(2.0) and merging_options.threshold(
        "top=.5"
    ) == Quantile(0.5)
    for text in ("", "z", "z=", "half=1", "top=0", "1.5", "nan", "z=inf"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not a threshold: pass a cosine"):
            merging_options.threshold(text)
