"""What the library must know of optimizers: whose step counts, what it trains, what it keeps."""

from __future__ import annotations

import sys
import weakref
from dataclasses import dataclass
from types import CodeType
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

__all__ = [
    "Attachment",
    "averaged_sequences",
    "first_moments",
    "held_parameters",
    "is_nested_step",
    "is_registered",
    "reshard",
    "stepping_optimizer",
]

# By name: they write the weights from copies of their own.
_STEPS_COPIES = {"DeepSpeedOptimizerWrapper", "MegatronLMOptimizerWrapper", "DummyOptim"}


@dataclass
class Attachment:
    """An optimizer that merges after its steps."""

    optimizer: weakref.ref[Optimizer]
    handle: RemovableHandle
    layers: set[int]  # all that the optimizer ever merged


def stepping_optimizer(optimizer: Any) -> Optimizer:
    """The torch optimizer whose step() writes the weights, behind the wrappers of others."""
    kinds = type(optimizer).__mro__
    names = {kind.__name__ for kind in kinds}
    packages = {kind.__module__.partition(".")[0] for kind in kinds}
    if packages & {"deepspeed", "megatron"} or names & _STEPS_COPIES:
        raise RuntimeError(
            f"{type(optimizer).__name__} steps copies of the weights and overwrites what is "
            "merged; train with DDP or FSDP2 (fully_shard) instead, a CNN fits both"
        )
    if any("ScheduleFree" in name for name in names) and not (
        isinstance(optimizer, Optimizer) and "schedulefree" in packages
    ):
        raise RuntimeError(
            f"{type(optimizer).__name__} keeps a second sequence of weights that can not be merged "
            "along; use SGDScheduleFree, AdamWScheduleFree or RAdamScheduleFree of the package "
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
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if any(type(p).__name__ == "FlatParameter" or hasattr(p, "_is_flat_param") for p in parameters):
        raise RuntimeError(
            "FSDP1 flattens the weights, so that no kernel can be found in them; use FSDP2 "
            "(fully_shard, or fsdp_version: 2 in Accelerate) or DDP"
        )
    if not hasattr(optimizer, "_optimizer_step_post_hooks"):
        raise TypeError(
            f"{type(optimizer).__name__} never called Optimizer.__init__, so its steps run no "
            "hooks; attach the optimizer inside of it, or call model.merge_() after each step"
        )
    return optimizer


def held_parameters(optimizer: Optimizer) -> set[int]:
    """Identities of the parameters in the optimizer's groups."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def first_moments(optimizer: Optimizer, weight: nn.Parameter) -> list[Tensor]:
    """SGD's momentum or Adam's first moment of a weight, where there is one yet."""
    # timm's Lookahead keeps the moments in the optimizer that it wraps.
    state = getattr(optimizer, "_base_optimizer", optimizer).state
    of_weight = state.get(weight, {})
    moments = (of_weight.get(key) for key in ("momentum_buffer", "exp_avg"))
    # Some optimizers keep their moments in fewer dimensions; those are no kernels.
    return [m for m in moments if m is not None and m.shape == weight.shape]


def averaged_sequences(optimizer: Optimizer, conv: nn.Conv2d) -> list[Tensor]:
    """The sequences of weights that a schedule-free optimizer averages beside the parameter.

    Its steps are linear in them: with the same kernels blended in each, the average that is
    evaluated in the end is merged exactly as the point that is trained.

    Raises:
        RuntimeError: If the weight is computed from other tensors.
    """
    if not any(kind.__module__.startswith("schedulefree.") for kind in type(optimizer).__mro__):
        return []
    weight = conv._parameters.get("weight")
    if weight is None:
        raise RuntimeError(
            "schedule-free optimizers average the stored tensors of a weight that is computed "
            "(weight_norm, spectral_norm, pruning), which merging can not follow; remove the "
            "parametrisation or use another optimizer"
        )
    state = optimizer.state.get(weight, {})
    return [state[key] for key in ("x", "y", "z") if key in state]


def reshard(model: nn.Module) -> None:
    """Brings every weight of FSDP2 back to the shards that its optimizer has just stepped.

    After a forward pass without a backward pass, as in evaluation, FSDP2 leaves the weights of
    its root unsharded, and they would not show the step.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    for module in model.modules():
        if any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__):
            cast(Any, module).reshard()


def is_registered(handle: RemovableHandle) -> bool:
    """Whether the hook of a handle still stands, although anybody may have removed it."""
    hooks = handle.hooks_dict_ref()
    return hooks is not None and handle.id in hooks


def is_nested_step(optimizer: Optimizer) -> bool:
    """Whether this hook runs inside of another step() of the same optimizer.

    Where a subclass calls super().step(), torch runs the hooks in both. The stack tells, and
    unlike a counter it stays right when a step raises. torch.compile runs steps under another
    code object of the same name and place.
    """
    steps = [vars(kind)["step"] for kind in type(optimizer).__mro__ if "step" in vars(kind)]
    patched = [_place(step.__code__) for step in steps if hasattr(step, "hooked")]
    if len(patched) < 2:
        return False
    frame, depth = sys._getframe(), 0
    while frame is not None:
        arguments = frame.f_locals.get("args") if _place(frame.f_code) in patched else None
        if arguments and arguments[0] is optimizer:
            depth += 1
        frame = frame.f_back  # type: ignore[assignment]
    return depth > 1


def _place(code: CodeType) -> tuple[str, str, int]:
    return code.co_filename, code.co_name, code.co_firstlineno
