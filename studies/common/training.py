"""One run of an experiment: the methods of methods.py in the same loop, at equal budget.

The budget is ``Run.epochs`` forward and backward passes over the training images. SAM needs two
passes for one step, so it gets half the epochs, unless the run says ``equal="epochs"``; a soup or
an ensemble divides them among its networks. Shares are rounded to whole epochs: of 15, SAM gets 8,
which are 16 passes. The result records the actual passes and the cost at
inference.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from studies.common import networks
from studies.common.augmentation import AUGMENTATIONS, Augmentation, augment
from studies.common.images import Images, Normalised
from studies.common.methods import SAM, Ensemble, Follower, Method, Mixup, Soup, Training
from studies.common.records import environment
from studies.common.running import batches, loss_of


@dataclass(frozen=True)
class Run:
    """The settings that determine the outcome of one run.

    ``weights`` is a file of safetensors to start from, or a package of networks.PACKAGES;
    ``augmentation`` a name of AUGMENTATIONS, or ``"mixup"`` for flips and the method of that name.
    ``equal`` is the budget that all methods share: passes over the images, or epochs, which cost
    twice as much with SAM. ``steps``, unless 0, takes the place of ``epochs``, rounded to whole
    ones. ``test_images`` is the number that is evaluated if it is not all (0).
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
    augmentation: str = "shifts"
    equal: Literal["passes", "epochs"] = "passes"
    channels_last: bool = False
    test_images: int = 0
    steps: int = 0
    method: tuple[Method, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings for the results file; methods by name."""
        fields = {name: value for name, value in vars(self).items() if name != "method"}
        for name in ("test_images", "steps"):
            if not fields[name]:  # as in the files from before there was a choice
                del fields[name]
        return fields | {"method": {method.name: method.to_dict() for method in self.method}}


# -- data and networks -----------------------------------------------------------------------------


def training_part(run: Run, data: Images) -> Images:
    """Returns the run's random subset of training images, a share of them with a random label."""
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
    """Builds the network of a run with what its methods add."""
    options: dict[str, Any] = {}
    for method in run.method:
        options |= method.network_settings()
    return networks.build(run.arch, run.weights, classes, channels, **options)


# -- the loop --------------------------------------------------------------------------------------


def all_methods(run: Run) -> tuple[Method, ...]:
    """Returns the methods of the run, and mixup where it is the augmentation."""
    return (*run.method, Mixup()) if run.augmentation == "mixup" else run.method


def augmentation_of(run: Run, data: Images) -> Augmentation:
    """Returns the augmentation of the training images; digits are not flipped."""
    if data.name == "digits" and run.augmentation == "shifts":
        return partial(augment, flip=False)
    return AUGMENTATIONS["flips" if run.augmentation == "mixup" else run.augmentation]


def normaliser(run: Run, data: Images, accelerator: Accelerator) -> Normalised:
    """Returns the normaliser: statistics of the training images, or of the pretrained weights."""
    statistics = None
    if run.weights in networks.PACKAGES:
        statistics = (networks.MEAN, networks.STD)
    return Normalised(data, accelerator.device, statistics)


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
    """Trains one network; returns the one to test, its cost and the merged share."""
    normalise, loss_function = normaliser(run, data, accelerator), loss_of(data.task)
    images, labels = data.parts["train"]
    methods = all_methods(run)
    loader = batches(accelerator, len(images), run.batch_size, seed)
    steps = len(loader)
    layout = torch.channels_last if run.channels_last else torch.contiguous_format
    model = network.to(accelerator.device, memory_format=layout)
    for method in methods:
        model = method.wrap(model, epochs * steps, seed)
    optimizer = sgd(model, lr, run.weight_decay)
    training = Training(network, model, optimizer, epochs, steps, lr, seed)
    followers = [method.follow(training) for method in methods]
    cycle = steps * min([method.falling_epochs(epochs) for method in methods], default=epochs)
    schedule = OneCycleLR(optimizer, lr, total_steps=max(1, cycle))
    model, optimizer = accelerator.prepare(model, optimizer)
    changed = augmentation_of(run, data)
    augmentation, draws = (torch.Generator().manual_seed(seed) for _ in range(2))
    passes = 0

    def backward(inputs: Tensor, targets: Tensor) -> None:
        nonlocal passes
        passes += 1
        accelerator.backward(loss_function(model(inputs), targets))

    model.train()
    for epoch in range(epochs):
        for follower in followers:
            follower.before_epoch(epoch)
        for step, (index,) in enumerate(loader, start=epoch * steps):
            inputs = normalise(changed(images[index], augmentation)).contiguous(
                memory_format=layout
            )
            targets = labels[index]
            for method in methods:
                inputs, targets = method.batch(inputs, targets, len(data.classes), draws)
            gradient: Callable[[], None] = partial(backward, inputs, targets)
            for method in methods:
                gradient = partial(method.gradient, network, gradient)
            gradient()
            optimizer.step()
            optimizer.zero_grad()
            if step < cycle:
                schedule.step()
            for follower in followers:
                follower.after_step(step)
        for follower in followers:
            follower.after_epoch(epoch)

    final, seen = finished(followers, network, lambda: normalise.batches(images))
    return final, {"passes": passes / steps, **seen}


def sgd(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Returns the optimizer of all runs."""
    return torch.optim.SGD(
        model.parameters(), lr=lr, momentum=0.9, weight_decay=weight_decay, fused=True
    )


def finished(
    followers: Iterable[Follower], network: nn.Module, images: Callable[[], Iterable[Tensor]]
) -> tuple[nn.Module, dict[str, Any]]:
    """Returns the network to test and what the followers have seen."""
    seen: dict[str, Any] = {}
    for follower in followers:
        network = follower.finish(network, images)
        seen |= follower.seen()
    return network, seen


def train_run(run: Run, data: Images, accelerator: Accelerator) -> tuple[nn.Module, dict[str, Any]]:
    """Trains a network on ``data`` with the methods of a run; returns it and the cost."""
    classes, channels = len(data.classes), data.input_size[0]
    normalise = normaliser(run, data, accelerator)

    def one(
        network: nn.Module, *, epochs: int, seed_offset: int = 0, lr_factor: float = 1.0
    ) -> tuple[nn.Module, dict[str, Any]]:
        seed, lr = run.seed + seed_offset, run.lr * lr_factor
        return fit(run, network, data, accelerator, epochs=epochs, seed=seed, lr=lr)

    def images() -> Iterable[Tensor]:
        return normalise.batches(data.parts["train"][0])

    total = run.epochs
    if run.steps:
        total = max(1, round(run.steps / max(1, len(data.parts["train"][0]) // run.batch_size)))
    twice = run.equal == "passes" and any(isinstance(method, SAM) for method in run.method)
    epochs = total / 2 if twice else float(total)
    several = next((m for m in run.method if isinstance(m, Ensemble | Soup)), None)
    if several is None:
        return one(build(run, classes, channels), epochs=max(1, round(epochs)))
    return several.train(lambda: build(run, classes, channels), one, images, data.task, epochs)


# -- one run ---------------------------------------------------------------------------------------

Measure = Callable[[nn.Module, Images, Normalised], dict[str, Any]]


def train(run: Run, data: Images, accelerator: Accelerator, measure: Measure) -> dict[str, Any]:
    """Trains with the methods of a run and evaluates the last epoch; nothing is selected."""
    set_seed(run.seed)
    data = training_part(run, data).to(accelerator.device)
    began, cpu_began = time.perf_counter(), time.process_time()
    final, seen = train_run(run, data, accelerator)
    trained = time.perf_counter()
    measured = measure(final, data, normaliser(run, data, accelerator))
    members = [method.members for method in run.method if isinstance(method, Ensemble)]
    return {
        "run": run.to_dict(),
        "seconds": trained - began,
        "seconds_of_measuring": time.perf_counter() - trained,
        "cpu_seconds": time.process_time() - cpu_began,  # of both, on a machine however busy
        "training_passes": seen.pop("passes"),
        "inference_passes": max(members, default=1),
        **seen,
        **measured,
        "environment": environment(),
    }
