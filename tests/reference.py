"""In-model merging written as the paper states it: one kernel at a time, in plain Python.

The oracle of the tests. It shares nothing with the library: no vectorisation, its own cosine in
float64, its own blend.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


def cosine(first: Tensor, second: Tensor) -> float:
    """Equations 1 and 2; NaN where a kernel is zero or not finite."""
    a, b = first.double().flatten().tolist(), second.double().flatten().tolist()
    if not all(map(math.isfinite, a + b)):
        return math.nan
    norm_a, norm_b = math.sqrt(math.fsum(x * x for x in a)), math.sqrt(math.fsum(y * y for y in b))
    if norm_a == 0.0 or norm_b == 0.0:
        return math.nan
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / (norm_a * norm_b)


def merge(
    weight: Tensor, pairs: list[tuple[int, int]], merge_weight: float, similarity_threshold: float
) -> tuple[Tensor, list[bool]]:
    """Equations 3 and 4 for the drawn pairs, all kernels read before any is written.

    Returns:
        The new weight and which pairs were merged.
    """
    new, merged = weight.clone(), []
    for target, source in pairs:
        similar = cosine(weight[target], weight[source]) > similarity_threshold
        if similar:
            kept = merge_weight * weight[target].double()
            taken = (1.0 - merge_weight) * weight[source].double()
            new[target] = (kept + taken).to(weight.dtype)
        merged.append(similar)
    return new, merged


def merge_on(weight: Tensor, pairs: list[tuple[int, int]], **settings: float) -> list[bool]:
    """The same, in place."""
    new, merged = merge(weight.detach(), pairs, **settings)
    with torch.no_grad():
        weight.copy_(new)
    return merged


def signed(kernel: Tensor, partner: Tensor, sign: int, radius: float) -> Tensor:
    """``K_i + s r |K_i| u``, u the unit vector of ``K_j - K_i``."""
    ours, theirs = kernel.double().flatten().tolist(), partner.double().flatten().tolist()
    difference = [b - a for a, b in zip(ours, theirs, strict=True)]
    length = math.sqrt(math.fsum(d * d for d in difference))
    norm = math.sqrt(math.fsum(a * a for a in ours))
    moved = [a + sign * radius * norm * d / length for a, d in zip(ours, difference, strict=True)]
    return torch.tensor(moved, dtype=torch.float64).reshape(kernel.shape).to(kernel.dtype)


def gaussian(kernel: Tensor, noise: Tensor, radius: float) -> Tensor:
    """``K_i + r |K_i| z / |z|``."""
    ours, z = kernel.double().flatten().tolist(), noise.double().flatten().tolist()
    norm = math.sqrt(math.fsum(a * a for a in ours))
    length = math.sqrt(math.fsum(n * n for n in z))
    moved = [a + radius * norm * n / length for a, n in zip(ours, z, strict=True)]
    return torch.tensor(moved, dtype=torch.float64).reshape(kernel.shape).to(kernel.dtype)


def multiplicative(kernel: Tensor, noise: Tensor, radius: float) -> Tensor:
    """``K_i (1 + r z)``, entry by entry."""
    ours, z = kernel.double().flatten().tolist(), noise.double().flatten().tolist()
    moved = [a * (1.0 + radius * n) for a, n in zip(ours, z, strict=True)]
    return torch.tensor(moved, dtype=torch.float64).reshape(kernel.shape).to(kernel.dtype)


def mixed_outputs(
    conv: nn.Module, images: Tensor, pairs: list[list[int]], shares: list[list[float]]
) -> Tensor:
    """What a convolution gives for each image with kernels of its own: K_i + c_i (K_j - K_i).

    Args:
        conv: An ``nn.Conv*`` without groups along the transposed dimension; its bias stays.
        images: Shape (N, C_in, *map).
        pairs: Partner of each kernel, for each image.
        shares: c of each kernel, for each image.
    """
    rows = []
    for image, partners, ours in zip(images, pairs, shares, strict=True):
        twin = copy.deepcopy(conv)
        twin.train(False)
        along = 1 if conv.transposed else 0
        kernels = conv.weight.detach().movedim(along, 0)
        new = [k + c * (kernels[j] - k) for k, j, c in zip(kernels, partners, ours, strict=True)]
        with torch.no_grad():
            twin.weight.copy_(torch.stack(new).movedim(0, along))
        rows.append(twin(image.unsqueeze(0))[0])
    return torch.stack(rows)


def forward_step(
    weight: Tensor,
    pairs: list[tuple[int, int]],
    gradient_at: Callable[[Tensor], Tensor],
    *,
    lr: float,
    merge_weight: float,
    similarity_threshold: float,
) -> Tensor:
    """One step of plain SGD: from the weight as it is, along the gradient at the merged one."""
    merged, _ = merge(weight, pairs, merge_weight, similarity_threshold)
    return weight - lr * gradient_at(merged)
