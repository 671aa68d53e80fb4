"""The merged layers of a network as a step finds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import repeat
from operator import attrgetter, getitem, is_
from typing import Any, TypeVar, cast
from zlib import crc32

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from inmerge_wrap.discovery import ConvSite
from inmerge_wrap.stores import Plain, Store, store_of

__all__ = ["Layers", "MergedLayer", "check_sites", "find_layers", "modules_of", "stream_of"]

_Fact = TypeVar("_Fact")


@dataclass(frozen=True)
class MergedLayer:
    """One merged convolution, looked up once in a step.

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


class Layers(Sequence[MergedLayer]):
    """Some merged layers as one step found them, with values derived from them.

    An immutable sequence. As long as the next steps find the same layers, they get the same
    object, so that what was derived once (pointer tables, choice of engine) stays valid.

    Args:
        layers: In the order of the plan.
        way: How the search found their modules; None for layers that no search has found.
    """

    def __init__(self, layers: Sequence[MergedLayer], way: _Way | None = None) -> None:
        self._layers = tuple(layers)
        self._way = way
        # Read now, because resizing a storage changes the address of every tensor found in it.
        self._memory = _Memory.of(layers)
        self._facts: dict[Any, Any] = {}

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, place: Any) -> Any:
        return self._layers[place]

    def __iter__(self) -> Iterator[MergedLayer]:
        return iter(self._layers)

    @cached_property
    def numbers(self) -> list[int]:
        """The position of each layer in the plan."""
        return [layer.number for layer in self]

    @cached_property
    def are_first(self) -> bool:
        """Whether they are the first layers of the plan, so that numbers are places."""
        return self.numbers == list(range(len(self)))

    @cached_property
    def stores(self) -> list[Store]:
        """The store of each layer's kernels."""
        return [layer.store for layer in self]

    def are_in(self, network: nn.Module) -> bool:
        """Returns whether a search through the network would find the same layers again."""
        return self._way is not None and self._way.is_in(network) and self.are_still()

    def are_still(self) -> bool:
        """Returns whether the modules have the same weights, in the same memory."""
        return self._memory is not None and self._memory.is_still()

    def at(self, places: Sequence[int]) -> Layers:
        """Returns some of the layers; this object itself for all of them."""
        return self if len(places) == len(self) else Layers([self[place] for place in places])

    def fact(self, key: Any, find: Callable[[Layers], _Fact]) -> _Fact:
        """Returns ``find(self)``, cached under ``key``."""
        if key not in self._facts:
            self._facts[key] = find(self)
        return cast(_Fact, self._facts[key])


# Every step asks whether anything has changed, which mapped builtins answer for all layers in the
# time that a loop takes for a few.


class _Way:
    """The modules of a network on the way to some of them, each once, as a search found them.

    Args:
        network: The network.
        names: Names of modules.
    """

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        self.modules: list[nn.Module] = []
        seen: dict[tuple[str, ...], nn.Module] = {(): network}
        self._parents: list[nn.Module] = []
        self._keys: list[str] = []
        for path in map(_path, names):
            for depth, key in enumerate(path):
                if path[: depth + 1] not in seen:
                    parent = seen[path[:depth]]
                    seen[path[: depth + 1]] = _submodule(parent, key)
                    self._parents.append(parent)
                    self._keys.append(key)
            self.modules.append(seen[path])
        self._network = network
        self._children = [*seen.values()][1:]

    def is_in(self, network: nn.Module) -> bool:
        """Returns whether the same modules are there."""
        try:
            found = map(getitem, map(attrgetter("_modules"), self._parents), self._keys)
            return network is self._network and all(map(is_, found, self._children))
        except KeyError:
            return False


class _Memory:
    """The memory of the weights of some modules, all of them ordinary tensors.

    Args:
        modules: The modules.
        weights: Their parameters ``weight``.
    """

    def __init__(self, modules: Sequence[nn.Module], weights: Sequence[nn.Parameter]) -> None:
        self._modules, self._weights = modules, weights
        self._found = self._look()

    @classmethod
    def of(cls, layers: Sequence[MergedLayer]) -> _Memory | None:
        """Returns the memory of layers; None if a weight is not an ordinary tensor in memory."""
        stores = [layer.store for layer in layers]
        if any(type(store) is not Plain or type(store.weight) is not Tensor for store in stores):
            return None
        weights = [store.parameters[0] for store in stores if store.parameters]
        if len(weights) < len(stores):
            return None
        if not all(weight.data_ptr() for weight in weights):
            return None
        return cls([layer.module for layer in layers], weights)

    def is_still(self) -> bool:
        """Returns whether nothing has changed."""
        try:
            now = map(getitem, map(attrgetter("_parameters"), self._modules), repeat("weight"))
            return all(map(is_, now, self._weights)) and self._look() == self._found
        except KeyError:
            return False

    def _look(self) -> list[list[Any]]:
        # A store keeps the memory it found alive, so no other tensor can have taken its address.
        return [
            [*map(Tensor.data_ptr, self._weights)],
            [*map(Tensor.stride, self._weights)],
            [*map(attrgetter("shape", "dtype", "device"), self._weights)],
        ]


def find_layers(
    network: nn.Module, sites: Sequence[ConvSite], last: Layers | None = None
) -> Layers:
    """Returns the layers of a plan as they are now; weights can be moved, sharded or frozen.

    Args:
        network: The network.
        sites: The merged layers of its plan.
        last: The previous result for these sites; returned itself if nothing has changed since.

    Raises:
        RuntimeError: If kernels have another shape than in the plan, or are on an XLA device.
    """
    if last is not None and last.are_in(network):
        return last
    way = _Way(network, [site.name for site in sites])
    layers = []
    for number, (site, module) in enumerate(zip(sites, way.modules, strict=True)):
        store = store_of(module)
        if store.parameters:
            _check(site, store)
        layers.append(MergedLayer(number, site, module, store))
    return Layers(layers, way)


def modules_of(network: nn.Module, sites: Sequence[ConvSite]) -> list[nn.Module]:
    """Returns the modules that are now at the names of some convolutions."""
    return [_submodule(network, site.name) for site in sites]


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
        store = store_of(conv) if isinstance(conv, _ConvNd) else None
        if store is None or not store.parameters or store.shape != site.shape:
            raise ValueError(
                f"the plan belongs to another network: this one has no convolution {site.name!r} "
                f"with kernels of shape {site.shape}; make a plan with plan_merging(network)"
            )


def stream_of(site: ConvSite) -> int:
    """Returns a layer's random stream, which does not depend on which layers are merged."""
    # The depth, not the position in the plan; the name for a convolution that never ran.
    return site.depth if site.depth is not None else 2**32 + crc32(site.name.encode())


@cache
def _path(name: str) -> tuple[str, ...]:
    return tuple(name.split("."))


def _submodule(network: nn.Module, name: str) -> nn.Module:
    found: Any = network
    try:
        for part in _path(name):
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
            "on XLA devices parameters are swapped without torch noticing, so that what is merged "
            "is lost; train on CUDA or CPU"
        )
