"""The draw and the move of one layer: what the settings make of the formulas.

Merging after a step and in the forward pass both call these functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inmerge_wrap.kernels import stream_of
from inmerge_wrap.merging import (
    add_gaussian,
    blend_kernels,
    centre,
    cyclic_sources,
    draw_pairs,
    mix,
    multiply_gaussian,
    nearest_kernels,
    norm_scale,
    pair_cosines,
    relative_weight,
)
from inmerge_wrap.plan import ConvSite
from inmerge_wrap.settings import MergeSettings

# They separate the random streams of directions and of shared partners from that of the pairs.
_DIRECTION_STREAM, _PARTNER_STREAM = 2**40, 2**41


@dataclass(frozen=True)
class Outcome:
    """What one pass over some layers did: of each layer its position in the plan, and its pairs."""

    numbers: Sequence[int]
    lengths: Sequence[int]
    cosines: Tensor  # of each drawn pair, layer after layer, shape (pairs,); NaN where undefined
    merged: Tensor  # whether the pair merged, boolean, shape (pairs,)

    @property
    def layer(self) -> Tensor:
        """Position of each pair's layer in the plan, int64, shape (pairs,)."""
        numbers, lengths = torch.tensor([[*self.numbers], [*self.lengths]], device="cpu")
        layer = numbers.repeat_interleave(lengths, output_size=len(self.cosines))
        return sent(layer, self.cosines.device)


@dataclass(frozen=True)
class Move:
    """How some kernels move, so that what follows them can move likewise."""

    rows: Tensor  # the new kernels, shape (pairs, fan_in)
    merge_weight: float | Tensor | None  # alpha, for all or each, shape (pairs, 1); None for noise
    scale: Tensor | None  # the factor that kept the norm, shape (pairs, 1)

    def follow(self, rows: Tensor, partners: Tensor) -> Tensor:
        """Blends what an optimizer keeps of the same kernels, shape (pairs, fan_in), likewise."""
        assert self.merge_weight is not None, "noise has no partner to blend with"
        weight = self.merge_weight
        weight = weight.to(rows.dtype) if isinstance(weight, Tensor) else weight
        blended = blend_kernels(rows, partners, weight)
        return blended if self.scale is None else blended * self.scale.to(rows.dtype)


def draw_layer(site: ConvSite, probability: float, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Draws the pairs of a layer from the seed, the step and the layer alone, on the CPU."""
    generator = torch.Generator("cpu").manual_seed(mix(seed, step, stream_of(site)))
    return draw_pairs(site.shape[0], probability, generator, site.pair_groups)


def shared_shift(site: ConvSite, seed: int, step: int) -> int:
    """Draws the cyclic shift that gives all kernels of a layer their partners on the outputs.

    Each kernel's partner is uniform: the shift lies in [1, C_out / groups). It is 0 where a group
    has one kernel and no pair exists.
    """
    size = site.shape[0] // site.pair_groups
    draw = mix(seed, step, _PARTNER_STREAM + stream_of(site))
    return 1 + draw % (size - 1) if size > 1 else 0


def pairs_of_step(
    sites: Sequence[ConvSite], settings: MergeSettings, step: int
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Returns the pairs that a step draws; see :meth:`InMergeWrapper.next_pairs`."""
    strength, found = settings.strength(step), {}
    for site in sites:
        sources: Tensor | None
        if settings.mode == "outputs":
            if not settings.shared_partner:
                raise RuntimeError(
                    "with shared_partner=False each image draws its own pairs from its content"
                )
            targets = torch.arange(0 if strength is None else site.shape[0])
            shift = shared_shift(site, settings.seed, step)
            sources = cyclic_sources(targets, shift, site.shape[0] // site.pair_groups)
        else:
            probability = 0.0 if strength is None else strength.probability
            targets, drawn = draw_layer(site, probability, settings.seed, step)
            sources = drawn if settings.partner == "random" else None
        found[site.name] = targets, sources
    return found


def draw_signs(site: ConvSite, count: int, seed: int, step: int) -> Tensor:
    """Draws 1 or -1 for each of the drawn pairs of a layer, int64, shape (count, 1), on the CPU.

    Also for those that will not merge, so that no sign depends on which of them do.
    """
    generator = _direction_generator(site, seed, step, torch.device("cpu"))
    return 2 * torch.randint(0, 2, (count, 1), generator=generator, device="cpu") - 1


def draw_noise(site: ConvSite, count: int, seed: int, step: int, device: torch.device) -> Tensor:
    """Draws standard normal numbers for kernels of a layer, float32, shape (count, fan_in)."""
    generator = _direction_generator(site, seed, step, device)
    shape = (count, site.fan_in)
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float32)


def _direction_generator(
    site: ConvSite, seed: int, step: int, device: torch.device
) -> torch.Generator:
    stream = _DIRECTION_STREAM + stream_of(site)
    return torch.Generator(device).manual_seed(mix(seed, step, stream))


def choose_sources(
    kernels: Tensor, targets: Tensor, sources: Tensor, site: ConvSite, settings: MergeSettings
) -> Tensor:
    """Returns the partners of the targets: the drawn ones, or those that a rule chooses.

    ``kernels`` are all of the layer, shape (C_out, fan_in), float32 or wider.
    """
    if settings.partner == "random":
        return sources
    bank = centre(kernels) if site.centred else kernels
    if settings.partner == "most_similar":
        return nearest_kernels(bank, targets, site.pair_groups)
    rule = settings.partner
    found = rule.sources(bank, targets, site.pair_groups)
    if found.shape != targets.shape or found.dtype != torch.int64:
        raise ValueError(
            f"partner={rule!r} must return one int64 index for each of the {len(targets)} "
            f"targets, got {found.dtype} of shape {tuple(found.shape)}"
        )
    if found.device.type == "cpu" and not torch.compiler.is_compiling():  # a device would wait
        size = len(bank) // site.pair_groups
        wrong = (found.div(size, rounding_mode="floor") != targets // size) | (found == targets)
        if wrong.any():
            place = int(wrong.nonzero()[0])
            raise ValueError(
                f"partner={rule!r} gave kernel {int(found[place])} of {len(bank)} as the partner "
                f"of {int(targets[place])}: a partner must be another kernel of the same group, "
                f"here of {size} kernels"
            )
    return found


def compare(
    kernels: Tensor,
    partners: Tensor,
    settings: MergeSettings,
    *,
    centred: bool,
    drawn: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the cosine of each pair (eq. 1, 2) and whether it passes the threshold (eq. 4).

    Pairs that were not ``drawn``, bool, shape (pairs,), have none: a rule judges the drawn alone.
    """
    if centred:
        kernels, partners = centre(kernels), centre(partners)
    cosines = pair_cosines(kernels, partners)
    if drawn is not None:
        cosines = torch.where(drawn, cosines, math.nan)
    similar = settings.similarity_threshold.is_similar(cosines, kernels.shape[1])
    if similar.shape != cosines.shape or similar.dtype != torch.bool:
        raise TypeError(
            f"similarity_threshold={settings.similarity_threshold} must decide on each pair: its "
            f"is_similar() gave {similar.dtype} of shape {tuple(similar.shape)} for {len(cosines)} "
            "cosines instead of as many booleans"
        )
    return cosines, similar


def weight_of(
    kernels: Tensor,
    partners: Tensor,
    signs: Tensor | None,
    size: float | Tensor,
    settings: MergeSettings,
) -> float | Tensor:
    """Returns alpha, the weight of the kernel itself, for all pairs or for each, (pairs, 1).

    Kernels and partners have the shape (pairs, fan_in). The signs, shape (pairs, 1), are 1 or -1;
    None moves all toward their partners.
    """
    if not isinstance(settings.direction, str):
        weight = settings.direction.weight(kernels, partners)
        if weight.shape != (len(kernels), 1):
            raise ValueError(
                f"direction={settings.direction!r} must return one weight for each of the "
                f"{len(kernels)} pairs, of shape ({len(kernels)}, 1), got {tuple(weight.shape)}"
            )
        return 1.0 - size * (1.0 - weight)
    ways = None if signs is None else signs.to(kernels.dtype)
    if settings.size == "radius":
        return relative_weight(kernels, partners, size if ways is None else ways * size)
    return size if ways is None else 1.0 - ways * (1.0 - size)


def move(
    kernels: Tensor,
    partners: Tensor,
    signs: Tensor | None,
    noise: Tensor | None,
    size: float | Tensor,
    settings: MergeSettings,
) -> Move:
    """Moves kernels toward their partners (eq. 3), or along standard normal noise.

    All three have the shape (pairs, fan_in), float32 or wider; signs are as for :func:`weight_of`.
    """
    if noise is None:
        weight = weight_of(kernels, partners, signs, size, settings)
        rows = blend_kernels(kernels, partners, weight)
    else:
        add = add_gaussian if settings.direction == "gaussian" else multiply_gaussian
        weight, rows = None, add(kernels, noise.to(kernels.dtype), size)
    if not settings.keep_norm:
        return Move(rows, weight, None)
    scale = norm_scale(kernels, rows)
    return Move(rows * scale, weight, scale)


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Sends what was drawn on the CPU to a device without waiting for it."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Disables autocast, inside which kernels would be compared in half precision."""
    kind = device.type
    # PyTorch 2.6 cannot compile the question whether a device has autocast.
    has = torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)
    if has and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()
