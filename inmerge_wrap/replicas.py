"""Checks that data-parallel replicas hold the same weights, which DDP itself does not."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["check_replicas"]

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_replicas(weights: Mapping[str, Tensor], numbers: Mapping[str, int]) -> None:
    """Compares a checksum of each weight over all processes (a collective; waits for the device).

    Weights that FSDP2 has sharded exist only once and are left out.

    Args:
        weights: Name -> tensor, the same names in the same order on every process.
        numbers: Name -> another value that must be the same, likewise.

    Raises:
        RuntimeError: On every process, naming the weights that differ and the ranks.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    whole = {name: w.detach() for name, w in weights.items() if not hasattr(w, "full_tensor")}
    device = next(iter(weights.values())).device
    sums = [_checksum(weight).to(device) for weight in whole.values()]
    mine = torch.stack([*sums, *torch.tensor(list(numbers.values()), device=device)])
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    differs = torch.stack(everyone).cpu() != everyone[0].cpu()
    if bool(differs.any()):
        names = [
            name
            for name, bad in zip([*whole, *numbers], differs.any(dim=0).tolist(), strict=True)
            if bad
        ]
        ranks = differs.any(dim=1).nonzero().flatten().tolist()
        raise RuntimeError(
            f"the replicas have drifted apart: {', '.join(names)} differ(s) between rank 0 and "
            f"rank(s) {ranks}. Give every process the same weights, seed and merging settings, and "
            "load checkpoints and change weights on all ranks alike"
        )


def _checksum(weight: Tensor) -> Tensor:
    """Returns a wrapping int64 sum over the bits that depends on the position of each kernel."""
    rows = weight.contiguous().view(_INTEGERS[weight.element_size()]).flatten(1)
    place = torch.arange(1, len(rows) + 1, device=weight.device)
    return (rows.sum(dim=1, dtype=torch.int64) * place).sum()
