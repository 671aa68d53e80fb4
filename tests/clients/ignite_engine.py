"""Ignite: create_supervised_trainer, Checkpoint, EMAHandler.

python -m tests.clients.ignite_engine
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, create_supervised_trainer
from ignite.handlers import Checkpoint, EMAHandler
from torch import nn

from inmerge_wrap import InMergeWrapper
from tests.clients.check import check, loader, merged, run, wrapped
from tests.scripts.common import digest, sgd


def parts(mode: str, seed: int = 0) -> tuple[InMergeWrapper, Any, Engine]:
    model = wrapped(mode, seed)  # InMerge
    optimizer = sgd(model)
    model.attach(optimizer)  # InMerge
    return model, optimizer, create_supervised_trainer(model, optimizer, nn.CrossEntropyLoss())


def resumes(folder: Path, mode: str) -> None:
    straight, _, trainer = parts(mode)
    trainer.run(loader(), max_epochs=4)
    merged(straight, 16)
    first, optimizer, trainer = parts(mode)
    trainer.run(loader(), max_epochs=2)
    objects = {"model": first, "optimizer": optimizer}
    saver = Checkpoint(objects, str(folder))
    saver(trainer)
    saved = torch.load(folder / str(saver.last_checkpoint), weights_only=True)
    second, optimizer, trainer = parts(mode, seed=1)
    Checkpoint.load_objects({"model": second, "optimizer": optimizer}, saved)
    trainer.run(loader(), max_epochs=2)
    check("resumed to the bit", digest(second.state_dict()) == digest(straight.state_dict()))


def averages(folder: Path, mode: str) -> None:
    model, _, trainer = parts(mode)
    handler = EMAHandler(model, momentum=0.1)
    handler.attach(trainer)
    trainer.run(loader(), max_epochs=2)
    merged(model, 8)
    check("the average merges nothing", handler.ema_model.step == 0)
    check(
        "the average is another",
        digest(handler.ema_model.state_dict()) != digest(model.state_dict()),
    )


if __name__ == "__main__":
    run(("pytorch-ignite",), resumes, averages)
