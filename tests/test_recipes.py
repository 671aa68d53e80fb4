"""Every recipe runs from the command line at a tiny setting, without a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
TINY = ["--arch", "test_resnet", "--train-images", "96", "--batch-size", "32"]


def run(*command: str, folder: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs in an empty folder, offline, with one thread."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
        "HOME": str(folder),
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
    assert "equal logits in plain timm" in done.stdout
    assert (out / "quickstart.png").stat().st_size > 10_000
    assert {"config.json", "model.safetensors"} <= {
        path.name for path in (out / "merged").iterdir()
    }
    written = json.loads((out / "results.json").read_text())
    assert set(written["results"]) == {"plain", "merged"}
    assert len(written["results"]["plain"]["test"]) == 5
    assert sum(layer["merged"] for layer in written["results"]["merged"]["merging"].values()) > 0


def test_medmnist_in_pairs_and_resumed(blood: Path) -> None:
    command = [sys.executable, recipe("medmnist"), *TINY, "--data-root", ".", "--epochs", "1"]
    done = run(*command, "--seeds", "2", folder=blood)
    results = sorted((blood / "runs" / "medmnist").glob("*/result.json"))
    assert len(results) == 4
    assert "±" in done.stdout and "0.948 ± 0.004" in done.stdout
    content = json.loads(results[0].read_text())
    assert content["merge"] and content["environment"]["command"].startswith("python ")
    assert set(content["test"]) >= {"clean", "gaussian_noise/3"}
    before = [path.stat().st_mtime_ns for path in results]
    run(*command, "--seeds", "2", folder=blood)
    assert [path.stat().st_mtime_ns for path in results] == before
    other = run(*command, "--seeds", "2", "--lr", "0.5", folder=blood, check=False)
    assert other.returncode != 0 and "lr=0.05, not 0.5" in other.stderr


def test_medmnist_on_two_processes(blood: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launcher += ["--master_port", "0", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    arguments = [*TINY, "--data-root", ".", "--epochs", "1"]
    done = run(*launcher, recipe("medmnist"), *arguments, folder=blood)
    assert len(list((blood / "runs" / "medmnist").glob("*/result.json"))) == 2
    assert done.stdout.count("Results and weights") == 1


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
    done = run(sys.executable, recipe("medmnist"), *arguments, folder=tmp_path, check=False)
    assert done.returncode != 0
    assert message in done.stderr and "Traceback" not in done.stderr.split(message)[-1]


def test_ablation_claims_runs_and_resumes(tmp_path: Path) -> None:
    command = [sys.executable, recipe("ablation"), "study", "--dataset", "digits", *TINY]
    command += ["--epochs", "1", "--seeds", "1", "--arms", "plain", "ema .98", "top half, cosine"]
    out = tmp_path / "runs" / "ablation"
    out.mkdir(parents=True)
    first = run(*command, folder=tmp_path)
    assert first.stdout.count("accuracy") == 3
    files = sorted(out.iterdir())
    assert len(files) == 3 and all(path.suffix == ".json" for path in files)
    merged = next(path for path in files if "top-half" in path.name)
    assert json.loads(merged.read_text())["merging"]["merged"] > 0
    merged.rename(merged.with_suffix(".claim"))  # as if another process were at it
    assert "accuracy" not in run(*command, folder=tmp_path).stdout


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


def test_chestxray_in_two_phases_and_resumed(tmp_path: Path, release: Path) -> None:
    command = [sys.executable, recipe("chestxray"), *CHEST, str(release)]
    done = run(*command, "--epochs", "1", "1", folder=tmp_path)
    out = tmp_path / "runs" / "chestxray"
    result = json.loads((out / "results.json").read_text())
    assert result["test_auroc"]["Hernia"] is None and 0 <= result["test_auroc"]["Mass"] <= 1
    assert sum(result["images"].values()) == 80 and result["images"]["test"] == 20
    merged = result["merging"]
    epoch = result["images"]["train"] // 16
    assert all(layer["steps"] == 2 * epoch for layer in merged.values())
    assert sum(layer["merged"] for layer in merged.values()) > 0
    assert "want of positives" in done.stdout and "CheXGCN" in done.stdout
    run(*command, "--epochs", "1", "2", "--resume", folder=tmp_path)
    resumed = json.loads((out / "results.json").read_text())
    assert resumed["history"][:2] == result["history"] and len(resumed["history"]) == 3
    assert all(layer["steps"] == 3 * epoch for layer in resumed["merging"].values())


@pytest.mark.parametrize(
    "break_it,message",
    [
        ("list", "test_list.txt is missing"),
        ("image", "00000001_000.png is listed but stands not in"),
        ("patient", "patients ['1'] stand in both"),
        ("finding", "has the unknown findings ['Cough']"),
        ("weights", "--weights nowhere.pth: there is no such file"),
        ("phase", "--epochs 1 0 leaves no epoch that merges"),
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
    else:
        extra = ["--epochs", "1", "0"]
    command = [sys.executable, recipe("chestxray"), *CHEST, str(release), *extra]
    done = run(*command, folder=tmp_path, check=False)
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr


def test_the_overhead_benchmark_runs(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "overhead.py"), "--models", "test_resnet"]
    command += ["--size", "32", "--batch-size", "4", "--repeats", "4", "--out", "overhead.json"]
    run(*command, folder=tmp_path)
    rows = json.loads((tmp_path / "overhead.json").read_text())["rows"]
    assert [row["merged_share"] for row in rows][1] == 1.0
    assert all(row["floor_ms"] > 0 and row["merge_over_floor"] > 1 for row in rows)
