"""The mathematics of in-model merging (arXiv 2502.20516), as pure tensor functions.

A convolution weight ``W`` has shape ``(C_out, C_in / groups, kH, kW)``; its *kernel* ``K_i`` is
``W[i]``. One pass draws ordered pairs ``(i, j)`` of kernels, compares them (eq. 1, 2) and blends
the source into the target if they are similar (eq. 3, 4)::

    cos(K_i, K_j) > tau   =>   K_i <- alpha K_i + (1 - alpha) K_j

A convolution is linear in its kernels, so the same blend can be made on its outputs, with other
pairs for each image and without a write to the weights (:func:`mix_channels`)::

    y_i <- y_i + c_i (y_j - y_i),   c = 1 - alpha

No function here waits for the device, so each can run in every training step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from inmerge_wrap.errors import check_range

__all__ = ["blend_kernels", "draw_pairs", "mix_channels", "pair_cosines"]

# -- which kernels are drawn -----------------------------------------------------------------------


def mix(*numbers: int) -> int:
    """Hashes integers to 32 bits, all that torch's CPU generator reads of a seed (splitmix64)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state >> 32


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
    check_range("probability", probability, 0.0, 1.0)
    if not all(isinstance(n, int) and n is not True for n in (num_kernels, groups)):
        raise TypeError(f"num_kernels and groups are counts, got {num_kernels!r} and {groups!r}")
    if groups < 1 or num_kernels < 1 or num_kernels % groups:
        raise ValueError(f"{num_kernels} kernels cannot be divided into {groups} equal groups")
    size = num_kernels // groups
    # Explicit, because a user's default device or dtype must not change the draws.
    chances = torch.empty(num_kernels, dtype=torch.float32, device="cpu")
    chances.uniform_(generator=generator)
    # A kernel alone in its group has no partner, so it is never a target.
    targets = (chances < (probability if size > 1 else 0.0)).nonzero().flatten()
    shifts = torch.empty_like(targets).random_(1, max(2, size), generator=generator)
    return targets, cyclic_sources(targets, shifts, size)


def cyclic_sources(targets: Tensor, shifts: Tensor | int, size: Tensor | int) -> Tensor:
    """Returns the partners that lie some places further, cyclically within each group.

    Args:
        targets: Indices of kernels, int64, any shape.
        shifts: By how many places, int64, broadcast with ``targets``.
        size: Kernels of one group.
    """
    place = targets % size
    return targets - place + (place + shifts) % size


def draw_bits(rows: Tensor, columns: Tensor) -> Tensor:
    """Draws 32 random bits for each row and column, as a function of nothing but their keys.

    A counter-based generator: it has no state that a recomputation, a replica or a graph could get
    out of step with, and gives the same bits on every device, eager and compiled. Products stay
    below 2**63, because signed overflow is undefined in compiled code.

    Args:
        rows: Keys of the images, int64, shape (rows,).
        columns: Keys of the channels, int64, shape (columns,).

    Returns:
        Integers in [0, 2**32), int64, shape (rows, columns).
    """
    bits = (rows.unsqueeze(1) + columns.unsqueeze(0)) & 0xFFFFFFFF
    bits = _scramble(_scramble(bits, 16, 0x7FEB352D), 15, 0x5A5B3D97)
    return bits ^ (bits >> 16)


def draw_ways(rows: Tensor, columns: Tensor) -> Tensor:
    """Draws 1 or -1 for each row and eight for each column, from the low bits of one draw each.

    Args:
        rows: As in :func:`draw_bits`.
        columns: Keys of blocks of eight channels, int64, shape (blocks,).

    Returns:
        float32, shape (rows, 8 * blocks).
    """
    byte = torch.arange(256, device=rows.device).unsqueeze(1)
    signs = 1.0 - 2.0 * (byte >> torch.arange(8, device=rows.device) & 1)
    drawn = draw_bits(rows, columns) & 0xFF
    # A table, because comparing and selecting eight times as many numbers takes five times longer.
    return signs.index_select(0, drawn.flatten()).reshape(len(rows), 8 * len(columns))


def _scramble(bits: Tensor, shift: int, factor: int) -> Tensor:
    return ((bits ^ (bits >> shift)) * factor) & 0xFFFFFFFF


def fingerprint(inputs: Tensor) -> Tensor:
    """Returns an integer that identifies the content of a batch, int64, a scalar on its device.

    The sum over the bits does not depend on the order of summation, so that it is the same on
    every device. It tells micro-batches apart without a counter: a pass that is run again for
    activation checkpointing finds the draws of the first.
    """
    if inputs.layout != torch.strided:
        inputs = inputs.coalesce().values() if inputs.is_sparse else inputs.values()
    inputs = inputs.resolve_conj().resolve_neg()  # lazy in torch, and no view shows the bits
    inputs = torch.view_as_real(inputs) if inputs.is_complex() else inputs
    if inputs.is_floating_point():
        whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(inputs.element_size())
        inputs = inputs.view(whole) if whole else inputs.float().view(torch.int32)
    if inputs.element_size() == 8:
        inputs = (inputs ^ (inputs >> 32)) & 0xFFFFFFFF  # else the sum could overflow
    total = inputs.sum(dtype=torch.int64)
    return (total ^ (total >> 32)) & 0xFFFFFFFF


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


# -- how similar they are (eq. 1, 2) ---------------------------------------------------------------


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
    cosines = ((kernels * partners).sum(dim=1) / norms).clamp(-1.0, 1.0)
    # 0 / 0 is NaN, and so is a quotient with an infinite norm: broken kernels drop out.
    return torch.where(torch.isfinite(norms), cosines, math.nan)


def centre(kernels: Tensor) -> Tensor:
    """Subtracts the mean of each kernel, as a layer with weight standardisation does.

    Args:
        kernels: Shape (n, fan_in).
    """
    return kernels - kernels.mean(dim=-1, keepdim=True)


# -- how they blend (eq. 3, 4) ---------------------------------------------------------------------


def blend_kernels(kernels: Tensor, partners: Tensor, merge_weight: float | Tensor) -> Tensor:
    """Blends kernels with their partners (eq. 3); which of them is decided by eq. 4.

    Args:
        kernels: Shape (pairs, fan_in).
        partners: Their partners, of the same shape and dtype.
        merge_weight: alpha, the weight of the kernel itself; above 1 it moves away from its
            partner. A number, or one for each pair, shape (pairs, 1).

    Returns:
        ``alpha * kernels + (1 - alpha) * partners``.
    """
    return torch.lerp(partners, kernels, merge_weight)


def norm_scale(kernels: Tensor, changed: Tensor) -> Tensor:
    """Returns the factor that brings changed kernels back to their norm, shape (pairs, 1).

    The paper does not rescale: a blend of orthogonal kernels is shorter, by 18% at alpha = 0.8.
    """
    norms = torch.linalg.vector_norm(kernels, dim=1, keepdim=True)
    return (norms / torch.linalg.vector_norm(changed, dim=1, keepdim=True)).nan_to_num(1.0, 1.0)


def relative_weight(kernels: Tensor, partners: Tensor, radius: float | Tensor) -> Tensor:
    """Returns the merge weight that moves each kernel by ``radius`` of its norm.

    With it :func:`blend_kernels` returns ``K_i + r |K_i| (K_j - K_i) / |K_j - K_i|``: a step of a
    fixed relative size along the difference.

    Args:
        kernels: Shape (pairs, fan_in).
        partners: Their partners, of the same shape and dtype.
        radius: r, the size of the step relative to the kernel's norm; negative moves away from
            the partner. A number, or one for each pair, shape (pairs, 1).

    Returns:
        Shape (pairs, 1); 1, which leaves the kernel unchanged, if both are equal.
    """
    norms = torch.linalg.vector_norm(kernels, dim=1, keepdim=True)
    distance = torch.linalg.vector_norm(partners - kernels, dim=1, keepdim=True)
    return 1.0 - torch.where(distance > 0, radius * norms / distance, 0.0)


def add_gaussian(kernels: Tensor, noise: Tensor, radius: float | Tensor) -> Tensor:
    """Moves each kernel by ``radius`` of its norm in a random direction (LPF-SGD's filter noise).

    Args:
        kernels: Shape (pairs, fan_in).
        noise: Standard normal numbers z of the same shape.
        radius: r: ``K_i + r |K_i| z / |z|``.
    """
    norms = torch.linalg.vector_norm(kernels, dim=1, keepdim=True)
    lengths = torch.linalg.vector_norm(noise, dim=1, keepdim=True)
    return kernels + noise * (radius * norms / lengths)


def multiply_gaussian(kernels: Tensor, noise: Tensor, radius: float | Tensor) -> Tensor:
    """Scales each entry by ``1 + r z`` (DAMP, arXiv 2406.16540).

    The step has ``radius`` times the norm of its kernel in expectation.

    Args:
        kernels: Shape (pairs, fan_in).
        noise: Standard normal numbers z of the same shape.
        radius: r, the size of the step relative to the kernel's norm.
    """
    return kernels * (1.0 + radius * noise)


# -- the same blend on the outputs of a convolution ------------------------------------------------


def mix_channels(
    outputs: Tensor,
    shares: Tensor,
    shift: Tensor | tuple[Tensor, Tensor] | int,
    groups: int = 1,
    bias: Tensor | None = None,
) -> Tensor:
    """Blends the channels of a convolution's output as if its kernels had been blended (eq. 3).

    ``y_i + c_i (y_j - y_i)`` is the output of the kernel ``K_i + c_i (K_j - K_i)``, because a
    convolution is linear in its kernels; a bias is not blended. The partner ``j`` of channel ``i``
    lies ``shift`` places further in its group. The gradient is that of the expression, to any
    order. For the backward pass only the shares and the shift are kept.

    Args:
        outputs: y, shape (N, C, *map), floating point, in any memory format, which is kept.
        shares: c = 1 - alpha, shape (N, C), or (1, C) for all images together.
        shift: A number in [1, C / groups); a tensor, int64, shape (N, 1), for a partner of its own
            in each image; or what a number means for each channel, which channel is its partner
            and whose partner it is, two tensors, int64, shape (C,): a compiled graph would repeat
            a number.
        groups: Groups of the convolution.
        bias: Its bias b, shape (C,); adds ``c_i (b_i - b_j)``.

    Returns:
        A new tensor of the shape, dtype and memory format of ``outputs``.
    """
    shares = shares.to(outputs.dtype)
    mixed: Tensor = _MixChannels.apply(outputs, _over_map(shares, outputs), shift, groups)
    if bias is None:
        return mixed
    places = _sources(shift, len(bias), groups, outputs.device)
    return mixed + _over_map(shares * (bias - bias[places]).to(shares), outputs)


class _MixChannels(torch.autograd.Function):
    """The blend of channels, with the blend in the other direction as its gradient.

    Autograd's own would keep the whole output and scatter the gradient, which is slow and, on a
    GPU, not repeatable.
    """

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, shares: Tensor, shift: Any, groups: int) -> Tensor:
        ctx.save_for_backward(shares)
        ctx.shift, ctx.groups = shift, groups
        if not isinstance(shift, int):
            # Not lerp, in whose graph the gathered channels come first: a compiler would take
            # their memory format for the gradient, and transpose it twice.
            return outputs + shares * (_shifted(outputs, shift, groups) - outputs)
        wrapped = outputs.shape[1] // groups - shift  # the first channel whose partner is before it
        blends = (
            _parts(outputs, wrapped, groups),
            _parts(outputs, shift, groups)[::-1],
            _parts(shares, wrapped, groups),
        )
        mixed = torch.empty_like(outputs)
        for part, *blend in zip(_parts(mixed, wrapped, groups), *blends, strict=True):
            torch.lerp(*blend, out=part)
        return mixed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (shares,) = ctx.saved_tensors
        return _transposed(gradients[0], shares, ctx.shift, ctx.groups), None, None, None


def _transposed(gradient: Tensor, shares: Tensor, shift: Any, groups: int) -> Tensor:
    """Returns the gradient of the blend: each channel gives its share to its partner."""
    kept = torch.addcmul(gradient, shares, gradient, value=-1)
    if not isinstance(shift, int):
        back = -shift if isinstance(shift, Tensor) else shift[::-1]
        return kept + _shifted(shares * gradient, back, groups)
    wrapped = gradient.shape[1] // groups - shift
    given = (
        _parts(kept, shift, groups),
        _parts(shares, wrapped, groups)[::-1],
        _parts(gradient, wrapped, groups)[::-1],
    )
    if torch.is_grad_enabled():  # a gradient of the gradient
        return _joined(map(torch.addcmul, *given), gradient)
    for part, *factors in zip(*given, strict=True):
        part.addcmul_(*factors)
    return kept


def _parts(tensor: Tensor, first: int, groups: int) -> tuple[Tensor, ...]:
    """Returns views of the first channels of each group, and of the others."""
    if groups > 1:
        tensor = tensor.unflatten(1, (groups, -1))
    dim = 1 if groups == 1 else 2
    return tensor.split_with_sizes([first, tensor.shape[dim] - first], dim)


def _joined(parts: Iterable[Tensor], like: Tensor) -> Tensor:
    """Returns parts as one tensor: autograd refuses to write into parts."""
    first, last = parts
    return torch.cat((first, last), dim=1 if first.ndim == like.ndim else 2).reshape(like.shape)


def _sources(shift: Any, channels: int, groups: int, device: torch.device) -> Tensor:
    """Returns the partner of each channel, int64, shape (C,) for all images, or (N, C)."""
    if isinstance(shift, tuple):
        return shift[0]
    return cyclic_sources(torch.arange(channels, device=device), shift, channels // groups)


def _shifted(values: Tensor, shift: Any, groups: int) -> Tensor:
    """Returns each channel's partner, in the memory format of ``values``."""
    places = _sources(shift, values.shape[1], groups, values.device)
    if places.ndim == 1:
        return values[:, places]
    return torch.take_along_dim(values, _over_map(places, values).expand_as(values), 1)


def _over_map(per_channel: Tensor, outputs: Tensor) -> Tensor:
    """Returns a view of (N, C) that broadcasts over the map of a convolution."""
    return per_channel.reshape(*per_channel.shape, *[1] * (outputs.ndim - 2))
