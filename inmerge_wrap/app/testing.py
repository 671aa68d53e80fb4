"""What is measured of a trained network on the test part, kept in a file."""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import dataclass, replace
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
from inmerge_wrap.app.options import MEASURED, prevalences_of
from inmerge_wrap.app.records import of_an_earlier_start
from inmerge_wrap.app.training import Data, Run
from inmerge_wrap.files import read_json, write_json
from inmerge_wrap.images.collection import ImageCollection, units_of
from inmerge_wrap.images.preparation import Recipe
from inmerge_wrap.images.sets import as_floats
from inmerge_wrap.robustness import RobustnessResult, bootstrap_weights, evaluate_robustness
from inmerge_wrap.robustness.corruptions import resolve_preset


@dataclass(frozen=True)
class Measured:
    """What takes long to find out about the network of a run."""

    training: dict[str, Any]  # its training.json
    recipe: Recipe  # with the temperature and thresholds that were chosen on validation images
    notes: list[str]  # of that choice
    result: RobustnessResult
    families: list[dict[str, Any]]  # see `findings.by_family`
    outputs: Tensor  # (N, classes) for the test images as they are

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without the replicates of the result."""
        return {
            "training": self.training,
            "recipe": self.recipe.to_dict(),
            "notes": self.notes,
            "rows": self.result.rows,
            "settings": self.result.settings,
            "families": self.families,
            "outputs": self.outputs.tolist(),
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Measured:
        """Reads what `to_dict` gave, also by way of JSON."""
        return cls(
            content["training"],
            Recipe.from_dict(content["recipe"]),
            content["notes"],
            RobustnessResult(content["rows"], content["settings"], seconds={}),
            content["families"],
            torch.tensor(content["outputs"], dtype=torch.float64),
        )


def network_of(run: Run, training: dict[str, Any], classes: int) -> nn.Module:
    """The network of a finished run, in eval mode."""
    channels = len(training["mean"])
    network = timm.create_model(training["arch"], num_classes=classes, in_chans=channels)
    weights = run.folder / "best.safetensors"
    with of_an_earlier_start(weights, remove=run.folder):
        network.load_state_dict(load_file(weights))
    return network.eval()


def test(run: Run, data: Data, options: argparse.Namespace, device: torch.device) -> Measured:
    """Measures a network, or reads what was measured of it before."""
    path, asked = run.folder / "evaluation.json", asked_of(options, data.collection)
    if path.exists() and (known := _measured_before(path, asked, data.collection)):
        return known
    classes, several = data.collection.classes, data.collection.task == "multilabel"
    with of_an_earlier_start(run.folder, remove=run.folder):
        training = read_json(run.folder / "training.json")
        recipe = Recipe(
            preparation=data.sets["test"].preparation,
            mean=tuple(map(float, training["mean"])),
            std=tuple(map(float, training["std"])),
            task=data.collection.task,
            classes=classes,
            thresholds=(0.5,) * len(classes) if several else None,
        )
        network = network_of(run, training, len(classes)).to(device)
    found = _measure(run, training, TrainedModel(network, recipe), data, options)
    write_json(path, {"asked": asked, **found.to_dict()})
    return found


def asked_of(options: argparse.Namespace, collection: ImageCollection) -> dict[str, Any]:
    """What decides what is measured: options, and whose the test images are."""
    groups = [image.group for image in collection.part("test")]
    digest = hashlib.sha256(json.dumps(groups).encode()).hexdigest()
    return {key: getattr(options, key) for key in MEASURED} | {"groups": digest}


def _measured_before(
    path: Path, asked: dict[str, Any], collection: ImageCollection
) -> Measured | None:
    """What an earlier start measured; None if other figures were asked for."""
    with of_an_earlier_start(path, remove=path):
        stored = read_json(path)
        if stored["asked"] != asked:
            return None
        found = Measured.from_dict(stored)
        shape = len(collection.part("test")), len(collection.classes)
        if found.outputs.shape != shape:
            raise ValueError(f"its outputs are not those of {shape[0]} test images")
        return found


def _measure(
    run: Run,
    training: dict[str, Any],
    model: TrainedModel,
    data: Data,
    options: argparse.Namespace,
) -> Measured:
    def loader(part: str) -> DataLoader:
        return DataLoader(
            data.sets[part], batch_size=64, num_workers=options.workers, collate_fn=as_floats
        )

    bar = tqdm(loader("val"), desc=f"{run.name}, val images", unit="batch", leave=False)
    scores = torch.cat([model.scores(pixels) for pixels, _ in bar])
    recipe, notes = operating_point(model.recipe, scores, data.sets["val"].labels)
    preset = options.preset or ("grey" if recipe.preparation.channels == 1 else "all")
    conditions = 1 + len(resolve_preset(preset)) * len(options.severities)
    total = conditions * len(data.sets["test"])
    with (
        tqdm(total=total, desc=f"{run.name}, testing", leave=False) as images,
        tqdm(total=conditions, desc=f"{run.name}, intervals", leave=False) as intervals,
    ):
        result = evaluate_robustness(
            Tempered(model.network, recipe.temperature),
            loader("test"),
            preset=preset,
            task=data.collection.task,
            normalize=model.normalised,
            severities=options.severities,
            bootstrap=options.bootstrap,
            threshold=recipe.thresholds or 0.5,
            groups=units_of(data.collection.part("test")),
            progress=images.update,
            scored=intervals.update,
        )
    return Measured(
        training=training,
        recipe=recipe,
        notes=[f"{run.name}: {note}." for note in notes],
        result=result,
        families=findings.by_family(result),
        outputs=result.logits.double() * recipe.temperature,
    )


def describe(found: Measured, data: Data, options: argparse.Namespace) -> dict[str, Any]:
    """What the outputs for the test images show."""
    recipe, labels, task = found.recipe, data.sets["test"].labels, data.collection.task
    probabilities = recipe.probabilities(found.outputs)
    before = replace(recipe, temperature=1.0).probabilities(found.outputs)
    said = recipe.named(probabilities)
    images = data.collection.part("test")
    units = units_of(images)
    draws = None
    if options.bootstrap:
        draws = torch.from_numpy(bootstrap_weights(len(labels), options.bootstrap, groups=units))
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
        "mistakes": [
            {**mistake, "image": images[mistake["index"]].name}
            for mistake in findings.worst_mistakes(probabilities, labels, said, task, limit=24)
        ],
    }
