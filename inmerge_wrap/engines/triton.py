"""The Triton engine: a pass over all layers in a few launches, on a GPU.

See :mod:`inmerge_wrap.engines.triton_launches` for the launches. The tests run it in Triton's
interpreter, on a CPU, and on a GPU where there is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inmerge_wrap.changes import Blend, Change
from inmerge_wrap.engines import triton_launches
from inmerge_wrap.engines.native import makes as makes
from inmerge_wrap.layers import Layers
from inmerge_wrap.pairs import Outcome, Pairs
from inmerge_wrap.stores import Plain, Store, batched, store_of
from inmerge_wrap.thresholds import Fixed, Quantile, Threshold, ZScore

__all__ = ["NAME", "KeptBuffer", "batches", "change_", "cosines", "makes", "merge_", "problem"]

NAME = "triton"


def problem(device: torch.device) -> str | None:
    """Returns why Triton cannot be used on a device; None where it can."""
    return triton_launches.unavailable_reason(device)


def takes(store: Store) -> bool:
    """Returns whether the kernels of a store can be read and written where they are."""
    weight = store.rows_in_memory
    return weight is not None and triton_launches.takes(weight)


def batches(stores: Sequence[Store]) -> list[list[int]]:
    """Groups the layers of a device and a dtype, except those that share memory."""
    return batched(stores, lambda weight: (weight.device, weight.dtype))


def cosines(stores: Sequence[Store], pairs: Pairs, centred: Sequence[bool]) -> Tensor:
    """Returns the float32 cosine of each pair; see :func:`inmerge_wrap.merging.pair_cosines`."""
    weights = [store.weight for store in stores]
    ends = pairs.targets, pairs.sources
    return triton_launches.compare(
        triton_launches.batch_of(weights, pairs.lengths, *ends, centred=centred)
    )


def change_(stores: Sequence[Store], pairs: Pairs, changed: Tensor | None, change: Change) -> None:
    """Blends kernels in place; all are read before they are written (eq. 3)."""
    assert isinstance(change, Blend) and not isinstance(change.merge_weight, Tensor)
    if changed is None:
        changed = torch.ones_like(pairs.targets, dtype=torch.bool)
    weights = [store.weight for store in stores]
    batch = triton_launches.batch_of(weights, pairs.lengths, pairs.targets, pairs.sources)
    triton_launches.merge_(batch, change.merge_weight, decided=changed)


def merge_(
    layers: Layers,
    pairs: Pairs,
    threshold: Threshold,
    merge_weight: float,
    *,
    signs: Tensor | None = None,
    skip: Tensor | None = None,
    keep: list[Any] | None = None,
) -> Outcome | None:
    """Compares, decides and blends; equal to :func:`cosines`, the threshold and :func:`change_`.

    For any number of layers: one message and two launches; a quantile takes some twenty more.

    Args:
        layers: The layers of one batch, see :func:`batches`.
        pairs: Drawn pairs, on the CPU.
        threshold: The rule that decides which pairs merge.
        merge_weight: See :func:`triton_launches.merge_`.
        signs: 1 or -1 for each pair, on the CPU: move each kernel toward its partner or away.
        skip: A scalar on the device; non-zero disables the merge.
        keep: Receives the kernels that change, before they do.

    Returns:
        The outcome of each pair; None, with nothing changed, for a custom threshold.
    """
    if type(threshold) not in (Fixed, ZScore, Quantile):
        return None
    sites = [layer.site for layer in layers]
    bounds = None
    if isinstance(threshold, Fixed | ZScore):
        bounds = [threshold.bound(site.fan_in) for site in sites]
    batch = triton_launches.batch_to_send(
        [store.weight for store in layers.stores],
        pairs.lengths,
        pairs.table,
        centred=[site.centred for site in sites],
        thresholds=bounds,
        signs=signs,
        in_order=layers.are_first,
    )
    found = decided = None
    if isinstance(threshold, Quantile):
        found = triton_launches.compare(batch)
        places, share = batch.place, threshold.share
        decided = triton_launches.reach_quantiles(found, places, pairs.lengths, share)
        if skip is not None:
            decided &= skip == 0
            skip = None
    done = triton_launches.merge_(
        batch, merge_weight, decided=decided, skip=skip, keep=keep is not None
    )
    if keep is not None:
        keep.append(KeptBuffer(layers, pairs, batch, done))
    if found is None:
        found = done.cosines
    return Outcome(batch.numbers, found, done.merged, pairs.lengths)


@dataclass(frozen=True)
class KeptBuffer:
    """Kernels of some layers as they were before a pass, in one buffer.

    Attributes:
        layers: The layers.
        pairs: The pairs whose targets are kept, on the CPU.
        batch: The same on the device.
        merged: Which of them merged, and the buffer.
    """

    layers: Layers
    pairs: Pairs
    batch: triton_launches.Batch
    merged: triton_launches.Merged

    @property
    def modules(self) -> Sequence[nn.Module]:
        """The convolutions."""
        return [layer.module for layer in self.layers]

    def put_back_(self) -> None:
        """Restores the kernels, bit for bit, wherever the convolutions have their weights now."""
        if self.layers.are_still():
            triton_launches.restore_(self.batch, self.merged)
            return
        stores = [store_of(module) for module in self.modules]
        if all(map(_is_alike, stores, self.layers.stores)):
            weights = [store.weight for store in stores]
            triton_launches.restore_(self.batch, self.merged, weights)
            return
        # Moved or converted since: unpack into weights of the old form and copy from these.
        unpacked = [torch.empty_like(store.weight) for store in self.layers.stores]
        triton_launches.restore_(self.batch, self.merged, unpacked)
        pairs = self.pairs.to(self.batch.place.device)
        masks = self.merged.merged.split(self.pairs.lengths)
        for store, weight, part, mask in zip(stores, unpacked, pairs.split(), masks, strict=True):
            index = part.targets[mask]
            store.copy_back_(index, Plain(weight).copy_out(index))


def _is_alike(now: Store, before: Store) -> bool:
    """Returns whether a weight has the device, dtype and order of entries that it had."""
    ours, theirs = now.weight, before.weight
    return takes(now) and (ours.device, ours.dtype, ours.shape, ours.stride()) == (
        theirs.device,
        theirs.dtype,
        theirs.shape,
        theirs.stride(),
    )
