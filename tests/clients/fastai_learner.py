"""fastai: Learner with torch's optimizers and its own, freeze and unfreeze, save and load.

python -m tests.clients.fastai_learner
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from torch import nn

from tests.clients.check import check, loader, merged, run, wrapped
from tests.scripts.common import digest, weights_of


class Merging(Callback):
    """Attaches the optimizer of each fit: fastai makes it there, and again with ``reset_opt``."""

    def before_fit(self) -> None:
        self.learn.model.attach(self.learn.opt.opt)  # InMerge


class MergingByHand(Callback):
    """For fastai's own optimizers, which are none of torch's."""

    def after_step(self) -> None:
        self.learn.model.merge_()  # InMerge


TORCH_SGD = partial(OptimWrapper, opt=torch.optim.SGD, momentum=0.9)


def learner(
    folder: Path, mode: str, seed: int = 0, callback: Callable[[], Callback] = Merging
) -> Learner:
    options = {"opt_func": TORCH_SGD} if callback is Merging else {}
    learn = Learner(
        DataLoaders(loader(), loader(), device=torch.device("cpu")),
        wrapped(mode, seed),  # InMerge
        loss_func=nn.CrossEntropyLoss(),
        lr=0.05,
        path=folder,
        cbs=[callback()],
        splitter=lambda model: [
            [p for n, p in model.named_parameters() if "head" not in n],
            list(model.module.head.parameters()),
        ],
        train_bn=False,
        **options,
    )
    learn.remove_cbs([cb for cb in learn.cbs if cb.name in ("progress", "recorder")])
    return learn


def resumes(folder: Path, mode: str) -> None:
    straight = learner(folder, mode)
    straight.fit(4)
    merged(straight.model, 16)
    first = learner(folder, mode)
    first.fit(2)
    first.save("half")
    second = learner(folder, mode, seed=1)
    second.load("half")
    second.fit(2)
    check(
        "resumed to the bit",
        digest(second.model.state_dict()) == digest(straight.model.state_dict()),
    )


def replaces_its_optimizer(folder: Path, mode: str) -> None:
    learn = learner(folder, mode)
    learn.fit(1)
    learn.fit(1, reset_opt=True)
    merged(learn.model, 8)


def freezes_and_unfreezes(folder: Path, mode: str) -> None:
    learn = learner(folder, mode)
    before = weights_of(learn.model.mid)
    learn.freeze()
    learn.fit(1)
    after = weights_of(learn.model.mid)
    check("frozen kernels stay", all(torch.equal(before[n], after[n]) for n in before))
    learn.unfreeze()
    learn.fit(1)
    check("kernels merge once they thaw", learn.model.report().merged > 0)
    check("8 steps were seen", learn.model.step == 8)


def merges_by_hand(folder: Path, mode: str) -> None:
    if mode != "step":
        return  # there is no step to put the kernels back at
    learn = learner(folder, mode, callback=MergingByHand)
    learn.fit(2)
    merged(learn.model, 8)


if __name__ == "__main__":
    run(("fastai",), resumes, replaces_its_optimizer, freezes_and_unfreezes, merges_by_hand)
