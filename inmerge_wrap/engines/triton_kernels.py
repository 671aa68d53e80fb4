"""The kernels of ``triton.py``: what runs on the device.

A program (a thread block) works on one drawn pair, or in :func:`decide` on one layer. The plain
functions of ``merging.py`` are the specification. As everywhere in this library,
*kernels* are those of a convolution; what Triton calls a kernel is a function of this module.

``bfloat16`` is read and written as its 16 bits and converted with integers: GPUs before Ampere have
no instruction for it, and Triton's interpreter truncates where it should round.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["COLUMNS", "blend", "compare", "copy", "decide"]

# A layer in the table of layers, in int64; see triton.py.
_ADDRESS = tl.constexpr(0)  # of the first entry of its weight
_FAN_IN = tl.constexpr(1)
_FIRST_PAIR = tl.constexpr(2)  # in the arrays of all pairs
_PAIRS = tl.constexpr(3)  # how many
_FIRST_PROGRAM = tl.constexpr(4)  # that works on it
_BUFFER = tl.constexpr(5)  # address of the buffer's row for its first pair
_CENTRED = tl.constexpr(6)  # whether to compare its kernels without their mean
COLUMNS = tl.constexpr(7)

# No argument is specialised: compiling in mid-training costs more than a variant could gain.
_POINTERS = ["table", "targets", "sources", "cosines", "changed", "later", "thresholds", "skip"]
_POINTERS.append("signs")
_ONE_VARIANT = {"do_not_specialize": ["layers"], "do_not_specialize_on_alignment": _POINTERS}


@triton.jit
def _layer_of(table: tl.tensor, layers: tl.tensor, program: tl.tensor) -> tl.tensor:
    """Returns the table row that a program works on: the last that begins at or before it."""
    low = 0
    high = layers
    while high - low > 1:
        middle = (low + high) // 2
        later = tl.load(table + middle * COLUMNS + _FIRST_PROGRAM) > program
        low = tl.where(later, low, middle)
        high = tl.where(later, middle, high)
    return table + low * COLUMNS


@triton.jit
def _row(layer: tl.tensor, kernel: tl.tensor, stored: tl.constexpr) -> tl.tensor:
    """Returns the pointer to the first entry of a kernel of a layer."""
    weight = tl.load(layer + _ADDRESS).to(tl.pointer_type(stored))
    return weight + kernel * tl.load(layer + _FAN_IN)


@triton.jit
def _buffer_row(layer: tl.tensor, pair: tl.tensor, stored: tl.constexpr) -> tl.tensor:
    """Returns the pointer to the first entry of the buffer's row for a pair."""
    rows = tl.load(layer + _BUFFER).to(tl.pointer_type(stored))
    return rows + (pair - tl.load(layer + _FIRST_PAIR)) * tl.load(layer + _FAN_IN)


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


@triton.jit(**_ONE_VARIANT)
def compare(
    table: tl.tensor,
    layers: tl.tensor,
    targets: tl.tensor,
    sources: tl.tensor,
    cosines: tl.tensor,
    stored: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Returns the cosine of each pair."""
    program = tl.program_id(0)
    layer = _layer_of(table, layers, program)
    pair = tl.load(layer + _FIRST_PAIR) + program - tl.load(layer + _FIRST_PROGRAM)
    kernel = _row(layer, tl.load(targets + pair), stored)
    partner = _row(layer, tl.load(sources + pair), stored)
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
    tl.store(cosines + pair, tl.where(norms < float("inf"), cosine, float("nan")))


@triton.jit(**_ONE_VARIANT)
def decide(
    table: tl.tensor,
    thresholds: tl.tensor,
    cosines: tl.tensor,
    skip: tl.tensor,
    changed: tl.tensor,
    merged: tl.tensor,
    undefined: tl.tensor,
    cosine_sum: tl.tensor,
    cosine_max: tl.tensor,
    inclusive: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Decides which pairs merge and updates the running counts; one program per layer.

    Each row of the table: the layer's first pair, the pair after its last, its row in the counts.
    """
    layer = tl.program_id(0)
    first = tl.load(table + layer * 3)
    after = tl.load(table + layer * 3 + 1)
    threshold = tl.load(thresholds + layer).to(tl.float32)  # from float64 of the host
    if skip is not None:
        threshold = tl.where(tl.load(skip) == 0, threshold, float("inf"))
    # Each number is computed by one program, so that the order of additions is deterministic.
    passed_here = tl.zeros([block], tl.int64)
    undefined_here = tl.zeros([block], tl.int64)
    sum_here = tl.zeros([block], tl.float64)
    max_here = tl.full([block], float("-inf"), tl.float32)
    for start in range(first, after, block):
        pair = start + tl.arange(0, block)
        inside = pair < after
        cosine = tl.load(cosines + pair, mask=inside, other=float("nan"))
        passed = cosine >= threshold if inclusive else cosine > threshold
        tl.store(changed + pair, passed, mask=inside)
        known = cosine == cosine
        passed_here += passed.to(tl.int64)
        undefined_here += (inside & (known == 0)).to(tl.int64)
        sum_here += tl.where(known, cosine, 0.0).to(tl.float64)
        max_here = tl.where(known & (cosine > max_here), cosine, max_here)
    if merged is not None:
        row = tl.load(table + layer * 3 + 2)
        tl.store(merged + row, tl.load(merged + row) + tl.sum(passed_here, axis=0))
        tl.store(undefined + row, tl.load(undefined + row) + tl.sum(undefined_here, axis=0))
        tl.store(cosine_sum + row, tl.load(cosine_sum + row) + tl.sum(sum_here, axis=0))
        highest = tl.maximum(tl.load(cosine_max + row), tl.max(max_here, axis=0))
        tl.store(cosine_max + row, highest)


@triton.jit(**_ONE_VARIANT)
def blend(
    table: tl.tensor,
    layers: tl.tensor,
    targets: tl.tensor,
    sources: tl.tensor,
    changed: tl.tensor,
    later: tl.tensor,
    merge_weight: tl.tensor,
    signs: tl.tensor,
    stored: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Blends the kernels of the changed pairs, in place if they are not a source of any pair.

    The others go to the buffer and are marked in ``later``, to be written after this launch. With
    ``signs`` each kernel moves by ``merge_weight`` times its norm along the line to its partner.
    """
    program = tl.program_id(0)
    layer = _layer_of(table, layers, program)
    first_pair = tl.load(layer + _FIRST_PAIR)
    pair = first_pair + program - tl.load(layer + _FIRST_PROGRAM)
    target = tl.load(targets + pair)
    wanted = tl.load(changed + pair)
    readers = tl.zeros([block], tl.int32)
    number = tl.where(wanted, tl.load(layer + _PAIRS), 0)
    for start in range(0, number, block):
        others = start + tl.arange(0, block)
        read = tl.load(sources + first_pair + others, mask=others < number, other=-1)
        readers += (read == target).to(tl.int32)
    is_read = tl.sum(readers, axis=0) > 0
    tl.store(later + pair, is_read)
    if wanted:
        kernel = _row(layer, target, stored)
        partner = _row(layer, tl.load(sources + pair), stored)
        blended = tl.where(is_read, _buffer_row(layer, pair, stored), kernel)
        fan_in = tl.load(layer + _FAN_IN)
        weight = merge_weight
        if signs is not None:
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
            step = tl.load(signs + pair).to(tl.float32) * merge_weight
            step = step * tl.sqrt_rn(tl.sum(square, axis=0))
            weight = 1.0 - tl.where(apart > 0.0, tl.div_rn(step, apart), 0.0)
        for start in range(0, fan_in, block):
            entries = start + tl.arange(0, block)
            inside = entries < fan_in
            mine = _widened(tl.load(kernel + entries, mask=inside, other=0))
            theirs = _widened(tl.load(partner + entries, mask=inside, other=0))
            # The two forms of torch.lerp, each exact at its end.
            from_theirs = theirs + weight * (mine - theirs)
            from_mine = mine - (mine - theirs) * (1.0 - weight)
            new = tl.where(weight < 0.5, from_theirs, from_mine)
            tl.store(blended + entries, _narrowed(new, stored), mask=inside)


@triton.jit(**_ONE_VARIANT)
def copy(
    table: tl.tensor,
    layers: tl.tensor,
    targets: tl.tensor,
    changed: tl.tensor,
    to_buffer: tl.constexpr,
    stored: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Copies the kernels of all or of the changed pairs, to the buffer or from it."""
    program = tl.program_id(0)
    layer = _layer_of(table, layers, program)
    pair = tl.load(layer + _FIRST_PAIR) + program - tl.load(layer + _FIRST_PROGRAM)
    wanted = True
    if changed is not None:
        wanted = tl.load(changed + pair)
    if wanted:
        kernel = _row(layer, tl.load(targets + pair), stored)
        kept = _buffer_row(layer, pair, stored)
        fan_in = tl.load(layer + _FAN_IN)
        for start in range(0, fan_in, block):
            entries = start + tl.arange(0, block)
            inside = entries < fan_in
            if to_buffer:
                tl.store(kept + entries, tl.load(kernel + entries, mask=inside), mask=inside)
            else:
                tl.store(kernel + entries, tl.load(kept + entries, mask=inside), mask=inside)
