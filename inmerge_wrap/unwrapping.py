"""Unwraps networks, and finds the wrappers in a model.

Wrappers are recognised by class name, so nothing here imports them, and modules that take any
``nn.Module`` (export, model cards, similarity) do not depend on the wrapper's code.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

__all__ = ["find_wrapper", "named_wrappers", "unwrap"]

_MERGING = "InMergeWrapper"
_WRAPPERS = {
    _MERGING,
    "AveragedModel",
    "DataParallel",
    "DistributedDataParallel",
    "ModelEmaV2",
    "ModelEmaV3",
    "OptimizedModule",
}


def unwrap(model: nn.Module) -> nn.Module:
    """Unwraps InMergeWrapper, DDP, torch.compile and weight averages, in any order.

    Raises:
        TypeError: If the object is not a network.
    """
    check_network(model)
    while class_names(model) & _WRAPPERS:
        children = dict(model.named_children())
        model = children["_orig_mod"] if "_orig_mod" in children else children["module"]
    return model


def named_wrappers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Returns every InMergeWrapper in a model with its name there, "" for the model itself."""
    for name, module in model.named_modules():
        if _MERGING in class_names(module):
            yield name, module


def find_wrapper(model: nn.Module) -> nn.Module | None:
    """Returns the outermost InMergeWrapper of a model (even inside DDP or compiled) or None."""
    return next((wrapper for _, wrapper in named_wrappers(model)), None)


def check_network(network: object) -> None:
    """Raises a TypeError if the object is not a network."""
    if isinstance(network, nn.Module):
        return
    if isinstance(network, str):
        remedy = f"build the network first, for example timm.create_model({network!r})"
    else:
        remedy = "pass the network itself, not its class, its weights or its output"
    raise TypeError(f"a torch.nn.Module is required, got {network!r:.80}: {remedy}")


def refuse_wrapped(network: nn.Module) -> None:
    """Raises a ValueError if anything in a network is wrapped: it would merge twice a step."""
    for name, _ in named_wrappers(network):
        place = f"{name}.module".removeprefix(".")
        raise ValueError(
            "this network is already wrapped, and two wrappers would merge twice in each step: "
            "change the settings of the existing wrapper (model.merge_weight = ...), or wrap the "
            f"bare network, model.{place}"
        )


def class_names(value: object) -> set[str]:
    """Returns the names of the classes of an object, which need no import."""
    return {kind.__name__ for kind in type(value).__mro__}
