"""The pairs of kernels that one step draws, and their outcome."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["Outcome", "Pairs", "Totals", "mix", "places_of"]


@dataclass(frozen=True)
class Pairs:
    """Ordered pairs of kernels of several layers, layer after layer.

    Attributes:
        table: int64, shape (3, pairs): number of the layer, target, source. Within a layer no
            target repeats.
        lengths: Number of pairs of each layer.
    """

    table: Tensor
    lengths: tuple[int, ...]

    def __len__(self) -> int:
        return self.table.shape[1]

    @property
    def layer(self) -> Tensor:
        """Number of each pair's layer in the plan, shape (pairs,)."""
        return self.table[0]

    @property
    def targets(self) -> Tensor:
        """The kernels that may change, shape (pairs,)."""
        return self.table[1]

    @property
    def sources(self) -> Tensor:
        """Their partners, shape (pairs,)."""
        return self.table[2]

    def to(self, device: torch.device) -> Pairs:
        """Returns the pairs on a device, without waiting for it."""
        if self.table.device == device:
            return self
        table = self.table.pin_memory() if device.type == "cuda" else self.table
        return replace(self, table=table.to(device, non_blocking=device.type == "cuda"))

    def split(self) -> list[Pairs]:
        """Splits the pairs by layer."""
        parts = self.table.split(self.lengths, dim=1)
        return [Pairs(part, (part.shape[1],)) for part in parts]

    def of(self, places: Sequence[int]) -> Pairs:
        """Returns the pairs of some of the layers, by their positions in :attr:`lengths`."""
        if len(places) == len(self.lengths):
            return self
        parts = self.table.split(self.lengths, dim=1)
        table = torch.cat([parts[place] for place in places], dim=1)
        return Pairs(table, tuple(self.lengths[place] for place in places))

    def at(self, index: Tensor) -> Pairs:
        """Returns some pairs of a single layer, by position."""
        return Pairs(self.table[:, index], (len(index),))

    def toward(self, sources: Tensor) -> Pairs:
        """Returns the same targets with other sources, shape (pairs,)."""
        return replace(self, table=torch.stack([self.layer, self.targets, sources]))


@dataclass(frozen=True)
class Outcome:
    """What one step did.

    Attributes:
        layer: Number of each drawn pair's layer in the plan, of any integer type, shape (pairs,).
        cosines: Cosine of each drawn pair, shape (pairs,); NaN where it is undefined.
        merged: Whether the target changed, boolean, shape (pairs,).
        lengths: Number of pairs that each layer drew, in the order of the layers of the step.
    """

    layer: Tensor
    cosines: Tensor
    merged: Tensor
    lengths: tuple[int, ...]

    def has_merged(self, number: int) -> bool:
        """Returns whether a pair of a layer merged; waits for the device."""
        return bool(self.merged[self.layer == number].any())


@dataclass(frozen=True)
class Totals:
    """What one step did, added up by the engine.

    Attributes:
        numbers: Number of each layer in the plan.
        sums: For each layer, in five lists: pairs drawn, pairs merged, pairs without a cosine, sum
            of the cosines, largest cosine (-2 for none).
    """

    numbers: Sequence[int]
    sums: Sequence[Sequence[float]]

    def has_merged(self, number: int) -> bool:
        """See :meth:`Outcome.has_merged`."""
        return bool(self.sums[1][self.numbers.index(number)])


def places_of(lengths: Sequence[int]) -> Tensor:
    """Returns the layer of each pair by its place in ``lengths``, int64, on the CPU."""
    return torch.repeat_interleave(torch.tensor(lengths, dtype=torch.int64, device="cpu"))


def mix(*numbers: int) -> int:
    """Hashes integers to 32 bits, all that torch's CPU generator reads of a seed (splitmix64)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state >> 32
