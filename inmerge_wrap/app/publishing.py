"""What is handed on after a training: the exported network, tables, and the report."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from tqdm import tqdm

from inmerge_wrap.app.findings import marks_of
from inmerge_wrap.app.options import title_of
from inmerge_wrap.app.records import environment
from inmerge_wrap.app.report import contact_sheet, flipped, write_report
from inmerge_wrap.app.snippet import snippet
from inmerge_wrap.app.testing import load_best, row_of, untempered
from inmerge_wrap.app.training import Run, standing
from inmerge_wrap.card import PLACE, ModelCard, results_of
from inmerge_wrap.export import export_timm
from inmerge_wrap.files import replacing, write_json
from inmerge_wrap.images.collection import PARTS, ImageCollection, spaced
from inmerge_wrap.images.files import Facts
from inmerge_wrap.images.folders import write_split
from inmerge_wrap.images.looks import look_at, seen_of
from inmerge_wrap.images.preparation import Recipe, Seen, digest_of
from inmerge_wrap.images.sets import ImageSet
from inmerge_wrap.images.tables import write_table
from inmerge_wrap.markdown import plain_text
from inmerge_wrap.robustness import RobustnessResult, paired_difference

Found = dict[str, Any]
MOST_LOOKED_AT = 1000  # training images, for what they are like


def publish(
    evaluations: Mapping[Run, Found],
    sets: Mapping[str, ImageSet],
    collection: ImageCollection,
    facts: Mapping[Path, Facts],
    options: argparse.Namespace,
) -> Path:
    """Writes everything that is handed on; returns the page to open."""
    chosen = choose(evaluations)
    found = evaluations[chosen]
    recipe = recipe_of(found, sets, collection, facts)
    call = export(chosen, found, recipe, collection, options)
    write_predictions(found, collection, options.out / "predictions.csv")
    write_split(collection, options.out / "split.csv")
    if any(len(names) > 5 for _, names in collection.lists):
        with replacing(options.out / "lists.txt") as draft:
            lists = ("\n".join([f"{title}:", *names]) for title, names in collection.lists)
            draft.write_text("\n\n".join(lists), encoding="utf-8")
    test = sets["test"]
    pictures = [test[mistake["index"]][0] for mistake in found["mistakes"]]
    content = content_of(chosen, evaluations, collection, recipe, options) | {"load": call}
    write_json(options.out / "results.json", content)
    if pictures:
        contact_sheet(pictures, options.out / "mistakes.png")
    return write_report(content, pictures, options.out / "report.html")


def choose(evaluations: Mapping[Run, Found]) -> Run:
    """Returns the run with the best epoch on validation; the test part plays no role."""

    def best(run: Run) -> tuple[float, float]:
        return max(map(standing, evaluations[run]["training"]["history"]))

    return max(evaluations, key=best)


# -- the network -----------------------------------------------------------------------------------


def recipe_of(
    found: Found,
    sets: Mapping[str, ImageSet],
    collection: ImageCollection,
    facts: Mapping[Path, Facts],
) -> Recipe:
    """How the network is used, with what its training images were like and which they were."""
    seen = [image for part in ("train", "val") for image in collection.part(part)]
    marks = marks_of(sets["train"].labels, len(collection.classes))
    return replace(
        untempered(found["training"], sets, collection),
        temperature=found["temperature"],
        thresholds=tuple(found["thresholds"]) or None,
        seen=_seen(sets["train"], facts),
        class_shares=tuple(marks.nanmean(0).nan_to_num().tolist()),
        trained_on=tuple(sorted({digest_of(image.digest) for image in seen})),
    )


def _seen(train: ImageSet, facts: Mapping[Path, Facts]) -> Seen:
    """What the training images are like: files of all of them, pixels of up to 1,000."""
    entries = [facts[image.path] for image in train.images]
    places = tqdm(
        spaced(len(train), MOST_LOOKED_AT),
        desc="looking at training images",
        unit="image",
        leave=False,
    )
    return seen_of(entries, [look_at(entries[place], train[place][0]) for place in places])


def export(
    run: Run, found: Found, recipe: Recipe, collection: ImageCollection, options: argparse.Namespace
) -> str:
    """Writes OUT/model, a timm folder with its card; returns the line that loads it."""
    training, preparation = found["training"], recipe.preparation
    counts = ", ".join(f"{len(collection.part(part)):,} {part}" for part in PARTS)
    said = plain_text(" ".join([*collection.notes, *collection.warnings]))
    name, classes = title_of(options), plain_text(", ".join(collection.classes))
    several = recipe.thresholds is not None
    aim = f"looks for {classes}, each by itself" if several else f"tells apart {classes}"
    card = ModelCard(
        title=f"{training['arch']} for {name}",
        license=options.license,
        description=f"A {training['arch']} that {aim}.",
        training_data=f"{plain_text(name)}: {counts} images. {said}",
        training=_training_of(training, options),
        task=collection.task,
        thresholds=recipe.thresholds or (),
        code=snippet(recipe, PLACE),
        results=results_of(
            RobustnessResult(found["rows"], found["settings"], found["seconds"]), dataset=name
        ),
        merging=training["merging"] or None,
        merged=bool(training["merging"]),
    )
    folder = options.out / "model"
    call = export_timm(
        load_best(run, training, len(collection.classes)),
        folder,
        input_size=(preparation.channels, preparation.size, preparation.size),
        mean=recipe.mean,
        std=recipe.std,
        crop_mode=preparation.crop_mode,
        label_names=collection.classes,
        card=card,
    )
    recipe.write(folder)
    return call


def _training_of(training: Mapping[str, Any], options: argparse.Namespace) -> str:
    """How the network was trained, in a sentence."""
    parts = [
        f"{options.epochs} epochs of AdamW from weights {options.weights!r}",
        f"learning rate {options.lr:g} with warm-up and cosine decay",
        "TrivialAugment",
    ]
    if options.flip != "none":
        parts.append(f"flips ({options.flip})")
    if options.class_balanced:
        parts.append("classes balanced")
    if options.ema:
        parts.append(f"average of the weights with decay {options.ema:g}")
    return f"{', '.join(parts)}; epoch {training['best_epoch']} was best on validation."


# -- tables ----------------------------------------------------------------------------------------


def write_predictions(found: Found, collection: ImageCollection, path: Path) -> None:
    """One row for each test image: its name, its truth, the answer, and all probabilities."""
    several, classes = collection.task == "multilabel", collection.classes
    truths = [f"true {name}" for name in classes] if several else ["true"]
    rows = []
    for image, said, row in zip(
        collection.part("test"), found["said"], found["probabilities"], strict=True
    ):
        named = "; ".join(name for name, is_so in zip(classes, said, strict=True) if is_so)
        figures = [round(value, 7) for value in row]
        rows.append([image.name, *collection.cells(image), named, *figures])
    write_table(path, ["image", *truths, "prediction", *classes], rows)


# -- the report's content --------------------------------------------------------------------------


def content_of(
    chosen: Run,
    evaluations: Mapping[Run, Found],
    collection: ImageCollection,
    recipe: Recipe,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """All that the report says, as plain data."""
    found = evaluations[chosen]
    images = collection.part("test")
    kept = ("rows", "families", "classes", "confusion", "calibration", "subgroups", "units")
    return {
        "title": title_of(options),
        "date": time.strftime("%Y-%m-%d"),
        "task": collection.task,
        "classes": list(collection.classes),
        "counts": {part: collection.counts(collection.part(part)) for part in PARTS},
        "images": {part: len(collection.part(part)) for part in PARTS},
        "groups": len({image.group for image in collection.images if image.group is not None}),
        "notes": list(collection.notes),
        "warnings": [*collection.warnings, *found["notes"]],
        "preparation": recipe.preparation.to_dict(),
        "chosen": chosen.name,
        "method": chosen.method,
        "test": {key: found[key] for key in (*kept, "thresholds", "temperature")}
        | {
            "severities": found["settings"]["severities"],
            "mistakes": [
                {**mistake, "image": images[mistake["index"]].name} for mistake in found["mistakes"]
            ],
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
    }


def compare(evaluations: Mapping[Run, Found]) -> list[dict[str, Any]]:
    """Merged minus plain, paired over the seeds; empty without both."""
    methods = ("plain", "merged")
    if {run.method for run in evaluations} != set(methods):
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
                for run, found in evaluations.items()
                if run.method == method
                and (value := figure(row_of(found, condition), metric)) is not None
            ]
            for method in methods
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


def figure(row: Mapping[str, Any], metric: str) -> float | None:
    """A figure of a row, None where it is undefined; rows hold the balanced error."""
    if metric == "balanced_accuracy":
        return flipped(row.get("balanced_error"))
    return row.get(metric)
