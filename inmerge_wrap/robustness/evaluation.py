"""Evaluation of a model on clean, corrupted and attacked images.

`evaluate_robustness` leaves the model unchanged: the mode of each module, gradients and torch's
global random generators are restored.

The loader is read once; each batch goes through the model clean, at every corruption and severity,
and under every attack. Images are corrupted as pixels in [0, 1] and normalised after that. The
corruption of an image depends only on its index in the loader and on the seed, so all models that
are given the same data see the same images, whatever their batch size.

Against a baseline model, with E the balanced error, c a corruption and s a severity:

    BE_c  = mean_s E(c, s) / mean_s E_base(c, s)
    rBE_c = (mean_s E(c, s) - E(clean)) / (mean_s E_base(c, s) - E_base(clean))

and BE, rBE are their means over the corruptions (F. Di Salvo et al., MedMNIST-C, arXiv 2406.17536,
with AlexNet as the baseline; after D. Hendrycks, T. Dietterich, arXiv 1903.12261). Below 1 is
better than the baseline. If the denominator is not positive (a baseline that makes no errors or
loses nothing to the corruption), the ratio is undefined: absent, and left out of the mean over the
corruptions. Its interval is absent if it is undefined in more than 2.5% of the resamples: the
baseline's loss is not distinguishable from zero.

Intervals are 95% percentile intervals of a bootstrap over images. All conditions, and all models
on data of the same size and the same seed, share the resamples, so those of BE and rBE are paired.
That of the ECE is shifted by the bootstrap's estimate of its bias, which is upward, because
resampling adds to the variation within the bins. Intervals cover the choice of test images, not the
training seed: for that, compare seeds with `paired_difference`.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from inmerge_wrap.robustness.attacks import Attack, attack_batch, worst_case
from inmerge_wrap.robustness.corruptions import Corruption, check_images, corrupt, resolve_preset
from inmerge_wrap.robustness.effects import Draws
from inmerge_wrap.robustness.metrics import (
    bootstrap_weights,
    check_logits,
    check_targets,
    resolve_task,
)
from inmerge_wrap.robustness.results import Condition, RobustnessResult, check_baseline
from inmerge_wrap.robustness.scoring import CLEAN, rows_of, score

__all__ = ["evaluate_robustness"]


def evaluate_robustness(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    preset: str | Sequence[str | Corruption],
    task: str = "multiclass",
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    normalize: Callable[[Tensor], Tensor] | None = None,
    severities: Sequence[int] = (1, 2, 3, 4, 5),
    seed: int = 0,
    baseline: RobustnessResult | None = None,
    attacks: Sequence[Attack | str] = (),
    threshold: float | Sequence[float] = 0.5,
    bootstrap: int = 1000,
    groups: Sequence[Hashable] | None = None,
    progress: Callable[[int], None] | None = None,
    scored: Callable[[], None] | None = None,
) -> RobustnessResult:
    """Evaluates a model on clean, corrupted and attacked images.

    Args:
        model: Maps (B, C, H, W) to logits: (B, classes); for a binary task (B,), (B, 1) or (B, 2);
            for a multi-label one (B, labels). It runs in eval mode and is restored afterwards.
        loader: Iterable of batches (images, labels, ...), images floats in [0, 1] *before* any
            normalisation, in a fixed order.
        preset: A name of `PRESETS`, a MedMNIST flag, or a sequence of corruptions.
        task: "multiclass", "binary" or "multilabel", or a task name of MedMNIST.
        mean: Subtracted from the pixels, one value or one per channel.
        std: Divides the pixels after that, likewise.
        normalize: Any function of (B, C, H, W) pixels, in place of mean and std.
        severities: Severities to evaluate, among 1 ... 5.
        seed: Seed of the corruptions, of PGD's starts and of the bootstrap.
        baseline: Result of the model to compare with, on the same data with the same settings.
        attacks: `Attack` objects, or "fgsm" and "pgd" for their defaults (eps 2/255). An attacker
            may leave an image unchanged: one that the attack would correct counts as clean.
        threshold: Operating point of a binary or multi-label task, one or one per label. Choose it
            on validation data: with rare labels, 0.5 predicts nothing.
        bootstrap: Number of resamples; 0 for no intervals.
        groups: Whose image each is, such as patients, in the order of the loader: resamples draw
            whole groups then. None for independent images.
        progress: Called with the number of images after each condition of a batch: each image
            passes once clean, once for every corruption and severity, once for every attack.
        scored: Called after that, as often as there are conditions: each time the metrics and
            intervals of one are known.

    Returns:
        Rows, settings and times.

    Raises:
        ValueError: If a setting is out of range, the loader is empty or shuffles, images are not in
            [0, 1], labels do not fit the outputs, logits are not finite, or the baseline was
            measured on other data.
    """
    if bootstrap < 0:
        raise ValueError(f"bootstrap is {bootstrap}; it must be >= 0")
    if isinstance(getattr(loader, "sampler", None), torch.utils.data.RandomSampler):
        raise ValueError(
            "the loader shuffles, and the corruption of an image depends on its index: every model "
            "would see different images; build it with shuffle=False"
        )
    tensors = itertools.chain(model.parameters(), model.buffers())
    run = _Run(
        model,
        resolve_preset(preset),
        _checked_levels(severities),
        _checked_attacks(attacks),
        task=resolve_task(task),
        normalise=_normaliser(mean, std, normalize),
        threshold=torch.as_tensor(threshold, dtype=torch.float64).tolist(),
        seed=seed,
        device=next((t.device for t in tensors), torch.device("cpu")),
        progress=progress or (lambda images: None),
    )
    with _undisturbed(model, run.device):
        for batch in loader:
            run.add(batch)
    return _result_of(run, bootstrap, groups, baseline, scored or (lambda: None))


def _checked_levels(severities: Sequence[int]) -> tuple[int, ...]:
    levels = tuple(severities)
    if not levels or len(set(levels)) < len(levels) or not set(levels) <= {1, 2, 3, 4, 5}:
        raise ValueError(f"severities is {levels}; choose some of 1, 2, 3, 4, 5, each once")
    return tuple(map(int, levels))


def _checked_attacks(attacks: Sequence[Attack | str]) -> tuple[Attack, ...]:
    chosen = tuple(Attack(entry) if isinstance(entry, str) else entry for entry in attacks)
    names = [(attack.name, attack.eps) for attack in chosen]
    if len(set(names)) < len(names):
        raise ValueError(f"attacks repeat a name and eps: {names}; give each once")
    return chosen


def _normaliser(
    mean: float | Sequence[float] | None,
    std: float | Sequence[float] | None,
    normalize: Callable[[Tensor], Tensor] | None,
) -> Callable[[Tensor], Tensor]:
    if normalize is not None:
        if mean is not None or std is not None:
            raise ValueError("give mean and std, or normalize, not both")
        return normalize
    if mean is None and std is None:
        return lambda pixels: pixels
    if mean is None or std is None:
        raise ValueError(f"mean is {mean} and std is {std}; give both or neither")
    centre, scale = (
        torch.as_tensor(values, dtype=torch.float32).reshape(-1, 1, 1) for values in (mean, std)
    )
    if not (scale > 0).all():
        raise ValueError(f"std is {std}; every entry must be positive")

    def apply(pixels: Tensor) -> Tensor:
        for name, values in (("mean", centre), ("std", scale)):
            if len(values) not in (1, pixels.shape[1]):
                given = f"{name} has {len(values)} entries for {pixels.shape[1]} channels"
                raise ValueError(f"{given}; give one, or one each")
        return (pixels - centre.to(pixels)) / scale.to(pixels)

    return apply


@contextmanager
def _undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluates in eval mode, then restores modes, what is trained, and torch's generators."""
    modes = [(module, module.training) for module in model.modules()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            # Flags, not eval(): a module may override eval() and leave its own flag untouched.
            for module, _ in modes:
                module.training = False
            for parameter in trained:
                parameter.requires_grad_(False)
            yield
        finally:
            for module, training in modes:
                module.training = training
            for parameter in trained:
                parameter.requires_grad_(True)


@dataclass
class _Run:
    """One pass over the loader: the logits of every condition, batch by batch."""

    model: nn.Module
    corruptions: tuple[Corruption, ...]
    levels: tuple[int, ...]
    attacks: tuple[Attack, ...]
    task: str
    normalise: Callable[[Tensor], Tensor]
    threshold: float | list[float]
    seed: int
    device: torch.device
    progress: Callable[[int], None]
    logits: dict[Condition, list[Tensor]] = field(default_factory=dict)
    targets: list[Tensor] = field(default_factory=list)
    digest: Any = field(default_factory=hashlib.sha256)
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("corruption", "inference", "attacks"), 0.0)
    )

    def add(self, batch: Any) -> None:
        """Runs a batch through the model: clean, corrupted and attacked."""
        if not isinstance(batch, list | tuple) or len(batch) < 2:
            raise ValueError(
                f"the loader yielded a {type(batch).__name__}; batches (images, labels) are needed"
            )
        images, labels = batch[0], torch.as_tensor(batch[1])
        check_images(images)
        self.digest.update(images.detach().float().cpu().contiguous().numpy().tobytes())
        images = images.to(self.device)
        clean = self._infer(images)
        truth = check_targets(labels, clean.shape, self.task)
        seen = sum(map(len, self.targets))
        indices = range(seen, seen + len(images))
        self.targets.append(truth.cpu())
        self._keep(CLEAN, clean)
        for entry in self.corruptions:
            for level in self.levels:
                with self._clock("corruption"):
                    damaged = corrupt(images, entry, level, seed=self.seed, indices=indices)
                self._keep((entry.name, level), self._infer(damaged))
        truth = truth.to(self.device)
        for attack in self.attacks:
            draws = Draws(attack.name, indices, seed=self.seed)
            with self._clock("attacks"):
                moved = attack_batch(
                    attack, self._answer, images, truth, task=self.task, draws=draws
                )
            worst = worst_case(clean, self._infer(moved), truth, self.task, self.threshold)
            self._keep((attack.name, attack.eps), worst)

    def _answer(self, pixels: Tensor) -> Tensor:
        return check_logits(self.model(self.normalise(pixels)), pixels, self.task)

    def _infer(self, pixels: Tensor) -> Tensor:
        with torch.no_grad(), self._clock("inference"):
            found = self._answer(pixels)
        if any(module.training for module in self.model.modules()):
            raise RuntimeError("the model put itself into train mode: its outputs are worthless")
        return found

    def _keep(self, condition: Condition, logits: Tensor) -> None:
        self.logits.setdefault(condition, []).append(logits.float().cpu())
        self.progress(len(logits))

    @contextmanager
    def _clock(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[what] += time.perf_counter() - started


def _result_of(
    run: _Run,
    bootstrap: int,
    groups: Sequence[Hashable] | None,
    baseline: RobustnessResult | None,
    scored: Callable[[], None],
) -> RobustnessResult:
    if not run.targets:
        raise ValueError("the loader is empty; give it at least one batch (images, labels)")
    targets = torch.cat(run.targets)
    run.digest.update(targets.numpy().tobytes())
    started = time.perf_counter()
    weights = bootstrap_weights(len(targets), bootstrap, seed=run.seed, groups=groups)
    settings = {
        "task": run.task,
        "corruptions": [entry.name for entry in run.corruptions],
        "severities": list(run.levels),
        "seed": run.seed,
        "threshold": run.threshold,
        "bootstrap": bootstrap,
        "attacks": [asdict(attack) for attack in run.attacks],
        "n": len(targets),
        "data_sha256": run.digest.hexdigest(),
        "resamples_sha256": hashlib.sha256(weights.tobytes()).hexdigest(),
    }
    if baseline is not None:
        check_baseline(baseline, settings)

    scores = {}
    for condition, parts in run.logits.items():
        logits = torch.cat(parts)
        scores[condition] = score(logits, targets, run.task, run.threshold, weights)
        scored()
    rows, drawn = rows_of(scores, settings, run.corruptions, baseline)
    run.seconds["statistics"] = time.perf_counter() - started
    return RobustnessResult(rows, settings, run.seconds, drawn, torch.cat(run.logits[CLEAN]))
