"""Networks of MONAI and segmentation_models_pytorch: planned, trained, exported, loaded again.

    python -m tests.clients.networks    # writes benchmarks/results/other_networks.csv

Each takes two steps with every pair merged, at 64 pixels a side or 32 of a volume; the exported
weights then give the same answers in a network of the same class, bit for bit.
"""

from __future__ import annotations

import csv
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import segmentation_models_pytorch as smp
import torch
from monai.networks import nets
from torch import nn
from torch.utils._pytree import tree_leaves

from inmerge_wrap import InMergeWrapper, export_weights
from tests import zoo
from tests.clients.check import check

# What wrapping may not do: take another way than the trace, or merge nothing.
warnings.filterwarnings("error", module="inmerge_wrap")
# True, and of no matter here: what is exported is compared with what was trained.
warnings.filterwarnings("ignore", "kernels were merged in the very last step")


def networks() -> Iterator[tuple[str, str, int, Callable[[], nn.Module]]]:
    """Library, name, dimensions of the images, and what builds the network."""
    for dims in (2, 3):
        d: dict[str, Any] = {"spatial_dims": dims, "in_channels": 1}
        c = {**d, "num_classes": 3}
        s = {**d, "out_channels": 3}
        unet = {"channels": (16, 32, 64, 128, 256), "strides": (2, 2, 2, 2), "num_res_units": 2}
        dyn = {"kernel_size": [3] * 5, "strides": [1, 2, 2, 2, 2], "upsample_kernel_size": [2] * 4}
        deep = {"deep_supervision": True, "deep_supr_num": 2}
        resnet = {"spatial_dims": dims, "n_input_channels": 1, "num_classes": 3}
        efficient = {"model_name": "efficientnet-b0", "pretrained": False}
        made: list[tuple[str, Callable[[], nn.Module]]] = [
            ("DenseNet121", lambda s=s: nets.DenseNet121(**s)),
            ("SEResNet50", lambda c=c: nets.SEResNet50(**c)),
            ("EfficientNetBN b0", lambda c=c, e=efficient: nets.EfficientNetBN(**c, **e)),
            ("ResNet18", lambda r=resnet: nets.resnet18(**r)),
            ("ResNet50", lambda r=resnet: nets.resnet50(**r)),
            ("UNet", lambda s=s, u=unet: nets.UNet(**s, **u)),
            ("SegResNet", lambda s=s: nets.SegResNet(**s)),
            ("DynUNet", lambda s=s, y=dyn: nets.DynUNet(**s, **y)),
            ("DynUNet, deep supervision", lambda s=s, y=dyn | deep: nets.DynUNet(**s, **y)),
        ]
        yield from (("monai", name, dims, make) for name, make in made)
    for encoder in ("resnet34", "tu-resnet18", "tu-efficientnet_b0"):
        yield (
            "segmentation_models_pytorch",
            f"Unet, {encoder}",
            2,
            lambda e=encoder: smp.Unet(e, encoder_weights=None, classes=3, in_channels=1),
        )


def go_round(make: Callable[[], nn.Module], dims: int) -> InMergeWrapper:
    """Two steps with every pair merged, the export, and the way back."""
    torch.manual_seed(0)
    network = make()
    model = InMergeWrapper(network, similarity_threshold=-1.0, merge_probability=1.0)
    # BatchNorm of two values makes gradients of a million, with merging and without.
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9, momentum=0.9)
    model.attach(optimizer)
    images = torch.randn(2, 1, *[64 if dims == 2 else 32] * dims)
    for _ in range(2):
        optimizer.zero_grad()
        sum(leaf.square().mean() for leaf in tree_leaves(model(images))).backward()
        optimizer.step()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        expected = tree_leaves(network.eval()(images))
        assert all(leaf.isfinite().all() for leaf in expected), "the answers are not finite"
        path = export_weights(model, Path(folder, "weights.safetensors"))
        stock = make()
        stock.load_state_dict(safetensors.torch.load_file(path))
        found = tree_leaves(stock.eval()(images))
        assert len(found) == len(expected) and all(map(torch.equal, found, expected))
    return model


def main() -> None:
    rows = []
    for library, name, dims, make in networks():
        model = go_round(make, dims)
        plan, report = model.plan, model.report()
        check(f"{name} {dims}D: {report.merged} merges", plan.found_by == "trace" and report.merged)
        rows.append(
            {
                "library": f"{library} {version(library)}",
                "network": name,
                "images": f"{dims}D",
                "convolutions": len(plan.merged) + len(plan.skipped),
                "merged": len(plan.merged),
                "skipped": zoo.compact(plan),
            }
        )
    with open(zoo.RESULTS / "other_networks.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
