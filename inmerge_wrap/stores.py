"""Where a convolution keeps its kernels, and how they are read and written.

A convolution's ``weight`` is not always the tensor that training changes. Weight normalisation,
spectral normalisation and pruning compute it from other tensors before each forward pass, and a
write to ``weight`` is then lost without an error. A *store* names the tensors behind the weight,
so that what is compared and blended is what the forward pass uses, and what is written stays
written. Shards of FSDP2 are a store that is gathered when it is opened and scattered when it is
closed. A store holds no arithmetic of merging: that is the business of the engines.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from inmerge_wrap.merging import gather_kernels, scatter_kernels_

__all__ = [
    "Plain",
    "Pruned",
    "Sharded",
    "Store",
    "Unreachable",
    "WeightNormed",
    "is_dense",
    "is_sharded",
    "store_of",
    "tensor_store",
]


_NOTHING = torch.empty(0)


@dataclass(frozen=True)
class Store:
    """The tensors that hold the kernels of one convolution.

    Attributes:
        weight: The stored kernels, shape (C_out, C_in / groups, kH, kW), detached.
        parameters: What an optimizer must train for merging to act.
    """

    weight: Tensor = _NOTHING
    parameters: tuple[nn.Parameter, ...] = ()

    @property
    def reason(self) -> str | None:
        """Why the kernels cannot be written; None where they can."""
        return None

    @property
    def rows_in_memory(self) -> Tensor | None:
        """The weight, if its rows are the kernels as the forward pass uses them, else None."""
        return None

    @contextmanager
    def opened(self) -> Iterator[Store]:
        """Gives a store whose kernels are all here, for reading and writing."""
        yield self

    def read(self, index: Tensor) -> Tensor:
        """The kernels that the forward pass uses, shape (len(index), fan_in), float32 or wider.

        Args:
            index: Which kernels, int64.
        """
        raise NotImplementedError

    def write_(self, index: Tensor, rows: Tensor, changed: Tensor | None) -> None:
        """Stores ``rows``, shape (len(index), fan_in), where ``changed``, shape (len(index),).

        None stores all. The other rows must be those that :meth:`read` gave; they stay as they
        are, bit for bit.
        """
        raise NotImplementedError

    @property
    def written(self) -> tuple[Tensor, ...]:
        """The tensors that :meth:`write_` changes."""
        return (self.weight,)

    def copy_out(self, index: Tensor) -> tuple[Tensor, ...]:
        """A copy of all that :meth:`write_` would change for these kernels."""
        return tuple(tensor.index_select(0, index) for tensor in self.written)

    def copy_back_(self, index: Tensor, kept: tuple[Tensor, ...]) -> None:
        """Puts back, bit for bit, what :meth:`copy_out` gave.

        A weight that was moved or converted since takes the kernels as it was itself.
        """
        for tensor, rows in zip(self.written, kept, strict=True):
            tensor.index_copy_(0, index.to(tensor.device), rows.to(tensor))


@dataclass(frozen=True)
class Plain(Store):
    """Kernels that are the rows of one tensor: an ordinary weight, or an optimizer's moment.

    Spectral normalisation divides all kernels by one number, which no cosine and no blend can see,
    so the stored kernels stand for those in use.
    """

    @property
    def rows_in_memory(self) -> Tensor | None:
        return self.weight

    def read(self, index: Tensor) -> Tensor:
        return gather_kernels(self.weight, index)

    def write_(self, index: Tensor, rows: Tensor, changed: Tensor | None) -> None:
        scatter_kernels_(self.weight, index, rows)


@dataclass(frozen=True)
class WeightNormed(Store):
    """Weight normalisation: a direction, the ``weight`` here, and the norm of each kernel.

    Attributes:
        magnitude: Norm of each kernel, shape (C_out, 1, 1, 1).
    """

    magnitude: Tensor = _NOTHING

    @property
    def written(self) -> tuple[Tensor, ...]:
        return self.weight, self.magnitude

    def read(self, index: Tensor) -> Tensor:
        rows = gather_kernels(self.weight, index)
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        return rows * (gather_kernels(self.magnitude, index) / norms)

    def write_(self, index: Tensor, rows: Tensor, changed: Tensor | None) -> None:
        if changed is None:
            changed = torch.ones_like(index, dtype=torch.bool)
        changed = changed.unsqueeze(1)
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        kept = gather_kernels(self.magnitude, index)
        scatter_kernels_(self.magnitude, index, torch.where(changed, norms, kept))
        stored = gather_kernels(self.weight, index)
        scatter_kernels_(self.weight, index, torch.where(changed, rows, stored))


@dataclass(frozen=True)
class Pruned(Store):
    """Pruning: a pruned entry keeps its stored value, so that it stays pruned.

    Attributes:
        mask: Of the weight's shape, one where the entry is in use.
    """

    mask: Tensor = _NOTHING

    def read(self, index: Tensor) -> Tensor:
        return gather_kernels(self.weight, index) * gather_kernels(self.mask, index)

    def write_(self, index: Tensor, rows: Tensor, changed: Tensor | None) -> None:
        writable = gather_kernels(self.mask, index) != 0
        if changed is not None:
            writable = writable & changed.unsqueeze(1)
        stored = gather_kernels(self.weight, index)
        scatter_kernels_(self.weight, index, torch.where(writable, rows, stored))


@dataclass(frozen=True)
class Sharded(Store):
    """Kernels that FSDP2 holds in shards: an ordinary weight, or an optimizer's moment."""

    @contextmanager
    def opened(self) -> Iterator[Store]:
        """Every rank gathers the whole, works on its copy, and keeps its own slice of the outcome.

        A collective: all ranks must call it.
        """
        from torch.distributed.tensor import DTensor, distribute_tensor

        sharded = cast(DTensor, self.weight)
        whole = sharded.full_tensor()
        yield Plain(whole, self.parameters)
        mine = distribute_tensor(whole, sharded.device_mesh, sharded.placements, src_data_rank=None)
        sharded.copy_(mine)


@dataclass(frozen=True)
class Unreachable(Store):
    """Kernels that cannot be written.

    Attributes:
        why: The reason, for a plan or a message.
    """

    why: str = ""

    @property
    def reason(self) -> str | None:
        return self.why

    @contextmanager
    def opened(self) -> Iterator[Store]:
        """Raises a RuntimeError with the reason."""
        raise RuntimeError(
            f"the kernels of this convolution cannot be written: {self.why}. If a library "
            "replaced the weights after wrapping (FSDP1, DeepSpeed, Megatron, reparameterisation), "
            "train with DDP or FSDP2 (fully_shard) instead, or wrap the network again"
        )
        yield self


def is_sharded(tensor: Tensor) -> bool:
    """Whether FSDP2 holds a tensor in shards."""
    return hasattr(tensor, "full_tensor")


def is_dense(weight: Tensor) -> bool:
    """Whether a weight is a matrix of kernels in memory, whatever the order of their entries."""
    if weight.is_contiguous():
        return True
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return weight.ndim in formats and weight.is_contiguous(memory_format=formats[weight.ndim])


def tensor_store(tensor: Tensor) -> Store:
    """The store of kernels that are the rows of a tensor, which FSDP2 may have sharded."""
    kind = Sharded if is_sharded(tensor) else Plain
    return kind(tensor.detach(), (tensor,) if isinstance(tensor, nn.Parameter) else ())


def store_of(conv: nn.Module) -> Store:
    """The store of a convolution's kernels; an :class:`Unreachable` one where there is none."""
    own = conv._parameters
    plain = own.get("weight")
    if plain is not None:  # first, for it is nearly always so and asked for in every step
        if isinstance(plain, nn.parameter.UninitializedParameter):
            reason = "lazy: its weight has no shape before the first forward pass"
            return Unreachable(plain, (plain,), reason)
        return tensor_store(plain)
    if parametrize.is_parametrized(conv, "weight"):
        return _parametrized(cast(nn.ModuleDict, conv.parametrizations)["weight"])
    direction, magnitude = own.get("weight_v"), own.get("weight_g")
    if direction is not None and magnitude is not None:
        if magnitude.shape == (len(direction), *[1] * (direction.ndim - 1)):
            return _weight_normed(direction, magnitude)
        return Unreachable(why="weight_norm that is not over each kernel")
    original, mask = own.get("weight_orig"), conv._buffers.get("weight_mask")
    if original is not None and mask is not None:
        return _unless_sharded(Pruned(original.detach(), (original,), mask))
    if original is not None and conv._buffers.get("weight_u") is not None:
        return tensor_store(original)  # spectral_norm
    return Unreachable(why="a weight that is not a parameter of the convolution")


def _weight_normed(direction: nn.Parameter, magnitude: nn.Parameter) -> Store:
    parameters = (direction, magnitude)
    return _unless_sharded(WeightNormed(direction.detach(), parameters, magnitude.detach()))


def _unless_sharded(store: Store) -> Store:
    if not is_sharded(store.weight):
        return store
    reason = "a computed weight that FSDP2 has sharded"
    return Unreachable(store.weight, store.parameters, reason)


def _parametrized(chain: nn.Module) -> Store:
    """The store behind ``torch.nn.utils.parametrizations``."""
    first, *others = cast(nn.ModuleList, chain)
    stored = chain._parameters
    if not others and isinstance(first, parametrizations._WeightNorm):
        magnitude, direction = stored["original0"], stored["original1"]
        assert magnitude is not None and direction is not None
        if first.dim == 0:
            return _weight_normed(direction, magnitude)
        return Unreachable(why=f"weight_norm over dim {first.dim}, not over each kernel")
    if not others and isinstance(first, parametrizations._SpectralNorm):
        original = stored["original"]
        assert original is not None
        return tensor_store(original)
    return Unreachable(why=f"a weight computed by the parametrization {type(first).__name__}")
