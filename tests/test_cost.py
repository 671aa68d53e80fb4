"""What a pass takes: its operations and its memory, counted by PyTorch's dispatcher."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from inmerge_wrap import InMergeWrapper, MergeSettings
from inmerge_wrap.outputs import Outputs
from inmerge_wrap.pairs import Outcome
from inmerge_wrap.plan import ConvSite
from inmerge_wrap.settings import Strength
from inmerge_wrap.weights import Weights


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


@pytest.mark.parametrize("threshold", [0.3, -1.0])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_pass_takes_the_memory_of_one_layer(device: str, threshold: float) -> None:
    network = timm.create_model("resnet18", num_classes=3).to(device)
    model = InMergeWrapper(network, similarity_threshold=threshold, inspect_every=0, compiled=False)
    model.merge_()  # the tally moves to the device once
    sizes = []
    for _ in range(4):
        with Ledger(network) as ledger:
            model.merge_()
        sizes.append((ledger.operations, ledger.peak))
    # Of the drawn kernels, .3 of a layer: the kernels, their partners, products and blends.
    largest = max(site.fan_in * site.shape[0] * 4 for site in model.plan.merged)
    assert all(peak < 5 * 0.4 * largest for _, peak in sizes)
    assert len({count for count, _ in sizes}) == 1  # nothing grows with the steps


class Waits(TorchDispatchMode):
    """Names the operations that copy to a GPU while the host waits."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        devices = {each.device.type for each in (*args, out) if isinstance(each, torch.Tensor)}
        copies = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if copies and devices == {"cpu", "cuda"} and not (kwargs or {}).get("non_blocking"):
            self.found.append(str(func))
        return out


def test_what_a_step_draws_is_sent_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors stand for those of a GPU, which is not needed."""
    every = torch.arange(8)
    monkeypatch.setattr("inmerge_wrap.weights.draw_layer", lambda *_: (every, every.flip(0)))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda values: values)
    sites, cuda = [ConvSite("conv", depth=1, shape=(8, 3, 3, 3))], torch.device("cuda")
    with FakeTensorMode(allow_non_fake_inputs=True):
        ways, cosines = (Outputs(sites, cuda), Weights(sites, cuda, {})), torch.zeros(8).to(cuda)
        with Waits() as waits:
            for way in ways:
                way.set_step(0, Strength(1.0, 0.8), MergeSettings())
            assert Outcome([0], [8], cosines, cosines > 0).layer.device.type == "cuda"
    assert waits.found == []


def test_on_the_outputs_nothing_but_shares_is_kept_for_the_backward_pass() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(4)))
    images = torch.randn(16, 8, 24, 24)
    settings = {"direction": "signed", "similarity_threshold": -1.0, "merge_probability": 1.0}

    def saved(model: nn.Module) -> int:
        """Bytes that autograd keeps, each storage once."""
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage.nbytes()
            storages.append(storage)  # no other may take its address
            return tensor

        storages: list[Any] = []
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(images)
        return sum(kept.values())

    plain = saved(network)
    model = InMergeWrapper(
        network, mode="outputs", shallow_layers=0, example_input=images, **settings
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.attach(optimizer)
    shares = 4 * len(images) * 8 * 4  # layers, images, channels, bytes
    assert saved(model) - plain == shares
    assert shares < images.nbytes / 100
