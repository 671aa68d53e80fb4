"""One pass over some layers: partners, cosines, threshold, change. Only weights are modified.

For each drawn pair ``(i, j)`` of a layer, all kernels being read before any is written::

    cos(K_i, K_j) > tau   =>   K_i <- alpha K_i + (1 - alpha) K_j          (eq. 1-4)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from inmerge_wrap.changes import Blend, Change, Noise
from inmerge_wrap.discovery import ConvSite
from inmerge_wrap.engines import (
    Engine,
    divided,
    group,
    has_merge,
    merge_at_once_,
    native,
    step_at_once_,
    torch_blocks,
)
from inmerge_wrap.layers import Layers, MergedLayer, stream_of
from inmerge_wrap.merging import (
    centre,
    draw_layers,
    nearest_kernels,
    norm_scale,
    signed_weight,
)
from inmerge_wrap.pairs import Outcome, Pairs, Totals, mix
from inmerge_wrap.settings import MergeSettings
from inmerge_wrap.stores import Plain, Store, store_of
from inmerge_wrap.thresholds import Fixed, Threshold

__all__ = ["merge_pairs_"]

_DIRECTION_STREAM = 2**40  # separates the random stream of directions from that of the pairs


class Kept(Protocol):
    """Kernels of some layers as they were before a pass."""

    @property
    def modules(self) -> Sequence[nn.Module]:
        """The convolutions."""
        ...

    def put_back_(self) -> None:
        """Restores the kernels, bit for bit, wherever the convolutions have their weights now."""
        ...


@dataclass(frozen=True)
class KeptKernels:
    """Kernels of one layer as they were before a pass.

    Attributes:
        module: The convolution.
        index: Indices of the kernels, int64, shape (kernels,).
        rows: The content that the layer's store returned for them.
    """

    module: nn.Module
    index: Tensor
    rows: tuple[Tensor, ...]

    @property
    def modules(self) -> tuple[nn.Module]:
        """See :class:`Kept`."""
        return (self.module,)

    def put_back_(self) -> None:
        """See :class:`Kept`."""
        store_of(self.module).copy_back_(self.index, self.rows)


def draw_step(layers: Layers, settings: MergeSettings, step: int) -> Pairs:
    """Draws the pairs of some layers, from the seed, the step and the layer alone.

    Args:
        layers: At least one.
        settings: Those of this step, see :meth:`MergeSettings.at`.
        step: The optimizer step.

    Returns:
        The pairs, on the CPU. The sources are those of ``partner="random"``.
    """
    if _draws_natively(settings):
        pairs = native.draw(layers, settings.merge_probability, settings.seed, step)
    else:
        counts = [layer.site.shape[0] for layer in layers]
        sizes = [layer.site.shape[0] // layer.site.pair_groups for layer in layers]
        seeds = [mix(settings.seed, step, stream_of(layer.site)) for layer in layers]
        table, lengths = draw_layers(counts, sizes, settings.merge_probability, seeds)
        pairs = Pairs(table, tuple(lengths))
    if layers.are_first:
        return pairs
    number = torch.tensor(layers.numbers, dtype=torch.int64, device="cpu")
    return Pairs(
        torch.stack([number[pairs.layer], pairs.targets, pairs.sources]),
        pairs.lengths,
    )


def _draws_natively(settings: MergeSettings) -> bool:
    """Returns whether native code draws, for weights on any device."""
    return settings.engine != "torch" and native.problem() is None


def merge_step(
    layers: Layers,
    settings: MergeSettings,
    step: int,
    *,
    companions: Mapping[int, Sequence[Store]] | None = None,
    skip: Tensor | None = None,
    keep: list[Kept] | None = None,
) -> Outcome | Totals:
    """Draws and merges the pairs of some layers, in place.

    Equal to :func:`draw_step` and :func:`merge_layers`, in one call where an engine has one.
    """
    blends = settings.direction in ("partner", "signed") and not settings.keep_norm
    if blends and settings.partner == "random" and not companions:
        totals = step_at_once_(
            layers,
            settings.engine,
            probability=settings.merge_probability,
            seed=settings.seed,
            step=step,
            threshold=settings.similarity_threshold,
            merge_weight=settings.merge_weight,
            radius=settings.radius if settings.direction == "signed" else None,
            skip=skip,
            keep=keep,
        )
        if totals is not None:
            return totals
    pairs = draw_step(layers, settings, step)
    return merge_layers(
        layers, pairs, settings, step=step, companions=companions, skip=skip, keep=keep
    )


def merge_layers(
    layers: Layers,
    pairs: Pairs,
    settings: MergeSettings,
    *,
    step: int = 0,
    companions: Mapping[int, Sequence[Store]] | None = None,
    skip: Tensor | None = None,
    keep: list[Kept] | None = None,
) -> Outcome:
    """Merges the drawn pairs of some layers, in place.

    Args:
        layers: At least one.
        pairs: Their drawn pairs, layer after layer, on the CPU.
        settings: Those of this step, see :meth:`MergeSettings.at`.
        step: The optimizer step; with the seed it decides random directions.
        companions: Number of a layer -> tensors of an optimizer that change like its weight.
        skip: A scalar on the device; non-zero disables the merge.
        keep: Receives a copy of the kernels that change, before they do.

    Returns:
        The outcome of each pair, on the device of the first layer.
    """
    with _without_autocast(layers[0].store.weight.device):
        return _merge_groups(layers, pairs, settings, step, companions or {}, skip, keep)


def _merge_groups(
    layers: Layers,
    pairs: Pairs,
    settings: MergeSettings,
    step: int,
    companions: Mapping[int, Sequence[Store]],
    skip: Tensor | None,
    keep: list[Kept] | None,
) -> Outcome:
    """Passes each engine its layers, and restores the order of the layers in the results."""
    cosines: list[Tensor] = [torch.empty(0)] * len(layers)
    merged = list(cosines)
    on_device: dict[torch.device, Pairs] = {}
    for engine, places, batch in divided(layers, settings.engine):
        device = batch[0].store.weight.device
        if has_merge(engine):  # which sends what it needs of the pairs itself
            theirs = pairs.of(places)
        else:
            if device not in on_device:
                on_device[device] = pairs.to(device)
            theirs = on_device[device].of(places)
        found = _merge_batch(engine, batch, theirs, settings, step, companions, skip, keep)
        if batch is layers:  # already in order
            return found
        for parts, whole in ((cosines, found.cosines), (merged, found.merged)):
            for place, part in zip(places, whole.split(theirs.lengths), strict=True):
                parts[place] = part
    device = cosines[0].device
    return Outcome(
        pairs.layer.to(device),
        torch.cat([part.to(device) for part in cosines]),
        torch.cat([part.to(device) for part in merged]),
        pairs.lengths,
    )


def _merge_batch(
    engine: Engine,
    layers: Layers,
    pairs: Pairs,
    settings: MergeSettings,
    step: int,
    companions: Mapping[int, Sequence[Store]],
    skip: Tensor | None,
    keep: list[Kept] | None,
) -> Outcome:
    """Merges a batch of layers with one engine, in one call or step by step."""
    blend = Blend(settings.merge_weight)
    blends = settings.direction == "partner" and not settings.keep_norm and engine.makes(blend)
    changes: list[Change] = [blend] * len(layers)
    signs = None
    if settings.direction == "signed":
        signs = _signs(layers, pairs.lengths, settings, step)
    moves = signs is not None and not settings.keep_norm and not companions
    if (blends or moves) and settings.partner == "random":
        outcome = merge_at_once_(
            engine,
            layers,
            pairs,
            settings.similarity_threshold,
            settings.merge_weight if signs is None else settings.radius,
            signs=signs,
            skip=skip,
            keep=keep,
        )
        if outcome is not None:
            merged = outcome.merged
            _change_companions_(layers, pairs, merged, changes, companions, settings.engine)
            return outcome
    device = layers[0].store.weight.device
    pairs = pairs.to(device)
    signs = None if signs is None else signs.to(device)
    sites = [layer.site for layer in layers]
    with ExitStack() as stack:
        stores = [stack.enter_context(layer.store.opened()) for layer in layers]
        if settings.partner == "most_similar":
            pairs = pairs.toward(torch.cat([*map(_nearest, layers, stores, pairs.split())]))
        cosines = engine.cosines(stores, pairs, [site.centred for site in sites])
        fan_ins = [site.fan_in for site in sites]
        merged = _alike(settings.similarity_threshold, cosines, pairs.lengths, fan_ins)
        if skip is not None:
            merged &= skip.to(merged.device) == 0
        if keep is not None:
            keep += map(_copy, layers, stores, pairs.split(), merged.split(pairs.lengths))
        outcome = Outcome(pairs.layer, cosines, merged, pairs.lengths)
        if blends:
            engine.change_(stores, pairs, merged, blend)
            _change_companions_(layers, pairs, merged, changes, companions, settings.engine)
            return outcome
        masks = merged.split(pairs.lengths)
        ways = [None] * len(layers) if signs is None else signs.split(pairs.lengths)
        for layer, store, part, mask, way in zip(
            layers, stores, pairs.split(), masks, ways, strict=True
        ):
            known = _known(mask)
            some, changed = part, mask
            if known is not None:
                some, changed = part.at(known), None
                way = None if way is None else way[known]
            change = _change_of(layer, store, some, settings, step, way)
            torch_blocks.change_([store], some, changed, change)
            _change_companions_([layer], some, changed, [change], companions, settings.engine)
    return outcome


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Disables autocast, inside which kernels would be compared in half precision."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def _nearest(layer: MergedLayer, store: Store, pairs: Pairs) -> Tensor:
    """Returns the most similar partner of each target of a layer."""
    everyone = torch.arange(layer.site.shape[0], device=pairs.targets.device)
    bank = store.read(everyone)
    bank = centre(bank) if layer.site.centred else bank
    return nearest_kernels(bank, pairs.targets, layer.site.pair_groups)


def _alike(
    threshold: Threshold, cosines: Tensor, lengths: Sequence[int], fan_ins: Sequence[int]
) -> Tensor:
    """Returns which pairs are alike enough to merge, boolean, shape (pairs,)."""
    if type(threshold) is Fixed:  # the same in all layers
        return threshold.alike(cosines, max(fan_ins))
    masks = []
    for part, fan_in in zip(cosines.split(lengths), fan_ins, strict=True):
        alike = threshold.alike(part, fan_in)
        if alike.shape != part.shape or alike.dtype != torch.bool:
            raise TypeError(
                f"similarity_threshold={threshold} must decide on each pair: its alike() gave a "
                f"{alike.dtype} of shape {tuple(alike.shape)} for {len(part)} cosines instead of "
                "as many booleans"
            )
        masks.append(alike)
    return torch.cat(masks)


def _known(changed: Tensor) -> Tensor | None:
    """Returns the index of the pairs that merge, where finding it does not wait for a device.

    On a CPU the others then cost nothing; on other devices the mask decides later.
    """
    return changed.nonzero().flatten() if changed.device.type == "cpu" else None


def _copy(layer: MergedLayer, store: Store, pairs: Pairs, changed: Tensor) -> KeptKernels:
    known = _known(changed)
    targets = pairs.targets if known is None else pairs.targets[known]
    return KeptKernels(layer.module, targets, store.copy_out(targets))


def _change_of(
    layer: MergedLayer,
    store: Store,
    pairs: Pairs,
    settings: MergeSettings,
    step: int,
    signs: Tensor | None,
) -> Change:
    """Returns the change of the kernels of one layer; ``signs`` for the signed direction."""
    device = pairs.targets.device
    if settings.direction == "partner":
        blend = Blend(settings.merge_weight)
    elif signs is None:
        numbers = torch.randn(
            (len(pairs), layer.site.fan_in),
            generator=_direction_generator(layer, settings, step, device),
            device=device,
            dtype=torch.float32,
        )
        multiplicative = settings.direction == "multiplicative"
        return Noise(multiplicative, settings.radius, numbers, settings.keep_norm)
    else:
        blend = Blend(
            torch.cat(
                [
                    signed_weight(kernels, partners, signs[here], settings.radius)
                    for here, kernels, partners in torch_blocks.blocks(store, pairs)
                ]
            )
        )
    if not settings.keep_norm:
        return blend
    scales = [
        norm_scale(kernels, partners, blend.at(here).merge_weight)
        for here, kernels, partners in torch_blocks.blocks(store, pairs)
    ]
    return Blend(blend.merge_weight, torch.cat(scales))


def _signs(
    layers: Sequence[MergedLayer], drawn: Sequence[int], settings: MergeSettings, step: int
) -> Tensor:
    """Draws 1 or -1 for each drawn pair, on the host.

    Also for those that will not merge, so that no sign depends on which of them do.
    """
    if _draws_natively(settings):
        streams = [stream_of(layer.site) for layer in layers]
        return native.draw_signs(streams, drawn, settings.seed, step)
    host = torch.device("cpu")
    draws = [
        torch.randint(
            0, 2, (count,), generator=_direction_generator(layer, settings, step, host), device=host
        )
        for layer, count in zip(layers, drawn, strict=True)
    ]
    return 2 * torch.cat(draws) - 1


def _direction_generator(
    layer: MergedLayer, settings: MergeSettings, step: int, device: torch.device
) -> torch.Generator:
    """Returns the generator of a layer's directions, independent of that of its pairs."""
    generator = torch.Generator(device)
    return generator.manual_seed(
        mix(settings.seed, step, _DIRECTION_STREAM + stream_of(layer.site))
    )


def _change_companions_(
    layers: Sequence[MergedLayer],
    pairs: Pairs,
    changed: Tensor | None,
    changes: Sequence[Change],
    companions: Mapping[int, Sequence[Store]],
    name: str,
) -> None:
    """Changes the tensors that an optimizer keeps of some layers like their weights."""
    if not companions:
        return
    pairs = pairs.to(layers[0].store.weight.device)
    masks = [None] * len(layers) if changed is None else changed.split(pairs.lengths)
    for layer, part, mask, change in zip(layers, pairs.split(), masks, changes, strict=True):
        for companion in companions.get(layer.number, ()):
            ((engine, _),) = group([companion], name)
            engine = engine if engine.makes(change) else torch_blocks
            with companion.opened() as store:
                engine.change_([store], part, mask, change)


def merge_pairs_(
    weight: Tensor,
    targets: Tensor,
    sources: Tensor,
    *,
    merge_weight: float,
    similarity_threshold: float,
) -> Tensor:
    """Merges the drawn pairs of one convolution weight, in place (eq. 1-4).

    All kernels are read before any is written, as the paper's simultaneous update requires, and
    only the rows in ``targets`` are touched. Half precision weights are compared and blended in
    float32 and rounded once. Kernels that are zero or hold NaN or Inf neither merge nor spread.

    Args:
        weight: Shape (C_out, C_in / groups, kH, kW), floating point, any memory format.
        targets: Kernels to blend, int64, shape (pairs,), without repetition.
        sources: Their partners, int64, shape (pairs,).
        merge_weight: alpha in [0, 2], the weight of the kernel itself in the blend.
        similarity_threshold: tau in [-1, 1]; a pair merges if its cosine is above it.

    Returns:
        Boolean mask of the pairs that were merged, shape (pairs,), on the weight's device.

    Raises:
        ValueError: If ``merge_weight`` or ``similarity_threshold`` is out of range.
    """
    settings = MergeSettings(
        merge_weight=merge_weight,
        similarity_threshold=similarity_threshold,  # type: ignore[arg-type]
        engine="torch",
    )
    site = ConvSite("weight", 1, tuple(weight.shape))
    layer = MergedLayer(0, site, nn.Module(), Plain(weight.detach()))
    table = torch.stack([torch.zeros_like(targets), targets, sources])
    with torch.no_grad():
        return merge_layers(Layers([layer]), Pairs(table, (len(targets),)), settings).merged
