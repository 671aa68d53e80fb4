"""The batches of a training: in an order and with an augmentation that a continued run repeats."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision.transforms import v2

from inmerge_wrap.images.sets import ImageSet
from inmerge_wrap.robustness.effects import seed_of


def statistics(images: ImageSet) -> tuple[list[float], list[float]]:
    """Returns mean and standard deviation per channel of up to 1,000 images, pixels in [0, 1]."""
    sample = images.sample(1000, "brightness of images")
    pixels = torch.stack([pixels for _, pixels in sample]).float() / 255
    return pixels.mean((0, 2, 3)).tolist(), pixels.std((0, 2, 3)).clamp_min(1e-3).tolist()


def augmentation(augment: str, flip: str) -> v2.Compose:
    """Returns TrivialAugment (arXiv 2103.10158) or nothing on uint8 pixels, and flips."""
    trivial = v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR)
    steps: list[nn.Module] = [trivial if augment == "trivial" else v2.Identity()]
    if flip in ("horizontal", "both"):
        steps.append(v2.RandomHorizontalFlip())
    if flip == "both":
        steps.append(v2.RandomVerticalFlip())
    return v2.Compose(steps)


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """The images of a set, augmented by chance that depends only on seed, epoch and image.

    So it is the same however many processes read them, and in a run that continues.
    """

    def __init__(self, images: ImageSet, transform: Callable[[Tensor], Tensor], seed: int) -> None:
        self.images, self.transform, self.seed, self.epoch = images, transform, seed, 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pixels, label = self.images[index]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(self.seed, self.epoch, index))
            return self.transform(pixels), label


def derived_seed(*numbers: int) -> int:
    """Derives a seed of 32 bits from numbers, such as a run's seed and the epoch."""
    return seed_of(repr(numbers))


@dataclass
class Batches:
    """The images of an epoch in their order, and those of validation."""

    loader: DataLoader
    val_loader: DataLoader
    images: Augmented
    order: torch.Generator  # of the next pass over the images

    def __len__(self) -> int:
        """Batches that this process reads in an epoch, of training and of validation."""
        return len(self.loader) + len(self.val_loader)

    def start(self, epoch: int) -> None:
        """Makes order and augmentation those of an epoch, which depend on it and the seed alone."""
        self.images.epoch = epoch
        self.order.manual_seed(derived_seed(self.images.seed, epoch))


def per_process(batch_size: int, processes: int, images: int | None = None) -> int:
    """Returns the batch size of each process, of which these images must fill one."""
    if images is not None and batch_size > images:
        raise SystemExit(f"--batch-size {batch_size} exceeds the {images} training images")
    if batch_size < 1 or batch_size % processes:
        raise SystemExit(
            f"--batch-size {batch_size} is the size over all processes: "
            f"pass a positive multiple of their number, {processes}"
        )
    return batch_size // processes


def open_batches(
    sets: dict[str, ImageSet], options: argparse.Namespace, seed: int, accelerator: Accelerator
) -> Batches:
    """Returns the batches of a run: those of the parts train and val, prepared."""
    count, processes = len(sets["train"]), accelerator.num_processes
    order = torch.Generator()
    images = Augmented(sets["train"], augmentation(options.augment, options.flip), seed)
    loader = DataLoader(
        images,
        batch_size=per_process(min(options.batch_size, count // processes * processes), processes),
        sampler=RandomSampler(images, generator=order),  # not shuffle, which draws more from it
        num_workers=options.workers,
        drop_last=True,  # BatchNorm cannot train on a last batch of one image
    )
    val_loader = DataLoader(sets["val"], batch_size=64, num_workers=options.workers)
    loader, val_loader = accelerator.prepare(loader, val_loader)
    return Batches(loader, val_loader, images, order)
