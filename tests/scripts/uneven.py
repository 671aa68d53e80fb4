"""Two replicas of plain DDP whose settings or numbers of batches differ; see two_ranks.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from inmerge_wrap import InMergeWrapper
from tests.scripts.common import batch, digest, loss_of, weights_of, wrapped

Case = Callable[[], dict[str, Any]]


def steps(model: nn.Module, optimizer: Any, numbers: Iterable[int]) -> None:
    rank = dist.get_rank()
    for number in numbers:
        images, labels = batch(10 * number + rank)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()


def parallel(draws: int = 0, **settings: Any) -> tuple[InMergeWrapper, Any, torch.optim.SGD]:
    model = wrapped(**settings)
    model.seed = draws
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model.attach(optimizer)
    return model, DistributedDataParallel(model), optimizer


def failed(run: Callable[[], None]) -> dict[str, Any]:
    try:
        run()
    except RuntimeError as error:
        return {"error": str(error)}
    return {"error": None}


def found_apart(**settings: Any) -> dict[str, Any]:
    """The error, and at which step."""
    model, ddp, optimizer = parallel(**settings)
    return {**failed(lambda: steps(ddp, optimizer, range(3))), "step": model.step}


def other_seeds() -> dict[str, Any]:
    return found_apart(draws=dist.get_rank())


def other_radius() -> dict[str, Any]:
    return found_apart(direction="signed", radius=0.1 * (1 + dist.get_rank()))


def other_plan() -> dict[str, Any]:
    return found_apart(exclude=("mid",) if dist.get_rank() else ())


def other_seeds_in_the_forward_pass() -> dict[str, Any]:
    return found_apart(mode="outputs", draws=dist.get_rank())


def other_intervals_of_inspection() -> dict[str, Any]:
    return found_apart(inspect_every=100 * dist.get_rank())


def changed_alike_after_attaching() -> dict[str, Any]:
    model, ddp, optimizer = parallel()
    model.seed = 5
    return failed(lambda: steps(ddp, optimizer, range(3)))


def by_hand() -> dict[str, Any]:
    model = wrapped()
    model.seed = dist.get_rank()
    ddp = DistributedDataParallel(model)

    def run() -> None:
        for number in range(3):
            loss_of(ddp, number).backward()
            model.merge_()

    return {**failed(run), "step": model.step}


def only_one_steps() -> dict[str, Any]:
    """A teacher or a generator that one process trains; the other does something else."""
    alone = wrapped(merge_weight=0.5)
    if dist.get_rank() == 0:
        optimizer = torch.optim.SGD(alone.parameters(), lr=0.05)
        alone.attach(optimizer)
        steps(alone, optimizer, range(3))
    model, ddp, optimizer = parallel()
    steps(ddp, optimizer, range(3))
    return {"step": model.step, "alone": alone.step}


def joined(**settings: Any) -> tuple[InMergeWrapper, list[str]]:
    """Three epochs in which rank 1 runs out of batches first, then one with as many for both."""
    model, ddp, optimizer = parallel(**settings)
    ends = []
    for epoch in range(3):
        with ddp.join():
            steps(ddp, optimizer, range(10 * epoch, 10 * epoch + 5 - 2 * dist.get_rank()))
        ends.append(digest(weights_of(model)))
    steps(ddp, optimizer, range(40, 43))
    ends.append(digest(weights_of(model)))
    return model, ends


def uneven() -> dict[str, Any]:
    model, ends = joined()
    return {"ends": ends, "step": model.step, "merged": model.report().merged}


def uneven_in_the_forward_pass() -> dict[str, Any]:
    model, ends = joined(mode="outputs")
    return {"ends": ends, "step": model.step}


def uneven_but_compared(**settings: Any) -> dict[str, Any]:
    _, ddp, optimizer = parallel(check_replicas_every=2, **settings)

    def run() -> None:
        with ddp.join():
            steps(ddp, optimizer, range(3))

    return failed(run)


def uneven_but_compared_in_the_forward_pass() -> dict[str, Any]:
    return uneven_but_compared(mode="outputs")


CASES: tuple[Case, ...] = (
    only_one_steps,
    other_seeds,
    other_radius,
    other_plan,
    other_seeds_in_the_forward_pass,
    other_intervals_of_inspection,
    changed_alike_after_attaching,
    by_hand,
    uneven,
    uneven_in_the_forward_pass,
    uneven_but_compared,
    uneven_but_compared_in_the_forward_pass,
)
