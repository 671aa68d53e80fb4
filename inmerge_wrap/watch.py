"""The history of the kernels, and the warnings when merging does not do what it should."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

from inmerge_wrap.kernels import MergedLayer
from inmerge_wrap.report import LayerReport, LayerSnapshot, MergeReport
from inmerge_wrap.schedule import Schedule
from inmerge_wrap.settings import MergeSettings
from inmerge_wrap.similarity import effective_rank, read_kernels
from inmerge_wrap.thresholds import Fixed, Threshold

__all__ = ["CollapseWarning", "NoEffectWarning", "Watch"]

_PATIENCE = 100  # passes after which a run without effect is reported
_COLLAPSED = 0.5  # share of its first effective rank below which a layer is collapsing
_NOTABLE = 0.1  # share of merged pairs above which a falling rank is attributed to merging
_MISSED_STEPS = 10  # of an unattached optimizer before it is reported
_OUTLASTED = (10, 100)  # lengths of the schedule, and steps, after its end that are reported
_IDLE_FORWARDS = {False: 10, True: 1000}  # merged before or attached -> forwards without a step


class NoEffectWarning(UserWarning):
    """Merging is set up but has no effect."""


class CollapseWarning(UserWarning):
    """Merging makes the kernels of a layer copies of each other."""


class Watch:
    """Observes merging in this process, and warns if it has no effect or collapses a layer."""

    def __init__(self) -> None:
        self.history: list[LayerSnapshot] = []
        self.steps = 0  # with merging in this process, not counting those before a checkpoint
        self.idle_forwards = 0  # training forward passes since the last of these steps
        self.missed_steps = 0  # since then, of optimizers that are not attached
        self._inspected: dict[str, tuple[float, LayerReport]] = {}  # first rank, last report
        self._warned: set[str] = set()

    def warn_once(self, key: str, message: str, category: type[Warning] = NoEffectWarning) -> None:
        """Warns once for each key."""
        if key not in self._warned:
            self._warned.add(key)
            self.warn(message, category)

    def warn(self, message: str, category: type[Warning] = NoEffectWarning) -> None:
        """Warns."""
        warnings.warn(message, category, stacklevel=4)

    def rewind(self, step: int) -> None:
        """Discards snapshots after the step that a loaded checkpoint goes back to."""
        self.history = [entry for entry in self.history if entry.step <= step]
        self._inspected.clear()

    def before_forward(self, *, attached: bool) -> None:
        """Counts a training forward pass; warns after several without a step."""
        self.idle_forwards += 1
        if self.idle_forwards < _IDLE_FORWARDS[attached or self.steps > 0]:
            return
        if self.steps and not attached:
            reason = "merge_() is no longer called, and no optimizer is attached"
        else:
            reason = _why_idle(attached=attached)
        self.warn_once(
            "idle", f"{self.idle_forwards} training forward passes without merging: {reason}"
        )

    def after_missed_step(self, optimizer: str) -> None:
        """Counts a step of an unattached optimizer of this class; warns after several."""
        self.missed_steps += 1
        if self.missed_steps >= _MISSED_STEPS:
            self.warn_once(
                "idle",
                f"{optimizer} took {self.missed_steps} steps without merging: it trains the "
                "weights to merge but is not attached. Call model.attach(optimizer), and again for "
                "each optimizer that replaces an attached one",
            )

    def why_never(self, step: int, *, attached: bool) -> str | None:
        """Returns why no step, before a checkpoint or after, was seen although training began."""
        began = self.idle_forwards or self.missed_steps
        return _why_idle(attached=attached) if began and not step else None

    def after_step(self, step: int, schedule: Schedule) -> None:
        """Warns where training goes on long after the schedule has ended.

        If epochs are passed for steps, it is over within the first epoch.
        """
        if schedule.end is None:
            return
        times, least = _OUTLASTED
        since = step + 1 - schedule.end
        if since >= max(times * (schedule.end - schedule.start), least):
            self.warn_once(
                "schedule",
                f"merging ended at step {schedule.end:,}, as its schedule says, and training has "
                f"gone on for {since:,} steps without it: total_steps and the end of a Schedule "
                "count optimizer steps, not epochs (epochs * len(loader), over the steps of "
                "gradient accumulation)",
            )

    def after_pass(
        self,
        layers: Sequence[MergedLayer],
        passes: Sequence[int],
        settings: MergeSettings,
        report: Callable[[], MergeReport],
    ) -> None:
        """Inspects layers at their first pass and every few; checks that merging has an effect.

        ``layers`` has a pass just merged, ``passes`` are those of each layer of the plan with this
        one. The report is made only if needed, because it waits for the device.
        """
        if settings.changes_nothing:
            value = f"{settings.size}={getattr(settings, settings.size)}"
            self.warn_once(
                "size",
                f"{value} leaves every kernel as it is, so that this is a plain training run: "
                f"change {settings.size}, or train without the wrapper",
            )
        every = settings.inspect_every

        def is_due(layer: MergedLayer) -> bool:
            return layer.site.name not in self._inspected or (passes[layer.number] - 1) % every == 0

        if every and (due := list(filter(is_due, layers))):
            self._inspect(due, report(), merges_for_good=settings.mode == "step")
        if max(passes[layer.number] for layer in layers) == _PATIENCE:
            self._judge(report(), settings)

    def _inspect(
        self, layers: Sequence[MergedLayer], report: MergeReport, *, merges_for_good: bool
    ) -> None:
        """Records the state of some layers, and warns of those whose kernels become similar."""
        for layer in layers:
            site = layer.site
            kernels = read_kernels(layer.module, centred=site.centred)
            rank = float(effective_rank(kernels, site.pair_groups))
            total = report[site.name]
            first_rank, last = self._inspected.get(site.name, (rank, None))
            self._inspected[site.name] = first_rank, total
            new = total.since(last)
            self.history.append(
                LayerSnapshot(site.name, total.steps, new.share, new.mean_cosine, rank)
            )
            # Training alone can lower the rank too, which is no reason to warn of merging. Nor can
            # merging for a gradient alone make copies.
            is_ours = merges_for_good and new.share > _NOTABLE
            if is_ours and rank < _COLLAPSED * first_rank:
                self.warn_once(
                    site.name,
                    f"the kernels of {site.name} are becoming copies of each other: their "
                    f"effective rank fell from {first_rank:.2f} to {rank:.2f} by step "
                    f"{total.steps}, and {new.share:.0%} of the drawn pairs merge. Raise "
                    "similarity_threshold, lower merge_probability, or let merging end earlier "
                    "(schedule)",
                    CollapseWarning,
                )

    def _judge(self, report: MergeReport, settings: MergeSettings) -> None:
        """Warns where hardly any pair merged."""
        if report.had_effect:
            return
        if not report.drawn:
            found = f"no pair was drawn in {_PATIENCE} steps"
            remedy = (
                "raise merge_probability"
                if settings.mode == "step"
                else "call the wrapper itself, in train mode, as its convolutions must be too"
            )
        else:
            found = (
                f"{report.merged or 'none'} of {report.drawn:,} drawn pairs passed "
                f"similarity_threshold={settings.similarity_threshold} in {_PATIENCE} steps"
            )
            largest = [
                (each.max_cosine, each.name) for each in report if each.max_cosine is not None
            ]
            remedy = "all kernels are zero or hold NaN or Inf"
            if largest:
                cosine, name = max(largest)
                advice = _advice(settings.similarity_threshold)
                remedy = f"the largest cosine was {cosine:.4f}, in {name}. {advice}"
        self.warn_once(
            "effect", f"merging has no effect, this is a plain training run: {found}; {remedy}"
        )


def _why_idle(*, attached: bool) -> str:
    if attached:
        return (
            "the attached optimizer never completed a step. Attach the optimizer whose step() your "
            "loop calls"
        )
    return "no optimizer is attached. Call model.attach(optimizer)"


def _advice(threshold: Threshold) -> str:
    """Suggests a threshold that merges, in place of one that hardly any pair passes."""
    if isinstance(threshold, Fixed):
        return (
            "Wide layers rarely reach a fixed cosine: use similarity_threshold=ZScore(2.0), "
            "which adapts to the width of a layer, or "
            "InMergeWrapper.recommended(network, total_steps=..., mode='step'), which sets it"
        )
    return (
        "Use a rule that more pairs pass: a smaller z, or similarity_threshold=Quantile(0.1), "
        "which always merges the most similar tenth of the pairs of each layer"
    )
