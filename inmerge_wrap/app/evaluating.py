"""Trained networks on the same labelled images: how they are prepared, read and compared."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from inmerge_wrap.app.model import Tempered
from inmerge_wrap.app.snippet import in_card
from inmerge_wrap.architectures import is_timm_folder
from inmerge_wrap.errors import ArgumentError
from inmerge_wrap.images.collection import spaced, units_of
from inmerge_wrap.images.files import RASTER, counted
from inmerge_wrap.images.finding import inside, parts_in
from inmerge_wrap.images.folders import read_part
from inmerge_wrap.images.labelled import ImageFolder, fit_images, read_npz
from inmerge_wrap.images.preparation import FILE, Recipe, digest_of
from inmerge_wrap.images.sets import as_floats
from inmerge_wrap.robustness import RobustnessResult, evaluate_robustness

INTERVALS = "metrics and intervals"
"""What `evaluate_all` calls this part of its work, which comes after the images of each network."""

_CROP = {"crop_mode": "center", "crop_pct": 1.0, "interpolation": "bicubic"}


@dataclass(frozen=True)
class Contender:
    """A network to evaluate."""

    name: str
    path: Path
    network: nn.Module
    mean: Sequence[float]
    std: Sequence[float]
    reads: Mapping[str, Any]  # its classes, and how it reads images; None what is not known
    recipe: Recipe | None  # of a training of the application


def contender(
    name: str,
    path: Path,
    network: nn.Module,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    size: int | None = None,
) -> Contender:
    """Returns a network with its preprocessing: from its folder, unless arguments override it."""
    config: Mapping[str, Any] = network.pretrained_cfg if is_timm_folder(path) else {}  # type: ignore[assignment]
    mean, std = mean or list(config.get("mean", [])), std or list(config.get("std", []))
    if not mean or not std:
        raise ArgumentError(
            f"{path} does not record how its images were preprocessed: give <mean> and <std> "
            "of the training"
        )
    recipe = Recipe.read(path) if config and (path / FILE).is_file() else None
    if recipe is not None and size is not None:
        recipe = replace(recipe, preparation=replace(recipe.preparation, size=size))
    stored = tuple(config["input_size"][1:]) if config else None
    reads = {
        "channels": next(m.in_channels for m in network.modules() if isinstance(m, nn.Conv2d)),
        "size": stored if size is None else (size, size),
        "classes": config.get("label_names"),
        **{key: config.get(key) for key in _CROP},
        "preparation": recipe and recipe.preparation,
    }
    return Contender(name, path, network, mean, std, reads, recipe)


@dataclass(frozen=True)
class LabelledImages:
    """Images in a fixed order, in [0, 1] and not normalised."""

    loader: DataLoader[Any]
    labels: Tensor  # class indices (N,), or marks (N, labels)
    part: str  # train, val, test or all
    digests: Sequence[str] = ()  # of each image's file, where files were read
    groups: Sequence[str] | None = None  # whose image each is, where this is known


def open_data(
    data: Path, contenders: Sequence[Contender], *, part: str, limit: int | None, batch_size: int
) -> LabelledImages:
    """Opens an .npz file, a folder of classes or a CSV file for networks that read it alike."""
    reads = _common(contenders, files=data.suffix != ".npz")
    size, classes = reads["size"], reads["classes"]
    recipe = next((each.recipe for each in contenders if each.recipe), None)
    is_table = data.suffix.lower() == ".csv"
    if is_table and recipe is None:
        raise ArgumentError(
            f"{contenders[0].path} has no {FILE}, which says how files are read: of such "
            "networks a folder of classes or an .npz file is read, not a table"
        )
    prepared = recipe if is_table or data.is_dir() else None
    for each in contenders:
        if each.recipe is None and in_card(each.path):
            _warn(
                f"{each.name} is of inmerge train, and {each.path} lacks {FILE}: without it the "
                "temperature, the thresholds and the range of values are not those of the "
                "training. Copy the whole folder model/"
            )
        elif each.recipe is None and prepared is not None:
            _warn(
                f"{each.name} has no {FILE}: its images are prepared as that of the other network "
                "says, with its size, crop and range of values"
            )
    if prepared is not None:
        return _read_part(data, prepared, classes, part, limit, batch_size)
    if not data.is_dir():
        images, labels = read_npz(data, part)
        places = spaced(len(labels), limit)
        images = fit_images(images[places], reads["channels"], size)
        dataset = TensorDataset(images, labels[places])
        return LabelledImages(DataLoader(dataset, batch_size=batch_size), labels[places], part)
    if size is None:
        raise ArgumentError(f"{data} holds images of any size: pass <size>, the side in training")
    if classes is not None and len(classes) == 1:
        classes = _with_its_opposite(data, part, classes[0])
    known = {key: reads[key] for key in _CROP if reads[key] is not None}
    config = {"input_size": (reads["channels"], *size), **_CROP, **known}
    folder = ImageFolder(data, config=config, split=part, classes=classes, limit=limit)
    if deep := [path for path in folder.paths if _is_deep(path)]:
        _warn(
            f"{counted(len(deep), 'image')} of more than 8 bits or in DICOM, such as {deep[0]}: "
            "black is 0 and white is 65535 (of fractions 1), and DICOM is shown as each file says. "
            f"If the training used another range, the figures are wrong: {FILE} of inmerge train "
            "says the right one; without it, convert the images to 8 bits as for the training"
        )
    loader = DataLoader(folder, batch_size=batch_size)
    for each in contenders:
        outputs = outputs_of(each.network, loader)
        if max(outputs, 2) != len(folder.classes):
            raise ArgumentError(
                f"{data} has the classes {', '.join(folder.classes)}, and {each.name} has "
                f"{outputs} outputs: rename or add folders, or export the model with "
                "<label_names>, which map outputs to classes"
            )
    return LabelledImages(loader, folder.labels, folder.part)


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)


def _is_deep(path: Path) -> bool:
    """Whether a file needs a range to be shown: its header says more than 8 bits, or is DICOM's."""
    try:
        with Image.open(path) as image:
            return image.mode[0] in "IF"
    except Exception:  # not Pillow's, or broken, which is said when it is read
        return path.suffix.lower() not in RASTER


def _common(contenders: Sequence[Contender], *, files: bool) -> dict[str, Any]:
    """What all networks read, None if none of them says; an error where they differ."""
    common = dict(contenders[0].reads)
    for what in common if files else ("channels", "size", "classes"):
        first, *others = [each for each in contenders if each.reads[what] is not None] or contenders
        common[what] = first.reads[what]
        for other in others:
            if other.reads[what] != common[what]:
                raise ArgumentError(
                    f"{first.name} and {other.name} cannot be compared on the same images: {what} "
                    f"is {common[what]} and {other.reads[what]}"
                    + ("; <size> makes them equal" if what == "size" else "; evaluate each alone")
                )
    return common


def _with_its_opposite(data: Path, part: str, name: str) -> list[str]:
    """Returns the folders of two classes, that of the network's single output second."""
    root = parts_in(data).get(part, data)
    others = [folder.name for folder in inside(root, folders=True) if folder.name != name]
    if len(others) != 1 or not (root / name).is_dir():
        raise ArgumentError(
            f"{root} must hold two folders, {name} and one other, because the network has the "
            f"single output {name}"
        )
    return [*others, name]


def _read_part(
    data: Path,
    recipe: Recipe,
    classes: Sequence[str] | None,
    part: str,
    limit: int | None,
    batch_size: int,
) -> LabelledImages:
    pixels, labels, collection = read_part(
        data,
        part,
        size=recipe.preparation.size,
        preparation=recipe.preparation,
        classes=classes,
        several=recipe.task == "multilabel",
        limit=limit,
    )
    images = collection.images
    return LabelledImages(
        DataLoader(TensorDataset(pixels, labels), batch_size=batch_size, collate_fn=as_floats),
        labels,
        part if any(image.part is not None for image in images) else "all",
        [image.digest for image in images],
        units_of(images),
    )


def outputs_of(network: nn.Module, loader: DataLoader[Any]) -> int:
    """Returns the number of a classifier's outputs, for one image of a loader."""
    image, _ = loader.collate_fn([loader.dataset[0]])  # a whole batch takes long to decode
    device = next(network.parameters()).device
    with torch.no_grad():
        answer = network.eval()(image.to(device))
    if not isinstance(answer, Tensor) or answer.ndim > 2:
        raise ValueError(
            f"{type(network).__name__} returns {type(answer).__name__}, not class scores: choose "
            "a classifier"
        )
    return answer.shape[-1]


def seen_in_training(contenders: Sequence[Contender], images: LabelledImages) -> list[str]:
    """Returns a warning for each network that training, or a choice after it, showed them to."""
    found = []
    for each in contenders:
        known = set(each.recipe.trained_on) if each.recipe is not None else set()
        count = sum(digest_of(digest) in known for digest in images.digests)
        if count:
            found.append(
                f"{each.name} was trained, or its temperature and thresholds chosen, on {count} of "
                f"the {len(images.digests)} images, so its figures are too good: use other images, "
                "such as the test part of the split.csv of that training"
            )
    return found


def evaluate_all(
    contenders: Sequence[Contender],
    images: LabelledImages,
    *,
    task: str | None,
    progress: Callable[[str, int], None],
    **settings: Any,
) -> dict[str, RobustnessResult]:
    """Evaluates networks on the same images, each at its own temperature and thresholds.

    The others are compared with the first. ``progress`` is called with a network's name and a
    number of images, and with `INTERVALS` and 1 after each condition of a network.
    """
    results: dict[str, RobustnessResult] = {}
    for each in contenders:
        several = each.recipe is not None and each.recipe.task == "multilabel"
        if several and task is None and images.labels.ndim == 1:
            raise ArgumentError(
                f"{each.name} answers for several labels, and the images have one class each: give "
                "a table with the column path and one of 0 and 1 for each label"
            )
        outputs = outputs_of(each.network, images.loader)
        guess = "binary" if outputs == 1 else "multiclass"
        network, recipe = each.network, each.recipe
        results[each.name] = evaluate_robustness(
            network if recipe is None else Tempered(network, recipe.temperature),
            images.loader,
            task=task or ("multilabel" if images.labels.ndim == 2 else guess),
            mean=each.mean,
            std=each.std,
            baseline=next(iter(results.values()), None),
            threshold=0.5 if recipe is None else recipe.thresholds or 0.5,
            progress=partial(progress, each.name),
            scored=lambda: progress(INTERVALS, 1),
            groups=images.groups,
            **settings,
        )
        results[each.name].settings |= {
            "weights": str(each.path),
            "split": images.part,
            "mean": list(each.mean),
            "std": list(each.std),
            "groups": len(set(images.groups)) if images.groups is not None else None,
        }
        if recipe is not None:
            used = {"temperature": recipe.temperature, "thresholds": recipe.thresholds}
            results[each.name].settings |= used
    return results
