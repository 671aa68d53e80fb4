"""What the training runs of all studies share: batches, loss, memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset


@contextmanager
def one_line_if_out_of_memory() -> Iterator[None]:
    """Replaces the traceback of an out-of-memory error with one line."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
            raise
        cause = str(error).splitlines()[0]
        raise SystemExit(f"out of memory: the batch of this run is too large ({cause})") from None


def loss_of(task: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns cross-entropy, or binary cross-entropy over the labels of a multi-label task."""
    return F.binary_cross_entropy_with_logits if task == "multilabel" else F.cross_entropy


def batches(accelerator: Accelerator, count: int, batch_size: int, seed: int) -> DataLoader:
    """Yields shuffled indices of the training images, each batch split over the processes.

    Raises:
        SystemExit: If the batch cannot be divided evenly.
    """
    if batch_size < 1 or batch_size % accelerator.num_processes:
        raise SystemExit(
            f"the batch of {batch_size} images must be a positive multiple of the number of "
            f"processes, {accelerator.num_processes}"
        )
    loader = DataLoader(
        TensorDataset(torch.arange(count)),
        batch_size=batch_size // accelerator.num_processes,
        shuffle=True,
        drop_last=count > batch_size,  # BatchNorm cannot train on a last batch of one image
        generator=torch.Generator().manual_seed(seed),
    )
    return accelerator.prepare(loader)
