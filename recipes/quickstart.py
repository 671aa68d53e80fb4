"""Compares in-model merging with plain training, in a minute and without a download.

    accelerate launch recipes/quickstart.py

Trains a small timm ResNet twice on the scanned digits that scikit-learn ships, from the same seed:
once plainly, once with merging. Measures both on clean, noisy and blurred test images, exports the
merged network, loads it back into plain timm and checks that it computes the same. Writes the
weights, ``results.json`` and ``quickstart.png`` into ``runs/quickstart/``.

Hardware and time: 2 CPU cores, under two minutes. Expected: both networks around .99 clean. One
seed on a toy data set is a demonstration, not evidence; for that see docs/evidence.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from augmentation import augment
from evaluation import evaluate, metrics, predict
from images import Images, Normalised, load_digits
from merging_options import add_merging_arguments, merging_settings, parse_run
from records import environment, write_json
from running import batches, make_accelerator, one_line_if_out_of_memory
from tqdm import tqdm

from inmerge_wrap import InMergeWrapper, export_timm

# -- settings --------------------------------------------------------------------------------------

CORRUPTIONS = {"gaussian_noise": (3, 5), "gaussian_blur": (3, 5)}

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--arch", default="resnet10t", help="any timm CNN (default: %(default)s)")
parser.add_argument(
    "--epochs", type=int, default=8, help="epochs of each run (default: %(default)s)"
)
parser.add_argument("--batch-size", type=int, default=32, help="total over all processes")
parser.add_argument("--lr", type=float, default=0.05, help="peak of the one-cycle schedule")
parser.add_argument("--seed", type=int, default=0, help="seed of both runs")
parser.add_argument("--train-images", type=int, default=1100, help="at most 1100")
parser.add_argument(
    "--out", type=Path, default=Path("runs/quickstart"), help="folder (default: %(default)s)"
)
add_merging_arguments(parser, optional=False)


# -- one training run ------------------------------------------------------------------------------


def train(
    accelerator: Accelerator, data: Images, options: argparse.Namespace, *, merge: bool
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Trains a model; returns it (wrapped, if it merges) and its results."""
    set_seed(options.seed)
    network = timm.create_model(options.arch, num_classes=10, in_chans=1)
    normalise = Normalised(data, accelerator.device)
    images, labels = data.parts["train"]
    loader = batches(accelerator, len(images), options.batch_size, options.seed)
    total_steps = options.epochs * len(loader)

    # The two lines that merging takes: wrap the network ...
    model: torch.nn.Module = network
    if merge:
        settings = merging_settings(options, total_steps)  # none given: the recommended ones
        model = InMergeWrapper.recommended(
            network, total_steps=total_steps, seed=options.seed, **settings
        )
    optimizer = torch.optim.SGD(model.parameters(), lr=options.lr, momentum=0.9, weight_decay=5e-4)
    if isinstance(model, InMergeWrapper):
        model.attach(optimizer)  # ... and attach its optimizer.

    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=total_steps)
    model, optimizer = accelerator.prepare(model, optimizer)
    augmentation = torch.Generator().manual_seed(options.seed)
    history = []
    bar = tqdm(
        range(options.epochs),
        desc="merged" if merge else "plain ",
        disable=not accelerator.is_main_process,
    )
    for _ in bar:
        model.train()
        for (index,) in loader:
            pixels = normalise(augment(images[index], augmentation, flip=False))
            loss = torch.nn.functional.cross_entropy(model(pixels), labels[index])
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        val_images, val_labels = data.parts["val"]
        logits = predict(network, val_images, normalise, 500)
        history.append(metrics(logits, val_labels, data.task)["accuracy"])
        bar.set_postfix(val_accuracy=f"{history[-1]:.3f}")
    result: dict[str, Any] = {
        "val_accuracy": history,
        "test": evaluate(network, data, normalise, corruptions=CORRUPTIONS),
    }
    trained = accelerator.unwrap_model(model)
    if merge:
        result["plan"], result["report"] = str(trained.plan), str(trained.report())
        result["merging"] = trained.report().to_dict()
    return trained, result


# -- report ----------------------------------------------------------------------------------------


def print_table(results: dict[str, dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Test accuracy, one seed")
    table.add_column("test images")
    for run in results:
        table.add_column(run, justify="right")
    for condition in results["plain"]["test"]:
        accuracies = [f"{run['test'][condition]['accuracy']:.3f}" for run in results.values()]
        table.add_row(condition.replace("/", ", severity "), *accuracies)
    Console().print(table)


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (course, bars) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    conditions = list(results["plain"]["test"])
    for place, (name, run) in enumerate(results.items()):
        color = ("#0072B2", "#D55E00")[place]
        epochs = range(1, len(run["val_accuracy"]) + 1)
        course.plot(epochs, run["val_accuracy"], marker="o", label=name, color=color)
        heights = [run["test"][condition]["accuracy"] for condition in conditions]
        positions = [index + 0.4 * place for index in range(len(conditions))]
        drawn = bars.bar(positions, heights, width=0.38, label=name, color=color)
        bars.bar_label(drawn, fmt="%.2f", fontsize=8)
    course.set(xlabel="epoch", ylabel="accuracy", title="Validation during training")
    labels = [
        condition.replace("gaussian_", "").replace("/", "\nseverity ") for condition in conditions
    ]
    bars.set_xticks([index + 0.2 for index in range(len(conditions))], labels)
    bars.set(ylabel="accuracy", ylim=(0, 1.08), title="Test images, clean and corrupted")
    for axis in (course, bars):
        axis.spines[["top", "right"]].set_visible(False)
    course.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    options = parse_run(parser)
    accelerator = make_accelerator()
    data = load_digits().first_labels(options.train_images, seed=0).to(accelerator.device)
    results = {}
    _, results["plain"] = train(accelerator, data, options, merge=False)
    merged, results["merged"] = train(accelerator, data, options, merge=True)
    if not accelerator.is_main_process:
        return

    options.out.mkdir(parents=True, exist_ok=True)
    mean, std = data.statistics()
    call = export_timm(
        merged,
        options.out / "merged",
        input_size=data.input_size,
        mean=mean,
        std=std,
        label_names=data.classes,
    )
    pixels, _ = data.parts["test"]
    normalise = Normalised(data, accelerator.device)
    reloaded = timm.create_model(f"local-dir:{options.out / 'merged'}", pretrained=True)
    reloaded.to(accelerator.device)
    ours, theirs = (predict(net, pixels, normalise, 500) for net in (merged, reloaded))
    if not torch.equal(ours, theirs):
        raise SystemExit("the exported network gives other outputs: do not use these weights")

    print(results["merged"].pop("plan"))
    print(results["merged"].pop("report"))
    print_table(results)
    print(
        "One seed: chance can decide which of them is ahead. Paired seeds and intervals, in a\n"
        "quarter of an hour:\n"
        "  accelerate launch recipes/medmnist_2d.py --dataset digits --seeds 5\n"
        "docs/evidence.md has those of medical images."
    )
    draw(results, options.out / "quickstart.png")
    settings = {key: str(value) for key, value in vars(options).items()}
    write_json(
        options.out / "results.json",
        {"settings": settings, "results": results, "environment": environment()},
    )
    print(f"The exported weights give identical logits in plain timm. Load them with\n  {call}")
    print(f"Results and figure: {options.out}/results.json, {options.out}/quickstart.png")


if __name__ == "__main__":
    with one_line_if_out_of_memory():
        main()
