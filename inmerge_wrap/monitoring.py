"""Live statistics of merging for TensorBoard, Weights & Biases or any other tracker.

accelerator.log(tracker_values(model), step=step)
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from inmerge_wrap.report import MergeReport
from inmerge_wrap.similarity import effective_rank, read_kernels
from inmerge_wrap.unwrapping import find_wrapper

__all__ = ["tracker_values"]


@torch.no_grad()
def tracker_values(
    model: nn.Module, *, since: MergeReport | None = None, prefix: str = "merge"
) -> dict[str, float]:
    """Returns what merging does as a flat dict of numbers, as experiment trackers take it.

    For every merged layer: ``PREFIX_share/LAYER``, merged over drawn pairs;
    ``PREFIX_cosine/LAYER``, the mean cosine of the drawn pairs; ``PREFIX_rank/LAYER``, the
    effective rank of its kernels now (it falls when kernels become copies of each other).
    ``PREFIX/share`` and ``PREFIX/step`` describe the whole network. A value that is not defined
    yet, such as a share before the first pair is drawn, is absent.

    It waits for the device and compares all kernels of the merged layers, so do not log every
    step. Under FSDP2 all ranks must call it together.

    Args:
        model: An InMergeWrapper, or one inside DDP or torch.compile, as ``prepare`` returns it.
        since: An earlier ``model.report()``: shares and cosines are then those of the pairs drawn
            after it; without it, of all pairs from the start.
        prefix: Prefix of all names.

    Returns:
        Finite numbers by name.

    Raises:
        TypeError: If there is no InMergeWrapper in the model.
        ValueError: If ``since`` is the report of another model.
    """
    wrapper: Any = find_wrapper(model)
    if wrapper is None:
        raise TypeError(f"no InMergeWrapper in this {type(model).__name__}: nothing merges")
    report = wrapper.report()
    names = [layer.name for layer in report]
    if since is not None and [layer.name for layer in since] != names:
        raise ValueError("since is the report of a model with other merged layers")
    if since is not None and since.drawn > report.drawn:
        raise ValueError(
            f"since counts {since.drawn:,} {since.unit} and the model {report.drawn:,}: take a new "
            "report() after restart() or after an earlier checkpoint was loaded"
        )
    values = {f"{prefix}/step": float(wrapper.step)}
    layers = zip(since or [None] * len(names), report, strict=True)
    new = replace(report, layers=tuple(layer.since(earlier) for earlier, layer in layers))
    if new.drawn:
        values[f"{prefix}/share"] = new.share
    for layer in new:
        if layer.drawn:
            values[f"{prefix}_share/{layer.name}"] = layer.share
        if layer.mean_cosine is not None:
            values[f"{prefix}_cosine/{layer.name}"] = layer.mean_cosine
    for name, rank in zip(names, _ranks(wrapper), strict=True):
        if math.isfinite(rank):
            values[f"{prefix}_rank/{name}"] = rank
    return values


def _ranks(wrapper: Any) -> list[float]:
    ranks = []
    for site in wrapper.plan.merged:
        conv = wrapper.module.get_submodule(site.name)
        ranks.append(effective_rank(read_kernels(conv, centred=site.centred), site.pair_groups))
    first = ranks[0].device  # a network may be spread over several
    return torch.stack([rank.to(first) for rank in ranks]).tolist()
