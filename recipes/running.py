"""Shared parts of training runs: accelerator, batches, memory, command line."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from tracking import tracking


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that ``start`` reads, besides ``--out``."""
    parser.add_argument(
        "--tracker",
        choices=["tensorboard", "wandb", "trackio", "jsonl"],
        help="tracker for each epoch's figures; jsonl, a file in --out, needs no package "
        "(default: nowhere)",
    )
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="bit-for-bit repeatable on the same machine, with slower kernels where needed",
    )


def make_accelerator(**settings: Any) -> Accelerator:
    """Creates an Accelerator that also works across processes of a CPU-only machine.

    Without ``cpu``, ``torchrun --nproc_per_node 2`` on such a machine would train two networks.
    """
    cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    return Accelerator(cpu=cpu, **settings)


def start(options: argparse.Namespace, project: str, **settings: Any) -> Accelerator:
    """Creates the accelerator of a run and starts its tracker."""
    if options.deterministic:
        # cuBLAS reads it once, when CUDA starts; without it deterministic kernels are refused.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    accelerator = make_accelerator(**tracking(options.tracker, options.out), **settings)
    accelerator.init_trackers(project, {key: str(value) for key, value in vars(options).items()})
    return accelerator


@contextmanager
def one_line_if_out_of_memory() -> Iterator[None]:
    """Replaces the traceback of an out-of-memory error with a one-line remedy."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
            raise
        cause = str(error).splitlines()[0]
        raise SystemExit(f"out of memory: pass a smaller --batch-size ({cause})") from None


def loss_of(task: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns cross-entropy, or binary cross-entropy over the labels of a multi-label task."""
    return F.binary_cross_entropy_with_logits if task == "multilabel" else F.cross_entropy


def per_process(batch_size: int, processes: int) -> int:
    """Returns the batch size of each process.

    Raises:
        SystemExit: If the batch cannot be divided evenly.
    """
    if batch_size < 1 or batch_size % processes:
        raise SystemExit(
            f"--batch-size {batch_size} is the size over all processes: "
            f"pass a positive multiple of their number, {processes}"
        )
    return batch_size // processes


def batches(accelerator: Accelerator, count: int, batch_size: int, seed: int) -> DataLoader:
    """Yields shuffled indices of the training images, each batch split over the processes."""
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(
        TensorDataset(torch.arange(count)),
        batch_size=per_process(batch_size, accelerator.num_processes),
        shuffle=True,
        drop_last=count > batch_size,  # BatchNorm cannot train on a last batch of one image
        generator=generator,
    )
    return accelerator.prepare(loader)


class Waited:
    """A loader that adds up the seconds that the loop waited for its batches.

    They are an upper bound of the idle time of an accelerator, which works through its queue.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader, self.seconds = loader, 0.0

    def __iter__(self) -> Iterator[Any]:
        began = time.perf_counter()
        for batch in self.loader:
            self.seconds += time.perf_counter() - began
            yield batch
            began = time.perf_counter()
        self.seconds += time.perf_counter() - began
