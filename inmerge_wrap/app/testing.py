"""All that is measured of one trained network on the test part, kept in a file."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from inmerge_wrap.app import findings
from inmerge_wrap.app.model import Tempered, TrainedModel
from inmerge_wrap.app.operating import operating_point
from inmerge_wrap.app.options import ASKED, prevalences_of
from inmerge_wrap.app.records import of_an_earlier_start
from inmerge_wrap.app.training import Data, Run
from inmerge_wrap.files import read_json, write_json
from inmerge_wrap.images.collection import ImageCollection, units_of
from inmerge_wrap.images.preparation import Recipe
from inmerge_wrap.images.sets import as_floats
from inmerge_wrap.robustness import RobustnessResult, bootstrap_weights, evaluate_robustness
from inmerge_wrap.robustness.corruptions import resolve_preset


def best_of(run: Run, training: dict[str, Any], data: Data) -> TrainedModel:
    """The network of a finished run, before its temperature and thresholds are chosen."""
    classes, several = data.collection.classes, data.collection.task == "multilabel"
    mean, std = (tuple(map(float, training[name])) for name in ("mean", "std"))
    network = timm.create_model(training["arch"], num_classes=len(classes), in_chans=len(mean))
    weights = run.folder / "best.safetensors"
    with of_an_earlier_start(weights, remove=run.folder):
        network.load_state_dict(load_file(weights))
    recipe = Recipe(
        preparation=data.sets["test"].preparation,
        mean=mean,
        std=std,
        task="multi-label" if several else "multi-class",
        classes=classes,
        thresholds=(0.5,) * len(classes) if several else None,
    )
    return TrainedModel(network.eval(), recipe)


# The names that `test` writes: an evaluation.json that lacks one is damaged, or of another version.
NAMES = {"asked", "training", "temperature", "thresholds", "notes", "rows", "settings", "seconds"}
NAMES |= {"families", "classes", "subgroups", "units", "confusion", "calibration", "mistakes"}
NAMES |= {"probabilities", "said"}


def test(run: Run, data: Data, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Measures a network, or reads what was measured of it before."""
    path, collection = run.folder / "evaluation.json", data.collection
    asked = asked_of(options, collection)
    if path.exists() and (stored := _measured_before(path, asked, collection)):
        return stored
    with of_an_earlier_start(run.folder, remove=run.folder):
        training = read_json(run.folder / "training.json")
        model = best_of(run, training, data)
        model.network.to(device)

    def loader(part: str) -> DataLoader:
        return DataLoader(
            data.sets[part], batch_size=64, num_workers=options.workers, collate_fn=as_floats
        )

    def scores(part: str) -> Tensor:
        bar = tqdm(loader(part), desc=f"{run.name}, {part} images", unit="batch", leave=False)
        return torch.cat([model.scores(pixels) for pixels, _ in bar])

    recipe, notes = operating_point(model.recipe, scores("val"), data.sets["val"].labels)
    units = units_of(collection.part("test"))
    result = _evaluated(
        run.name,
        Tempered(model.network, recipe.temperature),
        loader("test"),
        preset=options.preset or ("grey" if recipe.preparation.channels == 1 else "all"),
        task=collection.task,
        normalize=model.normalised,
        severities=options.severities,
        bootstrap=options.bootstrap,
        threshold=recipe.thresholds or 0.5,
        groups=units,
    )
    found = {
        "asked": asked,
        "training": training,
        "temperature": recipe.temperature,
        "thresholds": list(recipe.thresholds or []),
        "notes": [f"{run.name}: {note}." for note in notes],
        "rows": result.rows,
        "settings": result.settings,
        "seconds": result.seconds,
        "families": findings.by_family(result),
        **_about(recipe, scores("test"), units, data, options),
    }
    write_json(path, found)
    return found


def asked_of(options: argparse.Namespace, collection: ImageCollection) -> dict[str, Any]:
    """What decides the figures of a network: options, and what is known of the test images."""
    about = [[image.group, image.marks] for image in collection.part("test")]
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()
    return {key: getattr(options, key) for key in ASKED} | {"about": digest}


def _evaluated(
    name: str, network: nn.Module, loader: DataLoader, **settings: Any
) -> RobustnessResult:
    """`evaluate_robustness`, with one bar for the images and one for the intervals."""
    conditions = 1 + len(resolve_preset(settings["preset"])) * len(settings["severities"])
    total = conditions * len(loader.dataset)  # type: ignore[arg-type]
    with (
        tqdm(total=total, desc=f"{name}, testing", leave=False) as images,
        tqdm(total=conditions, desc=f"{name}, intervals", leave=False) as intervals,
    ):
        return evaluate_robustness(
            network, loader, progress=images.update, scored=intervals.update, **settings
        )


def _measured_before(
    path: Path, asked: dict[str, Any], collection: ImageCollection
) -> dict[str, Any] | None:
    """What an earlier start measured; None if other figures were asked for."""
    with of_an_earlier_start(path, remove=path):
        stored = read_json(path)
        if stored["asked"] != asked:
            return None
        if missing := NAMES - stored.keys():
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        shape = [len(collection.classes)] * len(collection.part("test"))
        for name in ("probabilities", "said"):
            if [len(row) for row in stored[name]] != shape:
                raise ValueError(f"its {name} are not those of {len(shape)} test images")
        return stored


def _about(
    recipe: Recipe,
    outputs: Tensor,
    units: list[str] | None,
    data: Data,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """What the probabilities of the test images show."""
    task, labels = data.collection.task, data.sets["test"].labels
    probabilities = recipe.probabilities(outputs)
    before = replace(recipe, temperature=1.0).probabilities(outputs)
    said = recipe.named(probabilities)
    draws = None
    if options.bootstrap:
        draws = torch.from_numpy(bootstrap_weights(len(labels), options.bootstrap, groups=units))
    images = data.collection.part("test")
    marks = {name: [image.mark(name) for image in images] for name in options.subgroups}
    return {
        "classes": findings.class_table(
            probabilities,
            labels,
            said,
            recipe,
            draws=draws,
            units=units,
            prevalences=prevalences_of(options, recipe.classes),
        ),
        "subgroups": findings.subgroup_table(probabilities, labels, recipe, marks, draws, units),
        "units": len(set(units)) if units is not None else None,
        "confusion": findings.confusion(probabilities, labels) if task == "multiclass" else None,
        "calibration": {
            "before": findings.calibration(before, labels, task),
            "after": findings.calibration(probabilities, labels, task),
        },
        "mistakes": findings.worst_mistakes(probabilities, labels, said, task, limit=24),
        "probabilities": probabilities.tolist(),
        "said": said.tolist(),
    }


def row_of(found: Mapping[str, Any], corruption: str) -> dict[str, Any]:
    """The row of a condition, of several severities their mean."""
    return [row for row in found["rows"] if row["corruption"] == corruption][-1]
