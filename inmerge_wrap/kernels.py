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
from dataclasses import dataclass, replace
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
    """Where the kernels of a convolution are in a tensor: kernel ``i`` is ``tensor[i]``.

    The weight of a transposed convolution is (C_in, C_out / groups, *kernel size): kernel ``o`` of
    group ``g`` is ``tensor[g * C_in / groups : (g + 1) * C_in / groups, o]``.
    """

    transposed_groups: int | None = None  # of a transposed convolution; None for any other

    def shape(self, tensor: Tensor) -> tuple[int, ...]:
        """Returns the shape of the bank of kernels, (C_out, C_in / groups, *kernel size)."""
        groups = self.transposed_groups
        if groups is None or tensor.ndim < 2:  # FSDP1 and DeepSpeed flatten: no bank at all
            return tensor.shape
        inputs, outputs, *size = tensor.shape
        return outputs * groups, inputs // groups, *size

    def rows(self, tensor: Tensor, index: Tensor) -> Tensor:
        """Returns a copy of some kernels, shape (len(index), fan_in), float32 or wider."""
        if self.transposed_groups is None:
            kernels = tensor.index_select(0, index)
        else:
            bank, places = self._by_group(tensor, index)
            kernels = bank[places]
        return kernels.flatten(1).to(torch.promote_types(tensor.dtype, torch.float32))

    def put_rows_(self, tensor: Tensor, index: Tensor, rows: Tensor) -> None:
        """Writes rows, shape (len(index), fan_in), in the dtype of the tensor."""
        kernels = rows.to(tensor.dtype).unflatten(1, self.shape(tensor)[1:])
        if self.transposed_groups is None:
            tensor.index_copy_(0, index, kernels)
        else:
            bank, places = self._by_group(tensor, index)
            bank[places] = kernels

    def _by_group(self, tensor: Tensor, index: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Returns a view (groups, C_out / groups, C_in / groups, *kernel size) and places in it."""
        in_group = tensor.shape[1]
        bank = tensor.unflatten(0, (self.transposed_groups, -1)).transpose(1, 2)
        return bank, (index // in_group, index % in_group)


_ROWS = Layout()


@dataclass(frozen=True)
class Store:
    """The tensors that hold the kernels of one convolution, or an optimizer's moment of them.

    Spectral normalisation divides all kernels by one number, which changes neither cosines nor
    blends, so the stored kernels represent those in use.
    """

    weight: Tensor = _NOTHING  # detached, in the shape that the convolution uses
    parameters: tuple[nn.Parameter, ...] = ()  # an optimizer must train them for merging to act
    layout: Layout = _ROWS
    magnitude: Tensor | None = None
    """With weight normalisation, the norm of each kernel, and the weight is its direction: shape
    (C_out, 1, ...); (1, C_out, 1, ...) of a transposed convolution."""
    mask: Tensor | None = None  # with pruning, of the weight's shape, one where an entry is in use
    reason: str | None = None  # why the kernels cannot be written

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the bank of kernels, (C_out, C_in / groups, *kernel size)."""
        return self.layout.shape(self.weight)

    @property
    def is_matrix(self) -> bool:
        """Whether the weight is what the forward pass uses, and its rows are the kernels."""
        computed = self.magnitude is not None or self.mask is not None
        return not computed and self.layout.transposed_groups is None

    @contextmanager
    def opened(self) -> Iterator[Store]:
        """Yields a store whose kernels are all local, for reading and writing.

        Of FSDP2's shards it gathers the whole on every rank, and each keeps its own slice of the
        result: all ranks must call it.
        """
        if self.reason is not None:
            raise RuntimeError(
                f"the kernels of this convolution cannot be written: {self.reason}. If a library "
                "replaced the weights after wrapping (FSDP1, DeepSpeed, Megatron, "
                "reparameterisation), train with DDP or FSDP2 (fully_shard) instead, or wrap the "
                "network again"
            )
        if not is_sharded(self.weight):
            yield self
            return
        from torch.distributed.tensor import DTensor, distribute_tensor

        sharded = cast(DTensor, self.weight)
        whole = sharded.full_tensor()
        yield replace(self, weight=whole)
        mine = distribute_tensor(whole, sharded.device_mesh, sharded.placements, src_data_rank=None)
        sharded.copy_(mine)

    def read(self, index: Tensor) -> Tensor:
        """Reads kernels as the forward pass uses them, (len(index), fan_in), float32 or wider."""
        assert self.reason is None and not is_sharded(self.weight), "only opened() has them all"
        rows = self.layout.rows(self.weight, index)
        if self.mask is not None:
            rows = rows * self.layout.rows(self.mask, index)
        if self.magnitude is not None:
            norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
            rows = rows * (self.layout.rows(self.magnitude, index) / norms)
        return rows

    def write_(self, index: Tensor, rows: Tensor, changed: Tensor | None) -> None:
        """Stores ``rows``, shape (len(index), fan_in), where ``changed``, shape (len(index),).

        None stores all. The other rows must be those that :meth:`read` returned; they do not
        change, bit for bit. A pruned entry keeps its stored value, so that it stays pruned.
        """
        writable = None if changed is None else changed.unsqueeze(1)
        if self.magnitude is not None:
            norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
            self._put_(self.magnitude, index, norms, writable)
            self._put_(self.weight, index, rows, writable)
        elif self.mask is not None:
            used = self.layout.rows(self.mask, index) != 0
            self._put_(self.weight, index, rows, used if writable is None else used & writable)
        else:
            self.layout.put_rows_(self.weight, index, rows)

    def _put_(self, tensor: Tensor, index: Tensor, rows: Tensor, writable: Tensor | None) -> None:
        if writable is not None:
            rows = torch.where(writable, rows, self.layout.rows(tensor, index))
        self.layout.put_rows_(tensor, index, rows)


def is_sharded(tensor: Tensor) -> bool:
    """Returns whether FSDP2 holds a tensor in shards."""
    return hasattr(tensor, "full_tensor")


def tensor_store(tensor: Tensor, layout: Layout = _ROWS) -> Store:
    """Returns the store of kernels that are parts of a weight, or of a tensor in its shape."""
    return Store(tensor.detach(), (tensor,) if isinstance(tensor, nn.Parameter) else (), layout)


def layout_of(conv: nn.Module) -> Layout:
    """Returns where a convolution has its kernels in its weight."""
    return Layout(cast(int, conv.groups) if getattr(conv, "transposed", False) else None)


def store_of(conv: nn.Module) -> Store:
    """Returns the store of a convolution's kernels, with a reason if they cannot be written."""
    own, layout = conv._parameters, layout_of(conv)
    plain = own.get("weight")
    if plain is not None:  # first, because it is by far the most common and checked in every step
        if isinstance(plain, nn.parameter.UninitializedParameter):
            reason = "lazy: its weight has no shape before the first forward pass"
            return Store(plain, (plain,), reason=reason)
        return tensor_store(plain, layout)
    direction, magnitude = own.get("weight_v"), own.get("weight_g")
    original, mask = own.get("weight_orig"), conv._buffers.get("weight_mask")
    has_spectral_norm = conv._buffers.get("weight_u") is not None
    if parametrize.is_parametrized(conv, "weight"):
        chain = cast(nn.ModuleDict, conv.parametrizations)["weight"]
        stored, kinds = chain._parameters, [type(part) for part in cast(nn.ModuleList, chain)]
        has_spectral_norm = kinds == [parametrizations._SpectralNorm]
        if kinds == [parametrizations._WeightNorm]:
            magnitude, direction = stored["original0"], stored["original1"]
        elif has_spectral_norm:
            original = stored["original"]
        else:
            name = kinds[0].__name__
            return Store(reason=f"a weight computed by the parametrization {name}")
    if original is not None and mask is None and has_spectral_norm:
        return tensor_store(original, layout)
    if direction is not None and magnitude is not None:
        store = _weight_normed(direction, magnitude, layout)
    elif original is not None and mask is not None:
        store = Store(original.detach(), (original,), layout, mask=mask)
    else:
        return Store(reason="a weight that is not a parameter of the convolution")
    if is_sharded(store.weight):
        return replace(store, reason="a computed weight that FSDP2 has sharded")
    return store


def _weight_normed(direction: nn.Parameter, magnitude: nn.Parameter, layout: Layout) -> Store:
    kernels, *others = layout.shape(direction)
    # Not of a transposed convolution in groups, where each magnitude is of a kernel in every group.
    if layout.shape(magnitude) != (kernels, *[1] * len(others)):
        reason = "weight_norm that is not over each kernel"
        hint = "; of a transposed convolution without groups, dim=1 is"
        return Store(reason=reason if layout.transposed_groups is None else reason + hint)
    parameters = direction, magnitude
    return Store(direction.detach(), parameters, layout, magnitude=magnitude.detach())


# -- the merged layers of a network ----------------------------------------------------------------


@dataclass(frozen=True)
class MergedLayer:
    """One merged convolution of a plan, by its position there, as a step finds it."""

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
            module = module._modules.get(part)  # a fifth of the time that get_submodule takes
            if module is None:
                raise RuntimeError(
                    f"the network has lost the convolution {site.name}, which the plan merges: "
                    "change the network first, then wrap it and create the optimizer"
                )
        found.append(module)
    return found


def rows_of(conv: nn.Module, weight: Any) -> Tensor:
    """Returns the kernels in a weight, detached, shape (C_out, fan_in), float32 or wider."""
    layout, stored = layout_of(conv), weight.detach()
    everyone = torch.arange(layout.shape(stored)[0], device=stored.device)
    return layout.rows(stored, everyone)


def deciding_parameter(conv: nn.Module) -> nn.Parameter:
    """Returns the weight of a convolution, or the first parameter of what computes it.

    Whether it is trained, and by which optimizer, decides for the layer.
    """
    weight = conv._parameters.get("weight")
    if weight is None:
        weight = next((p for name, p in conv.named_parameters() if name != "bias"), None)
    if weight is None:
        raise RuntimeError(
            f"FSDP1 flattens the weights, that of {conv} too: pass use_orig_params=True to it, or "
            "use FSDP2 (fully_shard, or fsdp_version: 2 in Accelerate) or DDP"
        )
    return weight


def check_layers(layers: Sequence[MergedLayer]) -> None:
    """Raises a RuntimeError if kernels have another shape than in the plan, or are on XLA."""
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


def replaced(names: str, by: nn.Module) -> str:
    """Returns the message for convolutions whose place another module took."""
    return (
        f"{names}: a {type(by).__name__} took the place of the convolution after the network was "
        "wrapped. Change the network first (BlurPool and other surgery, quantisation, adapters), "
        "then wrap it and create the optimizer"
    )


def check_sites(network: nn.Module, sites: Sequence[ConvSite]) -> None:
    """Raises a ValueError if a plan does not belong to this network, or merges nothing."""
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
