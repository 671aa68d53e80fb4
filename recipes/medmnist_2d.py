"""Compares plain training and in-model merging on a MedMNIST data set, paired by seed.

    accelerate launch recipes/medmnist_2d.py --dataset bloodmnist --data-root DIR --seeds 5

Uses the official splits; the epoch is chosen by validation AUROC alone, and the test part is used
once per run. Each run writes one JSON file and the weights as a timm folder, and is not repeated,
so that a stopped command can be continued. Prints mean and standard deviation over the seeds, the
paired difference with its 95% interval, and the paper's figures next to them; also writes this
table in Markdown.

Hardware and time: ResNet-18, 28 px, 5 epochs on one CPU core of a busy machine take 2 minutes a run
on DermaMNIST and 4 to 5 on BloodMNIST. Expected: docs/evidence.md, files results/medmnist/.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from augmentation import augment
from evaluation import CORRUPTIONS, evaluate, metrics, predict
from images import Images, Normalised, load_images
from merging_options import add_merging_arguments, merging_settings, paper_settings, parse_run
from records import difference_text, environment, spread, write_json
from running import add_run_arguments, batches, loss_of, one_line_if_out_of_memory, start
from tqdm import tqdm
from tracking import merged_share

from inmerge_wrap import InMergeWrapper, export_timm
from inmerge_wrap.robustness import paired_difference

# -- settings --------------------------------------------------------------------------------------

SHOWN = {"accuracy": "accuracy", "balanced_error": "balanced error", "auroc": "AUROC"}
PUBLISHED = {  # arXiv 2502.20516, accuracy: baseline, InMerge (mean, standard deviation)
    "pathmnist": ((0.898, 0.010), (0.924, 0.002)),
    "dermamnist": ((0.745, 0.009), (0.760, 0.005)),
    "bloodmnist": ((0.941, 0.005), (0.948, 0.004)),
}

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--dataset", default="bloodmnist", help="a 2D MedMNIST flag, or digits")
parser.add_argument("--data-root", type=Path, default=Path("data"), help="folder of npz files")
parser.add_argument(
    "--size",
    type=int,
    default=28,
    choices=[28, 64, 128, 224],
    help="side of the images in pixels (default: %(default)s)",
)
parser.add_argument("--arch", default="resnet18", help="any timm CNN (default: %(default)s)")
parser.add_argument(
    "--epochs", type=int, default=10, help="epochs of each run (default: %(default)s)"
)
parser.add_argument("--batch-size", type=int, default=64, help="total over all processes")
parser.add_argument("--lr", type=float, default=0.05, help="peak of the one-cycle schedule")
parser.add_argument("--weight-decay", type=float, default=5e-4, help="L2 penalty of SGD")
parser.add_argument("--seed", type=int, default=0, help="the first seed")
parser.add_argument("--seeds", type=int, default=1, help="number of paired runs")
parser.add_argument(
    "--train-images", type=int, default=0, help="size of a random subset; 0 uses all"
)
parser.add_argument(
    "--out", type=Path, default=Path("runs/medmnist"), help="folder (default: %(default)s)"
)
add_run_arguments(parser)
add_merging_arguments(parser)


# -- one run ---------------------------------------------------------------------------------------


def train(
    accelerator: Accelerator,
    data: Images,
    options: argparse.Namespace,
    seed: int,
    merge: bool,
    folder: Path,
) -> dict[str, Any]:
    """Trains, selects the best validation epoch, tests it once and exports it."""
    set_seed(seed, deterministic=options.deterministic)
    if options.train_images:
        data = data.first_labels(options.train_images, seed)
    data = data.to(accelerator.device)
    images, labels = data.parts["train"]
    normalise, loss_function = Normalised(data, accelerator.device), loss_of(data.task)
    network = timm.create_model(
        options.arch, num_classes=len(data.classes), in_chans=data.input_size[0]
    )
    loader = batches(accelerator, len(images), options.batch_size, seed)
    total_steps = options.epochs * len(loader)

    model: torch.nn.Module = network
    if merge:
        settings = merging_settings(options, total_steps)
        model = InMergeWrapper.recommended(network, total_steps=total_steps, seed=seed, **settings)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=options.lr,
        momentum=0.9,
        weight_decay=options.weight_decay,
        fused=True,
    )
    if isinstance(model, InMergeWrapper):
        model.attach(optimizer)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=total_steps)
    model, optimizer = accelerator.prepare(model, optimizer)
    trained = accelerator.unwrap_model(model)

    augmentation = torch.Generator().manual_seed(seed)
    flip = data.name != "digits"
    best: dict[str, Any] = {"auroc": -1.0}
    began = time.perf_counter()
    bar = tqdm(
        range(1, options.epochs + 1),
        desc=f"{'merged' if merge else 'plain '} seed {seed}",
        disable=not accelerator.is_main_process,
    )
    for epoch in bar:
        model.train()
        total_loss = torch.zeros((), device=accelerator.device)
        for (index,) in loader:
            pixels = normalise(augment(images[index], augmentation, flip=flip))
            loss = loss_function(model(pixels), labels[index])
            accelerator.backward(loss)
            total_loss += loss.detach()  # stays on the device: .item() would wait for each step
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        val_images, val_labels = data.parts["val"]
        validation = metrics(predict(network, val_images, normalise, 500), val_labels, data.task)
        bar.set_postfix(val_auroc=f"{validation['auroc']:.3f}")
        if options.tracker:
            values = {
                "train_loss": accelerator.reduce(total_loss, "mean").item() / len(loader),
                "lr": schedule.get_last_lr()[0],
                **{f"val_{name}": value for name, value in validation.items()},
                **merged_share(trained),
            }
            accelerator.log({f"{folder.name}/{k}": v for k, v in values.items()}, step=epoch)
        if validation["auroc"] > best["auroc"]:
            state = {name: value.clone() for name, value in network.state_dict().items()}
            best = {"auroc": validation["auroc"], "epoch": epoch, "state": state}
    seconds = time.perf_counter() - began

    network.load_state_dict(best["state"])
    result = {
        "settings": {key: str(value) for key, value in vars(options).items()},
        "seed": seed,
        "merge": merge,
        "epoch": best["epoch"],
        "val_auroc": best["auroc"],
        "test": evaluate(network, data, normalise, corruptions=CORRUPTIONS),
        "seconds": seconds,
        "environment": environment(),
    }
    if merge:
        report = trained.report()
        result["merging"] = report.to_dict()
        accelerator.print(report)
    if accelerator.is_main_process:
        mean, std = data.statistics()
        result["load"] = export_timm(
            trained,
            folder,
            input_size=data.input_size,
            mean=mean,
            std=std,
            label_names=data.classes,
        )
        write_json(folder / "result.json", result)
    return result


# -- all runs, and their results -------------------------------------------------------------------


def compare(dataset: str, runs: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    """Returns heads and rows of the table: mean and SD over seeds, paired difference."""
    lines = [["images", "metric", *runs]]
    if len(runs) == 2:
        lines[0].append("difference (95% interval)")
    for condition in next(iter(runs.values()))[0]["test"]:
        for metric, name in SHOWN.items():
            values = {
                arm: [run["test"][condition][metric] for run in done] for arm, done in runs.items()
            }
            cells = [spread(v) for v in values.values()]
            if len(values) == 2:
                cells.append(difference_text(paired_difference(values["merged"], values["plain"])))
            lines.append([condition, name, *cells])
    if dataset in PUBLISHED:
        (before, before_sd), (after, after_sd) = PUBLISHED[dataset]
        published = {"plain": f"{before:.3f} ± {before_sd:.3f}"}
        published["merged"] = f"{after:.3f} ± {after_sd:.3f}"
        lines.append(["published", "accuracy", *(published[arm] for arm in runs)])
        if len(runs) == 2:
            lines[-1].append(f"{after - before:+.3f}")
    return lines


def print_comparison(lines: list[list[str]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for column in lines[0]:
        table.add_column(column, justify="left" if column in ("images", "metric") else "right")
    for line in lines[1:]:
        table.add_row(*line)
    Console(width=110).print(table)


def write_markdown(lines: list[list[str]], title: str, path: Path) -> None:
    """The table for a page: few columns, the difference before what it is of."""
    heads, *rows = (
        [f"{condition.replace('_', ' ')}, {metric}", *cells[2:], *cells[:2]]
        for condition, metric, *cells in lines
    )
    text = [f"| {' | '.join(row)} |" for row in rows]
    heads = [head.replace("difference", "merged minus plain") for head in heads]
    head = f"| {' | '.join(heads)} |"
    path.write_text("\n".join([title, "", head, "|---" * len(heads) + "|", *text, ""]))


def main() -> None:
    options = parse_run(parser)
    accelerator = start(options, "medmnist")
    with accelerator.main_process_first():  # one process downloads, the others find the file
        data = load_images(options.dataset, options.data_root, options.size)
    runs: dict[str, list[dict[str, Any]]] = {}
    for seed in range(options.seed, options.seed + options.seeds):
        for arm in ("plain",) if options.no_merge else ("plain", "merged"):
            name = f"{options.dataset}-{options.size}-{options.arch}-{arm}-seed{seed}"
            folder = options.out / name
            if (folder / "result.json").exists():
                result = json.loads((folder / "result.json").read_text())
                check_same_settings(result, options, folder, arm)
            else:
                result = train(accelerator, data, options, seed, arm == "merged", folder)
                accelerator.wait_for_everyone()
            runs.setdefault(arm, []).append(result)
    accelerator.end_training()
    if accelerator.is_main_process:
        lines = compare(options.dataset, runs)
        title = (
            f"{options.dataset}, {options.size} px, {options.arch}: test part, "
            f"{options.seeds} seed(s), mean ± standard deviation"
        )
        print_comparison(lines, title)
        name = f"{options.dataset}-{options.size}-{options.arch}.md"
        write_markdown(lines, title, options.out / name)
        print(f"Results and weights: {options.out}/; the table: {name}")


def check_same_settings(
    result: dict[str, Any], options: argparse.Namespace, folder: Path, arm: str
) -> None:
    """Refuses to mix runs of different settings into one mean."""
    # --persistent is no setting of its own: it chooses others, which are compared.
    free = {"seed", "seeds", "out", "data_root", "no_merge", "tracker", "persistent"}
    if arm == "plain":
        free |= {"paper", *paper_settings()}
    for key, value in vars(options).items():
        # A run from before an argument was added used what is now its default.
        default = paper_settings().get(key, parser.get_default(key))
        before = result["settings"].get(key, str(default))
        if key not in free and before != str(value):
            raise SystemExit(
                f"{folder} holds a run with {key}={before}, not {value}: "
                "choose another folder with --out"
            )


if __name__ == "__main__":
    with one_line_if_out_of_memory():
        main()
