"""The command line of training on one's own images."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path

import timm
import torch

from inmerge_wrap.app.training import Run
from inmerge_wrap.card import ModelCard
from inmerge_wrap.errors import ArgumentError, at_least, for_command_line
from inmerge_wrap.images.collection import PARTS, check_shares
from inmerge_wrap.images.finding import canonical
from inmerge_wrap.images.preparation import Preparation
from inmerge_wrap.robustness.corruptions import resolve_preset

DESCRIPTION = """\
Trains a classifier on a folder of your own images, and writes a report that you can share.

    %(prog)s --data-dir DIR --arch resnet18 \\
        --weights none --size 224 --epochs 20 --out runs/mine

DIR holds train|val|test/CLASS/*, or CLASS/*, which is then split; or --csv FILE names the path and
the label of each image. Images are PNG, JPEG, TIFF, BMP or DICOM, grey or colour, of 8 or 16 bits
and any size. Trains pairs of networks from the same seed, without and with in-model merging (--only
merged trains the merged ones alone), all with TrivialAugment unless you pass --augment none, and
writes

    OUT/report.html      one file, opens offline
    OUT/model/           the best network on validation
    OUT/results.json     every figure of the report
    OUT/predictions.csv  every test image
    OUT/split.csv        the part of each image

After an interruption the same command continues from the last complete epoch; on a CPU the weights
are then the same, bit for bit.

The progress bar shows the time that is left. How well it works depends on your images; the report
says how certain each figure is.
"""


class _Help(argparse.HelpFormatter):
    """Fills the paragraphs of the description to the terminal; indented ones stay as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        parts = text.rstrip().split("\n\n")
        fill = super()._fill_text
        return "\n\n".join(
            part if part.startswith("    ") else fill(part, width, indent) for part in parts
        )


parser = argparse.ArgumentParser(
    description=DESCRIPTION, usage="%(prog)s --data-dir DIR [OPTIONS]", formatter_class=_Help
)
group = parser.add_argument_group("images")
add = group.add_argument
add("--data-dir", type=Path, required=True, help="holds train|val|test/CLASS/*, or CLASS/*")
add("--csv", type=Path, help="table with the columns path and label, and optionally group and part")
add(
    "--labels",
    nargs="+",
    metavar="COLUMN",
    help="the table's column of class names (default: label), or several columns that hold 0, 1 or "
    "nothing (unknown), which make a multi-label task",
)
add("--path-column", help="the table's column of paths, relative to --data-dir (default: path)")
add(
    "--groups",
    help="which patient an image shows, so that all images of a patient stay in one part: a column "
    "of the table, or a regular expression to find in the path, such as '(patient\\d+)'",
)
add(
    "--site",
    nargs="+",
    metavar=("COLUMN", "NAME"),
    help="hold a whole site out as the test part: each site in turn, or only those that are named; "
    "a column or an expression as for --groups",
)
add(
    "--split",
    type=float,
    nargs=3,
    metavar=("TRAIN", "VAL", "TEST"),
    help="shares of the parts, if the data are not split (default: 0.7 0.15 0.15)",
)
add(
    "--split-seed",
    type=int,
    help="seed of the split, the same for all runs (default: 0)",
)
add("--skip-broken", action="store_true", help="leave out files that cannot be read")
add("--allow-overlap", action="store_true", help="train although parts share images or groups")
add("--size", type=int, default=224, help="side of the images in pixels (default: %(default)s)")
add(
    "--channels",
    type=int,
    choices=(1, 3),
    help="channels of the network's input; if unset, 3 if any image shows colours, else 1",
)
add(
    "--crop-mode",
    default="squash",
    choices=("squash", "center"),
    help="for images that are not square: squash keeps the whole image, center keeps its "
    "proportions (default: %(default)s)",
)
add(
    "--pixel-range",
    type=float,
    nargs=2,
    metavar=("BLACK", "WHITE"),
    help="values of black and white in images of more than 8 bits, found if unset; replaces the "
    "windows of DICOM files",
)
add("--no-cache", action="store_true", help="decode images in every epoch, not once onto the disk")
add(
    "--workers",
    type=at_least(0),
    default=min(4, (os.cpu_count() or 1) - 1),
    help="processes that read images; they do not change the weights (default here: %(default)s)",
)

group = parser.add_argument_group("training")
add = group.add_argument
add("--arch", help="any timm CNN (default: resnet18)")
add(
    "--weights",
    default="imagenet",
    metavar="W",
    help="imagenet (timm's weights for --arch), a timm name, a file, efficientnet-lite0 (from a "
    "package), or none (default: %(default)s)",
)
add("--epochs", type=at_least(1), default=20, help="epochs of each run (default: %(default)s)")
add("--batch-size", type=at_least(1), default=32, help="over all processes (default: %(default)s)")
add(
    "--lr",
    type=float,
    default=5e-4,
    help="learning rate of AdamW, after one epoch of warm-up (default: %(default)s)",
)
add("--weight-decay", type=float, default=0.05, help="of AdamW (default: %(default)s)")
add(
    "--ema",
    type=float,
    default=0.998,
    help="decay of the averaged weights (EMA); 0 for none (default: %(default)s)",
)
add(
    "--augment",
    default="trivial",
    choices=("trivial", "none"),
    help="trivial: TrivialAugment, which changes colours and geometry at random (default); none "
    "where the finding lies in these",
)
add(
    "--flip",
    default="none",
    choices=("none", "horizontal", "both"),
    help="mirror images at random; not by default, because left and right may matter",
)
add("--class-balanced", action="store_true", help="rare classes weigh as much as common ones")
add(
    "--mixed-precision",
    default="auto",
    choices=("auto", "no", "fp16", "bf16"),
    help="auto: on a GPU bf16 if it supports it, else fp16; on a CPU no",
)
add(
    "--seeds",
    type=at_least(1),
    default=1,
    help="number of pairs; with --only, of runs (default: 1)",
)
add("--only", choices=("plain", "merged"), help="train plain or merged networks instead of pairs")

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
    help="severities of the corruptions, 1 to 5 (default: 3)",
)
add(
    "--bootstrap",
    type=at_least(0),
    default=1000,
    help="resamples for the intervals; 0 for none (default: %(default)s)",
)
add(
    "--subgroups",
    nargs="+",
    default=[],
    metavar="COLUMN",
    help="report results by sex, view, scanner: columns or expressions as for --groups",
)
add(
    "--prevalence",
    nargs="+",
    default=[],
    metavar="[CLASS=]P",
    help="also report predictive values for this share of patients with the finding, such as 0.02",
)
add("--title", help="title of the report (default: the name of the folder)")
add(
    "--license",
    default="unknown",
    help="licence of the weights, for the model card (default: %(default)s)",
)
add("--license-name", help="name of the licence, with --license other")
add("--out", type=Path, default=Path("runs/own_images"), help="folder (default: %(default)s)")

MEASURED = ("preset", "severities", "bootstrap")  # what decides what is measured of a network
# What may differ when a run is continued: none of it changes the weights, and the images
# themselves are compared.
FREE = {*MEASURED, "subgroups", "prevalence", "title", "license", "license_name", "seeds", "only"}
FREE |= {"out", "workers", "no_cache", "data_dir", "csv", "skip_broken", "allow_overlap"}


def parse_arguments(arguments: Sequence[str] | None, program: str) -> argparse.Namespace:
    """The command line; what is out of range is refused before hours of training, not after."""
    parser.prog = program
    options = parser.parse_args(arguments)
    options.severities = sorted(set(options.severities))
    if not 0 < options.lr < math.inf:
        parser.error(f"--lr must be above 0, got {options.lr:g}")
    if not 0 <= options.weight_decay < math.inf:
        parser.error(f"--weight-decay must be at least 0, got {options.weight_decay:g}")
    if not 0 <= options.ema < 1:
        parser.error(f"--ema must lie in [0, 1), got {options.ema:g}")
    inside = options.out.resolve().is_relative_to(options.data_dir.resolve())
    if options.csv is None and inside:
        parser.error(
            f"--out {options.out} lies in --data-dir {options.data_dir}, whose folders are "
            "classes: choose a folder elsewhere"
        )
    if options.csv is None and (options.labels or options.path_column):
        parser.error("--labels and --path-column name columns of a table: give --csv FILE")
    if options.arch is not None and not timm.is_model(options.arch):
        parser.error(f"--arch {options.arch} is no model of timm")
    if options.license_name is not None and options.license != "other":
        parser.error(f"--license-name {options.license_name}: give --license other, too")
    options.title = (options.title or "").strip() or options.data_dir.resolve().name
    if not options.title:
        parser.error(f"--data-dir {options.data_dir} has no name for the report: give a --title")
    try:
        Preparation(options.size, options.channels or 3, pixel_range=options.pixel_range)
        if options.split is not None:
            check_shares(dict(zip(PARTS, options.split, strict=True)))
        prevalences_of(options, ())
        if options.preset is not None:
            resolve_preset(options.preset)
        licence = {name: getattr(options, name) for name in ("license", "license_name")}
        ModelCard(title=options.title, training_data="own images", **licence)
    except ValueError as error:
        parser.error(for_command_line(error, {"shares": "--split"}))
    return options


def prevalences_of(options: argparse.Namespace, classes: Sequence[str]) -> list[float | None]:
    """The prevalence that the reader gave of each class, None where there is none."""
    found: dict[str, float] = {}
    for text in options.prevalence:
        name, _, share = canonical(text).rpartition("=")
        try:
            found[name] = float(share)
        except ValueError:
            found[name] = -1.0
        if not 0 < found[name] < 1:
            raise ArgumentError(
                f"--prevalence {text}: give a share between 0 and 1, or CLASS=SHARE"
            )
        if name and classes and name not in classes:
            raise ArgumentError(f"--prevalence {text}: the classes are {', '.join(classes)}")
    return [found.get(name, found.get("")) for name in classes]


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
