"""What training images go through, batch by batch; every draw comes from a given generator."""

from __future__ import annotations

import torch
from torch import Tensor


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
