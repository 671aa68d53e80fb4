"""What a pass takes: its operations and its memory, counted by PyTorch's dispatcher."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from inmerge_wrap import InMergeWrapper


class Ledger(TorchDispatchMode):
    """Counts operations, and the bytes of new storages that live at the same time."""

    def __init__(self, known: nn.Module) -> None:
        super().__init__()
        self.operations, self.live, self.peak = 0, 0, 0
        self._seen = {p.untyped_storage()._cdata for p in known.state_dict().values()}

    def _free(self, key: int, size: int) -> None:
        self.live -= size
        self._seen.discard(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self._seen:
                size = storage.nbytes()
                self._seen.add(storage._cdata)
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, storage._cdata, size)
        return out


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("threshold", [0.3, -1.0])
def test_a_pass_takes_less_than_the_largest_layer(device: str, threshold: float) -> None:
    network = timm.create_model("resnet18", num_classes=3).to(device)
    model = InMergeWrapper(network, similarity_threshold=threshold, inspect_every=0)
    model.merge_()  # the tally moves to the device once
    sizes = []
    for _ in range(4):
        with Ledger(network) as ledger:
            model.merge_()
        sizes.append((ledger.operations, ledger.peak))
    largest = max(site.fan_in * site.shape[0] * 4 for site in model.plan.merged)
    assert all(peak < largest for _, peak in sizes)
    operations = [count for count, _ in sizes]
    # The number of blocks follows the number of pairs drawn, and nothing grows with the steps.
    assert max(operations) < 1.2 * min(operations)
