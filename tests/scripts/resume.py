"""One epoch under Accelerate, saved in the middle; or the second half of it, in a new process.

    python tests/scripts/resume.py FOLDER SAFE straight|resume

Prints the digest of the final weights, step counter and statistics.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from inmerge_wrap import InMergeWrapper
from tests.scripts.common import EXAMPLE, batch, digest, tiny_net

HALF, WHOLE = 5, 12


class Run:
    """Shuffled data, dropout, momentum, a scheduler: everything that a checkpoint must hold."""

    def __init__(self, seed: int, mode: str = "step") -> None:
        set_seed(0)  # orders the batches; what else is random shall come from the checkpoint
        torch.rand(1 + seed)
        self.accelerator = Accelerator(
            cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True)
        )
        net = nn.Sequential(nn.Dropout(0.2), tiny_net(seed))
        self.model = InMergeWrapper(
            net,
            shallow_layers=1,
            similarity_threshold=0.0,
            example_input=EXAMPLE,
            mode=mode,
        )
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.model.attach(optimizer)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-2, total_steps=WHOLE)
        data = TensorDataset(*batch(0, size=4 * WHOLE))
        # A generator of its own: an iterator would else draw from the restored global one.
        own = torch.Generator().manual_seed(0)
        loader = DataLoader(data, batch_size=4, shuffle=True, generator=own)
        self.prepared, self.optimizer, self.scheduler, self.loader = self.accelerator.prepare(
            self.model, optimizer, scheduler, loader
        )

    def train(self, folder: Path | None = None, safe: bool = True, first: int = 0) -> str:
        """Trains to the end of the epoch; saves after HALF batches if a folder is given."""
        self.loader.set_epoch(0)
        loader: Any = self.loader
        if first:
            loader = self.accelerator.skip_first_batches(self.loader, first)
        for number, (images, labels) in enumerate(loader, start=first):
            self.optimizer.zero_grad()
            self.accelerator.backward(nn.functional.cross_entropy(self.prepared(images), labels))
            self.optimizer.step()
            self.scheduler.step()
            if folder and number + 1 == HALF:
                self.accelerator.save_state(str(folder), safe_serialization=safe)
        return digest(self.model.state_dict())

    def resume(self, folder: Path) -> str:
        self.accelerator.load_state(str(folder))
        assert self.model.step == HALF
        return self.train(first=HALF)


def main() -> None:
    folder, safe, mode = Path(sys.argv[1]), sys.argv[2] == "safe", sys.argv[3]
    torch.set_num_threads(1)
    if mode == "straight":
        print(Run(seed=0).train(folder, safe))
    else:
        print(Run(seed=1).resume(folder))  # nothing but the checkpoint may bring the runs together


if __name__ == "__main__":
    main()
