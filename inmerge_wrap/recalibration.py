"""BatchNorm's running statistics, measured again.

Merging moves kernels after the forward pass that measured them, so the running statistics lag
behind the weights. If merging runs until the last step, they must be measured again. The same
function adapts a trained network to images of another site (Schneider et al. 2020, Improving
robustness against common corruptions by covariate shift adaptation, arXiv 2006.16971).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from inmerge_wrap.errors import ArgumentError
from inmerge_wrap.unwrapping import named_wrappers

__all__ = ["recalibrate"]


def recalibrate(model: nn.Module, loader: Iterable[Any], *, prior: float = 0.0) -> int:
    """Measures the running statistics of every BatchNorm on the images of a loader.

    The new statistics are the mean of those of the batches, each weighted by its images; of a
    BatchNorm that runs several times in a pass, over all its calls. With ``prior``, each statistic
    becomes ``(prior * old + n * new) / (prior + n)`` for n images. A BatchNorm that does not run,
    such as that of another branch, keeps its statistics.

    Only BatchNorm runs in train mode; dropout and stochastic depth are off, as at inference. The
    mode of every module is restored, and on failure the old statistics too.

    Args:
        model: The network, or a wrapper of it, on its device.
        loader: Batches of images, or tuples that begin with them, preprocessed as in training.
            ``itertools.islice(loader, 100)`` is a part of them.
        prior: Number of images that the old statistics count as; 0 forgets them.

    Returns:
        The number of batches used; 0 if the network has no BatchNorm statistics.

    Raises:
        TypeError: If a batch is neither a tensor nor a sequence that begins with one.
        ValueError: If the loader yields no batch, ``prior`` is negative or not finite, or no
            BatchNorm runs.
    """
    if not isinstance(prior, int | float) or not 0 <= prior < math.inf:
        raise ArgumentError(f"<prior> must be a number of images >= 0, got {prior!r}")
    norms = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    ]
    batches = _measure(model, norms, loader, prior) if norms else 0
    for _, wrapper in named_wrappers(model):
        wrapper.statistics_measured()  # type: ignore[operator]  # or its export would warn
    return batches


def _measure(model: nn.Module, norms: list[_BatchNorm], loader: Iterable[Any], prior: float) -> int:
    modes = [(module, module.training) for module in model.modules()]
    momenta = [norm.momentum for norm in norms]
    before = [{name: value.clone() for name, value in norm.named_buffers()} for norm in norms]
    measured: set[nn.Module] = set()
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
        batches, images, rows = _run(model, norms, loader)
        if not batches:
            raise ValueError("the loader yielded no batch, so there are no statistics to measure")
        if not rows:
            raise ValueError(
                "no BatchNorm runs in the forward pass of these images, so there are no statistics "
                "to measure: pass batches that reach it"
            )
        for norm, old in zip(norms, before, strict=True):
            for name in ("running_mean", "running_var"):
                # An exact 0 keeps nothing, not even an old value that is not finite.
                kept = prior / (prior + images) * old[name] if prior else 0.0
                norm.get_buffer(name).mul_(images / (prior + images)).add_(kept)
        measured = {*rows}
    finally:
        for norm, old, momentum in zip(norms, before, momenta, strict=True):
            norm.momentum = momentum
            if norm not in measured:  # it did not run, or something failed
                for name, value in old.items():
                    norm.get_buffer(name).copy_(value)
        for module, training in modes:
            module.training = training
    return batches


def _run(
    model: nn.Module, norms: list[_BatchNorm], loader: Iterable[Any]
) -> tuple[int, int, dict[nn.Module, int]]:
    """Runs the batches; returns how many there were, their images, and the rows of each norm."""
    device = next(model.parameters()).device
    batches = images = 0
    rows: dict[nn.Module, int] = {}

    def weigh(norm: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        found = len(args[0] if args else kwargs["input"])
        rows[norm] = rows.get(norm, 0) + found
        norm.momentum = found / rows[norm]  # type: ignore[assignment]  # the mean so far

    hooks = [norm.register_forward_pre_hook(weigh, with_kwargs=True) for norm in norms]
    try:
        # A compiled network does not look for new hooks.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            for batch in loader:
                pixels = _images(batch).to(device)
                batches, images = batches + 1, images + len(pixels)
                model(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    return batches, images, rows


def _images(batch: Any) -> Tensor:
    first = batch[0] if isinstance(batch, list | tuple) and batch else batch
    if not isinstance(first, Tensor):
        raise TypeError(
            f"a batch must be images or a tuple that begins with them, got {type(batch).__name__}: "
            "pass a generator that yields the image tensors"
        )
    return first
