"""Comparing, merging and restoring the kernels of many layers in one launch each, on a GPU.

PyTorch launches some twenty small kernels for each layer of a pass. Here one launch works on all
layers, whatever their number: it reads the weights through a table of their addresses, which the
host sends with the drawn pairs in one message, without waiting. The launches are in
``triton_kernels.py``; Triton is imported when it is first needed.

The weights of a batch must be on one device and of one dtype, and no two may share memory;
:func:`takes` checks whether a weight is supported.

Under ``TRITON_INTERPRET=1``, set before Triton is imported, the same functions run on a CPU,
slowly; this is how the tests run them without a GPU.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inmerge_wrap.pairs import places_of
from inmerge_wrap.stores import is_dense

__all__ = [
    "Batch",
    "Merged",
    "available",
    "batch_of",
    "batch_to_send",
    "compare",
    "layer_quantiles",
    "merge_",
    "reach_quantiles",
    "restore_",
    "takes",
    "unavailable_reason",
]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BLOCK = 512  # entries of a kernel that a program works on at a time
_WARPS = 4  # of 32 threads each, in a program, so that a thread reads 16 bytes of float32
_ALIGNMENT = 16  # bytes; of the layers in a buffer


class Batch(NamedTuple):
    """Pairs of kernels of some layers, and what the launches read of them, on the device.

    Attributes:
        weights: Each of shape (C_out, C_in / groups, kH, kW); see :func:`takes`.
        lengths: Number of pairs of each layer.
        table: int64, a row of numbers for each layer; see ``triton_kernels.py``.
        place: int16 or int32, shape (pairs,), as the following: the layer of each pair, by its
            place here.
        targets: Kernels to write; none repeats in a layer.
        sources: Their partners.
        read: Whether the target is a source of a pair of its layer, 0 or 1.
        late: Indices of the pairs for which it is; None if only the device knows.
        signs: Whether to move a kernel toward its partner (1) or away from it (-1); None to blend.
        numbers: The layer of each pair, by its position in the plan if it is known, else its place.
        room: Bytes of a buffer with a row for each pair.
    """

    weights: Sequence[Tensor]
    lengths: Sequence[int]
    table: Tensor
    place: Tensor
    targets: Tensor
    sources: Tensor
    read: Tensor
    late: Tensor | None
    signs: Tensor | None
    numbers: Tensor
    room: int


class Merged(NamedTuple):
    """What :func:`merge_` did.

    Attributes:
        cosines: Cosine of each pair, shape (pairs,), float32; undefined if given a decision.
        merged: Whether it merged, boolean, shape (pairs,).
        kept: The kernels that changed as they were, for :func:`restore_`; None if not wanted.
    """

    cosines: Tensor
    merged: Tensor
    kept: Tensor | None


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
        compare(batch_of([weight], [1], target, target + 1))
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


def batch_to_send(
    weights: Sequence[Tensor],
    lengths: Sequence[int],
    pairs: Tensor,
    *,
    centred: Sequence[bool] | None = None,
    thresholds: Sequence[float] | None = None,
    signs: Tensor | None = None,
    in_order: bool = True,
) -> Batch:
    """Sends pairs that the host has drawn, with the table of their layers, in one message.

    Args:
        weights: See :class:`Batch`; likewise ``lengths``.
        pairs: int64, on the CPU, shape (3, pairs): position in the plan, target and source.
        centred: For each layer, whether to compare its kernels without their mean; by default no.
        thresholds: The cosine above which the pairs of each layer merge; by default none does.
        signs: See :class:`Batch`.
        in_order: Whether positions in the plan are places here, so that they are not sent twice.
    """
    numbers, targets, sources = pairs
    place = numbers if in_order else places_of(lengths)
    read = _is_read(weights, place, targets, sources)
    rows = {
        "place": place,
        "targets": targets,
        "sources": sources,
        "read": read,
        "late": read.nonzero().flatten(),
    }
    if signs is not None:
        rows["signs"] = signs
    if not in_order:
        rows["numbers"] = numbers
    table, room = _table(weights, lengths, centred, thresholds)
    table, sent = _send(table, rows, weights[0].device, _index_type(weights, numbers))
    sent.setdefault("signs", None)
    sent.setdefault("numbers", sent["place"])
    return Batch(weights, lengths, table, room=room, **sent)


def batch_of(
    weights: Sequence[Tensor],
    lengths: Sequence[int],
    targets: Tensor,
    sources: Tensor,
    *,
    centred: Sequence[bool] | None = None,
) -> Batch:
    """Describes pairs that are on the device already, as those with the most similar partner.

    Takes some ten launches more than :func:`batch_to_send`, and one message.

    Args:
        weights: See :class:`Batch`; likewise ``lengths``.
        targets: int64, shape (pairs,), layer after layer.
        sources: Likewise.
        centred: See :func:`batch_to_send`.
    """
    table, room = _table(weights, lengths, centred)
    kind = _index_type(weights)
    table, sent = _send(table, {"place": places_of(lengths)}, weights[0].device, kind)
    place = sent["place"]
    read = _is_read(weights, place, targets, sources)
    targets, sources, read = (part.to(kind).contiguous() for part in (targets, sources, read))
    return Batch(weights, lengths, table, place, targets, sources, read, None, None, place, room)


def compare(batch: Batch) -> Tensor:
    """Computes the cosine of each pair, as :func:`inmerge_wrap.merging.pair_cosines`: one launch.

    Returns:
        Shape (pairs,), float32.
    """
    cosines = torch.empty(len(batch.place), dtype=torch.float32, device=batch.place.device)
    _launch("compare", batch, len(cosines), batch.sources, cosines)
    return cosines


def layer_quantiles(cosines: Tensor, lengths: Sequence[int], share: float) -> Tensor:
    """Returns the cosine that the most similar ``share`` of each layer's pairs reach.

    As :func:`torch.nanquantile` of each layer, in a number of operations that does not grow with
    the layers.

    Args:
        cosines: Cosines of all layers, shape (pairs,).
        lengths: Number of pairs of each layer.
        share: In (0, 1].

    Returns:
        Shape (layers,); NaN for a layer without a pair that has a cosine.
    """
    width = max(lengths, default=0)
    if width == 0:
        return cosines.new_full((len(lengths),), torch.nan)
    counts = torch.tensor(lengths, dtype=torch.int64, device="cpu")
    unused = torch.arange(len(lengths), device="cpu") * width - (counts.cumsum(0) - counts)
    index = torch.arange(len(cosines), device="cpu") + unused.repeat_interleave(counts)
    rows = cosines.new_full((len(lengths) * width,), torch.nan)
    rows.index_copy_(0, _there(index, cosines.device), cosines)
    return torch.nanquantile(rows.view(len(lengths), width), 1.0 - share, dim=1)


def reach_quantiles(cosines: Tensor, place: Tensor, lengths: Sequence[int], share: float) -> Tensor:
    """Returns which pairs are among the most similar ``share`` of their layer, boolean.

    Args:
        cosines: See :func:`layer_quantiles`; likewise ``lengths`` and ``share``.
        place: See :class:`Batch`.
    """
    return cosines >= layer_quantiles(cosines, lengths, share).index_select(0, place.int())


def merge_(
    batch: Batch,
    merge_weight: float,
    *,
    decided: Tensor | None = None,
    skip: Tensor | None = None,
    keep: bool = False,
) -> Merged:
    """Compares, decides and blends in place; all kernels are read before any is written (eq. 1-4).

    Launches: two. The first blends in place the kernels that are not a source of any pair, and the
    others into a buffer, from which the second copies. The buffer has room for all drawn kernels,
    because it may be that only the device knows which of them need it. An order in which each
    kernel is read by all pairs that use it before it is written, as in ``native.cpp``, would need
    no buffer. But it requires the sources on the host, where the most similar partners are not, and
    a single program that follows it, while a GPU runs thousands.

    Args:
        batch: The pairs. A NaN cosine passes no threshold.
        merge_weight: alpha, the weight of the kernel itself; with signs the radius r of
            :func:`inmerge_wrap.merging.signed_weight`.
        decided: Boolean mask, shape (pairs,), of the pairs to blend, instead of comparing them.
        skip: A scalar on the device; non-zero disables the merge, as on a gradient overflow. Not
            together with ``decided``.
        keep: Whether to keep the kernels that change.
    """
    device = batch.place.device
    if decided is None:
        merged = torch.empty(len(batch.place), dtype=torch.bool, device=device)
    else:
        merged = decided.contiguous()
    cosines = torch.empty(len(batch.place), dtype=torch.float32, device=device)
    blended = _buffer(batch)
    kept = _buffer(batch) if keep else None
    results = cosines, merged, blended, kept
    pairs = batch.sources, batch.read, batch.signs
    count, weight = len(merged), float(merge_weight)  # Triton would compile again for an integer
    _launch("merge", batch, count, *pairs, *results, skip, weight, decided is not None)
    if batch.late is None:
        _launch("copy", batch, count, merged, batch.read, None, blended)
    else:
        _launch("copy", batch, len(batch.late), merged, None, batch.late, blended)
    _written(batch)
    return Merged(cosines, merged, kept)


def restore_(batch: Batch, merged: Merged, weights: Sequence[Tensor] | None = None) -> None:
    """Restores the kernels that :func:`merge_` kept, bit for bit: one launch.

    Args:
        batch: The pairs.
        merged: What :func:`merge_` returned.
        weights: Where to write, of the same shapes, dtypes and strides; by default those of the
            batch. Others take a message.

    Raises:
        ValueError: If nothing was kept.
    """
    if merged.kept is None:
        raise ValueError("nothing to restore: call merge_() with keep=True")
    if weights is not None and _addresses(weights) != _addresses(batch.weights):
        table, _ = _table(weights, batch.lengths)
        there = _there(table, weights[0].device)
        batch = batch._replace(weights=weights, table=there)
    _launch("copy", batch, len(merged.merged), merged.merged, None, None, merged.kept)
    _written(batch)


def _table(
    weights: Sequence[Tensor],
    lengths: Sequence[int],
    centred: Sequence[bool] | None = None,
    thresholds: Sequence[float] | None = None,
) -> tuple[Tensor, int]:
    """Builds the table of layers, on the host, and counts the bytes of a buffer for all pairs."""
    centred = centred or [False] * len(weights)
    bounds = array("i", array("f", thresholds or [torch.inf] * len(weights)).tobytes())
    rows = []
    pairs = room = 0
    for weight, length, mean, bound in zip(weights, lengths, centred, bounds, strict=True):
        address, row_bytes = weight.data_ptr(), weight.nbytes // weight.shape[0]
        row_0 = room - pairs * row_bytes
        is_aligned = (address | row_bytes) % _ALIGNMENT == 0
        fan_in = row_bytes // weight.itemsize
        rows.append((address, fan_in, row_0, mean, bound, is_aligned))
        pairs += length
        room += -(-length * row_bytes // _ALIGNMENT) * _ALIGNMENT
    return torch.tensor(rows, dtype=torch.int64, device="cpu"), room


def _is_read(weights: Sequence[Tensor], place: Tensor, targets: Tensor, sources: Tensor) -> Tensor:
    """Returns whether each target is a source of a pair of its layer, where the pairs are."""
    # A row of marks for each layer.
    width = _widest(weights)
    marks = torch.zeros(len(weights) * width, dtype=torch.bool, device=targets.device)
    row = place.long() * width
    marks.index_fill_(0, row + sources, True)
    return marks.index_select(0, row + targets)


def _launch(name: str, batch: Batch, programs: int, *arguments: Any) -> None:
    """Launches a function of ``triton_kernels.py``, with a program for each pair."""
    if programs == 0:
        return
    kernel = getattr(_kernels(), name)
    shared = batch.table, batch.place, batch.targets
    last = _stored()[batch.weights[0].dtype], _BLOCK
    with torch.cuda.device_of(batch.table):
        kernel[(programs,)](*shared, *arguments, *last, num_warps=_WARPS)


def _buffer(batch: Batch) -> Tensor:
    return torch.empty(batch.room, dtype=torch.uint8, device=batch.place.device)


def _widest(weights: Sequence[Tensor]) -> int:
    return max(weight.shape[0] for weight in weights)


def _addresses(weights: Sequence[Tensor]) -> list[int]:
    return [weight.data_ptr() for weight in weights]


def _written(batch: Batch) -> None:
    """Bumps the version counter of a weight, so that autograd detects the in-place write."""
    # All weights that may have changed: only the device knows which pairs did.
    pairs = zip(batch.weights, batch.lengths, strict=True)
    torch.autograd.graph.increment_version([weight for weight, count in pairs if count])


def _send(
    table: Tensor, rows: dict[str, Tensor], device: torch.device, kind: torch.dtype
) -> tuple[Tensor, dict[str, Any]]:
    """Sends an int64 table and rows of numbers, converted, to the device in one message."""
    sizes = [table.nbytes // kind.itemsize, *map(len, rows.values())]
    pinned = device.type == "cuda"
    message = torch.empty(sum(sizes), dtype=kind, device="cpu", pin_memory=pinned)
    head, *parts = message.split(sizes)
    head.view(torch.int64).copy_(table.flatten())
    for part, row in zip(parts, rows.values(), strict=True):
        part.copy_(row)
    head, *parts = _there(message, device).split(sizes)
    return head.view(torch.int64).view(table.shape), dict(zip(rows, parts, strict=True))


@cache
def _message_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _index_type(weights: Sequence[Tensor], numbers: Tensor | None = None) -> torch.dtype:
    """Returns the smallest type of indices, since a message of many takes longer than a launch."""
    largest = max(len(weights), _widest(weights))
    if numbers is not None and len(numbers):
        largest = max(largest, len(numbers), int(numbers[-1]))
    return torch.int16 if largest < 2**15 else torch.int32


def _there(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies to the device, while that still does what was launched before, without waiting."""
    if device.type != "cuda":
        return tensor.to(device)
    stream, current = _message_stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(stream):
        sent = tensor.pin_memory().to(device, non_blocking=True)
    current.wait_stream(stream)
    sent.record_stream(current)  # else its memory might be used again while it is still read
    return sent
