"""Where a convolution keeps its kernels, and how they are read and written.

A convolution's ``weight`` is not always the tensor that training changes. Weight normalisation,
spectral normalisation and pruning compute it from other tensors before each forward pass, and a
write to ``weight`` is then lost without an error. A *store* refers to the tensors behind the
weight, so that the compared and blended kernels are those that the forward pass uses, and writes
persist. A store of FSDP2 shards is gathered when it is opened and scattered when it is closed. A
*layout* defines where in these tensors a kernel is: along the first dimension, or, for a transposed
convolution, along the second.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrizations, parametrize

from inmerge_wrap.plan import ConvSite

_NOTHING = torch.empty(0)


@dataclass(frozen=True)
class Layout:
    """Where the kernels of a convolution are in a tensor: kernel ``i`` is ``tensor[i]``."""

    def shape(self, tensor: Tensor) -> tuple[int, ...]:
        """Returns the shape of the bank of kernels, (C_out, C_in / groups, *kernel size)."""
        return tensor.shape

    def select(self, tensor: Tensor, index: Tensor) -> Tensor:
        """Returns a copy of some kernels, shape (len(index), C_in / groups, *kernel size)."""
        return tensor.index_select(0, index)

    def put_(self, tensor: Tensor, index: Tensor, kernels: Tensor) -> None:
        """Writes kernels of the shape and dtype that :meth:`select` returns."""
        tensor.index_copy_(0, index, kernels)

    def rows(self, tensor: Tensor, index: Tensor) -> Tensor:
        """Returns a copy of some kernels, shape (len(index), fan_in), float32 or wider."""
        rows = self.select(tensor, index).flatten(1)
        return rows.to(torch.promote_types(rows.dtype, torch.float32))

    def put_rows_(self, tensor: Tensor, index: Tensor, rows: Tensor) -> None:
        """Writes rows, shape (len(index), fan_in), in the dtype of the tensor."""
        self.put_(tensor, index, rows.to(tensor.dtype).unflatten(1, self.shape(tensor)[1:]))


@dataclass(frozen=True)
class Transposed(Layout):
    """The layout of a transposed convolution, whose weight is (C_in, C_out / groups, *kernel size).

    Kernel ``o`` of group ``g`` is ``tensor[g * C_in / groups : (g + 1) * C_in / groups, o]``: the
    weights of output channel ``g * C_out / groups + o`` for its input channels.
    """

    groups: int = 1

    def shape(self, tensor: Tensor) -> tuple[int, ...]:
        if tensor.ndim < 2:  # flattened by FSDP1 or DeepSpeed: no bank of kernels at all
            return tensor.shape
        inputs, outputs, *size = tensor.shape
        return outputs * self.groups, inputs // self.groups, *size

    def select(self, tensor: Tensor, index: Tensor) -> Tensor:
        return self._by_group(tensor)[self._places(tensor, index)]

    def put_(self, tensor: Tensor, index: Tensor, kernels: Tensor) -> None:
        self._by_group(tensor)[self._places(tensor, index)] = kernels

    def _by_group(self, tensor: Tensor) -> Tensor:
        """Returns a view of shape (groups, C_out / groups, C_in / groups, *kernel size)."""
        return tensor.unflatten(0, (self.groups, -1)).transpose(1, 2)

    def _places(self, tensor: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        in_group = tensor.shape[1]
        return index // in_group, index % in_group


_ROWS = Layout()


@dataclass(frozen=True)
class Store:
    """The tensors that hold the kernels of one convolution.

    Attributes:
        weight: The stored kernels, detached, in the shape that the convolution uses.
        parameters: The parameters that an optimizer must train for merging to act.
        layout: Where the kernels are in the weight, and in all tensors of its shape.
        reason: Why the kernels cannot be written; None where they can.
    """

    weight: Tensor = _NOTHING
    parameters: tuple[nn.Parameter, ...] = ()
    layout: Layout = _ROWS
    reason: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the bank of kernels, (C_out, C_in / groups, *kernel size)."""
        return self.layout.shape(self.weight)

    @contextmanager
    def opened(self) -> Iterator[Store]:
        """Yields a store whose kernels are all local, for reading and writing."""
        yield self

    def read(self, index: Tensor) -> Tensor:
        """Reads the kernels that the forward pass uses, (len(index), fan_in), float32 or wider.

        Args:
            index: Which kernels, int64.

        Raises:
            RuntimeError: If only an opened store can read them; likewise :meth:`write_`.
        """
        raise self._closed()

    def write_(self, index: Tensor, rows: Tensor, changed: Tensor | None) -> None:
        """Stores ``rows``, shape (len(index), fan_in), where ``changed``, shape (len(index),).

        None stores all. The other rows must be those that :meth:`read` returned; they do not
        change, bit for bit.
        """
        raise self._closed()

    def _closed(self) -> RuntimeError:
        kind = type(self).__name__
        return RuntimeError(
            f"{kind} kernels are not in local memory: read and write them in the store that "
            "opened() yields, as in `with store.opened() as local:`"
        )


@dataclass(frozen=True)
class Plain(Store):
    """Kernels that are parts of one tensor: an ordinary weight, or an optimizer's moment.

    Spectral normalisation divides all kernels by one number, which changes neither cosines nor
    blends, so the stored kernels represent those in use.
    """

    def read(self, index: Tensor) -> Tensor:
        return self.layout.rows(self.weight, index)

    def write_(self, index: Tensor, rows: Tensor, changed: Tensor | None) -> None:
        self.layout.put_rows_(self.weight, index, rows)


@dataclass(frozen=True)
class WeightNormed(Store):
    """Weight normalisation: a direction, the ``weight`` here, and the norm of each kernel.

    Attributes:
        magnitude: Norm of each kernel, shape (C_out, 1, ...); (1, C_out, 1, ...) of a transposed
            convolution.
    """

    magnitude: Tensor = _NOTHING

    def read(self, index: Tensor) -> Tensor:
        rows = self.layout.rows(self.weight, index)
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        return rows * (self.layout.rows(self.magnitude, index) / norms)

    def write_(self, index: Tensor, rows: Tensor, changed: Tensor | None) -> None:
        if changed is None:
            changed = torch.ones_like(index, dtype=torch.bool)
        changed = changed.unsqueeze(1)
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        kept = self.layout.rows(self.magnitude, index)
        self.layout.put_rows_(self.magnitude, index, torch.where(changed, norms, kept))
        stored = self.layout.rows(self.weight, index)
        self.layout.put_rows_(self.weight, index, torch.where(changed, rows, stored))


@dataclass(frozen=True)
class Pruned(Store):
    """Pruning: a pruned entry keeps its stored value, so that it stays pruned.

    Attributes:
        mask: Of the weight's shape, one where the entry is in use.
    """

    mask: Tensor = _NOTHING

    def read(self, index: Tensor) -> Tensor:
        return self.layout.rows(self.weight, index) * self.layout.rows(self.mask, index)

    def write_(self, index: Tensor, rows: Tensor, changed: Tensor | None) -> None:
        writable = self.layout.rows(self.mask, index) != 0
        if changed is not None:
            writable = writable & changed.unsqueeze(1)
        stored = self.layout.rows(self.weight, index)
        self.layout.put_rows_(self.weight, index, torch.where(writable, rows, stored))


@dataclass(frozen=True)
class Sharded(Store):
    """Kernels that FSDP2 holds in shards: an ordinary weight, or an optimizer's moment."""

    @contextmanager
    def opened(self) -> Iterator[Store]:
        """Gathers the whole weight on every rank; each keeps its own slice of the result.

        A collective: all ranks must call it.
        """
        from torch.distributed.tensor import DTensor, distribute_tensor

        sharded = cast(DTensor, self.weight)
        whole = sharded.full_tensor()
        yield Plain(whole, self.parameters, self.layout)
        mine = distribute_tensor(whole, sharded.device_mesh, sharded.placements, src_data_rank=None)
        sharded.copy_(mine)


@dataclass(frozen=True)
class Unreachable(Store):
    """Kernels that cannot be written, for a reason that plans and messages show."""

    @contextmanager
    def opened(self) -> Iterator[Store]:
        """Raises a RuntimeError with the reason."""
        raise RuntimeError(
            f"the kernels of this convolution cannot be written: {self.reason}. If a library "
            "replaced the weights after wrapping (FSDP1, DeepSpeed, Megatron, reparameterisation), "
            "train with DDP or FSDP2 (fully_shard) instead, or wrap the network again"
        )
        yield self


def is_sharded(tensor: Tensor) -> bool:
    """Returns whether FSDP2 holds a tensor in shards."""
    return hasattr(tensor, "full_tensor")


def tensor_store(tensor: Tensor, layout: Layout = _ROWS) -> Store:
    """Returns the store of kernels that are parts of a weight, or of a tensor in its shape."""
    kind = Sharded if is_sharded(tensor) else Plain
    return kind(tensor.detach(), (tensor,) if isinstance(tensor, nn.Parameter) else (), layout)


def layout_of(conv: nn.Module) -> Layout:
    """Returns where a convolution has its kernels in its weight."""
    return Transposed(cast(int, conv.groups)) if getattr(conv, "transposed", False) else _ROWS


def store_of(conv: nn.Module) -> Store:
    """Returns the store of a convolution's kernels; :class:`Unreachable` if it has none."""
    own = conv._parameters
    layout = layout_of(conv)
    plain = own.get("weight")
    if plain is not None:  # first, because it is by far the most common and checked in every step
        if isinstance(plain, nn.parameter.UninitializedParameter):
            reason = "lazy: its weight has no shape before the first forward pass"
            return Unreachable(plain, (plain,), reason=reason)
        return tensor_store(plain, layout)
    if parametrize.is_parametrized(conv, "weight"):
        return _parametrized(cast(nn.ModuleDict, conv.parametrizations)["weight"], layout)
    direction, magnitude = own.get("weight_v"), own.get("weight_g")
    if direction is not None and magnitude is not None:
        return _weight_normed(direction, magnitude, layout)
    original, mask = own.get("weight_orig"), conv._buffers.get("weight_mask")
    if original is not None and mask is not None:
        return _unless_sharded(Pruned(original.detach(), (original,), layout, mask=mask))
    if original is not None and conv._buffers.get("weight_u") is not None:
        return tensor_store(original, layout)  # spectral_norm
    return Unreachable(reason="a weight that is not a parameter of the convolution")


def _weight_normed(direction: nn.Parameter, magnitude: nn.Parameter, layout: Layout) -> Store:
    kernels, *others = layout.shape(direction)
    # Not of a transposed convolution in groups, where each magnitude is of a kernel in every group.
    if layout.shape(magnitude) != (kernels, *[1] * len(others)):
        reason = "weight_norm that is not over each kernel"
        hint = "; of a transposed convolution without groups, dim=1 is"
        return Unreachable(reason=reason + hint if isinstance(layout, Transposed) else reason)
    stored, norms = direction.detach(), magnitude.detach()
    parameters = (direction, magnitude)
    return _unless_sharded(WeightNormed(stored, parameters, layout, magnitude=norms))


def _unless_sharded(store: Store) -> Store:
    if not is_sharded(store.weight):
        return store
    reason = "a computed weight that FSDP2 has sharded"
    return Unreachable(store.weight, store.parameters, store.layout, reason)


def _parametrized(chain: nn.Module, layout: Layout) -> Store:
    """Returns the store behind ``torch.nn.utils.parametrizations``."""
    first, *others = cast(nn.ModuleList, chain)
    stored = chain._parameters
    if not others and isinstance(first, parametrizations._WeightNorm):
        magnitude, direction = stored["original0"], stored["original1"]
        assert magnitude is not None and direction is not None
        return _weight_normed(direction, magnitude, layout)
    if not others and isinstance(first, parametrizations._SpectralNorm):
        original = stored["original"]
        assert original is not None
        return tensor_store(original, layout)
    return Unreachable(reason=f"a weight computed by the parametrization {type(first).__name__}")


# -- the merged layers of a network ----------------------------------------------------------------


@dataclass(frozen=True)
class MergedLayer:
    """One merged convolution as a step finds it.

    Attributes:
        number: Its position in the plan.
        site: Its entry in the plan.
        module: The convolution.
        store: Where its kernels are.
    """

    number: int
    site: ConvSite
    module: nn.Module
    store: Store

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The parameters that an optimizer must train for merging to act."""
        return self.store.parameters


def find_layers(network: nn.Module, sites: Sequence[ConvSite]) -> list[MergedLayer]:
    """Returns the layers of a plan as they are now; weights can be moved, sharded or frozen."""
    return [
        MergedLayer(number, site, module, store_of(module))
        for number, (site, module) in enumerate(zip(sites, modules_of(network, sites), strict=True))
    ]


def modules_of(network: nn.Module, sites: Sequence[ConvSite]) -> list[nn.Module]:
    """Returns the modules that are now at the names of some convolutions."""
    found = []
    for site in sites:
        module: Any = network
        for part in filter(None, site.name.split(".")):
            module = module._modules[part]  # a fifth of the time that get_submodule takes
        found.append(module)
    return found


def rows_of(conv: nn.Module, weight: Any) -> Tensor:
    """Returns the kernels that a weight of a convolution holds, detached.

    Shape (C_out, fan_in), float32 or wider.
    """
    layout, stored = layout_of(conv), weight.detach()
    everyone = torch.arange(layout.shape(stored)[0], device=stored.device)
    return layout.rows(stored, everyone)


def deciding_parameter(conv: nn.Module) -> nn.Parameter:
    """Returns the weight of a convolution, or the first parameter of what computes it.

    Whether it is trained, and by which optimizer, decides for the layer.
    """
    weight = conv._parameters.get("weight")
    if weight is None:
        return next(p for name, p in conv.named_parameters() if name != "bias")
    return weight


def check_layers(layers: Sequence[MergedLayer]) -> None:
    """Checks that the weights of some layers can be merged where they are now.

    Raises:
        RuntimeError: If kernels have another shape than in the plan, or are on an XLA device.
    """
    for layer in layers:
        if layer.store.parameters and layer.store.shape != layer.site.shape:
            raise RuntimeError(
                f"the kernels of {layer.site.name} have the shape {tuple(layer.store.shape)} "
                f"instead of {layer.site.shape}. A layer that was replaced needs a new wrapper; "
                "FSDP1 and DeepSpeed ZeRO-3 flatten the weights, so that no kernel can be found "
                "in them: use FSDP2 (fully_shard, or fsdp_version: 2 in Accelerate) or DDP"
            )
        if layer.store.weight.device.type == "xla":
            raise RuntimeError(
                "on XLA devices parameters are swapped without torch noticing, so that what is "
                "merged is lost; train on CUDA or CPU, or merge in the forward pass "
                "(mode='outputs')"
            )


def check_sites(network: nn.Module, sites: Sequence[ConvSite]) -> None:
    """Checks that a plan belongs to this network.

    Raises:
        ValueError: If it does not, or merges nothing.
    """
    if not sites:
        raise ValueError("the plan merges no convolution")
    modules = dict(network.named_modules())
    for site in sites:
        conv = modules.get(site.name)
        if not isinstance(conv, _ConvNd) or kernel_shape(conv) != site.shape:
            raise ValueError(
                f"the plan belongs to another network: this one has no convolution {site.name!r} "
                f"with kernels of shape {site.shape}; make a plan with plan_merging(network)"
            )


def kernel_shape(conv: _ConvNd) -> tuple[int, ...]:
    """Returns (C_out, C_in / groups, *kernel size) from the weight, or else as declared.

    Empty for a lazy layer, whose weight has no shape yet.
    """
    if isinstance(conv._parameters.get("weight"), nn.parameter.UninitializedParameter):
        return ()
    store = store_of(conv)
    if store.reason is None:
        return tuple(store.shape)
    return conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size


def stream_of(site: ConvSite) -> int:
    """Returns a layer's random stream, which does not depend on which layers are merged."""
    # The depth, not the position in the plan; the name for a convolution that never ran.
    return site.depth if site.depth is not None else 2**32 + crc32(site.name.encode())
