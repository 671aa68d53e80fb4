"""How the kernels of the merged pairs change: toward a partner, or in another direction."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from inmerge_wrap.merging import add_gaussian, blend_kernels, multiply_gaussian

__all__ = ["Blend", "Change", "Noise"]


@dataclass(frozen=True)
class Blend:
    """Each kernel moves along the line to its partner: ``a K_i + (1 - a) K_j`` (eq. 3).

    The map is linear in the kernels, so an optimizer's moments can follow their weights.

    Attributes:
        merge_weight: a, the weight of the kernel itself, for all pairs or for each, shape
            (pairs, 1).
        scale: Factor of each blend, shape (pairs, 1), if norms are kept.
    """

    merge_weight: float | Tensor
    scale: Tensor | None = None

    def at(self, index: slice | Tensor) -> Blend:
        """Returns the same change for some of the pairs."""
        weight = self.merge_weight
        return replace(
            self,
            merge_weight=weight[index] if isinstance(weight, Tensor) else weight,
            scale=None if self.scale is None else self.scale[index],
        )

    def rows(self, kernels: Tensor, partners: Tensor, changed: Tensor | None) -> Tensor:
        """Returns the new kernels, shape (pairs, fan_in); the old ones where not ``changed``."""
        weight = self.merge_weight
        if isinstance(weight, Tensor):
            weight = weight.to(kernels.dtype)
        return blend_kernels(kernels, partners, changed, weight, self.scale)


@dataclass(frozen=True)
class Noise:
    """Each kernel moves in a random direction, independent of its partner.

    Attributes:
        multiplicative: Whether entries are scaled (DAMP) instead of moved (filter-wise noise).
        radius: Size of the move relative to the kernel's norm.
        numbers: Standard normal numbers, shape (pairs, fan_in).
        keep_norm: Whether each kernel is scaled back to its norm.
    """

    multiplicative: bool
    radius: float
    numbers: Tensor
    keep_norm: bool = False

    def at(self, index: slice | Tensor) -> Noise:
        """Returns the same change for some of the pairs."""
        return replace(self, numbers=self.numbers[index])

    def rows(self, kernels: Tensor, partners: Tensor, changed: Tensor | None) -> Tensor:
        """Returns the new kernels, shape (pairs, fan_in); the old ones where not ``changed``."""
        move = multiply_gaussian if self.multiplicative else add_gaussian
        moved = move(kernels, self.numbers.to(kernels.dtype), self.radius)
        if self.keep_norm:
            norms, new = (
                torch.linalg.vector_norm(k, dim=1, keepdim=True) for k in (kernels, moved)
            )
            moved = moved * (norms / new).nan_to_num(1.0, 1.0)
        return moved if changed is None else torch.where(changed.unsqueeze(1), moved, kernels)


Change = Blend | Noise
