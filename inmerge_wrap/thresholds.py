"""Similarity thresholds that adapt to the layer.

A fixed tau means something different in every layer: the cosine of two random kernels of fan-in
``d`` has a standard deviation of ``1 / sqrt(d)``, so that random pairs pass 0.3 at a fan-in of 9
and never at 4,608. A rule decides from the cosines drawn in this pass and the layer's
fan-in, without waiting for the device. A plain number is the paper's fixed tau.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from inmerge_wrap.errors import check_range

__all__ = ["Fixed", "Quantile", "Threshold", "ZScore"]


class Threshold(Protocol):
    """Decides which of the drawn pairs are similar enough to merge."""

    def is_similar(self, cosines: Tensor, fan_in: int) -> Tensor:
        """Returns which cosines pass, boolean, shape (pairs,); a NaN cosine never passes.

        Args:
            cosines: Of the drawn pairs, float32 or wider, shape (pairs,).
            fan_in: Number of entries of each kernel.
        """
        ...


@dataclass(frozen=True)
class Fixed:
    """The paper's threshold: the same cosine tau in [-1, 1] in every layer."""

    tau: float

    def __post_init__(self) -> None:
        check_range("similarity_threshold", self.tau, -1.0, 1.0)

    def bound(self, fan_in: int) -> float:
        """Returns the cosine above which a pair merges."""
        return self.tau

    def is_similar(self, cosines: Tensor, fan_in: int) -> Tensor:
        """See :class:`Threshold`."""
        return cosines > self.bound(fan_in)

    def __str__(self) -> str:
        return f"{self.tau:g}"


@dataclass(frozen=True)
class ZScore:
    """Pairs that are more similar than chance: cosine above ``z / sqrt(fan_in)``.

    Of independent random kernels, 2.3% of the pairs pass ``z = 2`` in any layer, whatever its
    fan-in.
    """

    z: float

    def __post_init__(self) -> None:
        check_range("z", self.z, -1e6, 1e6)

    def bound(self, fan_in: int) -> float:
        """Returns the cosine above which a pair merges, in a layer of this fan-in."""
        return self.z / math.sqrt(fan_in)

    def is_similar(self, cosines: Tensor, fan_in: int) -> Tensor:
        """See :class:`Threshold`."""
        return cosines > self.bound(fan_in)


@dataclass(frozen=True)
class Quantile:
    """The most similar ``share`` in (0, 1] of the pairs drawn in this pass, per layer."""

    share: float

    def __post_init__(self) -> None:
        check_range("share", self.share, 0.0, 1.0)
        if self.share == 0.0:
            raise ValueError("share must lie in (0, 1], got 0")

    def is_similar(self, cosines: Tensor, fan_in: int) -> Tensor:
        """See :class:`Threshold`."""
        if not len(cosines):
            return cosines.bool()
        return cosines >= torch.nanquantile(cosines, 1.0 - self.share)


def as_threshold(value: float | Threshold) -> Threshold:
    """Returns a rule unchanged, and a number in [-1, 1] as :class:`Fixed`."""
    if isinstance(value, int | float):
        return Fixed(value)
    if not callable(getattr(value, "is_similar", None)):
        raise TypeError(
            "similarity_threshold must be a number in [-1, 1] or a rule such as Quantile(0.5), "
            f"got {value!r}"
        )
    return value
