"""Drawing, comparing and blending the kernels of many layers in one call each, on a CPU.

PyTorch copies the drawn kernels out of a weight before it multiplies them, and each of its calls
takes longer than the arithmetic of a small layer. ``native.cpp`` reads the weights where they lie.
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

__all__ = ["blend_", "compare", "draw_layers", "is_dense", "library", "takes"]

_DTYPES = {
    torch.float32: ("float32", torch.float32),
    torch.float64: ("float64", torch.float64),
    torch.bfloat16: ("bfloat16", torch.float32),
}


@cache
def library() -> ctypes.CDLL:
    """Compiles ``native.cpp`` and loads it.

    The compiler is that of the environment variable ``CXX``, else ``c++``; it must take the
    options of GCC.

    Raises:
        RuntimeError: If there is none, or what it made can not be loaded.
    """
    source = Path(__file__).with_name("native.cpp")
    # Apple's compiler has no OpenMP; without it one thread does the work.
    parallel = [] if sys.platform == "darwin" else ["-fopenmp"]
    here = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    options = ["-std=c++17", "-O3", here, "-fPIC", "-shared", *parallel]
    with TemporaryDirectory(prefix="inmerge-", ignore_cleanup_errors=True) as folder:
        target = Path(folder, "native.so")
        try:
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
            raise RuntimeError(
                "compiled=True does not work on the CPU: it needs a C++ compiler (c++, or that of "
                "the environment variable CXX) with the options of g++ and clang++, and a folder "
                "for temporary files (TMPDIR) from which libraries may be loaded; install it, or "
                "leave compiled=False, which computes the same "
                f"({getattr(error, 'stderr', None) or error})"
            ) from error


def is_dense(weight: Tensor) -> bool:
    """Whether a weight is a matrix of kernels in memory, whatever the order of their entries."""
    return weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)


def takes(weight: Tensor) -> bool:
    """Whether the kernels of a weight can be read where they lie, on a CPU."""
    # Subclasses (shards, quantised and fake tensors) may have no memory of their own.
    plain = type(weight) is Tensor and weight.layout is torch.strided
    return plain and weight.device.type == "cpu" and weight.dtype in _DTYPES and is_dense(weight)


def draw_layers(
    num_kernels: Sequence[int],
    group_sizes: Sequence[int],
    probability: float,
    seeds: Sequence[int],
) -> tuple[Tensor, list[int]]:
    """The same draws as of :func:`inmerge_wrap.merging.draw_layers`."""
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


def compare(
    weights: Sequence[Tensor],
    pairs: Sequence[int],
    targets: Tensor,
    sources: Tensor,
    centred: Sequence[bool],
) -> Tensor:
    """Cosine of each drawn pair of several layers, as of :func:`inmerge_wrap.merging.pair_cosines`.

    Args:
        weights: Of one dtype, each of shape (C_out, C_in / groups, kH, kW); see :func:`takes`.
        pairs: How many pairs each layer has.
        targets: int64, layer after layer, shape (sum(pairs),).
        sources: Likewise.
        centred: Of each layer, whether to compare the kernels without their mean.

    Returns:
        Shape (sum(pairs),), float32 or wider.
    """
    name, wide = _DTYPES[weights[0].dtype]
    targets, sources = targets.contiguous(), sources.contiguous()
    cosines = torch.empty(len(targets), dtype=wide, device="cpu")
    layers = _table(weights, pairs, centred)
    arguments = map(_address, (layers, targets, sources, cosines))
    getattr(library(), f"compare_{name}")(*arguments, ctypes.c_int64(len(weights)), _threads())
    return cosines


def blend_(
    weights: Sequence[Tensor],
    pairs: Sequence[int],
    targets: Tensor,
    sources: Tensor,
    changed: Tensor,
    merge_weight: float,
) -> None:
    """Blends kernels of several layers in place; all are read before they are written (eq. 3).

    Args:
        weights: As of :func:`compare`, as are ``pairs``, ``targets`` and ``sources``.
        pairs: Of each layer.
        targets: Without repetition in a layer.
        sources: Their partners.
        changed: Boolean mask of the pairs to blend, shape (sum(pairs),).
        merge_weight: alpha, the share of a kernel that stays.
    """
    name, _ = _DTYPES[weights[0].dtype]
    targets, sources, changed = (part.contiguous() for part in (targets, sources, changed))
    layers, alpha = _table(weights, pairs), ctypes.c_double(merge_weight)
    arguments = map(_address, (layers, targets, sources, changed))
    written = (ctypes.c_bool * len(weights))()
    number = ctypes.c_int64(len(weights))
    getattr(library(), f"blend_{name}")(*arguments, number, alpha, written, _threads())
    # As PyTorch does where it writes, so that a backward pass over the old weights is refused.
    torch.autograd.graph.increment_version(
        [weight for weight, was in zip(weights, written, strict=True) if was]
    )


def _table(
    weights: Sequence[Tensor], pairs: Sequence[int], centred: Sequence[bool] | None = None
) -> Tensor:
    """An array of ``struct Layer``, see ``native.cpp``."""
    ends = list(accumulate(pairs, initial=0))
    rows = [weight.data_ptr() for weight in weights]
    fan_ins = [weight.numel() // len(weight) for weight in weights]
    means = centred or [False] * len(weights)
    columns = zip(rows, fan_ins, ends[:-1], ends[1:], means, strict=True)
    return torch.tensor(list(columns), dtype=torch.int64, device="cpu")


def _address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _threads() -> ctypes.c_int:
    return ctypes.c_int(torch.get_num_threads())
