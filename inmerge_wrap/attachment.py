"""The attached optimizers: which one steps which layer, and what the library must know of it."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from operator import attrgetter, getitem, is_
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from inmerge_wrap.discovery import ConvSite
from inmerge_wrap.layers import Layers, MergedLayer, modules_of
from inmerge_wrap.settings import MergeSettings
from inmerge_wrap.stores import Sharded, Store, tensor_store
from inmerge_wrap.unwrapping import unwrap

if TYPE_CHECKING:
    from inmerge_wrap.wrapper import InMergeWrapper

__all__ = [
    "Attachments",
    "carry_counter",
    "check_settings",
    "companions",
    "is_nested_step",
    "is_no_training_step",
    "is_schedule_free",
    "notice_every_step",
    "refuse_capture",
    "refuse_second",
    "remedy_for_none_held",
    "reshard",
    "stepping_optimizer",
    "trains_any",
]

# By name, so that nothing is imported: they write the weights from copies of their own.
_STEPS_COPIES = {"DeepSpeedOptimizerWrapper", "MegatronLMOptimizerWrapper", "DummyOptim"}

_COUNTERS = "inmerge"  # key in an optimizer's state dict: one entry for each wrapper attached to it


@dataclass
class _Attachment:
    """An optimizer whose steps merge."""

    # Not a strong reference: a copy of the wrapper would take the optimizer along.
    optimizer: weakref.ref[Optimizer]
    handle: RemovableHandle
    layers: set[int]  # numbers of all layers that the optimizer ever merged
    last: _Held | None = None


@dataclass
class _Held:
    """Which of some layers an optimizer held, and the inputs of that decision."""

    layers: Layers
    groups: _Groups  # of the optimizer and of those attached later
    held: Layers
    parameters: list[nn.Parameter]  # of the layers that it holds
    free: list[bool]  # whether each of these parameters is not frozen
    trained: Layers

    @classmethod
    def of(cls, layers: Layers, optimizers: Sequence[Optimizer]) -> _Held:
        """Finds the layers that the first optimizer holds and none of the others does."""
        mine, *others = (set(map(id, _parameters_of(each))) for each in optimizers)
        mine = mine.difference(*others)
        held = _where(
            layers,
            lambda layer: bool(layer.parameters) and mine.issuperset(map(id, layer.parameters)),
        )
        groups = _Groups(optimizers, _parameters_in(layers))
        return cls(layers, groups, held, _parameters_in(held), [], Layers([]))

    def follow_freezing(self) -> None:
        """Finds the layers that train, if parameters were frozen or unfrozen since."""
        free = [*map(attrgetter("requires_grad"), self.parameters)]
        if free != self.free:
            self.free = free
            self.trained = _where(
                self.held, lambda layer: all(p.requires_grad for p in layer.parameters)
            )


class _Groups:
    """The parameters of some optimizers, and whether they are still the same.

    After a training step nothing is in the caches, so that reading every parameter of a network
    takes longer than a small pass. Only those of merged layers are compared one by one; of the
    others, their lists.

    Args:
        optimizers: The optimizers.
        merged: The parameters of all merged layers.
    """

    def __init__(self, optimizers: Sequence[Optimizer], merged: Sequence[nn.Parameter]) -> None:
        self._lists = _lists_of(optimizers)
        self._lengths = [*map(len, self._lists)]
        of_layers = set(map(id, merged))
        found = [
            (some, place)
            for some in self._lists
            for place, parameter in enumerate(some)
            if id(parameter) in of_layers
        ]
        self._holders = [some for some, _ in found]
        self._places = [place for _, place in found]
        self._merged = [some[place] for some, place in found]

    def are_still(self, optimizers: Sequence[Optimizer]) -> bool:
        """Returns whether these optimizers hold the same parameters as those before."""
        lists = _lists_of(optimizers)
        return (
            len(lists) == len(self._lists)
            and all(map(is_, lists, self._lists))
            and [*map(len, lists)] == self._lengths
            and all(map(is_, map(getitem, self._holders, self._places), self._merged))
        )


class Attachments:
    """The optimizers whose steps merge, in the order in which they were attached.

    If two hold the same layer, the one attached last merges it.
    """

    def __init__(self) -> None:
        self._known: list[_Attachment] = []

    def add(
        self, optimizer: Optimizer, handle: RemovableHandle, layers: Sequence[MergedLayer]
    ) -> None:
        """Records an optimizer with the layers that it holds."""
        numbers = {layer.number for layer in layers}
        self._known.append(_Attachment(weakref.ref(optimizer), handle, numbers))

    def handle_of(self, optimizer: Optimizer) -> RemovableHandle | None:
        """Returns the handle of an optimizer that is attached."""
        for known in self._known:
            if known.optimizer() is optimizer and _is_registered(known.handle):
                return known.handle
        return None

    @property
    def live(self) -> list[Optimizer]:
        """The optimizers that still exist and whose hooks have not been removed."""
        return [
            optimizer
            for known in self._known
            if (optimizer := known.optimizer()) is not None and _is_registered(known.handle)
        ]

    def miss(self, optimizer: Optimizer) -> bool:
        """Returns whether an optimizer was never attached and none was detached on purpose."""
        detached = any(
            known.optimizer() is not None and not _is_registered(known.handle)
            for known in self._known
        )
        return not detached and all(known.optimizer() is not optimizer for known in self._known)

    def __len__(self) -> int:
        return len(self._known)

    def held_by(self, optimizer: Optimizer, layers: Layers) -> tuple[Layers, Layers]:
        """Returns the layers that the optimizer holds and no optimizer attached later does.

        Returns:
            All of them, and those that are not frozen; the same objects as long as that is so.
        """
        live = self.live
        later = live[live.index(optimizer) + 1 :] if optimizer in live else []
        optimizers = [optimizer, *later]
        known = next((known for known in self._known if known.optimizer() is optimizer), None)
        last = known.last if known else None
        if last is None or last.layers is not layers or not last.groups.are_still(optimizers):
            last = _Held.of(layers, optimizers)
        last.follow_freezing()
        if known:
            known.last = last
        return last.held, last.trained

    def check(
        self,
        optimizer: Optimizer,
        merging: Layers,
        layers: Layers,
    ) -> None:
        """Checks that an attached optimizer still holds the weights that it merged before.

        Args:
            optimizer: An attached one.
            merging: The layers that merge with this step.
            layers: All layers of the plan.

        Raises:
            RuntimeError: If it lost some, so that its steps no longer train them.
        """
        attachment = next(known for known in self._known if known.optimizer() is optimizer)
        attachment.layers.update(merging.numbers)
        if len(attachment.layers) == len(merging):
            return
        held = set(map(id, _parameters_of(optimizer)))
        lost = [
            layer
            for layer in layers
            if layer.number in attachment.layers
            and (
                not layer.parameters
                or any(p.requires_grad and id(p) not in held for p in layer.parameters)
            )
        ]
        if not lost:
            return
        names = ", ".join(layer.site.name for layer in lost)
        # FSDP1 takes the weight out of a convolution but keeps its class.
        others = [layer for layer in lost if not isinstance(layer.module, _ConvNd)]
        if others:
            kind = type(others[0].module).__name__
            raise RuntimeError(
                f"{names}: after attach() a {kind} took the place of the convolution. Change the "
                "network first (BlurPool and other surgery, quantisation, adapters), then wrap it "
                "and create the optimizer"
            )
        if any(isinstance(layer.store, Sharded) for layer in lost):
            remedy = (
                "With FSDP2 (fully_shard) create the optimizer after sharding; with Accelerate "
                "prepare model and optimizer in one call"
            )
        else:
            remedy = (
                "If the network was changed, wrap it and create the optimizer afterwards; if "
                "the optimizer was, attach it again. DeepSpeed, Megatron-LM and FSDP1 step copies "
                "of the weights: train with DDP or FSDP2 instead"
            )
        raise RuntimeError(
            f"the attached optimizer no longer holds the weights of {names}: they were replaced "
            f"after attach(). {remedy}"
        )


@dataclass(frozen=True)
class _Counter:
    """The two hooks through which an optimizer's state dict carries a wrapper's counts.

    Plain numbers, because libraries cast and move the tensors of such a state. Hooks outlast an
    attachment that was ended, and then do nothing.
    """

    wrapper: weakref.ref[InMergeWrapper]
    handle: RemovableHandle

    def save(self, _: Optimizer, state_dict: dict[str, Any]) -> None:
        wrapper = self.wrapper()
        if wrapper is not None and _is_registered(self.handle):
            state_dict.setdefault(_COUNTERS, []).append(wrapper.get_extra_state().tolist())

    def load(self, _: Optimizer, state_dict: dict[str, Any]) -> None:
        wrapper = self.wrapper()
        if wrapper is None or not _is_registered(self.handle) or not state_dict.get(_COUNTERS):
            return
        # A copy made for the hooks. Those of the next wrapper find the next entry.
        first, *state_dict[_COUNTERS] = state_dict[_COUNTERS]
        if first != wrapper.get_extra_state().tolist():  # else the statistics stay as they are
            wrapper.set_extra_state(torch.tensor(first, dtype=torch.float64, device="cpu"))


def carry_counter(
    wrapper: InMergeWrapper, handle: RemovableHandle, optimizers: Sequence[Any]
) -> None:
    """Makes the state dict of an optimizer carry the step counter and statistics of a wrapper.

    Code that resumes an optimizer then resumes merging, even if the network's weights are saved
    without the wrapper (timm, Hugging Face's Trainer). A state dict without them loads too, and
    one with them loads into any optimizer.

    Args:
        wrapper: No strong reference is kept.
        handle: The handle of the attachment.
        optimizers: The one that steps and those around it; other objects are ignored.
    """
    counter = _Counter(weakref.ref(wrapper), handle)
    inner = [getattr(optimizer, "_base_optimizer", None) for optimizer in optimizers]  # Lookahead
    for optimizer in {id(found): found for found in (*optimizers, *inner)}.values():
        # Some subclasses never call Optimizer.__init__; their state is that of another optimizer.
        if isinstance(optimizer, Optimizer) and "_optimizer_state_dict_post_hooks" in vars(
            optimizer
        ):
            optimizer.register_state_dict_post_hook(counter.save)
            optimizer.register_load_state_dict_pre_hook(counter.load)


_listeners: set[weakref.WeakMethod[Callable[[Optimizer], None]]] = set()


def notice_every_step(listener: Callable[[Optimizer], None]) -> None:
    """Calls ``listener(optimizer)`` after each step of any optimizer in this process.

    This detects a loop that forgot to attach its optimizer, or that replaced it.

    Args:
        listener: A bound method; no strong reference to its object is kept.
    """
    _register_once()
    _listeners.add(weakref.WeakMethod(listener, _listeners.discard))


@cache
def _register_once() -> None:
    register_optimizer_step_post_hook(_after_any_step)


def _after_any_step(optimizer: Optimizer, *_: Any) -> None:
    if torch.compiler.is_compiling():
        return
    for reference in tuple(_listeners):
        listener = reference()
        if listener is not None:
            listener(optimizer)


def trains_any(optimizer: Optimizer, network: nn.Module, sites: Sequence[ConvSite]) -> bool:
    """Returns whether an optimizer trains a weight of the modules at some convolution names."""
    held = set(map(id, _parameters_of(optimizer)))
    return any(
        id(parameter) in held and parameter.requires_grad
        for module in modules_of(network, sites)
        for parameter in module.parameters()
    )


def remedy_for_none_held(layers: Sequence[MergedLayer]) -> str:
    """Returns the remedy for an optimizer that holds no weight of some layers."""
    if any(p.requires_grad for layer in layers for p in layer.parameters):
        return "build it from the parameters of this model"
    return (
        "they are frozen, and it was built from the other parameters. Attach the optimizer that "
        "trains them once they are unfrozen, or build this one from all parameters of the model"
    )


def refuse_second(optimizer: Optimizer, wrapper: nn.Module) -> None:
    """Raises a ValueError if the optimizer merges for another wrapper of the same network."""
    for hook in optimizer._optimizer_step_post_hooks.values():
        other = getattr(hook, "__self__", None)
        if isinstance(other, type(wrapper)) and unwrap(other) is unwrap(wrapper):
            raise ValueError(
                "the optimizer already merges for another InMergeWrapper of this network, and "
                "both would merge in each step: create a new optimizer, or detach the other "
                "wrapper with handle.remove(), where handle is what its attach() returned"
            )


def check_settings(
    settings: MergeSettings, optimizer: Optimizer, held: Sequence[MergedLayer]
) -> None:
    """Checks that settings work with an optimizer and the layers that it holds.

    Raises:
        RuntimeError: If they do not.
    """
    if settings.transient and any(isinstance(layer.store, Sharded) for layer in held):
        raise RuntimeError(
            "transient=True does not work with FSDP2: a forward pass gathers the weights "
            "before the wrapper is called, so that it would not see what is merged in the "
            "shards; train with DDP, which suits a CNN, or merge for good "
            "(InMergeWrapper.recommended(..., transient=False))"
        )
    noise = settings.direction in ("gaussian", "multiplicative")
    if noise and is_schedule_free(optimizer) and not settings.transient:
        raise RuntimeError(
            f"the averages of {type(optimizer).__name__} cannot follow "
            f"direction={settings.direction!r}: use direction='partner', or "
            "transient=True"
        )


def stepping_optimizer(optimizer: Any) -> Optimizer:
    """Returns the torch optimizer whose step() writes the weights, inside any other wrappers."""
    kinds = type(optimizer).__mro__
    names = {kind.__name__ for kind in kinds}
    packages = {kind.__module__.partition(".")[0] for kind in kinds}
    if packages & {"deepspeed", "megatron"} or names & _STEPS_COPIES:
        raise RuntimeError(
            f"{type(optimizer).__name__} steps copies of the weights and overwrites what is "
            "merged; train with DDP or FSDP2 (fully_shard) instead"
        )
    if any("ScheduleFree" in name for name in names) and not (
        isinstance(optimizer, Optimizer) and "schedulefree" in packages
    ):
        raise RuntimeError(
            f"{type(optimizer).__name__} keeps a second sequence of weights that cannot be merged "
            "too; use SGDScheduleFree, AdamWScheduleFree or RAdamScheduleFree of the package "
            "schedulefree"
        )
    if names & {"AcceleratedOptimizer", "LightningOptimizer"}:
        return stepping_optimizer(optimizer.optimizer)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"attach needs a torch.optim.Optimizer, got {type(optimizer).__name__}; where another "
            "object wraps the optimizer, attach the wrapped one, or call model.merge_() after "
            "each step"
        )
    inner = getattr(optimizer, "base_optimizer", None)
    if isinstance(inner, Optimizer):
        return stepping_optimizer(inner)
    flat = (
        type(p).__name__ == "FlatParameter" or hasattr(p, "_is_flat_param")
        for p in _parameters_of(optimizer)
    )
    if any(flat):
        raise RuntimeError(
            "FSDP1 flattens the weights, so that no kernel can be found in them; use FSDP2 "
            "(fully_shard, or fsdp_version: 2 in Accelerate) or DDP"
        )
    if not hasattr(optimizer, "_optimizer_step_post_hooks"):
        raise TypeError(
            f"{type(optimizer).__name__} never called Optimizer.__init__, so its steps run no "
            "hooks; attach the optimizer inside it, or call model.merge_() after each step"
        )
    return optimizer


def _parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """Returns the parameters in the optimizer's groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def _parameters_in(layers: Sequence[MergedLayer]) -> list[nn.Parameter]:
    """Returns the parameters of all layers."""
    return [p for layer in layers for p in layer.parameters]


def _where(layers: Layers, is_wanted: Callable[[MergedLayer], bool]) -> Layers:
    """Returns the layers for which a condition holds."""
    return layers.at([place for place, layer in enumerate(layers) if is_wanted(layer)])


def _lists_of(optimizers: Sequence[Optimizer]) -> list[list[nn.Parameter]]:
    """Returns the list of each parameter group of each optimizer."""
    return [group["params"] for optimizer in optimizers for group in optimizer.param_groups]


def _first_moments(optimizer: Optimizer, weight: nn.Parameter) -> list[Tensor]:
    """Returns SGD's momentum or Adam's first moment of a weight, if it exists yet."""
    # timm's Lookahead keeps the moments in the optimizer that it wraps.
    state = getattr(optimizer, "_base_optimizer", optimizer).state
    of_weight = state.get(weight, {})
    moments = (of_weight.get(key) for key in ("momentum_buffer", "exp_avg"))
    # Some optimizers keep their moments in fewer dimensions, where no kernel can be found.
    return [m for m in moments if m is not None and m.shape == weight.shape]


def companions(
    optimizer: Optimizer | None, layers: Sequence[MergedLayer], *, moments: bool
) -> tuple[dict[int, list[Store]], str | None]:
    """Returns the tensors of an optimizer that change like the weights.

    Args:
        optimizer: The optimizer that steps, if any.
        layers: The layers that merge.
        moments: Whether to include first moments; the averages of a schedule-free optimizer
            are always included.

    Returns:
        Number of each layer -> its tensors; and why a layer's moments cannot follow, if so.

    Raises:
        RuntimeError: If a schedule-free optimizer averages the tensors that a weight is computed
            from.
    """
    found: dict[int, list[Store]] = {}
    problem = None
    if optimizer is None or not (moments or is_schedule_free(optimizer)):
        return found, problem
    for layer in layers:
        tensors = _averaged_sequences(optimizer, layer.module)
        if moments:
            weight, *magnitude = layer.parameters
            first = [] if magnitude else _first_moments(optimizer, weight)
            tensors = first + tensors
            if not first and problem is None:
                problem = (
                    f"the weight of {layer.site.name} is computed from a direction and a "
                    "magnitude, whose moments cannot be blended"
                    if magnitude
                    else f"{type(optimizer).__name__} keeps no momentum_buffer or exp_avg of "
                    f"the shape of {layer.site.name}.weight"
                )
        found[layer.number] = [tensor_store(tensor, layer.store.layout) for tensor in tensors]
    return found, problem


def refuse_capture(what: str) -> None:
    """Raises a RuntimeError where a CUDA graph is being captured."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"a CUDA graph would repeat the pairs drawn at capture in every replay: run {what} "
            "outside the graph"
        )


def is_schedule_free(optimizer: Optimizer) -> bool:
    """Returns whether an optimizer is one of the package ``schedulefree``."""
    return any(kind.__module__.startswith("schedulefree.") for kind in type(optimizer).__mro__)


def _averaged_sequences(optimizer: Optimizer, conv: nn.Module) -> list[Tensor]:
    """Returns the weight sequences that a schedule-free optimizer averages.

    Its steps are linear in them: if the same kernels are blended in each, the average that is
    evaluated at the end is merged exactly like the weights that are trained.

    Raises:
        RuntimeError: If the weight is computed from other tensors.
    """
    if not is_schedule_free(optimizer):
        return []
    weight = conv._parameters.get("weight")
    if weight is None:
        raise RuntimeError(
            "schedule-free optimizers average the stored tensors of a weight that is computed "
            "(weight_norm, spectral_norm, pruning), which merging cannot follow; remove the "
            "parametrisation or use another optimizer"
        )
    state = optimizer.state.get(weight, {})
    return [state[key] for key in ("x", "y", "z") if key in state]


def reshard(model: nn.Module) -> None:
    """Reshards every FSDP2 weight, so that it shows the step that its optimizer just took.

    After a forward pass without a backward pass, as in evaluation, FSDP2 leaves the weights of
    its root unsharded, where they would not show the step.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    for module in model.modules():
        if any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__):
            cast(Any, module).reshard()


def _is_registered(handle: RemovableHandle) -> bool:
    """Returns whether the hook of a handle is still registered; anyone may have removed it."""
    hooks = handle.hooks_dict_ref()
    return hooks is not None and handle.id in hooks


def is_nested_step(optimizer: Optimizer) -> bool:
    """Returns whether this hook runs inside another step() of the same optimizer.

    If a subclass calls super().step(), torch runs the hooks in both. The call stack shows this,
    and unlike a counter it stays right when a step raises. torch.compile runs steps under another
    code object of the same name and place.
    """
    steps = [vars(kind)["step"] for kind in type(optimizer).__mro__ if "step" in vars(kind)]
    hooked = [step for step in steps if hasattr(step, "hooked")]
    if len(hooked) < 2:
        return False
    patched = [_place(step.__code__) for step in hooked]
    frame, depth = sys._getframe(), 0
    while frame is not None:
        arguments = frame.f_locals.get("args") if _place(frame.f_code) in patched else None
        if arguments and arguments[0] is optimizer:
            depth += 1
        frame = frame.f_back  # type: ignore[assignment]
    return depth > 1


def is_no_training_step() -> bool:
    """Returns whether this hook runs in a step that a library takes for another purpose.

    Two such steps are known. Only their callers identify them: a learning rate of 0 does not,
    because warm-ups begin with it, and neither does a gradient that was used before.

    - ``torch.distributed.checkpoint.state_dict.get_optimizer_state_dict`` and its ``set_`` twin
      (and with them Accelerate's FSDP2 resume) create a fresh optimizer's state with a step
      of zero gradients and a learning rate of 0 before they load.
    - Lightning's StochasticWeightAveraging steps once at the end of the epoch in which it
      recalibrates BatchNorm and skips all backward passes.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        name = frame.f_code.co_name
        if name == "_init_optim_state" or (
            name == "_optimizer_step"
            and getattr(frame.f_locals.get("self"), "_skip_backward", False) is True
        ):
            return True
        frame = frame.f_back
    return False


def _place(code: CodeType) -> tuple[str, str, int]:
    return code.co_filename, code.co_name, code.co_firstlineno
