"""What a pass takes: its operations and its memory, counted by PyTorch's dispatcher."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from inmerge_wrap import InMergeWrapper, Quantile, Schedule
from tests import NEEDS_COMPILER


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
@pytest.mark.parametrize("way", ["cpu", "meta", pytest.param("native", marks=NEEDS_COMPILER)])
def test_a_pass_takes_less_than_the_largest_layer(way: str, threshold: float) -> None:
    network = timm.create_model("resnet18", num_classes=3).to("meta" if way == "meta" else "cpu")
    model = InMergeWrapper(
        network,
        similarity_threshold=threshold,
        inspect_every=0,
        engine="native" if way == "native" else "torch",
    )
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
    assert max(operations) <= 1.2 * min(operations)


@NEEDS_COMPILER
def test_native_passes_equal_plain_ones() -> None:
    def layers(*modules: nn.Module) -> nn.Sequential:
        torch.manual_seed(0)
        net = nn.Sequential(*modules)
        for parameter in net.parameters():
            nn.init.normal_(parameter)
        return net

    def permuted(net: nn.Sequential) -> nn.Sequential:
        for conv in net:  # as weights of TensorFlow come
            hwio = conv.weight.detach().permute(2, 3, 1, 0).contiguous()
            conv.weight = nn.Parameter(hwio.permute(3, 2, 0, 1))
        return net

    def sharing(net: nn.Sequential) -> nn.Sequential:
        net[1].weight = nn.Parameter(net[0].weight.data)
        return net

    networks = {
        "float32": lambda: layers(nn.Conv2d(3, 40, 3), nn.Conv2d(40, 24, 1)),
        "channels_last": lambda: layers(nn.Conv2d(3, 40, 3), nn.Conv2d(40, 24, 3)).to(
            memory_format=torch.channels_last
        ),
        "bfloat16": lambda: layers(nn.Conv2d(3, 40, 3), nn.Conv2d(40, 24, 1)).bfloat16(),
        "float16": lambda: layers(nn.Conv2d(3, 40, 3), nn.Conv2d(40, 24, 1)).half(),
        "permuted": lambda: permuted(layers(nn.Conv2d(3, 40, 3), nn.Conv2d(40, 24, 2))),
        "shared memory": lambda: sharing(layers(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))),
        "weight_norm": lambda: layers(
            nn.Conv2d(3, 40, 3), nn.utils.parametrizations.weight_norm(nn.Conv2d(40, 24, 3))
        ),
    }
    for name, make in networks.items():
        for settings in (
            {"similarity_threshold": 0.05},
            {"similarity_threshold": Quantile(0.5), "keep_norm": True},
            {"similarity_threshold": Quantile(0.5), "partner": "most_similar"},
        ):
            models = [
                InMergeWrapper(
                    make(),
                    shallow_layers=0,
                    merge_probability=0.6,
                    schedule=Schedule(end=6, decay="linear", anneals="strength"),
                    engine=engine,
                    **settings,
                )
                for engine in ("torch", "native")
            ]
            for _ in range(5):
                for model in models:
                    model.merge_()
            plain, native = ([p for p in m.parameters() if p.ndim == 4] for m in models)
            for one, other in zip(plain, native, strict=True):
                assert one.stride() == other.stride(), name
                torch.testing.assert_close(one, other, msg=name)
            counts = [(layer.merged, layer.drawn) for layer in models[0].report()]
            assert counts == [(layer.merged, layer.drawn) for layer in models[1].report()]
            assert all(0 < merged < drawn for merged, drawn in counts)


@NEEDS_COMPILER
def test_native_passes_take_the_moments_along_and_leave_frozen_layers() -> None:
    results = []
    for engine in ("torch", "native"):
        torch.manual_seed(0)
        network = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4)))
        model = InMergeWrapper(
            network,
            shallow_layers=0,
            similarity_threshold=0.0,
            merge_momentum=True,
            engine=engine,
        )
        network[1].requires_grad_(False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        model.attach(optimizer)
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(2, 8, 6, 6)).square().mean().backward()
            optimizer.step()
        moments = [optimizer.state[p]["momentum_buffer"] for p in network[2].parameters()]
        results.append([*network.state_dict().values(), *moments])
        layers = list(model.report())
        assert layers[1].drawn == 0 and all(layers[n].merged > 0 for n in (0, 2, 3))
    torch.testing.assert_close(*results)
