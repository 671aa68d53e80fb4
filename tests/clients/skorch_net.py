"""skorch: fit, partial_fit, save_params and load_params.

python -m tests.clients.skorch_net
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from skorch import NeuralNetClassifier
from torch import nn

from inmerge_wrap import InMergeWrapper
from tests.clients.check import check, merged, run, wrapped
from tests.scripts.common import batch, digest


class MergingClassifier(NeuralNetClassifier):
    """Attaches each optimizer that skorch makes."""

    def initialize_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        super().initialize_optimizer(*args, **kwargs)
        self.module_.attach(self.optimizer_)  # InMerge
        return self


def classifier(mode: str, seed: int = 0) -> MergingClassifier:
    return MergingClassifier(
        wrapped(mode, seed),  # InMerge
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.SGD,
        optimizer__momentum=0.9,
        lr=0.05,
        batch_size=4,
        train_split=None,
        iterator_train__shuffle=False,
        verbose=0,
    ).initialize()


def fit(net: MergingClassifier, epochs: int) -> InMergeWrapper:
    images, labels = batch(0, size=16)
    net.partial_fit(images, labels, epochs=epochs)
    return net.module_


def resumes(folder: Path, mode: str) -> None:
    straight = fit(classifier(mode), 4)
    merged(straight, 16)
    first = classifier(mode)
    fit(first, 2)
    files = {"f_params": folder / "params.pt", "f_optimizer": folder / "optimizer.pt"}
    first.save_params(**files)
    second = classifier(mode, seed=1)
    second.load_params(**files)
    check(
        "resumed to the bit", digest(fit(second, 2).state_dict()) == digest(straight.state_dict())
    )


if __name__ == "__main__":
    run(("skorch",), resumes)
