"""Measures how the cost of a merge pass grows with kernels, layers and processes.

    python benchmarks/scaling.py --out benchmarks/results/scaling.json

Chains of 3x3 convolutions, all merged, p = 0.3, medians of several passes. The processes train the
same network under DDP on one machine, so that they share its memory: what should not grow with
them is the number of messages, which is counted. Writes JSON and a figure.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import socket
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from inmerge_wrap import InMergeWrapper

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SERIES: dict[str, dict[str, Any]] = {
    f"{pairs}, {engine}": {"similarity_threshold": threshold, "engine": engine}
    for engine in ("native", "torch")
    for pairs, threshold in (("no pair merges", 0.3), ("all drawn merge", -1.0))
}

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
parser.add_argument("--repeats", type=int, default=15, help="passes of each part")
parser.add_argument("--out", type=Path, default=Path("runs/scaling.json"))
parser.add_argument("--picture", type=Path, help="PNG file (default: next to --out)")
parser.add_argument(
    "--redraw", action="store_true", help="measure nothing; draw what --out holds already"
)


def chain(width: int, depth: int, **settings: Any) -> InMergeWrapper:
    network = nn.Sequential(*(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth)))
    return InMergeWrapper(
        network,
        shallow_layers=0,
        example_input=torch.zeros(1, width, 8, 8),
        inspect_every=0,
        **settings,
    )


def milliseconds(model: InMergeWrapper, repeats: int) -> float:
    weights = {key: value.clone() for key, value in model.module.state_dict().items()}
    times = []
    for repeat in range(repeats + 3):
        model.module.load_state_dict(weights)
        began = time.perf_counter()
        model.merge_()
        if repeat >= 3:
            times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times)


def one_process(rank: int, count: int, port: int, repeats: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=count)
    torch.manual_seed(0)
    model = chain(256, 8, similarity_threshold=-1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    parallel = DistributedDataParallel(model)

    def train() -> None:
        parallel(torch.zeros(1, 256, 4, 4)).sum().backward()
        optimizer.step()

    for _ in range(3):  # DDP forms its final buckets in the first steps
        train()
    messages = {}
    for part in ("without", "with"):
        if part == "with":
            model.attach(optimizer)
        with CommDebugMode() as communication:
            train()
        messages[part] = communication.get_total_counts()
    assert model.report().merged > 0
    taken = milliseconds(model, repeats)
    if rank == 0:
        found = {"ms": taken, "collectives": messages}
        (Path(folder) / f"{count}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def over_processes(counts: list[int], repeats: int, folder: Path) -> dict[int, Any]:
    found = {}
    for count in counts:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        arguments = (count, port, repeats, str(folder))
        torch.multiprocessing.spawn(one_process, arguments, nprocs=count)
        path = folder / f"{count}.json"
        found[count] = json.loads(path.read_text())
        path.unlink()
    return found


def draw(result: dict[str, Any], path: Path) -> None:
    plt.rcParams["font.size"] = 13  # for half of a page's width
    figure, axes = plt.subplots(1, 3, figsize=(10, 4.4), layout="constrained")
    panels = (
        ("kernels", "One layer", "kernels C, each C x 3 x 3"),
        ("layers", "Many layers", "layers of 256 kernels"),
    )
    for axis, (key, title, label) in zip(axes, panels, strict=False):
        for place, (name, points) in enumerate(result[key].items()):
            axis.plot(
                [int(x) for x in points],
                points.values(),
                marker="o",
                color="#0072B2" if name.startswith("no") else "#D55E00",
                linestyle="-" if place < 2 else "--",  # the second engine
                label=name,
            )
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel="one merge pass, ms")
        axis.set_title(title, fontsize=13)
        axis.set_xticks([int(x) for x in points], list(points), minor=False)
        low, high = axis.get_ylim()
        ticks = [x for x in (0.05, 0.1, 0.5, 1, 5, 10, 50, 100) if low <= x <= high]
        axis.set_yticks(ticks, [f"{x:g}" for x in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False
    )
    counts = list(result["processes"])
    heights = [result["processes"][count]["ms"] for count in counts]
    axes[2].bar(counts, heights, color="#009E73", width=0.6)
    labels = [
        "{}\n{without} / {with}".format(count, **result["processes"][count]["collectives"])
        for count in counts
    ]
    axes[2].set_xticks(range(len(counts)), labels)
    axes[2].set(
        xlabel=f"processes on {result['machine']['cores']} cores;\n"
        "messages a step,\nwithout / with merging",
        ylabel="one merge pass, ms",
    )
    axes[1].set_ylabel("")
    axes[2].set_title("Many processes", fontsize=13)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, facecolor="white")  # a dark page shows it as it is
    plt.close(figure)


def main() -> None:
    options = parser.parse_args()
    picture = options.picture or options.out.with_suffix(".png")
    picture.parent.mkdir(parents=True, exist_ok=True)
    if options.redraw:
        draw(json.loads(options.out.read_text()), picture)
        return
    options.out.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "kernels": {
            name: {
                str(width): milliseconds(chain(width, 1, **settings), options.repeats)
                for width in options.widths
            }
            for name, settings in SERIES.items()
        },
        "layers": {
            name: {
                str(depth): milliseconds(chain(256, depth, **settings), options.repeats)
                for depth in options.depths
            }
            for name, settings in SERIES.items()
        },
        "processes": {
            str(count): found
            for count, found in over_processes(
                options.processes, options.repeats, options.out.parent
            ).items()
        },
        "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "torch": torch.__version__,
    }
    options.out.write_text(json.dumps(result, indent=1))
    draw(result, picture)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
