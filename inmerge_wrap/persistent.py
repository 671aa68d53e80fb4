"""Merging after an optimizer step: the only code of the library that writes a weight.

For each drawn pair ``(i, j)`` of a layer, all kernels being read before any is written::

    cos(K_i, K_j) > tau   =>   K_i <- alpha K_i + (1 - alpha) K_j          (eq. 1-4)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from inmerge_wrap.kernels import MergedLayer, Store
from inmerge_wrap.pairs import (
    Outcome,
    choose_sources,
    compare,
    draw_layer,
    draw_noise,
    draw_signs,
    move,
    sent,
    without_autocast,
)
from inmerge_wrap.plan import ConvSite
from inmerge_wrap.settings import NOISE, MergeSettings, Strength, compiles


@torch.no_grad()
def merge_step(
    layers: Sequence[MergedLayer],
    settings: MergeSettings,
    strength: Strength,
    step: int,
    companions: Mapping[int, Sequence[Store]],
    skip: Tensor | None,
) -> Outcome:
    """Draws and merges the pairs of some layers, in place.

    Half precision weights are compared and blended in float32 and rounded once. Kernels that are
    zero or hold NaN or Inf neither merge nor spread.

    ``companions`` are by the number of a layer the tensors of an optimizer that change like its
    weight; a scalar ``skip`` that is not zero disables the merge. The outcome is on the device of
    the first layer.
    """
    found = []
    for layer in layers:
        device = layer.store.weight.device
        kept = companions.get(layer.number, ())
        unless = None if skip is None else skip.to(device)
        with without_autocast(device), layer.store.opened() as store:
            found.append(_merge_layer_(layer.site, store, settings, strength, step, kept, unless))
    first = found[0][0].device
    cosines, merged = ([part.to(first) for part in parts] for parts in zip(*found, strict=True))
    numbers, lengths = [layer.number for layer in layers], [len(part) for part in cosines]
    return Outcome(numbers, lengths, torch.cat(cosines), torch.cat(merged))


def _merge_layer_(
    site: ConvSite,
    store: Store,
    settings: MergeSettings,
    strength: Strength,
    step: int,
    companions: Sequence[Store],
    skip: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Draws and merges the pairs of one layer; see :func:`merge_pairs_`."""
    device = store.weight.device
    targets, sources = draw_layer(site, strength.probability, settings.seed, step)
    signs = None
    if settings.direction == "signed":
        signs = sent(draw_signs(site, len(targets), settings.seed, step), device)
    targets, sources = sent(targets, device), sent(sources, device)
    if settings.partner != "random":
        everyone = torch.arange(site.shape[0], device=device)
        sources = choose_sources(store.read(everyone), targets, sources, site, settings)
    is_usual = isinstance(settings.direction, str) and settings.direction not in NOISE
    if store.is_matrix and is_usual and not companions and compiles(settings.compiled, device):
        size = torch.full((), strength.size, device=device)  # a tensor of a number would wait
        bank = _bank(store.weight)
        merge = _compiled()
        cosines, merged, rows = merge(
            bank, targets, sources, signs, size, skip, site.centred, settings
        )
        bank.index_copy_(0, targets, rows)
        return cosines, merged

    def noise(count: int) -> Tensor | None:
        if settings.direction not in NOISE:
            return None
        return draw_noise(site, count, settings.seed, step, device)

    return merge_pairs_(
        store,
        targets,
        sources,
        settings,
        strength.size,
        signs=signs,
        noise=noise,
        centred=site.centred,
        companions=companions,
        skip=skip,
    )


def merge_pairs_(
    store: Store,
    targets: Tensor,
    sources: Tensor,
    settings: MergeSettings,
    size: float,
    *,
    signs: Tensor | None = None,
    noise: Callable[[int], Tensor | None] = lambda count: None,
    centred: bool = False,
    companions: Sequence[Store] = (),
    skip: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Merges the drawn pairs of one weight, in place (eq. 1-4).

    All kernels are read before any is written, as the paper's simultaneous update requires, and
    only the rows in ``targets`` are touched. The store is opened; targets and sources are int64,
    shape (pairs,), the targets without repetition; signs are 1 or -1, shape (pairs, 1); ``noise``
    returns that of a number of kernels. Returns the cosine of each pair and whether it merged.
    """
    kernels, partners = store.read(targets), store.read(sources)
    cosines, merged = compare(kernels, partners, settings, centred=centred)
    if skip is not None:
        merged &= skip == 0
    mask: Tensor | None = merged
    if merged.device.type == "cpu":  # finding the merged pairs waits for nothing there
        (known,) = merged.nonzero(as_tuple=True)
        mask = None
        if len(known) < len(targets):
            targets, sources = targets[known], sources[known]
            kernels, partners = kernels[known], partners[known]
            signs = None if signs is None else signs[known]

    def put_(into: Store, rows: Tensor, before: Tensor) -> None:
        if mask is not None:
            rows = torch.where(mask.unsqueeze(1), rows, before)
        into.write_(targets, rows, mask)

    moved = move(kernels, partners, signs, noise(len(targets)), size, settings)
    put_(store, moved.rows, kernels)
    for companion in companions:
        with companion.opened() as kept:
            rows = kept.read(targets)
            put_(kept, moved.follow(rows, kept.read(sources)), rows)
    return cosines, merged


def _merged_bank(
    bank: Tensor,
    targets: Tensor,
    sources: Tensor,
    signs: Tensor | None,
    size: Tensor,
    skip: Tensor | None,
    centred: bool,
    settings: MergeSettings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Merges kernels that are the rows of a matrix, (C_out, fan_in): what is compiled as one.

    It returns the new rows and writes none: compiled by PyTorch 2.6 it would read what it has
    written, where the partner of one pair is the target of another.
    """
    wide = torch.promote_types(bank.dtype, torch.float32)
    kernels, partners = bank[targets].to(wide), bank[sources].to(wide)
    cosines, merged = compare(kernels, partners, settings, centred=centred)
    if skip is not None:
        merged = merged & (skip == 0)
    moved = move(kernels, partners, signs, None, size, settings)
    rows = torch.where(merged.unsqueeze(1), moved.rows, kernels)
    return cosines, merged, rows.to(bank.dtype)


@cache
def _compiled() -> Any:
    """Returns the compiled pass over a layer; layers of all sizes share its code."""
    return torch.compile(_merged_bank, dynamic=True)


def _bank(weight: Tensor) -> Tensor:
    """Returns the kernels as rows of a matrix that shares the memory of the weight."""
    if weight.is_contiguous():
        return weight.flatten(1)
    places = sorted(range(1, weight.ndim), key=weight.stride, reverse=True)
    return weight.permute(0, *places).view(len(weight), -1)
