"""Small trained folders and images for the tests of predicting and adapting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image

from inmerge_wrap.app.model import TrainedModel
from inmerge_wrap.app.snippet import snippet
from inmerge_wrap.card import PLACE, CardResult, ModelCard
from inmerge_wrap.images.files import examine
from inmerge_wrap.images.looks import look_at, seen_of
from inmerge_wrap.images.preparation import Preparation, Recipe
from tests.images.test_folders import dicom

SIZE = 32


def pictures(folder: Path, form: str, count: int = 12, *, seed: int = 0, high: int = 4096) -> None:
    """Random images of a form, of different sizes and of a brightness that grows."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    for index in range(count):
        shape = (40 + index, 60)
        top = (index + 4) / (count + 4)
        if form in ("png8", "multilabel"):
            values = generator.integers(0, int(255 * top), (*shape, 3), dtype=np.uint8)
            Image.fromarray(values).save(folder / f"{index:02}.png")
            continue
        values = generator.integers(0, int(high * top), shape).astype(np.uint16)
        if form == "png16":
            Image.fromarray(values).save(folder / f"{index:02}.png")
        else:
            tags: dict[str, Any] = {
                "RescaleSlope": 2,
                "RescaleIntercept": -1000,
                "PhotometricInterpretation": f"MONOCHROME{1 + index % 2}",
            }
            if form == "dicom without windows":
                del tags["RescaleIntercept"]  # so that the slope alone counts for nothing
            if form == "dicom" and index % 3:
                tags |= {"WindowCenter": [900, 40], "WindowWidth": [4000, 400]}
            dicom(folder / f"{index:02}.dcm", values, BitsStored=12, HighBit=11, **tags)


def recipe_for(folder: Path, form: str) -> Recipe:
    """What a training on the images of a folder would write."""
    colour = form in ("png8", "multilabel")
    preparation = Preparation(
        size=SIZE,
        channels=3 if colour else 1,
        pixel_range=(0.0, 4095.0) if form == "png16" else None,
    )
    paths = sorted(folder.iterdir())
    facts = [examine(path) for path in paths]
    looks = [look_at(e, preparation(path)) for e, path in zip(facts, paths, strict=True)]
    several = form == "multilabel"
    return Recipe(
        preparation=preparation,
        mean=(0.4,) * preparation.channels,
        std=(0.2,) * preparation.channels,
        task="multilabel" if several else "multiclass",
        classes=("a", "b", "c"),
        temperature=1.7,
        thresholds=(0.45, 0.5, 0.55) if several else None,
        seen=seen_of(facts, looks),
        class_shares=(0.2, 0.3, 0.5),
    )


def trained(folder: Path, form: str, images: Path, arch: str = "test_resnet") -> TrainedModel:
    """Writes the folder of a network that has run on a folder's images."""
    recipe = recipe_for(images, form)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = timm.create_model(arch, num_classes=3, in_chans=recipe.preparation.channels)
        model = TrainedModel(network, recipe)
        pixels = [recipe.preparation(path) for path in sorted(images.iterdir())]
        network.train()
        for _ in range(20):
            with torch.no_grad():
                network(model.normalised(torch.stack(pixels)))
        network.eval()
        torch.nn.init.normal_(network.get_classifier().weight, std=1.0)
    card = ModelCard(
        "Three classes",
        "mit",
        "Random numbers.",
        results=[CardResult("accuracy", 0.987, "Noise")],
        task=recipe.task,
        thresholds=recipe.thresholds or (),
        code=snippet(recipe, PLACE),
    )
    model.write(folder, card)
    return model


def code_of(folder: Path) -> str:
    """The lines of Python in the card of a folder, with its place on this machine."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    return (
        card.partition("```python\n")[2].partition("```")[0].replace(PLACE, f"local-dir:{folder}")
    )
