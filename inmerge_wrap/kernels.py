"""Where a convolution keeps its kernels, and how to read and write them.

A convolution's ``weight`` is not always the tensor that training changes. Weight normalisation,
spectral normalisation and pruning compute it from other tensors before each forward pass, and a
write to ``weight`` is then lost without an error. :func:`open_kernels` finds the tensors behind the
weight, so that what is compared and blended is what the forward pass uses, and what is written
stays written. Shards of FSDP2 are gathered and scattered again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from inmerge_wrap import native
from inmerge_wrap.merging import (
    blend_kernels,
    centre,
    cosines_of,
    gather_kernels,
    norm_scale,
    pair_cosines,
    scatter_kernels_,
)

__all__ = [
    "Blend",
    "Kernels",
    "all_native",
    "check_compiler",
    "gathered",
    "is_sharded",
    "kernel_parameters",
    "open_kernels",
    "stored_kernels",
    "unmergeable_reason",
]

_Stored = tuple[Tensor, Tensor | None, Tensor | None]  # weight, magnitude, mask

# What a block of pairs may take, so that its rows are still in the cache when they are used again:
# about the L2 cache of a CPU core, or of a small GPU.
_CPU_BLOCK_BYTES = 2**20
_GPU_BLOCK_BYTES = 2**22


@dataclass(frozen=True)
class Blend:
    """What one pass does to the kernels of a layer: a map of rows, for any tensor of its rows.

    Attributes:
        targets: Kernels to blend, int64, shape (pairs,), without repetition.
        sources: Their partners, int64, shape (pairs,).
        changed: Boolean mask, shape (pairs,): the others stay as they are. None changes all.
        merge_weight: alpha, the share of a kernel that stays.
        scale: Factor of each blend, shape (pairs, 1), if norms are kept.
    """

    targets: Tensor
    sources: Tensor
    changed: Tensor | None
    merge_weight: float
    scale: Tensor | None = None

    def known(self) -> Blend:
        """The same without the pairs that stay as they are, where one need not wait to know them.

        On a CPU those cost nothing then; elsewhere the mask decides on the device. A scale is made
        for the pairs that are left.
        """
        if self.changed is None or self.changed.device.type != "cpu":
            return self
        kept = self.changed.nonzero().flatten()
        return replace(self, targets=self.targets[kept], sources=self.sources[kept], changed=None)


@dataclass(frozen=True)
class Kernels:
    """The tensors that hold the kernels of one convolution.

    Attributes:
        weight: The stored kernels, shape (C_out, C_in / groups, kH, kW).
        magnitude: Norm of each kernel under weight normalisation, shape (C_out, 1, 1, 1).
        mask: Pruning mask, of the weight's shape, one where the entry is kept.
        compiled: Fuse the reading with the arithmetic of plain, dense weights: on a CPU in native
            code, elsewhere by torch.compile. A computed weight is read without it, and so are
            norms to keep.
    """

    weight: Tensor
    magnitude: Tensor | None = None
    mask: Tensor | None = None
    compiled: bool = False

    def read(self, index: Tensor, *, centred: bool = False) -> Tensor:
        """The kernels that the forward pass uses, shape (len(index), fan_in), float32 or wider.

        Spectral normalisation divides all kernels by one number, which no cosine and no blend
        can see, so the stored kernels stand for them.

        Args:
            index: Which kernels, int64.
            centred: Without their mean; see :func:`centre`.
        """
        rows = gather_kernels(self.weight, index)
        if self.magnitude is not None:
            norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
            rows = rows * (gather_kernels(self.magnitude, index) / norms)
        if self.mask is not None:
            rows = rows * gather_kernels(self.mask, index)
        return centre(rows) if centred else rows

    def cosines(self, targets: Tensor, sources: Tensor, *, centred: bool = False) -> Tensor:
        """Cosine of each target with its source, shape (pairs,); as of :func:`pair_cosines`.

        Args:
            targets: int64, shape (pairs,).
            sources: int64, shape (pairs,).
            centred: Compare the kernels without their mean; see :func:`centre`.
        """
        if self.is_native:
            return native.compare([self.weight], [len(targets)], targets, sources, [centred])
        if self._fuses(targets):
            return _compiled(_compare)(_as_rows(self.weight), targets, sources, centred)
        products, norms = [], []
        for _, kernels, partners in self._in_blocks(targets, sources, centred=centred):
            norms.append(torch.linalg.vector_norm(kernels, dim=1))
            norms[-1] *= torch.linalg.vector_norm(partners, dim=1)
            products.append(kernels.mul_(partners).sum(dim=1))
        return cosines_of(torch.cat(products), torch.cat(norms))

    def keeping_norms(self, blend: Blend) -> Blend:
        """The same blend, scaled so that each kernel keeps its norm."""
        blend = blend.known()
        scales = [
            norm_scale(kernels, partners, blend.merge_weight)
            for _, kernels, partners in self._in_blocks(blend.targets, blend.sources)
        ]
        return replace(blend, scale=torch.cat(scales))

    def blend_(self, blend: Blend) -> None:
        """Blends rows; all are read before any is written (eq. 3)."""
        if self.is_native and blend.scale is None:
            changed = blend.changed
            if changed is None:
                changed = torch.ones_like(blend.targets, dtype=torch.bool)
            ends = blend.targets, blend.sources
            native.blend_([self.weight], [len(changed)], *ends, changed, blend.merge_weight)
            return
        blend = blend.known()
        if not len(blend.targets):
            return
        if self._fuses(blend.targets) and blend.scale is None:
            rows = _as_rows(self.weight)
            alpha = torch.tensor(blend.merge_weight, dtype=torch.float64)
            pairs = (blend.targets, blend.sources, blend.changed)
            rows.index_copy_(0, blend.targets, _compiled(_blend)(rows, *pairs, alpha))
            return
        blended = []
        for here, kernels, partners in self._in_blocks(blend.targets, blend.sources):
            scale = None if blend.scale is None else blend.scale[here]
            changed = None if blend.changed is None else blend.changed[here]
            new = blend_kernels(kernels, partners, changed, blend.merge_weight, scale)
            blended.append((blend.targets[here], new, changed))
        for targets, new, changed in blended:
            self.write_(targets, new, changed)

    @property
    def is_native(self) -> bool:
        """Whether native code reads and writes these kernels."""
        return self.compiled and self._plain and native.takes(self.weight)

    @contextmanager
    def whole(self) -> Iterator[Kernels]:
        """The same with a gathered weight; see :func:`gathered`."""
        if not is_sharded(self.weight):
            yield self
            return
        with gathered(self.weight) as weight:
            yield replace(self, weight=weight)

    @property
    def _plain(self) -> bool:
        return self.magnitude is None and self.mask is None

    def _fuses(self, index: Tensor) -> bool:
        compiled = self.compiled and self._plain and self.weight.device.type != "cpu"
        return compiled and native.is_dense(self.weight) and len(index) > 1

    def _in_blocks(
        self, targets: Tensor, sources: Tensor, *, centred: bool = False
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Some pairs in parts small enough for the cache, one at least.

        Yields:
            Which pairs, their kernels and their partners; fresh tensors, (pairs, fan_in).
        """
        cache = _CPU_BLOCK_BYTES if self.weight.device.type == "cpu" else _GPU_BLOCK_BYTES
        row_bytes = max(1, self.weight[0].numel() * max(4, self.weight.element_size()))
        length = max(1, cache // (2 * row_bytes))
        for start in range(0, max(1, len(targets)), length):
            here = slice(start, start + length)
            kernels = self.read(targets[here], centred=centred)
            yield here, kernels, self.read(sources[here], centred=centred)

    def write_(self, index: Tensor, rows: Tensor, changed: Tensor | None) -> None:
        """Stores ``rows``, shape (len(index), fan_in), where ``changed``, shape (len(index),).

        None stores all. The other rows must be those that :meth:`read` gave; they stay as they
        are, bit for bit. A pruned entry keeps its stored value, so that it stays pruned.
        """
        if self.magnitude is None and self.mask is None:
            scatter_kernels_(self.weight, index, rows)
            return
        if changed is None:
            changed = torch.ones_like(index, dtype=torch.bool)
        changed = changed.unsqueeze(1)
        if self.magnitude is not None:
            norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
            kept = gather_kernels(self.magnitude, index)
            scatter_kernels_(self.magnitude, index, torch.where(changed, norms, kept))
        if self.mask is not None:
            changed = changed & (gather_kernels(self.mask, index) != 0)
        stored = gather_kernels(self.weight, index)
        scatter_kernels_(self.weight, index, torch.where(changed, rows, stored))


def all_native(layers: Sequence[Kernels]) -> bool:
    """Whether one call of native code takes all these layers, which it reads and writes at once."""
    if not all(layer.is_native for layer in layers):
        return False
    spans = sorted((layer.weight.data_ptr(), layer.weight.nbytes) for layer in layers)
    apart = all(start + size <= after for (start, size), (after, _) in pairwise(spans))
    return apart and len({layer.weight.dtype for layer in layers}) == 1


def _as_rows(weight: Tensor) -> Tensor:
    """A view of shape (C_out, fan_in); in channels_last the entries have another order."""
    if not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last):
        weight = weight.permute(0, 2, 3, 1)
    return weight.view(len(weight), -1)


def _compare(rows: Tensor, targets: Tensor, sources: Tensor, centred: bool) -> Tensor:
    kernels, partners = gather_kernels(rows, targets), gather_kernels(rows, sources)
    if centred:
        kernels, partners = centre(kernels), centre(partners)
    return pair_cosines(kernels, partners)


def _blend(
    rows: Tensor, targets: Tensor, sources: Tensor, changed: Tensor | None, alpha: Tensor
) -> Tensor:
    kernels, partners = gather_kernels(rows, targets), gather_kernels(rows, sources)
    # A tensor, for a number would be compiled in, and again for each that a schedule gives.
    alpha = alpha.to(kernels.device, kernels.dtype)
    return blend_kernels(kernels, partners, changed, alpha).to(rows.dtype)


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # Not fullgraph: past its limit of shapes and dtypes torch.compile would raise in mid-training,
    # where it now says so and runs the function as it is.
    return torch.compile(function, dynamic=True)


def check_compiler(device: torch.device) -> None:
    """Compiles what passes call, so that what is missing is told before training begins.

    Raises:
        RuntimeError: If that can not be done.
    """
    if device.type == "meta":  # the network moves to another one later
        return
    if device.type == "cpu":
        native.library()
        return
    rows, index = torch.ones(5, 3, device=device), torch.arange(2, device=device)
    try:
        _compiled(_compare)(rows, index, index, False)
    except RuntimeError as error:
        raise RuntimeError(
            f"compiled=True does not work on {device}: torch.compile needs Triton on a GPU; "
            f"install it, or leave compiled=False, which computes the same ({error})"
        ) from error


def stored_kernels(conv: nn.Conv2d, *, compiled: bool = False) -> Kernels:
    """The kernels of a convolution as they are stored, which may be in shards.

    Args:
        conv: A convolution for which :func:`unmergeable_reason` is None.
        compiled: See :class:`Kernels`.

    Raises:
        RuntimeError: If the kernels can no longer be reached, for instance because FSDP1 or
            DeepSpeed took the weights over after the plan was made.
    """
    stored = _stored_tensors(conv)
    reason = _reason(stored)
    if reason is not None:
        raise RuntimeError(
            f"the kernels of this convolution can not be written: {reason}. If a library replaced "
            "the weights after wrapping (FSDP1, DeepSpeed, Megatron, reparameterisation), train "
            "with DDP or FSDP2 (fully_shard) instead, or wrap the network anew"
        )
    weight, magnitude, mask = cast(_Stored, stored)
    magnitude = None if magnitude is None else magnitude.detach()
    return Kernels(weight.detach(), magnitude, mask, compiled)


@contextmanager
def open_kernels(conv: nn.Conv2d) -> Iterator[Kernels]:
    """Gives the whole kernels of a convolution for reading and writing; see :func:`gathered`."""
    with stored_kernels(conv).whole() as kernels:
        yield kernels


@contextmanager
def gathered(tensor: Tensor) -> Iterator[Tensor]:
    """Gives the whole of a tensor that FSDP2 may have sharded; what is written to it is kept.

    Under FSDP2 every rank gathers the whole (a collective: all ranks must call it), works on the
    copy, and keeps its own slice of the outcome.
    """
    tensor = tensor.detach()
    if not is_sharded(tensor):
        yield tensor
        return
    from torch.distributed.tensor import DTensor, distribute_tensor

    sharded = cast(DTensor, tensor)
    whole = sharded.full_tensor()
    yield whole
    mine = distribute_tensor(whole, sharded.device_mesh, sharded.placements, src_data_rank=None)
    sharded.copy_(mine)


def is_sharded(tensor: Tensor) -> bool:
    """Whether FSDP2 holds a tensor in shards."""
    return hasattr(tensor, "full_tensor")


def unmergeable_reason(conv: nn.Conv2d) -> str | None:
    """Why the kernels of a convolution can not be written, or None where they can."""
    return _reason(_stored_tensors(conv))


def _reason(stored: _Stored | str) -> str | None:
    if isinstance(stored, str):
        return stored
    weight, *others = stored
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "lazy: its weight has no shape before the first forward pass"
    if any(other is not None for other in others) and is_sharded(weight):
        return "a computed weight that FSDP2 has sharded"
    return None


def kernel_parameters(conv: nn.Conv2d) -> list[nn.Parameter]:
    """The parameters that hold the kernels: what an optimizer must train for merging to act."""
    stored = _stored_tensors(conv)
    if isinstance(stored, str):
        return []
    weight, magnitude, _ = stored
    return [tensor for tensor in (weight, magnitude) if isinstance(tensor, nn.Parameter)]


def _stored_tensors(conv: nn.Conv2d) -> _Stored | str:
    """(weight, magnitude, mask) behind ``conv.weight``, or why they are out of reach."""
    own = conv._parameters
    plain = own.get("weight")
    if plain is not None:  # first, for it is nearly always so and asked for in every step
        return plain, None, None
    if parametrize.is_parametrized(conv, "weight"):
        return _parametrized_tensors(cast(nn.ModuleDict, conv.parametrizations)["weight"])
    direction, magnitude = own.get("weight_v"), own.get("weight_g")
    if direction is not None and magnitude is not None:
        if magnitude.shape == (conv.out_channels, 1, 1, 1):
            return direction, magnitude, None
        return "weight_norm that is not over each kernel"
    original, mask = own.get("weight_orig"), conv._buffers.get("weight_mask")
    if original is not None and mask is not None:
        return original, None, mask
    if original is not None and conv._buffers.get("weight_u") is not None:
        return original, None, None  # spectral_norm
    return "a weight that is not a parameter of the convolution"


def _parametrized_tensors(chain: nn.Module) -> _Stored | str:
    """The same for ``torch.nn.utils.parametrizations``."""
    first, *others = cast(nn.ModuleList, chain)
    stored = chain._parameters
    if not others and isinstance(first, parametrizations._WeightNorm):
        magnitude, direction = stored["original0"], stored["original1"]
        assert magnitude is not None and direction is not None
        if first.dim == 0:
            return direction, magnitude, None
        return f"weight_norm over dim {first.dim}, not over each kernel"
    if not others and isinstance(first, parametrizations._SpectralNorm):
        original = stored["original"]
        assert original is not None
        return original, None, None
    return f"a weight computed by the parametrization {type(first).__name__}"
