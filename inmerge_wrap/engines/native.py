"""The native engine: C++ that draws, compares and blends all layers in one call, on a CPU.

PyTorch copies the drawn kernels out of a weight before it multiplies them, and each of its calls
takes longer than the arithmetic of a small layer. ``native.cpp`` reads the weights where they are,
and blends a pair while its kernels are still in the cache. :mod:`.building` compiles it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, compress, pairwise
from operator import mul
from typing import Any

import torch
from torch import Tensor, nn

from inmerge_wrap import merging
from inmerge_wrap.changes import Blend, Change
from inmerge_wrap.engines.building import Build
from inmerge_wrap.layers import Layers, stream_of
from inmerge_wrap.pairs import Pairs, Totals, mix, places_of
from inmerge_wrap.stores import Store, batched, is_dense, store_of
from inmerge_wrap.thresholds import Fixed, Quantile, Threshold, ZScore

__all__ = [
    "NAME",
    "KeptRows",
    "batches",
    "change_",
    "cosines",
    "library",
    "makes",
    "prepare",
    "problem",
    "step_",
    "takes",
]

NAME = "native"

PATIENCE = 2.0
"""Seconds that training waits for the compiler if the engine was chosen automatically."""

LIMIT = 120.0
"""Seconds that training waits for the compiler if the engine was requested."""

REMEDY = (
    "native code needs a C++ compiler (c++, or that of the environment variable CXX) with the "
    "options of g++ and clang++, and a folder (~/.cache, or TMPDIR) from which libraries may be "
    "loaded; install it, or leave engine='auto', which computes the same without it"
)

_DTYPES = {
    torch.float32: ("float32", torch.float32),
    torch.float64: ("float64", torch.float64),
    torch.bfloat16: ("bfloat16", torch.float32),
}
_BOUND, _QUANTILE = 1, 2  # enum Decision
_LAYER = "rows", "kernels", "fan_in", "group_size", "stream", "centred", "bound"  # struct Layer
_KINDS = "compare", "change", "pass"
_WHOLE, _PLACE, _COUNT = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int

_build: Build | None = None
_decision: list[str | None] = []  # the answer without insist, which stays the same


def prepare() -> None:
    """Starts compiling, unless that is done already."""
    global _build
    if _build is None or (_build.pid != os.getpid() and _build.library is None):
        _build = Build()
        _decision.clear()


def problem(*, insist: bool = False) -> str | None:
    """Returns why native code cannot be used in this process; None if it can.

    Args:
        insist: Wait for the compiler for minutes. Otherwise wait two seconds, once; a run that
            started without native code continues without it, so that its arithmetic does not
            change.
    """
    prepare()
    assert _build is not None
    if insist:
        found = _build.wait(LIMIT)
        if found is None:
            _decision[:] = [None]
        return found
    if not _decision:
        _decision.append(_build.wait(PATIENCE))
    return _decision[0]


def library() -> ctypes.CDLL:
    """Returns the compiled ``native.cpp``.

    Raises:
        RuntimeError: If there is none, see :func:`problem`.
    """
    if _build is None or _build.library is None:
        why = problem(insist=True)
        if why is not None:
            raise RuntimeError(f"{REMEDY} ({why})")
    assert _build is not None and _build.library is not None
    return _declared(_build.library)


@cache
def _declared(made: ctypes.CDLL) -> ctypes.CDLL:
    """Declares the argument types of each function once, so that calls can pass plain numbers."""
    made.draw.argtypes = [_PLACE, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_float, _COUNT]
    made.draw_layer.argtypes = [_WHOLE, _WHOLE, ctypes.c_float, ctypes.c_uint32, _PLACE, _PLACE]
    made.draw_layer.restype = _WHOLE
    seeds = ctypes.c_uint64, ctypes.c_uint64
    made.draw_signs.argtypes = [_WHOLE, _PLACE, _PLACE, *seeds, _PLACE]
    made.put_back.argtypes = [_PLACE, _PLACE, _WHOLE, _COUNT]
    functions = [made.draw, made.draw_signs, made.put_back]
    for name, _ in _DTYPES.values():
        compare, change, run = (getattr(made, f"{kind}_{name}") for kind in _KINDS)
        compare.argtypes = [_PLACE, _COUNT]
        change.argtypes = [_PLACE, ctypes.c_double, _COUNT]
        run.argtypes = [_PLACE, ctypes.POINTER(_Rule), _PLACE, _PLACE, _COUNT]
        functions += [compare, change, run]
    for function in functions:
        function.restype = None
    return made


def takes(store: Store) -> bool:
    """Returns whether the kernels of a store can be read where they are, on a CPU."""
    weight = store.rows_in_memory
    # Subclasses (shards, quantised and fake tensors) may have no memory of their own.
    return (
        weight is not None
        and type(weight) is Tensor
        and weight.layout is torch.strided
        and weight.device.type == "cpu"
        and weight.dtype in _DTYPES
        and is_dense(weight)
    )


def makes(change: Change) -> bool:
    """Returns whether native code computes a kind of change: the paper's blend alone."""
    return (
        isinstance(change, Blend)
        and isinstance(change.merge_weight, float | int)
        and (change.scale is None)
    )


def batches(stores: Sequence[Store]) -> list[list[int]]:
    """Groups all layers of one dtype, except those that share memory."""
    return batched(stores, lambda weight: weight.dtype)


# -- the steps of a pass by themselves -----------------------------------------------------------


def draw(layers: Layers, probability: float, seed: int, step: int) -> Pairs:
    """Draws the pairs of layers on any device; see :func:`inmerge_wrap.merge_pass.draw_step`."""
    drawing = layers.fact((NAME, "drawing"), _Drawing)
    drawing.draw(probability, seed, step)
    return drawing.pairs()


def draw_signs(streams: Sequence[int], lengths: Sequence[int], seed: int, step: int) -> Tensor:
    """Draws 1 or -1 for each pair of some layers, int8, layer after layer.

    Args:
        streams: Random stream of each layer, see :func:`inmerge_wrap.layers.stream_of`.
        lengths: Number of pairs of each layer.
        seed: See :class:`inmerge_wrap.settings.MergeSettings`.
        step: The optimizer step.
    """
    rows = torch.tensor([streams, lengths], dtype=torch.int64, device="cpu")
    signs = torch.empty(sum(lengths), dtype=torch.int8, device="cpu")
    places = [part.data_ptr() for part in (*rows, signs)]
    library().draw_signs(len(lengths), *places[:2], seed, step, places[2])
    return signs


def cosines(stores: Sequence[Store], pairs: Pairs, centred: Sequence[bool]) -> Tensor:
    """Returns the cosine of each pair, see :func:`inmerge_wrap.merging.pair_cosines`.

    Args:
        stores: Stores of one dtype that share no memory; see :func:`batches`.
        pairs: Drawn pairs, on the CPU.
        centred: For each layer, whether its kernels are compared without their mean.

    Returns:
        Shape (pairs,), float32 or wider.
    """
    name, wide = _DTYPES[stores[0].weight.dtype]
    found = torch.empty(len(pairs), dtype=wide, device="cpu")
    table = _Table.of(stores, pairs, centred=centred, cosines=found)
    getattr(library(), f"compare_{name}")(table.address, _threads())
    return found


def change_(stores: Sequence[Store], pairs: Pairs, changed: Tensor | None, change: Change) -> None:
    """Blends kernels in place; all are read before they are written (eq. 3).

    Args:
        stores: See :func:`cosines`; likewise ``pairs``.
        pairs: No target repeats in a layer.
        changed: Boolean mask of the pairs to blend, shape (pairs,); None for all.
        change: See :func:`makes`.
    """
    assert isinstance(change, Blend) and not isinstance(change.merge_weight, Tensor)
    name, _ = _DTYPES[stores[0].weight.dtype]
    if changed is None:
        changed = torch.ones(len(pairs), dtype=torch.bool, device="cpu")
    changed = changed.contiguous()
    table = _Table.of(stores, pairs, merged=changed)
    getattr(library(), f"change_{name}")(table.address, change.merge_weight, _threads())
    parts = zip(stores, changed.split(pairs.lengths), strict=True)
    _note_writes([store.weight for store, mask in parts if mask.any()])


class _Table:
    """``struct Table`` of ``native.cpp``; it keeps the memory that it refers to alive.

    Args:
        layers: The result of :func:`_rows`.
        ends: Where the pairs of each layer end.
        targets: Of all pairs, int64, contiguous.
        sources: Likewise.
        cosines: Float32 or wider, for as many pairs; None if they are not written.
        merged: Boolean, likewise.
    """

    def __init__(
        self,
        layers: Tensor,
        ends: ctypes.Array[ctypes.c_int64],
        targets: Tensor,
        sources: Tensor,
        cosines: Tensor | None,
        merged: Tensor | None,
    ) -> None:
        tensors = targets, sources, cosines, merged
        self._memory = layers, ends, *tensors
        places = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        self._words = (_PLACE * 7)(layers.data_ptr(), len(layers), ctypes.addressof(ends), *places)
        self.address = ctypes.addressof(self._words)

    @classmethod
    def of(
        cls,
        stores: Sequence[Store],
        pairs: Pairs,
        *,
        centred: Sequence[bool] | None = None,
        cosines: Tensor | None = None,
        merged: Tensor | None = None,
    ) -> _Table:
        """Returns the table of drawn pairs."""
        ends = (_WHOLE * len(stores))(*accumulate(pairs.lengths))
        chosen = pairs.targets.contiguous(), pairs.sources.contiguous()
        weights = [store.weight for store in stores]
        rows = _rows(
            rows=[weight.data_ptr() for weight in weights],
            kernels=[len(weight) for weight in weights],
            fan_in=[weight.numel() // len(weight) for weight in weights],
            centred=centred or (),
        )
        return cls(rows, ends, *chosen, cosines, merged)


def _rows(**columns: Sequence[int]) -> Tensor:
    """Returns an array of ``struct Layer`` from its columns; those left out are zero."""
    nothing = [0] * len(columns["kernels"])
    table = [columns.get(name) or nothing for name in _LAYER]
    return torch.tensor(table, dtype=torch.int64, device="cpu").T.contiguous()


def _note_writes(weights: Sequence[Tensor]) -> None:
    """Bumps version counters as PyTorch does, so that autograd detects the in-place write."""
    torch.autograd.graph.increment_version(weights)


def _threads() -> int:
    return torch.get_num_threads()


# -- a whole pass in one call --------------------------------------------------------------------


def step_(
    layers: Layers,
    *,
    probability: float,
    seed: int,
    step: int,
    threshold: Threshold,
    merge_weight: float,
    radius: float | None = None,
    skip: Tensor | None = None,
    keep: list[Any] | None = None,
) -> Totals | None:
    """Draws, compares, decides and blends; equal to the functions of :mod:`.torch_blocks`.

    Args:
        layers: The layers of one batch, see :func:`batches`.
        probability: See :class:`inmerge_wrap.settings.MergeSettings`; likewise ``seed``.
        seed: Together with ``step`` it decides what is drawn.
        step: The optimizer step.
        threshold: The rule that decides which pairs merge.
        merge_weight: See :class:`inmerge_wrap.changes.Blend`.
        radius: Move each kernel by this share of its norm instead, along the line to its partner
            (:func:`inmerge_wrap.merging.signed_weight`); None for ``merge_weight``.
        skip: A scalar; non-zero disables the merge.
        keep: Receives the kernels that change, before they do.

    Returns:
        What was done; None, with nothing changed, for a custom threshold.
    """
    if type(threshold) not in (Fixed, ZScore, Quantile):
        return None
    run = layers.fact(NAME, _Pass)
    draws = _draws_like_torch() and (keep is None or probability == 1.0)
    if not draws:
        run.draw(probability, seed, step)
    rows = None if keep is None else run.room_for_kept(run.kernels if draws else run.lengths())
    signed = radius is not None, radius or 0.0
    skips = skip is not None and bool(skip)
    rule = _Rule(draws, probability, *run.aim(threshold), skips, merge_weight, *signed, seed, step)
    place = None if rows is None else rows.data_ptr()
    run.function(run.table.address, rule, place, run.sums.data_ptr(), _threads())
    sums = run.sums.tolist()
    _note_writes([*compress(run.weights, sums[1])])
    if rows is not None and keep is not None:
        keep.append(KeptRows(layers, rows))
    return Totals(layers.numbers, sums)


class _Rule(ctypes.Structure):
    """``struct Rule`` of ``native.cpp``."""

    _fields_ = (
        ("draws", ctypes.c_bool),
        ("probability", ctypes.c_float),
        ("decision", ctypes.c_int),
        ("share", ctypes.c_double),
        ("skip", ctypes.c_bool),
        ("alpha", ctypes.c_double),
        ("is_signed", ctypes.c_bool),
        ("radius", ctypes.c_double),
        ("seed", ctypes.c_uint64),
        ("step", ctypes.c_uint64),
    )


class _Drawing:
    """Some layers as ``native.cpp`` sees them, with room for the pairs of a step.

    Each step overwrites what the step before has drawn: after a training step, the first allocation
    of over a kilobyte takes longer than a small pass.
    """

    def __init__(self, layers: Layers) -> None:
        sites = [layer.site for layer in layers]
        self._layers = layers
        self.kernels = [site.shape[0] for site in sites]
        self._sizes = [site.shape[0] // site.pair_groups for site in sites]
        self._fan_ins = [site.fan_in for site in sites]
        self._rows = _rows(
            kernels=self.kernels,
            fan_in=self._fan_ins,
            group_size=self._sizes,
            stream=[stream_of(site) for site in sites],
            centred=[site.centred for site in sites],
        )
        self._ends = (_WHOLE * len(sites))()
        room = sum(self.kernels)
        self._targets, self._sources = torch.empty(2, room, dtype=torch.int64, device="cpu")
        self.table = _Table(self._rows, self._ends, self._targets, self._sources, None, None)

    def draw(self, probability: float, seed: int, step: int) -> None:
        """Draws the pairs of a step."""
        if _draws_like_torch():
            library().draw(self.table.address, seed, step, probability, _threads())
            return
        seeds = [mix(seed, step, stream_of(layer.site)) for layer in self._layers]
        drawn, lengths = merging.draw_layers(self.kernels, self._sizes, probability, seeds)
        self._targets[: drawn.shape[1]], self._sources[: drawn.shape[1]] = drawn[1:]
        self._ends[:] = list(accumulate(lengths))

    def pairs(self) -> Pairs:
        """Returns a copy of the pairs that were drawn last."""
        lengths = self.lengths()
        end = sum(lengths)
        table = torch.stack([places_of(lengths), self._targets[:end], self._sources[:end]])
        return Pairs(table, (*lengths,))

    def lengths(self) -> list[int]:
        """Returns how many pairs each layer has drawn."""
        return [end - begin for begin, end in pairwise([0, *self._ends])]


class _Pass(_Drawing):
    """The same layers with their weights and room for the outcome; valid as long as the weights."""

    def __init__(self, layers: Layers) -> None:
        super().__init__(layers)
        self.weights = [store.weight for store in layers.stores]
        self.dtype = self.weights[0].dtype
        name, wide = _DTYPES[self.dtype]
        self.function = getattr(library(), f"pass_{name}")
        self.sums = torch.empty(5, len(layers), dtype=torch.float64, device="cpu")
        self.spare: Tensor | None = None  # for kernels that are kept
        addresses = [weight.data_ptr() for weight in self.weights]
        self._rows[:, _LAYER.index("rows")] = torch.tensor(addresses, device="cpu")
        room = sum(self.kernels)
        found = torch.empty(room, dtype=wide, device="cpu")
        self._merged = torch.empty(room, dtype=torch.bool, device="cpu")
        self.table = _Table(
            self._rows, self._ends, self._targets, self._sources, found, self._merged
        )
        self._threshold: Threshold | None = None

    def merged(self) -> Tensor:
        """Returns which of the pairs merged, a boolean mask."""
        return self._merged[: self._ends[-1]]

    def aim(self, threshold: Threshold) -> tuple[int, float]:
        """Writes the bound of each layer; returns the decision of ``struct Rule`` and its share."""
        if isinstance(threshold, Quantile):
            return _QUANTILE, 1.0 - threshold.share
        if threshold != self._threshold:
            assert isinstance(threshold, Fixed | ZScore)
            bounds = [threshold.bound(fan_in) for fan_in in self._fan_ins]
            exact = torch.tensor(bounds, dtype=torch.float64, device="cpu")
            self._rows.view(torch.float64)[:, _LAYER.index("bound")] = exact
            self._threshold = threshold
        return _BOUND, 0.0

    def room_for_kept(self, lengths: Sequence[int]) -> Tensor:
        """Returns memory for the kernels of as many pairs of each layer."""
        entries = sum(map(mul, lengths, self._fan_ins))
        room, self.spare = self.spare, None
        if room is None or len(room) < entries:
            room = torch.empty(entries, dtype=self.dtype, device="cpu")
        return room


@cache
def _draws_like_torch() -> bool:
    """Returns whether PyTorch's generator is still the one that ``native.cpp`` follows."""
    for count, size, seed in ((64, 32, 1), (640, 640, 2**32 - 1)):
        expected, (length,) = merging.draw_layers([count], [size], 0.5, [seed])
        ours = torch.empty(2, count, dtype=torch.int64, device="cpu")
        places = [row.data_ptr() for row in ours]
        drawn = library().draw_layer(count, size, 0.5, seed, *places)
        if drawn != length or not torch.equal(ours[:, :length], expected[1:]):
            return False
    return True


@dataclass(frozen=True)
class KeptRows:
    """Kernels of several layers as they were before the last pass over these layers.

    Attributes:
        layers: The layers.
        rows: A kernel for each pair, one after the other; only those that merged are written.
    """

    layers: Layers
    rows: Tensor

    @property
    def modules(self) -> list[nn.Module]:
        """The convolutions."""
        return [layer.module for layer in self.layers]

    def put_back_(self) -> None:
        """Restores the kernels, bit for bit, wherever the convolutions have their weights now."""
        run = self.layers.fact(NAME, _Pass)
        if not self.layers.are_still():
            self._put_back_elsewhere_(run.pairs(), run.merged())
            return
        library().put_back(
            run.table.address, self.rows.data_ptr(), self.rows.element_size(), _threads()
        )
        _note_writes(run.weights)
        run.spare = self.rows

    def _put_back_elsewhere_(self, pairs: Pairs, merged: Tensor) -> None:
        """Puts the kernels back where tensors were exchanged in the meantime, as SAM does."""
        begin = 0
        masks = merged.split(pairs.lengths)
        for layer, part, mask in zip(self.layers, pairs.split(), masks, strict=True):
            # Entries are ordered as in the weight that was merged, possibly channels_last.
            weight = layer.store.weight
            shape = len(part), *weight.shape[1:]
            kernels = self.rows.as_strided(shape, weight.stride(), begin)
            begin += len(part) * layer.site.fan_in
            store_of(layer.module).copy_back_(part.targets[mask], (kernels[mask],))
