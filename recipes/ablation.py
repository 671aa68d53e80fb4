"""Which settings of merging help? Sweeps over arms and seeds, in pairs, resumable.

    python recipes/ablation.py study --data-root DIR            # the study of docs/evidence.md
    python recipes/ablation.py figure2 --data-root DIR          # merge weight x probability
    python recipes/ablation.py figure3 --data-root DIR          # merged depth, threshold
    python recipes/ablation.py architectures --data-root DIR

Every run is one JSON file in ``--out``. A run that is there is not done again, and several
processes or machines that share the folder never do the same one twice, so the same command
continues a sweep that was stopped, and speeds it up when it is started once more elsewhere.

Hardware and time: ResNet-18 at 28 px takes about 5 seconds an epoch of 1,000 images on one CPU
core, and then the evaluation. Expected: unknown; the study has not been run to its end.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from common import (
    Images,
    Normalised,
    augment,
    batches,
    environment,
    evaluate,
    load_images,
    loss_of,
    make_accelerator,
    write_json,
)
from timm.utils import ModelEmaV3

from inmerge_wrap import InMergeWrapper, Quantile, Schedule, ZScore

# -- settings --------------------------------------------------------------------------------------

CORRUPTIONS = {
    name: (3,) for name in ("gaussian_noise", "gaussian_blur", "contrast_down", "brightness_up")
}

COSINE = {"schedule": {"decay": "cosine"}}
ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ema .98": {"ema": 0.98},
    "paper": {"merge": {}},
    "all, cosine": {"merge": {"similarity_threshold": -1.0, **COSINE}},
    "all, a=.95, cosine": {"merge": {"similarity_threshold": -1.0, "merge_weight": 0.95, **COSINE}},
    "all, to the end, recalibrated": {
        "merge": {"similarity_threshold": -1.0},
        "recalibrate": True,
    },
    "z > 2, cosine": {"merge": {"similarity_threshold": {"z": 2.0}, **COSINE}},
    "top 10%, cosine": {"merge": {"similarity_threshold": {"share": 0.1}, **COSINE}},
    "top half, cosine": {"merge": {"similarity_threshold": {"share": 0.5}, **COSINE}},
    "nearest, top half, cosine": {
        "merge": {"similarity_threshold": {"share": 0.5}, "partner": "most_similar", **COSINE}
    },
    "top half, strength": {
        "merge": {
            "similarity_threshold": {"share": 0.5},
            "schedule": {"decay": "cosine", "anneals": "strength"},
        }
    },
    "top half, second half": {
        "merge": {
            "similarity_threshold": {"share": 0.5},
            "schedule": {"decay": "cosine", "start": 0.5},
        }
    },
    "top half, norm kept": {
        "merge": {"similarity_threshold": {"share": 0.5}, "keep_norm": True, **COSINE}
    },
    "top half, momentum": {
        "merge": {"similarity_threshold": {"share": 0.5}, "merge_momentum": True, **COSINE}
    },
}


@dataclass(frozen=True)
class Run:
    """Everything that decides the outcome of one run, and so names its file."""

    arm: str
    seed: int
    dataset: str
    size: int = 28
    arch: str = "resnet18"
    train_images: int = 0
    epochs: int = 25
    batch_size: int = 64
    lr: float = 0.05
    weight_decay: float = 5e-4
    method: Mapping[str, Any] = field(default_factory=dict)

    @property
    def file_name(self) -> str:
        """Readable, and unique to these settings."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        plain = "".join(c if c.isalnum() else "-" for c in f"{self.dataset}-{self.arm}-{self.seed}")
        return f"{plain}-{digest[:10]}.json"


def sweep(name: str, common: Mapping[str, Any], seeds: int, arms: list[str]) -> Iterator[Run]:
    """The runs of one experiment, seed by seed, so that a stopped sweep is paired so far."""
    for seed in range(seeds):
        if name == "study":
            for arm in arms or ARMS:
                yield Run(arm=arm, seed=seed, method=ARMS[arm], **common)
        elif name == "figure2":
            yield Run(arm="plain", seed=seed, **common)
            for weight, probability in product((0.5, 0.7, 0.8, 0.9, 0.95), (0.1, 0.3, 0.5, 1.0)):
                merge = {"merge_weight": weight, "merge_probability": probability, **COSINE}
                method = {"merge": {"similarity_threshold": {"share": 0.5}, **merge}}
                yield Run(arm=f"a={weight}, p={probability}", seed=seed, method=method, **common)
        elif name == "figure3":
            yield Run(arm="plain", seed=seed, **common)
            for share, tau in product((0.0, 0.25, 0.5, 0.625, 0.75), (-1.0, 0.0, 0.05, 0.1, 0.3)):
                merge = {"shallow_layers": share, "similarity_threshold": tau, **COSINE}
                yield Run(arm=f"L={share}, tau={tau}", seed=seed, method={"merge": merge}, **common)
        else:
            archs = ("vgg11", "vgg11_bn", "resnet18", "densenet121", "efficientnet_b0")
            for arch in (*archs, "convnext_atto"):
                for arm in arms or ("plain", "paper", "top half, cosine"):
                    here = {**common, "arch": arch}
                    yield Run(arm=f"{arch}: {arm}", seed=seed, method=ARMS[arm], **here)


# -- one run ---------------------------------------------------------------------------------------


def merging(method: Mapping[str, Any], total_steps: int) -> dict[str, Any]:
    """The arguments of InMergeWrapper; a schedule is given in shares of the whole training."""
    settings = dict(method)
    threshold = settings.get("similarity_threshold", 0.3)
    if isinstance(threshold, Mapping):
        rule = ZScore if "z" in threshold else Quantile
        settings["similarity_threshold"] = rule(**threshold)
    if "schedule" in settings:
        shares = dict(settings["schedule"])
        start = round(shares.pop("start", 0.0) * total_steps)
        settings["schedule"] = Schedule(start=start, end=total_steps, **shares)
    return settings


def train(run: Run, data: Images, accelerator: Accelerator) -> dict[str, Any]:
    """Trains one network and measures it; the last epoch counts, nothing is selected."""
    set_seed(run.seed)
    data = data.to(accelerator.device)
    normalise = Normalised(data, accelerator.device)
    images, labels = data.parts["train"]
    network = timm.create_model(
        run.arch, num_classes=len(data.classes), in_chans=data.input_size[0]
    )
    loader = batches(accelerator, len(images), run.batch_size, run.seed)
    total_steps = run.epochs * len(loader)
    method = dict(run.method)
    model: torch.nn.Module = network
    if "merge" in method:
        settings = merging(method["merge"], total_steps)
        model = InMergeWrapper(network, seed=run.seed, **settings)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=run.lr, momentum=0.9, weight_decay=run.weight_decay
    )
    if isinstance(model, InMergeWrapper):
        model.attach(optimizer)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, run.lr, total_steps=total_steps)
    model, optimizer = accelerator.prepare(model, optimizer)
    ema = ModelEmaV3(network, decay=method["ema"], use_warmup=True) if "ema" in method else None
    loss_function = loss_of(data.task)
    augmentation = torch.Generator().manual_seed(run.seed)
    began = time.perf_counter()
    model.train()
    for _ in range(run.epochs):
        for (index,) in loader:
            pixels = augment(images[index], augmentation, flip=data.name != "digits")
            loss = loss_function(model(normalise(pixels)), labels[index])
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if ema is not None:
                ema.update(network)
    seconds = time.perf_counter() - began
    result: dict[str, Any] = {}
    if isinstance(model, InMergeWrapper):
        report = model.report()
        result["merging"] = {"drawn": report.drawn, "merged": report.merged}
        result["history"] = [asdict(entry) for entry in model.history[-len(report) :]]
        for entry in result["history"]:
            del entry["_total"]
        if method.get("recalibrate"):
            model.recalibrate(
                normalise(images[part]) for part in torch.arange(len(images)).split(500)
            )
    final = network if ema is None else ema.module
    result["test"] = evaluate(final, data, normalise, corruptions=CORRUPTIONS)
    return {"run": asdict(run), "seconds": seconds, **result, "environment": environment()}


# -- many runs -------------------------------------------------------------------------------------


def claim(path: Path, patience: float = 3600.0) -> bool:
    """Whether this process may do the run: nobody has done it, nobody is at it.

    A claim older than ``patience`` seconds was left by a process that died, and is taken over.
    """
    if path.exists():
        return False
    token = path.with_suffix(".claim")
    try:
        os.close(os.open(token, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        if time.time() - token.stat().st_mtime < patience:
            return False
        os.utime(token)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", choices=["study", "figure2", "figure3", "architectures"])
    parser.add_argument("--dataset", default="dermamnist", help="a 2D MedMNIST flag, or digits")
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="folder of npz files")
    parser.add_argument("--size", type=int, default=28, choices=[28, 64, 128, 224])
    parser.add_argument("--arch", default="resnet18", help="any timm CNN")
    parser.add_argument("--train-images", type=int, default=0, help="random subset; 0 takes all")
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.05, help="peak of the one-cycle schedule")
    parser.add_argument("--seeds", type=int, default=5, help="paired runs of each arm")
    parser.add_argument("--arms", nargs="*", default=[], help=f"of {list(ARMS)}")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    options = parser.parse_args()
    unknown = sorted(set(options.arms) - set(ARMS))
    if unknown:
        parser.error(f"unknown arms {unknown}; choose from {list(ARMS)}")

    size = 32 if options.dataset == "digits" else options.size
    common = {
        "dataset": options.dataset,
        "size": size,
        "arch": options.arch,
        "train_images": options.train_images,
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "lr": options.lr,
    }
    data = load_images(options.dataset, options.data_root, size)
    options.out.mkdir(parents=True, exist_ok=True)
    accelerator = make_accelerator()
    runs = list(sweep(options.sweep, common, options.seeds, options.arms))
    for number, run in enumerate(runs, start=1):
        path = options.out / run.file_name
        if not claim(path):
            continue
        try:
            part = data.first_labels(run.train_images, run.seed) if run.train_images else data
            result = train(run, part, accelerator)
            write_json(path, result)
        finally:
            path.with_suffix(".claim").unlink(missing_ok=True)
        clean = result["test"]["clean"]
        print(
            f"[{number}/{len(runs)}] {run.arm}, seed {run.seed}: accuracy {clean['accuracy']:.3f}, "
            f"balanced error {clean['balanced_error']:.3f} ({result['seconds']:.0f} s)",
            flush=True,
        )


if __name__ == "__main__":
    main()
