"""The third study: for whom does merging per image help? protocol.md says what is asked.

    python -m studies.3.run lengths --data-root DIR   # of plain training, by augmentation
    python -m studies.3.run rates --data-root DIR     # at the lengths chosen
    python -m studies.3.run arms --data-root DIR      # all arms, BloodMNIST, 600 images
    python -m studies.3.run map --data-root DIR       # augmentation x images x plain and merging
    python -m studies.3.run freeze                    # then commit frozen-flips.json, -trivial.json
    python -m studies.3.run confirm --data-root DIR --chest-root NIH --laboratories wbc_labs.npz
    python -m studies.3.run collect                   # adds finished runs to runs.jsonl.gz

Every run writes one JSON file to ``--out``, and the logits of the test images beside it. A run that
is there or in ``runs.jsonl.gz`` is not repeated: the same command continues a stopped sweep, and
several processes may share the folder. Options narrow a sweep: ``--arms plain "channel noise"``.

Hardware and time: one thread; EfficientNet-lite0 takes .25 s a step of 32 images at 64 px on an
idle core, and a minute for the full exam. See README.md for the hours of each command.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from inmerge_wrap.app.training import make_accelerator
from studies.common.chest import load_chest
from studies.common.contributions import contributions
from studies.common.exams import Exam, answers, make_exam, scored
from studies.common.freezing import check_frozen, freeze
from studies.common.images import Images, Normalised, load_images
from studies.common.laboratories import in_laboratories, read_laboratories
from studies.common.mechanism import mechanism
from studies.common.networks import DEPTH
from studies.common.records import add_runs, name_of, read_runs
from studies.common.running import one_line_if_out_of_memory
from studies.common.sweeping import sweep
from studies.common.training import Run, train

from .arms import (
    ARMS,
    CHOOSING,
    CONFIRMING,
    FIRST_CONFIRMING_SEED,
    IMAGES,
    LENGTHS,
    LITE0,
    RATES,
    TRAINING,
    VOLUMES,
    Cell,
    Length,
    frozen_content,
    run_of,
    runs_of,
)

HERE = Path(__file__).parent
RUNS = HERE / "runs.jsonl.gz"
FEW, ALL = (3,), (1, 3, 5)  # severities: for choices, and for the confirmation


def frozen(augmentation: str) -> Path:
    """Returns the freeze file of an augmentation, whose training is chosen by itself."""
    return HERE / f"frozen-{augmentation}.json"


def planned(options: argparse.Namespace) -> list[Run]:
    """Returns the runs of a command, narrowed by the options, the most valuable first."""
    if options.lr is not None and options.command != "confirm":
        raise SystemExit("--lr: only confirm has it; rates are compared by the command rates")
    if options.command == "confirm":
        first = FIRST_CONFIRMING_SEED if options.first_seed is None else options.first_seed
        if first < FIRST_CONFIRMING_SEED:
            raise SystemExit(f"--first-seed: the confirmation has {FIRST_CONFIRMING_SEED} or more")
        seeds = range(first, first + (options.seeds or 20))
        archs = options.archs or [LITE0]
        cells = [
            cell
            for cell in CONFIRMING
            if cell.arch in archs
            and cell.dataset in (options.datasets or [cell.dataset])
            and cell.augmentation in (options.augmentations or [cell.augmentation])
        ]
        runs = runs_of(cells, options.arms or list(ARMS), seeds)
        return [run if options.lr is None else replace(run, lr=options.lr) for run in runs]
    defaults = {
        "lengths": (CHOOSING[:1], [600], list(TRAINING), ["plain"], 2),
        "rates": (CHOOSING[:1], [600], list(TRAINING), ["plain"], 2),
        "arms": (CHOOSING[:1], [600], ["flips", "trivial"], list(ARMS), 5),
        "map": (CHOOSING, IMAGES, list(TRAINING), ["plain", "merging per image"], 5),
    }
    datasets, images, augmentations, arms, count = defaults[options.command]
    cells = [
        Cell(dataset, number, augmentation, arch)
        for dataset, number, augmentation, arch in product(
            options.datasets or datasets,
            options.images or images,
            options.augmentations or augmentations,
            options.archs or [LITE0],
        )
    ]
    first = options.first_seed or 0
    seeds = range(first, first + (options.seeds or count))
    if options.command == "lengths":
        compared = [Length(steps) for steps in options.steps or LENGTHS]
        trials = [(cell, length) for length in compared for cell in cells]
    elif options.command == "rates":
        trials = [(c, replace(TRAINING[c.augmentation], lr=lr)) for lr in RATES for c in cells]
    else:
        return list(runs_of(cells, options.arms or arms, seeds))
    return [run_of(cell, "plain", seed, length) for seed in seeds for cell, length in trials]


def load(dataset: str, options: argparse.Namespace) -> Images:
    """Loads 28 px images, enlarged to 64 as in the second study; grey ones three times."""
    if dataset == "chest":
        return load_chest(options.chest_root, 64).in_colour()
    if dataset == VOLUMES:
        return load_images("bloodmnist", options.data_root, 28).stacked(DEPTH, seed=0)
    return load_images(dataset, options.data_root, 28).resized(64).in_colour()


def exams_of(data: Images, severities: tuple[int, ...]) -> dict[str, Exam]:
    """Returns the exams: validation at middle severity, test at the severities given."""
    return {
        "validation": make_exam(data, "val", 250, (3,)),
        "test": make_exam(data, "test", 400, severities),
    }


def measured(
    run: Run,
    exams: dict[str, Exam],
    options: argparse.Namespace,
    network: nn.Module,
    data: Images,
    normalise: Normalised,
) -> dict[str, Any]:
    """Returns scores, contributions of the test images and the mechanism; keeps the logits."""
    logits, exam = answers(network, exams, normalise), exams["test"]
    path = options.out / "logits" / f"{name_of(run.to_dict())}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **{k: x.half().numpy() for k, x in logits["test"].items()})
    found = scored(logits, exams, data.task)
    part = exams["validation"]
    pair = (part.pixels[name] for name in ("clean", "gaussian_noise/3"))
    found["mechanism"] = mechanism(network, *(normalise(pixels) for pixels in pair))
    found["contributions"] = contributions(logits["test"], exam.labels, exam.weights, data.task)
    if options.command == "confirm" and run.dataset == "bloodmnist":
        laboratories = read_laboratories(options.laboratories, run.size)
        found["laboratories"] = in_laboratories(network, laboratories, normalise)
    return found


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = ["lengths", "rates", "arms", "map", "freeze", "confirm", "collect"]
    parser.add_argument("command", choices=commands, help="what to run, see above")
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="folder of npz files")
    parser.add_argument("--chest-root", type=Path, default=Path("data-nih"), help="an NIH release")
    parser.add_argument(
        "--laboratories", type=Path, default=Path("data/wbc_labs.npz"), help="for confirm"
    )
    parser.add_argument("--datasets", nargs="+", help=f"MedMNIST flags, chest, or {VOLUMES!r}")
    parser.add_argument("--images", nargs="+", type=int, help="training images, 0 for all")
    parser.add_argument("--augmentations", nargs="+", choices=list(TRAINING))
    parser.add_argument("--archs", nargs="+", help=f"networks (default: {LITE0})")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS))
    parser.add_argument("--steps", nargs="+", type=int, help="of lengths: which to compare")
    parser.add_argument(
        "--lr", type=float, help="of confirm: a rate tried afterwards (default: the frozen one)"
    )
    parser.add_argument("--seeds", type=int, help="paired runs of each arm")
    parser.add_argument(
        "--first-seed",
        type=int,
        help=f"(default: 0; of confirm {FIRST_CONFIRMING_SEED}, which it cannot go below)",
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of a run (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/3"), help="folder (default: %(default)s)"
    )
    return parser.parse_args(arguments)


def main(options: argparse.Namespace) -> None:
    confirmable = {cell.augmentation for cell in CONFIRMING}
    confirmed = sorted(options.augmentations or confirmable)
    if options.command in ("freeze", "confirm") and not confirmable.issuperset(confirmed):
        raise SystemExit(f"--augmentations: the confirmation has {', '.join(sorted(confirmable))}")
    if options.command == "freeze":
        for augmentation in confirmed:
            freeze(frozen_content(augmentation), frozen(augmentation))
            print(f"Written: {frozen(augmentation)}. Commit it before the confirmation runs.")
        return
    if options.command == "collect":
        print(f"{add_runs(RUNS, options.out)} new runs in {RUNS}")
        return
    if options.command == "confirm":
        for augmentation in confirmed:
            check_frozen(frozen_content(augmentation), frozen(augmentation))
    torch.set_num_threads(options.threads)
    severities = ALL if options.command == "confirm" else FEW

    @cache
    def prepared(dataset: str) -> tuple[Images, dict[str, Exam]]:
        data = load(dataset, options)
        exams = exams_of(data, severities)
        return replace(data, parts={"train": data.parts["train"]}), exams

    accelerator = make_accelerator()

    def carry_out(run: Run) -> dict[str, Any]:
        data, exams = prepared(run.dataset)
        return train(run, data, accelerator, partial(measured, run, exams, options))

    runs = planned(options)
    if not runs:
        raise SystemExit("no run of this command matches --datasets, --archs and --arms")
    done = {name_of(run["run"]) for run in read_runs(RUNS)}
    sweep(runs, options.out, accelerator, carry_out, done)


if __name__ == "__main__":
    with one_line_if_out_of_memory():
        main(parse())
