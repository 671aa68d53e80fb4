"""Which calls of ``step()`` are steps of a training."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from functools import cache
from types import CodeType, FrameType
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

_listeners: set[weakref.WeakMethod[Callable[[Optimizer], None]]] = set()


def notice_every_step(listener: Callable[[Optimizer], None]) -> None:
    """Calls a bound method after each step of any optimizer in this process.

    This detects a loop that forgot to attach its optimizer, or that replaced it. No strong
    reference to the object of the method is kept.
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
        if (listener := reference()) is not None:
            listener(optimizer)


def is_captured() -> bool:
    """Returns whether a CUDA graph is being captured, which repeats what the device does now."""
    if torch.compiler.is_compiling() or not torch.cuda.is_available():
        return False
    return torch.cuda.is_current_stream_capturing()


def refuse_recording() -> None:
    """Raises a RuntimeError where a forward pass is exported or traced, with its draw for good."""
    # PyTorch 2.6 cannot say that it exports.
    is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)
    if is_exporting() or torch.jit.is_tracing():
        raise RuntimeError(
            "torch.export and torch.jit.trace would keep the pairs of one forward pass for good: "
            "call model.eval() first, and give them the network, model.module"
        )


def refuse_capture(what: str) -> None:
    """Raises a RuntimeError where a CUDA graph is being captured."""
    if is_captured():
        raise RuntimeError(
            f"a CUDA graph would repeat the pairs drawn at capture in every replay: run {what} "
            "outside the graph"
        )


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
    depth = 0
    for frame in callers():
        arguments = frame.f_locals.get("args") if _place(frame.f_code) in patched else None
        if arguments and arguments[0] is optimizer:
            depth += 1
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
    for frame in callers():
        name = frame.f_code.co_name
        if name == "_init_optim_state":
            return True
        if name == "_optimizer_step":
            if getattr(frame.f_locals.get("self"), "_skip_backward", False) is True:
                return True
    return False


def callers() -> Iterator[FrameType]:
    """Yields the frames that are running, from that of the caller outwards."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _place(code: CodeType) -> tuple[str, str, int]:
    return code.co_filename, code.co_name, code.co_firstlineno
