"""Training methods of the studies; plain training is the empty tuple ``()`` of methods.

Each method is a small frozen class that changes one or two parts of the loop in training.py: how
the network is created, what a batch holds, how a gradient is computed, what follows the weights. A
new method is one more class here, and its name in an arm. Methods combine in a tuple:
``(Merge({"transient": True}), EMA(0.98))``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from inmerge_wrap import (
    InMergeWrapper,
    Schedule,
    draw_pairs,
    plan_merging,
    recalibrate,
)
from inmerge_wrap.merging import blend_kernels, norm_scale, pair_cosines


@dataclass(frozen=True)
class Training:
    """A training run that is about to start, as its methods see it."""

    network: nn.Module
    model: nn.Module  # the network, or the wrapper around it
    optimizer: Optimizer
    epochs: int
    steps: int  # of an epoch
    lr: float
    seed: int


class Follower:
    """The actions and state of a method during one training run."""

    def before_epoch(self, epoch: int) -> None:
        """Runs before each epoch; epochs count from 0."""

    def after_step(self, step: int) -> None:
        """Runs after each step; steps count from 0 over the whole training."""

    def after_epoch(self, epoch: int) -> None:
        """Runs after each epoch; epochs count from 0."""

    def finish(self, network: nn.Module, images: Callable[[], Iterable[Tensor]]) -> nn.Module:
        """Returns the network to test, given the trained one and all training images."""
        return network

    def seen(self) -> dict[str, Any]:
        """Returns what is recorded in the result of the run."""
        return {}


class Method:
    """A method that changes nothing: whatever a subclass does not override is plain training."""

    name: ClassVar[str]

    def network_settings(self) -> dict[str, Any]:
        """Returns further arguments of ``timm.create_model``."""
        return {}

    def wrap(self, network: nn.Module, total_steps: int, seed: int) -> nn.Module:
        """Returns the module that is trained in place of the network."""
        return network

    def batch(
        self, inputs: Tensor, targets: Tensor, classes: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Returns the batch to train on; targets are class indices, or shares (N, classes)."""
        return inputs, targets

    def gradient(self, network: nn.Module, backward: Callable[[], None]) -> None:
        """Computes the gradient; each call of ``backward`` is a pass that the budget counts."""
        backward()

    def falling_epochs(self, epochs: int) -> int:
        """Returns the number of epochs over which the learning rate is annealed."""
        return epochs

    def follow(self, training: Training) -> Follower:
        """Starts one training run."""
        return Follower()

    def to_dict(self) -> Any:
        """Returns the settings, for the results file."""
        return asdict(self)  # type: ignore[call-overload]


# -- merging ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fade:
    """A Schedule of merging in shares of the training run."""

    start: float = 0.0
    decay: Literal["constant", "linear", "cosine"] = "cosine"
    anneals: Literal["probability", "strength"] = "probability"

    def schedule(self, total_steps: int) -> Schedule:
        """Returns the schedule for a training run of ``total_steps`` steps."""
        start = round(self.start * total_steps)
        return Schedule(start=start, end=total_steps, decay=self.decay, anneals=self.anneals)


@dataclass(frozen=True)
class Merge(Method):
    """In-model merging; settings left out are the paper's, or those recommended where it stays.

    Attributes:
        settings: Arguments of InMergeWrapper; not ``schedule`` and not ``seed``.
        fade: The schedule; None merges in every step to the end, or as recommended.
        recommended: Build on ``InMergeWrapper.recommended(..., transient=False)``.
        recalibrate: Recompute BatchNorm's statistics after training.
    """

    name: ClassVar[str] = "merge"
    settings: Mapping[str, Any] = field(default_factory=dict)
    fade: Fade | None = None
    recommended: bool = False
    recalibrate: bool = False

    def wrap(self, network: nn.Module, total_steps: int, seed: int) -> nn.Module:
        settings = {**self.settings, "seed": seed}
        if self.fade is not None:
            settings["schedule"] = self.fade.schedule(total_steps)
        if self.recommended:
            return InMergeWrapper.recommended(
                network, total_steps=total_steps, transient=False, **settings
            )
        return InMergeWrapper(network, **settings)

    def follow(self, training: Training) -> Follower:
        return _Merging(training, self.recalibrate)

    def to_dict(self) -> dict[str, Any]:
        written: dict[str, Any] = {
            name: asdict(value) if is_dataclass(value) else value  # type: ignore[arg-type]
            for name, value in self.settings.items()
        }
        if self.fade is not None:
            written["schedule"] = asdict(self.fade)
        switches = {"recommended": self.recommended, "recalibrate": self.recalibrate}
        return written | {name: True for name, on in switches.items() if on}


class _Merging(Follower):
    def __init__(self, training: Training, measure_again: bool) -> None:
        assert isinstance(training.model, InMergeWrapper)
        self.model, self.measure_again = training.model, measure_again
        self.model.attach(training.optimizer)

    def finish(self, network: nn.Module, images: Callable[[], Iterable[Tensor]]) -> nn.Module:
        if self.measure_again:
            self.model.recalibrate(images())
        return network

    def seen(self) -> dict[str, Any]:
        report = self.model.report()
        last = self.model.history[-len(report) :]
        return {
            "merging": {"drawn": report.drawn, "merged": report.merged},
            "layers": [
                {"layer": entry.name, "share": entry.share, "effective_rank": entry.effective_rank}
                for entry in last
            ],
        }


@dataclass(frozen=True)
class Variant(Method):
    """Two variants of merging that the first study tried, and that are not part of the library."""

    name: ClassVar[str] = "variant"
    toward: Literal["clusters", "unit"]

    def follow(self, training: Training) -> Follower:
        return _Varying(training, self.toward)


class _Varying(Follower):
    def __init__(self, training: Training, toward: Literal["clusters", "unit"]) -> None:
        plan = plan_merging(training.network)
        self.convolutions = [training.network.get_submodule(site.name) for site in plan.merged]
        self.fade = Schedule(end=training.epochs * training.steps, decay="cosine")
        self.generator = torch.Generator().manual_seed(training.seed)
        self.toward = toward

    def after_step(self, step: int) -> None:
        for convolution in self.convolutions:
            merge_variant_(
                convolution.weight,  # type: ignore[arg-type]
                self.generator,
                probability=0.3 * self.fade.level(step),
                toward=self.toward,
            )


@torch.no_grad()
def merge_variant_(
    weight: Tensor,
    generator: torch.Generator,
    *,
    probability: float,
    merge_weight: float = 0.8,
    toward: str,
) -> None:
    """Merges toward ``clusters`` or ``unit`` kernels, in place.

    ``clusters``: each drawn kernel moves toward the mean of those kernels that share its most
    similar one of C_out / 8 drawn at random. ``unit``: the most similar half of random pairs is
    blended by direction, as BatchNorm sees kernels; each keeps its norm.
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


# -- averages of weights ---------------------------------------------------------------------------


@dataclass(frozen=True)
class EMA(Method):
    """The exponential moving average of the weights of all steps."""

    name: ClassVar[str] = "ema"
    decay: float = 0.98

    def follow(self, training: Training) -> Follower:
        return _Ema(training.network, self.decay)


class _Ema(Follower):
    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = network
        self.ema = ModelEmaV3(network, decay=decay)

    def after_step(self, step: int) -> None:
        self.ema.update(self.network)

    def finish(self, network: nn.Module, images: Callable[[], Iterable[Tensor]]) -> nn.Module:
        return self.ema.module


@dataclass(frozen=True)
class SWA(Method):
    """The mean of the weights after each of the last epochs, trained at a fifth of the peak rate.

    Stochastic weight averaging, arXiv 1803.05407.
    """

    name: ClassVar[str] = "swa"
    share: float = 0.25

    def falling_epochs(self, epochs: int) -> int:
        return epochs - max(1, round(self.share * epochs))

    def follow(self, training: Training) -> Follower:
        return _Swa(training, self.falling_epochs(training.epochs))


class _Swa(Follower):
    def __init__(self, training: Training, first: int) -> None:
        self.training, self.first = training, first
        self.mean = AveragedModel(training.network)

    def before_epoch(self, epoch: int) -> None:
        if epoch >= self.first:
            for group in self.training.optimizer.param_groups:
                group["lr"] = self.training.lr / 5

    def after_epoch(self, epoch: int) -> None:
        if epoch >= self.first:
            self.mean.update_parameters(self.training.network)

    def finish(self, network: nn.Module, images: Callable[[], Iterable[Tensor]]) -> nn.Module:
        recalibrate(self.mean.module, images())
        return self.mean.module


# -- the gradient ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class SAM(Method):
    """Sharpness-aware minimisation (arXiv 2010.01412): the gradient ``rho`` up the slope."""

    name: ClassVar[str] = "sam"
    rho: float = 0.05

    def gradient(self, network: nn.Module, backward: Callable[[], None]) -> None:
        backward()
        with climbed(network, self.rho):
            backward()


@contextmanager
def climbed(network: nn.Module, rho: float) -> Iterator[None]:
    """Moves the weights by ``rho`` along their gradient, and clears it.

    BatchNorm's running statistics do not change: they belong to the weights in use.
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


# -- network and batches ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Dropout(Method):
    """Dropout before the classifier, and of whole residual branches (stochastic depth)."""

    name: ClassVar[str] = "dropout"
    rate: float = 0.0
    path_rate: float = 0.0

    def network_settings(self) -> dict[str, Any]:
        rates = {"drop_rate": self.rate, "drop_path_rate": self.path_rate}
        return {name: rate for name, rate in rates.items() if rate}


def as_shares(targets: Tensor, classes: int) -> Tensor:
    """Targets (N, classes) that can be mixed: class indices one-hot, others as they are."""
    return targets if targets.is_floating_point() else F.one_hot(targets, classes).float()


@dataclass(frozen=True)
class LabelSmoothing(Method):
    """Takes ``amount`` of each target and spreads it evenly over what the label could be."""

    name: ClassVar[str] = "label_smoothing"
    amount: float = 0.1

    def batch(
        self, inputs: Tensor, targets: Tensor, classes: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        # The labels of a multi-label task are shares already, and each is one of two.
        even = 0.5 if targets.is_floating_point() else 1.0 / classes
        return inputs, torch.lerp(
            as_shares(targets, classes), torch.full((), even, device=targets.device), self.amount
        )


@dataclass(frozen=True)
class Mixup(Method):
    """Blends each image and its target with another one's (arXiv 1710.09412)."""

    name: ClassVar[str] = "mixup"
    alpha: float = 0.2

    def batch(
        self, inputs: Tensor, targets: Tensor, classes: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        # torch.distributions takes no generator: Beta is a share of two gammas.
        first, second = torch._standard_gamma(
            torch.full((2,), self.alpha, dtype=torch.float64), generator=generator
        ).clamp_min(1e-30)
        share = float(first / (first + second))
        others = torch.randperm(len(inputs), generator=generator).to(inputs.device)
        shares = as_shares(targets, classes)
        return torch.lerp(inputs[others], inputs, share), torch.lerp(shares[others], shares, share)


# -- several networks ------------------------------------------------------------------------------

Fit = Callable[..., tuple[nn.Module, dict[str, Any]]]
Images = Callable[[], Iterable[Tensor]]


@dataclass(frozen=True)
class Ensemble(Method):
    """An ensemble: several networks that share the budget; their probabilities are averaged."""

    name: ClassVar[str] = "ensemble"
    members: int = 3

    def train(
        self, build: Callable[[], nn.Module], fit: Fit, images: Images, task: str, epochs: float
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Trains by calls of ``fit(network, epochs=..., seed_offset=..., lr_factor=...)``."""
        share = max(1, round(epochs / self.members))
        trained = [
            fit(build(), epochs=share, seed_offset=1000 * number) for number in range(self.members)
        ]
        passes = sum(cost["passes"] for _, cost in trained)
        return MeanProbability([network for network, _ in trained], task), {"passes": passes}


class MeanProbability(nn.Module):
    """Several networks; returns the logits of their mean probability."""

    def __init__(self, members: Sequence[nn.Module], task: str) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.task = task

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.stack([member(x) for member in self.members])
        if self.task == "multilabel":
            return logits.sigmoid().mean(0).logit(eps=1e-6)
        return logits.softmax(-1).mean(0).clamp_min(1e-12).log()


@dataclass(frozen=True)
class Soup(Method):
    """A soup: the mean of several networks fine-tuned from one, each with its own data order.

    The trunk takes half of the budget, the branches share the rest (model soups, arXiv 2203.05482).
    """

    name: ClassVar[str] = "soup"
    members: int = 3

    def train(
        self, build: Callable[[], nn.Module], fit: Fit, images: Images, task: str, epochs: float
    ) -> tuple[nn.Module, dict[str, Any]]:
        """See :meth:`Ensemble.train`."""
        branch = max(1, int(epochs // (2 * self.members)))
        trunk_epochs = max(1, round(epochs) - self.members * branch)
        trunk, seen = fit(build(), epochs=trunk_epochs)
        mean: AveragedModel | None = None
        for number in range(1, self.members + 1):
            member, cost = fit(
                copy.deepcopy(trunk), epochs=branch, seed_offset=1000 * number, lr_factor=0.2
            )
            seen["passes"] += cost["passes"]
            mean = AveragedModel(member) if mean is None else mean
            mean.update_parameters(member)
        assert mean is not None
        recalibrate(mean.module, images())
        return mean.module, seen
