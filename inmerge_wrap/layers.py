"""The merged layers of a network as a step finds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

from torch import nn
from torch.nn.modules.conv import _ConvNd

from inmerge_wrap.discovery import ConvSite
from inmerge_wrap.stores import Store, store_of

__all__ = ["MergedLayer", "check_sites", "find_layers", "stream_of"]


@dataclass(frozen=True)
class MergedLayer:
    """One merged convolution, looked up once in a step.

    Attributes:
        number: Its place in the plan.
        site: What the plan says of it.
        module: The convolution.
        store: Where its kernels are.
    """

    number: int
    site: ConvSite
    module: nn.Module
    store: Store

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """What an optimizer must train for merging to act."""
        return self.store.parameters


def find_layers(network: nn.Module, sites: Sequence[ConvSite]) -> list[MergedLayer]:
    """The layers of a plan as they are now: weights may be moved, sharded or frozen at any time.

    Raises:
        RuntimeError: If kernels have another shape than in the plan, or is on an XLA device.
    """
    layers = []
    for number, site in enumerate(sites):
        module = _submodule(network, site.name)
        store = store_of(module)
        if store.parameters:
            _check(site, store)
        layers.append(MergedLayer(number, site, module, store))
    return layers


def check_sites(network: nn.Module, sites: Sequence[ConvSite]) -> None:
    """Makes sure that a plan is one of this network.

    Raises:
        ValueError: If it is not, or merges nothing.
    """
    if not sites:
        raise ValueError("the plan merges no convolution")
    modules = dict(network.named_modules())
    for site in sites:
        conv = modules.get(site.name)
        store = store_of(conv) if isinstance(conv, _ConvNd) else None
        if store is None or not store.parameters or store.shape != site.shape:
            raise ValueError(
                f"the plan is not of this network: it has no convolution {site.name!r} with "
                f"kernels of shape {site.shape}; make one with plan_merging(network)"
            )


def stream_of(site: ConvSite) -> int:
    """What sets a layer's draws apart from those of others, whichever of them are merged."""
    # The depth, not the place in the plan; a convolution that never ran has none, but a name.
    return site.depth if site.depth is not None else 2**32 + crc32(site.name.encode())


def _submodule(network: nn.Module, name: str) -> nn.Module:
    found: Any = network
    try:
        for part in name.split("."):
            found = found._modules[part]  # a fifth of the time that get_submodule takes
    except KeyError:
        return network.get_submodule(name)
    return found


def _check(site: ConvSite, store: Store) -> None:
    if store.shape != site.shape:
        raise RuntimeError(
            f"the kernels of {site.name} have the shape {tuple(store.shape)} instead of "
            f"{site.shape}. A layer that was replaced needs a new wrapper; FSDP1 and DeepSpeed "
            "ZeRO-3 flatten the weights, so that no kernel can be found in them: use FSDP2 "
            "(fully_shard, or fsdp_version: 2 in Accelerate) or DDP"
        )
    if store.weight.device.type == "xla":
        raise RuntimeError(
            "on XLA devices parameters are swapped behind torch, and what is merged is lost; "
            "train on CUDA or CPU"
        )
