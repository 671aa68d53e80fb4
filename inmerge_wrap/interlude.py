"""Transient merging: kernels are merged from a training forward pass to the optimizer's step.

The weights are merged in place, so that everything that computes a gradient in the meantime
(recomputed activations, compiled code, replicas) sees the merged kernels, and only the kernels that
change are copied. Everything else must see the unmerged kernels: the optimizer, evaluation,
checkpoints, copies. Each such access is a *door*: a hook that ends the interlude first.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from inmerge_wrap.merge_pass import Kept

__all__ = ["BeforeStep", "Interlude"]


class Interlude:
    """The period in which some kernels are merged, with a copy of the original kernels.

    Args:
        network: The wrapped network.
        kept: The original kernels.
    """

    def __init__(self, network: nn.Module, kept: Sequence[Kept]) -> None:
        self._network = network
        self._kept = list(kept)
        self._hooks: list[RemovableHandle] = []
        self._guarded: list[nn.Module] = []
        self._open_doors()

    @property
    def is_over(self) -> bool:
        """Whether the kernels are restored."""
        return not self._kept

    @torch.no_grad()
    def end(self) -> None:
        """Restores the kernels, bit for bit, and removes every hook from the network."""
        self._put_back()
        for hook in self._hooks:
            hook.remove()
        for module in self._guarded:
            vars(module).pop("__getstate__", None)
        self._hooks, self._guarded = [], []

    @torch.no_grad()
    def _put_back(self) -> None:
        kept, self._kept = self._kept, []
        for part in kept:
            part.put_back_()

    def _open_doors(self) -> None:
        """Watches every way in which the weights can be read or replaced in the meantime.

        A hook must not remove itself while PyTorch iterates over the hooks, so these restore the
        kernels and are removed at the end.
        """
        convs = [module for part in self._kept for module in part.modules]
        self._hooks.append(self._network.register_forward_pre_hook(self._before_forward))
        for conv in convs:
            self._hooks.append(conv.register_state_dict_pre_hook(self._before_look))
            self._hooks.append(conv.register_load_state_dict_pre_hook(self._before_look))
        for module in (self._network, *convs):
            # Called by deepcopy and pickle, which look at the instance first.
            vars(module)["__getstate__"] = self._state_getter(module)
            self._guarded.append(module)

    def _before_forward(self, network: nn.Module, _: Any) -> None:
        if not (network.training and torch.is_grad_enabled()):
            self._put_back()

    def _before_look(self, *_: Any, **__: Any) -> None:
        self._put_back()

    def _state_getter(self, module: nn.Module) -> Callable[[], dict[str, Any]]:
        def getstate() -> dict[str, Any]:
            self.end()
            own = getattr(type(module), "__getstate__", None)
            state = None if own is None else own(module)
            return vars(module).copy() if state is None else state

        return getstate


class BeforeStep:
    """The step pre-hook of an optimizer: a step begins from unmerged kernels.

    Args:
        wrapper: The InMergeWrapper; no strong reference is kept.
    """

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = weakref.ref(wrapper)

    @torch.compiler.disable
    def __call__(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        wrapper = self._wrapper()
        if wrapper is None or not wrapper.settings.transient:
            return None
        wrapper.end_interlude()
        # step(closure) runs forward and backward inside the step; LBFGS does so several times.
        if len(args) > 1 and callable(closure := args[1]):  # the first is the optimizer
            return (args[0], _whole_after(wrapper, closure), *args[2:]), kwargs
        if callable(closure := kwargs.get("closure")):
            return args, {**kwargs, "closure": _whole_after(wrapper, closure)}
        return None


def _whole_after(wrapper: Any, closure: Any) -> Any:
    def evaluate() -> Any:
        try:
            return closure()
        finally:
            wrapper.end_interlude()

    return evaluate
