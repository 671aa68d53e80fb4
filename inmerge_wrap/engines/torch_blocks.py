"""The plain engine: PyTorch's own functions, in blocks of pairs that fit into the cache.

It supports every store, change and device, and is the specification of the other engines.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from inmerge_wrap.changes import Change
from inmerge_wrap.merging import centre, cosines_of
from inmerge_wrap.pairs import Pairs
from inmerge_wrap.stores import Store

__all__ = ["NAME", "batches", "blocks", "change_", "cosines", "makes", "takes"]

NAME = "torch"

# Size of a block of pairs, such that its rows are still in the cache when they are used again:
# about the L2 cache of a CPU core, or of a small GPU.
_CPU_BLOCK_BYTES = 2**20
_GPU_BLOCK_BYTES = 2**22


def takes(store: Store) -> bool:
    """Returns True: this engine reads and writes every store."""
    return True


def makes(change: Change) -> bool:
    """Returns True: this engine computes every change."""
    return True


def batches(stores: Sequence[Store]) -> list[list[int]]:
    """Returns one layer per group, so that only one sharded layer is ever gathered at a time."""
    return [[place] for place in range(len(stores))]


def cosines(stores: Sequence[Store], pairs: Pairs, centred: Sequence[bool]) -> Tensor:
    """Returns the cosine of each pair; see :func:`inmerge_wrap.merging.pair_cosines`.

    Args:
        stores: Opened store of each layer.
        pairs: Drawn pairs, on the device of the stores.
        centred: For each layer, whether its kernels are compared without their mean.

    Returns:
        Shape (pairs,), float32 or wider.
    """
    products, norms = [], []
    for store, part, mean in zip(stores, pairs.split(), centred, strict=True):
        for _, kernels, partners in blocks(store, part, centred=mean):
            norms.append(torch.linalg.vector_norm(kernels, dim=1))
            norms[-1] *= torch.linalg.vector_norm(partners, dim=1)
            products.append(kernels.mul_(partners).sum(dim=1))
    return cosines_of(torch.cat(products), torch.cat(norms))


def change_(stores: Sequence[Store], pairs: Pairs, changed: Tensor | None, change: Change) -> None:
    """Writes the new kernels of the changed pairs; all are read before any is written (eq. 3).

    Args:
        stores: Opened store of each layer.
        pairs: Drawn pairs, on the device of the stores.
        changed: Boolean mask, shape (pairs,); None changes all.
        change: The change of the kernels, for all pairs.
    """
    begin = 0
    for store, part in zip(stores, pairs.split(), strict=True):
        here = slice(begin, begin := begin + len(part))
        _change_one_(store, part, None if changed is None else changed[here], change.at(here))


def _change_one_(store: Store, pairs: Pairs, changed: Tensor | None, change: Change) -> None:
    if not len(pairs):
        return
    new = []
    for here, kernels, partners in blocks(store, pairs):
        mask = None if changed is None else changed[here]
        rows = change.at(here).rows(kernels, partners, mask)
        new.append((pairs.targets[here], rows, mask))
    for block in new:
        store.write_(*block)


def blocks(
    store: Store, pairs: Pairs, *, centred: bool = False
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Splits the pairs of one layer into blocks that fit the cache; at least one block.

    Yields:
        The index of the pairs, their kernels and their partners; new tensors, (pairs, fan_in).
    """
    weight = store.weight
    cache = _CPU_BLOCK_BYTES if weight.device.type == "cpu" else _GPU_BLOCK_BYTES
    fan_in = weight.numel() // max(1, store.shape[0])
    row_bytes = max(1, fan_in * max(4, weight.element_size()))
    length = max(1, cache // (2 * row_bytes))
    for start in range(0, max(1, len(pairs)), length):
        here = slice(start, start + length)
        kernels, partners = store.read(pairs.targets[here]), store.read(pairs.sources[here])
        if centred:
            kernels, partners = centre(kernels), centre(partners)
        yield here, kernels, partners
