"""What merging did: counted on the device while training runs, read when somebody asks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["LayerReport", "LayerSnapshot", "MergeReport", "Tally", "pairs_between"]


@dataclass(frozen=True)
class LayerReport:
    """What merging did to one convolution.

    Attributes:
        name: The convolution.
        steps: Optimizer steps that the layer has seen.
        drawn: Pairs drawn in all passes.
        merged: Of these, the pairs that passed the threshold and were blended.
        undefined: Of these, the pairs without a cosine: a kernel was zero or held NaN or Inf.
        mean_cosine: Mean over the drawn pairs that have a cosine; None before the first.
        max_cosine: The largest cosine drawn; None before the first.
    """

    name: str
    steps: int
    drawn: int
    merged: int
    undefined: int
    mean_cosine: float | None
    max_cosine: float | None

    @property
    def share(self) -> float:
        """Merged pairs over drawn pairs, 0 where none was drawn."""
        return self.merged / self.drawn if self.drawn else 0.0


@dataclass(frozen=True)
class LayerSnapshot:
    """The state of one convolution at one step, and what merging did since the last snapshot.

    Attributes:
        name: The convolution.
        step: Optimizer steps seen.
        share: Merged over drawn pairs since the last snapshot, 0 where none was drawn.
        mean_cosine: Of the pairs drawn since the last snapshot; None where none has a cosine.
        effective_rank: Of all its kernels, see :func:`inmerge_wrap.similarity.effective_rank`.
    """

    name: str
    step: int
    share: float
    mean_cosine: float | None
    effective_rank: float
    _total: LayerReport = field(repr=False, compare=False)

    @classmethod
    def since(cls, last: LayerSnapshot | None, total: LayerReport, rank: float) -> LayerSnapshot:
        """The snapshot between an earlier one and the running totals of now."""
        earlier = None if last is None else last._total
        drawn, merged, known, cosines = pairs_between(earlier, total)
        return cls(
            name=total.name,
            step=total.steps,
            share=merged / drawn if drawn else 0.0,
            mean_cosine=cosines / known if known else None,
            effective_rank=rank,
            _total=total,
        )


def pairs_between(earlier: LayerReport | None, later: LayerReport) -> tuple[int, int, int, float]:
    """Pairs drawn, merged, and with a cosine, and the sum of these cosines, between two reports.

    Args:
        earlier: None for all pairs up to the later one.
        later: Of the same layer.
    """

    def sums(layer: LayerReport) -> tuple[int, int, int, float]:
        known = layer.drawn - layer.undefined
        return layer.drawn, layer.merged, known, (layer.mean_cosine or 0.0) * known

    drawn, merged, known, cosines = sums(later)
    if earlier is None:
        return drawn, merged, known, cosines
    before = sums(earlier)
    return drawn - before[0], merged - before[1], known - before[2], cosines - before[3]


@dataclass(frozen=True)
class MergeReport:
    """What merging did to each layer; print it to see a table."""

    layers: tuple[LayerReport, ...]

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, name: str) -> LayerReport:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    @property
    def drawn(self) -> int:
        """Pairs drawn in all layers."""
        return sum(layer.drawn for layer in self.layers)

    @property
    def merged(self) -> int:
        """Pairs merged in all layers."""
        return sum(layer.merged for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for a JSON file or a tracker."""
        return {layer.name: {**asdict(layer), "share": layer.share} for layer in self.layers}

    def __str__(self) -> str:
        def number(value: float | None) -> str:
            return "-" if value is None else f"{value:.3f}"

        width = max([len("convolution"), *(len(layer.name) for layer in self.layers)])
        lines = [
            f"{'convolution':<{width}}  {'steps':>7}  {'drawn':>10}  {'merged':>10}  "
            f"{'share':>7}  {'mean cos':>8}  {'max cos':>7}"
        ]
        for layer in self.layers:
            broken = f"  {layer.undefined:,} pairs without a cosine" if layer.undefined else ""
            lines.append(
                f"{layer.name:<{width}}  {layer.steps:>7,}  {layer.drawn:>10,}  "
                f"{layer.merged:>10,}  {layer.share:>7.2%}  {number(layer.mean_cosine):>8}  "
                f"{number(layer.max_cosine):>7}{broken}"
            )
        share = self.merged / self.drawn if self.drawn else 0.0
        lines.append(f"{self.merged:,} of {self.drawn:,} drawn pairs were merged ({share:.2%}).")
        return "\n".join(lines)


class Tally:
    """Running counts of a number of layers.

    What the host knows (steps, passes, drawn pairs) is counted in Python; what only the device
    knows (which pairs merged, their cosines) is added up there, without waiting for it.
    """

    _NO_COSINE = -2.0  # below every cosine

    def __init__(self, layers: int) -> None:
        self.steps = [0] * layers
        self.passes = [0] * layers
        self.drawn = [0] * layers
        self._merged = torch.zeros(layers, dtype=torch.int64)
        self._undefined = torch.zeros(layers, dtype=torch.int64)
        self._cosine_sum = torch.zeros(layers, dtype=torch.float64)
        self._cosine_max = torch.full((layers,), self._NO_COSINE, dtype=torch.float32)

    def add(self, layer_of_pair: Tensor, cosines: Tensor, merged: Tensor) -> None:
        """Adds the pairs of one pass: three tensors of shape (pairs,) on one device."""
        if self._merged.device != cosines.device:
            self._move_to(cosines.device)
        undefined = cosines.isnan()
        self._merged.index_add_(0, layer_of_pair, merged.long())
        self._undefined.index_add_(0, layer_of_pair, undefined.long())
        known = torch.where(undefined, 0.0, cosines).to(self._cosine_sum.dtype)
        self._cosine_sum.index_add_(0, layer_of_pair, known)
        candidates = torch.where(undefined, self._NO_COSINE, cosines).float()
        self._cosine_max.scatter_reduce_(0, layer_of_pair, candidates, "amax")

    def _move_to(self, device: torch.device) -> None:
        wide = torch.float32 if device.type == "mps" else torch.float64  # mps has no float64
        self._merged = self._merged.to(device)
        self._undefined = self._undefined.to(device)
        self._cosine_sum = self._cosine_sum.to(device, wide)
        self._cosine_max = self._cosine_max.to(device)

    def report(self, names: Sequence[str]) -> MergeReport:
        """Reads the counts back from the device."""
        layers = []
        for index, name in enumerate(names):
            undefined = int(self._undefined[index])
            known = self.drawn[index] - undefined
            layers.append(
                LayerReport(
                    name=name,
                    steps=self.steps[index],
                    drawn=self.drawn[index],
                    merged=int(self._merged[index]),
                    undefined=undefined,
                    mean_cosine=float(self._cosine_sum[index]) / known if known else None,
                    max_cosine=float(self._cosine_max[index]) if known else None,
                )
            )
        return MergeReport(tuple(layers))

    def to_tensor(self) -> Tensor:
        """The whole tally, shape (layers, 7), float64 on the CPU (exact up to 2**53 pairs)."""
        columns = [self.steps, self.passes, self.drawn, self._merged, self._undefined]
        columns += [self._cosine_sum, self._cosine_max]
        return torch.stack(
            [torch.as_tensor(column).detach().cpu().double() for column in columns], dim=1
        )

    @classmethod
    def from_tensor(cls, table: Tensor) -> Tally:
        """The tally that :meth:`to_tensor` wrote.

        Raises:
            ValueError: If the tensor can not be one.
        """
        if table.ndim != 2 or table.shape[1] != 7 or not bool(table.isfinite().all()):
            raise ValueError(f"not the merging statistics of a checkpoint: {tuple(table.shape)}")
        tally = cls(len(table))
        tally.steps, tally.passes, tally.drawn = (
            [math.floor(value) for value in column] for column in table[:, :3].T.tolist()
        )
        tally._merged, tally._undefined = table[:, 3].long().clone(), table[:, 4].long().clone()
        tally._cosine_sum, tally._cosine_max = table[:, 5].clone(), table[:, 6].float().clone()
        return tally
