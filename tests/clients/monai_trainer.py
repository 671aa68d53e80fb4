"""MONAI: SupervisedTrainer with CheckpointSaver and CheckpointLoader, on a DenseNet of its own.

python -m tests.clients.monai_trainer
"""

from __future__ import annotations

from pathlib import Path

import torch
from monai.engines import SupervisedTrainer
from monai.handlers import CheckpointLoader, CheckpointSaver
from monai.networks.nets import DenseNet
from torch import nn
from torch.utils.data import DataLoader

from inmerge_wrap import InMergeWrapper
from tests.clients.check import SURE, check, merged, run
from tests.scripts.common import batch, digest


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return DenseNet(
        spatial_dims=2,
        in_channels=3,
        out_channels=3,
        init_features=8,
        growth_rate=4,
        block_config=(2, 2),
    )


def train(
    epochs: int, mode: str, seed: int = 0, save: Path | None = None, load: Path | None = None
) -> InMergeWrapper:
    images, labels = batch(0, size=16)
    data = [{"image": i, "label": n} for i, n in zip(images, labels, strict=True)]
    model = InMergeWrapper(  # InMerge
        network(seed), example_input=images[:1], mode=mode, **SURE
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model.attach(optimizer)  # InMerge
    handlers = []
    objects = {"model": model, "optimizer": optimizer}
    if load is not None:
        handlers.append(CheckpointLoader(str(load), objects))
    if save is not None:
        handlers.append(CheckpointSaver(str(save), objects, save_final=True))
    trainer = SupervisedTrainer(
        device="cpu",
        max_epochs=epochs,
        train_data_loader=DataLoader(data, batch_size=4),
        network=model,
        optimizer=optimizer,
        loss_function=nn.CrossEntropyLoss(),
        train_handlers=handlers,
    )
    trainer.run()
    return model


def resumes(folder: Path, mode: str) -> None:
    straight = train(4, mode)
    merged(straight, 16)
    train(2, mode, save=folder)
    (file,) = folder.glob("*.pt")
    second = train(2, mode, seed=1, load=file)
    check("resumed to the bit", digest(second.state_dict()) == digest(straight.state_dict()))


if __name__ == "__main__":
    run(("monai", "pytorch-ignite"), resumes)
