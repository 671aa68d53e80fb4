"""The attached optimizers: which one steps which layer, and what the library must know of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from inmerge_wrap.kernels import (
    MergedLayer,
    Store,
    deciding_parameter,
    find_layers,
    is_sharded,
    replaced,
    tensor_store,
)
from inmerge_wrap.settings import NOISE, MergeSettings
from inmerge_wrap.unwrapping import class_names, unwrap

# By name, so that nothing is imported: they write the weights from copies of their own.
_STEPS_COPIES = {"DeepSpeedOptimizerWrapper", "MegatronLMOptimizerWrapper", "DummyOptim"}

_COUNTERS = "inmerge"  # key in an optimizer's state dict: one entry for each wrapper attached to it


class Attachment:
    """An optimizer whose steps merge: the handle that ``attach`` returns.

    It keeps no strong reference to the optimizer, or a copy of the wrapper would take it along. Of
    its hooks, that of the steps comes first. The bound method ``ended`` is called when the
    optimizer is gone or the attachment removed: a compiled forward pass does not look for itself.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        handles: Sequence[RemovableHandle],
        ended: Callable[[], None],
    ) -> None:
        told = weakref.WeakMethod(ended)

        def end(_: Any = None) -> None:
            if (call := told()) is not None:
                call()

        self._optimizer = weakref.ref(optimizer, end)
        self._handles, self._end = handles, end
        self.merged: set[int] = set()  # numbers of all layers that its steps are to merge

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer, as long as it exists."""
        return self._optimizer()

    @property
    def is_live(self) -> bool:
        """Whether its steps still merge; anyone may have removed the hook."""
        hooks = self._handles[0].hooks_dict_ref()
        return self.optimizer is not None and hooks is not None and self._handles[0].id in hooks

    def remove(self) -> None:
        """Stops merging with the steps of this optimizer."""
        for handle in self._handles:
            handle.remove()
        self._end()


class Attachments:
    """The optimizers whose steps merge, in the order in which they were attached.

    If two hold the same layer, the one attached last merges it.
    """

    def __init__(self) -> None:
        self._known: list[Attachment] = []

    def __len__(self) -> int:
        return len(self._known)

    def add(self, attachment: Attachment) -> None:
        """Records an attachment, and forgets those of the same optimizer or of none."""
        gone = (None, attachment.optimizer)  # or attached again, after its hooks were removed
        self._known = [known for known in self._known if known.optimizer not in gone]
        self._known.append(attachment)

    def of(self, optimizer: Optimizer) -> Attachment | None:
        """Returns the attachment of an optimizer that is attached."""
        return next((k for k in self._known if k.optimizer is optimizer and k.is_live), None)

    @property
    def live(self) -> list[Optimizer]:
        """The optimizers that still exist and whose hooks have not been removed."""
        return [known.optimizer for known in self._known if known.is_live and known.optimizer]

    def miss(self, optimizer: Optimizer) -> bool:
        """Returns whether an optimizer was never attached and none was detached on purpose."""
        detached = any(k.optimizer is not None and not k.is_live for k in self._known)
        return not detached and all(k.optimizer is not optimizer for k in self._known)

    def held_by(self, optimizer: Optimizer, layers: Sequence[MergedLayer]) -> list[MergedLayer]:
        """Returns the layers that the optimizer holds and no optimizer attached later does."""
        live = self.live
        later = live[live.index(optimizer) + 1 :] if optimizer in live else []
        mine = ids_of(optimizer).difference(*map(ids_of, later))
        return [
            each for each in layers if each.parameters and mine.issuperset(map(id, each.parameters))
        ]


def trained_by(optimizer: Optimizer, layers: Sequence[MergedLayer]) -> list[MergedLayer]:
    """Returns the layers whose weight an optimizer trains, whatever computes the weight.

    If a weight has several parameters, the first decides: with an optimizer for each of them, only
    one counts the steps of the layer.
    """
    mine = ids_of(optimizer)
    return [
        layer
        for layer in layers
        # What took the place of a convolution may have no parameter at all.
        if isinstance(layer.module, _ConvNd) and id(deciding_parameter(layer.module)) in mine
    ]


def trained_of(layers: Sequence[MergedLayer]) -> list[MergedLayer]:
    """Returns the layers that are not frozen."""
    return [layer for layer in layers if all(p.requires_grad for p in layer.parameters)]


def stepped_of(layers: Sequence[MergedLayer], optimizer: Optimizer) -> list[MergedLayer]:
    """Returns the layers that a step has just moved: those whose weights have a gradient.

    A branch that did not run has none, nor has a backbone whose head alone is trained. Some
    optimizers drop all gradients in their step; then nothing can be known, and all layers count.
    """
    if all(parameter.grad is None for parameter in parameters_of(optimizer)):
        return list(layers)
    return [layer for layer in layers if any(p.grad is not None for p in layer.parameters)]


def check_held(
    optimizer: Optimizer,
    held: Sequence[MergedLayer],
    layers: Sequence[MergedLayer],
    network: nn.Module,
    *,
    to_write: bool,
) -> None:
    """Raises a ValueError if an optimizer trains none of the ``layers`` to merge.

    ``held`` are those that it does. Where merging writes no weight, any parameter of the network
    is enough, because its steps are only counted.
    """
    if to_write and not held:
        remedy = (
            "build it from the parameters of this model"
            if any(p.requires_grad for layer in layers for p in layer.parameters)
            else "they are frozen, and it was built from the other parameters. Attach the "
            "optimizer that trains them once they are unfrozen, or build this one from all "
            "parameters of the model"
        )
        raise ValueError(
            f"the optimizer holds none of the {len(layers)} weights to merge "
            f"({layers[0].site.name}, ...): {remedy}"
        )
    if ids_of(optimizer).isdisjoint(map(id, network.parameters())):
        raise ValueError(
            "the optimizer holds none of the parameters of this network: build it from "
            "model.parameters()"
        )


def check_still_held(
    attachment: Attachment, merging: Sequence[MergedLayer], layers: Sequence[MergedLayer]
) -> None:
    """Raises a RuntimeError if an attached optimizer lost weights that its steps trained before.

    ``merging`` are the layers that merge with this step, ``layers`` all of the plan.
    """
    attachment.merged.update(layer.number for layer in merging)
    optimizer = attachment.optimizer
    if optimizer is None or len(attachment.merged) == len(merging):
        return
    held = ids_of(optimizer)

    def is_lost(layer: MergedLayer) -> bool:
        trained = [p for p in layer.parameters if p.requires_grad]
        return not layer.parameters or not held.issuperset(map(id, trained))

    lost = [layer for layer in layers if layer.number in attachment.merged and is_lost(layer)]
    if not lost:
        return
    names = ", ".join(layer.site.name for layer in lost)
    for layer in lost:
        if not isinstance(layer.module, _ConvNd):  # FSDP1 takes the weight out but keeps the class
            raise RuntimeError(replaced(names, layer.module))
    if any(is_sharded(layer.store.weight) for layer in lost):
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


def refuse_per_image_gradients(layers: Sequence[MergedLayer]) -> None:
    """Raises where Opacus is to compute a gradient for each image.

    It takes the gradient of what leaves the convolution, with the blend of the outputs done, for
    that of the convolution's own output.
    """
    for layer in layers:
        if any(hasattr(parameter, "grad_sample") for parameter in layer.parameters):
            raise RuntimeError(
                f"Opacus would compute wrong gradients of {layer.site.name!r}, from the gradient "
                "of its output, which mode='outputs' blends: wrap the network with mode='weights' "
                "or mode='step'"
            )


def carry_counter(optimizers: Sequence[Any], wrapper: Any) -> list[RemovableHandle]:
    """Makes the state dict of an optimizer carry the step counter and statistics of a wrapper.

    Code that resumes an optimizer then resumes merging, even if the network's weights are saved
    without the wrapper (timm, Hugging Face's Trainer). A state dict without them loads too, and
    one with them loads into any optimizer. They are plain numbers, because libraries cast and move
    the tensors of such a state. No strong reference to the wrapper is kept.
    """
    known = weakref.ref(wrapper)

    def place_in(optimizer: Optimizer, wrapper: nn.Module) -> int:
        """Where the wrapper's parameters begin, as torch, too, knows parameters by their place."""
        mine = set(map(id, wrapper.parameters()))
        return next((n for n, p in enumerate(parameters_of(optimizer)) if id(p) in mine), -1)

    def after_save(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        if (wrapper := known()) is not None:
            entry = [place_in(optimizer, wrapper), wrapper.get_extra_state().tolist()]
            state_dict.setdefault(_COUNTERS, []).append(entry)

    def before_load(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        entries = state_dict.get(_COUNTERS)
        if (wrapper := known()) is None or not entries:
            return
        place = place_in(optimizer, wrapper)
        mine = next((entry for entry in entries if entry[0] == place), entries[0])
        # A copy made for the hooks. Those of the next wrapper find the other entries.
        state_dict[_COUNTERS] = [entry for entry in entries if entry is not mine]
        if mine[1] != wrapper.get_extra_state().tolist():  # else the statistics stay
            wrapper.set_extra_state(torch.tensor(mine[1], dtype=torch.float64, device="cpu"))

    inner = [getattr(optimizer, "_base_optimizer", None) for optimizer in optimizers]  # Lookahead
    handles = []
    for optimizer in {id(found): found for found in (*optimizers, *inner)}.values():
        # Some subclasses never call Optimizer.__init__; their state is that of another optimizer.
        held = vars(optimizer) if isinstance(optimizer, Optimizer) else {}
        if "_optimizer_state_dict_post_hooks" in held:
            handles.append(optimizer.register_state_dict_post_hook(after_save))
            handles.append(optimizer.register_load_state_dict_pre_hook(before_load))
    return handles


def refuse_second(optimizer: Optimizer, wrapper: Any, held: Sequence[MergedLayer]) -> None:
    """Raises a ValueError if the optimizer merges the same for another wrapper.

    That is one of the same network or, where weights are written, of one that shares a convolution
    that the optimizer holds.
    """
    for hook in optimizer._optimizer_step_post_hooks.values():
        other = getattr(hook, "__self__", None)
        if not isinstance(other, type(wrapper)):
            continue
        if unwrap(other) is unwrap(wrapper):
            raise ValueError(
                "the optimizer already merges for another InMergeWrapper of this network, and "
                "both would merge in each step: create a new optimizer, or detach the other "
                "wrapper with handle.remove(), where handle is what its attach() returned"
            )
        if other.mode != "step" or wrapper.mode != "step":
            continue
        theirs = find_layers(unwrap(other), other.plan.merged)
        merged = {id(parameter) for layer in theirs for parameter in layer.parameters}
        for layer in held:
            if not merged.isdisjoint(map(id, layer.parameters)):
                name = layer.site.name
                raise ValueError(
                    f"the optimizer already merges {name} for another InMergeWrapper, whose "
                    "network shares its weight, and both would merge it in each step: leave it out "
                    f"of one of them (exclude={name!r}), or wrap one module that holds both "
                    "networks"
                )


def check_settings(settings: MergeSettings, optimizer: Optimizer) -> None:
    """Raises a RuntimeError if settings do not work with an optimizer."""
    if settings.mode == "step" and settings.direction in NOISE and is_schedule_free(optimizer):
        raise RuntimeError(
            f"the averages of {type(optimizer).__name__} cannot follow "
            f"direction={settings.direction!r}: use direction='partner', or mode='weights'"
        )


def stepping_optimizer(optimizer: Any, *, to_write: bool) -> Optimizer:
    """Returns the torch optimizer whose step() writes the weights, inside any other wrappers.

    With ``to_write`` weights are written after its steps. Without, steps are only counted, and
    optimizers that write the weights from copies of their own work too.
    """
    inner = getattr(optimizer, "optimizer", None)
    if to_write:
        _refuse_copies(optimizer)
    elif class_names(optimizer) & _STEPS_COPIES and isinstance(inner, Optimizer):
        return stepping_optimizer(inner, to_write=False)
    if (bare := unprepared(optimizer)) is not optimizer:
        return stepping_optimizer(bare, to_write=to_write)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"attach needs a torch.optim.Optimizer, got {type(optimizer).__name__}; where another "
            "object wraps the optimizer, attach the wrapped one, or call model.merge_() after "
            "each step"
        )
    base = getattr(optimizer, "base_optimizer", None)
    if isinstance(base, Optimizer):
        return stepping_optimizer(base, to_write=to_write)
    if not hasattr(optimizer, "_optimizer_step_post_hooks"):
        raise TypeError(
            f"{type(optimizer).__name__} never called Optimizer.__init__, so its steps run no "
            "hooks; attach the optimizer inside it, or call model.merge_() after each step"
        )
    return optimizer


def unprepared(optimizer: Any) -> Any:
    """Returns what Accelerate or Lightning wrapped, which runs no code of theirs in its steps."""
    prepared = {"AcceleratedOptimizer", "LightningOptimizer", "_FabricOptimizer"}
    return unprepared(optimizer.optimizer) if class_names(optimizer) & prepared else optimizer


def _refuse_copies(optimizer: Any) -> None:
    """Raises a RuntimeError for an optimizer that writes the weights from copies of its own."""
    names = class_names(optimizer)
    packages = {kind.__module__.partition(".")[0] for kind in type(optimizer).__mro__}
    forward = "or merge in the forward pass, which writes no weight (mode='outputs')"
    if packages & {"deepspeed", "megatron"} or names & _STEPS_COPIES:
        raise RuntimeError(
            f"{type(optimizer).__name__} steps copies of the weights and overwrites what is "
            f"merged; train with DDP or FSDP2 (fully_shard) instead, {forward}"
        )
    if any("ScheduleFree" in name for name in names) and not (
        isinstance(optimizer, Optimizer) and "schedulefree" in packages
    ):
        raise RuntimeError(
            f"{type(optimizer).__name__} keeps a second sequence of weights that cannot be merged "
            "too; use SGDScheduleFree, AdamWScheduleFree or RAdamScheduleFree of the package "
            f"schedulefree, {forward}"
        )
    held = parameters_of(optimizer) if isinstance(optimizer, Optimizer) else []
    if any(type(p).__name__ == "FlatParameter" or hasattr(p, "_is_flat_param") for p in held):
        raise RuntimeError(
            "FSDP1 flattens the weights, so that no kernel can be found in them; use FSDP2 "
            f"(fully_shard, or fsdp_version: 2 in Accelerate) or DDP, {forward}"
        )


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """Returns the parameters in the optimizer's groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def ids_of(optimizer: Optimizer) -> set[int]:
    """Returns the ids of the parameters in the optimizer's groups."""
    return set(map(id, parameters_of(optimizer)))


def companions(
    optimizer: Optimizer | None, layers: Sequence[MergedLayer], *, moments: bool
) -> tuple[dict[int, list[Store]], str | None]:
    """Returns the tensors of an optimizer that change like the weights, by number of the layer.

    These are the averages of a schedule-free optimizer, and the first moments if they are asked
    for; the second result says why those of a layer cannot follow, if so.
    """
    found: dict[int, list[Store]] = {}
    problem = None
    if optimizer is None or not (moments or is_schedule_free(optimizer)):
        return found, problem
    for layer in layers:
        tensors = _averaged_sequences(optimizer, layer.module)
        if moments:
            weight, *magnitude = layer.parameters
            kept = {} if magnitude else optimizer.state.get(weight, {})
            first = [kept[key] for key in ("momentum_buffer", "exp_avg") if key in kept]
            # Some optimizers keep them in fewer dimensions, where no kernel can be found.
            first = [each for each in first if each is not None and each.shape == weight.shape]
            tensors = first + tensors
            if magnitude:
                problem = problem or (
                    f"the weight of {layer.site.name} is computed from a direction and a "
                    "magnitude, whose moments cannot be blended"
                )
            elif not first:
                problem = problem or (
                    f"{type(optimizer).__name__} keeps no momentum_buffer or exp_avg of the shape "
                    f"of {layer.site.name}.weight"
                )
        found[layer.number] = [tensor_store(tensor, layer.store.layout) for tensor in tensors]
    return found, problem


def is_schedule_free(optimizer: Optimizer) -> bool:
    """Returns whether an optimizer is one of the package ``schedulefree``."""
    return any(kind.__module__.startswith("schedulefree.") for kind in type(optimizer).__mro__)


def _averaged_sequences(optimizer: Optimizer, conv: nn.Module) -> list[Tensor]:
    """Returns the weight sequences that a schedule-free optimizer averages.

    Its steps are linear in them: if the same kernels are blended in each, the average that is
    evaluated at the end is merged exactly like the weights that are trained.
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


def fsdp_modules(model: nn.Module) -> list[Any]:
    """Returns the modules that FSDP2 shards.

    After a forward pass without a backward pass, as in evaluation, FSDP2 leaves the weights of its
    root unsharded, where they would not show the step that the optimizer took: call ``reshard()``.
    """
    return [module for module in model.modules() if "FSDPModule" in class_names(module)]
