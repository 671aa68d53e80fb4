"""Finds the convolutions of any network in depth order and decides which of them are merged.

The order is the order of execution in one forward pass, recorded on a copy of the network whose
tensors live on the meta device: they have shapes and no memory, so the network itself is neither
run nor doubled. The decision follows the paper: the first ``L_s`` convolutions are left alone.
Whatever is a ``Conv2d`` by class but not a bank of comparable kernels is skipped with a reason.
"""

from __future__ import annotations

import copy
import difflib
import random
import sys
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.lazy import LazyModuleMixin
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from inmerge_wrap.kernels import kernel_parameters, unmergeable_reason

__all__ = ["SKIPPED_KINDS", "ConvSite", "MergePlan", "plan_merging"]

SKIPPED_KINDS = {
    "depthwise": "depthwise: every kernel reads another channel",
    "vector": "works on a pooled 1x1 map: a gate (squeeze-excite, attention) or a dense layer",
    "dense": "one kernel covers the whole map: a dense layer in convolution clothes",
    "head": "head: its outputs are the predictions",
    "patch_embedding": "patch embedding: cuts the image into patches",
    "auxiliary": "auxiliary: runs in training only and is left out at inference",
    "unused": "never executed in a forward pass",
    "frozen": "frozen: requires_grad is False",
}
"""Kinds of convolution that are skipped unless named in ``also_merge``, each with its reason."""

Pattern = str | Callable[["ConvSite"], bool]

_WEIGHT_STANDARDISED = {"StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame"}
_HOOK_DICTS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_FALLBACK_SIZES = (224, 299, 384, 512, 256, 192, 160, 128, 96, 64)


@dataclass(frozen=True)
class ConvSite:
    """One Conv2d of a network and what merging does with it.

    Attributes:
        name: Its name in ``model.named_modules()``.
        depth: Its place in the order of execution among all Conv2d, from 1; None if never run.
        shape: Of its weight, (C_out, C_in / groups, kH, kW); empty while a lazy layer has none.
        groups: The convolution's groups.
        kind: ``"kernels"``, or a key of :data:`SKIPPED_KINDS`.
        centred: Whether kernels are compared without their mean, because the forward pass
            standardises them (StdConv2d, ScaledStdConv2d). Their gain is a scale of the output
            channel, like BatchNorm's, and takes no part in the comparison.
        reason: Why it is skipped; None where it is merged.
    """

    name: str
    depth: int | None
    shape: tuple[int, ...]
    groups: int = 1
    kind: str = "kernels"
    centred: bool = False
    reason: str | None = None

    @property
    def pair_groups(self) -> int:
        """The groups inside which kernels are paired; a depthwise layer pairs across its own."""
        depthwise = self.shape[:1] == (self.groups,) and self.shape[1] == 1
        return 1 if depthwise else self.groups

    @property
    def fan_in(self) -> int:
        """Entries of one kernel."""
        return int(torch.Size(self.shape[1:]).numel())


@dataclass(frozen=True)
class MergePlan:
    """Which convolutions are merged and why the others are not; print it to see a table.

    Attributes:
        merged: Convolutions to merge, in depth order.
        skipped: All the others, in depth order, each with its reason.
        found_by: How the order was found: ``"trace"`` (meta tensors), ``"forward"`` (a real
            forward pass), or ``"registration"`` (no forward pass was possible).
    """

    merged: tuple[ConvSite, ...]
    skipped: tuple[ConvSite, ...]
    found_by: str = "trace"

    def __str__(self) -> str:
        sites = sorted(
            self.merged + self.skipped, key=lambda site: (site.depth is None, site.depth or 0)
        )
        rows = [("depth", "convolution", "weight", "groups", "")]
        rows += [
            (
                "-" if site.depth is None else str(site.depth),
                site.name,
                "x".join(map(str, site.shape)) or "?",
                str(site.groups),
                "merged" if site.reason is None else f"skipped ({site.reason})",
            )
            for site in sites
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            f"{row[0]:>{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:<{widths[2]}}  "
            f"{row[3]:>{widths[3]}}  {row[4]}".rstrip()
            for row in rows
        ]
        lines.append(f"{len(self.merged)} of {len(sites)} convolutions are merged.")
        return "\n".join(lines)


def plan_merging(
    model: nn.Module,
    *,
    shallow_layers: int | float = 0.625,
    example_input: Any = None,
    include: Pattern | Sequence[Pattern] | None = None,
    exclude: Pattern | Sequence[Pattern] = (),
    also_merge: Collection[str] = (),
) -> MergePlan:
    """Finds every Conv2d of ``model`` in depth order and decides which are merged.

    Depth is the order of execution in a forward pass. Convolutions of a kind in
    :data:`SKIPPED_KINDS` are no bank of comparable kernels: they are neither merged nor counted
    as depth (but a patch embedding and a frozen layer do count). Grouped convolutions are merged
    inside their groups. A parameter that two layers share is merged once, through the first.

    Args:
        model: Any network; it is left exactly as it was.
        shallow_layers: L_s, the number of first convolutions that are left alone (int), or their
            share of the depth (float in [0, 1), rounded; at least one layer stays on either
            side). The default is the authors' 10 of VGG-19's 16.
        example_input: What to call the network with where its configuration does not tell: a
            tensor, a tuple of positional or a dict of keyword arguments, as for a training step.
        include: Merge exactly the convolutions that match: names with ``*`` wildcards, or a
            function of :class:`ConvSite`. Neither depth nor kind counts then.
        exclude: Of those that would be merged, leave out what matches.
        also_merge: Kinds of :data:`SKIPPED_KINDS` to treat like any other convolution.

    Returns:
        The plan, with at least one merged convolution.

    Raises:
        ValueError: If nothing is left to merge, a name or wildcard matches no convolution, an
            included convolution can not be merged, or an argument is out of range. The message
            says why and what to pass instead.
    """
    _check_arguments(shallow_layers, also_merge)
    _check_model(model)
    sites, found_by = _find_sites(model, example_input)
    plan = _decide(sites, shallow_layers, also_merge, _patterns(include), _patterns(exclude))
    if not plan.merged:
        raise ValueError(_why_empty(plan, model, shallow_layers))
    return replace(plan, found_by=found_by)


def _check_arguments(shallow_layers: int | float, also_merge: Collection[str]) -> None:
    count = isinstance(shallow_layers, int) and not isinstance(shallow_layers, bool)
    share = isinstance(shallow_layers, float) and 0.0 <= shallow_layers < 1.0
    if not share and not (count and shallow_layers >= 0):
        raise ValueError(
            "shallow_layers must be a count (int >= 0) or a share of the depth "
            f"(float in [0, 1)), got {shallow_layers!r}"
        )
    if isinstance(also_merge, str):
        raise ValueError(f"also_merge must be a collection of kinds, got the string {also_merge!r}")
    unknown = sorted(set(also_merge) - set(SKIPPED_KINDS))
    if unknown:
        raise ValueError(f"also_merge knows {sorted(SKIPPED_KINDS)}, got {unknown}")


def _check_model(model: nn.Module) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("a TorchScript module hides its layers; wrap the network it was made from")
    parallel = {"DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"}
    names = {kind.__name__ for kind in type(model).__mro__} & parallel
    if names:
        raise ValueError(
            f"wrap the network itself, before {names.pop()}: "
            "InMergeWrapper(network) first, then prepare or parallelise the wrapper"
        )


# ---------------------------------------------------------------------------------------------
# The trace: what runs, in which order, on what shapes, and where its output goes
# ---------------------------------------------------------------------------------------------


@dataclass
class _Call:
    """What one forward pass showed of one convolution."""

    inputs: list[torch.Size] = field(default_factory=list)
    outputs: list[torch.Size] = field(default_factory=list)
    used_own_weight: bool = False

    def is_vector(self) -> bool:
        return all(shape[-2:].numel() == 1 for shape in self.inputs + self.outputs)

    def is_dense(self, kernel_size: tuple[int, ...]) -> bool:
        covered = all(tuple(shape[-2:]) == kernel_size for shape in self.inputs)
        return covered and all(shape[-2:].numel() == 1 for shape in self.outputs)


@dataclass
class _Trace:
    calls: dict[str, _Call] = field(default_factory=dict)
    """Convolutions in order of their first call."""
    predictions: dict[str, bool] = field(default_factory=dict)
    """Convolutions whose output no other layer reads -> whether it ends as one vector per image."""
    activated: set[str] = field(default_factory=set)
    """Convolutions of the former whose output passes an activation of hidden layers."""


_Arguments = tuple[tuple[Any, ...], dict[str, Any]]

_OTHER_LAYER = "a layer that is no Conv2d"


class _Watch(TorchFunctionMode):
    """Sees every function of a forward pass: which convolution runs and who reads its output.

    The output of a layer belongs to that layer until another layer reads it. What belongs to
    nobody else when it leaves the network, or when it is cut from it by ``detach``, is a
    prediction.
    """

    def __init__(self, owners: Mapping[int, list[str]], trace: _Trace, shapes_only: bool) -> None:
        super().__init__()
        self._owners, self._trace, self._shapes_only = owners, trace, shapes_only
        self._running = ""  # the convolution whose module is being called
        self._layers_of = WeakTensorKeyDictionary()  # tensor -> names of the layers it comes from
        self._read: set[str] = {_OTHER_LAYER}
        self._cut: set[str] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if self._shapes_only and func in _KEEPS_SHAPE and args:
            result = torch.empty_like(args[0])  # on meta tensors these take most of the time
        else:
            result = func(*args, **kwargs)
        outputs = [result] if isinstance(result, Tensor) else _tensors_in(result)
        name = getattr(func, "__name__", "")
        if not outputs:
            if name == "__setitem__":
                self._layers_of[args[0]] = self._sources([args[0], args[2]])
            return result
        operands = _tensors_in((*args, *kwargs.values()))
        sources = self._sources(operands)
        if name == "detach":
            self._cut |= sources
            sources = frozenset()
        elif name in _LAYERS or any(isinstance(tensor, nn.Parameter) for tensor in operands):
            self._read |= sources
            sources = frozenset([_OTHER_LAYER])
        elif sources & self._read:  # a sum with features is features too
            self._read |= sources
        elif name in _HIDDEN_ACTIVATIONS:
            self._trace.activated |= sources
        if func is torch.conv2d:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            owners = self._owners.get(id(weight))
            if owners:
                owner = self._running if self._running in owners else owners[0]
                call = self._trace.calls.setdefault(owner, _Call())
                call.used_own_weight = True
                call.inputs.append((args[0] if args else kwargs["input"]).shape)
                call.outputs.append(result.shape)
                sources = frozenset([owner])
        if sources:
            for tensor in outputs:
                if tensor.is_floating_point():  # an index or a mask says where, not what
                    self._layers_of[tensor] = sources
        return result

    def enter(self, name: str) -> None:
        """Notes that a convolution is called as a module."""
        self._running = name

    def leave(self, name: str, inputs: tuple[Any, ...], output: Any) -> None:
        """Notes what went in and out, whatever the convolution's forward pass computed."""
        self._running = ""
        call = self._trace.calls.setdefault(name, _Call())
        if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            call.inputs.append(inputs[0].shape)
            call.outputs.append(output.shape)
            self._read |= self._sources([inputs[0]]) - {name}
            self._layers_of[output] = frozenset([name])

    def note_predictions(self, output: Any) -> None:
        """Finds the convolutions whose outputs are the network's."""
        for leaf in tree_leaves(output):
            for name in self._sources([leaf]) if isinstance(leaf, Tensor) else ():
                self._trace.predictions[name] = leaf.ndim == 2
        for name in self._cut:
            self._trace.predictions.setdefault(name, False)
        for name in self._read:
            self._trace.predictions.pop(name, None)

    def _sources(self, tensors: Sequence[Any]) -> frozenset[str]:
        known = [
            self._layers_of[t] for t in tensors if isinstance(t, Tensor) and t in self._layers_of
        ]
        return known[0] if len(known) == 1 else frozenset().union(*known)


_LAYERS = {
    *("linear", "bilinear", "embedding", "lstm", "gru", "rnn_tanh", "rnn_relu"),
    *(f"conv{transposed}{d}d" for transposed in ("", "_transpose") for d in (1, 2, 3)),
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


def _tensors_in(values: Any) -> list[Tensor]:
    """Tensors among some values and in lists and tuples among them."""
    if not isinstance(values, list | tuple):
        return []
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors_in(value)
    return found


def _trace(
    model: nn.Module, arguments: _Arguments, *, training: bool = False, shapes_only: bool = True
) -> _Trace:
    """Runs one forward pass and records which convolutions ran, in which order, on what.

    Args:
        model: A network without hooks of its users.
        arguments: What to call it with.
        training: In train mode; the modules' flags are set without calling their methods.
        shapes_only: Whether all tensors are on the meta device, where only shapes count.

    Raises:
        _ForwardFailed: If the network raised.
    """
    trace = _Trace()
    owners: dict[int, list[str]] = {}
    convs = dict(_named_convs(model))
    for name, conv in convs.items():
        if conv._parameters.get("weight") is not None:
            owners.setdefault(id(conv.weight), []).append(name)
    watch = _Watch(owners, trace, shapes_only)
    for module in model.modules():
        module.training = training
    handles = []
    for name, conv in convs.items():
        handles.append(conv.register_forward_pre_hook(partial(_enter, watch, name)))
        handles.append(conv.register_forward_hook(partial(_leave, watch, name)))
    try:
        with torch.no_grad(), watch:
            output = model(*arguments[0], **arguments[1])
        watch.note_predictions(output)
    except Exception as error:  # the network's own code ran here
        raise _ForwardFailed(len(trace.calls)) from error
    finally:
        for handle in handles:
            handle.remove()
    return trace


def _enter(watch: _Watch, name: str, module: nn.Module, inputs: Any) -> None:
    watch.enter(name)


def _leave(watch: _Watch, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
    watch.leave(name, inputs, output)


class _ForwardFailed(Exception):
    """A forward pass raised; the cause is its ``__cause__``.

    Args:
        calls: How many convolutions had run.
    """

    def __init__(self, calls: int) -> None:
        super().__init__(calls)
        self.calls = calls


def _named_convs(model: nn.Module) -> Iterator[tuple[str, nn.Conv2d]]:
    return (item for item in model.named_modules() if isinstance(item[1], nn.Conv2d))


def _is_lazy(module: nn.Module) -> bool:
    return isinstance(module, LazyModuleMixin) and module.has_uninitialized_params()


def _own_hooks(hooks: Mapping[int, Any]) -> OrderedDict[int, Any]:
    """The hooks by which torch computes weights (weight_norm, pruning) and shapes (lazy layers)."""
    return OrderedDict(
        (key, hook)
        for key, hook in hooks.items()
        if type(hook).__module__.startswith("torch.nn.utils")
        or getattr(hook, "__func__", None) is LazyModuleMixin._infer_parameters
    )


class _CloneToMeta(TorchFunctionMode):
    """Copies made inside of it have no memory, wherever the copied object keeps its tensors."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            return memo.setdefault(id(tensor), _meta_tensor(tensor))
        if func is Tensor.clone:
            return _meta_tensor(args[0])
        return func(*args, **(kwargs or {}))


def _meta_copy(model: nn.Module) -> nn.Module:
    """A copy of the network without memory for its tensors and without anybody's hooks."""
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
    """Runs the real network without its users' hooks, and puts everything back as it was."""
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
def _bystanders_kept(network: nn.Module) -> Iterator[None]:
    """Keeps what forward passes may touch beside the network: generators, hooks, compilers."""
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


def _find_sites(model: nn.Module, example_input: Any) -> tuple[list[ConvSite], str]:
    """Every Conv2d with its depth and kind, in depth order, and how the order was found."""
    network, prefix = model, ""
    while isinstance(getattr(network, "_orig_mod", None), nn.Module):  # made by torch.compile
        network, prefix = network._orig_mod, prefix + "_orig_mod."  # type: ignore[assignment]
    convs = dict(_named_convs(network))
    if not convs:
        raise ValueError(
            f"{type(network).__name__} has no Conv2d: in-model merging acts on the kernels of "
            "convolutional networks; choose a CNN (for example resnet34) as the model"
        )
    with _bystanders_kept(network):
        trace, found_by, problem = _first_possible_trace(network, convs, example_input)
        kinds = _kinds(network, convs, trace, example_input)
    if problem is not None:
        warnings.warn(problem, stacklevel=3)
    order = list(trace.calls) if trace else list(convs)
    order += [name for name in convs if name not in order]
    sites: list[ConvSite] = []
    first_owner: dict[int, str] = {}
    for place, name in enumerate(order, start=1):
        conv = convs[name]
        reason = unmergeable_reason(conv)
        weight = next(iter(kernel_parameters(conv)), None) if reason is None else None
        call = trace.calls.get(name) if trace else None
        centred = type(conv).__name__ in _WEIGHT_STANDARDISED
        stored = conv._parameters.get("weight")
        if call and stored is not None and not call.used_own_weight and not centred:
            reason = reason or f"{type(conv).__name__} computes its weight in its forward pass"
        if weight is not None and id(weight) in first_owner:
            reason = f"shares its weight with {prefix}{first_owner[id(weight)]}"
        elif weight is not None:
            first_owner[id(weight)] = name
        if reason is None and conv.out_channels == 1:
            reason = "one kernel: there is nothing to pair it with"
        sites.append(
            ConvSite(
                name=prefix + name,
                depth=place if call or trace is None else None,
                shape=() if weight is None else tuple(weight.shape),
                groups=conv.groups,
                kind=kinds[name],
                centred=centred,
                reason=reason,
            )
        )
    return sites, found_by


def _first_possible_trace(
    network: nn.Module, convs: Mapping[str, nn.Conv2d], example_input: Any
) -> tuple[_Trace | None, str, str | None]:
    """Traces on meta tensors, else by a real forward pass, else not at all.

    Returns:
        The trace, how it was made, and a warning where it was not made on meta tensors.
    """
    candidates = _call_arguments(network, convs, example_input)
    on_meta: list[_ForwardFailed] = []
    really: list[_ForwardFailed] = []
    try:
        twin = _meta_copy(network)
    except Exception as error:  # networks may hold anything, and copying it may raise anything
        on_meta = [_failed(error)]
    else:
        for arguments in candidates:
            try:
                return _trace(twin, _on_meta(arguments)), "trace", None
            except _ForwardFailed as failure:
                on_meta.append(failure)
    # A real pass would give lazy layers their shapes, and so change the user's network.
    lazy = any(_is_lazy(module) for module in network.modules())
    for arguments in () if lazy else candidates:
        try:
            with _undisturbed(network):
                trace = _trace(network, _on_device_of(network, arguments), shapes_only=False)
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
        "example_input, as for a training step. The forward pass failed with: "
        f"{_cause(really or on_meta)}",
    )


def _failed(cause: Exception) -> _ForwardFailed:
    failure = _ForwardFailed(0)
    failure.__cause__ = cause
    return failure


def _cause(failures: Sequence[_ForwardFailed]) -> str:
    """Why the forward pass failed that came furthest: the others were given a wrong image."""
    error = max(failures, key=lambda failure: failure.calls).__cause__
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _call_arguments(
    network: nn.Module, convs: Mapping[str, nn.Conv2d], example_input: Any
) -> list[_Arguments]:
    """What to try to call the network with, the likeliest first."""
    if isinstance(example_input, Mapping):
        return [((), dict(example_input))]
    if isinstance(example_input, tuple | list):
        return [(tuple(example_input), {})]
    if example_input is not None:
        return [((example_input,), {})]
    configured = _timm_config(network).get("input_size") or ()
    first = next(iter(convs.values()))
    channels = [first.weight.shape[1] * first.groups] if _has_shape(first) else []
    channels += [*configured[:1], 3, 1]
    # Of vision transformers in torchvision, in timm, and in timm where img_size was given.
    patches = getattr(network, "patch_embed", None)
    holders = ((network, "image_size"), (network, "img_size"), (patches, "img_size"))
    stated = [_pair(getattr(holder, name, None)) for holder, name in holders]
    sizes = [tuple(configured[1:])] if configured else []
    sizes += [size for size in stated if size] + [(side, side) for side in _FALLBACK_SIZES]
    shapes = [(channels[0], *size) for size in sizes] + [(count, *sizes[0]) for count in channels]
    dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
    # Batches of two, because BatchNorm can not train on one value per channel.
    return [
        ((torch.empty(2, *shape, dtype=dtype, device="meta"),), {})
        for shape in dict.fromkeys(shapes)
    ]


def _pair(size: Any) -> tuple[int, ...] | None:
    """(height, width) of what a network states as its image size, None if that is no size."""
    size = (size, size) if isinstance(size, int) else size
    is_size = isinstance(size, tuple) and len(size) == 2 and all(isinstance(n, int) for n in size)
    return size if is_size else None


def _timm_config(network: nn.Module) -> Mapping[str, Any]:
    config = getattr(network, "pretrained_cfg", None)
    return config if isinstance(config, Mapping) else {}


def _has_shape(conv: nn.Conv2d) -> bool:
    return not isinstance(conv._parameters.get("weight"), nn.parameter.UninitializedParameter)


def _on_meta(arguments: _Arguments) -> _Arguments:
    return tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, arguments)


def _on_device_of(network: nn.Module, arguments: _Arguments) -> _Arguments:
    device = next(network.parameters()).device

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.is_meta:
            return torch.zeros_like(value, device=device)
        return value.to(device)

    return tree_map(move, arguments)


# ---------------------------------------------------------------------------------------------
# The decision: which convolutions are banks of comparable kernels, and which of them are deep
# ---------------------------------------------------------------------------------------------


def _kinds(
    network: nn.Module,
    convs: Mapping[str, nn.Conv2d],
    trace: _Trace | None,
    example_input: Any,
) -> dict[str, str]:
    """The kind of every convolution: ``"kernels"`` or a key of SKIPPED_KINDS."""
    heads = _heads(network, convs, trace)
    calls = _calls_on_large_maps(network, convs, trace, example_input)
    in_training = _run_in_training(network, convs, trace, example_input)
    channels = _image_channels(trace)

    def kind(name: str, conv: nn.Conv2d) -> str:
        call = calls.get(name)
        if trace is not None and call is None:
            return "auxiliary" if name in in_training else "unused"
        if conv.groups == conv.in_channels > 1:
            return "depthwise"
        if name in heads:
            return "head"
        if call and conv.kernel_size == (1, 1) and call.is_vector():
            return "vector"
        if call and conv.kernel_size != (1, 1) and call.is_dense(conv.kernel_size):
            return "dense"
        side = max(conv.kernel_size)
        if conv.in_channels == channels and side > 1 and conv.kernel_size == conv.stride:
            return "patch_embedding"
        parameters = kernel_parameters(conv)
        if parameters and not all(p.requires_grad for p in parameters):
            return "frozen"
        return "kernels"

    return {name: kind(name, conv) for name, conv in convs.items()}


def _image_channels(trace: _Trace | None) -> int:
    """Channels of the image: what the first convolution of the forward pass reads."""
    first = next(iter(trace.calls.values()), None) if trace else None
    return first.inputs[0][-3] if first and first.inputs else 3


def _heads(network: nn.Module, convs: Mapping[str, nn.Conv2d], trace: _Trace | None) -> set[str]:
    """Convolutions whose outputs are the predictions.

    These are the ones that timm's configuration names as classifier, and the ones whose output
    no other layer reads. A backbone ends in such layers too: it gives itself away by an activation
    after the last one (that a pooled vector of class scores may have too, as in SqueezeNet), by
    a kernel larger than 1x1 that keeps the number of channels, or by timm's ``num_classes=0``.
    """
    named = _timm_config(network).get("classifier") or ()
    heads = {named} if isinstance(named, str) else set(named)
    if trace is None or getattr(network, "num_classes", None) == 0:
        return heads & convs.keys()

    def predicts(name: str, is_vector: bool) -> bool:
        conv = convs[name]
        keeps_width = conv.in_channels == conv.out_channels and max(conv.kernel_size) > 1
        return not keeps_width and (is_vector or name not in trace.activated)

    heads |= {name for name, is_vector in trace.predictions.items() if predicts(name, is_vector)}
    return heads & convs.keys()


def _calls_on_large_maps(
    network: nn.Module,
    convs: Mapping[str, nn.Conv2d],
    trace: _Trace | None,
    example_input: Any,
) -> Mapping[str, _Call]:
    """The calls of the trace, made anew with larger images where it matters.

    A small example image shrinks to one pixel by itself. A layer works on a pooled vector if its
    map still is one pixel when the image is larger.
    """
    if trace is None or example_input is None:
        return trace.calls if trace else {}
    if not any(
        call.is_vector() or call.is_dense(convs[name].kernel_size)
        for name, call in trace.calls.items()
    ):
        return trace.calls

    def enlarged(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim != 4:
            return value
        sides = [2 * max(side, 112) for side in value.shape[-2:]]
        return value.new_empty((*value.shape[:2], *sides), device="meta")

    (arguments,) = _call_arguments(network, convs, example_input)
    try:
        large = _trace(_meta_copy(network), _on_meta(tree_map(enlarged, arguments)))
    except Exception:  # no copy, or one size alone: at that size the maps are what they are
        return trace.calls
    return {name: large.calls.get(name, call) for name, call in trace.calls.items()}


def _run_in_training(
    network: nn.Module,
    convs: Mapping[str, nn.Conv2d],
    trace: _Trace | None,
    example_input: Any,
) -> set[str]:
    """Which convolutions run in train mode, asked only where some do not run in eval mode."""
    if trace is None or len(trace.calls) == len(convs):
        return set()
    for given in (example_input, None):  # the example may be too small for an auxiliary head
        for arguments in _call_arguments(network, convs, given):
            try:
                return set(_trace(_meta_copy(network), _on_meta(arguments), training=True).calls)
            except Exception:  # the copy fails, or another size suits the network
                continue
    return set()


def _decide(
    sites: Sequence[ConvSite],
    shallow_layers: int | float,
    also_merge: Collection[str],
    include: Sequence[Pattern] | None,
    exclude: Sequence[Pattern] | None,
) -> MergePlan:
    """Splits the sites into merged and skipped."""
    included = None if include is None else _matching(sites, include, "include")
    excluded = _matching(sites, exclude or (), "exclude")
    counted = [site for site in sites if _counts(site, also_merge)]
    shallow = {site.name for site in counted[: _shallow_count(shallow_layers, len(counted))]}

    def reason(site: ConvSite) -> str | None:
        if included is not None and site.name not in included:
            return "not included"
        if site.name in excluded:
            return "excluded"
        if site.reason is not None:
            if included is not None:
                raise ValueError(
                    f"include names {site.name!r}, which can not be merged: {site.reason}"
                )
            return site.reason
        if site.shape[0] == site.pair_groups > 1:
            return "one kernel in each group: there is nothing to pair it with"
        if included is not None:
            return None
        if site.kind != "kernels" and site.kind not in also_merge:
            return SKIPPED_KINDS[site.kind]
        return "shallow" if site.name in shallow else None

    decided = [replace(site, reason=reason(site)) for site in sites]
    return MergePlan(
        merged=tuple(site for site in decided if site.reason is None),
        skipped=tuple(site for site in decided if site.reason is not None),
    )


def _counts(site: ConvSite, also_merge: Collection[str]) -> bool:
    """Whether a convolution is a step of depth, merged or not."""
    return site.kind in {"kernels", "patch_embedding", "frozen", *also_merge}


def _shallow_count(shallow_layers: int | float, depth: int) -> int:
    if isinstance(shallow_layers, int):
        return shallow_layers
    if shallow_layers == 0.0:
        return 0
    return max(1, min(depth - 1, round(shallow_layers * depth)))


def _patterns(given: Pattern | Sequence[Pattern] | None) -> Sequence[Pattern] | None:
    return [given] if isinstance(given, str) or callable(given) else given


def _matching(sites: Sequence[ConvSite], patterns: Sequence[Pattern], argument: str) -> set[str]:
    """Names that some pattern matches; a name or wildcard without any match is an error."""
    names: set[str] = set()
    for pattern in patterns:
        if callable(pattern):
            names |= {site.name for site in sites if pattern(site)}
            continue
        found = {site.name for site in sites if fnmatchcase(site.name, pattern)}
        if not found:
            known = [site.name for site in sites]
            close = difflib.get_close_matches(pattern, known, n=3, cutoff=0.4)
            raise ValueError(
                f"{argument}={pattern!r} matches none of the {len(known)} convolutions; "
                f"close names: {', '.join(close or known[-3:])} (* stands for any characters)"
            )
        names |= found
    return names


def _why_empty(plan: MergePlan, model: nn.Module, shallow_layers: int | float) -> str:
    reasons = Counter(site.reason for site in plan.skipped)
    listed = "; ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    shallow = reasons["shallow"]
    frozen = reasons[SKIPPED_KINDS["frozen"]]
    if isinstance(shallow_layers, int) and shallow and shallow_layers >= shallow:
        remedy = (
            f"shallow_layers={shallow_layers} leaves none of the {shallow} counted layers: pass a "
            "smaller count, or a share such as 0.625"
        )
    elif frozen:
        remedy = "unfreeze deep layers before wrapping, or pass also_merge=('frozen',)"
    elif shallow:
        remedy = "the network is too shallow for a deep part: pass shallow_layers=0 to merge it all"
    else:
        remedy = (
            "choose a convolutional network, or name layers with include=[...] or their kind with "
            f"also_merge=(...), one of {', '.join(SKIPPED_KINDS)}"
        )
    return f"nothing to merge in {type(model).__name__}: {listed}. Remedy: {remedy}"
