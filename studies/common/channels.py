"""What a sceptic tries in the place of merging: other disturbances drawn for each image.

Noise and dropout act on the outputs of the same convolutions as merging in the forward pass: all
that read the same input channels for each output, so no depthwise ones. They fade along the same
cosine. Random erasing acts on the pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from inmerge_wrap import Schedule, plan_merging
from studies.common.methods import Follower, Method, Training

Disturbance = Callable[[Tensor, float, torch.Generator], Tensor]  # outputs, level in [0, 1]


def convolutions(network: nn.Module) -> list[nn.Conv2d | nn.Conv3d]:
    """Returns the convolutions whose outputs merging per image would mix."""
    plan = plan_merging(network, shallow_layers=0)
    found = [network.get_submodule(site.name) for site in plan.merged]
    kinds = (nn.Conv2d, nn.Conv3d)
    return [layer for layer in found if isinstance(layer, kinds) and layer.groups == 1]


def for_each_channel(values: Tensor, outputs: Tensor) -> Tensor:
    """Returns values (N, C) so that each applies to all of its channel of outputs (N, C, ...)."""
    return values.to(outputs)[(..., *[None] * (outputs.ndim - 2))]


@dataclass(frozen=True)
class ChannelNoise(Method):
    """Multiplies each channel of each image by ``1 + size z``, z standard normal."""

    name: ClassVar[str] = "channel_noise"
    size: float = 0.3

    def follow(self, training: Training) -> Follower:
        def disturbed(outputs: Tensor, level: float, generator: torch.Generator) -> Tensor:
            z = torch.randn(*outputs.shape[:2], generator=generator)
            return outputs * (1 + self.size * level * for_each_channel(z, outputs))

        return Disturbing(training, disturbed)


@dataclass(frozen=True)
class ChannelDropout(Method):
    """Sets a share of the channels of each image to zero, and scales the others up."""

    name: ClassVar[str] = "channel_dropout"
    rate: float = 0.1

    def follow(self, training: Training) -> Follower:
        def disturbed(outputs: Tensor, level: float, generator: torch.Generator) -> Tensor:
            rate = self.rate * level
            kept = torch.rand(*outputs.shape[:2], generator=generator) >= rate
            return outputs * (for_each_channel(kept, outputs) / (1 - rate))

        return Disturbing(training, disturbed)


class Disturbing(Follower):
    """Hooks that disturb the outputs of the convolutions while the network trains."""

    def __init__(self, training: Training, disturbed: Disturbance) -> None:
        self.fade = Schedule(
            end=training.epochs * training.steps, decay="cosine", anneals="strength"
        )
        self.level = self.fade.level(0)
        generator = torch.Generator().manual_seed(training.seed)

        def hook(module: nn.Module, _: object, outputs: Tensor) -> Tensor:
            return disturbed(outputs, self.level, generator) if module.training else outputs

        self.hooks = [layer.register_forward_hook(hook) for layer in convolutions(training.network)]

    def after_step(self, step: int) -> None:
        self.level = self.fade.level(step + 1)

    def finish(self, network: nn.Module, images: Callable[[], Iterable[Tensor]]) -> nn.Module:
        for hook in self.hooks:
            hook.remove()
        return network


@dataclass(frozen=True)
class RandomErasing(Method):
    """Fills a random rectangle of half of the images with noise (arXiv 1708.04896).

    The rectangle covers 2 to 33% of the image; its sides have a ratio from .3 to 3.3.
    """

    name: ClassVar[str] = "random_erasing"
    probability: float = 0.5

    def batch(
        self, inputs: Tensor, targets: Tensor, classes: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        erased = inputs.clone()
        height, width = inputs.shape[2:]
        for image in erased:
            chance, share, ratio, top, left = torch.rand(5, generator=generator).tolist()
            if chance >= self.probability:
                continue
            area, ratio = (0.02 + 0.31 * share) * height * width, 0.3 * 11**ratio
            rows = min(height, max(1, round((area * ratio) ** 0.5)))
            columns = min(width, max(1, round((area / ratio) ** 0.5)))
            top, left = int(top * (height - rows + 1)), int(left * (width - columns + 1))
            noise = torch.randn(len(image), rows, columns, generator=generator)
            image[:, top : top + rows, left : left + columns] = noise.to(image)
        return erased, targets
