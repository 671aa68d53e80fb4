"""The kernels of ``triton.py``: what runs on the device.

A program (a thread block) works on one drawn pair. The plain functions of ``merging.py`` are the
specification. As everywhere in this library, *kernels* are those of a convolution; what Triton
calls a kernel is a function of this module.

A thread reads several entries at a time if all rows of a layer begin at a multiple of 16 bytes. For
this the compiler must know that their length is such a multiple as well, because of the mask at the
end. So each body is compiled for both cases, and a program takes one of them. The entries of a row
are numbered in int32, since with int64 the arithmetic of indices would outweigh that of the blend.

``bfloat16`` is read and written as its 16 bits and converted with integers: GPUs before Ampere have
no instruction for it, and Triton's interpreter truncates where it should round.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["COLUMNS", "compare", "copy", "merge"]

# A layer in the table of layers, in int64; see triton_launches.py.
_ADDRESS = tl.constexpr(0)  # of the first entry of its weight
_FAN_IN = tl.constexpr(1)
_ROW_0 = tl.constexpr(2)  # byte of a buffer where the row of pair 0 would begin in this layer
_CENTRED = tl.constexpr(3)  # whether to compare its kernels without their mean
_THRESHOLD = tl.constexpr(4)  # the bits of a float32
_ALIGNED = tl.constexpr(5)  # whether all rows begin at a multiple of 16 bytes
COLUMNS = tl.constexpr(6)

# No argument is specialised: compiling in mid-training costs more than a variant could gain.
_POINTERS = ["table", "place", "targets", "sources", "read", "signs", "cosines", "merged", "skip"]
_POINTERS += ["changed", "buffer", "blended", "kept", "late"]
_ONE_VARIANT = {"do_not_specialize_on_alignment": _POINTERS}


@triton.jit
def _row(
    rows: tl.tensor,
    number: tl.tensor,
    fan_in: tl.tensor,
    stored: tl.constexpr,
    aligned: tl.constexpr,
) -> tl.tensor:
    """Returns the pointer to the first entry of a row, given the address of row 0."""
    row = rows.to(tl.pointer_type(stored)) + number.to(tl.int64) * fan_in
    return tl.multiple_of(row, 16) if aligned else row


@triton.jit
def _length(fan_in: tl.tensor, stored: tl.constexpr, aligned: tl.constexpr) -> tl.tensor:
    """Returns the entries of a row, by an operation that shows the compiler their alignment."""
    vector: tl.constexpr = 4 if stored == tl.float32 else 8  # entries in 16 bytes
    return fan_in // vector * vector if aligned else fan_in


@triton.jit
def _widened(values: tl.tensor) -> tl.tensor:
    """Returns the entries of a weight as float32."""
    if values.dtype == tl.uint16:
        return (values.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return values.to(tl.float32)


@triton.jit
def _narrowed(values: tl.tensor, stored: tl.constexpr) -> tl.tensor:
    """Converts float32 to the dtype of a weight, rounding to nearest, ties to even."""
    if stored == tl.uint16:
        bits = values.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # A NaN must not be rounded to infinity.
        return tl.where(values == values, rounded, 0x7FC0).to(tl.uint16)
    else:
        return values.to(stored)


@triton.jit
def _compared(
    kernel: tl.tensor,
    partner: tl.tensor,
    length: tl.tensor,
    centred: tl.tensor,
    block: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Returns the cosine of two kernels, the norm of the first and their distance."""
    entries = tl.arange(0, block)
    mean = 0.0
    partner_mean = 0.0
    if centred != 0:
        total = tl.zeros([block], tl.float32)
        partner_total = tl.zeros([block], tl.float32)
        for start in range(0, length, block):
            inside = start + entries < length
            total += _widened(tl.load(kernel + start + entries, mask=inside, other=0))
            partner_total += _widened(tl.load(partner + start + entries, mask=inside, other=0))
        mean = tl.sum(total, axis=0) / length.to(tl.float32)
        partner_mean = tl.sum(partner_total, axis=0) / length.to(tl.float32)
    product = tl.zeros([block], tl.float32)
    square = tl.zeros([block], tl.float32)
    partner_square = tl.zeros([block], tl.float32)
    with_mean = tl.zeros([block], tl.float32)
    between = tl.zeros([block], tl.float32)
    for start in range(0, length, block):
        inside = start + entries < length
        mine = _widened(tl.load(kernel + start + entries, mask=inside, other=0))
        theirs = _widened(tl.load(partner + start + entries, mask=inside, other=0))
        with_mean += mine * mine
        between += (theirs - mine) * (theirs - mine)
        mine = tl.where(inside, mine - mean, 0.0)
        theirs = tl.where(inside, theirs - partner_mean, 0.0)
        product += mine * theirs
        square += mine * mine
        partner_square += theirs * theirs
    norms = tl.sqrt_rn(tl.sum(square, axis=0)) * tl.sqrt_rn(tl.sum(partner_square, axis=0))
    cosine = tl.div_rn(tl.sum(product, axis=0), norms)
    cosine = tl.where(cosine > 1.0, 1.0, tl.where(cosine < -1.0, -1.0, cosine))
    # 0 / 0 is NaN and stays NaN; a quotient with an infinite or undefined norm is NaN as well.
    cosine = tl.where(norms < float("inf"), cosine, float("nan"))
    norm = tl.sqrt_rn(tl.sum(with_mean, axis=0))
    return cosine, norm, tl.sqrt_rn(tl.sum(between, axis=0))


@triton.jit(**_ONE_VARIANT)
def compare(
    table: tl.tensor,
    place: tl.tensor,
    targets: tl.tensor,
    sources: tl.tensor,
    cosines: tl.tensor,
    stored: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Returns the cosine of each pair."""
    pair = tl.program_id(0)
    layer = table + tl.load(place + pair).to(tl.int64) * COLUMNS
    target, source = tl.load(targets + pair), tl.load(sources + pair)
    rows, fan_in = tl.load(layer + _ADDRESS), tl.load(layer + _FAN_IN).to(tl.int32)
    centred, is_aligned = tl.load(layer + _CENTRED), tl.load(layer + _ALIGNED)
    for aligned in tl.static_range(2):
        if is_aligned == aligned:
            kernel = _row(rows, target, fan_in, stored, aligned)
            partner = _row(rows, source, fan_in, stored, aligned)
            length = _length(fan_in, stored, aligned)
            cosine, _, _ = _compared(kernel, partner, length, centred, block)
            tl.store(cosines + pair, cosine)


@triton.jit(**_ONE_VARIANT)
def merge(
    table: tl.tensor,
    place: tl.tensor,
    targets: tl.tensor,
    sources: tl.tensor,
    read: tl.tensor,
    signs: tl.tensor,
    cosines: tl.tensor,
    merged: tl.tensor,
    blended: tl.tensor,
    kept: tl.tensor,
    skip: tl.tensor,
    merge_weight: tl.tensor,
    decided: tl.constexpr,
    stored: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Compares each pair, decides and blends (eq. 1-4).

    A kernel is blended in place unless it is ``read``, the source of some pair. Those go to the
    buffer ``blended``, to be copied after this launch; ``kept`` receives the kernels as they
    were. With ``signs`` each kernel moves by ``merge_weight`` times its norm along the line to its
    partner. If it is already ``decided`` which pairs merge, ``merged`` is read instead of written,
    and no cosine is stored.
    """
    # What a program reads first, it reads together: most of its time is waiting for memory.
    pair = tl.program_id(0)
    layer = table + tl.load(place + pair).to(tl.int64) * COLUMNS
    target, source = tl.load(targets + pair), tl.load(sources + pair)
    is_read = tl.load(read + pair) != 0
    rows, fan_in = tl.load(layer + _ADDRESS), tl.load(layer + _FAN_IN).to(tl.int32)
    centred, is_aligned = tl.load(layer + _CENTRED), tl.load(layer + _ALIGNED)
    row_0, threshold = tl.load(layer + _ROW_0), tl.load(layer + _THRESHOLD).to(tl.int32)
    for aligned in tl.static_range(2):
        if is_aligned == aligned:
            kernel = _row(rows, target, fan_in, stored, aligned)
            partner = _row(rows, source, fan_in, stored, aligned)
            length = _length(fan_in, stored, aligned)
            if decided:
                wanted = tl.load(merged + pair)
            if not decided or signs is not None:
                cosine, norm, distance = _compared(kernel, partner, length, centred, block)
            if not decided:
                wanted = cosine > threshold.to(tl.float32, bitcast=True)
                if skip is not None:
                    wanted = wanted & (tl.load(skip) == 0)
                tl.store(cosines + pair, cosine)
                tl.store(merged + pair, wanted)
            if wanted:
                weight = merge_weight
                if signs is not None:
                    step = tl.load(signs + pair).to(tl.float32) * merge_weight * norm
                    # As signed_weight() of merging.py.
                    weight = 1.0 - tl.where(distance > 0.0, tl.div_rn(step, distance), 0.0)
                # The two forms of torch.lerp, each exact at its end.
                from_theirs = weight < 0.5
                share = tl.where(from_theirs, weight, weight - 1.0)
                new_row = _row(blended + row_0, pair, fan_in, stored, aligned)
                new_row = tl.where(is_read, new_row, kernel)
                if kept is not None:
                    kept_row = _row(kept + row_0, pair, fan_in, stored, aligned)
                for start in range(0, length, block):
                    entries = start + tl.arange(0, block)
                    inside = entries < length
                    old = tl.load(kernel + entries, mask=inside, other=0)
                    mine = _widened(old)
                    theirs = _widened(tl.load(partner + entries, mask=inside, other=0))
                    if kept is not None:
                        tl.store(kept_row + entries, old, mask=inside)
                    new = tl.where(from_theirs, theirs, mine) + share * (mine - theirs)
                    tl.store(new_row + entries, _narrowed(new, stored), mask=inside)


@triton.jit(**_ONE_VARIANT)
def copy(
    table: tl.tensor,
    place: tl.tensor,
    targets: tl.tensor,
    changed: tl.tensor,
    read: tl.tensor,
    late: tl.tensor,
    buffer: tl.tensor,
    stored: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Copies kernels of changed pairs from a buffer: of all, of the ``late``, or if ``read``."""
    pair = tl.program_id(0)
    if late is not None:
        pair = tl.load(late + pair).to(tl.int32)
    layer = table + tl.load(place + pair).to(tl.int64) * COLUMNS
    target, wanted = tl.load(targets + pair), tl.load(changed + pair)
    if read is not None:
        wanted = wanted & (tl.load(read + pair) != 0)
    rows, fan_in = tl.load(layer + _ADDRESS), tl.load(layer + _FAN_IN).to(tl.int32)
    row_0, is_aligned = tl.load(layer + _ROW_0), tl.load(layer + _ALIGNED)
    if wanted:
        for aligned in tl.static_range(2):
            if is_aligned == aligned:
                kernel = _row(rows, target, fan_in, stored, aligned)
                row = _row(buffer + row_0, pair, fan_in, stored, aligned)
                length = _length(fan_in, stored, aligned)
                for start in range(0, length, block):
                    entries = start + tl.arange(0, block)
                    inside = entries < length
                    tl.store(kernel + entries, tl.load(row + entries, mask=inside), mask=inside)
