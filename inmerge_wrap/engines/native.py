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
from itertools import accumulate
from operator import mul
from typing import Any

import torch
from torch import Tensor, nn

from inmerge_wrap import merging
from inmerge_wrap.changes import Blend, Change
from inmerge_wrap.engines.building import Build
from inmerge_wrap.layers import Layers, stream_of
from inmerge_wrap.pairs import Outcome, Pairs
from inmerge_wrap.stores import Store, batched, is_dense, store_of
from inmerge_wrap.thresholds import Fixed, Quantile, Threshold, ZScore

__all__ = [
    "NAME",
    "KeptRows",
    "batches",
    "change_",
    "cosines",
    "draw",
    "draw_layers",
    "library",
    "makes",
    "merge_",
    "prepare",
    "problem",
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
_GIVEN, _BOUND, _QUANTILE = range(3)  # enum Decision
_WHOLE, _EXACT, _PLACE = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
_COUNT = ctypes.c_int

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
    made.mix_seeds.argtypes = [_PLACE, _WHOLE, ctypes.c_uint64, ctypes.c_uint64, _PLACE]
    made.draw_layers.argtypes = [*[_PLACE] * 3, _WHOLE, ctypes.c_float, _PLACE, _WHOLE, _PLACE]
    made.put_back.argtypes = [_PLACE, _WHOLE, *[_PLACE] * 4, _WHOLE, _COUNT]
    layers = [_PLACE, _WHOLE, *[_PLACE] * 4]  # and the pairs of each, and their cosines
    for name, _ in _DTYPES.values():
        getattr(made, f"compare_{name}").argtypes = [*layers, _COUNT]
        merge = [_PLACE, _COUNT, _EXACT, _EXACT, ctypes.c_bool, _PLACE, _PLACE, _COUNT]
        getattr(made, f"merge_{name}").argtypes = [*layers, *merge]
        for function in (f"compare_{name}", f"merge_{name}"):
            getattr(made, function).restype = None
    for function in ("mix_seeds", "put_back"):
        getattr(made, function).restype = None
    made.draw_layers.restype = _WHOLE
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


# -- the pairs -----------------------------------------------------------------------------------


def draw(layers: Layers, probability: float, seed: int, step: int) -> Pairs:
    """Draws the pairs of some layers; see :func:`inmerge_wrap.merge_pass.draw_step`."""
    streams, drawing = layers.fact("drawing", _streams_and_drawing)
    library().mix_seeds(streams, len(streams), seed, step, drawing.seeds)
    table, lengths = drawing.draw(probability)
    return Pairs(table, tuple(lengths))


def _streams_and_drawing(layers: Layers) -> tuple[Any, _Drawing]:
    sites = [layer.site for layer in layers]
    counts = [site.shape[0] for site in sites]
    sizes = [site.shape[0] // site.pair_groups for site in sites]
    streams = (_WHOLE * len(sites))(*map(stream_of, sites))
    return streams, _Drawing(counts, sizes, [0] * len(sites))


def draw_layers(
    num_kernels: Sequence[int],
    group_sizes: Sequence[int],
    probability: float,
    seeds: Sequence[int],
) -> tuple[Tensor, list[int]]:
    """Draws exactly what :func:`inmerge_wrap.merging.draw_layers` draws."""
    return _Drawing(num_kernels, group_sizes, seeds).draw(probability)


class _Drawing:
    """The arguments of a draw, converted once; the seeds may be exchanged in place."""

    def __init__(
        self, num_kernels: Sequence[int], group_sizes: Sequence[int], seeds: Sequence[int]
    ) -> None:
        array = _WHOLE * len(num_kernels)
        self.seeds = array(*seeds)
        self._columns = array(*num_kernels), array(*group_sizes), self.seeds
        self._lengths = array()
        # Reused, because a fresh one of this size would be mapped page by page in every step.
        self._table = torch.empty(3, sum(num_kernels), dtype=torch.int64, device="cpu")

    def draw(self, probability: float) -> tuple[Tensor, list[int]]:
        """Returns what :func:`inmerge_wrap.merging.draw_layers` returns."""
        if not _draws_like_torch():
            counts, sizes, seeds = map(list, self._columns)
            return merging.draw_layers(counts, sizes, probability, seeds)
        return self.draw_natively(probability)

    def draw_natively(self, probability: float) -> tuple[Tensor, list[int]]:
        """Draws with the generator of ``native.cpp``."""
        drawn = library().draw_layers(
            *self._columns,
            len(self._lengths),
            probability,
            self._table.data_ptr(),
            self._table.shape[1],
            self._lengths,
        )
        return self._table.narrow(1, 0, drawn).clone(), self._lengths[:]


@cache
def _draws_like_torch() -> bool:
    """Returns whether PyTorch's generator is still the one that ``native.cpp`` follows."""
    arguments = [64, 640], [32, 640], [1, 2**32 - 1]
    ours, _ = _Drawing(*arguments).draw_natively(0.5)
    counts, sizes, seeds = arguments
    return torch.equal(ours, merging.draw_layers(counts, sizes, 0.5, seeds)[0])


# -- the steps of a pass by themselves -----------------------------------------------------------


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
    compare = getattr(library(), f"compare_{name}")
    layers, table = _table(stores, centred), _Columns(pairs)
    compare(layers.data_ptr(), len(stores), *table.places, found.data_ptr(), _threads())
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
    layers, table = _table(stores), _Columns(pairs)
    getattr(library(), f"merge_{name}")(
        layers.data_ptr(),
        len(stores),
        *table.places,
        None,
        changed.data_ptr(),
        _GIVEN,
        0.0,
        change.merge_weight,
        False,
        None,
        None,
        _threads(),
    )
    parts = zip(stores, changed.split(pairs.lengths), strict=True)
    _note_writes([store.weight for store, mask in parts if mask.any()])


def _table(stores: Sequence[Store], centred: Sequence[bool] | None = None) -> Tensor:
    """Returns an array of ``struct Layer``, see ``native.cpp``, without bounds."""
    weights = [store.weight for store in stores]
    rows = [
        (weight.data_ptr(), len(weight), weight.numel() // len(weight), mean, 0)
        for weight, mean in zip(weights, centred or [False] * len(weights), strict=True)
    ]
    return torch.tensor(rows, dtype=torch.int64, device="cpu")


class _Columns:
    """Where the pairs are: the end of each layer, all targets, all sources."""

    def __init__(self, pairs: Pairs) -> None:
        table = pairs.table if pairs.table.stride(1) == 1 else pairs.table.contiguous()
        self._table = table  # alive as long as its address is in use
        first, row = table.data_ptr(), table.stride(0) * table.element_size()
        ends = (_WHOLE * len(pairs.lengths))(*accumulate(pairs.lengths))
        self.places = ends, first + row, first + 2 * row


def _note_writes(weights: Sequence[Tensor]) -> None:
    """Bumps version counters as PyTorch does, so that autograd detects the in-place write."""
    torch.autograd.graph.increment_version(weights)


def _threads() -> int:
    return torch.get_num_threads()


# -- a whole pass in one call --------------------------------------------------------------------


def merge_(
    layers: Layers,
    pairs: Pairs,
    threshold: Threshold,
    merge_weight: float,
    *,
    skip: Tensor | None = None,
    keep: list[Any] | None = None,
) -> Outcome | None:
    """Compares, decides and blends; equal to :func:`cosines`, the threshold and :func:`change_`.

    Args:
        layers: The layers of one batch, see :func:`batches`.
        pairs: Their drawn pairs, on the CPU.
        threshold: The rule that decides which pairs merge.
        merge_weight: See :class:`inmerge_wrap.changes.Blend`.
        skip: A scalar; non-zero disables the merge.
        keep: Receives the kernels that change, before they do.

    Returns:
        The outcome of each pair; None, with nothing changed, for a custom threshold.
    """
    if type(threshold) not in (Fixed, ZScore, Quantile):
        return None
    table = layers.fact(NAME, _Table)
    decision, share = table.aim(threshold)
    name, wide = _DTYPES[table.dtype]
    columns = _Columns(pairs)
    found = torch.empty(len(pairs), dtype=wide, device="cpu")
    merged = torch.empty(len(pairs), dtype=torch.bool, device="cpu")
    sums = torch.empty(4, len(layers), dtype=torch.float64, device="cpu")
    rows = None if keep is None else table.room_for(pairs.lengths)
    getattr(library(), f"merge_{name}")(
        table.address,
        len(layers),
        *columns.places,
        found.data_ptr(),
        merged.data_ptr(),
        decision,
        share,
        merge_weight,
        skip is not None and bool(skip),
        None if rows is None else rows.data_ptr(),
        sums.data_ptr(),
        _threads(),
    )
    written = sums[0].tolist()
    _note_writes([weight for weight, count in zip(table.weights, written, strict=True) if count])
    if rows is not None and keep is not None:
        keep.append(KeptRows(layers, pairs, merged, rows))
    return Outcome(pairs.layer, found, merged, pairs.lengths, sums)


class _Table:
    """The arguments of ``merge`` for some layers; valid as long as their weights are."""

    def __init__(self, layers: Layers) -> None:
        stores, sites = layers.stores, [layer.site for layer in layers]
        self._columns = _table(stores, [site.centred for site in sites])
        self.address = self._columns.data_ptr()
        self.weights = [store.weight for store in stores]
        self.dtype = stores[0].weight.dtype
        self._fan_ins = [site.fan_in for site in sites]
        self._threshold: Threshold | None = None
        self.spare: Tensor | None = None  # for saved kernels, so that no step allocates memory

    def aim(self, threshold: Threshold) -> tuple[int, float]:
        """Writes the bound of each layer; returns the rule of ``merge`` and its quantile."""
        if isinstance(threshold, Quantile):
            return _QUANTILE, 1.0 - threshold.share
        if threshold != self._threshold:
            assert isinstance(threshold, Fixed | ZScore)
            bounds = [threshold.bound(fan_in) for fan_in in self._fan_ins]
            exact = torch.tensor(bounds, dtype=torch.float64, device="cpu")
            self._columns.view(torch.float64)[:, 4] = exact
            self._threshold = threshold
        return _BOUND, 0.0

    def room_for(self, lengths: Sequence[int]) -> Tensor:
        """Allocates memory for a number of kernels of each layer."""
        entries = sum(map(mul, lengths, self._fan_ins))
        room, self.spare = self.spare, None
        if room is None or len(room) < entries:
            room = torch.empty(entries, dtype=self.dtype, device="cpu")
        return room


@dataclass(frozen=True)
class KeptRows:
    """Kernels of several layers as they were before a pass.

    Attributes:
        layers: The layers.
        pairs: Their drawn pairs.
        merged: Which of the pairs changed their target, boolean, shape (pairs,).
        rows: A kernel for each pair, one after the other; only those that merged are written.
    """

    layers: Layers
    pairs: Pairs
    merged: Tensor
    rows: Tensor

    @property
    def modules(self) -> list[nn.Module]:
        """The convolutions."""
        return [layer.module for layer in self.layers]

    def put_back_(self) -> None:
        """Restores the kernels, bit for bit, wherever the convolutions have their weights now."""
        table = self.layers.fact(NAME, _Table)
        if not self.layers.are_still():
            self._put_back_elsewhere_()
            return
        columns = _Columns(self.pairs)
        ends, targets, _ = columns.places
        library().put_back(
            table.address,
            len(self.layers),
            ends,
            targets,
            self.merged.data_ptr(),
            self.rows.data_ptr(),
            self.rows.element_size(),
            _threads(),
        )
        _note_writes(table.weights)
        table.spare = self.rows

    def _put_back_elsewhere_(self) -> None:
        """Puts the kernels back where tensors were exchanged in the meantime, as SAM does."""
        begin = 0
        masks = self.merged.split(self.pairs.lengths)
        for layer, part, mask in zip(self.layers, self.pairs.split(), masks, strict=True):
            # Entries are ordered as in the weight that was merged, possibly channels_last.
            weight = layer.store.weight
            shape = len(part), *weight.shape[1:]
            kernels = self.rows.as_strided(shape, weight.stride(), begin)
            begin += len(part) * layer.site.fan_in
            store_of(layer.module).copy_back_(part.targets[mask], (kernels[mask],))
