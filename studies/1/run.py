"""Which settings of merging that stays help? Resumable sweeps over arms and paired seeds.

    python -m studies.1.run study --data-root DIR            # the arms of README.md
    python -m studies.1.run figure2 --data-root DIR          # merge weight x probability
    python -m studies.1.run figure3 --data-root DIR          # merged depth, threshold
    python -m studies.1.run architectures --data-root DIR
    python -m studies.1.run figure2 --transient ...          # the same, no merge stays
    python -m studies.1.report                               # tables

Every run writes one JSON file to ``--out``; a run that is there or in runs.jsonl.gz is not
repeated, and several processes that share the folder never do the same run twice. ``--collect``
adds the files to runs.jsonl.gz. All arms have the same budget of forward and backward passes over
the training images (studies/common/training.py).

Hardware and time: ResNet-18 at 28 px takes 4 seconds an epoch of 1,000 images on one CPU core, and
then 10 seconds for the evaluation. Expected: README.md, docs/evidence.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import nn

from inmerge_wrap import Quantile, ZScore
from inmerge_wrap.app.training import make_accelerator
from studies.common.evaluation import evaluate
from studies.common.images import Images, Normalised, load_images
from studies.common.merging import Fade, Merge
from studies.common.methods import EMA, SAM, SWA, Dropout, Ensemble, Method, Soup
from studies.common.records import name_of, raw_runs, read_runs, write_runs
from studies.common.running import one_line_if_out_of_memory
from studies.common.sweeping import sweep
from studies.common.training import Run, train

from .variants import Variant

RUNS = Path(__file__).parent / "runs.jsonl.gz"

# -- settings --------------------------------------------------------------------------------------

COSINE, HALF = Fade(decay="cosine"), Quantile(0.5)
LATE = Fade(start=0.5, decay="cosine")


def merge(fade: Fade | None = COSINE, recalibrate: bool = False, **settings: Any) -> Merge:
    """Returns the arm that merges with these arguments of InMergeWrapper, fading out."""
    return Merge(settings, fade, recalibrate=recalibrate)


ARMS: dict[str, tuple[Method, ...]] = {
    "plain": (),
    "ema .98": (EMA(0.98),),
    "swa": (SWA(0.25),),
    "dropout .3": (Dropout(rate=0.3),),
    "drop path .1": (Dropout(path_rate=0.1),),
    "sam": (SAM(0.05),),
    "soup of 3": (Soup(3),),
    "ensemble of 3": (Ensemble(3),),
    "paper": (Merge(),),
    "all, cosine": (merge(similarity_threshold=-1.0),),
    "all, a=.95, cosine": (merge(similarity_threshold=-1.0, merge_weight=0.95),),
    "all, to the end, recalibrated": (merge(None, recalibrate=True, similarity_threshold=-1.0),),
    "z > 2, cosine": (merge(similarity_threshold=ZScore(2.0)),),
    "top 10%, cosine": (merge(similarity_threshold=Quantile(0.1)),),
    "top half, cosine": (merge(similarity_threshold=HALF),),
    "nearest, top half, cosine": (merge(similarity_threshold=HALF, partner="most_similar"),),
    "top half, strength": (merge(Fade(anneals="strength"), similarity_threshold=HALF),),
    "top half, second half": (merge(LATE, similarity_threshold=HALF),),
    "top half, second half, ema .98": (merge(LATE, similarity_threshold=HALF), EMA(0.98)),
    "top half, norm kept": (merge(similarity_threshold=HALF, keep_norm=True),),
    "top half, momentum": (merge(similarity_threshold=HALF, merge_momentum=True),),
    "all, norm kept": (merge(similarity_threshold=-1.0, keep_norm=True),),
    "z > 2, norm kept": (merge(similarity_threshold=ZScore(2.0), keep_norm=True),),
    "nearest, top half, norm kept": (
        merge(similarity_threshold=HALF, partner="most_similar", keep_norm=True),
    ),
    "top half, norm kept, to the end": (merge(None, similarity_threshold=HALF, keep_norm=True),),
    "z > 2, p=1, cosine": (merge(similarity_threshold=ZScore(2.0), merge_probability=1.0),),
    "nearest, z > 3, cosine": (merge(similarity_threshold=ZScore(3.0), partner="most_similar"),),
    "unit kernels, top half, cosine": (Variant("unit"),),
    "cluster means, cosine": (Variant("clusters"),),
}


ARCHITECTURES = ("vgg_small", "resnet18", "densenet121", "efficientnet_b0", "convnext_atto")


def transient(methods: tuple[Method, ...]) -> tuple[Method, ...]:
    """Returns the same arm with every merge undone before the step."""
    return tuple(
        replace(method, settings={**method.settings, "transient": True})
        if isinstance(method, Merge)
        else method
        for method in methods
    )


def experiment(name: str, common: Mapping[str, Any], seeds: int, arms: list[str]) -> Iterator[Run]:
    """Returns the runs of one experiment, seed by seed, so that a stopped sweep stays paired."""
    for seed in range(seeds):
        if name == "study":
            for arm in arms or ARMS:
                yield Run(arm=arm, seed=seed, method=ARMS[arm], **common)
        elif name == "figure2":
            yield Run(arm="plain", seed=seed, **common)
            for weight, probability in product((0.5, 0.7, 0.8, 0.9, 0.95), (0.1, 0.3, 0.5, 1.0)):
                settings = {"merge_weight": weight, "merge_probability": probability}
                method = (merge(similarity_threshold=HALF, **settings),)
                yield Run(arm=f"a={weight}, p={probability}", seed=seed, method=method, **common)
        elif name == "figure3":
            yield Run(arm="plain", seed=seed, **common)
            for share, tau in product((0.0, 0.25, 0.5, 0.625, 0.75), (-1.0, 0.0, 0.05, 0.1, 0.3)):
                method = (merge(shallow_layers=share, similarity_threshold=tau),)
                yield Run(arm=f"L={share}, tau={tau}", seed=seed, method=method, **common)
        else:
            for arch in ARCHITECTURES:
                for arm in arms or ("plain", "paper", "top half, cosine"):
                    here = {**common, "arch": arch}
                    yield Run(arm=f"{arch}: {arm}", seed=seed, method=ARMS[arm], **here)


# -- the command ----------------------------------------------------------------------------------


def with_border(data: Images, width: int) -> Images:
    """Pads by reflection, for networks that halve the image more often than 28 px allow."""
    parts = {
        part: (F.pad(x.float(), [width] * 4, mode="reflect").byte(), labels)
        for part, (x, labels) in data.parts.items()
    }
    return replace(data, parts=parts)


def under_corruption(network: nn.Module, data: Images, normalise: Normalised) -> dict[str, Any]:
    """Evaluates the test part, clean and under four corruptions."""
    return {"test": evaluate(network, data, normalise)}


def collect(name: str, folder: Path) -> int:
    """Adds the runs of a folder to runs.jsonl.gz as a sweep; returns how many were new."""
    kept = read_runs(RUNS)
    done = {name_of(run["run"]) for run in kept if run["sweep"] == name}
    new = [run for run in raw_runs(folder) if name_of(run["run"]) not in done]
    write_runs(RUNS, [*kept, *({"sweep": name, **run} for run in new)])
    return len(new)


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "sweep", choices=["study", "figure2", "figure3", "architectures"], help="what to run"
    )
    parser.add_argument("--dataset", default="dermamnist", help="a 2D MedMNIST flag, or digits")
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="folder of npz files")
    parser.add_argument(
        "--size",
        type=int,
        choices=[28, 32, 64, 128, 224],
        help="side of the images in pixels; 32 pads those of 28 by reflection "
        "(default: 28; for architectures 32, because some of them halve the image five times)",
    )
    parser.add_argument(
        "--arch",
        help=f"any timm CNN; for architectures: {', '.join(ARCHITECTURES)} (default: resnet18)",
    )
    parser.add_argument(
        "--train-images", type=int, default=0, help="size of a random subset; 0 uses all"
    )
    parser.add_argument(
        "--test-images", type=int, default=0, help="the first so many are evaluated; 0 uses all"
    )
    parser.add_argument(
        "--epochs", type=int, default=25, help="budget of each run (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="total over all processes")
    parser.add_argument("--lr", type=float, default=0.05, help="peak of the one-cycle schedule")
    parser.add_argument("--weight-decay", type=float, default=5e-4, help="L2 penalty of SGD")
    parser.add_argument(
        "--label-noise", type=float, default=0.0, help="share of training labels drawn at random"
    )
    parser.add_argument(
        "--weights", default="", help="safetensors file to fine-tune from, without its head"
    )
    parser.add_argument(
        "--transient",
        action="store_true",
        help="merge only for the gradient, in every arm that merges; use a separate --out",
    )
    parser.add_argument("--seeds", type=int, default=5, help="paired runs of each arm")
    parser.add_argument(
        "--arms",
        nargs="*",
        default=[],
        help=f"of study and architectures: {', '.join(ARMS)} (default: all of them; plain, paper "
        "and top half)".replace("%", "%%"),
    )
    parser.add_argument("--out", type=Path, help="folder (default: runs/1/ and the sweep)")
    parser.add_argument(
        "--collect",
        action="store_true",
        help="train nothing: add the finished runs to runs.jsonl.gz",
    )
    options = parser.parse_args()
    check(options, parser)
    return options


def check(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuses options that a sweep would ignore."""
    unknown = sorted(set(options.arms) - set(ARMS))
    if unknown:
        parser.error(f"unknown arms {unknown}; choose from {list(ARMS)}")
    if options.arms and options.sweep.startswith("figure"):
        parser.error(f"{options.sweep} defines its own arms: leave out --arms")
    if options.arch and options.sweep == "architectures":
        parser.error(f"architectures runs {', '.join(ARCHITECTURES)}: leave out --arch")
    if options.size == 28 and options.sweep == "architectures":
        parser.error(
            "--size 28 is too small for architectures: leave out --size, or pass 32 or more"
        )


def main() -> None:
    options = parse()
    name = options.sweep + "-transient" * options.transient
    folder = options.out or Path("runs/1") / name
    if options.collect:
        print(f"{collect(name, folder)} new runs in {RUNS}")
        return

    accelerator = make_accelerator()
    size = options.size or (32 if options.sweep == "architectures" else 28)
    border = 2 if size == 32 and options.dataset != "digits" else 0
    with accelerator.main_process_first():  # one process downloads, the others find the file
        data = load_images(options.dataset, options.data_root, size - 2 * border)
    if border:
        data = with_border(data, border)
    if options.test_images:
        data = data.first_tests(options.test_images)
    common = {
        "dataset": options.dataset,
        "size": size,
        "arch": options.arch or "resnet18",
        "train_images": options.train_images,
        "test_images": options.test_images,
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "lr": options.lr,
        "weight_decay": options.weight_decay,
        "label_noise": options.label_noise,
        "weights": options.weights,
    }
    runs = list(experiment(options.sweep, common, options.seeds, options.arms))
    if options.transient:
        runs = [replace(run, method=transient(run.method)) for run in runs]
    done = {name_of(run["run"]) for run in read_runs(RUNS) if run["sweep"] == name}

    def carry_out(run: Run) -> dict[str, Any]:
        return train(run, data, accelerator, under_corruption)

    sweep(runs, folder, accelerator, carry_out, done)


if __name__ == "__main__":
    with one_line_if_out_of_memory():
        main()
