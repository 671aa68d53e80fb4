"""Training methods of the studies; plain training is the empty tuple ``()`` of methods.

Each method is a small frozen class that changes one or two parts of the loop in training.py: how
the network is created, what a batch holds, how a gradient is computed, what follows the weights. A
new method is one more class, and its name in an arm. Methods combine in a tuple:
``(Merge({"partner": "most_similar"}), EMA(0.98))``. Merging is in merging.py; channels.py disturbs
channels and pixels for each image.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from inmerge_wrap import recalibrate


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
