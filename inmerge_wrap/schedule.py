"""When merging runs and how strongly, over the course of training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral
from typing import Literal

from inmerge_wrap.errors import check_choice

__all__ = ["Schedule"]


@dataclass(frozen=True)
class Schedule:
    """In which optimizer steps merging runs, and how strongly.

    A pure function of the step, so that a resumed run needs only its counter. The paper's two
    phases, training and then fine-tuning with merging, are ``Schedule(start=...)``.

    Attributes:
        start: The first step that merges, counted from 0.
        end: The first step that no longer merges; None for no end.
        every: Merge in every ``every``-th step from ``start`` on.
        decay: How the level falls from 1 at ``start`` to 0 at ``end``: ``"linear"`` or
            ``"cosine"``; ``"constant"`` stays at 1. With a decay, BatchNorm has time to follow the
            weights.
        anneals: What decays: ``"probability"`` (fewer pairs are drawn) or ``"strength"`` (pairs
            are blended less: the share ``1 - alpha`` of the partner shrinks).
    """

    start: int = 0
    end: int | None = None
    every: int = 1
    decay: Literal["constant", "linear", "cosine"] = "constant"
    anneals: Literal["probability", "strength"] = "probability"

    def __post_init__(self) -> None:
        for name in ("start", "end", "every"):
            value = getattr(self, name)
            if isinstance(value, Integral) or (isinstance(value, float) and value.is_integer()):
                object.__setattr__(self, name, int(value))
            elif not (name == "end" and value is None):
                raise TypeError(f"{name} must be a whole number of steps, got {value!r}")
        if self.start < 0:
            raise ValueError(f"start must be a step >= 0, got {self.start}")
        if self.end is not None and self.end <= self.start:
            raise ValueError(f"end must come after start={self.start}, got {self.end}")
        if self.every < 1:
            raise ValueError(f"every must be a count of steps >= 1, got {self.every}")
        check_choice("decay", self.decay, ("constant", "linear", "cosine"))
        check_choice("anneals", self.anneals, ("probability", "strength"))
        if self.decay != "constant" and self.end is None:
            raise ValueError(f"decay={self.decay!r} needs an end: the step at which merging stops")

    def level(self, step: int) -> float:
        """Returns the level at an optimizer step, in [0, 1]; 0 where the step does not merge."""
        if step < self.start or (self.end is not None and step >= self.end):
            return 0.0
        if (step - self.start) % self.every:
            return 0.0
        if self.decay == "constant" or self.end is None:
            return 1.0
        done = (step - self.start) / (self.end - self.start)
        return 1.0 - done if self.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
