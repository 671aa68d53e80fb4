"""The kernels of ``triton.py``: what runs on the device.

A program (a thread block) works on one drawn pair. All rows begin at a multiple of ``vector``
bytes, so that threads read that much at a time. The plain functions of ``merging.py`` are the
specification. As everywhere in this library, *kernels* are those of a convolution; what Triton
calls a kernel is a function of this module.

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
_FIRST_PAIR = tl.constexpr(2)  # in the arrays of all pairs
_FIRST_BYTE = tl.constexpr(3)  # of the row of that pair in a buffer
_CENTRED = tl.constexpr(4)  # whether to compare its kernels without their mean
_THRESHOLD = tl.constexpr(5)  # the bits of a float32
_DTYPE = tl.constexpr(6)  # number of the dtype
COLUMNS = tl.constexpr(7)

# No argument is specialised: compiling in mid-training costs more than a variant could gain.
_POINTERS = ["table", "place", "targets", "sources", "read", "signs", "cosines", "merged", "skip"]
_POINTERS += ["changed", "buffer", "blended", "kept"]
_ONE_VARIANT = {"do_not_specialize": ["dtype"], "do_not_specialize_on_alignment": _POINTERS}


@triton.jit
def _row(
    layer: tl.tensor, kernel: tl.tensor, stored: tl.constexpr, vector: tl.constexpr
) -> tl.tensor:
    """Returns the pointer to the first entry of a kernel of a layer."""
    weight = tl.load(layer + _ADDRESS).to(tl.pointer_type(stored))
    row = weight + kernel.to(tl.int64) * tl.load(layer + _FAN_IN)
    return tl.multiple_of(row, vector)


@triton.jit
def _buffer_row(
    buffer: tl.tensor,
    layer: tl.tensor,
    pair: tl.tensor,
    stored: tl.constexpr,
    vector: tl.constexpr,
) -> tl.tensor:
    """Returns the pointer to the first entry of the row for a pair in a buffer of bytes."""
    rows = (buffer + tl.load(layer + _FIRST_BYTE)).to(tl.pointer_type(stored))
    row = rows + (pair - tl.load(layer + _FIRST_PAIR)) * tl.load(layer + _FAN_IN)
    return tl.multiple_of(row, vector)


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
def _cosine(
    layer: tl.tensor,
    kernel: tl.tensor,
    partner: tl.tensor,
    stored: tl.constexpr,
    block: tl.constexpr,
) -> tl.tensor:
    """Returns the cosine of two kernels of a layer."""
    fan_in = tl.load(layer + _FAN_IN)
    entries = tl.arange(0, block)
    mean = 0.0
    partner_mean = 0.0
    if tl.load(layer + _CENTRED) != 0:
        total = tl.zeros([block], tl.float32)
        partner_total = tl.zeros([block], tl.float32)
        for start in range(0, fan_in, block):
            inside = start + entries < fan_in
            total += _widened(tl.load(kernel + start + entries, mask=inside, other=0))
            partner_total += _widened(tl.load(partner + start + entries, mask=inside, other=0))
        mean = tl.sum(total, axis=0) / fan_in.to(tl.float32)
        partner_mean = tl.sum(partner_total, axis=0) / fan_in.to(tl.float32)
    product = tl.zeros([block], tl.float32)
    square = tl.zeros([block], tl.float32)
    partner_square = tl.zeros([block], tl.float32)
    for start in range(0, fan_in, block):
        inside = start + entries < fan_in
        mine = _widened(tl.load(kernel + start + entries, mask=inside, other=0))
        theirs = _widened(tl.load(partner + start + entries, mask=inside, other=0))
        mine = tl.where(inside, mine - mean, 0.0)
        theirs = tl.where(inside, theirs - partner_mean, 0.0)
        product += mine * theirs
        square += mine * mine
        partner_square += theirs * theirs
    norms = tl.sqrt_rn(tl.sum(square, axis=0)) * tl.sqrt_rn(tl.sum(partner_square, axis=0))
    cosine = tl.div_rn(tl.sum(product, axis=0), norms)
    cosine = tl.where(cosine > 1.0, 1.0, tl.where(cosine < -1.0, -1.0, cosine))
    # 0 / 0 is NaN and stays NaN; a quotient with an infinite or undefined norm is NaN as well.
    return tl.where(norms < float("inf"), cosine, float("nan"))


@triton.jit
def _signed_weight(
    kernel: tl.tensor,
    partner: tl.tensor,
    fan_in: tl.tensor,
    step: tl.tensor,
    block: tl.constexpr,
) -> tl.tensor:
    """Returns the weight that moves a kernel by ``step`` times its norm; see ``merging.py``."""
    square = tl.zeros([block], tl.float32)
    distance = tl.zeros([block], tl.float32)
    for start in range(0, fan_in, block):
        entries = start + tl.arange(0, block)
        inside = entries < fan_in
        mine = _widened(tl.load(kernel + entries, mask=inside, other=0))
        between = _widened(tl.load(partner + entries, mask=inside, other=0)) - mine
        square += mine * mine
        distance += between * between
    apart = tl.sqrt_rn(tl.sum(distance, axis=0))
    step = step * tl.sqrt_rn(tl.sum(square, axis=0))
    return 1.0 - tl.where(apart > 0.0, tl.div_rn(step, apart), 0.0)


@triton.jit(**_ONE_VARIANT)
def compare(
    table: tl.tensor,
    place: tl.tensor,
    targets: tl.tensor,
    sources: tl.tensor,
    cosines: tl.tensor,
    dtype: tl.tensor,
    stored: tl.constexpr,
    vector: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Returns the cosine of each pair of the layers of a dtype."""
    pair = tl.program_id(0)
    layer = table + tl.load(place + pair).to(tl.int64) * COLUMNS
    if tl.load(layer + _DTYPE) == dtype:
        kernel = _row(layer, tl.load(targets + pair), stored, vector)
        partner = _row(layer, tl.load(sources + pair), stored, vector)
        tl.store(cosines + pair, _cosine(layer, kernel, partner, stored, block))


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
    dtype: tl.tensor,
    stored: tl.constexpr,
    vector: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Compares each pair of the layers of a dtype, decides and blends (eq. 1-4).

    A kernel is blended in place unless it is ``read``, the source of some pair. Those go to the
    buffer ``blended``, to be copied after this launch; ``kept`` receives the kernels as they
    were. With ``signs`` each kernel moves by ``merge_weight`` times its norm along the line to its
    partner. If it is already ``decided`` which pairs merge, ``merged`` is read instead of written,
    and nothing is compared.
    """
    pair = tl.program_id(0)
    layer = table + tl.load(place + pair).to(tl.int64) * COLUMNS
    if tl.load(layer + _DTYPE) == dtype:
        kernel = _row(layer, tl.load(targets + pair), stored, vector)
        partner = _row(layer, tl.load(sources + pair), stored, vector)
        if decided:
            wanted = tl.load(merged + pair)
        else:
            cosine = _cosine(layer, kernel, partner, stored, block)
            bits = tl.load(layer + _THRESHOLD).to(tl.int32)
            wanted = cosine > bits.to(tl.float32, bitcast=True)
            if skip is not None:
                wanted = wanted & (tl.load(skip) == 0)
            tl.store(cosines + pair, cosine)
            tl.store(merged + pair, wanted)
        if wanted:
            fan_in = tl.load(layer + _FAN_IN)
            weight = merge_weight
            if signs is not None:
                step = tl.load(signs + pair).to(tl.float32) * merge_weight
                weight = _signed_weight(kernel, partner, fan_in, step, block)
            in_buffer = _buffer_row(blended, layer, pair, stored, vector)
            new_row = tl.where(tl.load(read + pair) != 0, in_buffer, kernel)
            for start in range(0, fan_in, block):
                entries = start + tl.arange(0, block)
                inside = entries < fan_in
                old = tl.load(kernel + entries, mask=inside, other=0)
                mine = _widened(old)
                theirs = _widened(tl.load(partner + entries, mask=inside, other=0))
                if kept is not None:
                    kept_row = _buffer_row(kept, layer, pair, stored, vector)
                    tl.store(kept_row + entries, old, mask=inside)
                # The two forms of torch.lerp, each exact at its end.
                from_theirs = theirs + weight * (mine - theirs)
                from_mine = mine - (mine - theirs) * (1.0 - weight)
                new = tl.where(weight < 0.5, from_theirs, from_mine)
                tl.store(new_row + entries, _narrowed(new, stored), mask=inside)


@triton.jit(**_ONE_VARIANT)
def copy(
    table: tl.tensor,
    place: tl.tensor,
    targets: tl.tensor,
    changed: tl.tensor,
    read: tl.tensor,
    buffer: tl.tensor,
    dtype: tl.tensor,
    stored: tl.constexpr,
    vector: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Copies kernels of changed pairs from a buffer; with ``read`` only those that it marks."""
    pair = tl.program_id(0)
    layer = table + tl.load(place + pair).to(tl.int64) * COLUMNS
    wanted = (tl.load(layer + _DTYPE) == dtype) & tl.load(changed + pair)
    if read is not None:
        wanted = wanted & (tl.load(read + pair) != 0)
    if wanted:
        kernel = _row(layer, tl.load(targets + pair), stored, vector)
        row = _buffer_row(buffer, layer, pair, stored, vector)
        fan_in = tl.load(layer + _FAN_IN)
        for start in range(0, fan_in, block):
            entries = start + tl.arange(0, block)
            inside = entries < fan_in
            tl.store(kernel + entries, tl.load(row + entries, mask=inside), mask=inside)
