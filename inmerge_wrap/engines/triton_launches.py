"""Comparing, blending, saving and restoring the kernels of many layers in one launch, on a GPU.

PyTorch launches some twenty small kernels for each layer of a pass. Here one launch works on all
layers, whatever their number: it reads the weights through a table of their addresses, which the
host sends without waiting. The launches are in
``triton_kernels.py``; Triton is imported when it is first needed.

All functions take lists of layers. The weights of a call and the tensors of pairs must be on one
device, and no two weights may share memory; :func:`takes` checks whether a weight is supported.
Each dtype takes its own launch.

Under ``TRITON_INTERPRET=1``, set before Triton is imported, the same functions run on a CPU,
slowly; this is how the tests run them without a GPU.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inmerge_wrap.stores import is_dense

__all__ = [
    "Counts",
    "available",
    "blend_",
    "compare",
    "decide",
    "layer_quantiles",
    "restore_",
    "save",
    "takes",
    "unavailable_reason",
]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BLOCK = 1024  # entries of a kernel that a program works on at a time: eight for each thread
_PAIRS = 256  # pairs that a program decides on at a time
_ALIGNMENT = 16  # bytes; of the layers in a buffer


class Counts(NamedTuple):
    """Running counts of layers, each of shape (layers,), which :func:`decide` adds to.

    Attributes:
        merged: int64, pairs that passed.
        undefined: int64, pairs without a cosine.
        cosine_sum: float64, over the pairs that have one.
        cosine_max: float32, the largest; below -1 before the first.
    """

    merged: Tensor
    undefined: Tensor
    cosine_sum: Tensor
    cosine_max: Tensor


def available(device: torch.device) -> bool:
    """Returns whether this module's functions run on a device; see :func:`unavailable_reason`."""
    return unavailable_reason(device) is None


@cache
def unavailable_reason(device: torch.device) -> str | None:
    """Returns why the functions of this module do not run on a device, or None where they do.

    Tries it once for each device with a small launch, for which Triton may have to compile: it
    needs a C compiler, the headers of Python and a folder for its cache.
    """
    if device.type != "cuda" and not _interpreted():
        return f"Triton runs on a GPU, not on {device.type}"
    try:
        weight = torch.ones(2, 1, 1, 1, device=device)
        target = torch.zeros(1, dtype=torch.int64, device=device)
        compare([weight], [1], target, target + 1, [False])
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    except Exception as error:  # compilers, drivers and folders can fail in any way
        return f"Triton does not work on {device}: {error!r}"
    return None


@cache
def _interpreted() -> bool:
    """Returns whether Triton runs in interpreter mode, without importing it."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "y", "yes", "on", "true")


@cache
def _kernels() -> ModuleType:
    from inmerge_wrap.engines import triton_kernels

    return triton_kernels


@cache
def _stored() -> dict[torch.dtype, Any]:
    """Returns the Triton type of each dtype; bfloat16 is read as its bits."""
    import triton.language as tl

    return dict(zip(_DTYPES, (tl.float32, tl.uint16, tl.float16), strict=True))


def takes(weight: Tensor) -> bool:
    """Returns whether a weight can be read and written in place."""
    # Subclasses (shards, quantised and fake tensors) may have no memory of their own.
    plain = type(weight) is Tensor and weight.layout is torch.strided
    here = weight.device.type == ("cpu" if _interpreted() else "cuda")
    return plain and here and weight.dtype in _DTYPES and is_dense(weight)


def compare(
    weights: Sequence[Tensor],
    pairs: Sequence[int],
    targets: Tensor,
    sources: Tensor,
    centred: Sequence[bool],
) -> Tensor:
    """Computes the cosine of each drawn pair, as :func:`inmerge_wrap.merging.pair_cosines`.

    Launches: a table and one kernel.

    Args:
        weights: Each of shape (C_out, C_in / groups, kH, kW); see :func:`takes`.
        pairs: Number of pairs of each layer.
        targets: int64, layer after layer, shape (sum(pairs),).
        sources: Likewise.
        centred: For each layer, whether to compare the kernels without their mean.

    Returns:
        Shape (sum(pairs),), float32.
    """
    cosines = torch.empty(len(targets), dtype=torch.float32, device=targets.device)
    table = _table(weights, pairs, centred=centred)
    _launch(_kernels().compare, table, targets.contiguous(), sources.contiguous(), cosines)
    return cosines


def layer_quantiles(cosines: Tensor, pairs: Sequence[int], share: float) -> Tensor:
    """Returns the cosine that the most similar ``share`` of each layer's pairs reach.

    As :func:`torch.nanquantile` of each layer, in a number of operations that does not grow with
    the layers.

    Args:
        cosines: Cosines of all layers, shape (sum(pairs),).
        pairs: Number of pairs of each layer.
        share: In (0, 1].

    Returns:
        Shape (layers,); NaN for a layer without a pair that has a cosine.
    """
    width = max(pairs, default=0)
    if width == 0:
        return cosines.new_full((len(pairs),), torch.nan)
    counts = torch.tensor(pairs, dtype=torch.int64, device="cpu")
    unused = torch.arange(len(pairs), device="cpu") * width - (counts.cumsum(0) - counts)
    index = torch.arange(len(cosines), device="cpu") + unused.repeat_interleave(counts)
    rows = cosines.new_full((len(pairs) * width,), torch.nan)
    rows.index_copy_(0, _send(index, cosines.device), cosines)
    return torch.nanquantile(rows.view(len(pairs), width), 1.0 - share, dim=1)


def decide(
    cosines: Tensor,
    pairs: Sequence[int],
    thresholds: Sequence[float] | Tensor,
    *,
    inclusive: bool = False,
    skip: Tensor | None = None,
    counts: Counts | None = None,
    rows: Sequence[int] | None = None,
) -> Tensor:
    """Decides which pairs merge: those with a cosine above the threshold of their layer (eq. 4).

    Launches: a table and one kernel. A NaN cosine passes no threshold, and a NaN threshold nothing.

    Args:
        cosines: Cosines of all layers, shape (sum(pairs),), float32.
        pairs: Number of pairs of each layer.
        thresholds: Threshold of each layer: numbers, or shape (layers,), float32, on the device.
        inclusive: Whether a cosine equal to the threshold passes.
        skip: A scalar on the device; non-zero disables the merge, as on a gradient overflow.
        counts: Running counts to add these pairs to.
        rows: Index of each layer in the counts; by default their order here.

    Returns:
        Boolean mask, shape (sum(pairs),).
    """
    changed = torch.empty(len(cosines), dtype=torch.bool, device=cosines.device)
    if not len(cosines):
        return changed
    ends = list(accumulate(pairs, initial=0))
    places = range(len(pairs)) if rows is None else rows
    numbers = [n for row in zip(ends[:-1], ends[1:], places, strict=True) for n in row]
    if not isinstance(thresholds, Tensor):  # along with the table: its 64 bits as an integer
        numbers.extend(array("q", array("d", thresholds).tobytes()))
    table = _send(torch.tensor(numbers, dtype=torch.int64, device="cpu"), cosines.device)
    if not isinstance(thresholds, Tensor):
        thresholds = table[3 * len(pairs) :].view(torch.float64)
    sums = counts or (None,) * 4
    with torch.cuda.device_of(cosines):
        grid = (len(pairs),)
        _kernels().decide[grid](table, thresholds, cosines, skip, changed, *sums, inclusive, _PAIRS)
    return changed


def blend_(
    weights: Sequence[Tensor],
    pairs: Sequence[int],
    targets: Tensor,
    sources: Tensor,
    changed: Tensor,
    merge_weight: float,
    signs: Tensor | None = None,
) -> None:
    """Blends kernels of all layers in place; all are read before any is written (eq. 3).

    Launches: a table and two kernels. The first blends in place the kernels that are not a source
    of any pair, and the others into a buffer, from which the second copies. The buffer has room
    for all drawn kernels, because only the device knows how many need it. An order in which each
    kernel is read by all pairs that use it before it is written, as in ``native.cpp``, would need
    no buffer. But it requires the sources on the host, where the most similar partners are not,
    and a single program that follows it, while a GPU runs thousands.

    Args:
        weights: As in :func:`compare`.
        pairs: Number of pairs of each layer.
        targets: Kernels to write; none repeats in a layer.
        sources: Their partners.
        changed: Boolean mask of the pairs to blend, shape (sum(pairs),).
        merge_weight: alpha, the weight of the kernel itself; with ``signs`` the radius r of
            :func:`inmerge_wrap.merging.signed_weight`.
        signs: 1 or -1, shape (sum(pairs),): move each kernel toward its partner or away from it.
    """
    targets, sources, changed = (part.contiguous() for part in (targets, sources, changed))
    buffer, later = _buffer(weights, pairs), torch.empty_like(changed)
    table = _table(weights, pairs, buffer=buffer)
    kernels = _kernels()
    _launch(kernels.blend, table, targets, sources, changed, later, merge_weight, signs)
    _launch(kernels.copy, table, targets, later, False)
    _written(weights, pairs)


def save(
    weights: Sequence[Tensor],
    pairs: Sequence[int],
    targets: Tensor,
    changed: Tensor | None = None,
) -> Tensor:
    """Copies kernels of all layers, bit for bit, for :func:`restore_`.

    Launches: a table and one kernel.

    Args:
        weights: As in :func:`compare`.
        pairs: Number of pairs of each layer.
        targets: The kernels to copy.
        changed: Boolean mask, shape (sum(pairs),), of those that are needed; None copies all.

    Returns:
        A buffer of bytes in an internal order. Those of kernels that are not needed are undefined.
    """
    buffer = _buffer(weights, pairs)
    table = _table(weights, pairs, buffer=buffer)
    mask = None if changed is None else changed.contiguous()
    _launch(_kernels().copy, table, targets.contiguous(), mask, True)
    return buffer


def restore_(
    weights: Sequence[Tensor],
    pairs: Sequence[int],
    targets: Tensor,
    buffer: Tensor,
    changed: Tensor | None = None,
) -> None:
    """Writes back what :func:`save` copied from weights of these shapes and dtypes.

    Launches: a table and one kernel.

    Args:
        weights: As in :func:`save`.
        pairs: Number of pairs of each layer.
        targets: Kernels to write; none repeats in a layer.
        buffer: The result of :func:`save`.
        changed: Which kernels to write, all of them saved; None writes all.

    Raises:
        ValueError: If the buffer does not belong to these layers and pairs.
    """
    expected = _buffer_starts(weights, pairs)[-1]
    if buffer.dtype != torch.uint8 or buffer.shape != (expected,):
        raise ValueError(
            f"the buffer must be the {expected} bytes that save() returned for these weights and "
            f"pairs, got {buffer.dtype} of shape {tuple(buffer.shape)}"
        )
    table = _table(weights, pairs, buffer=buffer)
    mask = None if changed is None else changed.contiguous()
    _launch(_kernels().copy, table, targets.contiguous(), mask, False)
    _written(weights, pairs)


class _Part(NamedTuple):
    """The layers of one dtype."""

    stored: Any  # of triton.language
    table: Tensor  # shape (layers, COLUMNS), int64, on the device; see triton_kernels.py
    pairs: int


def _table(
    weights: Sequence[Tensor],
    pairs: Sequence[int],
    *,
    centred: Sequence[bool] | None = None,
    buffer: Tensor | None = None,
) -> list[_Part]:
    """Builds the table of layers that the launches read, sent to the device in one copy."""
    first_pair = list(accumulate(pairs, initial=0))
    at = 0 if buffer is None else buffer.data_ptr()
    places = [at + start for start in _buffer_starts(weights, pairs)]
    rows, ends, programs = [], [], []
    for dtype in _DTYPES:
        program = 0
        for n, weight in enumerate(weights):
            if weight.dtype == dtype:
                rows.append(
                    (
                        weight.data_ptr(),
                        _fan_in(weight),
                        first_pair[n],
                        pairs[n],
                        program,
                        places[n],
                        centred is not None and centred[n],
                    )
                )
                program += pairs[n]
        ends.append(len(rows))
        programs.append(program)
    if not any(pairs):
        return []
    table = _send(torch.tensor(rows, dtype=torch.int64, device="cpu"), weights[0].device)
    parts = zip(_DTYPES, [0, *ends], ends, programs, strict=False)
    return [
        _Part(_stored()[dtype], table[begin:end], count)
        for dtype, begin, end, count in parts
        if count
    ]


def _launch(kernel: Any, parts: list[_Part], *arguments: Any) -> None:
    for stored, table, pairs in parts:
        with torch.cuda.device_of(table):
            kernel[(pairs,)](table, len(table), *arguments, stored, _BLOCK)


def _buffer(weights: Sequence[Tensor], pairs: Sequence[int]) -> Tensor:
    size = _buffer_starts(weights, pairs)[-1]
    return torch.empty(size, dtype=torch.uint8, device=weights[0].device)


def _buffer_starts(weights: Sequence[Tensor], pairs: Sequence[int]) -> list[int]:
    """Returns where each layer's rows begin in a buffer, and its size, in bytes."""
    row_bytes = (_fan_in(weight) * weight.element_size() for weight in weights)
    sizes = (count * size for count, size in zip(pairs, row_bytes, strict=True))
    return list(accumulate((-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes), initial=0))


def _fan_in(weight: Tensor) -> int:
    return weight.numel() // len(weight)


def _written(weights: Sequence[Tensor], pairs: Sequence[int]) -> None:
    """Bumps the version counter of a weight, so that autograd detects the in-place write."""
    # All weights that may have changed: only the device knows which pairs did.
    written = [weight for weight, count in zip(weights, pairs, strict=True) if count]
    torch.autograd.graph.increment_version(written)


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies to the device without waiting for it."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
