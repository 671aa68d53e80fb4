"""ChestX-ray14 with the paper's two phases: training, then fine-tuning with in-model merging.

    accelerate launch recipes/chestxray.py --data-root DIR
    accelerate launch recipes/chestxray.py --data-root DIR --arch densenet121 --no-merge   # CheXNet
    accelerate launch recipes/chestxray.py --dataset OWNER/NAME --revision COMMIT

``DIR`` is the NIH release as downloaded: ``images*/`` folders with the PNG files (those of
``images_001/images/`` are found as well), ``Data_Entry_2017*.csv``, ``train_val_list.txt`` and
``test_list.txt``. A data set of Hugging Face, from the hub or a folder, needs the splits train and
test, the columns image and label, and patients: a column Patient ID, or file names such as
00000061_012.png. Without a validation split, a tenth of the training patients is used for it. No
patient may be in two parts, which is checked. After each epoch the state is saved; ``--resume``
continues from it with the same settings.

Decoding 1024 px PNG files is slower than training on a GPU; each epoch prints the share of its time
spent waiting for images. ``--cache DIR`` decodes and resizes each image once (7.3 GB for all at
224 px) and reads the results from then on, with the same pixels.

Training is that of arXiv 2502.20516: SGD, lr 0.1 divided by 10 when the validation loss stalls
for 8 epochs, 30 epochs without and 10 with merging, from the best checkpoint of the first phase.
``--paper`` uses the paper's merging settings as well; the default is
``InMergeWrapper.recommended``, and ``--persistent`` that for merging that stays, which FSDP2 needs.
Ten more epochs help a network with or without merging:
``--control`` repeats the second phase without merging, from the same checkpoint with the same
images in the same order, and reports both.

Hardware: meant for GPUs (112,120 images of 1024 px); a small folder runs on a CPU with
``--size 64``. Expected: a mean AUROC around the .80 to .83 of the published systems that the table
lists. We have not run it on the whole data set.
"""

from __future__ import annotations

import argparse
import math
import shutil
import statistics
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from evaluation import evaluating
from merging_options import add_merging_arguments, merging_settings, parse_run
from nih import (
    FINDINGS,
    MEAN,
    STD,
    Part,
    Radiographs,
    Standardised,
    cached,
    images_per_second,
    read_dataset,
    read_release,
    resized_side,
)
from records import environment, write_json
from running import (
    Waited,
    add_run_arguments,
    one_line_if_out_of_memory,
    per_process,
    start,
)
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from tracking import merged_share

from inmerge_wrap import InMergeWrapper, Schedule, export_timm

# -- settings --------------------------------------------------------------------------------------

SHORT = "Atel Card Effu Infi Mass Nodu Pnma Pntx Cons Edem Emph Fibr P_T Hern".split()
PUBLISHED = {  # AUROC in the same order, then their mean, as the paper lists them
    "U-DCNN": ".700 .810 .759 .661 .693 .669 .658 .799 .703 .805 .833 .786 .684 .872 .745",
    "LSTM": ".733 .856 .806 .673 .718 .777 .684 .805 .711 .806 .842 .743 .724 .775 .761",
    "AGCL": ".756 .887 .819 .689 .814 .755 .729 .850 .728 .848 .906 .818 .765 .875 .803",
    "CheXNet": ".769 .885 .825 .694 .824 .759 .715 .852 .745 .842 .906 .821 .766 .901 .807",
    "DNet": ".767 .883 .828 .709 .821 .758 .731 .846 .745 .835 .895 .818 .761 .896 .807",
    "CRAL": ".781 .880 .829 .702 .834 .773 .729 .857 .754 .850 .908 .830 .778 .917 .816",
    "CAN": ".777 .894 .829 .696 .838 .771 .722 .862 .750 .846 .908 .827 .779 .934 .817",
    "DualCXN": ".784 .888 .831 .705 .838 .796 .727 .876 .746 .852 .942 .837 .796 .912 .823",
    "LLAGnet": ".783 .885 .834 .703 .841 .790 .729 .877 .754 .851 .939 .832 .798 .916 .824",
    "CheXGCN": ".786 .893 .832 .699 .840 .800 .739 .876 .751 .850 .944 .834 .795 .929 .826",
    "InMerge": ".805 .895 .881 .710 .842 .750 .770 .878 .801 .888 .915 .818 .773 .903 .830",
}

OFFICIAL_TEST_IMAGES = 25_596  # in the release's test_list.txt

# What may differ from the run that --resume continues.
FREE = {"resume", "out", "tracker", "workers", "cache", "time_loading", "data_root"}

AUROCs = dict[str, float | None]  # of each finding; None where it is undefined

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
source = parser.add_mutually_exclusive_group(required=True)
source.add_argument("--data-root", type=Path, help="the NIH release")
source.add_argument(
    "--dataset", help="a Hugging Face data set instead: a name on the Hub, or a folder"
)
parser.add_argument("--revision", help="commit of a --dataset on the Hub, 40 hex digits")
parser.add_argument("--cache", type=Path, help="folder of decoded images, created if needed")
parser.add_argument("--arch", default="resnet34", help="any timm CNN (default: %(default)s)")
parser.add_argument(
    "--weights",
    default="imagenet",
    help="imagenet (downloaded by timm), none, or a file of weights (default: %(default)s)",
)
parser.add_argument("--size", type=int, default=224, help="side of the centre crop, in pixels")
parser.add_argument(
    "--epochs",
    type=int,
    nargs=2,
    default=[30, 10],
    metavar=("PLAIN", "MERGED"),
    help="epochs of the two phases (default: 30 10)",
)
parser.add_argument(
    "--control",
    action="store_true",
    help="also train the second phase without merging, from the same checkpoint and in the same "
    "order",
)
parser.add_argument("--batch-size", type=int, default=324, help="total over all processes")
parser.add_argument(
    "--lr", type=float, default=0.1, help="initial learning rate (default: %(default)s)"
)
parser.add_argument("--weight-decay", type=float, default=1e-4, help="L2 penalty of SGD")
parser.add_argument("--workers", type=int, default=4, help="loader workers per process")
parser.add_argument(
    "--time-loading", type=int, default=0, metavar="N", help="time N batches of the loader first"
)
parser.add_argument(
    "--mixed-precision",
    default="no",
    choices=["no", "bf16", "fp16"],
    help="number format of the forward pass (default: float32)",
)
parser.add_argument("--seed", type=int, default=0, help="seed of split, network, order and merging")
parser.add_argument("--resume", action="store_true", help="continue from the last saved epoch")
parser.add_argument(
    "--out", type=Path, default=Path("runs/chestxray"), help="folder (default: %(default)s)"
)
add_run_arguments(parser)
add_merging_arguments(parser)


# -- data ------------------------------------------------------------------------------------------


def read_parts(options: argparse.Namespace) -> dict[str, Part]:
    if options.dataset:
        parts = read_dataset(options.dataset, options.revision, options.seed)
    else:
        parts = read_release(options.data_root, options.seed)
    if not options.cache:
        return parts
    source = str(Path(options.dataset or options.data_root).resolve())
    if options.revision:
        source = f"{options.dataset} {options.revision}"
    side, workers = resized_side(options.size), options.workers
    return {
        name: cached(part, options.cache / f"{name}.npy", source, side, workers)
        for name, part in parts.items()
    }


# -- model -----------------------------------------------------------------------------------------


def create_network(arch: str, weights: str) -> nn.Module:
    if weights == "none":
        return timm.create_model(arch, num_classes=len(FINDINGS))
    if weights == "imagenet":
        try:
            return timm.create_model(arch, num_classes=len(FINDINGS), pretrained=True)
        except Exception as error:  # hub, network and cache each raise their own errors
            raise SystemExit(
                f"the ImageNet weights of {arch} are not available ({type(error).__name__}): pass "
                "--weights FILE with a local copy, or --weights none"
            ) from error
    if not Path(weights).is_file():
        raise SystemExit(f"--weights {weights}: there is no such file")
    overlay = {"file": weights}
    return timm.create_model(
        arch, num_classes=len(FINDINGS), pretrained=True, pretrained_cfg_overlay=overlay
    )


# -- training and evaluation -----------------------------------------------------------------------


class Progress:
    """The settings and progress of a run; saved and loaded with Accelerate's state."""

    def __init__(self, run: dict[str, str]) -> None:
        self.run = run
        self.epoch, self.best_loss, self.history = 0, float("inf"), []  # type: ignore[var-annotated]

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def saved_epochs(folder: Path) -> list[Path]:
    """Returns the states that were saved completely, the newest last."""
    return sorted(folder.glob("epoch-*"))


def save(accelerator: Accelerator, folder: Path, epoch: int) -> None:
    """Saves the state of an epoch atomically, then deletes the previous one."""
    draft = folder / "draft"
    if accelerator.is_main_process:
        shutil.rmtree(draft, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(draft))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        older = saved_epochs(folder)
        draft.rename(folder / f"epoch-{epoch:04d}")
        for path in older:
            shutil.rmtree(path)
    accelerator.wait_for_everyone()


def keep_state(accelerator: Accelerator, states: Path, folder: Path) -> None:
    """Copies the newest state, which the next epoch would delete."""
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(saved_epochs(states)[-1], folder)
    accelerator.wait_for_everyone()


def go_back(accelerator: Accelerator, progress: Progress, folder: Path) -> None:
    """Loads a kept state, but not the progress of the run."""
    so_far = progress.state_dict()
    accelerator.load_state(str(folder))
    progress.load_state_dict(so_far)


def check_same_run(saved: Path, run: dict[str, str]) -> None:
    """Refuses to continue a run with other settings or images.

    Raises:
        SystemExit: If there are differences, each with both values.
    """
    # Progress is the first object that is registered for checkpointing.
    before = torch.load(saved / "custom_checkpoint_0.pkl")["run"]
    differences = [
        f"{key}={before.get(key)}, not {value}"
        for key, value in run.items()
        if key not in FREE and before.get(key) != value
    ]
    if differences:
        raise SystemExit(
            f"--resume: {saved} belongs to a run with {'; '.join(differences)}: "
            "pass the same settings, or start again with another --out"
        )


@torch.no_grad()
def predict(
    accelerator: Accelerator, model: nn.Module, loader: DataLoader, standardise: Standardised
) -> tuple[Tensor, Tensor]:
    """Returns the logits and labels of a whole part, on every process."""
    outputs = []
    with evaluating(model):
        for images, labels in loader:
            logits = model(standardise(images)).float()
            outputs.append([x.cpu() for x in accelerator.gather_for_metrics((logits, labels))])
    logits, labels = (torch.cat(column) for column in zip(*outputs, strict=True))
    return logits, labels


def aurocs(logits: Tensor, labels: Tensor) -> AUROCs:
    """Returns the AUROC of each finding; None where a part lacks positives or negatives."""
    values: AUROCs = {}
    for column, finding in enumerate(FINDINGS):
        target = labels[:, column].numpy()
        defined = 0 < target.sum() < len(target)
        values[finding] = float(roc_auc_score(target, logits[:, column])) if defined else None
    return values


def mean_of(values: AUROCs) -> float | None:
    """Returns the mean over the findings that have an AUROC."""
    known = [value for value in values.values() if value is not None]
    return sum(known) / len(known) if known else None


def print_tables(test_images: int, official: bool, rows: dict[str, AUROCs]) -> None:
    """Prints the AUROC of this run's networks and the published ones, apart if not comparable."""
    from rich.console import Console
    from rich.table import Table

    def cell(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}".lstrip("0")

    def table(title: str, **style: str) -> Table:
        empty = Table(title=title, **style)  # type: ignore[arg-type]
        empty.add_column("system")
        for heading in (*SHORT, "mean"):
            empty.add_column(heading, justify="right")
        return empty

    console = Console(width=140)
    own = table(f"AUROC on the {test_images:,} test images")
    comparable = official and test_images == OFFICIAL_TEST_IMAGES
    published = own
    if not comparable:
        published = table(
            f"NOT COMPARABLE with the above: published for the official {OFFICIAL_TEST_IMAGES:,} "
            "test images",
            style="dim",
        )
    for system, row in PUBLISHED.items():
        published.add_row(system, *row.split())
    own.add_section()
    for label, values in rows.items():
        own.add_row(label, *(cell(values[finding]) for finding in FINDINGS), cell(mean_of(values)))
    console.print(own)
    undefined = [finding for finding, value in values.items() if value is None]
    if undefined:
        print(
            f"No AUROC, and not in the mean, without positives or negatives: {', '.join(undefined)}"
        )
    if not comparable:
        console.print(published)


def main() -> None:
    options = parse_run(parser)
    if not options.no_merge and options.epochs[1] < 1:
        parser.error(f"--epochs {options.epochs[0]} 0 leaves no epoch that merges: pass --no-merge")
    plain_epochs, second_epochs = options.epochs
    if options.control and (options.no_merge or plain_epochs < 1):
        parser.error("--control compares two second phases: pass --epochs 1 1 or more, and merge")
    state, best_of_phase_1 = options.out / "state", options.out / "best-of-phase-1"
    end_of_phase_1 = options.out / "end-of-phase-1"
    # The second phase, after its control if there is one, and where the best network of each goes.
    branches = {"control": options.out / "best-control"} if options.control else {}
    branches["plain" if options.no_merge else "merged"] = options.out / "best"
    saved = saved_epochs(state)
    if options.resume and not saved:
        raise SystemExit(f"--resume: {state} holds no epoch: start again with another --out")
    used = [*saved, *branches.values(), best_of_phase_1, options.out / "results.json"]
    if not options.resume and any(path.exists() for path in used):
        raise SystemExit(
            f"{options.out} already holds a run: continue it with --resume, or choose another --out"
        )
    # The others wait while one process writes the cache, far longer than the default ten minutes.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=12))
    accelerator = start(
        options, "chestxray", mixed_precision=options.mixed_precision, kwargs_handlers=[patience]
    )
    batch_size = per_process(options.batch_size, accelerator.num_processes)
    with accelerator.local_main_process_first():  # one process of a machine downloads and writes
        parts = read_parts(options)
    # After that: the one process that writes a cache has used random numbers for its loader.
    set_seed(options.seed, deterministic=options.deterministic)
    accelerator.print({name: len(part) for name, part in parts.items()})
    settings = {key: str(value) for key, value in vars(options).items()}
    run = settings | {f"{name} images": str(len(part)) for name, part in parts.items()}
    if options.resume:
        check_same_run(saved[-1], run)
    loaders = {
        name: DataLoader(
            Radiographs(part, options.size, resized_side(options.size), train=name == "train"),
            batch_size=batch_size,
            shuffle=name == "train",
            drop_last=name == "train",
            num_workers=options.workers,
            persistent_workers=options.workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
        for name, part in parts.items()
    }
    if not len(loaders["train"]):
        raise SystemExit(f"--batch-size {options.batch_size} exceeds {len(parts['train'])} images")
    loading = None
    if options.time_loading:
        with torch.random.fork_rng(devices=[]):  # so that training does not change
            loading = images_per_second(loaders["train"], options.time_loading)
        accelerator.print(f"the loader of one process, alone: {loading:.0f} images/s")
    loaders = dict(zip(loaders, accelerator.prepare(*loaders.values()), strict=True))
    steps = len(loaders["train"])
    network = create_network(options.arch, options.weights)
    model = network
    if not options.no_merge:
        total_steps = (plain_epochs + second_epochs) * steps
        merging = merging_settings(options, total_steps, start=plain_epochs * steps)
        model = InMergeWrapper.recommended(
            network, total_steps=total_steps, seed=options.seed, **merging
        )
        accelerator.print(model.plan)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=options.lr,
        momentum=0.9,
        weight_decay=options.weight_decay,
        fused=True,
    )
    if isinstance(model, InMergeWrapper):
        model.attach(optimizer)
        schedule = model.schedule
        # What the wrapper counts is the same as in the merged phase, which it never reaches.
        never = Schedule(start=2 * total_steps)
    stall = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=8)
    model, optimizer = accelerator.prepare(model, optimizer)
    unwrapped = accelerator.unwrap_model(model)
    progress = Progress(run)
    accelerator.register_for_checkpointing(progress, stall)
    if options.resume:
        accelerator.load_state(str(saved[-1]))
    standardise, loss_function = Standardised(accelerator.device), nn.BCEWithLogitsLoss()
    began = time.perf_counter()
    for epoch in range(progress.epoch, plain_epochs + len(branches) * second_epochs):
        branch, since = divmod(max(0, epoch - plain_epochs), second_epochs or 1)
        name = list(branches)[branch]
        if isinstance(unwrapped, InMergeWrapper):
            unwrapped.schedule = never if name == "control" else schedule
        if epoch >= plain_epochs > 0 and since == 0:
            if branch == 0 and options.control:
                keep_state(accelerator, state, end_of_phase_1)
            elif branch > 0:
                go_back(accelerator, progress, end_of_phase_1)
            # The second phase starts from the best of the first, as in the paper.
            network.load_state_dict(load_file(best_of_phase_1 / "model.safetensors"))
            progress.best_loss = float("inf")
        model.train()
        loaders["train"].set_epoch(plain_epochs + since if epoch >= plain_epochs else epoch)
        waited, total_loss = Waited(loaders["train"]), torch.zeros((), device=accelerator.device)
        bar = tqdm(
            waited,
            desc=f"epoch {epoch + 1}",
            total=steps,
            disable=not accelerator.is_main_process,
        )
        epoch_began = time.perf_counter()
        for images, labels in bar:
            loss = loss_function(model(standardise(images)), labels)
            accelerator.backward(loss)
            total_loss += loss.detach()  # stays on the device: .item() would wait for each step
            optimizer.step()
            optimizer.zero_grad()
        train_loss = accelerator.reduce(total_loss, "mean").item() / steps
        epoch_seconds = time.perf_counter() - epoch_began
        logits, labels = predict(accelerator, model, loaders["val"], standardise)
        val_loss = loss_function(logits, labels).item()
        if not math.isfinite(val_loss):
            raise SystemExit(
                f"epoch {epoch + 1}: the validation loss is {val_loss}: start again with another "
                f"--out and an --lr below {options.lr:g}"
            )
        progress.epoch = epoch + 1
        figures = {
            "train_loss": train_loss,
            "val_loss": val_loss,
            "val_auroc": mean_of(aurocs(logits, labels)),
            "lr": optimizer.param_groups[0]["lr"],
            "images_per_second": steps * batch_size * accelerator.num_processes / epoch_seconds,
            "share_waiting": waited.seconds / epoch_seconds,
        }
        stall.step(val_loss)
        progress.history.append(figures)
        accelerator.print(f"epoch {epoch + 1}: {figures}")
        if options.tracker:
            shown = {key: value for key, value in figures.items() if value is not None}
            shown |= merged_share(unwrapped)
            accelerator.log(shown, step=epoch + 1)
        if val_loss < progress.best_loss:
            progress.best_loss = val_loss
            if accelerator.is_main_process:
                # Not the wrapper, which would warn each time of statistics that lag while merging
                # is on: this is the network whose loss was measured.
                export_timm(
                    network,
                    branches[name]
                    if epoch >= plain_epochs or not second_epochs
                    else best_of_phase_1,
                    input_size=(3, options.size, options.size),
                    mean=MEAN,
                    std=STD,
                    crop_pct=224 / 256,
                    interpolation="bilinear",
                    label_names=FINDINGS,
                )
        save(accelerator, state, epoch + 1)

    seconds = time.perf_counter() - began
    values: dict[str, AUROCs] = {}
    for name, folder in branches.items():
        network.load_state_dict(load_file(folder / "model.safetensors"))
        values[name] = aurocs(*predict(accelerator, model, loaders["test"], standardise))
    means = {name: mean_of(of_branch) for name, of_branch in values.items()}
    accelerator.end_training()
    if not accelerator.is_main_process:
        return
    result = {
        "settings": settings,
        "split": f"splits of {options.dataset}; without one, a tenth of train for validation"
        if options.dataset
        else "official test list; validation patients are a tenth of train_val_list.txt",
        "images": {name: len(part) for name, part in parts.items()},
        "images_per_second": statistics.median(x["images_per_second"] for x in progress.history),
        "share_waiting": statistics.median(x["share_waiting"] for x in progress.history),
        "loader_images_per_second": loading,
        "history": progress.history,
        "test_auroc": values[name],
        "test_mean_auroc": means[name],
        "seconds": seconds,
        "environment": environment(),
    }
    if isinstance(unwrapped, InMergeWrapper):
        report = unwrapped.report()
        print(report)
        result["merging"] = report.to_dict()
    if options.control:
        result["control_test_auroc"] = values["control"]
        result["control_test_mean_auroc"] = means["control"]
        shutil.rmtree(end_of_phase_1)
    write_json(options.out / "results.json", result)
    rows = {f"{options.arch}, {name}": of_branch for name, of_branch in values.items()}
    print_tables(len(parts["test"]), options.dataset is None, rows)
    if None not in means.values() and options.control:
        print(
            f"merged minus control, mean AUROC: {means['merged'] - means['control']:+.4f}, 1 pair"
        )
    print(f"Results: {options.out}/results.json; weights: {branches[name]}/")


if __name__ == "__main__":
    with one_line_if_out_of_memory():
        main()
