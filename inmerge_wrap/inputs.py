"""Arguments and results of a network: guesses of the first, and the tensors in either."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves, tree_map

from inmerge_wrap.kernels import kernel_shape

# Sizes of example inputs by their number of dimensions, the likeliest first: sound and signals,
# images, videos and volumes.
_FALLBACK_SIZES: dict[int, list[tuple[int, ...]]] = {
    1: [(length,) for length in (1024, 4096, 16384, 512, 256, 128)],
    2: [(side, side) for side in (224, 299, 384, 512, 256, 192, 160, 128, 96, 64)],
    3: [(16, 112, 112), *((side,) * 3 for side in (64, 96, 32, 128)), (16, 224, 224)],
}


Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional ones and those by name."""


def tensors_of(content: Any) -> list[Tensor]:
    """Returns the tensors in nested lists, tuples, dicts, and objects that hold them."""
    found = []
    for leaf in tree_leaves(content):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, type | nn.Module):
            found += [each for each in tree_leaves(vars(leaf)) if isinstance(each, Tensor)]
    return found


def call_arguments(
    network: nn.Module, convs: Mapping[str, _ConvNd], example_input: Any
) -> list[Arguments]:
    """Returns candidate inputs for the network, the likeliest first."""
    if isinstance(example_input, Mapping):
        return [((), dict(example_input))]
    if isinstance(example_input, tuple):
        return [(example_input, {})]
    if isinstance(example_input, list):  # of arguments, or the one argument of a detection network
        return [(tuple(example_input), {}), ((example_input,), {})]
    if example_input is not None:
        return [((example_input,), {})]
    configured = timm_config(network).get("input_size") or ()
    shapes: list[tuple[int, ...]] = []
    for dims in dict.fromkeys(len(conv.kernel_size) for conv in convs.values()):
        shapes += _likely_shapes(network, convs, dims, configured if dims == 2 else ())
    shapes += [tuple(configured)] if configured else []  # as a network unfolds it for its layers
    dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
    # Batches of two, because BatchNorm cannot train on one value per channel.
    return [
        ((torch.empty(2, *shape, dtype=dtype, device="meta"),), {})
        for shape in dict.fromkeys(shapes)
    ]


def _likely_shapes(
    network: nn.Module, convs: Mapping[str, _ConvNd], dims: int, configured: Sequence[int]
) -> list[tuple[int, ...]]:
    """Returns candidate input shapes (channels, *size) for convolutions of some dimension."""
    first = next(conv for conv in convs.values() if len(conv.kernel_size) == dims)
    shape = kernel_shape(first)  # from the weight, which users replace to change the channels
    channels = [shape[1] * first.groups] if shape else []
    channels += [*configured[:1], 3, 1]
    # Of vision transformers in torchvision, in timm, and in timm where img_size was given.
    patches = getattr(network, "patch_embed", None)
    holders = ((network, "image_size"), (network, "img_size"), (patches, "img_size"))
    stated = [_size(getattr(holder, name, None), dims) for holder, name in holders]
    sizes = [tuple(configured[1:])] if configured else []
    sizes += [size for size in stated if size] + _FALLBACK_SIZES[dims]
    return [(channels[0], *size) for size in sizes] + [(count, *sizes[0]) for count in channels]


def _size(size: Any, dims: int) -> tuple[int, ...] | None:
    """Returns a size that a network declares as a tuple, or None if it is not a size."""
    size = (size,) * dims if isinstance(size, int) else size
    if not isinstance(size, tuple) or len(size) != dims:
        return None
    return size if all(isinstance(side, int) for side in size) else None


def timm_config(network: nn.Module) -> Mapping[str, Any]:
    """Returns the timm configuration of a network; empty if it is not a timm model."""
    config = getattr(network, "pretrained_cfg", None)
    return config if isinstance(config, Mapping) else {}


def to_meta(arguments: Arguments) -> Arguments:
    """Returns the arguments of a call with all tensors on the meta device."""
    return tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, arguments)


def on_device_of(network: nn.Module, arguments: Arguments) -> Arguments:
    """Returns the arguments on the device of a network, with zeros for those without content."""
    # A network that is quantised as a whole has no parameters.
    device = next((p.device for p in network.parameters()), torch.device("cpu"))

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.is_meta:
            return torch.zeros_like(value, device=device)
        return value.to(device)

    return tree_map(move, arguments)


def is_quantised(module: nn.Module) -> bool:
    """Returns whether a module is an integer convolution of ``torch.ao.quantization``."""
    # By name, because torch.ao may be missing and is slow to import.
    return any(
        kind.__name__ == "_ConvNd" and kind.__module__ == "torch.ao.nn.quantized.modules.conv"
        for kind in type(module).__mro__
    )
