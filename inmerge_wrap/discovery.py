"""Finds the convolutions of any network in depth order and decides which of them are merged.

The order is that of execution in one forward pass, recorded on a copy of the network whose tensors
are on the meta device: they have shapes but no memory, so the network itself is neither run nor
duplicated. The decision follows the paper: the first ``L_s`` convolutions are not merged.
A convolution has any number of dimensions and may be transposed; its *kernels* are the weights of
one output channel each. A layer that is a convolution by class but not a bank of comparable kernels
is skipped with a reason.
"""

from __future__ import annotations

import difflib
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from inmerge_wrap._constants import DEFAULT_SHALLOW_SHARE, SKIPPED_KINDS
from inmerge_wrap.errors import ArgumentError, ArgumentWarning, check_choice
from inmerge_wrap.inputs import is_quantised
from inmerge_wrap.kernels import Store, kernel_shape, store_of
from inmerge_wrap.kinds import kinds_of
from inmerge_wrap.plan import ConvSite, MergePlan
from inmerge_wrap.settings import MODES, Mode
from inmerge_wrap.tracing import Call, bystanders_kept, convs_of, first_possible_trace
from inmerge_wrap.unwrapping import check_network, class_names

__all__ = ["DEFAULT_SHALLOW_SHARE", "SKIPPED_KINDS", "plan_merging"]

Pattern = str | Callable[[ConvSite], bool]

_WEIGHT_STANDARDISED = {"StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame"}


def plan_merging(
    model: nn.Module,
    *,
    shallow_layers: int | float = DEFAULT_SHALLOW_SHARE,
    example_input: Any = None,
    include: Pattern | Sequence[Pattern] | None = None,
    exclude: Pattern | Sequence[Pattern] = (),
    also_merge: Collection[str] = (),
    mode: Mode = "step",
) -> MergePlan:
    """Finds every convolution of ``model`` in depth order and decides which are merged.

    Depth is the order of execution in a forward pass. Convolutions of a kind in
    :data:`SKIPPED_KINDS` are not banks of comparable kernels: they are neither merged nor
    counted as depth (except a patch embedding and a frozen layer, which count). Grouped
    convolutions are merged inside their groups. A parameter that two layers share is merged
    once, through the first.

    Args:
        model: Any network; it is left exactly as it was.
        shallow_layers: L_s, the number of first convolutions that are not merged (int), or their
            share of the depth (float in [0, 1), rounded; at least one layer remains on either
            side). The default is the authors' 10 of VGG-19's 16.
        example_input: Input to call the network with if its configuration does not define one: a
            tensor, a tuple of positional or a dict of keyword arguments, as for a training step.
            A list is taken as positional arguments, or as the one argument of a network that
            takes lists of images.
        include: Merge exactly the convolutions that match: names with ``*`` wildcards, or a
            function of :class:`ConvSite`. Depth and kind are ignored then.
        exclude: Of the convolutions that would be merged, leave out those that match.
        also_merge: Kinds of :data:`SKIPPED_KINDS` to treat like any other convolution.
        mode: How :class:`InMergeWrapper` will merge. After each step (``"step"``) a weight must be
            one that can be written, and one that two layers share is merged once. In the forward
            pass a convolution must be called as a module, and on the outputs a depthwise one
            cannot be merged: its channels read different inputs.

    Returns:
        The plan, with at least one merged convolution.

    Raises:
        TypeError: If the model is not a network.
        ValueError: If nothing is left to merge, a name or wildcard matches no convolution, an
            included convolution cannot be merged, or an argument is out of range. The message
            says why and what to pass instead.
    """
    check_choice("mode", mode, MODES)
    _check_arguments(shallow_layers, also_merge)
    _check_model(model)
    sites, found_by = _find_sites(model, example_input, mode)
    included = None if include is None else _matching(sites, "include", include)
    excluded = _matching(sites, "exclude", exclude)
    decided = _decide(sites, shallow_layers, also_merge, included, excluded)
    merged = tuple(site for site in decided if site.reason is None)
    skipped = tuple(site for site in decided if site.reason is not None)
    if not merged:
        why = _why_empty(skipped, shallow_layers)
        raise ArgumentError(f"nothing to merge in {type(model).__name__}: {why}")
    return MergePlan(merged, skipped, found_by, mode)


def _check_arguments(shallow_layers: int | float, also_merge: Collection[str]) -> None:
    count = isinstance(shallow_layers, int) and not isinstance(shallow_layers, bool)
    share = isinstance(shallow_layers, float) and 0.0 <= shallow_layers < 1.0
    if not share and not (count and shallow_layers >= 0):
        raise ArgumentError(
            "<shallow_layers> must be a count (int >= 0) or a share of the depth "
            f"(float in [0, 1)), got {shallow_layers!r}"
        )
    if isinstance(also_merge, str) or not isinstance(also_merge, Collection):
        raise ArgumentError(f"<also_merge> must be a collection of kinds, got {also_merge!r}")
    unknown = [kind for kind in also_merge if kind not in list(SKIPPED_KINDS)]
    if unknown:
        raise ArgumentError(f"<also_merge> must be among {sorted(SKIPPED_KINDS)}, got {unknown}")


def _check_model(model: nn.Module) -> None:
    check_network(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("a TorchScript module hides its layers; wrap the network it was made from")
    parallel = {"DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"}
    names = class_names(model) & parallel
    if names:
        raise ValueError(
            f"wrap the network itself, before {names.pop()}: "
            "InMergeWrapper(network) first, then prepare or parallelise the wrapper"
        )


def _find_sites(model: nn.Module, example_input: Any, mode: Mode) -> tuple[list[ConvSite], str]:
    """Returns every convolution with depth and kind, in depth order, and how these were found."""
    network, prefix = model, ""
    while isinstance(getattr(network, "_orig_mod", None), nn.Module):  # made by torch.compile
        network, prefix = network._orig_mod, prefix + "_orig_mod."  # type: ignore[assignment]
    convs = convs_of(network)
    if not convs:
        raise ValueError(
            f"{type(network).__name__} has no convolution: in-model merging acts on the kernels of "
            "convolutional networks; choose a CNN (for example resnet34) as the model"
        )
    with bystanders_kept(network):
        trace, found_by, problem = first_possible_trace(network, convs, example_input)
        kinds = kinds_of(network, convs, trace, example_input)
    if problem is not None:
        warnings.warn(ArgumentWarning(problem), stacklevel=3)
    order = dict.fromkeys([*(trace.calls if trace else ()), *convs])
    sites: list[ConvSite] = []
    owners: dict[int, str] = {}  # of each weight, the first layer that has it
    for place, name in enumerate(order, start=1):
        conv = convs[name]
        call = trace.calls.get(name) if trace else None
        store = store_of(conv)
        reason = _why_not(conv, store, call, kinds[name], mode)
        if mode == "step" and store.reason is None:
            owner = owners.setdefault(id(store.parameters[0]), name)
            if owner != name:
                reason = f"shares its weight with {prefix}{owner}", "shared"
        site = ConvSite(
            name=prefix + name,
            depth=place if call or trace is None else None,
            shape=kernel_shape(conv),
            groups=conv.groups,
            kind=kinds[name],
            centred=type(conv).__name__ in _WEIGHT_STANDARDISED,
        )
        if reason is None and site.shape[0] == site.pair_groups:
            where = "one kernel" if site.groups == 1 else "one kernel in each group"
            reason = f"{where}: there is nothing to pair it with", "one_kernel"
        words, reason_kind = reason or (None, None)
        sites.append(replace(site, reason=words, reason_kind=reason_kind))
    return sites, found_by


def _why_not(
    conv: _ConvNd, store: Store, call: Call | None, kind: str, mode: Mode
) -> tuple[str, str] | None:
    """Returns why a mode cannot merge a convolution, in words and as a kind."""
    weight = conv._parameters.get("weight")
    if any(parameter.dtype.is_complex for parameter in conv.parameters()):
        return "complex: kernels of complex numbers are not compared", "unwritable"
    if is_quantised(conv):
        return "quantised: integers, which no optimizer trains", "unwritable"
    if store.reason is not None and (mode == "step" or weight is not None):  # computed, or lazy
        return store.reason, "unwritable"
    if mode == "step":
        computes = call and weight is not None and not call.used_own_weight
        if computes and type(conv).__name__ not in _WEIGHT_STANDARDISED:
            return f"{_class_name(conv)} computes its weight in its forward pass", "unwritable"
        return None
    if call and not call.is_called:
        return "its weight is used without calling the module, so that no hook runs", "functional"
    if mode == "outputs" and call and not call.is_whole:
        return f"{_class_name(conv)} goes on after its convolution: use mode='weights'", "composite"
    if mode == "outputs" and kind == "depthwise":
        return "depthwise: its channels read different inputs, which outputs cannot mix", kind
    return None


def _class_name(conv: _ConvNd) -> str:
    """Returns the name of a class that is not PyTorch's own, though it may be called the same."""
    kind = type(conv)
    return f"{kind.__module__}.{kind.__name__}" if hasattr(nn, kind.__name__) else kind.__name__


# -- which of them are merged ---------------------------------------------------------------------


def _decide(
    sites: Sequence[ConvSite],
    shallow_layers: int | float,
    also_merge: Collection[str],
    included: Collection[str] | None,
    excluded: Collection[str],
) -> list[ConvSite]:
    """Returns the sites, those that are skipped with the reason."""
    counted = [site.name for site in sites if _counts(site, also_merge)]
    shallow = counted[: _shallow_count(shallow_layers, len(counted))]

    def reason(site: ConvSite) -> tuple[str | None, str | None]:
        """Returns the reason in words, and the kind."""
        if included is not None and site.name not in included:
            return "not included", "not_included"
        if site.name in excluded:
            return "excluded", "excluded"
        if site.reason is not None:
            if included is not None:
                raise ValueError(
                    f"include names {site.name!r}, which cannot be merged: {site.reason}"
                )
            return site.reason, site.reason_kind
        if included is not None:
            return None, None
        if site.kind != "kernels" and site.kind not in also_merge:
            return SKIPPED_KINDS[site.kind], site.kind
        return ("shallow", "shallow") if site.name in shallow else (None, None)

    reasons = [reason(site) for site in sites]
    return [
        replace(site, reason=words, reason_kind=kind)
        for site, (words, kind) in zip(sites, reasons, strict=True)
    ]


def _counts(site: ConvSite, also_merge: Collection[str]) -> bool:
    """Returns whether a convolution is a step of depth, merged or not."""
    if site.shape[:2] == (1, 1):  # a filter along the channels (as in ECA), not features
        return False
    return site.kind in {"kernels", "patch_embedding", "frozen", *also_merge}


def _shallow_count(shallow_layers: int | float, depth: int) -> int:
    if isinstance(shallow_layers, int):
        return shallow_layers
    if shallow_layers == 0.0:
        return 0
    return max(1, min(depth - 1, round(shallow_layers * depth)))


def _matching(
    sites: Sequence[ConvSite], argument: str, given: Pattern | Sequence[Pattern]
) -> set[str]:
    """Returns the names that some pattern matches; a pattern without a match is an error."""
    patterns: Any = [given] if isinstance(given, str) or callable(given) else given
    is_list = isinstance(patterns, Collection)
    if not is_list or not all(isinstance(each, str) or callable(each) for each in patterns):
        raise ArgumentError(
            f"<{argument}> must be a name, a function of ConvSite or a list of these, got {given!r}"
        )
    names: set[str] = set()
    for pattern in patterns:
        if callable(pattern):
            names |= {site.name for site in sites if pattern(site)}
            continue
        found = {site.name for site in sites if fnmatchcase(site.name, pattern)}
        if not found:
            known = [site.name for site in sites]
            close = difflib.get_close_matches(pattern, known, n=3, cutoff=0.4)
            raise ArgumentError(
                f"<{argument}={pattern!r}> matches none of the {len(known)} convolutions; "
                f"close names: {', '.join(close or known[-3:])} (* stands for any characters)"
            )
        names |= found
    return names


def _why_empty(skipped: Sequence[ConvSite], shallow_layers: int | float) -> str:
    reasons = Counter(site.reason for site in skipped)
    listed = "; ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    kinds = Counter(site.reason_kind for site in skipped)
    shallow = kinds["shallow"]
    if isinstance(shallow_layers, int) and shallow and shallow_layers >= shallow:
        remedy = (
            f"<shallow_layers={shallow_layers}> leaves none of the {shallow} counted layers: pass "
            f"a smaller count, or a share such as {DEFAULT_SHALLOW_SHARE}"
        )
    elif kinds["adapter"]:
        remedy = (
            "the network trains only through adapters; merge while its own convolutions train, "
            "before the adapters are added or after they are merged into it"
        )
    elif kinds["frozen"]:
        remedy = "unfreeze deep layers before wrapping, or add 'frozen' to <also_merge>"
    elif shallow:
        remedy = (
            "the network is too shallow for a deep part: pass <shallow_layers=0> to merge it all"
        )
    elif kinds["unwritable"]:
        remedy = (
            "merge in a training run before the weights are replaced (wrap and train the network "
            "first, then prepare_qat or parametrise it); lazy layers need one forward pass"
        )
    elif kinds["patch_embedding"]:
        remedy = (
            "choose a convolutional network (for example resnet34); a transformer has no bank of "
            "kernels except the patch embedding, which the option <include> merges anyway"
        )
    else:
        remedy = "choose a network with other convolutions, or name layers with <include>"
    return f"{listed}. Remedy: {remedy}"
