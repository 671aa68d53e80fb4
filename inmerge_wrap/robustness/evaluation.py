"""Evaluation of a model on clean, corrupted and attacked images.

`evaluate_robustness` runs one model over one set of images, clean and corrupted, and returns plain
rows. It takes any `nn.Module` that maps (B, C, H, W) to logits and leaves it unchanged: the mode of
each module, gradients, buffers and the global random generators are restored.

    result = evaluate_robustness(model, loader, preset="dermatoscopy", mean=0.5, std=0.5)
    result.value("balanced_error", "motion_blur", severity=3)
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from inmerge_wrap.robustness.attacks import Attack, PixelClassifier, attack_batch, worst_case
from inmerge_wrap.robustness.corruptions import Corruption, check_images, corrupt, resolve_preset
from inmerge_wrap.robustness.metrics import (
    LEVEL,
    bootstrap_weights,
    check_coverages,
    check_logits,
    check_targets,
    classification_metrics,
    percentile_interval,
    resolve_task,
    to_probabilities,
)

__all__ = ["RobustnessResult", "compare_results", "evaluate_robustness"]

_CLEAN = ("clean", 0)

Row = dict[str, Any]
Condition = tuple[str, int | str]


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
    centre = torch.as_tensor(mean, dtype=torch.float32).reshape(-1, 1, 1)
    scale = torch.as_tensor(std, dtype=torch.float32).reshape(-1, 1, 1)
    if not (scale > 0).all():
        raise ValueError(f"std is {std}; every entry must be positive")

    def apply(pixels: Tensor) -> Tensor:
        for name, values in (("mean", centre), ("std", scale)):
            if len(values) not in (1, pixels.shape[1]):
                raise ValueError(
                    f"{name} has {len(values)} entries for {pixels.shape[1]} channels; give one, "
                    "or one each"
                )
        return (pixels - centre.to(pixels)) / scale.to(pixels)

    return apply


# --- the evaluation -------------------------------------------------------------------------------


@dataclass
class RobustnessResult:
    """The result of `evaluate_robustness`.

    Attributes:
        rows: One plain dict per condition. `corruption` and `severity` identify it: "clean" and 0,
            a corruption and 1 ... 5 or "mean" (over its severities), "all" and "mean" (over the
            corruptions), or an attack and its eps. Then `kind`, `n`, and each metric by name with
            `_low` and `_high`. An undefined metric is absent; `left_out` gives the reason, and
            names the classes that a mean leaves out.
        settings: What the figures depend on, with a fingerprint of the data.
        seconds: Wall-clock time in corruption, inference, attacks and statistics.
        replicates: Bootstrap values of the balanced error per condition, for intervals of
            ratios between two models; not written to JSON.
    """

    rows: list[Row]
    settings: dict[str, Any]
    seconds: dict[str, float]
    replicates: dict[Condition, np.ndarray] = field(default_factory=dict, repr=False)

    def row(self, corruption: str = "clean", severity: int | float | str | None = None) -> Row:
        """Returns the row of a condition.

        Args:
            corruption: "clean", a corruption, "all" or an attack.
            severity: 1 ... 5, "mean", or the eps of an attack; if None: the only row of "clean" or
                of an attack, and the mean over the severities of a corruption.

        Raises:
            ValueError: If there is no such row, or more than one.
        """
        rows = [row for row in self.rows if row["corruption"] == corruption]
        if severity is None and len(rows) > 1:
            severity = "mean"
        found = [row for row in rows if severity is None or row["severity"] == severity]
        if len(found) != 1:
            known = ", ".join(dict.fromkeys(str(row["corruption"]) for row in self.rows))
            have = [row["severity"] for row in rows]
            raise ValueError(
                f"{len(found)} rows for {corruption!r} at severity {severity!r}; "
                + (f"choose one of {have}" if rows else f"choose from {known}")
            )
        return found[0]

    def value(
        self,
        metric: str,
        corruption: str = "clean",
        severity: int | float | str | None = None,
    ) -> float | None:
        """Returns a figure of the row that `row` finds, or None where it is undefined."""
        return self.row(corruption, severity).get(metric)

    def to_json(self, path: str | Path | None = None) -> str:
        """Returns rows, settings and seconds as JSON text, also written to `path` if given."""
        content = {"settings": self.settings, "seconds": self.seconds, "rows": self.rows}
        text = json.dumps(content, indent=1, allow_nan=False)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, path: str | Path) -> RobustnessResult:
        """Reads a file of `to_json`. As a baseline it yields BE and rBE without intervals."""
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(content["rows"], content["settings"], content["seconds"])


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
    coverages: Sequence[float] = (0.5, 0.8, 0.9),
    bootstrap: int = 1000,
    device: torch.device | str | None = None,
    progress: Callable[[int], None] | None = None,
) -> RobustnessResult:
    """Evaluates a model on corrupted and attacked images.

    The loader is read once; each batch goes through the model clean, at every corruption and
    severity, and under every attack. Images are corrupted as pixels in [0, 1] and normalised after
    that. The corruption of an image depends only on its index in the loader and on `seed`, so all
    models that are given the same data see the same images, whatever their batch size.

    Against a baseline model, with E the balanced error, c a corruption and s a severity:

        BE_c  = mean_s E(c, s) / mean_s E_base(c, s)
        rBE_c = (mean_s E(c, s) - E(clean)) / (mean_s E_base(c, s) - E_base(clean))

    and BE, rBE are their means over the corruptions (F. Di Salvo et al., MedMNIST-C, arXiv
    2406.17536, with AlexNet as the baseline; after D. Hendrycks, T. Dietterich, arXiv 1903.12261).
    Below 1 is better than the baseline. If the denominator is not positive (a baseline that
    makes no errors or loses nothing to the corruption), the ratio is undefined: absent, and left
    out of the mean over the corruptions. Its interval is absent if it is undefined in more than
    2.5 % of the resamples: the baseline's loss is not distinguishable from zero.

    Intervals are 95 % percentile intervals of a bootstrap over images. All conditions, and all
    models on data of the same size and the same seed, share the resamples, so those of BE and rBE
    are paired. That of the ECE is shifted by the bootstrap's estimate of its bias, which is upward,
    because resampling adds to the variation within the bins. Intervals cover the choice of test
    images, not the training seed: for that, compare seeds with `paired_difference`.

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
        coverages: Shares of the images for the selective accuracy.
        bootstrap: Number of resamples; 0 for no intervals.
        device: Where the model is; taken from its parameters if None.
        progress: Called with the number of images after each condition of a batch: each image
            passes once clean, once for every corruption and severity, once for every attack.

    Returns:
        Rows, settings and times.

    Raises:
        ValueError: If a setting is out of range, the loader is empty or shuffles, images are not in
            [0, 1], labels do not fit the outputs, logits are not finite, or the baseline was
            measured on other data.
        ImportError: If kornia (or, for attacks, the Adversarial Robustness Toolbox) is missing.
    """
    task = resolve_task(task)
    corruptions = resolve_preset(preset)
    normalise = _normaliser(mean, std, normalize)
    check_coverages(coverages)
    levels = tuple(severities)
    if not levels or len(set(levels)) < len(levels) or not set(levels) <= {1, 2, 3, 4, 5}:
        raise ValueError(f"severities is {levels}; choose some of 1, 2, 3, 4, 5, each once")
    if bootstrap < 0:
        raise ValueError(f"bootstrap is {bootstrap}; it must be >= 0")
    if isinstance(getattr(loader, "sampler", None), torch.utils.data.RandomSampler):
        raise ValueError(
            "the loader shuffles, and the corruption of an image depends on its index: every model "
            "would see different images; build it with shuffle=False"
        )
    chosen_attacks = [Attack(entry) if isinstance(entry, str) else entry for entry in attacks]
    names = [(attack.name, attack.eps) for attack in chosen_attacks]
    if len(set(names)) < len(names):
        raise ValueError(f"attacks repeat a name and eps: {names}; give each once")
    where = _device_of(model, device)

    with _undisturbed(model, where):
        run = _run(
            model,
            loader,
            corruptions,
            levels,
            chosen_attacks,
            normalise=normalise,
            task=task,
            threshold=threshold,
            seed=seed,
            device=where,
            progress=progress or (lambda images: None),
        )
    settings = {
        "task": task,
        "corruptions": [entry.name for entry in corruptions],
        "severities": list(levels),
        "seed": seed,
        "threshold": threshold if isinstance(threshold, int | float) else list(threshold),
        "coverages": list(coverages),
        "bootstrap": bootstrap,
        "attacks": [asdict(attack) for attack in chosen_attacks],
        "n": len(run.targets),
        "data_sha256": run.digest,
    }
    if baseline is not None:
        _check_baseline(baseline, settings)

    started = time.perf_counter()
    weights = bootstrap_weights(len(run.targets), bootstrap, seed=seed)
    scores = {
        condition: _score(logits, run.targets, task, threshold, coverages, weights)
        for condition, logits in run.logits.items()
    }
    rows = _rows(scores, corruptions, levels, chosen_attacks, len(run.targets), baseline)
    run.seconds["statistics"] = time.perf_counter() - started
    replicates = {
        condition: score.replicates["balanced_error"]
        for condition, score in scores.items()
        if "balanced_error" in score.replicates
    }
    return RobustnessResult(rows, settings, run.seconds, replicates)


def compare_results(result: RobustnessResult, baseline: RobustnessResult) -> list[Row]:
    """Compares the balanced error of two models on the same images; below 0 is better.

    Both models are scored on the same resamples of the images, so that the effect
    of an image's difficulty on both cancels: the interval is narrower than the two would suggest.

    Args:
        result: Result of the model in question.
        baseline: Result of the model to compare with, on the same data with the same settings.

    Returns:
        One dict for each condition, in the order of `result.rows`: `corruption`, `severity`,
        `kind`, `difference`, and its 95 % percentile interval `difference_low`, `difference_high`
        if both results were computed with a bootstrap in this process. Conditions where a
        balanced error is undefined are absent.

    Raises:
        ValueError: If the two were measured on different data, with different settings, or under
            different corruptions.
    """
    _check_baseline(baseline, result.settings)
    differences = []
    for row in result.rows:
        condition = row["corruption"], row["severity"]
        theirs = baseline.value("balanced_error", *condition)
        if "balanced_error" not in row or theirs is None:
            continue
        entry: Row = {name: row[name] for name in ("corruption", "severity", "kind")}
        entry["difference"] = row["balanced_error"] - theirs
        mine_drawn, their_drawn = (_drawn(of, *condition) for of in (result, baseline))
        if mine_drawn is not None and their_drawn is not None:
            interval = percentile_interval(mine_drawn - their_drawn)
            if interval is not None:
                entry["difference_low"], entry["difference_high"] = interval
        differences.append(entry)
    return differences


def _drawn(
    result: RobustnessResult, corruption: str, severity: int | float | str
) -> np.ndarray | None:
    """Returns the bootstrap values of the balanced error of any row, means included."""
    if corruption == "all":
        parts = [_drawn(result, name, "mean") for name in result.settings["corruptions"]]
    elif severity == "mean":
        levels = result.settings["severities"]
        parts = [result.replicates.get((corruption, level)) for level in levels]
    else:
        key = str(severity) if isinstance(severity, float) else severity
        return result.replicates.get((corruption, key))
    known = [part for part in parts if part is not None]
    # An interval must belong to the same mean as the value, or be absent.
    return np.mean(known, axis=0) if known and len(known) == len(parts) else None


@dataclass
class _Run:
    """Raw outcome of one pass over the loader."""

    logits: dict[Condition, Tensor]
    targets: Tensor
    digest: str
    seconds: dict[str, float]


@dataclass
class _Score:
    """Metrics of one condition: values, bootstrap values, and what is left out and why."""

    values: dict[str, float]
    replicates: dict[str, np.ndarray]
    left_out: dict[str, str]


def _device_of(model: nn.Module, device: torch.device | str | None) -> torch.device:
    tensor = next(iter([*model.parameters(), *model.buffers()]), None)
    if device is None:
        return tensor.device if tensor is not None else torch.device("cpu")
    wanted = torch.device(device)
    if tensor is not None and (
        tensor.device.type != wanted.type or wanted.index not in (None, tensor.device.index)
    ):
        raise ValueError(f"device is {wanted} and the model is on {tensor.device}; move the model")
    return tensor.device if tensor is not None else wanted


@contextmanager
def _undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluates in eval mode, then restores modes, gradients and the global generators."""
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            # Flags, not eval(): a module may override eval() and leave its own flag untouched.
            for module, _ in modes:
                module.training = False
            for parameter, _, _ in parameters:
                parameter.requires_grad_(False)
            yield
        finally:
            for module, training in modes:
                module.training = training
            for parameter, requires_grad, gradient in parameters:
                parameter.requires_grad_(requires_grad)
                parameter.grad = gradient
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def _run(
    model: nn.Module,
    loader: Iterable[Any],
    corruptions: Sequence[Corruption],
    levels: Sequence[int],
    attacks: Sequence[Attack],
    *,
    normalise: Callable[[Tensor], Tensor],
    task: str,
    threshold: float | Sequence[float],
    seed: int,
    device: torch.device,
    progress: Callable[[int], None],
) -> _Run:
    """Runs every batch through the model: clean, corrupted and attacked."""
    logits: dict[Condition, list[Tensor]] = {}
    targets: list[Tensor] = []
    digest = hashlib.sha256()
    seconds = {"corruption": 0.0, "inference": 0.0, "attacks": 0.0}
    network = PixelClassifier(model, normalise, task)
    seen = 0

    @contextmanager
    def clock(what: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds[what] += time.perf_counter() - started

    def infer(pixels: Tensor) -> Tensor:
        with torch.no_grad(), clock("inference"):
            found = check_logits(model(normalise(pixels)), pixels, task)
        if any(module.training for module in model.modules()):
            raise RuntimeError("the model put itself into train mode: its outputs are worthless")
        return found

    for batch in loader:
        if not isinstance(batch, list | tuple) or len(batch) < 2:
            raise ValueError(
                f"the loader yielded a {type(batch).__name__}; batches (images, labels) are needed"
            )
        images, labels = batch[0], torch.as_tensor(batch[1])
        check_images(images)
        digest.update(images.detach().float().cpu().contiguous().numpy().tobytes())
        images = images.to(device)
        clean = infer(images)
        truth = check_targets(labels, clean.shape, task)
        targets.append(truth.cpu())
        logits.setdefault(_CLEAN, []).append(clean.float().cpu())
        progress(len(images))
        indices = range(seen, seen + len(images))
        for entry in corruptions:
            for level in levels:
                with clock("corruption"):
                    damaged = corrupt(images, entry, level, seed=seed, indices=indices)
                logits.setdefault((entry.name, level), []).append(infer(damaged).float().cpu())
                progress(len(images))
        for attack in attacks:
            with clock("attacks"):
                moved = attack_batch(
                    attack,
                    network,
                    images,
                    truth.to(device),
                    outputs=clean.shape[1],
                    seed=seed + seen,
                )
            worst = worst_case(clean, infer(moved), truth.to(device), task, threshold)
            logits.setdefault((attack.name, str(attack.eps)), []).append(worst.float().cpu())
            progress(len(images))
        seen += len(images)
    if not targets:
        raise ValueError("the loader is empty; give it at least one batch (images, labels)")
    joined = torch.cat(targets)
    digest.update(joined.numpy().tobytes())
    return _Run(
        {condition: torch.cat(parts) for condition, parts in logits.items()},
        joined,
        digest.hexdigest(),
        seconds,
    )


def _score(
    logits: Tensor,
    targets: Tensor,
    task: str,
    threshold: float | Sequence[float],
    coverages: Sequence[float],
    weights: np.ndarray,
) -> _Score:
    def metrics(given: Tensor | None) -> tuple[dict[str, Tensor], dict[str, str]]:
        return classification_metrics(
            probabilities,
            targets,
            task=task,
            threshold=threshold,
            coverages=coverages,
            weights=given,
        )

    probabilities = to_probabilities(logits, task)
    points, left_out = metrics(None)
    values = {name: float(point) for name, point in points.items() if not point.isnan()}
    # Resamples in chunks, so that a large data set does not need them all in memory at once.
    portion = max(1, 20_000_000 // len(targets))
    parts = [
        metrics(torch.from_numpy(weights[:, start : start + portion]))[0]
        for start in range(0, weights.shape[1], portion)
    ]
    replicates = {
        name: np.concatenate([part[name].double().numpy() for part in parts])
        for name in values
        if parts
    }
    return _Score(values, replicates, left_out)


def _rows(
    scores: Mapping[Condition, _Score],
    corruptions: Sequence[Corruption],
    levels: Sequence[int],
    attacks: Sequence[Attack],
    n: int,
    baseline: RobustnessResult | None,
) -> list[Row]:
    """Returns one row per condition, then each corruption's mean, then the mean of all."""
    clean = scores[_CLEAN]
    rows = [_row("clean", "clean", 0, n, clean)]
    means = []
    for entry in corruptions:
        per_level = [scores[entry.name, level] for level in levels]
        rows += [
            _row(entry.name, entry.kind, level, n, score)
            for level, score in zip(levels, per_level, strict=True)
        ]
        mean = _mean_score(per_level)
        if baseline is not None:
            _add_ratios(mean, entry.name, clean, baseline)
        means.append(mean)
        rows.append(_row(entry.name, entry.kind, "mean", n, mean))
    rows.append(_row("all", "all", "mean", n, _mean_score(means)))
    rows += [
        _row(attack.name, "attack", attack.eps, n, scores[attack.name, str(attack.eps)])
        for attack in attacks
    ]
    return rows


def _row(corruption: str, kind: str, severity: int | float | str, n: int, score: _Score) -> Row:
    row: Row = {"corruption": corruption, "kind": kind, "severity": severity, "n": n}
    for name, value in score.values.items():
        row[name] = value
        drawn = score.replicates.get(name, np.empty(0))
        if name == "ece" and drawn.size:
            drawn = np.maximum(0, drawn - (drawn.mean() - value))
        interval = percentile_interval(drawn)
        if interval is not None:
            row[f"{name}_low"], row[f"{name}_high"] = interval
    if score.left_out:
        row["left_out"] = score.left_out
    return row


def _mean_score(scores: Sequence[_Score]) -> _Score:
    """Returns the mean of every figure over those conditions for which it is defined."""
    values, replicates = {}, {}
    for name in dict.fromkeys(name for score in scores for name in score.values):
        defined = [score for score in scores if name in score.values]
        values[name] = float(np.mean([score.values[name] for score in defined]))
        # An interval must belong to the same mean as the value, or be absent.
        if all(name in score.replicates for score in defined):
            replicates[name] = np.mean([score.replicates[name] for score in defined], axis=0)
    reasons: dict[str, list[str]] = {}
    for score in scores:
        for name, reason in score.left_out.items():
            if reason not in reasons.setdefault(name, []):
                reasons[name].append(reason)
    return _Score(values, replicates, {name: "; ".join(why) for name, why in reasons.items()})


def _add_ratios(score: _Score, corruption: str, clean: _Score, baseline: RobustnessResult) -> None:
    """Adds BE and rBE of one corruption to its mean over the severities, where they are defined."""
    if "balanced_error" not in score.values:
        return
    base = baseline.value("balanced_error", corruption, "mean")
    base_clean = baseline.value("balanced_error")
    if base is None or base_clean is None:
        return
    drawn, base_drawn = None, None
    condition_means = [
        values for (name, _), values in baseline.replicates.items() if name == corruption
    ]
    if condition_means and "balanced_error" in score.replicates:
        drawn = score.replicates["balanced_error"]
        base_drawn = np.mean(condition_means, axis=0)
    value = score.values["balanced_error"]
    terms = {
        "be": (value, base, drawn, base_drawn),
        "rbe": (
            value - clean.values["balanced_error"],
            base - base_clean,
            None if drawn is None else drawn - clean.replicates["balanced_error"],
            None if base_drawn is None else base_drawn - baseline.replicates[_CLEAN],
        ),
    }
    for name, (above, below, above_drawn, below_drawn) in terms.items():
        if below <= 1e-12:
            what = "makes no error under" if name == "be" else "loses nothing to"
            score.left_out[name] = f"the baseline {what} {corruption}"
            continue
        score.values[name] = above / below
        if above_drawn is None or below_drawn is None:
            continue
        defined = below_drawn > 1e-12
        if np.mean(~defined) <= (1 - LEVEL) / 2:
            score.replicates[name] = np.where(
                defined, above_drawn / np.where(defined, below_drawn, 1.0), math.nan
            )


def _check_baseline(baseline: RobustnessResult, settings: Mapping[str, Any]) -> None:
    names = ["data_sha256", "task", "severities", "seed", "threshold"]
    if baseline.replicates:
        names.append("bootstrap")
    for name in names:
        theirs = baseline.settings.get(name)
        if theirs != settings[name]:
            raise ValueError(
                f"the baseline was measured with {name} {theirs!r}, not {settings[name]!r}: run it "
                "again on the same data with the same settings"
            )
    missing = sorted(set(settings["corruptions"]) - set(baseline.settings["corruptions"]))
    if missing:
        raise ValueError(
            f"the baseline was not measured under {', '.join(missing)}: run it with the same preset"
        )
