"""Engines compare and change the kernels of layers; all compute the same, up to rounding.

An engine is a module with a ``NAME``, ``takes(store)``, ``makes(change)``, ``batches(stores)``,
``cosines(stores, pairs, centred)`` and ``change_(stores, pairs, changed, change)``; see
:mod:`inmerge_wrap.engines.torch_blocks`, which is the specification. It may provide a ``merge_``
that performs the steps of a pass in one call, with the same result, and a ``step_`` that draws the
pairs as well. Each layer is assigned to the selected engine if that supports the layer's store, and
to plain PyTorch otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from inmerge_wrap.changes import Change
from inmerge_wrap.engines import native, torch_blocks, triton
from inmerge_wrap.layers import Layers
from inmerge_wrap.pairs import Outcome, Pairs, Totals
from inmerge_wrap.stores import Plain, Store
from inmerge_wrap.thresholds import Threshold

__all__ = [
    "ENGINES",
    "Engine",
    "describe",
    "divided",
    "group",
    "has_merge",
    "merge_at_once_",
    "require",
    "step_at_once_",
    "wanted",
]

ENGINES = ("auto", "torch", "native", "triton")
"""The engines a user can request; ``auto`` is the fastest that works on the device."""


class Engine(Protocol):
    """The functions that each engine module provides."""

    NAME: str

    def takes(self, store: Store) -> bool:
        """Returns whether the engine can read and write a store."""
        ...

    def makes(self, change: Change) -> bool:
        """Returns whether the engine can compute a kind of change."""
        ...

    def batches(self, stores: Sequence[Store]) -> list[list[int]]:
        """Groups the stores, by index, that one call can process together."""
        ...

    def cosines(self, stores: Sequence[Store], pairs: Pairs, centred: Sequence[bool]) -> Tensor:
        """Returns the cosine of each pair, shape (pairs,)."""
        ...

    def change_(
        self, stores: Sequence[Store], pairs: Pairs, changed: Tensor | None, change: Change
    ) -> None:
        """Writes the new values of the changed kernels."""
        ...


_torch: Any = torch_blocks
_native: Any = native
_triton: Any = triton


def wanted(name: str, device: torch.device) -> Engine:
    """Returns the engine that a setting selects on a device."""
    on_cpu = name in ("auto", "native") and device.type == "cpu"
    if on_cpu and native.problem(insist=name == "native") is None:
        return _native
    if name == "triton" or (name == "auto" and device.type == "cuda"):
        return _torch if triton.problem(device) else _triton
    return _torch


def require(name: str, device: torch.device) -> None:
    """Checks that an engine requested by name works on a device.

    Raises:
        RuntimeError: If it does not.
    """
    if name != "torch":
        native.prepare()  # so that it is ready for the first step, for the draw on any device
    if name in ("auto", "torch") or device.type == "meta":  # a network on meta is moved later
        return
    if name == "triton":
        problem = triton.problem(device)
    elif device.type != "cpu":
        problem = f"native code runs on a CPU, and the network is on {device}"
    else:
        problem = native.problem(insist=True)
        problem = problem and f"{native.REMEDY} ({problem})"
    if problem is not None:
        raise RuntimeError(f"engine={name!r} does not work here: {problem}; or leave engine='auto'")


def group(stores: Sequence[Store], name: str) -> list[tuple[Engine, list[int]]]:
    """Assigns layers to engines, and splits them into batches for one call.

    Args:
        stores: Store of each layer, opened or not.
        name: One of :data:`ENGINES`.

    Returns:
        Engines with the indices of their layers, ordered by the first index.
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


def divided(layers: Layers, name: str) -> list[tuple[Engine, list[int], Layers]]:
    """Returns the result of :func:`group` with the layers of each group, cached."""

    def find(layers: Layers) -> list[tuple[Engine, list[int], Layers]]:
        groups = group(layers.stores, name)
        return [(engine, places, layers.at(places)) for engine, places in groups]

    return layers.fact(("engines", name), find)


def has_merge(engine: Engine) -> bool:
    """Returns whether an engine performs the steps of a pass in one call."""
    return hasattr(engine, "merge_")


def merge_at_once_(
    engine: Any,
    layers: Layers,
    pairs: Pairs,
    threshold: Threshold,
    merge_weight: float,
    *,
    signs: Tensor | None,
    skip: Tensor | None,
    keep: list[Any] | None,
) -> Outcome | None:
    """Runs a whole pass in one call of an engine; returns None if the engine has no such call.

    The pairs and the signs are on the CPU.
    """
    if not has_merge(engine):
        return None
    found: Outcome | None = engine.merge_(
        layers, pairs, threshold, merge_weight, signs=signs, skip=skip, keep=keep
    )
    return found


def step_at_once_(layers: Layers, name: str, **step: Any) -> Totals | None:
    """Draws and merges in one call of the engine that handles all layers.

    Args:
        layers: At least one.
        name: One of :data:`ENGINES`.
        step: Arguments of :func:`inmerge_wrap.engines.native.step_`.

    Returns:
        What was done; None, with nothing changed, if there is no such call.
    """
    (engine, _, batch), *others = divided(layers, name)
    if others or not hasattr(engine, "step_"):
        return None
    found: Totals | None = cast(Any, engine).step_(batch, **step)
    return found


def describe(layers: Layers, name: str) -> str:
    """Describes how many layers each engine handles, and why not all use the fastest one."""
    parts: dict[str, int] = {}
    reasons: dict[str, dict[str, None]] = {}
    for engine, places, batch in divided(layers, name):
        parts[engine.NAME] = parts.get(engine.NAME, 0) + len(places)
        why = reasons.setdefault(engine.NAME, {})
        for store in batch.stores:
            device = store.weight.device
            if wanted(name, device) is not engine:
                why[_kind_of(store)] = None
            elif name == "auto" and engine is _torch and device.type == "cpu":
                why[f"no native code, {str(native.problem()).splitlines()[0]}"] = None
    return ", ".join(
        f"{engine} ({count} {'layer' if count == 1 else 'layers'}"
        + (f": {', '.join(reasons[engine])})" if reasons[engine] else ")")
        for engine, count in parts.items()
    )


def _kind_of(store: Store) -> str:
    """Describes why an engine cannot handle a store."""
    if type(store) is not Plain:
        return f"{type(store).__name__.lower()} weights"
    if store.weight.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        return str(store.weight.dtype).removeprefix("torch.")
    return "kernels that are not together in memory"
