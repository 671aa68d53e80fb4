"""Which convolutions are banks of comparable kernels, and what the others are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves, tree_map

from inmerge_wrap.inputs import Arguments, call_arguments, timm_config, to_meta
from inmerge_wrap.kernels import store_of
from inmerge_wrap.tracing import Call, Trace, meta_copy, run_trace

# Modules inside a layer that peft adapts to a task: the two factors of a low-rank update.
_ADAPTERS = {"lora_A", "lora_B"}


def kinds_of(
    network: nn.Module,
    convs: Mapping[str, _ConvNd],
    trace: Trace | None,
    example_input: Any,
) -> dict[str, str]:
    """Returns the kind of every convolution: ``"kernels"`` or a key of SKIPPED_KINDS."""
    training = _training_trace(network, convs, trace, example_input)
    in_training = training.calls.keys() if training else ()
    heads = _heads(network, convs, trace)
    if trace and training:  # outputs of deep supervision, which evaluation drops
        heads |= trace.unread & training.predictions.keys()
    calls = _calls_on_large_maps(network, convs, trace, example_input)
    channels = _image_channels(convs, trace)
    dropped = _only_for_dropped_scores(network, convs, trace, example_input)

    def kind(name: str, conv: _ConvNd) -> str:
        call, size = calls.get(name), conv.kernel_size
        if not _ADAPTERS.isdisjoint(name.split(".")):
            return "adapter"
        if trace is not None and call is None:
            return "auxiliary" if name in in_training else "unused"
        if name in dropped:
            return "auxiliary"
        if conv.groups == conv.in_channels > 1:
            return "depthwise"
        if name in heads:
            return "head"
        if call and max(size) == 1 and call.is_vector(len(size)):
            return "vector"
        if call and max(size) > 1 and call.is_dense(size):
            return "dense"
        reads_image = conv.in_channels == channels and not conv.transposed
        if reads_image and max(size) > 1 and size == conv.stride:
            return "patch_embedding"
        parameters = store_of(conv).parameters
        if parameters and not all(p.requires_grad for p in parameters):
            return "frozen"
        return "kernels"

    return {name: kind(name, conv) for name, conv in convs.items()}


def _image_channels(convs: Mapping[str, _ConvNd], trace: Trace | None) -> int:
    """Returns the channels of the image: what the first convolution of the forward pass reads."""
    name, first = next(iter(trace.calls.items()), ("", None)) if trace else ("", None)
    if first is None or not first.inputs:
        return 3
    return first.inputs[0][-1 - len(convs[name].kernel_size)]


def _heads(network: nn.Module, convs: Mapping[str, _ConvNd], trace: Trace | None) -> set[str]:
    """Returns the convolutions whose outputs are the predictions.

    These are the ones that timm's configuration names as classifier, and the ones whose output
    no other layer reads. A backbone ends in such layers too: it is recognised by an activation
    after the last one (which a pooled vector of class scores may have too, as in SqueezeNet), by
    a kernel larger than 1x1 that keeps the number of channels (unless its map has grown back to
    the size of the image, as in MONAI's UNet), or by timm's ``num_classes=0``.
    """
    named = timm_config(network).get("classifier") or ()
    heads = {named} if isinstance(named, str) else set(named)
    if trace is None or getattr(network, "num_classes", None) == 0:
        return heads & convs.keys()

    restored = _restored(convs, trace)

    def predicts(name: str, is_vector: bool) -> bool:
        conv = convs[name]
        keeps_width = conv.in_channels == conv.out_channels and max(conv.kernel_size) > 1
        return (not keeps_width or name in restored) and (is_vector or name not in trace.activated)

    heads |= {name for name, is_vector in trace.predictions.items() if predicts(name, is_vector)}
    heads |= {name for name in trace.summed & restored if predicts(name, is_vector=False)}
    return heads & convs.keys()


def _restored(convs: Mapping[str, _ConvNd], trace: Trace) -> set[str]:
    """Convolutions whose map has the size of the image again, after smaller ones."""
    restored: set[str] = set()
    image: torch.Size | None = None
    shrunk = False
    for name, call in trace.calls.items():
        dims = len(convs[name].kernel_size)
        if not call.outputs:
            continue
        size = call.outputs[-1][-dims:]
        if image is None:
            image = call.inputs[0][-dims:]
        if shrunk and size == image:
            restored.add(name)
        shrunk = shrunk or size.numel() < image.numel()
    return restored


def _calls_on_large_maps(
    network: nn.Module,
    convs: Mapping[str, _ConvNd],
    trace: Trace | None,
    example_input: Any,
) -> Mapping[str, Call]:
    """Returns the calls of the trace, run again with larger images where it matters.

    A small example image may shrink to one pixel even without pooling. A layer works on a pooled
    vector if its map is still one pixel when the image is larger.
    """
    if trace is None or example_input is None:
        return trace.calls if trace else {}
    sizes = {name: convs[name].kernel_size for name in trace.calls}
    small = {
        len(sizes[name])
        for name, call in trace.calls.items()
        if call.is_vector(len(sizes[name])) or call.is_dense(sizes[name])
    }
    if not small:
        return trace.calls

    def enlarged(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim - 2 not in small:
            return value
        sides = [2 * max(side, 112) for side in value.shape[2:]]
        return value.new_empty((*value.shape[:2], *sides), device="meta")

    candidates = call_arguments(network, convs, example_input)
    large = _first_run(network, tree_map(enlarged, candidates))
    if large is None:  # no copy, or only one size works: keep the maps of that size
        return trace.calls
    return {name: large.calls.get(name, call) for name, call in trace.calls.items()}


def _first_run(network: nn.Module, candidates: Sequence[Arguments], **how: Any) -> Trace | None:
    """Returns the trace of the first inputs that a copy of the network takes, None for none."""
    for arguments in candidates:
        try:
            return run_trace(meta_copy(network), to_meta(arguments), **how)
        except Exception:  # the copy fails, or another size suits the network
            continue
    return None


def _training_trace(
    network: nn.Module,
    convs: Mapping[str, _ConvNd],
    trace: Trace | None,
    example_input: Any,
) -> Trace | None:
    """Traces in train mode, only where some outputs may matter in training alone."""
    if trace is None or (len(trace.calls) == len(convs) and not trace.unread):
        return None
    candidates = call_arguments(network, convs, example_input)
    if example_input is not None:  # which may be too small for an auxiliary head
        candidates += call_arguments(network, convs, None)
    return _first_run(network, candidates, training=True)


def _only_for_dropped_scores(
    network: nn.Module,
    convs: Mapping[str, _ConvNd],
    trace: Trace | None,
    example_input: Any,
) -> set[str]:
    """Returns the convolutions of a timm model that serve none of the first class scores.

    timm's Inception returns the scores of its auxiliary head in evaluation as well, where timm's
    own scripts drop all but the first. A layer serves the first if their gradient reaches it.
    """
    scores = trace.outputs if trace and timm_config(network) else []
    if trace is None or len(scores) < 2 or len(set(scores)) > 1 or len(scores[0]) != 2:
        return set()
    for arguments in call_arguments(network, convs, example_input):
        twin = meta_copy(network).requires_grad_(True)
        for module in twin.modules():
            module.training = False
        given, named = to_meta(arguments)
        try:
            with torch.enable_grad():
                tree_leaves(twin(*given, **named))[0].sum().backward()
        except Exception:  # another size suits the network
            continue
        reached = dict(twin.named_modules())
        return {
            name
            for name in trace.calls
            if all(parameter.grad is None for parameter in reached[name].parameters())
        }
    return set()
