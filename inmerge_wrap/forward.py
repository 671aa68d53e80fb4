"""Merging in the forward pass: hooks on the merged convolutions, and no weight is written.

Where the merge is made, on the outputs or in the weights, is the work of outputs.py and weights.py.
All numbers that change from step to step are tensors, so that a compiled network does not compile
again, and draws are functions of the seed, the step, the content of the batch, the layer, the image
and the channel: a pass that is run again in the backward pass finds the draws of the first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from inmerge_wrap.counts import Counts
from inmerge_wrap.inputs import tensors_of
from inmerge_wrap.kernels import MergedLayer, deciding_parameter, modules_of, replaced
from inmerge_wrap.outputs import Outputs
from inmerge_wrap.plan import ConvSite
from inmerge_wrap.settings import MergeSettings, Strength
from inmerge_wrap.steps import is_captured
from inmerge_wrap.weights import Weights, chain_of


class _Plain:
    """Stands for the draw of a pass that does not merge."""


class ForwardMerge:
    """Merges in the forward pass of one network."""

    def __init__(self, sites: Sequence[ConvSite], network: nn.Module) -> None:
        self.is_on = False  # whether the current step merges
        self.is_graphed = False  # whether a CUDA graph repeats passes, which the host cannot see
        self._sites = sites
        self._modules = modules_of(network, sites)
        self._hooks: list[RemovableHandle] = []
        self._chains: dict[int, nn.Module] = {}  # of parametrizations, which compute a weight
        self._way: Outputs | Weights | None = None
        self._counts: Counts | None = None
        self._draw: Any = None  # of the forward pass that runs
        self._replayed: Any = None  # of the one whose backward pass runs
        # Draws of the passes of this step, by their id; and which have had a backward pass.
        self._open: dict[int, Any] = {}
        self._over: set[int] = set()
        self._sharing: set[ForwardMerge] = set()  # of other networks, with convolutions of this one

    def __getstate__(self) -> dict[str, Any]:
        # A copy is driven by no optimizer, for which a compiled forward pass does not look. It has
        # no tensors of this one: those that go to another process share their memory with it.
        none = {"_way": None, "_counts": None, "_replayed": None}
        return vars(self) | none | {"is_on": False, "_open": {}, "_over": set()}

    def install(self, network: nn.Module) -> None:
        """Puts the hooks on the convolutions of the plan, behind all others that are there."""
        self.uninstall()
        for other in self._others():
            self._sharing.add(other)
            other._sharing.add(self)
        for number, module in enumerate(self._modules):
            self._hooks += [
                module.register_forward_pre_hook(partial(self._before, number)),
                module.register_forward_hook(partial(self._after, number), always_call=True),
            ]
            if (chain := chain_of(module)) is not None:
                self._chains[number] = chain
                self._hooks.append(chain.register_forward_hook(partial(self._computed, number)))
        self._hooks.append(network.register_forward_hook(self._passed))

    def _others(self) -> set[ForwardMerge]:
        """Returns what merges in other networks that have a convolution of this one."""
        hooks = [hook for module in self._modules for hook in module._forward_pre_hooks.values()]
        owners = [getattr(getattr(hook, "func", None), "__self__", None) for hook in hooks]
        return {each for each in owners if isinstance(each, ForwardMerge) and each is not self}

    def uninstall(self) -> None:
        """Takes the hooks off the network, when no optimizer drives the merging any more."""
        self.is_on = False
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for other in self._sharing:
            other._sharing.discard(self)
        self._sharing.clear()
        self._chains.clear()  # the same object, which the stand-ins look at

    def refuse_replaced(self, layers: Sequence[MergedLayer]) -> None:
        """Raises a RuntimeError if another module has taken the place of a convolution."""
        for layer, module in zip(layers, self._modules, strict=True):
            if layer.module is not module:
                raise RuntimeError(replaced(layer.site.name, layer.module))

    def set_step(self, step: int, strength: Strength | None, settings: MergeSettings) -> None:
        """Prepares the next step: draws what does not depend on the images, and sets the strength.

        Without a strength the step does not merge.
        """
        _guard_hooks()
        self.is_on = strength is not None
        self._open.clear()
        self._forget()
        if strength is None:
            return
        device = next(self._modules[0].parameters()).device
        if self._way is None or self._way.device != device:
            if settings.mode == "outputs":
                self._way = Outputs(self._sites, device)
            else:
                self._way = Weights(self._sites, device, self._chains)
            before, self._counts = self._counts, Counts(len(self._sites), device)
            if before is not None:
                self._counts.take_over(before)
        self._way.set_step(step, strength, settings)

    # -- one forward pass -------------------------------------------------------------------------

    def begin(self, inputs: Any) -> None:
        """Draws for a forward pass of the network on these inputs."""
        assert self._way is not None, "set_step comes first"
        _guard_hooks()
        if is_captured():
            self.is_graphed = True
        if self._way.device.type == "meta" and not next(self._modules[0].parameters()).is_meta:
            raise RuntimeError(
                "the weights were on the meta device when the optimizer was attached: place them "
                "first, then create the optimizer and attach it"
            )
        if not torch.compiler.is_compiling():
            self._way.end_pass()  # of what was interrupted while a backward pass repeated it
        self._draw = self._way.draw(inputs)

    @property
    def repeats_plain(self) -> bool:
        """Whether a backward pass repeats a pass that did not merge, as under paused()."""
        return _in_backward() and isinstance(self._replayed, _Plain)

    def end(self, outputs: Any) -> None:
        """Ends a forward pass; the passes that its backward pass repeats will draw the same."""
        draw, self._draw = self._draw, None
        assert self._way is not None and self._counts is not None, "begin comes first"
        self._counts.end_pass(is_repeated=torch.compiler.is_compiling() or is_captured())
        self._way.end_pass()
        if draw is not None:
            self._follow(draw, outputs)

    def _passed(self, _: nn.Module, __: Any, outputs: Any) -> None:
        """Ends a forward pass of the network that did not merge: under paused(), or a direct one.

        A backward pass may repeat it beside one that did.
        """
        if self._draw is None and torch.is_grad_enabled() and not _in_backward():
            self._follow(_Plain(), outputs)

    def _follow(self, draw: Any, outputs: Any) -> None:
        """Makes the backward pass of these outputs repeat what their forward pass drew."""
        if torch.compiler.is_compiling():  # a compiled graph repeats it by itself
            return
        self._note(draw, outputs)
        for other in tuple(self._sharing):
            other._note(_Plain(), outputs)

    def _note(self, draw: Any, outputs: Any) -> None:
        """Notes a pass over the convolutions, for a backward pass that repeats it."""
        if not self.is_on:
            return
        if not _in_backward():
            self._forget()  # what one that raised has left
        for place in self._over:
            self._open.pop(place, None)
        self._over.clear()
        if torch.is_grad_enabled():
            self._open[id(draw)] = draw
        for tensor in tensors_of(outputs):
            if tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(partial(self._replay, draw))

    def _replay(self, draw: Any, _: Any = None) -> None:
        self._replayed = draw
        self._over.add(id(draw))
        after_backward(self._forget)

    def _find(self) -> None:
        """Finds the draw of the pass that a backward pass repeats, if no output led to it.

        A loss of features that a hook kept begins at none.
        """
        waiting = [draw for place, draw in self._open.items() if place not in self._over]
        draw, *others = waiting or self._open.values()
        if others:
            raise RuntimeError(
                "activation checkpointing repeats a forward pass, and it cannot be found which of "
                f"{1 + len(others)}, so that it could draw other pairs: compute the loss from what "
                "the model returns (tensors, tuples, lists, dicts or objects with tensors as "
                "attributes), or run the backward pass after each forward pass"
            )
        self._replay(draw)

    def _forget(self) -> None:
        self._replayed = None

    # -- the hooks of a convolution ---------------------------------------------------------------

    def _before(self, number: int, module: nn.Module, _: Any) -> None:
        """Does what needs the parameters, where they are whole.

        FSDP2 gathers them for the module alone, and frees them before the hook that comes after it.
        """
        if self._draw is None and self._replayed is None and self._open and _in_backward():
            self._find()
        if self._way is not None and self._acting(module) is not None:
            self._way.before(number, module, self._counting())

    def _after(self, number: int, module: nn.Module, _: Any, output: Any) -> Tensor | None:
        """Removes the stand-in, or blends the channels of the output."""
        if self._way is None:
            return None
        return self._way.after(number, self._acting(module), output, self._counting())

    def _computed(self, number: int, _: nn.Module, __: Any, weight: Tensor) -> Tensor | None:
        """Returns what stands in for a weight that a parametrization has computed."""
        if not isinstance(self._way, Weights):
            return None
        return self._way.computed(number, weight, self._counting())

    def _acting(self, module: nn.Module) -> Any:
        """Returns the draw that acts on a convolution; none in eval mode and on a frozen one.

        It is that of the pass that runs, or of the one that a checkpoint repeats.
        """
        draw = self._replayed if self._draw is None and _in_backward() else self._draw
        if draw is None or isinstance(draw, _Plain):
            return None
        if not module.training or not deciding_parameter(module).requires_grad:
            return None
        return draw

    # -- what acted -------------------------------------------------------------------------------

    def _counting(self) -> Counts | None:
        """Returns where to count; nothing for a pass that is repeated, and has been counted."""
        return None if _in_backward() else self._counts

    def take_counts(self) -> tuple[Tensor, Tensor] | None:
        """Returns what acted since the last call, see :meth:`Counts.take`; None if nothing ran."""
        if self._counts is None or self._way is None or self._way.device.type == "meta":
            return None  # a copy reads the counts too, also before the weights have a place
        return self._counts.take()


def _guard_hooks() -> None:
    """Lets compiled graphs look for hooks, and discards those that were made without looking.

    By default one graph serves all networks of a class: that of a network without hooks would serve
    a merged one, which would not merge.
    """
    if "torch._dynamo" not in sys.modules or torch.compiler.is_compiling():
        return
    if getattr(torch._dynamo.config, "skip_nnmodule_hook_guards", False):
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        torch._dynamo.reset()


def _in_backward() -> bool:
    """Returns whether autograd runs a backward pass, in which checkpoints repeat forward passes."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def after_backward(call: Callable[[], None]) -> None:
    """Calls a function when the backward pass that runs is over; at once if none does."""
    if _in_backward():
        torch.autograd.Variable._execution_engine.queue_callback(call)
    else:
        call()
