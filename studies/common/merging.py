"""In-model merging as a method of the studies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from inmerge_wrap import InMergeWrapper, Schedule
from studies.common.methods import Follower, Method, Training


@dataclass(frozen=True)
class Fade:
    """A Schedule of merging in shares of the training run."""

    start: float = 0.0
    decay: Literal["constant", "linear", "cosine"] = "cosine"
    anneals: Literal["probability", "strength"] = "probability"

    def schedule(self, total_steps: int) -> Schedule:
        """Returns the schedule for a training run of ``total_steps`` steps."""
        start = round(self.start * total_steps)
        return Schedule(start=start, end=total_steps, decay=self.decay, anneals=self.anneals)


@dataclass(frozen=True)
class Merge(Method):
    """In-model merging; settings left out are the paper's, or those recommended where it stays.

    Attributes:
        settings: Arguments of InMergeWrapper; not ``schedule`` and not ``seed``. ``transient``,
            in the records of the first two studies, says that no merge stays: it is mode
            ``"weights"``, and without it ``"step"``.
        fade: The schedule; None merges in every step to the end, or as recommended.
        recommended: Build on ``InMergeWrapper.recommended(..., mode="step")``.
        recalibrate: Recompute BatchNorm's statistics after training.
    """

    name: ClassVar[str] = "merge"
    settings: Mapping[str, Any] = field(default_factory=dict)
    fade: Fade | None = None
    recommended: bool = False
    recalibrate: bool = False

    def wrap(self, network: nn.Module, total_steps: int, seed: int) -> nn.Module:
        settings = {**self.settings, "seed": seed}
        if settings.pop("transient", False):
            settings["mode"] = "weights"
        if self.fade is not None:
            settings["schedule"] = self.fade.schedule(total_steps)
        if self.recommended:
            return InMergeWrapper.recommended(
                network, total_steps=total_steps, mode="step", **settings
            )
        return InMergeWrapper(network, **settings)

    def follow(self, training: Training) -> Follower:
        return _Merging(training, self.recalibrate)

    def to_dict(self) -> dict[str, Any]:
        written: dict[str, Any] = {
            name: asdict(value) if is_dataclass(value) else value  # type: ignore[arg-type]
            for name, value in self.settings.items()
        }
        if self.fade is not None:
            written["schedule"] = asdict(self.fade)
        switches = {"recommended": self.recommended, "recalibrate": self.recalibrate}
        return written | {name: True for name, on in switches.items() if on}


class _Merging(Follower):
    def __init__(self, training: Training, measure_again: bool) -> None:
        assert isinstance(training.model, InMergeWrapper)
        self.model, self.measure_again = training.model, measure_again
        self.model.attach(training.optimizer)

    def finish(self, network: nn.Module, images: Callable[[], Iterable[Tensor]]) -> nn.Module:
        if self.measure_again:
            self.model.recalibrate(images())
        return network

    def seen(self) -> dict[str, Any]:
        report = self.model.report()
        last = self.model.history[-len(report) :]
        return {
            "merging": {"drawn": report.drawn, "merged": report.merged},
            "layers": [
                {"layer": entry.name, "share": entry.share, "effective_rank": entry.effective_rank}
                for entry in last
            ],
        }
