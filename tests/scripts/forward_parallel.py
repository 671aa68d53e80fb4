"""Merging in the forward pass under DDP and FSDP2, compared with both batches in one process.

See two_ranks.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from inmerge_wrap import InMergeWrapper
from tests.scripts.common import attached, loss_of, sgd, wrapped
from tests.scripts.sharded import distance, shard

STEPS = 4
CASES: dict[str, dict[str, Any]] = {
    "outputs": {
        "mode": "outputs",
        "direction": "signed",
        "similarity_threshold": -1.0,
        "merge_probability": 1.0,
    },
    "outputs, compared": {"mode": "outputs", "direction": "signed", "radius": 0.3},
    "weights": {"mode": "weights", "direction": "signed", "radius": 0.3},
}


def in_one_process(world: int, **settings: Any) -> tuple[InMergeWrapper, list[int]]:
    """Each rank's batch in a forward pass of its own; the gradient is their mean."""
    model, optimizer = attached(**settings)
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(world):
            (loss_of(model, step * world + rank) / world).backward()
        optimizer.step()
    return model, [layer.drawn for layer in model.report()]


def in_parallel(kind: str, **settings: Any) -> dict[str, Any]:
    rank, world = dist.get_rank(), dist.get_world_size()
    model = wrapped(**settings)
    parallel: nn.Module = DistributedDataParallel(model) if kind == "ddp" else shard(model)
    optimizer = sgd(model)
    model.attach(optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(parallel, step * world + rank).backward()
        optimizer.step()
        model.eval()
        with torch.no_grad():  # FSDP2 leaves the weights of its root gathered
            loss_of(parallel, step)
        model.train()
    expected, drawn = in_one_process(world, **settings)
    plain, _ = in_one_process(world, **settings | {"merge_weight": 1.0, "radius": None})
    report = model.report()
    # In the weights each pass of the one process counts its kernels again.
    return {
        "worst": distance(model, expected),
        "moved": distance(expected, plain),
        "drawn": [layer.drawn * world for layer in report] == drawn,
        "merged": report.merged,
        "step": model.step,
    }
