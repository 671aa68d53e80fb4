"""What is handed on after a training: the exported network, tables, and the report."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Any

from inmerge_wrap.app.findings import marks_of
from inmerge_wrap.app.model import TrainedModel
from inmerge_wrap.app.predicting import class_columns
from inmerge_wrap.app.records import environment, of_an_earlier_start
from inmerge_wrap.app.report import contact_sheet, flipped, write_report
from inmerge_wrap.app.snippet import snippet
from inmerge_wrap.app.testing import Measured, describe, network_of
from inmerge_wrap.app.training import Data, Run, standing
from inmerge_wrap.card import PLACE, UNEXAMINED, ModelCard, results_of
from inmerge_wrap.files import replacing, write_json
from inmerge_wrap.images.collection import PARTS, ImageCollection
from inmerge_wrap.images.files import SHOWN, counted
from inmerge_wrap.images.folders import write_split
from inmerge_wrap.images.looks import look_at, seen_of
from inmerge_wrap.images.preparation import Recipe, digest_of
from inmerge_wrap.images.tables import write_table
from inmerge_wrap.markdown import plain_text
from inmerge_wrap.robustness import paired_difference


def publish(measured: Mapping[Run, Measured], data: Data, options: argparse.Namespace) -> Path:
    """Writes everything that is handed on; returns the page to open."""
    # The run with the best epoch on validation: the test part plays no role.
    chosen = max(measured, key=lambda run: max(map(standing, measured[run].training["history"])))
    found, collection, out = measured[chosen], data.collection, options.out
    with of_an_earlier_start(chosen.folder, remove=chosen.folder):
        network = network_of(chosen, found.training, len(collection.classes))
    model = TrainedModel(network, _described(found.recipe, data))
    for name in ("lists.txt", "mistakes.png"):  # of an earlier start, where none is written now
        (out / name).unlink(missing_ok=True)
    call = model.write(out / "model", _card(found, model.recipe, collection, options))
    _write_predictions(found, collection, out / "predictions.csv")
    write_split(collection, out / "split.csv")
    if any(len(names) > SHOWN for _, names in collection.lists):
        with replacing(out / "lists.txt") as draft:
            lists = ("\n".join([f"{title}:", *names]) for title, names in collection.lists)
            draft.write_text("\n\n".join(lists), encoding="utf-8")
    content = _content_of(chosen, measured, data, options) | {"load": call}
    test = data.sets["test"]
    pictures = [test[mistake["index"]][0] for mistake in content["test"]["mistakes"]]
    write_json(out / "results.json", content)
    if pictures:
        contact_sheet(pictures, out / "mistakes.png")
    return write_report(content, pictures, out / "report.html")


# -- the network -----------------------------------------------------------------------------------


def _described(recipe: Recipe, data: Data) -> Recipe:
    """The recipe, with what the training images were like and which they were."""
    train, val = data.sets["train"], data.sets["val"]
    looks = [
        look_at(image.facts, pixels)
        for image, pixels in train.sample(1000, "looking at training images")
    ]
    marks = marks_of(train.labels, len(data.collection.classes))
    return replace(
        recipe,
        seen=seen_of([image.facts for image in train.images], looks),
        class_shares=tuple(marks.nanmean(0).nan_to_num().tolist()),
        trained_on=tuple(sorted({digest_of(i.digest) for i in (*train.images, *val.images)})),
    )


def _card(
    found: Measured, recipe: Recipe, collection: ImageCollection, options: argparse.Namespace
) -> ModelCard:
    training = found.training
    counts = ", ".join(f"{len(collection.part(part)):,} {part}" for part in PARTS)
    said = plain_text(" ".join([*collection.notes, *collection.warnings]))
    name, classes = options.title, plain_text(", ".join(collection.classes))
    several = recipe.thresholds is not None
    aim = f"looks for {classes}, each by itself" if several else f"tells apart {classes}"
    limits = list(ModelCard.limits)
    if options.subgroups:
        columns = plain_text(", ".join(options.subgroups))
        only = f"Groups of patients were compared by {columns} alone: see report.html."
        limits[limits.index(UNEXAMINED)] = only
    return ModelCard(
        title=f"{training['arch']} for {name}",
        license=options.license,
        license_name=options.license_name,
        description=f"A {training['arch']} that {aim}.",
        training_data=f"{plain_text(name)}: {counts} images. {said}",
        training=_training_of(training, options),
        task=collection.task,
        thresholds=recipe.thresholds or (),
        code=snippet(recipe, PLACE),
        limits=limits,
        results=results_of(found.result, dataset=name),
        merging=training["merging"] or None,
        merged=bool(training["merging"]),
    )


def _training_of(training: Mapping[str, Any], options: argparse.Namespace) -> str:
    """How the network was trained, in a sentence."""
    parts = [
        f"{counted(options.epochs, 'epoch')} of AdamW from weights {options.weights!r}",
        f"learning rate {options.lr:g} with warm-up and cosine decay",
        "TrivialAugment" if options.augment == "trivial" else "no TrivialAugment",
        f"flips ({options.flip})" if options.flip != "none" else "",
        "classes balanced" if options.class_balanced else "",
        f"average of the weights with decay {options.ema:g}" if options.ema else "",
    ]
    done = ", ".join(part for part in parts if part)
    return f"{done}; epoch {training['best_epoch']} was best on validation."


# -- tables ----------------------------------------------------------------------------------------


def _write_predictions(found: Measured, collection: ImageCollection, path: Path) -> None:
    """One row for each test image: its name, its truth, the answer, and all probabilities."""
    several, classes = collection.task == "multilabel", collection.classes
    others = ["image", *([f"true {name}" for name in classes] if several else ["true"])]
    others += ["prediction"]
    probabilities = found.recipe.probabilities(found.outputs)
    answers = zip(found.recipe.named(probabilities), probabilities.tolist(), strict=True)
    rows = []
    for image, (said, row) in zip(collection.part("test"), answers, strict=True):
        named = "; ".join(name for name, is_so in zip(classes, said, strict=True) if is_so)
        figures = [round(value, 7) for value in row]
        rows.append([image.name, *collection.cells(image), named, *figures])
    write_table(path, [*others, *class_columns(classes, others)], rows)


# -- the report's content --------------------------------------------------------------------------


def _content_of(
    chosen: Run, measured: Mapping[Run, Measured], data: Data, options: argparse.Namespace
) -> dict[str, Any]:
    """All that the report says, as plain data."""
    found, collection = measured[chosen], data.collection
    return {
        "title": options.title,
        "date": time.strftime("%Y-%m-%d"),
        "task": collection.task,
        "classes": list(collection.classes),
        "counts": {part: collection.counts(collection.part(part)) for part in PARTS},
        "images": {part: len(collection.part(part)) for part in PARTS},
        "groups": len({image.group for image in collection.images if image.group is not None}),
        "notes": list(collection.notes),
        "warnings": [*collection.warnings, *found.notes],
        "preparation": asdict(found.recipe.preparation),
        "chosen": chosen.name,
        "method": chosen.method,
        "test": {
            "rows": found.result.rows,
            "families": found.families,
            "severities": found.result.settings["severities"],
            "temperature": found.recipe.temperature,
            "thresholds": list(found.recipe.thresholds or ()),
            **describe(found, data, options),
        },
        "runs": [
            {
                "name": run.name,
                **{key: each.training[key] for key in ("method", "seed", "best_epoch")},
                "history": each.training["history"],
                "clean": each.result.row("clean"),
                "corrupted": each.result.row("all"),
                "merging": each.training["merging"],
            }
            for run, each in measured.items()
        ],
        "differences": _compare(measured),
        "parameters": found.training["parameters"],
        "arch": found.training["arch"],
        "settings": {key: str(value) for key, value in vars(options).items()},
        "environment": environment(),
    }


def _compare(measured: Mapping[Run, Measured]) -> list[dict[str, Any]]:
    """Merged minus plain, paired over the seeds; empty without both."""
    differences = []
    for metric, condition in (
        ("balanced_accuracy", "clean"),
        ("auroc", "clean"),
        ("ece", "clean"),
        ("balanced_accuracy", "all"),
    ):
        plain, merged = (
            [
                _figure(found.result.row(condition), metric)
                for run, found in measured.items()
                if run.method == method
            ]
            for method in ("plain", "merged")
        )
        if plain and merged and None not in (*plain, *merged):
            means = {"plain": mean(plain), "merged": mean(merged)}
            difference = paired_difference(merged, plain)
            differences.append({"metric": metric, "on": condition, **means, **difference})
    return differences


def _figure(row: Mapping[str, Any], metric: str) -> Any:
    """A figure of a row, None where it is undefined; rows hold the balanced error."""
    if metric == "balanced_accuracy":
        return flipped(row.get("balanced_error"))
    return row.get(metric)
