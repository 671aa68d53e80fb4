"""Nothing happens silently: the history of the kernels, and the warnings. Of this process alone."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

from inmerge_wrap.layers import MergedLayer
from inmerge_wrap.report import LayerSnapshot, MergeReport
from inmerge_wrap.settings import MergeSettings
from inmerge_wrap.similarity import effective_rank, read_kernels
from inmerge_wrap.tally import Tally

__all__ = ["CollapseWarning", "NoEffectWarning", "Watch"]

_PATIENCE = 100  # passes after which a run without effect is reported
_NEGLIGIBLE = 1e-3  # share of merged pairs below which a run is called a plain run
_COLLAPSED = 0.5  # of its first effective rank, below which a layer is called collapsing
_NOTABLE = 0.1  # share of merged pairs above which a falling rank is put down to merging
_MISSED_STEPS = 10  # of an optimizer that is not attached, after which it is reported
_IDLE_FORWARDS = {False: 10, True: 1000}  # merged before or attached -> forwards without a step


class NoEffectWarning(UserWarning):
    """Merging was asked for and does not happen."""


class CollapseWarning(UserWarning):
    """Merging is making the kernels of a layer copies of each other."""


class Watch:
    """Looks at what merging does and warns of what it does not.

    Attributes:
        history: Snapshots of the layers, in the order in which they were taken.
        steps: Steps that merging was part of in this process, whatever a checkpoint says.
        idle_forwards: Training forward passes since the last of these steps.
        missed_steps: Steps since then of optimizers that are not attached.
    """

    def __init__(self) -> None:
        self.history: list[LayerSnapshot] = []
        self.steps = 0
        self.idle_forwards = 0
        self.missed_steps = 0
        self._snapshots: dict[str, tuple[LayerSnapshot, LayerSnapshot]] = {}  # first, last
        self._warned: set[str] = set()

    def warn_once(self, key: str, message: str, category: type[Warning] = NoEffectWarning) -> None:
        """Warns, the first time for each key."""
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, category, stacklevel=3)

    def rewind(self, step: int) -> None:
        """Forgets what came after a step to which a checkpoint went back."""
        self.history = [entry for entry in self.history if entry.step <= step]
        self._snapshots.clear()

    def before_forward(self, *, attached: bool) -> None:
        """Counts a training forward pass; warns after some that no step follows."""
        self.idle_forwards += 1
        if self.idle_forwards < _IDLE_FORWARDS[attached or self.steps > 0]:
            return
        if attached:
            remedy = "the attached optimizer never finished a step. Attach the optimizer whose "
            remedy += "step() your loop calls"
        elif self.steps:
            remedy = "merge_() is no longer called, and no optimizer is attached"
        else:
            remedy = "no optimizer is attached. Call model.attach(optimizer)"
        self.warn_once(
            "idle", f"{self.idle_forwards} training forward passes without merging: {remedy}"
        )

    def after_missed_step(self, optimizer: str) -> None:
        """Counts a step of an optimizer of this class that is not attached; warns after some."""
        self.missed_steps += 1
        if self.missed_steps >= _MISSED_STEPS:
            self.warn_once(
                "idle",
                f"{self.missed_steps} steps of {optimizer} without merging: it trains the weights "
                "to merge and is not attached. Call model.attach(optimizer), again for each "
                "optimizer that replaces an attached one",
            )

    def after_pass(
        self,
        layers: Sequence[MergedLayer],
        tally: Tally,
        settings: MergeSettings,
        report: Callable[[], MergeReport],
    ) -> None:
        """Inspects layers at their first pass here and every so many; judges after enough of them.

        Args:
            layers: Those that a pass has just merged.
            tally: The counts, with this pass.
            settings: Of the wrapper.
            report: Makes the report, which waits for the device, where one is needed.
        """
        every, passes = settings.inspect_every, tally.passes
        due = [
            layer
            for layer in layers
            if every
            and (layer.site.name not in self._snapshots or (passes[layer.number] - 1) % every == 0)
        ]
        if due:
            self._inspect(due, report())
        if max(passes[layer.number] for layer in layers) == _PATIENCE:
            self._judge(report(), settings)

    def _inspect(self, layers: Sequence[MergedLayer], report: MergeReport) -> None:
        """Records the state of some layers, and warns of those whose kernels grow alike."""
        for layer in layers:
            site = layer.site
            kernels = read_kernels(layer.module, centred=site.centred)
            rank = float(effective_rank(kernels, site.pair_groups))
            first, last = self._snapshots.get(site.name, (None, None))
            now = LayerSnapshot.since(last, report[site.name], rank)
            self._snapshots[site.name] = (first or now, now)
            self.history.append(now)
            # Training alone may lower the rank as well; that is not for merging to warn of.
            if first and now.share > _NOTABLE and rank < _COLLAPSED * first.effective_rank:
                self.warn_once(
                    now.name,
                    f"the kernels of {now.name} are becoming copies of each other: their effective "
                    f"rank fell from {first.effective_rank:.2f} to {rank:.2f} by step {now.step}, "
                    f"{now.share:.0%} of the drawn pairs merge. Raise similarity_threshold, lower "
                    "merge_probability, or let merging end earlier (schedule)",
                    CollapseWarning,
                )

    def _judge(self, report: MergeReport, settings: MergeSettings) -> None:
        """Warns where hardly any pair merged."""
        if report.drawn and report.share >= _NEGLIGIBLE:
            return
        if not report.drawn:
            found = f"no pair was drawn in {_PATIENCE} steps"
            remedy = "raise merge_probability"
        else:
            found = (
                f"{report.merged or 'none'} of {report.drawn:,} drawn pairs passed "
                f"similarity_threshold={settings.similarity_threshold} in {_PATIENCE} steps"
            )
            known = [layer for layer in report if layer.max_cosine is not None]
            best = max(known, key=lambda layer: layer.max_cosine or 0.0, default=None)
            remedy = (
                "all kernels are zero or hold NaN or Inf"
                if best is None
                else f"the largest cosine was {best.max_cosine:.4f}, in {best.name}: a "
                f"similarity_threshold of {_just_below(best.max_cosine or 0.0):g} would have "
                "merged it"
            )
        self.warn_once(
            "effect",
            f"merging has no effect, this is a plain training run: {found}; {remedy}",
        )


def _just_below(cosine: float) -> float:
    return max(-1.0, math.ceil(cosine * 1000) / 1000 - 0.001)
