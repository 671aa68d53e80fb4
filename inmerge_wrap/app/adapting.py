"""A trained network at another site: BatchNorm's statistics re-estimated on unlabelled images.

Another scanner or stain shifts what every layer sees, while BatchNorm normalises with the
statistics of the training. Their re-estimation needs no label and changes no weight (Schneider et
al. 2020, arXiv 2006.16971). It assumes the mix of classes of the training: where a site shows one
disease only, it can do harm (Vianna et al. 2025, arXiv 2402.04958).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from inmerge_wrap.app.model import Progress, TrainedModel, read_files, silent
from inmerge_wrap.app.operating import balanced_accuracy, operating_point
from inmerge_wrap.errors import ArgumentError
from inmerge_wrap.images.collection import spaced
from inmerge_wrap.images.files import counted, named
from inmerge_wrap.images.looks import Look, seen_of
from inmerge_wrap.images.preparation import Recipe, digest_of
from inmerge_wrap.recalibration import recalibrate

_BATCH = 64  # statistics of smaller batches are noisier
_FEW = 32  # images, below which a warning is given
_MOST = 0.8  # share of one class among the predictions, likewise
_MOVED = 0.2  # change of a share, likewise


@dataclass(frozen=True)
class Site:
    """Images of another site."""

    names: tuple[str, ...]  # of those that were read
    pixels: Tensor  # uint8 (N, C, S, S), prepared as in training
    looks: tuple[Look, ...]
    errors: Mapping[str, str]  # reason by name, of files that cannot be read
    beyond: int = 0  # files that the limit left out


@dataclass(frozen=True)
class Adaptation:
    """An adapted network and what changed."""

    model: TrainedModel
    prior: float
    images: int
    labelled: int
    shares: Mapping[str, tuple[float, float]]  # of images named so, before and after
    balanced_accuracy: tuple[float, float] | None  # on the labelled images, before and after
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without the network."""
        return {
            "prior": self.prior,
            "images": self.images,
            "labelled": self.labelled,
            "shares": {name: list(pair) for name, pair in self.shares.items()},
            "balanced_accuracy": self.balanced_accuracy,
            "temperature": self.model.recipe.temperature,
            "thresholds": self.model.recipe.thresholds,
            "warnings": list(self.warnings),
        }


def read_site(
    model: TrainedModel,
    files: Sequence[tuple[str, Path]],
    *,
    limit: int | None = None,
    workers: int = 0,
    progress: Progress = silent,
) -> Site:
    """Reads images of another site into memory, up to ``limit`` of them, evenly spaced."""
    used = [files[place] for place in spaced(len(files), limit)]
    names, stacks, looks, errors = [], [], [], {}
    batches = read_files(used, model.recipe.preparation, workers=workers, progress=progress)
    for batch, pixels in batches:
        if len(pixels):
            stacks.append(pixels)
        for entry in batch:
            if entry.look is None:
                errors[entry.name] = str(entry.error)
                continue
            names.append(entry.name)
            looks.append(entry.look)
    if not names:
        name, error = next(iter(errors.items()))
        raise ArgumentError(f"no image can be read, for example {name}: {error}")
    beyond = len(files) - len(used)
    return Site(tuple(names), torch.cat(stacks), tuple(looks), errors, beyond)


def adapt(
    model: TrainedModel,
    site: Site,
    *,
    prior: float = 16.0,
    labels: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> Adaptation:
    """Returns a copy of a network with BatchNorm's statistics re-estimated on a site's images.

    Each statistic becomes ``(prior * old + n * new) / (prior + n)`` for n images. With the labels
    of some (see `read_labels`), temperature and thresholds are chosen on them afterwards.
    """
    check_norms(model.network)
    if len(site.names) < 2:
        raise ArgumentError(f"1 image is too few to estimate statistics on: use {_FEW} or more")
    adapted = replace(model, network=copy.deepcopy(model.network))
    before = _scores(model, site.pixels, progress)
    recalibrate(adapted.network, _batches(adapted, site.pixels, progress), prior=prior)
    after = _scores(adapted, site.pixels, progress)
    recipe, accuracy = model.recipe, None
    notes: list[str] = []
    kept = [place for place, name in enumerate(site.names) if name in (labels or {})]
    elsewhere = "among those of the site"
    if site.beyond:
        elsewhere += f", or among the {counted(site.beyond, 'image')} that --limit left out"
    if labels and not kept:
        raise ArgumentError(
            f"no labelled image is {elsewhere}, for example {next(iter(labels))!r} and "
            f"{site.names[0]!r}: write the paths of the labels as they are below the folder of "
            "images, or in the table of images"
        )
    if labels:
        known = torch.tensor([labels[site.names[place]] for place in kept])
        first, last = (balanced_accuracy(recipe, of[kept], known) for of in (before, after))
        recipe, notes = operating_point(recipe, after[kept], known)
        if unused := [name for name in labels if name not in site.names]:
            notes.append(
                f"{len(unused)} of {len(labels)} labelled images not used, as not {elsewhere}: "
                f"{named(unused)}"
            )
        if math.isnan(first):
            notes.append("the labelled images hold one class, so balanced accuracy is undefined")
        else:
            accuracy = first, last
    pairs = zip(_shares(before, model.recipe), _shares(after, recipe), strict=True)
    shares = dict(zip(recipe.classes, pairs, strict=True))
    facts = [look.facts for look in site.looks]
    trained_on = {*recipe.trained_on, *(digest_of(facts[place].digest) for place in kept)}
    recipe = replace(recipe, seen=seen_of(facts, site.looks), trained_on=tuple(sorted(trained_on)))
    found = Adaptation(
        model=replace(adapted, recipe=recipe),
        prior=prior,
        images=len(site.names),
        labelled=len(kept),
        shares=shares,
        balanced_accuracy=accuracy,
    )
    return replace(found, warnings=(*_cautions(found, site.errors), *notes))


def check_norms(network: torch.nn.Module) -> None:
    """Raises an error if a network has no statistics to re-estimate."""
    if any(isinstance(m, _BatchNorm) and m.track_running_stats for m in network.modules()):
        return
    raise ArgumentError(
        f"{type(network).__name__} has no BatchNorm, so there are no statistics to re-estimate: "
        "fine-tune it on labelled images of the site, or train a network with BatchNorm, such as "
        "resnet18"
    )


def _scores(model: TrainedModel, pixels: Tensor, progress: Progress) -> Tensor:
    found = []
    for part in pixels.split(_BATCH):
        found.append(model.scores(part))
        progress(len(part))
    return torch.cat(found)


def _batches(model: TrainedModel, pixels: Tensor, progress: Progress) -> Iterator[Tensor]:
    """Shuffled, because files are often in the order of their classes; of equal sizes."""
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    for places in order.tensor_split(-(-len(pixels) // _BATCH)):
        yield model.normalised(pixels[places])
        progress(len(places))


def _shares(scores: Tensor, recipe: Recipe) -> list[float]:
    return recipe.named(recipe.probabilities(scores)).double().mean(0).tolist()


def _cautions(found: Adaptation, errors: Mapping[str, str]) -> Iterator[str]:
    """What can have gone wrong, in sentences."""
    recipe = found.model.recipe
    if errors:
        yield (
            f"{counted(len(errors), 'file')} left out as unreadable, for example "
            + ": ".join(next(iter(errors.items())))
        )
    if found.images < _FEW:
        yield (
            f"{counted(found.images, 'image')} to estimate statistics on: use {_FEW} or more, or "
            f"raise the prior above {found.prior:g}"
        )
    name, (before, after) = max(found.shares.items(), key=lambda entry: entry[1][1])
    usual = recipe.class_shares[recipe.classes.index(name)] if recipe.class_shares else 0.0
    if recipe.task == "multiclass" and after >= max(_MOST, usual + _MOVED / 2):
        trained = f", {usual:.0%} of the training images" if recipe.class_shares else ""
        yield (
            f"{after:.0%} of the images are now taken for {name} ({before:.0%} before{trained}). "
            "If that is the mix of cases here (a ward with one disease), do not adapt on them: "
            "re-estimated statistics assume the mix of the training, and can make the network worse"
        )
    moved = [
        f"{label} from {first:.0%} to {last:.0%}"
        for label, (first, last) in found.shares.items()
        if abs(last - first) >= _MOVED
    ]
    if moved:
        yield (
            f"the share of predictions moved: {', '.join(moved)}. Check a sample of the images "
            "against their labels before you use the adapted network"
        )
    if found.balanced_accuracy is not None:
        first, last = found.balanced_accuracy
        if last < first:
            yield (
                f"balanced accuracy on the labelled images fell from {first:.3f} to {last:.3f}: "
                "keep the network as it was"
            )
