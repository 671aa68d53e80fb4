"""Counts per layer, added up on the device, and their format in checkpoints."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from inmerge_wrap.pairs import Outcome, Totals
from inmerge_wrap.report import LayerReport, MergeReport

__all__ = ["Tally"]

_FORMAT = 1
_COLUMNS = 7
_PASSES_AT_ONCE = 32


class Tally:
    """Running counts of a number of layers.

    What the host knows (steps, passes, drawn pairs) is counted in Python; what only the device
    knows (which pairs merged, their cosines) is added up there, without waiting for it.

    Attributes:
        steps: Optimizer steps that each layer has seen.
        passes: Of these, the steps in which it was merged.
    """

    _NO_COSINE = -2.0  # below every cosine

    def __init__(self, layers: int) -> None:
        self.steps = [0] * layers
        self.passes = [0] * layers
        self._drawn = [0] * layers
        self._merged = torch.zeros(layers, dtype=torch.int64)
        self._undefined = torch.zeros(layers, dtype=torch.int64)
        self._cosine_sum = torch.zeros(layers, dtype=torch.float64)
        self._cosine_max = torch.full((layers,), self._NO_COSINE, dtype=torch.float32)
        # The passes that are not counted yet.
        self._pairs: list[Outcome] = []
        self._totals: list[Totals] = []

    @property
    def step(self) -> int:
        """Optimizer steps seen; with several optimizers, those of the one with most."""
        return max(self.steps)

    def begin(self, layers: Sequence[int]) -> int:
        """Begins a step of some layers, which share one clock; returns the number before it.

        A layer that was frozen or joined later adopts the count of the others: the schedule
        follows the training run, not the layer.
        """
        step = self.next_step(layers)
        for layer in layers:
            self.steps[layer] = step + 1
        return step

    def next_step(self, layers: Sequence[int]) -> int:
        """Returns the number of the next step of some layers."""
        return max(self.steps[layer] for layer in layers)

    def add(self, layers: Sequence[int], outcome: Outcome | Totals) -> None:
        """Adds what one pass over some layers did."""
        for layer in layers:
            self.passes[layer] += 1
        # A device adds up many passes in the launches that one would take, and a CPU finds what it
        # needs in its caches from the second on.
        if isinstance(outcome, Totals):
            self._totals.append(outcome)
            is_due = False
        else:
            for layer, length in zip(layers, outcome.lengths, strict=True):
                self._drawn[layer] += length
            self._pairs.append(outcome)
            is_due = outcome.cosines.device.type == "cpu"
        if is_due or len(self._totals) + len(self._pairs) == _PASSES_AT_ONCE:
            self._add_waiting()

    def _add_waiting(self) -> None:
        """Adds up the passes that are not counted yet."""
        pairs, self._pairs = self._pairs, []
        if pairs:
            self._add_pairs(pairs)
        for found in self._totals:
            self._add_totals(found)
        self._totals = []

    def _add_pairs(self, outcomes: Sequence[Outcome]) -> None:
        device = outcomes[-1].cosines.device  # a network may have moved in the meantime
        layer_of_pair, cosines, merged = (
            torch.cat([getattr(outcome, name).to(device) for outcome in outcomes])
            for name in ("layer", "cosines", "merged")
        )
        if self._merged.device != device:
            self._move_to(device)
        layer_of_pair = layer_of_pair.long()
        undefined = cosines.isnan()
        self._merged.index_add_(0, layer_of_pair, merged.long())
        self._undefined.index_add_(0, layer_of_pair, undefined.long())
        known = torch.where(undefined, 0.0, cosines).to(self._cosine_sum.dtype)
        self._cosine_sum.index_add_(0, layer_of_pair, known)
        candidates = torch.where(undefined, self._NO_COSINE, cosines).float()
        self._cosine_max.scatter_reduce_(0, layer_of_pair, candidates, "amax")

    def _add_totals(self, totals: Totals) -> None:
        for layer, drawn in zip(totals.numbers, totals.sums[0], strict=True):
            self._drawn[layer] += int(drawn)
        device = self._merged.device
        place = torch.tensor(totals.numbers, device=device)
        sums = torch.tensor(totals.sums[1:], dtype=self._cosine_sum.dtype, device=device)
        self._merged.index_add_(0, place, sums[0].long())
        self._undefined.index_add_(0, place, sums[1].long())
        self._cosine_sum.index_add_(0, place, sums[2])
        self._cosine_max.scatter_reduce_(0, place, sums[3].float(), "amax")

    def _move_to(self, device: torch.device) -> None:
        wide = torch.float32 if device.type == "mps" else torch.float64  # mps has no float64
        self._merged = self._merged.to(device)
        self._undefined = self._undefined.to(device)
        self._cosine_sum = self._cosine_sum.to(device, wide)
        self._cosine_max = self._cosine_max.to(device)

    def report(self, names: Sequence[str]) -> MergeReport:
        """Reads the counts back from the device."""
        self._add_waiting()
        layers = []
        for index, name in enumerate(names):
            undefined = int(self._undefined[index])
            known = self._drawn[index] - undefined
            layers.append(
                LayerReport(
                    name=name,
                    steps=self.steps[index],
                    passes=self.passes[index],
                    drawn=self._drawn[index],
                    merged=int(self._merged[index]),
                    undefined=undefined,
                    mean_cosine=float(self._cosine_sum[index]) / known if known else None,
                    max_cosine=float(self._cosine_max[index]) if known else None,
                )
            )
        return MergeReport(tuple(layers))

    def to_state(self, seed: int) -> Tensor:
        """Returns the whole tally as one float64 CPU tensor (exact up to 2**53 pairs)."""
        self._add_waiting()
        columns = [self.steps, self.passes, self._drawn, self._merged, self._undefined]
        columns += [self._cosine_sum, self._cosine_max]
        with torch.device("cpu"):
            table = torch.stack(
                [torch.as_tensor(column).detach().cpu().double() for column in columns], dim=1
            )
            header = table.new_tensor([_FORMAT, seed, len(self.steps)])
            return torch.cat([header, table.flatten()])

    @classmethod
    def from_state(
        cls, state: object, *, layers: int | None = None, seed: int | None = None
    ) -> Tally:
        """Restores the tally that :meth:`to_state` wrote.

        Args:
            state: The tensor that it returned.
            layers: Number of layers of the plan that continues; that of the state if None.
            seed: Seed of the wrapper that continues; not checked if None.

        Raises:
            ValueError: If the state was not written by an InMergeWrapper.
        """
        if not isinstance(state, Tensor) or state.numel() < 3 or state[0].item() != _FORMAT:
            raise ValueError(
                "_extra_state of the checkpoint is not that of an InMergeWrapper (format "
                f"{_FORMAT}); load a checkpoint of this model, or drop its _extra_state"
            )
        written_seed, written_layers = int(state[1]), int(state[2])
        if state.numel() != 3 + _COLUMNS * written_layers:
            raise ValueError(
                f"_extra_state holds {state.numel()} numbers where {written_layers} merged layers "
                f"need {3 + _COLUMNS * written_layers}: the checkpoint is truncated"
            )
        if state.dtype != torch.float64:
            raise ValueError(
                f"_extra_state was converted to {state.dtype}, which rounds its counters; convert "
                "the weights of a checkpoint only, or drop its _extra_state"
            )
        table = state[3:].detach().cpu().reshape(written_layers, _COLUMNS)
        if not bool(table.isfinite().all()):
            raise ValueError("_extra_state of the checkpoint holds numbers that are not finite")
        if seed is not None and written_seed != seed:
            warnings.warn(
                f"the checkpoint was trained with seed={written_seed}, this wrapper draws with "
                f"seed={seed}: the run will not continue as it began",
                stacklevel=3,
            )
        steps, passes, drawn = (
            [math.floor(value) for value in column] for column in table[:, :3].T.tolist()
        )
        tally = cls(written_layers if layers is None else layers)
        if layers is not None and written_layers != layers:
            warnings.warn(
                f"the checkpoint merged {written_layers} layers and this plan {layers}: the step "
                "counter continues, the statistics start again",
                stacklevel=3,
            )
            tally.steps = [max(steps)] * layers
            return tally
        tally.steps, tally.passes, tally._drawn = steps, passes, drawn
        tally._merged, tally._undefined = table[:, 3].long().clone(), table[:, 4].long().clone()
        tally._cosine_sum, tally._cosine_max = table[:, 5].clone(), table[:, 6].float().clone()
        return tally
