"""Measures the cost of merging: a training step with it over one without, and a pass alone.

    python benchmarks/overhead.py --models resnet34 --size 64 --batch-size 32

Steps with and without merging alternate in one process, in pairs of which the second is timed, so
that it follows one of its own kind and the effect of a pass on the caches counts too. The table
shows the median of the ratio with its quartiles. The floor is the bytes that a pass must move
(each drawn kernel and its partner read, each merged kernel written) over the measured speed of a
copy. The literal loop is one pass as the paper writes it, one kernel at a time. The rows of
the table, in Markdown, are those of docs/performance.md.
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
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch

from inmerge_wrap import InMergeWrapper, Quantile
from inmerge_wrap.merging import draw_pairs

MODELS = ["resnet34", "resnet50", "densenet121", "efficientnet_b0"]
TRANSIENT = {"similarity_threshold": -1.0, "transient": True}
WAYS: dict[str, dict[str, Any]] = {
    "0.3": {"similarity_threshold": 0.3},
    "every pair": {"similarity_threshold": -1.0},
    "top half": {"similarity_threshold": Quantile(0.5)},
    "transient": TRANSIENT,
    "transient, p = 1": {**TRANSIENT, "merge_probability": 1.0},
    "transient, signed": {  # as docs/transient.md recommends for fine-tuning
        **TRANSIENT,
        "merge_probability": 1.0,
        "shallow_layers": 0,
        "direction": "signed",
    },
}

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--models", nargs="+", default=MODELS, help=f"timm models (default: {MODELS})")
parser.add_argument(
    "--ways",
    nargs="+",
    default=list(WAYS),
    choices=WAYS,
    help="threshold, and whether kernels are restored (default: all)",
)
parser.add_argument("--size", type=int, default=64, help="side of the images, in pixels")
parser.add_argument("--batch-size", type=int, default=32, help="images per step")
parser.add_argument("--bf16", action="store_true", help="train under bfloat16 autocast")
parser.add_argument(
    "--engine",
    default="auto",
    choices=["auto", "torch", "native"],
    help="engine of the pass (default: auto)",
)
parser.add_argument(
    "--shallow-layers", type=int, help="see InMergeWrapper (default: its default, a share)"
)
parser.add_argument(
    "--literal", action="store_true", help="time the literal loop as well, for fixed thresholds"
)
parser.add_argument("--repeats", type=int, default=15, help="repeats of each part")
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


def seconds_on_device(work: Callable[[], object]) -> float:
    """Times work that waits in the queue of a GPU, so that the host's own time is hidden.

    In training the host is ahead of the GPU as well.
    """
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(50_000_000)  # cycles, some 25 ms
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def copy_speed(device: str) -> float:
    """Measures bytes read and written per second by a copy larger than any cache."""
    source = torch.empty(2**26, device=device)
    target = torch.empty_like(source)
    timed = seconds_on_device if device == "cuda" else partial(seconds, device=device)
    times = [timed(lambda: target.copy_(source)) for _ in range(7)]
    return 2 * source.numel() * source.element_size() / statistics.median(times)


def literal_loop(model: InMergeWrapper, tau: float) -> None:
    """Runs one pass as the paper writes it: one kernel at a time, waiting for each comparison."""
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


def measure(name: str, way: str, options: argparse.Namespace, speed: float) -> dict[str, Any]:
    device = options.device
    network = timm.create_model(name, num_classes=10).to(device)
    chosen = dict(WAYS[way])
    if options.shallow_layers is not None:
        chosen["shallow_layers"] = options.shallow_layers
    model = InMergeWrapper(network, engine=options.engine, inspect_every=0, **chosen)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
    images = torch.randn(options.batch_size, 3, options.size, options.size, device=device)
    labels = torch.randint(10, (options.batch_size,), device=device)
    weights = {key: value.clone() for key, value in network.state_dict().items()}

    def train(module: torch.nn.Module) -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=options.bf16):
            loss = torch.nn.functional.cross_entropy(module(images), labels)
        loss.backward()
        optimizer.step()

    def steps(with_merging: bool) -> float:
        """Times the step after one of its kind; on a GPU several, which the host runs ahead of."""
        count = 4 if device == "cuda" else 1
        handle = model.attach(optimizer) if with_merging else None
        module = model if with_merging else network
        train(module)
        taken = seconds(lambda: [train(module) for _ in range(count)], device) / count
        if handle is not None:
            handle.remove()
        return taken

    parts: dict[str, Callable[[], object]] = {"optimizer step": optimizer.step}
    if not model.transient:
        parts["merge pass"] = model.merge_
    if options.literal and way in ("0.3", "every pair"):
        tau = WAYS[way]["similarity_threshold"]
        parts["literal loop"] = lambda: literal_loop(model, tau)
    times: dict[str, list[float]] = defaultdict(list)
    for repeat in range(options.repeats + 2):
        network.load_state_dict(weights)  # merging always would make all kernels alike
        order = (False, True) if repeat % 2 else (True, False)
        taken = {"with merging" if each else "training step": steps(each) for each in order}
        for part, work in parts.items():
            train(network)  # it drives the caches' contents out, as in training
            taken[part] = seconds(work, device)
        if device == "cuda" and "merge pass" in parts:
            taken["merge pass on the device"] = seconds_on_device(model.merge_)
        if repeat >= 2:
            for part, value in taken.items():
                times[part].append(value)
    report = model.report()
    width = {site.name: site.fan_in * 4 for site in model.plan.merged}
    passes = report.layers[-1].passes
    moved = sum((2 * layer.drawn + layer.merged) * width[layer.name] for layer in report) / passes
    floor = moved / speed
    pairs = [("with merging", "training step")]
    if "merge pass" in parts:
        pairs += [("merge pass", "training step"), ("merge pass", "optimizer step")]
    if "literal loop" in parts:
        pairs.append(("literal loop", "merge pass"))
    ratios = {
        f"{part} over {whole}": [m / t for m, t in zip(times[part], times[whole], strict=True)]
        for part, whole in pairs
    }
    row = {
        "model": name,
        "batch_size": options.batch_size,
        "size": options.size,
        "way": way,
        "shallow_layers": options.shallow_layers,
        "engine": report.engine,
        "layers": len(report),
        "merged_share": report.merged / report.drawn,
        "median_ms": {part: 1e3 * statistics.median(taken) for part, taken in times.items()},
        "floor_ms": 1e3 * floor,
        "quartiles": {key: statistics.quantiles(ratio, n=4) for key, ratio in ratios.items()},
    }
    if "merge pass" in parts:
        of_pass = times.get("merge pass on the device", times["merge pass"])
        row["merge_over_floor"] = statistics.median(of_pass) / floor
    return row


def cells(row: dict[str, Any]) -> dict[str, str]:
    """Returns one line of the table, by column."""
    ratio = row["quartiles"]
    low, middle, high = ratio["with merging over training step"]
    share = ratio.get("merge pass over training step")
    shallow = row["shallow_layers"]
    return {
        "network": row["model"] if shallow is None else f"{row['model']}, {shallow} shallow",
        "images": f"{row['batch_size']} x {row['size']} px",
        "merging": row["way"],
        "pairs merged": f"{row['merged_share']:.0%}",
        "step with / without (quartiles)": f"{middle:.3f} ({low:.3f} to {high:.3f})",
        "pass, of the step": "" if share is None else f"{share[1]:.1%}",
        "pass, of the floor": "" if share is None else f"{row['merge_over_floor']:.1f}",
    }


def markdown(row: dict[str, Any]) -> str:
    """Returns the measurement as a line of a Markdown table."""
    return f"| {' | '.join(cells(row).values())} |"


def write(path: Path, options: argparse.Namespace, speed: float, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    machine = {"cpu": platform.machine(), "cores": os.cpu_count(), "copy": speed}
    machine["load"] = os.getloadavg()
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
        for way in options.ways:
            rows.append(measure(name, way, options, speed))
            if len(rows) == 1:
                print(
                    f"| {' | '.join(cells(rows[0]))} |",
                    "|---" * len(cells(rows[0])) + "|",
                    sep="\n",
                )
            print(markdown(rows[-1]), flush=True)
            # After each row: a network that fails costs no more than its own.
            write(options.out, options, speed, rows)
    print(
        f"{options.device}, {options.threads} threads, copies {speed / 1e9:.1f} GB/s, {options.out}"
    )


if __name__ == "__main__":
    main()
