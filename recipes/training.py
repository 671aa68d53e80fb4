"""One run of an experiment: merging, or a baseline of equal budget, in one and the same loop.

The budget is ``Run.epochs`` passes forward and backward over the training images. SAM needs two
passes for one step, so it gets half the epochs; a soup or an ensemble divides them among its
networks. Shares are rounded to whole epochs: of 15, SAM gets 8, which are 16 passes. The passes
that were made, and what a method costs at inference, stand in its result.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from common import (
    CORRUPTIONS,
    Images,
    Normalised,
    augment,
    batches,
    environment,
    evaluate,
    loss_of,
)
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import SWALR, AveragedModel
from torchvision.models import vgg

from inmerge_wrap import (
    InMergeWrapper,
    Quantile,
    Schedule,
    ZScore,
    draw_pairs,
    plan_merging,
    recalibrate,
)
from inmerge_wrap.merging import blend_kernels, norm_scale, pair_cosines


@dataclass(frozen=True)
class Run:
    """Everything that decides the outcome of one run, and so names its file.

    ``method`` holds at most one of ``merge`` (arguments of InMergeWrapper; a threshold
    ``{"z": 2}`` or ``{"share": 0.5}``, a schedule in shares of the training), ``variant`` (of
    merge_variant_), ``ema`` (decay), ``swa`` (last share of the epochs), ``sam`` (rho), ``soup``
    and ``ensemble`` (networks), and ``network`` (arguments of timm, such as ``drop_rate``); but
    ``recalibrate`` and ``ema`` go with ``merge``.
    """

    arm: str
    seed: int
    dataset: str
    size: int = 28
    arch: str = "resnet18"
    train_images: int = 0
    epochs: int = 25
    batch_size: int = 64
    lr: float = 0.05
    weight_decay: float = 5e-4
    label_noise: float = 0.0
    weights: str = ""
    method: Mapping[str, Any] = field(default_factory=dict)

    @property
    def file_name(self) -> str:
        """Readable, and unique to these settings."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        plain = "".join(c if c.isalnum() else "-" for c in f"{self.dataset}-{self.arm}-{self.seed}")
        return f"{plain}-{digest[:10]}.json"


# -- data and networks -----------------------------------------------------------------------------


def training_part(run: Run, data: Images) -> Images:
    """The run's random subset of the training images, a share of them with a random label."""
    if run.train_images:
        data = data.first_labels(run.train_images, run.seed)
    if not run.label_noise:
        return data
    images, labels = data.parts["train"]
    generator = torch.Generator().manual_seed(run.seed)
    wrong = torch.rand(labels.shape, generator=generator) < run.label_noise
    drawn = torch.randint(len(data.classes), labels.shape, generator=generator)
    return data.trained_on(images, torch.where(wrong, drawn.to(labels.dtype), labels))


def build(run: Run, classes: int, channels: int) -> nn.Module:
    """A network of timm, or ``vgg_small``: eight convolutions, no normalisation, as in 2014."""
    options = dict(run.method.get("network", {}))
    if run.arch == "vgg_small":
        if options or run.weights:
            raise SystemExit(f"vgg_small takes no {', '.join(options) or 'weights'}")
        widths = [32, "M", 64, "M", 128, 128, "M", 256, 256, 256, 256]
        features = vgg.make_layers(widths)  # type: ignore[arg-type]
        features[0] = nn.Conv2d(channels, 32, 3, padding=1)
        for module in features:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        return nn.Sequential(
            features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, classes)
        )
    network = timm.create_model(run.arch, num_classes=classes, in_chans=channels, **options)
    if run.weights:
        own, trained = network.state_dict(), load_file(run.weights)
        fitting = {n: v for n, v in trained.items() if n in own and v.shape == own[n].shape}
        head = sum(1 for _ in network.get_classifier().parameters())
        if len(fitting) < len(own) - head:
            raise SystemExit(f"{run.weights}: only {len(fitting)} tensors fit a {run.arch}")
        network.load_state_dict(fitting, strict=False)
    return network


class Ensemble(nn.Module):
    """Several networks; answers with the logits of their mean probability."""

    def __init__(self, members: list[nn.Module], task: str) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.task = task

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.stack([member(x) for member in self.members])
        if self.task == "multilabel":
            return logits.sigmoid().mean(0).logit(eps=1e-6)
        return logits.softmax(-1).mean(0).clamp_min(1e-12).log()


# -- methods ---------------------------------------------------------------------------------------


def merging(method: Mapping[str, Any], total_steps: int) -> dict[str, Any]:
    """The arguments of InMergeWrapper; a schedule is given in shares of the whole training."""
    settings = dict(method)
    threshold = settings.get("similarity_threshold", 0.3)
    if isinstance(threshold, Mapping):
        rule = ZScore if "z" in threshold else Quantile
        settings["similarity_threshold"] = rule(**threshold)
    if "schedule" in settings:
        shares = dict(settings["schedule"])
        start = round(shares.pop("start", 0.0) * total_steps)
        settings["schedule"] = Schedule(start=start, end=total_steps, **shares)
    return settings


@contextmanager
def climbed(network: nn.Module, rho: float) -> Iterator[None]:
    """The weights moved by ``rho`` up their gradient, which is forgotten (SAM, arXiv 2010.01412).

    BatchNorm's running statistics stand still meanwhile: they belong to the weights in use.
    """
    weights = [weight for weight in network.parameters() if weight.grad is not None]
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    with torch.no_grad():
        length = torch.stack([weight.grad.norm() for weight in weights]).norm() + 1e-12
        moves = [weight.grad * (rho / length) for weight in weights]
        for weight, move in zip(weights, moves, strict=True):
            weight.add_(move)
            weight.grad = None
    for norm in norms:
        norm.momentum = 0.0
    yield
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    with torch.no_grad():
        for weight, move in zip(weights, moves, strict=True):
            weight.sub_(move)


@torch.no_grad()
def merge_variant_(
    weight: Tensor,
    generator: torch.Generator,
    *,
    probability: float,
    merge_weight: float = 0.8,
    toward: str,
) -> None:
    """Two variants of merging that are studied and not part of the library.

    ``clusters``: each drawn kernel moves toward the mean of those kernels that share its most
    similar one of C_out / 8 drawn at random. ``unit``: the most alike half of random pairs is
    blended as BatchNorm sees kernels, by their direction; each keeps its norm.
    """
    kernels = weight.flatten(1)
    norms = kernels.norm(dim=1, keepdim=True).clamp_min(1e-12)
    unit = kernels / norms
    if toward == "clusters":
        drawn = (torch.rand(len(kernels), generator=generator) < probability).nonzero().flatten()
        centres = torch.randperm(len(kernels), generator=generator)[: max(1, len(kernels) // 8)]
        cluster = (unit @ unit[centres].T).argmax(dim=1)
        sums = kernels.new_zeros(len(centres), kernels.shape[1]).index_add_(0, cluster, kernels)
        means = sums / cluster.bincount(minlength=len(centres)).clamp_min(1).unsqueeze(1)
        blended = torch.lerp(means[cluster[drawn]], kernels[drawn], merge_weight)
    else:
        drawn, partners = draw_pairs(len(kernels), probability, generator)
        cosines = pair_cosines(kernels[drawn], kernels[partners])
        alike = cosines >= cosines.median()
        drawn, partners = drawn[alike], partners[alike]
        pair = unit[drawn], unit[partners]
        scale = norm_scale(*pair, merge_weight)
        blended = norms[drawn] * blend_kernels(*pair, None, merge_weight, scale)
    weight.index_copy_(0, drawn, blended.unflatten(1, weight.shape[1:]))


def fit(
    run: Run,
    network: nn.Module,
    data: Images,
    accelerator: Accelerator,
    *,
    epochs: int,
    seed: int,
    lr: float,
) -> tuple[nn.Module, dict[str, Any]]:
    """Trains one network; returns the one to test, and what it cost and what was merged."""
    method = run.method
    normalise, loss_function = Normalised(data, accelerator.device), loss_of(data.task)
    images, labels = data.parts["train"]
    loader = batches(accelerator, len(images), run.batch_size, seed)
    total_steps = epochs * len(loader)
    averaged_from = epochs - max(1, round(method.get("swa", 0.0) * epochs))
    model = network.to(accelerator.device)
    if "merge" in method:
        model = InMergeWrapper(network, seed=seed, **merging(method["merge"], total_steps))
    optimizer = torch.optim.SGD(
        model.parameters(), lr=lr, momentum=0.9, weight_decay=run.weight_decay, fused=True
    )
    if isinstance(model, InMergeWrapper):
        model.attach(optimizer)
    cycle = averaged_from * len(loader) if "swa" in method else total_steps
    schedule = OneCycleLR(optimizer, lr, total_steps=max(1, cycle))
    held = SWALR(optimizer, swa_lr=lr / 5, anneal_epochs=1) if "swa" in method else None
    model, optimizer = accelerator.prepare(model, optimizer)
    ema = ModelEmaV3(network, decay=method["ema"], use_warmup=True) if "ema" in method else None
    swa = AveragedModel(network) if "swa" in method else None
    variant = plan_merging(network).merged if "variant" in method else ()
    fade = Schedule(end=total_steps, decay="cosine")
    augmentation, draws = (torch.Generator().manual_seed(seed) for _ in range(2))
    passes = 0
    model.train()
    for epoch in range(epochs):
        if held is not None and epoch >= averaged_from:
            held.step()
        for step, (index,) in enumerate(loader, start=epoch * len(loader)):
            inputs = normalise(augment(images[index], augmentation, flip=data.name != "digits"))
            accelerator.backward(loss_function(model(inputs), labels[index]))
            passes += 1
            if "sam" in method:
                with climbed(network, method["sam"]):
                    accelerator.backward(loss_function(model(inputs), labels[index]))
                passes += 1
            optimizer.step()
            optimizer.zero_grad()
            for site in variant:
                weight = network.get_submodule(site.name).weight
                probability = 0.3 * fade.level(step)
                merge_variant_(weight, draws, probability=probability, toward=method["variant"])
            if held is None or epoch < averaged_from:
                schedule.step()
            if ema is not None:
                ema.update(network)
        if swa is not None and epoch >= averaged_from:
            swa.update_parameters(network)

    seen: dict[str, Any] = {"passes": passes / len(loader)}
    if isinstance(model, InMergeWrapper):
        report = model.report()
        seen["merging"] = {"drawn": report.drawn, "merged": report.merged}
        seen["layers"] = [
            {"layer": entry.name, "share": entry.share, "effective_rank": entry.effective_rank}
            for entry in model.history[-len(report) :]
        ]
        if method.get("recalibrate"):
            model.recalibrate(normalise.batches(images))
    if swa is not None:
        recalibrate(swa.module, normalise.batches(images))
        return swa.module, seen
    return (network if ema is None else ema.module), seen


def soup(
    run: Run, data: Images, accelerator: Accelerator, count: int
) -> tuple[nn.Module, dict[str, Any]]:
    """The mean of ``count`` networks fine-tuned from one, each in its own order of the images.

    The trunk takes half of the budget, the branches share the rest (model soups, arXiv 2203.05482).
    """
    branch = max(1, run.epochs // (2 * count))
    classes, channels = len(data.classes), data.input_size[0]
    trunk, seen = fit(
        run,
        build(run, classes, channels),
        data,
        accelerator,
        epochs=max(1, run.epochs - count * branch),
        seed=run.seed,
        lr=run.lr,
    )
    mean: AveragedModel | None = None
    for number in range(count):
        member, cost = fit(
            run,
            copy.deepcopy(trunk),
            data,
            accelerator,
            epochs=branch,
            seed=run.seed + 1000 * (number + 1),
            lr=run.lr / 5,
        )
        seen["passes"] += cost["passes"]
        mean = AveragedModel(member) if mean is None else mean
        mean.update_parameters(member)
    normalise = Normalised(data, accelerator.device)
    recalibrate(mean.module, normalise.batches(data.parts["train"][0]))
    return mean.module, seen


# -- one run ---------------------------------------------------------------------------------------


def train(run: Run, data: Images, accelerator: Accelerator) -> dict[str, Any]:
    """Trains by the run's method and measures it; the last epoch counts, nothing is selected."""
    set_seed(run.seed)
    data = training_part(run, data).to(accelerator.device)
    classes, channels = len(data.classes), data.input_size[0]
    method = run.method
    began = time.perf_counter()
    if "soup" in method:
        final, seen = soup(run, data, accelerator, method["soup"])
    else:
        members = method.get("ensemble", 1)
        share = members * (2 if "sam" in method else 1)
        trained = []
        for number in range(members):
            trained.append(
                fit(
                    run,
                    build(run, classes, channels),
                    data,
                    accelerator,
                    epochs=max(1, round(run.epochs / share)),
                    seed=run.seed + 1000 * number,
                    lr=run.lr,
                )
            )
        final, seen = trained[0]
        if members > 1:
            final = Ensemble([network for network, _ in trained], data.task)
            seen = {"passes": sum(cost["passes"] for _, cost in trained)}
    seconds = time.perf_counter() - began
    normalise = Normalised(data, accelerator.device)
    return {
        "run": asdict(run),
        "seconds": seconds,
        "training_passes": seen.pop("passes"),
        "inference_passes": method.get("ensemble", 1),
        **seen,
        "test": evaluate(final, data, normalise, corruptions=CORRUPTIONS),
        "environment": environment(),
    }
