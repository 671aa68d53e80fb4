"""Training on one's own images: reads and checks them, trains, tests, and writes the report."""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout
from torch import nn
from tqdm import tqdm

from inmerge_wrap.app.batches import open_batches
from inmerge_wrap.app.options import FREE, parse_arguments, planned_runs, precision, prevalences_of
from inmerge_wrap.app.publishing import publish
from inmerge_wrap.app.records import of_an_earlier_start
from inmerge_wrap.app.report import flipped
from inmerge_wrap.app.starting_weights import start_network
from inmerge_wrap.app.testing import test
from inmerge_wrap.app.training import Data, Run, make_accelerator, one_line_if_out_of_memory, train
from inmerge_wrap.errors import ArgumentError, for_command_line
from inmerge_wrap.files import read_json, replacing, write_json
from inmerge_wrap.images.collection import PARTS, ImageCollection
from inmerge_wrap.images.files import SHOWN, DataError, named
from inmerge_wrap.images.finding import find_images
from inmerge_wrap.images.folders import open_images
from inmerge_wrap.images.sets import ImageSet, keep_pixels
from inmerge_wrap.images.tables import write_table
from inmerge_wrap.robustness.corruptions import resolve_preset
from inmerge_wrap.wrapper import InMergeWrapper


def main(
    arguments: Sequence[str] | None = None,
    *,
    program: str = "accelerate launch recipes/own_images.py",
) -> None:
    """Trains and reports as the command line says."""
    options = parse_arguments(arguments, program)
    accelerator = make_accelerator(mixed_precision=precision(options.mixed_precision))
    try:
        alone = _alone_in(options.out) if accelerator.is_main_process else nullcontext()
        with one_line_if_out_of_memory(), alone:
            if options.site:
                train_each_site(options, accelerator)
            else:
                train_and_report(options, accelerator, memory=options.out / "files.json")
    except ArgumentError as error:
        raise SystemExit(_with_list(error, options.out)) from None


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Holds a folder for one process; a second start with the same folder is refused."""
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise SystemExit(
            f"another process is training into {folder}: wait until it has ended, or give another "
            "--out"
        ) from None
    except OSError as error:
        raise SystemExit(
            f"--out {folder} is no folder that can be written ({error.strerror}): give another one"
        ) from error
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _with_list(error: ArgumentError, folder: Path) -> str:
    """The message, and a file with all names where the message shows only the first."""
    text = for_command_line(error, {"shares": "--split"})
    if not isinstance(error, DataError) or len(error.names) <= SHOWN:
        return f"error: {text}"
    path = folder / "lists.txt"
    with replacing(path) as draft:
        draft.write_text("\n".join([text, "", *error.names, ""]), encoding="utf-8")
    return f"error: {text}\nAll {len(error.names):,} names are in {path}"


# -- one site after the other ----------------------------------------------------------------------


def train_each_site(options: argparse.Namespace, accelerator: Accelerator) -> None:
    """Trains once for each site, which is the test part then; writes OUT/sites.csv."""
    column, *wanted = options.site
    found = find_images(
        options.data_dir,
        table=options.csv,
        labels=options.labels or ["label"],
        path_column=options.path_column or "path",
        marks=[column],
    )
    sites = sorted({image.mark(column) for image in found.images} - {""})
    unknown = [site for site in wanted if site not in sites]
    if unknown:
        raise DataError(f"<site={column} {' '.join(unknown)}>: there are {', '.join(sites)}")
    chosen = list(dict.fromkeys(wanted)) or sites
    _refuse_sites_that_alone_show_a_class(found, column, chosen)
    rows = []
    for site in chosen:
        accelerator.print(f"== held out: {column} {site}")
        each = copy.copy(options)
        each.out, each.site = options.out / folder_name(site), [column, site]
        train_and_report(each, accelerator, memory=options.out / "files.json")
        if accelerator.is_main_process:
            rows += _site_rows(site, each.out)
    if accelerator.is_main_process:
        head = ["site", "run", "test images", "balanced accuracy", "low", "high", "auroc"]
        write_table(options.out / "sites.csv", head, rows)
        print(f"Each site, when it was held out: {options.out / 'sites.csv'}")


def _refuse_sites_that_alone_show_a_class(
    found: ImageCollection, column: str, sites: Sequence[str]
) -> None:
    """Before the first site is trained for hours, what would stop a later one."""
    for site in sites:
        counts = found.counts(image for image in found.images if image.mark(column) != site)
        if gone := [name for name, count in zip(found.classes, counts, strict=True) if not count]:
            raise DataError(
                f"<site={column} {site}>: without it there is no image of {named(gone)} to train "
                f"on; hold other sites out, by their names after {column}"
            )


def folder_name(site: str) -> str:
    """A site as a folder: its letters and digits, and a digest where others were dropped."""
    plain = re.sub(r"[^\w.-]+", "-", site).strip(".-")
    digest = hashlib.sha256(site.encode()).hexdigest()[:6]
    return plain if plain == site else f"{plain}-{digest}"


def _site_rows(site: str, folder: Path) -> list[list[Any]]:
    content = read_json(folder / "results.json")
    rows = []
    for run in content["runs"]:
        errors = [run["clean"].get(f"balanced_error{end}") for end in ("", "_high", "_low")]
        figures = [*map(flipped, errors), run["clean"].get("auroc")]
        rounded = [None if value is None else round(value, 7) for value in figures]
        rows.append([site, run["name"], content["images"]["test"], *rounded])
    return rows


# -- one training ----------------------------------------------------------------------------------


def train_and_report(options: argparse.Namespace, accelerator: Accelerator, memory: Path) -> None:
    """Reads, trains, tests and writes the report."""
    runs = planned_runs(options)
    with accelerator.main_process_first():
        check_network(runs, options, accelerator.num_processes)
        data = read_data(options, runs, memory)
    collection = data.collection
    prevalences_of(options, collection.classes)
    for note in collection.notes:
        accelerator.print(f"note: {note}")
    for warning in collection.warnings:
        accelerator.print(f"warning: {warning}")
    if accelerator.is_main_process:
        begin_or_continue(runs, collection, options, accelerator.num_processes)
    accelerator.wait_for_everyone()

    per_epoch = len(open_batches(data.sets, options, 0, accelerator))
    bar = tqdm(
        total=len(runs) * options.epochs * per_epoch,
        unit="batch",
        disable=not accelerator.is_main_process,
    )
    with bar:
        for run in runs:
            if (run.folder / "training.json").exists():
                bar.update(bar.total // len(runs))
            else:
                train(run, data, options, accelerator, bar)
    if not accelerator.is_main_process:
        return
    found = {run: test(run, data, options, accelerator.device) for run in runs}
    page = publish(found, data, options)
    shutil.rmtree(options.out / "cache", ignore_errors=True)
    for run, each in found.items():
        error = each.result.value("balanced_error")
        if error is not None:
            print(f"{run.name}: balanced accuracy {1 - error:.3f} on the test part")
    print(f"The report: {page}\nThe network, for plain timm: {options.out / 'model'}")


def check_network(runs: list[Run], options: argparse.Namespace, processes: int) -> None:
    """Gets the weights, tries a forward pass and, for merging, the plan before images are read."""
    network, _, _ = start_network(
        options.arch, options.weights, num_classes=2, channels=options.channels or 3
    )
    config: Any = network.pretrained_cfg
    arch, each = config["architecture"], options.batch_size // processes
    if reason := _failure_of(network, options, min(2, max(1, each))):
        own, remedy = config["input_size"][-1], "pass another --arch"
        if own != options.size:
            remedy += f", or --size {own}, for which it was made"
        if each < 2 and _failure_of(network, options, 2) is None:
            remedy = "pass a --batch-size of at least 2 for each process"
        raise SystemExit(
            f"--arch {arch} cannot be trained with --size {options.size} and --batch-size "
            f"{options.batch_size} ({reason}): {remedy}"
        )
    if any(run.method == "merged" for run in runs):
        try:
            InMergeWrapper.recommended(network, total_steps=1)
        except ValueError as error:
            raise SystemExit(
                f"--arch {arch}: {error}. Or train it without merging: --only plain"
            ) from error


def _failure_of(network: nn.Module, options: argparse.Namespace, images: int) -> str | None:
    """Why a forward pass of training fails, in a line; None if it works."""
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            network.train()(torch.zeros(images, options.channels or 3, *2 * [options.size]))
    except Exception as error:  # networks raise all sorts of things
        return " ".join(str(error).split())[:200]
    return None


def read_data(options: argparse.Namespace, runs: list[Run], memory: Path) -> Data:
    """Reads and checks the images, and decodes them once unless nothing is left to train."""
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
        site=tuple(options.site) if options.site else None,
        subgroups=options.subgroups,
        shares=dict(zip(PARTS, options.split, strict=True)) if options.split else None,
        split_seed=options.split_seed,
        skip_broken=options.skip_broken,
        allow_overlap=options.allow_overlap,
        workers=options.workers,
        memory=memory,
    )
    asked = resolve_preset(options.preset) if options.preset is not None else ()
    coloured = [each.name for each in asked if each.rgb_only]
    if coloured and preparation.channels == 1:
        raise SystemExit(
            f"--preset {options.preset} needs colours ({coloured[0]}), and the images are grey: "
            "choose grey or quick, or --channels 3"
        )
    sets = {part: ImageSet(collection.part(part), preparation) for part in PARTS}
    finished = all((run.folder / "evaluation.json").exists() for run in runs)
    if not (options.no_cache or finished):
        key = hashlib.sha256(
            json.dumps([collection.fingerprint, asdict(preparation)]).encode()
        ).hexdigest()[:12]
        for part, images in sets.items():
            path = options.out / "cache" / f"{part}-{key}.npy"
            sets[part] = keep_pixels(images, path, workers=options.workers)
    return Data(collection, sets)


def begin_or_continue(
    runs: list[Run], collection: ImageCollection, options: argparse.Namespace, processes: int
) -> None:
    """Notes each run's settings in its folder, or holds those that are there against them."""
    settings = {key: value for key, value in vars(options).items() if key not in FREE} | {
        "split_seed": options.split_seed or 0,
        "images": collection.fingerprint,
        "processes": processes,
    }
    settings = json.loads(json.dumps(settings, default=str))
    for run in runs:
        path = run.folder / "settings.json"
        if not path.exists():
            write_json(path, settings)
            continue
        with of_an_earlier_start(path, remove=run.folder):
            before = read_json(path)
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
