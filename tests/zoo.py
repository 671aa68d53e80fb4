"""Every model of timm and torchvision: is it planned, and does it come back from a file?

    python -m tests.zoo                 # plans every model, writes results/zoo.csv
    python -m tests.zoo --round-trip    # trains, exports and reloads one model of each family,
                                        # writes results/zoo_round_trip.csv

Both take 8 minutes on two CPU processes and need no weights. The first builds on the meta
device, where tensors have shapes and no memory. They end with exit status 1 if a model broke a
promise.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import random
import sys
import tempfile
import time
import warnings
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from inmerge_wrap import InMergeWrapper, export_timm, export_weights, plan_merging
from inmerge_wrap.discovery import SKIPPED_KINDS, MergePlan

TIMM_OF_THE_TABLE = "1.0.31"
RESULTS = Path(__file__).parents[1] / "results"
# For training: at its own 1024 pixels this one takes 16 GB.
_SETTINGS: dict[str, dict[str, Any]] = {"samvit_base_patch16": {"img_size": 256}}


@dataclass
class Entry:
    """A name of the zoo."""

    source: str  # "timm" or "torchvision"
    family: str  # the module that defines it
    model: str


@dataclass
class Outcome(Entry):
    """What planning one model gave; one line of results/zoo.csv."""

    parameters: int = 0
    convolutions: int = 0
    mergeable: int = 0
    """What an independent count finds; see :func:`count_mergeable`."""
    merged: int = 0
    skipped: str = ""
    found_by: str = ""
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    """Of one thread; what others do on the machine does not count."""
    refusal: str = ""
    broken: str = ""
    """The promise that does not hold, empty if all do."""


@dataclass
class RoundTrip(Entry):
    """What the way through training, file and stock model gave."""

    layers: int = 0
    merges: int = 0
    files: str = ""
    seconds: float = 0.0
    broken: str = ""


@cache
def entries() -> tuple[Entry, ...]:
    """Every name of timm and every classification model of torchvision."""
    found = {
        name: Entry("timm", module, name)
        for module in timm.models.list_modules()
        for name in timm.list_models(module=module)
    }
    missing = set(timm.list_models()) - found.keys()
    assert not missing, f"names of timm in no module: {sorted(missing)}"
    classifiers = torchvision.models.list_models(module=torchvision.models)
    return (
        *found.values(),
        *(Entry("torchvision", _torchvision_family(name), name) for name in classifiers),
    )


def _torchvision_family(name: str) -> str:
    builder = torchvision.models.get_model_builder(name)
    return builder.__module__.rpartition(".")[2]


def build(entry: Entry, device: str = "meta", **settings: Any) -> nn.Module:
    """The model without weights; on the CPU where it can not be built on the meta device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what others say about their own models
        if device != "meta":
            return _create(entry, **settings)
        try:
            with torch.device("meta"):
                return _create(entry)
        except RuntimeError:  # the regnets of torchvision compute their widths with tensors
            return _create(entry)


def _create(entry: Entry, **settings: Any) -> nn.Module:
    if entry.source == "timm":
        return timm.create_model(entry.model, **settings)
    slow_init = entry.model in {"googlenet", "inception_v3"}
    if slow_init:
        settings["init_weights"] = False
    return torchvision.models.get_model(entry.model, weights=None, **settings)


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """(channels, height, width) of the images that a model of the zoo takes."""
    configured = getattr(model, "pretrained_cfg", {}).get("input_size")
    if configured:
        return tuple(configured)
    side = 299 if type(model).__name__ == "Inception3" else getattr(model, "image_size", 224)
    return 3, side, side


def count_mergeable(model: nn.Module) -> set[str]:
    """The convolutions that merging should reach, found by other means than the library's.

    They run in eval mode, have several kernels that read the same channels, work on a map, and
    neither read the image nor are the classifier that the model names.
    """
    maps: dict[str, tuple[bool, int]] = {}

    def hook_of(name: str) -> Any:
        def hook(module: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
            maps[name] = (inputs[0].shape[1] == channels, output.shape[-2:].numel())

        return hook

    channels, *sides = input_size(model)
    device = next(model.parameters()).device
    convs = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    handles = [conv.register_forward_hook(hook_of(name)) for name, conv in convs.items()]
    with torch.no_grad():
        model.eval()(torch.zeros(2, channels, *sides, device=device))
    for handle in handles:
        handle.remove()
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier")
    return {
        name
        for name, (reads_image, pixels) in maps.items()
        if not reads_image
        and pixels > 1
        and name != classifier
        and convs[name].groups != convs[name].in_channels
        and convs[name].out_channels > convs[name].groups
    }


def compact(plan: MergePlan) -> str:
    """How many convolutions are skipped for which reason, the most frequent first."""
    words = Counter(
        site.reason_kind if site.reason_kind in SKIPPED_KINDS else str(site.reason).split(":")[0]
        for site in plan.skipped
    )
    return "; ".join(f"{count} {word}" for word, count in words.most_common())


def plan_one(entry: Entry) -> Outcome:
    """Plans one model and checks every promise."""
    outcome = Outcome(**asdict(entry))
    model = build(entry)
    outcome.parameters = sum(parameter.numel() for parameter in model.parameters())
    outcome.convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    start, cpu_start = time.perf_counter(), time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plan = plan_merging(model)
    except ValueError as error:
        outcome.refusal = str(error)
    except Exception as error:
        outcome.broken = f"unexpected {type(error).__name__}: {error}"
    else:
        outcome.merged, outcome.skipped = len(plan.merged), compact(plan)
        outcome.found_by = plan.found_by
    outcome.seconds = round(time.perf_counter() - start, 3)
    outcome.cpu_seconds = round(time.process_time() - cpu_start, 3)
    if outcome.convolutions:
        mergeable = count_mergeable(model)
        outcome.mergeable = len(mergeable)
        if outcome.refusal and mergeable:
            outcome.broken = f"refused with {len(mergeable)} mergeable convolutions"
        elif outcome.merged:
            wrong = {site.name for site in plan.merged} - mergeable
            outcome.broken = f"merged without being mergeable: {sorted(wrong)}" if wrong else ""
    return outcome


def go_round(entry: Entry) -> RoundTrip:
    """Wrap, two real training steps with every pair merged, export, reload, compare logits."""
    outcome = RoundTrip(**asdict(entry))
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            # True, and of no matter here: what is exported is compared with what was trained.
            warnings.filterwarnings("ignore", "kernels were merged in the very last step")
            _go_round(entry, outcome)
    except Exception as error:
        outcome.broken = f"{type(error).__name__}: {error}".splitlines()[0]
    outcome.seconds = round(time.perf_counter() - start, 1)
    return outcome


def _go_round(entry: Entry, outcome: RoundTrip) -> None:
    torch.manual_seed(0)
    settings = _SETTINGS.get(entry.model, {})
    network = build(entry, "cpu", **settings)
    size = input_size(network)
    if "img_size" in settings:
        size = size[0], settings["img_size"], settings["img_size"]
    wrapper = InMergeWrapper(network, similarity_threshold=-1.0, merge_probability=1.0)
    optimizer = torch.optim.SGD(wrapper.parameters(), lr=1e-3, momentum=0.9)
    wrapper.attach(optimizer)
    wrapper.train()
    for _ in range(2):
        output = wrapper(torch.randn(2, *size))
        loss = sum(leaf.square().mean() for leaf in tree_leaves(output))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    report = wrapper.report()
    outcome.layers, outcome.merges = len(wrapper.plan.merged), report.merged
    # All pairs are drawn and merged, but those of zero kernels, which some layers start with.
    idle = [layer.name for layer in report if layer.merged + layer.undefined < layer.drawn]
    images = torch.randn(2, *size)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        expected = network.eval()(images)
        assert expected.isfinite().all(), "the logits are not finite"
        path = export_weights(wrapper, Path(folder, "weights.safetensors"))
        stock = build(entry, "cpu", **settings)
        state = OrderedDict(safetensors.torch.load_file(path))
        if type(stock).__name__ == "MNASNet":
            # It asks for its version, which torch keeps beside the tensors and safetensors drops.
            state._metadata = stock.state_dict()._metadata
        stock.load_state_dict(state)
        assert torch.equal(stock.eval()(images), expected), "the reloaded logits differ"
        outcome.files = "weights"
        if entry.source == "timm":
            config = network.pretrained_cfg
            export_timm(
                wrapper,
                Path(folder, "timm"),
                input_size=size,
                mean=config["mean"],
                std=config["std"],
                model_args=settings,
            )
            stock = timm.create_model(f"local-dir:{folder}/timm", pretrained=True)
            assert torch.equal(stock.eval()(images), expected), "timm's reloaded logits differ"
            outcome.files = "weights, timm folder"
    assert not idle, f"layers without a merge of every pair: {idle}"


def smallest_of_families() -> list[Entry]:
    """The smallest model of each family with something to merge, as results/zoo.csv knows it."""
    best: dict[tuple[str, str], dict[str, str]] = {}
    for row in read(RESULTS / "zoo.csv"):
        key = row["source"], row["family"]
        if int(row["merged"]) and (
            key not in best or int(row["parameters"]) < int(best[key]["parameters"])
        ):
            best[key] = row
    return [Entry(row["source"], row["family"], row["model"]) for row in best.values()]


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def outcome_rows(outcomes: Iterable[Entry]) -> list[dict[str, str]]:
    """The outcomes as a table gives them back."""
    return [{key: str(value) for key, value in asdict(outcome).items()} for outcome in outcomes]


def summaries(rows: Sequence[dict[str, str]] | None = None) -> list[str]:
    """The tables of docs/what-is-merged.md, from results/zoo.csv."""
    rows = read(RESULTS / "zoo.csv") if rows is None else rows
    planned = [row for row in rows if int(row["merged"])]
    refused = [row for row in rows if row["refusal"]]
    outcomes = {
        "names": len(rows),
        **Counter(f"planned, found by {row['found_by']}" for row in planned),
        **Counter(f"refused: {_refusal(row['refusal'])}" for row in refused),
        "broken promises": sum(bool(row["broken"]) for row in rows),
    }
    layers, models = Counter(merged=sum(int(row["merged"]) for row in planned)), Counter()
    models["merged"] = len(planned)
    for row in planned:
        for part in row["skipped"].split("; ") if row["skipped"] else ():
            count, _, word = part.partition(" ")
            layers[word] += int(count)
            models[word] += 1
    clocks = [sorted(float(row[c]) for row in planned) for c in ("seconds", "cpu_seconds")]
    quantiles = [
        (f"{share:.0%}", *(f"{clock[int(share * (len(clock) - 1))]:.2f}" for clock in clocks))
        for share in (0.5, 0.9, 0.95, 0.99, 1.0)
    ]
    return [
        _markdown(("outcome", "models"), outcomes.items()),
        _markdown(
            ("convolutions of the planned models", "count", "models with any"),
            [(word, count, models[word]) for word, count in layers.most_common()],
        ),
        _markdown(("share of the planned models", "within seconds", "CPU seconds"), quantiles),
    ]


def _refusal(message: str) -> str:
    if "has no Conv2d" in message:
        return "no Conv2d"
    reasons = message.partition(": ")[2].partition(". Remedy")[0].split("; ")
    words = (reason.partition(" ")[2].partition(":")[0] for reason in reasons)
    return "nothing but " + ", ".join(sorted(words))


def _markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def write(path: Path, outcomes: Iterable[Entry], kind: type[Entry]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(kind)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            asdict(outcome)
            for outcome in sorted(outcomes, key=lambda o: (o.source, o.family, o.model))
        )


def _use_one_thread() -> None:
    torch.set_num_threads(1)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--round-trip", action="store_true", help="train, export and reload")
    parser.add_argument("--only", default="*", help="names to take, with * wildcards")
    parser.add_argument("--output", type=Path, help="the table to write")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    job, kind = (go_round, RoundTrip) if options.round_trip else (plan_one, Outcome)
    names = smallest_of_families() if options.round_trip else list(entries())
    names = [entry for entry in names if fnmatchcase(entry.model, options.only)]
    random.Random(0).shuffle(names)  # so that the large models of a family do not meet
    default = RESULTS / ("zoo_round_trip.csv" if options.round_trip else "zoo.csv")
    start, outcomes = time.perf_counter(), []
    # An executor, because a pool waits for ever for the work of a process that was killed.
    with ProcessPoolExecutor(
        options.processes, multiprocessing.get_context("spawn"), _use_one_thread
    ) as pool:
        for future in as_completed([pool.submit(job, entry) for entry in names]):
            outcome = future.result()
            outcomes.append(outcome)
            if outcome.broken:
                print(f"{outcome.source} {outcome.model}: {outcome.broken}", file=sys.stderr)
            if len(outcomes) % 100 == 0:
                print(f"{len(outcomes)} of {len(names)}", file=sys.stderr)
    write(options.output or default, outcomes, kind)
    broken = sum(bool(outcome.broken) for outcome in outcomes)
    seconds = time.perf_counter() - start
    print(f"{len(outcomes)} models, {broken} broken, {seconds:.0f} s")
    if not options.round_trip:
        print(*summaries(outcome_rows(outcomes)), sep="\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
