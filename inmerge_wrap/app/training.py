"""Resumable training: every epoch starts from seeds and ends in a checkpoint.

A killed run continues from its last complete epoch and, on a CPU, ends bit for bit as an
uninterrupted one: the order of the images, the augmentation and dropout are drawn from seeds of the
run and the epoch, and merging from its own seed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from accelerate.utils.memory import should_reduce_batch_size
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm import tqdm

from inmerge_wrap.app.batches import Batches, derived_seed, open_batches, statistics
from inmerge_wrap.app.model import Normalise
from inmerge_wrap.app.records import of_an_earlier_start
from inmerge_wrap.app.starting_weights import start_network
from inmerge_wrap.card import merging_settings
from inmerge_wrap.checkpoints import read_pickle
from inmerge_wrap.export import export_weights
from inmerge_wrap.files import replacing, write_json
from inmerge_wrap.images.collection import ImageCollection
from inmerge_wrap.images.sets import ImageSet
from inmerge_wrap.robustness import classification_metrics
from inmerge_wrap.robustness.metrics import to_probabilities
from inmerge_wrap.wrapper import InMergeWrapper


@dataclass(frozen=True)
class Run:
    """One training."""

    method: str
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        """Display name."""
        return f"{self.method}, seed {self.seed}"


# -- processes ---------------------------------------------------------------------------------


def make_accelerator(**settings: Any) -> Accelerator:
    """Creates an Accelerator that also works across processes of a CPU-only machine.

    Without ``cpu``, ``torchrun --nproc_per_node 2`` on such a machine would train two networks.
    """
    cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    return Accelerator(cpu=cpu, **settings)


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


def merged_share(model: nn.Module) -> dict[str, float]:
    """Returns the share of merged pairs; empty without merging.

    Waits for the device, so call it at the end of an epoch, not in every step.
    """
    if not isinstance(model, InMergeWrapper):
        return {}
    report = model.report()
    return {"merged_share": report.merged / report.drawn if report.drawn else 0.0}


# -- the parts of training ---------------------------------------------------------------------


def loss_of(
    task: str, labels: Tensor, *, balanced: bool, device: torch.device
) -> Callable[[Tensor, Tensor], Tensor]:
    """Computes cross-entropy; binary, over the known labels, for a multi-label task."""
    if task == "multiclass":
        counts = labels.bincount().float()
        weights = (len(labels) / (len(counts) * counts)).to(device) if balanced else None
        return lambda logits, truth: F.cross_entropy(logits, truth, weight=weights)
    ratio = (labels == 0).sum(0) / (labels == 1).sum(0).clamp_min(1)
    positive = ratio.clamp_min(1e-3).to(device) if balanced else None

    def binary(logits: Tensor, truth: Tensor) -> Tensor:
        known = ~truth.isnan()
        losses = F.binary_cross_entropy_with_logits(
            logits, truth.nan_to_num(), pos_weight=positive, reduction="none"
        )
        return (losses * known).sum() / known.sum().clamp_min(1)

    return binary


def warm_up_and_cosine(warm_up: int, total: int) -> Callable[[int], float]:
    """Returns the share of the peak learning rate: linear warm-up, then cosine decay."""

    def share(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        done = (step - warm_up) / max(1, total - warm_up)
        return float(0.5 * (1 + torch.cos(torch.tensor(torch.pi * min(1.0, done)))))

    return share


@torch.no_grad()
def predict(
    network: nn.Module,
    loader: DataLoader,
    normalise: Normalise,
    accelerator: Accelerator,
    bar: tqdm,
) -> tuple[Tensor, Tensor]:
    """Returns logits and labels of all images of a prepared loader, on the CPU of every process."""
    was_training = network.training
    network.eval()
    outputs, truths = [], []
    for pixels, labels in loader:
        pair = network(normalise(pixels)).float(), labels
        scored, truth = accelerator.gather_for_metrics(pair)
        outputs.append(scored.cpu())
        truths.append(truth.cpu())
        bar.update()
    network.train(was_training)
    return torch.cat(outputs), torch.cat(truths)


def validation_auroc(logits: Tensor, labels: Tensor, task: str) -> float | None:
    """Returns the AUROC that selects the best epoch; None if it is undefined on validation."""
    probabilities = to_probabilities(logits.double(), task)
    values, _ = classification_metrics(probabilities, labels, task=task)
    area = float(values["auroc"])
    return None if area != area else area


@dataclass
class _Training:
    """What changes while a network trains; all of it goes into the checkpoint."""

    network: nn.Module
    model: nn.Module
    optimizer: Optimizer
    course: LambdaLR
    average: ModelEmaV3 | None
    accelerator: Accelerator
    history: list[dict[str, Any]]

    @property
    def final(self) -> nn.Module:
        """The network whose weights are kept: the average, if there is one."""
        return self.network if self.average is None else self.average.module

    def _parts(self) -> dict[str, Any]:
        parts = {
            "model": self.accelerator.unwrap_model(self.model),
            "optimizer": self.optimizer,
            "course": self.course,
            "average": self.average,
            "scaler": self.accelerator.scaler,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def save(self, path: Path) -> None:
        """Writes a checkpoint atomically: after a kill or a power cut, the last one is intact."""
        if self.accelerator.is_main_process:
            state = {name: part.state_dict() for name, part in self._parts().items()}
            with replacing(path) as draft:
                torch.save(state | {"history": self.history}, draft)

    def load(self, path: Path, epochs: int) -> None:
        """Continues from a checkpoint of at most as many epochs."""
        with of_an_earlier_start(path, remove=path):
            stored = read_pickle(path)
            for name, part in self._parts().items():
                part.load_state_dict(stored[name])
            self.history = stored["history"]
            done = [entry["epoch"] for entry in self.history]
            if done != list(range(1, len(done) + 1)) or not 1 <= len(done) <= epochs:
                raise ValueError(f"it is of {len(done)} epochs")
            best_epoch(self.history)


def _begin(
    run: Run, network: nn.Module, steps: int, options: argparse.Namespace, accelerator: Accelerator
) -> _Training:
    """The network with its optimizer, and merging where the run merges; ``steps`` an epoch."""
    total_steps = options.epochs * steps
    network = network.to(accelerator.device)
    model: nn.Module = network
    if run.method == "merged":
        model = InMergeWrapper.recommended(network, total_steps=total_steps, seed=run.seed)
    optimizer = create_optimizer_v2(
        network, opt="adamw", lr=options.lr, weight_decay=options.weight_decay
    )
    if isinstance(model, InMergeWrapper):
        model.attach(optimizer)
    course = LambdaLR(optimizer, warm_up_and_cosine(steps, total_steps))
    average = ModelEmaV3(network, decay=options.ema, use_warmup=True) if options.ema else None
    model, optimizer = accelerator.prepare(model, optimizer)
    return _Training(network, model, optimizer, course, average, accelerator, [])


def train(
    run: Run,
    sets: dict[str, ImageSet],
    collection: ImageCollection,
    options: argparse.Namespace,
    accelerator: Accelerator,
    bar: tqdm,
) -> None:
    """Trains or resumes one network; writes its best weights and history to a folder.

    Every epoch starts from its own seeds and ends in a checkpoint that replaces the last one
    atomically, so a killed run loses at most one epoch and reaches the same weights.
    """
    checkpoint, task = run.folder / "checkpoint.pt", collection.task
    set_seed(run.seed)
    network, mean, std = start_network(
        options.arch,
        options.weights,
        num_classes=len(collection.classes),
        channels=sets["train"].preparation.channels,
    )
    if mean is None or std is None:
        mean, std = statistics(sets["train"])
    normalise = Normalise(mean, std, accelerator.device)
    batches = open_batches(sets, options, run.seed, accelerator)
    training = _begin(run, network, len(batches.loader), options, accelerator)
    loss_function = loss_of(
        task,
        sets["train"].labels,
        balanced=options.class_balanced,
        device=accelerator.device,
    )
    if checkpoint.exists():
        training.load(checkpoint, options.epochs)
        bar.update(len(training.history) * len(batches))
    for epoch in range(len(training.history), options.epochs):
        began = time.perf_counter()
        bar.set_description(f"{run.name}, epoch {epoch + 1}/{options.epochs}")
        loss = _epoch(run, training, batches, epoch, loss_function, normalise, bar)
        logits, truth = predict(training.final, batches.val_loader, normalise, accelerator, bar)
        area = validation_auroc(logits, truth, task)
        plain = loss_of(task, truth, balanced=False, device=logits.device)
        entry = {
            "epoch": epoch + 1,
            "loss": loss,
            "val_loss": float(plain(logits, truth)),
            "val_auroc": area,
            "seconds": time.perf_counter() - began,
        }
        training.history.append(entry | merged_share(accelerator.unwrap_model(training.model)))
        bar.set_postfix(loss=f"{loss:.3f}", val_auroc=area and f"{area:.3f}")
        if best_epoch(training.history) == epoch + 1:
            export_weights(training.final, run.folder / "best.safetensors")
        training.save(checkpoint)
    if accelerator.is_main_process:
        _write_result(run, training, mean, std)
        checkpoint.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    accelerator.free_memory()


def _epoch(
    run: Run,
    training: _Training,
    batches: Batches,
    epoch: int,
    loss_function: Callable[[Tensor, Tensor], Tensor],
    normalise: Normalise,
    bar: tqdm,
) -> float:
    """Trains for an epoch; returns the mean loss."""
    accelerator, steps = training.accelerator, len(batches.loader)
    batches.start(epoch)
    set_seed(derived_seed(run.seed, epoch, accelerator.process_index))
    training.model.train()
    losses = torch.zeros((), device=accelerator.device)
    for step, (pixels, truth) in enumerate(batches.loader, start=epoch * steps + 1):
        loss = loss_function(training.model(normalise(pixels)), truth)
        accelerator.backward(loss)
        training.optimizer.step()
        training.course.step()
        training.optimizer.zero_grad()
        if training.average is not None:
            training.average.update(training.network, step)
        losses += loss.detach()
        bar.update()
    mean_loss = float(losses) / steps
    if not torch.isfinite(losses):
        raise SystemExit(f"{run.name}: the loss is {mean_loss} in epoch {epoch + 1}: lower --lr")
    return mean_loss


def _write_result(run: Run, training: _Training, mean: list[float], std: list[float]) -> None:
    config: Any = training.network.pretrained_cfg
    trained = training.accelerator.unwrap_model(training.model)
    result = {
        "method": run.method,
        "seed": run.seed,
        "mean": mean,
        "std": std,
        "best_epoch": best_epoch(training.history),
        "history": training.history,
        "arch": config["architecture"],
        "parameters": sum(parameter.numel() for parameter in training.network.parameters()),
        "merging": {key: str(value) for key, value in merging_settings(trained).items()},
    }
    write_json(run.folder / "training.json", result)


def standing(entry: dict[str, Any]) -> tuple[float, float]:
    """Returns the sort key of an epoch: validation AUROC, then the loss for ties."""
    return entry["val_auroc"] or 0.0, -entry["val_loss"]


def best_epoch(history: list[dict[str, Any]]) -> int:
    """Returns the best epoch on validation; the first of equals."""
    return max(history, key=standing)["epoch"]
