"""Every model of timm and torchvision: is it planned, and does it come back from a file?

    python -m tests.zoo                 # plans every model, writes benchmarks/results/zoo.csv
    python -m tests.zoo --round-trip    # trains, exports and reloads one model of each family,
                                        # writes benchmarks/results/zoo_round_trip.csv

With ``--recommended`` both merge in the forward pass, as ``InMergeWrapper.recommended`` does, and
write zoo_recommended.csv and zoo_recommended_round_trip.csv.

Each takes some 10 minutes on two CPU processes and needs no weights. The first builds on the meta
device, where tensors have shapes and no memory, but for detection networks, whose boxes depend on
values. They end with exit status 1 if a model broke a promise.
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
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
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
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

from inmerge_wrap import (
    InMergeWrapper,
    export_timm,
    export_weights,
    plan_merging,
    recommended_settings,
)
from inmerge_wrap.discovery import SKIPPED_KINDS
from inmerge_wrap.plan import MergePlan

TIMM_OF_THE_TABLE = "1.0.31"
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
# For training: at its own 1024 pixels this one takes 16 GB.
_SETTINGS: dict[str, dict[str, Any]] = {"samvit_base_patch16": {"img_size": 256}}


@dataclass
class Entry:
    """A name of the zoo."""

    source: str  # "timm" or "torchvision"
    family: str  # the module that defines it
    model: str

    @property
    def detects(self) -> bool:
        """Whether it is a detection network, which takes lists of images."""
        return self.family.startswith("detection.")


@dataclass
class Outcome(Entry):
    """What planning one model gave; one line of benchmarks/results/zoo.csv."""

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
    """Every name of timm, and all of torchvision that classify, segment or detect."""
    found = {
        name: Entry("timm", module, name)
        for module in timm.models.list_modules()
        for name in timm.list_models(module=module)
    }
    missing = set(timm.list_models()) - found.keys()
    assert not missing, f"names of timm in no module: {sorted(missing)}"
    models = torchvision.models
    return (
        *found.values(),
        *(
            Entry("torchvision", _torchvision_family(name), name)
            for module in (models, models.video, models.segmentation, models.detection)
            for name in models.list_models(module=module)
        ),
    )


def _torchvision_family(name: str) -> str:
    builder = torchvision.models.get_model_builder(name)
    return builder.__module__.removeprefix("torchvision.models.")


def build(entry: Entry, device: str = "meta", **settings: Any) -> nn.Module:
    """The model without weights; on the CPU where it cannot be built on the meta device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what others say about their own models
        if device != "meta" or entry.detects:
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
    if entry.family.startswith(("segmentation.", "detection.")):
        settings["weights_backbone"] = None
    if entry.detects and "ssd" not in entry.family:  # that one has a size of its own
        settings |= {"min_size": 256, "max_size": 256}
    if "rcnn" in entry.model:  # or its heads run on a thousand boxes
        settings |= {"rpn_post_nms_top_n_test": 10, "box_detections_per_img": 2}
    return torchvision.models.get_model(entry.model, weights=None, **settings)


def input_size(model: nn.Module) -> tuple[int, ...]:
    """(channels, *size) of the images or videos that a model of the zoo takes."""
    configured = getattr(model, "pretrained_cfg", {}).get("input_size")
    if configured:
        return tuple(configured)
    if type(model).__module__.startswith("torchvision.models.video."):
        side = 112 if type(model).__name__ == "VideoResNet" else 224
        return 3, 16, side, side
    if type(model).__module__.startswith("torchvision.models.detection."):
        return 3, 256, 256
    side = 299 if type(model).__name__ == "Inception3" else getattr(model, "image_size", 224)
    return 3, side, side


def example(entry: Entry, size: tuple[int, ...], device: torch.device | None = None) -> Any:
    """What to call a model with: a batch of two, or for a detection network a list of two."""
    batch = torch.rand(2, *size, device=device)
    return list(batch) if entry.detects else batch


def count_mergeable(entry: Entry, model: nn.Module, recommended: bool = False) -> set[str]:
    """The convolutions that merging should reach, found by other means than the library's.

    They run in eval mode, have several kernels that read the same channels, work on a map, and
    are not the classifier that the model names. With the paper's settings they do not read the
    image; with the recommended ones they may, but for those that cut it into patches.
    """
    reads_image: dict[str, bool] = {}
    pixels: Counter[str] = Counter()

    def hook_of(name: str) -> Any:
        def hook(module: _ConvNd, inputs: tuple[Tensor], output: Tensor) -> None:
            reads_image[name] = inputs[0].shape[1] == channels
            pixels[name] = max(pixels[name], output.shape[2:].numel())

        return hook

    size = input_size(model)
    channels = size[0]
    convs = {name: m for name, m in model.named_modules() if isinstance(m, _ConvNd)}
    handles = [conv.register_forward_hook(hook_of(name)) for name, conv in convs.items()]
    with torch.no_grad():
        model.eval()(example(entry, size, next(model.parameters()).device))
    for handle in handles:
        handle.remove()
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier")
    return {
        name
        for name, of_image in reads_image.items()
        if (not of_image or (recommended and not _cuts(convs[name])))
        and pixels[name] > 1
        and name != classifier
        and not convs[name].groups == convs[name].in_channels > 1
        and convs[name].out_channels > convs[name].groups
    }


def _cuts(conv: _ConvNd) -> bool:
    return conv.kernel_size == conv.stride and max(conv.kernel_size) > 1


@contextmanager
def strict(entry: Entry) -> Iterator[None]:
    """Makes warnings errors, but that a detection network was really run: nothing else can be."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if entry.detects:
            warnings.filterwarnings("ignore", "the convolutions were found by a real forward pass")
        yield


def compact(plan: MergePlan) -> str:
    """How many convolutions are skipped for which reason, the most frequent first."""
    words = Counter(
        site.reason_kind if site.reason_kind in SKIPPED_KINDS else str(site.reason).split(":")[0]
        for site in plan.skipped
    )
    return "; ".join(f"{count} {word}" for word, count in words.most_common())


def plan_one(entry: Entry, recommended: bool = False) -> Outcome:
    """Plans one model, for the paper's settings or the recommended ones; checks every promise."""
    outcome = Outcome(**asdict(entry))
    torch.manual_seed(0)  # which boxes a detection network finds depends on its weights
    model = build(entry)
    outcome.parameters = sum(parameter.numel() for parameter in model.parameters())
    outcome.convolutions = sum(isinstance(module, _ConvNd) for module in model.modules())
    start, cpu_start = time.perf_counter(), time.process_time()
    try:
        given = example(entry, input_size(model)) if entry.detects else None
        with strict(entry):
            chosen = recommended_settings(total_steps=100) if recommended else {}
            settings = {key: chosen[key] for key in ("mode", "shallow_layers") if key in chosen}
            plan = plan_merging(model, example_input=given, **settings)
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
        mergeable = count_mergeable(entry, model, recommended)
        outcome.mergeable = len(mergeable)
        if outcome.refusal and mergeable:
            outcome.broken = f"refused with {len(mergeable)} mergeable convolutions"
        elif outcome.merged:
            wrong = {site.name for site in plan.merged} - mergeable
            outcome.broken = f"merged without being mergeable: {sorted(wrong)}" if wrong else ""
    return outcome


def go_round(entry: Entry, recommended: bool = False) -> RoundTrip:
    """Wrap, two real training steps with every pair merged, export, reload, compare logits."""
    outcome = RoundTrip(**asdict(entry))
    start = time.perf_counter()
    try:
        with strict(entry):
            # True, and of no matter here: what is exported is compared with what was trained.
            warnings.filterwarnings("ignore", "kernels were merged in the very last step")
            _go_round(entry, outcome, recommended)
    except Exception as error:
        outcome.broken = f"{type(error).__name__}: {error}".splitlines()[0]
    outcome.seconds = round(time.perf_counter() - start, 1)
    return outcome


def _go_round(entry: Entry, outcome: RoundTrip, recommended: bool) -> None:
    torch.manual_seed(0)
    settings = _SETTINGS.get(entry.model, {})
    network = build(entry, "cpu", **settings)
    size = input_size(network)
    if "img_size" in settings:
        size = size[0], settings["img_size"], settings["img_size"]
    given = example(entry, size) if entry.detects else None
    every_pair = {"similarity_threshold": -1.0, "merge_probability": 1.0}
    chosen = recommended_settings(total_steps=100) if recommended else every_pair
    wrapper = InMergeWrapper(network, example_input=given, **chosen)
    optimizer = torch.optim.SGD(wrapper.parameters(), lr=1e-3, momentum=0.9)
    wrapper.attach(optimizer)
    wrapper.train()
    for _ in range(2):
        if entry.detects:  # these give their losses
            loss = sum(wrapper(example(entry, size), _targets(2)).values())
        else:
            output = wrapper(torch.randn(2, *size))
            loss = sum(leaf.square().mean() for leaf in tree_leaves(output))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    report = wrapper.report()
    outcome.layers, outcome.merges = len(wrapper.plan.merged), report.merged
    # All pairs are drawn and merged, but those of zero kernels, which some layers start with.
    idle = [
        layer.name
        for layer in report
        if not layer.drawn or layer.merged + layer.undefined < layer.drawn
    ]
    images = example(entry, size)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        expected = tree_leaves(network.eval()(images))
        assert all(leaf.isfinite().all() for leaf in expected), "the logits are not finite"
        path = export_weights(wrapper, Path(folder, "weights.safetensors"))
        stock = build(entry, "cpu", **settings)
        state = OrderedDict(safetensors.torch.load_file(path))
        if type(stock).__name__ == "MNASNet":
            # It asks for its version, which torch keeps beside the tensors and safetensors drops.
            state._metadata = stock.state_dict()._metadata
        stock.load_state_dict(state)
        assert _equal(stock, images, expected), "the reloaded logits differ"
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
            assert _equal(stock, images, expected), "timm's reloaded logits differ"
            outcome.files = "weights, timm folder"
    assert not idle, f"layers without a merge of every pair: {idle}"


def _targets(count: int) -> list[dict[str, Tensor]]:
    """What any detection network of torchvision learns: boxes, masks and keypoints."""
    targets = {
        "boxes": torch.tensor([[40.0, 40.0, 180.0, 180.0]]),
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, 256, 256, dtype=torch.uint8),
        "keypoints": torch.tensor([[[100.0, 100.0, 1.0]] * 17]),
    }
    return [targets] * count


def _equal(model: nn.Module, images: Any, expected: Sequence[Tensor]) -> bool:
    """Whether the outputs of a model are these, bit for bit."""
    found = tree_leaves(model.eval()(images))
    return len(found) == len(expected) > 0 and all(map(torch.equal, found, expected))


def smallest_of_families() -> list[Entry]:
    """The smallest model of each family with something to merge, as zoo.csv knows it."""
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
    """The tables of docs/what-is-merged.md, from benchmarks/results/zoo.csv."""
    rows = read(RESULTS / "zoo.csv") if rows is None else rows
    planned = [row for row in rows if int(row["merged"])]
    refused = [row for row in rows if row["refusal"]]
    outcomes = {
        "all": len(rows),
        **Counter(f"planned, found by {row['found_by']}" for row in planned),
        **Counter(f"refused: {_refusal(row['refusal'])}" for row in refused),
        "planned or refused wrongly": sum(bool(row["broken"]) for row in rows),
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
            ("convolutions of the planned models", "count", "in models"),
            [(word, count, models[word]) for word, count in layers.most_common()],
        ),
        _markdown(("share of the planned models", "within seconds", "CPU seconds"), quantiles),
    ]


def other_networks() -> str:
    """The table of other libraries in docs/what-is-merged.md, from its file of results."""
    lines: dict[tuple[str, ...], list[str]] = {}
    for row in read(RESULTS / "other_networks.csv"):
        merged = f"{row['merged']} of {row['convolutions']}"
        library = row["library"].partition(" ")[0].replace("segmentation_models_pytorch", "smp")
        key = f"{library} {row['network']}", merged, row["skipped"]
        lines.setdefault(key, []).append(row["images"])
    return _markdown(
        ("network", "images", "merged", "skipped"),
        [(name, ", ".join(images), *rest) for (name, *rest), images in lines.items()],
    )


def _refusal(message: str) -> str:
    if "has no convolution" in message:
        return "no convolution"
    reasons = message.partition(": ")[2].partition(". Remedy")[0].split("; ")
    words = (reason.partition(" ")[2].partition(":")[0] for reason in reasons)
    return "nothing but " + ", ".join(sorted(words))


def _markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(
        "| " + " | ".join(f"{x:,}" if isinstance(x, int) else str(x) for x in line) + " |\n"
        for line in lines
    )


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
    parser.add_argument("--recommended", action="store_true", help="merge in the forward pass")
    parser.add_argument("--only", default="*", help="names to take, with * wildcards")
    parser.add_argument("--output", type=Path, help="the table to write")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    job, kind = (go_round, RoundTrip) if options.round_trip else (plan_one, Outcome)
    names = smallest_of_families() if options.round_trip else list(entries())
    names = [entry for entry in names if fnmatchcase(entry.model, options.only)]
    random.Random(0).shuffle(names)  # so that the large models of a family do not meet
    parts = "zoo", options.recommended * "_recommended", options.round_trip * "_round_trip"
    default = RESULTS / f"{''.join(parts)}.csv"
    start, outcomes = time.perf_counter(), []
    # An executor, because a pool waits for ever for the work of a process that was killed.
    with ProcessPoolExecutor(
        options.processes, multiprocessing.get_context("spawn"), _use_one_thread
    ) as pool:
        jobs = [pool.submit(job, entry, options.recommended) for entry in names]
        for future in as_completed(jobs):
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
