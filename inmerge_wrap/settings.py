"""The settings of merging: checked at construction, then frozen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import wraps
from numbers import Real
from typing import Any, Literal, ParamSpec

from inmerge_wrap.engines import ENGINES
from inmerge_wrap.merging import check_range
from inmerge_wrap.schedule import Schedule
from inmerge_wrap.thresholds import Fixed, Threshold, ZScore, as_threshold

__all__ = ["MergeSettings", "recommended_settings"]

PARTNERS = ("random", "most_similar")
DIRECTIONS = ("partner", "signed", "gaussian", "multiplicative")
_CHOICES = {"partner": PARTNERS, "direction": DIRECTIONS, "engine": ENGINES}
# The symbols of the paper and the documentation, and the arguments that they denote.
_SYMBOLS = {
    "alpha": ("merge_weight", "in [0, 2]"),
    "tau": ("similarity_threshold", "in [-1, 1], or a rule such as ZScore(2.0)"),
    "p": ("merge_probability", "in [0, 1]"),
    "L_s": ("shallow_layers", "a count of layers, or a share of the depth in [0, 1)"),
}
_P = ParamSpec("_P")


def explains_symbols(function: Callable[_P, None]) -> Callable[_P, None]:
    """Decorates a function to name the right argument when the paper's symbol is passed."""

    @wraps(function)
    def explained(*args: _P.args, **kwargs: _P.kwargs) -> None:
        for symbol in _SYMBOLS.keys() & kwargs.keys():
            name, values = _SYMBOLS[symbol]
            raise TypeError(
                f"{symbol}={kwargs[symbol]!r}: the argument for the paper's {symbol} is {name} "
                f"({values}), so write {name}={kwargs[symbol]!r}"
            )
        function(*args, **kwargs)

    return explained


@dataclass(frozen=True, kw_only=True)
class MergeSettings:
    """The settings of an :class:`inmerge_wrap.InMergeWrapper`, which documents each attribute.

    Raises:
        ValueError: If a setting is out of range, or two contradict each other.
        TypeError: If a number, threshold or schedule is of another type.
    """

    merge_weight: float = 0.8
    similarity_threshold: Threshold = field(default_factory=lambda: Fixed(0.3))
    merge_probability: float = 0.3
    schedule: Schedule = field(default_factory=Schedule)
    partner: Literal["random", "most_similar"] = "random"
    direction: Literal["partner", "signed", "gaussian", "multiplicative"] = "partner"
    radius: float = 0.3
    keep_norm: bool = False
    merge_momentum: bool = False
    transient: bool = False
    replica_draws: bool = False
    engine: str = "auto"
    seed: int = 0
    inspect_every: int = 100
    check_replicas_every: int = 0

    def __post_init__(self) -> None:
        check_range("merge_weight", self.merge_weight, 0.0, 2.0)
        check_range("merge_probability", self.merge_probability, 0.0, 1.0)
        check_range("radius", self.radius, 0.0, 2.0)
        object.__setattr__(self, "similarity_threshold", as_threshold(self.similarity_threshold))
        if not isinstance(self.schedule, Schedule):
            raise TypeError(f"schedule must be a Schedule, got {self.schedule!r}")
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                listed = " or ".join(map(repr, choices))
                raise ValueError(f"{name} must be {listed}, got {value!r}")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be an integer in [0, 2**32), got {self.seed!r}")
        for name in ("inspect_every", "check_replicas_every"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} must be a count of steps >= 0, got {value!r}")
        self._check_combinations()

    def _check_combinations(self) -> None:
        unused = {"radius": "merge_weight", "merge_weight": "radius"}[self.size]
        value, default = getattr(self, unused), getattr(MergeSettings, unused)
        if value != default:
            raise ValueError(
                f"{unused}={value} has no effect with direction={self.direction!r}, where "
                f"{self.size} is the size of the change: set {self.size}, and leave {unused} at "
                f"{default}"
            )
        if self.merge_momentum and self.transient:
            raise ValueError(
                "merge_momentum has no effect with transient=True: the optimizer steps from the "
                "unmerged kernels; leave one of them out"
            )
        if self.merge_momentum and self.direction in ("gaussian", "multiplicative"):
            raise ValueError(
                f"merge_momentum needs a partner to blend with, and direction={self.direction!r} "
                "has none; leave one of them out"
            )
        if self.replica_draws and not self.transient:
            raise ValueError(
                "replica_draws=True needs transient=True: replicas that merge different pairs "
                "permanently would drift apart"
            )

    @property
    def size(self) -> str:
        """Name of the setting that is the size of a change: ``merge_weight`` or ``radius``."""
        return "merge_weight" if self.direction == "partner" else "radius"

    @property
    def changes_nothing(self) -> bool:
        """Whether the change has size zero, so that pairs count as merged and no kernel changes."""
        return self.merge_weight == 1.0 if self.direction == "partner" else self.radius == 0.0

    def at(self, step: int) -> MergeSettings | None:
        """Returns the settings of an optimizer step; None where the step does not merge."""
        level = self.schedule.level(step)
        if level == 0.0:
            return None
        if level == 1.0:
            return self
        probability, weight = self.schedule.apply(step, self.merge_probability, self.merge_weight)
        if self.direction == "partner":
            return replace(self, merge_probability=probability, merge_weight=weight)
        fades = self.schedule.anneals == "strength"
        radius = self.radius * level if fades else self.radius
        return replace(self, merge_probability=probability, radius=radius)


def recommended_settings(total_steps: int, *, transient: bool = True) -> dict[str, Any]:
    """Returns the settings of ``InMergeWrapper.recommended``, to be shown or changed.

    They are those that docs/evidence.md confirms for fine-tuning: at each step every kernel of
    every merged layer moves by .3 of its norm toward a random partner or away from it, for the
    gradient alone. The move fades out along a cosine. It ends 5 % of the steps before the end of
    training, so that the BatchNorm statistics fit the final weights.

    Args:
        total_steps: Optimizer steps of the whole training run.
        transient: False returns settings for merging that stays, where transient merging is not
            possible (FSDP2) or not wanted: deep pairs that are more similar than chance
            (:class:`ZScore` of 2) merge as in the paper, and the probability fades out.

    Raises:
        ValueError: If ``total_steps`` is not positive.
    """
    if not isinstance(total_steps, Real) or total_steps < 1:
        raise ValueError(f"total_steps must be a count of steps >= 1, got {total_steps!r}")
    end = max(1, int(total_steps) - max(1, int(total_steps) // 20))
    if not transient:
        return {
            "similarity_threshold": ZScore(2.0),
            "schedule": Schedule(end=end, decay="cosine"),
        }
    return {
        "transient": True,
        "direction": "signed",
        "radius": 0.3,
        "shallow_layers": 0,
        "similarity_threshold": -1.0,
        "merge_probability": 1.0,
        "schedule": Schedule(end=end, decay="cosine", anneals="strength"),
    }
