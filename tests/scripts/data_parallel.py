"""Trains on each rank of DDP under Accelerate and writes what became of the weights.

    python -m torch.distributed.run --nproc_per_node 2 tests/scripts/data_parallel.py FOLDER CASE...

Every rank writes FOLDER/RANK.json: case -> outcome.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from inmerge_wrap import InMergeWrapper
from inmerge_wrap.merging import draw_pairs
from tests import reference
from tests.scripts.common import MERGED, SETTINGS, batch, digest, sgd, tiny_net, weights_of


class NoisyNet(nn.Module):
    """Its dropout reads the global generator, as augmentation does in a real run."""

    def __init__(self) -> None:
        super().__init__()
        self.body = tiny_net()
        self.drop = nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self.drop(x))


def loop(accelerator: Accelerator, model: Any, optimizer: Any, after_step: Any = None) -> Any:
    """Two epochs over data of which each rank sees its own part; returns the prepared model."""
    torch.manual_seed(100 + accelerator.process_index)
    images, labels = batch(0, size=64)
    loader = DataLoader(TensorDataset(images, labels), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for _ in range(2):
        for images, labels in loader:
            if accelerator.process_index == 1:
                torch.rand(1)  # what a rank does alone must not matter
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            if after_step:
                after_step()
    return model


def wrap(**settings: Any) -> InMergeWrapper:
    return InMergeWrapper(NoisyNet(), **{**SETTINGS, **settings})


def merged(accelerator: Accelerator) -> dict[str, Any]:
    model = wrap(check_replicas_every=3)
    optimizer = sgd(model)
    model.attach(optimizer)
    prepared = loop(accelerator, model, optimizer)
    assert accelerator.unwrap_model(prepared) is model
    buffers = {name: b.double() for name, b in model.named_buffers()}
    return {
        "weights": digest(weights_of(model)),
        "buffers": digest(buffers),
        "report": model.report().to_dict(),
        "global generator": torch.get_rng_state().sum().item(),
        "parallel": type(prepared).__name__,
    }


def drawn_globally(accelerator: Accelerator) -> dict[str, Any]:
    """The control: the same merging, drawn from the global generator."""
    net = NoisyNet()

    def merge() -> None:
        for name in MERGED:
            weight = net.body.get_submodule(name).weight
            targets, sources = draw_pairs(len(weight), 0.6, torch.default_generator)
            pairs = list(zip(targets.tolist(), sources.tolist(), strict=True))
            reference.merge_on(weight, pairs, merge_weight=0.8, similarity_threshold=0.0)

    loop(accelerator, net, sgd(net), merge)
    return {"weights": digest(weights_of(net))}


def one_rank_changed(accelerator: Accelerator) -> dict[str, Any]:
    model = wrap(check_replicas_every=4)
    optimizer = sgd(model)
    model.attach(optimizer)
    steps = 0

    def disturb() -> None:
        nonlocal steps
        steps += 1
        if steps == 6 and accelerator.process_index == 1:
            with torch.no_grad():
                model.module.body.last.weight[3, 0, 0, 0] += 1e-6

    try:
        loop(accelerator, model, optimizer, disturb)
    except RuntimeError as error:
        return {"error": str(error), "step": model.step}
    return {"error": None}


def one_rank_resumed(accelerator: Accelerator) -> dict[str, Any]:
    """A checkpoint loaded on rank 0 alone: DDP sends the weights around, but no step counter."""
    model = wrap(check_replicas_every=50)
    if accelerator.process_index == 0:
        trained = wrap()
        trained.merge_()
        model.load_state_dict(trained.state_dict())
    optimizer = sgd(model)
    model.attach(optimizer)
    try:
        loop(accelerator, model, optimizer)
    except RuntimeError as error:
        return {"error": str(error)}
    return {"error": None}


def saved_and_resumed(accelerator: Accelerator) -> dict[str, Any]:
    """Saved by all ranks in the middle, and gone on from there once more."""
    model = wrap(check_replicas_every=1)
    optimizer = sgd(model)
    model.attach(optimizer)
    prepared, optimizer = accelerator.prepare(model, optimizer)

    def train(start: int, stop: int) -> str:
        for number in range(start, stop):
            images, labels = batch(10 * number + accelerator.process_index)
            optimizer.zero_grad()
            accelerator.backward(nn.functional.cross_entropy(prepared(images), labels))
            optimizer.step()
        return digest(weights_of(model))

    train(0, 4)
    accelerator.save_state("state")
    accelerator.wait_for_everyone()
    straight = train(4, 8)
    accelerator.load_state("state")
    return {"steps": model.step, "straight": straight, "resumed": train(4, 8)}


def main() -> None:
    folder, *cases = sys.argv[1:]
    os.chdir(folder)
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    known = (merged, drawn_globally, one_rank_changed, one_rank_resumed, saved_and_resumed)
    by_name = {case.__name__: case for case in known}
    outcome = {case: by_name[case](accelerator) for case in cases}
    outcome["world"] = accelerator.num_processes
    Path(folder, f"{accelerator.process_index}.json").write_text(json.dumps(outcome))
    accelerator.end_training()


if __name__ == "__main__":
    main()
