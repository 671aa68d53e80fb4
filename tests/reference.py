"""In-model merging written as the paper states it: one kernel at a time, in plain Python.

The oracle of the tests. It shares nothing with the library: no vectorisation, its own cosine in
float64, its own blend.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
        alike = cosine(weight[target], weight[source]) > similarity_threshold
        if alike:
            kept = merge_weight * weight[target].double()
            taken = (1.0 - merge_weight) * weight[source].double()
            new[target] = (kept + taken).to(weight.dtype)
        merged.append(alike)
    return new, merged


def merge_on(weight: Tensor, pairs: list[tuple[int, int]], **settings: float) -> list[bool]:
    """The same, in place."""
    new, merged = merge(weight.detach(), pairs, **settings)
    with torch.no_grad():
        weight.copy_(new)
    return merged
