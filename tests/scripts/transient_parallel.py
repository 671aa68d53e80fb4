"""Transient merging on each rank of DDP, and under FSDP2; writes what became of the weights.

    python -m torch.distributed.run --nproc_per_node 2 tests/scripts/transient_parallel.py FOLDER

Every rank writes FOLDER/RANK.json.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.scripts.common import digest, loss_of, sgd, tiny_net, weights_of, wrapped

LR = 0.05


def replicas(own: bool) -> dict[str, Any]:
    """Four steps of two micro-batches each, the first of which does not synchronise."""
    model = wrapped(transient=True, replica_draws=own, check_replicas_every=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    model.attach(optimizer)
    parallel = DistributedDataParallel(model)
    whole, merged = [], []
    for step in range(4):
        optimizer.zero_grad()
        for micro in range(2):
            with parallel.no_sync() if micro == 0 else nullcontext():
                loss_of(parallel, 8 * step + 2 * dist.get_rank() + micro).backward()
            merged.append(digest(weights_of(model)))
        optimizer.step()
        whole.append(digest(weights_of(model)))
    return {"whole": whole, "merged": merged, "drawn": model.report().drawn}


def mean_gradient() -> dict[str, Any]:
    """A step with draws of one's own, and the same step by hand from each rank's merged network."""
    model = wrapped(transient=True, replica_draws=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    model.attach(optimizer)
    parallel = DistributedDataParallel(model)
    before = weights_of(model)
    loss_of(parallel, 3).backward()
    twin = tiny_net()
    merged = {name.removeprefix("module."): w for name, w in weights_of(model).items()}
    twin.load_state_dict(merged, strict=False)
    loss_of(twin, 3).backward()
    optimizer.step()
    worst = 0.0
    for name, parameter in twin.named_parameters():
        gradient: Tensor = parameter.grad  # type: ignore[assignment]
        dist.all_reduce(gradient)
        expected = before[f"module.{name}"] - LR * gradient / dist.get_world_size()
        worst = max(worst, (weights_of(model)[f"module.{name}"] - expected).abs().max().item())
    return {"worst": worst, "merged": digest(merged)}


def sharded() -> str:
    model = wrapped(transient=True)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    try:
        model.attach(sgd(model))
    except RuntimeError as error:
        return str(error)
    return ""


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(dist.get_rank())
    found = {
        "shared": replicas(own=False),
        "own": replicas(own=True),
        "mean": mean_gradient(),
        "sharded": sharded(),
    }
    Path(sys.argv[1], f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
