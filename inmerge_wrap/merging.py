"""The mathematics of in-model merging (arXiv 2502.20516), as pure tensor functions.

A convolution weight ``W`` has shape ``(C_out, C_in / groups, kH, kW)``; its *kernel* ``K_i`` is
``W[i]``. One pass draws ordered pairs ``(i, j)`` of kernels, compares them (eq. 1, 2) and blends
the source into the target if they are similar (eq. 3, 4)::

    cos(K_i, K_j) > tau   =>   K_i <- alpha K_i + (1 - alpha) K_j

No function here waits for the device, so each can run in every training step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["draw_pairs"]


def draw_pairs(
    num_kernels: int, probability: float, generator: torch.Generator, groups: int = 1
) -> tuple[Tensor, Tensor]:
    """Draws which kernels are blended in one pass, and each one's partner.

    Every kernel is a target with ``probability``, independently. Its source is uniform over the
    *other* kernels of the same group: kernels of different groups read different channels and
    are not comparable. A group of one kernel therefore has no target.

    Args:
        num_kernels: C_out of the convolution.
        probability: p, in [0, 1].
        generator: A CPU generator; the only source of randomness.
        groups: Number of equal groups into which the kernels are divided, in order.

    Returns:
        ``(targets, sources)``, int64 tensors of equal length on the CPU; ``targets`` is
        strictly increasing, so no kernel is written twice.

    Raises:
        ValueError: If ``probability`` is outside [0, 1] or ``groups`` does not divide
            ``num_kernels``.
    """
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"probability must lie in [0, 1], got {probability}")
    if groups < 1 or num_kernels < 1 or num_kernels % groups:
        raise ValueError(f"{num_kernels} kernels cannot be divided into {groups} equal groups")
    size = num_kernels // groups
    chances = torch.empty(num_kernels, dtype=torch.float32, device="cpu")
    chances.uniform_(generator=generator)
    # A kernel alone in its group has no partner, so it is never a target.
    targets = (chances < (probability if size > 1 else 0.0)).nonzero().flatten()
    shifts = torch.empty_like(targets).random_(1, max(2, size), generator=generator)
    return targets, _shifted(targets, shifts, size)


def draw_layers(
    num_kernels: Sequence[int],
    group_sizes: Sequence[int],
    probability: float,
    seeds: Sequence[int],
) -> tuple[Tensor, list[int]]:
    """Draws for several layers in a few operations.

    Each layer draws what :func:`draw_pairs` draws with a generator of its seed, so that no layer
    affects the draws of another.

    Args:
        num_kernels: C_out of each layer.
        group_sizes: How many kernels are in each group of a layer.
        probability: p, in [0, 1].
        seeds: Seed of each layer, in [0, 2**32).

    Returns:
        The drawn pairs, layer after layer, int64, shape (3, pairs) on the CPU: index of the layer
        in the arguments, target, source; and the number of pairs of each layer.
    """
    generator = torch.Generator("cpu")
    # Explicit, because a user's default device or dtype must not change the draws.
    host: dict[str, Any] = {"generator": generator, "device": "cpu"}
    chances, shifts = [], []
    for count, size, seed in zip(num_kernels, group_sizes, seeds, strict=True):
        generator.manual_seed(seed)
        chances.append(torch.rand(count, dtype=torch.float32, **host))
        # More than will be used: how many are needed is known only when all layers are drawn.
        shifts.append(torch.randint(1, max(2, size), (count,), dtype=torch.int64, **host))
    chance, shift = torch.cat(chances), torch.cat(shifts)
    counts, size_of = torch.tensor([num_kernels, group_sizes], dtype=torch.int64, device="cpu")
    begins = counts.cumsum(0) - counts
    layer = torch.zeros_like(shift).index_fill_(0, begins[1:], 1).cumsum(0)  # of each kernel
    drawn = ((chance < probability) & (size_of > 1)[layer]).nonzero().flatten()
    layer = layer[drawn]
    pairs = layer.bincount(minlength=len(counts))
    first = begins[layer]
    rank = torch.arange(len(drawn), device="cpu") - (pairs.cumsum(0) - pairs)[layer]
    targets = drawn - first
    sources = _shifted(targets, shift[first + rank], size_of[layer])
    return torch.stack([layer, targets, sources]), pairs.tolist()


def _shifted(targets: Tensor, shifts: Tensor, size: int | Tensor) -> Tensor:
    """Returns the indices shifted by some places, cyclically within each group of ``size``."""
    place = targets % size
    return targets - place + (place + shifts) % size


def nearest_kernels(kernels: Tensor, targets: Tensor, groups: int = 1) -> Tensor:
    """Returns the most similar other kernel of the same group, for each target.

    An alternative to the paper's uniform choice of the partner. Compares every target with all
    kernels: ``pairs x C_out x fan_in`` multiplications.

    Args:
        kernels: All kernels of the layer, flattened, shape (C_out, fan_in), float32 or float64.
        targets: int64, shape (pairs,).
        groups: As in :func:`draw_pairs`.

    Returns:
        The sources, int64, shape (pairs,). If no other kernel has a cosine with the target, an
        arbitrary one, whose undefined cosine keeps the pair from merging.
    """
    unit = kernels / torch.linalg.vector_norm(kernels, dim=1, keepdim=True)
    cosines = (unit[targets] @ unit.T).nan_to_num(-2.0)
    everyone = torch.arange(len(kernels), device=kernels.device)
    group_size = len(kernels) // groups
    strangers = (everyone // group_size) != (targets // group_size).unsqueeze(1)
    cosines = cosines.masked_fill(strangers | (everyone == targets.unsqueeze(1)), -3.0)
    return cosines.argmax(dim=1)


def pair_cosines(kernels: Tensor, partners: Tensor) -> Tensor:
    """Returns the cosine similarity of each kernel with its partner (eq. 1, 2).

    Args:
        kernels: Flattened kernels, shape (pairs, fan_in), float32 or float64.
        partners: Their partners, of the same shape and dtype.

    Returns:
        Shape (pairs,), in [-1, 1]. NaN where the cosine is undefined, because a kernel is zero
        or holds NaN or Inf; NaN passes no threshold.
    """
    norms = torch.linalg.vector_norm(kernels, dim=1) * torch.linalg.vector_norm(partners, dim=1)
    return cosines_of((kernels * partners).sum(dim=1), norms)


def cosines_of(products: Tensor, norms: Tensor) -> Tensor:
    """Computes cosines, shape (pairs,), from inner products and products of norms."""
    # 0 / 0 is NaN, and so is a quotient with an infinite norm: broken kernels drop out.
    return torch.where(torch.isfinite(norms), (products / norms).clamp(-1.0, 1.0), math.nan)


def centre(kernels: Tensor) -> Tensor:
    """Subtracts the mean of each kernel, as a layer with weight standardisation does.

    Args:
        kernels: Shape (n, fan_in).
    """
    return kernels - kernels.mean(dim=-1, keepdim=True)


def blend_kernels(
    kernels: Tensor,
    partners: Tensor,
    merged: Tensor | None,
    merge_weight: float | Tensor,
    scale: Tensor | None = None,
) -> Tensor:
    """Blends the kernels of the merged pairs with their partners (eq. 3), leaving the others.

    Args:
        kernels: Shape (pairs, fan_in).
        partners: Their partners, of the same shape and dtype.
        merged: Boolean mask, shape (pairs,): which pairs are blended; None blends all.
        merge_weight: alpha, the weight of the kernel itself; above 1 it moves away from its
            partner. A number, or one for each pair, shape (pairs, 1).
        scale: Factor of each blend, shape (pairs, 1), see :func:`norm_scale`; none by default.

    Returns:
        ``alpha * kernels + (1 - alpha) * partners`` where ``merged``, else ``kernels``.
    """
    blended = torch.lerp(partners, kernels, merge_weight)
    if scale is not None:
        blended = blended * scale
    return blended if merged is None else torch.where(merged.unsqueeze(1), blended, kernels)


def norm_scale(kernels: Tensor, partners: Tensor, merge_weight: float | Tensor) -> Tensor:
    """Returns the factor that brings each blend back to the norm of its kernel, shape (pairs, 1).

    The paper does not rescale: a blend of orthogonal kernels is shorter, by 18% at alpha = 0.8.
    """
    blended = torch.lerp(partners, kernels, merge_weight)
    norms = torch.linalg.vector_norm(kernels, dim=1, keepdim=True)
    return (norms / torch.linalg.vector_norm(blended, dim=1, keepdim=True)).nan_to_num(1.0, 1.0)


def signed_weight(kernels: Tensor, partners: Tensor, signs: Tensor, radius: float) -> Tensor:
    """Returns the merge weight that moves each kernel by ``radius`` of its norm.

    With it :func:`blend_kernels` returns ``K_i + s r |K_i| (K_j - K_i) / |K_j - K_i|``: a step of a
    fixed relative size along the difference, toward the partner (s = 1) or away from it (s = -1).

    Args:
        kernels: Shape (pairs, fan_in).
        partners: Their partners, of the same shape and dtype.
        signs: 1 or -1, shape (pairs,).
        radius: r, the size of the step relative to the kernel's norm.

    Returns:
        Shape (pairs, 1); 1, which leaves the kernel unchanged, if both are equal.
    """
    norms = torch.linalg.vector_norm(kernels, dim=1, keepdim=True)
    distance = torch.linalg.vector_norm(partners - kernels, dim=1, keepdim=True)
    step = signs.to(kernels.dtype).unsqueeze(1) * (radius * norms / distance)
    return 1.0 - torch.where(distance > 0, step, 0.0)


def add_gaussian(kernels: Tensor, noise: Tensor, radius: float) -> Tensor:
    """Moves each kernel by ``radius`` of its norm in a random direction (LPF-SGD's filter noise).

    Args:
        kernels: Shape (pairs, fan_in).
        noise: Standard normal numbers z of the same shape.
        radius: r: ``K_i + r |K_i| z / |z|``.
    """
    norms = torch.linalg.vector_norm(kernels, dim=1, keepdim=True)
    lengths = torch.linalg.vector_norm(noise, dim=1, keepdim=True)
    return kernels + noise * (radius * norms / lengths)


def multiply_gaussian(kernels: Tensor, noise: Tensor, radius: float) -> Tensor:
    """Scales each entry by ``1 + r z`` (DAMP, arXiv 2406.16540).

    The step has ``radius`` times the norm of its kernel in expectation.

    Args:
        kernels: Shape (pairs, fan_in).
        noise: Standard normal numbers z of the same shape.
        radius: r, the size of the step relative to the kernel's norm.
    """
    return kernels * (1.0 + radius * noise)


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raises a TypeError or ValueError that names the setting, its value and its range."""
    if not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number in [{low:g}, {high:g}], got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must lie in [{low:g}, {high:g}], got {value!r}")
