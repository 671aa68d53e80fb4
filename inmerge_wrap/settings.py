"""The settings of merging: checked at construction, then frozen."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from numbers import Integral, Real
from typing import Any, Literal, ParamSpec, Protocol, get_args

import torch
from torch import Tensor

from inmerge_wrap.errors import check_choice, check_range
from inmerge_wrap.schedule import Schedule
from inmerge_wrap.thresholds import Fixed, Quantile, Threshold, ZScore, as_threshold

__all__ = [
    "DirectionRule",
    "MergeSettings",
    "Mode",
    "PartnerRule",
    "Strength",
    "recommended_settings",
]

Mode = Literal["step", "outputs", "weights"]
MODES: tuple[str, ...] = get_args(Mode)
PARTNERS = ("random", "most_similar")
DIRECTIONS = ("partner", "signed", "gaussian", "multiplicative")
NOISE = ("gaussian", "multiplicative")
# The symbols of the paper and the documentation, and the arguments that they denote.
_SYMBOLS = {
    "alpha": ("merge_weight", "in [0, 2]"),
    "tau": ("similarity_threshold", "in [-1, 1], or a rule such as ZScore(2.0)"),
    "p": ("merge_probability", "in [0, 1]"),
    "L_s": ("shallow_layers", "a count of layers, or a share of the depth in [0, 1)"),
}
_P = ParamSpec("_P")


class PartnerRule(Protocol):
    """A user's own choice of each kernel's partner."""

    def sources(self, kernels: Tensor, targets: Tensor, groups: int) -> Tensor:
        """Returns the partner of each target, int64, shape (pairs,).

        Args:
            kernels: All kernels of the layer, shape (C_out, fan_in), float32 or wider.
            targets: The drawn kernels, int64, shape (pairs,).
            groups: Groups of the layer; a partner must be another kernel of the same group, which
                is checked where the kernels are on the CPU.
        """
        ...


class DirectionRule(Protocol):
    """A user's own way and size of the move, along the line between a kernel and its partner."""

    def weight(self, kernels: Tensor, partners: Tensor) -> Tensor:
        """Returns the merge weight alpha of each pair at full strength, shape (pairs, 1).

        Args:
            kernels: Shape (pairs, fan_in), float32 or wider.
            partners: Of the same shape.
        """
        ...


Partner = Literal["random", "most_similar"] | PartnerRule
Direction = Literal["partner", "signed", "gaussian", "multiplicative"] | DirectionRule


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


@dataclass(frozen=True)
class Strength:
    """How strongly one step merges."""

    probability: float
    size: float  # alpha, or the radius, or for a DirectionRule the share of its full move


@dataclass(frozen=True, kw_only=True)
class MergeSettings:
    """The settings of an :class:`inmerge_wrap.InMergeWrapper`, which documents each attribute.

    Raises:
        ValueError: If a setting is out of range, or two contradict each other.
        TypeError: If a number, threshold, rule or schedule is of another type.
    """

    mode: Mode = "step"
    merge_weight: float = 0.8
    radius: float | None = None
    similarity_threshold: Threshold = field(default_factory=lambda: Fixed(0.3))
    merge_probability: float = 0.3
    schedule: Schedule = field(default_factory=Schedule)
    partner: Partner = "random"
    direction: Direction = "partner"
    shared_partner: bool = True
    shared_sign: bool = False
    keep_norm: bool = False
    merge_momentum: bool = False
    compiled: bool | None = None
    seed: int = 0
    inspect_every: int = 100
    check_replicas_every: int = 0

    def __post_init__(self) -> None:
        for name, high in (("merge_weight", 2.0), ("merge_probability", 1.0), ("radius", 2.0)):
            if (value := getattr(self, name)) is not None or name != "radius":
                check_range(name, value, 0.0, high)
                object.__setattr__(self, name, float(value))  # numpy's too
        object.__setattr__(self, "similarity_threshold", as_threshold(self.similarity_threshold))
        if not isinstance(self.schedule, Schedule):
            raise TypeError(f"schedule must be a Schedule, got {self.schedule!r}")
        check_choice("mode", self.mode, MODES)
        check_choice("partner", self.partner, PARTNERS, rule="sources")
        check_choice("direction", self.direction, DIRECTIONS, rule="weight")
        if not isinstance(self.seed, Integral) or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be an integer in [0, 2**32), got {self.seed!r}")
        for name in ("shared_partner", "shared_sign", "keep_norm", "merge_momentum", "compiled"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (name == "compiled" and value is None):
                raise TypeError(f"{name} must be True or False, got {value!r}")
        for name in ("inspect_every", "check_replicas_every"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or value < 0:
                raise ValueError(f"{name} must be a count of steps >= 0, got {value!r}")
        for name in ("seed", "inspect_every", "check_replicas_every"):
            object.__setattr__(self, name, int(getattr(self, name)))
        for problem in _contradictions(self):
            raise ValueError(problem)

    @property
    def size(self) -> str:
        """Name of the setting that is the size of a change."""
        if not isinstance(self.direction, str):
            return "direction"
        return "merge_weight" if self.radius is None else "radius"

    @property
    def changes_nothing(self) -> bool:
        """Whether the change has size zero, so that pairs count as merged and no kernel changes."""
        return (self.size, getattr(self, self.size)) in (("merge_weight", 1.0), ("radius", 0.0))

    @property
    def compares(self) -> bool:
        """Whether the merge looks at cosines: a threshold of -1 lets every pair pass."""
        threshold = self.similarity_threshold
        return not (isinstance(threshold, Fixed) and threshold.tau == -1.0)

    @property
    def draws_all(self) -> bool:
        """Whether every kernel is drawn in every step that merges, now and later."""
        thins = self.schedule.decay != "constant" and self.schedule.anneals == "probability"
        return self.merge_probability == 1.0 and not thins

    @property
    def in_words(self) -> str:
        """What merging does to the kernels, in two sentences."""
        match rule := self.similarity_threshold:
            case Fixed(tau=-1.0):
                which = "however similar"
            case Fixed():
                which = f"with a cosine above {rule}"
            case ZScore():
                which = f"{rule.z:g} standard deviations more similar than chance"
            case Quantile():
                which = f"the most similar {rule.share:.0%} of those drawn"
            case _:
                which = f"that {rule} lets pass"
        toward = "away from" if self.merge_weight > 1 else "toward"
        how = {
            "partner": f"a kernel moved {toward} its partner",
            "signed": "a kernel moved toward its partner or away from it, as the draw said",
            "gaussian": "a kernel moved in a random direction, by a share of its norm",
            "multiplicative": "the weights of a kernel were multiplied by random factors near 1",
        }.get(str(self.direction), f"a kernel moved as {self.direction} says")
        when = {
            "step": "After each optimizer step",
            "outputs": "In each forward pass of the training and for each image, on the outputs",
            "weights": "In each forward pass of the training",
        }[self.mode]
        stays = self.mode == "step"
        kept = "The moved kernels stayed in the weights" if stays else "No weight was written"
        return f"{when}, pairs of kernels of a layer were drawn; in pairs {which}, {how}. {kept}."

    def strength(self, step: int) -> Strength | None:
        """Returns how strongly an optimizer step merges; None where it does not merge."""
        level = self.schedule.level(step)
        if level == 0.0:
            return None
        fades = self.schedule.anneals == "strength"
        full = {
            "merge_weight": 1.0 - (1.0 - self.merge_weight) * level if fades else self.merge_weight,
            "radius": (self.radius or 0.0) * (level if fades else 1.0),
            "direction": level if fades else 1.0,
        }
        probability = self.merge_probability * (1.0 if fades else level)
        return Strength(probability, full[self.size])


def _contradictions(of: MergeSettings) -> list[str]:
    """Returns what does not go together, each as a message with the remedy."""
    default = MergeSettings.merge_weight
    rule = not isinstance(of.direction, str)
    noise = not rule and of.direction in NOISE
    outputs, forward = of.mode == "outputs", of.mode != "step"
    own = outputs and not of.shared_partner
    found = {
        f"direction={of.direction!r} needs a size relative to the kernel: set radius, for "
        "example radius=0.3": noise and of.radius is None,
        f"merge_weight={of.merge_weight} has no effect with radius={of.radius}, which is the size "
        f"of the change: set one of the two, and leave merge_weight at {default}": (
            of.radius is not None and of.merge_weight != default
        ),
        f"direction={of.direction!r} decides the size itself: leave merge_weight and radius at "
        "their defaults": rule and (of.radius is not None or of.merge_weight != default),
        f"direction={of.direction!r} has no form on the outputs of a convolution: use "
        "mode='weights', or direction='partner' or 'signed'": outputs and noise,
        f"partner={of.partner!r} needs mode='step' or 'weights': on the outputs the partners of "
        "all kernels are one cyclic shift": outputs and of.partner != "random",
        "shared_partner=False needs mode='outputs': only there each image can have its own "
        "pairs": not outputs and not of.shared_partner,
        "shared_partner=False needs a constant size: leave radius and direction rules out, which "
        "compare the kernels of a pair": own and (of.radius is not None or rule),
        f"shared_partner=False compares nothing: similarity_threshold={of.similarity_threshold} "
        "needs the same partners for all images, or set it to -1": own and of.compares,
        "shared_sign=True needs mode='outputs', where signs are drawn for each image": (
            of.shared_sign and not outputs
        ),
        f"shared_sign=True has no effect with direction={of.direction!r} and "
        "merge_probability=1.0, which draw nothing for an image: leave it out": (
            of.shared_sign and outputs and of.direction != "signed" and of.draws_all
        ),
        "keep_norm=True needs mode='step' or 'weights': on the outputs no kernel is there to be "
        "rescaled": outputs and of.keep_norm,
        f"merge_momentum has no effect with mode={of.mode!r}, where no weight is written: leave "
        "one of them out": forward and of.merge_momentum,
        f"merge_momentum needs a partner to blend with, and direction={of.direction!r} has none; "
        "leave one of them out": of.merge_momentum and noise,
        f"compiled=True has no effect with direction={of.direction!r}, whose pass is not compiled: "
        "leave it out": bool(of.compiled) and (noise or rule),
        f"compiled={of.compiled} has no effect with mode={of.mode!r}, which compiles with the "
        "network: use torch.compile(model)": forward and of.compiled is not None,
    }
    return [problem for problem, is_so in found.items() if is_so]


def recommended_settings(total_steps: int, *, mode: Mode = "outputs") -> dict[str, Any]:
    """Returns the settings of ``InMergeWrapper.recommended``, to be shown or changed.

    In the forward pass (``mode="outputs"``): in every merged layer of the whole depth the channels
    of each image move by a fifth toward a partner or away from it. The move fades out along a
    cosine. It ends 5% of the steps before the end of training, so that the BatchNorm statistics
    fit the final weights.

    Args:
        total_steps: Optimizer steps of the whole training run.
        mode: ``"step"`` returns settings for merging after each step: deep pairs that are more
            similar than chance (:class:`ZScore` of 2) merge as in the paper, and the probability
            fades out. ``"weights"`` returns those of ``"outputs"`` with a move of 0.3 of the
            kernel's norm, which all images share.

    Raises:
        ValueError: If ``total_steps`` is not positive, or the mode unknown.
    """
    if not isinstance(total_steps, Real) or not 1 <= total_steps < math.inf:
        raise ValueError(f"total_steps must be a count of steps >= 1, got {total_steps!r}")
    check_choice("mode", mode, MODES)
    end = max(1, int(total_steps) - max(1, int(total_steps) // 20))
    if mode == "step":
        return {
            "mode": "step",
            "similarity_threshold": ZScore(2.0),
            "schedule": Schedule(end=end, decay="cosine"),
        }
    size = {"merge_weight": 0.8} if mode == "outputs" else {"radius": 0.3}
    return {
        "mode": mode,
        "direction": "signed",
        **size,
        "shallow_layers": 0,
        "similarity_threshold": -1.0,
        "merge_probability": 1.0,
        "schedule": Schedule(end=end, decay="cosine", anneals="strength"),
        "inspect_every": 0,  # no weight is written that could become a copy of another
    }


def compiles(compiled: bool | None, device: torch.device) -> bool:
    """Returns whether a pass after a step runs compiled: as set, or on a GPU with Triton."""
    if compiled is not None:
        return compiled
    if device.type != "cuda":
        return False
    from torch.utils._triton import has_triton

    return has_triton()
