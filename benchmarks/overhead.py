"""What one merge pass costs beside the optimizer step and the whole training step.

    python benchmarks/overhead.py --size 64 --batch-size 32 --out results/overhead/cpu-64px.json

All parts of a model are timed in one process, in turn, several times; the table shows medians and
their ratio, with the quartiles of the ratio. The floor is the bytes that a pass must move (each
drawn kernel and its partner read, each merged kernel written) over the measured speed of a copy.
The literal loop is one pass written as the paper states it, a kernel at a time. The rows of the
table, in Markdown, are those of docs/performance.md.
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
from pathlib import Path
from typing import Any

import timm
import torch

from inmerge_wrap import InMergeWrapper, Quantile
from inmerge_wrap.merging import draw_pairs

MODELS = ["resnet18", "resnet34", "resnet50", "vgg19", "densenet121", "convnext_tiny"]
MODELS += ["efficientnet_b0"]
THRESHOLDS: dict[str, float | Quantile] = {"0.3": 0.3, "-1": -1.0, "top half": Quantile(0.5)}

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--models", nargs="+", default=MODELS, help=f"of timm (default: {MODELS})")
parser.add_argument(
    "--thresholds",
    nargs="+",
    default=list(THRESHOLDS),
    choices=THRESHOLDS,
    help="which pairs merge (default: each of them)",
)
parser.add_argument("--size", type=int, default=64, help="side of the images, in pixels")
parser.add_argument("--batch-size", type=int, default=32, help="images a step")
parser.add_argument("--bf16", action="store_true", help="train under bfloat16 autocast")
parser.add_argument("--compiled", action="store_true", help="merge with compiled=True")
parser.add_argument(
    "--literal", action="store_true", help="time the literal loop as well, for fixed thresholds"
)
parser.add_argument("--repeats", type=int, default=15, help="of each part")
parser.add_argument(
    "--threads", type=int, default=os.cpu_count(), help="of PyTorch (default: all cores)"
)
parser.add_argument(
    "--device",
    default="cuda" if torch.cuda.is_available() else "cpu",
    help="cpu or cuda (default: cuda where there is one)",
)
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


def literal_loop(model: InMergeWrapper, tau: float) -> None:
    """One pass as the paper writes it: a kernel at a time, waiting for each comparison."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for site in model.plan.merged:
            weight = model.module.get_submodule(site.name).weight
            before = weight.clone()
            draw = len(weight), model.merge_probability, generator, site.pair_groups
            targets, sources = draw_pairs(*draw)
            for target, source in zip(targets.tolist(), sources.tolist(), strict=True):
                kernel, partner = before[target], before[source]
                cosine = torch.cosine_similarity(kernel.flatten(), partner.flatten(), dim=0)
                if cosine.item() > tau:
                    alpha = model.merge_weight
                    weight[target] = alpha * kernel + (1 - alpha) * partner


def measure(name: str, tau: str, options: argparse.Namespace, speed: float) -> dict[str, Any]:
    device = options.device
    network = timm.create_model(name, num_classes=10).to(device)
    model = InMergeWrapper(
        network,
        similarity_threshold=THRESHOLDS[tau],
        compiled=options.compiled,
        inspect_every=0,
    )
    optimizer = torch.optim.SGD(
        model.parameters(), lr=1e-6, momentum=0.9, weight_decay=1e-4, fused=True
    )
    images = torch.randn(options.batch_size, 3, options.size, options.size, device=device)
    labels = torch.randint(10, (options.batch_size,), device=device)
    weights = {key: value.clone() for key, value in network.state_dict().items()}

    def train() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=options.bf16):
            loss = torch.nn.functional.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()

    parts: dict[str, Callable[[], object]] = {
        "training step": train,
        "with merging": train,
        "optimizer step": optimizer.step,
        "merge pass": model.merge_,
    }
    if options.literal and tau != "top half":
        parts["literal loop"] = lambda: literal_loop(model, float(tau))
    times: dict[str, list[float]] = {part: [] for part in parts}
    for repeat in range(options.repeats + 3):
        network.load_state_dict(weights)  # merging always would make all kernels alike
        for part, work in parts.items():
            handle = model.attach(optimizer) if part == "with merging" else None
            taken = seconds(work, device)
            if handle is not None:
                handle.remove()
            if repeat >= 3:
                times[part].append(taken)
    report = model.report()
    width = {site.name: site.fan_in * 4 for site in model.plan.merged}
    passes = 2 * (options.repeats + 3)
    moved = sum((2 * layer.drawn + layer.merged) * width[layer.name] for layer in report) / passes
    floor = moved / speed
    ratios = {
        f"{part} over {whole}": [m / t for m, t in zip(times[part], times[whole], strict=True)]
        for part, whole in (
            ("with merging", "training step"),
            ("merge pass", "training step"),
            ("merge pass", "optimizer step"),
            *((("literal loop", "merge pass"),) if "literal loop" in parts else ()),
        )
    }
    return {
        "model": name,
        "batch_size": options.batch_size,
        "size": options.size,
        "similarity_threshold": tau,
        "merged_share": report.merged / report.drawn,
        "median_ms": {part: 1e3 * statistics.median(taken) for part, taken in times.items()},
        "floor_ms": 1e3 * floor,
        "quartiles": {key: statistics.quantiles(ratio, n=4) for key, ratio in ratios.items()},
        "merge_over_floor": statistics.median(times["merge pass"]) / floor,
    }


def cells(row: dict[str, Any]) -> dict[str, str]:
    """One line of the table: what is shown of a measurement, by column."""
    time_of, ratio = row["median_ms"], row["quartiles"]
    low, middle, high = ratio["merge pass over training step"]
    literal = ratio.get("literal loop over merge pass")
    return {
        "network": row["model"],
        "images": f"{row['batch_size']} x {row['size']} px",
        "threshold": row["similarity_threshold"],
        "pairs merged": f"{row['merged_share']:.0%}",
        "training step": f"{time_of['training step']:.0f} ms",
        "merge pass": f"{time_of['merge pass']:.1f} ms",
        "of the training step (quartiles)": f"{middle:.1%} ({low:.1%} to {high:.1%})",
        "of the optimizer step": f"{ratio['merge pass over optimizer step'][1]:.2f}",
        "of the floor": f"{row['merge_over_floor']:.1f}",
        "literal loop": "" if literal is None else f"{literal[1]:.0f} x",
    }


def markdown(row: dict[str, Any]) -> str:
    """The same as a line of a Markdown table."""
    return f"| {' | '.join(cells(row).values())} |"


def write(path: Path, options: argparse.Namespace, speed: float, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    machine = {"cpu": platform.machine(), "cores": os.cpu_count(), "copy": speed}
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
    speed = copy_speed(options.device)
    rows: list[dict[str, Any]] = []
    for name in options.models:
        for tau in options.thresholds:
            rows.append(measure(name, tau, options, speed))
            if len(rows) == 1:
                print(
                    f"| {' | '.join(cells(rows[0]))} |",
                    "|---" * len(cells(rows[0])) + "|",
                    sep="\n",
                )
            print(markdown(rows[-1]), flush=True)
            if options.out:  # after each row: a network that fails costs no more than its own
                write(options.out, options, speed, rows)
    print(f"{options.device}, {options.threads} threads, copies {speed / 1e9:.1f} GB/s")


if __name__ == "__main__":
    main()
