"""Engines compare and change the kernels of layers; all compute the same, up to rounding.

An engine is a module with a ``NAME``, ``takes(store)``, ``makes(change)``, ``batches(stores)``,
``cosines(stores, pairs, centred)`` and ``change_(stores, pairs, changed, change)``; see
:mod:`inmerge_wrap.engines.torch_blocks`, which is the specification. Each layer is given to the
engine that is wanted if it takes the layer's store, and to plain PyTorch otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from inmerge_wrap.changes import Change
from inmerge_wrap.engines import native, torch_blocks
from inmerge_wrap.pairs import Pairs
from inmerge_wrap.stores import Store

__all__ = ["ENGINES", "Engine", "group", "require", "wanted"]

ENGINES = ("auto", "torch", "native")
"""What a user may ask for; ``auto`` is the fastest that works on the device at hand."""


class Engine(Protocol):
    """What a module of this package provides."""

    NAME: str

    def takes(self, store: Store) -> bool:
        """Whether it reads and writes a store."""
        ...

    def makes(self, change: Change) -> bool:
        """Whether it computes a kind of change."""
        ...

    def batches(self, stores: Sequence[Store]) -> list[list[int]]:
        """Which of the stores, by their places, one call may be given together."""
        ...

    def cosines(self, stores: Sequence[Store], pairs: Pairs, centred: Sequence[bool]) -> Tensor:
        """Cosine of each pair, shape (pairs,)."""
        ...

    def change_(
        self, stores: Sequence[Store], pairs: Pairs, changed: Tensor | None, change: Change
    ) -> None:
        """Writes what becomes of the changed kernels."""
        ...


_torch: Any = torch_blocks
_native: Any = native


def wanted(name: str, device: torch.device) -> Engine:
    """The engine that a setting means on a device."""
    if name != "torch" and device.type == "cpu" and native.problem() is None:
        return _native
    return _torch


def require(name: str, device: torch.device) -> None:
    """Makes sure that an engine asked for by name works on a device.

    Raises:
        RuntimeError: If it does not.
    """
    if name in ("auto", "torch") or device.type == "meta":  # a network on meta moves later
        return
    if device.type != "cpu":
        raise RuntimeError(
            f"engine={name!r} works on a CPU and the network is on {device}: leave engine='auto'"
        )
    problem = native.problem()
    if problem is not None:
        raise RuntimeError(f"engine={name!r} does not work here: {problem}")


def group(stores: Sequence[Store], name: str) -> list[tuple[Engine, list[int]]]:
    """Divides layers among engines, and into what one call of an engine may be given.

    Args:
        stores: Of each layer, opened or not.
        name: One of :data:`ENGINES`.

    Returns:
        Engines with the places of their layers, in the order of the first of these.
    """
    best = [wanted(name, store.weight.device) for store in stores]
    best = [
        engine if engine.takes(store) else _torch
        for engine, store in zip(best, stores, strict=True)
    ]
    groups: list[tuple[Engine, list[int]]] = []
    for engine in dict.fromkeys(best):
        places = [place for place, chosen in enumerate(best) if chosen is engine]
        for batch in engine.batches([stores[place] for place in places]):
            groups.append((engine, [places[place] for place in batch]))
    return sorted(groups, key=lambda item: item[1][0])
