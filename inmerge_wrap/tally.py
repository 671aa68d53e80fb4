"""Counts per layer, added up on the device, and their format in checkpoints."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from inmerge_wrap.pairs import Outcome
from inmerge_wrap.report import LayerReport, MergeReport
from inmerge_wrap.schedule import Schedule
from inmerge_wrap.settings import MergeSettings

_FORMAT = 5
_HEADER = 6  # format, seed, schedule, layers, whether images are counted, which layers
_COLUMNS = 8
_AVERAGED = 1e-3  # what weights that add up to about 1 may change in the format's number
_NO_COSINE = -2.0  # below every cosine


class Tally:
    """Running counts of a number of layers.

    What the host knows (steps, passes, drawn pairs) is counted in Python; what only the device
    knows (which pairs merged, their cosines) is added up there, without waiting for it. No tensor
    changes in place: a process that was started with the model shares their memory.
    """

    def __init__(self, layers: int, *, per_image: bool = False, key: int = 0) -> None:
        self.per_image = per_image  # whether a channel of an image is drawn, not a pair of kernels
        self.key = key  # stands for the names of the layers
        self.steps = [0] * layers  # that each layer has seen
        self.passes = [0] * layers  # of these, the steps in which it was merged
        self._drawn = [0] * layers
        # Pairs that merged, without and with a cosine.
        self._counts = torch.zeros(layers, 3, dtype=torch.int64)
        self._cosine_sum = torch.zeros(layers, dtype=torch.float64)
        self._cosine_max = torch.full((layers,), _NO_COSINE, dtype=torch.float32)

    @property
    def unit(self) -> str:
        """What is drawn."""
        return "images x channels" if self.per_image else "drawn pairs"

    def begun_again(self, step: int = 0) -> Tally:
        """Returns counts of the same layers at a step, without statistics."""
        other = Tally(len(self.steps), per_image=self.per_image, key=self.key)
        other.steps = [step] * len(self.steps)
        return other

    @property
    def step(self) -> int:
        """Optimizer steps seen; with several optimizers, those of the one with most."""
        return max(self.steps)

    def begin(self, layers: Sequence[int]) -> int:
        """Begins a step of some layers, which share one clock; returns the number before it.

        A layer that was frozen or joined later adopts the count of the others: the schedule
        follows the training run, not the layer.
        """
        step = max(self.steps[layer] for layer in layers)
        for layer in layers:
            self.steps[layer] = step + 1
        return step

    def catch_up(self, step: int) -> None:
        """Adopts a step counter that is ahead: that of replicas which had more batches."""
        missed = step - self.step
        self.steps = [taken + missed for taken in self.steps]

    def add(self, outcome: Outcome) -> None:
        """Adds what one pass after a step did."""
        for number, drawn in zip(outcome.numbers, outcome.lengths, strict=True):
            self.passes[number] += 1
            self._drawn[number] += drawn
        layer, cosines = outcome.layer, outcome.cosines
        self._move_to(cosines.device)
        undefined = cosines.isnan()
        columns = torch.stack([outcome.merged, undefined, ~undefined], dim=1)
        self._counts = self._counts.index_add(0, layer, columns.long())
        known = torch.where(undefined, 0.0, cosines).to(self._cosine_sum.dtype)
        self._cosine_sum = self._cosine_sum.index_add(0, layer, known)
        candidates = torch.where(undefined, _NO_COSINE, cosines).float()
        self._cosine_max = self._cosine_max.scatter_reduce(0, layer, candidates, "amax")

    def add_totals(self, counts: Tensor, cosines: Tensor, passes: Sequence[int]) -> None:
        """Adds what forward passes did, see :meth:`Counts.take`.

        The steps in which each layer could merge count for those that acted.
        """
        for number, drawn in enumerate(counts[:, 0].tolist()):
            self._drawn[number] += drawn
            self.passes[number] += passes[number] if drawn else 0
        device = self._counts.device
        self._counts = self._counts + counts[:, 1:].to(device)
        self._cosine_sum = self._cosine_sum + cosines[:, 0].to(self._cosine_sum)
        self._cosine_max = torch.maximum(self._cosine_max, cosines[:, 1].to(self._cosine_max))

    def _move_to(self, device: torch.device) -> None:
        if self._counts.device == device:
            return
        wide = torch.float32 if device.type == "mps" else torch.float64  # mps has no float64
        self._counts = self._counts.to(device)
        self._cosine_sum = self._cosine_sum.to(device, wide)
        self._cosine_max = self._cosine_max.to(device)

    def report(self, names: Sequence[str]) -> MergeReport:
        """Reads the counts back from the device."""
        layers = []
        counts, sums, highest = (
            values.tolist() for values in (self._counts, self._cosine_sum, self._cosine_max)
        )
        for index, name in enumerate(names):
            merged, undefined, known = counts[index]
            layers.append(
                LayerReport(
                    name=name,
                    steps=self.steps[index],
                    passes=self.passes[index],
                    drawn=self._drawn[index],
                    merged=merged,
                    undefined=undefined,
                    compared=known,
                    mean_cosine=sums[index] / known if known else None,
                    max_cosine=highest[index] if known else None,
                )
            )
        return MergeReport(tuple(layers), unit=self.unit)

    def to_state(self, settings: MergeSettings) -> Tensor:
        """Returns the whole tally as one float64 CPU tensor (exact up to 2**53 pairs)."""
        columns: list[Any] = [self.steps, self.passes, self._drawn, *self._counts.T]
        columns += [self._cosine_sum, self._cosine_max]
        with torch.device("cpu"):
            table = torch.stack(
                [torch.as_tensor(column).detach().cpu().double() for column in columns], dim=1
            )
            about = [settings.seed, _key_of(settings.schedule), len(self.steps)]
            header = table.new_tensor([_FORMAT, *about, self.per_image, self.key])
            return torch.cat([header, table.flatten()])

    @classmethod
    def from_state(
        cls, state: object, *, now: Tally | None = None, settings: MergeSettings | None = None
    ) -> Tally | None:
        """Restores the tally that :meth:`to_state` wrote, or returns None with a warning.

        ``now`` and settings, where given, are those of the wrapper that continues. Counters are
        rounded if they were averaged over several models, as in federated training; if they were
        converted to another type, they have lost digits and are of no use.
        """
        if isinstance(state, Tensor) and state.dtype != torch.float64:
            warnings.warn(
                f"_extra_state of the checkpoint was converted to {state.dtype}, which rounds its "
                "counters, and is ignored: convert the weights of a checkpoint only",
                stacklevel=3,
            )
            return None
        if (
            not isinstance(state, Tensor)
            or state.numel() < _HEADER
            or not math.isclose(state[0].item(), _FORMAT, rel_tol=_AVERAGED)
        ):
            raise ValueError(
                "_extra_state of the checkpoint is not that of an InMergeWrapper (format "
                f"{_FORMAT}); load a checkpoint of this model, or drop its _extra_state"
            )
        if not bool(state.isfinite().all()):
            raise ValueError("_extra_state of the checkpoint holds numbers that are not finite")
        written = [round(number.item()) for number in state[1:_HEADER]]
        written_seed, written_schedule, written_layers, per_image, key = written
        if state.numel() != _HEADER + _COLUMNS * written_layers:
            raise ValueError(
                f"_extra_state holds {state.numel()} numbers where {written_layers} merged layers "
                f"need {_HEADER + _COLUMNS * written_layers}: the checkpoint is truncated"
            )
        if settings is not None and written_seed != settings.seed:
            warnings.warn(
                f"the checkpoint was trained with seed={written_seed}, this wrapper draws with "
                f"seed={settings.seed}: the run will not continue as it began",
                stacklevel=3,
            )
        table = state[_HEADER:].detach().cpu().reshape(written_layers, _COLUMNS)
        counts = table[:, :6].round().long()
        steps, passes, drawn = counts[:, :3].T.tolist()
        tally = cls(written_layers, per_image=bool(per_image), key=key)
        tally.steps, tally.passes, tally._drawn = steps, passes, drawn
        tally._counts = counts[:, 3:].clone()
        tally._cosine_sum, tally._cosine_max = table[:, 6].clone(), table[:, 7].float().clone()
        if settings is not None and tally.step and written_schedule != _key_of(settings.schedule):
            warnings.warn(
                f"the checkpoint was trained with another schedule: at step {tally.step:,} this "
                f"one continues, {settings.schedule}. If a new training run begins, call "
                "model.restart()",
                stacklevel=3,
            )
        if now is None or (now.key, now.unit) == (tally.key, tally.unit):
            return tally
        warnings.warn(
            f"the checkpoint merged {written_layers} layers ({tally.unit}), not the "
            f"{len(now.steps)} of this plan ({now.unit}): the step counter continues, the "
            "statistics start again",
            stacklevel=3,
        )
        return now.begun_again(tally.step)


def _key_of(schedule: Schedule) -> int:
    """Returns a number that stands for a schedule."""
    return crc32(repr(schedule).encode())
