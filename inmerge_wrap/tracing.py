"""Traces one forward pass of any network: which convolutions run, in which order, on what.

The pass runs on a copy whose tensors are on the meta device. If that is not possible, the real
network runs once, and everything that it may change is restored.
"""

from __future__ import annotations

import copy
import random
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from inmerge_wrap.inputs import (
    Arguments,
    call_arguments,
    is_quantised,
    on_device_of,
    tensors_of,
    to_meta,
)

_HOOK_DICTS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


@dataclass
class Call:
    """What one forward pass revealed about one convolution."""

    inputs: list[torch.Size] = field(default_factory=list)
    outputs: list[torch.Size] = field(default_factory=list)
    used_own_weight: bool = False
    is_called: bool = False  # as a module, so that its hooks ran too
    is_whole: bool = True  # returned what its convolution gave, with nothing computed after it

    def is_dense(self, kernel_size: tuple[int, ...]) -> bool:
        """Returns whether the kernel covers the whole map, as of 1x1 a single position."""
        dims = len(kernel_size)
        covered = all(tuple(shape[-dims:]) == kernel_size for shape in self.inputs)
        return covered and all(shape[-dims:].numel() == 1 for shape in self.outputs)


@dataclass
class Trace:
    """What one forward pass revealed about a network."""

    calls: dict[str, Call] = field(default_factory=dict)  # in order of the first
    predictions: dict[str, bool] = field(default_factory=dict)
    """Convolutions whose output no other layer reads -> whether it ends as one vector per image."""
    summed: set[str] = field(default_factory=set)
    """Convolutions whose output no other layer reads but in a sum with one that another reads."""
    activated: set[str] = field(default_factory=set)
    """Convolutions of either whose output passes an activation of hidden layers."""
    unread: set[str] = field(default_factory=set)
    """Convolutions whose output was neither read nor returned, as far as could be seen."""
    outputs: list[torch.Size] = field(default_factory=list)  # of what the network returned


_OTHER_LAYER = "a layer that is not a convolution"


class _Watch(TorchFunctionMode):
    """Intercepts a forward pass: which convolution runs, and which layer reads its output.

    The output of a layer belongs to that layer until another layer reads it. An output that
    belongs to no other layer when it leaves the network, or when ``detach`` cuts it off, is a
    prediction.
    """

    def __init__(self, owners: Mapping[int, list[str]], trace: Trace, shapes_only: bool) -> None:
        super().__init__()
        self._owners, self._trace, self._shapes_only = owners, trace, shapes_only
        self._running = ""  # the convolution whose module is being called
        self._given: tuple[Tensor, int] | None = None  # by the last convolution, and its version
        self._layers_of = WeakTensorKeyDictionary()  # tensor -> names of the layers it comes from
        self._read: set[str] = {_OTHER_LAYER}
        self._summed: set[str] = set()
        self._cut: set[str] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        result: Any
        if self._shapes_only and func in _KEEPS_SHAPE and args:
            result = torch.empty_like(args[0])  # on meta tensors these take most of the time
        elif self._shapes_only and name in _RECURRENT and isinstance(args[3], bool):  # not packed
            result = _recurrent_shapes(*args)
        else:
            result = func(*args, **kwargs)
        outputs = tensors_of(result)
        if not outputs:
            if name == "__setitem__":
                self._layers_of[args[0]] = self._sources([args[0], args[2]])
            return result
        operands = tensors_of((args, kwargs))
        sources = self._sources(operands)
        if name == "detach":
            self._cut |= sources
            sources = frozenset()
        elif name in _LAYERS or any(isinstance(tensor, nn.Parameter) for tensor in operands):
            self._read |= sources
            sources = frozenset([_OTHER_LAYER])
        else:
            if sources & (self._read | self._summed):  # a sum with features is features too
                self._summed |= sources
            if name in _HIDDEN_ACTIVATIONS:
                self._trace.activated |= sources
        if func in _CONVOLUTIONS:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            owners = self._owners.get(id(weight))
            if owners:
                owner = self._running if self._running in owners else owners[0]
                call = self._trace.calls.setdefault(owner, Call())
                call.used_own_weight = True
                call.inputs.append((args[0] if args else kwargs["input"]).shape)
                call.outputs.append(result.shape)
                sources = frozenset([owner])
            self._given = result, _version_of(result)
        if sources:
            for tensor in outputs:
                if tensor.is_floating_point():  # an index or a mask carries no features
                    self._layers_of[tensor] = sources
        return result

    def enter(self, name: str, *_: Any) -> None:
        """Records that a convolution is called as a module."""
        self._running, self._given = name, None

    def leave(self, name: str, _: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Records input and output, whatever the convolution's forward pass computed."""
        self._running = ""
        call = self._trace.calls.setdefault(name, Call())
        call.is_called = True
        if self._given is not None:  # it ran a convolution, with its own weight or a computed one
            given, version = self._given
            is_as_given = output is given and _version_of(output) == version
            call.is_whole = call.is_whole and is_as_given
        if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            call.inputs.append(inputs[0].shape)
            call.outputs.append(output.shape)
            self._read |= self._sources([inputs[0]]) - {name}
            self._layers_of[output] = frozenset([name])

    def note_predictions(self, output: Any) -> None:
        """Finds the convolutions whose outputs are the network's."""
        for tensor in tensors_of(output):
            self._trace.outputs.append(tensor.shape)
            for name in self._sources([tensor]):
                self._trace.predictions[name] = tensor.ndim == 2
        for name in self._cut:
            self._trace.predictions.setdefault(name, False)
        self._trace.summed = self._trace.predictions.keys() & self._summed - self._read
        for name in self._read | self._summed:
            self._trace.predictions.pop(name, None)
        used = self._read | self._summed | self._trace.predictions.keys()
        self._trace.unread = self._trace.calls.keys() - used

    def _sources(self, tensors: Sequence[Any]) -> frozenset[str]:
        known = [
            self._layers_of[t] for t in tensors if isinstance(t, Tensor) and t in self._layers_of
        ]
        return known[0] if len(known) == 1 else frozenset().union(*known)


def _version_of(tensor: Tensor) -> int:
    """Returns how often a tensor was written in place, which inference mode does not count."""
    return 0 if tensor.is_inference() else tensor._version


_CONVOLUTIONS = {
    *(torch.conv1d, torch.conv2d, torch.conv3d),
    *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
}
_RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}
_LAYERS = {
    *("linear", "bilinear", "embedding", *_RECURRENT),
    *(convolution.__name__ for convolution in _CONVOLUTIONS),
    *("batch_norm", "instance_norm", "layer_norm", "group_norm", "rms_norm"),
}
_HIDDEN_ACTIVATIONS = {
    f"{name}{in_place}"
    for name in ("relu", "relu6", "leaky_relu", "elu", "selu", "celu", "rrelu", "hardtanh")
    for in_place in ("", "_")
} | {"gelu", "silu", "mish", "hardswish", "softplus", "prelu", "glu"}
_KEEPS_SHAPE = {
    *(F.batch_norm, F.layer_norm, F.group_norm),
    *(F.relu, F.gelu, F.silu, F.hardswish, F.hardsigmoid),
}


def _recurrent_shapes(
    inputs: Tensor,
    states: Any,
    _weights: Any,
    _biases: bool,
    _layers: int,
    _dropout: float,
    _training: bool,
    is_bidirectional: bool,
    *_: Any,
) -> tuple[Tensor, ...]:
    """Returns empty results of an LSTM, GRU or RNN, which meta tensors pass step by step."""
    held = [states] if isinstance(states, Tensor) else states
    width = held[0].shape[-1] * (2 if is_bidirectional else 1)
    outputs = inputs.new_empty((*inputs.shape[:-1], width))
    return outputs, *(torch.empty_like(state) for state in held)


def run_trace(
    model: nn.Module, arguments: Arguments, *, training: bool = False, shapes_only: bool = True
) -> Trace:
    """Runs one forward pass and records which convolutions ran, in which order, on what.

    The network has no hooks of its users; with ``shapes_only`` its tensors are on the meta device.
    """
    trace = Trace()
    owners: dict[int, list[str]] = {}
    convs = convs_of(model)
    for name, conv in convs.items():
        if conv._parameters.get("weight") is not None:
            owners.setdefault(id(conv.weight), []).append(name)
    watch = _Watch(owners, trace, shapes_only)
    for module in model.modules():
        module.training = training  # without train(), which networks override
    handles = []
    for name, conv in convs.items():
        handles.append(conv.register_forward_pre_hook(partial(watch.enter, name)))
        handles.append(conv.register_forward_hook(partial(watch.leave, name)))
    try:
        with torch.no_grad(), watch:
            output = model(*arguments[0], **arguments[1])
        watch.note_predictions(output)
    except Exception as error:  # the network's own code ran here
        raise _ForwardFailed(len(trace.calls), error) from error
    finally:
        for handle in handles:
            handle.remove()
    return trace


class _ForwardFailed(Exception):
    """A forward pass raised an error after some number of convolutions had run."""

    def __init__(self, calls: int, error: Exception) -> None:
        super().__init__(calls, error)
        self.calls, self.error = calls, error


def convs_of(model: nn.Module) -> dict[str, _ConvNd]:
    """Returns the convolutions of a network in the order of registration, shared ones once."""
    return {
        name: cast(_ConvNd, module)
        for name, module in model.named_modules()
        if isinstance(module, _ConvNd) or is_quantised(module)
    }


def _is_lazy(module: nn.Module) -> bool:
    return isinstance(module, LazyModuleMixin) and module.has_uninitialized_params()


def _own_hooks(hooks: Mapping[int, Any]) -> OrderedDict[int, Any]:
    """Returns torch's own hooks, which compute weights (weight_norm, pruning) and lazy shapes."""
    return OrderedDict(
        (key, hook)
        for key, hook in hooks.items()
        if type(hook).__module__.startswith("torch.nn.utils")
        or getattr(hook, "__func__", None) is LazyModuleMixin._infer_parameters
    )


class _CloneToMeta(TorchFunctionMode):
    """Copies made inside have no memory, wherever the copied object keeps its tensors."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            return memo.setdefault(id(tensor), _meta_tensor(tensor))
        if func is Tensor.clone:
            return _meta_tensor(args[0])
        return func(*args, **(kwargs or {}))


def meta_copy(model: nn.Module) -> nn.Module:
    """Returns a copy of the network on the meta device, without the users' hooks."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        # A lazy layer's hook is bound to the layer and must be copied with it.
        for name in () if _is_lazy(module) else _HOOK_DICTS:
            memo[id(getattr(module, name))] = _own_hooks(getattr(module, name))
        tensors = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
        for tensor in tensors:
            if isinstance(tensor, Tensor) and id(tensor) not in memo:
                memo[id(tensor)] = _meta_tensor(tensor)
    with _CloneToMeta():
        twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        for name in _HOOK_DICTS if _is_lazy(module) else ():
            setattr(module, name, _own_hooks(getattr(module, name)))
    return twin


def _meta_tensor(tensor: Tensor) -> Tensor:
    if isinstance(tensor, nn.parameter.UninitializedParameter | nn.parameter.UninitializedBuffer):
        return cast(Any, type(tensor))(device="meta", dtype=tensor.dtype)
    shape_only = torch.empty_like(tensor, device="meta", requires_grad=False)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(shape_only, requires_grad=tensor.requires_grad)
    return shape_only


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Runs the real network without its users' hooks, and restores everything afterwards."""
    modules = list(model.modules())
    attributes = [dict(vars(module)) for module in modules]
    contents = [
        (held, dict(held))
        for module in modules
        for held in (module._parameters, module._buffers, module._modules)
    ]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        for module in modules:
            for name in _HOOK_DICTS:
                setattr(module, name, _own_hooks(getattr(module, name)))
        yield
    finally:
        for module, kept in zip(modules, attributes, strict=True):
            vars(module).clear()
            vars(module).update(kept)
        for held, content in contents:
            held.clear()
            held.update(cast(Any, content))
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


@contextmanager
def bystanders_kept(network: nn.Module) -> Iterator[None]:
    """Restores what forward passes may change besides the network: generators, hooks, compilers."""
    devices = {p.device.index for p in network.parameters() if p.device.type == "cuda"}
    python_state = random.getstate()
    numpy_random: Any = sys.modules.get("numpy.random")
    numpy_state = None if numpy_random is None else numpy_random.get_state()
    global_hooks = [
        (hooks, dict(hooks))
        for name, hooks in vars(torch.nn.modules.module).items()
        if name in {f"_global{hooks}" for hooks in _HOOK_DICTS}
    ]
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=sorted(devices)))
        if "torch._dynamo" in sys.modules:  # else nothing can have been compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            for hooks, _ in global_hooks:
                hooks.clear()
            yield
        finally:
            for hooks, kept in global_hooks:
                hooks.update(kept)
            random.setstate(python_state)
            if numpy_random is not None:
                numpy_random.set_state(numpy_state)


def trace_on_meta(
    network: nn.Module, candidates: Sequence[Arguments], *, training: bool = False
) -> tuple[Trace | None, list[_ForwardFailed]]:
    """Returns the trace of the first inputs that a copy takes, and why it took no others."""
    try:
        twin = meta_copy(network)
    except Exception as error:  # networks may hold anything, and copying it may raise anything
        return None, [_ForwardFailed(0, error)]
    failures: list[_ForwardFailed] = []
    for arguments in candidates:
        try:
            return run_trace(twin, to_meta(arguments), training=training), failures
        except _ForwardFailed as failure:
            failures.append(failure)
    return None, failures


def first_possible_trace(
    network: nn.Module, convs: Mapping[str, _ConvNd], example_input: Any
) -> tuple[Trace | None, str, str | None]:
    """Traces on meta tensors, else with a real forward pass, else not at all.

    Returns the trace, how it was made, and a warning if it was not made on meta tensors.
    """
    candidates = call_arguments(network, convs, example_input)
    trace, on_meta = trace_on_meta(network, candidates)
    if trace is not None:
        return trace, "trace", None
    really: list[_ForwardFailed] = []
    # A real pass would give lazy layers their shapes, and so change the user's network.
    lazy = any(_is_lazy(module) for module in network.modules())
    for arguments in () if lazy else candidates:
        try:
            with _undisturbed(network):
                trace = run_trace(network, on_device_of(network, arguments), shapes_only=False)
        except _ForwardFailed as failure:
            really.append(failure)
        else:
            return (
                trace,
                "forward",
                "the convolutions were found by a real forward pass, because the network does not "
                f"run on meta tensors ({_cause(on_meta)})",
            )
    return (
        None,
        "registration",
        "no forward pass was possible, so the convolutions are taken in the order in which they "
        "were registered, and squeeze-excite layers and heads are not recognised. Pass "
        "<example_input>, as for a training step. The forward pass failed with: "
        f"{_cause(really or on_meta)}",
    )


def _cause(failures: Sequence[_ForwardFailed]) -> str:
    """Returns why the forward pass that came furthest failed; the others had a wrong input."""
    error = max(failures, key=lambda failure: failure.calls).error
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
