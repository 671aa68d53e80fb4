"""Augmentation of training images per batch; every draw comes from a given generator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms import v2

Augmentation = Callable[[Tensor, torch.Generator], Tensor]  # uint8 (N, C, H, W) -> the same


def unchanged(images: Tensor, generator: torch.Generator) -> Tensor:
    """Returns the images as they are."""
    return images


def augment(images: Tensor, generator: torch.Generator, *, flip: bool) -> Tensor:
    """Shifts each image by up to a fourteenth of its side, and flips half of them."""
    count, _, height, width = images.shape
    reach = max(1, height // 14)
    shifts = torch.randint(-reach, reach + 1, (2, count, 1), generator=generator).to(images.device)
    rows = (torch.arange(height, device=images.device) + shifts[0]).clamp(0, height - 1)
    columns = (torch.arange(width, device=images.device) + shifts[1]).clamp(0, width - 1)
    if flip:
        flipped = (torch.rand(count, 1, generator=generator) < 0.5).to(images.device)
        columns = torch.where(flipped, columns.flip(1), columns)
    picture = torch.arange(count, device=images.device).view(-1, 1, 1)
    return images.permute(0, 2, 3, 1)[picture, rows.unsqueeze(2), columns.unsqueeze(1)].permute(
        0, 3, 1, 2
    )


def flips(images: Tensor, generator: torch.Generator) -> Tensor:
    """Flips half of the images horizontally."""
    mirrored = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    return torch.where(mirrored.to(images.device), images.flip(3), images)


def of_torchvision(transform: Callable[[Tensor], Tensor]) -> Augmentation:
    """Returns flips followed by a torchvision transform, drawn for each image.

    Its draws come from the global generator, which is seeded for the batch and then restored, so
    that other draws from it do not change the images.
    """

    def transformed(images: Tensor, generator: torch.Generator) -> Tensor:
        flipped = flips(images, generator)
        seed = int(torch.randint(2**31, (), generator=generator))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return torch.stack([transform(image) for image in flipped])

    return transformed


def noise_and_blur() -> v2.Transform:
    """Returns Gaussian noise of up to .15 of the range on half of the images, blur on half."""
    noise = v2.RandomChoice([v2.GaussianNoise(sigma=size) for size in (0.05, 0.1, 0.15)])
    return v2.Compose(
        [
            v2.ToDtype(torch.float32, scale=True),
            v2.RandomApply([noise], 0.5),
            v2.RandomApply([v2.GaussianBlur(5, sigma=(0.1, 2.0))], 0.5),
            v2.ToDtype(torch.uint8, scale=True),
        ]
    )


def jitter() -> v2.Transform:
    """Returns the colour jitter that histology and cytology use against other stains."""
    return v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)


AUGMENTATIONS: dict[str, Augmentation] = {
    "none": unchanged,
    "shifts": lambda images, generator: augment(images, generator, flip=True),
    "flips": flips,
    "noise and blur": of_torchvision(noise_and_blur()),
    "trivial": of_torchvision(v2.TrivialAugmentWide()),
    "augmix": of_torchvision(v2.AugMix()),
    "trivial and jitter": of_torchvision(v2.Compose([v2.TrivialAugmentWide(), jitter()])),
}
