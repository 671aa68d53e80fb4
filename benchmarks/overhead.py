"""Measures the cost of merging: a training step with it over one without.

    python benchmarks/overhead.py --models resnet34 --size 64 --batch-size 32

Steps with and without merging alternate in one process, in pairs of which the second is timed, so
that each follows one of its own kind and the effect of merging on the caches counts too. The table
shows the median of the ratio with its quartiles. The rows of the table, in Markdown, are those of
docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import timm
import torch

from inmerge_wrap import InMergeWrapper, recommended_settings

MODELS = ["resnet34", "resnet18", "tf_efficientnet_lite0"]
STEPS = 10**9  # a training run so long that the strength does not fade while it is measured
FORWARD = recommended_settings(STEPS)
WAYS: dict[str, dict[str, Any]] = {
    "after each step, tau = 0.3": {},
    "after each step, every pair": {"similarity_threshold": -1.0},
    "after each step, every pair, compiled": {"similarity_threshold": -1.0, "compiled": True},
    "forward pass, outputs": FORWARD,
    "forward pass, outputs, network compiled": FORWARD,
    "forward pass, weights": recommended_settings(STEPS, mode="weights"),
}

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--models", nargs="+", default=MODELS, help=f"timm models (default: {MODELS})")
parser.add_argument(
    "--ways", nargs="+", default=list(WAYS), choices=WAYS, help="ways to merge (default: all)"
)
parser.add_argument("--size", type=int, default=64, help="side of the images, in pixels")
parser.add_argument("--batch-size", type=int, default=32, help="images per step")
parser.add_argument("--bf16", action="store_true", help="train under bfloat16 autocast")
parser.add_argument("--channels-last", action="store_true", help="memory format of the network")
parser.add_argument(
    "--shallow-layers", type=int, help="see InMergeWrapper (default: that of the way)"
)
parser.add_argument(
    "--inspect-every", type=int, default=0, help="see InMergeWrapper (default: no inspection)"
)
parser.add_argument("--repeats", type=int, default=15, help="pairs of steps")
parser.add_argument(
    "--threads", type=int, default=os.cpu_count(), help="PyTorch threads (default: all cores)"
)
parser.add_argument(
    "--device",
    default="cuda" if torch.cuda.is_available() else "cpu",
    help="cpu or cuda (default: cuda where there is one)",
)
parser.add_argument("--out", type=Path, default=Path("runs/overhead.json"), help="JSON file")


def seconds(work: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(name: str, way: str, options: argparse.Namespace) -> dict[str, Any]:
    device = options.device
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    network = timm.create_model(name, num_classes=10).to(device, memory_format=layout)
    chosen = {**WAYS[way], "inspect_every": options.inspect_every}
    if options.shallow_layers is not None:
        chosen["shallow_layers"] = options.shallow_layers
    model = InMergeWrapper(network, **chosen)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
    images = torch.randn(options.batch_size, 3, options.size, options.size, device=device)
    images = images.contiguous(memory_format=layout)
    labels = torch.randint(10, (options.batch_size,), device=device)
    weights = {key: value.clone() for key, value in network.state_dict().items()}
    is_compiled = way.endswith("network compiled")
    model.attach(optimizer)
    train = torch.compile(model, fullgraph=True) if is_compiled else model

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=options.bf16):
            loss = torch.nn.functional.cross_entropy(train(images), labels)
        loss.backward()
        optimizer.step()

    def taken(merging: bool) -> float:
        """Times the step after one of its kind; on a GPU several, which the host runs ahead of."""
        count = 4 if device == "cuda" else 1
        with nullcontext() if merging else model.paused():
            step()
            return seconds(lambda: [step() for _ in range(count)], device) / count

    times: dict[bool, list[float]] = {True: [], False: []}
    for repeat in range(options.repeats + 2):
        network.load_state_dict(weights)  # merging always would make all kernels equal
        for merging in (False, True) if repeat % 2 else (True, False):
            spent = taken(merging)
            if repeat >= 2:
                times[merging].append(spent)
    report = model.report()
    ratios = [m / p for m, p in zip(times[True], times[False], strict=True)]
    return {
        "model": name,
        "batch_size": options.batch_size,
        "size": options.size,
        "way": way,
        "shallow_layers": options.shallow_layers,
        "layers": len(report),
        "merged_share": report.merged / report.drawn,
        "step_ms": 1e3 * statistics.median(times[False]),
        "quartiles": statistics.quantiles(ratios, n=4),
    }


def cells(row: dict[str, Any]) -> dict[str, str]:
    """Returns one line of the table, by column."""
    low, middle, high = row["quartiles"]
    shallow = row["shallow_layers"]
    return {
        "network": row["model"] if shallow is None else f"{row['model']}, {shallow} shallow",
        "images": f"{row['batch_size']} x {row['size']} px",
        "merging": row["way"],
        "merged": f"{row['merged_share']:.0%}",
        "step with / without (quartiles)": f"{middle:.3f} ({low:.3f} to {high:.3f})",
    }


def markdown(row: dict[str, Any]) -> str:
    """Returns the measurement as a line of a Markdown table."""
    return f"| {' | '.join(cells(row).values())} |"


def write(path: Path, options: argparse.Namespace, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    machine = {"cpu": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()}
    if options.device == "cuda":
        machine |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    content = {
        "command": shlex.join(["python", *sys.argv]),
        "settings": {key: str(value) for key, value in vars(options).items()},
        "machine": machine,
        "torch": torch.__version__,
        "rows": rows,
    }
    path.write_text(json.dumps(content, indent=1))


def main() -> None:
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    for name in options.models:
        for way in options.ways:
            torch.compiler.reset()
            rows.append(measure(name, way, options))
            if len(rows) == 1:
                head = cells(rows[0])
                print(f"| {' | '.join(head)} |", "|---" * len(head) + "|", sep="\n")
            print(markdown(rows[-1]), flush=True)
            # After each row: a network that fails costs no more than its own.
            write(options.out, options, rows)
    print(f"{options.device}, {options.threads} threads, {options.out}")


if __name__ == "__main__":
    main()
