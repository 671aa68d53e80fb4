"""A classifier for a folder of your own images, and a report on it that you can hand on.

    accelerate launch recipes/own_images.py --data-dir DIR --arch resnet18 --weights none \
        --size 224 --epochs 20 --out runs/mine

DIR holds `train|val|test/CLASS/*`, or `CLASS/*`, which is then split; or `--csv FILE` names path
and label of each image. PNG, JPEG, TIFF and DICOM, 8 or 16 bit, grey or colour, any size. Trains
plainly and with in-model merging in pairs of seeds (`--only merged` trains that alone), and writes

    OUT/report.html       what to read, and to hand to a colleague: one file, opens offline
    OUT/model/            the network that was best on validation, for plain timm, with its card
    OUT/results.json      every figure of the report; predictions.csv: every test image
    OUT/split.csv         which image stood in which part

The same command continues after a kill from the last whole epoch, on a CPU to the same bits.

Hardware and time: any CPU or GPU; 1,000 images of 224 px take a resnet18 about two minutes an epoch
on one CPU core. Expected: depends on your images; the report says how sure each figure is.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import timm
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from inmerge_wrap.app.findings import (
    by_family,
    chosen_thresholds,
    class_table,
    confusion,
    probabilities_of,
    reliability,
    worst_mistakes,
)
from inmerge_wrap.app.records import environment
from inmerge_wrap.app.report import contact_sheet, write_report
from inmerge_wrap.app.starting_weights import start_network
from inmerge_wrap.app.training import (
    Normalise,
    Run,
    make_accelerator,
    one_line_if_out_of_memory,
    standing,
    train,
)
from inmerge_wrap.card import ModelCard, results_of
from inmerge_wrap.export import export_timm
from inmerge_wrap.files import replacing, write_json
from inmerge_wrap.images.collection import PARTS, ImageCollection
from inmerge_wrap.images.files import DataError
from inmerge_wrap.images.folders import ImageSet, keep_pixels, open_images, write_split
from inmerge_wrap.images.preparation import Preparation
from inmerge_wrap.robustness import (
    RobustnessResult,
    evaluate_robustness,
    paired_difference,
)
from inmerge_wrap.robustness.corruptions import PRESETS, resolve_preset
from inmerge_wrap.wrapper import InMergeWrapper

# -- settings --------------------------------------------------------------------------------------

parser = argparse.ArgumentParser(
    prog="own_images.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
group = parser.add_argument_group("images")
add = group.add_argument
add("--data-dir", type=Path, required=True, help="holds train|val|test/CLASS/*, or CLASS/*")
add("--csv", type=Path, help="table with the columns path, label, and if wanted group and part")
add(
    "--labels",
    nargs="+",
    metavar="COLUMN",
    help="its column of class names (default: label); or several columns of 0, 1 and nothing for "
    "unknown, which make a multi-label task",
)
add("--path-column", help="its column of paths, relative to --data-dir (default: path)")
add(
    "--groups",
    help="whose image it is, so that a patient's images stay in one part: a column of the table, "
    "or a regular expression that is found in the path, such as '(patient\\d+)'",
)
add(
    "--split",
    type=float,
    nargs=3,
    metavar=("TRAIN", "VAL", "TEST"),
    help="shares of the parts, where the data have none (default: .7 .15 .15)",
)
add("--split-seed", type=int, default=0, help="of the split; the same for all runs")
add("--skip-broken", action="store_true", help="leave out files that cannot be read")
add("--allow-overlap", action="store_true", help="train although parts share images or groups")
add("--size", type=int, default=224, help="side in pixels (default: %(default)s)")
add("--channels", type=int, choices=(1, 3), help="3 if any image shows colours, if unset")
add(
    "--crop-mode",
    default="squash",
    choices=("squash", "center"),
    help="of images that are not square squash keeps everything, center the proportions "
    "(default: %(default)s)",
)
add(
    "--pixel-range",
    type=float,
    nargs=2,
    metavar=("BLACK", "WHITE"),
    help="of images of more than 8 bits; found if unset. Replaces the windows of DICOM files",
)
add("--no-cache", action="store_true", help="decode in every epoch instead of once onto the disk")
add(
    "--workers",
    type=int,
    default=min(4, (os.cpu_count() or 1) - 1),
    help="processes that read (default here: %(default)s)",
)

group = parser.add_argument_group("training")
add = group.add_argument
add("--arch", help="any timm CNN (default: resnet18)")
add(
    "--weights",
    default="imagenet",
    metavar="W",
    help="imagenet: timm's for --arch; a timm name; a file; efficientnet-lite0, from a package; or "
    "none (default: %(default)s)",
)
add("--epochs", type=int, default=20, help="(default: %(default)s)")
add("--batch-size", type=int, default=32, help="over all processes (default: %(default)s)")
add("--lr", type=float, default=5e-4, help="of AdamW, after a first epoch of warm-up")
add("--weight-decay", type=float, default=0.05, help="(default: %(default)s)")
add("--ema", type=float, default=0.998, help="decay of the average of the weights; 0 for none")
add(
    "--flip",
    default="none",
    choices=("none", "horizontal", "both"),
    help="mirror images at random; not by default, for left and right may matter",
)
add("--class-balanced", action="store_true", help="rare classes weigh as much as common ones")
add(
    "--mixed-precision",
    default="auto",
    choices=("auto", "no", "fp16", "bf16"),
    help="auto: on a GPU, bf16 where it has it",
)
add("--seeds", type=int, default=1, help="how many runs, or pairs of runs (default: 1)")
add("--only", choices=("plain", "merged"), help="train one of the two instead of pairs")

group = parser.add_argument_group("results")
add = group.add_argument
add(
    "--preset",
    help="corruptions of the test images: a modality such as chest_xray, blood or dermatoscopy, or "
    "quick; all that fit the images if unset",
)
add(
    "--severities",
    type=int,
    nargs="+",
    default=[3],
    choices=range(1, 6),
    metavar="S",
    help="of the corruptions, 1 to 5 (default: 3)",
)
add("--bootstrap", type=int, default=1000, help="resamples for the intervals; 0 for none")
add("--title", help="of the report (default: the name of the folder)")
add("--license", default="unknown", help="of the weights, for the model card")
add("--out", type=Path, default=Path("runs/own_images"), help="folder (default: %(default)s)")

# What may differ when a run is continued: none of it changes the weights, and the images
# themselves are compared.
FREE = {"out", "workers", "no_cache", "preset", "severities", "bootstrap", "title", "license"}
FREE |= {"seeds", "only", "data_dir", "csv", "skip_broken", "allow_overlap"}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; what is out of range is refused before hours of training, not after."""
    options = parser.parse_args(arguments)
    for name, least in (("epochs", 1), ("seeds", 1), ("batch_size", 1), ("workers", 0)):
        value = getattr(options, name)
        if value < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if options.bootstrap < 0 or not options.lr > 0 or options.weight_decay < 0:
        parser.error("--bootstrap and --weight-decay must not be negative, and --lr positive")
    if not 0 <= options.ema < 1:
        parser.error(f"--ema must lie in [0, 1), got {options.ema:g}")
    if options.csv is None and (options.labels or options.path_column):
        parser.error("--labels and --path-column name columns of a table: give --csv FILE")
    if options.arch is not None and not timm.is_model(options.arch):
        parser.error(f"--arch {options.arch} is no model of timm")
    try:
        if options.preset is not None:
            resolve_preset(options.preset)
        ModelCard(title=title_of(options), license=options.license, training_data="own images")
    except ValueError as error:
        parser.error(f"{error} (presets: {', '.join(PRESETS)})" if options.preset else str(error))
    return options


def planned_runs(options: argparse.Namespace) -> list[Run]:
    """Pairs of runs, seed by seed, or the half of them that is asked for."""
    methods = [options.only] if options.only else ["plain", "merged"]
    return [
        Run(method, seed, options.out / "runs" / f"{method}-{seed}")
        for seed in range(options.seeds)
        for method in methods
    ]


def precision(choice: str) -> str:
    """bf16 where a GPU computes with it, fp16 on older ones, and float32 on anything else."""
    if choice != "auto":
        return choice
    if not torch.cuda.is_available():
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


# -- data ------------------------------------------------------------------------------------------


def read_data(
    options: argparse.Namespace,
) -> tuple[ImageCollection, Preparation, dict[str, ImageSet]]:
    """The images, how they are read, and the set of each part."""
    collection, preparation = open_images(
        options.data_dir,
        size=options.size,
        channels=options.channels,
        crop_mode=options.crop_mode,
        pixel_range=tuple(options.pixel_range) if options.pixel_range else None,
        table=options.csv,
        labels=options.labels or ["label"],
        path_column=options.path_column or "path",
        groups=options.groups,
        shares=dict(zip(PARTS, options.split, strict=True)) if options.split else None,
        seed=options.split_seed,
        skip_broken=options.skip_broken,
        allow_overlap=options.allow_overlap,
        workers=options.workers,
        memory=options.out / "files.json",
    )
    sets = {part: ImageSet(collection.part(part), preparation) for part in PARTS}
    finished = all((run.folder / "evaluation.json").exists() for run in planned_runs(options))
    if not (options.no_cache or finished):
        key = hashlib.sha256(
            json.dumps([collection.fingerprint, preparation.to_dict()]).encode()
        ).hexdigest()[:12]
        for part, images in sets.items():
            path = options.out / "cache" / f"{part}-{key}.npy"
            sets[part] = keep_pixels(images, path, workers=options.workers)
    return collection, preparation, sets


def begin_or_continue(
    runs: list[Run], collection: ImageCollection, options: argparse.Namespace, processes: int
) -> None:
    """Notes each run's settings in its folder, or holds those that are there against them.

    Raises:
        SystemExit: If a run was begun with other settings or other images.
    """
    settings = {key: value for key, value in vars(options).items() if key not in FREE} | {
        "images": collection.fingerprint,
        "processes": processes,
    }
    settings = json.loads(json.dumps(settings, default=str))
    for run in runs:
        path = run.folder / "settings.json"
        if not path.exists():
            write_json(path, settings)
            continue
        before = json.loads(path.read_text())
        differing = [
            f"{key} {before.get(key)}, not {value}"
            for key, value in settings.items()
            if before.get(key) != value
        ]
        if differing:
            raise SystemExit(
                f"{run.folder} was begun with {'; '.join(differing)}. "
                "Give another --out, or remove the folder"
            )


def check_network(
    runs: list[Run],
    collection: ImageCollection,
    preparation: Preparation,
    options: argparse.Namespace,
) -> None:
    """Gets the weights and, for merging, the plan once, so that no run fails for them later."""
    network, _, _ = start_network(
        options.arch,
        options.weights,
        num_classes=len(collection.classes),
        channels=preparation.channels,
    )
    if any(run.method == "merged" for run in runs):
        try:
            InMergeWrapper.recommended(network, total_steps=1)
        except ValueError as error:
            raise SystemExit(f"--arch {options.arch}: {error}") from error


# -- evaluation ------------------------------------------------------------------------------------


def load_best(run: Run, training: dict[str, Any], classes: int) -> nn.Module:
    """The network of a finished run, in eval mode."""
    network = timm.create_model(
        training["arch"], num_classes=classes, in_chans=len(training["mean"])
    )
    network.load_state_dict(load_file(run.folder / "best.safetensors"))
    return network.eval()


def as_floats(batch: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Collates items of an ImageSet for corruptions, which act on floats in [0, 1]."""
    pixels, labels = zip(*batch, strict=True)
    return torch.stack(pixels).float() / 255, torch.stack(labels)


def evaluate(
    run: Run,
    sets: dict[str, ImageSet],
    collection: ImageCollection,
    options: argparse.Namespace,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """All that is measured of one run on the test part; kept in a file and not measured twice."""
    path = run.folder / "evaluation.json"
    asked = {key: getattr(options, key) for key in ("preset", "severities", "bootstrap")}
    if path.exists():
        stored = json.loads(path.read_text())
        if stored["asked"] == asked:
            return stored
    training = json.loads((run.folder / "training.json").read_text())
    network = load_best(run, training, len(collection.classes)).to(accelerator.device)
    normalise = Normalise(training["mean"], training["std"], accelerator.device)
    task, resamples = collection.task, options.bootstrap

    def read(part: str) -> tuple[Tensor, Tensor]:
        loader = DataLoader(
            sets[part], batch_size=64, num_workers=options.workers, collate_fn=as_floats
        )
        outputs, truths = [], []
        with torch.no_grad():
            for pixels, labels in loader:
                outputs.append(network(normalise(pixels.to(accelerator.device))).float().cpu())
                truths.append(labels)
        return probabilities_of(torch.cat(outputs), task), torch.cat(truths)

    thresholds: list[float] = []
    if task == "multilabel":
        thresholds = chosen_thresholds(*read("val"))
    loader = DataLoader(
        sets["test"], batch_size=64, num_workers=options.workers, collate_fn=as_floats
    )
    grey = sets["test"].preparation.channels == 1
    result = evaluate_robustness(
        network,
        tqdm(loader, desc=f"{run.name}, testing", unit="batch"),
        preset=options.preset or ("grey" if grey else "all"),
        task=task,
        normalize=normalise,
        severities=sorted(options.severities),
        bootstrap=resamples,
        threshold=thresholds or 0.5,
    )
    probabilities, labels = read("test")
    found = {
        "asked": asked,
        "training": training,
        "rows": result.rows,
        "settings": result.settings,
        "seconds": result.seconds,
        "families": by_family(result),
        "thresholds": thresholds,
        "classes": class_table(
            probabilities, labels, collection.classes, task, thresholds, resamples=resamples
        ),
        "confusion": confusion(probabilities, labels) if task == "multiclass" else None,
        "reliability": reliability(probabilities, labels, task),
        "mistakes": worst_mistakes(probabilities, labels, task, thresholds, limit=24),
        "probabilities": probabilities.float().tolist(),
    }
    write_json(path, found)
    return found


def compare(evaluations: dict[Run, dict[str, Any]]) -> list[dict[str, Any]]:
    """Merged minus plain, paired over the seeds; empty without both."""
    by_method: dict[str, list[dict[str, Any]]] = {}
    for run, found in evaluations.items():
        by_method.setdefault(run.method, []).append(found)
    if len(by_method) < 2:
        return []
    differences = []
    for metric, condition in (
        ("balanced_accuracy", "clean"),
        ("auroc", "clean"),
        ("ece", "clean"),
        ("balanced_accuracy", "all"),
    ):
        plain, merged = (
            [
                value
                for found in by_method[method]
                if (value := figure(row_of(found, condition), metric)) is not None
            ]
            for method in ("plain", "merged")
        )
        if len(plain) + len(merged) < len(evaluations):
            continue
        differences.append(
            {
                "metric": metric,
                "on": condition,
                "plain": mean(plain),
                "merged": mean(merged),
                **paired_difference(merged, plain),
            }
        )
    return differences


def figure(row: dict[str, Any], metric: str) -> float | None:
    """A figure of a row, None where it is undefined; rows hold the balanced error."""
    if metric != "balanced_accuracy":
        return row.get(metric)
    return 1 - row["balanced_error"] if "balanced_error" in row else None


def row_of(found: dict[str, Any], corruption: str) -> dict[str, Any]:
    """The row of a condition, of several severities their mean."""
    return [row for row in found["rows"] if row["corruption"] == corruption][-1]


def choose(evaluations: dict[Run, dict[str, Any]]) -> Run:
    """Returns the run with the best epoch on validation; the test part plays no role."""

    def best(run: Run) -> tuple[float, float]:
        return max(map(standing, evaluations[run]["training"]["history"]))

    return max(evaluations, key=best)


# -- what is handed on -----------------------------------------------------------------------------


def export(
    run: Run,
    found: dict[str, Any],
    collection: ImageCollection,
    preparation: Preparation,
    options: argparse.Namespace,
) -> str:
    """Writes OUT/model, a timm folder with its card; returns the line that loads it."""
    training = found["training"]
    counts = ", ".join(f"{len(collection.part(part)):,} {part}" for part in PARTS)
    deep = preparation.pixel_range
    ranges = (
        f" Pixels of more than 8 bits are scaled first, from {deep[0]:g} (black) to {deep[1]:g} "
        "(white)."
        if deep
        else ""
    )
    said = " ".join([*collection.notes, *collection.warnings])
    name = title_of(options)
    merging = training["merging"]
    card = ModelCard(
        title=f"{training['arch']} for {name}",
        license=options.license,
        description=f"A {training['arch']} that tells apart {', '.join(collection.classes)}"
        + (", trained with in-model merging." if merging else "."),
        training_data=f"{name}: {counts} images. {said}{ranges}",
        training=f"{options.epochs} epochs of AdamW from weights {options.weights!r}, learning "
        f"rate {options.lr:g} with warm-up and cosine decay, TrivialAugment, average of the "
        f"weights with decay {options.ema:g}; epoch {training['best_epoch']} was best on "
        "validation.",
        results=results_of(
            RobustnessResult(found["rows"], found["settings"], found["seconds"]), dataset=name
        ),
        merging=merging or None,
    )
    folder = options.out / "model"
    call = export_timm(
        load_best(run, training, len(collection.classes)),
        folder,
        input_size=(preparation.channels, preparation.size, preparation.size),
        mean=training["mean"],
        std=training["std"],
        crop_mode=preparation.crop_mode,
        label_names=collection.classes,
        card=card,
    )
    write_json(folder / "preparation.json", preparation.to_dict())
    return call


def title_of(options: argparse.Namespace) -> str:
    """What the images are called."""
    return options.title or options.data_dir.resolve().name


def write_predictions(found: dict[str, Any], collection: ImageCollection, path: Path) -> None:
    """One row for each test image: its name, its label and the probability of each class."""
    several = collection.task == "multilabel"
    truths = [f"true {name}" for name in collection.classes] if several else ["true", "said"]
    with replacing(path) as draft, open(draft, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", *truths, *collection.classes])
        for image, row in zip(collection.part("test"), found["probabilities"], strict=True):
            if isinstance(image.label, int):
                said = collection.classes[max(range(len(row)), key=row.__getitem__)]
                truth: list[Any] = [collection.classes[image.label], said]
            else:
                truth = ["" if value != value else int(value) for value in image.label]
            writer.writerow([image.name, *truth, *(f"{value:.5f}" for value in row)])


def report(
    evaluations: dict[Run, dict[str, Any]],
    sets: dict[str, ImageSet],
    collection: ImageCollection,
    preparation: Preparation,
    options: argparse.Namespace,
) -> Path:
    """Writes everything that is handed on; returns the page to open."""
    chosen = choose(evaluations)
    found = evaluations[chosen]
    call = export(chosen, found, collection, preparation, options)
    write_predictions(found, collection, options.out / "predictions.csv")
    write_split(collection, options.out / "split.csv")
    test = sets["test"]
    pictures = [test[mistake["index"]][0] for mistake in found["mistakes"]]
    names = [test.images[mistake["index"]].name for mistake in found["mistakes"]]
    mistakes = [
        {**mistake, "image": name} for mistake, name in zip(found["mistakes"], names, strict=True)
    ]
    content = {
        "title": title_of(options),
        "date": time.strftime("%Y-%m-%d"),
        "task": collection.task,
        "classes": list(collection.classes),
        "counts": {part: collection.counts(collection.part(part)) for part in PARTS},
        "images": {part: len(collection.part(part)) for part in PARTS},
        "groups": len({image.group for image in collection.images if image.group is not None}),
        "notes": list(collection.notes),
        "warnings": list(collection.warnings),
        "preparation": preparation.to_dict(),
        "chosen": chosen.name,
        "method": chosen.method,
        "test": {
            **{key: found[key] for key in ("rows", "families", "classes", "confusion")},
            **{key: found[key] for key in ("reliability", "thresholds")},
            "severities": found["settings"]["severities"],
            "mistakes": mistakes,
        },
        "runs": [
            {
                "name": run.name,
                **{key: each["training"][key] for key in ("method", "seed", "best_epoch")},
                "history": each["training"]["history"],
                "clean": row_of(each, "clean"),
                "corrupted": row_of(each, "all"),
                "merging": each["training"]["merging"],
            }
            for run, each in evaluations.items()
        ],
        "differences": compare(evaluations),
        "parameters": found["training"]["parameters"],
        "arch": found["training"]["arch"],
        "settings": {key: str(value) for key, value in vars(options).items()},
        "environment": environment(),
        "load": call,
    }
    write_json(options.out / "results.json", content)
    if pictures:
        contact_sheet(pictures, options.out / "mistakes.png")
    return write_report(content, pictures, options.out / "report.html")


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains and reports as the command line says.

    Args:
        arguments: Of the command line; those of the process if None.

    Raises:
        SystemExit: With one line that names a remedy, if anything is wrong.
    """
    with one_line_if_out_of_memory():
        train_and_report(parse_arguments(arguments))


def train_and_report(options: argparse.Namespace) -> None:
    """Reads, trains, evaluates and writes the report."""
    accelerator = make_accelerator(mixed_precision=precision(options.mixed_precision))
    try:
        with accelerator.main_process_first():
            collection, preparation, sets = read_data(options)
    except DataError as error:
        raise SystemExit(f"error: {error}") from None
    for note in collection.notes:
        accelerator.print(f"note: {note}")
    for warning in collection.warnings:
        accelerator.print(f"warning: {warning}")

    runs = planned_runs(options)
    check_network(runs, collection, preparation, options)
    if accelerator.is_main_process:
        begin_or_continue(runs, collection, options, accelerator.num_processes)
    accelerator.wait_for_everyone()
    batch = min(options.batch_size, len(sets["train"]))
    bar = tqdm(
        total=len(runs) * options.epochs * (len(sets["train"]) // batch),
        unit="step",
        disable=not accelerator.is_main_process,
    )
    with bar:
        for run in runs:
            if (run.folder / "training.json").exists():
                bar.update(bar.total // len(runs))
            else:
                train(run, sets, collection, options, accelerator, bar)
    if not accelerator.is_main_process:
        return

    evaluations = {run: evaluate(run, sets, collection, options, accelerator) for run in runs}
    page = report(evaluations, sets, collection, preparation, options)
    shutil.rmtree(options.out / "cache", ignore_errors=True)
    print(f"The report: {page}\nThe network, for plain timm: {options.out / 'model'}")
