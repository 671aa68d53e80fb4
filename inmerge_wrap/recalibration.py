"""Recalibration of BatchNorm statistics.

Merging moves kernels after the forward pass that measured them, so the running statistics lag
behind the weights. If merging runs until the last step, they must be recomputed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from inmerge_wrap.unwrapping import named_wrappers

__all__ = ["recalibrate"]


def recalibrate(model: nn.Module, loader: Iterable[Any], *, max_batches: int | None = None) -> int:
    """Recomputes the running statistics of every BatchNorm as a mean over batches.

    Only BatchNorm runs in train mode; dropout and stochastic depth are off, as at inference. The
    mode of every module is restored, and on failure the old statistics too.

    Args:
        model: The network, or a wrapper of it, on its device.
        loader: Batches of images, or tuples that begin with them, preprocessed as in training.
        max_batches: Number of batches to use; None for all.

    Returns:
        The number of batches used; 0 if the network has no BatchNorm statistics.

    Raises:
        TypeError: If a batch is neither a tensor nor a sequence that begins with one.
        ValueError: If the loader yields no batch, or ``max_batches`` is not positive.
    """
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches must be a count >= 1 or None, got {max_batches}")
    norms = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    ]
    batches = _measure(model, norms, loader, max_batches) if norms else 0
    for _, wrapper in named_wrappers(model):
        wrapper.statistics_measured()  # type: ignore[operator]  # or its export would warn
    return batches


def _measure(
    model: nn.Module, norms: list[_BatchNorm], loader: Iterable[Any], max_batches: int | None
) -> int:
    device = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    momenta = [norm.momentum for norm in norms]
    before = [{name: value.clone() for name, value in norm.named_buffers()} for norm in norms]
    batches = 0
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain mean over the batches
            norm.train()
        with torch.no_grad():
            for batch in loader:
                if max_batches is not None and batches >= max_batches:
                    break
                model(_images(batch).to(device))
                batches += 1
        if not batches:
            raise ValueError("the loader yielded no batch, so there are no statistics to measure")
    except BaseException:
        for norm, buffers in zip(norms, before, strict=True):
            for name, value in buffers.items():
                norm.get_buffer(name).copy_(value)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, training in modes:
            module.training = training
    return batches


def _images(batch: Any) -> Tensor:
    first = batch[0] if isinstance(batch, list | tuple) and batch else batch
    if not isinstance(first, Tensor):
        raise TypeError(
            f"a batch must be images or a tuple that begins with them, got {type(batch).__name__}: "
            "pass a generator that yields the image tensors"
        )
    return first
