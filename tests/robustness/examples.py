"""Images and labels that several tests share."""

import torch


def data(task: str, n: int = 60, channels: int = 3, side: int = 16):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(n, channels, side, side, generator=generator)
    high, shape = {"multiclass": (4, (n, 1)), "binary": (2, (n,)), "multilabel": (2, (n, 3))}[task]
    return images, torch.randint(0, high, shape, generator=generator)
