"""Resumable training: every epoch starts from seeds and ends in a checkpoint.

A killed run continues from its last complete epoch and, on a CPU, ends bit for bit as an
uninterrupted one: the order of the images, the augmentation and dropout are drawn from seeds of the
run and the epoch, and merging from its own seed.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from accelerate.utils.memory import should_reduce_batch_size
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from inmerge_wrap.app.batches import derived_seed, open_batches, statistics
from inmerge_wrap.app.model import Normalise
from inmerge_wrap.app.operating import cross_entropy
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


@dataclass(frozen=True)
class Data:
    """The images of a training: what they are, and the set of each part."""

    collection: ImageCollection
    sets: dict[str, ImageSet]


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


# -- the parts of training ---------------------------------------------------------------------


def balancing_weights(labels: Tensor) -> Tensor:
    """Returns weights for `cross_entropy` with which rare classes count as much as common ones."""
    if labels.ndim == 1:
        counts = labels.bincount().float()
        return len(labels) / (len(counts) * counts)
    return ((labels == 0).sum(0) / (labels == 1).sum(0).clamp_min(1)).clamp_min(1e-3)


def warm_up_and_cosine(warm_up: int, total: int) -> Callable[[int], float]:
    """Returns the share of the peak learning rate: linear warm-up, then cosine decay."""

    def share(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        done = (step - warm_up) / max(1, total - warm_up)
        return float(0.5 * (1 + torch.cos(torch.tensor(torch.pi * min(1.0, done)))))

    return share


def train(
    run: Run, data: Data, options: argparse.Namespace, accelerator: Accelerator, bar: tqdm
) -> None:
    """Trains or resumes one network; writes its best weights and history to a folder."""
    checkpoint = run.folder / "checkpoint.pt"
    training = _Training(run, data, options, accelerator, bar)
    if checkpoint.exists():
        training.load(checkpoint)
    for epoch in range(len(training.history), options.epochs):
        training.epoch(epoch)
        if best_epoch(training.history) == epoch + 1:
            export_weights(training.final, run.folder / "best.safetensors")
        if accelerator.is_main_process:
            training.save(checkpoint)
    if accelerator.is_main_process:
        write_json(run.folder / "training.json", training.result())
        checkpoint.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    accelerator.free_memory()


class _Training:
    """One network in training; what changes are its parts and its history."""

    def __init__(
        self, run: Run, data: Data, options: argparse.Namespace, accelerator: Accelerator, bar: tqdm
    ) -> None:
        self.run, self.options, self.accelerator, self.bar = run, options, accelerator, bar
        self.task, images = data.collection.task, data.sets["train"]
        self.history: list[dict[str, Any]] = []
        set_seed(run.seed)
        network, mean, std = start_network(
            options.arch,
            options.weights,
            num_classes=len(data.collection.classes),
            channels=images.preparation.channels,
        )
        if mean is None or std is None:
            mean, std = statistics(images)
        self.mean, self.std = mean, std
        self.normalise = Normalise(mean, std, accelerator.device)
        self.batches = open_batches(data.sets, options, run.seed, accelerator)
        weights = balancing_weights(images.labels).to(accelerator.device)
        self.loss = partial(cross_entropy, weights=weights if options.class_balanced else None)
        self.network = network.to(accelerator.device)
        steps = len(self.batches.loader)
        total_steps = options.epochs * steps
        model: nn.Module = self.network
        if run.method == "merged":
            model = InMergeWrapper.recommended(model, total_steps=total_steps, seed=run.seed)
        optimizer = create_optimizer_v2(
            self.network, opt="adamw", lr=options.lr, weight_decay=options.weight_decay
        )
        if isinstance(model, InMergeWrapper):
            model.attach(optimizer)
        self.course = LambdaLR(optimizer, warm_up_and_cosine(steps, total_steps))
        self.average = None
        if options.ema:
            self.average = ModelEmaV3(self.network, decay=options.ema, use_warmup=True)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.trained = accelerator.unwrap_model(self.model)
        parts = {
            "model": self.trained,
            "optimizer": self.optimizer,
            "course": self.course,
            "average": self.average,
            "scaler": accelerator.scaler,
        }
        self.parts = {name: part for name, part in parts.items() if part is not None}

    @property
    def final(self) -> nn.Module:
        """The network whose weights are kept: the average, if there is one."""
        return self.network if self.average is None else self.average.module

    def save(self, path: Path) -> None:
        """Writes a checkpoint atomically: after a kill or a power cut, the last one is intact."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        with replacing(path) as draft:
            torch.save(state | {"history": self.history}, draft)

    def load(self, path: Path) -> None:
        """Continues from a checkpoint of at most as many epochs."""
        with of_an_earlier_start(path, remove=path):
            stored = read_pickle(path)
            for name, part in self.parts.items():
                part.load_state_dict(stored[name])
            self.history = stored["history"]
            done = [entry["epoch"] for entry in self.history]
            if done != list(range(1, len(done) + 1)) or not 1 <= len(done) <= self.options.epochs:
                raise ValueError(f"it is of {len(done)} epochs")
            best_epoch(self.history)
        self.bar.update(len(done) * len(self.batches))

    def epoch(self, epoch: int) -> None:
        """Trains for an epoch from its own seeds, validates, and adds both to the history."""
        began = time.perf_counter()
        self.bar.set_description(f"{self.run.name}, epoch {epoch + 1}/{self.options.epochs}")
        loss = self._pass(epoch)
        found = {"epoch": epoch + 1, "loss": loss, **self._validate()}
        found["seconds"] = time.perf_counter() - began
        if isinstance(self.trained, InMergeWrapper):
            report = self.trained.report()
            found["merged_share"] = report.merged / max(report.drawn, 1)
        self.history.append(found)
        area = found["val_auroc"]
        self.bar.set_postfix(loss=f"{loss:.3f}", val_auroc=area and f"{area:.3f}")

    def _pass(self, epoch: int) -> float:
        steps, accelerator = len(self.batches.loader), self.accelerator
        self.batches.start(epoch)
        set_seed(derived_seed(self.run.seed, epoch, accelerator.process_index))
        self.model.train()
        losses = torch.zeros((), device=accelerator.device)
        for step, (pixels, truth) in enumerate(self.batches.loader, start=epoch * steps + 1):
            loss = self.loss(self.model(self.normalise(pixels)), truth)
            accelerator.backward(loss)
            self.optimizer.step()
            self.course.step()
            self.optimizer.zero_grad()
            if self.average is not None:
                self.average.update(self.network, step)
            losses += loss.detach()
            self.bar.update()
        mean = float(losses) / steps
        self._refuse_divergence("the loss", mean)
        return mean

    def _refuse_divergence(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            epoch = len(self.history) + 1
            raise SystemExit(f"{self.run.name}: {what} is {value} in epoch {epoch}: lower --lr")

    @torch.no_grad()
    def _validate(self) -> dict[str, Any]:
        """Loss and AUROC of all validation images, on every process; None if it is undefined."""
        network, found = self.final.eval(), []
        for pixels, labels in self.batches.val_loader:
            pair = network(self.normalise(pixels)).float(), labels
            found.append([part.cpu() for part in self.accelerator.gather_for_metrics(pair)])
            self.bar.update()
        logits, truth = map(torch.cat, zip(*found, strict=True))
        loss = float(cross_entropy(logits, truth))
        self._refuse_divergence("the loss on validation", loss)
        probabilities = to_probabilities(logits.double(), self.task)
        values, _ = classification_metrics(probabilities, truth, task=self.task)
        area = float(values["auroc"])
        return {
            "val_loss": loss,
            "val_auroc": None if math.isnan(area) else area,
        }

    def result(self) -> dict[str, Any]:
        """What is kept of the training beside its weights."""
        config: Any = self.network.pretrained_cfg
        return {
            "method": self.run.method,
            "seed": self.run.seed,
            "mean": self.mean,
            "std": self.std,
            "best_epoch": best_epoch(self.history),
            "history": self.history,
            "arch": config["architecture"],
            "parameters": sum(parameter.numel() for parameter in self.network.parameters()),
            "merging": {key: str(value) for key, value in merging_settings(self.trained).items()},
        }


def standing(entry: dict[str, Any]) -> tuple[float, float]:
    """Returns the sort key of an epoch: validation AUROC, then the loss for ties."""
    return entry["val_auroc"] or 0.0, -entry["val_loss"]


def best_epoch(history: list[dict[str, Any]]) -> int:
    """Returns the best epoch on validation; the first of equals."""
    return max(history, key=standing)["epoch"]
