"""Counts what merging in the forward pass adds to a step on a GPU, without one.

    python benchmarks/launches.py

A step of each network runs on PyTorch's meta device, which computes nothing. Every operator call
that is not a view counts as one launch, and the tensors that it reads and writes as its bytes, as
if no cache held them. Written with the counts of the same step without merging.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from inmerge_wrap import InMergeWrapper, recommended_settings

NETWORKS = (("resnet50", 224), ("tf_efficientnet_lite0", 224), ("resnet18", 28))
BATCH = 32

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--out", type=Path, default=Path("runs/launches.json"), help="JSON file")


class Counter(TorchDispatchMode):
    """Counts the launches and bytes of all operators on the device that are not views."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        written = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if any(x.device.type == "cpu" for x in written):  # the host prepares the next step
            return result
        if not func.is_view and "empty" not in func.name() and "detach" not in func.name():
            self.launches += 1
            options = {name: value for name, value in (kwargs or {}).items() if name != "out"}
            read = {id(x): x for x in tree_leaves((args, options)) if isinstance(x, Tensor)}
            for tensor in (*read.values(), *written):
                self.bytes += tensor.numel() * tensor.element_size()
        return result


def count(name: str, size: int, merging: bool) -> Counter:
    """Counts one step of SGD in bfloat16, the second one."""
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=10).to(torch.bfloat16)
        images = torch.empty(BATCH, 3, size, size, dtype=torch.bfloat16)
        labels = torch.empty(BATCH, dtype=torch.int64)
    model = InMergeWrapper(network, **recommended_settings(10**9))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=True)
    model.attach(optimizer)
    with nullcontext() if merging else model.paused():
        for counter in (Counter(), Counter()):
            with counter:
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(images), labels).backward()
                optimizer.step()
    return counter


def markdown(row: dict[str, Any]) -> str:
    """Returns the counts of a network as a line of the table in docs/performance.md."""
    plain, merged = row["without"], row["with"]
    return (
        f"| {row['model']} | {BATCH} x {row['size']} px | {plain['launches']} "
        f"| {merged['launches']} | {plain['gigabytes']:.2f} | {merged['gigabytes']:.2f} |"
    )


def main(options: argparse.Namespace) -> None:
    rows = []
    for name, size in NETWORKS:
        row: dict[str, Any] = {"model": name, "size": size}
        for key, merging in (("without", False), ("with", True)):
            counter = count(name, size, merging)
            row[key] = {"launches": counter.launches, "gigabytes": counter.bytes / 1e9}
        print(markdown(row))
        rows.append(row)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", *sys.argv])
    content = {"command": command, "torch": torch.__version__, "rows": rows}
    options.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(parser.parse_args())
