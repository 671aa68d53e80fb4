"""composer: Trainer with EMA, checkpoints and resume; BlurPool after attach is an error.

python -m tests.clients.composer_trainer
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from composer import Trainer
from composer.algorithms import EMA, BlurPool
from composer.functional import apply_blurpool
from composer.models import ComposerClassifier

from inmerge_wrap import InMergeWrapper
from tests.clients.check import SURE, check, loader, merged, run, wrapped
from tests.scripts.common import digest, sgd


def trainer(mode: str, epochs: int, seed: int = 0, **options: Any) -> tuple[Any, Trainer]:
    model = wrapped(mode, seed)  # InMerge
    optimizer = sgd(model)
    model.attach(optimizer)  # InMerge
    return model, Trainer(
        model=ComposerClassifier(module=model, num_classes=3),
        optimizers=optimizer,
        train_dataloader=loader(),
        max_duration=f"{epochs}ep",
        device="cpu",
        progress_bar=False,
        **options,
    )


def resumes(folder: Path, mode: str) -> None:
    straight, training = trainer(mode, 4)
    training.fit()
    merged(straight, 16)
    _, training = trainer(mode, 2, save_folder=str(folder), save_interval="2ep")
    training.fit()
    (file,) = folder.glob("ep2*.pt")
    second, training = trainer(mode, 4, seed=1, load_path=str(file))
    training.fit()
    check("resumed to the bit", digest(second.state_dict()) == digest(straight.state_dict()))


def averages(folder: Path, mode: str) -> None:
    model, training = trainer(mode, 2, algorithms=[EMA(half_life="4ba")])
    training.fit()
    merged(model, 8)


def surgery_comes_first(folder: Path, mode: str) -> None:
    network = timm.create_model("resnet10t", num_classes=3)
    model = InMergeWrapper(network, shallow_layers=0, mode=mode)
    optimizer = sgd(model)
    model.attach(optimizer)
    images = torch.utils.data.TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8) % 3)
    try:
        Trainer(
            model=ComposerClassifier(module=model, num_classes=3),
            optimizers=optimizer,
            train_dataloader=torch.utils.data.DataLoader(images, batch_size=4),
            max_duration="1ep",
            device="cpu",
            progress_bar=False,
            algorithms=[BlurPool(min_channels=1)],
        ).fit()
    except RuntimeError as error:
        check(f"an error: {error}", "BlurConv2d" in str(error) and "then wrap" in str(error))
    else:
        check("BlurPool after attach is an error", False)


def functional_surgery_before_wrapping(folder: Path, mode: str) -> None:
    network = timm.create_model("resnet10t", num_classes=3)
    apply_blurpool(network, min_channels=1)
    model = InMergeWrapper(network, shallow_layers=0, mode=mode, **SURE)
    optimizer = sgd(model)
    model.attach(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 32, 32)).logsumexp(1).mean().backward()
        optimizer.step()
    blurred = [site.name for site in model.plan.merged if site.name.endswith(".conv")]
    check(f"blurred layers are merged: {', '.join(blurred)}", blurred)
    merged(model, 3)


if __name__ == "__main__":
    run(("mosaicml",), resumes, averages, surgery_comes_first, functional_surgery_before_wrapping)
