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
from inmerge_wrap.tracing import Call, Trace, meta_copy, trace_on_meta

# Modules inside a layer that peft adapts to a task: the two factors of a low-rank update.
_ADAPTERS = {"lora_A", "lora_B"}


def kinds_of(
    network: nn.Module, convs: Mapping[str, _ConvNd], trace: Trace | None, example_input: Any
) -> dict[str, str]:
    """Returns the kind of every convolution: ``"kernels"`` or a key of SKIPPED_KINDS."""
    candidates = call_arguments(network, convs, example_input)
    seen, training = trace or Trace(), Trace()
    if trace and (len(trace.calls) < len(convs) or trace.unread):
        # An example may be too small for an auxiliary head.
        guesses = [] if example_input is None else call_arguments(network, convs, None)
        training = trace_on_meta(network, candidates + guesses, training=True)[0] or training
    # Evaluation drops the outputs of deep supervision.
    heads = _heads(network, convs, seen) | (seen.unread & training.predictions.keys())
    calls = seen.calls
    if example_input is not None:
        calls = _calls_on_large_maps(network, convs, seen, candidates)
    channels = _image_channels(convs, seen)
    dropped = _only_for_dropped_scores(network, seen, candidates)

    def kind(name: str, conv: _ConvNd) -> str:
        call, size = calls.get(name), conv.kernel_size
        if not _ADAPTERS.isdisjoint(name.split(".")):
            return "adapter"
        if trace is not None and call is None:
            return "auxiliary" if name in training.calls else "unused"
        if name in dropped:
            return "auxiliary"
        if conv.groups == conv.in_channels > 1:
            return "depthwise"
        if name in heads:
            return "head"
        if call and call.is_dense(size):
            return "dense" if max(size) > 1 else "vector"
        reads_image = conv.in_channels == channels and not conv.transposed
        if reads_image and max(size) > 1 and size == conv.stride:
            return "patch_embedding"
        parameters = store_of(conv).parameters
        if parameters and not all(p.requires_grad for p in parameters):
            return "frozen"
        return "kernels"

    return {name: kind(name, conv) for name, conv in convs.items()}


def _image_channels(convs: Mapping[str, _ConvNd], trace: Trace) -> int:
    """Returns the channels of the image: what the first convolution of the forward pass reads."""
    for name, call in trace.calls.items():
        return call.inputs[0][-1 - len(convs[name].kernel_size)] if call.inputs else 3
    return 3


def _heads(network: nn.Module, convs: Mapping[str, _ConvNd], trace: Trace) -> set[str]:
    """Returns the convolutions whose outputs are the predictions.

    These are the ones that timm's configuration names as classifier, and the ones whose output
    no other layer reads. A backbone ends in such layers too: it is recognised by an activation
    after the last one (which a pooled vector of class scores may have too, as in SqueezeNet), by
    a kernel larger than 1x1 that keeps the number of channels (unless its map has grown back to
    the size of the image, as in MONAI's UNet), or by timm's ``num_classes=0`` or ``features_only``.
    """
    named = timm_config(network).get("classifier") or ()
    heads = {named} if isinstance(named, str) else set(named)
    # A timm network of features only has no number of classes.
    if getattr(network, "num_classes", 0 if timm_config(network) else None) == 0:
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
        image = image or call.inputs[0][-dims:]
        if shrunk and size == image:
            restored.add(name)
        shrunk = shrunk or size.numel() < image.numel()
    return restored


def _calls_on_large_maps(
    network: nn.Module,
    convs: Mapping[str, _ConvNd],
    trace: Trace,
    candidates: Sequence[Arguments],
) -> dict[str, Call]:
    """Returns the calls of the trace, run again with larger images where it matters.

    A small example image may shrink to one pixel even without pooling. A layer works on a pooled
    vector if its map is still one pixel when the image is larger.
    """
    sizes = {name: convs[name].kernel_size for name in trace.calls}
    small = {len(sizes[name]) for name, call in trace.calls.items() if call.is_dense(sizes[name])}
    if not small:
        return trace.calls

    def enlarged(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim - 2 not in small:
            return value
        sides = [2 * max(side, 112) for side in value.shape[2:]]
        return value.new_empty((*value.shape[:2], *sides), device="meta")

    large, _ = trace_on_meta(network, tree_map(enlarged, candidates))
    if large is None:  # no copy, or only one size works: keep the maps of that size
        return trace.calls
    return {name: large.calls.get(name, call) for name, call in trace.calls.items()}


def _only_for_dropped_scores(
    network: nn.Module, trace: Trace, candidates: Sequence[Arguments]
) -> set[str]:
    """Returns the convolutions of a timm model that serve none of the first class scores.

    timm's Inception returns the scores of its auxiliary head in evaluation as well, where timm's
    own scripts drop all but the first. A layer serves the first if their gradient reaches it.
    """
    scores = trace.outputs if timm_config(network) else []
    if len(scores) < 2 or len(set(scores)) > 1 or len(scores[0]) != 2:
        return set()
    for arguments in candidates:
        twin = meta_copy(network).requires_grad_(True)
        for module in twin.modules():
            module.training = False
        given, named = to_meta(arguments)
        try:
            with torch.enable_grad():
                tree_leaves(twin(*given, **named))[0].sum().backward()
        except Exception:  # another size suits the network
            continue
        return {
            name
            for name in trace.calls
            if all(p.grad is None for p in twin.get_submodule(name).parameters())
        }
    return set()
