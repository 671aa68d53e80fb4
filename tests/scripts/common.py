"""A tiny network, data that depend on nothing but their number, and fingerprints of weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn

from inmerge_wrap import InMergeWrapper


def forget_accelerator() -> None:
    """Accelerate keeps its settings for the whole process, and so for the tests that follow."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


class TinyNet(nn.Module):
    """Three convolutions with batch normalisation; the widths fall unevenly on 2 and 4 ranks."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.mid = nn.Conv2d(5, 7, 3, padding=1, bias=False)
        self.last = nn.Conv2d(7, 9, 3, padding=1)
        self.head = nn.Linear(9, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = self.last(self.mid(x).relu()).relu()
        return self.head(x.mean((2, 3)))


EXAMPLE = torch.zeros(1, 3, 8, 8)
MERGED = ("mid", "last")
SETTINGS: dict[str, Any] = {
    "shallow_layers": 1,
    "similarity_threshold": 0.0,
    "merge_probability": 0.6,
    "example_input": EXAMPLE,
}


def tiny_net(seed: int = 0) -> TinyNet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TinyNet()


def wrapped(seed: int = 0, **settings: Any) -> InMergeWrapper:
    """A wrapped tiny network that merges a good part of its pairs in ``mid`` and ``last``."""
    return InMergeWrapper(tiny_net(seed), **{**SETTINGS, **settings})


def sgd(model: nn.Module, lr: float = 0.05) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


class Nested(torch.optim.SGD):
    """A subclass whose step calls super().step(); torch then runs the hooks in both."""

    fail = False

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        if self.fail:
            raise FloatingPointError("asked for")
        return result


def attached(seed: int = 0, **settings: Any) -> tuple[InMergeWrapper, torch.optim.SGD]:
    """A wrapped tiny network and the optimizer after whose steps it merges."""
    model = wrapped(seed, **settings)
    optimizer = sgd(model)
    model.attach(optimizer)
    return model, optimizer


def batch(number: int, size: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + number)
    images = torch.randn(size, 3, 8, 8, generator=generator)
    return images, torch.randint(3, (size,), generator=generator)


def loss_of(model: nn.Module, number: int) -> Tensor:
    images, labels = batch(number)
    return nn.functional.cross_entropy(model(images), labels)


def train(model: nn.Module, optimizer: Any, steps: int, start: int = 0) -> None:
    """Plain steps on the batches ``start``, ``start + 1``, ..."""
    model.train()
    for number in range(start, start + steps):
        optimizer.zero_grad()
        loss_of(model, number).backward()
        optimizer.step()


def closure_of(model: nn.Module, optimizer: Any, number: int) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, number)
        loss.backward()
        return loss

    return closure


def digest(state: Mapping[str, Tensor]) -> str:
    """A hash of all bits of all tensors and of their names."""
    sha = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        sha.update(name.encode() + tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def next_pairs(model: InMergeWrapper) -> list[list[tuple[int, int]]]:
    """What the next pass will draw, layer by layer; asking does not change it."""
    return [
        list(zip(targets.tolist(), sources.tolist(), strict=True))
        for targets, sources in model.next_pairs().values()
        if sources is not None
    ]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters alone: running statistics differ between the ranks of DDP by design."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
