"""What one merge pass costs beside the optimizer step and the whole training step.

    python benchmarks/overhead.py --models resnet18 resnet34 vgg19 --out results/overhead.json

All parts of a model are timed in one process, in turn, several times; the table shows medians and
their ratio, with the quartiles of the ratio. The floor is the bytes that a pass must move (each
drawn kernel and its partner read, each merged kernel written) over the measured speed of a copy.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table

from inmerge_wrap import InMergeWrapper

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--models", nargs="+", default=["resnet18", "resnet34", "vgg19"])
parser.add_argument("--size", type=int, default=64, help="side of the images, in pixels")
parser.add_argument("--batch-size", type=int, default=32)
parser.add_argument("--repeats", type=int, default=15, help="of each part")
parser.add_argument("--threads", type=int, default=os.cpu_count())
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
parser.add_argument("--out", type=Path, help="write the figures here as JSON")


def seconds(work: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def copy_speed(device: str) -> float:
    """Bytes read and written per second by a copy that no cache can hold."""
    source = torch.empty(2**26, device=device)
    target = torch.empty_like(source)
    times = [seconds(lambda: target.copy_(source), device) for _ in range(7)]
    return 2 * source.numel() * source.element_size() / statistics.median(times)


def measure(name: str, tau: float, options: argparse.Namespace, speed: float) -> dict[str, Any]:
    device = options.device
    network = timm.create_model(name, num_classes=10).to(device)
    model = InMergeWrapper(network, similarity_threshold=tau, inspect_every=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, weight_decay=1e-4)
    images = torch.randn(options.batch_size, 3, options.size, options.size, device=device)
    labels = torch.randint(10, (options.batch_size,), device=device)
    weights = {key: value.clone() for key, value in network.state_dict().items()}

    def train() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()

    parts: dict[str, Callable[[], object]] = {
        "training step": train,
        "optimizer step": optimizer.step,
        "merge pass": model.merge_,
    }
    times: dict[str, list[float]] = {part: [] for part in parts}
    for repeat in range(options.repeats + 3):
        network.load_state_dict(weights)  # merging always would make all kernels alike
        for part, work in parts.items():
            taken = seconds(work, device)
            if repeat >= 3:
                times[part].append(taken)
    report = model.report()
    passes = options.repeats + 3
    width = {site.name: site.fan_in * 4 for site in model.plan.merged}
    moved = sum((2 * layer.drawn + layer.merged) * width[layer.name] for layer in report) / passes
    floor = moved / speed
    ratios = {
        whole: [m / t for m, t in zip(times["merge pass"], times[whole], strict=True)]
        for whole in ("training step", "optimizer step")
    }
    return {
        "model": name,
        "similarity_threshold": tau,
        "merged_share": report.merged / report.drawn,
        "median_ms": {part: 1e3 * statistics.median(taken) for part, taken in times.items()},
        "floor_ms": 1e3 * floor,
        "merge_over": {whole: statistics.quantiles(r, n=4) for whole, r in ratios.items()},
        "merge_over_floor": statistics.median(times["merge pass"]) / floor,
    }


def main() -> None:
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    speed = copy_speed(options.device)
    table = Table(title=f"{options.device}, {options.threads} threads, copy {speed / 1e9:.1f} GB/s")
    for column in ("model", "tau", "merged", "training step", "optimizer step", "merge pass"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for column in ("of training step (quartiles)", "of optimizer step", "of floor"):
        table.add_column(column, justify="right")
    rows = []
    for name in options.models:
        for tau in (0.3, -1.0):
            row = measure(name, tau, options, speed)
            rows.append(row)
            low, middle, high = row["merge_over"]["training step"]
            table.add_row(
                name,
                f"{tau:g}",
                f"{row['merged_share']:.0%}",
                *(f"{value:.1f} ms" for value in row["median_ms"].values()),
                f"{middle:.2%} ({low:.2%} to {high:.2%})",
                f"{row['merge_over']['optimizer step'][1]:.2f}",
                f"{row['merge_over_floor']:.1f}",
            )
    Console(width=130).print(table)
    if options.out:
        content = {
            "settings": {key: str(value) for key, value in vars(options).items()},
            "machine": {"cpu": platform.machine(), "cores": os.cpu_count(), "copy": speed},
            "torch": torch.__version__,
            "rows": rows,
        }
        options.out.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
