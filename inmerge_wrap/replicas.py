"""Checks that data-parallel replicas hold the same weights, which DDP itself does not."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from inmerge_wrap.kernels import MergedLayer, is_sharded
from inmerge_wrap.optimizers import fsdp_modules
from inmerge_wrap.plan import MergePlan
from inmerge_wrap.schedule import Schedule
from inmerge_wrap.settings import MergeSettings
from inmerge_wrap.thresholds import Fixed, Quantile, ZScore

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PLAIN = (int, float, str, bool, type(None), Schedule, Fixed, Quantile, ZScore)
_CHECKED_STEPS = 2  # who differs is found at the first step, and the others hear of it at the next
_numbers = itertools.count()


class Replicas:
    """What the replicas of one network share: their settings, and where inputs are uneven the step.

    They talk through the store of the process group. Unlike a collective it makes no process wait
    for another, so that nothing hangs where only some of them step.
    """

    def __init__(self) -> None:
        self.joins = False  # whether DDP's join() is in use, with which some step less often
        self._number: int | None = None  # that of the network, in the order of training
        self._began = 0  # times that the step counter began anew
        self._told = False
        self._checked = 0

    def tell(self, settings: MergeSettings, plan: MergePlan, network: nn.Module) -> None:
        """Tells the others, at the first forward pass, what this process merges with.

        Only of a network inside DDP or FSDP2, which all processes make in the same order. Any other
        may be one that this process alone has.
        """
        if self._told or not _is_distributed():
            return
        is_parallel = DistributedDataParallel._get_active_ddp_module() is not None
        if is_parallel or fsdp_modules(network):
            self._told = True
            self._compare("forward", settings, plan)

    def check(self, settings: MergeSettings, plan: MergePlan) -> None:
        """Checks, at the first steps, that all processes merge with the same settings."""
        if not self._told or self._checked == _CHECKED_STEPS:
            return
        self._checked += 1
        self._compare("step", settings, plan)
        if (differs := self._get("differs")) is not None:
            raise RuntimeError(
                f"the replicas differ in {differs}. With mode='step' each process draws the pairs "
                "itself, so that the weights would drift apart: give every process the same seed, "
                "merging settings and plan (only the data may be drawn by rank)"
            )

    def _compare(self, stage: str, settings: MergeSettings, plan: MergePlan) -> None:
        """Compares the settings with those of the process that came first."""
        mine = {"rank": dist.get_rank(), **_described(settings, plan)}
        first = json.loads(self._store().compare_set(self._key(stage), "", json.dumps(mine)))
        differs = [
            f"{name}: {first[name]} on rank {first['rank']} and {mine[name]} on rank {mine['rank']}"
            for name in mine
            if name != "rank" and first[name] != mine[name]
        ]
        if differs:
            self._store().set(self._key("differs"), "; ".join(differs))

    def follow(self, step: int) -> int:
        """Returns the step counter that the replicas share, before a forward pass.

        Inside DDP's ``join()`` a process that has no batches left takes no steps, while the others
        go on. In a forward pass nobody can be ahead: a step needs the gradients of all that are
        left.
        """
        parallel = DistributedDataParallel._get_active_ddp_module()
        if parallel is not None:
            self.joins = bool(parallel._join_config.enable)
        if not self.joins:
            return step
        return max(step, int(self._get(f"{self._began}/step") or 0))

    def counted(self, step: int) -> None:
        """Tells the others, after a step, where the step counter is."""
        if self.joins:
            self._store().set(self._key(f"{self._began}/step"), str(step))

    def begin(self) -> None:
        """Forgets the shared step counter, where a checkpoint sets another on all processes."""
        self._began += 1

    def _key(self, name: str) -> str:
        if self._number is None:
            self._number = next(_numbers)
        return f"inmerge/{self._number}/{name}"

    def _get(self, name: str) -> str | None:
        store, key = self._store(), self._key(name)
        return store.get(key).decode() if store.check([key]) else None

    def _store(self) -> Any:
        return dist.distributed_c10d._get_default_store()


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _described(settings: MergeSettings, plan: MergePlan) -> dict[str, str]:
    """Returns, by name, all that decides the draws and the moves."""
    chosen = {
        name: repr(value) if isinstance(value, _PLAIN) else type(value).__qualname__
        for name, value in vars(settings).items()
        if name != "inspect_every"
    }
    layers = sha256(repr(plan.merged).encode()).hexdigest()[:8]
    return {**chosen, "plan": f"layers: {len(plan.merged)} ({layers})"}


def compared_weights(layers: Sequence[MergedLayer]) -> dict[str, Tensor]:
    """Returns the weights of merged layers by name; of a computed one, what it is computed from."""
    return {
        f"{layer.site.name}.{name}": parameter
        for layer in layers
        for name, parameter in layer.module.named_parameters()
        if parameter.ndim > 1
    }


def check_replicas(weights: Mapping[str, Tensor], numbers: Mapping[str, int]) -> None:
    """Compares a checksum of each weight over all processes (a collective; waits for the device).

    Weights and other numbers come by name, in the same order on every process. Those that FSDP2
    has sharded exist only once and are left out.
    """
    if not _is_distributed():
        return
    whole = {name: w.detach() for name, w in weights.items() if not is_sharded(w)}
    device = next(iter(weights.values())).device
    sums = [_checksum(weight).to(device) for weight in whole.values()]
    mine = torch.stack([*sums, *torch.tensor(list(numbers.values()), device=device)])
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    differs = torch.stack(everyone).cpu() != everyone[0].cpu()
    if bool(differs.any()):
        names = itertools.compress([*whole, *numbers], differs.any(dim=0).tolist())
        ranks = differs.any(dim=1).nonzero().flatten().tolist()
        raise RuntimeError(
            f"the replicas have drifted apart: {', '.join(names)} differ(s) between rank 0 and "
            f"rank(s) {ranks}. Give every process the same weights, seed and merging settings, and "
            "load checkpoints and change weights on all ranks in the same way"
        )


def _checksum(weight: Tensor) -> Tensor:
    """Returns a wrapping int64 sum over the bits that depends on the position of each kernel."""
    rows = weight.contiguous().view(_INTEGERS[weight.element_size()]).flatten(1)
    place = torch.arange(1, len(rows) + 1, device=weight.device)
    return (rows.sum(dim=1, dtype=torch.int64) * place).sum()
