"""The native engine: C++ that draws, compares and blends all layers in one call each, on a CPU.

PyTorch copies the drawn kernels out of a weight before it multiplies them, and each of its calls
takes longer than the arithmetic of a small layer. ``native.cpp`` reads the weights where they are.
It is compiled when it is first needed, for the processor at hand, and kept for this process only:
a file in a home directory might be loaded on another kind of processor.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from inmerge_wrap import merging
from inmerge_wrap.changes import Blend, Change
from inmerge_wrap.pairs import Pairs
from inmerge_wrap.stores import Store, is_dense

__all__ = ["NAME", "batches", "change_", "cosines", "draw_layers", "makes", "problem", "takes"]

NAME = "native"

_DTYPES = {
    torch.float32: ("float32", torch.float32),
    torch.float64: ("float64", torch.float64),
    torch.bfloat16: ("bfloat16", torch.float32),
}


def problem() -> str | None:
    """Why native code cannot be used in this process; None where it can."""
    made = _library()
    return made if isinstance(made, str) else None


def library() -> ctypes.CDLL:
    """The compiled ``native.cpp``.

    Raises:
        RuntimeError: If there is none, see :func:`problem`.
    """
    made = _library()
    if isinstance(made, str):
        raise RuntimeError(made)
    return made


@cache
def _library() -> ctypes.CDLL | str:
    """Compiles ``native.cpp`` and loads it; or says why that failed.

    The compiler is that of the environment variable ``CXX``, else ``c++``; it must take the
    options of GCC.
    """
    source = Path(__file__).with_name("native.cpp")
    # Apple's compiler has no OpenMP; without it one thread does the work.
    parallel = [] if sys.platform == "darwin" else ["-fopenmp"]
    here = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    options = ["-std=c++17", "-O3", here, "-fPIC", "-shared", *parallel]
    try:
        with TemporaryDirectory(prefix="inmerge-", ignore_cleanup_errors=True) as folder:
            target = Path(folder, "native.so")
            compiler = shlex.split(os.environ.get("CXX") or "c++")
            subprocess.run(
                [*compiler, *options, str(source), "-o", str(target)],
                check=True,
                capture_output=True,
                text=True,
                errors="replace",
            )
            return ctypes.CDLL(str(target))
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        return (
            "native code needs a C++ compiler (c++, or that of the environment variable CXX) with "
            "the options of g++ and clang++, and a folder for temporary files (TMPDIR) from which "
            "libraries may be loaded; install it, or leave engine='auto', which computes the same "
            f"without ({getattr(error, 'stderr', None) or error})"
        )


def takes(store: Store) -> bool:
    """Whether the kernels of a store can be read where they are, on a CPU."""
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
    """Whether native code computes a kind of change: the paper's blend alone."""
    return (
        isinstance(change, Blend)
        and isinstance(change.merge_weight, float | int)
        and (change.scale is None)
    )


def batches(stores: Sequence[Store]) -> list[list[int]]:
    """All layers of one dtype together, but for those that share memory."""
    found: dict[torch.dtype, list[int]] = {}
    alone, end = [], 0
    for place in sorted(range(len(stores)), key=lambda n: stores[n].weight.data_ptr()):
        weight = stores[place].weight
        if weight.data_ptr() < end:
            alone.append([place])
            continue
        end = weight.data_ptr() + weight.nbytes
        found.setdefault(weight.dtype, []).append(place)
    return [sorted(places) for places in found.values()] + alone


def draw_layers(
    num_kernels: Sequence[int],
    group_sizes: Sequence[int],
    probability: float,
    seeds: Sequence[int],
) -> tuple[Tensor, list[int]]:
    """The same draws as those of :func:`inmerge_wrap.merging.draw_layers`."""
    if not _draws_like_torch():
        return merging.draw_layers(num_kernels, group_sizes, probability, seeds)
    return _draw([num_kernels, group_sizes, seeds], probability)


@cache
def _draws_like_torch() -> bool:
    """Whether PyTorch's generator is still the one that ``native.cpp`` follows."""
    kernels, sizes, seeds = [64, 640], [32, 640], [1, 2**32 - 1]
    ours, _ = _draw([kernels, sizes, seeds], 0.5)
    return torch.equal(ours, merging.draw_layers(kernels, sizes, 0.5, seeds)[0])


def _draw(columns: Sequence[Sequence[int]], probability: float) -> tuple[Tensor, list[int]]:
    array = ctypes.c_int64 * len(columns[0])
    lengths = array()
    pairs = torch.empty(3, sum(columns[0]), dtype=torch.int64, device="cpu")
    library().draw_layers(
        *(array(*column) for column in columns),
        ctypes.c_int64(len(lengths)),
        ctypes.c_float(probability),
        _address(pairs),
        ctypes.c_int64(pairs.shape[1]),
        lengths,
    )
    numbers = list(lengths)
    return pairs[:, : sum(numbers)], numbers


def cosines(stores: Sequence[Store], pairs: Pairs, centred: Sequence[bool]) -> Tensor:
    """Cosine of each pair, see :func:`inmerge_wrap.merging.pair_cosines`.

    Args:
        stores: Of one dtype, without common memory; see :func:`batches`.
        pairs: On the CPU.
        centred: Of each layer, whether its kernels are compared without their mean.

    Returns:
        Shape (pairs,), float32 or wider.
    """
    name, wide = _DTYPES[stores[0].weight.dtype]
    targets, sources = pairs.targets.contiguous(), pairs.sources.contiguous()
    found = torch.empty(len(targets), dtype=wide, device="cpu")
    layers = _table(stores, pairs.lengths, centred)
    arguments = map(_address, (layers, targets, sources, found))
    getattr(library(), f"compare_{name}")(*arguments, ctypes.c_int64(len(stores)), _threads())
    return found


def change_(stores: Sequence[Store], pairs: Pairs, changed: Tensor | None, change: Change) -> None:
    """Blends kernels in place; all are read before they are written (eq. 3).

    Args:
        stores: See :func:`cosines`, as for ``pairs``.
        pairs: Without repetition of a target in a layer.
        changed: Boolean mask of the pairs to blend, shape (pairs,); None for all.
        change: See :func:`makes`.
    """
    assert isinstance(change, Blend) and not isinstance(change.merge_weight, Tensor)
    name, _ = _DTYPES[stores[0].weight.dtype]
    if changed is None:
        changed = torch.ones(len(pairs), dtype=torch.bool, device="cpu")
    targets, sources = pairs.targets.contiguous(), pairs.sources.contiguous()
    changed = changed.contiguous()
    layers, alpha = _table(stores, pairs.lengths), ctypes.c_double(change.merge_weight)
    arguments = map(_address, (layers, targets, sources, changed))
    written = (ctypes.c_bool * len(stores))()
    number = ctypes.c_int64(len(stores))
    getattr(library(), f"blend_{name}")(*arguments, number, alpha, written, _threads())
    # As PyTorch does where it writes, so that a backward pass over the old weights is refused.
    torch.autograd.graph.increment_version(
        [store.weight for store, was in zip(stores, written, strict=True) if was]
    )


def _table(
    stores: Sequence[Store], lengths: Sequence[int], centred: Sequence[bool] | None = None
) -> Tensor:
    """An array of ``struct Layer``, see ``native.cpp``."""
    ends = list(accumulate(lengths, initial=0))
    rows = [store.weight.data_ptr() for store in stores]
    fan_ins = [store.weight.numel() // len(store.weight) for store in stores]
    means = centred or [False] * len(stores)
    columns = zip(rows, fan_ins, ends[:-1], ends[1:], means, strict=True)
    return torch.tensor(list(columns), dtype=torch.int64, device="cpu")


def _address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _threads() -> ctypes.c_int:
    return ctypes.c_int(torch.get_num_threads())
