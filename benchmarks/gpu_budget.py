"""Calculates what a merge pass should cost on a GPU: launches, bytes, time, share of a step.

    python benchmarks/gpu_budget.py --step-ms 60

Nothing here is measured. The launches and bytes of plain PyTorch are counted while it makes a pass
on the meta device, which runs a GPU's path without its arithmetic; those of the Triton engine
follow from the plan, and a test holds them to what Triton's interpreter counts. The time is

    launches * time of a launch + bytes / bandwidth,

as if launches never overlapped and caches had no effect. It leaves out Python's own time, which the
GPU does not wait for while it is busy with the training step, and uses the manufacturer's
bandwidth, which no program quite reaches. A message to the device counts as a launch, although it
travels while the device still trains. ``benchmarks/overhead.py --device cuda`` measures the cost on
a GPU.

The floor is the time to transfer the bytes that any pass must move (each drawn kernel and its
partner read, each merged kernel written). Writes JSON and prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from inmerge_wrap import InMergeWrapper, MergePlan, Quantile
from inmerge_wrap.engines.triton_launches import reach_quantiles
from inmerge_wrap.merging import draw_layers

MODELS = ["resnet18", "resnet34", "resnet50", "vgg19", "densenet121", "efficientnet_b0"]
Draws = Sequence[tuple[Tensor, Tensor]]  # targets and sources of each layer
RULES: dict[str, float | Quantile] = {"fixed": -1.0, "quantile": Quantile(0.5)}


@dataclass(frozen=True)
class Device:
    """A GPU by its data sheet.

    Attributes:
        name: Name of the variant.
        bandwidth: Memory bandwidth, bytes per second.
        source: Address of the data sheet.
    """

    name: str
    bandwidth: float
    source: str


DEVICES = {
    "h100": Device("H100 SXM", 3.35e12, "https://www.nvidia.com/en-us/data-center/h100/"),
    "a100": Device("A100 80 GB SXM", 2.039e12, "https://www.nvidia.com/en-us/data-center/a100/"),
    "l4": Device("L4", 300e9, "https://www.nvidia.com/en-us/data-center/l4/"),
    "t4": Device("T4", 320e9, "https://www.nvidia.com/en-us/data-center/tesla-t4/"),
    "4090": Device(
        "RTX 4090",
        1.008e12,
        "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf",
    ),
}


@dataclass(frozen=True)
class Cost:
    """The work on the device.

    Attributes:
        launches: Kernel launches, and messages from the host.
        moved: Bytes read and written.
    """

    launches: int
    moved: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.launches + other.launches, self.moved + other.moved)

    def seconds(self, device: Device, launch: float) -> float:
        """Returns the time on a device whose launches take ``launch`` seconds each."""
        return self.launches * launch + self.moved / device.bandwidth


class Ledger(TorchDispatchMode):
    """Counts the operations of PyTorch that would launch something, and their bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.moved = 0, 0

    @property
    def cost(self) -> Cost:
        """What was counted so far."""
        return Cost(self.launches, self.moved)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given, made = (
            [part for part in tree_leaves(tree) if isinstance(part, Tensor)]
            for tree in ((args, kwargs), out)
        )
        on_device = any(tensor.device.type != "cpu" for tensor in given + made)
        a_view = func.is_view or torch.Tag.inplace_view in func.tags
        if on_device and made and not a_view and "empty" not in func.name():
            self.launches += 1
            # Rows are taken out of a tensor or put into it; the rest of it is not touched.
            if func.overloadpacket is torch.ops.aten.index_select:
                given = [made[0], given[-1]]
            elif func.overloadpacket is torch.ops.aten.index_copy_:
                given, made = given[1:], given[-1:]
            self.moved += sum(tensor.nbytes for tensor in given + made)
        return out


def plain_pass(network: nn.Module, rule: float | Quantile, **settings: Any) -> Cost:
    """Counts a pass of plain PyTorch.

    Args:
        network: A network on the meta device.
        rule: The similarity threshold.
        **settings: Settings of the wrapper.
    """
    model = InMergeWrapper(
        network, similarity_threshold=rule, inspect_every=0, engine="torch", **settings
    )
    model.merge_()  # the counts move to the device once
    with Ledger() as ledger:
        model.merge_()
    return ledger.cost


def plain_transience(plan: MergePlan, draws: Draws, dtype: torch.dtype) -> Cost:
    """Counts saving the drawn kernels and restoring them in plain PyTorch."""
    with Ledger() as ledger:
        for site, (targets, _) in zip(plan.merged, draws, strict=True):
            weight = torch.empty(site.shape, dtype=dtype, device="meta")
            index = torch.empty_like(targets, device="meta")
            weight.index_copy_(0, index, weight.index_select(0, index))
    return ledger.cost


def fused_pass(
    plan: MergePlan, draws: Draws, share: float, dtype: torch.dtype, *, quantile: bool = False
) -> Cost:
    """Counts a pass of the Triton engine for weights of one dtype.

    Args:
        plan: The merged layers.
        draws: Draws of each layer.
        share: Share of the drawn pairs that merge.
        dtype: Dtype of the weights.
        quantile: Whether each layer has a threshold that follows from its cosines.
    """
    # Bytes of a row of each pair; of those, where a mean comes first; of targets that are sources.
    drawn, averaged, late = 0.0, 0.0, 0.0
    for site, (targets, sources) in zip(plan.merged, draws, strict=True):
        row = site.fan_in * dtype.itemsize
        drawn += len(targets) * row
        averaged += len(targets) * row * site.centred
        late += share * int(torch.isin(targets, sources).sum()) * row
    compared = 2 * drawn + 2 * averaged  # means come first
    cost = Cost(1, 0)  # a message
    cost += Cost(1, compared + 3 * share * drawn + late)  # merge: some into the buffer
    cost += Cost(1, late)  # and from there
    if quantile:  # a launch of its own to compare
        with Ledger() as ledger:
            pairs = [len(targets) for targets, _ in draws]
            cosines = torch.empty(sum(pairs), device="meta")
            place = torch.empty(sum(pairs), dtype=torch.int16, device="meta")
            reach_quantiles(cosines, place, pairs, 0.5)
        cost += ledger.cost + Cost(1, 0)
    return cost


def fused_transience(plan: MergePlan, draws: Draws, share: float, dtype: torch.dtype) -> Cost:
    """Counts keeping the kernels that merge, as they merge, and restoring them."""
    return Cost(1, 3 * share * row_bytes(plan, draws, dtype))


def draw(plan: MergePlan, probability: float) -> Draws:
    """Draws targets and sources of each layer for one pass."""
    counts = [site.shape[0] for site in plan.merged]
    sizes = [site.shape[0] // site.pair_groups for site in plan.merged]
    (_, targets, sources), pairs = draw_layers(counts, sizes, probability, range(len(counts)))
    return list(zip(targets.split(pairs), sources.split(pairs), strict=True))


def row_bytes(plan: MergePlan, draws: Draws, dtype: torch.dtype) -> int:
    """Returns the bytes of one kernel of each pair: the size of the Triton engine's buffer."""
    rows = (len(targets) for targets, _ in draws)
    sizes = (n * site.fan_in for n, site in zip(rows, plan.merged, strict=True))
    return sum(sizes) * dtype.itemsize


def budget(name: str, rule: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns the rows of a network: both engines, persistent and transient merging."""
    dtype = getattr(torch, options.dtype)
    network = timm.create_model(name, num_classes=10).to("meta", dtype)
    settings = {"merge_probability": options.merge_probability}
    plan = InMergeWrapper(network, **settings).plan
    draws = draw(plan, options.merge_probability)
    share = 0.5 if rule == "quantile" else options.merged_share
    plain = plain_pass(network, RULES[rule], **settings)
    fused = fused_pass(plan, draws, share, dtype, quantile=rule == "quantile")
    engines = {
        ("torch", "persistent"): plain,
        ("torch", "transient"): plain + plain_transience(plan, draws, dtype),
        ("triton", "persistent"): fused,
        ("triton", "transient"): fused + fused_transience(plan, draws, share, dtype),
    }
    drawn = row_bytes(plan, draws, dtype)
    floor = Cost(0, (2 + share) * drawn)
    rows = []
    for (engine, mode), cost in engines.items():
        times = {key: cost.seconds(DEVICES[key], 1e-6 * options.launch_us) for key in options.gpus}
        rows.append(
            {
                "model": name,
                "layers": len(plan.merged),
                "drawn_pairs": sum(len(targets) for targets, _ in draws),
                "rule": rule,
                "merged_share": share,
                "engine": engine,
                "mode": mode,
                **asdict(cost),
                "buffer_bytes": drawn if engine == "triton" else None,
                "microseconds": {key: 1e6 * taken for key, taken in times.items()},
                "floor_microseconds": {
                    key: 1e6 * floor.seconds(DEVICES[key], 0.0) for key in options.gpus
                },
                "share_of_step": {
                    key: taken / (1e-3 * options.step_ms) for key, taken in times.items()
                }
                if options.step_ms
                else None,
            }
        )
    return rows


def cells(row: dict[str, Any]) -> dict[str, str]:
    """Returns one line of the table, by column."""
    shown = {
        "network": f"{row['model']} ({row['layers']} layers)",
        "threshold": row["rule"],
        "engine": row["engine"],
        "merging": row["mode"],
        "launches": f"{row['launches']}",
        "MB": f"{1e-6 * row['moved']:.1f}",
    }
    for key, taken in row["microseconds"].items():
        share = row["share_of_step"] and f" ({row['share_of_step'][key]:.2%})"
        shown[f"{DEVICES[key].name}, µs"] = f"{taken:.0f}{share or ''}"
    return shown


parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--models", nargs="+", default=MODELS, help=f"timm models (default: {MODELS})")
parser.add_argument(
    "--rules", nargs="+", default=list(RULES), choices=RULES, help="(default: both)"
)
parser.add_argument("--gpus", nargs="+", default=list(DEVICES), choices=DEVICES)
parser.add_argument("--merge-probability", type=float, default=0.3)
parser.add_argument(
    "--merged-share",
    type=float,
    default=1.0,
    help="share of the drawn pairs that merge (default: all, the upper bound of the cost)",
)
parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
parser.add_argument(
    "--launch-us",
    type=float,
    default=3.0,
    help="assumed time of a launch, in µs (default: %(default)s)",
)
parser.add_argument(
    "--step-ms", type=float, help="time of a training step, in ms, to print shares of it"
)
parser.add_argument("--out", type=Path, default=Path("runs/gpu_budget.json"))


def main() -> None:
    options = parser.parse_args()
    rows = [
        row
        for name in options.models
        for rule in options.rules
        for row in budget(name, rule, options)
    ]
    head = cells(rows[0])
    print("A calculation, not a measurement.\n")
    print(f"| {' | '.join(head)} |", "|---" * len(head) + "|", sep="\n")
    for row in rows:
        print(f"| {' | '.join(cells(row).values())} |")
    content = {
        "command": shlex.join(["python", *sys.argv]),
        "kind": "a calculation, not a measurement",
        "settings": {key: str(value) for key, value in vars(options).items()},
        "devices": {key: asdict(DEVICES[key]) for key in options.gpus},
        "torch": torch.__version__,
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(content, indent=1))
    print(f"\nwritten to {options.out}")


if __name__ == "__main__":
    main()
